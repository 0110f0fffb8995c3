"""The streams of `get_dataset`: the digits, folders and TensorFlow Datasets image sets that the tests write to disk themselves; prefetching, augmentation."""
import functools
import gzip
import importlib.util
import io
import json
import logging
import os
import struct
import subprocess
import sys
import tarfile
import textwrap
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from sklearn import datasets

from flaxdiff.data import arrays, captions, stream
from flaxdiff.data import folder as folder_module
from flaxdiff.data import pixels as module_pixels
from flaxdiff.data import tfds as module
from flaxdiff.data import (FileStream, ImageFolder, ImageStream, PrepareImage, TFDSStream, apply_augmentation, augment_image, augmentation_labels,
                           draw_augmentation, get_dataset, load_digits, prefetch_to_device, warp_image)
from flaxdiff.models.simple_unet import SimpleUNet
from flaxdiff.predictors import KarrasEDMPredictor
from flaxdiff.schedulers import EDMNoiseScheduler
from flaxdiff.trainer import DiffusionTrainer

# Pictures of which only the middle square has the colour (10 i, 200, 255 - 10 i); all around it is black.
RECIPES = """
import io, sys
import numpy as np
import tensorflow_datasets as tfds

def picture(i, channels=3):
    side, longer = 20 + i, 31 + 2 * i
    image = np.zeros((side, longer, channels), np.uint8)
    start = (longer - side) // 2
    image[:, start:start + side] = (10 * i, 200, 255 - 10 * i)[:channels]
    return image if i % 2 else image.swapaxes(0, 1)  # wide and high ones

class Recipe(tfds.core.GeneratorBasedBuilder):
    VERSION, skip_registration = tfds.core.Version("1.0.0"), True
    splits, with_label = {"train": range(11), "test": range(11, 17)}, True
    def _info(self):
        kinds = {"image": tfds.features.Image(encoding_format="png")}
        if self.with_label: kinds["label"] = tfds.features.ClassLabel(num_classes=60)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(kinds))
    def _split_generators(self, manager):
        return {name: self._generate_examples(numbers) for name, numbers in self.splits.items()}
    def _generate_examples(self, numbers):
        for i in numbers: yield i, {"image": picture(i), "label": i} if self.with_label else {"image": picture(i)}

class TinyPictures(Recipe): pass
class TinyUnlabelled(Recipe): with_label = False
class TinyDamaged(Recipe):  # bytes that are no picture among the others
    def _generate_examples(self, numbers):
        for i in numbers: yield i, {"image": io.BytesIO(b"no picture at all") if i in (3, 4, 12) else picture(i), "label": i}
class OxfordFlowers102(Recipe):  # stands for the real one, whose recipe is then found prepared
    VERSION, splits = tfds.core.Version("2.1.1"), {"train": range(3), "validation": range(3, 6), "test": range(6, 17)}

for kind in (TinyPictures, TinyUnlabelled, TinyDamaged, OxfordFlowers102):
    kind(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
TinyPictures(data_dir=sys.argv[2], file_format="tfrecord").download_and_prepare()
"""
M = 17  # pictures in TinyPictures


