"""The footprint of a model of one layer, of which a test says only what it is about."""

from typing import Any

from gangline.core.geometry import LayerGeometry, MoEGeometry
from gangline.runtime.footprint import Footprint

MIB = 1 << 20


def make_footprint(experts: int, **sizes: Any) -> Footprint:
    """So many experts of 1 MiB, two per token; everything else takes nothing, or what ``sizes`` says."""
    none = dict.fromkeys(
        (
            "dense",
            "load_extra",
            "table",
            "row_params",
            "head_params",
            "kv_per_token",
            "row",
            "vocab_row",
            "kernel",
        ),
        0,
    )
    return Footprint(
        **(none | sizes),
        width=2,
        slots=((MIB, (0,)),),
        experts=experts * MIB,
        active_experts=2 * MIB,
        geometry=MoEGeometry((LayerGeometry(experts, 2, 64, 32),)),
        codecs=("bf16",),
    )
