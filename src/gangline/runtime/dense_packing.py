"""Pack the linear layers of a model: attention projections, shared experts, dense FFNs and the output head.

``--precision int4`` means the model, not only its experts; embeddings, norms, routers and layers too small to
matter keep their 16 or 32 bits. A GGUF file that is loaded as it is stored keeps its linear layers in its own
blocks, or in tiles that hold exactly the same.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gangline.formats import get_codec
from gangline.formats.retile import tile_form
from gangline.kernels.cpu import native
from gangline.kernels.cpu.encoder import encode
from gangline.kernels.cpu.packed_linear import PackedLinear
from gangline.kernels.cpu.retiler import retile
from gangline.models import MoEView
from gangline.runtime.embedding import give_back
from gangline.runtime.footprint import Footprint

if TYPE_CHECKING:
    from gangline.checkpoint.gguf import GGUFCheckpoint

# A layer with fewer outputs than one tile has rows gains nothing (gates of shared experts have one).
_FEWEST_ROWS = 16


# An output head of 4 bits costs more quality than its bytes are worth; llama.cpp's files of 4 bits keep it at
# 6 as well.
HEAD_CODEC = "tile16:int6g32d"


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


def linear_codecs(model: nn.Module, view: MoEView, codec: str) -> dict[str, str]:
    """Return the codec of every linear layer, by name, where experts are packed into ``codec``."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {
        name: linear_codec(codec, is_head=module is head) for name, module in packable_linears(model, view)
    }


def stored_linears(model: nn.Module, view: MoEView, gguf: "GGUFCheckpoint") -> dict[str, str]:
    """Return the codec of every linear layer, by name, that computes on the blocks of a GGUF file.

    Blocks that tiles hold exactly become tiles. Layers whose blocks the native core does not know are left
    out: they are expanded to the model's dtype, as all of them are without the native core.
    """
    core = native()
    known = set() if core is None else set(core.native_formats())
    found = {}
    for name, _ in packable_linears(model, view):
        stored = gguf.linear_codec(f"{name}.weight")
        codec = None if stored is None else tile_form(stored) or stored
        if codec is not None and codec in known:
            found[name] = codec
    return found


def with_packed_linears(
    footprint: Footprint, model: nn.Module, view: MoEView, codecs: Mapping[str, str], *, expanded: bool = True
) -> Footprint:
    """Return the sizes of a model of which some linear layers are packed.

    Args:
        footprint: without packing.
        model: the skeleton. view: its MoE layers.
        codecs: of the layers that are packed, by name.
        expanded: whether their plain weights are in memory while the model is loaded.
    """
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    plain = packed = rows = heads = freed = 0
    weights: Counter[str] = Counter()
    for name, module in packable_linears(model, view):
        own = codecs.get(name)
        if own is None:
            continue
        count = module.weight.numel()
        weights[own] += count
        if module is head:
            heads += count
        else:
            rows += count
        packed += get_codec(own).nbytes((module.out_features, module.in_features))
        if module.weight is not embedding:  # a head that shares the embedding's weights leaves them there
            plain += count * module.weight.element_size()
            freed += count
    return replace(
        footprint,
        dense=footprint.dense - plain + packed,
        load_extra=footprint.load_extra + plain if expanded else footprint.load_extra - 4 * freed,
        row_params=footprint.row_params - rows,
        head_params=footprint.head_params - heads,
        packed=rows,
        packed_head=heads,
        packed_codec=weights.most_common(1)[0][0] if weights else "",
    )


@torch.no_grad()
def pack_linears(model: nn.Module, view: MoEView, codecs: Mapping[str, str]) -> None:
    """Replace linear layers by :class:`PackedLinear`, one after another; each frees its weights.

    A head that shares its weights with the embedding gets packed ones of its own; the embedding stays.

    Args:
        model: loaded. view: its MoE layers.
        codecs: of the layers to pack, by name.
    """
    for name, module in list(packable_linears(model, view)):
        if name not in codecs:
            continue
        weight_OI: Tensor = module.weight
        raw = encode(weight_OI, codecs[name])
        if raw is None:
            raw = get_codec(codecs[name]).encode(weight_OI)
        _replace(model, name, module, raw, codecs[name])
        give_back(weight_OI)


def keep_stored_linears(
    model: nn.Module, view: MoEView, gguf: "GGUFCheckpoint", codecs: Mapping[str, str]
) -> None:
    """Replace linear layers by :class:`PackedLinear` on the blocks of a GGUF file.

    Args:
        model: loaded; the weights of these layers are not read. view: its MoE layers.
        gguf: the file.
        codecs: what :func:`stored_linears` returned.

    Raises:
        CheckpointError: the file is truncated.
        FormatError: a scale that tiles cannot hold.
    """
    for name, module in list(packable_linears(model, view)):
        if name not in codecs:
            continue
        stored = gguf.linear_codec(f"{name}.weight")
        assert stored is not None
        raw = gguf.linear_bytes(f"{name}.weight")
        if stored != codecs[name]:
            tiles = retile(raw, (module.out_features, module.in_features), stored)
            assert tiles is not None
            raw = tiles[1]
        _replace(model, name, module, raw, codecs[name])


def _replace(model: Any, name: str, module: nn.Linear, raw: Tensor, codec: str) -> None:
    packed = PackedLinear(raw, codec, module.in_features, module.out_features, module.bias)
    model.set_submodule(name, packed.train(module.training))


def _language_modules(model: Any) -> set[int]:
    """Ids of all modules of the language model: towers for images and sound keep their weights."""
    parts = [model.get_decoder(), model.get_output_embeddings()]
    if getattr(model.config, "is_encoder_decoder", False):
        parts.append(model.get_encoder())
    return {id(module) for part in parts if part is not None for module in part.modules()}
