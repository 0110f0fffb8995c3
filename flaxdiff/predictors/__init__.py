"""What the network's output means: one row of a 2×2 system."""
from .common import (DiffusionPredictionTransform, DirectPredictionTransform, EpsilonPredictionTransform,
                     EpsilonPredictor, VPredictionTransform, VPredictor, X0Predictor)
from .edm import KarrasEDMPredictor, KarrasPredictionTransform
from .flow import FlowPredictor

__all__ = ["DiffusionPredictionTransform", "EpsilonPredictor", "X0Predictor", "VPredictor", "KarrasEDMPredictor",
           "FlowPredictor", "EpsilonPredictionTransform", "DirectPredictionTransform", "VPredictionTransform",
           "KarrasPredictionTransform"]
