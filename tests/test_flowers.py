"""The recipe for flowers: its own code, at its own sizes where shapes are enough, and run where it is small; and every line that it and the TPU chapter tell a reader to type."""
import ast
import contextlib
import functools
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxdiff.checkpoints import fingerprint
from flaxdiff.models.simple_unet import SimpleUNet
from flaxdiff.predictors import KarrasPredictionTransform
from flaxdiff.schedulers import EDMNoiseScheduler
from flaxdiff.tpu import PINS, tpu_main, tpu_parser
from flaxdiff.trainer import DiffusionTrainer, training_step
from flaxdiff.trainer.step import init_state
from flaxdiff.training import TrainConfig, check_config, load_run, make_network, make_optimizer, train_main, train_parser

for extra in ("tensorflow_datasets", "grain"): pytest.importorskip(extra)
NOTEBOOK = json.loads((Path(__file__).resolve().parents[1] / "nbs" / "52_flowers_tpu.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
PRINTED = "".join("".join(out.get("text", "")) for cell in NOTEBOOK["cells"] for out in cell.get("outputs", []))
KEPT = {"ATTEND", "SETTINGS", "BATCH", "PLANS", "FLOPS", "PEAK", "LINE", "LINES"}  # assignments of the chapter that are executed; of the rest, what defines and imports


def wanted(statement):
    if isinstance(statement, ast.Assign): return bool(KEPT & {n.id for n in ast.walk(statement.targets[0]) if isinstance(n, ast.Name)})
    return isinstance(statement, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))


def chapter(size):
    "The names that the chapter's cells define, with SIZE = size; nothing is drawn, written or trained."
    names = {"SIZE": size, "__name__": "chapter"}
    for source in CODE:
        body = ast.parse(re.sub(r"^(\s*)%.*$", r"\1pass", source, flags=re.M)).body
        exec(compile(ast.Module([s for s in body if wanted(s)], []), "52_flowers_tpu", "exec"), names)
    return SimpleNamespace(**names), names


@functools.cache
def flowers(): return chapter(64)[0]


# ---- what the text says

def test_the_settings_at_64_are_the_contracts_first_program():
    f = flowers()
    assert f.BATCH == 16 and f.s.image == 64 and f.s.lr == 2e-4 and f.s.epochs == 1000
    due = SimpleUNet(emb_features=256, feature_depths=[64, 128, 256, 512], attention_configs=[{"heads": 4}] * 5, num_res_blocks=2, num_middle_res_blocks=1)
    assert f.make_unet(f.s) == due.clone(dtype=jnp.bfloat16)
    schedule, density = f.make_process(f.s)
    assert vars(schedule) == vars(EDMNoiseScheduler(1, sigma_max=80, rho=7, sigma_data=0.5)) and density is None


def test_128_differs_in_what_the_chapter_names_and_in_nothing_else():
    at_64, at_128 = (flowers().SETTINGS[size] for size in (64, 128))
    assert {k for k in at_64 if at_64[k] != at_128[k]} == {"image", "attention", "sigma_max", "shift", "remat"}
    assert at_128["attention"] == [None] + at_64["attention"][1:]


@pytest.mark.parametrize("name, parameters", [("64", 51_773_571), ("128", 51_740_419)])
def test_the_table_of_sizes(name, parameters):
    f = flowers()
    assert sum(p.size for p in jax.tree.leaves(f.shapes(f.PLANS[name])[1])) == parameters
    row = re.search(rf"^{name} +([\d,]+) parameters, +([\d.]+) GB .* F = +([\d.]+) GFLOP; +([\d.]+) GB kept$", PRINTED, re.M)
    assert int(row[1].replace(",", "")) == parameters
    due = 16 * parameters / 1e9, f.forward_flops(f.PLANS[name]) / 1e9, f.kept(f.PLANS[name]) / 1e9
    np.testing.assert_allclose([float(row[k]) for k in (2, 3, 4)], due, atol=0.0051)


def test_the_lines_ask_for_the_same_runs():
    f = flowers()
    for size, s in ((64, f.SETTINGS[64]), (128, f.SETTINGS[128])):
        given = vars(train_parser().parse_args(f.LINES[size].split()))
        assert given.pop("out") == f"flowers-{size}" and given.pop("resume")
        config = TrainConfig(**given)
        assert (config.dataset, config.image_size, config.batch_size, config.steps) == ("oxford_flowers102", s["image"], f.BATCH, s["epochs"] * 511)
        assert config.attention_levels == sum(a is not None for a in s["attention"]) and config.heads == 4 and list(config.features) == s["depths"]
        assert (config.emb_features, config.res_blocks, config.dtype, config.remat) == (s["emb"], s["blocks"], "bfloat16", s["remat"])
        assert (config.schedule, config.predictor, config.loss, config.seed, config.ema_decay) == ("edm", "edm", "plain", 4, 0.999)
        params = {"w": jnp.ones(3)}  # the optimizer: Adam at a constant rate, from the second update on
        mine, plain = make_optimizer(config), optax.adam(s["lr"])
        states = [mine.init(params), plain.init(params)]
        for k in range(3): (a, states[0]), (b, states[1]) = (o.update({"w": jnp.arange(3.0) + k}, state, params) for o, state in zip((mine, plain), states))
        np.testing.assert_allclose(a["w"], b["w"], rtol=1e-6)


def test_the_install_cell_pins_what_flaxdiff_tpu_installs():
    install = next(source for source in CODE if "%pip install -q \"flaxdiff[data] @" in source)
    for pin in PINS: assert pin.replace("jax[tpu]", "jax[{chip}]") in install
    assert not any("colab_tpu" in source for source in CODE), "jax.tools.colab_tpu does not exist any more"


def test_it_opens_on_a_tpu():
    assert NOTEBOOK["metadata"].get("accelerator") == "TPU", "Colab reads the kind of machine from the notebook's metadata: {'accelerator': 'TPU'}"


# ---- the arithmetic

def test_operations_are_counted():
    "Products, convolutions and loops, by hand; and XLA's own count where there is neither an edge nor a loop."
    f = flowers()
    a, b = jnp.ones((5, 7)), jnp.ones((7, 3))
    looped = lambda x: jax.lax.scan(lambda c, _: (jnp.tanh(c @ jnp.ones((7, 7))), None), x, None, length=11)[0]
    image, kernel = jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 4, 6))
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    for function, arguments, due in ((jnp.matmul, (a, b), 2 * 5 * 7 * 3), (looped, (a,), 11 * 2 * 5 * 7 * 7), (jax.checkpoint(jax.jit(looped)), (a,), 11 * 2 * 5 * 7 * 7),
                                     (conv, (image, kernel), 2 * 2 * 4 * 4 * 6 * 9 * 4)):
        assert f.count_flops(function, *arguments) == due
    assert jax.jit(conv).lower(image, kernel).cost_analysis()["flops"] == 2 * 2 * 4 * 4 * 6 * 9 * 4


