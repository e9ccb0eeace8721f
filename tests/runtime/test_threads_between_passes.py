"""torch computes alone between native passes of one ``generate()``, and gets its threads back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import gangline
from gangline.kernels.cpu import native
from gangline.runtime import native_decode
from gangline.runtime.engine import Engine
from gangline.runtime.torch_threads import TorchThreads
from tiny_models import VOCABULARY, tiny_model

if native() is None:
    pytest.skip("the native CPU core is not built here", allow_module_level=True)


@pytest.fixture(autouse=True)
def same_threads_after():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_change_only_where_they_are_lent() -> None:
    threads = TorchThreads()
    threads.one()
    assert torch.get_num_threads() == 2
    with threads.lent():
        assert torch.get_num_threads() == 2
        threads.one()
        assert torch.get_num_threads() == 1
        with threads.lent():
            threads.many()
            assert torch.get_num_threads() == 2
            threads.one()
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_threads_are_given_back_after_an_error() -> None:
    threads = TorchThreads()
    with pytest.raises(KeyError), threads.lent():
        threads.one()
        raise KeyError
    assert torch.get_num_threads() == 2


def test_generate_computes_alone_and_gives_the_threads_back(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("olmoe", seed=seed).save_pretrained(tmp_path)
    seen = []
    run = native_decode.NativeDecode._run

    def noted(self: Any, step: Any) -> Any:
        output = run(self, step)
        seen.append(torch.get_num_threads())
        return output

    monkeypatch.setattr(native_decode.NativeDecode, "_run", noted)
    model = gangline.load(str(tmp_path), precision="int4", expert_slots=12, threads=2)
    torch.set_num_threads(2)
    ids_BP = torch.randint(3, VOCABULARY, (1, 7))
    model.generate(ids_BP, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert seen and set(seen) == {1}
    assert torch.get_num_threads() == 2


def test_a_native_pass_without_generate_computes_alone_too(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("olmoe", seed=seed).save_pretrained(tmp_path)
    model = gangline.load(str(tmp_path), precision="int4", expert_slots=12, threads=2)
    torch.set_num_threads(2)
    seen = []
    forward = Engine.forward

    def noted(self: Any, *args: Any) -> Any:
        seen.append(torch.get_num_threads())
        return forward(self, *args)

    monkeypatch.setattr(Engine, "forward", noted)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for _ in range(2):
            token_BS = torch.randint(3, VOCABULARY, (1, 1))
            model(token_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)
            assert torch.get_num_threads() == 2
    assert seen and set(seen) == {1}
