"""Endless streams of images that can be stopped anywhere: digits, folders, arrays and published data sets; augmented, and sent ahead."""
from .arrays import Arrays, array_stream, read_idx, read_idx_folder, read_npz, table_stream
from .augment import apply_augmentation, augment_image, augmentation_labels, draw_augmentation, warp_image
from .folder import FileStream, ImageFolder
from .pixels import PrepareImage, compose, keys_kernel, middle_square, open_picture
from .prefetch import DevicePrefetch, prefetch_to_device
from .stream import (EndlessLine, ExamplesOf, ImageStream, choose_part, host_rows, load_digits,
                     mix_streams)
from .tfds import find_tfds, get_dataset, open_tfds

TFDSStream = FileStream  # its name before folders could be read

__all__ = ["load_digits", "host_rows", "EndlessLine", "ImageStream", "keys_kernel", "middle_square",
           "mix_streams", "choose_part", "ExamplesOf", "open_picture", "compose", "PrepareImage", "ImageFolder",
           "FileStream", "TFDSStream", "Arrays", "read_npz", "read_idx", "read_idx_folder", "array_stream", "table_stream",
           "find_tfds", "open_tfds", "get_dataset", "draw_augmentation", "augmentation_labels", "warp_image",
           "apply_augmentation", "augment_image", "prefetch_to_device", "DevicePrefetch"]
