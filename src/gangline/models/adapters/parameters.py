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


def matrix_shape(module: nn.Module, path: str, stacked: bool = True) -> tuple[int, int]:
    """Return the shape of one expert's matrix in a parameter that is one matrix, or a stack of them.

    Raises:
        UnsupportedModelError: the parameter is quantized, or not of that form.
    """
    parameter = get_parameter(module, path)
    if not parameter.is_floating_point() or parameter.element_size() < 2:
        raise UnsupportedModelError(
            f"{type(module).__name__}.{path} holds quantized weights ({parameter.dtype}); "
            "load the model unquantized, and choose a precision in gangline"
        )
    if parameter.dim() != 2 + stacked:
        raise UnsupportedModelError(
            f"{type(module).__name__}.{path} has shape {tuple(parameter.shape)}, which is not "
            f"{'one matrix per expert' if stacked else 'a matrix'}; report the class to gangline"
        )
    return (int(parameter.shape[-2]), int(parameter.shape[-1]))


def set_parameter(module: nn.Module, path: str, value: Tensor | None) -> None:
    """Set the parameter; None frees it and removes its key from the state dict."""
    owner, name = _owner(module, path)
    before = owner._parameters.get(name)
    grad = bool(before is not None and before.requires_grad)
    owner._parameters[name] = None if value is None else nn.Parameter(value, requires_grad=grad)
