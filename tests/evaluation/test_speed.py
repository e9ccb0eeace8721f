"""What ``bench`` reports adds up; how fast it is, is not tested."""

import dataclasses
import json
from contextlib import contextmanager

import pytest
import torch

from evaluation.tiny_text import saved_model
from gangline.benchmarks.shapes import make_shape
from gangline.core.errors import UsageError
from gangline.evaluation import speed
from gangline.evaluation.bound import Bandwidths, Weights, bandwidths, decode_bound, weights_of
from gangline.evaluation.speed import Routing, SpeedSettings, bench_model
from gangline.evaluation.speed_report import Spread
from gangline.evaluation.speed_run import ForcedTokens, Sample
from gangline.evaluation.speed_side import Facts
from gangline.runtime.load import load_model
from gangline.runtime.runtime import peak_resident

SHORT = SpeedSettings(prompt_tokens=8, new_tokens=5, repetitions=3, warmup=1)


@pytest.fixture(autouse=True)
def instant_bandwidths(monkeypatch):
    monkeypatch.setattr(
        speed, "bandwidths", lambda *_, disk: Bandwidths(2e10, 1e9, "a way") if disk else Bandwidths(2e10)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"), "olmoe", seed=5)


@pytest.mark.parametrize("slots", [None, 4])
def test_report_adds_up(folder, slots):
    steps = []
    report = bench_model(folder, SHORT, progress=steps.append, expert_slots=slots)
    assert report.kind == "measured"
    assert report.text == "text"
    assert report.decode.n == report.prefill.n == 3
    assert report.decode.low <= report.decode.median <= report.decode.high
    assert report.prefill.median == pytest.approx(8 / report.first_token_seconds.median, rel=1e-6)
    assert report.hit_rate["host"] + report.hit_rate["disk"] == pytest.approx(1)
    bound = report.bound
    assert bound.disk_way == "a way"
    seconds = max(bound.disk_bytes / 1e9, bound.memory_bytes / 2e10)
    assert bound.tokens_per_second == pytest.approx(1 / seconds)
    assert bound.share == bound.shares.median
    if slots is None:
        assert bound.share == pytest.approx(report.decode.median / bound.tokens_per_second)
    assert sum(step.startswith("run ") for step in steps) == 4
    assert json.loads(json.dumps(report.to_dict()))["decode"]["n"] == 3


def test_everything_resident_reads_nothing(folder):
    report = bench_model(folder, SHORT)
    assert report.miss_bytes_per_token == 0
    assert report.hit_rate == {"host": 1.0, "disk": 0.0}
    assert report.bound.limit == "memory"


def test_few_slots_read_from_disk(folder):
    report = bench_model(folder, SHORT, expert_slots=1)
    assert report.miss_bytes_per_token > 0
    assert report.hit_rate["disk"] > 0.5
    assert report.bound.limit == "disk"


def test_random_tokens_without_a_tokenizer(tmp_path):
    folder = make_shape("tiny-olmoe", tmp_path / "shape")
    report = bench_model(folder, SHORT, name="tiny-olmoe")
    assert (report.text, report.model) == ("random", "tiny-olmoe")


def test_encoder_decoder(tmp_path):
    folder = make_shape("tiny-switch", tmp_path / "shape")
    assert bench_model(folder, SHORT).decode.median > 0


def test_peak_is_at_least_what_is_resident_now():
    import psutil

    assert peak_resident() >= psutil.Process().memory_info().rss * 0.9


def test_weights_count_each_once(folder):
    model = load_model(folder)
    try:
        config = model.config
        expert = 3 * config.hidden_size * config.intermediate_size * 4
        dense = sum(
            weight.numel() * 4
            for name, weight in model.named_parameters()
            if "experts" not in name and "embed_tokens" not in name
        )
        weights = weights_of(model)
        assert weights.dense == dense
        assert weights.routed == config.num_hidden_layers * config.num_experts_per_tok * expert
        assert weights.expert == expert
        assert weights.step_bytes(1, 0) == dense + weights.routed
        assert weights.step_bytes(4, 7.5) == dense + 7.5 * expert
        # Four tokens that route evenly: an expert of E is missed with (1 - K / E) ** 4.
        experts, top_k = config.num_experts, config.num_experts_per_tok
        used = config.num_hidden_layers * experts * (1 - (1 - top_k / experts) ** 4)
        assert weights.step_bytes(4, 0) == pytest.approx(dense + used * expert)
    finally:
        model.gangline.close()


def test_bandwidths_of_this_machine(folder):
    model = load_model(folder)
    try:
        found = bandwidths(weights_of(model), 1, disk=True)
        assert found.disk > 0
        assert found.memory > 0
        assert "depth" in found.disk_way
        assert bandwidths(weights_of(model), 1, disk=False).disk is None
    finally:
        model.gangline.close()


WEIGHTS = Weights(dense=100, routed=60, expert=10.0, spread=((60, 240),), files=("x",), record=10)


def test_the_bound_is_the_most_that_was_seen():
    samples = [Sample(1, 2, bytes_read=0), Sample(1, 4, bytes_read=0), Sample(1, 4, bytes_read=0)]
    seen = [Bandwidths(160, 5.0, "a"), Bandwidths(320), Bandwidths(160), Bandwidths(80, 7.0, "b")]
    bound = decode_bound(WEIGHTS, samples, 4, 1, [(seen[i], seen[i + 1]) for i in range(3)])
    assert (bound.disk_bandwidth, bound.disk_way, bound.memory_bandwidth) == (7.0, "b", 320)
    assert (bound.limit, bound.tokens_per_second) == ("memory", 2)
    # Each run beside its own windows: 2 tokens/s of 2, 1 of 2, 1 of 1.
    assert bound.shares == Spread(1.0, 0.5, 1.0, 3)
    assert bound.share == 1.0


def test_reading_from_disk_can_be_the_bound():
    seen = (Bandwidths(1e9, 50.0, "a"), Bandwidths(1e9, 40.0, "b"))
    bound = decode_bound(WEIGHTS, [Sample(1, 10, hits=8, misses=8, bytes_read=400)], 4, 2, [seen])
    assert (bound.limit, bound.disk_bytes, bound.memory_bytes) == ("disk", 50, 70)
    # A step reads 100 bytes, two seconds; it decodes two tokens.
    assert (bound.tokens_per_second, bound.share) == (1, pytest.approx(0.8))


def test_a_batch_counts_all_its_tokens(folder):
    report = bench_model(folder, dataclasses.replace(SHORT, batch=3, repetitions=1), expert_slots=4)
    assert report.batch == 3
    assert report.prefill.median == pytest.approx(3 * 8 / report.first_token_seconds.median)
    assert report.miss_bytes_per_token > 0


def test_a_batch_fits_into_the_budget_it_was_planned_for(folder):
    settings = SpeedSettings(prompt_tokens=40, new_tokens=3, repetitions=1, warmup=0, batch=3)
    report = bench_model(folder, settings, memory="4GiB", batch_tokens=30)
    assert report.decode.median > 0


def test_routing_is_entered_and_named(folder):
    events = []

    @contextmanager
    def around(model):
        events.append(model.config.model_type)
        yield
        events.append("left")

    report = bench_model(folder, SHORT, routing=Routing("of a test", around))
    assert events == ["olmoe", "left"]
    assert report.routing == "of a test"


def test_facts_survive_json():
    facts = Facts("banner", 50, 2, WEIGHTS, None)
    assert Facts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts


def test_spread():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)


@pytest.mark.parametrize("rows", [1, 3])
def test_forced_tokens_follow(seed, rows):
    following = torch.randint(50, (rows, 6))
    following[0, :2] = torch.tensor([0, 49])
    processor = ForcedTokens(following)
    for step in range(6):
        scores = processor(torch.zeros(rows, 1), torch.randn(rows, 50))
        assert scores.shape == (rows, 50) and int(scores.isfinite().sum()) == rows
        assert torch.equal(scores.argmax(-1), following[:, step])


@pytest.mark.parametrize(
    "settings", [{"new_tokens": 1}, {"prompt_tokens": 0}, {"repetitions": 0}, {"warmup": -1}, {"batch": 0}]
)
def test_impossible_settings(settings):
    with pytest.raises(UsageError):
        SpeedSettings(**settings)
