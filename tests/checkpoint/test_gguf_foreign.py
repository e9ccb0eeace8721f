"""Files laid out as llama.cpp's converter does: DeepSeek, gpt-oss, split files, fused and single experts."""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from checkpoint.gguf_models import (
    FOREIGN,
    expert_matrices,
    experts_modules,
    rebuild,
    tiny_model,
    write_foreign,
)
from gangline.checkpoint.gguf import GGUFCheckpoint
from gangline.checkpoint.gguf_header import GGUFTensor, read_header
from gangline.checkpoint.gguf_writer import write_gguf
from gangline.core.errors import CheckpointError, UnsupportedModelError
from gangline.formats import get_codec


@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("family", FOREIGN)
def test_same_model(tmp_path: Path, family: str, absorbed: bool, seed: int) -> None:
    model = tiny_model(family)
    write_foreign(model, tmp_path / "m.gguf", absorbed=absorbed)
    checkpoint = GGUFCheckpoint.open(tmp_path / "m.gguf")
    assert checkpoint.config.to_dict() == model.config.to_dict()
    again = rebuild(checkpoint)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    ids = torch.randint(3, 96, (2, 17))
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_query_lora_is_read_where_it_is(tmp_path: Path, seed: int) -> None:
    model = tiny_model("deepseek_v2", q_lora_rank=32)
    write_foreign(model, tmp_path / "m.gguf")
    checkpoint = GGUFCheckpoint.open(tmp_path / "m.gguf")
    assert checkpoint.config.q_lora_rank == 32
    ids = torch.randint(3, 96, (1, 9))
    assert torch.equal(model(ids).logits, rebuild(checkpoint)(ids).logits)


def test_correction_bias_stays_fp32(tmp_path: Path, seed: int) -> None:
    write_foreign(tiny_model("deepseek_v3"), tmp_path / "m.gguf")
    tensors = dict(GGUFCheckpoint.open(tmp_path / "m.gguf").dense_tensors(torch.bfloat16))
    bias = tensors.pop("model.layers.1.mlp.gate.e_score_correction_bias")
    assert bias.dtype == torch.float32
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def _split(tmp_path: Path) -> list[Path]:
    write_foreign(tiny_model("gpt_oss"), tmp_path / "m.gguf", split_max_tensors=11)
    return sorted(tmp_path.glob("m-*.gguf"))


