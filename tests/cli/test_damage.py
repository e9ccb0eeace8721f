"""Damaged and foreign files: one clear error each, whichever command meets them."""

import json
import shutil

import pytest

from evaluation.tiny_text import saved_model


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"), "qwen3_moe", seed=1, shard="20KB")


@pytest.fixture
def folder(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "copy")


VERBS = [["run", "MODEL", "hello"], ["plan", "MODEL"], ["check", "MODEL"], ["bench", "MODEL"]]


@pytest.fixture(params=VERBS, ids=lambda verb: verb[0])
def fails(request, gangline):
    """Run one command on a model, and return its one line of error."""

    def call(model):
        result = gangline(*[model if word == "MODEL" else word for word in request.param])
        assert (result.exit_code, result.stdout) == (1, ""), result.stdout + result.stderr
        *steps, line = result.stderr.splitlines()
        assert set(steps) <= {"loading", "all experts in memory"}
        assert line.startswith("error: ")
        assert "unexpected" not in line
        return line

    return call


def shards(folder):
    found = sorted(folder.glob("model-*.safetensors"))
    assert len(found) > 2
    return found


def test_missing_shard(fails, folder):
    shard = shards(folder)[1]
    shard.unlink()
    assert shard.name in fails(folder)


def test_truncated_shard(fails, folder):
    shard = shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert shard.name in fails(folder)


def test_broken_header(fails, folder):
    shard = shards(folder)[0]
    shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])
    assert shard.name in fails(folder)


@pytest.fixture
def unknown(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_model"}))
    return folder


def test_unknown_architecture(fails, unknown):
    assert "no_such_model" in fails(unknown)


def test_unknown_architecture_beside_a_talkative_transformers(fails, unknown, monkeypatch):
    """Refused before transformers warns of it, where the user or a CI machine has it say all it can."""
    from transformers.utils import logging

    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "warning")
    library, level = logging.get_logger("transformers"), logging.get_verbosity()
    monkeypatch.setattr(library, "propagate", True)
    logging.set_verbosity_warning()
    try:
        assert "no_such_model" in fails(unknown)
    finally:
        logging.set_verbosity(level)


def test_transformers_is_quiet_though_imported_before(gangline, folder, monkeypatch):
    from transformers.utils import logging

    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    level = logging.get_verbosity()
    logging.set_verbosity_warning()
    try:
        gangline("plan", folder)
        assert logging.get_verbosity() == logging.ERROR
    finally:
        logging.set_verbosity(level)


def test_broken_configuration(fails, folder):
    (folder / "config.json").write_text("{")
    assert "config.json" in fails(folder)


def test_dense_model(fails, folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes)).save_pretrained(folder)
    assert "Llama" in fails(folder)


@pytest.mark.parametrize("verb", ["run", "check", "bench"])
def test_model_that_does_not_generate(gangline, tmp_path, verb):
    folder = saved_model(tmp_path, "openai_privacy_filter", seed=0)
    result = gangline(verb, folder, *(["hello"] if verb == "run" else []))
    assert result.exit_code == 1
    assert "does not generate text" in result.stderr.splitlines()[-1]


def test_folder_without_a_model(fails, tmp_path):
    assert str(tmp_path) in fails(tmp_path)


def test_damaged_pack(gangline, only_error, intact, tmp_path, monkeypatch):
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path / "home"))
    words = ["run", intact, "hello", "-n", "2", "--precision", "int8"]
    assert gangline(*words).exit_code == 0
    (pack,) = (tmp_path / "home" / "packs").glob("[!.]*/experts.bin")
    data = bytearray(pack.read_bytes())
    data[100] ^= 1
    pack.write_bytes(data)
    verified = gangline("cache", "verify")
    assert verified.exit_code == 3
    assert "layer 0, expert 0" in verified.stdout
    result = gangline(*words)
    assert result.exit_code == 1
    assert "expert 0" in only_error(result)
    name = f"packs/{pack.parent.name}"
    assert gangline("cache", "rm", name, "--yes").exit_code == 0
    assert gangline(*words).exit_code == 0


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 64, b"no gguf"])
def test_corrupt_gguf(fails, tmp_path, content):
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    assert "broken.gguf" in fails(file)
