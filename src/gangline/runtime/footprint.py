"""What a model needs in memory besides its experts, from its configuration and a skeleton on ``meta``."""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gangline.core.geometry import MoEGeometry
from gangline.core.layout import ExpertLayout
from gangline.policies.precision import HobbitPrecision
from gangline.runtime.embedding import lookup_table
from gangline.runtime.scratch import Scratch


@dataclass(frozen=True)
class Copies:
    """Copies of all experts in low precision.

    Attributes:
        slots: bytes of the slot of a copy, for each layer.
        share: part of the slot bytes that they get.
        codecs: names of the codecs of their matrices.
        scratch: see :class:`Footprint`; ``kernel`` likewise.
        rule: that chooses between the precisions.
    """

    slots: tuple[int, ...]
    share: float
    codecs: tuple[str, ...]
    kernel: int
    scratch: Scratch | None
    rule: HobbitPrecision


@dataclass(frozen=True)
class Footprint:
    """Sizes of one model in bytes.

    Attributes:
        dense: parameters and buffers that are no expert matrix; tied weights count once.
        load_extra: what loading them holds besides, for a moment: what a conversion starts from.
        table: bytes of an input embedding that stays in its file; 0 if it does not.
        row_params: dense parameters that multiply every row (no embedding, no output head).
        head_params: parameters of the output head, which multiply one row of a sequence.
        packed: weights of packed linear layers, which ``row_params`` leaves out; ``packed_head`` likewise
            of the output head; both in ``packed_codec``.
        width: bytes of a number of the computation.
        kv_per_token: keys and values of one token over all layers.
        row: activations of one row of a prefill chunk (attention, experts, residual stream).
        vocab_row: logits of one position in fp32.
        kernel: scratch of one expert's computation (its matrices decoded to the compute dtype).
        scratch: what the native core keeps instead, by rows of a chunk; None where torch computes experts.
        slots: layers that share a slot size: ``(slot bytes, layer numbers)``.
        experts: payload bytes of all experts.
        active_experts: payload bytes of the experts that one token uses.
        geometry: the MoE layers.
        codecs: names of the codecs of the expert matrices.
        copies: of the experts in low precision, where a policy uses them.
    """

    dense: int
    load_extra: int
    table: int
    row_params: int
    head_params: int
    width: int
    kv_per_token: int
    row: int
    vocab_row: int
    kernel: int
    slots: tuple[tuple[int, tuple[int, ...]], ...]
    experts: int
    active_experts: int
    geometry: MoEGeometry
    codecs: tuple[str, ...]
    packed: int = 0
    packed_head: int = 0
    packed_codec: str = ""
    scratch: Scratch | None = None
    copies: Copies | None = None

    @property
    def working_set(self) -> int:
        """Slot bytes of the experts that one token uses in all layers."""
        return sum(
            size * sum(self.geometry.layers[layer].top_k for layer in layers) for size, layers in self.slots
        )

    @property
    def all_slots(self) -> int:
        """Slot bytes of all experts."""
        return sum(
            size * sum(self.geometry.layers[layer].experts for layer in layers) for size, layers in self.slots
        )


def measure_footprint(
    model: nn.Module,
    dtype: torch.dtype,
    geometry: MoEGeometry,
    layouts: tuple[ExpertLayout, ...],
    slot_bytes: tuple[int, ...],
    mapped: Container[str] = (),
    loaded: bool = False,
    scratch: Scratch | None = None,
) -> Footprint:
    """Add up a model whose expert matrices have been dropped (its other tensors may lie on ``meta``).

    Args:
        model: the skeleton.
        dtype: the model's number format.
        geometry: its MoE layers.
        layouts: how the experts of each layer will lie in their slots.
        slot_bytes: bytes of one slot for each layer.
        mapped: names of parameters that need no conversion, so that they are used where the file has them.
        loaded: whether the model is in memory already.
        scratch: see :func:`gangline.runtime.scratch.native_scratch`.
    """
    config = text_config(model.config)
    sizes = [tensor.numel() * _width(tensor, dtype) for tensor in _unique_tensors(model)]
    pairs = list(zip(geometry.layers, layouts, strict=True))
    groups: dict[int, list[int]] = {}
    for layer, size in enumerate(slot_bytes):
        groups.setdefault(size, []).append(layer)
    decoded = max(layer.expert_params for layer in geometry.layers) * dtype.itemsize
    return Footprint(
        dense=sum(sizes),
        load_extra=0 if loaded else _load_extra(model, mapped),
        table=_table(model, dtype, mapped),
        row_params=_row_params(model),
        head_params=_head_params(model),
        width=dtype.itemsize,
        kv_per_token=_kv_per_token(config, dtype),
        row=_row_bytes(config, geometry, dtype),
        vocab_row=4 * int(getattr(config, "vocab_size", 0) or 0),
        kernel=2 * decoded,
        slots=tuple((size, tuple(layers)) for size, layers in sorted(groups.items())),
        experts=sum(layer.experts * layout.nbytes for layer, layout in pairs),
        active_experts=sum(layer.top_k * layout.nbytes for layer, layout in pairs),
        geometry=geometry,
        codecs=tuple(sorted({field.codec for layout in layouts for field in layout.fields})),
        scratch=scratch,
    )