def test_looks_cost_what_equation_1_says():
    f = flowers()
    saved = f.forward_flops(f.variant(64)) - f.forward_flops(f.variant(64, attention=[None] + [f.ATTEND] * 4))
    assert saved == 2 * (4 * 4096 ** 2 * 64 + 8 * 4096 * 64 ** 2 + 5 * 2 * 64 * 16)  # the last: its norm's five products with the matrix of 64 channels by 16 groups


def test_training_costs_three_times_the_way_forth():
    "By XLA's count of the compiled gradient, at a size without loops; and no more than four times with `remat`."
    f = flowers()
    def cost(what, **changes):
        net, *rest = f.shapes(f.variant(64, image=16, depths=[32, 64], attention=[None, f.ATTEND, f.ATTEND], emb=32, blocks=1, **changes))
        ask = lambda params, x, t: jnp.sum(net.apply(params, x, t) ** 2)
        return jax.jit(what(ask)).lower(*rest).cost_analysis()["flops"]
    forth = cost(lambda ask: ask)
    assert 2.6 < cost(jax.grad) / forth < 3.2 < cost(jax.grad, remat=True) / forth < 4.2


def test_hours_are_equation_3():
    f = flowers()
    for size, k in ((64, 3), (128, 4)):
        due = 1000 * 511 * 16 * k * f.forward_flops(f.variant(size)) / (0.3 * 197e12) / 3600
        assert math.isclose(f.hours(size, f.PEAK["TPU v5e"], 0.3), due) and math.isclose(f.hours(size, f.PEAK["TPU v5e"], 0.3, chips=8), due / 8)
        assert float(re.search(rf"TPU v5e, {size} × {size}: +([\d.]+) hours if", PRINTED)[1]) == round(due, 1)


