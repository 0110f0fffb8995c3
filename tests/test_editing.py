"""Editing: on Gaussian data every answer is known; what is kept stays bit for bit; and bad requests are refused."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdiff.denoiser import Denoiser, with_params
from flaxdiff.editing import Blur, Downsample, Grey, Keep, Posterior, encode, image_to_image, inpaint, invert_and_edit, slerp, solve_inverse
from flaxdiff.editing.inpainting import Replaced, ResamplingSampler, with_denoiser
from flaxdiff.editing.inverse import check_operator, conjugate_gradients
from flaxdiff.exact import ExactModel, Gaussian
from flaxdiff.samplers import DDIMSampler, DPMSolverPlusPlusSampler, EDMSampler, EulerAncestralSampler, HeunSampler
from laws import EACH_KIND, PREDICTORS, SAMPLER_CLASSES, SCHEDULES, WAVE, ZERO_SNR, Wave, default_predictor, over, x64

EDM, ROW = SCHEDULES["EDMNoiseScheduler"], PREDICTORS["KarrasEDMPredictor"]
D = 8
PLACE = np.arange(D)
COV = 0.05 * np.exp(-(((PLACE[:, None] - PLACE) / 2.0) ** 2) / 2) + 1e-4 * np.eye(D)
MEAN = 0.1 * np.cos(PLACE)
DATA = Gaussian(MEAN, COV)
MASK = np.array([[1, 1, 1, 0, 0, 0, 1, 1]])
KNOWN = MASK[0] == 1
Y = np.asarray(DATA.sample(jax.random.PRNGKey(3), 1))[0]
KINDS = {name: {**SCHEDULES, **ZERO_SNR}[name] for name in EACH_KIND}


def gaussian_sampler(cls=HeunSampler, schedule=EDM, predictor=None, **options):
    row = predictor or (ROW if schedule is EDM else default_predictor(schedule))
    return cls(ExactModel(DATA, schedule, row, (1, D, 1)), {}, schedule, row, **options)


def wave_sampler(cls=HeunSampler, schedule=EDM, model=None, **options):
    return cls(model or Wave(), Wave.params, schedule, ROW if schedule is EDM else default_predictor(schedule), **options)


def given(A, y, sigma):
    "Mean and covariance of x0 given y = A x0 + sigma noise: the normal equations, written out."
    gain = COV @ A.T @ np.linalg.inv(A @ COV @ A.T + sigma ** 2 * np.eye(len(A)))
    return MEAN + gain @ (y - A @ MEAN), COV - gain @ A @ COV


def moments_of_flow(sampler, std, N=80):
    "Mean and covariance of what a deterministic sampler makes: for Gaussian data its map is affine."
    z = std * np.concatenate([np.zeros((1, D)), np.eye(D)]).reshape(-1, 1, D, 1)
    out = np.asarray(sampler(jnp.asarray(z), N)).reshape(-1, D)
    slope = out[1:] - out[0]
    return out[0], slope.T @ slope


def pictures(seed=0, batch=2, side=4, channels=1):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, side, side, channels)).astype(np.float32)


# ---------------------------------------------------------------- the exact posterior

@over(schedule=KINDS)
@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_inverse_problems_have_the_gaussian_posterior(schedule, sigma, x64):
    "Means of neighbours, with noise and without: mean and covariance to the solver's order."
    A = np.kron(np.eye(4), np.ones((1, 2)) / 2)
    y = A @ Y + 0.05
    sampler = gaussian_sampler(schedule=schedule)
    operator = jax.tree_util.Partial(lambda x: jnp.asarray(A, x.dtype) @ x.reshape(len(x), D, 1))

    def make(z, N):
        measured = jnp.broadcast_to(jnp.asarray(y)[:, None], (len(z), 4, 1))
        edited = Posterior(sampler.denoiser, schedule, operator, measured, sigma, 4)
        return with_denoiser(sampler, edited).sample(z, sampler.make_steps(N), rng=0)

    mean, cov = moments_of_flow(make, 80.0 if schedule is EDM else 1.0)
    due_mean, due_cov = given(A, y, sigma)
    np.testing.assert_allclose(mean, due_mean, atol=2e-3)
    np.testing.assert_allclose(cov, due_cov, atol=4e-4)


@pytest.mark.parametrize("cls", [DPMSolverPlusPlusSampler, EulerAncestralSampler, EDMSampler])
def test_any_solver_walks_to_the_posterior(cls):
    "Through `solve_inverse`: a multistep method, a stochastic one, one with churn. 4000 draws: a mean to ± .004."
    sampler = gaussian_sampler(cls, **({"S_churn": 10} if cls is EDMSampler else {}))
    seen = np.broadcast_to((Y * KNOWN).astype(np.float32).reshape(1, 1, D, 1), (4000, 1, D, 1))
    made = np.asarray(solve_inverse(sampler, seen, Keep(MASK[..., None]), 0.0, 60, rng=0)).reshape(-1, D)
    mean, cov = given(np.eye(D)[KNOWN], Y[KNOWN], 0.0)
    np.testing.assert_allclose(made.mean(0), mean, atol=8e-3)
    np.testing.assert_allclose(np.cov(made.T), cov, atol=2.5e-3)


def test_where_the_signal_is_gone_nothing_is_guided(x64):
    "α = 0: no division by it, and the plain answer."
    schedule = ZERO_SNR["CosineNoiseSchedule-zero-snr"]
    sampler = gaussian_sampler(schedule=schedule)
    edited = Posterior(sampler.denoiser, schedule, Keep(MASK[..., None]), jnp.ones((1, 1, D, 1)), 0.1)
    x = jnp.asarray(Y).reshape(1, 1, D, 1)
    T = schedule.max_timesteps
    np.testing.assert_array_equal(edited(x, T)[0], sampler.denoiser(x, T)[0])


def test_variance_of_the_data_in_place_of_the_slope(x64):
    "On data of equal variances both are the same: there the slope says what ΠGDM assumes."
    schedule = SCHEDULES["CosineContinuousNoiseScheduler"]
    model = ExactModel(Gaussian(np.zeros(D), 0.3 * np.ones(D)), schedule, PREDICTORS["VPredictor"], (1, D, 1))
    sampler = HeunSampler(model, {}, schedule, PREDICTORS["VPredictor"])
    y = 0.2 * jnp.ones((2, 1, D // 2, 1))
    operator = jax.tree_util.Partial(lambda x: x[:, :, ::2] + x[:, :, 1::2])
    a, b = (Posterior(sampler.denoiser, schedule, operator, y, 0.1, 4, v) for v in (None, 0.3))
    x = jax.random.normal(jax.random.key(0), (2, 1, D, 1))
    for t in (0.1, 0.5, 0.9): np.testing.assert_allclose(a(x, t)[0], b(x, t)[0], atol=1e-12)


def test_an_edited_denoiser_is_called_and_given_weights_like_any_other(x64):
    "What does not fit is refused by name; other weights reach the network through it."
    denoiser = Denoiser(WAVE, {"w": np.float64(0.3)}, EDM, PREDICTORS["VPredictor"])
    known = jnp.ones((2, 4, 4, 1))
    edited = Replaced(denoiser, EDM, known, jnp.zeros((1, 4, 4, 1)))
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    for bad, named in (((x, [0.1, 0.2, 0.3]), "^t must"), ((x, 0.5, {"label": np.zeros(3)}), "^conditioning must"), ((np.ones((2, 4, 4, 1), int), 0.5), "^x must")):
        with pytest.raises(ValueError, match=named): edited(*bad)
    other = {"w": np.float64(0.9)}
    want = Denoiser(WAVE, other, EDM, PREDICTORS["VPredictor"])(x, 0.5)
    for a, b in zip(with_params(edited, other)(x, 0.5), want): np.testing.assert_allclose(a, b, rtol=1e-12)
    assert np.abs(edited(x, 0.5)[0] - want[0]).max() > 1e-3 and edited.params["w"] == 0.3


def test_conjugate_gradients(x64):
    "Each row for itself; a zero row, a singular but consistent one, and one with no curvature stay finite."
    M = np.random.default_rng(0).normal(size=(4, 5, 5))
    M = M @ M.transpose(0, 2, 1)
    M[2, :, 0] = M[2, 0] = 0
    M[3] = -np.eye(5)
    due = np.random.default_rng(1).normal(size=(4, 5))
    due[1] = due[2, 0] = 0
    b = np.einsum("bij,bj->bi", M, due)
    u = conjugate_gradients(lambda v: jnp.einsum("bij,bj->bi", M, v), jnp.asarray(b), 12)
    np.testing.assert_allclose(u[:3], due[:3], atol=1e-6)
    np.testing.assert_array_equal(u[3], 0)


def test_operators():
    x = pictures(side=8, channels=3)
    np.testing.assert_allclose(Downsample(4)(x)[1, 1, 0, 2], x[1, 4:, :4, 2].mean(), rtol=1e-6)
    np.testing.assert_allclose(Blur(1.5)(jnp.ones((1, 8, 8, 1))), 1, rtol=1e-6)
    bright = np.zeros((1, 21, 21, 1), np.float32)  # far from the edges, where the kernel is cut and its rest made to sum to 1
    bright[0, 10, 10] = 1
    spot = np.asarray(Blur(1.0)(bright))[0, ..., 0]
    np.testing.assert_allclose(spot[10, 11] / spot[10, 10], np.exp(-0.5), rtol=1e-6)
    assert Grey()(x).shape == (2, 8, 8, 1) and np.allclose(Grey()(jnp.ones((1, 2, 2, 3))), 1)
    assert Downsample(4) == Downsample(4) and hash(Blur(1.0)) == hash(Blur(1.0))  # so that programs are found again
    for operator in (Downsample(2), Blur(1.0), Grey(), Keep(np.eye(8)[..., None]), lambda x: 3 * x[:, 1:]):
        check_operator(operator, x.shape)


# ---------------------------------------------------------------- filling holes

AT_ONCE = ("EulerSampler", "HeunSampler", "DDPMSampler", "DPMSolverPlusPlusSampler", "UniPCSampler", "EDMSampler")  # the others wait for --slow


@pytest.mark.parametrize("cls", [pytest.param(cls, id=name, marks=[] if name in AT_ONCE else [pytest.mark.slow]) for name, cls in SAMPLER_CLASSES.items()])
@pytest.mark.parametrize("method", ["repaint", *(pytest.param(method, marks=pytest.mark.slow) for method in ("replace", "guided"))])
def test_kept_pixels_come_back_bit_for_bit(cls, method):
    "With every solver; the holes are filled with something else than lay there."
    images, mask = pictures(), np.ones((4, 4))
    mask[1:3, 1:3] = 0
    made = np.asarray(inpaint(wave_sampler(cls), images, mask, method, diffusion_steps=6, rounds=2, rng=0))
    hole = np.broadcast_to(mask[None, ..., None] == 0, made.shape)
    np.testing.assert_array_equal(made[~hole], images[~hole])
    assert np.all(np.isfinite(made)) and np.all(np.abs(made) <= 1) and np.all(made[hole] != images[hole])


@over(schedule=KINDS)
@pytest.mark.parametrize("method", ["replace", "repaint", "guided"])
def test_holes_on_every_kind_of_schedule(schedule, method):
    images, mask = pictures(), np.eye(4)
    made = np.asarray(inpaint(wave_sampler(DDIMSampler, schedule), images, mask[..., None], method, diffusion_steps=8, rounds=1, rng=0))
    np.testing.assert_array_equal(made[:, mask == 1], images[:, mask == 1])
    assert np.all(np.isfinite(made))


def test_the_known_part_is_noised_as_the_level_says(x64):
    "Under `Replaced` a deterministic solver holds α y + σ z with the z it began with, and a stochastic one has that variance."
    y, z = jnp.asarray(Y).reshape(1, 1, D, 1), jax.random.normal(jax.random.key(1), (4000, 1, D, 1))
    for cls, schedule in ((HeunSampler, EDM), (DPMSolverPlusPlusSampler, SCHEDULES["CosineContinuousNoiseScheduler"]), (EulerAncestralSampler, EDM)):
        sampler = gaussian_sampler(cls, schedule)
        edited = with_denoiser(sampler, Replaced(sampler.denoiser, schedule, y, jnp.asarray(MASK[None, ..., None])))
        steps = sampler.make_steps(20)
        alpha, sigma = schedule.alpha(steps[[0, 10]]), schedule.sigma(steps[[0, 10]])
        x = edited.sample(alpha[0] * y + sigma[0] * z, steps[:11], rng=0, denoise_final=False)
        rest = np.asarray((x - alpha[1] * y) / sigma[1])[:, 0, KNOWN, 0]
        if cls is EulerAncestralSampler: assert abs(rest.std() - 1) < 0.02 and abs(rest.mean()) < 0.02
        else: np.testing.assert_allclose(rest, np.asarray(z)[:, 0, KNOWN, 0], atol=1e-6)


def test_replacing_is_wrong_resampling_nearer_and_the_posterior_right():
    "The variance in the hole given what is around it, by method, in units of the posterior's."
    n, sampler = 3000, gaussian_sampler(HeunSampler)
    images = np.broadcast_to(Y.astype(np.float32).reshape(1, 1, D, 1), (n, 1, D, 1))
    due = given(np.eye(D)[KNOWN], Y[KNOWN], 0.0)[1][~KNOWN][:, ~KNOWN].trace()
    def excess(made): return np.cov(np.asarray(made).reshape(n, D)[:, ~KNOWN].T).trace() / due
    replaced, guided, repaint, more = (excess(inpaint(sampler, images, MASK, method, 40, rounds=rounds, rng=0))
                                       for method, rounds in (("replace", 1), ("guided", 1), ("repaint", 4), ("repaint", 16)))
    exact = excess(solve_inverse(sampler, images * MASK[..., None].astype(np.float32), Keep(MASK[..., None]), 0.0, 40, rng=0))
    assert replaced > guided > 5 > repaint > 2 > more > exact and abs(exact - 1) < 0.1


def test_resampling_alone_changes_no_distribution():
    "Down and up again leaves p_t as it is, so the samples are still those of the data."
    sampler = ResamplingSampler(gaussian_sampler(HeunSampler), 2)
    x = 80 * jax.random.normal(jax.random.key(0), (4000, 1, D, 1))
    made = np.asarray(sampler.sample(x, sampler.make_steps(300), rng=1)).reshape(-1, D)
    np.testing.assert_allclose(made.mean(0), MEAN, atol=0.02)
    np.testing.assert_allclose(np.cov(made.T), COV, atol=6e-3)


def test_calls_of_the_network():
    "Heun asks 2N - 1 times; each round once more at each of the N - 1 steps."
    for method, rounds, due in (("replace", 3, 9), ("guided", 3, 9), ("repaint", 3, 9 + 4 * 3)):
        model = Wave(count_calls=True)
        inpaint(wave_sampler(HeunSampler, model=model), pictures(), np.eye(4), method, diffusion_steps=5, rounds=rounds, rng=0).block_until_ready()
        jax.effects_barrier()
        assert model.calls == due


def test_one_program_for_all_pictures_and_masks():
    "New images, another mask or measurement, another seed: nothing is compiled again."
    model = Wave()
    sampler = wave_sampler(DDIMSampler, model=model)
    def ask(seed):
        images = pictures(seed)
        inpaint(sampler, images, np.eye(4) if seed else np.ones((4, 4)) - np.eye(4), diffusion_steps=4, rng=seed)
        solve_inverse(sampler, Downsample(2)(images), Downsample(2), 0.1 * seed, 4, image_size=4, channels=1, rng=seed)
        return model.traces
    traces = ask(0)
    assert ask(1) == traces


def test_the_answer_for_one_image_does_not_hang_on_the_others():
    sampler, images, mask = wave_sampler(EulerAncestralSampler), pictures(batch=4), np.eye(4)
    both = inpaint(sampler, images, mask, diffusion_steps=4, rng=0)
    other = images.copy()
    other[2:] = 0
    np.testing.assert_array_equal(inpaint(sampler, other, mask, diffusion_steps=4, rng=0)[:2], both[:2])


# ---------------------------------------------------------------- from a picture, and back to noise

def test_image_to_image_is_noise_and_then_the_solver():
    sampler, images = wave_sampler(), pictures()
    made = image_to_image(sampler, images, 0.4, 8, rng=5)
    steps = sampler.make_steps(8, start_step=400)
    noise = jax.random.normal(jax.random.split(jax.random.PRNGKey(5))[0], images.shape)
    by_hand = sampler.sample(EDM.add_noise(images, noise, steps[0]), steps, rng=0)
    np.testing.assert_allclose(made, np.clip(by_hand, -1, 1), atol=1e-5)
    np.testing.assert_array_equal(made, image_to_image(sampler, images, 0.4, 8, rng=5))
    assert np.any(made != image_to_image(sampler, images, 0.4, 8, rng=6))


@over(schedule=KINDS)
def test_the_weaker_the_nearer(schedule):
    "On data of its own the mean distance grows with strength, and next to none is left at the least."
    sampler = gaussian_sampler(EulerAncestralSampler, schedule)
    images = np.clip(np.asarray(DATA.sample(jax.random.PRNGKey(0), 200)), -1, 1).reshape(-1, 1, D, 1)
    far = [float(np.abs(np.asarray(image_to_image(sampler, images, s, 12, rng=0)) - images).mean()) for s in (0.01, 0.1, 1.0)]
    assert far[0] < 0.04 and far[0] < far[1] < far[2]


@pytest.mark.parametrize("cls, ratio", [(DDIMSampler, 1.9), (HeunSampler, 3.6)])
def test_there_and_back_is_the_identity_to_the_solvers_order(cls, ratio, x64):
    "Twice the levels: half the error, or a quarter. (Below 128 levels the steps near σ = 0 hide Heun's order: 2.4, 3.1, then 5.9, 7.6.)"
    schedule = SCHEDULES["CosineContinuousNoiseScheduler"]
    sampler = gaussian_sampler(cls, schedule)
    images = np.clip(np.asarray(DATA.sample(jax.random.PRNGKey(0), 4)), -1, 1).reshape(-1, 1, D, 1)
    off = []
    for N in (128, 256):
        noise = encode(sampler, images, N, 0.9)
        off.append(float(np.abs(np.asarray(sampler.generate_images(priors=noise, diffusion_steps=N, start_step=900)) - images).max()))
    assert off[1] < 0.05 and off[0] / off[1] > ratio


class Labelled:
    "Two heaps: label 0 is N(-0.3, 0.1²), label 1 is N(0.4, 0.2²), and the network of each."
    def __init__(self, schedule, predictor):
        self.models = [ExactModel(Gaussian([m], [s ** 2]), schedule, predictor) for m, s in ((-0.3, 0.1), (0.4, 0.2))]

    def apply(self, params, x, temb, label):
        a, b = (model.apply(params, x.reshape(-1, 1), jnp.repeat(temb, x[0].size)).reshape(x.shape) for model in self.models)
        return jnp.where(label[:, None, None, None] == 0, a, b)


def test_an_edit_by_inversion_carries_one_gaussian_into_the_other(x64):
    "(x - m₀)/s₀ = (x' - m₁)/s₁; and under the same label nothing changes."
    sampler = HeunSampler(Labelled(EDM, ROW), {}, EDM, ROW)
    images = np.linspace(-0.5, -0.1, 8).reshape(2, 2, 2, 1)
    label = lambda k: {"label": jnp.full(2, k)}
    made = np.asarray(invert_and_edit(sampler, images, label(0), label(1), 60))
    np.testing.assert_allclose(made, 0.4 + (images + 0.3) / 0.1 * 0.2, atol=4e-3)
    np.testing.assert_allclose(invert_and_edit(sampler, images, label(0), label(0), 60), images, atol=4e-3)


def test_conditions_and_denoisers_of_other_make():
    "A condition reaches the network through every edit; a plain function is a denoiser too."
    sampler = DDIMSampler(Labelled(EDM, ROW), {}, EDM, ROW)
    images, one = pictures(side=2) / 4, {"label": jnp.array([0, 1])}
    for edit in (lambda s, **kw: image_to_image(s, images, 0.8, 10, rng=0, **kw),
                 lambda s, **kw: inpaint(s, images, np.eye(2), "guided", 10, rng=0, **kw),
                 lambda s, **kw: solve_inverse(s, images, lambda x: x, 1.0, 10, image_size=2, channels=1, rng=0, **kw)):
        made = np.asarray(edit(sampler, conditioning=one))
        assert made[0, 0, 1, 0] < 0 < made[1, 0, 1, 0]
        plain = DDIMSampler(lambda x, t, conditioning=(): sampler.denoiser(x, t, one), noise_schedule=EDM)
        np.testing.assert_allclose(edit(plain), made, atol=1e-4)


# ---------------------------------------------------------------- interpolation on the sphere

def test_slerp_goes_along_the_arc(x64):
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 1))
    size = lambda v: np.linalg.norm(np.asarray(v).reshape(len(v), -1), axis=1)
    b_same = b * (size(a) / size(b))[:, None, None, None]
    for share in (0.0, 0.3, 0.5, 1.0): np.testing.assert_allclose(size(slerp(a, b_same, share)), size(a), rtol=1e-12)
    np.testing.assert_allclose(size(slerp(a, b, 0.25)), 0.75 * size(a) + 0.25 * size(b), rtol=1e-12)
    np.testing.assert_allclose(slerp(a, b, 0.0), a, atol=1e-12)
    np.testing.assert_allclose(slerp(a, b, np.array([0.0, 1.0, 0.5])), [a[0], b[1], slerp(a, b, 0.5)[2]], atol=1e-12)
    quarter = slerp(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]), np.linspace(0, 1, 4))
    np.testing.assert_allclose(quarter, [[np.cos(v), np.sin(v)] for v in np.linspace(0, np.pi / 2, 4)], atol=1e-12)
    np.testing.assert_allclose(slerp(a, a * (1 + 1e-9), 0.5), a, rtol=1e-8)


# ---------------------------------------------------------------- bad requests

def refuse(match, call, *args, **options):
    with pytest.raises(ValueError, match=match): call(*args, **options)


def test_bad_pictures_and_strengths_are_refused():
    sampler, images = wave_sampler(), pictures()
    for strength in (0, -0.1, 1.1, np.nan, True, "half"): refuse("strength", image_to_image, sampler, images, strength)
    refuse("strength", encode, sampler, images, 8, 0.0)
    refuse("strength must be below 1", encode, wave_sampler(schedule=ZERO_SNR["CosineNoiseSchedule-zero-snr"]), images, 8)
    refuse("eta must be 0", encode, wave_sampler(EulerAncestralSampler), images, 8)
    for bad in (images * 3, images[0], (images * 100).astype(np.uint8), images * np.nan):
        refuse("images must", image_to_image, sampler, bad, 0.5)
        refuse("images must", inpaint, sampler, bad, np.ones((4, 4)))
        refuse("images must", encode, sampler, bad)
    refuse(r"images must have shape \(any, 1, 8, 1\)", image_to_image, gaussian_sampler(), images, 0.5)
    for edit in (lambda s: image_to_image(s, images, 0.5), lambda s: inpaint(s, images, np.ones((4, 4))), lambda s: solve_inverse(s, images, Grey(), 0)):
        refuse("sampler must", edit, "heun")
    refuse("one row for each", image_to_image, sampler, images, 0.5, 4, conditioning={"label": np.zeros(3)})


def test_bad_masks_are_refused():
    sampler, images = wave_sampler(), pictures()
    for shape in ((3, 4), (4, 4, 3), (3, 4, 4, 1), (2, 4, 4), (1,)): refuse("mask must have shape", inpaint, sampler, images, np.ones(shape))
    for mask in (np.full((4, 4), 0.5), np.full((4, 4), 255), np.full((4, 4), np.nan), np.full((4, 4), "1")): refuse("mask must hold", inpaint, sampler, images, mask)
    refuse("method", inpaint, sampler, images, np.ones((4, 4)), "magic")
    refuse("rounds", inpaint, sampler, images, np.ones((4, 4)), rounds=0)
    refuse("weight", inpaint, sampler, images, np.ones((4, 4)), "guided", weight=-1)
    for mask in (np.eye(4, dtype=bool), np.stack([np.eye(4), np.ones((4, 4))])[..., None]):  # these will do
        inpaint(sampler, images, mask, "replace", 3, rng=0)


def test_bad_measurements_are_refused():
    sampler, images = wave_sampler(), pictures()
    def solve(measurement, operator, sigma=0.1, **options): return solve_inverse(sampler, measurement, operator, sigma, 3, image_size=4, channels=1, **options)
    refuse("must be linear", solve, images, lambda x: x ** 2)
    refuse("must be linear", solve, images, lambda x: x + 1)
    refuse("each image for itself", solve, images, lambda x: x + x.mean(0))
    refuse("one row for each", solve, images, lambda x: x.mean())
    refuse("operator must be a function", solve, images, np.eye(4))
    refuse("measurement must have shape", solve, images, Downsample(2))
    refuse("measurement must be finite", solve, images * np.nan, lambda x: x)
    refuse("measurement must be floating", solve, images.astype(int), lambda x: x)
    refuse("factor must divide", solve, images, Downsample(3))
    refuse("factor", solve, images, Downsample(0))
    refuse("std", solve, images, Blur(0))
    refuse("x must have shape", solve, images, Grey())
    refuse("sigma", solve, images, lambda x: x, -1)
    refuse("iterations", solve, images, lambda x: x, iterations=0)
    refuse("variance", solve, images, lambda x: x, variance=0)
    refuse("image_size must be given", solve_inverse, sampler, images, lambda x: x, 0.1)
    refuse("b must have shape", slerp, images, images[:, :2], 0.5)
    refuse("direction", slerp, images, 0 * images, 0.5)


# ---------------------------------------------------------------- a bar on long work

BARS = {  # function -> the steps its bars count
    "image_to_image": (lambda sampler, **more: image_to_image(sampler, pictures(), 0.6, 6, rng=0, **more), [5]),
    "encode": (lambda sampler, **more: encode(sampler, pictures(), 6, 0.9, **more), [5]),
    "invert_and_edit": (lambda sampler, **more: invert_and_edit(sampler, pictures(), (), (), 6, 0.9, **more), [5, 5]),
    "replace": (lambda sampler, **more: inpaint(sampler, pictures(), np.eye(4), "replace", 6, rng=0, **more), [5]),
    "repaint": (lambda sampler, **more: inpaint(sampler, pictures(), np.eye(4), "repaint", 6, rng=0, **more), [5]),
    "inverse": (lambda sampler, **more: solve_inverse(sampler, np.zeros((2, 2, 2, 1), np.float32), Downsample(2), 0.1, 6, image_size=4, channels=1, rng=0, **more), [5])}


@pytest.mark.parametrize("name", BARS)
def test_a_bar_counts_the_steps_of_edits(name, capfd):
    "Also after a run without one, by the same sampler: its copies count on the same bar."
    edit, steps = BARS[name]
    sampler = wave_sampler()
    plain, shown, again = edit(sampler), edit(sampler, progress=True), edit(sampler, progress=True)
    err = capfd.readouterr().err
    assert err.count("5/5") >= 2 * len(steps), err
    np.testing.assert_array_equal(plain, shown)
    np.testing.assert_array_equal(plain, again)
    with pytest.raises(ValueError, match="progress"): edit(sampler, progress="yes")
