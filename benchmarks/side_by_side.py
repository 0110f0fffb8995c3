"""Side by side: this library, diffusers, k-diffusion, and the `flaxdiff` of PyPI, another project of that name; one run, one machine, its CPU.

    python benchmarks/side_by_side.py [--only overhead network errors digits fashion] [--repeats 9] [--json FILE] [--quick]

`make parity` installs PyTorch, diffusers and k-diffusion. The other flaxdiff cannot stand beside this one in an environment; give it a folder,

    pip install --no-deps --target .venv/others flaxdiff clu ml-collections

Who is not there is left out, and named. Every contender has a process of its own; they take turns, so that what else the machine does meets all
alike. Numbers are medians, ratios are to this library in the same run. Prints Markdown; --json keeps the tables for the page side_by_side.
On a GPU, `benchmarks/gpu.py` has training and sampling beside PyTorch.
"""
import argparse
import datetime
import gzip
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
FASHION = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")
HERE, DIFFUSERS, K, OTHERS, SAME = "flaxdiff (here)", "diffusers", "k-diffusion", "flaxdiff (PyPI)", "PyTorch, same network"
SHAPE, FEW, MANY, CALLS = (16, 32, 32, 3), 20, 120, 20
DEPTHS = {"digits": (32, 64), "fashion": (32, 64, 96)}
RATE, DECAY, BATCH = 1e-3, 0.995, 64  # of learning within a budget, for all


def seconds_of(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


# ---------------------------------------------------------------- what a step costs beside the network: a trivial one, on (16, 32, 32, 3)

SOLVERS = ("Euler", "Euler ancestral", "Heun", "DPM-Solver++ 2M")


def steps_here():
    import jax

    from flaxdiff import samplers as S
    from flaxdiff.predictors import KarrasEDMPredictor
    from flaxdiff.schedulers import EDMNoiseScheduler

    class Trivial:
        def apply(self, params, x, temb): return params * x + 1e-3 * temb.reshape(-1, 1, 1, 1)
    classes = (S.EulerSampler, S.EulerAncestralSampler, S.HeunSampler, S.DPMSolverPlusPlusSampler)
    made = {name: cls(Trivial(), jax.numpy.float32(0.3), EDMNoiseScheduler(), KarrasEDMPredictor()) for name, cls in zip(SOLVERS, classes)}
    x = 80 * jax.random.normal(jax.random.PRNGKey(0), SHAPE)
    return {"steps": lambda solver, n: seconds_of(lambda: made[solver].sample(x, made[solver].make_steps(n), rng=1).block_until_ready())}


def trivial_in_torch(x, temb): return 0.3 * x + 1e-3 * temb


def preconditioned(F, sigma_data=0.5):
    "EDM's denoiser (x, σ) -> x̂₀ of a network F(x, ln σ/4), as k-diffusion calls it."
    def denoise(x, sigma, **ignored):
        s = sigma.reshape(-1, 1, 1, 1)
        n = (s ** 2 + sigma_data ** 2).sqrt()
        return sigma_data ** 2 / n ** 2 * x + s * sigma_data / n * F(x / n, sigma.log() / 4)
    return denoise


def levels_in_torch(n):
    "EDM's n levels, and 0."
    import torch
    ramp = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), n) ** 7
    return torch.cat([ramp, torch.zeros(1)])


def steps_k():
    import torch
    k = load_k()
    sample = dict(zip(SOLVERS, (k.sample_euler, k.sample_euler_ancestral, k.sample_heun, k.sample_dpmpp_2m)))
    x, denoise = 80 * torch.randn(SHAPE), preconditioned(lambda x, temb: trivial_in_torch(x, temb.reshape(-1, 1, 1, 1)))

    @torch.no_grad()
    def steps(solver, n): return seconds_of(lambda: sample[solver](denoise, x, levels_in_torch(n), disable=True))
    return {"steps": steps}


def load_k():
    sys.path.insert(0, str(ROOT / "tests"))
    import peers
    return peers.load_k_diffusion()


