"""The sizes of a MoE, without any tensor."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerGeometry:
    """One MoE layer.

    Attributes:
        experts: number of routed experts E.
        top_k: experts per token K.
        hidden: model width D.
        intermediate: expert width F.
        matrices: weight matrices per expert (3 with a gate, 2 without).
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    matrices: int = 3

    @property
    def expert_params(self) -> int:
        """Weights of one expert (biases not counted: they stay with the dense weights)."""
        return self.matrices * self.hidden * self.intermediate


@dataclass(frozen=True)
class MoEGeometry:
    """All MoE layers of one model, in the order in which a token meets them."""

    layers: tuple[LayerGeometry, ...]

    @property
    def total_experts(self) -> int:
        """Number of routed experts over all layers."""
        return sum(layer.experts for layer in self.layers)

    @property
    def active_experts(self) -> int:
        """Expert computations per token: the working set of one token."""
        return sum(layer.top_k for layer in self.layers)

    @property
    def expert_params(self) -> int:
        """Weights in all routed experts."""
        return sum(layer.experts * layer.expert_params for layer in self.layers)
