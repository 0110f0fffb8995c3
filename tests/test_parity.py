"""The same denoiser, start and levels give what k-diffusion and diffusers give, to rounding; where we differ on purpose, the case says so.

Skipped where they are not installed; tests/peers.py says how to.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peers = pytest.importorskip("peers")
try: K = peers.load_k_diffusion()
except ModuleNotFoundError as missing: pytest.skip(str(missing), allow_module_level=True)

from flaxdiff.predictors import EpsilonPredictor, KarrasEDMPredictor, VPredictor
from flaxdiff.samplers import (DDIMSampler, DDPMSampler, DEISSampler, DPMSolverPlusPlusSampler, DPMSolverSampler, EDMSampler, EulerAncestralSampler, EulerSampler,
                               HeunSampler, LMSSampler, PLMSSampler, PNDMSampler, UniPCSampler, exponential_grid, karras_grid, leading_grid,
                               trailing_grid, uniform_grid)
from flaxdiff.schedulers import CosineNoiseSchedule, DiscreteNoiseScheduler, EDMNoiseScheduler, LinearNoiseSchedule
from laws import MIXTURE, exact_sampler, x64

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.filterwarnings("ignore:::diffusers"),
              pytest.mark.filterwarnings("ignore:.*dpmsolver.*deprecated")]
SHAPE = (4, 2, 2, 1)
EDM, LINEAR, EDM_ROW, V_ROW, EPS_ROW = EDMNoiseScheduler(), LinearNoiseSchedule(1000), KarrasEDMPredictor(), VPredictor(), EpsilonPredictor()
# x begins near 100 and all ends in sums and products of a few dozen terms: 1e-13 of rounding, which the ODE stretches a hundredfold
# where paths part, and weights that are differences of e^h lose a few digits more
CLOSE = 1e-9
# some peers compute x in float32 whatever they are given: 100 · 6e-8, as often stretched
SINGLE = 2e-4


class Problem:
    "12 levels of ρ = 7, down to the last one above σ = 0, and noise at the first; `sigmas` and x are those of α = 1."
    def __init__(self, schedule, row, times=None):
        self.schedule, self.row = schedule, row
        self.times = karras_grid(schedule, schedule.max_timesteps, schedule.min_time, 12) if times is None else np.asarray(times, float)
        self.alpha = np.asarray(schedule.alpha(self.times))
        self.sigmas = np.asarray(schedule.sigma(self.times)) / self.alpha
        self.x = self.sigmas[0] * np.random.default_rng(0).normal(size=SHAPE)
        self.denoiser = peers.Denoiser(lambda x, sigma: MIXTURE.denoise(x, 1.0, sigma))

    def ours(self, cls, denoise_final=False, key=0, **options):
        sampler = exact_sampler(cls, self.schedule, self.row, options=tuple(options.items()))
        y = np.asarray(sampler.sample(self.alpha[0] * self.x, self.times, key, denoise_final=denoise_final))
        return y if denoise_final else y / self.alpha[-1]

    def by_k_diffusion(self, sample, zero=False, **options):
        return sample(self.denoiser, torch.tensor(self.x), torch.tensor(np.append(self.sigmas, [0.0] * zero)), disable=True, **options).numpy()

    def by_diffusers(self, scheduler, sigmas=None, **options):
        return peers.run_diffusers(scheduler, self.denoiser, self.x, self.sigmas if sigmas is None else sigmas, **options)


@pytest.fixture(params=[(EDM, EDM_ROW), (LINEAR, V_ROW)], ids=["EDM", "linear"])
def problem(request, x64): return Problem(*request.param)


def our_noise(n, key=0, shape=SHAPE):
    "The n draws of one of our samplers: each by a key split off the one it carries."
    rng, draws = jax.random.PRNGKey(key), []
    for _ in range(n):
        rng, now = jax.random.split(rng)
        draws.append(np.asarray(jax.random.normal(now, shape, jnp.float64)))
    return draws


def agree(ours, theirs, atol=CLOSE): np.testing.assert_allclose(theirs, ours, rtol=0, atol=atol)


def differ(ours, theirs, atol=CLOSE): assert np.abs(theirs - ours).max() > 100 * atol


# Solvers that draw nothing

@pytest.mark.parametrize("cls, options, theirs, their_options", [
    (EulerSampler, {}, "euler", {}),
    (DDIMSampler, {}, "euler", {}),
    (HeunSampler, dict(frame="sigma"), "heun", {}),  # theirs knows no angle, which is our frame where α is not 1
    (LMSSampler, {}, "lms", {}),
    (LMSSampler, dict(order=2), "lms", dict(order=2)),
    (DPMSolverPlusPlusSampler, dict(multistep=False), "dpmpp_2s_ancestral", dict(eta=0)),
    (DPMSolverPlusPlusSampler, {}, "dpmpp_2m", {}),
], ids=["euler", "ddim", "heun", "lms4", "lms2", "2s", "2m"])
def test_k_diffusion(problem, cls, options, theirs, their_options):
    "At the last level above 0 and, where we both jump from there to x̂₀, at 0."
    sample = getattr(K, f"sample_{theirs}")
    agree(problem.ours(cls, **options), problem.by_k_diffusion(sample, **their_options))
    last = problem.ours(cls, True, **options), problem.by_k_diffusion(sample, zero=True, **their_options)
    # different on purpose: their LMS extrapolates to σ = 0 from its past slopes, ours trusts the newest x̂₀, as all our solvers do
    (differ if cls is LMSSampler else agree)(*last)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_by_k_diffusion(problem, order):
    "Their class takes one step at a time; its own loop chooses the levels (and the order of the last steps), so the loop is here."
    solver, x = K.DPMSolver(problem.denoiser), torch.tensor(problem.x)
    t = -torch.tensor(problem.sigmas).log()
    for start, end in zip(t[:-1], t[1:]): x, _ = getattr(solver, f"dpm_solver_{order}_step")(x, start, end)
    agree(problem.ours(DPMSolverSampler, order=order), x.numpy())
    assert problem.denoiser.calls == order * 11


def with_looks(sigmas, looks):
    "The levels, and between any two those at equal parts of λ that a single-step solver looks at."
    lam = -np.log(sigmas)
    inside = lam[:-1, None] + np.diff(lam)[:, None] * np.arange(looks) / looks
    return np.exp(-np.append(inside.ravel(), lam[-1]))


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("algorithm, ours", [("dpmsolver", (DPMSolverSampler, {})), ("dpmsolver++", (DPMSolverPlusPlusSampler, dict(multistep=False)))],
                         ids=["on-noise", "on-data"])
def test_single_step_by_diffusers(problem, algorithm, ours, order):
    """Diffusers counts every look inside a step as a level.

    To the second of three looks it goes by the rule that ends a step of order 2; the papers, k-diffusion and we integrate a straight line
    there, which diffusers calls 'heun'. Told so for that look, it agrees.
    """
    scheduler = diffusers.DPMSolverSinglestepScheduler(solver_order=order, algorithm_type=algorithm, prediction_type="sample", final_sigmas_type="sigma_min")
    sigmas, (cls, options) = with_looks(problem.sigmas, order), ours
    ours = problem.ours(cls, order=order, **options)
    if order == 3:
        differ(ours, problem.by_diffusers(scheduler, sigmas))
        update = scheduler.singlestep_dpm_solver_update
        def told(*args, order, **kwargs):
            scheduler.register_to_config(solver_type="heun" if order == 2 else "midpoint")
            return update(*args, order=order, **kwargs)
        scheduler.singlestep_dpm_solver_update = told
    agree(ours, problem.by_diffusers(scheduler, sigmas))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(problem, order):
    "B₂ on x̂₀. Theirs lowers the order of the last steps by default; with ours that is no option, all steps are of full order."
    make = lambda **options: diffusers.UniPCMultistepScheduler(solver_order=order, prediction_type="sample", **options)
    ours = problem.ours(UniPCSampler, order=order)
    agree(ours, problem.by_diffusers(make(lower_order_final=False)))
    if order > 1: differ(ours, problem.by_diffusers(make()))
    agree(problem.ours(UniPCSampler, order=order, corrector=False), problem.by_diffusers(make(lower_order_final=False, disable_corrector=list(range(12)))))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(problem, order):
    "In log ρ, which is -λ; diffusers has the integrals written out, ours are by quadrature."
    scheduler = diffusers.DEISMultistepScheduler(solver_order=order, prediction_type="sample", lower_order_final=False)
    agree(problem.ours(DEISSampler, order=order), problem.by_diffusers(scheduler))


@pytest.mark.parametrize("order", [2, 3])
def test_multistep_by_diffusers(problem, order):
    "2M, and 3M as published: ours is another, see below. In float32, whatever x is."
    scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=order, prediction_type="sample", lower_order_final=False, final_sigmas_type="sigma_min")
    ours = problem.ours(DPMSolverPlusPlusSampler, order=2) if order == 2 else three_m(problem)
    agree(ours, problem.by_diffusers(scheduler), SINGLE)


def test_the_jump_to_zero_by_diffusers(problem):
    "x̂₀ there too; UniPC's corrector has moved x by then, but not the x̂₀ of the network. Higher orders than this UniPC's are not finite at 0."
    sigmas, options = np.append(problem.sigmas, 0), dict(prediction_type="sample", lower_order_final=False)
    agree(problem.ours(UniPCSampler, True, order=1), problem.by_diffusers(diffusers.UniPCMultistepScheduler(solver_order=1, **options), sigmas))
    agree(problem.ours(DPMSolverPlusPlusSampler, True), problem.by_diffusers(diffusers.DPMSolverMultistepScheduler(solver_order=2, **options), sigmas), SINGLE)


def test_edm_schedulers():
    "Diffusers' own EDM classes, whose x is ours, in float32."
    problem = Problem(EDM, EDM_ROW)
    sigmas = np.append(problem.sigmas, 0)
    agree(problem.ours(EulerSampler, True), problem.by_diffusers(diffusers.EDMEulerScheduler(), sigmas), SINGLE)
    agree(problem.ours(DPMSolverPlusPlusSampler, True), problem.by_diffusers(diffusers.EDMDPMSolverMultistepScheduler(lower_order_final=False), sigmas), SINGLE)


# The third order of DPM-Solver++

def three_m(problem, second=1, start="midpoint", noise=()):
    """DPM-Solver++(3M) as its authors' code and both peers have it, at α = 1; their second difference times `second`.

    Where only two x̂₀ are known (`start`), diffusers takes half the first difference, the rule of 2M, k-diffusion the exact integral.
    """
    x, lam, known = problem.x, -np.log(problem.sigmas), []
    for i, h in enumerate(np.diff(lam)):
        known = [(lam[i], problem.denoiser(torch.tensor(x), problem.sigmas[i]).numpy()), *known[:2]]
        H = h * (2 if noise else 1)  # the SDE forgets twice as fast
        a0, a1 = -np.expm1(-H), 1 + np.expm1(-H) / H  # ∫ H e^(-H(1-u)) u^k du over [0, 1], k = 0 and 1
        a2_published = 0.5 - a1 / H  # half of what k = 2 gives
        slope = lambda new, old: (new[1] - old[1]) * h / (new[0] - old[0])
        x = np.exp(-H) * x + a0 * known[0][1]
        if len(known) == 2: x = x + (a1 if start == "exact" else a0 / 2) * slope(*known)
        if len(known) == 3:
            d, d_old, width = slope(*known[:2]), slope(*known[1:]), (known[0][0] - known[2][0]) / h
            bend = (d - d_old) / width
            x = x + a1 * (d + bend * (known[0][0] - known[1][0]) / h) + second * a2_published * bend
        if noise: x = x + problem.sigmas[i + 1] * np.sqrt(-np.expm1(-2 * h)) * noise[i]
    return x


@pytest.mark.parametrize("eta", [0, 1], ids=["ode", "sde"])
def test_3m(problem, eta):
    "Published: k-diffusion's, which starts exactly. With its second difference doubled and 2M's start: ours."
    noise = our_noise(11) if eta else []
    theirs = problem.by_k_diffusion(K.sample_dpmpp_3m_sde, eta=eta, noise_sampler=peers.TakesFrom(noise))
    ours = problem.ours(DPMSolverPlusPlusSampler, order=3, stochastic=bool(eta))
    agree(three_m(problem, start="exact", noise=noise), theirs)
    agree(three_m(problem, 2, noise=noise), ours)
    differ(ours, theirs)


def test_orders_of_3m():
    "On the exact solution; the first of the steps h is split into h/2, h/4, … so that the low order of the start is not what is measured."
    errors = []
    for n in (64, 128):
        lam = np.linspace(-np.log(6), -np.log(0.3), n + 1)
        h = lam[1] - lam[0]
        start = lam[0] + h * 0.5 ** np.arange(int(np.ceil(np.log2(8 / h ** 2))), 0, -1)
        sigmas = np.exp(-np.concatenate([lam[:1], start, lam[1:]]))
        problem = Problem(EDM, EDM_ROW, np.asarray(EDM.get_timesteps(sigmas)))
        exact = np.asarray(MIXTURE.ode_solution(jnp.asarray(problem.x), (1.0, problem.sigmas[0]), (1.0, problem.sigmas[-1])))
        errors.append([np.abs(x - exact).max() for x in (three_m(problem), problem.ours(DPMSolverPlusPlusSampler, order=3))])
    np.testing.assert_allclose(np.log2(np.divide(*errors)), [2, 3], atol=0.2)


# Solvers that draw: the same noise

@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_ancestral(problem, eta):
    "Euler ancestral and DDIM(η) are one formula here, DDPM too at η = 1."
    theirs = problem.by_k_diffusion(K.sample_euler_ancestral, eta=eta, noise_sampler=peers.TakesFrom(our_noise(11)))
    for cls in (EulerAncestralSampler, DDIMSampler): agree(problem.ours(cls, eta=eta), theirs)
    if eta == 1: agree(problem.ours(DDPMSampler), theirs)


def test_2m_sde(problem):
    theirs = problem.by_k_diffusion(K.sample_dpmpp_2m_sde, noise_sampler=peers.TakesFrom(our_noise(11)))
    agree(problem.ours(DPMSolverPlusPlusSampler, stochastic=True), theirs)


def test_2s_sde(problem):
    """k-diffusion's dpmpp_sde. Ours goes on from the noise it has half-way; theirs takes each draw from the start of the step.

    So theirs is given, for the whole step, the sum of our two draws: a normal draw like any other.
    """
    kept = np.exp(np.diff(np.log(problem.sigmas)) / 2)  # e^(-h/2)
    noise = our_noise(22)
    for i, k in enumerate(kept): noise[2 * i + 1] = (k * noise[2 * i] + noise[2 * i + 1]) * np.sqrt((1 - k ** 2) / (1 - k ** 4))
    theirs = problem.by_k_diffusion(K.sample_dpmpp_sde, noise_sampler=peers.TakesFrom(noise))
    agree(problem.ours(DPMSolverPlusPlusSampler, multistep=False, stochastic=True), theirs)


@pytest.mark.parametrize("s_max, s_noise", [(np.inf, 1.003), (5.0, 1.0)])
def test_churn(problem, s_max, s_noise, monkeypatch):
    "Both share S_churn among the levels, but ours does not churn the last jump: here S_tmin excludes it. On a schedule that ends at T, ours cannot be raised above it."
    if s_max == np.inf and problem.schedule is LINEAR: problem = Problem(LINEAR, V_ROW, karras_grid(LINEAR, 700.0, 1.0, 12))
    between = float(np.sqrt(problem.sigmas[-1] * problem.sigmas[-2]))
    monkeypatch.setattr(torch, "randn_like", peers.TakesFrom(our_noise(11) + [np.zeros(SHAPE)]))  # theirs draws at every level, needed or not
    churn = dict(churn=4.0, tmin=between, tmax=s_max, noise=s_noise)
    theirs = problem.by_k_diffusion(K.sample_heun, zero=True, **{f"s_{k}": v for k, v in churn.items()})
    agree(problem.ours(EDMSampler, True, frame="sigma", **{f"S_{k}": v for k, v in churn.items()}), theirs)
    differ(problem.ours(HeunSampler, True, frame="sigma"), theirs)


# Solvers of diffusers that walk whole times; index k of its tables is our time k + 1

def on_table(cls, scheduler, schedule=LINEAR, n=10, told=(), **options):
    "(ours, theirs) at the last of n levels; `told` are those of our options that its step takes too."
    problem = Problem(schedule, EPS_ROW, np.arange(n)[::-1] * (schedule.max_timesteps // n) + 1)  # its 'leading'
    theirs = peers.run_on_table(scheduler, problem.denoiser, problem.alpha[0] * problem.x, np.exp(schedule.log_alpha_bar[1:]), n, calls=-1,
                                **{name: options[name] for name in told})
    return problem.ours(cls, **options), theirs / problem.alpha[-1]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(eta, monkeypatch):
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddim.randn_tensor", peers.TakesFrom(our_noise(9)))
    agree(*on_table(DDIMSampler, diffusers.DDIMScheduler(clip_sample=False, prediction_type="sample"), told=["eta"], eta=eta))


@pytest.mark.parametrize("variance, theirs", [("posterior", "fixed_small"), ("beta", "fixed_large")])
def test_ddpm(variance, theirs, monkeypatch):
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", peers.TakesFrom(our_noise(9)))
    agree(*on_table(DDPMSampler, diffusers.DDPMScheduler(clip_sample=False, prediction_type="sample", variance_type=theirs), variance=variance))


def test_plms():
    "Its skip_prk_steps: the first step is Heun's, as ours, and then 2, 3, 4 slopes. Its last step too, to ᾱ = 1, has four: ours is x̂₀."
    agree(*on_table(PLMSSampler, diffusers.PNDMScheduler(skip_prk_steps=True)))


def test_pndm():
    "Its half-way is half-way in t, ours in σ/α: the same where σ/α = 0.02 t, and otherwise not."
    alpha_bar = 1 / (1 + (0.02 * np.arange(1001)) ** 2)
    straight = DiscreteNoiseScheduler(1 - alpha_bar[1:] / alpha_bar[:-1])
    agree(*on_table(PNDMSampler, diffusers.PNDMScheduler(), straight))
    differ(*on_table(PNDMSampler, diffusers.PNDMScheduler()))


# Schedules and levels

@pytest.mark.parametrize("ours, theirs", [
    (LinearNoiseSchedule(1000), dict(beta_schedule="linear")),
    (LinearNoiseSchedule(1000, 0.00085, 0.012, scaled=True), dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)),
    (CosineNoiseSchedule(1000), dict(beta_schedule="squaredcos_cap_v2")),
    (LinearNoiseSchedule(1000, zero_terminal_snr=True), dict(beta_schedule="linear", rescale_betas_zero_snr=True)),
    (LinearNoiseSchedule(1000, 0.00085, 0.012, scaled=True, zero_terminal_snr=True),
     dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True)),
], ids=["linear", "scaled", "cosine", "linear-zero-snr", "scaled-zero-snr"])
def test_discrete_schedules(ours, theirs):
    "Diffusers multiplies in float32: a thousand roundings of ᾱ, each 6e-8, and of betas."
    theirs = diffusers.DDIMScheduler(**theirs).alphas_cumprod.double().numpy()
    np.testing.assert_allclose(ours.alpha(np.arange(1, 1001.0)) ** 2, theirs, rtol=5e-5, atol=1e-7)


@pytest.mark.parametrize("n", [10, 50])
@pytest.mark.parametrize("spacing, grid", [("trailing", trailing_grid), ("leading", leading_grid), ("linspace", uniform_grid)])
def test_timesteps(spacing, grid, n):
    "One more than theirs. Ours are not rounded to whole times, and all start at T, where the noise is: their 'leading' starts one step lower."
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    ours, theirs = grid(LINEAR, 1000.0, 1.0, n), scheduler.timesteps.numpy() + 1
    if spacing == "leading": theirs[0] = 1000
    np.testing.assert_allclose(ours, theirs, atol=0.5 if spacing == "linspace" else 1e-9)


def test_karras_and_exponential_sigmas():
    "Their ramps are float32, and ρ = 7 takes seven times their rounding."
    for n in (2, 18, 1000):
        for make, grid in ((K.get_sigmas_karras, karras_grid), (K.get_sigmas_exponential, exponential_grid)):
            np.testing.assert_allclose(EDM.sigma(grid(EDM, 1.0, 0.0, n)), make(n, 0.002, 80.0).numpy()[:-1], rtol=5e-6)
    for name, grid in (("karras", karras_grid), ("exponential", exponential_grid)):
        scheduler = diffusers.EDMEulerScheduler(sigma_schedule=name)
        scheduler.set_timesteps(18)
        np.testing.assert_allclose(EDM.sigma(grid(EDM, 1.0, 0.0, 18)), scheduler.sigmas.numpy()[:18], rtol=5e-6)


@pytest.mark.parametrize("name, grid", [("use_karras_sigmas", karras_grid), ("use_exponential_sigmas", exponential_grid)])
def test_sigmas_on_discrete_schedules(name, grid):
    "Diffusers' options of the same names, from its first to its last level: the last is the root of its 1 - ᾱ(1), 1e-4 less 6e-8."
    scheduler = diffusers.DPMSolverMultistepScheduler(**{name: True}, beta_schedule="linear")
    scheduler.set_timesteps(18)
    t = grid(LINEAR, 1000.0, 1.0, 18)
    np.testing.assert_allclose(LINEAR.sigma(t) / LINEAR.alpha(t), scheduler.sigmas[:-1].numpy(), rtol=3e-4)
