"""llama.cpp computes the same logits from our files: rotary order, router and expert layout are right."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint.gguf_models import CONFIGS, WRITABLE, tiny_model, write_foreign
from gangline.checkpoint.gguf_writer import write_gguf
from near_ties import agree_unless_tied, is_tied

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

# llama.cpp rounds YaRN's limits to whole channels, gpt-oss does not; and it knows a DeepSeek without query
# LoRA by its number of layers.
_COMPARABLE = {
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
    "deepseek_v2": {"q_lora_rank": 32},
}


@pytest.mark.parametrize("family", CONFIGS)
def test_same_logits(tmp_path: Path, family: str, seed: int) -> None:
    model = tiny_model(family, **_COMPARABLE.get(family, {}))
    path = tmp_path / "m.gguf"
    if family in WRITABLE:
        model.save_pretrained(tmp_path)
        write_gguf(tmp_path, path, type="f32")
    else:
        write_foreign(model, path)
    llama = llama_cpp.Llama(
        str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1, flash_attn=False, type_k=0, type_v=0
    )

    @torch.no_grad()
    def attempt(draw: int) -> Callable[[], bool] | None:
        ids = torch.randint(3, 96, (24,))
        llama.reset()
        llama.eval(ids[:16].tolist())
        llama.eval(ids[16:].tolist())
        theirs = torch.from_numpy(np.array(llama.scores[: len(ids)]))
        ours = model(ids[None]).logits[0]
        best, second = ours.topk(2).values.unbind(-1)
        clear = best - second > 4e-3
        assert clear.sum() > 12
        if (theirs - ours).abs().max() <= 2e-3:
            assert torch.equal(theirs.argmax(-1)[clear], ours.argmax(-1)[clear])
            return None
        return torch.no_grad()(lambda: is_tied(model, lambda: model(ids[None]).logits, _far, noise=1e-5))

    agree_unless_tied(attempt)


def _far(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not (one - other).abs().max() <= 4e-3


@pytest.mark.parametrize("type", ["bf16", "f16", "q8_0", "q4_0"])
def test_every_type_loads_without_a_vocabulary(tmp_path: Path, type: str, seed: int) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path)
    path = write_gguf(tmp_path, tmp_path / "m.gguf", type=type)
    llama = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1, use_mmap=True)
    llama.eval([5, 6, 7])
    assert np.isfinite(llama.scores[:3]).all()
    assert llama.scores[:3].std() > 0.1