def text_config(config: Any) -> Any:
    """Return the configuration of the language model in a composite one."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _row_params(model: nn.Module) -> int:
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    skipped = {id(p) for module in ends if module is not None for p in module.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in skipped)


def _head_params(model: nn.Module) -> int:
    head = model.get_output_embeddings()  # type: ignore[operator]
    return 0 if head is None else sum(weight.numel() for weight in head.parameters())


def _table(model: nn.Module, dtype: torch.dtype, mapped: Container[str]) -> int:
    name = lookup_table(model)
    if name is None or name not in mapped:
        return 0
    return model.get_parameter(name).numel() * dtype.itemsize


def _load_extra(model: nn.Module, mapped: Container[str]) -> int:
    """Converted weights are made beside what they are made from, which may be fp32."""
    return 4 * sum(weight.numel() for name, weight in model.named_parameters() if name not in mapped)


def _unique_tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _width(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    return dtype.itemsize if tensor.is_floating_point() else tensor.element_size()


def _kv_per_token(config: Any, dtype: torch.dtype) -> int:
    """Keys and values as transformers' caches keep them: expanded, for latent attention as well."""

    hidden = _read(config, "hidden_size") or _read(config, "d_model")
    heads = _read(config, "num_attention_heads") or _read(config, "num_heads") or 1
    layers = _read(config, "num_hidden_layers") or _read(config, "num_layers") or 1
    if _read(config, "kv_lora_rank"):
        parts = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        width = heads * sum(_read(config, part) for part in parts)
    else:
        head_dim = _read(config, "head_dim") or _read(config, "d_kv") or hidden // heads
        width = 2 * (_read(config, "num_key_value_heads") or heads) * head_dim
    crossing = 2 if getattr(config, "is_encoder_decoder", False) else 1
    return layers * crossing * width * dtype.itemsize


def _read(config: Any, name: str) -> int:
    """Read a size; the largest one where it differs between layers; 0 where there is none."""
    layers = getattr(config, "per_layer_config", None)
    sources = [config] if not layers else list(layers.values() if isinstance(layers, dict) else layers)
    values = []
    for source in sources:
        try:
            value = getattr(source, name, None)
        except AttributeError:  # transformers raises a kind of it where only layers have the answer
            continue
        values.append(max(value, default=0) if isinstance(value, (list, tuple)) else value or 0)
    return int(max(values, default=0))


def _row_bytes(config: Any, geometry: MoEGeometry, dtype: torch.dtype) -> int:
    """Peak bytes of one row: residual stream, attention inputs, and the widest MoE layer."""
    hidden = max(layer.hidden for layer in geometry.layers)
    heads = _read(config, "num_attention_heads") or 1
    head_dim = _read(config, "head_dim") or hidden // heads
    attention = (6 * hidden + 4 * heads * head_dim) * dtype.itemsize
    # The sum in fp32, and (if all rows choose one expert) that expert's input, product, gate and output.
    width = dtype.itemsize
    routed = max(
        layer.hidden * (12 + 2 * width) + 3 * layer.intermediate * width + layer.experts * 12
        for layer in geometry.layers
    )
    return attention + routed
