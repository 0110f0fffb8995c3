"""How good the shipped models are: samples, measured in the shipped features against all pictures of the data set.

    python benchmarks/quality.py digits [--num 1000] [--rng 0] [--sampler NAME] [--levels N] [--guidance W] [--load samples.npz] [--save samples.npz] [--card]

Ten levels of DPM-Solver++ by default, four jumps of a flow map, all thousand levels of the DDPM. Prints the Fréchet distance as it is and at 1/n = 0,
the share of samples of which the classifier is sure, and for models with labels or captions the share in which it sees what was asked for. Labels are asked for in turn, captions as they stand in the data.
No classifier of emoji ships: there, a hundred captions are asked for in turn (twelve levels, guidance 3), and what is measured is for how many samples the caption's own picture is the nearest of the hundred.
`--card` writes the lines into the model's card.
"""
import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from flaxdiff.data import load_digits
from flaxdiff.data.captions import describe_digits
from flaxdiff.metrics import frechet_limit, load_features, measure_frechet, measure_share
from flaxdiff.metrics.distances import collect_stats
from flaxdiff.pretrained import SHIPPED, load_model, write_card
from flaxdiff.text import load_text_encoder


@dataclass(frozen=True)
class Measure:
    "How samples of a model are drawn for its card, and what measures them."
    features: str | None  # the shipped features; None: the nearest of a hundred real emoji
    sampler: str = "dpm-solver++"
    levels: int = 10
    guidance: float = 1.0


MEASURES = {"digits": Measure("digits"), "digits-ddpm": Measure("digits", "ddpm", 1000), "digits-flow": Measure("digits"), "digits-map": Measure("digits", "flow-map", 4),
            "digits-text": Measure("digits"), "fashion": Measure("fashion"), "emoji": Measure(None, levels=12, guidance=3.0)}
EMOJI = Path(__file__).resolve().parents[1] / "nbs" / "images"  # a hundred of the pictures that the emoji model was trained on, and their captions


def real_emoji():
    "(the hundred real pictures, (100, 16, 16, 3) in [-1, 1], their captions)."
    sheet = np.asarray(Image.open(EMOJI / "emoji_real.png").convert("RGB"), np.float32) / 127.5 - 1
    captions = json.loads((EMOJI / "emoji_real.json").read_text(encoding="utf-8"))
    return sheet.reshape(10, 16, 10, 16, 3).swapaxes(1, 2).reshape(100, 16, 16, 3), captions


def mean_colours(images):
    "The mean colours of 8 × 8 squares, a row a picture, (n, 192)."
    return images.reshape(len(images), 8, 2, 8, 2, 3).mean((2, 4)).reshape(len(images), -1)


def nearest_emoji(images):
    "Which of the hundred real pictures is the nearest to each, (n,): by colours and rough shapes, not by single pixels."
    drawn, real = mean_colours(images), mean_colours(real_emoji()[0])
    return ((drawn[:, None] - real) ** 2).sum(2).argmin(1)


def ask(name, model, n, rng=0):
    "(conditions of n samples, the labels or numbers of the captions that they ask for, or None)."
    if MEASURES[name].features is None:
        captions, numbers = real_emoji()[1], np.arange(n) % 100
        return load_text_encoder(model.encoder)([captions[i] for i in numbers]), numbers
    if "label" in model.conditions:
        labels = np.arange(n, dtype=np.int32) % 10
        return {"label": labels}, labels
    if model.encoder is not None:
        images, labels = load_digits()
        picked = np.random.default_rng(rng).permutation(len(images))[:n]
        captions = np.array(describe_digits(images, labels), object)[picked]
        return load_text_encoder(model.encoder)(list(captions)), labels[picked]
    return (), None


def draw(name, n, rng=0, way=None, at_once=250):
    "(n samples as `way`, a `Measure`, says; what `ask` says that they were asked for)."
    model, way = load_model(name), way or MEASURES[name]
    conditions, labels = ask(name, model, n, rng)
    solver, parts = model.sampler(way.sampler, guidance_scale=way.guidance), []
    for start in range(0, n, at_once):
        count = min(at_once, n - start)
        part = {name: value[start:start + count] for name, value in conditions.items()} if conditions else ()
        parts.append(np.asarray(solver.generate_images(count, way.levels, rng=1000 * rng + start // at_once, conditioning=part)))
    return np.concatenate(parts), labels


def measure(name, images, labels=None):
    "What a card says of these samples of this model, by name."
    if MEASURES[name].features is None:
        return {"as asked": measure_share("the caption's own picture is the nearest of the hundred real ones for", nearest_emoji(images) == labels)}
    features = load_features(MEASURES[name].features)
    shards, p = collect_stats(features, images), features.probabilities(images)
    found = {"distance": measure_frechet(features.reference, shards), "distance at 1/n = 0": frechet_limit(features.reference, shards),
             "recognised": measure_share("the classifier is sure (p ≥ 0.8) of", p.max(1) >= 0.8)}
    if labels is not None: found["as asked"] = measure_share("the classifier sees what was asked for in", p.argmax(1) == labels)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MEASURES)
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--rng", type=int, default=0)
    parser.add_argument("--sampler")
    parser.add_argument("--levels", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--load", help="samples of an earlier call")
    parser.add_argument("--save", help="where to keep the samples")
    parser.add_argument("--card", action="store_true", help="write the lines into the card")
    args = parser.parse_args()
    given = {key: value for key in ("sampler", "levels", "guidance") if (value := getattr(args, key)) is not None}
    way = replace(MEASURES[args.name], **given)
    if args.load: images, labels = np.load(args.load)["images"], ask(args.name, load_model(args.name), args.num, args.rng)[1]
    else: images, labels = draw(args.name, args.num, args.rng, way)
    if args.save: np.savez_compressed(args.save, images=images.astype(np.float16))
    rows = {key: str(value) for key, value in measure(args.name, images, labels).items()}
    guided = f" --guidance {way.guidance:g}" if way.guidance != 1 else ""
    rows["measured"] = f"`python benchmarks/quality.py {args.name} --num {len(images)} --rng {args.rng} --sampler {way.sampler} --levels {way.levels}{guided}`"
    for key, text in rows.items(): print(f"{key}: {text}")
    if args.card:
        folder = SHIPPED / args.name
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["card"].update(rows)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(write_card(args.name, config, (folder / "model.safetensors").stat().st_size), encoding="utf-8")


if __name__ == "__main__": main()
