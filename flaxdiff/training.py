"""The old place of `flaxdiff.cli`'s settings, train and sample: every name from there."""
from .checkpoints import fingerprint
from .cli import cost, record, sample, settings, train
from .cli.cost import *
from .cli.record import *
from .cli.sample import *
from .cli.settings import *
from .cli.train import *

NetworkConfig = LearningConfig = TrainConfig  # once three classes, each the next one's base

__all__ = [*settings.__all__, *cost.__all__, *record.__all__, *train.__all__, *sample.__all__,
           "NetworkConfig", "LearningConfig", "fingerprint"]
