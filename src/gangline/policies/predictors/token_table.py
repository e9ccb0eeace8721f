"""Token-id statistics as tensors, so that they can be saved like a network.

Shape suffixes: N token ids that were seen, E experts.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from gangline.policies.predictors.token_statistics import TokenStatistics


class TokenTable(nn.Module):
    """Counts by token id.

    Args:
        experts: routed experts of each layer.
        tokens: token ids that were seen.
        prior: as for :class:`TokenStatistics`.
    """

    tokens_N: Tensor

    def __init__(self, experts: Sequence[int], tokens: int, prior: float = 1.0) -> None:
        super().__init__()
        self.experts, self.prior = list(experts), prior
        self.register_buffer("tokens_N", torch.zeros(tokens, dtype=torch.int64))
        self.counts = nn.ParameterList(
            nn.Parameter(torch.zeros(tokens, count), requires_grad=False) for count in experts
        )

    @classmethod
    def of(cls, statistics: TokenStatistics) -> "TokenTable":
        """Return the counts of ``statistics``; a token that a layer has not seen counts 0 there."""
        tables = statistics.tables()
        seen_N = np.unique(np.concatenate([tokens for tokens, _ in tables]))
        found = cls(statistics.experts, len(seen_N), statistics.prior)
        found.tokens_N.copy_(torch.from_numpy(seen_N))
        for parameter, (tokens, counts) in zip(found.counts, tables, strict=True):
            parameter[torch.from_numpy(np.searchsorted(seen_N, tokens))] = torch.from_numpy(counts).float()
        return found

    @property
    def config(self) -> dict[str, object]:
        """The arguments that build a table of this size."""
        return {"experts": self.experts, "tokens": len(self.tokens_N), "prior": self.prior}

    def statistics(self, *, learn: bool = True) -> TokenStatistics:
        """Return a predictor that knows these counts."""
        found = TokenStatistics(self.experts, self.prior, learn=learn)
        for layer, counts_NE in enumerate(self.counts):
            found.restore(layer, self.tokens_N.numpy(), counts_NE.detach().numpy().astype(np.float64))
        return found
