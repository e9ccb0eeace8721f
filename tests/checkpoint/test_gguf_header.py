"""Corrupt GGUF files give one clear error; nothing else, however the bytes are changed."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.gguf_models import experts_modules, tiny_model, write_foreign
from gangline.checkpoint.gguf import GGUFCheckpoint
from gangline.checkpoint.gguf_header import Strings, read_header
from gangline.core.errors import CheckpointError, GanglineError, UnsupportedModelError


def _write(path: Path, **options: int) -> Path:
    writer = GGUFWriter(path, "olmoe", **options)
    writer.add_uint32("olmoe.block_count", 3)
    writer.add_float32("olmoe.rope.freq_base", 10000.0)
    writer.add_bool("olmoe.flag", True)
    writer.add_array("olmoe.numbers", [4, 5, 6])
    writer.add_token_list(["a", "bc", ""])
    writer.add_tensor("x.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.add_tensor("y.weight", np.arange(4, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    header = read_header(_write(tmp_path / "a.gguf"))
    assert header.metadata["olmoe.block_count"] == 3
    assert header.metadata["olmoe.flag"] is True
    assert header.metadata["olmoe.numbers"] == (4, 5, 6)
    assert header.metadata["tokenizer.ggml.tokens"] == Strings(3)
    x, y = header.tensors["x.weight"], header.tensors["y.weight"]
    assert (x.shape, x.type, x.nbytes) == ((2, 32), "F32", 256)
    assert (y.shape, y.type, y.nbytes) == ((4,), "F16", 8)
    data = (tmp_path / "a.gguf").read_bytes()
    assert data[x.offset : x.offset + 256] == np.arange(64, dtype="<f4").tobytes()
    assert data[y.offset : y.offset + 8] == np.arange(4, dtype="<f2").tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"GGML" + data[4:], "no GGUF file"),
        (lambda data: b"", "empty"),
        (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "version 1"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "big-endian"),
        (lambda data: data[:8] + struct.pack("<Q", 2**62) + data[16:], f"cannot hold {2**62} tensors"),
        (lambda data: data[:16] + struct.pack("<Q", 2**40) + data[24:], f"cannot hold {2**40} metadata"),
        (lambda data: data[:24] + struct.pack("<Q", 2**63) + data[32:], "letters in a metadata key"),
        (lambda data: data[:40], "cannot hold 2 tensors"),
        (lambda data: data[:250], "ends inside its header|cannot hold"),
        (lambda data: data[:-40], "lies beyond its end"),
        (lambda data: data.replace(b"y.weight", b"x.weight"), "twice"),
        (lambda data: data.replace(b"y.weight", b"\xff.weight"), "no text"),
    ],
)
def test_corrupt_header_is_one_clear_line(tmp_path: Path, change, message: str) -> None:
    path = _write(tmp_path / "a.gguf")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["dimensions", "type", "offset", "size"])
def test_impossible_tensor(tmp_path: Path, field: str) -> None:
    path = _write(tmp_path / "a.gguf")
    data = bytearray(path.read_bytes())
    at = data.index(b"x.weight") + len(b"x.weight")
    place, value = {
        "dimensions": (at, struct.pack("<I", 5)),
        "type": (at + 4 + 16, struct.pack("<I", 99)),
        "offset": (at + 4 + 16 + 4, struct.pack("<Q", 8)),
        "size": (at + 4, struct.pack("<Q", 2**61)),
    }[field]
    data[place : place + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.weight"):
        read_header(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(CheckpointError, match="no such file"):
            GGUFCheckpoint.open(path)


def test_missing_gguf_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "a.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r'pip install "gangline\[gguf\]"'):
        GGUFCheckpoint.open(path)


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(_write(path).read_bytes().replace(b"olmoe", b"bloom"))
    with pytest.raises(
        UnsupportedModelError, match=r"'bloom'; supported are deepseek2, gpt-oss, llama, olmoe"
    ):
        GGUFCheckpoint.open(path)


def test_llama_without_experts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(_write(path).read_bytes().replace(b"olmoe", b"llama"))
    with pytest.raises(UnsupportedModelError, match="no experts"):
        GGUFCheckpoint.open(path)


_MUTATION = st.one_of(
    st.tuples(st.just("byte"), st.floats(0, 1), st.integers(0, 255)),
    st.tuples(st.just("u32"), st.floats(0, 1), st.sampled_from([0, 1, 7, 2**31, 2**32 - 1])),
    st.tuples(st.just("u64"), st.floats(0, 1), st.sampled_from([0, 1, 2**20, 2**33, 2**63, 2**64 - 1])),
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
    st.tuples(st.just("drop"), st.floats(0, 1), st.integers(1, 40)),
)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[bytes, int]]:
    """Small valid files and the length of their headers."""
    torch.manual_seed(0)
    files = []
    for family in ("deepseek_v2", "gpt_oss"):
        path = tmp_path_factory.mktemp("fuzz") / f"{family}.gguf"
        write_foreign(tiny_model(family, num_hidden_layers=2), path)
        header = read_header(path)
        files.append((path.read_bytes(), min(tensor.offset for tensor in header.tensors.values())))
    return files


@settings(max_examples=300)
@given(which=st.integers(0, 1), mutations=st.lists(_MUTATION, min_size=1, max_size=4))
def test_fuzzed_files_give_an_error_of_ours_or_a_model(tmp_path_factory, seeds, which, mutations) -> None:
    data, header = seeds[which]
    changed = bytearray(data)
    for kind, place, value in mutations:
        at = int(place * (min(header, len(changed)) - 1)) if changed else 0
        if kind == "cut":
            changed = changed[: int(place * len(changed))]
        elif kind == "drop":
            del changed[at : at + value]
        elif kind == "byte":
            changed[at : at + 1] = bytes([value])
        else:
            raw = struct.pack("<I" if kind == "u32" else "<Q", value)
            changed[at : at + len(raw)] = raw
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    path.write_bytes(changed)
    try:
        checkpoint = GGUFCheckpoint.open(path)
        config = checkpoint.config
        for name, tensor in checkpoint.dense_tensors(torch.float32):
            assert name
            assert tensor.dtype == torch.float32
        if config.num_hidden_layers == 2 and config.vocab_size == 96 and config.hidden_size == 64:
            model = tiny_model("gpt_oss" if which else "deepseek_v2", num_hidden_layers=2)
            source = checkpoint.expert_source(experts_modules(model))
            assert sum(1 for _ in source.read_layer(0)) == 8
    except GanglineError as error:
        assert "\n" not in str(error)
