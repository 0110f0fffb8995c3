"""The streams of `get_dataset`: the digits, and TensorFlow Datasets image sets that the tests write to disk themselves."""
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from sklearn import datasets

from flaxdiff import data as module
from flaxdiff.data import ImageStream, get_dataset, load_digits

# Pictures of which only the middle square has the colour (10 i, 200, 255 - 10 i); all around it is black.
RECIPES = """
import sys
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
class OxfordFlowers102(Recipe):  # stands for the real one, whose recipe is then found prepared
    VERSION, splits = tfds.core.Version("2.1.1"), {"train": range(3), "validation": range(3, 6), "test": range(6, 17)}

for kind in (TinyPictures, TinyUnlabelled, OxfordFlowers102):
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


@pytest.fixture(params=["digits", "tiny_pictures"])
def opened(request, folders):
    "`get_dataset` of either kind, small enough to go through several epochs: (a function that opens it, the number of examples)."
    def open(**arguments): return get_dataset(request.param, **{"batch_size": 5, "image_scale": 8, "data_dir": folders[0], **arguments})[0]
    return open, {"digits": 1797, "tiny_pictures": M}[request.param]


def take(stream, n):
    "The next n batches."
    return [next(stream) for _ in range(n)]


def rows(batches):
    "One hashable thing for each image."
    return [image.tobytes() for batch in batches for image in batch]


# ---- both kinds of stream

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
    (dict(image_scale=0), "image_scale"), (dict(image_scale=8.5), "image_scale"), (dict(channels=2), "channels"), (dict(channels=True), "channels"),
    (dict(batch_size=0), "batch_size"), (dict(batch_size=2.0), "batch_size"), (dict(seed=-1), "seed"), (dict(seed=None), "seed"),
    (dict(split="valid"), "split"), (dict(split=3), "split"), (dict(split=None), "split")])
def test_bad_arguments_are_named(name, bad, word, folders):
    with pytest.raises(ValueError, match=f"^{word} must"): get_dataset(name, **{"data_dir": folders[0], **bad})


@pytest.mark.parametrize("name", [None, 5, b"digits"])
def test_a_name_is_a_string(name):
    with pytest.raises(ValueError, match="^name must"): get_dataset(name)


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
    assert repr(name) in str(error.value) and "name must be 'digits' or one of tensorflow.org/datasets/catalog" in str(error.value)
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
    with pytest.raises(ValueError, match="'oxford_flowers102' needs TensorFlow Datasets and grain: pip install 'flaxdiff\\[data\\]'"):
        get_dataset("oxford_flowers102")


def test_a_recipe_that_dies_is_told(monkeypatch, folders):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="its process ended with code 1"): module.find_tfds("tiny_pictures", folders[0])
