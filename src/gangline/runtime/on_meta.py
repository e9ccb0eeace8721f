"""Build modules on ``meta`` without torch's compiler.

There torch computes even a quotient with functions written in Python, and they import the compiler and the
symbolic algebra that it needs. A module that is built asks for little: it fills its
parameters, which have no bytes, and computes the frequencies of its positions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FILLS = {Tensor.fill_, Tensor.normal_, Tensor.random_, Tensor.uniform_, Tensor.zero_}
_ARITHMETIC = {
    Tensor.__add__,
    Tensor.__mul__,
    Tensor.__pow__,
    Tensor.__rmul__,
    Tensor.__rpow__,
    Tensor.__rtruediv__,
    Tensor.__truediv__,
    Tensor.div,
    Tensor.float,
    Tensor.reciprocal,
    torch.pow,
    torch.reciprocal,
}
# Elements up to which shape and type of a result are found by computing it, with any values, on the CPU.
_SMALL = 1 << 16
_COUNTS = {"start", "end", "step", "dtype", "device"}


class WithoutCompiler(TorchFunctionMode):
    """Give the same tensors on ``meta``; whatever is asked otherwise goes its usual way."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS or getattr(func, "__module__", None) == torch.nn.init.__name__:
            tensor = args[0] if args else kwargs.get("tensor")
            if _is_on_meta(tensor):
                return tensor
        elif func is torch.arange:
            if _is_small_count(args, kwargs):
                return func(*args, **{**kwargs, "device": "cpu"}).to("meta")
        elif func is torch.empty_like:
            if (
                args
                and _is_on_meta(args[0])
                and args[0].is_contiguous()
                and kwargs.keys() <= {"device", "dtype"}
            ):
                asked = {key: value for key, value in kwargs.items() if value is not None}
                return torch.empty(args[0].shape, **{"dtype": args[0].dtype, "device": "meta", **asked})
        elif func in _ARITHMETIC and not kwargs and args:
            tensors = [each for each in args if isinstance(each, Tensor)]
            if all(
                _is_on_meta(each) and each.numel() <= _SMALL and not each.requires_grad for each in tensors
            ):
                return func(*(_on_cpu(each) if isinstance(each, Tensor) else each for each in args)).to(
                    "meta"
                )
        return func(*args, **kwargs)


def _is_on_meta(value: Any) -> bool:
    return type(value) in (Tensor, torch.nn.Parameter) and value.is_meta


def _is_small_count(args: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether these are arguments for positions on ``meta`` that are soon counted."""
    if not kwargs.keys() <= _COUNTS or torch.device(kwargs.get("device") or "cpu").type != "meta":
        return False
    numbers = [*args, *(kwargs[key] for key in ("start", "end", "step") if key in kwargs)]
    return all(isinstance(each, int) and abs(each) <= _SMALL for each in numbers)


def _on_cpu(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
