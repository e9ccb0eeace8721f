"""Experts that carry transformers' ``use_experts_implementation``: one experts function serves them all.

Source of the contract: ``transformers.integrations.moe`` (documented as "Experts backends").
"""

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, _default_apply_gate

from gangline.models.adapters.stacked import StackedAdapter, stock_forward
from gangline.models.view import ExpertsForward, LayoutFlags, MoEBlock, Undo

IMPLEMENTATION = "gangline"
_FORWARD = "_gangline_forward"


@dataclass
class _Selected:
    """A config whose experts implementation we changed; blocks of one model usually share one config."""

    config: Any
    previous: str | None
    blocks: int


_selected: dict[int, _Selected] = {}


def _experts_function(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run the forward installed on this module; a neighbour that shares the config keeps its own."""
    forward = module.__dict__.get(_FORWARD)
    if forward is None:
        config = cast(Any, module.config)
        chosen = _selected.get(id(config))
        previous = "eager" if chosen is None or chosen.previous is None else chosen.previous
        function = ALL_EXPERTS_FUNCTIONS.get_interface(previous, stock_forward(module))
        return cast(Tensor, function(module, hidden_states, top_k_index, top_k_weights))
    return cast(Tensor, forward(hidden_states, top_k_index, top_k_weights)).to(hidden_states.dtype)


ExpertsInterface.register(IMPLEMENTATION, _experts_function)


class DecoratedAdapter(StackedAdapter):
    """Every class with the decorator, whatever its layout flags."""

    name = "experts interface"

    def claims(self, module: nn.Module) -> bool:
        """Whether the decorator initialised this module."""
        return all(
            hasattr(module, name) for name in ("_apply_gate", "is_concatenated", "is_transposed", "has_bias")
        )

    def flags(self, module: nn.Module) -> LayoutFlags:
        """Read the decorator's flags."""
        return {
            "has_gate": bool(module.has_gate),
            "interleaved": not module.is_concatenated,
            "transposed": bool(module.is_transposed),
            "has_bias": bool(module.has_bias),
            "has_post_norm": bool(getattr(module, "has_post_expert_norm", False)),
            "default_gate": getattr(type(module), "_apply_gate", None) is _default_apply_gate,
        }

    def install(self, block: MoEBlock, forward: ExpertsForward) -> Undo:
        """Select our experts function on the module's config; the last undo restores the former one."""
        module, config = block.experts, cast(Any, block.experts.config)
        chosen = _selected.setdefault(id(config), _Selected(config, config._experts_implementation, 0))
        chosen.blocks += 1
        before = module.__dict__.get(_FORWARD)
        module.__dict__[_FORWARD] = forward
        # Not through the property: its setter would also change sub-configs that hold no experts.
        config._experts_implementation_internal = IMPLEMENTATION

        def undo() -> None:
            if before is None:
                del module.__dict__[_FORWARD]
            else:
                module.__dict__[_FORWARD] = before
            chosen.blocks -= 1
            if chosen.blocks == 0:
                config._experts_implementation_internal = chosen.previous
                del _selected[id(config)]

        return undo
