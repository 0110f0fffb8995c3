"""Networks."""
from .simple_unet import SimpleUNet, Unet, init_network

__all__ = ["SimpleUNet", "Unet", "init_network"]
