"""Runs that test_multihost.py starts in processes of their own: `python workers.py JOB`, the job as JSON; what came out lies in `out`.npz."""
import json
import sys
import warnings
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxdiff import get_dataset
from flaxdiff.data import host_rows
from flaxdiff.distributed import DataParallel, start_hosts
from flaxdiff.predictors import KarrasEDMPredictor
from flaxdiff.schedulers import EDMNoiseScheduler
from flaxdiff.trainer import DiffusionTrainer
from flaxdiff.trainer.facade import first_state


class Small(nn.Module):
    "Two dense layers that hear the time, for 64 pixels."
    dtype: object = jnp.float64

    @nn.compact
    def __call__(self, x, temb):
        h = nn.Dense(24, param_dtype=self.dtype)(x.reshape(len(x), -1)) + nn.Dense(24, param_dtype=self.dtype)(temb[:, None].astype(x.dtype))
        return nn.Dense(64, param_dtype=self.dtype)(jnp.tanh(h)).reshape(x.shape)


class Digits:
    "This host's rows of the digits' batches, in the precision wanted; it notes the first batch."
    def __init__(self, dtype, batch): self.data, self.dtype, self.first = get_dataset("digits", batch_size=batch, seed=3)[0], dtype, None
    def __iter__(self): return self
    def get_state(self): return self.data.get_state()
    def set_state(self, state): self.data.set_state(state)

    def __next__(self):
        batch = next(self.data).astype(self.dtype)
        if self.first is None: self.first = batch
        return batch


def train(steps, optimizer="sgd", devices=None, first=0, batch=16, resume=False, asks=False, **running):
    "A dict of arrays: what `steps` updates give, on so many devices from number `first` on."
    jax.config.update("jax_enable_x64", optimizer == "sgd")
    dtype = np.float64 if optimizer == "sgd" else np.float32
    rule = optax.sgd(0.05) if optimizer == "sgd" else optax.adam(1e-3)
    if devices: running["devices"] = jax.devices()[first:first + devices]
    trainer = DiffusionTrainer(Small(dtype), rule, EDMNoiseScheduler(), rngs=7, model_output_transform=KarrasEDMPredictor(), flip=True, **running)
    data = Digits(dtype, batch)
    if resume:
        trainer.initialize(np.zeros((len(next(Digits(dtype, batch))), 8, 8, 1), dtype))
        if trainer.restore(data) is None: raise SystemExit("nothing to resume")
    every = 12 if optimizer == "sgd" else 1  # the record by noise level decays from look to look: only equal looks give equal records
    def report(row):
        print("step", row["step"], flush=True)
        if asks and jax.process_index() == 0: drawn.append([float(jnp.sum(v)) for v in jax.tree.leaves((trainer.state.ema_params, trainer.denoiser))])  # as the record's pictures do
    drawn = []
    if asks:
        trainer.initialize(np.zeros((len(next(Digits(dtype, batch))), 8, 8, 1), dtype))
        if jax.process_index() == 0: drawn.append([float(jnp.sum(v)) for v in jax.tree.leaves(trainer.state.params)])
    take_steps, sent = trainer.take_steps, []
    def noting(batches):
        sent.extend(getattr(x, "sharding", None) == trainer.training.parallel.place for x in jax.tree.leaves(batches))
        return take_steps(batches)
    trainer.take_steps = noting
    state = trainer.fit(data, steps, progress=False, report_every=every, on_report=report)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    return {"params": flat(state.params), "ema": flat(state.ema_params), "opt": flat(state.opt_state) if jax.tree.leaves(state.opt_state) else np.zeros(0),
            "losses": np.array(trainer.losses), "levels": trainer.levels, "step": np.array(int(state.step)), "preempted": np.array(trainer.preempted),
            "drawn": np.array(len(drawn)), "sent": np.array(all(sent)), "rows": data.first if data.first is not None else np.zeros(0)}


def born(**options):
    "What a state that is cut looks like before any update: the bytes of its larger arrays in all, and those of them on device 0."
    trainer = DiffusionTrainer(Small(jnp.float32), optax.adam(1e-3), EDMNoiseScheduler(), rngs=7, model_output_transform=KarrasEDMPredictor(), **options)
    images = np.zeros((8 * jax.local_device_count(), 8, 8, 1), np.float32)
    state = first_state(trainer.make_recipe(), trainer.key, images, {}, trainer.devices, trainer.fsdp)
    large = [x for x in jax.tree.leaves(state) if x.size >= 1024]
    return {"whole": np.array(sum(x.nbytes for x in large)), "held": np.array(sum(x.addressable_data(0).nbytes for x in large))}


def own_step(rule, state, key, index, batch, axis=None):
    "A step that knows no trainer: noise by place, momentum, and an average."
    n, params, ema, opt = state
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, n)))(index)
    eps = jax.vmap(lambda k: jax.random.normal(k, batch.shape[1:], batch.dtype))(keys)
    def objective(params): return jnp.mean((Small(batch.dtype).apply(params, batch + eps, jnp.ones(len(batch))) - batch) ** 2)
    loss, grads = jax.value_and_grad(objective)(params)
    if axis: loss, grads = jax.lax.pmean((loss, grads), axis)
    updates, opt = rule.update(grads, opt, params)
    params = optax.apply_updates(params, updates)
    return (n + 1, params, jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, ema, params), opt), {"loss": loss}


def own(calls, devices=None, K=1, **options):
    "A dict of arrays: what so many calls of K steps of `own_step` give; and what one device holds, and whether memory was used again."
    jax.config.update("jax_enable_x64", True)
    rule = optax.sgd(0.1, momentum=0.9)
    run = DataParallel(partial(own_step, rule), jax.devices()[:devices] if devices else None, **options)
    params = Small(jnp.float64).init(jax.random.key(1), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
    state, losses, deleted = run.replicate((jnp.int32(0), params, params, rule.init(params))), [], True
    rows = host_rows(16)
    batches = np.random.default_rng(2).standard_normal((calls * K, 16, 8, 8, 1))[:, rows.start:rows.stop]
    index = np.tile(np.arange(rows.start, rows.stop, dtype=np.int32), (calls * K, 1))
    held = lambda: np.array(sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(state)))
    first = held()
    for k in range(0, calls * K, K):
        old = jax.tree.leaves(state)
        state, metrics = run(state, np.array([0, 5], np.uint32), index[k:k + K], batches[k:k + K])
        losses += np.asarray(metrics["loss"]).tolist()
        deleted &= all(x.is_deleted() for x in old)
    whole = run.one_copy(state)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    return {"params": flat(whole[1]), "ema": flat(whole[2]), "opt": flat(whole[3]), "losses": np.array(losses), "levels": np.zeros(1), "step": np.array(int(whole[0])), "held": held(), "first": first,
            "whole": np.array(sum(x.nbytes for x in jax.tree.leaves(whole))), "deleted": np.array(deleted), "programs": np.array(run.program._cache_size() if hasattr(run.program, "_cache_size") else 0),
            "after": flat(run.one_copy(run.replicate(whole)))}


def main(out, cases, host=None):
    "Run the named cases one after the other; `host` is what `start_hosts` is given."
    warnings.simplefilter("error", DeprecationWarning)
    where = start_hosts(*(host or ()))
    assert where == ((host[2], host[1]) if host else (0, 1)), where
    results = {}
    for name, case in cases.items():
        print("case", name, flush=True)
        kind = born if case.pop("born", False) else own if "calls" in case else train
        results |= {f"{name}/{key}": value for key, value in kind(**case).items()}
    np.savez(out, **results)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
    print("FINISHED", flush=True)
