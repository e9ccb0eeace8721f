"""Every exact composition computes the bits that everything in memory gives, and does its work."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import gangline
from gangline.core.errors import UsageError
from gangline.core.events import RoutingDetail, RoutingEvent
from gangline.core.forecast import Forecast
from gangline.models import find_moe
from gangline.policies.caches.layer_lru import LayerLRU
from gangline.policies.caches.phased import PhasedCache
from gangline.policies.compositions import COMPOSITIONS
from gangline.policies.predictors.expertflow import RoutingPathPredictor
from gangline.policies.predictors.identity import describe_model
from gangline.policies.predictors.next_gate import NextGate
from gangline.policies.predictors.pregate import PreGates
from gangline.policies.predictors.protocol import Predictor
from gangline.policies.predictors.read_me import DecoupledRouter
from gangline.policies.predictors.registry import PREDICTORS
from gangline.policies.predictors.saved import save_predictor
from gangline.policies.predictors.sida import HashFunction
from gangline.runtime.policy_choice import DEFAULT
from gangline.runtime.policy_setup import live_parts
from gangline.runtime.router_scores import router_scores
from gangline.traces import TraceWriter
from gangline.traces.describe import describe_recording
from gangline.traces.record import record_generation
from gangline.traces.recorder import Recorder
from gangline.traces.texts import Item
from near_ties import agree_unless_tied, is_tied
from tiny_models import EXPERTS, VOCABULARY, tiny_model

EXACT = sorted(name for name, found in COMPOSITIONS.items() if found.exact)
GREEDY: dict[str, Any] = {
    "max_new_tokens": 10,
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
def saved(tmp_path: Path, seed: int) -> tuple[Any, Path]:
    model = tiny_model("olmoe", seed=seed, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def answers(model: Any, prompts: list[Tensor]) -> list[Tensor]:
    """Logits of one answer after another."""
    return [torch.stack(list(model.generate(ids, **GREEDY).logits)) for ids in prompts]


def prompts() -> list[Tensor]:
    return [torch.randint(3, VOCABULARY, shape) for shape in ((1, 7), (1, 1), (3, 5), (1, 16))]


def learned(model: Any, name: str, folder: Path) -> str | None:
    """What the predictor or cache of a composition learned, as a file or trace."""
    view = find_moe(model)
    layers, hidden = len(view.blocks), view.geometry.layers[0].hidden
    wanted = COMPOSITIONS[name].predictor
    if COMPOSITIONS[name].cache == "static-hot":
        with TraceWriter(folder / "trace", describe_recording(model, "tiny", source="generation")) as writer:
            items = [Item("p", tuple(torch.randint(3, VOCABULARY, (9,)).tolist()))]
            settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            record_generation(model, Recorder(writer), items, settings=settings)
        return str(folder / "trace")
    sizes: dict[str, Any] = {
        "sida": (HashFunction, {"embedding": hidden, "experts": [EXPERTS] * layers, "hidden": 8}),
        "expertflow": (
            RoutingPathPredictor,
            {"vocabulary": VOCABULARY, "layers": layers, "experts": EXPERTS, "feed_forward": 16, "depth": 1},
        ),
        "read-me": (
            DecoupledRouter,
            {"vocabulary": VOCABULARY, "layers": layers, "experts": EXPERTS, "hidden": 16},
        ),
    }
    about = describe_model(view, "tiny")
    if wanted in sizes:
        build, config = sizes[wanted]
        return str(save_predictor(folder / "p.safetensors", wanted, build(**config), config, about))
    if wanted == "pre-gate":
        gates = [block.router.weight.detach() for block in view.blocks]  # type: ignore[union-attr]
        shapes = {"shapes": [list(gate.shape) for gate in gates[1:]]}
        return str(save_predictor(folder / "p.safetensors", wanted, PreGates(gates), shapes, about))
    return None


@pytest.mark.parametrize("slots", [4, 10])
@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str, slots: int, saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = saved
    asked = prompts()
    with gangline.load(folder, policy="default", batch_tokens=6).gangline as runtime:
        want = answers(runtime._model, asked)
    loaded = gangline.load(
        folder, expert_slots=slots, policy=name, predictor=learned(model, name, tmp_path), batch_tokens=6
    )
    with loaded.gangline as runtime:
        found = answers(loaded, asked)
        stats = runtime.store.stats
        assert runtime.policy.name == name and f"policy {name}" in runtime.banner()
        assert stats.misses > 0
        runtime.store.wait_idle()
    assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))
    assert stats.useful_prefetch_bytes + stats.wasted_prefetch_bytes <= stats.bytes_read["prefetch"]


@pytest.mark.parametrize("name", ["hobbit-exact", "hybrimoe", "fate", "pre-gated"])
def test_gates_see_the_future(name: str, saved: tuple[Any, Path], tmp_path: Path) -> None:
    """Prediction by gates brings experts that are then used, without an event having waited for them."""
    model, folder = saved
    file = learned(model, name, tmp_path)
    with gangline.load(folder, expert_slots=16, policy=name, predictor=file).gangline as runtime:
        answers(runtime._model, [torch.randint(3, VOCABULARY, (1, 6)) for _ in range(4)])
        stats = runtime.store.stats
    assert stats.useful_prefetch_bytes > 0 and stats.by_prefetch > 0


def test_layer_lru_costs_nothing(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    for options in ({"expert_slots": 6, "policy": "layer-lru"}, {}):
        with gangline.load(folder, **options).gangline as runtime:
            assert runtime._engine.policy is None
    with gangline.load(folder, policy="hobbit-exact").gangline as runtime:
        assert runtime._engine.policy is None  # all experts are in memory
        assert "idle" in runtime.banner()


class Watcher(Predictor):
    """Notes the order of calls, and forecasts what it saw last."""

    def __init__(self, layers: int) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def on_request(self, step: int, token_ids: Any, embeddings_TD: Any = None) -> list[Forecast]:
        self.calls.append(("request", step, list(token_ids)))
        return []

    def before_attention(self, step: int, layer: int, x_TD: Any) -> list[Forecast]:
        self.calls.append(("hidden", step, layer, tuple(x_TD.shape)))
        return []

    def after_gate(self, event: Any) -> list[Forecast]:
        self.calls.append(("gate", event.step, event.layer, event.tokens))
        return []

    def end_step(self, step: int) -> list[Forecast]:
        self.calls.append(("end", step))
        return []

    def end_request(self) -> None:
        self.calls.append(("end request",))


@pytest.fixture
def watcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Watcher]]:
    made: list[Watcher] = []

    def make(geometry: Any) -> Watcher:
        made.append(Watcher(len(geometry.layers)))
        return made[-1]

    monkeypatch.setitem(PREDICTORS, "watcher", make)
    yield made


def test_order_of_calls(saved: tuple[Any, Path], tmp_path: Path, watcher: list[Watcher]) -> None:
    model, folder = saved
    (tmp_path / "mine.yaml").write_text("predictor: watcher\n")
    loaded = gangline.load(folder, expert_slots=5, policy=str(tmp_path / "mine.yaml"))
    layers = len(find_moe(model).blocks)
    with loaded.gangline:
        ids = torch.randint(3, VOCABULARY, (1, 4))
        out = loaded.generate(ids, **GREEDY | {"max_new_tokens": 2}).sequences[0].tolist()
        loaded.generate(ids, **GREEDY | {"max_new_tokens": 1})
    calls = watcher[0].calls

    def expected(step: int, tokens: list[int]) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = [("request", step, tokens)]
        for layer in range(layers):
            found.append(("hidden", step, layer, (len(tokens), 32)))
            found.append(("gate", step, layer, len(tokens)))
        return [*found, ("end", step)]

    first = calls[0][1]
    want = expected(first, out[:4]) + expected(first + 1, out[4:5])
    assert calls[: len(want)] == want
    assert calls[len(want) :] == [("end request",), *expected(first + 2, out[:4])]


def test_changing_the_policy_of_a_running_model(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    asked = prompts()
    loaded = gangline.load(folder, expert_slots=8)
    with loaded.gangline as runtime:
        want = answers(loaded, asked)
        for name in ("hobbit-exact", "moe-infinity", "freetoken", "default", "layer-lru"):
            runtime.use_policy(name)
            assert runtime.store.residency() == {} and runtime.policy.name == name
            found = answers(loaded, asked)
            assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))
        assert runtime._engine.policy is None


def test_attached(saved: tuple[Any, Path]) -> None:
    model, _ = saved

    def attempt(draw: int) -> Callable[[], bool] | None:
        ids = torch.randint(3, VOCABULARY, (1, 6))

        def tokens() -> Tensor:
            return answers(model, [ids])[0].argmax(-1)

        with gangline.attach(model, expert_slots=6, policy="hybrimoe") as runtime:
            assert "GPU tier" in runtime.banner()
            found = tokens()
        if torch.equal(found, tokens()):
            return None
        return lambda: is_tied(model, tokens, lambda a, b: not torch.equal(a, b))

    agree_unless_tied(attempt)


def test_refusals(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = saved
    other = tiny_model("mixtral", seed=1)
    path = tmp_path / "x.yaml"
    path.write_text("cache: belady\n")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"policy": "hobit"}, "did you mean 'hobbit'"),
        ({"policy": "hobbit"}, "its exact part is hobbit-exact"),
        ({"policy": "sida"}, "gangline predict train"),
        ({"policy": "fiddler"}, "gangline trace"),
        ({"policy": str(path)}, "knows the future"),
        ({"policy": str(tmp_path / "none.yaml")}, "cannot read"),
        ({"predictor": "p"}, "name it"),
        ({"policy": "sida", "predictor": str(tmp_path / "none")}, "does not exist"),
        ({"policy": "sida", "predictor": learned(other, "sida", tmp_path)}, "was trained for tiny"),
        ({"policy": "fiddler", "predictor": str(folder)}, "is not a trace"),
    ]
    for options, says in cases:
        with pytest.raises(gangline.GanglineError, match=says):
            gangline.load(folder, expert_slots=6, **options)
    with pytest.raises(UsageError, match="not of read-me"):
        gangline.load(folder, expert_slots=6, policy="sida", predictor=learned(model, "read-me", tmp_path))


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss", "jetmoe"])
def test_router_scores_are_the_routers_and_nobody_hears_of_them(family: str, seed: int) -> None:
    view = find_moe(tiny_model(family, seed=seed))
    heard: list[int] = []
    block = view.blocks[-1]
    assert block.router is not None
    block.router.register_forward_hook(lambda *_: heard.append(1))
    x_TD = torch.randn(6, block.geometry.hidden)
    scores_TE = router_scores(view)[-1](x_TD)
    assert heard == []
    with torch.no_grad():
        routed = block.adapter.route(block, x_TD, torch.zeros(6, dtype=torch.long))
    logits_TE = routed.logits_TE.float()
    sigmoid = block.router_spec is not None and block.router_spec.score == "sigmoid"
    want_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)
    torch.testing.assert_close(torch.from_numpy(scores_TE), want_TE, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_several_routers_at_once_forecast_the_same(family: str, seed: int) -> None:
    model = tiny_model(family, seed=seed, dtype=torch.float32).eval()
    view = find_moe(model)
    gates, width = router_scores(view), model.config.hidden_size
    for rows, top_k in itertools.product((1, 5), (None, 2)):
        detail = RoutingDetail(gate_input_TD=torch.randn(rows, width))
        event = RoutingEvent(3, 0, "decode", rows, (0,), (rows,), detail)
        together = NextGate(gates, len(gates), top_k).after_gate(event)
        assert len(together) == len(gates) - 1
        for n, one in enumerate(together, start=1):
            alone = NextGate([lambda x, n=n: gates[n](x)] * len(gates), n, top_k).after_gate(event)[-1]
            assert one == alone
        assert NextGate(gates, 1, most_tokens=rows - 1).after_gate(event) == []


@pytest.mark.parametrize(("family", "runs_as"), [("olmoe", "phased"), ("muse_spark", "layer-lru")])
def test_default_asks_plain_routers_only(family: str, runs_as: str, seed: int) -> None:
    view = find_moe(tiny_model(family, seed=seed))
    pools = [(1, 4, range(len(view.blocks)))]
    plan = SimpleNamespace(pools=pools, everything_resident=False)
    caches = {"phased": PhasedCache, "layer-lru": LayerLRU}
    parts = live_parts(DEFAULT, view, plan)
    assert [type(cache) for cache in parts.caches] == [caches[runs_as]]
    assert parts.passive == (runs_as == "layer-lru")
    if runs_as == "layer-lru":
        with pytest.raises(UsageError, match="choose another policy"):
            router_scores(view)
