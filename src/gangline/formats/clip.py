"""The scale of an integer group by clip search.

The scale that maps the largest magnitude to the end of the grid is seldom the best: a slightly smaller one
clips one weight and rounds all the others finer. Following "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers" (arXiv:2210.17323), whose code tries ``grid * maxshrink`` shrunk ranges
and keeps the one with the least ``sum |error|^norm``.

Four differences. Scales are scored as stored, rounded to fp16. A symmetric grid has one more negative code
than positive ones: where the weight of the largest magnitude is positive the scale is negative, so that this
weight always has the wider side (as in ggml's Q4_0). The scales that put it exactly on the last negative or
positive code are tried as well, so that weights which already lie on a grid come back unchanged. And where
that code has ``|error|^2.4``, an error ``d``, in steps of the scale without clipping, counts ``d^2 (1 + 2
d)``: between the square of small errors and the cube of large ones, locally a power of 2.33 at a quarter
step and of 2.5 at half a step. It needs only operations that every machine rounds alike (square roots and
powers in torch are none), summed in a fixed order, so that the native encoder finds the same scales, bit for
bit.

A group leaves the search where clipping its largest weight alone already costs more than its best scale so
far: this cannot change the result. The grid is half as fine as the 100 of that code, for half the time;
``tests/formats/test_clip.py`` bounds what that costs.

Shapes: N groups, L weights of a group (a multiple of 8).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gangline.core.errors import FormatError

GRID = 50
MAX_SHRINK = 0.8
# Smaller scales would be subnormal in fp16: imprecise, and flushed to zero by some hardware.
SMALLEST_SCALE = 2.0**-14
LARGEST_SCALE = 65504.0
# A candidate must win by more than the rounding noise of the scores, else the earlier one stays.
MARGIN = 1 - 1e-5
_LANES = 8


def plain_scale(peak_N: Tensor, bits: int) -> Tensor:
    """Symmetric scale without clipping, ``2 max|w| / (2^bits - 1)``, rounded to fp16, returned as fp32."""
    return _stored(peak_N, (2**bits - 1) / 2)


def search_scale(w_NL: Tensor, bits: int) -> Tensor:
    """The best symmetric scale of every group, fp32 holding fp16 values.

    It is negative where the weight of the largest magnitude is positive.

    Args:
        w_NL: weights, fp32.
        bits: width of the codes, which are ``round(w / scale)`` in ``[-2^(bits-1), 2^(bits-1))``.

    Raises:
        FormatError: a weight is nan or infinite, or too large for an fp16 scale.
    """
    low_N, high_N = torch.aminmax(w_NL, dim=1)
    sign_N = torch.where(high_N > -low_N, -1.0, 1.0)
    peak_N = torch.maximum(-low_N, high_N)
    _check(
        peak_N, 2 ** (bits - 1) - 1, f"a weight of magnitude {{:g}} is past {{:g}}, the most that int{bits}"
    )
    plain = (2**bits - 1) / 2
    exact = [float(2 ** (bits - 1)), float(2 ** (bits - 1) - 1)]
    floor_N = torch.full_like(peak_N, -(2 ** (bits - 1)))
    rest_N = torch.minimum(-low_N, high_N)
    groups = _Groups(w_NL.t() * sign_N, -peak_N, rest_N, peak_N, floor_N, floor_N + (2**bits - 1))
    return _search(groups, plain, sorted({*_shrunk(plain), *exact})).mul_(sign_N)


def search_range(w_NL: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The best scale of every group, fp32 holding fp16 values, and its zero point, fp32 in ``[0, 2^bits)``.

    The range is that of the weights and zero; the zero point is the code nearest to where zero lies in it,
    the same for every clipping. Codes are ``round(w / scale) + zero`` in ``[0, 2^bits)``.

    Args:
        w_NL: weights, fp32.
        bits: width of the codes.

    Raises:
        FormatError: a weight is nan or infinite, or the range too wide for an fp16 scale.
    """
    low_N, high_N = torch.aminmax(w_NL, dim=1)
    low_N, high_N = low_N.clamp(max=0), high_N.clamp(min=0)
    span_N = high_N - low_N
    plain = float(2**bits - 1)
    past = f"weights {{:g}} apart are past {{:g}}, the widest range that int{bits}"
    _check(span_N, 2**bits - 1, past)
    zero_N = (-low_N * _stored(span_N, plain).reciprocal_()).round_().clamp_(0, 2**bits - 1)
    groups = _Groups(w_NL.t().contiguous(), low_N, high_N, span_N, -zero_N, 2**bits - 1 - zero_N)
    return _search(groups, plain, _shrunk(plain)), zero_N