def test_split_model_opens_from_any_part(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = tiny_model("gpt_oss")
    torch.manual_seed(seed)
    files = _split(tmp_path)
    assert len(files) > 2
    ids = torch.randint(3, 96, (1, 9))
    for file in (files[0], files[-1]):
        checkpoint = GGUFCheckpoint.open(file)
        assert checkpoint.path == files[0]
        assert checkpoint.files == tuple(files)
        assert torch.equal(model(ids).logits, rebuild(checkpoint)(ids).logits)
    catalog = checkpoint.expert_source(experts_modules(model)).catalog
    assert catalog is not None
    assert len(catalog.files) > 1


def test_split_model_with_a_missing_part(tmp_path: Path, seed: int) -> None:
    files = _split(tmp_path)
    files[1].unlink()
    with pytest.raises(CheckpointError, match=f"1 of {len(files)} files.*{files[1].name}"):
        GGUFCheckpoint.open(files[0])


def test_split_model_with_swapped_parts(tmp_path: Path, seed: int) -> None:
    files = _split(tmp_path)
    first, second = files[1].read_bytes(), files[2].read_bytes()
    files[1].write_bytes(second)
    files[2].write_bytes(first)
    with pytest.raises(CheckpointError, match="not part 2 of"):
        GGUFCheckpoint.open(files[0])


def _rewrite(path: Path, out: Path, changed: dict[str, dict[str, np.ndarray] | None]) -> None:
    """Copy a file, replacing some tensors (name pattern -> new tensors, or a maker of them)."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.")):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if tensor.name not in changed:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for group in changed.values():
        for name, data in (group or {}).items():
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _written(tmp_path: Path, family: str) -> tuple[torch.nn.Module, Path]:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    return model, write_gguf(tmp_path, tmp_path / "m.gguf", type="f32")


def _array(tensor: GGUFTensor) -> np.ndarray:
    return np.fromfile(tensor.file, "<f4", tensor.nbytes // 4, offset=tensor.offset).reshape(tensor.shape)


def test_experts_stored_one_by_one(tmp_path: Path, seed: int) -> None:
    model, path = _written(tmp_path, "mixtral")
    tensors = read_header(path).tensors
    changed = {
        name: {
            name.replace("_exps.weight", f".{expert}.weight"): matrix
            for expert, matrix in enumerate(_array(tensor))
        }
        for name, tensor in tensors.items()
        if "_exps" in name
    }
    _rewrite(path, tmp_path / "old.gguf", changed)
    checkpoint = GGUFCheckpoint.open(tmp_path / "old.gguf")
    assert "blk.1.ffn_down.7.weight" in checkpoint.tensors
    ids = torch.randint(3, 96, (1, 9))
    assert torch.equal(model(ids).logits, rebuild(checkpoint)(ids).logits)
    assert checkpoint.expert_source(experts_modules(model)).catalog is not None


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_gate_and_up_in_one_tensor(tmp_path: Path, family: str, seed: int) -> None:
    if family == "gpt_oss":
        model, path = tiny_model(family), tmp_path / "m.gguf"
        write_foreign(model, path)
    else:
        model, path = _written(tmp_path, family)
    tensors = read_header(path).tensors
    changed: dict[str, dict[str, np.ndarray] | None] = {}
    for layer in range(2):
        gate, up = (f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up"))
        both = np.concatenate([_array(tensors[gate]), _array(tensors[up])], axis=1)
        changed |= {gate: {f"blk.{layer}.ffn_gate_up_exps.weight": both}, up: None}
    _rewrite(path, tmp_path / "fused.gguf", changed)
    checkpoint = GGUFCheckpoint.open(tmp_path / "fused.gguf")
    ids = torch.randint(3, 96, (1, 9))
    assert torch.equal(model(ids).logits, rebuild(checkpoint)(ids).logits)


def test_types_outside_our_formats_are_converted_with_a_note(tmp_path: Path, seed: int) -> None:
    """IQ4_NL has no encoder in the gguf package: random codes with sane scales are a valid tensor."""
    model = tiny_model("gpt_oss")
    path = tmp_path / "m.gguf"
    write_foreign(model, path)
    generator = np.random.default_rng(seed)
    packed = generator.integers(0, 256, (8, 64, 2, 18), dtype=np.uint8)
    packed[..., :2] = generator.uniform(-0.01, 0.01, (8, 64, 2, 1)).astype("<f2").view(np.uint8)
    packed = packed.reshape(8, 64, 36)
    exact = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.IQ4_NL)
    name = "blk.1.ffn_up_exps.weight"
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "iq.gguf", "gpt-oss")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.")):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if tensor.name == name:
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.IQ4_NL)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    source = GGUFCheckpoint.open(tmp_path / "iq.gguf").expert_source(experts_modules(model), torch.bfloat16)
    assert source.catalog is None
    assert source.notes == ("experts stored as IQ4_NL are converted to bf16",)
    assert [field.codec for field in source.layouts[1].fields] == ["ggml:F32", "bf16", "ggml:F32"]
    for expert, fields in source.read_layer(1):
        up = get_codec("bf16").decode(fields[1], (64, 64), torch.bfloat16)
        assert torch.equal(up, torch.from_numpy(exact[expert]).bfloat16())


def test_expert_of_another_shape_names_both(tmp_path: Path, seed: int) -> None:
    model = tiny_model("gpt_oss")
    write_foreign(model, tmp_path / "m.gguf")
    checkpoint = GGUFCheckpoint.open(tmp_path / "m.gguf")
    other = experts_modules(tiny_model("gpt_oss", intermediate_size=96))
    with pytest.raises(CheckpointError, match=re.escape("(8, 64, 64)") + ".*" + re.escape("(8, 96, 64)")):
        checkpoint.expert_source(other)


def test_tensor_without_a_place_is_refused_by_name(tmp_path: Path, seed: int) -> None:
    _, path = _written(tmp_path, "mixtral")
    _rewrite(path, tmp_path / "new.gguf", {"": {"rope_freqs.weight": np.ones(8, np.float32)}})
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight"):
        list(GGUFCheckpoint.open(tmp_path / "new.gguf").dense_tensors())


def test_gguf_experts_match_the_source_matrices(tmp_path: Path, seed: int) -> None:
    model = tiny_model("deepseek_v3")
    write_foreign(model, tmp_path / "m.gguf")
    modules = experts_modules(model)
    source = GGUFCheckpoint.open(tmp_path / "m.gguf").expert_source(modules)
    assert len(source.layouts) == len(modules) == 1  # the first layer is dense
    exact = expert_matrices(model, modules[0].prefix)
    for expert, fields in source.read_layer(0):
        for spec, raw in zip(source.layouts[0].fields, fields, strict=True):
            assert torch.equal(raw.view(torch.float32).view(spec.shape), exact[spec.name][expert])
