"""What ``bench`` reports adds up; how fast it is, is not tested."""

import json

import pytest
import torch

from evaluation.tiny_text import saved_model
from gangline.benchmarks.shapes import make_shape
from gangline.core.errors import UsageError
from gangline.evaluation import speed
from gangline.evaluation.bound import active_bytes, bandwidths, decode_bound
from gangline.evaluation.speed import SpeedSettings, bench_model
from gangline.evaluation.speed_report import Spread
from gangline.runtime.load import load_model
from gangline.runtime.runtime import peak_resident

SHORT = SpeedSettings(prompt_tokens=8, new_tokens=5, repetitions=3, warmup=1)


@pytest.fixture(autouse=True)
def instant_bandwidths(monkeypatch):
    monkeypatch.setattr(speed, "bandwidths", lambda runtime: (1e9, 2e10))


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
    assert bound.disk_bytes == report.miss_bytes_per_token
    seconds = max(bound.disk_bytes / 1e9, bound.memory_bytes / 2e10)
    assert bound.tokens_per_second == pytest.approx(1 / seconds)
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


def test_active_bytes_count_each_weight_once(folder):
    model = load_model(folder)
    try:
        config = model.config
        experts = config.num_hidden_layers * config.num_experts_per_tok
        routed = experts * 3 * config.hidden_size * config.intermediate_size * 4
        dense = sum(
            weight.numel() * 4
            for name, weight in model.named_parameters()
            if "experts" not in name and "embed_tokens" not in name
        )
        assert active_bytes(model) == routed + dense
    finally:
        model.gangline.close()


def test_bandwidths_of_this_machine(folder):
    model = load_model(folder)
    try:
        disk, ram = bandwidths(model.gangline)
        assert disk > 0
        assert ram > 0
        bound = decode_bound(model, 0.0, 10.0, [(disk, ram), (disk, 3 * ram)])
        assert bound.memory_bandwidth == pytest.approx(2 * ram)
        assert bound.limit == "memory"
    finally:
        model.gangline.close()


def test_spread():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)


def test_random_processor_forces_every_token():
    processor = speed._RandomTokens(vocabulary=50, seed=1)
    scores = torch.randn(1, 50)
    drawn = {int(processor(torch.zeros(1, 1), scores).argmax()) for _ in range(200)}
    assert len(drawn) > 40


@pytest.mark.parametrize(
    "settings", [{"new_tokens": 1}, {"prompt_tokens": 0}, {"repetitions": 0}, {"warmup": -1}]
)
def test_impossible_settings(settings):
    with pytest.raises(UsageError):
        SpeedSettings(**settings)