def python(program, *arguments, **environment):
    "Standard output of a program in a process of its own."
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)], capture_output=True, text=True,
                         env={**os.environ, "JAX_PLATFORMS": "cpu", **environment})
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    "(data sets in array_record format, one of them in tfrecord format)."
    for extra in ("tensorflow_datasets", "grain"): pytest.importorskip(extra)
    if importlib.util.find_spec("tensorflow") is None: pytest.skip("writing a data set needs TensorFlow")
    folder = tmp_path_factory.mktemp("tfds")
    script = folder / "tiny_recipes.py"
    script.write_text(RECIPES)
    run = subprocess.run([sys.executable, script, folder / "records", folder / "tf"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder / "records", folder / "tf"


def save_picture(path, i, captions=False):
    "A file of one colour, which says which it is: (10 i, 200, 255 - 10 i), wide or high."
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.broadcast_to(np.array([10 * i, 200, 255 - 10 * i], np.uint8), (20 + i, 31, 3) if i % 2 else (31, 20 + i, 3))
    Image.fromarray(colours).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
    if captions: path.with_suffix(".txt").write_text(f" picture {i}\n")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    "A folder of 17 pictures of every kind, in three folders, with captions beside them and things that are no pictures."
    pytest.importorskip("grain")
    folder = tmp_path_factory.mktemp("pictures")
    endings = ["png", "jpg", "JPEG", "webp", "bmp", "gif"]
    for i in range(M): save_picture(folder / ("cats", "dogs", "dogs/old")[i % 3] / f"{i:02d}.{endings[i % 6]}", i, captions=True)
    for hidden in (".hidden.png", ".cache/a.png", "cats/.01.png", "cats/notes.md", "cats/notes"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_bytes(b"no picture")
    return folder


FIND = functools.cache(module.find_tfds)  # a process for each question: asked once here


@pytest.fixture(params=["digits", "tiny_pictures", "folder"])
def opened(request, monkeypatch):
    "`get_dataset` of each kind, small enough to go through several epochs: (a function that opens it, the number of examples)."
    monkeypatch.setattr(module, "find_tfds", FIND)
    if request.param == "folder": name, rest = f"folder:{request.getfixturevalue('pictures')}", {}
    else: name, rest = request.param, {"data_dir": request.getfixturevalue("folders")[0]}
    def open(**arguments): return get_dataset(name, **{"batch_size": 5, "image_scale": 8, **rest, **arguments})[0]
    return open, 1797 if name == "digits" else M


def take(stream, n):
    "The next n batches."
    return [next(stream) for _ in range(n)]


def rows(batches):
    "One hashable thing for each image."
    return [image.tobytes() for batch in batches for image in batch]


# ---- every kind of stream

def test_a_seed_fixes_the_order_and_another_changes_it(opened):
    open, _ = opened
    first, same, other = (rows(take(open(seed=seed), 3)) for seed in (3, 3, 4))
    assert first == same
    assert first != other


def test_every_example_once_an_epoch_and_another_order_in_the_next(opened):
    open, M = opened
    data = open(batch_size=M)
    epochs = [rows([batch]) for batch in take(data, 3)]
    assert all(len(set(epoch)) == M for epoch in epochs)
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_line_does_not_depend_on_how_it_is_cut(opened):
    open, M = opened
    many = -(-2 * M // 5)
    assert rows(take(open(batch_size=5), many))[:2 * M] == rows(take(open(batch_size=M), 2))
    larger = next(open(batch_size=2 * M + 1))  # more than the data set holds
    assert len(larger) == 2 * M + 1 and rows([larger])[:2 * M] == rows(take(open(batch_size=M), 2))


@pytest.mark.parametrize("labels", [False, True])
def test_a_saved_position_goes_on_bit_for_bit(opened, labels):
    open, _ = opened
    data = open(seed=1, labels=labels)
    take(data, 7)
    state = json.dumps(data.get_state())  # plain data: it goes into a checkpoint as JSON
    expected = take(data, 8)
    again = open(seed=1, labels=labels)
    take(again, 2)
    for _ in range(2):  # forward, then back
        again.set_state(json.loads(state))
        for a, b in zip(expected, take(again, 8), strict=True):
            a, b = ([batch["image"], batch["label"]] if labels else [batch] for batch in (a, b))
            assert all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_state_of_another_order_is_refused(opened):
    open, M = opened
    state, data = open(seed=1).get_state(), open(seed=2)
    with pytest.raises(ValueError, match="seed 2"): data.set_state(state)
    with pytest.raises(ValueError, match=str(M)): data.set_state({**data.get_state(), "examples": M + 1})
    assert data.get_state()["position"] == 0


def test_images_are_float32_in_range_and_labels_int32(opened):
    open, M = opened
    for channels in (1, 3):
        batch = next(open(channels=channels, image_scale=12, labels=True, batch_size=6))
        assert batch.keys() == {"image", "label"}
        assert batch["image"].shape == (6, 12, 12, channels) and batch["image"].dtype == np.float32
        assert batch["image"].min() >= -1 and batch["image"].max() <= 1
        assert batch["label"].shape == (6,) and batch["label"].dtype == np.int32


@pytest.mark.parametrize("name", ["digits", "tiny_pictures"])
@pytest.mark.parametrize("bad, word", [
    (dict(image_scale=0), "image_scale"), (dict(image_scale=8.5), "image_scale"), (dict(channels=5), "channels"), (dict(channels=True), "channels"),
    (dict(batch_size=0), "batch_size"), (dict(batch_size=2.0), "batch_size"), (dict(seed=-1), "seed"), (dict(seed=None), "seed"),
    (dict(split="valid"), "split"), (dict(split=3), "split"), (dict(split=None), "split")])
def test_bad_arguments_are_named(name, bad, word, folders):
    with pytest.raises(ValueError, match=f"^{word} must"): get_dataset(name, **{"data_dir": folders[0], **bad})


@pytest.mark.parametrize("name", ["digits", "tiny_pictures", "folder"])
@pytest.mark.parametrize("bad, word", [
    (dict(labels="no"), "labels must be True or False, got 'no'"), (dict(labels=None), "labels must be True or False"),
    (dict(captions="no"), "captions must be True or False, got 'no'"), (dict(captions=0), "captions must be True or False"),
    (dict(max_damaged=-5), "max_damaged must be a whole number of at least 0, got -5"), (dict(max_damaged=1.5), "max_damaged must"),
    (dict(max_damaged=True), "max_damaged must"), (dict(data_dir=5), "data_dir must"), (dict(max_damaged=np.nan), "max_damaged must"),
    (dict(batch_size=np.nan), "batch_size must"), (dict(image_scale=np.nan), "image_scale must"), (dict(image_scale=-8), "image_scale must"),
    (dict(channels=np.nan), "channels must"), (dict(channels="3"), "channels must"), (dict(channels=3.0), "channels must"),
    (dict(seed=np.nan), "seed must"), (dict(seed=True), "seed must"), (dict(seed=2 ** 32), "seed must"), (dict(host=np.nan, hosts=2), "host must")])
def test_no_kind_of_data_takes_a_word_for_a_flag_or_nonsense_for_a_number(name, bad, word, request, monkeypatch):
    monkeypatch.setattr(module, "find_tfds", FIND)
    where = {} if name == "folder" else {"data_dir": request.getfixturevalue("folders")[0]}
    name = f"folder:{request.getfixturevalue('pictures')}" if name == "folder" else name
    with pytest.raises(ValueError, match=f"^{word}"): get_dataset(name, **{**where, **bad})


def test_the_parts_check_their_flags_and_numbers_too(pictures):
    images = np.zeros((3, 8, 8, 1), np.float32)
    for words, make in (("with_labels must be True or False", lambda: ImageStream(images, np.zeros(3), 1, with_labels="no")),
                        ("with_labels must be True or False", lambda: PrepareImage(8, 3, with_labels="no")),
                        ("with_text must be True or False", lambda: PrepareImage(8, 3, with_text="no")),
                        ("image_scale must", lambda: PrepareImage(np.nan, 3)), ("channels must", lambda: PrepareImage(8, 5)),
                        ("labels must be True or False", lambda: ImageFolder(pictures, labels="no")),
                        ("captions must be True or False", lambda: ImageFolder(pictures, captions="no")),
                        ("labels must be True or False", lambda: module.find_tfds("tiny_pictures", labels="no")),
                        ("threads must", lambda: FileStream(images, lambda x: x, 1, threads=0)),
                        ("image_scale must", lambda: load_digits(-1)), ("channels must", lambda: load_digits(8, np.nan))):
        with pytest.raises(ValueError, match=f"^{words}"): make()
    assert PrepareImage(np.int64(8), np.int64(3)).channels == 3 and PrepareImage(8, 3, np.True_).with_labels is True


@pytest.mark.parametrize("option", [{"threads": 0}, {"threads": "two"}, {"max_damaged": -1}, {"background": "no such colour"}, {"background": (1, 2)}])
def test_options_of_picture_files_are_checked_for_data_in_memory_too(option, tmp_path):
    "One call serves every kind of data: what the digits have no use for must still make sense."
    with pytest.raises(ValueError, match=f"^{next(iter(option))} must be"): get_dataset("digits", **option)


def test_a_folder_that_is_not_there_is_not_ignored_for_the_digits(tmp_path):
    with pytest.raises(ValueError, match="^data_dir must be None for the digits.*'/nope'"): get_dataset("digits", data_dir="/nope")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="^data_dir must"): get_dataset("digits", data_dir=tmp_path / "file")
    assert get_dataset("digits", data_dir=str(tmp_path), max_damaged=0)[1] == 1797  # one call for every kind of data, as scripts make


def test_whole_numbers_are_no_images():
    for dtype in (np.uint8, np.int32, bool):
        with pytest.raises(ValueError, match="^images must be floating point in \\[-1, 1\\], got .*127.5 - 1"): ImageStream(np.zeros((3, 8, 8, 1), dtype), None, 1)
    for images in (np.zeros((3, 8, 8, 1), np.float16), jnp.zeros((3, 8, 8, 1), jnp.bfloat16), np.arange(3)):  # the last: places of a line
        assert len(next(ImageStream(images, None, 2))) == 2
    pytest.importorskip("grain")
    stored = np.full((3, 8, 8, 1), 255, np.uint8)  # bytes on disk, which the transform makes images of
    assert next(FileStream(stored, lambda x: x / np.float32(127.5) - 1, 2)).max() == 1


def test_what_does_not_fit_into_memory_is_refused_with_its_size(monkeypatch, pictures):
    monkeypatch.setattr(stream, "machine_memory", lambda: 8_000_000_000)
    with pytest.raises(ValueError, match="^image_scale must be smaller: 1,797 digits of 3000×3000×1 .* would take 194.1 GB of memory, and this machine has 8.0 GB"):
        get_dataset("digits", image_scale=3000)
    for name in ("digits", f"folder:{pictures}"):
        with pytest.raises(ValueError, match="^batch_size.* must be smaller: .* GB of memory"): get_dataset(name, batch_size=10 ** 12)
    with pytest.raises(ValueError, match="image_scale must be smaller: a batch of 16 pictures of 20000×20000×3 .* 76.8 GB"): get_dataset(f"folder:{pictures}", image_scale=20_000)
    monkeypatch.setattr(stream, "machine_memory", lambda: None)  # a system that does not say
    assert get_dataset("digits", image_scale=9)[1] == 1797
    monkeypatch.undo()
    assert 1e8 < stream.machine_memory() < 1e15


@pytest.mark.parametrize("position", [-5, np.nan, 1.5, None, "0", True, [0]])
def test_a_place_in_a_state_is_a_whole_number(opened, position):
    data = opened[0]()
    next(data)
    with pytest.raises(ValueError, match="state"): data.set_state({**data.get_state(), "position": position})
    for state in (None, 5, {}, [0]):
        with pytest.raises(ValueError, match="^state must"): data.set_state(state)
    assert data.get_state()["position"] == 5


@pytest.mark.parametrize("name", [None, 5, b"digits"])
def test_a_name_is_a_string(name):
    with pytest.raises(ValueError, match="^name must"): get_dataset(name)


# ---- several hosts

def columns(batch): return list(batch.values()) if isinstance(batch, dict) else [batch]


@pytest.mark.parametrize("H", [1, 2, 3, 4, 6, 12])
def test_the_hosts_shares_side_by_side_are_the_one_hosts_batch(opened, H):
    open, M = opened
    alone, hosts = open(batch_size=12, labels=True, host=0, hosts=1), [open(batch_size=12, labels=True, host=h, hosts=H) for h in range(H)]
    for _ in range(4):  # past two ends of an epoch of 17
        whole, shares = next(alone), [next(host) for host in hosts]
        assert all(len(share["image"]) == 12 // H for share in shares)
        for k in whole: assert np.array_equal(np.concatenate([share[k] for share in shares]), whole[k])
        assert all(host.get_state() == alone.get_state() for host in hosts)


def test_a_run_goes_on_with_another_number_of_hosts(opened):
    open, _ = opened
    expected = rows(take(open(batch_size=12, seed=2), 9))
    found, state = [], open(batch_size=12, seed=2).get_state()
    for H in (2, 1, 6):
        hosts = [open(batch_size=12, seed=2, host=h, hosts=H) for h in range(H)]
        for host in hosts: host.set_state(json.loads(json.dumps(state)))
        for _ in range(3): found += [image for host in hosts for image in rows([next(host)])]
        state, = {json.dumps(host.get_state()) for host in hosts}
        state = json.loads(state)
    assert found == expected and state == {"position": 9 * 12, "seed": 2, "examples": state["examples"]}


class Counted:
    "A source that notes which of its examples are read."
    def __init__(self, M): self.M, self.read = M, []
    def __len__(self): return self.M
    def __getitem__(self, i):
        self.read.append(int(i))
        return np.float32(i)


def test_a_host_reads_nothing_but_its_rows():
    pytest.importorskip("grain")
    sources = [Counted(1000) for _ in range(4)]
    streams = [FileStream(source, lambda x: x, 8, threads=1, host=h, hosts=4) for h, source in enumerate(sources)]
    handed = [np.concatenate([next(stream) for _ in range(20)]).tolist() for stream in streams]
    for source, mine in zip(sources, handed): assert source.read[:40] == mine  # in order: one thread
    assert len(set(sum(handed, []))) == 160


def test_the_next_epoch_is_read_before_this_one_ends():
    pytest.importorskip("grain")
    source = Counted(10)
    stream = FileStream(source, lambda x: x, 10, threads=2)
    next(stream)
    for _ in range(500):
        if len(source.read) >= 40: break
        time.sleep(0.01)
    assert len(source.read) >= 40 and stream.get_state()["position"] == 10


def test_the_hosts_are_jaxs_processes_by_default(opened, monkeypatch):
    open, _ = opened
    whole = next(open(batch_size=12))
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    assert np.array_equal(next(open(batch_size=12)), whole[8:])


@pytest.mark.parametrize("bad, word", [(dict(host=0, hosts=2), "batch_size must divide by the number of hosts, 2"), (dict(host=2, hosts=2, batch_size=4), "host must"),
                                       (dict(host=-1, hosts=5), "host must"), (dict(host=True, hosts=5), "host must"), (dict(host=0, hosts=0), "hosts must"),
                                       (dict(host=1), "host and hosts must"), (dict(hosts=1), "host and hosts must")])
def test_bad_hosts_are_named(opened, bad, word):
    with pytest.raises(ValueError, match=f"^{word}"): opened[0](**bad)


def test_the_order_of_the_digits_is_that_of_the_first_release():
    data = get_dataset("digits", batch_size=6, labels=True)[0]
    labels = np.concatenate([next(data)["label"] for _ in range(600)])
    order = np.concatenate([np.random.default_rng((0, epoch)).permutation(1797) for epoch in range(3)])[:3600]
    assert np.array_equal(labels, load_digits()[1][order]) and data.get_state() == {"position": 3600, "seed": 0, "examples": 1797}


def test_the_order_of_files_is_that_of_the_first_release(folders):
    "Checkpoints of it go on: grain's shuffle of the source itself, in batches."
    import grain
    data = get_dataset("tiny_pictures", batch_size=5, seed=3, image_scale=8, labels=True, data_dir=folders[0])[0]
    source = module.open_tfds("tiny_pictures", data_dir=folders[0])
    expected = grain.MapDataset.source(source).seed(3).shuffle().repeat()
    assert np.concatenate([next(data)["label"] for _ in range(12)]).tolist() == [int(expected[j]["label"]) for j in range(60)]
    assert TFDSStream is FileStream


# ---- the digits

def test_digits_are_scikit_learns():
    images, labels = load_digits()
    digits = datasets.load_digits()
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.float32
    assert np.array_equal((images[..., 0] + 1) * 8, digits.images) and np.array_equal(labels, digits.target)
    assert images.min() == -1 and images.max() == 1
    assert get_dataset("digits")[1] == 1797 and next(get_dataset("digits", batch_size=4)[0]).shape == (4, 8, 8, 1)


def test_digits_keep_their_labels():
    images, labels = load_digits()
    of = {image.tobytes(): label for image, label in zip(images, labels)}
    batch = next(get_dataset("digits", batch_size=300, labels=True)[0])
    assert [of[image.tobytes()] for image in batch["image"]] == batch["label"].tolist()


def test_digits_in_colour_and_at_another_size():
    grey, colour = load_digits(image_scale=32)[0], load_digits(image_scale=32, channels=3)[0]
    assert grey.shape == (1797, 32, 32, 1) and np.array_equal(colour, np.repeat(grey, 3, -1))
    assert grey.min() >= -1 and grey.max() <= 1
    small = load_digits()[0]
    assert np.corrcoef(grey.reshape(1797, 8, 4, 8, 4).mean((2, 4)).ravel(), small.ravel())[0, 1] > 0.98  # upright, not mirrored


def test_digits_need_none_of_the_extras():
    found = python("""
        import sys
        from flaxdiff import get_dataset
        next(get_dataset("digits")[0])
        print([m for m in ("tensorflow", "tensorflow_datasets", "grain") if m in sys.modules])""")
    assert found.strip() == "[]"


def test_a_stream_checks_its_arrays():
    with pytest.raises(ValueError, match="images"): ImageStream(np.zeros((0, 8, 8, 1)), None, 4)
    with pytest.raises(ValueError, match="labels"): ImageStream(np.zeros((3, 8, 8, 1)), np.zeros(2), 4, with_labels=True)
    with pytest.raises(ValueError, match="labels"): ImageStream(np.zeros((3, 8, 8, 1)), None, 4, with_labels=True)


# ---- TensorFlow Datasets

def test_tfds_is_read_without_tensorflow(folders):
    found = json.loads(python("""
        import json, sys
        import numpy as np
        from flaxdiff import get_dataset
        data, datalen = get_dataset("tiny_pictures", batch_size=6, image_scale=16, labels=True, data_dir=sys.argv[1])
        batches = [next(data) for _ in range(6)]
        data.set_state(data.get_state())
        image = next(data)["image"]
        print(json.dumps([datalen, image.shape, str(image.dtype), "tensorflow" in sys.modules]))""", folders[0]).splitlines()[-1])
    assert found == [M, [6, 16, 16, 3], "float32", False]


@pytest.mark.parametrize("size", [8, 64])  # smaller than the pictures, and larger
def test_the_middle_square_is_what_is_kept(folders, size):
    batch = next(get_dataset("tiny_pictures", batch_size=M, image_scale=size, labels=True, data_dir=folders[0])[0])
    assert sorted(batch["label"]) == list(range(M))
    for image, i in zip(batch["image"], batch["label"]):
        expected = np.array([10 * i, 200, 255 - 10 * i], np.float32) / 127.5 - 1
        assert np.array_equal(image, np.broadcast_to(expected, image.shape))  # a picture of one colour stays so, to the last bit


def test_grey_is_the_luminance(folders):
    batch = next(get_dataset("tiny_pictures", batch_size=M, channels=1, image_scale=8, labels=True, data_dir=folders[0])[0])
    luminance = [0.299 * 10 * i + 0.587 * 200 + 0.114 * (255 - 10 * i) for i in batch["label"]]  # ITU-R BT.601
    assert abs((batch["image"].mean((1, 2, 3)) + 1) * 127.5 - luminance).max() <= 1  # rounded to a byte


@pytest.mark.parametrize("split, examples", [("all", range(17)), ("train", range(11)), ("test", range(11, 17)), ("train+test", range(17))])
def test_splits(folders, split, examples):
    data, datalen = get_dataset("tiny_pictures", batch_size=17, image_scale=8, labels=True, split=split, data_dir=folders[0])
    assert datalen == len(examples)
    assert set(next(data)["label"]) == set(examples)


def test_part_of_a_split_and_none_of_it(folders):
    assert get_dataset("tiny_pictures", split="train[:4]", data_dir=folders[0])[1] == 4
    for split in ("train[:0]", "train[:12]", "train[:x]", ""):
        with pytest.raises(ValueError, match="made of train, test, with at least one example"): get_dataset("tiny_pictures", split=split, data_dir=folders[0])


def test_a_name_with_a_recipe_of_tfds_own(folders):
    "oxford_flowers102 is in TFDS's catalogue; what lies on disk under its name and version is read, all three splits of it."
    data, datalen = get_dataset("oxford_flowers102", batch_size=17, image_scale=64, data_dir=str(folders[0]))
    assert datalen == 17 and next(data).shape == (17, 64, 64, 3) and len(set(rows([next(data)]))) == 17


def test_a_position_inside_a_batch_is_refused(folders):
    data, _ = get_dataset("tiny_pictures", batch_size=4, data_dir=folders[0])
    with pytest.raises(ValueError, match="between batches of 4"): data.set_state({**data.get_state(), "position": 6})


@pytest.mark.parametrize("name", ["no_such_flowers", "not a name", "", "Digits", "tiny_pictures:7.0.0"])
def test_an_unknown_name_is_told_shortly(name, folders):
    with pytest.raises(ValueError) as error: get_dataset(name, data_dir=folders[0])
    assert repr(name) in str(error.value) and "name must be 'digits', 'folder:PATH' or one of tensorflow.org/datasets/catalog" in str(error.value)
    assert len(str(error.value)) < 300 and "abstract_reasoning" not in str(error.value)  # not the thousand names of TFDS


def test_what_cannot_be_fetched_is_told_soon(tmp_path, monkeypatch, capfd):
    "A proxy that nobody listens at: there is no network, whatever the machine has."
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"): monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("NO_PROXY", "no_proxy"): monkeypatch.delenv(variable, raising=False)
    start = time.monotonic()
    with pytest.raises(ValueError) as error: get_dataset("oxford_flowers102", data_dir=tmp_path)
    assert time.monotonic() - start < 100  # about 5 s; left to itself TFDS tries for 200
    for word in ("'oxford_flowers102'", "127.0.0.1", "network", "tensorflow-cpu", "data_dir="): assert word in str(error.value)
    assert len(str(error.value)) < 700


def test_tfrecord_files_are_refused_with_advice(folders):
    with pytest.raises(ValueError, match="cannot read name='tiny_pictures'.*array_record"): get_dataset("tiny_pictures", data_dir=folders[1])


def test_labels_that_are_not_there(folders):
    assert next(get_dataset("tiny_unlabelled", image_scale=8, data_dir=folders[0])[0]).shape == (16, 8, 8, 3)
    with pytest.raises(ValueError, match="labels=True needs a 'label'"): get_dataset("tiny_unlabelled", labels=True, data_dir=folders[0])


def test_data_without_images_is_refused_before_it_is_fetched(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match="has no 'image' of bytes, only .*title"): get_dataset("ag_news_subset", data_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("extra", ["tensorflow_datasets", "grain"])
def test_a_missing_extra_is_named(extra, monkeypatch):
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(ValueError, match="'oxford_flowers102' needs TensorFlow Datasets and grain: pip install tensorflow-datasets grain pillow"):
        get_dataset("oxford_flowers102")


def test_a_recipe_that_dies_is_told(monkeypatch, folders):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="its process ended with code 1"): module.find_tfds("tiny_pictures", folders[0])


# ---- folders

def test_a_folder_is_read_whole_and_right(pictures):
    data, datalen = get_dataset(f"folder:{pictures}", batch_size=M, image_scale=8, labels=True, captions=True)
    assert datalen == M and data.label_names == ["cats", "dogs"] and data.damaged == {}
    batch = next(data)
    assert list(batch) == ["image", "label", "text"] and batch["image"].shape == (M, 8, 8, 3) and batch["image"].dtype == np.float32
    assert batch["label"].dtype == np.int32 and batch["text"].dtype == object and batch["text"].shape == (M,)
    assert all(isinstance(text, str) for text in batch["text"])
    numbers = [int(text.removeprefix("picture ")) for text in batch["text"]]
    assert sorted(numbers) == list(range(M))
    for image, label, i in zip(batch["image"], batch["label"], numbers):
        assert label == (i % 3 > 0)
        expected = np.array([10 * i, 200, 255 - 10 * i]) / 127.5 - 1
        assert abs(image - expected).max() < 4 / 127.5, i  # a JPEG, in which colours are rounded


def test_a_folder_is_sorted_by_path_and_its_batches_are_what_is_asked_for(pictures):
    folder = ImageFolder(pictures)
    assert folder.files == sorted(folder.files) and len(folder) == M and not any("/." in f or f.startswith(".") for f in folder.files)
    assert isinstance(next(get_dataset(f"folder:{pictures}", image_scale=8)[0]), np.ndarray)
    assert set(next(get_dataset(f"folder:{pictures}", image_scale=8, captions=True)[0])) == {"image", "text"}
    assert set(next(get_dataset(f"folder:{pictures}", image_scale=8, labels=True)[0])) == {"image", "label"}
    assert next(get_dataset(f"folder:{pictures}", image_scale=8, channels=1)[0]).shape == (16, 8, 8, 1)


def test_the_first_frame_of_a_moving_picture(tmp_path):
    frames = [Image.fromarray(np.full((9, 9, 3), v, np.uint8)) for v in (255, 0, 0)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert next(get_dataset(f"folder:{tmp_path}", 1, 8)[0]).min() == 1


def test_captions_of_a_table(tmp_path):
    for i in range(3): save_picture(tmp_path / "a" / f"{i}.png", i, captions=True)
    table = tmp_path / "metadata.jsonl"
    texts = ["zwei Löwen\u2028 und\nmehr", "", "one 1"]
    table.write_text("".join(json.dumps({"file_name": f"./a/{i}.png" if i else "a/0.png", "text": text, "more": 1}, ensure_ascii=False) + "\n" for i, text in enumerate(texts)) + "\n", "utf-8")
    batch = next(get_dataset(f"folder:{tmp_path}", 3, 8, captions=True)[0])
    assert sorted(batch["text"]) == sorted(texts)  # of the table, not of the files beside the pictures
    for line, word in (("{", "JSONDecodeError"), ('{"file_name": "a/0.png"}', "KeyError: 'text'"), ('{"file_name": "a/0.png", "text": 5}', "must be a string, got 5"),
                       ("[]", "TypeError"), ('{"file_name": "a/0.png", "text": "another"}', "second caption")):
        table.write_text(json.dumps({"file_name": "a/0.png", "text": "one"}) + "\n" + line, "utf-8")
        with pytest.raises(ValueError, match=f"line 2 of .*metadata.jsonl .*{word}"): get_dataset(f"folder:{tmp_path}", captions=True)
    table.write_text(json.dumps({"file_name": "a/0.png", "text": "one"}))
    with pytest.raises(ValueError, match="2 of 3 have none in metadata.jsonl, such as 'a/1.png'"): get_dataset(f"folder:{tmp_path}", captions=True)


def test_captions_that_are_missing_or_no_text(tmp_path):
    for i in range(3): save_picture(tmp_path / f"{i}.png", i, captions=i > 0)
    with pytest.raises(ValueError, match="captions=True needs a caption for every picture; 1 of 3 have none .*such as '0.png'"): get_dataset(f"folder:{tmp_path}", captions=True)
    (tmp_path / "0.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8.*0.txt"): get_dataset(f"folder:{tmp_path}", captions=True)


def test_what_is_wrong_with_a_folder_is_said(tmp_path, pictures, folders):
    for name, word in (("folder:", "must name a folder"), (f"folder:{tmp_path / 'none'}", "must name a folder of pictures, got '.*none'"), (f"folder:{tmp_path}", "holds no picture")):
        with pytest.raises(ValueError, match=word): get_dataset(name)
    save_picture(tmp_path / "a" / "1.png", 1)
    save_picture(tmp_path / "loose.png", 2)
    with pytest.raises(ValueError, match="labels=True .*'loose.png' lies in none"): get_dataset(f"folder:{tmp_path}", labels=True)
    assert get_dataset(f"folder:{tmp_path}")[0].label_names is None and get_dataset(f"folder:{tmp_path}")[1] == 2
    with pytest.raises(ValueError, match="^split must be 'all' for a folder"): get_dataset(f"folder:{pictures}", split="train")
    with pytest.raises(ValueError, match="^data_dir must be None for a folder"): get_dataset(f"folder:{pictures}", data_dir="x")
    for rest in (dict(captions=True), dict(encoder=WordEncoder())):
        with pytest.raises(ValueError, match="^captions must be False and encoder None"): get_dataset("tiny_pictures", data_dir=folders[0], **rest)


def test_a_folder_needs_grain_and_says_so(pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ValueError, match="needs grain: pip install grain pillow"): get_dataset(f"folder:{pictures}")


def test_label_names(folders):
    assert get_dataset("digits")[0].label_names == list("0123456789")
    assert get_dataset("tiny_pictures", data_dir=folders[0])[0].label_names == [str(i) for i in range(60)]
    assert get_dataset("tiny_unlabelled", data_dir=folders[0])[0].label_names is None


# ---- damaged examples

@pytest.fixture
def broken(tmp_path):
    "23 pictures, of which three are damaged: a JPEG and a PNG cut short, and a file of something else."
    pytest.importorskip("grain")
    for i in range(23): save_picture(tmp_path / "ab"[i % 2] / f"{i:02d}.{'jpg' if i % 3 else 'png'}", i, captions=True)
    jpeg, png, garbage = tmp_path / "a" / "04.jpg", tmp_path / "b" / "15.png", tmp_path / "b" / "21.png"
    for file in (jpeg, png): file.write_bytes(file.read_bytes()[:-40])
    garbage.write_bytes(b"this is no picture" * 40)
    return tmp_path, {"a/04.jpg", "b/15.png", "b/21.png"}


def test_damaged_files_are_named_skipped_and_counted_once(broken, caplog):
    folder, names = broken
    data, datalen = get_dataset(f"folder:{folder}", 23, 8, labels=True, captions=True)
    with caplog.at_level(logging.WARNING, "flaxdiff.data"): batches = take(data, 4)
    assert datalen == 23 and set(data.damaged.values()) == names and data.get_state()["position"] == 4 * 23
    said = [record.getMessage() for record in caplog.records if record.name == "flaxdiff.data"]
    assert len(said) == 3 and all(sum(f"example {i} is damaged and skipped: {name}" in line for line in said) == 1 for i, name in data.damaged.items())
    files = ImageFolder(folder).files
    stands_for = {file: next(f for f in files[i:] + files if f not in names) for i, file in enumerate(files)}
    expected = sorted(f"picture {int(f[2:4])}" for f in stands_for.values())
    for batch in batches: assert sorted(batch["text"]) == expected  # each epoch: the next readable file in the place of each damaged one
    for batch in batches: assert all(label == int(text.split()[1]) % 2 for text, label in zip(batch["text"], batch["label"]))


def test_damage_moves_nobody_else(broken):
    folder, names = broken
    sound = {f: (folder / f).read_bytes() for f in names}
    def texts(hosts): return [sum((next(host)["text"].tolist() for host in hosts), []) for _ in range(6)]
    def open(H): return [get_dataset(f"folder:{folder}", 8, 8, captions=True, host=h, hosts=H)[0] for h in range(H)]
    skipped = texts(open(1))
    assert skipped == texts(open(2)) == texts(open(8))  # whoever reads, and however much of it
    late = open(1)[0]
    late.set_state({**late.get_state(), "position": 16})
    assert texts([late])[:4] == skipped[2:]
    for f in sound: save_picture(folder / f, int(f[2:4]))
    whole, gone = texts(open(1)), {f"picture {int(f[2:4])}" for f in names}
    assert gone <= set(sum(whole, []))
    for a, b in zip(sum(skipped, []), sum(whole, [])): assert b in gone and a not in gone or a == b


def test_damaged_bytes_in_a_tfds_set(folders, caplog):
    data, _ = get_dataset("tiny_damaged", batch_size=M, image_scale=8, labels=True, data_dir=folders[0])
    labels = [sorted(next(data)["label"].tolist()) for _ in range(3)]
    names = {data.images[i]["label"]: name for i, name in data.damaged.items()}
    assert names.keys() == {3, 4, 12} and all(name == f"tiny_damaged all[{i}]" for i, name in data.damaged.items())
    assert labels[0] == labels[1] == labels[2] and len(labels[0]) == M and len(set(labels[0])) == M - 3
    assert all(name in caplog.text for name in names.values())


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_too_many_damaged_examples_stop_the_run(broken, limit):
    folder, names = broken
    data, _ = get_dataset(f"folder:{folder}", 4, 8, max_damaged=limit)
    with pytest.raises(ValueError, match=f"of 23 examples are damaged, where max_damaged is {limit}: [ab]/") as error: take(data, 20)
    assert int(str(error.value).split()[0]) == len(data.damaged) > limit and any(name in str(error.value) for name in names)
    stopped = data.get_state()
    assert stopped["position"] < 23 + 4
    with pytest.raises(ValueError, match="damaged"): next(data)  # it stays so
    assert data.get_state() == stopped
    assert take(get_dataset(f"folder:{folder}", 4, 8, max_damaged=3)[0], 20)


def test_the_limit_is_one_per_cent_and_at_least_ten():
    pytest.importorskip("grain")
    for M, limit in ((5, 10), (999, 10), (2345, 23)): assert FileStream(np.zeros((M, 2, 2, 1)), lambda x: x, 1).max_damaged == limit
    for bad in (-1, 1.5, True, "3"):
        with pytest.raises(ValueError, match="^max_damaged must"): FileStream(np.zeros((5, 2, 2, 1)), lambda x: x, 1, max_damaged=bad)


def test_a_folder_of_nothing_but_garbage(tmp_path):
    for i in range(3): (tmp_path / f"{i}.png").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="^3 of 3 examples are damaged.*0.png"): next(get_dataset(f"folder:{tmp_path}", 2, 8)[0])


# ---- to the device

def test_prefetched_batches_are_the_same_and_on_the_device(opened):
    open, _ = opened
    expected, ahead = take(open(labels=True), 8), prefetch_to_device(open(labels=True), ahead=3)
    for a, b in zip(expected, take(ahead, 8)):
        assert all(isinstance(x, jax.Array) and np.array_equal(x, y) for x, y in zip(columns(b), columns(a), strict=True))


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_a_prefetched_stream_says_what_was_consumed(opened, ahead):
    open, _ = opened
    plain, data = open(seed=1), prefetch_to_device(open(seed=1), ahead)
    for _ in range(7):
        assert data.get_state() == plain.get_state()
        assert np.array_equal(next(data), next(plain))
    assert data.data.get_state()["position"] == plain.get_state()["position"] + 5 * ahead  # it did read on
    state = json.dumps(data.get_state())
    expected = [np.asarray(x) for x in take(data, 4)]
    data.set_state(json.loads(state))
    assert data.get_state() == json.loads(state)
    assert all(np.array_equal(a, b) for a, b in zip(expected, take(data, 4), strict=True))
    with pytest.raises(ValueError, match="seed 1"): data.set_state({**data.get_state(), "seed": 2})
    plain.set_state(data.get_state())
    assert np.array_equal(next(data), next(plain))  # a refused state moved nothing


def test_prefetching_a_plain_iterator():
    batches = [np.full((2, 3), i, np.float32) for i in range(5)]
    data = prefetch_to_device(batches)
    assert not hasattr(data, "get_state") and not hasattr(data, "set_state")
    assert [float(b[0, 0]) for b in data] == [0, 1, 2, 3, 4] and next(data, None) is None

    def breaks():
        yield from batches[:2]
        raise OSError("the disk is gone")
    data = prefetch_to_device(breaks(), ahead=4)
    assert len(take(data, 2)) == 2  # what was good is handed out first
    with pytest.raises(OSError, match="gone"): next(data)
    for bad in (0, 1.5, True, np.nan, "2"):
        with pytest.raises(ValueError, match="^ahead must"): prefetch_to_device(batches, ahead=bad)
    for bad in ("cpu", 0, True, jax.devices()):
        with pytest.raises(ValueError, match="^place must"): prefetch_to_device(batches, place=bad)
    with pytest.raises(ValueError, match="^data must"): prefetch_to_device(5)


def test_an_error_ahead_does_not_move_the_state(broken):
    data = prefetch_to_device(get_dataset(f"folder:{broken[0]}", 4, 8, max_damaged=0)[0], ahead=3)
    consumed = 0
    with pytest.raises(ValueError, match="damaged"):
        while True: next(data); consumed += 4
    assert data.get_state()["position"] == consumed


def test_captions_stay_on_the_host(pictures):
    batch = next(prefetch_to_device(get_dataset(f"folder:{pictures}", 4, 8, labels=True, captions=True)[0]))
    assert isinstance(batch["image"], jax.Array) and isinstance(batch["label"], jax.Array) and batch["text"].dtype == object
    assert next(prefetch_to_device([{"image": np.zeros(2), "text": ["a", "b"]}]))["text"] == ["a", "b"]


def test_prefetching_onto_several_devices():
    found = python("""
        import jax, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec
        from flaxdiff.data import get_dataset, prefetch_to_device
        place = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
        one, two = next(get_dataset("digits")[0]), next(prefetch_to_device(get_dataset("digits")[0], place=place))
        last = next(prefetch_to_device(get_dataset("digits")[0], place=jax.devices()[1]))
        print(two.sharding == place, [shard.data.shape[0] for shard in two.addressable_shards], np.array_equal(one, two), last.devices() == {jax.devices()[1]})""",
        XLA_FLAGS=f"--xla_force_host_platform_device_count=2 {os.environ['XLA_FLAGS']}")
    assert found.strip() == "True [8, 8] True True"


# ---- augmentation

def noise(shape, dtype=jnp.float32): return jax.random.uniform(jax.random.PRNGKey(5), shape, dtype, -1, 1)
def only(**values): return jnp.array([values.get(f"a{k}", 0) for k in range(8)], jnp.float32)


SHAPES = [(12, 12, 3), (9, 14, 1), (8, 5, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_flips_and_nothing_are_exact(shape):
    image = noise(shape)
    for a, expected in ((only(), image), (only(a0=1), image[:, ::-1]), (only(a1=1), image[::-1]), (only(a0=1, a1=1), image[::-1, ::-1])):
        assert np.array_equal(jax.jit(apply_augmentation)(image, a), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_whole_pixels_move_by_whole_pixels(shape):
    H, W, _ = shape
    image = noise(shape)
    moved = apply_augmentation(image, only(a6=8 * 3 / W, a7=-8 * 2 / H))  # right by 3, up by 2
    expected = np.pad(image, ((0, 2), (3, 0), (0, 0)), mode="reflect")[2:, :W]
    assert abs(moved - expected).max() < 1e-5


@pytest.mark.parametrize("turns", [1, 2, -1])
def test_quarter_turns_are_np_rot90(turns):
    image = noise((13, 13, 3))
    assert abs(apply_augmentation(image, only(a3=turns * np.pi / 2)) - np.rot90(image, turns)).max() < 1e-5


def wave(x, y): return 0.4 * np.cos(0.5 * x + 0.3 * y) + 0.3 * np.sin(0.2 * x - 0.4 * y)  # wavelengths of 10 pixels and more


def linear(a):
    "The forward matrix of (x, y), as the paper's table lists its factors: S, then R, then A."
    turn = lambda t: np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]])
    return turn(-a[4]) @ np.diag([2 ** (0.2 * a[5]), 2 ** (-0.2 * a[5])]) @ turn(a[4]) @ turn(-a[3]) * 2 ** (0.2 * a[2])


@pytest.mark.parametrize("a", [dict(a2=1.3), dict(a2=-0.8), dict(a3=0.7), dict(a4=0.9, a5=1.1), dict(a6=0.3, a7=-0.21), dict(a2=0.6, a3=-2.2, a4=2.5, a5=-0.7, a6=0.4, a7=0.2)])
def test_a_warp_is_the_tables_transformation(a):
    "A function of the plane, drawn, warped, and drawn warped: they agree wherever no mirrored edge is seen."
    n, a = 48, np.asarray(only(**a))
    y, x = np.mgrid[:n, :n] - (n - 1) / 2
    shift = a[6:] * n / 8
    back = np.linalg.inv(linear(a))
    qx, qy = np.einsum("ij,jhw->ihw", back, np.stack([x - shift[0], y - shift[1]]))
    warped = np.asarray(apply_augmentation(jnp.asarray(wave(x, y), jnp.float32)[..., None], jnp.asarray(a)))[..., 0]
    inside = (abs(qx) < n / 2 - 3) & (abs(qy) < n / 2 - 3)
    error = abs(warped - wave(qx, qy))[inside].max()
    assert inside.mean() > 0.3 and error < 0.012  # Keys' kernel on waves of 10 pixels; bilinear errs by 0.03 and more
    bilinear = jax.scipy.ndimage.map_coordinates(jnp.asarray(wave(x, y)), [qy + (n - 1) / 2, qx + (n - 1) / 2], 1)
    assert error < 0.5 * abs(bilinear - wave(qx, qy))[inside].max()


def test_edges_are_mirrored_and_the_range_is_kept():
    image = noise((6, 7, 2))
    far = warp_image(image, jnp.eye(2), jnp.array([12.0, 10.0]))  # whole periods of the mirrored image: 2 (7 - 1), 2 (6 - 1)
    assert abs(far - image).max() < 1e-5
    out = jax.jit(jax.vmap(lambda key: augment_image(key, image, 1.0)[0]))(jax.random.split(jax.random.PRNGKey(0), 200))
    assert out.min() >= image.min() and out.max() <= image.max() and jnp.isfinite(out).all()


def test_half_a_pixel_at_a_mirrored_edge():
    "Keys' weights halfway between pixels are -1/16, 9/16, 9/16, -1/16; beyond the edge stands the image without its outermost pixel."
    image = noise((5, 9, 2))
    padded = np.pad(image, ((0, 0), (4, 4), (0, 0)), mode="reflect")
    expected = sum(w * padded[:, k:k + 9] for w, k in zip((-1, 9, 9, -1), (2, 3, 4, 5))) / 16  # the image moved right by 1/2
    assert abs(warp_image(image, jnp.eye(2), jnp.array([0.5, 0.0])) - np.clip(expected, image.min(), image.max())).max() < 1e-5


def test_labels_say_what_was_done():
    a = np.array([1, 0, 0.3, 0.5, 0.7, 1.1, -0.2, 0.4])
    due = [1, 0, 0.3, np.cos(0.5) - 1, np.sin(0.5), 1.1 * np.cos(0.7), 1.1 * np.sin(0.7), -0.2, 0.4]
    assert np.allclose(augmentation_labels(jnp.asarray(a, jnp.float32)), due, atol=1e-6)


@pytest.mark.parametrize("probability, mirror", [(0.12, 0.5), (0.5, 0.0), (1.0, 1.0)])
def test_the_draws_are_the_tables(probability, mirror):
    n = 40_000
    a = np.asarray(jax.jit(jax.vmap(lambda key: draw_augmentation(key, probability, mirror)))(jax.random.split(jax.random.PRNGKey(1), n)))
    near = lambda found, due, spread: abs(found - due) < 4.5 * spread / np.sqrt(n) + 1e-9
    p = probability
    for k, due in enumerate([mirror, p / 2, *[p] * 6]): assert near(np.mean(a[:, k] != 0), due, np.sqrt(due * (1 - due))), k
    for k in (2, 5, 6, 7): assert near(a[:, k].mean(), 0, np.sqrt(p)) and near((a[:, k] ** 2).mean(), p, np.sqrt(3 * p - p * p)) and near((a[:, k] ** 4).mean(), 3 * p, np.sqrt(105 * p))
    for k in (3, 4): assert abs(a[:, k]).max() <= np.pi and near(a[:, k].mean(), 0, np.sqrt(p * np.pi ** 2 / 3)) and near((a[:, k] ** 2).mean(), p * np.pi ** 2 / 3, np.sqrt(p * np.pi ** 4 / 5))
    assert ((a[:, 4] != 0) == (a[:, 5] != 0)).all() and ((a[:, 6] != 0) == (a[:, 7] != 0)).all()
    kinds = (a[:, [1, 2, 3, 5, 6]] != 0).astype(float)  # drawn independently of one another
    if p < 1: assert abs(np.corrcoef(kinds.T) - np.eye(5)).max() < 4.5 / np.sqrt(n)
    values = np.abs(a[:, [2, 3, 5, 6, 7]][(kinds[:, 1:] != 0).all(1)])
    if p > 0.4: assert abs(np.corrcoef(values.T) - np.eye(5)).max() < 4.5 / np.sqrt(len(values))


def test_labels_are_zero_if_and_only_if_nothing_was_touched():
    image = noise((10, 10, 3))
    out, labels = jax.jit(jax.vmap(augment_image, (0, None)))(jax.random.split(jax.random.PRNGKey(2), 3000), image)
    same, quiet = np.array([np.array_equal(x, image) for x in out]), np.all(np.asarray(labels) == 0, 1)
    assert labels.shape == (3000, 9) and np.array_equal(same, quiet)
    share = 0.5 * 0.94 * 0.88 ** 4
    assert abs(quiet.mean() - share) < 4 * np.sqrt(share * (1 - share) / 3000)


def test_probability_zero_turns_all_off():
    image, keys = noise((6, 6, 1)), jax.random.split(jax.random.PRNGKey(0), 300)
    out, labels = jax.jit(jax.vmap(lambda key: augment_image(key, image, probability=0)))(keys)
    assert (out == image).all() and (labels == 0).all()
    _, labels = jax.jit(jax.vmap(lambda key: augment_image(key, image, probability=0.12, mirror=0)))(keys)
    assert (labels[:, 0] == 0).all() and (labels != 0).any()


def test_an_image_depends_on_its_own_key_alone_and_keeps_its_type():
    images, keys = noise((5, 8, 8, 3)), jax.random.split(jax.random.PRNGKey(3), 5)
    together, labels = jax.jit(jax.vmap(lambda k, x: augment_image(k, x, 0.8)))(keys, images)
    one = jax.jit(lambda k, x: augment_image(k, x, 0.8))
    for i in range(5):
        alone, label = one(keys[i], images[i])
        assert abs(alone - together[i]).max() < 1e-5 and np.allclose(label, labels[i], atol=1e-6)
    for dtype in (jnp.bfloat16, jnp.float16): assert jax.eval_shape(augment_image, keys[0], images[0].astype(dtype))[0].dtype == dtype
    traced = jax.jit(lambda p: augment_image(keys[0], images[0], p)[0])  # the probability may be a traced number: a schedule of it
    assert np.array_equal(traced(0.0), images[0])


@pytest.mark.parametrize("bad, word", [(dict(probability=-0.1), "probability"), (dict(probability=12), "probability"), (dict(mirror=1.5), "mirror"),
                                       (dict(probability=np.nan), "probability"), (dict(probability="no"), "probability"), (dict(mirror=True), "mirror"), (dict(mirror=None), "mirror")])
def test_bad_probabilities_are_named(bad, word):
    with pytest.raises(ValueError, match=f"^{word} must lie in"): augment_image(jax.random.PRNGKey(0), noise((4, 4, 1)), **bad)


def test_what_is_no_image_and_no_augmentation_is_named():
    key, image = jax.random.PRNGKey(0), noise((4, 4, 1))
    for bad in ((image * 127).astype(jnp.uint8), np.zeros((4, 4, 1), bool)):
        with pytest.raises(ValueError, match="^image must be floating point"): augment_image(key, bad)
    for bad in (image[..., 0], image[None]):
        with pytest.raises(ValueError, match="^image must have shape"): augment_image(key, bad)
    for function in (lambda a: apply_augmentation(image, a), augmentation_labels):
        with pytest.raises(ValueError, match="^a must have shape"): function(jnp.zeros(9))
        with pytest.raises(ValueError, match="^a must have shape"): function(jnp.zeros((2, 8)))
    with pytest.raises(ValueError, match="^matrix must"): warp_image(image, jnp.eye(3), jnp.zeros(2))
    with pytest.raises(ValueError, match="^shift must"): warp_image(image, jnp.eye(2), jnp.zeros(1))


def test_every_name_of_the_one_module_is_still_there():
    import pickle
    import flaxdiff.data
    names = """TFDSStream load_digits host_rows ImageStream keys_kernel middle_square PrepareImage find_tfds open_tfds ImageFolder FileStream get_dataset
        prefetch_to_device DevicePrefetch draw_augmentation augmentation_labels warp_image apply_augmentation augment_image""".split()
    assert set(names) <= set(flaxdiff.data.__all__) and all(hasattr(flaxdiff.data, name) for name in names)
    assert flaxdiff.get_dataset is get_dataset
    again = pickle.loads(pickle.dumps(PrepareImage(8, 1, True)))  # what readers in other processes would be given
    assert again.image_scale == 8 and again.with_labels


# ---- right pixels

def in_file(picture, kind="png", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return {"image": file.getvalue()}


def in_bytes(image): return (np.asarray(image, np.float64) + 1) * 127.5


@pytest.mark.parametrize("kind, dtype", [("png", "<u2"), ("tiff", "<u2"), ("tiff", ">u2"), ("ppm", "<u2"), ("tiff", "<i4")])
def test_sixteen_bits_run_from_black_to_white(kind, dtype):
    ramp = np.arange(65536).reshape(256, 256)
    picture = Image.fromarray(ramp.astype("<i4" if dtype == "<i4" else "<u2"))
    if dtype == ">u2": picture = Image.frombytes("I;16B", (256, 256), ramp.astype(dtype).tobytes())
    for channels in (1, 3):
        image = PrepareImage(256, channels)(in_file(picture, kind))
        assert image.dtype == np.float32 and image.shape == (256, 256, channels) and image.min() == -1 and image.max() == 1
        assert abs(image - (ramp / 32767.5 - 1)[..., None]).max() < 1e-6
    small = PrepareImage(16, 1)(in_file(picture, kind))  # resized at full depth
    assert len(np.unique(small)) == 256 and abs(small.max() - 15 / 16) < 0.002 and abs(small.min() + 15 / 16) < 0.002


def test_greys_whose_white_is_not_known_are_refused_not_cut():
    for values in (np.full((4, 4), 70_000, np.int32), np.full((4, 4), -1, np.int32), np.full((4, 4), 1.5, np.float32), np.full((4, 4), np.nan, np.float32)):
        with pytest.raises(ValueError, match="grey values from .* can be read"): PrepareImage(4, 1)(in_file(Image.fromarray(values), "tiff"))
    assert np.allclose(PrepareImage(4, 1)(in_file(Image.fromarray(np.full((4, 4), 0.25, np.float32)), "tiff")), -0.5)


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize("number", range(1, 9))
def test_every_orientation_comes_out_upright(kind, number):
    pixels = np.zeros((48, 32, 3), np.uint8)  # of four colours, and no symmetry
    pixels[:24, :16], pixels[:24, 16:], pixels[24:, :16], pixels[24:, 16:] = (250, 0, 0), (0, 250, 0), (0, 0, 250), (120, 120, 120)
    # what the camera's sensor saw, by the table of the EXIF standard: where row 0 and column 0 of the file belong
    file = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.swapaxes(0, 1), 6: np.rot90(pixels), 7: np.rot90(pixels, 2).swapaxes(0, 1), 8: np.rot90(pixels, -1)}[number]
    note = Image.Exif()
    note[274] = number
    options = {"exif": note, **({"quality": 100, "subsampling": 0} if kind == "jpeg" else {"lossless": True} if kind == "webp" else {})}
    image = in_bytes(PrepareImage(32, 3)(in_file(Image.fromarray(np.ascontiguousarray(file)), kind, **options)))
    for (row, column), colour in {(4, 4): (250, 0, 0), (4, 28): (0, 250, 0), (28, 4): (0, 0, 250), (28, 28): (120, 120, 120)}.items():
        assert abs(image[row, column] - colour).max() < 4


def test_exif_data_that_cannot_be_read_turn_nothing():
    picture = Image.new("RGB", (8, 8), (10, 20, 30))
    assert np.array_equal(PrepareImage(8, 3)(in_file(picture, exif=b"Exif\0\0nonsense")), PrepareImage(8, 3)(in_file(picture)))


def test_transparent_pixels_show_the_background():
    hidden = Image.new("RGBA", (6, 6), (0, 255, 0, 0))
    half = Image.new("RGBA", (6, 6), (200, 100, 50, 128))
    assert np.array_equal(PrepareImage(6, 3)(in_file(hidden)), np.ones((6, 6, 3)))
    assert abs(in_bytes(PrepareImage(6, 3)(in_file(half))) - (227.39, 177.20, 152.10)).max() < 0.01
    assert abs(in_bytes(PrepareImage(6, 1)(in_file(half))) - np.dot((227.39, 177.20, 152.10), (0.299, 0.587, 0.114))).max() < 0.01
    for background, colour in (("black", (0, 0, 0)), ("#ff0000", (255, 0, 0)), ((10, 20, 30), (10, 20, 30))):
        seen = in_bytes(PrepareImage(6, 3, background=background)(in_file(half)))
        assert abs(seen - (np.array([200, 100, 50]) * 128 + np.array(colour) * 127) / 255).max() < 0.01
        assert abs(in_bytes(PrepareImage(6, 3, background=background)(in_file(hidden))) - colour).max() < 0.01
    grey = in_bytes(PrepareImage(6, 1)(in_file(Image.new("LA", (6, 6), (40, 102)))))
    assert abs(grey - (40 * 102 + 255 * 153) / 255).max() < 0.01


def test_transparency_in_palettes_and_keys():
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    red, blue, white = (255, 0, 0), (0, 0, 255), (255, 255, 255)
    for kind in ("png", "gif"):
        seen = in_bytes(PrepareImage(2, 3)(in_file(palette, kind, transparency=1)))
        assert abs(seen - [[red, white], [white, red]]).max() < 0.01
        assert abs(in_bytes(PrepareImage(2, 3)(in_file(palette, kind))) - [[red, blue], [blue, red]]).max() < 0.01
    faint = in_bytes(PrepareImage(2, 3)(in_file(palette, transparency=bytes([255, 51]))))
    assert abs(faint[0, 1] - (204, 204, 255)).max() < 0.01
    for picture, key in ((Image.new("RGB", (2, 2), (7, 8, 9)), (7, 8, 9)), (Image.new("L", (2, 2), 7), 7), (Image.fromarray(np.full((2, 2), 700, np.uint16)), 700)):
        assert (PrepareImage(2, 3)(in_file(picture, transparency=key)) == 1).all()


def test_a_border_shows_nothing_of_what_is_hidden():
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :, 1] = 255  # green everywhere, and nothing of it to be seen
    pixels[:, :32] = (255, 0, 0, 255)
    image = in_bytes(PrepareImage(9, 3)(in_file(Image.fromarray(pixels))))
    assert abs(image[..., 1] - image[..., 2]).max() < 0.01 and image[..., 0].min() > 254.9


def test_other_colour_spaces():
    photograph = Image.fromarray(datasets.load_sample_images().images[1]).resize((40, 40))
    due = in_bytes(PrepareImage(40, 3)(in_file(photograph)))
    assert abs(in_bytes(PrepareImage(40, 3)(in_file(photograph.convert("CMYK"), "tiff"))) - due).max() < 2
    grey = in_bytes(PrepareImage(40, 1)(in_file(photograph)))
    for mode in ("CMYK", "LAB"):
        assert abs(in_bytes(PrepareImage(40, 1)(in_file(photograph.convert(mode) if mode == "CMYK" else to_lab(photograph), "tiff"))) - grey).mean() < 3, mode
    assert abs(in_bytes(PrepareImage(40, 3)(in_file(to_lab(photograph), "tiff"))) - due).mean() < 6
    assert abs(in_bytes(PrepareImage(40, 3)(in_file(photograph.convert("CMYK"), "jpeg", quality=100))) - due).mean() < 4
    bits = np.random.default_rng(0).random((8, 8)) < 0.5
    for channels in (1, 3): assert np.array_equal(PrepareImage(8, channels)(in_file(Image.fromarray(bits))), np.repeat(np.where(bits, 1, -1)[..., None], channels, -1))


def to_lab(picture):
    from PIL import ImageCms
    return ImageCms.applyTransform(picture, ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"))


def test_opaque_bytes_are_read_as_they_always_were():
    "The same bits as of the first release: runs on photographs go on."
    picture = Image.fromarray(datasets.load_sample_images().images[0])
    for kind in ("jpeg", "png", "webp"):
        for channels, mode in ((1, "L"), (3, "RGB")):
            file = in_file(picture, kind)
            old = np.asarray(module_pixels.middle_square(Image.open(io.BytesIO(file["image"])).convert(mode), 64), np.float32).reshape(64, 64, channels) / 127.5 - 1
            assert np.array_equal(PrepareImage(64, channels)(file), old)


def test_one_to_four_channels(tmp_path):
    half, opaque = Image.new("RGBA", (6, 6), (200, 100, 50, 128)), Image.new("RGB", (6, 6), (200, 100, 50))
    luminance = 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    for picture, opacity in ((half, 128), (opaque, 255)):
        assert abs(in_bytes(PrepareImage(6, 4)(in_file(picture))) - (200, 100, 50, opacity)).max() < 0.02
        assert abs(in_bytes(PrepareImage(6, 2)(in_file(picture))) - (luminance, opacity)).max() < 0.02
    assert abs(in_bytes(PrepareImage(6, 4)(in_file(Image.new("RGBA", (6, 6), (0, 255, 0, 0))))) - (255, 255, 255, 0)).max() < 0.02  # nothing hidden is kept
    half.save(tmp_path / "a.png")
    for channels in (1, 2, 3, 4): assert next(get_dataset(f"folder:{tmp_path}", 2, 4, channels)[0]).shape == (2, 4, 4, channels)
    with pytest.raises(ValueError, match="^channels must be one of 1, 3, got 4"): get_dataset("digits", channels=4)


@pytest.mark.parametrize("bad", ["no such colour", (1, 2), (1, 2, 300), (0, 0, np.nan), 5, None, "#ff000080"])
def test_a_background_is_a_colour(bad):
    with pytest.raises(ValueError, match="^background must be a colour's name"): PrepareImage(8, 3, background=bad)


def claim(width, height):
    "A PNG of a few bytes whose header claims another size."
    head = in_file(Image.new("L", (1, 1)))["image"]
    chunk = head[12:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + head[24:29]
    return head[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + head[33:]


def test_a_decompression_bomb_is_refused_and_counted(tmp_path, monkeypatch):
    pytest.importorskip("grain")
    for limit in (Image.MAX_IMAGE_PIXELS, None):  # None: another library has turned Pillow's own guard off
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="^a decompression bomb"): PrepareImage(8, 3)({"image": claim(60_000, 60_000)})
    for i in range(4): save_picture(tmp_path / f"{i}.png", i)
    (tmp_path / "bomb.png").write_bytes(claim(60_000, 60_000))
    data = get_dataset(f"folder:{tmp_path}", 5, 8)[0]
    next(data)
    assert list(data.damaged.values()) == ["bomb.png"] and all("decompression bomb" in why for why in data.reasons.values())
    with pytest.raises(ValueError, match="max_damaged is 0: bomb.png .*decompression bomb"): take(get_dataset(f"folder:{tmp_path}", 5, 8, max_damaged=0)[0], 2)


# ---- squares at random places

def test_random_squares_depend_on_seed_epoch_and_example_alone(tmp_path):
    pytest.importorskip("grain")
    for i in range(6):
        ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None] + 40, (20, 200, 3)).copy()
        ramp[..., 1] = 10 * i
        Image.fromarray(ramp if i % 2 else ramp.swapaxes(0, 1)).save(tmp_path / f"{i}.png")
    def open(**rest): return get_dataset(f"folder:{tmp_path}", **{"batch_size": 6, "image_scale": 20, "crop": "random", "seed": 3, **rest})[0]
    def place(batch): return {round(float(in_bytes(image[..., 1]).mean())) // 10: float(in_bytes(image[..., 0]).min()) for image in batch}
    epochs = [place(next(data)) for data in [open()] for _ in range(30)]
    assert all(set(epoch) == set(range(6)) for epoch in epochs)
    lefts = np.array([[epoch[i] - 40 for i in range(6)] for epoch in epochs])
    assert lefts.min() < 20 and lefts.max() > 160 and abs(lefts.mean() - 90) < 4.5 * 52.5 / np.sqrt(lefts.size)  # uniform on 0…180
    again, hosts = open(threads=1), [open(host=h, hosts=3) for h in range(3)]
    again.set_state({**again.get_state(), "position": 6 * 7})
    for host in hosts: host.set_state(again.get_state())
    assert place(next(again)) == epochs[7] == place(np.concatenate([next(host) for host in hosts]))
    cut = open(batch_size=4)  # however the line is cut
    assert place(np.concatenate(take(cut, 3))[:6]) == epochs[0] and place(next(open(seed=4))) != epochs[0]
    with pytest.raises(ValueError, match="^crop must be one of centre, random"): open(crop="middle")
    for name in ("digits",):
        with pytest.raises(ValueError, match="^crop must be 'centre'"): get_dataset(name, crop="random")
    with pytest.raises(ValueError, match="^rng must"): PrepareImage(8, 3, crop="random")(in_file(Image.new("L", (8, 9))))


# ---- everything in a folder is read or counted

def test_every_ending_that_pillow_reads(tmp_path):
    pytest.importorskip("grain")
    known = Image.registered_extensions()
    endings = [e for e in (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".TIFF", ".ppm") if e.lower() in known]
    for i, ending in enumerate(endings): Image.new("RGB", (9, 9), (20 * i, 100, 50)).save(tmp_path / f"{i:02d}{ending}", known[ending.lower()], **({"lossless": True} if ending == ".webp" else {}))
    assert len(ImageFolder(tmp_path)) == len(endings) >= 11
    data = get_dataset(f"folder:{tmp_path}", len(endings), 8)[0]
    assert sorted(round(float(in_bytes(image[..., 0]).mean()) / 20) for image in next(data)) == list(range(len(endings))) and not data.damaged


def test_linked_folders_are_followed_and_no_circle_is_walked(tmp_path):
    d, elsewhere = tmp_path / "d", tmp_path / "elsewhere"
    for i in range(3): save_picture(elsewhere / "deep" / f"{i}.png", i)
    save_picture(d / "dogs" / "7.png", 7)
    (d / "cats").symlink_to(elsewhere)
    (d / "dogs" / "round").symlink_to(d)
    (elsewhere / "deep" / "also").symlink_to(elsewhere)
    (d / "dogs" / "broken.png").symlink_to(tmp_path / "nothing")
    (d / "dogs" / "self").symlink_to(d / "dogs" / "self")
    (d / "dogs" / "linked.png").symlink_to(elsewhere / "deep" / "1.png")
    folder = ImageFolder(d, labels=True)
    assert folder.files == ["cats/deep/0.png", "cats/deep/1.png", "cats/deep/2.png", "dogs/7.png", "dogs/linked.png"] and folder.label_names == ["cats", "dogs"]
    assert folder.left_out == {"links back to a folder above": 2, "links that lead nowhere and what is no file": 2}


def test_what_is_left_out_is_counted_in_one_line(tmp_path, caplog):
    for i in range(3): save_picture(tmp_path / "a" / f"{i}.png", i, captions=True)
    for name in ("a/x.heic", "a/y.HEIC", "a/README", ".hidden", ".git/config", "a/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    folder = ImageFolder(tmp_path, captions=True)
    assert folder.left_out == {"*.heic": 2, "*.md": 1, "files without an ending": 1, "hidden": 2}
    assert caplog.messages == [f"{tmp_path}: 3 pictures; left out: 2 (*.heic), 1 (*.md), 1 (files without an ending), 2 (hidden)"]
    assert ImageFolder(tmp_path).left_out["*.txt"] == 3  # captions that nobody asked for
    caplog.clear()
    quiet = tmp_path / "b"
    save_picture(quiet / "1.png", 1)
    (quiet / ".DS_Store").write_text("")
    assert ImageFolder(quiet).left_out == {"hidden": 1} and not [r for r in caplog.records if r.levelno >= logging.WARNING]


# ---- arrays

def write_idx(path, array):
    code = {"u1": 8, "i1": 9, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}[array.dtype.str[1:]]
    stored = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(array.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(stored) if path.suffix == ".gz" else stored)


PIXELS = np.random.default_rng(0).integers(0, 256, (23, 6, 6), dtype=np.uint8)


@pytest.fixture
def mnist(tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    write_idx(folder / "train-images-idx3-ubyte.gz", PIXELS[:15])
    write_idx(folder / "train-labels-idx1-ubyte", np.arange(15, dtype=np.uint8))
    write_idx(folder / "t10k-images-idx3-ubyte", PIXELS[15:])
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.arange(15, 23, dtype=np.uint8))
    return folder


def test_idx_files_of_every_type(tmp_path):
    for kind in ("u1", "i1", "i2", "i4", "f4", "f8"):
        array = np.arange(-6 if kind != "u1" else 0, 18 if kind == "u1" else 12).astype(kind)[:18].reshape(2, 3, 3)
        for name in ("a", "a.gz"):
            write_idx(tmp_path / name, array)
            assert np.array_equal(arrays.read_idx(tmp_path / name), array)
    write_idx(tmp_path / "b", PIXELS)
    whole = (tmp_path / "b").read_bytes()
    for broken in (whole[:-1], whole + b"x", whole[:3], b"\0\0\x08\x03\0\0", b"PNG" + whole, b"", gzip.compress(whole)[:-30], b"\x1f\x8bnonsense"):
        (tmp_path / "b").write_bytes(broken)
        with pytest.raises(ValueError, match="is damaged|is no IDX file"): arrays.read_idx(tmp_path / "b")
    (tmp_path / "b").write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", 2 ** 31, 2 ** 15, 2 ** 15))  # a bomb: 2 EB
    with pytest.raises(ValueError, match="would take .* GB of memory"): arrays.read_idx(tmp_path / "b")


def test_a_folder_in_mnists_format(mnist):
    data, count = get_dataset(f"idx:{mnist}", 23, labels=True)
    batch = next(data)
    assert count == 23 and batch["image"].shape == (23, 6, 6, 1) and batch["image"].dtype == np.float32 and batch["label"].dtype == np.int32
    assert sorted(batch["label"]) == list(range(23)) and data.label_names == [str(i) for i in range(23)]
    assert np.array_equal(batch["image"], (PIXELS / np.float32(127.5) - 1)[batch["label"]][..., None])
    for split, due in (("train", range(15)), ("test", range(15, 23))): assert set(next(get_dataset(f"idx:{mnist}", 23, labels=True, split=split)[0])["label"]) == set(due)
    (mnist / "label_names.txt").write_text("\n".join(f"thing {i}" for i in range(23)) + "\n")
    assert get_dataset(f"idx:{mnist}", labels=True)[0].label_names[3] == "thing 3"
    assert next(get_dataset(f"idx:{mnist}", 4, 12, 3)[0]).shape == (4, 12, 12, 3)
    with pytest.raises(ValueError, match="^split must be"): get_dataset(f"idx:{mnist}", split="validation")
    (mnist / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="labels=True needs a file of labels beside .*t10k"): get_dataset(f"idx:{mnist}", labels=True)
    write_idx(mnist / "emnist-train-images-idx3-ubyte", PIXELS)
    with pytest.raises(ValueError, match="holds several sets"): get_dataset(f"idx:{mnist}")
    for name, word in ((f"idx:{mnist / 'none'}", "must name a folder"), ("idx:", "must name a folder"), (f"idx:{mnist.parent}", "holds no file")):
        with pytest.raises(ValueError, match=word): get_dataset(name)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "float32", "float64", "float16"])
def test_npz_images_of_every_type(tmp_path, dtype):
    unit = np.linspace(0, 1, 5 * 4 * 4 * 3).reshape(5, 4, 4, 3)
    white = {"bool": 1, "uint8": 255, "uint16": 65535}.get(dtype)
    stored = np.round(unit * white).astype(dtype) if white else (unit * 2 - 1).astype(dtype)
    np.savez(tmp_path / "a.npz", image=stored, label=np.arange(5))
    batch = next(get_dataset(f"npz:{tmp_path}/a.npz", 5, labels=True)[0])
    due = (stored.astype(np.float64) / white * 2 - 1 if white else stored)[batch["label"]]
    assert batch["image"].dtype == np.float32 and abs(batch["image"] - due).max() < 1e-6 and batch["image"].min() == -1 and batch["image"].max() == 1
    assert next(get_dataset(f"npz:{tmp_path}/a.npz", 2, 8, 1)[0]).shape == (2, 8, 8, 1)


def test_npz_columns_are_conditions_and_names_are_kept(tmp_path):
    path, pose = tmp_path / "a.npz", np.arange(46, dtype=np.float32).reshape(23, 2)
    np.savez_compressed(path, images=PIXELS, labels=np.arange(23) % 3, label_names=["a", "b", "c"], pose=pose, short=np.zeros(4))
    data, count = get_dataset(f"npz:{path}", 7, labels=True, columns=("pose",))
    batch = next(data)
    order = np.random.default_rng((0, 0)).permutation(23)[:7]
    assert count == 23 and list(batch) == ["image", "label", "pose"] and data.label_names == ["a", "b", "c"]
    assert np.array_equal(batch["pose"], pose[order]) and np.array_equal(batch["label"], order % 3) and np.array_equal(batch["image"][..., 0], PIXELS[order] / np.float32(127.5) - 1)
    assert list(next(get_dataset(f"npz:{path}", 7, columns=["pose"])[0])) == ["image", "pose"] and isinstance(next(get_dataset(f"npz:{path}", 7)[0]), np.ndarray)
    for bad, word in ((dict(columns=("nose",)), "must hold an array named nose; it holds images, labels"), (dict(columns=("short",)), "short.* must be one for each of the 23 images"),
                      (dict(columns="pose"), "^columns must be names"), (dict(split="train"), "^split must be 'all'"),
                      (dict(crop="random"), "^crop must be 'centre'"), (dict(data_dir="x"), "^data_dir must be None"), (dict(batch_size=10 ** 12), "^batch_size.* must be smaller")):
        with pytest.raises(ValueError, match=word): get_dataset(f"npz:{path}", **bad)
    with pytest.raises(ValueError, match="^columns must"): get_dataset("digits", columns=("pose",))


def test_npz_files_that_are_not_what_they_should_be(tmp_path):
    path, ok = tmp_path / "a.npz", PIXELS / np.float32(127.5) - 1
    cases = [(dict(x=ok), "must hold an array named image; it holds x"), (dict(image=ok[0, 0]), "must have shape"), (dict(image=np.zeros((2, 4, 4, 5), np.uint8)), "must have shape"),
             (dict(image=PIXELS / 255), "must lie in \\[-1, 1\\] and be negative somewhere.* 2 - 1"), (dict(image=PIXELS * 1.0), "must lie in"), (dict(image=np.where(PIXELS > 3, np.nan, ok)), "must lie in"),
             (dict(image=PIXELS.astype(int)), "must be bytes, 16-bit numbers or floats"), (dict(image=ok, label=np.zeros(3, int)), "labels must be 23 whole numbers"),
             (dict(image=ok, label=np.zeros(23)), "labels must be 23"), (dict(image=ok, label=-np.ones(23, int)), "labels must be 23"), (dict(image=ok), "labels=True needs labels"),
             (dict(image=np.zeros((0, 4, 4), np.uint8)), "must have shape")]
    for held, word in cases:
        np.savez(path, **held)
        with pytest.raises(ValueError, match=word): get_dataset(f"npz:{path}", labels=True)
    np.savez(path, image=np.array([{}], object))
    with pytest.raises(ValueError, match="pickle"): get_dataset(f"npz:{path}")
    np.savez(path, image=PIXELS)
    for broken in (path.read_bytes()[:-60], b"no zip", b""):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="is no .npz file, or a damaged one"): get_dataset(f"npz:{path}")
    for name in ("npz:", f"npz:{tmp_path}", f"npz:{tmp_path}/none.npz"):
        with pytest.raises(ValueError, match="must name a file"): get_dataset(name)


def test_paths_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    pytest.importorskip("grain")
    monkeypatch.setenv("HOME", str(tmp_path))
    np.savez(tmp_path / "a.npz", image=PIXELS)
    write_idx(tmp_path / "train-images-idx3-ubyte", PIXELS)
    save_picture(tmp_path / "p" / "1.png", 1)
    for name, count in (("npz:~/a.npz", 23), ("idx:~", 23), ("folder:~/p", 1)): assert get_dataset(name)[1] == count
    seen = []
    monkeypatch.setattr(module.subprocess, "run", lambda command, **rest: seen.append(json.loads(command[-1])) or subprocess.CompletedProcess(command, 1))
    with pytest.raises(ValueError): module.find_tfds("tiny", "~/sets")
    assert seen == [["tiny", str(tmp_path / "sets"), False]]
    for bad in ("", tmp_path / "a.npz"):
        with pytest.raises(ValueError, match="^data_dir must"): get_dataset("tiny_pictures", data_dir=bad)


def test_a_stream_of_arrays_stops_and_goes_on_and_is_shared(mnist):
    def open(**rest): return get_dataset(f"idx:{mnist}", **{"batch_size": 6, "labels": True, "seed": 5, **rest})[0]
    data, whole = open(), open()
    expected = take(whole, 9)
    for h in range(3):
        host = open(host=h, hosts=3)
        assert all(np.array_equal(share[k], batch[k][2 * h:2 * h + 2]) for share, batch in zip(take(host, 9), expected) for k in batch)
    take(data, 4)
    state, again = json.dumps(data.get_state()), open()
    again.set_state(json.loads(state))
    assert all(np.array_equal(a[k], b[k]) for a, b in zip(take(again, 5), expected[4:]) for k in a)


# ---- tables of Hugging Face's

def save_table(path, hugging_face, **parts):
    features = hugging_face.Features(img=hugging_face.Image(), label=hugging_face.ClassLabel(names=[f"c{i}" for i in range(8)]), caption=hugging_face.Value("string"))
    tables = {}
    for name, numbers in parts.items():
        files = []
        for i in numbers:
            file = io.BytesIO()
            Image.new("RGB", (9, 12), (30 * i, 100, 50)).save(file, "png")
            files.append({"bytes": file.getvalue(), "path": None})
        tables[name] = hugging_face.Dataset.from_dict({"img": files, "label": list(numbers), "caption": [f"picture {i}" for i in numbers]}, features)
    hugging_face.DatasetDict(tables).save_to_disk(str(path))


def check_tables(path):
    data, count = get_dataset(f"hf:{path}", 8, 8, labels=True, captions=True)
    batch = next(data)
    assert count == 8 and sorted(batch["label"]) == list(range(8)) and data.label_names == [f"c{i}" for i in range(8)] and not data.damaged
    for image, label, text in zip(batch["image"], batch["label"], batch["text"]): assert text == f"picture {label}" and abs(in_bytes(image) - (30 * label, 100, 50)).max() < 0.01
    assert set(next(get_dataset(f"hf:{path}", 3, 8, split="test", labels=True)[0])["label"]) == {5, 6, 7}
    assert next(get_dataset(f"hf:{path}", 3, 8)[0]).shape == (3, 8, 8, 3)
    with pytest.raises(ValueError, match="split must be 'all' or a sum of train, test, got 'valid'"): get_dataset(f"hf:{path}", split="valid")
    with pytest.raises(ValueError, match="must name a folder that Dataset.save_to_disk wrote"): get_dataset(f"hf:{path.parent}")
    with pytest.raises(ValueError, match="must name a folder"): get_dataset(f"hf:{path}/none")


def test_tables_of_hugging_face(tmp_path, monkeypatch):
    import datasets
    pytest.importorskip("grain")
    save_table(tmp_path / "table", datasets, train=range(5), test=range(5, 8))
    check_tables(tmp_path / "table")
    datasets.load_from_disk(str(tmp_path / "table")).remove_columns("caption").save_to_disk(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="one column of captions, got none of img, label"): get_dataset(f"hf:{tmp_path}/bare", captions=True)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs Hugging Face's datasets: pip install datasets"): get_dataset(f"hf:{tmp_path}/table")


# ---- a part held back

@pytest.mark.parametrize("validation, held", [(0.1, lambda M: round(M / 10)), (5, lambda M: 5), (0.001, lambda M: max(1, round(M / 1000)))])
def test_a_part_held_back_is_never_trained_on(opened, validation, held):
    open, M = opened
    kept = {}
    for part in ("train", "validation"):
        for rest in (dict(seed=0), dict(seed=9), dict(seed=9, host=1, hosts=2)):
            data = open(validation=validation, part=part, batch_size=2 * M, **rest)
            found = {row for batch in take(data, 2) for row in rows([batch])}  # two epochs and more, also of one host
            if "hosts" not in rest: assert kept.setdefault(part, found) == found and len(found) == data.examples
            assert found <= kept[part]
    assert not kept["train"] & kept["validation"] and len(kept["validation"]) == held(M) and len(kept["train"]) == M - held(M)
    assert set(rows(take(open(batch_size=M), 1))) == kept["train"] | kept["validation"]


def test_a_larger_share_holds_back_what_a_smaller_one_does():
    parts = [set(stream.choose_part(1000, share, "validation")) for share in (0.01, 0.1, 0.5, 700)]
    assert [len(part) for part in parts] == [10, 100, 500, 700] and all(a < b for a, b in zip(parts, parts[1:]))
    assert stream.choose_part(1000) is None and len(stream.choose_part(1000, 0.1)) == 900


@pytest.mark.parametrize("bad", [-0.1, np.nan, np.inf, "0.1", True, None, 1.5, 1797, 0.9999])
def test_what_cannot_be_held_back_is_named(bad):
    with pytest.raises(ValueError, match="^validation must"): get_dataset("digits", validation=bad)
    with pytest.raises(ValueError, match="^part must"): get_dataset("digits", validation=0.1, part="test")
    with pytest.raises(ValueError, match="^validation must"): get_dataset("digits", part="validation")


def test_damage_is_mended_within_its_part(broken):
    folder, names = broken
    texts = {}
    for part in ("train", "validation"):
        data = get_dataset(f"folder:{folder}", 23, 8, captions=True, validation=0.4, part=part)[0]
        texts[part] = {text for batch in take(data, 3) for text in batch["text"]}
        assert set(data.damaged.values()) <= names
    assert not texts["train"] & texts["validation"] and len(texts["train"] | texts["validation"]) == 20


# ---- an order that costs nothing

def test_a_shuffle_is_made_once_an_epoch(monkeypatch):
    made, default_rng = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: made.append(seed) or default_rng(seed))
    data = ImageStream(np.arange(1000), None, 30)
    line = np.concatenate(take(data, 100))  # three epochs, by batches that run over their ends
    shuffles = [seed for seed in made if len(seed) == 2]  # readers of other tests may still draw crops, by three numbers
    assert shuffles == [(0, 0), (0, 1), (0, 2)]
    data.set_state({**data.get_state(), "position": 990})
    assert np.array_equal(next(data), line[990:1020])
    monkeypatch.undo()
    assert np.array_equal(line, np.concatenate([np.random.default_rng((0, e)).permutation(1000) for e in range(3)]))


# ---- threads

def test_there_are_as_many_threads_as_cores(pictures, monkeypatch):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert get_dataset(f"folder:{pictures}")[0].threads == cores == FileStream(np.zeros((3, 2)), lambda x: x, 1).threads
    monkeypatch.setattr(folder_module.os, "sched_getaffinity", lambda _: range(96), raising=False)
    assert folder_module.reading_threads() == 96 == get_dataset(f"folder:{pictures}")[0].threads
    assert get_dataset(f"folder:{pictures}", threads=3)[0].threads == 3
    monkeypatch.setattr(folder_module, "machine_memory", lambda: 12_000)
    assert folder_module.reading_threads(100) == 10 and folder_module.reading_threads(10 ** 9) == 1
    with pytest.raises(ValueError, match="^threads must"): get_dataset(f"folder:{pictures}", threads=0)


def test_a_function_may_send_the_batches(opened):
    open, _ = opened
    plain = open(seed=1, batch_size=6)
    data = prefetch_to_device(open(seed=1, batch_size=6), place=lambda batch: jax.device_put(batch.reshape(2, 3, *batch.shape[1:])))
    for _ in range(4):
        assert data.get_state() == plain.get_state()
        sent, batch = next(data), next(plain)
        assert isinstance(sent, jax.Array) and sent.shape[:2] == (2, 3) and np.array_equal(sent.reshape(batch.shape), batch)


# ---- captions and what an encoder makes of them

class WordEncoder:
    "A text encoder that really encodes: one vector for each of up to 6 words, the same for the same word; counts what it was asked."
    name, features, tokens = "tests/words", 5, 6

    def __init__(self): self.asked = []

    def __call__(self, texts):
        self.asked += texts
        context, mask = np.zeros((len(texts), 6, 5), np.float32), np.zeros((len(texts), 6), bool)
        for i, text in enumerate(texts):
            for j, word in enumerate(text.split()[:6]): context[i, j], mask[i, j] = np.random.default_rng(zlib.crc32(word.encode())).normal(size=5), True
        return {"textcontext": context, "textmask": mask}


@pytest.fixture(params=["digits", "folder", "several", "npz", "idx", "hf"])
def captioned(request, tmp_path, monkeypatch):
    "A function that opens captioned data of each kind."
    name, texts = "digits", None
    if request.param in ("folder", "several"):
        pytest.importorskip("grain")
        for i in range(M): save_picture(tmp_path / "p" / "ab"[i % 2] / f"{i:02d}.png", i, captions=True)
        name = f"folder:{tmp_path / 'p'}"
        if request.param == "several":
            table = [json.dumps({"file_name": f"{'ab'[i % 2]}/{i:02d}.png", "text": [f"picture {i}", f"number {i} of all"]}) for i in range(M)]
            (tmp_path / "p" / "metadata.jsonl").write_text("\n".join(table))
    if request.param == "npz":
        name = f"npz:{tmp_path}/a.npz"
        np.savez(tmp_path / "a.npz", image=PIXELS, text=np.array([f"picture {i}" for i in range(23)]), label=np.arange(23) % 3)
    if request.param == "idx":
        name = f"idx:{tmp_path}"
        write_idx(tmp_path / "train-images-idx3-ubyte", PIXELS)
        write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(23, dtype=np.uint8) % 3)
        (tmp_path / "label_names.txt").write_text("a shirt\na shoe\na bag\n")
    if request.param == "hf":
        hugging_face = pytest.importorskip("datasets")
        save_table(tmp_path / "t", hugging_face, all=range(8))
        name = f"hf:{tmp_path / 't'}"
    return lambda **rest: get_dataset(name, **{"batch_size": 6, "image_scale": 4 if request.param == "npz" else 8, "seed": 3, **rest})[0]


