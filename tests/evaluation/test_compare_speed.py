"""Other engines get the same tokens and the same weights in turns; how fast they are is not tested."""

import dataclasses
import io
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from evaluation.tiny_text import saved_model
from gangline.checkpoint.gguf_writer import gguf_size, write_gguf
from gangline.core.errors import UsageError
from gangline.evaluation import compare_speed as module
from gangline.evaluation import compare_speed_llamacpp, compare_speed_worker
from gangline.evaluation.bound import Bandwidths, Weights
from gangline.evaluation.compare_speed import compare_speed, compare_with
from gangline.evaluation.compare_speed_llamacpp import LlamaCppSide, require_llama_cpp
from gangline.evaluation.compare_speed_peers import Peer, find_peer, gguf_reads, gguf_type
from gangline.evaluation.compare_speed_process import PeerError, SideProcess
from gangline.evaluation.speed import SpeedSettings
from gangline.evaluation.speed_run import Sample
from gangline.evaluation.speed_side import Facts

SHORT = SpeedSettings(prompt_tokens=6, new_tokens=5, repetitions=3, warmup=1)
READS = Weights(dense=100, routed=60, expert=10.0, spread=((60, 240),), files=("x",), record=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"), "qwen3_moe", seed=5)


@pytest.fixture
def fake_sides(monkeypatch):
    """Replace the processes by sides whose runs take known times; return the order of events."""
    events, times = [], {"ours": (1.0, 2.0), "llama.cpp": (2.0, 6.0), "transformers": (4.0, 1.0)}

    class Fake:
        def __init__(self, job, threads):
            self.side = job["side"]
            events.append(f"open {self.side}")
            mine = self.side == "ours"
            self.facts = Facts(f"banner {len(events)}", 50, threads, READS, 7) if mine else None

        def run(self, ids_BP, new_tokens, following_BN):
            assert following_BN.shape == (ids_BP.shape[0], new_tokens)
            events.append((self.side, ids_BP.tolist(), following_BN.tolist()))
            return Sample(*times[self.side])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            events.append(f"close {self.side}")

    monkeypatch.setattr(module, "SideProcess", Fake)
    monkeypatch.setattr(
        module, "bandwidths", lambda *_, disk: Bandwidths(1000.0, 500.0 if disk else None, "a way")
    )
    return events


def peers(reads=READS):
    return [
        Peer("llama.cpp", "1", "x GGUF", {"side": "llama.cpp"}, 10, reads),
        Peer("transformers", "2", "bf16", {"side": "transformers"}, 10, None),
    ]


def runs_of(events):
    return [event for event in events if not isinstance(event, str)]


def test_sides_take_turns_on_the_same_tokens(folder, fake_sides):
    report = compare_with(folder, peers(), SHORT, together=True)
    names = ["ours", "llama.cpp", "transformers"]
    assert fake_sides[:3] == [f"open {name}" for name in names]
    assert fake_sides[-3:] == [f"close {name}" for name in reversed(names)]
    runs = runs_of(fake_sides)
    assert [run[0] for run in runs] == names * 4
    rounds = [runs[i : i + 3] for i in range(0, 12, 3)]
    for one in rounds:
        assert one[0][1:] == one[1][1:] == one[2][1:]
    assert len({str(one[0][1:]) for one in rounds}) == 4
    assert report.together is True


def test_ratios_and_shares(folder, fake_sides):
    report = compare_with(folder, peers(), dataclasses.replace(SHORT, batch=2), together=True)
    # 2 sequences, 4 steps.
    assert (report.decode.median, report.prefill.median) == (4.0, 12.0)
    llama, plain = report.peers
    assert (llama.decode.median, llama.prefill.median) == (pytest.approx(8 / 6), 6.0)
    assert (llama.decode_ratio.median, llama.prefill_ratio.median, llama.decode_ratio.n) == (3.0, 2.0, 3)
    assert (plain.decode_ratio.median, plain.prefill_ratio.median) == (0.5, 4.0)
    step = READS.step_bytes(2, 0)
    assert llama.decode_share.median == pytest.approx(step * 4 / 6 / 1000)
    assert plain.decode_share is None
    assert report.bound.share == pytest.approx(step * 4 / 2 / 1000)
    assert report.bound.disk_bandwidth == 500
    found = json.loads(json.dumps(report.to_dict()))["peers"][0]
    assert (found["name"], found["decode_ratio"]["median"]) == ("llama.cpp", 3.0)


def test_in_turns_one_is_loaded_at_a_time(folder, fake_sides):
    report = compare_with(folder, peers(), SHORT, together=False)
    loaded = 0
    for event in fake_sides:
        if isinstance(event, str):
            loaded += 1 if event.startswith("open") else -1
        assert loaded <= 1
    assert fake_sides.count("open ours") == 3
    timed = runs_of(fake_sides)[1::2]  # each is warmed up after loading
    assert [run[0] for run in timed] == ["ours", "llama.cpp", "transformers"] * 3
    assert timed[0][1:] == timed[1][1:] == timed[2][1:]
    assert report.together is False


def test_memory_decides_what_stays_loaded(folder, fake_sides):
    assert compare_with(folder, peers(), SHORT).together is True
    large = [dataclasses.replace(peers()[0], needed=2**60)]
    assert compare_with(folder, large, SHORT).together is False


@pytest.mark.parametrize("batch", [1, 3])
def test_llama_cpp_gets_every_sequence(tmp_path, batch, seed):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=96,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    path = write_gguf(tmp_path, tmp_path / "m.gguf", type="f32")
    side = LlamaCppSide(str(path), threads=1, batch=batch, context=20)
    ids = torch.randint(3, 96, (batch, 14))
    try:
        for _ in range(2):  # a second run starts from an empty cache
            sample = side.run(ids[:, :9], 5, ids[:, 9:])
            assert sample.prefill_seconds > 0
            assert sample.decode_seconds > 0
            theirs = torch.stack([side.logits(row) for row in range(batch)])
            with torch.no_grad():
                ours = model(ids[:, :13]).logits[:, -1]
            torch.testing.assert_close(theirs, ours, atol=1e-2, rtol=0)
    finally:
        side.close()


def test_gguf_of_the_same_weights(folder, tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path / "home"))
    said = []
    peer = find_peer("llama.cpp", folder, SHORT, threads=1, progress=said.append)
    assert peer.weights == "f32 GGUF"
    (file,) = (tmp_path / "home" / "gguf").iterdir()
    assert peer.job["gguf"] == str(file)
    assert file.name.endswith("-f32.gguf")
    assert len(said) == 1
    assert "KiB" in said[0] or "MiB" in said[0]
    assert gguf_size(folder, "f32") <= file.stat().st_size < gguf_size(folder, "f32") * 1.2 + 20_000
    find_peer("llama.cpp", folder, SHORT, threads=1, progress=said.append)
    assert len(said) == 1
    reads = gguf_reads(file)
    config = AutoConfig.from_pretrained(folder)
    expert = 3 * config.hidden_size * config.moe_intermediate_size * 4
    assert reads.expert == expert
    assert reads.routed == config.num_hidden_layers * config.num_experts_per_tok * expert
    plain = find_peer("transformers", folder, SHORT, threads=1, progress=said.append)
    assert (plain.weights, plain.reads.routed) == ("fp32", reads.routed)
    assert plain.reads.dense == pytest.approx(reads.dense, rel=0.01)
    with pytest.raises(UsageError, match="leave --precision out"):
        find_peer("llama.cpp", file, SHORT, threads=1, precision="int4", progress=said.append)
    same = find_peer("llama.cpp", file, SHORT, threads=1, progress=said.append)
    assert (same.weights, same.job["gguf"]) == ("the same f32 GGUF", str(file))


