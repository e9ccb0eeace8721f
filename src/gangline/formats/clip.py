"""The scale of a symmetric integer group by clip search.

The scale that maps the largest magnitude to the end of the grid is seldom the best: a slightly smaller one
clips one weight and rounds all the others finer. Following "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers" (arXiv:2210.17323), whose code tries ``grid * maxshrink`` shrunk ranges
and keeps the one with the least ``sum |error|^norm``.

Two differences. Scales are scored as stored, rounded to fp16; and the scales that put the largest weight
exactly on the last negative or positive code are tried as well, so that weights which already lie on a grid
come back unchanged. The search ends early where clipping the largest weight alone already costs more than the
best scale so far: this cannot change the result. The grid is half as fine as the 100 of that code, for half
the time; ``tests/formats/test_clip.py`` bounds what that costs.

Shapes: N groups, L weights of a group.
"""

import torch
from torch import Tensor

from gangline.core.errors import FormatError

NORM = 2.4
GRID = 50
MAX_SHRINK = 0.8
# Smaller scales would be subnormal in fp16: imprecise, and flushed to zero by some hardware.
SMALLEST_SCALE = 2.0**-14
LARGEST_SCALE = 65504.0
# A candidate must win by more than the rounding noise of the scores, else the earlier one stays.
_MARGIN = 1 - 1e-5


def plain_scale(peak_N: Tensor, bits: int) -> Tensor:
    """Scale without clipping, ``2 max|w| / (2^bits - 1)``, rounded to fp16 and returned as fp32."""
    return _stored(peak_N, (2**bits - 1) / 2)


def search_scale(w_NL: Tensor, bits: int) -> Tensor:
    """The best scale of every group, fp32 holding fp16 values.

    Args:
        w_NL: weights, fp32.
        bits: width of the codes.

    Raises:
        FormatError: a weight is nan or infinite, or too large for an fp16 scale.
    """
    low_N, high_N = torch.aminmax(w_NL, dim=1)
    peak_N = torch.maximum(-low_N, high_N)
    _check_peak(peak_N, bits)
    best_N = plain_scale(peak_N, bits)
    unit_N = best_N.clone()
    error_N = _score(w_NL, best_N, unit_N, bits)
    scale_N, least_N = best_N, error_N
    active_A: Tensor | None = None
    for steps in _candidates(bits):
        candidate = _stored(peak_N, steps)
        hopeful = _clip_cost(low_N, high_N, candidate, unit_N, bits) < least_N
        if not bool(hopeful.any()):
            break
        if 4 * int(hopeful.sum()) < 3 * hopeful.numel():
            kept = hopeful.nonzero().squeeze(1)
            active_A = kept if active_A is None else active_A[kept]
            w_NL, low_N, high_N, peak_N, unit_N, scale_N, least_N, candidate = (
                part[kept] for part in (w_NL, low_N, high_N, peak_N, unit_N, scale_N, least_N, candidate)
            )
        score = _score(w_NL, candidate, unit_N, bits)
        better = score < least_N * _MARGIN
        scale_N = torch.where(better, candidate, scale_N)
        least_N = torch.where(better, score, least_N)
        if active_A is None:
            best_N = scale_N
        else:
            best_N[active_A] = scale_N
    return best_N


def _candidates(bits: int) -> list[float]:
    """Steps of the grid onto which the largest magnitude is laid, ascending: later ones clip more."""
    plain = (2**bits - 1) / 2
    shrunk = [plain / (1 - i / GRID) for i in range(1, int(GRID * MAX_SHRINK))]
    exact = [float(2 ** (bits - 1)), float(2 ** (bits - 1) - 1)]
    return sorted({*shrunk, *exact})


def _stored(peak_N: Tensor, steps: float) -> Tensor:
    """``peak / steps`` as fp16 keeps it, in fp32."""
    return (peak_N / steps).clamp_(min=SMALLEST_SCALE).to(torch.float16).to(torch.float32)


def _score(w_NL: Tensor, scale_N: Tensor, unit_N: Tensor, bits: int) -> Tensor:
    """``sum |w_hat - w|^norm`` of every group, in units of ``unit^norm`` so that nothing underflows."""
    x_NL = w_NL / scale_N[:, None]
    error_NL = x_NL.round().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).sub_(x_NL).abs_()
    # exp2(log2) takes about half the time of pow; zero becomes -inf and zero again.
    powered_NL = error_NL.log2_().mul_(NORM).exp2_()
    return powered_NL.sum(1).mul_((scale_N / unit_N).pow_(NORM))


def _clip_cost(low_N: Tensor, high_N: Tensor, scale_N: Tensor, unit_N: Tensor, bits: int) -> Tensor:
    """What clipping the smallest or the largest weight costs alone, a lower bound of the score."""
    under_N = -low_N / scale_N - 2 ** (bits - 1)
    over_N = high_N / scale_N - (2 ** (bits - 1) - 1)
    return torch.maximum(under_N, over_N).clamp_(min=0).mul_(scale_N / unit_N).pow_(NORM)


def _check_peak(peak_N: Tensor, bits: int) -> None:
    if not bool(torch.isfinite(peak_N).all()):
        raise FormatError("the weights hold nan or infinite values; repair the checkpoint before encoding it")
    limit = LARGEST_SCALE * (2 ** (bits - 1) - 1)
    if bool((peak_N > limit).any()):
        raise FormatError(
            f"a weight of magnitude {float(peak_N.max()):g} is past {limit:g}, the most that int{bits} codes "
            "with an fp16 scale hold; keep this matrix in fp32"
        )
