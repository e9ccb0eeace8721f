"""A GGUF file as it is stored: linear layers on its own blocks, experts turned into tiles in their slots."""

import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from checkpoint.gguf_models import tiny_model
from formats.codec_rig import HALF_FIELDS, random_raw
from gangline.checkpoint.gguf import GGUFCheckpoint
from gangline.checkpoint.gguf_writer import write_gguf
from gangline.core.layout import ExpertLayout, FieldSpec
from gangline.formats import get_codec
from gangline.kernels.cpu import native
from gangline.kernels.cpu.packed_linear import PackedLinear
from gangline.runtime.arrival import arrive, slot_layout
from gangline.runtime.dense_packing import packable_linears
from gangline.runtime.load import load_model, plan_model

if native() is None:
    pytest.skip("the native CPU core is not built here", allow_module_level=True)

_OLMOE = {"hidden_size": 256, "intermediate_size": 128, "vocab_size": 320}


def layout(*fields: tuple[str, tuple[int, int], str]) -> ExpertLayout:
    return ExpertLayout(
        tuple(FieldSpec(name, shape, codec, get_codec(codec).nbytes(shape)) for name, shape, codec in fields)
    )


def make(tmp_path: Path, family: str, kind: str, **changes: Any) -> Path:
    tiny_model(family, **changes).save_pretrained(tmp_path / "model")
    return write_gguf(tmp_path / "model", tmp_path / "m.gguf", type=kind)


