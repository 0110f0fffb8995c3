"""Pictures from pictures: changed, filled in, made sharp, or mixed."""
from .inpainting import inpaint
from .inverse import Blur, Downsample, Grey, Keep, Posterior, solve_inverse
from .paths import encode, image_to_image, invert_and_edit, slerp

__all__ = ["image_to_image", "encode", "invert_and_edit", "slerp", "inpaint", "solve_inverse", "Posterior",
           "Downsample", "Blur", "Grey", "Keep"]
