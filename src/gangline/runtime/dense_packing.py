"""Pack the linear layers of a model: attention projections, shared experts, dense FFNs and the output head.

``--precision int4`` means the model, not only its experts; embeddings, norms, routers and layers too small to
matter keep their 16 or 32 bits.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gangline.formats import get_codec
from gangline.kernels.cpu.encoder import encode
from gangline.kernels.cpu.packed_linear import PackedLinear
from gangline.models import MoEView
from gangline.runtime.embedding import give_back
from gangline.runtime.footprint import Footprint

# A layer with fewer outputs than one tile has rows gains nothing (gates of shared experts have one).
_FEWEST_ROWS = 16


# An output head of 4 bits costs more quality than its bytes are worth; llama.cpp's files of 4 bits keep it at
# 6 as well.
HEAD_CODEC = "tile16:int6g32"


def linear_codec(codec: str, *, is_head: bool) -> str:
    """Return the codec of one linear layer where experts are packed into ``codec``."""
    return HEAD_CODEC if is_head and get_codec(codec).bits < get_codec(HEAD_CODEC).bits else codec


def packable_linears(model: nn.Module, view: MoEView) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the name and module of every linear layer of the language model that ``--precision`` packs."""
    routers = {
        id(module) for block in view.blocks if block.router is not None for module in block.router.modules()
    }
    language = _language_modules(model)
    for name, module in model.named_modules():
        wanted = id(module) in language and id(module) not in routers
        if wanted and type(module) is nn.Linear and module.out_features >= _FEWEST_ROWS:
            yield name, module


def with_packed_linears(footprint: Footprint, model: nn.Module, view: MoEView, codec: str) -> Footprint:
    """Return the sizes of a model whose linear layers will be packed into ``codec`` after loading."""
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    plain = packed = rows = heads = 0
    for _, module in packable_linears(model, view):
        if module is head:
            heads += module.weight.numel()
        else:
            rows += module.weight.numel()
        own = get_codec(linear_codec(codec, is_head=module is head))
        packed += own.nbytes((module.out_features, module.in_features))
        if module.weight is not embedding:  # a head that shares the embedding's weights leaves them there
            plain += module.weight.numel() * module.weight.element_size()
    dense = footprint.dense - plain + packed
    return replace(
        footprint,
        dense=dense,
        load_extra=footprint.load_extra + plain,
        row_params=footprint.row_params - rows,
        head_params=footprint.head_params - heads,
        packed=rows,
        packed_head=heads,
        packed_codec=codec,
    )


@torch.no_grad()
def pack_linears(model: nn.Module, view: MoEView, codec: str) -> None:
    """Replace every packable layer by a :class:`PackedLinear`, one after another; each frees its weights.

    A head that shares its weights with the embedding gets packed ones of its own; the embedding stays.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in list(packable_linears(model, view)):
        weight_OI: Tensor = module.weight
        own = linear_codec(codec, is_head=module is head)
        raw = encode(weight_OI, own)
        if raw is None:
            raw = get_codec(own).encode(weight_OI)
        packed = PackedLinear(raw, own, module.in_features, module.out_features, module.bias)
        model.set_submodule(name, packed.train(module.training))
        give_back(weight_OI)


def _language_modules(model: Any) -> set[int]:
    """Ids of all modules of the language model: towers for images and sound keep their weights."""
    parts = [model.get_decoder(), model.get_output_embeddings()]
    if getattr(model.config, "is_encoder_decoder", False):
        parts.append(model.get_encoder())
    return {id(module) for part in parts if part is not None for module in part.modules()}
