"""Read, forget and set a parameter by its dotted path below a module."""

from torch import Tensor, nn

from gangline.core.errors import UnsupportedModelError


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    prefix, _, name = path.rpartition(".")
    return module.get_submodule(prefix), name


def get_parameter(module: nn.Module, path: str) -> Tensor:
    """Return the parameter.

    Raises:
        UnsupportedModelError: the module has no such parameter, or its bytes were taken over already.
    """
    owner, name = _owner(module, path)
    parameter = owner._parameters.get(name)
    if parameter is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no parameter {path}; "
            "if gangline is attached to this model, detach it first"
        )
    return parameter


def set_parameter(module: nn.Module, path: str, value: Tensor | None) -> None:
    """Set the parameter; None frees it and removes its key from the state dict."""
    owner, name = _owner(module, path)
    before = owner._parameters.get(name)
    grad = bool(before is not None and before.requires_grad)
    owner._parameters[name] = None if value is None else nn.Parameter(value, requires_grad=grad)
