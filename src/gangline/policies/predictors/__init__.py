"""What coming layers will ask for."""

from gangline.policies.predictors.protocol import Predictor

__all__ = ["Predictor"]
