"""Which sampler: the shipped models drawn from by every solver at the same number of network calls.

    python benchmarks/which_sampler.py [--parts digits digits-flow fashion guided guided-strongly] [--num 1000] [--out nbs/images/which_sampler.json] [--quick]

Each row of a part is (network calls, distance to the many-call answer, Fréchet distance, its error). The distance is the root mean square
of what a picture is off from the picture that 400 calls of Heun's method make of the same noise; it is left out for solvers that draw noise,
whose pictures are others. The guided parts are the model of digits by their captions, w = 3 and 7.5. The Fréchet distance is measured in the shipped features, and left out where there are too few pictures for it.
"""
import argparse
import datetime
import json
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from quality import ask

from flaxdiff.metrics import collect_stats, load_features, measure_frechet
from flaxdiff.pretrained import load_model

OUT = Path(__file__).resolve().parents[1] / "nbs" / "images" / "which_sampler.json"
BUDGETS = 4, 6, 8, 12, 20, 40, 100
CHURN = dict(S_churn=20, S_tmin=0.05, S_tmax=50, S_noise=1.003)
SOLVERS = {  # what it is called on the page: (its name, options, network calls for N levels, whether it draws noise)
    "DDIM": ("ddim", {}, lambda n: n, False), "Heun": ("heun", {}, lambda n: 2 * n - 1, False),
    "RK4": ("rk4", {}, lambda n: 4 * n - 3, False), "LMS 4": ("lms", {}, lambda n: n, False),
    "DPM-Solver-3": ("dpm-solver", dict(order=3), lambda n: 3 * n - 2, False), "DEIS 3": ("deis", {}, lambda n: n, False),
    "DPM-Solver++ 2M": ("dpm-solver++", {}, lambda n: n, False), "DPM-Solver++ 3M": ("dpm-solver++", dict(order=3), lambda n: n, False),
    "UniPC 2": ("unipc", {}, lambda n: n, False), "UniPC 3": ("unipc", dict(order=3), lambda n: n, False),
    "Euler ancestral": ("euler-ancestral", {}, lambda n: n, True), "EDM with churn": ("edm", CHURN, lambda n: 2 * n - 1, True),
    "DPM-Solver++ 2M SDE": ("dpm-solver++", dict(stochastic=True), lambda n: n, True),
    "Euler–Maruyama": ("euler-maruyama", {}, lambda n: n, True), "predictor–corrector": ("predictor-corrector", {}, lambda n: 2 * n - 1, True)}
SHORT = "DDIM", "Heun", "DPM-Solver++ 2M", "DPM-Solver++ 3M", "UniPC 2", "UniPC 3", "DEIS 3"
PARTS = {"digits": ("digits", tuple(SOLVERS), 1.0), "digits-flow": ("digits-flow", (*SHORT, "Euler ancestral"), 1.0),
         "fashion": ("fashion", SHORT, 1.0),
         "guided": ("digits-text", SHORT, 3.0), "guided-strongly": ("digits-text", SHORT, 7.5)}
FEWER = {"fashion": 20, "guided": 200, "guided-strongly": 200}  # pictures of the parts that cost more: enough for the distance to the many-call answer


def levels_for(calls, budget):
    "The most levels that cost at most so many network calls."
    return max(n for n in range(1, budget + 1) if calls(n) <= budget)


def draw(sampler, noise, levels, key, conditioning, padded=128):
    "Pictures from this noise. The levels are padded to one length, so that all numbers of them share one compiled program."
    times = sampler.make_steps(levels)
    times = jnp.asarray(np.pad(times, (0, padded - levels), mode="edge"), jnp.float32)
    arrays = sampler.denoiser, noise, times, jnp.int32(levels - 2), key, conditioning
    return np.clip(np.asarray(sampler.programs(*arrays, denoise_final=True, differentiable=False, progress=False)), -1, 1)


def measure_part(part, num, budgets, at_once=250):
    "The rows of each solver of one part, by name."
    name, solvers, scale = PARTS[part]
    model = load_model(name)
    shape, asked = model.image_shape, ask(name, model, num)[0] or {}
    starts = range(0, num, at_once)
    def noise_of(start):
        std = float(jnp.hypot(model.noise_schedule.alpha(1.0) * (not model.noise_schedule.variance_exploding), model.noise_schedule.sigma(1.0)))
        return std * jax.random.normal(jax.random.key(start), (min(at_once, num - start), *shape))
    def conditions(start): return {key: jnp.asarray(rows[start:start + at_once]) for key, rows in asked.items()}
    def all_images(sampler, levels):
        return np.concatenate([draw(sampler, noise_of(s), levels, jax.random.key(1000 + s), conditions(s), 256 if levels > 128 else 128) for s in starts])
    goal = all_images(model.sampler("heun", guidance_scale=scale), 200)
    features = load_features(name.split("-")[0]) if num >= 500 else None
    def judge(images, noisy):
        apart = None if noisy else round(float(np.sqrt(np.mean((images - goal) ** 2))), 6)
        if features is None: return apart, None, None
        found = measure_frechet(features.reference, collect_stats(features, images))
        return apart, round(found.value, 4), round(found.error, 4)
    rows = {"400 calls": [[399, *judge(goal, False)]]}
    for solver in solvers:
        short, options, calls, noisy = SOLVERS[solver]
        sampler, rows[solver] = model.sampler(short, guidance_scale=scale, **options), []
        for budget in budgets:
            levels = levels_for(calls, budget)
            if levels < 2: continue
            rows[solver].append([calls(levels), *judge(all_images(sampler, levels), noisy)])
        print(part, solver, rows[solver], flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--num", type=int, default=1000, help="pictures of the parts digits and digits-flow; the others have fewer")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    args = parser.parse_args()
    found = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    for part in args.parts:
        num = 8 if args.quick else FEWER.get(part, args.num)
        rows = measure_part(part, num, BUDGETS[:2] if args.quick else BUDGETS)
        made = {"date": datetime.date.today().isoformat(), "device": f"{jax.devices()[0].device_kind}, two cores shared with other programs",
                "versions": f"jax {jax.__version__}, Python {platform.python_version()}", "pictures": num,
                "command": f"python benchmarks/which_sampler.py --parts {part}" + f" --num {num}" * (part not in FEWER)}
        found[part] = {"made": made, "rows": rows}
        args.out.write_text(json.dumps(found, ensure_ascii=False).replace('"rows": ', '\n"rows": ') + "\n", encoding="utf-8")


if __name__ == "__main__": main()