def continued(model: Any, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and the logits that chose them."""
    found = model.generate(
        ids_BT,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return found.sequences, torch.stack(found.logits, dim=1)


@pytest.mark.parametrize("offset", [0, 32, 4096 - 32])
def test_fields_side_by_side_become_tiles_on_cache_lines(offset: int, seed: int) -> None:
    stored = layout(
        ("gate", (32, 256), "ggml:Q4_0"), ("up", (32, 256), "ggml:Q4_0"), ("down", (256, 64), "ggml:Q8_0")
    )
    raws = [random_raw(spec.codec, spec.shape) for spec in stored.fields]
    slot = torch.zeros(2 * 4096 + stored.nbytes, dtype=torch.uint8)
    begin = -slot.data_ptr() % 64 + offset
    places, at = [], begin
    for raw in raws:
        places.append(slot[at : at + len(raw)])
        places[-1].copy_(raw)
        at += len(raw)
    used = slot_layout(stored)
    assert [spec.codec for spec in used.fields] == ["tile16:int4g32", "tile16:int4g32", "tile16:int8g32"]
    for old, new, raw, tiles in zip(stored.fields, used.fields, raws, arrive(stored, places), strict=True):
        assert tiles.data_ptr() % 64 == 0
        was = get_codec(old.codec).decode(raw, old.shape, torch.float32)
        assert torch.equal(get_codec(new.codec).decode(tiles, new.shape, torch.float32), was)


def test_a_field_that_stays_keeps_its_place(seed: int) -> None:
    stored = layout(("up", (32, 256), "ggml:Q4_0"), ("down", (256, 256), "ggml:Q6_K"))
    raws = [random_raw(spec.codec, spec.shape) for spec in stored.fields]
    turned = arrive(stored, [raw.clone() for raw in raws])
    assert [spec.codec for spec in slot_layout(stored).fields] == ["tile16:int4g32", "ggml:Q6_K"]
    assert torch.equal(turned[1], raws[1])
    assert torch.equal(
        get_codec("tile16:int4g32").decode(turned[0], (32, 256), torch.float32),
        get_codec("ggml:Q4_0").decode(raws[0], (32, 256), torch.float32),
    )


@pytest.mark.parametrize(
    ("family", "kind", "changes", "head"),
    [
        ("olmoe", "q4_0", _OLMOE, "ggml:Q6_K"),
        ("mixtral", "q8_0", {}, "tile16:int8g32"),
        ("qwen2_moe", "q4_0", {}, "tile16:int8g32"),
        ("qwen3_moe", "q8_0", {}, "tile16:int8g32"),
    ],
)
def test_packed_layers_hold_the_weights_of_the_file(
    tmp_path: Path, family: str, kind: str, changes: dict[str, Any], head: str, seed: int
) -> None:
    path = make(tmp_path, family, kind, **changes)
    weights = dict(GGUFCheckpoint.open(path).dense_tensors(torch.float32))
    model: Any = load_model(path)
    try:
        packed = {name: part for name, part in model.named_modules() if isinstance(part, PackedLinear)}
        assert {name.rpartition(".")[2] for name in packed} >= {"q_proj", "k_proj", "o_proj", "lm_head"}
        assert model.lm_head.codec == head
        for name, module in packed.items():
            own = "model.embed_tokens" if name == "lm_head" and "lm_head.weight" not in weights else name
            assert torch.equal(module.weight, weights[f"{own}.weight"]), name
            assert module.matrix is not None
        assert not list(packable_linears(model, model.gangline.view)) or kind == "q4_0"
        held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        assert abs(held - model.gangline.plan.dense) < 0.01 * held
    finally:
        model.gangline.close()


def test_answers_do_not_depend_on_where_experts_lie(tmp_path: Path, seed: int) -> None:
    path = make(tmp_path, "olmoe", "q4_0", **_OLMOE)
    ids_BT = torch.randint(3, 300, (2, 9))
    answers = []
    for slots in (16, 5):
        model: Any = load_model(path, expert_slots=slots)
        try:
            answers.append(continued(model, ids_BT))
            assert model.gangline.plan.codecs == ("tile16:int4g32",)
        finally:
            model.gangline.close()
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])


def test_the_plan_counts_packed_layers(tmp_path: Path, seed: int) -> None:
    path = make(tmp_path, "olmoe", "q4_0", **_OLMOE)
    stored, expanded = plan_model(path), plan_model(path, precision="int8")
    assert stored.dense < expanded.dense
    assert stored.load_extra < expanded.load_extra


def with_super_blocks(source: Path, target: Path) -> Path:
    """A copy of a Q8_0 file whose matrices are random blocks of the types that Q4_K_M and Q5_K_M mix."""
    read, write = gguf.GGUFReader(source), gguf.GGUFWriter(target, "olmoe")
    for key, field in read.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            parts = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            write.add_key_value(key, field.contents(), field.types[0], parts)
    for tensor in read.tensors:
        kind, data = tensor.tensor_type, tensor.data
        if kind == gguf.GGMLQuantizationType.Q8_0 and tensor.name != "token_embd.weight":
            wide = ("down", "output.weight", "attn_v")
            name = "Q6_K" if any(part in tensor.name for part in wide) else "Q4_K"
            name = "Q5_K" if "attn_q" in tensor.name else name
            kind = gguf.GGMLQuantizationType[name]
            *outer, columns = (int(size) for size in reversed(tensor.shape))
            raw = random_raw(f"ggml:{name}", (math.prod(outer), columns)).view(math.prod(outer), -1)
            blocks_NB = raw.view(-1, get_codec(f"ggml:{name}").size)
            for place, scale in zip(HALF_FIELDS[f"ggml:{name}"], (5e-4, 4e-3), strict=False):
                step = scale if name != "Q6_K" else 9e-5
                blocks_NB[:, place : place + 2] = torch.tensor([step]).half().view(torch.uint8)
            data = raw.view(*outer, -1).numpy()
        write.add_tensor(tensor.name, data, raw_dtype=kind)
    write.write_header_to_file()
    write.write_kv_data_to_file()
    write.write_tensors_to_file()
    write.close()
    return target


def test_a_mix_of_super_blocks_runs_as_it_is_stored(tmp_path: Path, seed: int) -> None:
    changes = {**_OLMOE, "intermediate_size": 256}
    path = with_super_blocks(make(tmp_path, "olmoe", "q8_0", **changes), tmp_path / "mix.gguf")
    weights = dict(GGUFCheckpoint.open(path).dense_tensors(torch.float32))
    ids_BT = torch.randint(3, 300, (2, 9))
    answers = []
    for slots in (16, 5):
        model: Any = load_model(path, expert_slots=slots)
        try:
            packed = {name: part for name, part in model.named_modules() if isinstance(part, PackedLinear)}
            assert {part.codec for part in packed.values()} == {"ggml:Q4_K", "ggml:Q5_K", "ggml:Q6_K"}
            assert all(torch.equal(part.weight, weights[f"{name}.weight"]) for name, part in packed.items())
            assert model.gangline.plan.codecs == ("ggml:Q4_K", "ggml:Q6_K")
            answers.append(continued(model, ids_BT))
        finally:
            model.gangline.close()
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])
