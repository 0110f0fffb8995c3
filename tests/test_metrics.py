"""Metrics: what they are known to be, with their error bars; that streaming and sharding change nothing; what ships, measured again; and what is refused."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdiff import metrics
from flaxdiff.data import load_digits
from flaxdiff.metrics import (FeatureStats, Measure, collect_stats, density_coverage, frechet_distance, frechet_limit, kernel_distance, load_features, measure_frechet,
                              measure_share, merge_stats, nearest_copies, precision_recall, shipped_features)
from flaxdiff.metrics.distances import ball_hits, deal_rows, distance_to, frechet_ladder, jackknife_error, kernel_sums, name_metric
from flaxdiff.metrics.features import Classifier, Labelled, features_main, inception_shapes, inception_variables, read_labelled, torch_name
from flaxdiff.pretrained import SHIPPED, load_model, write_tensors

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import quality  # the command that wrote the models' cards

rng = np.random.default_rng(0)
MIX = rng.normal(size=(6, 6)) / 2
ROWS = rng.normal(size=(500, 6)) @ MIX + [5, 0, 0, 1, 2, 3]


def stats_of(rows, shards=24, name="test"):
    identity = lambda rows: rows
    identity.name = name
    return collect_stats(identity, np.asarray(rows), shards)


# ---------------------------------------------------------------- the Fréchet distance

def test_frechet_of_two_gaussians():
    assert abs(frechet_distance(1, 0.25, 0.2, 0.09) - 0.68) < 1e-12
    assert abs(frechet_distance([1.0], [[0.25]], [0.2], [[0.09]]) - 0.68) < 1e-12
    assert isinstance(frechet_distance(1, 0.25, 0.2, 0.09), float)


def test_frechet_by_another_formula():
    "tr (C₁C₂)^½ by scipy's square root; and it is symmetric, and does not see a turn of both."
    from scipy.linalg import sqrtm
    C1, C2 = (m @ m.T for m in rng.normal(size=(2, 6, 6)))
    m1, m2 = rng.normal(size=(2, 6))
    want = np.sum((m1 - m2) ** 2) + np.trace(C1 + C2 - 2 * np.real(sqrtm(C1 @ C2)))
    assert abs(frechet_distance(m1, C1, m2, C2) - want) < 1e-8 and abs(frechet_distance(m2, C2, m1, C1) - want) < 1e-8
    Q = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert abs(frechet_distance(Q @ m1, Q @ C1 @ Q.T, Q @ m2, Q @ C2 @ Q.T) - want) < 1e-8


def test_frechet_of_singular_covariances():
    "Fewer rows than features, a feature that never changes, and the same twice: no NaN, no complex number."
    few = rng.normal(size=(5, 40))
    few[:, 3] = 1
    stats = FeatureStats().update(few)
    assert 0 <= frechet_distance(stats.mean, stats.covariance, stats.mean, stats.covariance) < 1e-6
    assert abs(frechet_distance(np.zeros(3), np.zeros((3, 3)), np.zeros(3), np.eye(3)) - 3) < 1e-12
    across = frechet_distance(np.zeros(2), np.diag([1.0, 0]), np.zeros(2), np.diag([0, 4.0]))
    assert abs(across - 5) < 1e-7, "orthogonal: nothing is shared"
    shards = stats_of(few, 2)
    assert abs(distance_to(merge_stats(shards))(shards)) < 1e-5


# ---------------------------------------------------------------- streaming

def test_statistics_in_any_batches_are_the_same():
    once = FeatureStats().update(ROWS)
    assert np.abs(once.mean - ROWS.mean(0)).max() < 1e-12 and np.abs(once.covariance - np.cov(ROWS.T)).max() < 1e-12
    streamed = FeatureStats()
    for batch in np.split(ROWS, [1, 2, 50, 51, 333]): streamed.update(batch)
    assert streamed.n == 500 and np.abs(streamed.mean - once.mean).max() < 1e-12 and np.abs(streamed.covariance - once.covariance).max() < 1e-12
    for cuts in ([100, 101, 400], [250]):
        merged = merge_stats([FeatureStats().update(part) for part in np.split(ROWS, cuts)])
        assert merged.n == 500 and np.abs(merged.mean - once.mean).max() < 1e-12 and np.abs(merged.covariance - once.covariance).max() < 1e-12
    assert FeatureStats().merge(once).n == 500 and once.merge(FeatureStats()).n == 500


def test_statistics_far_from_zero_are_stable():
    "The sum of squares minus the square of the sum has lost every digit here."
    far = ROWS + 1e8
    streamed = FeatureStats()
    for batch in np.split(far, 10): streamed.update(batch)
    assert np.abs(streamed.covariance - np.cov(ROWS.T)).max() < 1e-6
    naive = far.T @ far / 499 - np.outer(far.sum(0), far.sum(0)) / (500 * 499)
    assert np.abs(naive - np.cov(ROWS.T)).max() > 1e-1


def test_shards_do_not_depend_on_batches():
    identity = lambda rows: rows
    for cuts in ([7, 8, 300], [250], range(10, 500, 10)):
        a, b = collect_stats(identity, ROWS, 24), collect_stats(identity, iter(np.split(ROWS, cuts)), 24)
        assert [s.n for s in a] == [s.n for s in b] and sum(s.n for s in a) == 500
        assert all(np.abs(s.covariance - t.covariance).max() < 1e-12 for s, t in zip(a, b))
    whole = merge_stats(a)
    assert sum(s.n for s in a) == 500 and {s.n for s in a} == {20, 21}, "merging leaves the shards as they are"
    assert np.abs(whole.covariance - np.cov(ROWS.T)).max() < 1e-12


def test_classes_in_turn_are_dealt_by_chance():
    "Labels 0 to 9 again and again: with row i in shard i mod 24 the odd ones would never meet the even ones, and the error bar would be theirs."
    x = np.arange(4800) % 10
    dealt = deal_rows(0, 4800, 24)
    counts = np.array([np.bincount(x[dealt == j], minlength=10) for j in range(24)])
    assert counts.min() > 3 and np.all(counts.sum(1) == 200)
    assert np.array_equal(np.concatenate([deal_rows(0, 100, 24), deal_rows(100, 4700, 24)]), dealt)
    mean = lambda shards: float(merge_stats(shards).mean[0])
    assert jackknife_error(mean, stats_of(x[:, None])) < 1.6 * x.std() / 4800 ** 0.5


def test_half_precision_and_jax_arrays_are_taken():
    for rows in (jnp.asarray(ROWS, jnp.bfloat16), jnp.asarray(ROWS, jnp.float32), ROWS.astype(np.float16)):
        assert np.abs(FeatureStats().update(rows).covariance - np.cov(ROWS.T)).max() < 0.1


# ---------------------------------------------------------------- bias, error bars, the limit

def test_the_bias_is_what_theory_says():
    "Of the plug-in distance of n draws from N(0, 1) in D dimensions to itself: D/n + D (D + 1)/(4 (n - 1))."
    D, n, repeats = 5, 200, 400
    mean, eye = np.zeros(D), np.eye(D)
    found = []
    for rows in np.random.default_rng(1).normal(size=(repeats, n, D)): found.append(frechet_distance(mean, eye, rows.mean(0), np.cov(rows.T)))
    due = D / n + D * (D + 1) / (4 * (n - 1))
    assert abs(np.mean(found) - due) < 4 * np.std(found) / repeats ** 0.5 + 0.02 * due


def known_draws(seed, n=960):
    "(reference, draws, distance): N(0, 1) in four dimensions, and draws from N(0.3, 1.2²)."
    reference = FeatureStats("test")
    reference.n, reference.mean, reference.scatter = 10 ** 6, np.zeros(4), np.eye(4) * (10 ** 6 - 1)
    draws = 0.3 + 1.2 * np.random.default_rng(seed).normal(size=(n, 4))
    return reference, draws, 4 * (0.09 + 0.04)


def test_error_bars_cover():
    "Over 50 repetitions: the jackknife's errors are the spread, the limit is unbiased, and the plain distance is not quite."
    plain, limits = [], []
    for seed in range(50):
        reference, draws, due = known_draws(seed, 480)
        shards = stats_of(draws, 12)
        plain.append(measure_frechet(reference, shards))
        limits.append(frechet_limit(reference, shards))
    for found in (plain, limits):
        spread, error = np.std([m.value for m in found], ddof=1), np.mean([m.error for m in found])
        assert 0.7 < error / spread < 1.45, (error, spread)
    values = np.array([m.value for m in limits])
    assert abs(values.mean() - due) < 3.5 * values.std() / 50 ** 0.5
    assert np.mean([m.value for m in plain]) > values.mean()
    inside = np.mean([abs(m.value - due) < 2 * m.error for m in limits])
    assert inside > 0.85


def test_the_ladder_uses_every_sample_on_every_rung():
    reference, draws, _ = known_draws(0)
    shards = stats_of(draws)
    inverse, values = frechet_ladder(distance_to(reference), shards, 4)
    assert np.allclose(inverse, np.arange(1, 5) / 960) and values[3] > values[0]
    assert abs(values[0] - measure_frechet(reference, shards).value) < 1e-12
    assert frechet_limit(reference, shards).name == "FD∞ (test)"


def test_jackknife_of_a_mean_is_the_usual_error():
    "For any sizes of the shards, as far as shards can tell; for single rows exactly."
    x = np.random.default_rng(3).normal(size=(40, 1))
    shards = []
    for row in x: shards.append(FeatureStats().update(row[None]))
    mean = lambda shards: float(merge_stats(shards).mean[0])
    assert abs(jackknife_error(mean, shards) - x.std(ddof=1) / 40 ** 0.5) < 1e-12
    uneven = [FeatureStats().update(part) for part in np.split(np.random.default_rng(4).normal(size=(3000, 1)), np.cumsum([50, 150] * 15)[:-1])]
    assert 0.6 < jackknife_error(mean, uneven) / 3000 ** -0.5 < 1.4


# ---------------------------------------------------------------- the kernel distance

def test_kernel_distance_by_hand():
    x, y = ROWS[:7], ROWS[7:12] + 0.1
    k = lambda a, b: (a @ b / 6 + 1) ** 3
    mean = lambda pairs: np.mean(list(pairs))
    want = (mean(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) + mean(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j)
            - 2 * mean(k(a, b) for a in x for b in y))
    for block in (1, 3, 1024): assert abs(kernel_distance(x, y, block).value - want) < 1e-9 * k(x[0], x[0])
    without = lambda rows, i: np.delete(rows, i, 0)
    variance = sum((n - 1) * np.var([kernel_distance(*pair(i)).value for i in range(n)]) for n, pair in ((7, lambda i: (without(x, i), y)), (5, lambda i: (x, without(y, i)))))
    assert abs(kernel_distance(x, y).error / variance ** 0.5 - 1) < 1e-8


def test_kernel_distance_is_unbiased_and_its_error_honest():
    "Draws of the same: the mean is 0 within its error. Draws of another: the errors are the spread."
    draw = np.random.default_rng(5)
    same = [kernel_distance(*draw.normal(size=(2, 60, 3))).value for _ in range(300)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 300 ** 0.5 and min(same) < 0
    other = [kernel_distance(draw.normal(size=(80, 3)), draw.normal(size=(90, 3)) + 1) for _ in range(80)]
    spread = np.std([m.value for m in other])
    assert 0.75 < np.mean([m.error for m in other]) / spread < 1.3


def test_kernel_sums_in_tiles():
    whole = kernel_sums(ROWS, ROWS[:50], 4096)
    for block in (1, 7, 100): assert all(np.allclose(a, b, rtol=1e-12) for a, b in zip(kernel_sums(ROWS, ROWS[:50], block), whole))


# ---------------------------------------------------------------- neighbours

def test_precision_and_recall_of_known_sets():
    draw = np.random.default_rng(6)
    a, b = draw.normal(size=(2, 400, 3))
    p, r = precision_recall(a, b + 100, 3)
    assert p.value == r.value == 0 and p.error > 0
    p, r = precision_recall(a, b, 5)
    assert p.value > 0.9 and r.value > 0.9
    assert precision_recall(a, a, 3)[0].value == precision_recall(a, a, 3)[1].value == 1
    p, r = precision_recall(a, a[:100] * 0.1, 3)  # all in the middle
    assert p.value > 0.95 and r.value < 0.4


def test_density_and_coverage_of_known_sets():
    draw = np.random.default_rng(7)
    a, b = draw.normal(size=(2, 600, 3))
    d, c = density_coverage(a, b, 5)
    assert abs(d.value - 1) < 4 * d.error + 0.05 and abs(c.value - (1 - 0.5 ** 5)) < 4 * c.error, "for m = n: 1 - 2⁻ᵏ (Naeem et al. 2020, lemma 2, in the limit)"
    assert density_coverage(a, b + 100, 5)[0].value == density_coverage(a, b + 100, 5)[1].value == 0


def test_one_outlier_fools_precision_and_not_density():
    draw = np.random.default_rng(8)
    a = np.concatenate([draw.normal(size=(300, 2)), [[60.0, 0.0]]])
    fake = draw.normal(size=(300, 2)) + [30, 0]
    assert precision_recall(a, fake, 3)[0].value > 0.9 and density_coverage(a, fake, 3)[0].value < 0.4


def test_balls_in_any_blocks():
    a, b = ROWS[:200], ROWS[200:]
    whole = ball_hits(a, b, 3, 4096)
    for block in (1, 64): assert all(np.array_equal(x, y) for x, y in zip(ball_hits(a, b, 3, block), whole))
    distance = np.linalg.norm(b[:, None] - a[None], axis=2)
    radii = np.sort(np.linalg.norm(a[:, None] - a[None], axis=2), 1)[:, 3]
    assert np.array_equal((distance <= radii).sum(1), whole[0]) and np.array_equal((distance <= radii).sum(0), whole[1])


def test_copies_are_seen():
    train, fresh = ROWS[:300], ROWS[300:]
    fake = np.concatenate([train[[7, 7, 200]], train[:40] + 1e-3, fresh[:57]])
    found = nearest_copies(train, fake)
    assert found.nearest[:3].tolist() == [7, 7, 200] and np.array_equal(found.nearest[3:43], np.arange(40))
    assert np.all(found.distance[:3] < 1e-7) and np.all(found.ratio[:43] < 0.05)
    assert 0.43 <= found.share.value < 0.47 and found.share.n == 100
    none = nearest_copies(train, fresh)
    assert none.share.value < 0.05 and np.median(none.ratio) > 0.6
    for block in (1, 9): assert np.allclose(nearest_copies(train, fake, block=block).ratio, found.ratio)
    assert nearest_copies(np.ones((60, 2)), np.ones((3, 2))).share.value == 1, "all the same"


# ---------------------------------------------------------------- names

def test_only_inceptions_features_make_an_fid():
    assert [name_metric(short, "inception") for short in ("FD", "FD∞", "KD")] == ["FID", "FID∞", "KID"]
    names = set()
    for features in ("digits", "fashion", "pixels", "unnamed features", "classifier:inception", "my inception", "Inception", "inceptions"):
        names |= {name_metric(short, features) for short in ("FD", "FD∞", "KD")}
        x = stats_of(ROWS, name=features)
        names |= {measure_frechet(merge_stats(x), x).name, frechet_limit(merge_stats(x), x).name, kernel_distance(ROWS, ROWS, features=features).name}
    assert not any("FID" in name or "KID" in name for name in names) and "FD (digits)" in names
    x = stats_of(ROWS, name="inception")
    assert measure_frechet(merge_stats(x), x).name == "FID"


def test_every_number_comes_with_its_error_and_n():
    x = stats_of(ROWS)
    found = [measure_frechet(merge_stats(x), x), frechet_limit(merge_stats(x), x), kernel_distance(ROWS, ROWS[:100] + 1), *precision_recall(ROWS, ROWS[:100], 3),
             *density_coverage(ROWS, ROWS[:100], 3), nearest_copies(ROWS, ROWS[:100]).share, measure_share("right", [True] * 9 + [False])]
    for measure in found:
        assert isinstance(measure, Measure) and type(measure.value) is type(measure.error) is float and measure.error > 0 and measure.n in (500, 100, 10), measure
        assert re.fullmatch(r".+ -?[\d.e+-]+ ± [\d.e+-]+, n = [\d,]+", str(measure))
    assert measure_share("right", [True] * 100).error > 0


# ---------------------------------------------------------------- features

def test_what_ships():
    assert shipped_features() == ["digits", "fashion"]
    for name in shipped_features():
        folder = SHIPPED / f"features-{name}"
        assert (folder / "model.safetensors").stat().st_size < 7e5 and sorted(p.name for p in folder.iterdir()) == ["README.md", "features.json", "model.safetensors"]
        features = load_features(name)
        page = (folder / "README.md").read_text(encoding="utf-8")
        assert {"what", "data", "licence", "command", "seed", "accuracy", "time", "device"} <= set(features.card) and all(text in page for text in features.card.values())
        images = np.random.default_rng(0).uniform(-1, 1, (3, *features.image_shape)).astype(np.float32)
        rows, p = features(images), features.probabilities(images)
        assert rows.shape == (3, json.loads((folder / "features.json").read_text())["features"]) and rows.dtype == np.float32
        assert p.shape == (3, 10) and np.allclose(p.sum(1), 1, atol=1e-5)


def accuracy_of(name, dataset):
    features, data = load_features(name), read_labelled(dataset)
    right = features.probabilities(data.held_out).argmax(1) == data.held_out_labels
    said = re.match(r"([\d.]+) ± ([\d.]+), n = ([\d,]+)", features.card["accuracy"])
    assert int(said[3].replace(",", "")) == len(right)
    assert abs(right.mean() - float(said[1])) <= float(said[2]), (right.mean(), said[0])
    return right.mean()


def test_the_digits_classifier_is_as_good_as_its_card_says(): assert accuracy_of("digits", "digits") > 0.97


@pytest.mark.slow
def test_the_fashion_classifier_is_as_good_as_its_card_says():
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.exists(): pytest.skip("Debian's dataset-fashion-mnist is not installed")
    assert accuracy_of("fashion", f"idx:{folder}") > 0.91


def test_features_do_not_depend_on_batches():
    features, images = load_features("digits"), load_digits()[0][:150]
    whole = features(images)
    assert np.allclose(np.concatenate([features(images[:1]), features(images[1:140]), features(images[140:])]), whole, atol=1e-5)
    assert load_features("pixels")(images).shape == (150, 64) and np.array_equal(load_features("pixels")(images), images.reshape(150, 64))


def test_a_classifier_is_made_and_found_again(tmp_path, capsys, monkeypatch):
    "By the command, in one update."
    few = Labelled(*(part[:130] for part in read_labelled("digits")))
    monkeypatch.setattr(metrics.features, "read_labelled", lambda dataset: few)
    monkeypatch.setattr(metrics.features, "Classifier", lambda features, classes, widths=(2, 3): Classifier(features, classes, widths))
    features_main(["digits", "--out", str(tmp_path / "mine"), "--features", "8", "--epochs", "1", "--card", "licence=none"])
    out = capsys.readouterr().out
    assert "epoch 1 of 1" in out and re.search(r"accuracy 0\.\d+ ± ", out)
    features = load_features(f"classifier:{tmp_path / 'mine'}")
    images = load_digits()[0][:5]
    assert features(images).shape == (5, 8) and features.card["licence"] == "none" and features.name == f"classifier:{tmp_path / 'mine'}"
    with pytest.raises(SystemExit): features_main(["digits", "--out", str(tmp_path / "mine")])
    assert "path must be a new folder" in capsys.readouterr().err


def test_the_command_is_a_module():
    done = subprocess.run([sys.executable, "-m", "flaxdiff.metrics", "nothing", "--out", "x"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "dataset must be 'digits' or 'idx:FOLDER'" in done.stderr and "Warning" not in done.stderr


def test_the_shipped_classifiers_are_in_the_wheel():
    assert '"shipped/*/*"' in (ROOT / "setup.py").read_text(encoding="utf-8") and (SHIPPED / "features-digits" / "model.safetensors").is_file()


# ---------------------------------------------------------------- Inception

def inception_file(**changes):
    "Random weights by PyTorch's names."
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(inception_shapes()):
        shape = leaf.shape if len(leaf.shape) == 1 else [leaf.shape[i] for i in (3, 2, 0, 1)]
        tensors[torch_name("/".join(key.key for key in path))] = np.zeros(shape, np.float16)
    return {**tensors, **changes}


def test_inception_is_the_published_network():
    "21.8 million parameters in 94 convolutions, by the names that PyTorch gives them."
    tensors = inception_file()
    kernels = [x for name, x in tensors.items() if name.endswith("conv.weight")]
    assert len(kernels) == 94 and sum(x.size for name, x in tensors.items() if "running" not in name) == 21_785_568
    assert tensors["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1) and tensors["Mixed_6e.branch7x7dbl_2.conv.weight"].shape == (192, 192, 7, 1)
    assert tensors["Conv2d_4a_3x3.bn.running_var"].shape == (192,)


def test_what_is_no_inception_is_refused(tmp_path):
    whole = inception_file(**{"fc.weight": np.zeros((1008, 2048), np.float16)})
    inception_variables(whole)
    lacking = {name: x for name, x in whole.items() if name != "Mixed_6a.branch3x3.bn.weight"}
    with pytest.raises(ValueError, match="lacks Mixed_6a.branch3x3.bn.weight"): inception_variables(lacking)
    with pytest.raises(ValueError, match=r"as Mixed_5b.branch1x1.bn.bias, got \(65,\)"): inception_variables({**whole, "Mixed_5b.branch1x1.bn.bias": np.zeros(65)})
    with pytest.raises(ValueError, match="finite"): inception_variables({**whole, "Mixed_5b.branch1x1.bn.bias": np.full(64, np.nan)})
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    write_tensors(tmp_path / "b.safetensors", {"x": np.zeros(3)})
    for file, words in (("a", "not a whole safetensors"), ("b", "lacks Conv2d_1a_3x3"), ("c", "must name a safetensors file")):
        with pytest.raises(ValueError, match=words): load_features(f"inception:{tmp_path / file}.safetensors")


# ---------------------------------------------------------------- bad input

STATS = stats_of(ROWS)
NAN = np.where(ROWS > 6, np.nan, ROWS)
BAD = {
    "mean1 has two axes": (lambda: frechet_distance(np.eye(2), np.eye(2), [0, 0], np.eye(2)), "mean1"),
    "cov1 is another size": (lambda: frechet_distance([0, 0], np.eye(3), [0, 0], np.eye(2)), "cov1"),
    "cov2 is a diagonal": (lambda: frechet_distance([0, 0], np.eye(2), [0, 0], [1, 1]), "cov2"),
    "cov2 is not symmetric": (lambda: frechet_distance([0, 0], np.eye(2), [0, 0], [[1, 0.5], [0, 1]]), "cov2"),
    "cov1 has negative values": (lambda: frechet_distance([0, 0], np.diag([1, -1]), [0, 0], np.eye(2)), "cov1"),
    "cov2 is NaN": (lambda: frechet_distance(0, 1, 0, np.nan), "cov2"),
    "mean2 is infinite": (lambda: frechet_distance(0, 1, np.inf, 1), "mean2"),
    "sizes differ": (lambda: frechet_distance([0, 0], np.eye(2), [0], [[1]]), "mean2"),
    "update: one axis": (lambda: FeatureStats().update(ROWS[0]), "features"),
    "update: NaN": (lambda: FeatureStats().update(NAN), "features"),
    "update: words": (lambda: FeatureStats().update([["a"]]), "features"),
    "update: complex": (lambda: FeatureStats().update(ROWS * 1j), "features"),
    "update: no rows": (lambda: FeatureStats().update(ROWS[:0]), "features"),
    "update: another D": (lambda: FeatureStats().update(ROWS).update(ROWS[:, :3]), "features"),
    "merge: another D": (lambda: FeatureStats().update(ROWS).merge(FeatureStats().update(ROWS[:, :3])), "other"),
    "merge: other features": (lambda: FeatureStats("a").merge(FeatureStats("b")), "other"),
    "covariance of one": (lambda: FeatureStats().update(ROWS[:1]).covariance, "features"),
    "merge_stats: none": (lambda: merge_stats([]), "shards"),
    "merge_stats: not a list": (lambda: merge_stats(STATS[0]), "shards"),
    "collect: one shard": (lambda: stats_of(ROWS, 1), "shards"),
    "collect: too few": (lambda: stats_of(ROWS[:40], 24), "batches"),
    "frechet: other features": (lambda: measure_frechet(merge_stats(STATS), stats_of(ROWS, name="other")), "fake"),
    "frechet: another D": (lambda: measure_frechet(merge_stats(STATS), stats_of(ROWS[:, :2])), "fake"),
    "frechet: one shard": (lambda: measure_frechet(merge_stats(STATS), STATS[:1]), "shards"),
    "limit: rungs": (lambda: frechet_limit(merge_stats(STATS), STATS, 25), "rungs"),
    "limit: one rung": (lambda: frechet_limit(merge_stats(STATS), STATS, 1), "rungs"),
    "kernel: two rows": (lambda: kernel_distance(ROWS[:2], ROWS), "x"),
    "kernel: NaN": (lambda: kernel_distance(ROWS, NAN), "y"),
    "kernel: another D": (lambda: kernel_distance(ROWS, ROWS[:, :2]), "y"),
    "kernel: block": (lambda: kernel_distance(ROWS, ROWS, block=0), "block"),
    "precision: k = n": (lambda: precision_recall(ROWS[:5], ROWS, 5), "k"),
    "precision: k = m": (lambda: precision_recall(ROWS, ROWS[:5], 5), "k"),
    "precision: k = 0": (lambda: precision_recall(ROWS, ROWS, 0), "k"),
    "precision: k = 2.5": (lambda: precision_recall(ROWS, ROWS, 2.5), "k"),
    "precision: images": (lambda: precision_recall(np.zeros((9, 8, 8, 1)), ROWS, 2), "real"),
    "density: k = n": (lambda: density_coverage(ROWS[:5], ROWS, 5), "k"),
    "density: NaN": (lambda: density_coverage(ROWS, NAN, 5), "fake"),
    "density: another D": (lambda: density_coverage(ROWS, ROWS[:, :2], 5), "fake"),
    "copies: k = n": (lambda: nearest_copies(ROWS[:5], ROWS, 5), "k"),
    "copies: NaN": (lambda: nearest_copies(NAN, ROWS), "train"),
    "copies: threshold": (lambda: nearest_copies(ROWS, ROWS, threshold=0), "threshold"),
    "share of nothing": (lambda: measure_share("x", []), "held"),
    "features: bytes": (lambda: load_features("digits")(np.zeros((2, 8, 8, 1), np.uint8)), "images"),
    "features: another size": (lambda: load_features("digits")(np.zeros((2, 28, 28, 1), np.float32)), "images"),
    "features: out of range": (lambda: load_features("pixels")(np.full((2, 8, 8, 1), 2.0)), "images"),
    "features: no classes": (lambda: load_features("pixels").probabilities(np.zeros((2, 8, 8, 1))), "pixels"),
    "load_features: unknown": (lambda: load_features("didgits"), "name"),
    "load_features: nothing": (lambda: load_features(None), "name"),
    "load_features: no folder": (lambda: load_features("classifier:nowhere"), "nowhere"),
    "train: batch": (lambda: metrics.features.train_classifier(Classifier(4, 10), np.zeros((9, 8, 8, 1)), np.zeros(9, int), 1), "batch_size"),
    "dataset": (lambda: read_labelled("mnist"), "dataset"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what):
    call, name = BAD[what]
    with pytest.raises(ValueError, match=name): call()


# ---------------------------------------------------------------- the models' cards

def on_card(card, key):
    "(value, error, n) as a model's card says."
    value, error, n = re.search(r"(-?[\d.e+-]+) ± ([\d.e+-]+), n = ([\d,]+)$", card[key]).groups()
    return float(value), float(error), int(n.replace(",", ""))


def agrees(found, said):
    "Two measures of the same, with samples of their own, are within three of their common error."
    return abs(found.value - said[0]) <= 3 * (found.error ** 2 + said[1] ** 2) ** 0.5


@pytest.mark.parametrize("name", [name for name, way in quality.MEASURES.items() if way.features])
def test_cards_name_their_metric_with_error_and_n(name):
    card = load_model(name).card
    assert card["distance"].startswith(f"FD ({quality.MEASURES[name].features}) ") and card["distance at 1/n = 0"].startswith("FD∞ (")
    assert on_card(card, "distance")[2] == 1000 and card["measured"].startswith(f"`python benchmarks/quality.py {name} --num 1000 ")
    assert ("as asked" in card) == bool(load_model(name).conditions)


def test_every_shipped_model_has_its_measure():
    assert set(quality.MEASURES) == {folder.name for folder in SHIPPED.iterdir() if not folder.name.startswith("features-")}
    card = load_model("emoji").card
    assert on_card(card, "as asked")[2] == 1000 and card["measured"].startswith("`python benchmarks/quality.py emoji --num 1000 ")


def test_emoji_are_told_apart():
    "A real picture is the nearest to itself, also with noise on it; another one is not."
    real, captions = quality.real_emoji()
    assert real.shape == (100, 16, 16, 3) and len(captions) == len(set(captions)) == 100
    noisy = real + np.random.default_rng(0).normal(0, 0.1, real.shape)
    assert (quality.nearest_emoji(noisy) == np.arange(100)).all()
    assert quality.measure("emoji", np.roll(real, 1, axis=0), np.arange(100))["as asked"].value == 0


def test_digits_are_as_good_as_their_card_says():
    "Fewer samples than the card's, so at 1/n = 0; what is spoiled by noise is not as good."
    card = load_model("digits").card
    images, _ = quality.draw("digits", 250, rng=7)
    found = quality.measure("digits", images)
    for key in ("distance at 1/n = 0", "recognised"): assert agrees(found[key], on_card(card, key)), (key, str(found[key]), card[key])
    spoiled = quality.measure("digits", np.roll(images, 1, axis=2))
    assert not agrees(spoiled["distance at 1/n = 0"], on_card(card, "distance at 1/n = 0")) and not agrees(spoiled["recognised"], on_card(card, "recognised"))


@pytest.mark.slow
@pytest.mark.parametrize("name, n", [("digits", 1000), ("digits-ddpm", 300), ("digits-flow", 1000), ("digits-map", 1000), ("digits-text", 1000), ("emoji", 200), ("fashion", 500)])
def test_models_are_as_good_as_their_cards_say(name, n):
    "By the command that wrote them, with another seed, and compiled as users have it."
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "quality.py", name, "--num", str(n), "--rng", "5"], capture_output=True, text=True, env={**env, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    found, card = dict(line.split(": ", 1) for line in done.stdout.splitlines()), load_model(name).card
    keys = {"distance at 1/n = 0", "recognised", "as asked", "distance"} & set(found) - ({"distance"} if n != 1000 else set())
    for key in keys:
        value, error, _ = on_card(found, key)
        assert agrees(Measure(key, value, error, n), on_card(card, key)), (key, found[key], card[key])
