"""ExpertFlow's routing path predictor: the paths of a whole prompt before layer 0.

"ExpertFlow: Efficient Mixture-of-Experts Inference via Predictive Expert Caching and Token Scheduling"
(arXiv 2410.17954). A small encoder-decoder (hidden 32, feed-forward 2048) reads token ids; a light head for
each MoE layer gives the chance that each token uses each expert, all in one pass. Loss: binary cross-entropy
with the 0/1 routing matrix. We differ from T5 in the position code (sinusoids instead of relative biases),
and the decoder reads the same tokens as the encoder.

Shape suffixes: B sequences, T tokens, L MoE layers, E experts.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gangline.core.forecast import Forecast
from gangline.policies.predictors.fitting import Progress, fit
from gangline.policies.predictors.protocol import Predictor
from gangline.policies.predictors.ranking import forecast


class RoutingPathPredictor(nn.Module):
    """Predicts ``p[B, T, L, E]``; all layers must have the same number of experts.

    Args:
        vocabulary: token ids.
        layers: MoE layers L.
        experts: routed experts E of each layer.
        hidden: width (the paper: 32).
        feed_forward: inner width (the paper: 2048).
        depth: encoder and decoder layers each.
        heads: attention heads.
    """

    def __init__(
        self,
        vocabulary: int,
        layers: int,
        experts: int,
        hidden: int = 32,
        feed_forward: int = 2048,
        depth: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(hidden, heads, feed_forward, **options),
            depth,
            enable_nested_tensor=False,
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(hidden, heads, feed_forward, **options), depth
        )
        self.heads = nn.ModuleList(nn.Linear(hidden, experts) for _ in range(layers))

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return logits ``[B, T, L, E]``; their sigmoid is the chance of use."""
        x_BTH = self.embedding(ids_BT)
        x_BTH = x_BTH + positions(ids_BT.shape[1], x_BTH.shape[-1]).to(x_BTH)
        y_BTH = self.decoder(x_BTH, self.encoder(x_BTH))
        return torch.stack([head(y_BTH) for head in self.heads], dim=2)


def positions(tokens: int, hidden: int) -> Tensor:
    """Return sinusoids ``[T, H]``."""
    rate = torch.exp(torch.arange(0, hidden, 2) * (-math.log(10_000.0) / hidden))
    angle = torch.arange(tokens)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :hidden]


Sample = tuple[Tensor, Tensor]
"""Token ids ``[B, T]`` and the 0/1 routing matrix ``[B, T, L, E]``."""


def train_paths(
    network: RoutingPathPredictor,
    samples: Sequence[Sample],
    *,
    epochs: int = 10,
    lr: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    """Train by binary cross-entropy over layers and experts; returns the mean loss of the last epoch."""

    def loss(sample: Sample) -> Tensor:
        return functional.binary_cross_entropy_with_logits(network(sample[0]), sample[1].float())

    return fit(network, samples, loss, epochs=epochs, lr=lr, seed=seed, progress=progress)


class ExpertFlowPredictor(Predictor):
    """The trained network as a hint for prompts. In decoding it sees only the tokens of the pass.

    Args:
        network: a trained routing path predictor.
    """

    needs = frozenset({"token_ids"})

    def __init__(self, network: RoutingPathPredictor) -> None:
        self.network = network

    @torch.no_grad()
    def on_request(self, step: int, token_ids: Sequence[int], embeddings_TD: Any = None) -> list[Forecast]:
        """Forecast every layer; an expert's probability is the chance that any token uses it."""
        if not len(token_ids):
            return []
        p_TLE = self.network(torch.as_tensor(list(token_ids)).unsqueeze(0)).sigmoid()[0]
        used_LE = 1 - (1 - p_TLE).prod(dim=0)
        return [
            forecast(step, layer, row.numpy(), layer + 1, "expertflow") for layer, row in enumerate(used_LE)
        ]
