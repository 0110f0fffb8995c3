"""Noise schedules: α(t) and σ(t), and everything that follows from them."""
from .common import NoiseScheduler
from .continuous import CosineContinuousNoiseScheduler, CosineGeneralNoiseScheduler
from .discrete import (CosineNoiseSchedule, CosineNoiseScheduler, DiscreteNoiseScheduler, ExpNoiseSchedule,
                       ExpNoiseScheduler, LinearNoiseSchedule, LinearNoiseScheduler)
from .flow import FlowNoiseScheduler
from .karras import EDMNoiseScheduler, KarrasVENoiseScheduler
from .sde import SubVPNoiseScheduler, VENoiseScheduler, VPNoiseScheduler

__all__ = ["NoiseScheduler", "DiscreteNoiseScheduler", "LinearNoiseSchedule", "CosineNoiseSchedule",
           "ExpNoiseSchedule", "LinearNoiseScheduler", "CosineNoiseScheduler", "ExpNoiseScheduler",
           "CosineContinuousNoiseScheduler", "CosineGeneralNoiseScheduler", "KarrasVENoiseScheduler",
           "EDMNoiseScheduler", "FlowNoiseScheduler", "VPNoiseScheduler", "SubVPNoiseScheduler",
           "VENoiseScheduler"]
