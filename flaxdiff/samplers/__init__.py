"""From noise to data: one scan, one hook, many solvers."""
from .churn import EDMSampler
from .common import DiffusionSampler, SamplerState
from .ddim import DDIMSampler, EulerAncestralSampler
from .ddpm import DDPMSampler
from .dpm_solver import DEISSampler, DPMSolverPlusPlusSampler, DPMSolverSampler, UniPCSampler
from .few_steps import FewStepSampler
from .flow_map import FlowMap, FlowMapSampler
from .grids import exponential_grid, karras_grid, lambda_grid, leading_grid, trailing_grid, uniform_grid
from .multistep import LMSSampler, MultiStepDPM, PLMSSampler, PNDMSampler
from .ode import AdaptiveSampler, EulerSampler, HeunSampler, MidpointSampler, RK4Sampler
from .sde import EulerMaruyamaSampler, PredictorCorrectorSampler

__all__ = ["DiffusionSampler", "SamplerState", "DDPMSampler", "DDIMSampler", "EulerAncestralSampler", "EulerSampler",
           "HeunSampler", "MidpointSampler", "RK4Sampler", "AdaptiveSampler", "EDMSampler",
           "EulerMaruyamaSampler", "PredictorCorrectorSampler",
           "MultiStepDPM", "LMSSampler", "PLMSSampler", "PNDMSampler", "DPMSolverSampler", "DPMSolverPlusPlusSampler",
           "UniPCSampler", "DEISSampler", "FewStepSampler", "FlowMap", "FlowMapSampler",
           "uniform_grid", "leading_grid", "trailing_grid", "karras_grid", "lambda_grid", "exponential_grid"]
