"""What llama.cpp calls the tensors of a MoE model, and what transformers calls them.

``blk.3.attn_q.weight`` is ``model.layers.3.self_attn.q_proj.weight``. The tables hold the part after the
layer number. Facts from the ``gguf`` package (``constants.py``, ``tensor_mapping.py``) and from the model
files of llama.cpp.

Legend: D hidden, E experts, F intermediate.
"""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ATTENTION = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
}
_QKV_BIAS = {
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
}
_QK_NORM = {
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
}
_ROUTER = {
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
}
_DENSE_FFN = {
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def _shared(module: str) -> dict[str, str]:
    return {f"ffn_{part}_shexp.weight": f"mlp.{module}.{part}_proj.weight" for part in ("gate", "up", "down")}


@dataclass(frozen=True)
class Family:
    """One llama.cpp architecture.

    Attributes:
        arch: its name in ``general.architecture``.
        layer: GGUF name within a block -> transformers name within a layer, for every dense tensor.
        permuted: whether the rows of Q and K are stored in the order of interleaved rotary embeddings.
        renormalised: whether llama.cpp renormalises the top-k weights; ``None``: metadata says.
    """

    arch: str
    layer: dict[str, str] = field(repr=False)
    permuted: bool = False
    renormalised: bool | None = None

    def dense_name(self, name: str) -> str | None:
        """Return the transformers name of a dense GGUF tensor, or ``None`` if it is no plain dense tensor."""
        if name in _TOP:
            return _TOP[name]
        match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        if match is None or match[2] not in self.layer:
            return None
        return f"model.layers.{match[1]}.{self.layer[match[2]]}"

    def gguf_name(self, name: str) -> str | None:
        """Return the GGUF name of a dense transformers parameter, or ``None`` if there is no such tensor."""
        for top, theirs in _TOP.items():
            if theirs == name:
                return top
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is None:
            return None
        for ours, theirs in self.layer.items():
            if theirs == match[2]:
                return f"blk.{match[1]}.{ours}"
        return None


_QWEN2MOE = {
    **_ATTENTION,
    **_QKV_BIAS,
    **_ROUTER,
    **_shared("shared_expert"),
    "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
}
_DEEPSEEK2 = {
    **_ATTENTION,
    **_ROUTER,
    **_DENSE_FFN,
    **_shared("shared_experts"),
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_kv_b.weight": "self_attn.kv_b_proj.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}
_GPT_OSS = {
    **_ATTENTION,
    **_QKV_BIAS,
    "attn_output.bias": "self_attn.o_proj.bias",
    "attn_sinks.weight": "self_attn.sinks",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.router.weight",
    "ffn_gate_inp.bias": "mlp.router.bias",
}

FAMILIES: dict[str, Family] = {
    family.arch: family
    for family in (
        Family("olmoe", {**_ATTENTION, **_QK_NORM, **_ROUTER}, renormalised=False),
        Family("qwen2moe", _QWEN2MOE, renormalised=False),
        Family("qwen3moe", {**_ATTENTION, **_QK_NORM, **_ROUTER}, renormalised=True),
        Family("llama", {**_ATTENTION, **_ROUTER}, permuted=True, renormalised=True),
        Family("deepseek2", _DEEPSEEK2),
        Family("gpt-oss", _GPT_OSS),
    )
}


def permute_heads(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of Q or K from transformers' rotary order (two halves) to llama.cpp's (pairs).

    Args:
        rows: ``(heads * head_dim, ...)``; row ``h, half, i`` goes to ``h, i, half``.
        heads: number of heads in ``rows``.
    """
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).transpose(1, 2).reshape(rows.shape)


def unpermute_heads(rows: Tensor, heads: int) -> Tensor:
    """Undo :func:`permute_heads`."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


def merge_kv_b(k_b: Tensor, v_b: Tensor) -> Tensor:
    """Return DeepSeek's ``kv_b_proj`` weight from the two tensors that llama.cpp's absorbed attention needs.

    Args:
        k_b: ``(heads, kv_lora_rank, nope)``.
        v_b: ``(heads, value, kv_lora_rank)``.

    Returns:
        ``(heads * (nope + value), kv_lora_rank)``.
    """
    return torch.cat([k_b.transpose(1, 2), v_b], dim=1).flatten(0, 1)
