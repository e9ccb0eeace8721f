"""What happens to an expert between its last byte from disk and its first use: ggml blocks become tiles.

``Q4_0``, ``Q8_0`` and ``MXFP4`` hold what tiles hold, in another order and as many bytes, so a GGUF file
needs no pack: its experts are read where they lie and turned in their slot. The weights stay the same, bit
for bit, and as every expert is turned, where it lies never changes an answer.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from gangline.core.layout import ExpertLayout, FieldSpec
from gangline.kernels.cpu.retiler import LINE, form_in_place, retile_in_place


def slot_layout(stored: ExpertLayout) -> ExpertLayout:
    """Return how an expert that is read in the layout ``stored`` lies in its slot when it is used."""
    return ExpertLayout(tuple(_in_slot(spec) for spec in stored.fields))


def arrive(stored: ExpertLayout, raws: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Turn the fields of one expert, as read, into those of :func:`slot_layout`, where they are.

    Args:
        stored: their layout in the file.
        raws: parts of a slot, uint8, in slot order.

    Raises:
        FormatError: a scale that tiles cannot hold.
    """
    turned = [_in_slot(spec) is not spec for spec in stored.fields]
    # Neighbours in a slot move alike, so that none moves over another: the first one may lie anywhere in the
    # bytes that an aligned read has put before it.
    aligned = all(turned) and all(spec.nbytes % LINE == 0 for spec in stored.fields)
    fields = []
    for spec, raw, turn in zip(stored.fields, raws, turned, strict=True):
        shift = min(raw.data_ptr() % LINE, int(raw.storage_offset())) if aligned else 0
        fields.append(retile_in_place(raw, spec.shape, spec.codec, shift) if turn else raw)
    return tuple(fields)


def _in_slot(spec: FieldSpec) -> FieldSpec:
    name = None if spec.transposed else form_in_place(spec.shape, spec.codec)
    return spec if name is None else replace(spec, codec=name)
