"""transformers folder -> write_gguf -> GGUFCheckpoint: the same config, the same weights, the same logits."""

import errno
import shutil
from pathlib import Path

import pytest
import torch

from checkpoint.gguf_models import (
    CONFIGS,
    WRITABLE,
    expert_matrices,
    experts_modules,
    rebuild,
    tiny_model,
)
from gangline.checkpoint.gguf import GGUFCheckpoint
from gangline.checkpoint.gguf_writer import write_gguf
from gangline.core.errors import CheckpointError, UnsupportedModelError
from gangline.core.keys import ExpertKey
from gangline.formats import get_codec

_NOT_IN_A_FILE = {"architectures", "dtype"}
# Largest rounding of a weight as a share of the largest weight in its block of 32; scales are fp16.
_HALF_STEP = {"q8_0": 0.5 / 127 + 1e-3, "q4_0": 1 / 8 + 1e-3}


@pytest.mark.parametrize("family", WRITABLE)
def test_fp32_file_is_the_same_model(tmp_path: Path, family: str, seed: int) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    checkpoint = GGUFCheckpoint.open(write_gguf(tmp_path, tmp_path / "m.gguf", type="f32"))
    ours, theirs = checkpoint.config.to_dict(), model.config.to_dict()
    different = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert different <= _NOT_IN_A_FILE
    again = rebuild(checkpoint)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    ids = torch.randint(3, 96, (2, 17))
    assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("family", WRITABLE)
def test_bf16_checkpoint_stays_exact(tmp_path: Path, family: str, seed: int) -> None:
    model = tiny_model(family).bfloat16()
    model.save_pretrained(tmp_path)
    checkpoint = GGUFCheckpoint.open(write_gguf(tmp_path, tmp_path / "m.gguf", type="bf16"))
    again = rebuild(checkpoint, torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("type", ["q8_0", "q4_0"])
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_quantized_experts_are_within_half_a_step(tmp_path: Path, family: str, type: str, seed: int) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    checkpoint = GGUFCheckpoint.open(write_gguf(tmp_path, tmp_path / "m.gguf", type=type))
    modules = experts_modules(model)
    source = checkpoint.expert_source(modules)
    assert source.notes == ()
    assert {field.codec for layout in source.layouts for field in layout.fields} == {f"ggml:{type.upper()}"}
    for layer, module in enumerate(modules):
        exact = expert_matrices(model, module.prefix)
        for expert, fields in source.read_layer(layer):
            for spec, raw in zip(source.layouts[layer].fields, fields, strict=True):
                read = get_codec(spec.codec).decode(raw, spec.shape, torch.float32)
                blocks = exact[spec.name][expert].reshape(-1, 32)
                error = (read.reshape(-1, 32) - blocks).abs().amax(dim=1)
                assert (error <= blocks.abs().amax(dim=1) * _HALF_STEP[type]).all()


def test_catalog_points_at_the_bytes_that_read_layer_gives(tmp_path: Path, seed: int) -> None:
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    checkpoint = GGUFCheckpoint.open(write_gguf(tmp_path, tmp_path / "m.gguf", type="q8_0"))
    source = checkpoint.expert_source(experts_modules(model))
    assert source.catalog is not None
    assert [field.name for field in source.layouts[0].fields] == ["gate", "up", "down"]
    assert not any(field.transposed for field in source.layouts[0].fields)
    data = [path.read_bytes() for path in source.catalog.files]
    for layer in range(2):
        for expert, fields in source.read_layer(layer):
            extents = source.catalog.extents[ExpertKey(layer, expert)]
            for extent, raw in zip(extents, fields, strict=True):
                assert (
                    data[extent.file][extent.offset : extent.offset + extent.nbytes] == raw.numpy().tobytes()
                )
    assert len(source.catalog.extents) == 16


def test_shards_and_fused_experts_give_the_same_file(tmp_path: Path, seed: int) -> None:
    from safetensors.torch import save_file

    model = tiny_model("qwen2_moe")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    (tmp_path / "fused").mkdir()
    model.config.save_pretrained(tmp_path / "fused")
    save_file(
        {name: t.contiguous() for name, t in model.state_dict().items()},
        tmp_path / "fused" / "model.safetensors",
    )
    files = []
    for kind in ("one", "shards", "fused"):
        folder = (tmp_path / kind).rename(tmp_path / "model")  # the file carries the name of the folder
        files.append(write_gguf(folder, tmp_path / f"{kind}.gguf", type="q4_0").read_bytes())
        folder.rename(tmp_path / kind)
    assert files[0] == files[1] == files[2]


def test_progress_reaches_the_end(tmp_path: Path, seed: int) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path)
    seen: list[tuple[int, int]] = []
    write_gguf(tmp_path, tmp_path / "m.gguf", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("mixtral", {"sliding_window": 16}, "sliding_window"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(
    tmp_path: Path, family: str, changes: dict, message: str, seed: int
) -> None:
    tiny_model(family, **changes).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=message):
        write_gguf(tmp_path, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_unknown_family_names_the_known_ones(tmp_path: Path, seed: int) -> None:
    tiny_model("gpt_oss").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="mixtral, olmoe, qwen2_moe, qwen3_moe"):
        write_gguf(tmp_path, tmp_path / "m.gguf")


def test_interrupted_write_leaves_nothing(tmp_path: Path, seed: int) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path)

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(tmp_path, tmp_path / "m.gguf", progress=interrupt)
    assert not list(tmp_path.glob("*.gguf*"))


def test_full_disk_is_refused_before_and_cleaned_up_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path)
    (tmp_path / "m.gguf").write_text("the old file")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(CheckpointError, match="1000 B; choose another place"):
            write_gguf(tmp_path, tmp_path / "m.gguf")

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_gguf(tmp_path, tmp_path / "m.gguf")
    assert [file.name for file in tmp_path.glob("*.gguf*")] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_text() == "the old file"


def test_bad_arguments(tmp_path: Path, seed: int) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        write_gguf(tmp_path, tmp_path / "m.gguf")
    tiny_model("olmoe").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="bf16, f16, f32, q8_0, q4_0"):
        write_gguf(tmp_path, tmp_path / "m.gguf", type="q9_9")
    with pytest.raises(CheckpointError, match="is no folder"):
        write_gguf(tmp_path, tmp_path / "none" / "m.gguf")


def test_tied_embedding_is_written_twice_where_llama_cpp_needs_it(tmp_path: Path, seed: int) -> None:
    model = tiny_model("olmoe", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    again = rebuild(GGUFCheckpoint.open(write_gguf(tmp_path, tmp_path / "m.gguf", type="f32")))
    ids = torch.randint(3, 96, (1, 9))
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_rows_that_no_block_fits_stay_f16(tmp_path: Path, seed: int) -> None:
    model = tiny_model("olmoe", intermediate_size=40)
    model.save_pretrained(tmp_path)
    checkpoint = GGUFCheckpoint.open(write_gguf(tmp_path, tmp_path / "m.gguf", type="q8_0"))
    codecs = [field.codec for field in checkpoint.expert_source(experts_modules(model)).layouts[0].fields]
    assert codecs == ["ggml:Q8_0", "ggml:Q8_0", "ggml:F16"]


def test_missing_tensor_is_named(tmp_path: Path, seed: int) -> None:
    from safetensors.torch import load_file, save_file

    tiny_model("olmoe").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.experts.5.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="expert 5 of layer 1 has no up matrix"):
        write_gguf(tmp_path, tmp_path / "m.gguf")


def test_every_family_has_a_config() -> None:
    assert set(WRITABLE) < set(CONFIGS)
