"""k-diffusion, diffusers and smalldiffusion, run on a denoiser, a start and levels of ours. Needs torch; nothing in `make test` installs it.

    pip install torch diffusers torchdiffeq torchsde && pip install --no-deps k-diffusion smalldiffusion

Everywhere x is that of α = 1, so that x = x₀ + σ ε and a level is its σ/α.
"""
import importlib
import importlib.util
import sys
import types
from unittest import mock

import jax
import numpy as np
import torch


def alone(name, *missing):
    "The module `name` of a package, without what the package itself imports; `missing` modules, needed for training only, are dummies."
    package = name.split(".")[0]
    spec = importlib.util.find_spec(package)
    if spec is None: raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    bare = types.ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations)
    dummies = [m for m in missing if m not in sys.modules]
    sys.modules.update({package: bare, **{m: mock.MagicMock() for m in dummies}})
    try: return importlib.import_module(name)
    finally:
        for m in dummies: del sys.modules[m]


def load_k_diffusion():
    "k_diffusion.sampling."
    return alone("k_diffusion.sampling", "torchvision", "torchvision.transforms", "torchvision.transforms.functional")


def load_smalldiffusion():
    "smalldiffusion.diffusion."
    return alone("smalldiffusion.diffusion", "accelerate")


def as_torch(x): return torch.from_numpy(np.array(x))


class Denoiser:
    "A JAX denoiser (x, σ) -> x̂₀ as torch calls it, in the dtype of x; counts its calls. σ may be a scalar or one for each image, all the same."
    def __init__(self, denoise): self.denoise, self.calls = jax.jit(denoise), 0

    def __call__(self, x, sigma, **ignored):
        self.calls += 1
        x = x.numpy()
        return as_torch(self.denoise(x, np.asarray(np.ravel(sigma)[0], x.dtype)))


class TakesFrom:
    "Where a peer asks for random numbers it gets these, in order; `rest` are those it did not ask for."
    def __init__(self, noise): self.rest = [as_torch(z) for z in noise]
    def __call__(self, *ignored, dtype=torch.float64, **others): return self.rest.pop(0).to(dtype)


class SmallModel(torch.nn.Module):
    "A denoiser as smalldiffusion's model, for its solvers that draw nothing."
    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser

    def predict_eps_cfg(self, x, sigma, *ignored): return (x - self.denoiser(x, sigma)) / sigma
    def rand_input(self, n): return torch.zeros(())


def run_smalldiffusion(module, denoiser, x, sigmas, **options):
    "The last of smalldiffusion's samples; it walks to sigmas[-1]."
    none = types.SimpleNamespace(device="cpu")
    *_, last = module.samples(SmallModel(denoiser), torch.tensor(np.asarray(sigmas)), xt=as_torch(x), accelerator=none, **options)
    return last.numpy()


def run_diffusers(scheduler, denoiser, x, sigmas, **options):
    "x walked from σ = sigmas[0] down to sigmas[-1] by a diffusers scheduler that keeps a list of σ; most of them see x/√(1+σ²)."
    n, edm = len(sigmas) - 1, hasattr(scheduler, "precondition_outputs")
    scheduler.set_timesteps(n)
    scheduler.sigmas = torch.tensor(np.asarray(sigmas, np.float64))
    scheduler.timesteps = torch.arange(n, 0, -1) / (1.0 if edm else 1)  # names of the levels only
    if edm: scheduler.precondition_outputs, scheduler.is_scale_input_called = lambda x, out, sigma: out, True
    shrink = [1.0 if edm else (1 + s * s) ** -0.5 for s in np.asarray(sigmas, np.float64)]
    x = as_torch(x) * shrink[0]
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(denoiser(x / shrink[i], sigmas[i]), t, x, **options).prev_sample
    return (x / shrink[-1]).numpy()


def run_on_table(scheduler, denoiser, x, alpha_bar, n, calls=None, **options):
    """x, of the process itself, by a diffusers scheduler that looks ᾱ up in a table, here `alpha_bar` (ᾱ(1), …, ᾱ(N)), at n of its levels.

    The first so many `calls` only, all by default; the last leads to ᾱ = 1.
    """
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = torch.tensor(alpha_bar), torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(n)
    x = as_torch(x)
    for t in scheduler.timesteps.tolist()[:calls]:
        a, s = alpha_bar[t] ** 0.5, (1 - alpha_bar[t]) ** 0.5
        x0 = denoiser(x / a, s / a)
        out = x0 if scheduler.config.prediction_type == "sample" else (x - a * x0) / s
        x = scheduler.step(out, t, x, **options).prev_sample
    return x.numpy()
