"""Find the MoE layers of any transformers model, also on the meta device."""

import re

from torch import nn

from gangline.core.errors import UnsupportedModelError
from gangline.models.adapters import ADAPTERS
from gangline.models.adapters.parameters import get_parameter
from gangline.models.view import MoEBlock, MoEView

# Attention whose query and output projections are experts: these stay ordinary dense weights.
_DENSE_BY_CHOICE = ("JetMoeMoA",)
_MOE_CLASS = re.compile(r"(MoE|Moe|Experts)(Layer|Block)?$")


def find_moe(model: nn.Module) -> MoEView:
    """Return every MoE layer of ``model``; works on meta tensors and changes nothing.

    Raises:
        UnsupportedModelError: the model has no experts, or holds some in a class that no adapter knows.
    """
    blocks: list[MoEBlock] = []
    for name, module in model.named_modules():
        adapter = next((a for a in ADAPTERS if a.claims(module)), None)
        if adapter is not None:
            blocks.append(adapter.describe(model, name, module, len(blocks)))
    _mark_shared_weights(blocks)
    _refuse_unknown(model, [block.parent_name for block in blocks])
    if not blocks:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no MoE layer: it is a dense model, and gangline has nothing "
            "to place; run it with transformers alone, or make a MoE of it with gangline convert"
        )
    family = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    notes = tuple(dict.fromkeys(note for block in blocks for note in block.notes))
    return MoEView(model, family, blocks, notes)


def _mark_shared_weights(blocks: list[MoEBlock]) -> None:
    """Name the first layer with the same parameters (diffusion_gemma ties its decoder to its encoder)."""
    first: dict[int, int] = {}
    for block in blocks:
        parameter = get_parameter(block.experts, block.param_names[0].format(expert=0))
        layer = first.setdefault(id(parameter), block.layer)
        block.same_weights_as = None if layer == block.layer else layer


def _refuse_unknown(model: nn.Module, known: list[str]) -> None:
    """Raise if a module counts experts, or is named after them, away from every block that we know."""
    for name, module in model.named_modules():
        if not _looks_like_moe(module) or type(module).__name__ in _DENSE_BY_CHOICE:
            continue
        inside = any(name == path or name.startswith(f"{path}.") for path in known)
        around = any(path.startswith(f"{name}.") for path in known)
        if not inside and not around and not _below_dense_by_choice(model, name):
            raise UnsupportedModelError(
                f"{type(module).__name__} ({name or 'the model'}) of {type(model).__name__} holds experts "
                "in a way that gangline does not know; see the table of supported models in the documentation"
            )


def _looks_like_moe(module: nn.Module) -> bool:
    if hasattr(module, "config_class"):  # a whole model may carry a count for its loss
        return False
    count = getattr(module, "num_experts", None)
    return (isinstance(count, int) and count > 1) or _MOE_CLASS.search(type(module).__name__) is not None


def _below_dense_by_choice(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    paths = (".".join(parts[:i]) for i in range(1, len(parts)))
    return any(type(model.get_submodule(path)).__name__ in _DENSE_BY_CHOICE for path in paths)
