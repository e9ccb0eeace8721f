"""Walk a dense model layer by layer, beside its converted twin, and fit every layer on the twin's own inputs.

Shapes: S sequences, C tokens per sequence, T = S * C tokens, D hidden.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gangline.compress.dense_to_moe.layer import FitConfig, LayerPlan, fit_layer
from gangline.compress.dense_to_moe.source import dense_ffn

BATCH = 8


def _attend(model: Any, layer: Any, hidden_SCD: Tensor, dtype: torch.dtype) -> Tensor:
    """Residual stream after the attention of `layer`."""
    positions_1C = torch.arange(hidden_SCD.shape[1])[None]
    rotary = model.model.rotary_emb(hidden_SCD, positions_1C)
    parts = []
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        for part_SCD in hidden_SCD.split(BATCH):
            normed_SCD = layer.input_layernorm(part_SCD)
            mixed_SCD = layer.self_attn(normed_SCD, position_embeddings=rotary, attention_mask=None)[0]
            parts.append(part_SCD + mixed_SCD.float())
    return torch.cat(parts)


def _dense_out(layer: Any, mid_SCD: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        return torch.cat(
            [part + layer.mlp(layer.post_attention_layernorm(part)).float() for part in mid_SCD.split(BATCH)]
        )


@torch.no_grad()
def fit_layers(
    model: Any,
    ids_SC: Tensor,
    config: FitConfig,
    *,
    dtype: torch.dtype = torch.float32,
    stored: Callable[[LayerPlan], LayerPlan] = lambda plan: plan,
) -> Iterator[LayerPlan]:
    """Fit all layers in order; yields a plan per layer.

    Each layer is fitted on the inputs that it gets behind the converted layers before it, so that errors are
    made good where they can be instead of adding up; the target is the dense model's residual stream.

    Args:
        ids_SC: token ids of the calibration text, sequences of equal length.
        dtype: attention and the dense FFN are computed in it; the fits always are in float32.
        stored: what storing makes of a plan (quantization); later layers then make good its error too.
    """
    dense_SCD = model.model.embed_tokens(ids_SC).float()
    moe_SCD = dense_SCD
    for layer in model.model.layers:
        ffn = dense_ffn(layer)
        dense_SCD = _dense_out(layer, _attend(model, layer, dense_SCD, dtype), dtype)
        mid_SCD = _attend(model, layer, moe_SCD, dtype)
        x_TD = layer.post_attention_layernorm(mid_SCD).flatten(0, 1)
        target_TD = (dense_SCD - mid_SCD).flatten(0, 1)
        weight_T = dense_SCD.flatten(0, 1).norm(dim=1).reciprocal()
        plan = stored(fit_layer(ffn, x_TD, target_TD, weight_T / weight_T.mean(), config))
        moe_SCD = mid_SCD + plan.output(ffn, x_TD).view_as(mid_SCD)
        yield plan
