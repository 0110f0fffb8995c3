"x"
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flaxdiff.predictors import (DiffusionPredictionTransform, EpsilonPredictor, KarrasEDMPredictor,
                                 VPredictor, X0Predictor)
from flaxdiff.predictors.common import check_predictor
from flaxdiff.pretrained import arguments_of
from flaxdiff.schedulers import (DiscreteNoiseScheduler, EDMNoiseScheduler, KarrasVENoiseScheduler,
                                 NoiseScheduler)
from flaxdiff.utils import check_choice, check_flag, check_positive_int, check_real

class StepNoiseScheduler(DiscreteNoiseScheduler):
    "N betas whose network is told the number of the step from 0, i = t - 1, as diffusers counts."
    def network_time(self, t: ArrayLike) -> jax.Array:
        "t - 1."
        return self.as_times(t) - 1

    def from_network_time(self, temb: ArrayLike) -> jax.Array:
        "temb + 1."
        return self.as_times(jnp.asarray(temb) + 1)

def named_betas(
    name: str,  # linear, scaled_linear or squaredcos_cap_v2
    steps: int,  # N
    start: float = 1e-4,  # the first β of the first two
    end: float = 0.02,  # their last
) -> np.ndarray:
    "(N,) float64: β, or √β, in equal steps from start to end; or of the cosine ᾱ, cut at 0.999."
    check_choice("beta_schedule", name, ("linear", "scaled_linear", "squaredcos_cap_v2"))
    check_positive_int("num_train_timesteps", steps)
    if name == "squaredcos_cap_v2":
        f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - f[1:] / f[:-1], 0.999)
    for argument, value in (("beta_start", start), ("beta_end", end)):
        check_real(argument, value, 0, 1, "()")
    power = 0.5 if name == "scaled_linear" else 1
    return np.linspace(start ** power, end ** power, steps) ** (1 / power)

DISCRETE = tuple(f"{name}Scheduler" for name in (  # the schedulers of diffusers that are a list of betas
    "DDPM", "DDIM", "DDIMInverse", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete",
    "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep",
    "DPMSolverSDE", "DEISMultistep", "UniPCMultistep", "SASolver", "LCM", "TCD"))
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")  # and those of Karras et al. 2022
PREDICTORS = {"epsilon": EpsilonPredictor, "v_prediction": VPredictor, "sample": X0Predictor}
STEPS = {"use_flow_sigmas": (False, None), "timestep_type": ("discrete",)}  # nothing else is a list of betas

def schedule_from(
    config: Mapping[str, Any],  # of a scheduler_config.json
) -> tuple[NoiseScheduler, DiffusionPredictionTransform]:
    "(the process, what the network's output means); how to sample is another matter, and not read."
    name = check_choice("_class_name in scheduler_config.json", config.get("_class_name"), (*DISCRETE, *EDM))
    if name in EDM:
        return edm_schedule_from(config)
    for field, due in STEPS.items():
        check_choice(f"{field} in scheduler_config.json", config.get(field, due[0]), due)
    kind = check_choice("prediction_type in scheduler_config.json",
                        config.get("prediction_type", "epsilon"), tuple(PREDICTORS))
    steps = config.get("num_train_timesteps", 1000)
    betas = config.get("trained_betas")
    if betas is None:
        betas = named_betas(config.get("beta_schedule", "linear"), steps, config.get("beta_start", 1e-4),
                            config.get("beta_end", 0.02))
    if len(betas) != steps:
        raise ValueError(f"trained_betas in scheduler_config.json must be num_train_timesteps={steps} "
                         f"numbers, got {len(betas)}")
    rescale = check_flag("rescale_betas_zero_snr", config.get("rescale_betas_zero_snr", False))
    schedule, predictor = StepNoiseScheduler(betas, rescale), PREDICTORS[kind]()
    check_predictor(predictor, schedule)
    return schedule, predictor

def edm_schedule_from(
    config: Mapping[str, Any],  # of a scheduler_config.json of one of `EDM`
) -> tuple[EDMNoiseScheduler, KarrasEDMPredictor]:
    "(the ramp of Karras et al. 2022, their preconditioning)."
    for field, due in (("sigma_schedule", "karras"), ("prediction_type", "epsilon")):
        check_choice(f"{field} in scheduler_config.json", config.get(field, due), (due,))
    ends = config.get("sigma_min", 0.002), config.get("sigma_max", 80.0), config.get("rho", 7.0)
    sigma_data = config.get("sigma_data", 0.5)
    return EDMNoiseScheduler(1, *ends, sigma_data), KarrasEDMPredictor(sigma_data)

