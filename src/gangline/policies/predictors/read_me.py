"""Read-ME's decoupled router: routing from tokens alone, ahead of the backbone.

"Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design" (arXiv
2410.19123). One causal transformer layer (4 heads, SwiGLU, rotary positions, RMSNorm) reads token ids and
chooses one expert index for all layers of its refactorised model. There it *is* the router. For other models
it is distilled from their routing layer by layer, then one head for each layer predicts better than one for
all (``shared=False``), and it is a hint.

Shape suffixes: B sequences, T tokens, H hidden, N heads, L MoE layers, E experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gangline.core.forecast import Forecast
from gangline.policies.predictors.fitting import Progress, fit
from gangline.policies.predictors.protocol import Predictor
from gangline.policies.predictors.ranking import forecast


class DecoupledRouter(nn.Module):
    """Token ids to router logits.

    Args:
        vocabulary: token ids (the paper: 32000).
        layers: MoE layers L.
        experts: routed experts E of each layer.
        hidden: width (the paper: 512).
        heads: attention heads (4).
        shared: one head for all layers, as in the paper, or one for each.
    """

    def __init__(
        self,
        vocabulary: int,
        layers: int,
        experts: int,
        hidden: int = 512,
        heads: int = 4,
        *,
        shared: bool = True,
    ) -> None:
        super().__init__()
        self.layers, self.attention_heads = layers, heads
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.norm_attention, self.norm_mlp = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.norm_out = nn.RMSNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.gate_up = nn.Linear(hidden, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, hidden, bias=False)
        self.heads = nn.ModuleList(nn.Linear(hidden, experts) for _ in range(1 if shared else layers))

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return logits ``[B, T, L, E]``; with a shared head all layers are alike."""
        x_BTH = self.embedding(ids_BT)
        x_BTH = x_BTH + self._attend(self.norm_attention(x_BTH))
        gate_BTH, up_BTH = self.gate_up(self.norm_mlp(x_BTH)).chunk(2, dim=-1)
        x_BTH = self.norm_out(x_BTH + self.down(functional.silu(gate_BTH) * up_BTH))
        logits_BTLE = torch.stack([head(x_BTH) for head in self.heads], dim=2)
        return logits_BTLE.expand(-1, -1, self.layers, -1)

    def _attend(self, x_BTH: Tensor) -> Tensor:
        batch, tokens, hidden = x_BTH.shape
        q, k, v = (
            part.view(batch, tokens, self.attention_heads, -1).transpose(1, 2)
            for part in self.qkv(x_BTH).chunk(3, dim=-1)
        )
        y_BNTd = functional.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        attended: Tensor = self.out(y_BNTd.transpose(1, 2).reshape(batch, tokens, hidden))
        return attended


def rotated(x_BNTd: Tensor) -> Tensor:
    """Apply rotary positions to the halves of the last dimension."""
    half = x_BNTd.shape[-1] // 2
    rate = 10_000.0 ** (-torch.arange(half, device=x_BNTd.device) / half)
    angle = torch.arange(x_BNTd.shape[-2], device=x_BNTd.device)[:, None] * rate
    a, b = x_BNTd[..., :half], x_BNTd[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


Sample = tuple[Tensor, Tensor]
"""Token ids ``[B, T]`` and the model's router logits ``[B, T, L, E]``."""


def train_router(
    router: DecoupledRouter,
    samples: Sequence[Sample],
    *,
    epochs: int = 10,
    lr: float = 5e-4,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    """Distil layer-wise routing (Kullback-Leibler divergence); returns the mean loss of the last epoch."""

    def loss(sample: Sample) -> Tensor:
        student = router(sample[0]).log_softmax(-1).flatten(0, 2)
        teacher = sample[1].float().log_softmax(-1).flatten(0, 2)
        return functional.kl_div(student, teacher, log_target=True, reduction="batchmean")

    return fit(router, samples, loss, epochs=epochs, lr=lr, seed=seed, progress=progress)


class DecoupledRouterPredictor(Predictor):
    """The router as a forecast of all layers of a pass.

    Args:
        router: a trained router.
        top_k: experts per token.
    """

    needs = frozenset({"token_ids"})

    def __init__(self, router: DecoupledRouter, top_k: int) -> None:
        self.router, self.top_k = router, top_k

    @torch.no_grad()
    def on_request(self, step: int, token_ids: Sequence[int], embeddings_TD: Any = None) -> list[Forecast]:
        """Forecast every layer; an expert's probability is the mean share of its tokens' choices."""
        if not len(token_ids):
            return []
        p_TLE = self.router(torch.as_tensor(list(token_ids)).unsqueeze(0))[0].softmax(-1)
        best = p_TLE.topk(self.top_k, dim=-1)
        kept_LE = torch.zeros_like(p_TLE).scatter(-1, best.indices, best.values).mean(dim=0)
        return [forecast(step, layer, row.numpy(), layer + 1, "read-me") for layer, row in enumerate(kept_LE)]
