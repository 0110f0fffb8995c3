"""What a training step costs: ours, a plain jitted JAX step of the same UNet, and (where it is installed) PyTorch with diffusers' UNet of the same size.

    python tests/bench_train.py [--seconds 20] [--parts]

A UNet of about 2.2 million parameters, 16 images of 32×32×3, Adam and a moving average. Prints steps/s (medians over interleaved rounds), ratios,
the first call and the memory of the compiled step; with --parts also forward and backward alone.
"""
import argparse
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxdiff.losses import diffusion_loss
from flaxdiff.models import SimpleUNet
from flaxdiff.predictors import KarrasEDMPredictor
from flaxdiff.schedulers import EDMNoiseScheduler
from flaxdiff.trainer import DiffusionTrainer, ema_update

SHAPE = (16, 32, 32, 3)
SCHEDULE, PREDICTOR = EDMNoiseScheduler(), KarrasEDMPredictor()


def network(): return SimpleUNet(3, 128, (32, 64, 128), (None, None, {"heads": 4}, {"heads": 4}), 1, norm_groups=8)


def ours(**options):
    "A step of the trainer."
    trainer = DiffusionTrainer(network(), optax.adam(1e-4), SCHEDULE, model_output_transform=PREDICTOR, **options)
    images = np.random.default_rng(0).uniform(-1, 1, SHAPE).astype(np.float32)
    trainer.initialize(images)
    return lambda: jax.block_until_ready(trainer.train_step(images)), trainer


def plain():
    "The same formulas in one function, jitted as it stands."
    model, optimizer, images = network(), optax.adam(1e-4), jnp.asarray(np.random.default_rng(0).uniform(-1, 1, SHAPE), jnp.float32)
    params = jax.jit(model.init)(jax.random.PRNGKey(0), images[:1], jnp.zeros(1))

    def loss(params, key):
        a, b = jax.random.split(key)
        t, eps = SCHEDULE.sample_timesteps(a, len(images)), jax.random.normal(b, images.shape)
        alpha, sigma = SCHEDULE.get_rates(t)
        x_t = alpha * images + sigma * eps
        F = model.apply(params, x_t * PREDICTOR.get_input_scale(alpha, sigma), SCHEDULE.network_time(t))
        return jnp.mean(diffusion_loss(F, PREDICTOR.get_target(images, eps, alpha, sigma), alpha.ravel(), sigma.ravel(), PREDICTOR))

    @jax.jit
    def step(params, ema, memory, n):
        value, grads = jax.value_and_grad(loss)(params, jax.random.fold_in(jax.random.PRNGKey(1), n))
        updates, memory = optimizer.update(grads, memory)
        params = optax.apply_updates(params, updates)
        return params, ema_update(ema, params, n, 0.999), memory, value
    state = [params, params, optimizer.init(params)]

    def run():
        *state[:], value = step(*state, 5)
        jax.block_until_ready(value)
    return run, (jax.jit(loss), jax.jit(jax.grad(loss)), params)


def torch_step():
    "PyTorch and diffusers: a UNet of as many parameters, levels and blocks; Adam and a moving average."
    import torch
    from diffusers import UNet2DModel
    torch.manual_seed(0)
    net = UNet2DModel(sample_size=32, block_out_channels=(32, 64, 128), layers_per_block=1, norm_num_groups=8, attention_head_dim=32,
                      down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"))
    images, optimizer = torch.rand(SHAPE[0], 3, 32, 32) * 2 - 1, torch.optim.Adam(net.parameters(), 1e-4)
    average = [p.detach().clone() for p in net.parameters()]

    def run():
        sigma, eps = torch.exp(torch.randn(len(images)) * 1.2 - 1.2), torch.randn_like(images)
        s = sigma[:, None, None, None]
        n = (s ** 2 + 0.25).sqrt()
        F = net((images + s * eps) / n, sigma.log() / 4).sample
        loss = (F - (s * images / 0.5 - 0.5 * eps) / n).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad(): torch._foreach_lerp_(average, list(net.parameters()), 1e-3)
        return loss.item()
    return run, sum(p.numel() for p in net.parameters())


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def race(calls, budget):
    "Median seconds of each, in turns, for about `budget` seconds."
    taken, start = {name: [] for name in calls}, time.perf_counter()
    while time.perf_counter() - start < budget or len(next(iter(taken.values()))) < 3:
        for name, call in calls.items(): taken[name].append(seconds(call))
    return {name: statistics.median(v) for name, v in taken.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20, help="of racing")
    parser.add_argument("--parts", action="store_true", help="forward and backward alone, too")
    arguments = parser.parse_args()
    calls, first = {}, {}
    calls["flaxdiff"], trainer = ours()
    calls["plain JAX"], (forward, backward, params) = plain()
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, batch {SHAPE}, {sum(p.size for p in jax.tree.leaves(params)):,} parameters")
    try:
        import torch
        calls["PyTorch"], size = torch_step()
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {size:,} parameters")
    except ImportError: print("PyTorch and diffusers are not installed: make parity brings them")
    if arguments.parts:
        key = jax.random.PRNGKey(0)
        calls["forward"], calls["forward + backward"] = lambda: forward(params, key).block_until_ready(), lambda: jax.block_until_ready(backward(params, key))
    for name, call in calls.items(): first[name] = seconds(call)
    for name, median in (times := race(calls, arguments.seconds)).items():
        print(f"{name:18s} {1 / median:6.2f} steps/s   {1e3 * median:7.1f} ms   {times['plain JAX'] / median:5.2f} of plain JAX's speed   first call {first[name]:5.1f} s")
