"""From noise to data: one scan, one hook, many solvers."""
from .common import DiffusionSampler, SamplerState
from .ddim import DDIMSampler, EulerAncestralSampler
from .grids import karras_grid, lambda_grid, uniform_grid
from .ode import EulerSampler, HeunSampler, RK4Sampler

__all__ = ["DiffusionSampler", "SamplerState", "DDIMSampler", "EulerAncestralSampler", "EulerSampler",
           "HeunSampler", "RK4Sampler", "uniform_grid", "karras_grid", "lambda_grid"]
