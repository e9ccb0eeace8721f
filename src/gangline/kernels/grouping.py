"""Sort (token, slot) pairs by expert, and sum the experts' outputs back in ascending expert id.

Shape suffixes: T tokens, K chosen experts per token, P real pairs (P <= T*K), D hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Grouping:
    """The pairs of one routing event, sorted by expert and then by token.

    Attributes:
        experts: distinct expert ids, ascending.
        starts: first pair of each expert; one more entry closes the last (length ``len(experts) + 1``).
        token_P: token of each pair.
        weight_P1: mixing weight of each pair.
        slot_TK: for each token its pairs in ascending expert id; P (one past the end) marks an empty slot.
    """

    experts: tuple[int, ...]
    starts: tuple[int, ...]
    token_P: Tensor
    weight_P1: Tensor
    slot_TK: Tensor

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens per expert."""
        return tuple(b - a for a, b in zip(self.starts, self.starts[1:], strict=False))


def group_by_expert(ids_TK: Tensor, weights_TK: Tensor, experts: int) -> Grouping:
    """Group pairs by expert. Ids outside ``[0, experts)`` are sentinels ("not mine") and are dropped."""
    tokens, width = ids_TK.shape
    flat = ids_TK.reshape(-1)
    key = torch.where((flat >= 0) & (flat < experts), flat, experts)
    order = torch.argsort(key, stable=True)
    sorted_ids = key[order]
    ids, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
    id_list, count_list = ids.tolist(), counts.tolist()
    if id_list and id_list[-1] == experts:
        id_list.pop()
        count_list.pop()
    starts = [0]
    for count in count_list:
        starts.append(starts[-1] + count)
    pairs = starts[-1]
    position = torch.full_like(order, pairs)
    position[order[:pairs]] = torch.arange(pairs)
    return Grouping(
        experts=tuple(id_list),
        starts=tuple(starts),
        token_P=order[:pairs] // width,
        weight_P1=weights_TK.reshape(-1)[order[:pairs]].unsqueeze(-1),
        slot_TK=position.view(tokens, width).sort(dim=-1).values,
    )


def combine(y_PD: Tensor, grouping: Grouping, out_dtype: torch.dtype) -> Tensor:
    """Return ``[T, D]``: per token the weighted sum of its experts' outputs, in ascending expert id, in fp32.

    ``y_PD`` has ``P + 1`` rows; the last one is zero and stands for empty slots.
    """
    y_PD[:-1] *= grouping.weight_P1
    y_PD[-1] = 0
    slot_TK = grouping.slot_TK
    out_TD = y_PD[slot_TK[:, 0]]
    for k in range(1, slot_TK.shape[1]):
        out_TD += y_PD[slot_TK[:, k]]
    return out_TD.to(out_dtype)
