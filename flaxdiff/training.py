"""The old place of `flaxdiff.cli.train` and `flaxdiff.cli.sample`: every name from there."""
from .checkpoints import fingerprint
from .cli import sample, train
from .cli.sample import *
from .cli.train import *

NetworkConfig = LearningConfig = TrainConfig  # once three classes, each the next one's base

__all__ = [*train.__all__, *sample.__all__, "NetworkConfig", "LearningConfig", "fingerprint"]