@pytest.mark.parametrize("labels", [False, True])
def test_captions_come_encoded_each_once_and_stay_with_their_pictures(captioned, labels, tmp_path):
    encoder = WordEncoder()
    words, data = captioned(captions=True, labels=labels), captioned(encoder=encoder, cache=tmp_path / "cache", labels=labels)
    asked = [text for text in encoder.asked if text not in ("a picture", "")]
    assert len(asked) == len(set(asked)) > 0
    for read, due in zip(take(data, 9), take(words, 9)):
        assert list(read) == ["image"] + ["label"] * labels + ["textcontext", "textmask"] and np.array_equal(read["image"], due["image"])
        encoded = WordEncoder()(list(due["text"]))
        assert all(np.array_equal(read[k], encoded[k]) and read[k].dtype == encoded[k].dtype for k in encoded)
    again = WordEncoder()
    captioned(encoder=again, cache=tmp_path / "cache")
    assert set(again.asked) == {"a picture"}  # the probe alone: all else is known


def test_encoded_captions_stop_go_on_and_are_shared(captioned, tmp_path):
    def open(**rest): return captioned(encoder=WordEncoder(), cache=tmp_path / "cache", **rest)
    data = open()
    take(data, 3)
    state, due, again = json.dumps(data.get_state()), take(data, 4), open()
    again.set_state(json.loads(state))
    for a, b in zip(take(again, 4), due): assert all(np.array_equal(a[k], b[k]) for k in a)
    for h in range(2):
        host = open(host=h, hosts=2)
        host.set_state(json.loads(state))
        for a, b in zip(take(host, 4), due): assert all(np.array_equal(a[k], b[k][3 * h:3 * h + 3]) for k in a)
    for part in ("train", "validation"): assert next(open(validation=2, part=part))["textmask"].any(1).all() and open(validation=2, part=part).num_classes == open().num_classes


