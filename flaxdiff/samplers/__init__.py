"""From noise to data: one scan, one hook, many solvers."""
from .common import DiffusionSampler, SamplerState
from .ddim import DDIMSampler, EulerAncestralSampler
from .ddpm import DDPMSampler
from .dpm_solver import DEISSampler, DPMSolverPlusPlusSampler, DPMSolverSampler, UniPCSampler
from .edm import EDMSampler
from .few_steps import FewStepSampler
from .grids import exponential_grid, karras_grid, lambda_grid, leading_grid, trailing_grid, uniform_grid
from .multistep import LMSSampler, MultiStepDPM, PLMSSampler, PNDMSampler
from .ode import AdaptiveSampler, EulerSampler, HeunSampler, MidpointSampler, RK4Sampler

__all__ = ["DiffusionSampler", "SamplerState", "DDPMSampler", "DDIMSampler", "EulerAncestralSampler", "EulerSampler",
           "HeunSampler", "MidpointSampler", "RK4Sampler", "AdaptiveSampler", "EDMSampler",
           "EulerMaruyamaSampler", "PredictorCorrectorSampler",
           "MultiStepDPM", "LMSSampler", "PLMSSampler", "PNDMSampler", "DPMSolverSampler", "DPMSolverPlusPlusSampler", "UniPCSampler", "DEISSampler", "FewStepSampler",
           "uniform_grid", "leading_grid", "trailing_grid", "karras_grid", "lambda_grid", "exponential_grid"]


def __getattr__(name):
    "The samplers of `flaxdiff.sde`, which itself builds on `samplers.common`: fetched when first asked for, so that either may come first."
    if name not in ("EulerMaruyamaSampler", "PredictorCorrectorSampler"): raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .. import sde
    return getattr(sde, name)
