"""Laws of the UNet and its layers."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdiff.models import layers
from flaxdiff.models.layers import GroupNorm, LabelEmbedding, attention, attention_in_blocks, attention_kind, plain_attention
from flaxdiff.models.simple_unet import (AttentionBlock, Downsample, FouriedEmbedding, FourierEmbedding, ResidualBlock, SimpleUNet,
                                         TimeEmbedding, Unet, Upsample)
from flaxdiff.speed import with_every_derivative

TINY = dict(emb_features=16, feature_depths=(8, 16), attention_configs=({"heads": 2},) * 3, num_res_blocks=1, norm_groups=4)


def random_params(shapes, seed=1):
    "Numbers of a sensible size for every parameter, so that nothing stays at its zero; and nothing to compile."
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [(rng.normal(size=p.shape) / max(1, np.prod(p.shape[:-1])) ** 0.5).astype(np.float32) for p in leaves])


def moved(module, *args):
    "(the compiled apply, random parameters) of a layer."
    return jax.jit(module.apply), random_params(jax.eval_shape(module.init, jax.random.PRNGKey(0), *args))


@functools.lru_cache(maxsize=None)
def unet(shape=(2, 8, 8, 3), **fields): return moved(SimpleUNet(**{**TINY, "output_channels": shape[-1], **fields}), *inputs(shape))


def inputs(shape=(2, 8, 8, 3)):
    return np.random.default_rng(2).normal(size=shape).astype(np.float32), np.linspace(-1.5, 1.0, shape[0]).astype(np.float32)


def with_text(shape=(2, 3, 5)): return np.random.default_rng(3).normal(size=shape).astype(np.float32)


@functools.lru_cache(maxsize=None)
def with_context():
    "(model, its parameters at initialisation): one level, and attention in the middle alone."
    model = SimpleUNet(**{**TINY, "feature_depths": (8,), "attention_configs": (None, {"heads": 2})})
    return model, jax.jit(model.init)(jax.random.PRNGKey(0), *inputs(), with_text())


def flat(params): return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


# Attention

def plain(q, k, v):
    "softmax(q·kᵀ/√d) v, all at once."
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits, -1), v)


@pytest.mark.parametrize("n, m", [(1500, 1500), (1025, 7), (1152, 40), (40, 40)])
def test_blocked_attention_is_attention(n, m):
    "Values and gradients, also where the tokens do not fill the last block."
    rng = np.random.default_rng(0)
    q, k, v, weight = (rng.normal(size=(2, size, 2, 4)).astype(np.float32) * scale for size, scale in ((n, 3), (m, 3), (m, 3), (n, 1)))
    def both(f):
        def run(q, k, v):
            out, back = jax.vjp(f, q, k, v)
            return out, *back(weight)
        return jax.jit(run)(q, k, v)
    for got, want in zip(both(attention), both(plain)):
        np.testing.assert_allclose(got, want, atol=2e-5 * max(1, np.abs(want).max()))


# Forms of attention

ROWS = [("gpu", jnp.bfloat16, 16, 4096, 4096, "flash"), ("gpu", jnp.float16, 128, 256, 256, "flash"), ("gpu", jnp.bfloat16, 64, 64, 64, "flash"),
        ("gpu", jnp.bfloat16, 8, 4096, 77, "flash"), ("gpu", jnp.float32, 16, 4096, 4096, "blocks"), ("gpu", jnp.float64, 16, 4096, 4096, "blocks"),
        ("gpu", jnp.bfloat16, 12, 4096, 4096, "blocks"), ("gpu", jnp.bfloat16, 12, 1024, 1024, "plain"), ("gpu", jnp.bfloat16, 136, 4096, 4096, "blocks"),
        ("gpu", jnp.bfloat16, 64, 49, 49, "plain"), ("gpu", jnp.bfloat16, 64, 4096, 5, "plain"), ("gpu", jnp.float32, 64, 256, 256, "plain"),
        *((other, dtype, 64, n, n, "blocks" if n > 1024 else "plain") for other in ("other gpu", "tpu", "cpu", "neuron") for dtype in (jnp.bfloat16, jnp.float32)
          for n in (64, 1024, 1025, 4096))]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r[0]}-{jnp.dtype(r[1]).name}-{r[2]}-{r[3]}-{r[4]}")
def test_one_function_chooses_the_form_of_attention(row):
    *asked, due = row
    assert attention_kind(*asked) == due
    assert attention_kind(*asked, masked=True) == ("blocks" if row[3] * row[4] > 1024 ** 2 else "plain"), "cuDNN is given no masks"


@pytest.mark.parametrize("dtype, head_size, n, due", [(jnp.bfloat16, 16, 4096, "flash"), (jnp.float32, 16, 4096, "blocks"), (jnp.bfloat16, 16, 32, "plain")])
def test_attention_asks_that_function(monkeypatch, dtype, head_size, n, due):
    "On a GPU, as far as the form goes: each form is replaced by its name."
    monkeypatch.setattr(layers, "backend", lambda: "gpu")
    asked = []
    for name, kind in (("flash_attention", "flash"), ("attention_in_blocks", "blocks"), ("plain_attention", "plain")):
        monkeypatch.setattr(layers, name, lambda q, *_, kind=kind: asked.append(kind) or q)
    q = jax.ShapeDtypeStruct((1, n, 2, head_size), dtype)
    jax.eval_shape(attention, q, q, q)
    assert asked == [due]
    with pytest.raises(ValueError, match="^kind must be one of flash, blocks, plain, got 'fast'"): attention(*np.ones((3, 1, 4, 2, 8)), kind="fast")


def backwards_only(log):
    "Attention whose gradient can be taken once, and only backwards, as cuDNN's; it notes when it is asked."
    @jax.custom_vjp
    def f(q, k, v):
        log.append("forth")
        return plain(q, k, v)

    def forth(q, k, v):
        log.append("forth, kept")
        return jax.vjp(plain, q, k, v)

    def back(pull, cotangent):
        log.append("back")
        return jax.pure_callback(lambda *g: g, tuple(jax.ShapeDtypeStruct(g.shape, g.dtype) for g in pull(cotangent)), *pull(cotangent), vmap_method="broadcast_all")  # no derivative
    f.defvjp(forth, back)
    return f


def test_flash_attention_has_every_derivative():
    "Values and the gradient by the fast form; forward derivatives, batches of them, and second ones by the other."
    log, rng = [], np.random.default_rng(0)
    fast = backwards_only(log)
    ours = with_every_derivative(fast, attention_in_blocks, platform="cpu")
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(rng.normal(size=(2, 5, 2, 4))) for _ in range(3))
        directions = jnp.asarray(rng.normal(size=(3, *q.shape)))
        scalar = lambda f: lambda q: jnp.sum(jnp.sin(f(q, k * q, v)))
        asks = {"value": lambda f: f(q, k, v), "gradient": lambda f: jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1, 2))(q, k, v),
                "forwards": lambda f: jax.jvp(scalar(f), (q,), (directions[0],)),
                "many forwards": lambda f: jax.vmap(jax.linearize(scalar(f), q)[1])(directions),
                "second, along": lambda f: jax.jvp(jax.grad(scalar(f)), (q,), (directions[0],)),
                "second, back and back": lambda f: jax.grad(lambda q: jnp.sum(jax.grad(scalar(f))(q) ** 2))(q),
                "second, all": lambda f: jax.hessian(lambda s: scalar(f)(q + jnp.tensordot(s, directions, 1)))(jnp.zeros(3)),
                "images apart": lambda f: jax.vmap(jax.grad(lambda q, k, v: jnp.sum(jnp.sin(f(q[None], k[None], v[None])))))(q, k, v),
                "worked through again": lambda f: jax.grad(jax.checkpoint(scalar(f)))(q)}
        for name, ask in asks.items():
            log.clear()
            got = jax.jit(lambda ask=ask: ask(ours))()
            if name == "value": assert set(log) == {"forth"}
            if name == "gradient": assert "back" in log and "forth" not in log, "one way forward, which keeps what the way back needs"
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1, np.abs(b).max()), err_msg=name), got, ask(plain))
        with pytest.raises(Exception): jax.jvp(scalar(fast), (q,), (q,))  # so the stand-in is no better than cuDNN's


def lowered(f, platform, *args): return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def test_the_gpus_program_calls_cudnn(monkeypatch):
    "What would be compiled for an NVIDIA GPU; nothing is run. On another platform the same function has no such call."
    import jax._src.cudnn.fused_attention_stablehlo as theirs
    monkeypatch.setattr(theirs, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(theirs, "check_compute_capability", lambda capability: True)
    q = jax.ShapeDtypeStruct((2, 256, 2, 16), jnp.bfloat16)
    flash = lambda *qkv: attention(*qkv, kind="flash")
    loss = lambda *qkv: jnp.sum(flash(*qkv).astype(jnp.float32) ** 2)
    forward, gradient = lowered(flash, "cuda", q, q, q), lowered(jax.grad(loss, (0, 1, 2)), "cuda", q, q, q)
    assert forward.count("__cudnn$fmhaSoftmax") == 1 and "dot_general" not in forward
    assert gradient.count("__cudnn$fmhaSoftmaxBackward(") == 1 and "dot_general" not in gradient
    assert "cudnn" not in lowered(jax.grad(loss, (0, 1, 2)), "cpu", q, q, q)
    # A whole network, as it would choose there: a call for each attention of more than 64 pixels.
    monkeypatch.setattr(layers, "backend", lambda: "gpu")
    monkeypatch.setattr(layers, "by_backend", lambda cpu, other: other)
    net = SimpleUNet(**{**TINY, "feature_depths": (16, 16), "dtype": jnp.bfloat16})
    x, temb = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    params = jax.eval_shape(net.init, jax.random.PRNGKey(0), x, temb)
    assert lowered(net.apply, "cuda", params, x, temb).count("__cudnn$fmhaSoftmax") == 5
    assert "cudnn" not in lowered(net.clone(dtype=None).apply, "cuda", params, x, temb)


def test_a_tpus_program_can_be_made(monkeypatch):
    "As it would be chosen there, at 64×64: in blocks, and no form that is a CPU's."
    monkeypatch.setattr(layers, "backend", lambda: "tpu")
    monkeypatch.setattr(layers, "by_backend", lambda cpu, other: other)
    net = SimpleUNet(**{**TINY, "dtype": jnp.bfloat16})
    x, temb = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    params = jax.eval_shape(net.init, jax.random.PRNGKey(0), x, temb)
    loss = lambda params, x, temb: jnp.sum(net.apply(params, x, temb) ** 2)
    assert "stablehlo.while" in lowered(jax.grad(loss), "tpu", params, x, temb)


@pytest.mark.parametrize("kind", ["plain", "blocks"])
@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30])
def test_masked_tokens_change_nothing(kind, junk):
    "Values and every gradient are those of the tokens that are there alone; no gradient reaches the others."
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 2, 4)).astype(np.float32) for n in (9, 6, 6))
    there = np.array([[True, True, False, True, False, False], [False, True, True, False, False, True]])
    few = lambda x: np.stack([x[i][there[i]] for i in range(2)])
    bad_k, bad_v = (np.where(there[:, :, None, None], x, np.float32(junk)) for x in (k, v))
    masked = lambda q, k, v: attention(q, k, v, 4, mask=there, kind=kind)
    run = lambda f, *qkv: jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(jnp.sin(f(*qkv))), (0, 1, 2)))(*qkv)
    (value, (dq, dk, dv)), (due, (eq, ek, ev)) = run(masked, q, bad_k, bad_v), run(plain, q, few(k), few(v))
    for got, want in ((value, due), (dq, eq), (few(np.asarray(dk)), ek), (few(np.asarray(dv)), ev)): np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert not np.any(np.asarray(dk)[~there]) and not np.any(np.asarray(dv)[~there])
    assert not np.any(attention(q, bad_k, bad_v, mask=np.zeros((2, 6), bool), kind=kind)), "no key at all: zero"
    np.testing.assert_array_equal(attention(q, k, v, mask=np.ones((2, 6), bool), kind=kind), attention(q, k, v, kind=kind))
    with pytest.raises(ValueError, match="^mask must have shape"): attention(q, k, v, mask=there[:1])


def test_masked_text_changes_nothing():
    "In the whole network, whatever stands there, NaN too; the gradient by its parameters stays finite."
    model, params = with_context()
    params = jax.tree.map(lambda p: p + 0.1, params)
    text, there = with_text((2, 6, 5)), np.array([[True, True, False, False, False, False], [True, False, True, True, False, True]])
    apply = jax.jit(lambda params, text: model.apply(params, *inputs(), text, textmask=there))
    reference = apply(params, text)
    for junk in (np.nan, np.inf, 7): np.testing.assert_array_equal(apply(params, np.where(there[:, :, None], text, np.float32(junk))), reference)
    alone = jnp.concatenate([model.apply(params, inputs()[0][i:i + 1], inputs()[1][i:i + 1], text[i:i + 1, there[i]]) for i in range(2)])
    np.testing.assert_allclose(reference, alone, rtol=1e-4, atol=1e-5)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(apply(p, np.where(there[:, :, None], text, np.nan)) ** 2)))(params)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    assert np.abs(apply(params, text + there[:, :, None]) - reference).max() > 1e-4, "what is there is read"
    remat = model.clone(remat=True).apply(params, *inputs(), text, textmask=there)
    np.testing.assert_allclose(remat, reference, rtol=1e-4, atol=1e-5)


def largest(jaxpr):
    "The most numbers that any value in a jaxpr holds."
    most = 0
    for eqn in jaxpr.eqns:
        most = max([most, *(int(np.prod(v.aval.shape)) for v in eqn.outvars)])
        for value in eqn.params.values():
            for sub in value if isinstance(value, (tuple, list)) else (value,):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"): most = max(most, largest(sub))
    return most


def test_attention_at_64x64_stays_small():
    "16 × 4 heads × 4096² float32 would be 4 GB; nothing of the kind may appear, forwards or backwards."
    q = jax.ShapeDtypeStruct((16, 4096, 4, 16), jnp.float32)
    for f in (attention, jax.grad(lambda q, k, v: attention(q, k, v).sum(), (0, 1, 2))):
        assert largest(jax.make_jaxpr(f)(q, q, q).jaxpr) <= 2 ** 26  # 256 MB


def test_attention_block_keeps_images_apart():
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 8)).astype(np.float32)
    apply, params = moved(AttentionBlock(2, 4), x)
    out, other, nudged = x.copy(), x.copy(), x.copy()
    other[0] = -x[0]
    nudged[0, 0, 0] += 1
    out = apply(params, x)
    np.testing.assert_array_equal(apply(params, other)[1], out[1])
    assert np.abs(apply(params, nudged)[0, 3, 3] - out[0, 3, 3]).max() > 1e-5, "every pixel looks at every other"
    with pytest.raises(ValueError, match="heads"): jax.eval_shape(AttentionBlock(3).init, jax.random.PRNGKey(0), x)


def test_attention_block_is_attention():
    "Normalise, look with each head, add: against NumPy."
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 8)).astype(np.float32)
    apply, params = moved(AttentionBlock(2, 2), x)
    p = params["params"]
    h = x.reshape(6, 8)
    groups = h.reshape(6, 2, 4)
    n = ((groups - groups.mean((0, 2), keepdims=True)) / np.sqrt(groups.var((0, 2), keepdims=True) + 1e-5)).reshape(6, 8)
    n = n * p["norm_self"]["scale"] + p["norm_self"]["bias"]
    q, k, v = ((n @ p[f"self_{w}"]["kernel"]).reshape(6, 2, 4) for w in ("query", "key", "value"))
    w = np.exp(np.einsum("nhd,mhd->hnm", q, k) / 2)
    out = np.einsum("hnm,mhd->nhd", w / w.sum(-1, keepdims=True), v).reshape(6, 8) @ p["self_out"]["kernel"] + p["self_out"]["bias"]
    np.testing.assert_allclose(apply(params, x).reshape(6, 8), h + out, rtol=1e-4, atol=1e-5)


# Layers

def test_embedding_is_smooth_on_all_three_ranges():
    "ln σ / 4, t/T and 1000·t/T: neighbours look alike, and far ends do not."
    f = lambda t: np.asarray(jax.jit(FourierEmbedding(64).apply)({}, jnp.asarray(t, jnp.float32)))
    for low, high in ((-2, 2), (0, 1), (0, 1000)):
        e = f(np.linspace(low, high, 1001))
        assert e.shape == (1001, 64) and e.dtype == np.float32 and np.all(np.abs(e) <= 1)
        norm = np.linalg.norm(e, axis=1)
        cosine = np.sum(e[1:] * e[:-1], 1) / norm[1:] / norm[:-1]
        assert cosine.min() > 0.7, (low, high)
        assert np.linalg.norm(e[0] - e[-1]) > 0.5, (low, high)
        assert np.linalg.norm(e[1:] - e[:-1], axis=1).min() > 1e-4, "neighbours can be told apart"
    assert FouriedEmbedding is FourierEmbedding


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1)])
def test_down_and_up(size):
    shape = lambda layer, *args: jax.eval_shape(lambda *a: layer.init_with_output(jax.random.PRNGKey(0), *a, *args[1:])[0], args[0]).shape
    half = (2, -(-size[0] // 2), -(-size[1] // 2), 6)
    assert shape(Downsample(6), np.ones((2, *size, 4))) == half
    assert shape(Upsample(5), np.ones(half), size) == (2, *size, 5)
    assert shape(Upsample(5), np.ones(half)) == (2, 2 * half[1], 2 * half[2], 5)


@pytest.fixture(params=["a CPU's forms", "the others"])
def forms(request, monkeypatch):
    "Each choice of forms in turn, whatever the machine."
    first = request.param == "a CPU's forms"
    monkeypatch.setattr(layers, "by_backend", lambda cpu, other: cpu if first else other)
    return request.param


def test_doubling_is_repeating_and_convolving(forms):
    "Values and both gradients of `Upsample`, which on a CPU never makes the repeated picture, against those with it."
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, weight = rng.normal(size=(2, 5, 4, 3)), rng.normal(size=(2, 10, 8, 6))
        params = jax.tree.map(lambda p: rng.normal(size=p.shape), jax.eval_shape(Upsample(6).init, jax.random.PRNGKey(0), x))

        def by_hand(params, x):
            kernel, bias = (params["params"]["Conv_0"][name] for name in ("kernel", "bias"))
            repeated = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
            return jax.lax.conv_general_dilated(repeated, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + bias
        ours, theirs = (jax.jit(jax.value_and_grad(lambda params, x: jnp.sum(weight * jnp.sin(f(params, x))), (0, 1)))(params, x) for f in (Upsample(6).apply, by_hand))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11), ours, theirs)  # sums of a thousand products of order 1


@pytest.mark.parametrize("shape", [(3, 5, 4, 12), (3, 7, 12), (3, 12)])
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_group_norm_is_flaxs_then_scaled_and_shifted(shape, groups, forms):
    "Values, and gradients by all that goes in, in float64; of bfloat16 the statistics are float32."
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, weight, scale, shift = rng.normal(2, 3, shape), rng.normal(size=shape), *rng.normal(size=(2, 3, 12))
        params = {"params": {name: jnp.asarray(rng.normal(size=12)) for name in ("scale", "bias")}}

        def theirs(params, x, scale, shift):
            wide = lambda v: jnp.expand_dims(v, tuple(range(1, x.ndim - 1)))
            return nn.GroupNorm(groups, epsilon=1e-5, param_dtype=jnp.float64).apply(params, x) * (1 + wide(scale)) + wide(shift)
        run = lambda f: jax.jit(jax.value_and_grad(lambda *a: jnp.sum(weight * jnp.sin(f(*a))), range(4)))(params, x, scale, shift)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-8), run(GroupNorm(groups).apply), run(theirs))  # r is up to 316, where a group is one number
    low = 1000 + np.float32(x).astype(jnp.bfloat16)
    out = GroupNorm(groups, jnp.bfloat16).init_with_output(jax.random.PRNGKey(0), low)[0]
    assert out.dtype == jnp.bfloat16 and np.abs(np.float32(out).reshape(3, -1, groups, 12 // groups).mean((1, 3))).max() < 0.02  # results near 3 are rounded by 0.008; a mean of bfloat16 would be off by 4 of 1,000, here 1


@pytest.mark.parametrize("mean", [0, 3e4, -3e6])
def test_group_norm_of_numbers_far_from_zero(mean, forms):
    "Variance 1 of what float32 was given, and the gradient, too; one number of a group may be far from all others."
    rng = np.random.default_rng(0)
    x = (mean + max(1, abs(mean) / 3e4) * rng.normal(size=(2, 16, 16, 8))).astype(np.float32)
    x[1, 0, 0] += 100
    weight = rng.normal(size=x.shape).astype(np.float32)
    norm, params = GroupNorm(2), {"params": {"scale": np.linspace(0.5, 2, 8, dtype=np.float32), "bias": np.linspace(-1, 1, 8, dtype=np.float32)}}

    def exact(x):
        with jax.enable_x64(True):
            f = lambda x: nn.GroupNorm(2, epsilon=1e-5, use_fast_variance=False, param_dtype=jnp.float64).apply(jax.tree.map(np.float64, params), x)
            y, pull = jax.vjp(f, jnp.asarray(x, jnp.float64))
            return np.asarray(y), np.asarray(pull(jnp.asarray(weight, jnp.float64))[0])
    y, pull = jax.vjp(jax.jit(lambda x: norm.apply(params, x)), x)
    (due, slope), got = exact(x), pull(weight)[0]
    within = 0.04 if mean else 1024 * 2 ** -24 * np.abs(due).max()  # far from zero the numbers, and their mean, are rounded by 1/512 of their spread; else n roundings, n = 16 · 16 · 4
    np.testing.assert_allclose(y, due, rtol=0, atol=within)
    np.testing.assert_allclose(got, slope, rtol=0, atol=within * np.abs(slope).max())


def test_both_choices_of_forms_are_one_network(monkeypatch):
    "The whole UNet, odd sizes and text among them: values and gradients."
    shape, text = (2, 7, 9, 3), with_text()
    model = SimpleUNet(**{**TINY, "output_channels": 3, "num_classes": 4})
    with jax.enable_x64(True):
        x, temb, label = jnp.asarray(inputs(shape)[0], jnp.float64), jnp.asarray(inputs(shape)[1], jnp.float64), jnp.array([1, 4])
        params = jax.tree.map(np.float64, random_params(jax.eval_shape(lambda: model.init(jax.random.PRNGKey(0), x, temb, text, label=label))))
        found = []
        for first in (True, False):
            monkeypatch.setattr(layers, "by_backend", lambda cpu, other: cpu if first else other)
            found.append(jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(model.apply(p, x, temb, text, label=label)))))(params))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1, np.abs(b).max())), *found)


def test_residual_block_starts_as_the_identity_and_hears_the_time():
    x, emb = np.random.default_rng(0).normal(size=(2, 4, 4, 8)).astype(np.float32), np.stack([np.ones(6), np.zeros(6)]).astype(np.float32)
    apply, params = moved(ResidualBlock(8, 4), x, emb)
    assert np.abs(apply(params, x, emb) - apply(params, x, emb[::-1])).max() > 1e-3
    params["params"]["Conv_1"] = jax.tree.map(np.zeros_like, params["params"]["Conv_1"])
    np.testing.assert_array_equal(apply(params, x, emb), x)
    wider = jax.eval_shape(lambda: ResidualBlock(12, 4).init_with_output(jax.random.PRNGKey(0), x, emb)[0])
    assert wider.shape == (2, 4, 4, 12)


def test_time_embedding():
    apply, params = moved(TimeEmbedding(16), np.linspace(0, 1000, 5, dtype=np.float32))
    out = apply(params, np.linspace(0, 1000, 5, dtype=np.float32))
    assert out.shape == (5, 16) and np.all(np.isfinite(out)) and np.abs(np.diff(out, axis=0)).max() > 1e-3


# The whole

@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 7, 5, 1)])
def test_output_is_an_image_like_the_input(shape):
    apply, params = unet(shape)
    out = apply(params, *inputs(shape))
    assert out.shape == shape and out.dtype == jnp.float32 and np.all(np.isfinite(out)) and np.std(out) > 1e-3


@pytest.mark.parametrize("shape", [(1, 7, 7, 1), (2, 5, 9, 3), (1, 1, 1, 4), (1, 6, 10, 2), (1, 33, 17, 3)])
@pytest.mark.parametrize("depths", [(8,), (8, 16), (4, 8, 12, 16)])
def test_any_size_fits(shape, depths):
    model = SimpleUNet(**{**TINY, "feature_depths": depths, "attention_configs": ({"heads": 2},) * (len(depths) + 1), "output_channels": shape[-1]})
    out = jax.eval_shape(lambda *a: model.init_with_output(jax.random.PRNGKey(0), *a)[0], *inputs(shape))
    assert out.shape == shape and out.dtype == jnp.float32


@pytest.mark.parametrize("depths", [(8,), (8, 16), (8, 12, 16)])
@pytest.mark.parametrize("blocks, middle", [(1, 1), (2, 1), (1, 2)])
def test_depths_and_blocks(depths, blocks, middle):
    fields = dict(feature_depths=depths, attention_configs=(), num_res_blocks=blocks, num_middle_res_blocks=middle)
    shapes = jax.eval_shape(SimpleUNet(**{**TINY, **fields}).init, jax.random.PRNGKey(0), jnp.ones((1, 9, 9, 3)), jnp.ones(1))
    count = sum("ResidualBlock" in k for k in shapes["params"])
    assert count == 2 * len(depths) * blocks + 2 * middle


@pytest.mark.parametrize("configs, looks", [((), 0), (None, 0), ((None, {"heads": 2}), 2), (({"heads": 2},), 2), ((None, None, {"heads": 4}), 1),
                                            ([{"heads": 2}] * 3, 5)])
def test_fewer_attention_configs_mean_less_attention(configs, looks):
    "Each level that has one looks on its way down and on its way up; the middle once."
    model = SimpleUNet(**{**TINY, "attention_configs": configs})
    shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0), jnp.ones((1, 8, 8, 3)), jnp.ones(1))
    assert sum("AttentionBlock" in k for k in shapes["params"]) == looks


def test_lists_and_dicts_hash():
    a = SimpleUNet(feature_depths=[8, 16], attention_configs=[{"heads": 2}, None, {"heads": 2}])
    b = SimpleUNet(feature_depths=(8, 16), attention_configs=({"heads": 2}, None, {"heads": 2}))
    assert hash(a) == hash(b) and a == b and Unet is SimpleUNet
    assert len({a, b, SimpleUNet(feature_depths=[8], attention_configs=None)}) == 2
    jax.jit(lambda x, model: x, static_argnums=1)(1.0, a)
    assert hash(a.clone(output_channels=1)) != hash(a)


def test_the_contracts_unet_builds():
    model = Unet(emb_features=256, feature_depths=[64, 128, 256, 512], attention_configs=[{"heads": 4}] * 5, num_res_blocks=2, num_middle_res_blocks=1)
    x = jax.ShapeDtypeStruct((16, 64, 64, 3), jnp.float32)
    out, params = jax.eval_shape(lambda x, t: model.init_with_output(jax.random.PRNGKey(0), x, t), x, jax.ShapeDtypeStruct((16,), jnp.float32))
    assert out.shape == (16, 64, 64, 3)
    assert model == SimpleUNet(), "these are the defaults"


def test_only_last_layers_start_at_zero():
    "The last layer of each branch, and no other kernel: two stacked zeros would starve the body of gradient."
    kernels = {k: v for k, v in flat(with_context()[1]).items() if "kernel" in k}
    zero = {k for k, v in kernels.items() if not np.any(v)}
    want = {k for k in kernels if ("ResidualBlock" in k and "Conv_1" in k) or "self_out" in k or "cross_out" in k}
    assert zero == want and len(want) == 4 + 2
    for k, v in kernels.items():
        if k not in want: assert 0.2 < np.std(v) * np.prod(v.shape[:-1]) ** 0.5 < 3, k


def test_text_changes_the_output():
    "Not at initialisation, where the last layer of each look is zero; as soon as that has moved."
    model, params = with_context()
    apply, text = jax.jit(model.apply), with_text()
    np.testing.assert_array_equal(apply(params, *inputs(), text), apply(params, *inputs(), -text))
    params = jax.tree_util.tree_map_with_path(lambda path, p: p + 0.1 if "cross_out" in jax.tree_util.keystr(path) else p, params)
    assert np.abs(apply(params, *inputs(), text) - apply(params, *inputs(), -text)).max() > 1e-4
    one = text.copy()
    one[1] += 1
    difference = np.abs(apply(params, *inputs(), one) - apply(params, *inputs(), text)).max((1, 2, 3))
    assert difference[0] == 0 and difference[1] > 1e-5, "each image reads its own text"


def test_gradient_reaches_every_layer_in_two_steps():
    "What is behind a zero layer learns once that layer has moved."
    model, params = with_context()
    x, temb = inputs()
    loss = jax.jit(jax.grad(lambda p: jnp.mean((model.apply(p, x, temb, with_text()) - jnp.sin(5 * x)) ** 2)))
    params = jax.tree.map(lambda p, g: np.asarray(p) - 0.1 * np.asarray(g), params, loss(params))
    still = [k for k, g in flat(loss(params)).items() if np.abs(g).max() < 1e-8]
    assert still == []


def test_time_changes_the_output():
    (apply, params), (x, temb) = unet(), inputs()
    assert np.abs(apply(params, x, temb) - apply(params, x, temb + 0.5)).max() > 1e-3


def test_images_of_a_batch_do_not_meet():
    (apply, params), (x, temb) = unet(), inputs()
    other = x.copy()
    other[0] = 1 - x[0]
    np.testing.assert_array_equal(apply(params, other, temb)[1], apply(params, x, temb)[1])
    assert np.any(apply(params, other, temb)[0] != apply(params, x, temb)[0])


def test_bfloat16_computes_low_and_keeps_high():
    (low, params), (high, same), (x, temb) = unet(dtype=jnp.bfloat16), unet(), inputs()
    assert jax.tree.structure(params) == jax.tree.structure(same)
    shapes = jax.eval_shape(SimpleUNet(**TINY, dtype=jnp.bfloat16).init, jax.random.PRNGKey(0), x, temb)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(shapes))
    out, reference = low(params, x, temb), high(params, x, temb)
    assert out.dtype == jnp.float32 and np.all(np.isfinite(out)) and np.all(np.isfinite(low(params, 80 * x, temb)))
    assert 1e-4 < np.abs(out - reference).max() / np.abs(reference).max() < 0.1, "bfloat16 is used, and is close"


# Labels

def test_labels_are_heard_and_none_is_the_null_class():
    x, temb = inputs()
    model = SimpleUNet(**{**TINY, "num_classes": 3})
    init = lambda *a, **k: jax.eval_shape(lambda: model.init(jax.random.PRNGKey(0), x, temb, **k))
    params = random_params(init())
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, init(label=np.array([0, 1]))), "with or without a label at first"
    without = flat(unet()[1])
    assert set(flat(params)) - set(without) == {"['params']['label']['Embed_0']['embedding']"} and params["params"]["label"]["Embed_0"]["embedding"].shape == (4, 16)
    apply = jax.jit(lambda label: model.apply(params, x, temb, label=label))
    a, b, null = apply(np.array([0, 1])), apply(np.array([0, 2])), apply(np.array([3, 3]))
    np.testing.assert_array_equal(a[0], b[0])
    assert np.abs(a[1] - b[1]).max() > 1e-3 and np.abs(a - null).max((1, 2, 3)).min() > 1e-3
    np.testing.assert_allclose(model.apply(params, x, temb), null, rtol=1e-5, atol=1e-5)
    assert model.null_condition == {"label": 3} and SimpleUNet(**TINY).null_condition == {}
    assert np.isnan(apply(np.array([0, 4]))[1]).all() and np.isnan(apply(np.array([-1, 0]))[0]).all(), "inside jit a label that there is not cannot be refused"
    assert np.isfinite(apply(np.array([0, 4]))[0]).all()


def test_bad_labels_are_refused():
    x, temb = inputs()
    model = SimpleUNet(**{**TINY, "num_classes": 3})
    def refused(match, model=model, **kwargs):
        with pytest.raises(ValueError, match=match): model.init(jax.random.PRNGKey(0), x, temb, **kwargs)
    refused(r"^label must lie in 0 … 2, or be 3 for no class, got 4", label=np.array([0, 4]))
    refused(r"^label must lie in 0 … 2, or be 3 for no class, got -1", label=np.array([-1, 0]))
    refused("^label must have shape", label=np.array([0]))
    refused("^label must be whole numbers, got float32", label=np.float32([0, 1]))
    refused("^label needs a network that knows classes", SimpleUNet(**TINY), label=np.array([0, 1]))
    refused("^textmask needs a textcontext", textmask=np.ones((2, 3), bool))
    refused("^textmask must have shape", textcontext=with_text(), textmask=np.ones((2, 4), bool))
    refused("^textmask must be True and False, got int", textcontext=with_text(), textmask=np.ones((2, 3), np.int32))
    for bad in (0, -1, 2.5, True, "ten"):
        with pytest.raises(ValueError, match="num_classes"): SimpleUNet(**TINY, num_classes=bad)


def test_a_label_that_there_is_not_has_no_row():
    rows = LabelEmbedding(2, 3).init_with_output(jax.random.PRNGKey(0), np.array([0, 1, 2, 3, -1]))[0]
    assert np.isfinite(rows).all(1).tolist() == [True, True, True, False, False] and len({tuple(r) for r in np.asarray(rows[:3])}) == 3


# Dropout

def test_dropout_is_for_training_alone():
    "Without `train` nothing is left out; with it a key decides, the mean over keys is the network without, and parameters keep their names."
    x, temb = inputs()
    plain, dropping = SimpleUNet(**TINY), SimpleUNet(**TINY, dropout=0.5)
    params = random_params(jax.eval_shape(plain.init, jax.random.PRNGKey(0), x, temb))
    assert jax.tree.structure(jax.eval_shape(dropping.init, jax.random.PRNGKey(0), x, temb)) == jax.tree.structure(params)
    np.testing.assert_array_equal(dropping.apply(params, x, temb), plain.apply(params, x, temb))
    run = jax.jit(lambda key: dropping.apply(params, x, temb, train=True, rngs={"dropout": key}))
    a, b, again = (run(jax.random.key(i)) for i in (0, 1, 0))
    np.testing.assert_array_equal(a, again)
    assert np.abs(a - b).max() > 1e-3
    for bad in (1.0, -0.1, np.nan, "a tenth"):
        with pytest.raises(ValueError, match="dropout"): SimpleUNet(**TINY, dropout=bad)


def test_a_block_drops_what_comes_before_its_last_convolution():
    "The mean over many keys is the block without dropout: what is dropped goes through a linear map alone."
    x, temb = (np.random.default_rng(i).normal(size=s).astype(np.float32) for i, s in enumerate(((1, 4, 4, 8), (1, 16))))
    block = layers.ResidualBlock(8, norm_groups=4, dropout=0.3)
    params = random_params(jax.eval_shape(layers.ResidualBlock(8, norm_groups=4).init, jax.random.PRNGKey(0), x, temb))
    due = layers.ResidualBlock(8, norm_groups=4).apply(params, x, temb)
    many = jax.jit(jax.vmap(lambda key: block.apply(params, x, temb, rngs={"dropout": key})))(jax.random.split(jax.random.key(0), 4000))
    error = np.abs(np.mean(many, 0) - due).max() / (np.std(many, 0).max() / np.sqrt(4000))
    assert error < 5, "in standard errors, of 128 numbers"


@pytest.mark.slow
def test_working_through_again_changes_the_memory_alone():
    "`remat`: the same parameters by the same names, the same gradient, and a program that keeps less."
    shape, sizes = (2, 16, 16, 3), {}
    x, temb = inputs(shape)
    for remat in (False, True):
        model = SimpleUNet(**{**TINY, "output_channels": 3, "remat": remat})
        params = random_params(jax.eval_shape(model.init, jax.random.PRNGKey(0), x, temb))
        grad = jax.jit(jax.grad(lambda p: jnp.mean(jnp.square(model.apply(p, x, temb)))))
        sizes[remat] = (jax.tree.structure(params), grad(params), str(jax.make_jaxpr(grad)(params)))
    (tree, g, plain), (tree_again, g_again, again) = sizes[False], sizes[True]
    assert tree == tree_again and "remat" in again and "remat" not in plain
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), g_again, g)


def test_augmentation_labels_are_heard_and_none_is_zeros():
    x, temb = inputs((2, 8, 8, 3))
    model = SimpleUNet(**{**TINY, "output_channels": 3})
    params = random_params(jax.eval_shape(lambda *a: model.init(*a, augment=jnp.zeros((2, 9))), jax.random.PRNGKey(0), x, temb))
    silent, none, told = model.apply(params, x, temb), model.apply(params, x, temb, augment=jnp.zeros((2, 9))), model.apply(params, x, temb, augment=jnp.ones((2, 9)))
    np.testing.assert_array_equal(silent, none)
    assert np.abs(told - none).max() > 1e-3


def test_bad_fields_are_refused():
    for fields, name in ((dict(attention_configs=({"heads": 4, "flash": True},)), "flash"), (dict(attention_configs=({"head": 4},)), "attention_configs"),
                         (dict(attention_configs=({"heads": 4},) * 6), "attention_configs"), (dict(feature_depths=()), "feature_depths"),
                         (dict(feature_depths=(8, 0)), "feature_depths"), (dict(num_res_blocks=0), "num_res_blocks"), (dict(num_middle_res_blocks=-1), "num_middle_res_blocks"),
                         (dict(output_channels=0), "output_channels"), (dict(remat="no"), "remat"), (dict(remat=1), "remat"), (dict(emb_features=2.5), "emb_features"), (dict(norm_groups=0), "norm_groups")):
        with pytest.raises(ValueError, match=name): SimpleUNet(**fields)
    with pytest.raises(ValueError, match="heads"): unet.__wrapped__(attention_configs=({"heads": 3},))
    with pytest.raises(ValueError, match="groups must divide the 8 channels, got 3"): jax.eval_shape(GroupNorm(3).init, jax.random.PRNGKey(0), np.ones((1, 2, 2, 8)))


def test_inputs_that_do_not_fit_are_refused():
    "Bytes above all: a network would take 0 to 255 for the range [-1, 1]."
    model, (x, temb) = SimpleUNet(**TINY), inputs()
    def refused(match, *args, **kwargs):
        with pytest.raises(ValueError, match=match): jax.eval_shape(lambda *a: model.init(jax.random.PRNGKey(0), *a, **kwargs), *args)
    refused("^x must be floating point.*uint8", x.astype(np.uint8), temb)
    refused("^x must be floating point.*int32", x.astype(np.int32), temb)
    refused("^x must have shape", x[0], temb)
    refused("^temb must have shape", x, temb[:1])
    refused("^temb must have shape", x, temb[0])
    refused("^textcontext must have shape", x, temb, with_text((1, 3, 5)))
    refused("^augment must have shape", x, temb, augment=np.zeros((2, 8), np.float32))
    refused("^augment must have shape", x, temb, augment=np.zeros((1, 9), np.float32))
    with pytest.raises(ValueError, match="^textcontext needs attention"):
        jax.eval_shape(lambda *a: model.clone(attention_configs=()).init(jax.random.PRNGKey(0), *a), x, temb, with_text())
    for dtype in (np.float16, jnp.bfloat16):
        assert jax.eval_shape(lambda *a: model.init_with_output(jax.random.PRNGKey(0), *a)[0], x.astype(dtype), temb).dtype == jnp.float32
