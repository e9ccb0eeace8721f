"""The safetensors readers: exact on good files, one clear error on every bad one."""

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from gangline.checkpoint.safetensors_header import DTYPE_BITS, parse_header, read_header
from gangline.checkpoint.safetensors_index import SafetensorsIndex
from gangline.core.errors import CheckpointError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def some_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (7,), (), (0, 4), (2, 3, 4), (1,)]
    return {
        f"layer.{i}.weight": torch.randint(0, 100, shape, generator=generator).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, DTYPES, strict=True))
    }


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def save_shards(folder: Path, tensors: dict[str, torch.Tensor], index: bool = True) -> list[str]:
    names = list(tensors)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map = {}
    files = []
    for i, half in enumerate(halves):
        files.append(f"model-{i + 1:05d}-of-00002.safetensors")
        save_file({name: tensors[name] for name in half}, folder / files[-1])
        weight_map.update(dict.fromkeys(half, files[-1]))
    if index:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    return files


@pytest.mark.parametrize("layout", ["single", "sharded", "no index"])
def test_reads_what_was_written(tmp_path, layout, seed):
    tensors = some_tensors(seed)
    if layout == "single":
        save_file(tensors, tmp_path / "model.safetensors")
    else:
        save_shards(tmp_path, tensors, index=layout == "sharded")
    index = SafetensorsIndex.from_folder(tmp_path)
    assert set(index.tensors) == set(tensors)
    assert index.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        read = index.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)
        entry = index.tensors[name]
        data = index.files[entry.file].read_bytes()[entry.offset : entry.offset + entry.nbytes]
        assert data == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_single_file_wins_and_consolidated_copies_are_ignored(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    save_shards(tmp_path, some_tensors(0), index=False)
    assert "a" not in SafetensorsIndex.from_folder(tmp_path).tensors
    save_file({"b": torch.ones(2)}, tmp_path / "model.safetensors")
    assert set(SafetensorsIndex.from_folder(tmp_path).tensors) == {"b"}


def test_missing_shard_is_named(tmp_path):
    files = save_shards(tmp_path, some_tensors(1))
    (tmp_path / files[1]).unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards.*model-00002-of-00002.*download"):
        SafetensorsIndex.from_folder(tmp_path)


def test_tensor_promised_by_the_index_is_named(tmp_path):
    files = save_shards(tmp_path, some_tensors(2))
    save_file({"other": torch.ones(1)}, tmp_path / files[0])
    with pytest.raises(CheckpointError, match=r"layer\.0\.weight, promised by"):
        SafetensorsIndex.from_folder(tmp_path)


def test_duplicate_tensor_needs_an_index_to_decide(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor a is in both x.safetensors and y.safetensors"):
        SafetensorsIndex.from_folder(tmp_path)
    save_file({"b": torch.ones(2), "a": torch.zeros(2)}, tmp_path / "x.safetensors")
    weight_map = {"a": "y.safetensors", "b": "x.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert SafetensorsIndex.from_folder(tmp_path).read("a").tolist() == [1, 1]


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "", "a\0b", 3, None])
def test_index_cannot_leave_the_folder(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="names no file of this folder"):
        SafetensorsIndex.from_folder(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000])
def test_broken_index_file(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="download it again"):
        SafetensorsIndex.from_folder(tmp_path)


def test_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no safetensors file here"):
        SafetensorsIndex.from_folder(tmp_path)


def test_truncated_file_tells_both_sizes(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(some_tensors(3), path)
    whole = path.read_bytes()
    for size in (0, 5, 8, 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=rf"model.safetensors.*truncated.*{size}.*again"):
            SafetensorsIndex.from_folder(tmp_path)


def test_file_cut_after_opening(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    index = SafetensorsIndex.from_folder(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated at byte"):
        index.read("a")
    with pytest.raises(CheckpointError, match="tensor b is missing"):
        index.read("b")


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"not json", "not valid JSON"),
        (b" {}", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b'{"a": {}, "a": {}}', "a name occurs twice"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "not valid JSON"),
        ({"__metadata__": {"a": 1}}, "__metadata__"),
        ({"a": 3}, "not a JSON object"),
        ({"a": entry(dtype="X7")}, "unknown dtype 'X7'"),
        ({"a": entry(dtype=["U8"])}, "unknown dtype"),
        ({"a": entry(shape=[-4])}, "not a list of sizes"),
        ({"a": entry(shape=[4.0])}, "not a list of sizes"),
        ({"a": entry(shape=[True])}, "not a list of sizes"),
        ({"a": entry(shape=[2**70])}, "not a list of sizes"),
        ({"a": entry(offsets=[0])}, "not a list of sizes"),
        ({"a": entry(offsets=[4, 0])}, "takes 4"),
        ({"a": entry(dtype="F32")}, "4 bytes, but F32 of shape .4. takes 16"),
        ({"a": entry(shape=[2**62, 2**62])}, "bytes, but U8"),
        ({"a": entry(), "b": entry(offsets=[2, 6])}, "'b' so that it overlaps"),
        ({"a": entry(), "b": entry(offsets=[5, 9])}, "'b' so that it leaves a hole"),
        ({"a": entry(), "b": entry(offsets=[4, 8])}, "is truncated"),
        ({}, "4 bytes that belong to no tensor"),
    ],
)
def test_header_that_lies(tmp_path, header, says):
    path = raw_file(tmp_path / "model.safetensors", header, b"1234")
    with pytest.raises(CheckpointError, match=says) as caught:
        read_header(path, 0)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_claimed_header_beyond_the_limit(tmp_path):
    path = tmp_path / "big.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 200_000_000))
        stream.truncate(300_000_000)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(path, 0)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(list(DTYPE_BITS)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]) | st.text(),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    text=st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()),
    size=st.integers(0, 99),
)
def test_any_header_is_read_or_refused(text, size):
    try:
        entries = parse_header(text, size, Path("x"), 0, 8 + len(text))
    except CheckpointError:
        return
    assert sum(e.nbytes for e in entries) == size
    assert all(math.prod(e.shape) * DTYPE_BITS[e.dtype] == 8 * e.nbytes for e in entries)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    seed=st.integers(0, 5),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3)), max_size=3),
    cut=st.floats(0, 1),
)
def test_mutated_files_agree_with_the_safetensors_library(tmp_path, seed, edits, cut):
    """What we accept, the library accepts, and both read the same."""
    path = tmp_path / "model.safetensors"
    save_file(some_tensors(seed), path)
    data = bytearray(path.read_bytes())
    head = 8 + int.from_bytes(data[:8], "little")
    for where, new in edits:
        at = int(where * (head - 1))
        data[at : at + len(new)] = new
    if cut < 0.3:
        del data[int(len(data) * cut / 0.3) :]
    path.write_bytes(data)
    try:
        index = SafetensorsIndex.from_folder(tmp_path)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    with safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == set(index.tensors)
        for name, e in index.tensors.items():
            assert tuple(theirs.get_slice(name).get_shape()) == e.shape
            assert theirs.get_slice(name).get_dtype() == e.dtype
