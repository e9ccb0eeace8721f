"""Sort (token, slot) pairs by expert, and add the experts' outputs up in ascending expert id.

Shape suffixes: T tokens, K chosen experts per token, P real pairs (P <= T*K), N pairs of one expert, D
hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
    """

    experts: tuple[int, ...]
    starts: tuple[int, ...]
    token_P: Tensor
    weight_P1: Tensor

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens per expert."""
        return tuple(b - a for a, b in zip(self.starts, self.starts[1:], strict=False))

    def tokens(self, index: int) -> Tensor:
        """Return the tokens ``[N]`` of the expert at ``index`` of ``experts``, ascending."""
        return self.token_P[self.starts[index] : self.starts[index + 1]]

    def part(self, first: int, last: int) -> "Grouping":
        """Return the pairs of the experts ``first:last`` of ``experts`` as a grouping of their own."""
        begin, end = self.starts[first], self.starts[last]
        return Grouping(
            self.experts[first:last],
            tuple(start - begin for start in self.starts[first : last + 1]),
            self.token_P[begin:end],
            self.weight_P1[begin:end],
        )

    def only(self, indices: Sequence[int]) -> "Grouping":
        """Return the pairs of the experts at ascending ``indices`` of ``experts`` as a grouping of their
        own.
        """
        if len(indices) == len(self.experts):
            return self
        bounds = [(self.starts[index], self.starts[index + 1]) for index in indices]
        starts = [0]
        for begin, end in bounds:
            starts.append(starts[-1] + end - begin)
        return Grouping(
            tuple(self.experts[index] for index in indices),
            tuple(starts),
            torch.cat([self.token_P[:0], *(self.token_P[begin:end] for begin, end in bounds)]),
            torch.cat([self.weight_P1[:0], *(self.weight_P1[begin:end] for begin, end in bounds)]),
        )

    def add(self, index: int, y_ND: Tensor, out_TD: Tensor) -> None:
        """Add one expert's weighted output to ``out_TD`` (fp32).

        Called in the order of ``experts``, it sums each token's experts in ascending id, whatever the number
        of tokens and wherever the experts lie.
        """
        weight_N1 = self.weight_P1[self.starts[index] : self.starts[index + 1]]
        out_TD.index_add_(0, self.tokens(index), y_ND.float() * weight_N1)


Adder = Callable[[Tensor, Grouping, Sequence[Any], Tensor], None]
"""Adds weighted outputs of pairs to their tokens' sums, in the order of the pairs: called with the rows
``x_TD``, the pairs, the bound weights of their experts, and the sums ``out_TD`` (fp32)."""


def group_by_expert(ids_TK: Tensor, weights_TK: Tensor, experts: int) -> Grouping:
    """Group pairs by expert. Ids outside ``[0, experts)`` are sentinels ("not mine") and are dropped."""
    if len(ids_TK) == 1:
        return _group_one_token(ids_TK[0].tolist(), weights_TK, experts)
    width = ids_TK.shape[1]
    flat = ids_TK.reshape(-1)
    key = torch.where((flat >= 0) & (flat < experts), flat, experts)
    order = torch.argsort(key, stable=True)
    ids, counts = torch.unique_consecutive(key[order], return_counts=True)
    id_list, count_list = ids.tolist(), counts.tolist()
    if id_list and id_list[-1] == experts:
        id_list.pop()
        count_list.pop()
    starts = [0]
    for count in count_list:
        starts.append(starts[-1] + count)
    chosen = order[: starts[-1]]
    return Grouping(
        experts=tuple(id_list),
        starts=tuple(starts),
        token_P=chosen // width,
        weight_P1=weights_TK.reshape(-1)[chosen].float().unsqueeze(-1),
    )


def _group_one_token(ids: list[int], weights_1K: Tensor, experts: int) -> Grouping:
    """The same for one token, whose few ids are sorted sooner than torch is called."""
    order = sorted((k for k in range(len(ids)) if 0 <= ids[k] < experts), key=ids.__getitem__)
    starts = [n for n, k in enumerate(order) if n == 0 or ids[k] != ids[order[n - 1]]]
    device = weights_1K.device
    chosen = torch.tensor(order, dtype=torch.long, device=device)
    return Grouping(
        experts=tuple(ids[order[start]] for start in starts),
        starts=(*starts, len(order)),
        token_P=torch.zeros(len(order), dtype=torch.long, device=device),
        weight_P1=weights_1K[0, chosen].float().unsqueeze(-1),
    )
