"""Which of the native core's gate formulas a module computes, found out by trying it.

Shape suffixes: N rows, F intermediate, G columns of the gate/up product (2F or F).
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gangline.kernels.reference import ExpertMath

_log = logging.getLogger(__name__)

_ROWS = 24
_SCALES = (0.1, 1.0, 4.0, 12.0, 50.0)
# Below any sensible limit, and beyond.
_SMALL, _HUGE = 0.25, 1e6
# A limit or a slope is a number that someone typed: few decimals.
_DECIMALS = 4
_RELATIVE, _ABSOLUTE = 2e-6, 4e-7


@dataclass(frozen=True)
class GateForm:
    """A formula of the native core.

    ``h = act(gate) * (up + shift)``, or ``h = act(up)`` without a gate matrix; ``silu(x) = x sigmoid(alpha
    x)``.

    Attributes:
        name: the native core's name: an activation, ``swiglu_oai`` (silu with shift 1), behind ``plain:`` if
            there is no gate matrix, before ``:late`` if the limit applies after the activation.
        alpha: slope of silu's sigmoid.
        limit: bound of gate (from above) and up (both sides); infinity if there is none.
    """

    name: str
    alpha: float = 1.0
    limit: float = math.inf


_ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "silu": lambda x, alpha: x * torch.sigmoid(alpha * x),
    # Without the cancellation of 1 + erf and 1 + tanh.
    "gelu": lambda x, alpha: x * torch.special.erfc(x * -math.sqrt(0.5)) * 0.5,
    "gelu_tanh": lambda x, alpha: x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
    "relu": lambda x, alpha: x.relu(),
    "relu2": lambda x, alpha: x.relu().square(),
    "identity": lambda x, alpha: x,
}


def recognise_gate(expert_math: ExpertMath, intermediate: int, *, gated: bool) -> GateForm | None:
    """Return the formula that ``apply_gate`` computes, or None if it is none that the native core knows.

    The module is called in fp32 on random rows from small to far beyond any limit, and must agree with a
    formula computed in fp64 to fp32's accuracy.

    Args:
        expert_math: holds the function and its column order.
        intermediate: F; the module is called with rows of its real width.
        gated: whether there is a gate matrix (rows of 2F instead of F).
    """
    try:
        candidates = _gated_forms(expert_math) if gated else _plain_forms(expert_math)
        return next((form for form in candidates if _agrees(form, expert_math, intermediate, gated)), None)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        _log.info("the gate function does not take plain fp32 rows (%s): torch will compute it", error)
        return None


def formula(form: GateForm, gate_NF: Tensor | None, up_NF: Tensor) -> Tensor:
    """Compute ``h_NF`` by a form with torch, in the dtype of its arguments; ``gate_NF`` None if not gated."""
    name = form.name.removeprefix("plain:").removesuffix(":late")
    shift = 1.0 if name == "swiglu_oai" else 0.0
    activation = _ACTIVATIONS["silu" if name == "swiglu_oai" else name]
    if gate_NF is None:
        return activation(up_NF, form.alpha)
    if math.isinf(form.limit):
        return activation(gate_NF, form.alpha) * (up_NF + shift)
    up_NF = up_NF.clamp(-form.limit, form.limit)
    if form.name.endswith(":late"):
        return activation(gate_NF, form.alpha).clamp(max=form.limit) * (up_NF + shift)
    return activation(gate_NF.clamp(max=form.limit), form.alpha) * (up_NF + shift)


def _gated_forms(expert_math: ExpertMath) -> list[GateForm]:
    def at(gate: float, up: float) -> float:
        return float(_call(expert_math, torch.full((1, 2), gate), torch.full((1, 2), up))[0, 0])

    at_zero, at_small = at(_SMALL, 0.0), at(_SMALL, _SMALL)
    slope = (at_small - at_zero) / _SMALL  # act(_SMALL)
    if not (math.isfinite(slope) and slope > 0):
        return []
    shift = at_zero / slope
    limit = at(_SMALL, _HUGE) / slope - shift
    limit = math.inf if not limit < _HUGE / 2 else round(limit, _DECIMALS)
    if limit <= 0:
        return []
    if abs(shift - 1.0) < 1e-4:
        names = ["swiglu_oai"]
    elif abs(shift) < 1e-4:
        names = list(_ACTIVATIONS)
    else:
        return []
    ends = ("",) if math.isinf(limit) else ("", ":late")
    alpha = _silu_slope(at_zero if shift > 0.5 else slope)
    return [GateForm(name + end, _slope_of(name, alpha), limit) for name in names for end in ends]


def _plain_forms(expert_math: ExpertMath) -> list[GateForm]:
    alpha = _silu_slope(float(_call(expert_math, None, torch.full((1, 2), _SMALL))[0, 0]))
    return [GateForm(f"plain:{name}", _slope_of(name, alpha)) for name in _ACTIVATIONS]


def _slope_of(name: str, alpha: float) -> float:
    return alpha if name in ("silu", "swiglu_oai") else 1.0


def _silu_slope(at_small: float) -> float:
    """Alpha if ``sigmoid(alpha * _SMALL) * _SMALL == at_small``; 1 where the activation cannot be silu."""
    sigmoid = at_small / _SMALL
    if not 0.0 < sigmoid < 1.0:
        return 1.0
    return round(math.log(sigmoid / (1.0 - sigmoid)) / _SMALL, _DECIMALS) or 1.0


def _agrees(form: GateForm, expert_math: ExpertMath, intermediate: int, gated: bool) -> bool:
    random = torch.Generator().manual_seed(20240613)
    shape = (_ROWS, intermediate)
    scale_N1 = torch.tensor(_SCALES).repeat(_ROWS // len(_SCALES) + 1)[:_ROWS, None]
    up_NF = torch.randn(shape, generator=random) * scale_N1
    gate_NF = torch.randn(shape, generator=random) * scale_N1.flip(0) if gated else None
    rows_NF = up_NF if gate_NF is None else gate_NF
    got_NF = _call(expert_math, gate_NF, up_NF).double()
    want_NF = formula(form, None if gate_NF is None else gate_NF.double(), up_NF.double())
    if got_NF.shape != want_NF.shape:
        return False
    # fp32 loses what an activation cancels: gelu's tail is only as good as the argument itself.
    room_NF = rows_NF.abs() * (up_NF.abs() + 1 if gated else 1)
    return bool(((got_NF - want_NF).abs() <= _RELATIVE * want_NF.abs() + _ABSOLUTE * room_NF).all())


def _call(expert_math: ExpertMath, gate_NF: Tensor | None, up_NF: Tensor) -> Tensor:
    with torch.no_grad():
        if gate_NF is None:
            return expert_math.apply_gate(up_NF)
        if expert_math.interleaved:
            return expert_math.apply_gate(torch.stack((gate_NF, up_NF), dim=-1).flatten(-2))
        return expert_math.apply_gate(torch.cat((gate_NF, up_NF), dim=-1))
