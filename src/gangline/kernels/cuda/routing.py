"""Sort (token, slot) pairs by expert without a word to the host: by torch, or a few pairs by one kernel.

The same order as ``kernels/grouping.py``, which needs the counts on the host; here they stay on the device,
and kernels find their expert in ``starts`` and ``tiles``.

Shape suffixes: T tokens, K chosen experts per token, P = T K pairs, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gangline.kernels.cuda.compiler import KernelBuild
from gangline.kernels.cuda.launcher import Launch, Launcher

_ROUTE = KernelBuild("route.cu", "gangline_route")
_ROUTE_THREADS = 512
# Every pair is compared with every other, in one block.
_FEW_PAIRS = 1024


@dataclass(frozen=True)
class DeviceRouting:
    """The pairs of one routing event, sorted by expert and then by token.

    Attributes:
        starts: ``[E + 1]``, int32: first pair of each expert; the last entry is the number of real pairs.
        token_P: int32, token of each pair; past the real pairs those of ids outside ``[0, E)``.
        pair_TK: int32, the pairs of each token, ascending, that is in ascending expert id.
        weight_TK: fp32, mixing weights in the order of ``pair_TK``.
    """

    starts: Tensor
    token_P: Tensor
    pair_TK: Tensor
    weight_TK: Tensor


def route_on_device(ids_TK: Tensor, weights_TK: Tensor, experts: int) -> DeviceRouting:
    """Sort pairs by expert. Ids outside ``[0, experts)`` ("not mine") come last and count for nothing."""
    flat = ids_TK.reshape(-1)
    key = torch.where((flat >= 0) & (flat < experts), flat, experts)
    order = torch.argsort(key, stable=True)
    edges = torch.arange(experts + 1, device=key.device, dtype=key.dtype)
    starts = torch.searchsorted(key[order], edges).to(torch.int32)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    pair_TK, by_expert = place.view(ids_TK.shape).sort(dim=1)
    return DeviceRouting(
        starts=starts,
        token_P=(order // ids_TK.shape[1]).to(torch.int32),
        pair_TK=pair_TK.to(torch.int32),
        weight_TK=weights_TK.float().gather(1, by_expert),
    )


def route_few(
    ids_TK: Tensor, weights_TK: Tensor, experts: int, tokens: int, launcher: Launcher
) -> tuple[DeviceRouting, Tensor] | None:
    """The same by one small kernel, which matters where a layer takes microseconds; None for many pairs.

    Args:
        ids_TK: int64.
        weights_TK: mixing weights.
        experts: E.
        tokens: pairs of a tile.
        launcher: starts the kernel.

    Returns:
        The routing, and what :func:`token_tiles` says of it.
    """
    pairs = ids_TK.numel()
    if not 0 < pairs <= _FEW_PAIRS or experts > _FEW_PAIRS:
        return None
    ids, weights = ids_TK.to(torch.int64).contiguous(), weights_TK.float().contiguous()
    starts, tiles = ids.new_empty(2, experts + 1, dtype=torch.int32)
    token_P = ids.new_empty(pairs, dtype=torch.int32)
    pair_TK, weight_TK = torch.empty_like(ids, dtype=torch.int32), torch.empty_like(weights)
    launcher(
        Launch(_ROUTE, (1, 1), _ROUTE_THREADS, 4 * (2 * pairs + experts + 1)),
        (ids, weights, starts, tiles, token_P, pair_TK, weight_TK, pairs, ids_TK.shape[1], experts, tokens),
    )
    return DeviceRouting(starts, token_P, pair_TK, weight_TK), tiles


def token_tiles(starts: Tensor, tokens: int) -> Tensor:
    """First tile of ``tokens`` pairs of each expert, ``[E + 1]`` int32; the last entry is their number."""
    counts = starts.diff()
    tiles = torch.zeros_like(starts)
    tiles[1:] = torch.div(counts + tokens - 1, tokens, rounding_mode="floor").cumsum(0)
    return tiles


def most_tiles(pairs: int, experts: int, tokens: int) -> int:
    """A bound of the number of tiles, whatever the counts are."""
    used = min(pairs, experts)
    return (pairs + used * (tokens - 1)) // tokens
