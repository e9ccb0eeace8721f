"""Recognise the common skeleton of a MoE transformer in a model's modules, for the native step.

What is read here is proved by ``native_check`` before it is used; what is not recognised is refused by name.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from gangline.kernels.cpu.decoder import LayerPlan, NativeDecoder, NotNativeError, Parts, parts
from gangline.models import MoEBlock, MoEView, RouterSpec

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
_ROPE_CHANGES_WITH_LENGTH = ("dynamic", "longrope")
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


def native_decoder(model: PreTrainedModel, view: MoEView) -> NativeDecoder:
    """Return the native step of a model whose weights are loaded.

    Raises:
        NotNativeError: naming what the native core does not know.
    """
    made = parts()
    if model.config.is_encoder_decoder:
        raise NotNativeError("it has an encoder")
    config = model.config
    body = _child(model, "model")
    _only(body, {"embed_tokens", "layers", "norm", "rotary_emb"})
    _only(model, {"model", "lm_head"})
    blocks = {id(block.parent): block for block in view.blocks}
    layers = cast("Iterable[nn.Module]", _child(body, "layers"))
    plans = [_layer(made, config, layer, index, blocks) for index, layer in enumerate(layers)]
    if sum(plan.moe_layer is not None for plan in plans) != len(view.blocks):
        raise NotNativeError("MoE layers outside the decoder's layers")
    frequencies, scaling = _rope(_child(body, "rotary_emb"))
    return NativeDecoder(
        made,
        plans,
        hidden=int(config.hidden_size),
        final_norm=made.norm(_child(body, "norm")),
        head=made.linear(_child(model, "lm_head")),
        inverse_frequencies=frequencies,
        rope_scaling=scaling,
        dtype=model.dtype,
    )


def _layer(made: Parts, config: Any, layer: nn.Module, index: int, blocks: dict[int, MoEBlock]) -> LayerPlan:
    _only(layer, _LAYER_PARTS)
    network = _child(layer, "mlp")
    block = blocks.get(id(network))
    attention, kv_heads, head_dim = _attention(made, config, _child(layer, "self_attn"), index)
    common = (
        made.norm(_child(layer, "input_layernorm")),
        attention,
        made.norm(_child(layer, "post_attention_layernorm")),
    )
    if block is None:
        dense = made.core.DecoderLayer(*common, mlp=_mlp(made, config, network))
        return LayerPlan(dense, kv_heads, head_dim)
    mlp, gate = _shared(made, config, block)
    router, rule = _router(made, block), _rule(made, block)
    native = made.core.DecoderLayer(*common, router=router, rule=rule, mlp=mlp, shared_gate=gate)
    return LayerPlan(native, kv_heads, head_dim, block.layer, block.geometry.top_k, rule)


def _attention(made: Parts, config: Any, attention: nn.Module, index: int) -> tuple[Any, int, int]:
    """Return the native attention, and heads and width of its keys."""
    _only(attention, _ATTENTION_PARTS, parameters={"sinks"})
    q, k = _child(attention, "q_proj"), _child(attention, "k_proj")
    head_dim, scaling = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
    if not isinstance(head_dim, int) or not isinstance(scaling, float):
        raise NotNativeError(f"{type(attention).__name__} without head_dim and scaling")
    norms = {
        name: made.norm(getattr(attention, name)) for name in ("q_norm", "k_norm") if hasattr(attention, name)
    }
    sinks = getattr(attention, "sinks", None)
    q_native, k_native = made.linear(q), made.linear(k)
    clip = getattr(config, "clip_qkv", None)
    kv_heads = k_native.rows // head_dim
    native = made.core.Attention(
        q_native,
        k_native,
        made.linear(_child(attention, "v_proj")),
        made.linear(_child(attention, "o_proj")),
        heads=q_native.rows // head_dim,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scaling=scaling,
        window=_window(config, index),
        q_norm=norms.get("q_norm"),
        k_norm=norms.get("k_norm"),
        clip=float("inf") if clip is None else float(clip),
        sinks=0 if sinks is None else made.floats(sinks),
    )
    return native, kv_heads, head_dim


def _window(config: Any, index: int) -> int:
    """Return the sliding window of a layer, 0 for none, by the rule by which transformers makes caches."""
    window = getattr(config, "sliding_window", None) or 0
    types = getattr(config, "layer_types", None)
    if types is None:
        return int(window)
    if types[index] not in ("full_attention", "sliding_attention"):
        raise NotNativeError(f"layer {index} has {types[index]}")
    return int(window) if types[index] == "sliding_attention" else 0


def _mlp(made: Parts, config: Any, network: nn.Module) -> Any:
    _only(network, {"gate_proj", "up_proj", "down_proj", "act_fn"})
    name = str(getattr(config, "hidden_act", ""))
    if name not in _ACTIVATIONS:
        raise NotNativeError(f"activation {name!r} in {type(network).__name__}")
    linears = [made.linear(_child(network, part)) for part in ("gate_proj", "up_proj", "down_proj")]
    return made.core.Mlp(*linears, _ACTIVATIONS[name])


def _shared(made: Parts, config: Any, block: MoEBlock) -> tuple[Any, Any]:
    """Return the shared expert of a MoE layer and its sigmoid gate, None where there is none."""
    names = {"shared_expert", "shared_experts"} & {name for name, _ in block.parent.named_children()}
    router = {(block.router_name or "").removeprefix(f"{block.parent_name}.")}
    experts = {block.name.removeprefix(f"{block.parent_name}.")}
    known = names | router | experts | {"shared_expert_gate"}
    _only(block.parent, known, parameters={"e_score_correction_bias", "expert_bias"})
    gate = getattr(block.parent, "shared_expert_gate", None)
    if not names:
        return None, None
    shared = getattr(block.parent, names.pop())
    return _mlp(made, config, shared), None if gate is None else made.linear(gate)


def _router(made: Parts, block: MoEBlock) -> Any:
    router = block.router
    if router is None or block.router_spec is None:
        raise NotNativeError(f"the router of {block.parent_name}: {block.router_reason or 'there is none'}")
    _only(
        router, {"moe_statics"}, parameters={"weight", "bias", "e_score_correction_bias", "per_expert_scale"}
    )
    return made.linear(router)


def _rule(made: Parts, block: MoEBlock) -> Any:
    spec: RouterSpec = cast(RouterSpec, block.router_spec)
    odd = (spec.global_scale, spec.table_VK, spec.skip_class, spec.capacity, spec.shared or None)
    known = spec.score in ("softmax", "sigmoid", "softmax_topk") and spec.norm in ("none", "sum")
    if not known or any(value is not None for value in odd):
        raise NotNativeError(f"the routing rule {spec.kind!r} of {block.parent_name}")
    groups = spec.groups
    group_values: dict[str, Any] = {}
    if groups is not None and groups.keep < groups.count:
        group_values = {
            "groups": groups.count,
            "keep": groups.keep,
            "group_by_top2": groups.score == "top2_sum",
            "group_fill": groups.fill,
        }
    return made.core.RouterRule(
        classes=block.geometry.experts,
        k=spec.k,
        score=spec.score,
        choose_by_logit=spec.choose_by == "logit",
        bias=0 if spec.bias is None else made.floats(spec.bias.get().reshape(-1)),
        normalise=spec.norm == "sum",
        norm_eps=spec.norm_eps,
        norm_min=spec.norm_min,
        scale=spec.scale,
        expert_scale=0 if spec.expert_scale is None else made.floats(spec.expert_scale.get()),
        **group_values,
    )


def _rope(rotary: nn.Module) -> tuple[list[float], float]:
    """Return inverse frequencies and the scaling of cosines, proved against the module at a few positions."""
    frequencies = getattr(rotary, "inv_freq", None)
    scaling = getattr(rotary, "attention_scaling", None)
    if not isinstance(frequencies, torch.Tensor) or frequencies.dim() != 1 or scaling is None:
        raise NotNativeError(f"rotary embedding {type(rotary).__name__}")
    kind = str(getattr(rotary, "rope_type", "default"))
    if kind in _ROPE_CHANGES_WITH_LENGTH:
        raise NotNativeError(f"rotary embedding of the kind {kind!r}, whose angles change with the length")
    positions = torch.tensor([[0, 1, 7, 100, 1000]])
    angle = positions[0, :, None].float() * frequencies.float()
    try:
        cosine, sine = rotary(torch.zeros(1, 1), positions)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise NotNativeError(f"rotary embedding {type(rotary).__name__} ({error})") from None
    for ours, theirs in ((angle.cos() * scaling, cosine), (angle.sin() * scaling, sine)):
        half = theirs[0, :, : ours.shape[1]]
        again = theirs[0, :, ours.shape[1] :]
        same = half.shape == ours.shape and torch.allclose(ours, half, atol=1e-4)
        if not same or (again.numel() and not torch.equal(again, half)):
            raise NotNativeError(f"rotary embedding {type(rotary).__name__} with angles of its own")
    return [float(value) for value in frequencies.float().tolist()], float(scaling)


def _child(module: nn.Module, name: str) -> Any:
    child = getattr(module, name, None)
    if not isinstance(child, nn.Module):
        raise NotNativeError(f"{type(module).__name__} has no {name}")
    return child


def _only(module: nn.Module, children: set[str], parameters: set[str] | None = None) -> None:
    """Refuse a module with parts that the native step would leave out."""
    own = set(dict(module.named_parameters(recurse=False))) | set(dict(module.named_buffers(recurse=False)))
    unknown = (set(dict(module.named_children())) - children) | (own - (parameters or set()))
    if unknown:
        raise NotNativeError(f"{type(module).__name__} has {', '.join(sorted(unknown))}")
