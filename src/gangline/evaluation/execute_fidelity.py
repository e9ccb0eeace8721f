"""What it costs to compute SiDA's predicted experts instead of the routers' own.

Legend: T tokens of one document, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gangline.core.errors import UsageError
from gangline.evaluation.predictor_data import RoutedText
from gangline.policies.predictors.sida import HashFunction
from gangline.runtime.hash_routing import HashRouting


@dataclass(frozen=True)
class Fidelity:
    """The executed prediction beside the exact model, on the same held-out tokens.

    Attributes:
        tokens: that were predicted.
        layers: whose routers were replaced; ``skipped`` of these routers did not compute.
        choices: experts per token; None for the model's own number.
        top1: share of tokens and layers whose first executed expert is the exact model's first.
        recall: share of the exact model's experts that were executed.
        exact_perplexity, perplexity: of the exact model and of the executed prediction.
        same_next_token: share of positions at which both find the same token likeliest.
    """

    tokens: int
    layers: int
    skipped: int
    choices: int | None
    top1: float
    recall: float
    exact_perplexity: float
    perplexity: float
    same_next_token: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """Return the cost in one paragraph."""
        return (
            f"approximate: hash tables instead of the routers in {self.layers} layers "
            f"({self.skipped} routers skipped)\n"
            f"  first expert the same in {self.top1:.1%}, {self.recall:.1%} of the experts executed\n"
            f"  perplexity {self.perplexity:.2f}, exact {self.exact_perplexity:.2f} "
            f"({self.perplexity / self.exact_perplexity - 1:+.1%}); "
            f"same likeliest next token in {self.same_next_token:.1%} of {self.tokens:,} places"
        )


def execution_fidelity(
    model: Any,
    network: HashFunction,
    documents: Sequence[RoutedText],
    *,
    choices: int | None = None,
    damping: Sequence[float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Fidelity:
    """Run documents exactly, then by hash tables, and compare.

    Args:
        model: a causal language model from ``gangline.load`` or ``attach``.
        network: trained for it.
        documents: recorded from this very model, so that their routing is the exact one.
        choices, damping: see :class:`HashRouting`.
        progress: told runs done and in all.

    Raises:
        UsageError: the model is no causal language model, or its routing cannot be predicted.
    """
    if model.config.is_encoder_decoder:
        raise UsageError(
            "perplexity needs a causal language model; of an encoder-decoder model see the hits only"
        )
    texts = [document for document in documents if len(document.ids_T) > 1]
    total, done = 2 * len(texts), 0

    def run(document: RoutedText) -> tuple[float, Tensor]:
        nonlocal done
        found = _losses(model, document.ids_T)
        done += 1
        if progress is not None:
            progress(done, total)
        return found

    exact = [run(document) for document in texts]
    ours, agreed = [], torch.zeros(2)
    with HashRouting(model, network, mode="execute", choices=choices, damping=damping) as routing:
        for document in texts:
            prepared = routing.prepare(document.ids_T.unsqueeze(0))
            routing.use(prepared)
            ours.append(run(document))
            agreed += _agreement([ids[0] for ids in prepared.table.ids], document.chosen)
        layers, skipped = len(prepared.table.ids), routing.skipped
    predicted = sum(len(document.ids_T) - 1 for document in texts)
    rows = sum(len(document.ids_T) for document in texts) * layers
    same = sum(int((a == b).sum()) for (_, a), (_, b) in zip(exact, ours, strict=True))
    return Fidelity(
        tokens=predicted,
        layers=layers,
        skipped=skipped,
        choices=choices,
        top1=float(agreed[0]) / rows,
        recall=float(agreed[1]) / rows,
        exact_perplexity=math.exp(sum(loss for loss, _ in exact) / predicted),
        perplexity=math.exp(sum(loss for loss, _ in ours) / predicted),
        same_next_token=same / predicted,
    )


def _losses(model: Any, ids_T: Tensor) -> tuple[float, Tensor]:
    """Return the summed loss of a text and the likeliest next tokens ``[T - 1]``."""
    with torch.inference_mode():
        logits_TV = model(input_ids=ids_T.unsqueeze(0), use_cache=False).logits[0, :-1].float()
        loss = float(cross_entropy(logits_TV, ids_T[1:], reduction="sum"))
        return loss, logits_TV.argmax(dim=-1)


def _agreement(executed: Sequence[Tensor], chosen: Sequence[Tensor]) -> Tensor:
    """Return sums over tokens and layers: first expert equal, and share of experts executed."""
    out = torch.zeros(2)
    for mine_TK, ids_TK in zip(executed, chosen, strict=True):
        out[0] += (mine_TK[:, 0] == ids_TK[:, 0]).sum()
        out[1] += (mine_TK[:, None, :] == ids_TK[:, :, None]).any(2).float().mean(1).sum()
    return out
