"""The SDE of a schedule, its three classical processes and the samplers that walk it backwards, under their old address."""
from .samplers.sde import EulerMaruyamaSampler, PredictorCorrectorSampler
from .schedulers.sde import (SubVPNoiseScheduler, VENoiseScheduler, VPNoiseScheduler, diffusion_squared,
                             drift, score_from_eps, score_from_x0)

__all__ = ["drift", "diffusion_squared", "VPNoiseScheduler", "SubVPNoiseScheduler", "VENoiseScheduler",
           "score_from_eps", "score_from_x0", "EulerMaruyamaSampler", "PredictorCorrectorSampler"]
