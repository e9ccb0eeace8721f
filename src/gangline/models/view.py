"""The uniform view of a MoE in any transformers model: blocks, their geometry and where their weights lie.

Shape suffixes: T tokens, K chosen experts per token, D hidden, E experts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypedDict

from torch import Tensor, nn

from gangline.core.geometry import LayerGeometry, MoEGeometry
from gangline.core.layout import ModuleField
from gangline.kernels.reference import ExpertMath
from gangline.models.router import RouterSpec

ExpertsForward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``forward(x_TD, ids_TK, weights_TK) -> y_TD``; an id outside ``[0, E)`` is an empty slot to be skipped."""

Undo = Callable[[], None]


class Routed(NamedTuple):
    """What a model's own router decided for T rows; an empty slot has id E and weight 0."""

    logits_TE: Tensor
    weights_TK: Tensor
    ids_TK: Tensor


class LayoutFlags(TypedDict, total=False):
    """The layout flags of ``MoEBlock``; a missing one has its default."""

    has_gate: bool
    interleaved: bool
    transposed: bool
    has_bias: bool
    has_post_norm: bool
    default_gate: bool


class Adapter(Protocol):
    """How one kind of experts module is read, and how its computation is replaced."""

    name: str

    def install(self, block: "MoEBlock", forward: ExpertsForward) -> Undo:
        """Make the block compute its experts through ``forward``; the returned function undoes it."""
        ...

    def expert_tensors(self, block: "MoEBlock", expert: int) -> tuple[Tensor, ...]:
        """Return the module's own matrices of one expert, in field order, as stored."""
        ...

    def drop(self, block: "MoEBlock") -> None:
        """Free the module's expert matrices; their keys leave its state dict."""
        ...

    def restore(self, block: "MoEBlock", experts: Iterable[tuple[Tensor, ...]]) -> None:
        """Give the module its expert matrices back, one tuple per expert in ascending id."""
        ...

    def math(self, block: "MoEBlock") -> ExpertMath:
        """Return what the experts compute besides their matrices."""
        ...

    def compute(self, block: "MoEBlock", x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Run the module's own arithmetic on its own weights, whatever is installed."""
        ...

    def route(self, block: "MoEBlock", x_TD: Tensor, token_ids_T: Tensor) -> Routed:
        """Run the model's own router on T rows that form one sequence."""
        ...


@dataclass(eq=False)
class MoEBlock:
    """One MoE layer.

    Attributes:
        layer: index among the MoE layers, in the order in which a token meets them.
        name: path of the experts module in the model; the prefix of its parameters in the state dict.
        experts: the experts module.
        parent: the module that holds router and experts, with its path ``parent_name``.
        router: the router module, with its path ``router_name``; None if there is none.
        shared: shared experts by path: dense networks that see every token.
        geometry: sizes.
        fields: where one expert's matrices lie, in slot order.
        param_names: parameters of ``experts`` that the store takes over, one per field.
        param_shapes: their full shapes, kept because dropping the parameters forgets them.
        adapter: how to install our computation.
        has_gate: whether there is a gate matrix. interleaved: whether gate and up columns alternate.
        transposed: whether matrices are stored (in, out). has_bias: whether experts have biases.
        has_post_norm: whether an expert's output is normalised before weighting.
        default_gate: whether the gate function is the usual ``act(gate) * up``.
        router_spec: the family's routing rule, or None with the reason in ``router_reason``.
        same_weights_as: an earlier layer that holds the very same parameters, if there is one.
        stored_name: the path under which a checkpoint holds the experts, where that is another module's.
        notes: facts about this layer that a user should be told.
    """

    layer: int
    name: str
    experts: nn.Module
    parent: nn.Module
    parent_name: str
    router: nn.Module | None
    router_name: str | None
    shared: tuple[tuple[str, nn.Module], ...]
    geometry: LayerGeometry
    fields: tuple[ModuleField, ...]
    param_shapes: dict[str, tuple[int, ...]]
    adapter: Adapter
    has_gate: bool = True
    interleaved: bool = False
    transposed: bool = False
    has_bias: bool = False
    has_post_norm: bool = False
    default_gate: bool = True
    router_spec: RouterSpec | None = None
    router_reason: str = ""
    same_weights_as: int | None = None
    stored_name: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def param_names(self) -> tuple[str, ...]:
        """Parameters of ``experts`` with one slice per expert, in field order."""
        return tuple(field.parameter for field in self.fields)


@dataclass(eq=False)
class MoEView:
    """All MoE layers of one model.

    Attributes:
        model: the model itself.
        family: its ``model_type``.
        blocks: MoE layers in the order in which a token meets them.
        notes: facts about this model that a user should be told.
    """

    model: nn.Module
    family: str
    blocks: list[MoEBlock]
    notes: tuple[str, ...] = ()

    @property
    def geometry(self) -> MoEGeometry:
        """The sizes of all layers."""
        return MoEGeometry(tuple(block.geometry for block in self.blocks))