def test_types_have_the_bits_of_the_precision():
    assert gguf_type("stored", torch.bfloat16) == "bf16"
    assert gguf_type("stored", torch.float16) == "f16"
    assert (gguf_type("int8", torch.bfloat16), gguf_type("int4g32", torch.bfloat16)) == ("q8_0", "q4_0")
    with pytest.raises(UsageError, match="int3"):
        gguf_type("int3g64", torch.bfloat16)


def test_an_engine_that_is_not_installed_is_one_clear_error(folder, monkeypatch):
    monkeypatch.setattr(compare_speed_llamacpp, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install llama-cpp-python"):
        require_llama_cpp()
    with pytest.raises(UsageError, match="pip install llama-cpp-python"):
        compare_speed(folder, ["llama.cpp"], SHORT)


def test_the_worker_answers_each_line(folder):
    side = compare_speed_worker.open_side({"side": "ours", "model": str(folder), "batch": 1})
    asked = {"prompts": [[5, 6, 7]], "new_tokens": 3, "following": [[8, 9, 10]]}
    answers = io.StringIO()
    compare_speed_worker.serve(side, [json.dumps(asked)] * 2, answers)
    first, second = (json.loads(line) for line in answers.getvalue().splitlines())
    assert first["sample"]["decode_seconds"] > 0
    assert second["facts"]["vocabulary"] == AutoConfig.from_pretrained(folder).vocab_size
    side.close()


def test_a_side_that_cannot_load_says_why(tmp_path):
    with pytest.raises(PeerError, match=r"config\.json"):
        SideProcess({"side": "ours", "model": str(tmp_path), "batch": 1}, 1)


@pytest.mark.slow
def test_side_by_side_for_real(folder, monkeypatch):
    monkeypatch.setattr(
        module, "bandwidths", lambda *_, disk: Bandwidths(1e9, 1e9 if disk else None, "a way")
    )
    report = compare_speed(folder, ["transformers"], dataclasses.replace(SHORT, repetitions=1, batch=2))
    (peer,) = report.peers
    assert peer.decode_ratio.n == 1
    assert peer.decode_ratio.median == pytest.approx(report.decode.median / peer.decode.median)
    assert "of experts in RAM" in report.banner
