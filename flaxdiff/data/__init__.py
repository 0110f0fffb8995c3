"""Endless streams of images that can be stopped anywhere: digits, folders and published data sets; augmented, and sent ahead."""
from .augment import apply_augmentation, augment_image, augmentation_labels, draw_augmentation, warp_image
from .folder import FileStream, ImageFolder, PrepareImage
from .prefetch import DevicePrefetch, prefetch_to_device
from .stream import EndlessLine, ImageStream, host_rows, keys_kernel, load_digits, middle_square
from .tfds import find_tfds, get_dataset, open_tfds

TFDSStream = FileStream  # its name before folders could be read

__all__ = ["load_digits", "host_rows", "EndlessLine", "ImageStream", "keys_kernel", "middle_square",
           "PrepareImage", "ImageFolder", "FileStream", "TFDSStream", "find_tfds", "open_tfds", "get_dataset",
           "draw_augmentation", "augmentation_labels", "warp_image", "apply_augmentation", "augment_image",
           "prefetch_to_device", "DevicePrefetch"]