def test_one_of_several_captions_is_drawn_by_seed_epoch_and_example(tmp_path):
    pytest.importorskip("grain")
    for i in range(8): save_picture(tmp_path / f"{i}.png", i)
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": f"{i}.png", "text": [f"{i} a", f"{i} b", f"{i} c"]}) for i in range(8)))
    def open(**rest): return get_dataset(f"folder:{tmp_path}", 8, 8, captions=True, **rest)[0]
    def epochs(data): return [sorted(batch["text"]) for batch in take(data, 30)]
    seen = epochs(open())
    assert seen == epochs(open(threads=1)) != epochs(open(seed=1))
    assert all([text[0] for text in epoch] == list("01234567") for epoch in seen)
    counts = np.unique([text[2] for epoch in seen for text in epoch], return_counts=True)[1]
    assert len(counts) == 3 and abs(counts - 80).max() < 5 * np.sqrt(240 * 2 / 9)
    for bad in ([], [1], {"a": 1}, None):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": bad}))
        with pytest.raises(ValueError, match="line 1 .*must be a string, got"): open()


def test_crops_are_where_they_were_before_captions(tmp_path):
    pytest.importorskip("grain")
    ramp = np.arange(40 * 90 * 3).reshape(40, 90, 3) % 251
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a ramp")
    bare, worded = (get_dataset(f"folder:{tmp_path}", 5, 8, crop="random", **rest)[0] for rest in ({}, {"captions": True}))
    assert all(np.array_equal(a, b["image"]) for a, b in zip(take(bare, 3), take(worded, 3)))


