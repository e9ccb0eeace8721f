"""What a sparsification did, layer by layer, expert by expert, matrix by matrix."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Calibration = Literal["routed", "layer", "none"]
"""On which tokens an expert was calibrated: those routed to it, a sample of all its layer's, or none."""


@dataclass(frozen=True)
class MatrixReport:
    """One matrix.

    Attributes:
        name: ``gate_up``, ``gate``, ``up`` or ``down``.
        kept: share of the sum of squares of the original weights that lies where something is kept.
        error: mean square of the change of the outputs over the mean square of the outputs, on the
            calibration tokens; None without tokens.
    """

    name: str
    kept: float
    error: float | None


@dataclass(frozen=True)
class ExpertReport:
    """One expert.

    Attributes:
        expert: its id.
        tokens: calibration tokens routed to it.
        calibration: the tokens that were used.
        matrices: in slot order.
        permuted: kept share of saliencies before and after channels were put in another order; None if not
            asked for.
    """

    expert: int
    tokens: int
    calibration: Calibration
    matrices: tuple[MatrixReport, ...]
    permuted: tuple[float, float] | None = None


@dataclass(frozen=True)
class LayerReport:
    """One MoE layer.

    Attributes:
        layer: its number among the MoE layers.
        name: path of its experts module.
        experts: in ascending id.
        reconstructed: mean square, over that of what the layer should put out, of what it lacks, on the
            calibration tokens, before and after its down projections were fitted to it; None if not asked
            for.
    """

    layer: int
    name: str
    experts: tuple[ExpertReport, ...]
    reconstructed: tuple[float, float] | None = None

    @property
    def kept(self) -> float:
        """Mean over experts and matrices."""
        return _mean([matrix.kept for expert in self.experts for matrix in expert.matrices])

    @property
    def error(self) -> float | None:
        """Mean over experts and matrices; None if any was pruned without tokens."""
        errors = [matrix.error for expert in self.experts for matrix in expert.matrices]
        known = [error for error in errors if error is not None]
        return _mean(known) if len(known) == len(errors) else None

    @property
    def poor(self) -> tuple[int, ...]:
        """Experts that were not calibrated on their own tokens though tokens were wanted."""
        return tuple(expert.expert for expert in self.experts if expert.calibration == "layer")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "kept": self.kept, "error": self.error, "poor": list(self.poor)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
