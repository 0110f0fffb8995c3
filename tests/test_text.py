"""Words as a condition: the same vectors everywhere, whatever stands beside or behind a text; clear words for what cannot be read."""
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdiff.models.layers import AttentionBlock
from flaxdiff.text import TextEncoder, encode_in_batches, load_text_encoder, text_encoders

TEXTS = ["a thick handwritten seven leaning right", "a cat with sunglasses, at the beach", "7", "", "ÉTÉ – 赤いりんご", "a\tthree \n"]


def same(a, b, tolerance=0.0):
    "Two conditions are equal, at the places where there are tokens, to a tolerance."
    assert a.keys() == b.keys() == {"textcontext", "textmask"}
    width = min(a["textmask"].shape[-1], b["textmask"].shape[-1])
    for condition in (a, b): assert not condition["textmask"][..., width:].any()
    there = a["textmask"][..., :width]
    assert np.array_equal(there, b["textmask"][..., :width])
    x, y = (c["textcontext"][..., :width, :][there] for c in (a, b))
    if tolerance: np.testing.assert_allclose(x, y, atol=tolerance, rtol=0)
    else: assert np.array_equal(x, y)


def check_encoder(make, tolerance):
    "What every encoder keeps: shapes, mask, null, name; independent of the batch bit for bit, and of M to rounding."
    encoder = make()
    out = encoder(TEXTS)
    B, M, E = len(TEXTS), encoder.tokens, encoder.features
    context, mask = out["textcontext"], out["textmask"]
    assert context.shape == (B, M, E) and context.dtype == np.float32 and mask.shape == (B, M) and mask.dtype == np.bool_
    assert np.isfinite(context).all()
    length = mask.sum(1)
    assert (mask == (np.arange(M) < length[:, None])).all() and length.min() >= 2
    assert length[TEXTS.index("")] == length.min()
    for i, text in enumerate(TEXTS): same(encoder([text]), {k: v[i:i + 1] for k, v in out.items()})
    many = encoder(TEXTS * 4)
    same(many, {k: np.tile(v, (4,) + (1,) * (v.ndim - 1)) for k, v in out.items()})
    assert all(np.array_equal(encoder.null[k], encoder([""])[k][0]) for k in out) and encoder.null.keys() == out.keys()
    again = load_text_encoder(encoder.name)
    assert again.name == encoder.name and again.tokens == M
    same(again(TEXTS), out)
    other = make(tokens=M // 2)
    assert other.tokens == M // 2 and load_text_encoder(other.name).tokens == M // 2 and other.name != encoder.name
    same(other(TEXTS), out, tolerance)
    return encoder


# ---------------------------------------------------------------- letters

def letters(**options): return load_text_encoder("letters", **options)


def test_letters(): check_encoder(letters, 0)


def test_letters_are_the_same_everywhere():
    "A fixed function of the bytes: these sums were made elsewhere, and hold for every machine and version."
    out = letters()(TEXTS)
    assert hashlib.sha256(out["textcontext"].astype("<f4").tobytes()).hexdigest() == "05e0e4ec95ba8d948edcacee00b620e83e0846e4a47d6e0b5a563f32f57639fc"
    out = letters(features=100)(["a three"])
    assert [float(v).hex() for v in out["textcontext"][0, 1, :2]] == ["-0x1.823b820000000p-1", "0x1.ced9ce0000000p-3"]
    code = "from flaxdiff.text import load_text_encoder as l; import hashlib; print(hashlib.sha256(l('letters')(['a b'])['textcontext'].tobytes()).hexdigest())"
    sums = {subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path)},
                           capture_output=True, text=True, check=True).stdout for seed in ("1", "2")}
    assert len(sums) == 1


def test_letters_tell_words_spellings_and_places_apart():
    encoder = letters()
    first = lambda text, place=1: encoder([text])["textcontext"][0, place]
    assert np.array_equal(first("Seven"), first("seven")) and not np.array_equal(first("seven"), first("eight"))
    assert not np.array_equal(first("a a", 1), first("a a", 2))
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert cosine(first("leaning"), first("leans")) > cosine(first("leaning"), first("three")) + 0.1
    assert abs(first("seven").var() - 1) < 0.2
    assert encoder.tokenize(["x\x00\x02\x03y"])[1].sum() == 4, "control characters are spaces, not marks"
    with pytest.raises(ValueError, match="read-only"): encoder.embed.func.__globals__["letters_vector"](b"a", 0, 8)[0] = 1