def test_a_damaged_cache_is_made_again(tmp_path, caplog):
    def open():
        encoder = WordEncoder()
        batch = next(get_dataset("digits", 16, encoder=encoder, cache=tmp_path / "c")[0])
        return batch, len(set(encoder.asked) - {"", "a picture"})
    due, asked = open()
    assert asked > 50 and open()[1] == 0
    file, = (tmp_path / "c").rglob("*.npz")
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for broken in (b"", b"no zip", whole[:-100], whole[:200], bytes(flipped)):
        file.write_bytes(broken)
        caplog.clear()
        batch, again = open()
        assert again == asked and "is damaged and will be made again" in caplog.text and file.read_bytes()[:2] == b"PK"
        assert all(np.array_equal(batch[k], due[k]) for k in due) and open()[1] == 0
    assert not list((tmp_path / "c").rglob("*.part"))


def test_another_encoder_of_the_same_name_finds_nothing(tmp_path, caplog):
    class Other(WordEncoder):
        def __call__(self, texts):
            encoded = super().__call__(texts)
            return {**encoded, "textcontext": encoded["textcontext"] * 2}
    first = next(get_dataset("digits", 16, encoder=WordEncoder(), cache=tmp_path)[0])
    second = next(get_dataset("digits", 16, encoder=Other(), cache=tmp_path)[0])
    assert np.array_equal(second["textcontext"], 2 * first["textcontext"]) and "is not what it was" in caplog.text
    class Longer(WordEncoder):
        tokens = 7
        def __call__(self, texts): return {k: np.concatenate([v, v[:, :1]], 1) for k, v in super().__call__(texts).items()}
    assert next(get_dataset("digits", 16, encoder=Longer(), cache=tmp_path)[0])["textmask"].shape == (16, 7)
    assert np.array_equal(next(get_dataset("digits", 16, encoder=Other(), cache=tmp_path)[0])["textcontext"], second["textcontext"])


