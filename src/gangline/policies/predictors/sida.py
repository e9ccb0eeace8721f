"""SiDA's hash function: all layers' experts from token embeddings, before the pass begins.

"SiDA-MoE: Sparsity-Inspired Data-Aware Serving for Efficient and Scalable Large Mixture-of-Experts Models"
(arXiv 2310.18859). A small network reads only the embeddings of the tokens: a linear layer, an LSTM of two
layers, an attention whose rows are sparse (SparseMax), a residual, and one head for each MoE layer. It is
trained to reproduce the routers: cross-entropy with the router's first choice plus a distillation that is
truncated to its highest logits.

We differ in three points. SparseMax is the exact projection onto the simplex; the released code subtracts 1
twice, so that its rows sum to 2 before they are normalised. For decoder-only models the attention is causal.
And the prediction is a hint by default; :class:`HashTable` holds what the paper's own mode executes.

Shape suffixes: B sequences, T tokens, D embedding, H hidden, L MoE layers, E experts, K choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gangline.core.forecast import Forecast
from gangline.policies.predictors.fitting import Progress, fit
from gangline.policies.predictors.protocol import Predictor
from gangline.policies.predictors.ranking import forecast


def sparsemax(z: Tensor) -> Tensor:
    """Project the last dimension onto the simplex: ``max(z - tau, 0)``, summing to 1. -inf entries become 0.

    Martins and Astudillo, "From Softmax to Sparsemax" (arXiv 1602.02068).
    """
    sorted_z = z.sort(dim=-1, descending=True).values
    finite = sorted_z.isfinite()
    total = torch.where(finite, sorted_z, 0.0).cumsum(dim=-1)
    rank = torch.arange(1, z.shape[-1] + 1, device=z.device)
    support = (finite & (1 + rank * sorted_z > total)).sum(dim=-1, keepdim=True)
    tau = (total.gather(-1, support - 1) - 1) / support
    return torch.clamp(z - tau, min=0)


class HashFunction(nn.Module):
    """The predictor network.

    Args:
        embedding: width D of the model's token embeddings.
        experts: routed experts of each MoE layer.
        hidden: width H (the paper: 256).
        causal: attend to earlier tokens only, for decoder-only models (the paper's encoder is not causal).
    """

    def __init__(
        self, embedding: int, experts: Sequence[int], hidden: int = 256, *, causal: bool = True
    ) -> None:
        super().__init__()
        self.causal = causal
        self.compress = nn.Linear(embedding, hidden)
        self.lstm = nn.LSTM(hidden, hidden, num_layers=2, batch_first=True)
        self.residual = nn.Linear(hidden, hidden)
        self.heads = nn.ModuleList(nn.Linear(hidden, count) for count in experts)

    def forward(self, x_BTD: Tensor) -> list[Tensor]:
        """Return router logits ``[B, T, E]`` of each layer."""
        h_BTH = functional.relu(self.compress(x_BTD))
        y_BTH, _ = self.lstm(h_BTH)
        score_BTT = y_BTH @ y_BTH.transpose(1, 2)
        if self.causal:
            future_TT = torch.ones_like(score_BTT[0], dtype=torch.bool).triu(1)
            score_BTT = score_BTT.masked_fill(future_TT, float("-inf"))
        context_BTH = sparsemax(score_BTT) @ y_BTH + self.residual(h_BTH)
        return [head(context_BTH) for head in self.heads]


def truncated_distillation(student_XE: Tensor, teacher_XE: Tensor, top: int) -> Tensor:
    """Return the mean L1 distance of two softmaxes over the teacher's ``top`` highest logits only."""
    kept_XT, index_XT = teacher_XE.topk(min(top, teacher_XE.shape[-1]), dim=-1)
    difference_XT = student_XE.gather(-1, index_XT).softmax(-1) - kept_XT.softmax(-1)
    return difference_XT.abs().mean()


@dataclass(frozen=True)
class SidaTraining:
    """Hyperparameters of the paper.

    Attributes:
        ce: weight lambda of the cross-entropy.
        top: logits that the distillation is truncated to.
        lr: learning rate.
        epochs: passes over the data.
        seed: of the order of the data.
    """

    ce: float = 0.005
    top: int = 30
    lr: float = 5e-5
    epochs: int = 15
    seed: int = 0


def sida_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], setting: SidaTraining) -> Tensor:
    """Return ``lambda CE + L_TKD``, averaged over layers and tokens; both lists hold ``[B, T, E]``."""
    losses = [
        setting.ce * functional.cross_entropy(s.flatten(0, 1), t.argmax(-1).flatten())
        + truncated_distillation(s, t, setting.top)
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(losses).mean()


Sample = tuple[Tensor, Sequence[Tensor]]
"""Embeddings ``[B, T, D]`` and each layer's router logits ``[B, T, E]``."""


def train_hash_function(
    network: HashFunction,
    samples: Sequence[Sample],
    setting: SidaTraining | None = None,
    progress: Progress | None = None,
) -> float:
    """Train on recorded router logits; returns the mean loss of the last epoch."""
    chosen = setting or SidaTraining()

    def loss(sample: Sample) -> Tensor:
        return sida_loss(network(sample[0]), sample[1], chosen)

    return fit(
        network, samples, loss, epochs=chosen.epochs, lr=chosen.lr, seed=chosen.seed, progress=progress
    )


@dataclass(frozen=True)
class HashTable:
    """What the hash thread makes of a batch.

    Attributes:
        ids: predicted experts of each layer, ``[B, T, K]``, best first.
        values: their softmax over all experts, ``[B, T, K]``.
    """

    ids: list[Tensor]
    values: list[Tensor]

    def needed(self, layer: int) -> list[int]:
        """Return the experts that the batch uses in a layer, ascending."""
        return [int(e) for e in self.ids[layer].unique()]


@torch.no_grad()
def build_table(network: HashFunction, x_BTD: Tensor, top_k: int) -> HashTable:
    """Return the table of a batch (the paper: K = 1 for SST2, 3 for MRPC and MultiRC)."""
    best = [logits.softmax(-1).topk(min(top_k, logits.shape[-1]), dim=-1) for logits in network(x_BTD)]
    return HashTable([b.indices for b in best], [b.values for b in best])


def hash_hits(table: HashTable, teacher: Sequence[Tensor]) -> list[float]:
    """Return per layer how often the router's first choice is among the predicted K (0 to 1)."""
    return [
        (ids == logits.argmax(-1, keepdim=True)).any(-1).float().mean().item()
        for ids, logits in zip(table.ids, teacher, strict=True)
    ]


class SidaPredictor(Predictor):
    """The hash function as a hint: forecasts all layers of a pass from its embeddings.

    In decoding only the token just sampled is known, so each pass is predicted from the tokens given to it;
    the state of the LSTM over earlier tokens is not carried over.

    Args:
        network: a trained hash function.
        top_k: experts per token that a forecast names.
    """

    def __init__(self, network: HashFunction, top_k: int) -> None:
        self.network, self.top_k = network, top_k

    def on_request(self, step: int, token_ids: Sequence[int], embeddings_TD: Any = None) -> list[Forecast]:
        """Forecast every layer; nothing without embeddings. Probability is the mean over tokens."""
        if embeddings_TD is None or not len(embeddings_TD):
            return []
        x_BTD = torch.as_tensor(embeddings_TD, dtype=torch.float32).unsqueeze(0)
        table = build_table(self.network, x_BTD, self.top_k)
        out = []
        for layer, (ids, values) in enumerate(zip(table.ids, table.values, strict=True)):
            p_E = torch.zeros(int(ids.max()) + 1).index_add_(0, ids.flatten(), values.flatten())
            out.append(forecast(step, layer, (p_E / len(embeddings_TD)).numpy(), layer + 1, "sida"))
        return out
