"""HOBBIT's two precisions in the engine: what is computed, what it costs, and who must allow it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gangline
from gangline.core.errors import UsageError
from gangline.core.events import RoutingDetail, RoutingEvent
from gangline.core.keys import ExpertKey, low_copy
from gangline.core.precision import Precision
from gangline.kernels.grouping import group_by_expert
from gangline.kernels.sums import accumulate
from gangline.policies.precision import HobbitPrecision, divide_slots
from gangline.runtime.engine import Engine
from gangline.runtime.mixed import MixedPrecision
from gangline.runtime.stats import StoreStats
from tiny_models import EXPERTS, VOCABULARY, tiny_model

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


def test_each_expert_is_computed_as_it_was_chosen(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what the same experts give in memory: those of the model, or those of the model in int4."""
    policy = composition_file(tmp_path, high=0.3, low=0.8, bits="int4")
    events: list[dict[str, Any]] = []
    divide, forward = MixedPrecision.divide, Engine.forward

    def divided(self: Any, event: Any, grouping: Any) -> Any:
        found = divide(self, event, grouping)
        events[-1]["chosen"] = found[1][0].chosen
        return found

    def computed(self: Any, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        events.append({"layer": layer, "x": x.clone(), "ids": ids.clone(), "weights": weights.clone()})
        events[-1]["out"] = forward(self, layer, x, ids, weights)
        return events[-1]["out"].clone()

    loaded = gangline.load(saved, expert_slots=8, policy=policy, mode="mixed")
    with loaded.gangline as runtime, monkeypatch.context() as patched:
        patched.setattr(MixedPrecision, "divide", divided)
        patched.setattr(Engine, "forward", computed)
        answers(loaded, prompts())
        stats = runtime.stats()
        assert stats.low_hits + stats.low_misses > 0
        used = stats.host_hits + stats.host_misses + stats.skipped
        assert f"{stats.skipped / used:.1%} left out" in runtime.banner()
    with gangline.load(saved).gangline as high, gangline.load(saved, precision="int4").gangline as low:
        for event in events:
            assert torch.equal(event["out"], expected(event, {Precision.HIGH: high, Precision.LOW: low}))


def expected(event: dict[str, Any], runtimes: dict[Precision, Any]) -> Tensor:
    """Sums in ascending id, for several tokens those in high precision before the others."""
    x, layer = event["x"], event["layer"]
    grouping = group_by_expert(event["ids"], event["weights"], EXPERTS)
    order = list(range(len(grouping.experts)))
    if len(x) > 1:
        order.sort(key=lambda n: -event["chosen"][grouping.experts[n]])
    out = torch.zeros(x.shape)
    for n in order:
        expert = grouping.experts[n]
        how = event["chosen"][expert]
        if how is Precision.SKIP:
            continue
        runtime, part = runtimes[how], grouping.only([n])
        kernel, bound = runtime._engine._kernels[layer], runtime.store.bound(ExpertKey(layer, expert))
        accumulate(kernel.pairs(x, part.token_P, part.starts, [bound], [expert]), part, out)
    return out.to(x.dtype)


class Shelf:
    """As much of a store as dividing needs."""

    def __init__(self, held: set[ExpertKey]) -> None:
        self.held, self.stats = held, StoreStats()

    def holds(self, key: ExpertKey) -> bool:
        return key in self.held


@pytest.mark.parametrize("renormalise", [False, True])
def test_what_is_left_out_and_what_is_there_anyway(renormalise: bool) -> None:
    """The card's vector: 0.5, 0.3, 0.15, 0.05 are high, high, low, skipped, unless a better copy is there."""
    ids, weights = torch.tensor([[6, 2, 4, 0]]), torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    detail = RoutingDetail(ids_TK=ids.numpy(), weights_TK=weights.numpy())
    grouping = group_by_expert(ids, weights, 8)
    event = RoutingEvent(1, 2, "decode", 1, grouping.experts, grouping.counts, detail)
    rule, shelf = HobbitPrecision(renormalise=renormalise), Shelf(set())
    used, (high, low) = MixedPrecision(shelf, rule, 3).divide(event, grouping)  # type: ignore[arg-type]
    assert (used.experts, high.event.experts, low.event.experts) == ((2, 4, 6), (2, 6), (4,))
    assert (high.event.layer, low.event.layer) == (2, 5) and shelf.stats.skipped == 1
    assert high.whole == event and low.whole == replace(event, layer=5)
    total = 1.0 if renormalise else 0.95
    assert float(used.weight_P1.sum()) == pytest.approx(total)
    shelf.held = {ExpertKey(2, 4), low_copy(ExpertKey(2, 0), 3), low_copy(ExpertKey(2, 6), 3)}
    used, (high, low) = MixedPrecision(shelf, rule, 3).divide(event, grouping)  # type: ignore[arg-type]
    assert (high.event.experts, low.event.experts) == ((2, 4, 6), (0,)) and shelf.stats.skipped == 1
    assert torch.equal(used.weight_P1, grouping.weight_P1)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_other_families_and_random_victims(family: str, tmp_path: Path, seed: int) -> None:
    tiny_model(family, seed=seed, dtype=torch.bfloat16).eval().save_pretrained(tmp_path / "m")
    with gangline.load(
        tmp_path / "m", expert_slots=9, policy="hobbit", mode="mixed", cache_seed=seed
    ).gangline as runtime:
        for logits in answers(runtime._model, prompts()):
            assert bool(torch.isfinite(logits).all())
        stats = runtime.stats()
        assert stats.low_hits + stats.low_misses + stats.skipped > 0
        assert runtime.store.stats.hits >= stats.low_hits and runtime.plan.low_codecs
        runtime.use_policy("hobbit-exact")
        before = runtime.stats()
        assert before.approximate is None
        answers(runtime._model, prompts()[:1])
        after = runtime.stats()
        assert (after.low_hits, after.skipped) == (before.low_hits, before.skipped)


def test_a_built_model_can_have_two_precisions(seed: int) -> None:
    model = tiny_model("olmoe", seed=seed, dtype=torch.float32).eval()
    asked = prompts()
    want = answers(model, asked)
    with gangline.attach(model, expert_slots=9, policy="hobbit", mode="mixed") as runtime:
        answers(model, asked)
        assert runtime.stats().low_hits + runtime.stats().low_misses > 0
    assert all(torch.equal(a, b) for a, b in zip(want, answers(model, asked), strict=True))


def test_with_everything_in_memory_nothing_is_approximate(saved: Path) -> None:
    asked = prompts()
    with gangline.load(saved).gangline as runtime:
        want = answers(runtime._model, asked)
    with gangline.load(saved, policy="hobbit", mode="mixed").gangline as runtime:
        found = answers(runtime._model, asked)
        assert runtime.plan.low_slots == () and runtime.stats().approximate is None
        assert runtime.banner().startswith("exact")
        runtime.use_policy("hobbit", mode="mixed")
    assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "hobbit"}, "hobbit-exact, or allow it with --mode mixed"),
        ({"policy": "hobbit-exact", "mode": "mixed"}, "give --policy hobbit"),
        ({"mode": "mixed"}, "give --policy hobbit"),
        ({"policy": "hobbit", "mode": "mixed", "precision": "int2", "expert_slots": 9}, "no smaller"),
    ],
)
def test_who_changes_answers_must_be_allowed_to(saved: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        gangline.load(saved, **options)


def test_a_model_without_copies_does_not_change_to_two_precisions(saved: Path) -> None:
    with gangline.load(saved, expert_slots=9).gangline as runtime:
        with pytest.raises(UsageError, match="no slots for a second precision"):
            runtime.use_policy("hobbit", mode="mixed")
        with pytest.raises(UsageError, match="hobbit-exact"):
            runtime.use_policy("hobbit")


def test_the_plan_counts_both_precisions(saved: Path, tmp_path: Path) -> None:
    plain = gangline.plan(saved, expert_slots=12)
    for share in (0.1, 0.3):  # more copies than experts are never kept
        policy = composition_file(tmp_path, share=share)
        plan = gangline.plan(saved, expert_slots=12, policy=policy, mode="mixed")
        (size, _, layers), (low_size, copies, behind) = plan.pools
        assert low_size < size and behind == tuple(len(layers) + layer for layer in layers)
        assert plan.slot_bytes <= plain.slot_bytes and plan.kernel >= plain.kernel
        assert low_size * copies == pytest.approx(share * plain.slot_bytes, abs=low_size)
        what, nbytes, why = plan.rows_table()[-1]
        assert (what, nbytes) == ("low-precision slots", low_size * copies) and "approximate" in why
        assert any("approximate" in note for note in plan.notes)


@given(st.integers(2, 99), st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 0.99), st.integers(1, 120))
def test_slots_of_both_precisions_fit_where_one_did(
    slots: int, low: int, more: int, share: float, experts: int
) -> None:
    of_high, of_low = divide_slots(slots, low + more, low, share, experts)
    assert 1 <= of_high <= experts and 1 <= of_low <= experts
    assert of_high * (low + more) + of_low * low <= slots * (low + more)
