"""From a model's name to its files: folders, GGUF files, a small hub on this machine, the cache, offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from checkpoint.hub_rig import COMMIT, hub
from gangline.checkpoint.hub import hub_errors
from gangline.checkpoint.locate import LocalCheckpoint, resolve_checkpoint
from gangline.core.errors import CheckpointError

SCRIPT = """
import json, sys
from gangline.checkpoint.hub import hub_errors
from gangline.checkpoint.locate import resolve_checkpoint
from gangline.checkpoint.safetensors_index import SafetensorsIndex
from gangline.core.errors import CheckpointError
for call in json.loads(sys.argv[1]):
    try:
        if call[0] == "index":
            index = SafetensorsIndex.from_hub(*call[1:])
            tensors = {t.name: [t.dtype, list(t.shape), t.nbytes] for t in index}
            answer = {"files": [str(f) for f in index.files], "tensors": tensors, "local": index.local}
        else:
            found = resolve_checkpoint(*call)
            answer = {"kind": type(found).__name__, **{k: str(v) for k, v in vars(found).items()}}
    except CheckpointError as error:
        answer = {"error": str(error)}
    print("ANSWER", json.dumps(answer))
"""


def ask(endpoint: str, home: Path, *calls: list, offline: bool = False) -> list[dict]:
    """Make calls in a process of its own: huggingface_hub reads its environment once."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-c", SCRIPT, json.dumps(calls)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    return [json.loads(line[7:]) for line in run.stdout.splitlines() if line.startswith("ANSWER ")]


@pytest.fixture
def shelf(tmp_path):
    """Models on the hub: sharded, single file, GGUF only."""
    root = tmp_path / "shelf"
    sharded, single, gguf = (root / "owner" / name for name in ("sharded", "single", "gguf"))
    for folder in (sharded, single, gguf):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "mixtral"}')
    save_file({"a": torch.ones(3, 2)}, sharded / "model-1.safetensors")
    save_file({"b": torch.ones(4, dtype=torch.bfloat16)}, sharded / "model-2.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (sharded / "original").mkdir()
    save_file({"x": torch.ones(1)}, sharded / "original" / "model.safetensors")
    save_file({"x": torch.ones(1)}, sharded / "consolidated.safetensors")
    save_file({"c": torch.ones(5)}, single / "model.safetensors")
    (gguf / "small.gguf").write_bytes(b"GGUF")
    return root


def test_headers_are_all_that_a_plan_fetches(shelf, tmp_path):
    with hub(shelf) as (endpoint, log):
        found, index, single = ask(
            endpoint,
            tmp_path / "home",
            ["owner/sharded", None, False],
            ["index", "owner/sharded"],
            ["index", "owner/single"],
        )
        fetched = [line for line in log if line.startswith("GET") and "safetensors" in line]
    assert found["kind"] == "RemoteCheckpoint" and found["repo"] == "owner/sharded"
    assert index["tensors"] == {"a": ["F32", [3, 2], 24], "b": ["BF16", [4], 8]}
    assert index["files"] == ["model-1.safetensors", "model-2.safetensors"] and index["local"] is False
    assert single["tensors"] == {"c": ["F32", [5], 20]}
    assert all("bytes=0-100000" in line for line in fetched if not line.endswith("index.json"))


def test_download_takes_the_transformers_files_and_is_found_again(shelf, tmp_path):
    home = tmp_path / "home"
    with hub(shelf) as (endpoint, _):
        (found,) = ask(endpoint, home, ["owner/sharded"])
    folder = Path(found["folder"])
    assert found["kind"] == "LocalCheckpoint" and COMMIT in str(folder)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors"))
    assert names == ["model-1.safetensors", "model-2.safetensors"]
    again, header_only = ask(
        "http://127.0.0.1:9", home, ["owner/sharded"], ["owner/sharded", None, False], offline=True
    )
    assert again["folder"] == header_only["folder"] == str(folder)
    assert header_only["kind"] == "LocalCheckpoint"


def test_gguf_on_the_hub(shelf, tmp_path):
    with hub(shelf) as (endpoint, _):
        before, found, after, missing, folder = ask(
            endpoint,
            tmp_path / "home",
            ["owner/gguf:small.gguf", None, False],
            ["owner/gguf:small.gguf"],
            ["owner/gguf:small.gguf", None, False],
            ["owner/gguf:other.gguf"],
            ["owner/gguf"],
        )
    assert "hf download owner/gguf small.gguf" in before["error"]
    assert found["gguf"] == after["gguf"] and Path(found["gguf"]).read_bytes() == b"GGUF"
    assert "look at its files" in missing["error"]
    assert "no safetensors files; for a GGUF file write owner/gguf:file.gguf" in folder["error"]


def test_what_the_hub_refuses_is_one_line_with_the_way_out(shelf, tmp_path):
    calls = [
        (["owner/nothing"], "neither a file or folder here nor a model on the Hub"),
        (["owner/nothing", None, False], "neither a file or folder here nor a model on the Hub"),
        (["owner/gated"], "accept its terms"),
        (["owner/gated", None, False], "accept its terms"),
        (["index", "owner/gated"], "accept its terms"),
        (["owner/single", "v9"], "no such revision"),
        (["index", "owner/gguf"], "lacks config.json, safetensors"),
        (["a b/c!"], "neither a file or folder here"),
        (["owner/single:x.bin"], "only a .gguf file can follow"),
    ]
    with hub(shelf) as (endpoint, _):
        answers = ask(endpoint, tmp_path / "home", *[call for call, _ in calls])
    for (call, says), answer in zip(calls, answers, strict=True):
        assert says in answer.get("error", answer), call
        assert "\n" not in answer["error"]


NOWHERE = "http://127.0.0.1:9"


def test_offline(tmp_path):
    calls = ["owner/single"], ["owner/single", None, False], ["owner/single:x.gguf"]
    for answer in ask(NOWHERE, tmp_path / "home", *calls, offline=True):
        assert "not in the local cache, and the Hub cannot be reached" in answer["error"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), errors.HfHubHTTPError.__bases__[0]("cut\nhere")]
)
def test_network_and_disk_errors_are_one_line(error):
    with (
        pytest.raises(CheckpointError, match=r"^name: the Hub cannot be read .*try again$"),
        hub_errors("name"),
    ):
        raise error


def test_local_folder_and_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_checkpoint(tmp_path) == LocalCheckpoint(str(tmp_path), tmp_path)
    gguf = tmp_path / "x.GGUF"
    gguf.write_bytes(b"")
    assert resolve_checkpoint(str(gguf)) == LocalCheckpoint(str(gguf), tmp_path, gguf)


def test_folder_with_one_gguf_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json and no GGUF file"):
        resolve_checkpoint(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"")
    assert resolve_checkpoint(tmp_path).gguf == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"2 GGUF files; name one, for example .*a\.gguf"):
        resolve_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["/no/such/place", "./nothing", "~/nothing-here", "model.gguf", "dir/model.gguf"]
)
def test_path_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such file"):
        resolve_checkpoint(name)


def test_single_safetensors_file_is_not_a_model(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="name the folder around it"):
        resolve_checkpoint(path)
