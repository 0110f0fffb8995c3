"""The old place of `flaxdiff.cli`'s settings, train and sample: every name from there."""
from .checkpoints import fingerprint
from .cli import sample, settings, train
from .cli.sample import *
from .cli.settings import *
from .cli.train import *

NetworkConfig = LearningConfig = TrainConfig  # once three classes, each the next one's base

__all__ = [*settings.__all__, *train.__all__, *sample.__all__, "NetworkConfig", "LearningConfig", "fingerprint"]
