"""Scripts that measure whole models with Samoyeds experts and draw results: small, and without a GPU."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gangline.benchmarks.result import compare, read_result, write_result

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "samoyeds"
CODEC = "samoyeds:1:2:32/bf16"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Imports a script by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    yield load
    for name in ("gpu_model", "gpu_layer", "plots"):
        sys.modules.pop(name, None)


def run_model(script: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    words = [
        "--device",
        "cpu",
        "--shape",
        "tiny-mixtral:2",
        "--codec",
        CODEC,
        "--codec",
        "samoyeds:1:2:32/int8g64",
    ]
    words += ["--prompt", "8", "--rounds", "1", "--sequences", "1", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["gpu_model.py", *words])
    script.main()


def test_a_model_beside_its_dense_twin(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "samoyeds_gpu_model.json"
    run_model(script("gpu_model"), monkeypatch, out)
    result = read_result(out)
    works = {(row["work"], row["peer"]) for row in result["rows"]}
    for codec in (CODEC, "samoyeds:1:2:32/int8g64"):
        for count in (1, 2):
            for peer in ("transformers eager", "transformers grouped_mm"):
                for work in ("prompts of 8", "decode"):
                    assert (f"tiny-mixtral:2, {codec}, {count} sequences, {work}", peer) in works
    differences = result["machine"]["logit_differences"]["tiny-mixtral:2"]
    assert differences[f"gangline {CODEC}"] < 0.05
    assert 0 < differences["gangline samoyeds:1:2:32/int8g64"] < 0.2


def test_other_weights_are_found_out(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A side that computes something else is an error, and nothing is stored."""
    model = script("gpu_model")
    plain = model.Subject.ours

    def wrong(self, codec, timings):
        side = plain(self, codec, timings)
        return model.Side(
            side.name,
            codec=codec,
            forwards=tuple(lambda x, ids, w: torch.zeros_like(x) for _ in side.forwards),
        )

    monkeypatch.setattr(model.Subject, "ours", wrong)
    out = tmp_path / "samoyeds_gpu_model.json"
    with pytest.raises(SystemExit, match=r"tiny-mixtral:2, gangline .*/bf16: relative difference"):
        run_model(model, monkeypatch, out)
    assert not out.exists()


def test_pictures_of_results(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers on a GPU by tokens, everything else by shape; each file is a picture."""
    pytest.importorskip("matplotlib")
    rows = [
        compare(
            f"Mixtral-8x7B samoyeds:1:2:128/bf16, {tokens} tokens, layer, mma.sp", "us", [2.0], "torch", [1.0]
        )
        for tokens in (1, 16)
    ]
    rows += [
        compare(f"{shape}, {CODEC}, prefill, 512 tokens ({share} an expert)", "us", [1.0], "bf16", [3.0])
        for shape, share in (("OLMoE-1B-7B", 64), ("Mixtral-8x7B", 128))
    ]
    write_result("samoyeds_test", rows, folder=tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["plots.py", str(tmp_path / "samoyeds_test.json"), "--folder", str(tmp_path / "plots")]
    )
    script("plots").main()
    files = sorted((tmp_path / "plots").iterdir())
    assert [file.name for file in files] == [
        "samoyeds_test-mixtral-8x7b-samoyeds-1-2-128-bf16-layer-mma-sp.png",
        "samoyeds_test-prefill-512-tokens.png",
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
