"""Experts of mixed formats into a pack: ``tiled`` changes the order of bytes and no weight."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from checkpoint.pack_rig import record
from formats.codec_rig import random_raw
from gangline.checkpoint import recode
from gangline.checkpoint.pack import verify_pack, write_pack
from gangline.checkpoint.recode import recode_layout
from gangline.core.errors import FormatError
from gangline.core.layout import ExpertLayout, FieldSpec
from gangline.formats import get_codec

# Codec, stored transposed, and the codec and orientation that "tiled" gives it.
CASES = [
    ("ggml:Q4_0", False, "tile16:int4g32", False),
    ("ggml:Q8_0", False, "tile16:int8g32", False),
    ("mxfp4", False, "tile16:mxfp4", False),
    ("int3g64", False, "tile16:int3g64", False),
    ("int4g32", True, "int4g32", True),
    ("ggml:Q4_K", False, "ggml:Q4_K", False),
    ("bf16", False, "bf16", False),
    ("bf16", True, "bf16", False),
    ("tile16:int4g64z", False, "tile16:int4g64z", False),
]


def spec(name: str, codec: str, transposed: bool = False) -> FieldSpec:
    shape = (40, 256)
    return FieldSpec(name, shape, codec, get_codec(codec).nbytes(shape), transposed)


class MixedSource:
    """Two layers of random experts, ``up`` and ``down`` in formats of their own."""

    catalog = None
    notes = ()
    experts = (2, 3)

    def __init__(self, codec: str, transposed: bool) -> None:
        layout = ExpertLayout((spec("up", codec, transposed), spec("down", "fp32")))
        self.layouts = (layout, layout)
        self.data = [
            [tuple(random_raw(f.codec, f.shape) for f in layout.fields) for _ in range(count)]
            for count in self.experts
        ]

    def read_layer(self, layer: int) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        yield from enumerate(self.data[layer])


def weight(raw: Tensor, field: FieldSpec) -> Tensor:
    """The matrix ``(out, in)`` in fp32."""
    w = get_codec(field.codec).decode(raw, field.shape, torch.float32)
    return w.t() if field.transposed else w


@pytest.mark.parametrize(("codec", "transposed", "wanted", "stays"), CASES)
def test_a_tiled_pack_holds_the_same_weights(codec, transposed, wanted, stays, seed, tmp_path):
    source = MixedSource(codec, transposed)
    catalog = write_pack(source, tmp_path / "p", key="k", codec="tiled")
    assert verify_pack(tmp_path / "p") == 5
    up = catalog.layouts[0].fields[0]
    assert (up.codec, up.transposed) == (wanted, stays)
    for key in catalog.extents:
        data = torch.frombuffer(bytearray(record(catalog, *key)), dtype=torch.uint8)
        fields = zip(catalog.layouts[key.layer].fields, source.layouts[key.layer].fields, strict=True)
        at = 0
        for (new, old), raw in zip(fields, source.data[key.layer][key.expert], strict=True):
            assert torch.equal(weight(data[at : at + new.nbytes], new), weight(raw, old))
            at += new.nbytes


@pytest.mark.parametrize("codec", ["bf16", "fp16", "fp32", "ggml:Q4_0", "ggml:Q6_K"])
@pytest.mark.parametrize("native", [True, False])
def test_a_codec_is_what_it_makes_of_the_weights(codec, native, seed, monkeypatch):
    if not native:
        monkeypatch.setattr(recode, "encode", lambda *_: None)
    for transposed in (False, True):
        old = spec("up", codec, transposed)
        (new,) = recode_layout(ExpertLayout((old,)), "tile16:int4g64").fields
        assert new.shape == ((256, 40) if transposed else (40, 256)) and not new.transposed
        raw = random_raw(codec, old.shape)
        made = recode.recode(raw, old, new)
        assert torch.equal(made, get_codec(new.codec).encode(weight(raw, old)))


def test_a_matrix_that_has_the_tile_form_asked_for_is_not_rounded_again(seed):
    old = spec("up", "int4g64")
    (new,) = recode_layout(ExpertLayout((old,)), "tile16:int4g64").fields
    raw = random_raw("int4g64", old.shape)
    assert torch.equal(weight(recode.recode(raw, old, new), new), weight(raw, old))


def test_an_unknown_codec_is_refused():
    with pytest.raises(FormatError, match="unknown codec 'tile16:int5g32'"):
        recode_layout(ExpertLayout((spec("up", "bf16"),)), "tile16:int5g32")
