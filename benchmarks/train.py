"""What a training step costs: ours, a plain jitted JAX step, and (where they are installed) PyTorch with the same network, and diffusers.

    python benchmarks/train.py [--rounds 15] [--only NAME …] [--parts]

A UNet of 2.2 million parameters, 16 images of 32×32×3, Adam and a moving average. Every contender has a process of its own and they take
turns, so none meets the waiting threads of another. All but plain JAX keep their memory from step to step. Prints medians, the first call and the memory of the compiled step.
"""
import argparse
import os
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxdiff.losses import diffusion_loss
from flaxdiff.models import SimpleUNet
from flaxdiff.predictors import KarrasEDMPredictor
from flaxdiff.schedulers import EDMNoiseScheduler
from flaxdiff.speed import keep_memory
from flaxdiff.trainer import DiffusionTrainer, ema_update

SHAPE, DEPTHS, GROUPS, HEADS, WIDTH = (16, 32, 32, 3), (32, 64, 128), 8, 4, 128
SCHEDULE, PREDICTOR = EDMNoiseScheduler(), KarrasEDMPredictor()
IMAGES = np.random.default_rng(0).uniform(-1, 1, SHAPE).astype(np.float32)


def network(): return SimpleUNet(3, WIDTH, DEPTHS, (None, None, {"heads": HEADS}, {"heads": HEADS}), 1, norm_groups=GROUPS)


def ours():
    "A step of the trainer."
    trainer = DiffusionTrainer(network(), optax.adam(1e-4), SCHEDULE, model_output_transform=PREDICTOR)
    trainer.initialize(IMAGES)
    return lambda: jax.block_until_ready(trainer.train_step(IMAGES))


def loss_and_parameters():
    "The same formulas in one function: loss(params, key), and fresh parameters."
    model, images = network(), jnp.asarray(IMAGES)

    def loss(params, key):
        a, b = jax.random.split(key)
        t, eps = SCHEDULE.sample_timesteps(a, len(images)), jax.random.normal(b, images.shape)
        alpha, sigma = SCHEDULE.get_rates(t)
        F = model.apply(params, (alpha * images + sigma * eps) * PREDICTOR.get_input_scale(alpha, sigma), SCHEDULE.network_time(t))
        return jnp.mean(diffusion_loss(F, PREDICTOR.get_target(images, eps, alpha, sigma), alpha.ravel(), sigma.ravel(), PREDICTOR))
    return loss, jax.jit(model.init)(jax.random.PRNGKey(0), images[:1], jnp.zeros(1))


def plain_step():
    "(a plain step, what it is called with)."
    (loss, params), optimizer = loss_and_parameters(), optax.adam(1e-4)

    @jax.jit
    def step(params, ema, memory, n):
        value, grads = jax.value_and_grad(loss)(params, jax.random.fold_in(jax.random.PRNGKey(1), n))
        updates, memory = optimizer.update(grads, memory)
        params = optax.apply_updates(params, updates)
        return params, ema_update(ema, params, n, 0.999), memory, value
    return step, [params, params, optimizer.init(params)]


def plain():
    "Jitted as it stands."
    step, state = plain_step()

    def run(): state[:] = jax.block_until_ready(step(*state, 5))[:3]
    return run


def part(wrap):
    "Forward alone, or with the way back."
    loss, params = loss_and_parameters()
    call = jax.jit(wrap(loss))
    return lambda: jax.block_until_ready(call(params, jax.random.PRNGKey(0)))


