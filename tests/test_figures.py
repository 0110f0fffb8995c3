"The interactive figures compute what the library does: their modules, run by node, beside flaxdiff in float64."
import json, re, shutil, subprocess
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdiff.exact import ExactModel, GaussianMixture
from flaxdiff.guidance import ClassifierFreeGuidance
from flaxdiff.denoiser import Denoiser
from flaxdiff.plots import COLORS
from flaxdiff.predictors import KarrasEDMPredictor
from flaxdiff.samplers import DPMSolverPlusPlusSampler, EDMSampler, EulerSampler, FlowMapSampler, HeunSampler
from flaxdiff.samplers import churn as churn_module
from flaxdiff.schedulers import EDMNoiseScheduler, FlowNoiseScheduler
from flaxdiff.schedulers.common import NoiseScheduler

ROOT = Path(__file__).resolve().parents[1]
EDM, LINE, ROW = EDMNoiseScheduler(), FlowNoiseScheduler(), KarrasEDMPredictor()
close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)


class Turning(NoiseScheduler):
    "α = cos(πt/2), σ = sin(πt/2): the chapter's first toy."
    def alpha(self, t): return jnp.cos(jnp.pi / 2 * self.as_times(t))
    def sigma(self, t): return jnp.sin(jnp.pi / 2 * self.as_times(t))


class Growing(NoiseScheduler):
    "α = 1, σ = t: its second."
    def alpha(self, t): return jnp.ones_like(self.as_times(t))
    def sigma(self, t): return self.as_times(t)


class Flawed:
    "Two heaps, for whose right one the network takes nine tenths of the data above σ = 0.8."
    early, late = GaussianMixture([-0.6, 0.6], 0.15, [0.1, 0.9]), GaussianMixture([-0.6, 0.6], 0.15)
    def denoise(self, x, alpha, sigma):
        return jnp.where((sigma > 0.8 * alpha)[:, None], self.early.denoise(x, alpha, sigma), self.late.denoise(x, alpha, sigma))


def mixture(data): return GaussianMixture(data["means"], data["stds"], data["weights"])


def solve(Solver, data, starts, levels, **options):
    "Ends of the library's solver on the exact denoiser of `data`, on Karras' ramp."
    solver = Solver(ExactModel(data, EDM, ROW), {}, EDM, ROW, **options)
    return solver.sample(jnp.asarray(starts), solver.make_steps(levels), 0)


def ends(case): return np.array([path[-1] for path in case["paths"]])


def check_noise(cases):
    for case in cases:
        schedule = {"turning": Turning(1), "growing": Growing(20), "straight": LINE}[case["name"]]
        for share, seen in zip(case["shares"], case["seen"]):
            t = share * case["T"]
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            x_t = schedule.add_noise(jnp.asarray(case["picture"])[None], jnp.asarray(case["eps"])[None], t)[0]
            close([seen["alpha"], seen["sigma"], seen["logSnr"]], [alpha, sigma, schedule.log_snr(t)])
            close(seen["pixels"], x_t / jnp.hypot(alpha, sigma))


def check_race(cases):
    solvers = {"Euler": EulerSampler, "Heun": HeunSampler, "DPM++ 2M": partial(DPMSolverPlusPlusSampler, order=2)}
    for case in cases:
        data, N = mixture(case["data"]), len(case["sigmas"])
        assert case["calls"] == (2 * N - 1 if case["name"] == "Heun" else N)
        close(case["sigmas"], EDM.sigma(np.linspace(1, 0, N)))
        close(ends(case), solve(solvers[case["name"]], data, case["starts"], N))
        close(case["error"], np.sqrt(((ends(case) - case["finish"]) ** 2).sum(-1).mean()))
    close(case["finish"], solve(HeunSampler, data, case["starts"], 256))


def check_guidance(cases):
    for case in cases:
        data, starts = mixture(case["data"]), jnp.asarray(case["starts"])
        plane = Denoiser(ExactModel(data, EDM, ROW), {}, EDM, ROW)
        solver = HeunSampler(ClassifierFreeGuidance(plane, {"label": 3}, case["w"]))
        due = solver.sample(starts, solver.make_steps(18), conditioning={"label": jnp.zeros(len(starts), int)})
        close(ends(case), due)
        close(case["middle"], due.mean(0))
        close(case["spread"], np.sqrt(due.var(0).mean()))