def test_the_default_cache_is_the_users_and_a_stopped_start_keeps_what_is_done(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(captions, "IN_FILE", 64)
    caplog.set_level(logging.INFO)
    class Stopped(WordEncoder):
        def __call__(self, texts):
            if len(self.asked) > 150: raise KeyboardInterrupt
            return super().__call__(texts)
    with pytest.raises(KeyboardInterrupt): get_dataset("digits", encoder=Stopped())
    folder, = (tmp_path / "flaxdiff" / "captions").iterdir()
    assert str(folder) in caplog.text and folder.name.startswith("tests_words-") and list(folder.glob("*.npz"))
    encoder = WordEncoder()
    get_dataset("digits", encoder=encoder)
    fresh = WordEncoder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    get_dataset("digits", encoder=fresh)
    assert len(set(encoder.asked)) < len(set(fresh.asked)) - 60


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="^cache must be a folder to write to, got .*file"): get_dataset("digits", encoder=WordEncoder(), cache=tmp_path / "file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert next(get_dataset("digits", encoder=WordEncoder())[0])["textmask"].any() and "captions are not kept" in caplog.text


def test_encoders_that_are_none(tmp_path):
    nameless = lambda texts: WordEncoder()(texts)
    assert next(get_dataset("digits", encoder=nameless)[0])["textcontext"].shape == (16, 6, 5)
    for rest, word in ((dict(encoder="minilm"), "^encoder must be a function"), (dict(cache="x"), "^cache must be None without an encoder"), (dict(encoder=nameless, cache="x"), "^cache must be None"),
                       (dict(encoder=WordEncoder(), cache=3), "^cache must be the path"), (dict(encoder=lambda texts: np.zeros(3)), "^encoder must give"),
                       (dict(encoder=lambda texts: {"textcontext": np.zeros((len(texts), 2, 3))}), "^encoder must give"),
                       (dict(encoder=lambda texts: {"textcontext": np.zeros((1, 2, 3)), "textmask": np.zeros((1, 2), bool)}), "^encoder must give"),
                       (dict(encoder=lambda texts: {"textcontext": np.full((len(texts), 2, 3), np.nan), "textmask": np.ones((len(texts), 2), bool)}), "^encoder must give")):
        with pytest.raises(ValueError, match=word): get_dataset("digits", **rest)


def test_labels_are_counted_and_named(tmp_path):
    assert get_dataset("digits")[0].num_classes == 10 == len(get_dataset("digits", labels=True)[0].label_names)
    np.savez(tmp_path / "a.npz", image=PIXELS, label=np.arange(23) % 5, label_names=["a", "b", "c"])
    data = get_dataset(f"npz:{tmp_path}/a.npz", labels=True)[0]
    assert data.num_classes == 5 and data.label_names == ["a", "b", "c", "3", "4"]
    with pytest.raises(ValueError, match="captions=True needs a name for each label; there are 3 names, and labels to 4"): get_dataset(f"npz:{tmp_path}/a.npz", captions=True)
    np.savez(tmp_path / "b.npz", image=PIXELS)
    assert get_dataset(f"npz:{tmp_path}/b.npz")[0].num_classes is None
    with pytest.raises(ValueError, match="captions=True needs 23 strings"): get_dataset(f"npz:{tmp_path}/b.npz", captions=True)
    np.savez(tmp_path / "c.npz", image=PIXELS, text=np.arange(23))
    with pytest.raises(ValueError, match="captions=True needs 23 strings"): get_dataset(f"npz:{tmp_path}/c.npz", captions=True)


def stroke(width, shear, length=6, size=8, across=0.0, fine=16):
    "A bar of ink, of this width across and leaning so far to the right, (size, size, 1)."
    g = (np.arange(size * fine) + 0.5) / fine - size / 2
    y, x = np.meshgrid(g, g - across, indexing="ij")
    inside = (abs(x + shear * y) <= width / 2 * np.sqrt(1 + shear ** 2)) & (abs(y) <= length / 2)
    return inside.reshape(size, fine, size, fine).mean((1, 3))[..., None] * 2 - 1


def test_measures_of_drawn_strokes():
    for width in (0.5, 1, 1.5, 2, 2.5):
        bars = np.stack([stroke(width, shear, across=x) for shear in np.linspace(-0.8, 0.8, 9) for x in (-0.4, 0, 0.3)])
        assert abs(captions.stroke_weight(bars).mean() - width) < 0.26 and captions.stroke_weight(bars).std() < 0.15
    for shear in (-0.8, -0.3, 0, 0.3, 0.8): assert abs(captions.slant(stroke(1.2, shear)[None])[0] - shear) < 0.06
    turned = stroke(1.5, 0.3)[None]
    assert abs(captions.slant(turned[:, :, ::-1]) + captions.slant(turned)) < 1e-9  # mirrored: the other way
    assert abs(captions.stroke_weight(turned.transpose(0, 2, 1, 3)) - captions.stroke_weight(turned)) < 1e-9
    empty = -np.ones((2, 8, 8, 1))
    assert not captions.stroke_weight(empty).any() and not captions.slant(empty).any()
    for bad in (np.zeros((8, 8)), np.full((1, 8, 8), np.nan), np.zeros((0, 8, 8))):
        for measure in (captions.stroke_weight, captions.slant):
            with pytest.raises(ValueError, match="^images must"): measure(bad)


def test_digits_are_described_by_what_is_measured():
    images, labels = load_digits()
    texts = captions.describe_digits(images, labels)
    assert texts == captions.describe_digits(images, labels) and len(set(texts)) > 200
    weight, lean = captions.stroke_weight(images), captions.slant(images)
    for digit, name in enumerate(captions.DIGITS):
        own = np.flatnonzero(labels == digit)
        assert all(name in texts[i].replace(",", "").split() for i in own)
        for low, high, measure in (("thin", "thick", weight), ("leaning left", "leaning right", lean), ("leaning left", "upright", lean), ("upright", "leaning right", lean)):
            assert max(measure[i] for i in own if low in texts[i]) <= min(measure[i] for i in own if high in texts[i])
    assert not any(text.startswith("a eight") or "  " in text for text in texts) and {"a three", "an eight", "a one"} <= set(texts)
    for bad in (labels[:-1], labels * 2, labels.astype(float)):
        with pytest.raises(ValueError, match="^labels must be 1797 whole numbers from 0 to 9"): captions.describe_digits(images, bad)


# ---- emoji

def emoji_package(root):
    "A package of the form of npm's emoji-datasource-google, with four pictures and a skin tone."
    entries = []
    for n, (name, short, category) in enumerate((("GRINNING FACE", ["grinning", "grinning_face"], "Smileys & Emotion"), ("Chad Flag", ["flag-td"], "Flags"), ("WAVING HAND SIGN", ["wave"], "People & Body"))):
        entries.append({"name": name, "unified": f"1F60{n}", "image": f"1f60{n}.png", "short_names": short, "category": category, "subcategory": "x", "has_img_google": True})
    entries[2]["skin_variations"] = {"1F3FB": {"image": "1f602-1f3fb.png", "has_img_google": True}, "1F3FC-1F3FF": {"image": "1f602-b.png", "has_img_google": True}, "1F3FD": {"image": "none.png", "has_img_google": False}}
    (root / "img/google/64").mkdir(parents=True)
    for file in ("1f600", "1f601", "1f602", "1f602-1f3fb", "1f602-b"): Image.new("RGBA", (64, 64), (200, 0, 0, 0 if file == "1f600" else 255)).save(root / f"img/google/64/{file}.png")
    (root / "emoji.json").write_text(json.dumps(entries))
    return root


@pytest.mark.parametrize("packed", [False, True])
def test_emoji_become_a_folder_of_captioned_pictures(tmp_path, packed):
    pytest.importorskip("grain")
    package = emoji_package(tmp_path / "package")
    (tmp_path / "keys.json").write_text(json.dumps({"\U0001f600": ["grinning_face", "smile", ":D", "happy", "100"]}, ensure_ascii=False), "utf-8")
    if packed:
        with tarfile.open(tmp_path / "e.tgz", "w:gz") as archive: archive.add(package, "package")
        package = tmp_path / "e.tgz"
    told = python("import sys; from flaxdiff.data.captions import main; main(sys.argv[1:])", "emoji", package, tmp_path / "out", "--size", 16, "--keywords", tmp_path / "keys.json", "--background", "#00ff00")
    assert told == f"4 pictures of 16×16 with captions in {tmp_path / 'out'}\n"
    table = {row["file_name"]: row for row in map(json.loads, (tmp_path / "out" / "metadata.jsonl").read_text().splitlines())}
    assert table["1f600.png"] == {"file_name": "1f600.png", "text": ["grinning face", "grinning", "grinning face, smile, happy"], "category": "Smileys & Emotion", "subcategory": "x"}
    assert table["1f602-1f3fb.png"]["text"] == ["waving hand sign, light skin", "wave, light skin"] and table["1f602-b.png"]["text"][0] == "waving hand sign, medium-light and dark skin"
    data, count = get_dataset(f"folder:{tmp_path / 'out'}", 4, 16, captions=True)
    batch = next(data)
    assert count == 4 and all(text in table_texts for text, table_texts in zip(sorted(batch["text"]), [sum((row["text"] for row in table.values()), [])] * 4))
    clear = batch["image"][[text.startswith("grin") for text in batch["text"]]][0]
    assert abs(clear - [-1, 1, -1]).max() == 0  # a picture of nothing shows the background
    assert captions.prepare_emoji(package, tmp_path / "flags", 16, flags=True) == 5


def test_emoji_packages_that_are_none(tmp_path):
    (tmp_path / "e.tgz").write_bytes(b"no archive")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "emoji.json").write_text('[{"name": "A"}]')
    for package, word in ((tmp_path / "e.tgz", "a folder or a .tgz"), (tmp_path / "none", "a folder or a .tgz"), (tmp_path / "empty", "an emoji.json"), (tmp_path / "odd", "an emoji.json")):
        with pytest.raises(ValueError, match=f"^package must .*{word}"): captions.prepare_emoji(package, tmp_path / "out")
    with pytest.raises(ValueError, match="^out must be a new or an empty folder"): captions.prepare_emoji(tmp_path / "empty", tmp_path / "odd")
    assert not (tmp_path / "out").exists()


