"""What the data pipeline gives by itself: images a second of each kind of stream, and of the augmentation on the device.

    python benchmarks/data.py [--windows 7] [--batch-size 128]

Prints the median over windows of images/s and of CPU time an image (all threads; it does not suffer from other work on the machine).
A window is as many batches as there are threads; what was made ready before the first is not counted. CPU time is this process's own: that of
processes which read is not in it. The pictures are JPEG files of
some 400 × 500 pixels, cut from the two photographs of scikit-learn, in a folder and as a TFDS data set, which needs TensorFlow to be written.
"""
import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grain
import jax
import numpy as np
import PIL
from PIL import Image
from sklearn import datasets

from flaxdiff.data import ImageStream, augment_image, get_dataset, prefetch_to_device
from flaxdiff.data.folder import reading_threads

PICTURES = 512  # files on disk
THREADS = reading_threads()  # of a stream by default: one a core
DEMO = 128 * 8  # images a second: its batch times the steps a second of two CPU cores
RECIPE = """
import sys, pathlib, tensorflow_datasets as tfds
class Cuttings(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self): return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"image": tfds.features.Image()}))
    def _split_generators(self, manager): return {"train": self._generate_examples()}
    def _generate_examples(self):
        for file in pathlib.Path(sys.argv[1]).glob("*.jpg"): yield file.name, {"image": str(file)}
Cuttings(data_dir=sys.argv[2], file_format="array_record").download_and_prepare()
"""


def write_pictures(folder):
    "The files, and the TFDS data set of the same files; returns their mean size in bytes."
    photographs, rng = datasets.load_sample_images().images, np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for i in range(PICTURES):
        height, width = rng.integers(370, 427), rng.integers(450, 640)
        top, left = rng.integers(0, 428 - height), rng.integers(0, 641 - width)
        Image.fromarray(photographs[i % 2][top:top + height, left:left + width]).save(folder / "pictures" / f"{i:04d}.jpg", quality=90)
    (folder / "cuttings.py").write_text(RECIPE)
    subprocess.run([sys.executable, folder / "cuttings.py", folder / "pictures", folder / "tfds"], check=True, capture_output=True)
    return statistics.mean(file.stat().st_size for file in (folder / "pictures").iterdir())


def rates(step, images, windows, per_window, warm):
    "(median images/s, median CPU milliseconds an image) of `step`, each giving so many images."
    for _ in range(warm): step()
    wall, cpu = [], []
    for _ in range(windows):
        start, busy = time.perf_counter(), time.process_time()
        for _ in range(per_window): step()
        wall.append(per_window * images / (time.perf_counter() - start))
        cpu.append(1e3 * (time.process_time() - busy) / (per_window * images))
    return statistics.median(wall), statistics.median(cpu)


def report(name, rate):
    print(f"| {name:44s} | {rate[0]:12,.0f} | {rate[1]:10.4f} | {rate[0] / DEMO:8.1f} |", flush=True)
    return rate


def main(windows, B):
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {jax.devices()[0].device_kind}; Python {platform.python_version()}, "
          f"jax {jax.__version__}, grain {grain.__version__}, Pillow {PIL.__version__}, batch {B}")
    print(f"| {'stream':44s} | {'images/s':>12s} | {'CPU ms/im.':>10s} | {'× demo':>8s} |")
    digits = get_dataset("digits", B)[0]
    in_memory = report("digits, 8×8", rates(lambda: next(digits), B, windows, 200, 20))
    ahead = prefetch_to_device(get_dataset("digits", B)[0])
    report("digits, 8×8, on the device", rates(lambda: jax.block_until_ready(next(ahead)), B, windows, 200, 20))
    million = ImageStream(np.arange(1_280_000), None, B)  # numbers for images: what the order costs by itself
    report("numbers, 1,280,000 examples", rates(lambda: next(million), B, windows, 200, 20))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_pictures(folder)
        for kind, arguments in (("TFDS", dict(name="cuttings", data_dir=folder / "tfds")), ("folder", dict(name=f"folder:{folder / 'pictures'}"))):
            data, datalen = get_dataset(**arguments, batch_size=B, image_scale=64)
            assert datalen == PICTURES
            report(f"{kind}, JPEG of {size / 1e3:.0f} kB, 64×64", rates(lambda: next(data), B, windows, THREADS, 2 * THREADS + THREADS))
            assert not data.damaged
            del data
        for workers in (1, THREADS):
            data, _ = get_dataset(f"folder:{folder / 'pictures'}", B, 64, workers=workers)
            report(f"folder, by {workers} process{'es' * (workers > 1)}", rates(lambda: next(data), B, windows, THREADS, 3 * THREADS))
            del data
        data, _ = get_dataset(f"folder:{folder / 'pictures'}", B, 64, crop="bucket")
        report("folder, in buckets of some 64² pixels", rates(lambda: next(data), B, windows, 5 * THREADS, 15 * THREADS))
        del data
    keys = jax.random.split(jax.random.PRNGKey(0), B)
    for shape in ((8, 8, 1), (64, 64, 3)):
        images, augment = jax.random.uniform(jax.random.PRNGKey(1), (B, *shape)), jax.jit(jax.vmap(augment_image))
        report(f"augment_image, {'×'.join(map(str, shape))}, on the device", rates(lambda: jax.block_until_ready(augment(keys, images)), B, windows, 10, 3))
    print(f"The demo trains on the digits and needs about {DEMO:,} images/s (128 a step, 8 steps/s on two CPU cores): "
          f"their stream gives {in_memory[0] / DEMO:,.0f} times that, so it is not what limits the demo.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=128)
    arguments = parser.parse_args()
    main(arguments.windows, arguments.batch_size)
