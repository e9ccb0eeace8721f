"""Experts found in safetensors checkpoints are, byte for byte, the parameters of the model that was saved."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from gangline.checkpoint.resolve import resolve_index, resolve_safetensors
from gangline.checkpoint.safetensors_index import SafetensorsIndex
from gangline.checkpoint.source import ExpertsModule
from gangline.core.errors import CheckpointError
from gangline.core.keys import ExpertKey
from gangline.formats import get_codec
from gangline.models import expert_tensors, find_moe
from tiny_models import FAMILIES, tiny_model

CASES = [
    *((family, True) for family in FAMILIES),
    *(
        (family, False)
        for family in ("mixtral", "qwen3_vl_moe", "gpt_oss", "granitemoe", "llama4", "inkling2")
    ),
]
CONVERTED = {("ernie4_5_vl_moe", True), ("inkling2", True)}


def modules_of(view) -> list[ExpertsModule]:
    return [
        ExpertsModule(
            block.name,
            block.geometry.experts,
            block.param_shapes,
            block.transposed,
            block.has_gate,
            block.interleaved,
            block.fields,
        )
        for block in view.blocks
    ]


def on_meta(model):
    with torch.device("meta"):
        return type(model)(model.config)


def save(model, folder: Path, original: bool = True, shard: str = "30KB") -> Path:
    model.save_pretrained(folder, save_original_format=original, max_shard_size=shard)
    return folder


def matrices(layout, fields) -> dict[str, torch.Tensor]:
    """Delivered bytes as (out, in) matrices."""
    found = {}
    for spec, raw in zip(layout.fields, fields, strict=True):
        assert raw.dtype == torch.uint8 and raw.dim() == 1 and raw.numel() == spec.nbytes
        weight = get_codec(spec.codec).decode(raw, spec.shape, torch.float32)
        found[spec.name] = weight.T if spec.transposed else weight
    return found


def assert_same_weights(source, view) -> None:
    for block in view.blocks:
        layout = source.layouts[block.layer]
        assert layout.fields[-1].name == "down"
        delivered = list(source.read_layer(block.layer))
        assert [expert for expert, _ in delivered] == list(range(block.geometry.experts))
        for expert, fields in delivered:
            found = matrices(layout, fields)
            for field, tensor in zip(block.fields, expert_tensors(block, expert), strict=True):
                want = (tensor.T if field.transposed else tensor).detach().float()
                apart = field.name == "gate_up" and "gate" in found
                have = torch.cat([found["gate"], found["up"]]) if apart else found[field.name]
                assert torch.equal(have, want), f"{block.name} expert {expert} {field.name}"


@pytest.mark.parametrize(("family", "original"), CASES)
def test_delivers_the_models_own_weights(family, original, seed, tmp_path):
    model = tiny_model(family, seed=seed, dtype=torch.bfloat16)
    view = find_moe(model)
    source = resolve_safetensors(save(model, tmp_path, original), on_meta(model), modules_of(view))
    assert_same_weights(source, view)
    assert source.experts == tuple(block.geometry.experts for block in view.blocks)
    converted = (family, original) in CONVERTED
    assert (source.catalog is None) == converted == bool(source.notes)


def test_catalog_points_at_the_same_bytes(seed, tmp_path):
    model = tiny_model("qwen3_moe", seed=seed, dtype=torch.float16)
    source = resolve_safetensors(save(model, tmp_path), on_meta(model), modules_of(find_moe(model)))
    assert len(source.catalog.files) > 3
    for layer, layout in enumerate(source.layouts):
        for expert, fields in source.read_layer(layer):
            for spec, raw, extent in zip(
                layout.fields, fields, source.catalog.extents[ExpertKey(layer, expert)], strict=True
            ):
                data = source.catalog.files[extent.file].read_bytes()
                assert data[extent.offset : extent.offset + extent.nbytes] == raw.numpy().tobytes()
                assert spec.codec == "fp16"


def test_works_after_the_skeleton_lost_its_experts(seed, tmp_path):
    model = tiny_model("inkling2", seed=seed, dtype=torch.bfloat16)
    view, skeleton = find_moe(model), on_meta(model)
    modules = modules_of(view)
    for module in modules:
        for name in module.params:
            delattr(skeleton.get_submodule(module.prefix), name)
    assert_same_weights(resolve_safetensors(save(model, tmp_path), skeleton, modules), view)


def test_headers_alone_give_the_layouts(seed, tmp_path):
    model = tiny_model("mixtral", seed=seed, dtype=torch.bfloat16)
    modules = modules_of(find_moe(model))
    whole = SafetensorsIndex.from_folder(save(model, tmp_path))
    remote = SafetensorsIndex(tuple(Path(path.name) for path in whole.files), whole.tensors, local=False)
    source = resolve_index(remote, Path("owner/name"), on_meta(model), modules)
    assert source.layouts == resolve_safetensors(tmp_path, on_meta(model), modules).layouts
    with pytest.raises(CheckpointError, match="owner/name: only the headers are here"):
        next(source.read_layer(0))


class Edited:
    """A saved mixtral whose tensors a test changes."""

    def __init__(self, folder: Path, seed: int, family: str = "mixtral") -> None:
        self.model = tiny_model(family, seed=seed, dtype=torch.bfloat16)
        self.folder = save(self.model, folder, shard="1GB")
        self.path = folder / "model.safetensors"
        self.tensors = load_file(self.path)

    def resolve(self, dtype=None):
        save_file(self.tensors, self.path)
        return resolve_safetensors(self.folder, on_meta(self.model), modules_of(find_moe(self.model)), dtype)

    def named(self, *parts: str) -> list[str]:
        return [name for name in self.tensors if all(part in name for part in parts)]


@pytest.fixture
def edited(tmp_path, seed):
    return Edited(tmp_path, seed)


def test_missing_expert_is_named(edited):
    (name,) = edited.named("layers.1.", "experts.2.w3.weight")
    del edited.tensors[name]
    with pytest.raises(CheckpointError, match=rf"tensor {name} is missing; download"):
        edited.resolve()


def test_missing_last_expert_is_named(edited):
    (name,) = edited.named("layers.0.", "experts.7.w2.weight")
    del edited.tensors[name]
    with pytest.raises(CheckpointError, match=rf"tensor {name} is missing"):
        edited.resolve()


def test_all_up_projections_missing_is_not_half_a_model(edited):
    names = edited.named("layers.1.", ".w3.weight")
    for name in names:
        del edited.tensors[name]
    with pytest.raises(CheckpointError, match=rf"tensor {names[0]} and 7 more is missing"):
        edited.resolve()


def test_missing_layer_is_named(edited):
    for name in edited.named("layers.2.", "experts"):
        del edited.tensors[name]
    with pytest.raises(CheckpointError, match=r"no tensor becomes model\.layers\.2\..*experts\.gate_up_proj"):
        edited.resolve()


def test_one_tensor_of_another_shape(edited):
    (name,) = edited.named("layers.0.", "experts.3.w1.weight")
    edited.tensors[name] = edited.tensors[name][:-1].contiguous()
    with pytest.raises(CheckpointError, match=r"layers\.0\.\S*w1.*another model"):
        edited.resolve()


def test_another_width_everywhere(edited):
    for name in edited.named("experts."):
        edited.tensors[name] = edited.tensors[name][:16, :16].contiguous()
    with pytest.raises(CheckpointError, match=r"leads to shape .* but .* has .*another model"):
        edited.resolve()


def test_too_many_experts(edited):
    for name in edited.named("layers.0.", "experts.7."):
        edited.tensors[name.replace("experts.7.", "experts.8.")] = edited.tensors[name].clone()
    with pytest.raises(CheckpointError, match="another model"):
        edited.resolve()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_number_formats_without_codec_are_refused(edited, dtype):
    for name in edited.named("experts."):
        edited.tensors[name] = edited.tensors[name].to(dtype)
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1\.weight is stored as (F8_E4M3|I8)"):
        edited.resolve()


def test_mixed_formats_within_a_matrix_are_refused(edited):
    (name,) = edited.named("layers.1.", "experts.4.w1.weight")
    edited.tensors[name] = edited.tensors[name].float()
    with pytest.raises(CheckpointError, match=rf"{name} is stored as F32 and .* as BF16"):
        edited.resolve()


def test_each_matrix_may_have_its_own_format(edited):
    for name in edited.named(".w2.weight"):
        edited.tensors[name] = edited.tensors[name].float()
    source = edited.resolve()
    assert [field.codec for field in source.layouts[0].fields] == ["bf16", "bf16", "fp32"]
    assert_same_weights(source, find_moe(edited.model))


def test_float64_is_cast_with_a_note(edited):
    for name in edited.named("experts."):
        edited.tensors[name] = edited.tensors[name].double()
    source = edited.resolve(torch.float32)
    assert source.catalog is None and "float64 to float32" in source.notes[0]
    assert_same_weights(source, find_moe(edited.model))
    with pytest.raises(CheckpointError, match="stored as F64"):
        edited.resolve()


def test_two_tensors_for_one_parameter(tmp_path, seed):
    edited = Edited(tmp_path, seed, "granitemoe")
    (name,) = edited.named("layers.0.", "output_linear")
    fused = find_moe(edited.model).blocks[0]
    edited.tensors[f"{fused.name}.down_proj"] = edited.tensors[name].clone()
    with pytest.raises(CheckpointError, match="both become"):
        edited.resolve()


def test_quantization_is_named(edited, seed):
    for name in edited.named("experts."):
        edited.tensors[name.replace(".weight", ".qweight")] = edited.tensors.pop(name)
    edited.model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    save_file(edited.tensors, edited.path)
    skeleton = on_meta(edited.model)
    with pytest.raises(CheckpointError, match="quantized with gptq"):
        resolve_safetensors(edited.folder, skeleton, modules_of(find_moe(edited.model)))


def mxfp4_checkpoint(tmp_path, seed) -> Edited:
    edited = Edited(tmp_path, seed, "gpt_oss")
    for name in edited.named("experts.gate_up_proj") + edited.named("experts.down_proj"):
        if name.endswith("_bias"):
            continue
        count, inputs, outputs = edited.tensors.pop(name).shape
        shape = (count, outputs, inputs // 32)
        edited.tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        edited.tensors[f"{name}_scales"] = torch.randint(110, 135, shape, dtype=torch.uint8)
    return edited


def test_mxfp4_keeps_its_packed_bytes(tmp_path, seed, monkeypatch):
    from transformers.integrations.mxfp4 import dequantize_convertops

    monkeypatch.setitem(tiny_models._COMMON, "intermediate_size", 64)
    edited = mxfp4_checkpoint(tmp_path, seed)
    source = edited.resolve()
    assert source.catalog is None and "MXFP4" in source.notes[0]
    for layer, layout in enumerate(source.layouts):
        assert [(f.name, f.codec, f.transposed) for f in layout.fields] == [
            ("gate_up", "mxfp4", False),
            ("down", "mxfp4", False),
        ]
        prefix = f"model.layers.{layer}.mlp.experts."
        wants = [
            dequantize_convertops(
                edited.tensors[f"{prefix}{part}_blocks"],
                edited.tensors[f"{prefix}{part}_scales"],
                torch.bfloat16,
            )
            for part in ("gate_up_proj", "down_proj")
        ]
        for expert, fields in source.read_layer(layer):
            found = list(matrices(layout, fields).values())
            assert all(torch.equal(f, w[expert].T.float()) for f, w in zip(found, wants, strict=True))


def test_mxfp4_without_scales(tmp_path, seed, monkeypatch):
    monkeypatch.setitem(tiny_models._COMMON, "intermediate_size", 64)
    edited = mxfp4_checkpoint(tmp_path, seed)
    (name,) = edited.named("layers.1.", "down_proj_scales")
    del edited.tensors[name]
    with pytest.raises(CheckpointError, match=rf"tensor {name} is missing"):
        edited.resolve()


def test_shard_that_shrank_after_resolving(edited):
    source = edited.resolve()
    edited.path.write_bytes(edited.path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="truncated at byte"):
        list(source.read_layer(len(source.layouts) - 1))


def test_shard_that_vanished_after_resolving(edited):
    source = edited.resolve()
    edited.path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*cannot be read"):
        list(source.read_layer(0))


def test_index_json_is_read(edited):
    names = list(edited.tensors)
    save_file(edited.tensors, edited.folder / "a.safetensors")
    edited.path.unlink()
    weight_map = dict.fromkeys(names, "a.safetensors")
    (edited.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    view = find_moe(edited.model)
    assert_same_weights(resolve_safetensors(edited.folder, on_meta(edited.model), modules_of(view)), view)
