"""One matrix under the pattern, by each of the methods.

``magnitude``: the largest weights; no text is needed. ``wanda``: the largest ``|w| * rms(x)`` (A Simple and
Effective Pruning Approach for Large Language Models, arXiv 2306.11695), with the inputs that the expert
really gets, weighted by the square of their routing weight; ours compares within groups and sub-rows, not
within whole rows, because the pattern does. ``sparsegpt``: ``obs.py``. ``alps``: ``admm.py``.
"""

from torch import Tensor

from gangline.compress.sparsify.admm import prune_admm
from gangline.compress.sparsify.moments import Moments
from gangline.compress.sparsify.obs import prune_obs
from gangline.compress.sparsify.settings import Method
from gangline.formats.samoyeds_pattern import SparsePattern, keep_mask


def saliency(weight_OI: Tensor, moments: Moments | None) -> Tensor:
    """What each weight is worth without correction: ``|w|``, with inputs ``|w| * rms(x)``."""
    size_OI = weight_OI.abs()
    return size_OI if moments is None else size_OI * moments.norm_I


def prune(weight_OI: Tensor, pattern: SparsePattern, method: Method, moments: Moments | None) -> Tensor:
    """The matrix (fp32) with the pattern's zeros; ``moments`` may be None for ``magnitude`` only."""
    if method == "magnitude":
        return weight_OI.masked_fill(~keep_mask(saliency(weight_OI, None), pattern), 0)
    assert moments is not None
    if method == "wanda":
        return weight_OI.masked_fill(~keep_mask(saliency(weight_OI, moments), pattern), 0)
    if method == "sparsegpt":
        return prune_obs(weight_OI, moments, pattern)
    return prune_admm(weight_OI, moments, pattern)