def torch_unet(p, x, temb, depths=DEPTHS):
    "`SimpleUNet`, function by function; p: its parameters as nested dicts of tensors, x: (B, C, H, W)."
    import torch
    import torch.nn.functional as T
    seen = {}

    def next_of(kind): return p[f"{kind}_{seen.setdefault(kind, iter(range(99))).__next__()}"]
    def dense(q, h): return T.linear(h, q["kernel"].T, q.get("bias"))
    def norm(q, h): return T.group_norm(h, GROUPS, q["scale"], q["bias"], 1e-5)
    def conv(q, h, **how): return T.conv2d(h, q["kernel"].permute(3, 2, 0, 1), q["bias"], **{"padding": 1, **how})
    def matrix(q, h): return T.conv2d(h, q["kernel"].T[:, :, None, None], q["bias"])

    def block(h):
        q = next_of("ResidualBlock")
        g = conv(q["Conv_0"], T.silu(norm(q["GroupNorm_0"], h)))
        scale, shift = dense(q["Dense_0"], emb)[:, :, None, None].chunk(2, 1)
        g = conv(q["Conv_1"], T.silu(norm(q["GroupNorm_1"], g) * (1 + scale) + shift))
        return (matrix(q["Dense_1"], h) if "Dense_1" in q else h) + g

    def look(h):
        q = next_of("AttentionBlock")
        seen = norm(q["norm_self"], h).flatten(2).transpose(1, 2)
        parts = (dense(q[f"self_{what}"], seen).unflatten(2, (HEADS, -1)).transpose(1, 2) for what in ("query", "key", "value"))
        out = dense(q["self_out"], T.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return h + out.transpose(1, 2).reshape(h.shape)
    w = torch.tensor(np.geomspace(4.0, 1e-3, WIDTH // 2), dtype=torch.float32)
    emb = torch.cat([torch.cos(temb[:, None] * w), torch.sin(temb[:, None] * w)], -1)
    for q in p["TimeEmbedding_0"].values(): emb = T.silu(dense(q, emb))
    h, skips = conv(next_of("Conv"), x), []
    for i in range(len(depths)):
        if i: h = conv(next_of("Downsample")["Conv_0"], T.pad(h, (0, 1, 0, 1)), stride=2, padding=0)
        h = block(h) if i < 2 else look(block(h))
        skips.append(h)
    h = block(look(block(h)))
    for i in reversed(range(len(depths))):
        h = block(torch.cat([h, skips.pop()], 1))
        if i == 2: h = look(h)
        if i: h = conv(next_of("Upsample")["Conv_0"], T.interpolate(h, scale_factor=2))
    return conv(next_of("Conv"), T.silu(norm(next_of("GroupNorm"), h)))


def torch_step(net, parameters):
    "Adam and a moving average in PyTorch, the same formulas for the loss."
    import torch
    images, optimizer = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).contiguous(), torch.optim.Adam(parameters, 1e-4)
    average = [p.detach().clone() for p in parameters]

    def run():
        sigma, eps = torch.exp(torch.randn(len(images)) * 1.2 - 1.2), torch.randn_like(images)
        s = sigma[:, None, None, None]
        n = (s ** 2 + 0.25).sqrt()
        loss = (net((images + s * eps) / n, sigma.log() / 4) - (s * images / 0.5 - 0.5 * eps) / n).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad(): torch._foreach_lerp_(average, parameters, 1e-3)
        return loss.item()
    return run


def torch_same(**layout):
    "The same network and weights in PyTorch; they must give the same output. `layout`: how pictures lie in memory."
    import torch
    model, x, temb = network(), IMAGES[:2], np.float32([-0.5, 0.7])
    params = jax.jit(model.init)(jax.random.PRNGKey(0), x, temb)
    params = jax.tree.map(lambda p: np.random.default_rng(p.size).normal(0, 0.05, p.shape).astype(np.float32) + p, params)
    tensors = jax.tree.map(lambda p: torch.tensor(np.asarray(p)).requires_grad_(), params["params"])
    theirs = torch_unet(tensors, torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(temb)).permute(0, 2, 3, 1).detach().numpy()
    mine = np.asarray(jax.jit(model.apply)(params, x, temb))
    assert np.allclose(mine, theirs, rtol=0, atol=2e-5 * abs(mine).max()), abs(mine - theirs).max()  # a dozen layers of float32
    return torch_step(lambda x, temb: torch_unet(tensors, x.to(**layout) if layout else x, temb), jax.tree.leaves(tensors))


def diffusers():
    "diffusers' UNet of as many parameters and levels; its way up has two blocks a level, so it computes half as much again."
    from diffusers import UNet2DModel
    net = UNet2DModel(sample_size=32, block_out_channels=(32, 64, 112), layers_per_block=1, norm_num_groups=GROUPS, attention_head_dim=28,
                      down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"))
    return torch_step(lambda x, temb: net(x, temb).sample, list(net.parameters()))


def channels_last():
    import torch
    return torch_same(memory_format=torch.channels_last)


CONTENDERS = {"flaxdiff": ours, "plain JAX": plain, "PyTorch": torch_same, "PyTorch, channels last": channels_last, "diffusers": diffusers}
PARTS = {"forward": lambda: part(lambda f: f), "forward + backward": lambda: part(jax.value_and_grad)}


def serve(name):
    "Answer every line on the standard input by the seconds of one step."
    if name != "plain JAX": keep_memory()
    run = (CONTENDERS | PARTS)[name]()
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


def step(process):
    process.stdin.write("\n")
    process.stdin.flush()
    if not (line := process.stdout.readline()): raise SystemExit("a contender stopped; see above")
    return float(line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="rounds of five steps each")
    parser.add_argument("--only", nargs="*", metavar="NAME", choices=[*CONTENDERS, *PARTS], help="some of the contenders")
    parser.add_argument("--parts", action="store_true", help="forward and backward alone, too")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve: raise SystemExit(serve(arguments.serve))
    names = arguments.only or [*CONTENDERS, *(PARTS if arguments.parts else ())]
    try: import diffusers as _, torch
    except ImportError:
        names = [n for n in names if n not in ("PyTorch", "PyTorch, channels last", "diffusers")]
        print("PyTorch and diffusers are not installed: make parity brings them")
    else: print(f"torch {torch.__version__}")
    plain_one, made = plain_step()
    memory = plain_one.lower(*made, 5).compile().memory_analysis()
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, {sum(p.size for p in jax.tree.leaves(made[0])):,} parameters; "
          f"beside its state the plain step needs {memory.temp_size_in_bytes / 1e6:.0f} MB, and {memory.output_size_in_bytes / 1e6:.0f} MB for the new one")
    processes, first, taken = {}, {}, {n: [] for n in names}
    for n in names:  # one after the other, so that no first call meets another's start
        processes[n] = subprocess.Popen([sys.executable, __file__, "--serve", n], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        first[n] = step(processes[n])
    for _ in range(arguments.rounds):
        for n, p in processes.items():
            step(p)  # the first of a turn wakes the threads
            taken[n] += [step(p) for _ in range(4)]
    for p in processes.values(): p.stdin.close()
    median = {n: statistics.median(v) for n, v in taken.items()}
    for n in names:
        print(f"{n:24s} {1 / median[n]:6.2f} steps/s   {1e3 * median[n]:7.1f} ms (fastest {1e3 * min(taken[n]):.0f})   "
              f"{median[names[0]] / median[n]:5.2f} of {names[0]}'s speed   first call {first[n]:5.1f} s")