def steps_diffusers():
    import diffusers as D
    import torch
    classes = (D.EulerDiscreteScheduler, D.EulerAncestralDiscreteScheduler, D.HeunDiscreteScheduler, D.DPMSolverMultistepScheduler)
    made = {name: cls() for name, cls in zip(SOLVERS, classes)}
    x = torch.randn(SHAPE)

    @torch.no_grad()
    def walk(scheduler, n, x):
        scheduler.set_timesteps(n)
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps: x = scheduler.step(trivial_in_torch(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return {"steps": lambda solver, n: seconds_of(lambda: walk(made[solver], n, x))}


class Plain:
    "For the other flaxdiff, whose samplers want a configuration of conditions: none."
    def get_unconditionals(self): return []


def steps_others():
    import jax
    from flaxdiff.predictors import KarrasPredictionTransform
    from flaxdiff.samplers.euler import EulerAncestralSampler, EulerSampler
    from flaxdiff.samplers.heun_sampler import HeunSampler
    from flaxdiff.schedulers import KarrasVENoiseScheduler

    class Trivial:
        def apply(self, params, x, temb): return params * x + 1e-3 * temb.reshape(-1, 1, 1, 1)
    schedule = KarrasVENoiseScheduler(1, sigma_max=80, rho=7, sigma_data=0.5)
    made = {name: cls(Trivial(), schedule, KarrasPredictionTransform(0.5), Plain()) for name, cls in zip(SOLVERS, (EulerSampler, EulerAncestralSampler, HeunSampler))}
    x, params = 80 * jax.random.normal(jax.random.PRNGKey(0), SHAPE), jax.numpy.float32(0.3)

    def steps(solver, n):
        if solver not in made: return None  # its multistep method keeps the history of the last call
        return seconds_of(lambda: walk_others(made[solver], params, x, n).block_until_ready())
    return {"steps": steps}


def walk_others(sampler, params, x, n):
    "n levels of the other flaxdiff from x."
    return sampler.generate_samples(params, len(x), x.shape[1], diffusion_steps=n, start_step=1000, priors=x)


def overhead(ask, names, args):
    few, many = (3, 6) if args.quick else (FEW, MANY)
    taken = {(solver, name): [] for solver in SOLVERS for name in names}
    for turn in range(args.repeats + 1):  # the first of them is the call that compiles
        for solver, name in taken:
            a, b = (ask(name, "steps", solver=solver, n=n) for n in (few, many))
            if turn and a is not None: taken[solver, name].append(1e6 * (b - a) / (many - few))
    rows = []
    for solver in SOLVERS:
        found = {name: statistics.median(taken[solver, name]) for name in names if taken[solver, name]}
        rows.append([solver] + [f"{found[name]:,.0f} ({found[name] / found[HERE]:.2g})" if name in found else "—" for name in names])
    return {"title": "What a step costs beside the network", "columns": ["solver", *names], "rows": rows,
            "caption": f"Microseconds a step on {SHAPE}, with a network of two multiplications and an addition (in brackets: of ours): the slope between {few} and {many} steps, "
            f"median of {args.repeats}. Two network calls a step for Heun."}


# ---------------------------------------------------------------- the network: UNets of two million parameters, 16 images of 32×32×3

def network_here():
    import jax
    import train

    from flaxdiff.samplers import EulerSampler
    from flaxdiff.speed import keep_memory
    keep_memory()
    step, model = train.ours(), train.network()
    params = jax.jit(model.init)(jax.random.PRNGKey(0), train.IMAGES[:1], np.zeros(1, np.float32))
    sampler = EulerSampler(model, params, train.SCHEDULE, train.PREDICTOR)
    draw = lambda: sampler.generate_images(16, CALLS, image_size=32, channels=3, rng=0).block_until_ready()
    return {"train": lambda: seconds_of(step), "draw": lambda: seconds_of(draw), "parameters": lambda: sum(p.size for p in jax.tree.leaves(params))}


def same_network(shape, depths):
    "(this library's UNet as a function of torch with fresh weights, their list)."
    import jax
    import torch
    import train

    from flaxdiff.models import SimpleUNet
    configs = tuple({"heads": 4} if i >= 2 else None for i in range(len(depths))) + ({"heads": 4},)
    model = SimpleUNet(shape[-1], train.WIDTH, depths, configs, 1, norm_groups=train.GROUPS)
    params = jax.jit(model.init)(jax.random.PRNGKey(0), np.zeros((1, *shape), np.float32), np.zeros(1, np.float32))
    tensors = jax.tree.map(lambda p: torch.tensor(np.asarray(p)).requires_grad_(), params["params"])
    return (lambda x, temb, tensors=tensors: train.torch_unet(tensors, x, temb, depths)), tensors, model


def network_same():
    "With k-diffusion's loop."
    import torch
    import train
    net, tensors, _ = same_network(SHAPE[1:], train.DEPTHS)
    leaves, k = list(leaves_of(tensors)), load_k()
    step, x = train.torch_step(net, leaves), 80 * torch.randn(16, 3, 32, 32)

    @torch.no_grad()
    def draw(): k.sample_euler(preconditioned(net), x, levels_in_torch(CALLS), disable=True)
    return {"train": lambda: seconds_of(step), "draw": lambda: seconds_of(draw), "parameters": lambda: sum(p.numel() for p in leaves)}


def leaves_of(tree):
    for value in tree.values():
        if isinstance(value, dict): yield from leaves_of(value)
        else: yield value


def network_diffusers():
    import diffusers as D
    import torch
    import train
    net = D.UNet2DModel(sample_size=32, block_out_channels=(32, 64, 112), layers_per_block=1, norm_num_groups=8, attention_head_dim=28,
                        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"))
    step = train.torch_step(lambda x, temb: net(x, temb).sample, list(net.parameters()))
    x, scheduler = torch.randn(16, 3, 32, 32), D.EDMEulerScheduler()

    @torch.no_grad()
    def draw():
        scheduler.set_timesteps(CALLS)
        h = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps: h = scheduler.step(net(scheduler.scale_model_input(h, t), t).sample, t, h).prev_sample
    return {"train": lambda: seconds_of(step), "draw": lambda: seconds_of(draw), "parameters": lambda: sum(p.numel() for p in net.parameters())}


def trainer_others(shape, depths, sigma_data, rate):
    "The other flaxdiff's trainer of its own UNet, as its README has it, without conditions: (trainer, step of a batch in 0…255)."
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn
    from flaxdiff.inputs import DiffusionInputConfig
    from flaxdiff.models.simple_unet import Unet
    from flaxdiff.predictors import KarrasPredictionTransform
    from flaxdiff.schedulers import EDMNoiseScheduler
    from flaxdiff.trainer import GeneralDiffusionTrainer
    configs = (None,) * (len(depths) - 1) + ({"heads": 4},)

    class Unconditional(nn.Module):
        @nn.compact
        def __call__(self, x, temb):
            return Unet(output_channels=shape[-1], emb_features=128, feature_depths=depths, attention_configs=configs, num_res_blocks=1, norm_groups=8)(x, temb, jnp.zeros((len(x), 1, 1)))
    GeneralDiffusionTrainer.ema_decay = DECAY
    trainer = GeneralDiffusionTrainer(Unconditional(), optax.adam(rate), EDMNoiseScheduler(1, sigma_max=80, rho=7, sigma_data=sigma_data), DiffusionInputConfig("image", shape, []),
                                      jax.random.PRNGKey(0), model_output_transform=KarrasPredictionTransform(sigma_data), checkpoint_base_path=tempfile.mkdtemp())
    call, state = trainer._define_train_step(BATCH), [trainer.state, trainer.rngstate]

    def step(images):
        state[0], loss, state[1] = call(state[0], state[1], {"image": images}, jnp.zeros(1, jnp.int32))
        return float(loss)
    return trainer, step, state


def network_others():
    import jax
    from flaxdiff.predictors import KarrasPredictionTransform
    from flaxdiff.samplers.euler import EulerSampler
    from flaxdiff.schedulers import KarrasVENoiseScheduler
    trainer, step, state = trainer_others(SHAPE[1:], (32, 64, 128), 0.5, 1e-4)
    images = np.random.default_rng(0).uniform(0, 255, SHAPE).astype(np.float32)
    sampler = EulerSampler(trainer.model, KarrasVENoiseScheduler(1, sigma_max=80, rho=7, sigma_data=0.5), KarrasPredictionTransform(0.5), Plain())
    x, params = 80 * jax.random.normal(jax.random.PRNGKey(0), SHAPE), state[0].ema_params
    return {"train": lambda: seconds_of(lambda: step(images)), "draw": lambda: seconds_of(lambda: walk_others(sampler, params, x, CALLS).block_until_ready()),
            "parameters": lambda: sum(p.size for p in jax.tree.leaves(params))}


def network(ask, names, args):
    taken = {(what, name): [] for what in ("train", "draw") for name in names}
    first = {key: ask(key[1], key[0]) for key in taken}
    for _ in range(args.repeats):
        for what, name in taken:
            ask(name, what)  # wakes the threads
            taken[what, name] += [ask(name, what) for _ in range(1 if what == "draw" else 3)]
    found, rows = {key: statistics.median(values) for key, values in taken.items()}, []
    for name in names:
        ms = {what: 1e3 * found[what, name] for what in ("train", "draw")}
        rows.append([name, f"{ask(name, 'parameters'):,}", f"{ms['train']:,.0f} ({found['train', name] / found['train', HERE]:.2f})", f"{ms['draw']:,.0f} ({found['draw', name] / found['draw', HERE]:.2f})",
                     f"{first['train', name]:.1f}", f"{first['draw', name]:.1f}"])
    return {"title": "Training and sampling a UNet", "columns": ["", "parameters", "training step, ms", f"{CALLS} steps of Euler, ms", "first training step, s", "first sampling, s"], "rows": rows,
            "caption": "16 images of 32×32×3, attention at 8×8, float32, Adam and a moving average (in brackets: of ours, so that 2 is twice as slow). `PyTorch, same network` is our "
            "UNet function by function, eager, in k-diffusion's loop; diffusers and the flaxdiff of PyPI bring UNets of their own, of other blocks."}


# ---------------------------------------------------------------- error against network calls, on a mixture whose ODE is known

def errors_all():
    "All but the other flaxdiff, in float64; the mixture is the first of benchmarks/few_steps.py."
    import few_steps as F
    import jax

    from flaxdiff import samplers as S
    data = F.PROBLEMS["mixture-1"]()
    ours = {"Euler": (1, S.EulerSampler, {}), "Heun": (2, S.HeunSampler, {}), "LMS-4": (1, S.LMSSampler, {}), "DPM-Solver++ 2M": (1, S.DPMSolverPlusPlusSampler, {}),
            "DPM-Solver++ 3M": (1, S.DPMSolverPlusPlusSampler, {"order": 3}), "DEIS-3": (1, S.DEISSampler, {}), "UniPC-2": (1, S.UniPCSampler, {}), "UniPC-3": (1, S.UniPCSampler, {"order": 3})}
    kept = [n for n in F.PEERS if not n.startswith("small") and n != "k-diffusion dpmpp_2s_ancestral"]

    def start(n, fine):
        x = F.starts(7, n)
        end, how = F.exact_end(data, x, fine)
        return {"x": x.tolist(), "end": np.asarray(end).tolist(), "how": how, "means": np.asarray(data.means).tolist() if hasattr(data, "means") else None}

    def measure(x, end, calls):
        x, end, found = np.array(x), np.array(end), {}
        for name, (pairs, cls, options) in ours.items():
            sampler = cls(F.ExactModel(data, F.SCHEDULE, F.PREDICTOR), {}, F.SCHEDULE, F.PREDICTOR, **options)
            times = F.karras_grid(F.SCHEDULE, 1.0, 0.0, (calls + pairs - 1) // pairs)
            found[f"{HERE} {name}"] = F.rms(np.asarray(sampler.sample(x, times, rng=0)) - end)
        denoiser = F.peers.Denoiser(lambda x, sigma: data.denoise(x, 1.0, sigma))
        for name in kept:
            pairs, run = F.PEERS[name]
            sigmas = np.asarray(F.SCHEDULE.sigma(F.karras_grid(F.SCHEDULE, 1.0, 0.0, (calls + pairs - 1) // pairs)))
            found[name] = F.rms(run(denoiser, x, sigmas) - end)
        return found
    jax.config.update("jax_enable_x64", True)
    return {"start": start, "measure": measure}


def errors_others():
    "The other flaxdiff on the same mixture, written out; its levels lie on its own grid of whole thousandths."
    import jax
    import jax.numpy as jnp
    from flaxdiff.predictors import DirectPredictionTransform
    from flaxdiff.samplers.euler import EulerSampler
    from flaxdiff.samplers.heun_sampler import HeunSampler
    from flaxdiff.samplers.multistep_dpm import MultiStepDPM
    from flaxdiff.schedulers import KarrasVENoiseScheduler
    jax.config.update("jax_enable_x64", True)
    r = np.random.default_rng(2001)  # as in benchmarks/few_steps.py
    k = r.integers(8, 21)
    means, scales, weights = 0.5 * r.normal(size=(k, 64)), 0.2 * np.exp(0.4 * r.normal(size=k)), r.dirichlet(np.full(k, 3.0))

    class Exact:
        def apply(self, params, x, temb):
            v, sigma = x.reshape(len(x), 1, -1), jnp.exp(4 * temb).reshape(-1, 1)
            variance, off = scales ** 2 + sigma ** 2, v - means
            p = jax.nn.softmax(jnp.log(weights) - 32 * jnp.log(variance) - jnp.sum(off ** 2, 2) / (2 * variance))
            return jnp.sum(p[:, :, None] * (means + (scales ** 2 / variance)[:, :, None] * off), 1).reshape(x.shape)

    def measure(x, end, calls):
        x, end, found = np.array(x), np.array(end), {}
        for name, pairs, cls in (("Euler", 1, EulerSampler), ("Heun", 2, HeunSampler), ("MultiStepDPM", 1, MultiStepDPM)):
            sampler = cls(Exact(), KarrasVENoiseScheduler(1, sigma_max=80, rho=7), DirectPredictionTransform(), Plain())
            sampler.post_process = lambda x: x  # which would clip to [-1, 1]
            out = walk_others(sampler, {}, jnp.asarray(x).reshape(-1, 8, 8, 1), (calls + pairs - 1) // pairs)
            found[f"{OTHERS} {name}"] = float(np.sqrt(np.mean((np.asarray(out).reshape(x.shape) - end) ** 2)))
        return found
    return {"measure": measure}


def errors(ask, names, args):
    budgets, (n, fine) = ((8,), (8, 50)) if args.quick else ((8, 12, 20, 40, 80), (128, 1000))
    start, found = ask("all", "start", n=n, fine=fine), {}
    for calls in budgets:
        for name in names: found.setdefault(calls, {}).update(ask(name, "measure", x=start["x"], end=start["end"], calls=calls))
    best = {calls: min(v for v in found[calls].values() if np.isfinite(v)) for calls in budgets}
    mark = lambda v, calls: f"**{v:.1e}**" if f"{v:.1e}" == f"{best[calls]:.1e}" else f"{v:.1e}"
    rows = [[solver] + [mark(found[calls][solver], calls) for calls in budgets] for solver in found[budgets[0]]]
    return {"title": "Error against network calls", "columns": ["solver", *(f"{calls} calls" for calls in budgets)], "rows": rows,
            "caption": f"Root mean square of what {n} samples in 64 dimensions are off from the end of the exact ODE ({start['how']}), on a mixture of round Gaussians, from σ = 80 down the same levels of ρ = 7; "
            "bold is the smallest of its column. The flaxdiff of PyPI rounds its levels to thousandths of its time."}


# ---------------------------------------------------------------- quality within a budget of seconds

class Batches:
    "Random batches, the same for all."
    def __init__(self, path): self.images, self.random = np.load(path), np.random.default_rng(0)
    def __call__(self): return self.images[self.random.integers(0, len(self.images), BATCH)]


def within(step, seconds):
    "(updates, seconds) of calling `step` so long."
    n, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds: n, _ = n + 1, step()
    return [n, time.perf_counter() - began]


def drawn(draw, n, out, at_once=250):
    "Seconds for n images in [-1, 1], (n, H, W, C), written to `out`."
    began = time.perf_counter()
    images = np.concatenate([np.asarray(draw(min(at_once, n - i), i)) for i in range(0, n, at_once)])
    seconds = time.perf_counter() - began
    np.save(out, np.nan_to_num(np.clip(images, -1, 1)))
    return seconds


def budget_here(kind, path, sigma_data):
    import jax
    import optax

    from flaxdiff.models import SimpleUNet
    from flaxdiff.predictors import KarrasEDMPredictor
    from flaxdiff.samplers import DPMSolverPlusPlusSampler
    from flaxdiff.schedulers import EDMNoiseScheduler
    from flaxdiff.speed import keep_memory
    from flaxdiff.trainer import DiffusionTrainer
    keep_memory()
    batch, depths, begun, samplers = Batches(path), DEPTHS[kind], [], []
    configs = tuple({"heads": 4} if i >= 2 else None for i in range(len(depths))) + ({"heads": 4},)
    trainer = DiffusionTrainer(SimpleUNet(1, 128, depths, configs, 1, norm_groups=8), optax.adam(RATE), EDMNoiseScheduler(sigma_data=sigma_data),
                               model_output_transform=KarrasEDMPredictor(sigma_data=sigma_data), ema_decay=DECAY)

    def step():
        if not begun: begun.append(trainer.initialize(batch()))  # to read `trainer.state` each time would copy it
        jax.block_until_ready(trainer.train_step(batch()))

    def draw(n, rng):
        if not samplers: samplers.append(DPMSolverPlusPlusSampler(trainer.denoiser))  # each sampler compiles its own program
        samplers[0].params = trainer.denoiser.params
        return samplers[0].generate_images(n, CALLS, rng=rng)
    return {"train": lambda seconds: within(step, seconds), "draw": lambda n, out: drawn(draw, n, out)}


def in_torch(net, parameters, loss, batch):
    "(step, the parameters' average) of Adam in PyTorch."
    import torch
    optimizer, average = torch.optim.Adam(parameters, RATE), [p.detach().clone() for p in parameters]
    done = [0]

    def step():
        value = loss(torch.from_numpy(batch()).permute(0, 3, 1, 2).contiguous())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        done[0] += 1
        with torch.no_grad(): torch._foreach_lerp_(average, parameters, 1 - min(DECAY, (1 + done[0]) / (10 + done[0])))
        return value.item()

    def averaged(call):
        "What `call` gives with the average in the parameters' place."
        own = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, a in zip(parameters, average): p.copy_(a)
            out = call().permute(0, 2, 3, 1).numpy()
            for p, o in zip(parameters, own): p.copy_(o)
        return out
    return step, averaged


def budget_same(kind, path, sigma_data):
    "This library's network in PyTorch, EDM's loss, and k-diffusion's DPM-Solver++(2M)."
    import torch
    batch, k = Batches(path), load_k()
    net, tensors, _ = same_network(batch.images.shape[1:], DEPTHS[kind])

    def loss(x):
        sigma, eps = torch.exp(torch.randn(len(x)) * 1.2 - 1.2), torch.randn_like(x)
        s = sigma[:, None, None, None]
        n = (s ** 2 + sigma_data ** 2).sqrt()
        return (net((x + s * eps) / n, sigma.log() / 4) - (s * x / sigma_data - sigma_data * eps) / n).square().mean()
    step, averaged = in_torch(net, list(leaves_of(tensors)), loss, batch)

    def draw(n, seed):
        x = 80 * torch.randn(n, *batch.images.shape[:0:-1], generator=torch.Generator().manual_seed(seed))
        return averaged(lambda: k.sample_dpmpp_2m(preconditioned(net, sigma_data), x, levels_in_torch(CALLS), disable=True))
    return {"train": lambda seconds: within(step, seconds), "draw": lambda n, out: drawn(draw, n, out)}


def budget_diffusers(kind, path, sigma_data):
    "As its tutorial has it: UNet2DModel, ε, DDPMScheduler(1000) as it comes, which is linear betas; its DPM-Solver++ for the samples."
    import diffusers as D
    import torch
    batch, depths = Batches(path), DEPTHS[kind]
    look = ["DownBlock2D" if i < 2 else "AttnDownBlock2D" for i in range(len(depths))]
    net = D.UNet2DModel(sample_size=batch.images.shape[1], in_channels=1, out_channels=1, block_out_channels=depths, layers_per_block=1, norm_num_groups=8, attention_head_dim=16,
                        down_block_types=look, up_block_types=[name.replace("Down", "Up") for name in reversed(look)])
    scheduler = D.DDPMScheduler(1000)

    def loss(x):
        eps, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        return (net(scheduler.add_noise(x, eps, t), t).sample - eps).square().mean()
    step, averaged = in_torch(net, list(net.parameters()), loss, batch)

    def draw(n, seed):
        solver = D.DPMSolverMultistepScheduler.from_config(scheduler.config)
        x = torch.randn(n, *batch.images.shape[:0:-1], generator=torch.Generator().manual_seed(seed))
        return averaged(lambda: walk(solver, x))

    def walk(solver, x):
        solver.set_timesteps(CALLS)
        for t in solver.timesteps: x = solver.step(net(x, t).sample, t, x).prev_sample
        return x
    return {"train": lambda seconds: within(step, seconds), "draw": lambda n, out: drawn(draw, n, out)}


def budget_others(kind, path, sigma_data):
    "As its README has it: EDM's schedule in training, Karras' for 200 steps of Euler ancestral."
    import jax
    from flaxdiff.predictors import KarrasPredictionTransform
    from flaxdiff.samplers.euler import EulerAncestralSampler
    from flaxdiff.schedulers import KarrasVENoiseScheduler
    batch, made, samplers = Batches(path), [], []

    def step():
        if not made: made.extend(trainer_others(batch.images.shape[1:], DEPTHS[kind], sigma_data, RATE))
        return made[1](127.5 * (batch() + 1))

    def draw(n, seed):
        trainer, _, state = made
        schedule, predictor = KarrasVENoiseScheduler(1, sigma_max=80, rho=7, sigma_data=sigma_data), KarrasPredictionTransform(sigma_data)
        if not samplers: samplers.append(EulerAncestralSampler(trainer.model, schedule, predictor, Plain()))
        return walk_others(samplers[0], state[0].ema_params, 80 * jax.random.normal(jax.random.PRNGKey(seed), (n, *batch.images.shape[1:])), 200)
    return {"train": lambda seconds: within(step, seconds), "draw": lambda n, out: drawn(draw, n, out)}


def load_images(kind):
    if kind == "digits":
        from sklearn.datasets import load_digits
        return (load_digits().images[..., None] / 8 - 1).astype(np.float32)
    pixels = np.frombuffer(gzip.open(FASHION).read()[16:], np.uint8).reshape(-1, 28, 28, 1)
    return (pixels / 127.5 - 1).astype(np.float32)


def budget(kind):
    def part(ask, names, args):
        import quality
        total, slices, n = (2, 1, 60) if args.quick else {"digits": (60, 12, 1000), "fashion": (90, 18, 250)}[kind]
        marks, rows, used, updates = (slices // 2, slices), {name: [] for name in names}, dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
        for turn in range(1, slices + 1):
            for name in names:
                more, seconds = ask(name, "train", seconds=min(total / slices, max(0, total * turn / slices - used[name])))
                used[name], updates[name] = used[name] + seconds, updates[name] + more
            if turn not in marks: continue
            for name in names:
                with tempfile.TemporaryDirectory() as folder:
                    taken = ask(name, "draw", n=n, out=f"{folder}/x.npy")
                    found = quality.measure(kind, np.load(f"{folder}/x.npy"))
                rows[name].append([name, f"{used[name]:.0f}", f"{updates[name]:,}", f"{found['distance'].value:.2f} ± {found['distance'].error:.2f}",
                                   f"{found['recognised'].value:.2f} ± {found['recognised'].error:.2f}", f"{n / taken:,.0f}"])
        return {"title": f"Quality within {total} seconds of training: {'the digits' if kind == 'digits' else 'Fashion-MNIST'}",
                "columns": ["", "seconds", "updates", f"FD ({kind}), n = {n:,}", "recognised", "images/s when sampling"], "rows": [row for name in names for row in rows[name]],
                "caption": f"From nothing, the compiling counted; batches of {BATCH}, Adam at {RATE}, an average of decay {DECAY}, no labels. Samples by {CALLS} calls: DPM-Solver++ 2M (here, k-diffusion, diffusers), "
                "and 200 of Euler ancestral for the flaxdiff of PyPI, as its README has it. `PyTorch, same network` is our UNet with k-diffusion's sampler; diffusers learns ε on linear betas, as its tutorial has it. "
                "FD as in the chapter on metrics, smaller is better; recognised is the share of which the classifier is sure. One seed each."}
    return part


# ---------------------------------------------------------------- the run

PARTS = {"overhead": (overhead, {HERE: steps_here, K: steps_k, DIFFUSERS: steps_diffusers, OTHERS: steps_others}),
         "network": (network, {HERE: network_here, SAME: network_same, DIFFUSERS: network_diffusers, OTHERS: network_others}),
         "errors": (errors, {"all": errors_all, OTHERS: errors_others}),
         **{kind: (budget(kind), {HERE: budget_here, SAME: budget_same, DIFFUSERS: budget_diffusers, OTHERS: budget_others}) for kind in ("digits", "fashion")}}
NEEDS = {K: ("torch", "k_diffusion"), SAME: ("torch", "k_diffusion"), DIFFUSERS: ("torch", "diffusers"), "all": ("torch", "k_diffusion", "diffusers", "smalldiffusion")}


def serve(part, name, words):
    "Answer each line of JSON on the standard input by one."
    out, sys.stdout = sys.stdout, open(os.devnull, "w")
    jobs = PARTS[part][1][name](*words)
    for line in sys.stdin:
        what = json.loads(line)
        print(json.dumps(jobs[what.pop("job")](**what)), file=out, flush=True)


class Contenders:
    "One process each, asked by `ask(name, job, …)`; who cannot start is told in `missing`."
    def __init__(self, part, names, others, words=()):
        self.processes, self.logs = {}, {}
        for name in names:
            env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(others if name == OTHERS else ROOT)}
            env.pop("JAX_COMPILATION_CACHE_DIR", None)
            self.logs[name] = tempfile.TemporaryFile("w+")
            command = [sys.executable, __file__, "--serve", part, name, *words]
            self.processes[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.logs[name], text=True, env=env)

    def ask(self, name, job, **what):
        process = self.processes[name]
        try:
            process.stdin.write(json.dumps({"job": job, **what}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError: line = ""
        if line: return json.loads(line)
        self.logs[name].seek(0)
        raise SystemExit(f"{name} stopped:\n{self.logs[name].read()[-3000:]}")

    def close(self):
        for process in self.processes.values():
            process.stdin.close()
            process.wait()


def installed(name, others):
    if name == OTHERS: return (others / "flaxdiff").is_dir()
    return all(importlib.util.find_spec(package) for package in NEEDS.get(name, ()))


def versions(others):
    found = {}
    for package in ("jax", "flax", "torch", "diffusers", "k-diffusion"):
        try: found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError: found[package] = "not installed"
    theirs = sorted(others.glob("flaxdiff-*.dist-info"))
    return {**found, "flaxdiff of PyPI": theirs[0].name.split("-")[1].removesuffix(".dist") if theirs else "not installed"}


def machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {platform.system()}, Python {platform.python_version()}"


def markdown(table):
    rows = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    return "\n".join([f"### {table['title']}", "", *("| " + " | ".join(row) + " |" for row in rows), "", table["caption"], ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--others", type=Path, default=ROOT / ".venv" / "others", help="the folder of PyPI's flaxdiff")
    parser.add_argument("--json", type=Path, help="where to keep the tables; those of other parts stay as they are")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve: return serve(*args.serve[:2], [float(w) if w.replace(".", "").isdigit() else w for w in args.serve[2:]])
    args.repeats, args.others = 1 if args.quick else args.repeats, args.others.resolve()
    sys.path.insert(0, str(ROOT))
    record = {"machine": machine(), "versions": versions(args.others), "tables": {}}
    print(f"{record['machine']}; " + ", ".join(f"{k} {v}" for k, v in record["versions"].items()), flush=True)
    for part in args.only:
        run, contenders = PARTS[part]
        names = [name for name in contenders if installed(name, args.others)]
        for name in set(contenders) - set(names): print(f"({part}: {name} is not installed)")
        if "all" in contenders and "all" not in names or part == "fashion" and not FASHION.exists():
            why = "it needs the peers" if "all" in contenders else f"{FASHION} is not there"
            print(f"({part} is left out: {why})")
            continue
        with tempfile.TemporaryDirectory() as folder:
            words = ()
            if part in DEPTHS:
                images = load_images(part)
                np.save(f"{folder}/images.npy", images)
                words = (part, f"{folder}/images.npy", "0.75" if part == "digits" else f"{images.std():.2f}")
            group = Contenders(part, names, args.others, words)
            began = time.perf_counter()
            table = run(group.ask, names, args)
            group.close()
        command = " ".join(["python benchmarks/side_by_side.py --only", part] + [f"--repeats {args.repeats}"] * (part in ("overhead", "network")))
        record["tables"][part] = {**table, "machine": record["machine"], "date": f"{datetime.date.today()}", "command": command, "minutes": round((time.perf_counter() - began) / 60, 1)}
        print(markdown(table), flush=True)
        if args.json:
            before = json.loads(args.json.read_text())["tables"] if args.json.exists() else {}
            args.json.write_text(json.dumps({**record, "tables": {**before, **record["tables"]}}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__": main()
