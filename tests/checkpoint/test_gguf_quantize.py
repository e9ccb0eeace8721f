"""Our quantized GGUF files have the types of llama.cpp's own quantize tool, and our Q6_K is one."""

import ctypes

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gangline.checkpoint.gguf_q6_k import encode_q6_k
from gangline.checkpoint.gguf_writer import write_gguf
from gangline.core.errors import UnsupportedModelError
from gangline.formats.registry import get_codec

SIZES = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}
MODELS = {
    "eight experts": {"model_type": "mixtral", "num_local_experts": 8},
    "more experts": {"model_type": "olmoe", "num_experts": 16},
    "tied": {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "moe_intermediate_size": 256,
        "head_dim": 64,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "tied, head copied": {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "tie_word_embeddings": True,
    },
    "no super-blocks": {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "hidden_size": 96,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
}
FILE_TYPES = {"q8_0": 7, "q4_0": 2}


def types_in(path):
    gguf = pytest.importorskip("gguf")
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("type", FILE_TYPES)
@pytest.mark.parametrize("name", MODELS)
def test_types_are_those_of_llama_cpp(tmp_path, name, type, seed):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    config = AutoConfig.for_model(**(SIZES | MODELS[name]))
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    plain = write_gguf(tmp_path, tmp_path / "bf16.gguf", type="bf16")
    ours = write_gguf(tmp_path, tmp_path / "ours.gguf", type=type)
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.nthread = FILE_TYPES[type], 1
    theirs = tmp_path / "theirs.gguf"
    assert llama_cpp.llama_model_quantize(bytes(plain), bytes(theirs), ctypes.byref(how)) == 0
    assert types_in(ours) == types_in(theirs)


def test_fewer_key_heads_than_llama_cpp_computes_are_refused(tmp_path):
    pytest.importorskip("gguf")
    config = AutoConfig.for_model(**(SIZES | MODELS["more experts"] | {"num_key_value_heads": 2}))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="num_key_value_heads = 2"):
        write_gguf(tmp_path, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_the_head_can_be_chosen(tmp_path, seed):
    pytest.importorskip("gguf")
    config = AutoConfig.for_model(**(SIZES | MODELS["more experts"]))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    types = types_in(write_gguf(tmp_path, tmp_path / "m.gguf", type="q4_0", head="q8_0"))
    assert (types["output.weight"], types["token_embd.weight"]) == ("Q8_0", "Q4_0")


def test_q6_k_is_close_and_keeps_zeros(seed):
    x = torch.randn(40, 512) * torch.rand(40, 1).mul(8).exp()
    x[0] = 0
    x[1, 16:48] = 0
    raw = encode_q6_k(x)
    assert raw.shape == (80, 210)
    back = get_codec("ggml:Q6_K").decode(raw.view(-1), (40, 512), torch.float32)
    assert torch.equal(back[0], x[0])
    assert torch.equal(back[1, 16:48], x[1, 16:48])
    error = (back[1:] - x[1:]).norm(dim=1) / x[1:].norm(dim=1)
    assert error.max() < 0.025
    # No weight is further off than the largest of its group allows: half a step of 32, and rounded scales.
    off = (back - x).view(40, 32, 16).abs().amax(-1)
    assert (off <= x.view(40, 32, 16).abs().amax(-1) * 0.04 + x.abs().amax(-1, keepdim=True) * 0.005).all()


def test_q6_k_agrees_with_the_gguf_package(seed):
    gguf = pytest.importorskip("gguf")
    x = torch.randn(4, 256)
    raw = encode_q6_k(x)
    theirs = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType.Q6_K)
    ours = get_codec("ggml:Q6_K").decode(raw.view(-1), (4, 256), torch.float32)
    np.testing.assert_array_equal(ours.numpy(), theirs)
