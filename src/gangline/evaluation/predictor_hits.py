"""How often a predictor names the experts that the router then chooses, beside what needs no training.

Legend: T tokens of one document, K chosen experts per token, E experts.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from gangline.evaluation.predictor_data import RoutedText, embed
from gangline.evaluation.predictor_training import count_tokens

Scorer = Callable[[RoutedText], Sequence[Tensor | None]]
"""Returns for each layer scores ``[T, E]``, or None where the predictor says nothing of the layer."""


@dataclass(frozen=True)
class LayerHits:
    """One layer, as shares of its tokens.

    Attributes:
        layer: index among the predicted layers.
        top1: the router's first choice is the predictor's first. topk: it is among its first ``top``.
        recall: share of the K chosen experts among the predictor's first K.
    """

    layer: int
    top1: float
    topk: float
    recall: float


@dataclass(frozen=True)
class Hits:
    """One predictor.

    Attributes:
        name: of the predictor.
        top: the k of ``topk``.
        tokens: that were predicted.
        layers: one entry for each layer that it speaks of.
    """

    name: str
    top: int
    tokens: int
    layers: tuple[LayerHits, ...]

    def mean(self, metric: str) -> float:
        """Return the mean of a metric over layers."""
        return statistics.fmean(getattr(layer, metric) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        means = {metric: self.mean(metric) for metric in ("top1", "topk", "recall")}
        return asdict(self) | {"mean": means}


def measure_hits(
    scorers: Mapping[str, Scorer], documents: Sequence[RoutedText], *, top: int = 3
) -> list[Hits]:
    """Score every predictor on the same documents.

    Args:
        scorers: by name.
        documents: which no scorer has learnt from.
        top: the k of the paper's top-k hash hit rate.
    """
    found = []
    for name, scorer in scorers.items():
        sums: dict[int, Tensor] = {}
        counts: dict[int, int] = {}
        for document in documents:
            for layer, scores_TE in enumerate(scorer(document)):
                if scores_TE is None:
                    continue
                hits, tokens = _hits(scores_TE, document.chosen[layer], top)
                sums[layer] = sums.get(layer, torch.zeros(3)) + hits
                counts[layer] = counts.get(layer, 0) + tokens
        layers = tuple(
            LayerHits(layer, *(sums[layer] / max(1, counts[layer])).tolist()) for layer in sorted(sums)
        )
        found.append(Hits(name, top, max(counts.values(), default=0), layers))
    return found


def _hits(scores_TE: Tensor, chosen_TK: Tensor, top: int) -> tuple[Tensor, int]:
    """Return sums over tokens of top-1, top-k and recall; tokens whose expert was full are left out."""
    there_T = (chosen_TK >= 0).all(dim=1)
    scores_TE, chosen_TK = scores_TE[there_T], chosen_TK[there_T]
    k = chosen_TK.shape[1]
    ranked_TN = scores_TE.topk(min(max(top, k), scores_TE.shape[1]), dim=1).indices
    first_TN = ranked_TN == chosen_TK[:, :1]
    recalled_TK = (ranked_TN[:, None, :k] == chosen_TK[:, :, None]).any(dim=2)
    sums = (
        first_TN[:, :1].any(1).sum(),
        first_TN[:, :top].any(1).sum(),
        recalled_TK.float().mean(1).sum(),
    )
    return torch.stack([value.float() for value in sums]), len(chosen_TK)


def network_scorer(kind: str, network: Any, model: Any) -> Scorer:
    """Return what a trained network says of a document that it reads as a whole.

    A causal network says of each token what it would say while the text is being written.
    """

    @torch.no_grad()
    def scores(document: RoutedText) -> Sequence[Tensor | None]:
        ids_1T = document.ids_T.unsqueeze(0)
        if kind == "sida":
            return [z_1TE[0] for z_1TE in network(embed(model, ids_1T))]
        if kind == "pre-gate":
            assert document.inputs is not None
            return [None, *(network(b, x_TD) for b, x_TD in enumerate(document.inputs[:-1]))]
        if kind == "token-id":
            return by_token(network.statistics(learn=False))(document)
        return list(network(ids_1T)[0].unbind(1))

    return scores


def by_token(table: Any) -> Scorer:
    """Return what token-id statistics say."""

    def scores(document: RoutedText) -> Sequence[Tensor]:
        distinct, place_T = document.ids_T.unique(return_inverse=True)
        out = []
        for layer in range(len(document.chosen)):
            rows = [torch.from_numpy(table.share(layer, token)) for token in distinct.tolist()]
            out.append(torch.stack(rows)[place_T])
        return out

    return scores


def baselines(learnt: Sequence[RoutedText], experts: Sequence[int]) -> dict[str, Scorer]:
    """Return the scorers that any predictor must beat: frequency, token ids, and the token before.

    Args:
        learnt: documents that they may count.
        experts: of each layer.
    """
    table = count_tokens(learnt, experts)
    unseen = -1  # no token has this id, so its share is that of all tokens
    overall = [torch.from_numpy(table.share(layer, unseen)).float() for layer in range(len(experts))]

    def frequency(document: RoutedText) -> Sequence[Tensor]:
        return [share_E.expand(len(document.ids_T), -1) for share_E in overall]

    def previous(document: RoutedText) -> Sequence[Tensor]:
        out = []
        for share_E, ids_TK in zip(overall, document.chosen, strict=True):
            slots = ids_TK.shape[1]
            rank_K1 = torch.arange(slots, 0, -1).unsqueeze(1)
            there_TK1 = ids_TK.ge(0).unsqueeze(-1)
            used_TE = (one_hot(ids_TK.clamp(min=0), len(share_E)) * there_TK1 * rank_K1).sum(1)
            before_TE = torch.cat([torch.zeros_like(used_TE[:1]), used_TE[:-1]])
            out.append(before_TE + share_E)  # popularity decides among those not used
        return out

    return {"frequency": frequency, "token-id": by_token(table), "previous token": previous}


def crossed_baselines(documents: Sequence[RoutedText], experts: Sequence[int]) -> dict[str, Scorer]:
    """Return baselines for documents without others to learn from: each half is judged by the other's counts.

    They so learn from the very text that is judged, which favours them.
    """
    half = max(1, len(documents) // 2)
    sides = [baselines(documents[half:] or documents, experts), baselines(documents[:half], experts)]
    first = {id(document) for document in documents[:half]}

    def crossed(name: str) -> Scorer:
        return lambda document: sides[0 if id(document) in first else 1][name](document)

    return {name: crossed(name) for name in sides[0]}
