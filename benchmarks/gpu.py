"""One GPU: what a training step and fifty steps of sampling cost, and attention alone.

    python benchmarks/gpu.py [--batch 64] [--seconds 4] [--only NAME …] [--cpu]

Two networks in bfloat16 at 64×64: `published`, with attention at every level, and `coarse`, with attention at 16² and below. Each part has a
process of its own, so that each peak of memory is its own; a last one starts again with the programs of the first on disk. Beside them, where
PyTorch is installed, the same networks in PyTorch, eager and compiled. Prints one line of JSON a part; --cpu is a rehearsal at toy size.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

DENSE_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L4": 121, "L40S": 362, "B200": 2250}  # bfloat16, without sparsity, as NVIDIA states
HEADS, GROUPS, WIDTH = 4, 8, 256
SIZES = {"real": dict(size=64, depths=(64, 128, 256, 512), blocks=2, tokens=((4096, 16), (1024, 32), (4096, 64))),
         "toy": dict(size=8, depths=(16, 32), blocks=1, tokens=((64, 8),))}


def attends(name, levels):
    "Which levels, and the middle last, have attention: all, or the coarser half and the middle."
    return tuple(name == "published" or i >= levels // 2 for i in range(levels + 1))


def images(batch, size): return np.random.default_rng(0).uniform(-1, 1, (batch, size, size, 3)).astype(np.float32)


def rate(run, wait, seconds):
    "Calls a second, the median, after two to warm up."
    for _ in range(2): wait(run())
    taken, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds or len(taken) < 3:
        start = time.perf_counter()
        wait(run())
        taken.append(time.perf_counter() - start)
    return 1 / statistics.median(taken)


def network(name, how, **changes):
    import jax.numpy as jnp

    from flaxdiff.models import SimpleUNet
    configs = tuple({"heads": HEADS} if here else None for here in attends(name, len(how["depths"])))
    return SimpleUNet(3, WIDTH, how["depths"], configs, how["blocks"], norm_groups=GROUPS, dtype=jnp.bfloat16, **changes)


def operations(net, size):
    "Multiplications and additions forward for one image: XLA's count of the uncompiled program in its plain forms."
    import jax
    import jax.numpy as jnp

    import flaxdiff.models.layers as layers
    chosen = layers.by_backend, layers.attention_kind
    layers.by_backend, layers.attention_kind = (lambda cpu, other: other), (lambda *_, **__: "plain")
    try:
        x, temb = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
        params = jax.eval_shape(net.init, jax.random.PRNGKey(0), x, temb)
        return jax.jit(net.apply).lower(params, x, temb).cost_analysis()["flops"]
    finally: layers.by_backend, layers.attention_kind = chosen


def share(flops_a_second, kind):
    "Of the chip's peak, or None where it is not in the table."
    peak = next((v for name, v in DENSE_TFLOPS.items() if name in kind), None)
    return peak and round(flops_a_second / peak / 1e12, 3)


def ours(name, how, batch, seconds):
    "The trainer's step and Euler's sampler."
    import jax
    import optax

    from flaxdiff.predictors import KarrasPredictionTransform
    from flaxdiff.samplers import EulerSampler
    from flaxdiff.schedulers import EDMNoiseScheduler
    from flaxdiff.trainer import DiffusionTrainer
    began, x = time.perf_counter(), images(batch, how["size"])
    net = network(name, how)
    trainer = DiffusionTrainer(net, optax.adam(1e-4), EDMNoiseScheduler(), rngs=0, model_output_transform=KarrasPredictionTransform())
    trainer.initialize(x)
    jax.block_until_ready(trainer.state.params)
    ready = time.perf_counter()
    jax.block_until_ready(trainer.train_step(x))
    first = time.perf_counter()
    waited = rate(lambda: trainer.train_step(x), jax.block_until_ready, seconds)
    started, losses = time.perf_counter(), []
    for _ in range(max(3, int(waited * seconds))): losses.append(trainer.train_step(x))
    jax.block_until_ready(losses)
    steps = len(losses) / (time.perf_counter() - started)  # without waiting after each, as `fit` goes
    device = jax.local_devices()[0]
    flops = 3 * operations(net, how["size"]) * batch * steps
    sampler = EulerSampler(trainer.model, trainer.state.ema_params, trainer.noise_schedule, trainer.model_output_transform)
    sampled = rate(lambda: sampler.generate_images(batch, 50, rng=0), jax.block_until_ready, seconds)
    return dict(device=device.device_kind, jax=jax.__version__, parameters=sum(p.size for p in jax.tree.leaves(trainer.state.params)),
                initialise_s=round(ready - began, 1), first_step_s=round(first - ready, 1), images_s=round(steps * batch, 1), images_s_waiting=round(waited * batch, 1),
                model_tflops=round(flops / 1e12, 2), share_of_chip=share(flops, device.device_kind),
                peak_gb=round((device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9, 2), sampled_images_s=round(sampled * batch, 1))


def attention_alone(how, batch, seconds):
    "Milliseconds forward and backward of each form, and how far each is from the plain one."
    import jax
    import jax.numpy as jnp

    from flaxdiff.models.layers import attention
    from flaxdiff.speed import backend, cudnn_attention
    found = {"device": jax.local_devices()[0].device_kind, "backend": backend()}
    forms = {kind: lambda *qkv, kind=kind: attention(*qkv, kind=kind) for kind in ("plain", "blocks", *["flash"] * (backend() == "gpu"))}
    forms |= {"chosen": attention, "jax.nn": jax.nn.dot_product_attention} | ({"cuDNN, bare": cudnn_attention} if backend() == "gpu" else {})
    for n, d in how["tokens"]:
        qkv = [jax.random.normal(jax.random.PRNGKey(i), (min(batch, 16), n, HEADS, d), jnp.bfloat16) for i in range(3)]
        of = lambda f: jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(f(*qkv).astype(jnp.float32) ** 2), (0, 1, 2)))
        reference = of(forms["plain"])(*qkv)
        for name, f in forms.items():
            run = of(f)
            apart = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(jax.tree.leaves(run(*qkv)), jax.tree.leaves(reference)))
            found[f"{name}, {n} tokens of {d}"] = dict(ms=round(1e3 / rate(lambda: run(*qkv), jax.block_until_ready, seconds), 3), off=round(apart, 4))
    return found


def torch_network(name, how, device):
    "The same network in PyTorch, function by function: (its parameters, x, temb -> output)."
    import torch
    import torch.nn.functional as T
    depths, attended, kept = how["depths"], attends(name, len(how["depths"])), {}

    def weight(name, *shape):
        if name not in kept: kept[name] = torch.nn.Parameter((torch.randn(shape) * 0.02 if len(shape) > 1 else torch.zeros(shape)).to(device))
        return kept[name]

    def forward(x, temb):
        met = {}

        def next_of(kind):
            met[kind] = met.get(kind, -1) + 1
            return f"{kind}{met[kind]}"

        def dense(h, name, out): return T.linear(h, weight(name + "w", out, h.shape[-1]), weight(name + "b", out))
        def norm(h):
            name = next_of("norm")
            return T.group_norm(h, GROUPS, 1 + weight(name + "g", h.shape[1]), weight(name + "b", h.shape[1]), 1e-5)
        def conv(h, out, stride=1, kernel=3):
            name = next_of("conv")
            return T.conv2d(h, weight(name + "w", out, h.shape[1], kernel, kernel), weight(name + "b", out), stride=stride, padding=kernel // 2)

        def block(h, depth):
            g = conv(T.silu(norm(h)), depth)
            scale, shift = dense(emb, next_of("time"), 2 * depth)[:, :, None, None].chunk(2, 1)
            g = conv(T.silu(norm(g) * (1 + scale) + shift), depth)
            return (conv(h, depth, kernel=1) if h.shape[1] != depth else h) + g

        def look(h, here):
            if not here: return h
            seen, name, c = norm(h).flatten(2).transpose(1, 2), next_of("look"), h.shape[1]
            q, k, v = (dense(seen, name + which, c).unflatten(2, (HEADS, -1)).transpose(1, 2) for which in "qkv")
            out = dense(T.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), name + "o", c)
            return h + out.transpose(1, 2).reshape(h.shape)
        w = torch.tensor(np.geomspace(4.0, 1e-3, WIDTH // 2), dtype=torch.float32, device=device)
        emb = torch.cat([torch.cos(temb[:, None] * w), torch.sin(temb[:, None] * w)], -1)
        for layer in ("embed0", "embed1"): emb = T.silu(dense(emb, layer, WIDTH))
        h, skips = conv(x, depths[0]), []
        for i, depth in enumerate(depths):
            if i: h = conv(h, depth, 2)
            for j in range(how["blocks"]):
                h = look(block(h, depth), attended[i] and j == how["blocks"] - 1)
                skips.append(h)
        h = block(look(block(h, depths[-1]), attended[-1]), depths[-1])
        for i in reversed(range(len(depths))):
            for _ in range(how["blocks"]): h = block(torch.cat([h, skips.pop()], 1), depths[i])
            h = look(h, attended[i])
            if i: h = conv(T.interpolate(h, scale_factor=2), depths[i - 1])
        return conv(T.silu(norm(h)), 3)
    return kept, forward


def theirs(name, how, batch, seconds, compiled):
    "A step of PyTorch: the same loss, autocast to bfloat16, channels last, fused Adam, a moving average."
    import torch
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.from_numpy(images(batch, how["size"])).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last).to(device)
    kept, forward = torch_network(name, how, device)
    with torch.no_grad(): forward(x[:1], torch.zeros(1, device=device))  # makes the parameters
    for p in kept.values():
        if p.ndim == 4: p.data = p.data.contiguous(memory_format=torch.channels_last)
    parameters = list(kept.values())
    average, optimizer = [p.detach().clone() for p in parameters], torch.optim.Adam(parameters, 1e-4, fused=device == "cuda")
    net = torch.compile(forward) if compiled else forward

    def step():
        sigma, eps = torch.exp(torch.randn(batch, device=device) * 1.2 - 1.2), torch.randn_like(x)
        s = sigma[:, None, None, None]
        n = (s ** 2 + 0.25).sqrt()
        with torch.autocast(device, torch.bfloat16): F = net((x + s * eps) / n, sigma.log() / 4)
        loss = (F.float() - (s * x / 0.5 - 0.5 * eps) / n).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad(): torch._foreach_lerp_(average, parameters, 1e-3)

    def wait(_): torch.cuda.is_available() and torch.cuda.synchronize()
    began = time.perf_counter()
    wait(step())
    first = time.perf_counter() - began
    steps = rate(step, wait, seconds)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return dict(device=torch.cuda.get_device_name() if device == "cuda" else "cpu", torch=torch.__version__, parameters=sum(p.numel() for p in parameters),
                first_step_s=round(first, 1), images_s=round(steps * batch, 1), peak_gb=round(peak / 1e9, 2))


PARTS = {**{f"ours, {name}": lambda name=name, **how: ours(name, **how) for name in ("published", "coarse")},
         "ours, published, programs on disk": lambda **how: ours("published", **how), "attention": attention_alone,
         **{f"PyTorch, {name}, {word}": lambda name=name, word=word, **how: theirs(name, compiled=word == "compiled", **how)
            for name in ("published", "coarse") for word in ("eager", "compiled")}}


def have_torch():
    try: import torch as _
    except ImportError: return False
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--only", nargs="*", metavar="NAME", choices=PARTS, help=", ".join(PARTS))
    parser.add_argument("--cpu", action="store_true", help="a rehearsal: everything at toy size, on the CPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cpu: arguments.batch, arguments.seconds = 2, 0.05
    if arguments.part:
        if not arguments.part.startswith("PyTorch"):
            import jax

            from flaxdiff.speed import cache_programs
            if arguments.cpu: jax.config.update("jax_platforms", "cpu")
            if arguments.cache: cache_programs(arguments.cache, report=lambda line: None)
        result = PARTS[arguments.part](how=SIZES["toy" if arguments.cpu else "real"], batch=arguments.batch, seconds=arguments.seconds)
        print(json.dumps({"part": arguments.part, "batch": arguments.batch, **result}))
        raise SystemExit
    failed = []
    with tempfile.TemporaryDirectory() as cache:
        for part in arguments.only or PARTS:
            if part.startswith("PyTorch") and not have_torch(): continue
            kept = ["--cache", cache] if "published" in part else []
            words = [sys.executable, __file__, "--part", part, "--batch", str(arguments.batch), "--seconds", str(arguments.seconds), *kept]
            if subprocess.run(words + ["--cpu"] * arguments.cpu).returncode: failed.append(part)
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)
