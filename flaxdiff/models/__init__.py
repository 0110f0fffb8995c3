"""Networks."""
from .simple_unet import SimpleUNet, Unet

__all__ = ["SimpleUNet", "Unet"]
