"""What coming layers will ask for."""

from gangline.policies.predictors.protocol import Predictor
from gangline.policies.predictors.registry import PREDICTORS, make_predictor

__all__ = ["PREDICTORS", "Predictor", "make_predictor"]