def test_masked_tokens_change_nothing_in_attention():
    out = letters(tokens=8)(["a three", ""])
    x = jnp.ones((2, 2, 2, 8))
    block = AttentionBlock(heads=2)
    params = jax.tree.map(lambda p: p + 0.1, block.init(jax.random.key(0), x, out["textcontext"], out["textmask"]))
    spoilt = np.where(out["textmask"][..., None], out["textcontext"], np.nan)
    a, b = (block.apply(params, x, jnp.asarray(c), jnp.asarray(out["textmask"])) for c in (out["textcontext"], spoilt))
    assert np.array_equal(a, b) and np.isfinite(a).all()


# ---------------------------------------------------------------- the door, and what does not go through it

@pytest.mark.parametrize("texts, word", [("a cat", "single 'a cat'"), (b"a cat", "single"), ([], "at least one"), (None, "at least one"), (7, "at least one"),
                                         (["a", 7], "got 7 at place 1"), (["a", None], "place 1"), ([b"a"], "place 0"), ([["a"]], "place 0"),
                                         (np.array([1.0]), "place 0"), (np.array([["a"]]), "at least one"), (["\ud800"], "surrogate"), ({"a": 1}, "at least one")])
def test_bad_texts(texts, word):
    with pytest.raises(ValueError, match=f"(?s)texts must.*{word}"): letters()(texts)
    with pytest.raises(ValueError, match="texts must"): encode_in_batches(letters(), texts)


def test_texts_may_be_an_array_or_a_tuple():
    want = letters()(["a", "b"])
    for texts in (("a", "b"), np.array(["a", "b"]), np.array(["a", "b"], object), [np.str_("a"), "b"]): same(letters()(texts), want)


def test_a_text_that_is_too_long():
    text = "one two three four five six seven"
    with pytest.raises(ValueError, match="at most 6 tokens for 'letters,tokens=6', got 9 in 'one two.*truncate=True"): letters(tokens=6)(["short", text])
    encoder = letters(tokens=6, truncate=True)
    out = encoder([text, "short", text])
    assert encoder.truncated == 2 and encoder.name == "letters,tokens=6,truncate=True" and out["textmask"][0].all()
    assert encoder.tokenize([text])[0][0].tolist() == encoder.tokenize(["one two three four"])[0][0].tolist()
    assert load_text_encoder(encoder.name).truncate
    exact = letters(tokens=9)([text])
    assert exact["textmask"].all()


@pytest.mark.parametrize("name, word", [("leters", "one of letters, .*Hugging Face folder; got 'leters'"), ("", "got ''"), (None, "got None"), (7, "got 7"),
                                        ("letters:x", "takes no path"), ("letters,depth=3", "does not take the options depth"), ("/no/such/folder", "no such folder"),
                                        ("letters,tokens=2", "tokens must"), ("letters,tokens=x", "tokens must"), ("letters,tokens=", "one of"),
                                        ("letters,features=0", "features must"), ("letters,truncate=3", "truncate must"), ("clip", "clip:PATH"), ("bert", "bert:PATH"),
                                        ("clip:/no/such", "/no/such"), ("bert:/no/such", "/no/such"), ("minilm:/no/such", "/no/such")])
def test_bad_names(name, word):
    with pytest.raises(ValueError, match=f"(?s){word}"): load_text_encoder(name)


def test_an_encoder_of_ones_own():
    def load_mine(path="", tokens=4): return TextEncoder(f"mine:{path}", lambda texts: [[1, len(t), 2] for t in texts], lambda t, m: t[..., None].astype(np.float32), 0, tokens, 1)
    text_encoders["mine"] = load_mine
    try: assert load_text_encoder("mine:x")(["abc"])["textcontext"][0, :, 0].tolist() == [1, 3, 2, 0]
    finally: del text_encoders["mine"]


def test_encode_in_batches():
    sizes, encoder = [], letters()
    def watched(texts):
        sizes.append(len(texts))
        return encoder(texts)
    texts = (TEXTS * 3)[:-1]
    same(encode_in_batches(watched, texts, batch=4), encoder(texts))
    assert sizes == [4, 2]
    with pytest.raises(ValueError, match="batch must"): encode_in_batches(encoder, texts, batch=0)