def scheduler_config(
    noise_schedule: NoiseScheduler,  # of betas, or the EDM ramp
    predictor: DiffusionPredictionTransform,  # what the network's output means
) -> dict[str, Any]:
    "What scheduler_config.json would say; diffusers tells the network t - 1 (EDM: ln σ/4). Else `ValueError`."
    if isinstance(noise_schedule, KarrasVENoiseScheduler):
        return edm_scheduler_config(noise_schedule, predictor)
    if not isinstance(noise_schedule, DiscreteNoiseScheduler):
        raise ValueError("noise_schedule must be of betas, or the EDM ramp, to be one of diffusers', "
                         f"got {type(noise_schedule).__name__}")
    kinds = [kind for kind, cls in PREDICTORS.items() if type(predictor) is cls]
    if not kinds:
        raise ValueError(f"predictor must be one of {', '.join(c.__name__ for c in PREDICTORS.values())} "
                         f"on this schedule, got {type(predictor).__name__}")
    return {"_class_name": "DDIMScheduler", "num_train_timesteps": noise_schedule.max_timesteps,
            **describe_betas(betas_of(noise_schedule)), "prediction_type": kinds[0],
            "rescale_betas_zero_snr": noise_schedule.zero_terminal_snr, "clip_sample": False,
            "set_alpha_to_one": True, "steps_offset": 0, "timestep_spacing": "trailing"}

def betas_of(
    schedule: DiscreteNoiseScheduler,  # of N betas
) -> np.ndarray:
    "(N,) float64: the betas, before any rescaling to zero terminal SNR."
    if schedule.zero_terminal_snr:
        arguments = {**arguments_of(schedule), "zero_terminal_snr": False}
        schedule = type(schedule)(**arguments)
    return -np.expm1(np.diff(schedule.log_alpha_bar))

def describe_betas(
    betas: np.ndarray,  # (N,)
) -> dict[str, Any]:
    "The name and the ends of a list of betas that has a name; else the list itself, as trained_betas."
    start, end = float(f"{betas[0]:.12g}"), float(f"{betas[-1]:.12g}")
    for name in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        if np.allclose(betas, named_betas(name, len(betas), start, end), rtol=1e-9, atol=0):
            ends = {} if name == "squaredcos_cap_v2" else {"beta_start": start, "beta_end": end}
            return {"beta_schedule": name, **ends}
    return {"trained_betas": betas.tolist()}

def edm_scheduler_config(
    schedule: KarrasVENoiseScheduler,  # the ramp
    predictor: DiffusionPredictionTransform,  # `KarrasEDMPredictor`
) -> dict[str, Any]:
    "What the scheduler_config.json of an EDMEulerScheduler would say."
    if not isinstance(predictor, KarrasEDMPredictor):
        raise ValueError("predictor must be KarrasEDMPredictor on this schedule, "
                         f"got {type(predictor).__name__}")
    return {"_class_name": "EDMEulerScheduler", "sigma_min": schedule.sigma_min,
            "sigma_max": schedule.sigma_max, "sigma_data": predictor.sigma_data, "rho": schedule.rho,
            "sigma_schedule": "karras", "prediction_type": "epsilon", "num_train_timesteps": 1000}

def ddim_times(
    config: Mapping[str, Any],  # of a scheduler_config.json
    diffusion_steps: int,  # N
) -> tuple[np.ndarray, bool]:
    "(the times that diffusers' DDIM visits, whether the last step goes on to σ = 0), for `sampler.sample`."
    n, steps = check_positive_int("diffusion_steps", diffusion_steps), config.get("num_train_timesteps", 1000)
    if n > steps:
        raise ValueError(f"diffusion_steps must be at most num_train_timesteps={steps}, got {n}")
    spacing = check_choice("timestep_spacing in scheduler_config.json",
                           config.get("timestep_spacing", "leading"), ("leading", "trailing"))
    stride = steps // n
    if spacing == "trailing" and steps % n:
        raise ValueError(f"diffusion_steps must divide num_train_timesteps={steps} where timestep_spacing is "
                         f"trailing: else DDIM there steps beside its own times; got {n}")
    first = stride if spacing == "trailing" else 1 + config.get("steps_offset", 0)
    times = first + stride * np.arange(n)[::-1].astype(np.float64)
    to_zero = config.get("set_alpha_to_one", True)
    if not to_zero and times[-1] > 1:
        times = np.append(times, 1.0)  # the last step stops at the first level
    return times, to_zero
