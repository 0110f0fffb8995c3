"""The reference: every public name has an entry with a signature and a sentence, and the pages say what the code says."""
import json, re
from pathlib import Path

import pytest
from test_contract import NAMES
from test_repo import load_script

ROOT = Path(__file__).resolve().parents[1]


REFERENCE = load_script("_reference")
CONTRACT = NAMES | {  # and those that later parts of the contract name
    "flaxdiff.schedulers": [*NAMES["flaxdiff.schedulers"], "FlowNoiseScheduler"],
    "flaxdiff.predictors": [*NAMES["flaxdiff.predictors"], "DiffusionPredictionTransform", "FlowPredictor"],
    "flaxdiff.samplers": ["DiffusionSampler", "DDPMSampler", "DDIMSampler", "EulerSampler", "EulerAncestralSampler", "HeunSampler", "RK4Sampler", "MultiStepDPM",
                          "MidpointSampler", "LMSSampler", "PLMSSampler", "PNDMSampler", "EDMSampler", "EulerMaruyamaSampler", "PredictorCorrectorSampler",
                          "DPMSolverSampler", "DPMSolverPlusPlusSampler", "UniPCSampler", "DEISSampler", "FlowMapSampler"],
    "flaxdiff.models": ["DiT", "SimpleUNet"],
    "flaxdiff.denoiser": ["Denoiser"],
    "flaxdiff.guidance": ["ClassifierFreeGuidance", "ClassifierGuidance", "Autoguidance", "DynamicThreshold"],
    "flaxdiff.exact": ["GaussianMixture"],
    "flaxdiff.text": ["load_text_encoder"],
    "flaxdiff.editing": ["image_to_image", "inpaint", "solve_inverse", "slerp", "encode"],
    "flaxdiff.distill": ["distillation"],
    "flaxdiff.pretrained": ["load_model", "save_model", "PretrainedModel"],
    "flaxdiff.metrics": ["frechet_distance", "FeatureStats", "kernel_distance", "precision_recall", "density_coverage", "nearest_copies", "load_features"],
    "flaxdiff.utils": ["RandomMarkovState", "clip_images"],
    "flaxdiff.plots": ["plotImages"]}
METHODS = {"NoiseScheduler": ["alpha", "sigma", "get_rates", "log_snr", "add_noise", "remove_all_noise", "get_timesteps", "sample_timesteps", "get_posterior_mean", "get_posterior_variance"],
           "DiffusionSampler": ["generate_images", "sample"], "Solver": ["take_next_step", "step"], "RandomMarkovState": ["get_random_key"],
           "DiffusionTrainer": ["fit", "state", "load_weights", "export"], "Denoiser": ["__call__"], "SimpleUNet": ["__call__"], "FeatureStats": ["update", "merge"],
           "PretrainedModel": ["sampler", "denoiser"]}
COMMANDS = {"--dataset", "--image-size", "--steps", "--batch-size", "--seed", "--out", "--resume", "--checkpoint-every", "--sampler", "--num", "--label", "--prompt", "--guidance", "--save"}


@pytest.fixture(scope="module")
def cells():
    "{(page, id): text} of every cell, as the notebooks hold them."
    return {(f.name, c["id"]): "".join(c["source"]) for f in (ROOT / "nbs").glob("reference*.ipynb") for c in json.loads(f.read_text(encoding="utf-8"))["cells"]}


def entry(cells, reference, module, name):
    "The cell of a name, or nothing."
    place = reference.resolve(module, name)
    return next((text for (page, i), text in cells.items() if place and page == reference.page(reference.room_of(place[0])) and re.match(rf"### {name}\n", text)
                 and i == f"n-{place[0].rpartition('.')[2]}-{name}"[:64]), "")


def lacks(text):
    "What an entry lacks of a heading, a signature and a sentence."
    if not text.startswith("### "): yield "no entry"
    if not re.search(r"^```python\n\S", text, re.M): yield "no signature"
    prose = re.sub(r"(?ms)^```.*?^```", "", text).split("\n#### ")[0]
    said = [p for p in prose.split("\n\n") if p.strip() and not re.match(r"\||#|- |\*\*|Import it from|A kind of|For example|Parameters as", p.strip())]
    if not said: yield "no sentence"


def test_the_pages_are_what_the_code_says():
    old = [path.name for path, _ in REFERENCE.stale()]
    assert not old, f"run python nbs/_reference.py: {', '.join(old)}"
    assert not list(REFERENCE.unsaid())


