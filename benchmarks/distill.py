"""Distil the shipped digits for 1, 2 and 4 calls, longer than a chapter may.

    python benchmarks/distill.py [--updates 1000] [--batch 64] [--out student.npz]

The student is the teacher's network, told the end of a jump; it is taught by `consistency_loss` with the teacher's steps, on
`draw_jumps` of 18 levels. Then 384 samples from the noise of nbs/25_distill.ipynb are judged as there: pixel Fréchet distance
to the 1,797 real digits, and the share that a support-vector machine recognises.
"""
import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.calibration import CalibratedClassifierCV
from sklearn.svm import SVC

from flaxdiff.data import load_digits
from flaxdiff.denoiser import Denoiser
from flaxdiff.distill import TwoTimes, consistency_loss, draw_jumps, start_from
from flaxdiff.network import TrainedModel
from flaxdiff.pretrained import load_model
from flaxdiff.samplers import FlowMap, FlowMapSampler


def first_student(shipped):
    "A flow map of the teacher's network and weights."
    network = TrainedModel(TwoTimes(shipped.model.module), shipped.image_shape)
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, *shipped.image_shape)), jnp.zeros(1), jnp.ones(1))
    return FlowMap(Denoiser(network, start_from(params, shipped.params), shipped.noise_schedule, shipped.model_output_transform))


def make_update(teacher, images, optimizer, batch):
    "(state, key) -> (state, loss): one update, and the average of the parameters."
    def loss(student, key):
        pick, more, when = jax.random.split(key, 3)
        x0 = images[jax.random.randint(pick, (batch,), 0, len(images))]
        t, m, s = draw_jumps(student.noise_schedule, when, batch)
        return jnp.mean(consistency_loss(student, x0, jax.random.normal(more, x0.shape), t, m, s, teacher))

    @jax.jit
    def update(state, key):
        student, average, memory, step = state
        value, slope = jax.value_and_grad(loss)(student, key)
        change, memory = optimizer.update(slope, memory)
        student, decay = optax.apply_updates(student, change), jnp.minimum(0.995, (1 + step) / (10 + step))
        return (student, jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, student), memory, step + 1), value
    return update


def pixel_distance(a, b):
    "Fréchet's distance between the Gaussian fits of rows of pixels."
    A, B = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(A)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    both = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ B @ root), 0)).sum()
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(A) + np.trace(B) - 2 * both


def report(student, pixels, judge):
    "Distance and share recognised for 1, 2 and 4 calls."
    sampler, answers = FlowMapSampler(student), []
    noise = student.noise_schedule.sigma(1.0) * jax.random.normal(jax.random.key(4), (384, 8, 8, 1))
    for n in (1, 2, 4):
        x = np.clip(np.asarray(sampler.sample(noise, sampler.make_steps(n), rng=0), np.float64).reshape(-1, 64), -1, 1)
        answers.append(f"{n}: {pixel_distance(pixels, x):.2f} {np.mean(judge.predict_proba(x).max(1) >= 0.8):.2f}")
    return ", ".join(answers)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", help="a file for the averaged parameters, as an array a leaf")
    args = parser.parse_args()
    digits, classes = load_digits()
    order = np.random.default_rng(0).permutation(len(digits))
    pixels, classes = np.asarray(digits, np.float64).reshape(-1, 64)[order], classes[order]
    judge = CalibratedClassifierCV(SVC(C=10), method="temperature", cv=5).fit(pixels[:900], classes[:900])
    shipped = load_model("digits")
    student, optimizer = first_student(shipped), optax.adam(optax.cosine_decay_schedule(1e-3, args.updates))
    update = make_update(shipped.denoiser, jnp.asarray(digits), optimizer, args.batch)
    state, start = (student, student, optimizer.init(student), 0.0), time.time()
    for n, key in enumerate(jax.random.split(jax.random.key(5), args.updates), 1):
        state, value = update(state, key)
        if n % 200 == 0 or n == args.updates:
            head = f"{n} updates, {time.time() - start:.0f} s, loss {value:.4f}"
            print(f"{head}; calls: distance, recognised: {report(state[1], pixels, judge)}", flush=True)
    if args.out:
        np.savez(args.out, *jax.tree.leaves(state[1].params))


if __name__ == "__main__": main()