def check_churn(cases, monkeypatch):
    for case in cases:
        z = jnp.asarray(case["z"])  # (steps, walkers, 1), in place of the library's own draws
        heaps = Flawed() if case["network"] == "flawed" else Flawed.late
        solver = EDMSampler(ExactModel(heaps, EDM, ROW), {}, EDM, ROW, S_churn=float(case["S"]))
        plan, draw = solver.plan, churn_module.EDMSampler.before_denoising
        monkeypatch.setattr(solver, "plan", lambda levels, i, last: plan(levels, i, last) | {"z": z[i]})

        def before_denoising(x, level, state):
            if not case["S"]: return draw(solver, x, level, state)
            return state.plan["keep"] * x + state.plan["add"] * state.plan["z"], state.plan["higher"], state
        monkeypatch.setattr(solver, "before_denoising", before_denoising)
        due = solver.sample(jnp.asarray(case["starts"]), solver.make_steps(64), 0)
        close(ends(case), due)
        close(case["right"], (due > 0).mean())


def check_flowmap(cases):
    for case in cases:
        data, x = mixture(case["data"]), jnp.array([[case["x"]]])
        def rates(t): return 1.0 - t, t
        for i in range(0, 61, 12): close(case["path"][i], data.ode_solution(x, rates(1.0), rates(case["times"][i]))[0])
        solver = FlowMapSampler(ExactModel(data, LINE, ROW), {}, LINE, ROW)  # with a network that knows no end it is Euler's method
        close(case["tangent"][-1], solver.sample(x, solver.make_steps(case["N"]))[0])
        for n, place in enumerate(case["chord"]): close(place, data.ode_solution(x, rates(1.0), rates(1 - n / case["N"]))[0])


def check_numbers(numbers, monkeypatch):
    "Every number of every figure, to 1e-6."
    with jax.enable_x64(True):
        check_noise(numbers["noise"])
        check_race(numbers["race"])
        check_guidance(numbers["guidance"])
        check_churn(numbers["churn"], monkeypatch)
        check_flowmap(numbers["flowmap"])


def by_node(folder):
    "What node prints for the modules in `folder`."
    done = subprocess.run(["node", folder / "tests" / "figures.mjs"], capture_output=True, text=True, cwd=folder, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_figures_compute_what_the_library_does(monkeypatch):
    check_numbers(by_node(ROOT), monkeypatch)


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_a_wrong_figure_is_seen(tmp_path, monkeypatch):
    "A factor in DPM++ 2M, and one in the noise: neither goes unseen."
    for right, wrong, check in (("h / (2 * before.h)", "h / (2.001 * before.h)", "race"), ("process.sigma(t) * eps", "1.0001 * process.sigma(t) * eps", "noise")):
        for name in ("nbs/figures", "tests"): (tmp_path / name).mkdir(parents=True, exist_ok=True)
        for f in [*(ROOT / "nbs" / "figures").glob("*.mjs"), ROOT / "tests" / "figures.mjs"]:
            (tmp_path / f.relative_to(ROOT)).write_text(f.read_text(encoding="utf-8").replace(right, wrong), encoding="utf-8")
        numbers = by_node(tmp_path)
        with jax.enable_x64(True), pytest.raises(AssertionError):
            check_race(numbers["race"][-2:]) if check == "race" else check_noise(numbers["noise"][:1])


def test_figures_have_the_colours_of_the_book():
    css = (ROOT / "nbs" / "styles.css").read_text(encoding="utf-8")
    assert dict(re.findall(r"--(data|noise|ode|sde|exact|model): (#\w+);", css.split(".play {")[1].split("}")[0])) == COLORS


def test_each_figure_has_a_still_picture_and_words_for_it():
    drawn = set(re.findall(r"^  (\w+): \{$", (ROOT / "nbs" / "figures" / "play.mjs").read_text(encoding="utf-8"), re.M))
    found = {}
    for path in sorted((ROOT / "nbs").glob("[!_.]*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for name, alt, picture in re.findall(r'<div class="play" data-play="(\w+)">\s*!\[(.*?)\]\(attachment:(.*?)\)', "".join(cell["source"])):
                assert len(alt) > 40 and len(cell["attachments"][picture]["image/png"]) < 150_000, name
                found[name] = path.stem
    assert set(found) == drawn, f"figures in notebooks {sorted(found)}, in play.mjs {sorted(drawn)}"
