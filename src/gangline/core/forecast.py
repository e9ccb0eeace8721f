"""What a predictor says about one layer of one forward pass."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Forecast:
    """Experts that a layer will probably use, likeliest first. A hint: it never replaces the router.

    Attributes:
        step: the forward pass that it speaks of.
        layer: index of the MoE layer that it speaks of.
        experts: expert ids, descending in ``probabilities`` (ties: ascending id); experts left out have 0.
        probabilities: chance or score of each of ``experts``.
        horizon: MoE layers between the moment of the forecast and the layer, counted through step ends.
        source: name of the predictor.
    """

    step: int
    layer: int
    experts: tuple[int, ...]
    probabilities: tuple[float, ...]
    horizon: int
    source: str
