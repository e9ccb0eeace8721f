"""SiDA's hash function: all layers' experts from token embeddings, before the pass begins.

"SiDA-MoE: Sparsity-Inspired Data-Aware Serving for Efficient and Scalable Large Mixture-of-Experts Models"
(arXiv 2310.18859). A small network reads only the embeddings of the tokens: a linear layer, an LSTM of two
layers, an attention whose rows are sparse (SparseMax), a residual, and one head for each MoE layer. It is
trained to reproduce the routers: cross-entropy with the router's first choice plus a distillation that is
truncated to its highest logits.

We differ in three points. SparseMax is the exact projection onto the simplex; the released code subtracts 1
twice, so that its rows sum to 2 before they are normalised. For decoder-only models the attention is causal.
And the prediction is a hint by default; :class:`HashTable` holds what the paper's own mode executes.

Shape suffixes: B sequences, T tokens, S those and the ones before, D embedding, H hidden, L MoE layers,
E experts, K choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gangline.core.errors import UsageError
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


@dataclass(frozen=True)
class HashState:
    """What a causal hash function remembers of a text, so that it can go on with the next tokens.

    Attributes:
        lstm: hidden and cell state, ``[2, B, H]`` each.
        y_BTH: the LSTM's outputs so far, to which the attention looks back.
    """

    lstm: tuple[Tensor, Tensor]
    y_BTH: Tensor

    @property
    def tokens(self) -> int:
        """Tokens read so far."""
        return self.y_BTH.shape[1]


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
        return self.resume(x_BTD)[0]

    def resume(self, x_BTD: Tensor, state: HashState | None = None) -> tuple[list[Tensor], HashState]:
        """Return the logits of tokens that follow those of ``state``, and the state after them.

        Raises:
            UsageError: a state is given to a network that also looks at later tokens.
        """
        if state is not None and not self.causal:
            raise UsageError("a hash function that is not causal reads whole texts; call it without a state")
        h_BTH = functional.relu(self.compress(x_BTD))
        new_BTH, lstm = self.lstm(h_BTH, None if state is None else state.lstm)
        y_BSH = new_BTH if state is None else torch.cat([state.y_BTH, new_BTH], dim=1)
        score_BTS = new_BTH @ y_BSH.transpose(1, 2)
        if self.causal:
            past = y_BSH.shape[1] - new_BTH.shape[1]
            future_TS = torch.ones_like(score_BTS[0], dtype=torch.bool).triu(past + 1)
            score_BTS = score_BTS.masked_fill(future_TS, float("-inf"))
        context_BTH = sparsemax(score_BTS) @ y_BSH + self.residual(h_BTH)
        return [head(context_BTH) for head in self.heads], HashState(lstm, y_BSH)


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


def top_choices(logits: Sequence[Tensor], top_k: int) -> HashTable:
    """Return the K likeliest experts of each layer's logits ``[B, T, E]``."""
    best = [z_BTE.softmax(-1).topk(min(top_k, z_BTE.shape[-1]), dim=-1) for z_BTE in logits]
    return HashTable([b.indices for b in best], [b.values for b in best])


@torch.no_grad()
def build_table(network: HashFunction, x_BTD: Tensor, top_k: int) -> HashTable:
    """Return the table of a batch (the paper: K = 1 for SST2, 3 for MRPC and MultiRC)."""
    return top_choices(network(x_BTD), top_k)


def hash_hits(table: HashTable, teacher: Sequence[Tensor]) -> list[float]:
    """Return per layer how often the router's first choice is among the predicted K (0 to 1)."""
    return [
        (ids == logits.argmax(-1, keepdim=True)).any(-1).float().mean().item()
        for ids, logits in zip(table.ids, teacher, strict=True)
    ]


class SidaPredictor(Predictor):
    """The hash function as a hint: forecasts all layers of a pass from its embeddings.

    In decoding only the token just sampled is known; a causal network goes on from its state, so it has read
    the text before it. A pass of several tokens begins a new text.

    Args:
        network: a trained hash function.
        top_k: experts per token that a forecast names.
    """

    needs = frozenset({"token_ids", "embeddings"})

    def __init__(self, network: HashFunction, top_k: int) -> None:
        self.network, self.top_k = network, top_k
        self._state: HashState | None = None

    @torch.no_grad()
    def on_request(self, step: int, token_ids: Sequence[int], embeddings_TD: Any = None) -> list[Forecast]:
        """Forecast every layer; nothing without embeddings. Probability is the mean over tokens."""
        if embeddings_TD is None or not len(embeddings_TD):
            return []
        x_1TD = torch.as_tensor(embeddings_TD, dtype=torch.float32).unsqueeze(0)
        following = x_1TD.shape[1] == 1 and self.network.causal
        logits, self._state = self.network.resume(x_1TD, self._state if following else None)
        table = top_choices(logits, self.top_k)
        out = []
        for layer, (ids, values) in enumerate(zip(table.ids, table.values, strict=True)):
            p_E = torch.zeros(int(ids.max()) + 1).index_add_(0, ids.flatten(), values.flatten())
            out.append(forecast(step, layer, (p_E / len(embeddings_TD)).numpy(), layer + 1, "sida"))
        return out

    def end_request(self) -> None:
        """Forget the text."""
        self._state = None