def test_every_module_has_a_room():
    assert not [m.name for m in REFERENCE.modules().values() if m.notebook and REFERENCE.room_of(m.name) is None]


def test_every_name_of_a_package_and_of_the_contract_has_an_entry(cells):
    packages = {m.name: m.offered for m in REFERENCE.modules().values() if m.path.name == "__init__.py"}
    wanted = {(m, n) for names in (packages, CONTRACT) for m, some in names.items() for n in some if (m, n) != ("flaxdiff.utils", "plotImages")}
    faults = [f"{module}.{name}: {fault}" for module, name in sorted(wanted) for fault in lacks(entry(cells, REFERENCE, module, name))]
    assert len(wanted) > 150 and not faults, "\n".join(faults)


def test_methods_and_flags_can_be_looked_up(cells):
    text = "\n".join(cells.values()).replace("\\", "")
    assert not [f"{c}.{m}" for c, some in METHODS.items() for m in some if f"\n#### {c}.{m}\n" not in text]
    assert not [flag for flag in COMMANDS if f"| `{flag}" not in text]


def test_each_chapter_leads_to_its_names_and_back(cells):
    links = {m.name: m.notebook for m in REFERENCE.modules().values() if m.notebook}
    for module, notebook in links.items():
        line = REFERENCE.look_up(notebook)
        if not line: continue
        page, _, place = re.search(r"\]\(([^)]*)\)", line)[1].partition("#")
        assert (page, f"m-{module}".replace(".", "-")) in cells and place == REFERENCE.anchor(REFERENCE.title_of(module))
        assert any(f"]({notebook}" in text for (p, _), text in cells.items() if p == page), f"{page} never leads to {notebook}"


TOY = {"__init__.py": '"A toy."\nfrom .utils import Child, bad, good, other, LIMIT\n__all__ = ["Child", "bad", "good", "other", "LIMIT"]\n',
       "utils.py": '''"A chapter."
# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/17_karras.ipynb.
__all__ = ['Base', 'Child', 'bad', 'good', 'other', 'helper', 'LIMIT', 'check_real']

def check_real(name, value, low=None): ...

class Base:
    "A base."
    def __init__(self, a: int, *, b=2,  # (B,): b
                 c=3):
        ...
    def go(self,
           x,  # (B, H): where from
          ):
        "It goes."

class Child(Base):
    "A child (Karras et al. 2022, eq. 5) of x|y."
    def __init__(self, *args,
                 d=4,  # in pixels
                 **options):
        super().__init__(*args, c=5, **options)
        check_real("d", d, 0)
        if d > 9:
            raise ValueError(f"a must be small beside d, got {d}; use less")

    def go(self, x): return x

def good(x):  # a number
    "Good."
    return helper(x)

def bad(x): return x

def helper(x):
    "It helps."
    return x

other = good
LIMIT = 3
'''}


def test_an_undocumented_function_is_found_and_signatures_are_whole(tmp_path):
    toy = load_script("_reference")
    (tmp_path / "flaxdiff").mkdir()
    for name, text in TOY.items(): (tmp_path / "flaxdiff" / name).write_text(text)
    toy.LIBRARY, toy.statements, toy.notebooks = tmp_path / "flaxdiff", REFERENCE.statements, REFERENCE.notebooks
    text = {e.name: toy.entry_text(e) for e in toy.entries().values() if e.public}
    assert [said.split()[0] for said in toy.unsaid()] == ["flaxdiff.utils.bad", "flaxdiff.utils.LIMIT"]
    assert not list(lacks(text["good"])) and not list(lacks(text["other"])) and list(lacks(text["bad"])) == ["no sentence"]
    assert "Child(a: int, *, d=4, b=2)" in text["Child"] and "A kind of [Base]" in text["Child"], "a base is public with its child, and what it takes is shown"
    assert "| <code>d</code> | in pixels |" in text["Child"] and "(B,): b" in text["Child"] and "arxiv.org/abs/2206.00364" in text["Child"] and r"x\|y" in text["Child"]
    assert "- d must be a finite number of at least 0\n- a must be small beside d\n" in text["Child"]
    assert "It goes.\n\nParameters as in [Base.go](reference_helpers.ipynb#base.go)." in text["Child"] and "Another name of [good]" in text["other"]
    assert "helper" not in text and "helper" in toy.folded([e for e in toy.entries().values() if not e.public])
