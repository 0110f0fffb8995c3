"""A diffusion-model textbook that is its own JAX/Flax library."""
__version__ = "0.3.0"

from .data import get_dataset
from .plots import plotImages

__all__ = ["get_dataset", "plotImages"]
