"""Laws of the UNet and its layers."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdiff.models.simple_unet import (AttentionBlock, Downsample, FouriedEmbedding, FourierEmbedding, ResidualBlock, SimpleUNet,
                                         TimeEmbedding, Unet, Upsample, attention)

TINY = dict(emb_features=16, feature_depths=(8, 16), attention_configs=({"heads": 2},) * 3, num_res_blocks=1, norm_groups=4)


def keys(n): return jax.random.split(jax.random.PRNGKey(0), n)


def shaken(params, seed=1, size=0.1):
    "Every parameter moved, so that nothing stays at its zero."
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [p + size * rng.normal(size=p.shape).astype(np.float32) for p in leaves])


def built(shape=(2, 8, 8, 3), context=None, **fields):
    "(model, params, x, temb) of a small UNet."
    model = SimpleUNet(**{**TINY, "output_channels": shape[-1], **fields})
    x, temb = jax.random.normal(jax.random.PRNGKey(1), shape), jnp.linspace(-1.5, 1.0, shape[0])
    args = (x, temb) if context is None else (x, temb, context)
    return model, jax.jit(model.init)(jax.random.PRNGKey(0), *args), x, temb


def flat(params): return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


# Attention

def plain(q, k, v):
    "softmax(q·kᵀ/√d) v, all at once."
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits, -1), v)


@pytest.mark.parametrize("n, m", [(1500, 1500), (1500, 7), (1025, 1025), (1152, 40), (40, 40), (1024, 13)])
def test_blocked_attention_is_attention(n, m):
    "Values and gradients, also where the tokens do not fill the last block."
    q, k, v = (3 * jax.random.normal(key, (2, size, 2, 4)) for key, size in zip(keys(3), (n, m, m)))
    weight = jax.random.normal(jax.random.PRNGKey(9), (2, n, 2, 4))
    loss = lambda f: lambda q, k, v: jnp.sum(weight * f(q, k, v))
    np.testing.assert_allclose(attention(q, k, v), plain(q, k, v), atol=1e-5)
    for got, want in zip(jax.grad(loss(attention), (0, 1, 2))(q, k, v), jax.grad(loss(plain), (0, 1, 2))(q, k, v)):
        np.testing.assert_allclose(got, want, atol=2e-5 * max(1, np.abs(want).max()))


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
    x = jax.random.normal(jax.random.PRNGKey(0), (3, 4, 4, 8))
    block = AttentionBlock(2, 4)
    params = shaken(block.init(jax.random.PRNGKey(0), x))
    np.testing.assert_allclose(block.apply(params, x)[1:2], block.apply(params, x[1:2]), atol=1e-5)
    moved = block.apply(params, x.at[0, 0, 0].add(1.0)) - block.apply(params, x)
    assert np.abs(moved[0, 3, 3]).max() > 1e-5, "every pixel looks at every other"
    with pytest.raises(ValueError, match="heads"): AttentionBlock(3).init(jax.random.PRNGKey(0), x)


# Layers

def test_embedding_is_smooth_on_all_three_ranges():
    "ln σ / 4, t/T and 1000·t/T: neighbours look alike, and far ends do not."
    f = lambda t: np.asarray(FourierEmbedding(64).apply({}, jnp.asarray(t, jnp.float32)))
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
    x = jax.random.normal(jax.random.PRNGKey(0), (2, *size, 4))
    half, params = Downsample(6).init_with_output(jax.random.PRNGKey(0), x)
    assert half.shape == (2, -(-size[0] // 2), -(-size[1] // 2), 6)
    assert Upsample(5).init_with_output(jax.random.PRNGKey(0), half, size)[0].shape == (2, *size, 5)
    assert Upsample(5).init_with_output(jax.random.PRNGKey(0), half)[0].shape == (2, 2 * half.shape[1], 2 * half.shape[2], 5)


def test_residual_block_starts_as_the_identity_and_hears_the_time():
    x, emb = jax.random.normal(jax.random.PRNGKey(0), (2, 4, 4, 8)), jnp.stack([jnp.ones(6), jnp.zeros(6)])
    block = ResidualBlock(8, 4)
    params = block.init(jax.random.PRNGKey(0), x, emb)
    np.testing.assert_array_equal(block.apply(params, x, emb), x)
    params = shaken(params)
    assert np.abs(block.apply(params, x, emb) - block.apply(params, x, emb[::-1])).max() > 1e-3
    wider = ResidualBlock(12, 4)
    assert wider.init_with_output(jax.random.PRNGKey(0), x, emb)[0].shape == (2, 4, 4, 12)


def test_time_embedding():
    out, _ = TimeEmbedding(16).init_with_output(jax.random.PRNGKey(0), jnp.linspace(0, 1000, 5))
    assert out.shape == (5, 16) and np.all(np.isfinite(out)) and np.abs(np.diff(out, axis=0)).max() > 1e-3


# The whole

@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 7, 7, 1), (2, 5, 9, 3), (1, 1, 1, 4), (1, 6, 10, 2)])
def test_output_has_the_shape_of_the_input(shape):
    model, params, x, temb = built(shape)
    out = model.apply(params, x, temb)
    assert out.shape == shape and out.dtype == jnp.float32 and np.all(np.isfinite(out))


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
    "The last layer of each branch, biases, and nothing else: two stacked zeros would starve the body of gradient."
    model, params, x, temb = built(context=jnp.ones((2, 3, 5)))
    kernels = {k: v for k, v in flat(params).items() if "kernel" in k}
    zero = {k for k, v in kernels.items() if not np.any(v)}
    want = {k for k in kernels if ("ResidualBlock" in k and "Conv_1" in k) or "self_out" in k or "cross_out" in k}
    assert zero == want and len(want) == 6 + 2 * 5
    for k, v in kernels.items():
        if k not in want: assert 0.02 < float(jnp.std(v)) * np.sqrt(np.prod(v.shape[:-1])) < 3, k


def test_gradient_reaches_every_layer_in_two_steps():
    "What is behind a zero layer learns once that layer has moved."
    model, params, x, temb = built(context=(context := jax.random.normal(jax.random.PRNGKey(3), (2, 3, 5))))
    loss = jax.jit(jax.grad(lambda p: jnp.mean((model.apply(p, x, temb, context) - jnp.sin(5 * x)) ** 2)))
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, loss(params))
    still = [k for k, g in flat(loss(params)).items() if np.abs(g).max() < 1e-8]
    assert still == []


def test_text_changes_the_output():
    "Not at initialisation, where the last layer of each look is zero; as soon as that has moved."
    context = jax.random.normal(jax.random.PRNGKey(3), (2, 3, 5))
    model, params, x, temb = built(context=context)
    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(apply(params, x, temb, context), apply(params, x, temb, -context))
    def moved(path, p): return p + 0.1 if "cross_out" in jax.tree_util.keystr(path) else p
    params = jax.tree_util.tree_map_with_path(moved, params)
    # the residual blocks after a look are still the identity, so it reaches the end by the skips
    assert np.abs(apply(params, x, temb, context) - apply(params, x, temb, -context)).max() > 1e-4
    one = context.at[1].add(1.0)
    difference = np.abs(apply(params, x, temb, one) - apply(params, x, temb, context)).max((1, 2, 3))
    assert difference[0] == 0 and difference[1] > 1e-5, "each image reads its own text"


def test_time_changes_the_output():
    model, params, x, temb = built()
    params = shaken(params)
    assert np.abs(model.apply(params, x, temb) - model.apply(params, x, temb + 0.5)).max() > 1e-3


def test_bfloat16_computes_low_and_keeps_high():
    model, params, x, temb = built(dtype=jnp.bfloat16)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    params = shaken(params, size=0.02)
    out = model.apply(params, x, temb)
    reference = SimpleUNet(**TINY).apply(params, x, temb)
    assert out.dtype == jnp.float32 and np.all(np.isfinite(out))
    error = np.abs(out - reference).max() / np.abs(reference).max()
    assert 1e-4 < error < 0.1, "bfloat16 is used, and is close"
    assert np.all(np.isfinite(model.apply(params, 80 * x, temb)))
    gradient = jax.grad(lambda p: jnp.mean(model.apply(p, x, temb) ** 2))(params)
    assert all(g.dtype == jnp.float32 and np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))


def test_images_of_a_batch_do_not_meet():
    model, params, x, temb = built((3, 8, 8, 3))
    params = shaken(params)
    np.testing.assert_allclose(model.apply(params, x, temb)[:1], model.apply(params, x[:1], temb[:1]), rtol=1e-4, atol=1e-5)


def test_bad_fields_are_refused():
    for fields, name in ((dict(attention_configs=({"heads": 4, "flash": True},)), "flash"), (dict(attention_configs=({"head": 4},)), "attention_configs"),
                         (dict(attention_configs=({"heads": 4},) * 6), "attention_configs"), (dict(feature_depths=()), "feature_depths"),
                         (dict(feature_depths=(8, 0)), "feature_depths"), (dict(num_res_blocks=0), "num_res_blocks"), (dict(num_middle_res_blocks=-1), "num_middle_res_blocks"),
                         (dict(output_channels=0), "output_channels"), (dict(emb_features=2.5), "emb_features"), (dict(norm_groups=0), "norm_groups")):
        with pytest.raises(ValueError, match=name): SimpleUNet(**fields)
    with pytest.raises(ValueError, match="heads"): built(attention_configs=({"heads": 3},))