def test_the_noise_at_128_is_shifted_by_the_logarithm_of_two():
    f = flowers()
    (schedule, density), (usual, _) = (f.make_process(f.variant(size)) for size in (128, 64))
    assert math.isclose(schedule.sigma(1.0), 160, rel_tol=1e-6) and math.isclose(usual.sigma(1.0), 80, rel_tol=1e-6)
    shifted = jnp.log(schedule.sigma(density(jax.random.key(1), 20_000)))
    own = jnp.log(usual.sigma(usual.sample_timesteps(jax.random.key(2), 20_000)))
    error = 4 * 1.2 * math.sqrt(2 / 20_000)  # four standard errors of a difference
    assert abs(shifted.mean() - own.mean() - math.log(2)) < error and abs(shifted.std() - own.std()) < error


# ---- the full sizes, by shapes alone

@pytest.mark.parametrize("size", [64, 128])
def test_one_update_of_the_full_size(size):
    "The beginning and the update of the chapter's trainer are traced; nothing is computed."
    f = flowers()
    s = f.variant(size)
    schedule, density = f.make_process(s)
    trainer = DiffusionTrainer(f.make_unet(s), optax.adam(s.lr), schedule, 4, model_output_transform=KarrasPredictionTransform(0.5), time_density=density)
    recipe, key, image = trainer.make_recipe(), jax.random.key(0), jax.ShapeDtypeStruct((f.BATCH, size, size, 3), jnp.float32)
    state = jax.eval_shape(partial(init_state, recipe), key, image)
    assert sum(p.size for p in jax.tree.leaves(state.params)) == {64: 51_773_571, 128: 51_740_419}[size]
    new, metrics = jax.eval_shape(partial(training_step, recipe), state, jax.random.key_data(key), jax.ShapeDtypeStruct((f.BATCH,), jnp.int32), (image, ()))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32
    assert {p.dtype for p in jax.tree.leaves(new.params)} == {jnp.dtype("float32")}  # work in bfloat16, parameters not


# ---- the toy

