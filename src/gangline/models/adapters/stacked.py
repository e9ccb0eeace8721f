"""Experts as stacked parameters: one tensor per matrix with one slice per expert. Base of most adapters.

Shape suffixes: T tokens, K chosen experts per token, D hidden, E experts, G columns of the gate/up product.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import cast

from torch import Tensor, nn

from gangline.core.errors import UnsupportedModelError
from gangline.core.geometry import LayerGeometry
from gangline.core.layout import ModuleField
from gangline.kernels.reference import ExpertMath
from gangline.models.adapters.parameters import get_parameter, matrix_shape, set_parameter
from gangline.models.router_table import RouterUnknownError, router_spec
from gangline.models.view import Adapter, ExpertsForward, LayoutFlags, MoEBlock, Routed, Undo

_ROUTER_NAMES = ("gate", "router")
# These two read the sequence length off their input, so rows must come as one sequence.
_SEQUENCE_ROUTERS = ("AfmoeTokenChoiceRouter", "ZayaRouter")


class StackedAdapter(Adapter):
    """Reads ``gate_up_proj``/``up_proj`` and ``down_proj``, ``(E, ., .)``; replaces the module's forward."""

    name = "stacked"

    def claims(self, module: nn.Module) -> bool:
        """Whether this adapter knows the module."""
        raise NotImplementedError

    def flags(self, module: nn.Module) -> LayoutFlags:
        """Layout flags of the module, as fields of ``MoEBlock``."""
        return {}

    def fields(self, module: nn.Module, flags: LayoutFlags) -> tuple[ModuleField, ...]:
        """Where one expert's matrices lie."""
        first = "gate_up" if flags.get("has_gate", True) else "up"
        transposed = flags.get("transposed", False)
        return tuple(
            ModuleField(field, name, matrix_shape(module, name), transposed)
            for field, name in ((first, f"{first}_proj"), ("down", "down_proj"))
        )

    def experts_of(self, module: nn.Module) -> int:
        """Number of experts with weights."""
        return int(cast(int, module.num_experts))

    def top_k(self, router: nn.Module | None, parent: nn.Module) -> int:
        """Experts per token."""
        config = getattr(router, "config", None)
        for owner, name in ((router, "top_k"), (config, "top_k_experts"), (parent, "top_k")):
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
        raise UnsupportedModelError(
            f"cannot tell how many experts a token of {type(parent).__name__} uses; "
            "report the class to gangline"
        )

    def parent_of(self, model: nn.Module, name: str) -> tuple[str, nn.Module]:
        """Path and module of the MoE block: what holds both the router and the experts."""
        path = name.rpartition(".")[0]
        return path, model.get_submodule(path)

    def describe(self, model: nn.Module, name: str, module: nn.Module, layer: int) -> MoEBlock:
        """Build the block of an experts module that this adapter claims."""
        parent_name, parent = self.parent_of(model, name)
        router_name = next(
            (n for n in _ROUTER_NAMES if isinstance(getattr(parent, n, None), nn.Module)), None
        )
        router = None if router_name is None else parent.get_submodule(router_name)
        flags = self.flags(module)
        fields = self.fields(module, flags)
        block = MoEBlock(
            layer=layer,
            name=name,
            experts=module,
            parent=parent,
            parent_name=parent_name,
            router=router,
            router_name=None if router_name is None else f"{parent_name}.{router_name}".lstrip("."),
            shared=_shared_experts(model, parent_name),
            geometry=_geometry(fields, self.experts_of(module), self.top_k(router, parent)),
            fields=fields,
            param_shapes=self.param_shapes(module, fields),
            adapter=self,
            **flags,
        )
        _attach_router_spec(block)
        return block

    def param_shapes(self, module: nn.Module, fields: tuple[ModuleField, ...]) -> dict[str, tuple[int, ...]]:
        """Full shapes of the parameters behind the fields."""
        return {f.parameter: tuple(get_parameter(module, f.parameter).shape) for f in fields}

    def install(self, block: MoEBlock, forward: ExpertsForward) -> Undo:
        """Shadow the module's ``forward`` by an instance attribute."""
        return replace_forward(block.experts, self.wrap(block, forward))

    def wrap(self, block: MoEBlock, forward: ExpertsForward) -> Callable[..., Tensor]:
        """Return what the experts module should do when it is called, in terms of ``forward``."""

        def call(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            return forward(x_TD, ids_TK, weights_TK).to(x_TD.dtype)

        return call

    def expert_tensors(self, block: MoEBlock, expert: int) -> tuple[Tensor, ...]:
        """Return slices of the stacked parameters."""
        return tuple(
            self.slices(block, get_parameter(block.experts, name).detach())[expert]
            for name in block.param_names
        )

    def slices(self, block: MoEBlock, stack: Tensor) -> Tensor:
        """View a stacked parameter as one matrix per expert."""
        return stack

    def drop(self, block: MoEBlock) -> None:
        """Forget the stacked parameters."""
        for name in block.param_names:
            set_parameter(block.experts, name, None)

    def restore(self, block: MoEBlock, experts: Iterable[tuple[Tensor, ...]]) -> None:
        """Allocate the stacked parameters anew and fill them one expert at a time."""
        stacks: list[Tensor] = []
        for expert, tensors in enumerate(experts):
            if not stacks:
                stacks = [
                    t.new_zeros(block.param_shapes[n])
                    for n, t in zip(block.param_names, tensors, strict=True)
                ]
            for stack, tensor in zip(stacks, tensors, strict=True):
                self.slices(block, stack)[expert] = tensor
        for name, stack in zip(block.param_names, stacks, strict=True):
            set_parameter(block.experts, name, stack)

    def math(self, block: MoEBlock) -> ExpertMath:
        """Read activation, biases and norm from the module's flags."""
        experts = block.experts
        first = "gate_up_proj" if block.has_gate else "up_proj"
        return ExpertMath(
            apply_gate=cast(
                Callable[[Tensor], Tensor], experts._apply_gate if block.has_gate else experts.act_fn
            ),
            interleaved=block.interleaved,
            gate_up_bias_EG=cast(Tensor, getattr(experts, f"{first}_bias")).detach()
            if block.has_bias
            else None,
            down_bias_ED=cast(Tensor, experts.down_proj_bias).detach() if block.has_bias else None,
            post_norm=cast(nn.Module, experts.post_expert_norm) if block.has_post_norm else None,
        )

    def compute(self, block: MoEBlock, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Call the class's own forward."""
        return cast(Tensor, stock_forward(block.experts)(block.experts, x_TD, ids_TK, weights_TK))

    def route(self, block: MoEBlock, x_TD: Tensor, token_ids_T: Tensor) -> Routed:
        """Call a router that returns ``(logits, weights, ids, ...)``."""
        router = cast(nn.Module, block.router)
        rows = x_TD.unsqueeze(0) if type(router).__name__ in _SEQUENCE_ROUTERS else x_TD
        logits, weights, ids = router(rows, **_extra_arguments(router, block.parent, token_ids_T))[:3]
        tokens = x_TD.shape[0]
        return Routed(logits.reshape(tokens, -1), weights.reshape(tokens, -1), ids.reshape(tokens, -1))


def stock_forward(module: nn.Module) -> Callable[..., object]:
    """Return the forward that the class defines, without a decorator or an installed one."""
    forward = cast(Callable[..., object], type(module).forward)
    return cast(Callable[..., object], getattr(forward, "__wrapped__", forward))


def replace_forward(module: nn.Module, forward: Callable[..., object]) -> Undo:
    """Let ``module(...)`` call ``forward``; the returned function puts back what was there."""
    missing = object()
    before = module.__dict__.get("forward", missing)
    module.forward = forward

    def undo() -> None:
        if before is missing:
            del module.forward
        else:
            module.__dict__["forward"] = before

    return undo


def _geometry(fields: tuple[ModuleField, ...], experts: int, top_k: int) -> LayerGeometry:
    down = fields[-1]
    hidden, intermediate = reversed(down.shape) if down.transposed else down.shape
    gateless = [field.name for field in fields] == ["up", "down"]
    return LayerGeometry(experts, top_k, hidden, intermediate, matrices=2 if gateless else 3)


def _shared_experts(model: nn.Module, parent_name: str) -> tuple[tuple[str, nn.Module], ...]:
    """Shared experts lie beside the router, or one level above it (granitemoe, ernie4_5_vl_moe)."""
    found: list[tuple[str, nn.Module]] = []
    for path in (parent_name, parent_name.rpartition(".")[0]):
        for name, child in model.get_submodule(path).named_children():
            if name.startswith("shared") and not name.endswith("gate"):
                found.append((f"{path}.{name}".lstrip("."), child))
    return tuple(found)


def _attach_router_spec(block: MoEBlock) -> None:
    if block.router is None:
        block.router_reason = "no router module beside the experts"
        return
    try:
        block.router_spec = router_spec(block.router, block.parent, block.geometry.top_k)
    except RouterUnknownError as reason:
        block.router_reason = str(reason)


def _extra_arguments(router: nn.Module, parent: nn.Module, token_ids_T: Tensor) -> dict[str, Tensor | None]:
    """Return what some routers take beside the hidden states."""
    wanted = inspect.signature(type(router).forward).parameters
    extra: dict[str, Tensor | None] = {}
    for name in ("e_score_correction_bias", "expert_bias"):
        if name in wanted:
            extra[name] = cast(Tensor | None, getattr(parent, name, None))
    if "input_ids" in wanted:
        extra["input_ids"] = token_ids_T
    return extra


def gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the gate function ``activation(gate) * up`` on a concatenated product."""

    def apply(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate) * up

    return apply
