"""Laws of `flaxdiff.ema`: averages against sums over a recorded run, reconstruction against tracking, snapshots that are whole or not there."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from flaxdiff.trainer import ema, ema_update
from flaxdiff.ema import (SIGMA_RELS, load_snapshots, power_decay, power_dot, power_gamma, power_init, power_update, power_width,
                          reconstruct_ema, reconstruct_weights, reconstruction_error, save_snapshot)
from laws import x64

T = 4096
TRACKED = (0.02, *SIGMA_RELS, 0.07, 0.15, 0.20, 12 ** -0.5)


@pytest.fixture(scope="module")
def run():
    "SGD on a linear regression, one example a step: the path (T, 8), and the averages of every width after every step, all float64."
    with jax.enable_x64(True):
        best, scales = jnp.linspace(-3, 5, 8), jnp.geomspace(1, 0.2, 8)
        def step(state, now):
            (theta, emas), (key, n) = state, now
            x = scales * jax.random.normal(key, (8,))
            noise = jax.random.normal(jax.random.fold_in(key, 1))
            theta = theta - 0.05 * (x @ (theta - best) - noise) * x
            emas = power_update(emas, theta, n, TRACKED)
            return (theta, emas), (theta, emas)
        start = jnp.zeros(8), power_init(jnp.full(8, 77.0), TRACKED)
        path, emas = jax.lax.scan(step, start, (jax.random.split(jax.random.key(0), T), jnp.arange(T)))[1]
        return np.asarray(path), {s: np.asarray(e) for s, e in zip(TRACKED, emas)}


def direct(path, sigma_rel, t):
    edges = (np.arange(t + 1) / t) ** (float(power_gamma(sigma_rel)) + 1)
    return np.diff(edges) @ path[:t]


def profile(tau, t, gamma): return np.where(tau <= t, (gamma + 1) * (np.minimum(tau, t) / t) ** gamma / t, 0)


# ---------------------------------------------------------------- widths and decays

@settings(max_examples=200, deadline=None)
@given(st.floats(1e-4, 12 ** -0.5))
def test_gamma_solves_the_cubic(s):
    g = float(power_gamma(s))
    assert g >= 0 and power_width(g) == pytest.approx(s, rel=1e-12)
    assert g == pytest.approx(np.roots([1, 7, 16 - s ** -2, 12 - s ** -2]).real.max(), rel=1e-9, abs=1e-7)


def test_ends_of_the_widths():
    assert power_gamma(12 ** -0.5) == pytest.approx(0, abs=1e-12) and power_width(0) == pytest.approx(12 ** -0.5)
    np.testing.assert_allclose(power_gamma([0.05, 0.10]), [16.97, 6.94], atol=0.005)  # the paper's two
    tau = (np.arange(10 ** 6) + 0.5) / 10 ** 6
    for s in TRACKED:
        p = profile(tau, 1.0, float(power_gamma(s)))
        assert np.mean(p) == pytest.approx(1, rel=1e-6) and np.sqrt(np.mean(p * tau ** 2) - np.mean(p * tau) ** 2) == pytest.approx(s, rel=1e-6)


def test_decay_keeps_its_digits_in_float32():
    for step in (0, 1, 7, 999, 10 ** 6, 16_000_000):
        for gamma in (0.0, 6.94, 97.0):
            beta, gain = power_decay(step, gamma)
            assert gain.dtype == jnp.float32
            log = (gamma + 1) * np.log1p(-1 / (step + 1)) if step else -np.inf
            np.testing.assert_allclose([beta, gain], [np.exp(log), -np.expm1(log)], rtol=3e-5 if gamma > 50 else 3e-6)


def test_recursion_is_the_sum_exactly(run):
    "From whatever start, at every length of run."
    path, emas = run
    for s in TRACKED:
        for t in (1, 2, 3, 50, 1000, T): np.testing.assert_allclose(emas[s][t - 1], direct(path, s, t), rtol=1e-11)
    np.testing.assert_allclose(emas[12 ** -0.5][-1], path.mean(0), rtol=1e-11)


def test_update_is_pure_and_compiles_once():
    traces = []
    @jax.jit
    def update(emas, params, step): traces.append(1); return power_update(emas, params, step)
    params = {"a": jnp.arange(3.0), "b": (jnp.ones((2, 2), jnp.bfloat16),)}
    emas = power_init(params)
    assert len(emas) == 2 and all(x.dtype == jnp.float32 for x in jax.tree.leaves(emas))
    for n in range(4):
        new = update(emas, jax.tree.map(lambda x: x * (n + 1), params), jnp.int32(n))
        assert jax.tree.structure(new) == jax.tree.structure(emas) and all(x.dtype == jnp.float32 for x in jax.tree.leaves(new))
        emas = new
    assert len(traces) == 1
    np.testing.assert_allclose(emas[1]["a"], np.arange(3.0) * direct(np.array([1.0, 2, 3, 4])[:, None], 0.10, 4)[0], rtol=1e-6)
    low = power_update((jnp.zeros(2, jnp.bfloat16),), jnp.ones(2), 0, (0.1,))[0]
    assert low.dtype == jnp.bfloat16 and np.all(low == 1)


# ---------------------------------------------------------------- reconstruction

@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 1), st.floats(0, 40), st.floats(0.05, 1), st.floats(0, 40))
def test_inner_products_against_quadrature(ta, ga, tb, gb):
    end = min(ta, tb)
    node, weight = np.polynomial.legendre.leggauss(80)
    tau = end * (node + 1) / 2
    by_quadrature = end / 2 * weight @ (profile(tau, ta, ga) * profile(tau, tb, gb))
    assert power_dot(ta, ga, tb, gb) == pytest.approx(by_quadrature, rel=1e-5)  # τ^γ is no polynomial: γ near 0 is what limits
    assert power_dot(tb, gb, ta, ga) == pytest.approx(power_dot(ta, ga, tb, gb), rel=1e-12)


def held(run, steps): return np.stack([[run[1][s][t - 1] for s in SIGMA_RELS] for t in steps])


@pytest.mark.parametrize("width, off", [(0.02, 5e-3), (0.07, 5e-5), (0.15, 5e-5), (0.20, 2e-3)])
def test_reconstruction_is_what_tracking_gives(run, width, off):
    "64 snapshots of two averages of a real run; `off` is in units of the distance from the parameters."
    path, emas = run
    steps = np.arange(1, 65) * T // 64
    for t in (T // 2, T):
        made = np.tensordot(reconstruct_weights(steps, SIGMA_RELS, t, width), held(run, steps), 2)
        bound = off * (8 if t < T else 1)  # half as many snapshots
        assert np.linalg.norm(made - emas[width][t - 1]) < bound * np.linalg.norm(path[t - 1] - emas[width][t - 1])


def test_what_was_tracked_comes_back(run):
    steps = np.array([100, 170, 900, 901, 4096])
    for k, s in enumerate(SIGMA_RELS):
        for t in (170, 901, 4096):
            assert reconstruction_error(steps, SIGMA_RELS, t, s) < 1e-6
            made = np.tensordot(reconstruct_weights(steps, SIGMA_RELS, t, s), held(run, steps), 2)
            np.testing.assert_allclose(made, run[1][s][t - 1], atol=1e-6)


def test_error_is_the_distance_of_the_profiles():
    steps, tau = np.array([3, 5, 8, 9, 12, 16]), (np.arange(400_000) + 0.5) / 400_000 * 16
    gammas = power_gamma(SIGMA_RELS)
    for width in (0.07, 0.12, 0.17):
        w = reconstruct_weights(steps, SIGMA_RELS, 16, width, tolerance=np.inf)
        made = sum(w[i, k] * profile(tau, t, gammas[k]) for i, t in enumerate(steps) for k in range(2))
        want = profile(tau, 16, float(power_gamma(width)))
        by_sum = np.sqrt(np.sum((made - want) ** 2) / np.sum(want ** 2))
        assert reconstruction_error(steps, SIGMA_RELS, 16, width) == pytest.approx(by_sum, rel=1e-3)
        for _ in range(20):  # no other weights of sum 1 are nearer by more than the normalisation costs
            other = w + 0.05 * (d := np.random.default_rng(_).normal(size=w.shape)) - 0.05 * d.mean()
            made = sum(other[i, k] * profile(tau, t, gammas[k]) for i, t in enumerate(steps) for k in range(2))
            assert np.sum((made - want) ** 2) >= by_sum ** 2 * np.sum(want ** 2)


def test_weights_add_to_one_and_forget_the_future():
    steps = [700, 100, 300, 200, 500, 400, 600]  # in any order
    w = reconstruct_weights(steps, SIGMA_RELS, 400, 0.08)
    assert w.shape == (7, 2) and w.dtype == np.float64 and w.sum() == pytest.approx(1, abs=1e-12)
    assert np.all(w[[0, 4, 6]] == 0)
    np.testing.assert_allclose(w[[1, 3, 2, 5]], reconstruct_weights([100, 200, 300, 400], SIGMA_RELS, 400, 0.08), rtol=1e-9)
    np.testing.assert_allclose(reconstruct_weights(np.array(steps) * 1000, SIGMA_RELS, 400_000, 0.08), w, rtol=1e-9)


def test_error_falls_with_the_square_of_the_spacing():
    for width in (0.07, 0.15):
        errors = [reconstruction_error(np.arange(1, n + 1) * 1000, SIGMA_RELS, n * 1000, width) for n in (32, 64, 128)]
        assert 3.5 < errors[0] / errors[1] < 4.5 and 3.5 < errors[1] / errors[2] < 4.5


def test_weights_stay_small_where_snapshots_almost_coincide():
    "Rounding of float32 snapshots is multiplied by Σ|w|: pairs one step apart must not be played against each other."
    steps = np.arange(1, 65) * 15625
    pairs = np.sort(np.concatenate([steps, steps - 1]))
    for width in (0.02, 0.05, 0.15, 0.25):
        one, two = (reconstruct_weights(s, SIGMA_RELS, 10 ** 6, width) for s in (steps, pairs))
        assert np.abs(two).sum() < 1.1 * np.abs(one).sum() + 1
        assert reconstruction_error(pairs, SIGMA_RELS, 10 ** 6, width) < 1.02 * reconstruction_error(steps, SIGMA_RELS, 10 ** 6, width) + 1e-6
    assert np.abs(reconstruct_weights(np.arange(1, 401) * 100, SIGMA_RELS, 40000, 0.15)).sum() < 2


def test_too_few_or_too_late_is_refused():
    with pytest.raises(ValueError, match="snapshot_steps are too few.*0.25.*tolerance"): reconstruct_weights([500, 1000], SIGMA_RELS, 1000, 0.25)
    with pytest.raises(ValueError, match="too few.*0.01"): reconstruct_weights(np.arange(1, 9) * 100, SIGMA_RELS, 800, 0.01)
    assert reconstruct_weights([500, 1000], SIGMA_RELS, 1000, 0.25, tolerance=np.inf).sum() == pytest.approx(1)
    for step in (1001, 750, 0):
        with pytest.raises(ValueError, match=f"target_step.*1000, got {step}"): reconstruct_weights([500, 1000], SIGMA_RELS, step, 0.05)
    for bad in ([], [5, 5], [0, 5], [[5]]):
        with pytest.raises(ValueError, match="snapshot_steps"): reconstruct_weights(bad, SIGMA_RELS, 5, 0.05)
    for bad in (0, -0.1, 0.3, np.nan, [0.1, 0.4]):
        with pytest.raises(ValueError, match="sigma_rel"): power_gamma(bad)
    with pytest.raises(ValueError, match="gamma"): power_width(-0.1)
    with pytest.raises(ValueError, match="emas"): power_update((1.0,), 1.0, 0)


def test_what_is_no_number_is_refused():
    for step, gamma in ((5, np.nan), (5, np.inf), (5, -1), (-1, 5.0), (np.nan, 5.0)):
        with pytest.raises(ValueError, match="gamma must" if step == 5 else "step must"): power_decay(step, gamma)
    with pytest.raises(ValueError, match="gamma must"): power_width(np.inf)
    for decay in (np.nan, np.inf, -0.1, 1.5, "0.9", True):
        with pytest.raises(ValueError, match="decay must"): ema_update(jnp.ones(2), jnp.zeros(2), 3, decay)
    traced = jax.jit(lambda d: ema_update(jnp.ones(2), jnp.zeros(2), 10 ** 6, d))(0.25)  # no value to look at there
    np.testing.assert_allclose(traced, 0.25)
    with pytest.raises(ValueError, match="too few"): reconstruct_weights([500, 1000], SIGMA_RELS, 1000, 0.25, tolerance=np.nan)


# ---------------------------------------------------------------- snapshots

def tree(t, k):
    rng = np.random.default_rng([t, k])
    return {"params": {"Dense/0": {"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "bias": jnp.asarray(rng.normal(size=3), jnp.bfloat16)},
                       "scales": [jnp.float32(rng.normal()), jnp.asarray(rng.normal(size=2), jnp.float16)]}}


LIKE = jax.tree.map(jnp.zeros_like, tree(1, 0))


def same(a, b): return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


def test_snapshots_come_back_bit_for_bit(tmp_path):
    for t in (300, 20, 1): path = save_snapshot(tmp_path / "new" / "folder", jnp.int32(t), tuple(tree(t, k) for k in range(2)))
    assert path.name == "snapshot-000000001.npz"
    snapshots = load_snapshots(path.parent, LIKE)
    assert [s.step for s in snapshots] == [1, 20, 300] and {s.sigma_rels for s in snapshots} == {SIGMA_RELS}
    for s in snapshots:
        for k in range(2): assert same(s.read(k), tree(s.step, k))
    with np.load(path, allow_pickle=False) as file:
        assert all(file[k].dtype.kind != "O" for k in file.files) and "[1]['params']['Dense/0']['bias']" in file.files
    assert load_snapshots(tmp_path / "nowhere", LIKE) == []


def test_a_snapshot_is_whole_or_not_there(tmp_path, monkeypatch):
    "Killed while writing: what was there before is there still, and nothing half."
    path = save_snapshot(tmp_path, 7, (tree(7, 0), tree(7, 1)))
    before, savez = path.read_bytes(), np.savez
    def killed(file, **arrays):
        savez(file, **dict(list(arrays.items())[:3]))
        raise KeyboardInterrupt
    monkeypatch.setattr(ema.np, "savez", killed)
    for step in (7, 8):
        with pytest.raises(KeyboardInterrupt): save_snapshot(tmp_path, step, (tree(8, 0), tree(8, 1)))
    assert path.read_bytes() == before and [s.step for s in load_snapshots(tmp_path, LIKE)] == [7]
    monkeypatch.undo()
    save_snapshot(tmp_path, 8, (tree(8, 0), tree(8, 1)))
    assert [s.step for s in load_snapshots(tmp_path, LIKE)] == [7, 8] and len(list(tmp_path.glob("*.npz"))) == 2


def test_bad_snapshots_are_refused(tmp_path):
    path = save_snapshot(tmp_path, 7, (tree(7, 0), tree(7, 1)))
    with pytest.raises(ValueError, match="like must have the leaves.*other"): load_snapshots(tmp_path, {**LIKE, "other": jnp.zeros(1)})
    wrong = jax.tree.map(lambda x: jnp.zeros((*x.shape, 2)), LIKE)
    with pytest.raises(ValueError, match="like must have the shapes"): load_snapshots(tmp_path, wrong)[0].read(0)
    with pytest.raises(ValueError, match="emas"): save_snapshot(tmp_path, 7, (tree(7, 0),))
    with pytest.raises(ValueError, match="step"): save_snapshot(tmp_path, 0, (tree(7, 0), tree(7, 1)))
    with pytest.raises(ValueError, match="object"): save_snapshot(tmp_path, 9, ({"a": object()}, {"a": object()}))
    assert not (tmp_path / "snapshot-000000009.npz").exists()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="snapshot-000000007.npz.*no whole snapshot"): load_snapshots(tmp_path, LIKE)
    path.write_bytes(b"not a zip at all")
    with pytest.raises(ValueError, match="no whole snapshot"): load_snapshots(tmp_path, LIKE)


def test_reconstruction_from_files(run, tmp_path):
    path, emas = run
    steps = np.arange(1, 33) * T // 32
    for t in steps: save_snapshot(tmp_path, t, tuple({"w": jnp.asarray(emas[s][t - 1], jnp.float32)} for s in SIGMA_RELS))
    snapshots = load_snapshots(tmp_path, {"w": jnp.zeros(8)})
    for t in (None, T // 2):
        made = reconstruct_ema(snapshots, 0.15, t)["w"]
        want = np.tensordot(reconstruct_weights(steps, SIGMA_RELS, t or T, 0.15), held(run, steps), 2)
        assert made.dtype == jnp.float32 and isinstance(made, jax.Array)
        np.testing.assert_allclose(made, want, rtol=2e-6)
    with pytest.raises(ValueError, match="target_step"): reconstruct_ema(snapshots, 0.15, 77)
    with pytest.raises(ValueError, match="too few"): reconstruct_ema(snapshots[-2:], 0.2)
    with pytest.raises(ValueError, match="snapshots"): reconstruct_ema([], 0.15)
    with pytest.raises(ValueError, match="same widths"): reconstruct_ema([snapshots[0]._replace(sigma_rels=(0.05, 0.2)), snapshots[1]], 0.05)


def test_one_tree_in_memory_at_a_time():
    import weakref
    alive, most = weakref.WeakSet(), []
    class Leaf(np.ndarray): pass
    def read(j):
        leaf = np.full(4, float(j)).view(Leaf)
        alive.add(leaf), most.append(len(alive))
        return {"w": leaf}
    Leaf.__hash__ = lambda self: id(self)
    snapshots = [ema.Snapshot(t, SIGMA_RELS, read) for t in range(10, 410, 10)]
    reconstruct_ema(snapshots, 0.15)
    assert len(most) == 80 and max(most) <= 2  # the one being read, and the one just added
