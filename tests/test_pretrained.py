"""Models that travel: what a folder holds, that it draws the same bits, and what is said of one that is damaged, foreign or a class of one's own."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdiff import models, predictors, pretrained, samplers, schedulers
from flaxdiff.models import SimpleUNet
from flaxdiff.predictors import EpsilonPredictor, FlowPredictor, KarrasEDMPredictor, VPredictor, X0Predictor
from flaxdiff.pretrained import (SAMPLERS, arguments_of, describe, flatten, from_json, halve, load_model, nest, read_tensors, rebuild, save_model, shipped_models,
                                 to_json, write_tensors)
from flaxdiff.samplers import HeunSampler
from flaxdiff.schedulers import CosineNoiseSchedule, DiscreteNoiseScheduler, EDMNoiseScheduler, NoiseScheduler
from laws import ALL_SCHEDULES, PREDICTORS, SAMPLER_CLASSES, over
from recognisable import measure, verdicts

ROOT = Path(__file__).resolve().parents[1]
NETWORK = SimpleUNet(1, 8, (4,), (None, {"heads": 2}), 1, norm_groups=2)
SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def parts():
    "A small model, untrained: what `save_model` takes."
    shapes = jax.eval_shape(NETWORK.init, jax.random.key(0), jnp.zeros((1, *SHAPE)), jnp.zeros(1))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: random.normal(0, 0.2, x.shape).astype(np.float32), shapes)  # none is zero
    return NETWORK, params, EDMNoiseScheduler(sigma_data=0.75), KarrasEDMPredictor(0.75), SHAPE


@pytest.fixture
def saved(parts, tmp_path): return save_model(tmp_path / "model", *parts, card={"what": "A test.", "licence": "MIT"})


def draw(network, params, schedule, predictor, shape): return np.asarray(HeunSampler(network, params, schedule, predictor).generate_images(3, 4, image_size=8, channels=1, rng=2))


# ---------------------------------------------------------------- the journey

def test_a_model_draws_the_same_bits_after_the_journey(parts, saved):
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    model = load_model(saved)
    assert np.array_equal(np.asarray(model.sampler("heun").generate_images(3, 4, rng=2)), draw(*parts))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), dict(parts[1]), model.params))
    assert model.model.module == NETWORK and model.image_shape == model.model.image_shape == SHAPE
    assert (model.conditions, model.encoder, model.card) == ((), None, {"what": "A test.", "licence": "MIT"})
    x = np.ones((2, *SHAPE), np.float32)
    assert all(np.array_equal(a, b) for a, b in zip(model.denoiser(x, 0.5), pretrained.Denoiser(*parts[:4])(x, 0.5)))
    assert len(repr(model)) < 1000, "the parameters are not printed"
    with pytest.raises(AttributeError): model.params = {}


def test_where_it_lies_makes_no_difference(parts, saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "a" / "copy")
    monkeypatch.chdir(tmp_path / "a")
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in ("copy", "./copy", Path("copy"), "~/a/copy"): assert load_model(place).card["what"] == "A test."
    assert save_model("~/b", *parts) == tmp_path / "b" and (tmp_path / "b" / "README.md").exists()


def test_what_the_trainer_wraps_is_unwrapped(parts, tmp_path):
    from flaxdiff.trainer import TrainedModel
    save_model(tmp_path / "model", TrainedModel(NETWORK, SHAPE), *parts[1:])
    model = load_model(tmp_path / "model")
    save_model(tmp_path / "again", model.model, model.params, model.noise_schedule, model.model_output_transform, model.image_shape)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    assert (tmp_path / "model" / "config.json").read_bytes() == (tmp_path / "again" / "config.json").read_bytes()


@pytest.mark.parametrize("dtype, furthest", [("float16", 2 ** -11), ("bfloat16", 2 ** -8)])
def test_two_bytes_a_parameter(dtype, furthest, parts, tmp_path):
    save_model(tmp_path / "model", *parts, dtype=dtype)
    full, stored = flatten(parts[1]), read_tensors(tmp_path / "model" / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {jnp.dtype(dtype)}
    back = flatten(load_model(tmp_path / "model").params)
    assert {x.dtype for x in back.values()} == {np.dtype(np.float32)}
    for name, x in full.items(): assert np.all(np.abs(back[name] - x) <= furthest * np.abs(x) + 1e-7)


def test_parameters_that_were_16_bits_stay_so(parts, tmp_path):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parts[1])
    save_model(tmp_path / "model", NETWORK, params, *parts[2:])
    assert {x.dtype for x in jax.tree.leaves(load_model(tmp_path / "model").params)} == {jnp.dtype(jnp.bfloat16)}


def test_conditions_encoder_and_numbers_are_kept(parts, tmp_path):
    network = SimpleUNet(1, 8, (4,), ({"heads": 2}, {"heads": 2}), 1, norm_groups=2, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *SHAPE)), jnp.zeros(1), jnp.zeros((1, 3, 5)))
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    save_model(tmp_path / "model", network, params, *parts[2:], encoder="bert", conditions=["textcontext"])
    model = load_model(tmp_path / "model")
    assert model.conditions == ("textcontext",) and model.encoder == "bert" and model.model.module == network
    text = np.ones((2, 3, 5), np.float32)
    denoiser = model.denoiser
    x0, _ = jax.eval_shape(lambda x: denoiser(x, 0.5, {"textcontext": text}), np.ones((2, *SHAPE), np.float32))
    assert x0.shape == (2, *SHAPE)


LABELLED = SimpleUNet(1, 8, (4,), (None, {"heads": 2}), 1, norm_groups=2, num_classes=3)
NO_TEXT = {"textcontext": np.random.default_rng(1).normal(0, 1, (3, 5)).astype(np.float32), "textmask": np.array([True, False, False])}


def random_params(network, **conditions):
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *SHAPE)), jnp.zeros(1), **conditions)
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: random.normal(0, 0.2, x.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_what_stands_for_no_condition_travels_too(dtype, parts, tmp_path):
    "A network's own is made again; what was given lies among the arrays, as exact as it was, and through any number of journeys."
    text = random_params(LABELLED, textcontext=jnp.zeros((1, 3, 5)), textmask=jnp.ones((1, 3), bool))
    save_model(tmp_path / "a", LABELLED, text, *parts[2:], encoder="letters", conditions=["label", *NO_TEXT], null_condition=NO_TEXT, dtype=dtype)
    model = load_model(tmp_path / "a")
    save_model(tmp_path / "b", model.model, model.params, *parts[2:], encoder=model.encoder, conditions=model.conditions, dtype=dtype)
    for folder in ("a", "b"):
        stored = read_tensors(tmp_path / folder / "model.safetensors")
        assert {name for name in stored if name.startswith("null")} == {"null_condition/textcontext", "null_condition/textmask"}
        again = load_model(tmp_path / folder)
        assert again.encoder == "letters" and again.conditions == ("label", "textcontext", "textmask") and set(again.params) == {"params"}
        null = again.model.null_condition
        assert null == again.denoiser.model.null_condition and set(null) == {"label", *NO_TEXT} and int(null["label"]) == 3
        for name, value in NO_TEXT.items(): assert null[name].dtype == value.dtype and np.array_equal(null[name], value)
    x = np.ones((2, *SHAPE), np.float32)
    nothing = {name: np.stack([value] * 2) for name, value in model.model.null_condition.items()}
    assert np.isfinite(model.denoiser(x, 0.5, nothing)[0]).all()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["parameters"] == sum(x.size for x in jax.tree.leaves(text)), "what is given is no parameter"


def test_a_network_with_labels_needs_nothing_more(parts, tmp_path):
    save_model(tmp_path / "model", LABELLED, random_params(LABELLED), *parts[2:], conditions=["label"])
    assert load_model(tmp_path / "model").model.null_condition == {"label": 3} and load_model("digits").model.null_condition == {}
    assert not any(name.startswith("null") for name in read_tensors(tmp_path / "model" / "model.safetensors"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["null_condition"]  # as it was written before there was any
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path / "model").model.null_condition == {"label": 3}


def test_a_trainer_exports_its_null_condition(tmp_path):
    import itertools
    from flaxdiff.trainer import DiffusionTrainer
    network = SimpleUNet(1, 8, (4,), (None, {"heads": 2}), 1, norm_groups=2)
    batch = {"image": np.zeros((4, *SHAPE), np.float32), **{name: np.stack([value] * 4) for name, value in NO_TEXT.items()}}
    trainer = DiffusionTrainer(network, noise_schedule=EDMNoiseScheduler(), rngs=0, null_condition=NO_TEXT)
    trainer.fit(itertools.repeat(batch), 1, progress=False)
    trainer.export(tmp_path / "model", encoder="letters")
    model = load_model(tmp_path / "model")
    assert model.conditions == ("textcontext", "textmask") and model.encoder == "letters" and model.image_shape == SHAPE
    assert all(np.array_equal(model.model.null_condition[name], value) for name, value in NO_TEXT.items())


class Told(nn.Module):
    null_condition = {"label": 2}  # a plain number, no array

    @nn.compact
    def __call__(self, x, temb, label): return nn.Dense(x.shape[-1])(x) + label.reshape(-1, 1, 1, 1)


def test_a_null_condition_may_be_a_plain_number(tmp_path):
    params = Told().init(jax.random.key(0), jnp.zeros((1, *SHAPE)), jnp.zeros(1), jnp.zeros(1))
    save_model(tmp_path / "model", Told(), params, EDMNoiseScheduler(), None, SHAPE, conditions=("label",), without=("model",))
    model = load_model(tmp_path / "model", model=Told())
    assert model.sampler("heun", guidance_scale=2.0).generate_images(2, 3, rng=0, conditioning={"label": np.array([0, 1])}).shape == (2, *SHAPE)


def test_the_names_of_classes_travel(tmp_path):
    network = SimpleUNet(1, 8, (4,), (None, None), 1, norm_groups=2, num_classes=3)
    params = network.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), jnp.zeros(1), label=jnp.zeros(1, int))
    save = lambda name, names, network=network, params=params: save_model(tmp_path / name, network, params, EDMNoiseScheduler(), None, SHAPE, label_names=names)
    save("model", ("a hat, red", "Schuh"))
    assert load_model(tmp_path / "model").label_names == ("a hat, red", "Schuh") and "- **labels**: 0 a hat, red, 1 Schuh\n" in (tmp_path / "model" / "README.md").read_text()
    for names, says in ((list("abcd"), "the network has 3, got 4"), ("ab", "must be a list of names"), ([1], "must be a list of names"), (None, "must be a list of names"), ({"a": 1}, "must be a list of names")):
        with pytest.raises(ValueError, match=f"^label_names must be .*{says.removeprefix('must be ')}"): save("no", names)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for names, ok in ((["a", "b", "c", "d"], False), ([1], False), (None, True)):
        if names is None: del config["label_names"]  # as models before had it
        else: config["label_names"] = names
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        if ok: assert load_model(tmp_path / "model").label_names == ()
        else:
            with pytest.raises(ValueError, match="config.json does not make a model: label_names"): load_model(tmp_path / "model")
    without = SimpleUNet(1, 8, (4,), (None, None), 1, norm_groups=2)
    with pytest.raises(ValueError, match="the network has 0"): save("no", ["a"], without, without.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), jnp.zeros(1)))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("schedule, predictor, due", [
    (CosineNoiseSchedule(1000), EpsilonPredictor(), ("ddpm", 1000)), (CosineNoiseSchedule(1000), VPredictor(), ("heun", 18)),
    (EDMNoiseScheduler(), EpsilonPredictor(), ("dpm-solver++", 18)), (schedulers.FlowNoiseScheduler(), FlowPredictor(), ("heun", 18)), (schedulers.LinearNoiseSchedule(1000), EpsilonPredictor(), ("heun", 18)), (None, None, ("heun", 18))])
def test_the_usual_way_of_a_process(schedule, predictor, due):
    "Small steps where x̂₀ has ε̂'s error a thousandfold at the noisy end; EDM's, whose α is 1 and σ 80, is not such."
    assert pretrained.usual_way(None, schedule, predictor) == due


def test_the_usual_way_of_shipped_models():
    ways = {name: load_model(name).usual_way for name in shipped_models()}
    assert {name: way for name, way in ways.items() if way != ("dpm-solver++", 18)} == {"digits-ddpm": ("ddpm", 1000), "digits-flow": ("heun", 18), "digits-map": ("flow-map", 4)}
    for name, (solver, levels) in ways.items():
        page = (pretrained.SHIPPED / name / "README.md").read_text(encoding="utf-8")
        assert f'model.sampler("{solver}")' in page and f"diffusion_steps={levels}," in page


@pytest.mark.parametrize("null, words", [({"label": "none"}, "null_condition"), (3, "null_condition"), ({"textcontext": np.inf}, "null_condition"),
                                         ({"label": np.zeros(5)}, "model must run with params")])
def test_a_null_condition_that_will_not_do(null, words, parts, tmp_path):
    with pytest.raises(ValueError, match=words):
        save_model(tmp_path / "model", LABELLED, random_params(LABELLED), *parts[2:], conditions=["label"], null_condition=null)
    assert not (tmp_path / "model").exists()


# ---------------------------------------------------------------- the words

@over(schedule=ALL_SCHEDULES | {"betas": DiscreteNoiseScheduler(np.linspace(1e-4, 0.02, 30)), "zero": DiscreteNoiseScheduler(np.full(9, 0.3, np.float32), True),
                                "by place": EDMNoiseScheduler(2, 0.01, 40, 5, 0.3, -1, 1), "whole": CosineNoiseSchedule(np.int64(20), s=0.1)})
def test_every_schedule_is_made_again_from_words(schedule):
    again = rebuild("noise_schedule", json.loads(json.dumps(describe("noise_schedule", schedule), allow_nan=False)))
    t = np.linspace(schedule.min_time, schedule.max_timesteps, 1001)
    for f in ("alpha", "sigma", "network_time"): assert np.array_equal(getattr(again, f)(t), getattr(schedule, f)(t))
    key = jax.random.key(3)
    assert np.array_equal(again.sample_timesteps(key, 9), schedule.sample_timesteps(key, 9)) and again.min_time == schedule.min_time
    assert type(again) is type(schedule)


@over(predictor=PREDICTORS | {"sharp": KarrasEDMPredictor(np.float32(0.2))})
def test_every_predictor_is_made_again_from_words(predictor):
    again = rebuild("model_output_transform", json.loads(json.dumps(describe("model_output_transform", predictor))))
    alpha, sigma = (f(np.linspace(0.05, 1.5, 101)) for f in (np.cos, np.sin))
    assert type(again) is type(predictor) and np.array_equal(again.row(alpha, sigma), predictor.row(alpha, sigma))
    assert np.array_equal(again.get_input_scale(alpha, sigma), predictor.get_input_scale(alpha, sigma))


def test_every_name_in_the_packages_can_be_looked_up():
    "No class is enrolled under another's name, and none needs what a file cannot say."
    for name, package in pretrained.PACKAGES.items():
        for word in package.__all__:
            value = getattr(package, word)
            if isinstance(value, type): assert getattr(package, value.__name__) is value and value.__name__ in package.__all__, word


@pytest.mark.parametrize("network", [SimpleUNet(), SimpleUNet(1, 16, [8], [{"heads": 2}], dtype=jnp.bfloat16, remat=True), SimpleUNet(1, 16, (8,), (), dtype=np.float32),
                                     SimpleUNet(1, 16, (8,), None, dtype="bfloat16")])
def test_networks_are_made_again_from_words(network):
    assert rebuild("model", json.loads(json.dumps(describe("model", network)))) == network


def test_a_class_of_ones_own_is_refused_and_the_way_is_said(parts, tmp_path):
    class SimpleUNet(nn.Module):  # the library's name does not make it the library's
        @nn.compact
        def __call__(self, x, temb): return nn.Conv(1, (1, 1))(x)

    class Mine(EDMNoiseScheduler): "A schedule of one's own."
    class MyRow(VPredictor): "A predictor of one's own."

    own = SimpleUNet()
    params = own.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), jnp.zeros(1))
    for changed, name in (((own, params, *parts[2:]), "model"), ((*parts[:2], Mine(), *parts[3:]), "noise_schedule"), ((*parts[:3], MyRow(), SHAPE), "model_output_transform")):
        with pytest.raises(ValueError, match=rf"{name} must .*load_model\(path, {name}="): save_model(tmp_path / "own", *changed)
        assert not list(tmp_path.iterdir())
        save_model(tmp_path / "own", *changed, without=[name])
        with pytest.raises(ValueError, match=f"config.json.*{name}="): load_model(tmp_path / "own")
        part = changed[{"model": 0, "noise_schedule": 2, "model_output_transform": 3}[name]]
        model = load_model(tmp_path / "own", **{name: part})
        assert part is (model.model.module if name == "model" else getattr(model, name))
        shutil.rmtree(tmp_path / "own")


def test_what_was_changed_after_it_was_made_is_refused(parts, tmp_path):
    schedule, predictor = EDMNoiseScheduler(), CosineNoiseSchedule(30)
    schedule.sigma_max = 40
    predictor.log_alpha_bar = predictor.log_alpha_bar * 2
    for changed in (schedule, predictor):
        with pytest.raises(ValueError, match="noise_schedule must .*changed since"): save_model(tmp_path / "model", *parts[:2], changed, *parts[3:])
    sharp = KarrasEDMPredictor(0.5)
    sharp.sigma_data = 0.3  # read as it is
    assert rebuild("model_output_transform", describe("model_output_transform", sharp)).sigma_data == 0.3


def test_a_schedule_is_copied_with_its_arguments():
    import copy
    import pickle
    schedule = CosineNoiseSchedule(40, s=0.1)
    for again in (copy.copy(schedule), copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))): assert arguments_of(again) == arguments_of(schedule)


@pytest.mark.parametrize("value", [None, True, 3, 0.1, "a", [1, [2, None]], {"a": (1, 2)}, jnp.bfloat16, np.dtype(np.float16), "bfloat16", np.float32(0.5), np.arange(3)])
def test_values_go_to_json_and_come_back(value):
    back = from_json(json.loads(json.dumps(to_json("x", value))))
    def as_tuples(v): return tuple(map(as_tuples, v)) if isinstance(v, (list, tuple)) else {k: as_tuples(w) for k, w in v.items()} if isinstance(v, dict) else v
    if isinstance(value, np.ndarray): assert back == tuple(value.tolist())
    else: assert back == as_tuples(value)


@pytest.mark.parametrize("value", [nn.swish, object(), object, float("nan"), float("inf"), jax.random.key(0), {1, 2}])
def test_what_json_cannot_hold_is_named(value):
    with pytest.raises((ValueError), match="activation"): to_json("activation", [value])


# ---------------------------------------------------------------- the arrays

TREE = {"params": {"Dense_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros(0, np.float16)}, "scale": np.asarray(2.0, np.float64)},
        "batch_stats": {"mean": np.ones(3, jnp.bfloat16), "count": np.asarray(7, np.int32), "on": np.asarray([True, False])}}


def test_arrays_come_back_to_the_bit(tmp_path):
    write_tensors(tmp_path / "a", flatten(TREE))
    back = nest(read_tensors(tmp_path / "a"))
    assert jax.tree.structure(back) == jax.tree.structure(TREE)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(TREE)): assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_weights_may_be_read_by_whom_any_new_file_may(tmp_path):
    (tmp_path / "plain").write_text("x")
    pretrained.write_tensors(tmp_path / "weights", {"a": np.zeros(3)})
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_package_safetensors_reads_what_we_write_and_the_other_way_round(tmp_path):
    st = pytest.importorskip("safetensors.numpy")
    flat = {name: x for name, x in flatten(TREE).items() if x.dtype != jnp.bfloat16}
    write_tensors(tmp_path / "ours", flat)
    theirs = st.load_file(tmp_path / "ours")
    assert set(theirs) == set(flat) and all(np.array_equal(theirs[name], x) and theirs[name].dtype == x.dtype for name, x in flat.items())
    st.save_file(flat, tmp_path / "theirs", metadata={"by": "them"})
    ours = read_tensors(tmp_path / "theirs")
    assert set(ours) == set(flat) and all(np.array_equal(ours[name], x) and ours[name].dtype == x.dtype for name, x in flat.items())


def test_the_package_safetensors_reads_bfloat16(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    write_tensors(tmp_path / "ours", flatten(TREE))
    rows = dict(safetensors.deserialize((tmp_path / "ours").read_bytes()))
    assert rows["batch_stats/mean"]["dtype"] == "BF16" and rows["batch_stats/mean"]["data"] == TREE["batch_stats"]["mean"].tobytes()


def header(rows, body=b"\0" * 8):
    text = json.dumps(rows).encode()
    return len(text).to_bytes(8, "little") + text + body


ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN = {"empty": b"", "short": b"\1\2\3", "no header": b"\xff" * 40, "no json": b"\3" + b"\0" * 7 + b"abc", "list": header([1]), "number": header(3),
          "dtype": header({"a": {**ROW, "dtype": "F31"}}), "shape": header({"a": {**ROW, "shape": [3]}}), "small": header({"a": {**ROW, "shape": [1]}}),
          "negative": header({"a": {**ROW, "shape": [-2]}}), "words": header({"a": {**ROW, "shape": "ab"}}), "gap": header({"a": {**ROW, "data_offsets": [4, 12]}}, b"\0" * 12),
          "rest": header({"a": ROW}, b"\0" * 9), "beyond": header({"a": ROW}, b"\0" * 7), "twice": header({"a": ROW, "b": ROW}), "row": header({"a": 3}),
          "huge": header({"a": {**ROW, "shape": [2 ** 62, 2 ** 62]}}), "lacks": header({"a": {"dtype": "F32"}}), "deep": header({}).replace(b"{}", b"[" * 9)[:20]}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named(data, tmp_path):
    (tmp_path / "b.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="b.safetensors is not a whole safetensors file"): read_tensors(tmp_path / "b.safetensors")


@pytest.mark.parametrize("tree", [np.ones(3), [np.ones(3)], {"a": [np.ones(3)]}, {"a/b": np.ones(3)}, {1: np.ones(3)}, {"": np.ones(3)}, {"a": 3.0}, {"a": jax.random.key(0)}, {"a": None}])
def test_what_is_no_tree_of_arrays_is_refused(tree):
    with pytest.raises(ValueError, match="params must"): flatten(tree)


@pytest.mark.parametrize("value, dtype, match", [(1e5, "float16", "bfloat16"), (float("nan"), None, "finite"), (float("inf"), "bfloat16", "finite"), (1.0, "float8", "dtype must"), (1.0, "no", "dtype must")])
def test_what_two_bytes_cannot_hold(value, dtype, match):
    with pytest.raises(ValueError, match=match): halve({"a": np.float32([value])}, dtype)


# ---------------------------------------------------------------- whole or not at all

def test_a_folder_that_is_there_is_left_alone(parts, saved, tmp_path):
    before = {path: path.read_bytes() for path in saved.iterdir()}
    for path in (saved, saved / "README.md", tmp_path, "", " ", "gs://bucket/model", "~no-such-user-here/x"):
        with pytest.raises(ValueError, match="path must"): save_model(path, *parts)
    assert before == {path: path.read_bytes() for path in saved.iterdir()} and [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "empty").mkdir()
    save_model(tmp_path / "empty", *parts)
    assert load_model(tmp_path / "empty").image_shape == SHAPE


@pytest.mark.parametrize("fails", ["write_tensors", "write_text", "write_card", "rename"])
def test_a_failure_leaves_nothing(fails, parts, tmp_path, monkeypatch):
    def fail(*args): raise OSError("No space left on device")
    if fails == "rename": monkeypatch.setattr(pretrained.os, "rename", fail)
    else: monkeypatch.setattr(pretrained, fails, fail)
    with pytest.raises(OSError, match="No space"): save_model(tmp_path / "deep" / "model", *parts)
    assert not list((tmp_path / "deep").iterdir())


@pytest.mark.parametrize("change, match", [
    (dict(image_shape=(8, 8, 3)), "model must run with params"), (dict(image_shape=(8, 0, 1)), "image_shape"), (dict(image_shape=(8, 8.5, 1)), "image_shape"),
    (dict(params={"params": {}}), "model must run with params"), (dict(noise_schedule=3), "noise_schedule"), (dict(model_output_transform="v"), "model_output_transform"),
    (dict(model=3), "model"), (dict(dtype="float64"), "dtype"), (dict(without=["params"]), "without"), (dict(encoder=3), "encoder"), (dict(conditions=[3]), "conditions"),
    (dict(conditions="label"), "conditions"), (dict(card="MIT"), "card"), (dict(card={"licence": 3}), "card")])
def test_what_makes_no_model_is_refused_before_anything_is_written(change, match, parts, tmp_path):
    named = dict(zip(("model", "params", "noise_schedule", "model_output_transform", "image_shape"), parts)) | change
    with pytest.raises(ValueError, match=match): save_model(tmp_path / "model", **named)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- damaged and foreign

def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


@pytest.mark.parametrize("changes", [
    {"format": "other"}, {"format": "gone"}, {"format_version": 2}, {"format_version": "gone"}, {"model": {"class": "os.system", "arguments": {}}}, {"model": {"class": "Unknown", "arguments": {}}},
    {"model": {"class": "__all__", "arguments": {}}}, {"model": "SimpleUNet"}, {"model": {"class": "SimpleUNet"}}, {"model": {"class": "SimpleUNet", "arguments": {"width": 3}}},
    {"model": {"class": "SimpleUNet", "arguments": {"emb_features": 3}}}, {"model": {"class": "SimpleUNet", "arguments": {"dtype": {"__dtype__": "float99"}}}}, {"model": "gone"}, {"model": None},
    {"noise_schedule": {"class": "EpsilonPredictor", "arguments": {}}}, {"noise_schedule": {"class": ["a"], "arguments": {}}}, {"noise_schedule": {"class": "EDMNoiseScheduler", "arguments": {"rho": -1}}},
    {"image_shape": 8}, {"image_shape": [8, 8, 0]}, {"image_shape": "gone"}, {"conditions": 3}, {"null_condition": 3}, {"null_condition": "label"}, {"null_condition": ["null_condition/label"]}, {"card": 3}, {"card": [1]}, {"halved": "float99"}, {"sha256": "gone"}])
def test_a_foreign_description_is_named(changes, saved):
    edit(saved, **changes)
    with pytest.raises(ValueError, match=re.escape(str(saved / "config.json"))): load_model(saved)


@pytest.mark.parametrize("text", [b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_description_that_is_none_is_named(text, saved):
    (saved / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(str(saved / "config.json"))): load_model(saved)


def test_damaged_parameters_are_named(parts, saved, tmp_path):
    path = saved / "model.safetensors"
    whole, match = path.read_bytes(), re.escape(str(path))
    for damaged in (whole[:-1], whole + b"\0", whole[:99] + bytes([whole[99] ^ 4]) + whole[100:], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=match): load_model(saved)
    other = save_model(tmp_path / "other", NETWORK, jax.tree.map(lambda x: x + 1, parts[1]), *parts[2:])
    shutil.copy(other / "model.safetensors", path)
    with pytest.raises(ValueError, match=match): load_model(saved)
    path.unlink()
    with pytest.raises(ValueError, match=match): load_model(saved)


def test_a_run_is_no_model_and_the_way_is_said(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"dataset": "digits", "steps": 3}))
    with pytest.raises(ValueError, match="config.json.*flaxdiff-export"): load_model(tmp_path)


# ---------------------------------------------------------------- solvers, the shipped model, the card

def test_every_solver_has_a_name(parts, saved):
    model = load_model(saved)
    assert set(SAMPLERS.values()) == set(SAMPLER_CLASSES.values()) - {samplers.FewStepSampler}
    for name, cls in SAMPLERS.items():
        sampler = model.sampler(name)
        assert type(sampler) is cls and sampler.model is model.model
    assert model.sampler("ddim", eta=0.5).eta == 0.5
    for name in ("Heun", "", 3):
        with pytest.raises(ValueError, match="sampler must be one of heun"): model.sampler(name)


@pytest.mark.parametrize("name", ["digit", "no/such/folder", "README.md", "../digits"])
def test_an_unknown_name_lists_what_ships(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="path_or_name must") as e: load_model(name)
    assert "digits" in str(e.value)
    for nothing in ("", "gs://b/model", "~no-such-user-here/x"):
        with pytest.raises(ValueError, match="path_or_name must"): load_model(nothing)


def test_a_folder_that_is_there_goes_before_a_shipped_name(saved, monkeypatch):
    saved.rename(saved.with_name("digits"))
    assert "Handwritten" in load_model("digits").card["what"]
    monkeypatch.chdir(saved.parent)
    assert load_model("digits").card["what"] == "A test."


def test_the_shipped_digits_are_recognisable():
    model = load_model("digits")
    assert "digits" in shipped_models() and model.image_shape == SHAPE
    m = measure(model.sampler("heun").generate_images(256, 18, rng=1))
    assert all(held for _, held in verdicts(m)), verdicts(m)


def test_shipped_models_are_small_and_say_where_they_come_from():
    sizes = {folder.name: sum(path.stat().st_size for path in folder.iterdir()) for folder in pretrained.SHIPPED.iterdir()}
    assert max(sizes.values()) <= 8e6 and sum(sizes.values()) <= 30e6
    for name in shipped_models():
        folder = pretrained.SHIPPED / name
        card, page = load_model(name).card, (folder / "README.md").read_text(encoding="utf-8")
        assert {"what", "command", "seed", "device", "time", "data", "licence"} <= set(card) and "not stated" not in page
        assert all(" ".join(text.split()) in page for text in card.values())


def test_loading_and_drawing_need_no_training():
    "Neither data, optimizer, checkpoints, nor the trainer is imported."
    code = """if True:
        import sys
        class Never:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("orbax", "optax", "sklearn", "tensorboardX", "grain", "tensorflow", "torch") or name.startswith(("flaxdiff.trainer", "flaxdiff.cli")):
                    raise ImportError(f"{name} is not needed")
        sys.meta_path.insert(0, Never())
        from flaxdiff.pretrained import load_model
        print(load_model("digits").sampler("heun").generate_images(2, 3, rng=0).shape)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stdout.strip() == "(2, 8, 8, 1)", done.stderr[-2000:]


def test_the_card_loads_as_it_says(parts, saved, monkeypatch):
    page = (saved / "README.md").read_text(encoding="utf-8")
    for due in ("# model", "A test.", "SimpleUNet(", "sigma_data=0.75", "8 × 8 × 1", "**licence**: MIT", "**data**: not stated"): assert due in page
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len([line for line in code.splitlines() if line]) == 4
    monkeypatch.chdir(saved.parent)
    drawn = {}
    exec(code, drawn)
    assert drawn["images"].shape == (16, *SHAPE)


def test_the_shipped_models_are_in_the_wheel():
    "setup.py names them as the package's data."
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert '"shipped/*/*"' in text and all(path.is_file() for path in pretrained.SHIPPED.glob("*/*"))


def test_a_network_in_a_network_travels():
    from flaxdiff.distill import TwoTimes
    described = json.loads(json.dumps(describe("model", TwoTimes(NETWORK))))
    assert rebuild("model", described) == TwoTimes(NETWORK) and described["arguments"]["network"]["__module__"]["class"] == "SimpleUNet"