def test_the_real_emoji(tmp_path):
    package = os.environ.get("FLAXDIFF_EMOJI")
    if not package: pytest.skip("the real package is not here: npm pack emoji-datasource-google, and name its .tgz in FLAXDIFF_EMOJI")
    assert captions.prepare_emoji(package, tmp_path / "e", 8) > 3000
    batch = next(get_dataset(f"folder:{tmp_path / 'e'}", 64, 8, captions=True)[0])
    assert len(set(batch["text"])) > 50 and batch["image"].std() > 0.3


# ---- several streams in one

def test_mixed_streams_keep_their_weights_stop_and_go_on_on_every_host(pictures):
    def open(H=1, h=0, seed=4):
        parts = [(get_dataset("digits", 4, 8, 3, seed=1, host=h, hosts=H)[0], 5), (get_dataset(f"folder:{pictures}", 4, 8, host=h, hosts=H)[0], 2), (get_dataset("digits", 4, 8, 3, seed=2, host=h, hosts=H)[0], 1)]
        return stream.mix_streams(parts, seed)
    mixed = open()
    counts = np.bincount([mixed.choose(n) for n in range(800)], minlength=3)
    assert abs(counts - [500, 200, 100]).max() <= 4 and mixed.examples == 1797 * 2 + M
    batches = take(mixed, 9)
    state, due = json.dumps(mixed.get_state()), take(mixed, 20)
    again = open()
    assert all(np.array_equal(a, b) for a, b in zip(take(again, 9), batches))
    for H in (1, 2):
        for h in range(H):
            host = open(H, h)
            host.set_state(json.loads(state))
            share = 4 // H
            assert all(np.array_equal(a, b[h * share:(h + 1) * share]) for a, b in zip(take(host, 20), due))
            assert host.get_state() == mixed.get_state()
    assert not np.array_equal([open(seed=5).choose(n) for n in range(30)], [mixed.choose(n) for n in range(30)])