@dataclass(frozen=True)
class _Groups:
    """Groups side by side.

    Attributes:
        w_LN: weights.
        low_N, high_N: smallest and largest of them.
        span_N: what is divided by a number of steps to give a scale.
        floor_N, ceil_N: smallest and largest code, zero being 0.
    """

    w_LN: Tensor
    low_N: Tensor
    high_N: Tensor
    span_N: Tensor
    floor_N: Tensor
    ceil_N: Tensor

    def __getitem__(self, kept: Tensor) -> "_Groups":
        rest = (self.low_N, self.high_N, self.span_N, self.floor_N, self.ceil_N)
        return _Groups(self.w_LN.index_select(1, kept), *(part[kept] for part in rest))


def _search(groups: _Groups, plain: float, candidates: list[float]) -> Tensor:
    """The best of the scale at ``plain`` steps and those at the candidates' steps, in this order."""
    best_N = _stored(groups.span_N, plain)
    unit_N = scale_N = best_N.clone()
    least_N = _score(groups, scale_N, unit_N)
    live_N = torch.ones_like(least_N, dtype=torch.bool)
    active_A: Tensor | None = None
    for steps in candidates:
        candidate_N = _stored(groups.span_N, steps)
        live_N = live_N & (_clip_cost(groups, candidate_N, unit_N) < least_N)
        count = int(live_N.sum())
        if count == 0:
            break
        if 4 * count < 3 * live_N.numel():
            kept = live_N.nonzero().squeeze(1)
            active_A = kept if active_A is None else active_A[kept]
            groups = groups[kept]
            unit_N, scale_N, least_N, live_N, candidate_N = (
                part[kept] for part in (unit_N, scale_N, least_N, live_N, candidate_N)
            )
        score_N = _score(groups, candidate_N, unit_N)
        better_N = live_N & (score_N < least_N * MARGIN)
        scale_N = torch.where(better_N, candidate_N, scale_N)
        least_N = torch.where(better_N, score_N, least_N)
        if active_A is None:
            best_N = scale_N
        else:
            best_N[active_A] = scale_N
    return best_N


def _shrunk(plain: float) -> list[float]:
    """Steps of the grid onto which the range is laid, ascending: later ones clip more."""
    return [plain / (1 - i / GRID) for i in range(1, int(GRID * MAX_SHRINK))]


def _stored(span_N: Tensor, steps: float) -> Tensor:
    """``span / steps`` as fp16 keeps it, in fp32."""
    return (span_N / steps).clamp_(min=SMALLEST_SCALE).to(torch.float16).to(torch.float32)


def penalty(error: Tensor) -> Tensor:
    """What errors (not negative) count; changes ``error``."""
    cubic = error.mul(2).add_(1)
    return error.mul_(error).mul_(cubic)


def ordered_sum(x_LN: Tensor) -> Tensor:
    """Sum over L: element i is added to the sum ``i % 8``, then the eight sums are added in halves."""
    sums_8N, *rest = x_LN.view(-1, _LANES, x_LN.shape[1]).unbind(0)
    sums_8N = sums_8N.clone()
    for part_8N in rest:
        sums_8N += part_8N
    half = _LANES
    while half > 1:
        half //= 2
        sums_8N = sums_8N[:half] + sums_8N[half:]
    return sums_8N[0]


def _score(groups: _Groups, scale_N: Tensor, unit_N: Tensor) -> Tensor:
    """What the errors of every group count in all, with ``unit`` for one step."""
    x_LN = groups.w_LN * scale_N.reciprocal()
    error_LN = x_LN.round()
    torch.maximum(error_LN, groups.floor_N, out=error_LN)
    torch.minimum(error_LN, groups.ceil_N, out=error_LN)
    return ordered_sum(penalty(error_LN.sub_(x_LN).abs_().mul_(scale_N / unit_N)))


def _clip_cost(groups: _Groups, scale_N: Tensor, unit_N: Tensor) -> Tensor:
    """What clipping the smallest or the largest weight costs alone, a lower bound of the score.

    The operations are those of the score, so the bound holds after rounding too.
    """
    inverse_N = scale_N.reciprocal()
    under_N = groups.floor_N - groups.low_N * inverse_N
    over_N = groups.high_N * inverse_N - groups.ceil_N
    return penalty(torch.maximum(under_N, over_N).clamp_(min=0).mul_(scale_N / unit_N))


def _check(span_N: Tensor, steps: int, past: str) -> None:
    limit = LARGEST_SCALE * steps
    largest = float(span_N.max())
    if largest <= limit:
        return
    if not bool(torch.isfinite(span_N).all()):
        raise FormatError("the weights hold nan or infinite values; repair the checkpoint before encoding it")
    raise FormatError(
        f"{past.format(largest, limit)} codes with an fp16 scale hold; keep this matrix in fp32"
    )
