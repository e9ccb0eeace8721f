"""HOBBIT's two precisions in the engine: what is computed, what it costs, and who must allow it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gangline
from tiny_models import VOCABULARY, tiny_model

GREEDY: dict[str, Any] = {
    "max_new_tokens": 8,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "output_logits": True,
    "return_dict_in_generate": True,
}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path / "home"))


@pytest.fixture
def saved(tmp_path: Path, seed: int) -> Path:
    tiny_model("olmoe", seed=seed, dtype=torch.float32).eval().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def composition_file(folder: Path, **options: Any) -> str:
    """HOBBIT without reading ahead, under other thresholds."""
    path = folder / "mixed.yaml"
    named = ", ".join(f"{key}: {value}" for key, value in {"name": "HobbitPrecision", **options}.items())
    path.write_text(f"like: hobbit\npredictor: none\nprefetcher:\nprecision: {{{named}}}\n")
    return str(path)


def answers(model: Any, prompts: list[Tensor]) -> list[Tensor]:
    """Logits of one answer after another."""
    return [torch.stack(list(model.generate(ids, **GREEDY).logits)) for ids in prompts]


def prompts() -> list[Tensor]:
    return [torch.randint(3, VOCABULARY, shape) for shape in ((1, 7), (1, 1), (3, 5), (1, 12))]


@pytest.mark.parametrize("high", [1, 0.9999999])
def test_a_threshold_of_one_is_exact(saved: Path, tmp_path: Path, high: float) -> None:
    asked, policy = prompts(), composition_file(tmp_path, high=high, low=1)
    with gangline.load(saved).gangline as runtime:
        want = answers(runtime._model, asked)
    with gangline.load(saved, expert_slots=8, policy=policy, mode="mixed").gangline as runtime:
        found = answers(runtime._model, asked)
        stats = runtime.stats()
        assert runtime.plan.low_slots and stats.host_misses > 0
        assert (stats.low_hits, stats.low_misses, stats.skipped) == (0, 0, 0)
        assert (stats.approximate is None) == (high == 1)
    assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))
