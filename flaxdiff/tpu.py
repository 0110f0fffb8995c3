"""The old place of `flaxdiff.cli.tpu`: every name from there."""
from . import __version__
from .cli.tpu import *
from .cli.tpu import __all__