def test_states_and_parts_of_mixtures_that_do_not_fit():
    def open(weight=1.0, other=0, batch=4): return stream.mix_streams([(get_dataset("digits", batch)[0], weight), (get_dataset("digits", batch, seed=other)[0], 1)])
    mixed, moved = open(), open()
    take(moved, 3)
    moved_state = moved.get_state()
    wrong = json.loads(json.dumps(moved_state))
    wrong["streams"][1]["seed"] = 9
    for bad in ({}, None, open(2.0).get_state(), {**moved_state, "position": -1}, {**moved_state, "streams": moved_state["streams"][:1]}, wrong):
        with pytest.raises(ValueError): mixed.set_state(bad)
        assert mixed.get_state() == open().get_state()
    mixed.set_state(moved_state)
    data = get_dataset("digits")[0]
    for bad, word in (([], "at least one pair"), (3, "a list of pairs"), ([data], "a list of pairs|streams with get_state"), ([(data, 0)], "^weight must be above 0"), ([(data, -1)], "^weight must"), ([(data, np.nan)], "^weight must"),
                      ([(iter([1]), 1)], "streams with get_state"), ([(data, 1), (data, 1)], "each stream once")):
        with pytest.raises(ValueError, match=word): stream.mix_streams(bad)
    with pytest.raises(ValueError, match="^seed must"): stream.mix_streams([(data, 1)], seed=-1)
    odd = stream.mix_streams([(get_dataset("digits")[0], 1), (get_dataset("digits", labels=True)[0], 1)])
    with pytest.raises(ValueError, match="^streams must all hand out the same"): take(odd, 4)


# ---- processes that read, and batches of other shapes

def test_processes_read_the_same_stream_to_the_bit_count_damage_and_go_on(pictures, tmp_path):
    import shutil
    shutil.copytree(pictures, tmp_path / "p")
    (tmp_path / "p" / "cats" / "00.png").write_bytes(b"no picture")
    def open(**rest): return get_dataset(f"folder:{tmp_path / 'p'}", 6, 8, labels=True, captions=True, crop="random", seed=2, **rest)[0]
    alone, shared = open(threads=2), open(threads=2, workers=2)
    due = take(alone, 12)
    for a, b in zip(take(shared, 12), due): assert all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in b)
    assert shared.damaged == alone.damaged != {} and shared.reasons.keys() == alone.reasons.keys() and shared.get_state() == alone.get_state()
    shared.set_state({**shared.get_state(), "position": 5 * 6})  # an odd number: another process begins
    for a, b in zip(take(shared, 7), due[5:]): assert all(np.array_equal(a[k], b[k]) for k in b)
    with pytest.raises(ValueError, match="damaged"): take(open(workers=2, max_damaged=0), 6)


@pytest.mark.parametrize("bad", [-1, 1.5, True, "2", None])
def test_workers_are_a_number(pictures, bad):
    for name in (f"folder:{pictures}", "digits"):
        with pytest.raises(ValueError, match="^workers must be a whole number"): get_dataset(name, workers=bad)
    with pytest.raises(ValueError, match="^workers must be 0 for name='digits'"): get_dataset("digits", workers=1)


def test_bucket_shapes_hold_as_many_pixels():
    for side in (32, 64, 128, 256):
        shapes = module_pixels.bucket_shapes(side)
        assert len(shapes) == 5 and (side, side) in shapes and all(h % 8 == 0 == w % 8 for h, w in shapes)
        assert all(abs(h * w / side ** 2 - 1) < 0.2 for h, w in shapes) and sorted((w, h) for h, w in shapes) == sorted(shapes)
        assert np.array_equal(module_pixels.nearest_bucket([(w, h) for h, w in shapes], shapes), range(5))
    assert module_pixels.bucket_shapes(8) == [(8, 8)]
    for bad in (0, 2.5, None):
        with pytest.raises(ValueError, match="^image_scale must"): module_pixels.bucket_shapes(bad)


@pytest.fixture
def aspects(tmp_path):
    "Pictures of 3:1 (8 of them), 2:3 (4), 1:1 (4) and one lying on its side, whose red says which it is; and one that is none."
    pytest.importorskip("grain")
    sizes = [(90, 30)] * 8 + [(40, 60)] * 4 + [(50, 50)] * 4
    for i, (w, h) in enumerate(sizes): Image.new("RGB", (w, h), (10 * i, 0, 0)).save(tmp_path / f"{i:02d}.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40), (160, 0, 0)).save(tmp_path / "16.png", exif=exif)
    for i in range(17): (tmp_path / f"{i:02d}.txt").write_text(f"number {i}")
    return tmp_path


def numbers_of(batch): return np.rint((batch["image"][:, 0, 0, 0] + 1) * 12.75).astype(int)


def test_buckets_are_batches_of_one_shape_and_every_picture_comes_as_often(aspects):
    data, count = get_dataset(f"folder:{aspects}", 4, 32, crop="bucket", captions=True)
    seen = {}
    counts = np.zeros(17, int)
    for batch in take(data, 17 * 20 // 4):
        numbers = numbers_of(batch)
        assert [f"number {i}" for i in numbers] == list(batch["text"])
        seen.setdefault(batch["image"].shape[1:3], set()).update(numbers)
        np.add.at(counts, numbers, 1)
    assert seen == {(24, 48): set(range(8)), (40, 24): {8, 9, 10, 11, 16}, (32, 32): {12, 13, 14, 15}} and count == 17 == data.examples
    assert abs(counts - 20).max() <= 5


def test_buckets_stop_go_on_are_shared_encoded_and_held_back(aspects, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    def open(**rest): return get_dataset(f"folder:{aspects}", 4, 32, crop="bucket", encoder=WordEncoder(), cache=cache, seed=5, **rest)[0]
    data = open()
    take(data, 7)
    state, due = json.dumps(data.get_state()), take(data, 12)
    for h, H in ((0, 1), (0, 2), (1, 2)):
        again = open(host=h, hosts=H)
        again.set_state(json.loads(state))
        share = 4 // H
        for a, b in zip(take(again, 12), due): assert all(np.array_equal(a[k], b[k][h * share:(h + 1) * share]) for k in b)
    assert {"image", "textcontext", "textmask"} == set(due[0])
    parts = [{int(i) for batch in take(open(validation=5, part=part), 30) for i in numbers_of(batch)} for part in ("train", "validation")]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == set(range(17)) and len(parts[1]) == 5


def test_damage_in_all_buckets_is_counted_together(aspects):
    for i in (0, 1, 8, 12): (aspects / f"{i:02d}.png").write_bytes((aspects / f"{i:02d}.png").read_bytes()[:60])
    data = get_dataset(f"folder:{aspects}", 4, 32, crop="bucket")[0]
    take(data, 20)
    assert sorted(data.damaged.values()) == ["00.png", "01.png", "08.png", "12.png"]
    with pytest.raises(ValueError, match="of 17 examples are damaged, where max_damaged is 3|damaged"): take(get_dataset(f"folder:{aspects}", 4, 32, crop="bucket", max_damaged=3)[0], 40)
    with pytest.raises(ValueError, match="^crop must be 'centre' for name='digits'"): get_dataset("digits", crop="bucket")


def test_a_trainer_takes_the_shapes_that_the_buckets_have_and_no_others(aspects, tmp_path):
    def trainer(**rest):
        network = SimpleUNet(output_channels=3, emb_features=16, feature_depths=(8, 8), attention_configs=(None, None), num_res_blocks=1, norm_groups=4)
        made = DiffusionTrainer(network, optax.sgd(1e-3), EDMNoiseScheduler(), rngs=3, model_output_transform=KarrasEDMPredictor(), **rest)
        made.initialize(np.zeros((4, 32, 32, 3), np.float32))  # what is drawn is square
        return made
    def open(): return get_dataset(f"folder:{aspects}", 4, 32, crop="bucket", seed=2)[0]
    whole, cut = trainer(), trainer(checkpoint_dir=tmp_path / "run")
    shapes = {batch.shape for batch in take(open(), 9)}
    assert shapes == {(4, *shape, 3) for shape in open().shapes} and len(shapes) == 3
    whole.fit(open(), 9, progress=False)
    data = open()
    cut.fit(data, 4, progress=False)
    cut.save(data)
    again, data = trainer(checkpoint_dir=tmp_path / "run"), open()
    assert again.restore(data) == 4
    again.fit(data, 5, progress=False)
    for a, b in zip(jax.tree.leaves(whole.state.params), jax.tree.leaves(again.state.params)): np.testing.assert_array_equal(a, b)
    assert np.isfinite(whole.losses).all() and whole.model.image_shape == (32, 32, 3)
    with pytest.raises(ValueError, match=r"^data must keep the image shape \(32, 32, 3\) of its first batch, got \(24, 48, 3\)"): whole.train_step(np.zeros((4, 24, 48, 3), np.float32))
    data = get_dataset(f"folder:{aspects}", 4, 48, crop="bucket")[0]
    data.shapes = open().shapes
    with pytest.raises(ValueError, match=r"of its first batch or \d+×\d+"): whole.fit(data, 9, progress=False)
    with pytest.raises(ValueError, match="^steps_per_dispatch must be 1 for data whose shape changes"): trainer(steps_per_dispatch=2).fit(open(), 4, progress=False)
