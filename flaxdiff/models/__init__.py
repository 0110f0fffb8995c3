"""Networks."""
from .dit import DIT_SIZES, DiT
from .simple_unet import SimpleUNet, Unet

__all__ = ["DIT_SIZES", "DiT", "SimpleUNet", "Unet"]
