"""Laws of the diffusion transformer."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxdiff.cli.cost import make_network, measure_cost
from flaxdiff.models import DIT_SIZES, DiT, dit
from flaxdiff.models.dit import DiTBlock, adaptive_norm, from_patches, sine_positions, to_patches
from flaxdiff.predictors import KarrasEDMPredictor
from flaxdiff.pretrained import load_model
from flaxdiff.samplers import HeunSampler
from flaxdiff.schedulers import EDMNoiseScheduler
from flaxdiff.trainer import DiffusionTrainer
from flaxdiff.trainer.parallel import program_flops
from flaxdiff.training import TrainConfig, load_run, train_main

TINY = dict(output_channels=3, patch_size=2, width=16, depth=1, heads=2)
WORDS = np.random.default_rng(3).normal(size=(2, 6, 5)).astype(np.float32)
THERE = np.array([[True, True, False, False, False, False], [True, False, True, True, False, True]])


def inputs(shape=(2, 4, 6, 3)):
    return np.random.default_rng(2).normal(size=shape).astype(np.float32), np.linspace(-1.5, 1.0, shape[0]).astype(np.float32)


def random_params(model, *args, dtype=np.float32, **kwargs):
    "Numbers of a sensible size for every parameter, so that nothing stays at its zero; and nothing to compile."
    shapes = jax.eval_shape(functools.partial(model.init, **kwargs), jax.random.key(0), *args)
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(tree, [(rng.normal(size=p.shape) / max(1, np.prod(p.shape[:-1])) ** 0.5).astype(dtype) for p in leaves])


@functools.lru_cache(maxsize=None)
def network(**fields):
    "(model, random parameters, with those that read a text, the compiled apply)."
    model = DiT(**{**TINY, **fields})
    return model, random_params(model, *inputs(), textcontext=WORDS), jax.jit(functools.partial(model.apply, train=False))


@functools.lru_cache(maxsize=None)
def gradient(remat):
    "The compiled gradient by the parameters, as a function of them and of the words."
    model = DiT(**TINY, remat=remat)
    return jax.jit(jax.grad(lambda params, words: jnp.mean(model.apply(params, *inputs(), textcontext=words, textmask=THERE) ** 2)))


# ---------------------------------------------------------------- the network against its formula

def plain_norm(h): return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
def swish(x): return x / (1 + np.exp(-x))
def gelu(x): return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))


def look(q, k, v, heads):
    outs = []
    for q, k, v in zip(*(np.split(a, heads, -1) for a in (q, k, v))):
        weights = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
        outs.append(weights / weights.sum(-1, keepdims=True) @ v)
    return np.concatenate(outs, -1)


def plain_network(p, x, temb, label, words, heads=2):
    "The paper's network for one image, by loops and NumPy: nothing of the library."
    def layer(p, name, x): return x @ p[name]["kernel"] + p[name].get("bias", 0)
    angles = temb * np.geomspace(4.0, 1e-3, 128)
    c = layer(p, "time_in", np.concatenate([np.cos(angles), np.sin(angles)]))
    c = swish(layer(p, "time_out", swish(c)) + p["label"]["Embed_0"]["embedding"][label])
    height, width, channels = x.shape
    tokens, D = [], p["patches"]["bias"].size
    omega = [10_000 ** (-4 * k / D) for k in range(D // 4)]
    for i in range(height // 2):
        for j in range(width // 2):
            place = [f(w * a) for a in (j, i) for f in (np.sin, np.cos) for w in omega]
            tokens.append(layer(p, "patches", x[2 * i:2 * i + 2, 2 * j:2 * j + 2].reshape(-1)) + np.array(place))
    h = np.stack(tokens)
    for n in range(2):
        b = p[f"block_{n}"]
        b1, a1, g1, b2, a2, g2 = np.split(layer(b, "modulation", c), 6)
        q, k, v = np.split(layer(b, "query_key_value", (1 + a1) * plain_norm(h) + b1), 3, -1)
        h = h + g1 * layer(b, "attention_out", look(q, k, v, heads))
        k, v = np.split(layer(b, "text_key_value", words), 2, -1)
        h = h + layer(b, "text_out", look(layer(b, "text_query", plain_norm(h)), k, v, heads))
        h = h + g2 * layer(b, "mlp_out", gelu(layer(b, "mlp_in", (1 + a2) * plain_norm(h) + b2)))
    shift, scale = np.split(layer(p, "last_modulation", c), 2)
    pixels = layer(p, "output", (1 + scale) * plain_norm(h) + shift)
    out = np.zeros((height, width, pixels.shape[-1] // 4))
    for n, row in enumerate(pixels):
        i, j = divmod(n, width // 2)
        out[2 * i:2 * i + 2, 2 * j:2 * j + 2] = row.reshape(2, 2, -1)
    return out


def test_the_network_is_its_formula():
    "To 1e-10 of the largest number, in float64, with label and text."
    with jax.enable_x64(True):
        model = DiT(**{**TINY, "depth": 2}, num_classes=3)
        x, temb = (a.astype(np.float64) for a in inputs())
        params = random_params(model, x, temb, textcontext=WORDS, dtype=np.float64)
        out = jax.jit(model.apply)(params, x, temb, label=np.array([2, 3]), textcontext=WORDS.astype(np.float64))
        assert out.dtype == np.float64
        for i, label in enumerate((2, 3)):
            due = plain_network(params["params"], x[i], temb[i], label, WORDS[i].astype(np.float64))
            np.testing.assert_allclose(out[i], due, rtol=0, atol=1e-10 * np.abs(due).max())


PAPER = {("S", 8): (0.36, 33), ("S", 4): (1.41, 33), ("S", 2): (6.06, 33), ("B", 8): (1.42, 131), ("B", 4): (5.56, 130), ("B", 2): (23.01, 130),
         ("L", 8): (5.01, 459), ("L", 4): (19.70, 458), ("L", 2): (80.71, 458), ("XL", 8): (7.39, 676), ("XL", 4): (29.05, 675), ("XL", 2): (118.64, 675)}


def counted(size, patch):
    "(products, parameters) of one of the paper's networks, from a trace of shapes."
    model = DiT(8, patch, num_classes=1000, **DIT_SIZES[size])
    def start(x, label): return model.init_with_output(jax.random.key(0), x, jnp.zeros(1), label)
    program, (_, params) = jax.make_jaxpr(start, return_shape=True)(np.zeros((1, 32, 32, 4), np.float32), np.zeros(1, np.int32))
    return program_flops(program.jaxpr) // 2, sum(p.size for p in jax.tree.leaves(params))


@pytest.mark.parametrize("size, patch", PAPER)
def test_counts_are_the_papers(size, patch):
    "Table 4 of Peebles & Xie (2023), where a product with its addition is one flop; 5.56 for B/4 is 5.57 by every count."
    (flops, millions), sizes = PAPER[size, patch], DIT_SIZES[size]
    D, L, N = sizes["width"], sizes["depth"], (32 // patch) ** 2
    products, parameters = counted(size, patch)
    assert round(parameters / 1e6) == millions
    assert parameters == L * (18 * D ** 2 + 15 * D) + 4 * patch ** 2 * D + D + 256 * D + D + D ** 2 + D + 1001 * D + 2 * D ** 2 + 2 * D + 8 * patch ** 2 * (D + 1)
    assert products == L * (12 * N * D ** 2 + 2 * N ** 2 * D + 6 * D ** 2) + N * D * (4 + 8) * patch ** 2 + 256 * D + 3 * D ** 2
    assert abs(products / 1e9 - flops) < 0.021
    norms = (2 * L + 1) * N * D  # one more for each number that a norm gives
    assert round((products + norms) / 1e9, 2) == (5.57 if (size, patch) == ("B", 4) else flops)


def test_xl_2_has_the_parameters_of_the_published_weights():
    "675,129,632, of which 256 · 1152 are the places, a table there and a formula here."
    assert counted("XL", 2)[1] == 675_129_632 - 256 * 1152


# ---------------------------------------------------------------- patches and places

@pytest.mark.parametrize("patch, shape", [(1, (2, 3, 5, 1)), (2, (2, 4, 6, 3)), (4, (1, 8, 4, 2)), (3, (2, 3, 9, 1))])
def test_patches_are_squares_and_go_back(patch, shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    patches = to_patches(x, patch)
    columns = shape[2] // patch
    assert patches.shape == (shape[0], shape[1] // patch * columns, patch ** 2 * shape[3])
    for n in range(patches.shape[1]):
        i, j = (patch * k for k in divmod(n, columns))
        np.testing.assert_array_equal(patches[:, n].reshape(-1, patch, patch, shape[3]), x[:, i:i + patch, j:j + patch])
    np.testing.assert_array_equal(from_patches(patches, patch, shape[1]), x)


def test_places_know_how_far_apart_they_are():
    "Inner products depend on the differences of rows and of columns alone, and every place is its own."
    e = sine_positions(5, 7, 24)
    assert e.shape == (35, 24) and e.dtype == np.float64
    near = (e @ e.T).reshape(5, 7, 5, 7)
    np.testing.assert_allclose(near[1:, 2:, 1:, 2:], near[:-1, :-2, :-1, :-2], atol=1e-12)
    np.testing.assert_allclose(np.diag(e @ e.T), 12, atol=1e-12)
    assert np.sort(e @ e.T, -1)[:, -2].max() < 11.9
    np.testing.assert_array_equal(sine_positions(3, 7, 24), e[:21])


@pytest.mark.parametrize("shape", [(1, 2, 2, 3), (2, 8, 2, 3), (1, 6, 10, 3)])
def test_any_size_that_the_patch_divides(shape):
    model, params, _ = network()
    assert jax.eval_shape(model.apply, params, *inputs(shape)).shape == shape


def test_without_places_the_patches_are_a_set(monkeypatch):
    x, temb = inputs()
    shuffle = np.random.default_rng(0).permutation(6)
    scattered = lambda x: from_patches(to_patches(x, 2)[:, shuffle], 2, 4)
    model, params, run = network()
    assert np.abs(run(params, scattered(x), temb) - scattered(run(params, x, temb))).max() > 0.1
    monkeypatch.setattr(dit, "sine_positions", lambda rows, columns, width: np.zeros((rows * columns, width)))
    placeless = jax.jit(lambda x: model.apply(params, x, temb))
    out = placeless(x)
    np.testing.assert_allclose(placeless(scattered(x)), scattered(out), atol=1e-5 * np.abs(out).max())


# ---------------------------------------------------------------- how it begins

def test_it_begins_as_exactly_nothing():
    model = DiT(**TINY, num_classes=3)
    told = dict(label=np.array([0, 3]), textcontext=WORDS, textmask=THERE, augment=np.ones((2, 9), np.float32))
    out, params = jax.jit(functools.partial(model.init_with_output, **told))(jax.random.key(0), *inputs())
    for out in (out, jax.jit(model.clone(dtype=jnp.bfloat16).apply)(params, *inputs())):
        assert out.dtype == jnp.float32 and out.shape == (2, 4, 6, 3) and not np.any(out)
    silent = {jax.tree_util.keystr(path) for path, p in jax.tree_util.tree_leaves_with_path(params) if "kernel" in jax.tree_util.keystr(path) and not np.any(p)}
    due = ["['output']", "['last_modulation']", *(f"['block_0']['{name}']" for name in ("modulation", "text_out"))]
    assert silent == {f"['params']{name}['kernel']" for name in due}, "and no other matrix is zero"
    h = np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)
    block = DiTBlock(2)
    np.testing.assert_array_equal(jax.jit(block.init_with_output)(jax.random.key(0), h, np.ones((2, 16), np.float32), WORDS)[0], h)


def test_gradient_reaches_every_layer_in_three_updates():
    model, (x, temb) = DiT(**TINY, num_classes=3), inputs()
    told = dict(label=np.array([0, 3]), augment=np.ones((2, 9), np.float32), textcontext=WORDS, textmask=THERE)
    params = jax.jit(functools.partial(model.init, **told))(jax.random.key(0), x, temb)
    adam, reached = optax.adam(1e-3), []

    @jax.jit
    def update(params, memory):
        grads = jax.grad(lambda params: jnp.mean((model.apply(params, x, temb, **told) - np.sin(3 * x)) ** 2))(params)
        updates, memory = adam.update(grads, memory)
        return optax.apply_updates(params, updates), memory, grads

    memory = adam.init(params)
    for _ in range(3):
        params, memory, grads = update(params, memory)
        reached.append({jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if np.abs(g).max() > 1e-7})
    every = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert reached[0] == {"['params']['output']['kernel']", "['params']['output']['bias']"}
    assert any("modulation" in name for name in reached[1]) and not any("mlp_in" in name for name in reached[1])
    assert reached[2] == every, every - reached[2]


# ---------------------------------------------------------------- what it is told

def test_masked_words_change_no_bit():
    "Whatever stands there, NaN too; the gradient by the parameters stays finite; and what is there is read."
    model, params, run = network()
    reference = run(params, *inputs(), textcontext=WORDS, textmask=THERE)
    for junk in (np.nan, np.inf, 7):
        spoilt = np.where(THERE[:, :, None], WORDS, np.float32(junk))
        np.testing.assert_array_equal(run(params, *inputs(), textcontext=spoilt, textmask=THERE), reference)
    alone = [run(params, inputs()[0][i:i + 1], inputs()[1][i:i + 1], textcontext=WORDS[i:i + 1, THERE[i]]) for i in range(2)]
    np.testing.assert_allclose(reference, np.concatenate(alone), rtol=1e-4, atol=1e-5)
    spoilt = np.where(THERE[:, :, None], WORDS, np.nan)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient(False)(params, spoilt)))
    assert np.abs(run(params, *inputs(), textcontext=WORDS + THERE[:, :, None], textmask=THERE) - reference).max() > 1e-3


def test_a_network_that_begins_to_read_forgets_nothing():
    "With the text's last matrix at its zero the words change no bit; without words no parameter for them is asked."
    model, params, run = network()
    params = jax.tree_util.tree_map_with_path(lambda path, p: 0 * p if "text_out" in jax.tree_util.keystr(path) else p, params)
    without = jax.tree.map(lambda p: p, params)
    without["params"]["block_0"] = {name: p for name, p in params["params"]["block_0"].items() if "text" not in name}
    assert jax.tree.structure(without) == jax.tree.structure(random_params(model, *inputs()))
    np.testing.assert_array_equal(run(params, *inputs(), textcontext=WORDS), run(without, *inputs()))


def test_labels_are_heard_and_none_is_the_null_class():
    model, params, run = network(num_classes=3)
    say = lambda *labels: np.asarray(run(params, *inputs(), label=np.array(labels)))
    a, b, null = say(0, 1), say(0, 2), say(3, 3)
    np.testing.assert_array_equal(a[0], b[0])
    assert np.abs(a[1] - b[1]).max() > 1e-3
    np.testing.assert_array_equal(run(params, *inputs()), null)
    assert model.null_condition == {"label": 3} and DiT(**TINY).null_condition == {}
    assert params["params"]["label"]["Embed_0"]["embedding"].shape == (4, 16)
    assert np.isnan(say(0, 4)[1]).all() and np.isnan(say(-1, 0)[0]).all() and np.isfinite(say(0, 4)[0]).all()


def test_time_and_augmentation_are_heard():
    model, (x, temb) = DiT(**TINY), inputs()
    none = np.zeros((2, 9), np.float32)
    params = random_params(model, x, temb, augment=none)
    run = jax.jit(model.apply)
    np.testing.assert_array_equal(run(params, x, temb), run(params, x, temb, augment=none))
    assert np.abs(run(params, x, temb, augment=none + 1) - run(params, x, temb)).max() > 1e-3
    assert np.abs(run(params, x, temb + 0.5) - run(params, x, temb)).max() > 1e-3


def test_images_of_a_batch_do_not_meet():
    _, params, run = network()
    (x, temb), other = inputs(), inputs()[0].copy()
    other[1] += 1
    a, b = run(params, x, temb, textcontext=WORDS, textmask=THERE), run(params, other, temb, textcontext=WORDS[::-1] * [[[0]], [[1]]] + WORDS * [[[1]], [[0]]], textmask=THERE)
    np.testing.assert_array_equal(a[0], b[0])
    assert np.abs(a[1] - b[1]).max() > 1e-3


# ---------------------------------------------------------------- precision, memory, dropout

def test_bfloat16_computes_low_and_keeps_high():
    (_, params, high), (low_model, same, low) = network(), network(dtype=jnp.bfloat16)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, same)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(jax.eval_shape(low_model.init, jax.random.key(0), *inputs())))
    out, reference = low(params, *inputs()), high(params, *inputs())
    assert out.dtype == jnp.float32 and 1e-4 < np.abs(out - reference).max() / np.abs(reference).max() < 0.1
    assert np.isfinite(low(params, 80 * inputs()[0], inputs()[1])).all()


def test_the_norm_is_exact_far_from_zero():
    "A mean of 1e4 leaves the variance of 1 intact to float32's own rounding, in bfloat16's company too."
    h = np.random.default_rng(0).normal(size=(1, 4, 64)).astype(np.float32) + np.float32(1e4)
    due = plain_norm(h.astype(np.float64))
    np.testing.assert_allclose(adaptive_norm(h), due, atol=3e-3)
    assert adaptive_norm(h.astype(jnp.bfloat16)).dtype == jnp.float32


def test_working_through_again_changes_the_memory_alone():
    "`remat`: the same parameters by the same names, the same bits forward, the same gradient."
    (model, params, run), again = network(), DiT(**TINY, remat=True)
    assert jax.tree.structure(random_params(again, *inputs(), textcontext=WORDS)) == jax.tree.structure(params)
    told = dict(textcontext=WORDS, textmask=THERE)
    np.testing.assert_array_equal(jax.jit(again.apply)(params, *inputs(), **told), run(params, *inputs(), **told))
    assert "remat" in str(jax.make_jaxpr(gradient(True))(params, WORDS))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *(gradient(remat)(params, WORDS) for remat in (True, False)))


def test_dropout_is_for_training_alone():
    (_, params, run), dropping = network(), DiT(**TINY, dropout=0.5)
    np.testing.assert_array_equal(jax.jit(dropping.apply)(params, *inputs()), run(params, *inputs()))
    drawn = jax.jit(lambda key: dropping.apply(params, *inputs(), train=True, rngs={"dropout": key}))
    a, b, again = (drawn(jax.random.key(i)) for i in (0, 1, 0))
    np.testing.assert_array_equal(a, again)
    assert np.abs(a - b).max() > 1e-3 and np.abs(a - run(params, *inputs())).max() > 1e-3


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("name, bad", [("output_channels", 0), ("patch_size", 0), ("patch_size", 1.5), ("width", -4), ("width", 18), ("depth", 0), ("depth", True), ("heads", 0),
                                       ("heads", 3), ("num_classes", 0), ("num_classes", "ten"), ("remat", "no"), ("remat", 1), ("dropout", 1.0), ("dropout", np.nan)])
def test_bad_sizes_are_refused(name, bad):
    with pytest.raises(ValueError, match=f"^{name} must.*got {bad!r}"): DiT(**{**TINY, name: bad})


def test_inputs_that_do_not_fit_are_refused():
    x, temb = inputs()
    def refused(match, *args, model=DiT(**TINY, num_classes=3), **kwargs):
        with pytest.raises(ValueError, match=match): model.init(jax.random.key(0), *args, **kwargs)
    refused("^x must be floating point.*uint8", x.astype(np.uint8), temb)
    refused("^x must have shape", x[0], temb)
    refused("^x must have a height and a width that patch_size=2 divides, got 3 x 6", x[:, :3], temb)
    refused("^x must have a height and a width that patch_size=2 divides, got 4 x 5", x[:, :, :5], temb)
    refused("^temb must have shape", x, temb[:1])
    refused("^augment must have shape", x, temb, augment=np.zeros((2, 8), np.float32))
    refused("^label must have shape", x, temb, np.array([0]))
    refused("^label must be whole numbers, got float32", x, temb, np.float32([0, 1]))
    refused("^label must lie in 0 … 2, or be 3 for no class, got 4", x, temb, np.array([0, 4]))
    refused("^label needs a network that knows classes, got a DiT", x, temb, np.array([0, 1]), model=DiT(**TINY))
    refused("^textcontext must have shape", x, temb, textcontext=WORDS[:1])
    refused("^textmask needs a textcontext", x, temb, textmask=THERE)
    refused("^textmask must have shape", x, temb, textcontext=WORDS, textmask=THERE[:, :4])
    refused("^textmask must be True and False, got int", x, temb, textcontext=WORDS, textmask=THERE.astype(int))


# ---------------------------------------------------------------- in its place

@pytest.mark.slow
def test_it_is_trained_guided_and_exported_like_any_network(tmp_path):
    "Labels through the trainer, classifier-free guidance by its null class, and a folder that draws the same bits."
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 64)
    pictures = (np.where(label, 0.7, -0.7)[:, None, None, None] + 0.1 * rng.normal(size=(64, 4, 4, 1))).astype(np.float32).clip(-1, 1)
    def batches():
        while True:
            rows = rng.integers(0, 64, 32)
            yield {"image": pictures[rows], "label": label[rows].astype(np.int32)}
    trainer = DiffusionTrainer(DiT(1, 2, 16, 2, 2, num_classes=2), optax.adam(1e-2), EDMNoiseScheduler(sigma_data=0.7), rngs=0, name="dit",
                               model_output_transform=KarrasEDMPredictor(0.7), ema_decay=0.9, condition_dropout=0.2)
    state = trainer.fit(batches(), 80, progress=False)
    sampler = HeunSampler(trainer.model, state.ema_params, trainer.noise_schedule, trainer.model_output_transform, guidance_scale=2.0)
    ask = dict(num_images=8, diffusion_steps=8, rng=0, conditioning={"label": np.arange(8) % 2})
    drawn = np.asarray(sampler.generate_images(**ask))
    means = drawn.mean((1, 2, 3))
    assert (means[1::2] > 0.3).all() and (means[::2] < -0.3).all(), means
    trainer.export(tmp_path / "dit")
    loaded = load_model(tmp_path / "dit")
    assert loaded.model.module == DiT(1, 2, 16, 2, 2, num_classes=2)
    np.testing.assert_array_equal(loaded.sampler("heun", guidance_scale=2.0).generate_images(**ask), drawn)


def test_the_command_trains_a_transformer(tmp_path):
    "With labels; and what it leaves is read again, exported and loaded, bit for bit."
    words = "--network dit --patch-size 4 --width 16 --depth 1 --heads 2 --labels --steps 2 --batch-size 16 --no-tensorboard --quiet"
    train_main([*words.split(), "--out", str(tmp_path / "run")])
    trainer = load_run(tmp_path / "run")
    assert trainer.model.module == DiT(1, 4, 16, 1, 2, num_classes=10)
    trainer.export(tmp_path / "dit")
    loaded = load_model(tmp_path / "dit")
    assert loaded.model.module == trainer.model.module and loaded.conditions == ("label",)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, trainer.state.ema_params)


def test_the_commands_network_is_as_its_settings_say():
    config = TrainConfig(network="dit", patch_size=4, width=32, depth=3, heads=4, labels=True, classes=7, dtype="bfloat16", remat=True, dropout=0.1)
    assert make_network(config, 3) == DiT(3, 4, 32, 3, 4, 7, jnp.bfloat16, True, 0.1)
    assert measure_cost(TrainConfig(network="dit")).parameters == sum(p.size for p in jax.tree.leaves(random_params(DiT(1, 2, 96, 4, 4), *inputs((1, 8, 8, 1)))))
    with pytest.raises(ValueError, match="^patch_size must divide 8 for crop='bucket'"): make_network(TrainConfig(network="dit", patch_size=3, crop="bucket"), 3)
    with pytest.raises(ValueError, match="^heads must divide the width 96, got 5"): make_network(TrainConfig(network="dit", heads=5), 3)