@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "The folder of the drawn flowers, written by the chapter's recipe."
    import tensorflow_datasets as tfds
    tfds.disable_progress_bar()
    folder = tmp_path_factory.mktemp("flowers")
    flowers().OxfordFlowers102(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


# ---- what a reader is told to type

def recipe(name):
    "The lines of a chapter's shell blocks, continued ones joined; and the lines that the chapter's own code prints as `$ …`."
    notebook = json.loads((Path(__file__).resolve().parents[1] / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))
    prose = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", prose, re.M | re.S)).replace("\\\n", " ")
    return [line for line in blocks.splitlines() if shlex.split(line, comments=True)]


TYPED = [(name, line) for name in ("52_flowers_tpu", "81_tpu") for line in recipe(name)]


def training_words(words):
    "Parse the flags of flaxdiff-train as it does, and check that they ask for the network and the batches of the published program."
    given = vars(train_parser().parse_args(words))
    for name in ("out", "resume"): given.pop(name, None)
    config = TrainConfig(**given)
    check_config(config)
    assert (config.dataset, config.image_size, config.batch_size, config.learning_rate) == ("oxford_flowers102", 64, 16, 2e-4)
    shapes = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    params = jax.eval_shape(make_network(config, 3).init, jax.random.key(0), *shapes)
    assert sum(p.size for p in jax.tree.leaves(params)) == 51_773_571


def judge(words):
    "Whether a line can be right: flaxdiff's own commands are parsed by their own parsers, and the rest is known by name."
    program, *rest = words
    if program == "flaxdiff-tpu":
        cut = rest.index("--") if "--" in rest else len(rest)
        assert not vars(tpu_parser().parse_args(rest[:cut]))["dry_run"]
        with contextlib.redirect_stdout(io.StringIO()): assert tpu_main([rest[0], "--dry-run", *rest[1:]]) == 0
        if rest[0] == "train": training_words(rest[cut + 1:])
    elif program == "flaxdiff-train": training_words(rest)
    elif program == "pip": assert rest[0] == "install" and any(w.startswith("flaxdiff[data] @ git+https://") for w in rest) and any(w.startswith("tensorflow-cpu") for w in rest)
    elif program == "python": assert rest[0] == "-c" and compile(rest[1], "recipe", "exec")
    elif program == "gcloud": assert rest[:3] == ["storage", "buckets", "create"] or rest[:3] == ["storage", "cp", "-r"]
    elif program == "export": assert all(re.fullmatch(r"CLOUDSDK_[A-Z_]+=[a-z0-9-]+", w) for w in rest)
    else: assert program == "ssh-add"


@pytest.mark.parametrize("name, line", TYPED, ids=[f"{name} {line[:50]}" for name, line in TYPED])
def test_every_line_of_the_recipes_can_be_typed(name, line): judge(shlex.split(line, comments=True))


def test_wrong_lines_are_found():
    for line in ("flaxdiff-tpu fly t", "flaxdiff-tpu create t v4", "flaxdiff-tpu train t -- --dataset oxford_flowers102 --out x", "flaxdiff-train --featurs 3 --out x", "curl x", "pip install flaxdiff[data]"):
        with pytest.raises((AssertionError, SystemExit)): judge(shlex.split(line))


@pytest.mark.parametrize("name", ["52_flowers_tpu", "81_tpu"])
def test_the_recipes_have_what_they_need_before_they_need_it(name):
    "TensorFlow before the data are prepared, these before they are copied to the bucket, the bucket mounted and the data copied to every worker before training."
    said = "\n".join(recipe(name)) + (PRINTED if name == "52_flowers_tpu" else "")
    order = ["tensorflow-cpu", "get_dataset", "buckets create", "gcloud storage cp -r tensorflow_datasets", "flaxdiff-tpu create", "flaxdiff-tpu setup", "flaxdiff-tpu mount", "-- cp -r my-bucket/tensorflow_datasets .", "flaxdiff-tpu train"]
    places = [said.find(what) for what in order]
    assert -1 not in places and places == sorted(places), dict(zip(order, places))


TINY = "--image-size 16 --features 24 --attention-levels 1 --res-blocks 1 --emb-features 32 --steps 4 --checkpoint-every 2 --sample-every 4 --quiet"  # of two flags of one name the later counts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["52_flowers_tpu", "81_tpu"])
def test_the_recipes_run_to_their_end(name, drawn, tmp_path):
    "As they are written, in a shell, with stand-ins for Google and for the installer; the data are the drawings, the training is the real one at toy size."
    from test_tpu import BIN, UV, Bench
    bench = Bench(tmp_path)
    shutil.copytree(drawn, tmp_path / "tensorflow_datasets")  # what the photographs would be, once downloaded
    for program in ("pip", "ssh-add"): bench.put(f"bin/{program}", "#!/bin/sh\n")
    bench.put("bin/python", f"#!/bin/sh\nexec {sys.executable} \"$@\"\n")
    bench.put("env/bin/python", f"#!/bin/sh\nexec {sys.executable} \"$@\"\n")
    bench.put("env/bin/flaxdiff-train", f"#!/bin/sh\nexec {BIN / 'flaxdiff-train'} \"$@\" {TINY}\n")
    bench.put("uv", UV.replace("VENV", str(tmp_path / "env")))
    bench.put("bin/curl", f"#!/bin/sh\necho 'mkdir -p ~/.local/bin && cp {tmp_path}/uv ~/.local/bin/uv' > $4\n")
    bench.put("bin/mountpoint", "#!/bin/sh\ntest -L \"$2\"\n")
    bench.put("bin/gcsfuse", f"#!/bin/sh\nrmdir \"$3\" && ln -s {tmp_path}/buckets/\"$2\" \"$3\"\n")
    bench.says(workers=1)  # v5litepod-8 is one machine
    bench.env["PATH"] = f"{tmp_path / 'bin'}:{BIN}:{os.environ['PATH']}"
    lines = [line for line in recipe(name) if not line.startswith("flaxdiff-tpu delete")]
    if name == "52_flowers_tpu":
        lines += [line.removeprefix("$ ") for line in PRINTED.splitlines() if line.startswith("$ flaxdiff-tpu") and "train flowers" not in line and "delete" not in line]
        lines.insert(-1, "flaxdiff-tpu train flowers -- " + " ".join(flowers().LINE.replace("--out flowers-64", "--out my-bucket/flowers").split()))
    (train,) = (i for i, line in enumerate(lines) if " train " in line)
    def shell(lines):
        done = subprocess.run(["bash", "-e", "-c", "\n".join(lines)], env=bench.env, cwd=tmp_path, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout
    shell(lines[:train + 1])
    summary, log = tmp_path / "buckets" / "my-bucket" / "flowers" / "summary.json", tmp_path / "worker0" / "flaxdiff-train.log"
    end = time.monotonic() + 300
    while " steps, loss " not in log.read_text() and time.monotonic() < end: time.sleep(0.2)
    assert summary.exists(), log.read_text()[-3000:]
    assert "4 steps, loss" in shell(lines[train + 1:]) and json.loads(summary.read_text())["steps"] == 4
    assert (tmp_path / "worker0" / "tensorflow_datasets" / "oxford_flowers102").is_dir()


def test_the_drawings_have_the_features_of_the_photographs(drawn):
    import tensorflow_datasets as tfds
    mine = tfds.builder_from_directory(drawn / "oxford_flowers102" / "2.1.1", file_format="array_record").info
    features = {name: type(kind).__name__ for name, kind in mine.features.items()}
    assert features == {"image": "Image", "label": "ClassLabel", "file_name": "Text"} and mine.features["label"].num_classes == 102
    assert {name: split.num_examples for name, split in mine.splits.items()} == {"train": 8, "validation": 8, "test": 32}


def test_a_machine_without_tensorflow_reads_them(drawn, tmp_path):
    "As a TPU runtime of Colab is, once the folder has been copied there."
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'tensorflow'\")")
    program = "import sys; from flaxdiff import get_dataset; data, n = get_dataset('oxford_flowers102', 16, 16, data_dir=sys.argv[1]); print(n, next(data).shape)"
    done = subprocess.run([sys.executable, "-c", program, str(drawn)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"})
    assert done.stdout.strip() == "48 (16, 16, 16, 3)", done.stderr[-3000:]


@pytest.mark.slow
def test_the_toy_trains_and_resumes(drawn, tmp_path, capsys):
    "Two sessions leave what one does, bit for bit: parameters, losses, place in the data, grids."
    ends = []
    for run, epochs in (("one", [4]), ("two", [2, 4])):
        f, names = chapter("toy")
        names.update(DATA=drawn, RUN=tmp_path / run, steps=3)
        for until in epochs: trainer, data = f.go_on(until, every=2)
        grids = {p.name: p.read_bytes() for p in (tmp_path / run / "samples").glob("*.png")}
        ends.append((fingerprint(trainer.state.params), fingerprint(trainer.state.ema_params), trainer.losses, data.get_state(), grids))
    assert ends[0] == ends[1]
    assert capsys.readouterr().out.split() == "from update 0 from update 0 from update 6".split()
    losses, place, grids = ends[0][2:]
    assert len(losses) == 12 and np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    assert place["position"] == 12 * 16 and sorted(grids) == ["0000006.png", "0000012.png"]
    assert trainer.model.module == f.make_unet(f.s) and trainer.model.module.dtype == jnp.bfloat16 and ":" in trainer.name


@pytest.mark.slow
def test_the_line_at_toy_size(drawn, tmp_path, capsys):
    "The chapter's flaxdiff-train line on the drawings (of two flags of one name the later counts), and once more, when it is finished."
    small = f"--image-size 16 --features 24 --attention-levels 1 --res-blocks 1 --emb-features 32 --steps 6 --checkpoint-every 2 --quiet --data-dir {drawn} --out {tmp_path / 'run'}"
    words = [*flowers().LINE.split(), *small.split()]
    train_main(words)
    first = json.loads((tmp_path / "run" / "summary.json").read_text())
    train_main(words)  # finished: changes nothing
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == first and first["steps"] == 6 and np.isfinite(first["loss"])
    assert load_run(tmp_path / "run").model.image_shape == (16, 16, 3)
