"""Laws of guidance: each a denoiser made of denoisers, exact where the answer is known, with every solver, schedule and predictor."""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxdiff.denoiser import Denoiser, as_denoiser
from flaxdiff.exact import ExactModel, Gaussian, GaussianMixture
from flaxdiff.guidance import Autoguidance, ClassifierFreeGuidance, ClassifierGuidance, DynamicThreshold, guide, with_params
from flaxdiff.likelihood import log_likelihood, variational_bound
from flaxdiff.samplers import AdaptiveSampler, DiffusionSampler, EulerSampler, FewStepSampler, HeunSampler, RK4Sampler
from laws import ALL_SCHEDULES, EACH_KIND, MIXTURE, PREDICTORS, SAMPLER_CLASSES, SCHEDULES, WAVE, Wave, decodable, default_predictor, ends_pure, over, x64

EDM, LINEAR, COSINE = (SCHEDULES[name] for name in ("EDMNoiseScheduler", "LinearNoiseSchedule", "CosineContinuousNoiseScheduler"))
KARRAS, EPSILON, V = (PREDICTORS[name] for name in ("KarrasEDMPredictor", "EpsilonPredictor", "VPredictor"))
K = len(MIXTURE.weights)
NULL = {"label": K}


class Bells:
    "Data N(label, ¼), whose label is their mean: under guidance D_∅ + w (D_c - D_∅) is the D of one more of them."
    def denoise(self, x, alpha, sigma, label):
        mean = jnp.reshape(label, (-1, 1)).astype(x.dtype)
        gain = jnp.reshape(alpha / 4 / (alpha ** 2 / 4 + sigma ** 2), (-1, 1))
        return mean + gain * (x - jnp.reshape(alpha, (-1, 1)) * mean)


@functools.lru_cache(maxsize=None)
def exact(schedule, predictor, data=MIXTURE): return Denoiser(ExactModel(data, schedule, predictor), {}, schedule, predictor)
def bells(schedule, predictor): return exact(schedule, predictor, Bells())
def mean(value, n=4): return {"label": np.full(n, value, np.float32)}
BELL_NULL = {"label": np.float32(-0.5)}


@functools.lru_cache(maxsize=None)
def posterior(schedule, data=MIXTURE):
    "log p(label | x_t) of the exact classifier, the numbers of a picture together; 0 for the null label."
    def log_prob(x, t, conditioning):
        label, K = conditioning["label"], len(data.weights)
        alpha, sigma = (jnp.repeat(jnp.broadcast_to(rate(t), len(x)), x[0].size) for rate in (schedule.alpha, schedule.sigma))
        rows = data.class_log_prob(x.reshape(-1, 1), alpha, sigma).reshape(len(x), -1, K)
        picked = jnp.take_along_axis(rows, jnp.clip(label, 0, K - 1)[:, None, None], 2)
        return jnp.where(label < K, picked[..., 0].sum(1), 0)
    return log_prob


def noisy(schedule, t, shape=(4, 2), seed=0, data=MIXTURE):
    rng = np.random.default_rng(seed)
    alpha, sigma = (np.reshape(rate(t), (-1, 1)) for rate in (schedule.alpha, schedule.sigma))
    x0 = np.asarray(data.sample(jax.random.PRNGKey(seed), int(np.prod(shape)))).reshape(shape)
    return jnp.asarray(alpha * x0 + sigma * rng.normal(size=shape))


LABEL = np.array([0, 2, 1, 0])
COND = {"label": LABEL}


# What each does, against its formula

ONE_OF_EACH = (LINEAR, EPSILON), (COSINE, V), (EDM, KARRAS), (ALL_SCHEDULES["CosineNoiseSchedule-zero-snr"], PREDICTORS["X0Predictor"])
PROCESSES = [pytest.param(schedule, predictor, id=f"{name}-{kind}", marks=[] if (schedule, predictor) in ONE_OF_EACH else [pytest.mark.slow])
             for name, schedule in ALL_SCHEDULES.items() for kind, predictor in PREDICTORS.items() if decodable(predictor, schedule)]


@pytest.mark.parametrize("schedule, predictor", PROCESSES)
def test_answers_are_the_formulas(schedule, predictor, x64):
    "Each wrapper on each process and output, at one time and at a time for each image; α x̂₀ + σ ε̂ stays x_t."
    d = exact(schedule, predictor)
    T, times = schedule.max_timesteps, np.array([0.9, 0.2, 0.5, 0.7])
    for t in (0.4 * T, times * T):
        x = noisy(schedule, t)
        alpha, sigma = (np.reshape(rate(t), (-1, 1)) for rate in (schedule.alpha, schedule.sigma))
        a, s = (np.broadcast_to(v, (4, 1)) for v in (alpha, sigma))
        given, none = MIXTURE.denoise(x, a, s, LABEL), MIXTURE.denoise(x, a, s)
        guided = none + 3 * (given - none)
        size = jnp.maximum(1, jnp.quantile(jnp.abs(guided), 0.8, axis=1, keepdims=True))
        answers = {
            "free": (ClassifierFreeGuidance(d, NULL, 3), guided),
            "rescaled": (ClassifierFreeGuidance(d, NULL, 3, rescale=0.7), guided * (0.3 + 0.7 * given.std(1, keepdims=True) / guided.std(1, keepdims=True))),
            "interval": (ClassifierFreeGuidance(d, NULL, 3, interval=(0.3, 1.0)), np.where((0.3 < s / a) & (s / a <= 1.0), guided, given)),
            "classifier": (ClassifierGuidance(d, posterior(schedule), 2.0, null=NULL), none + 2 * (given - none)),
            "weak": (Autoguidance(d, exact(schedule, predictor, GaussianMixture(MIXTURE.means, 2 * MIXTURE.stds)), 2.5), None),
            "threshold": (DynamicThreshold(ClassifierFreeGuidance(d, NULL, 3), 0.8), jnp.clip(guided, -size, size) / size)}
        weak = GaussianMixture(MIXTURE.means, 2 * MIXTURE.stds).denoise(x, a, s, LABEL)
        answers["weak"] = answers["weak"][0], weak + 2.5 * (given - weak)
        for name, (denoiser, want) in answers.items():
            x0, eps = denoiser(x, t, COND)
            told = guided.std(1) > 1e-6 if name == "rescaled" else slice(None)  # where two numbers agree to rounding, their spreads' ratio is noise
            np.testing.assert_allclose(x0[told], want[told], rtol=1e-6, atol=1e-6, err_msg=name)
            np.testing.assert_allclose(alpha * x0 + sigma * eps, x, rtol=1e-9, atol=1e-9 * float(sigma.max()), err_msg=name)


@over(schedule=SCHEDULES, at_once=EACH_KIND)
def test_the_true_posterior_gives_the_conditional_score(schedule, x64):
    "Bayes: ∇ log p(x) + ∇ log p(k | x) = ∇ log p(x | k)."
    predictor = default_predictor(schedule)
    d = exact(schedule, predictor)
    for share in (0.05, 0.4, 0.95):
        t = share * schedule.max_timesteps
        x = noisy(schedule, t)
        got = ClassifierGuidance(d, posterior(schedule), null=NULL)(x, t, COND)
        for a, b in zip(got, d(x, t, COND)): np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-7)
        unconditional = exact(schedule, predictor, GaussianMixture(MIXTURE.means, MIXTURE.stds, MIXTURE.weights))
        again = ClassifierGuidance(unconditional, posterior(schedule), 1.0, null={})(x, t, COND)
        np.testing.assert_allclose(again, got, rtol=1e-12)


def test_the_two_gaussians_of_the_contract(x64):
    "w = 3: (-2, .6, 2.4) at σ = 2 to (2.544786, 3.175379, 3.611943) at σ = 0."
    guided = ClassifierFreeGuidance(bells(EDM, KARRAS), BELL_NULL, 3)
    x = jnp.array([[-2.0], [0.6], [2.4]])
    want = [2.544786, 3.175379, 3.611943]

    def slope(z, x): return jnp.exp(z) * guided(x, EDM.get_timesteps(jnp.exp(z)), mean(1, 3))[1]  # dx / d ln σ

    @jax.jit
    def rk4(x, z0, z1):
        h = (z1 - z0) / 300
        def step(x, z):
            k1 = slope(z, x)
            k2 = slope(z + h / 2, x + h / 2 * k1)
            k3 = slope(z + h / 2, x + h / 2 * k2)
            return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(z + h, x + h * k3)), None
        return jax.lax.scan(step, x, z0 + h * jnp.arange(300))[0]

    np.testing.assert_allclose(rk4(x, np.log(2.0), np.log(1e-4))[:, 0], want, atol=1e-6)
    steps = EDM.get_timesteps(np.geomspace(2, 0.0021, 400))
    for sampler in (RK4Sampler(guided), HeunSampler(guided)):
        end = sampler.sample(x, np.asarray(steps), rng=0, conditioning=mean(1, 3))
        np.testing.assert_allclose(end[:, 0], want, atol=5e-5)
    np.testing.assert_allclose(Gaussian([4.0], [0.25]).ode_solution(x, (1.0, 2.0), (1.0, 0.0))[:, 0], want, atol=1e-6)


def test_what_asks_for_nothing_changes_nothing():
    "Bit for bit: w = 1; a level outside; w = 0 of a classifier; a weak denoiser that is the same; pixels in range. φ = 0, and an interval of all."
    x, t = noisy(EDM, 0.5).astype(jnp.float32), 0.5
    d = exact(EDM, KARRAS)
    plain = d(x, t, COND)
    guided = ClassifierFreeGuidance(d, NULL, 2.5)
    same = (lambda v: v), jax.jit
    for call in same:
        ask = lambda denoiser, conditioning=COND: call(lambda denoiser, x: denoiser(x, t, conditioning))(denoiser, x)
        want, want_guided = ask(d), ask(guided)
        for denoiser in (ClassifierFreeGuidance(d, NULL, 1), ClassifierFreeGuidance(d, NULL, 5.0, interval=(50, 60)), Autoguidance(d, d, 1),
                         Autoguidance(d, d, 3.0), ClassifierGuidance(d, posterior(EDM), 0)):
            for a, b in zip(ask(denoiser), want): np.testing.assert_array_equal(a, b)
        for denoiser in (ClassifierFreeGuidance(d, NULL, 2.5, rescale=0.0), ClassifierFreeGuidance(d, NULL, 2.5, interval=(0, np.inf))):
            for a, b in zip(ask(denoiser), want_guided): np.testing.assert_allclose(a, b, rtol=1e-6)
    tame = exact(EDM, KARRAS, GaussianMixture([-0.5, 0.5], 0.01))
    for a, b in zip(DynamicThreshold(tame)(x, t), tame(x, t)): np.testing.assert_array_equal(a, b)
    assert plain[0].dtype == guided(x, t, COND)[0].dtype == jnp.float32


def test_rescaling_gives_each_image_its_spread_back(x64):
    x, t = noisy(EDM, 0.5, (4, 50)), 0.5
    d = exact(EDM, KARRAS)
    spread = lambda rescale: ClassifierFreeGuidance(d, NULL, 6.0, rescale=rescale)(x, t, COND)[0].std(1)
    np.testing.assert_allclose(spread(1.0), d(x, t, COND)[0].std(1), rtol=1e-12)
    assert np.all(spread(0.0) > spread(0.5)) and np.all(spread(0.5) > spread(1.0))
    flat = ClassifierFreeGuidance(bells(EDM, KARRAS), BELL_NULL, 3, rescale=0.5)
    assert np.all(np.isfinite(flat(jnp.ones((2, 1)), t, mean(1, 2))[0])), "one number has no spread"


def test_no_noise_level_is_too_pure(x64):
    "At α = 0 x̂₀ still obeys, ε̂ is x_t, and a classifier adds nothing."
    schedule = ALL_SCHEDULES["CosineNoiseSchedule-zero-snr"]
    assert ends_pure(schedule)
    T, d = schedule.max_timesteps, exact(schedule, V)
    x = noisy(schedule, T)
    for guided in (ClassifierFreeGuidance(d, NULL, 3, rescale=0.5), DynamicThreshold(ClassifierFreeGuidance(d, NULL, 3), 0.5),
                   ClassifierGuidance(d, posterior(schedule), 2.0), ClassifierFreeGuidance(d, NULL, 3, interval=(1, np.inf))):
        x0, eps = guided(x, T, COND)
        assert np.all(np.isfinite(x0))
        np.testing.assert_allclose(eps, x, rtol=1e-12)


# Every solver, in any order

@over(cls=SAMPLER_CLASSES, schedule=SCHEDULES, at_once=("EDMNoiseScheduler",))
def test_with_every_solver(cls, schedule, x64):
    "Two Gaussians under w are one, N(-½ + 3w/2, ¼), whatever solver walks; and by a new w nothing is compiled."
    T, d = schedule.max_timesteps, bells(schedule, default_predictor(schedule))
    x, steps = noisy(schedule, T)[:, :1], np.array([1.0, 0.7, 0.45, 0.2]) * T
    guided, plain = cls(ClassifierFreeGuidance(d, BELL_NULL, 3)), cls(d)
    for w in (3.0, 2.0):
        guided.denoiser = ClassifierFreeGuidance(d, BELL_NULL, w)
        got = guided.sample(x, steps, rng=0, conditioning=mean(1))
        want = plain.sample(x, steps, rng=0, conditioning=mean(1.5 * w - 0.5))
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)  # in float64: from σ/α of thousands, four steps of a method of order four lose half of float32's digits
    assert len(guided.programs.compiled) == 1


class Cheap:
    "A smooth network that takes a label."
    def apply(self, params, x, temb, label): return jnp.tanh(params["w"] * x + temb[:, None] / 4 + label[:, None] / 5)


CHEAP = Cheap()
FOUR = "free", "classifier", "weak", "threshold"
ORDERS = [pytest.param(order, id="-".join(order), marks=[] if order in [FOUR, FOUR[::-1], FOUR[2:] + FOUR[:2]] else [pytest.mark.slow]) for order in itertools.permutations(FOUR)]
def likes_its_label(x, t, conditioning): return -jnp.sum((x - conditioning["label"][:, None] / 3) ** 2, 1)


def chain(schedule, order, w=2.0, weights=Wave.params):
    "All four around a cheap network, in this order, the first inside."
    d, weak = (Denoiser(CHEAP, p, schedule, default_predictor(schedule)) for p in (weights, {"w": np.float32(0.2)}))
    wrap = {"free": lambda d: ClassifierFreeGuidance(d, NULL, w, interval=(0.1, 20.0), rescale=w / 10),
            "classifier": lambda d: ClassifierGuidance(d, likes_its_label, w / 2), "weak": lambda d: Autoguidance(d, weak, w / 2 + 0.6),
            "threshold": lambda d: DynamicThreshold(d, 1 - w / 10)}
    return functools.reduce(lambda d, name: wrap[name](d), order, d)


@over(cls=SAMPLER_CLASSES, schedule=SCHEDULES, at_once=())
def test_all_four_with_every_solver(cls, schedule):
    T = schedule.max_timesteps
    x = noisy(schedule, T).astype(jnp.float32)
    sampler = cls(chain(schedule, FOUR))
    for w in (2.0, 3.0):
        sampler.denoiser = chain(schedule, FOUR, w)
        end = sampler.sample(x, np.array([1.0, 0.7, 0.45]) * T, rng=0, conditioning=COND)
        assert end.shape == x.shape and np.all(np.isfinite(end)) and np.abs(end).max() <= 1
    assert len(sampler.programs.compiled) == 1


@pytest.mark.parametrize("order", ORDERS)
def test_in_any_order(order, x64):
    "Compiled or not, at one time or many; the two answers fit; what belongs to the innermost is found outside."
    denoiser = chain(COSINE, order)
    assert denoiser.model is CHEAP and denoiser.params is Wave.params and denoiser.noise_schedule is COSINE and isinstance(denoiser.model_output_transform, type(EPSILON))
    assert as_denoiser(denoiser)[0] is denoiser
    t, traces = np.array([0.9, 0.2, 0.5, 0.7]), []
    x = noisy(COSINE, t)

    @jax.jit
    def compiled(denoiser, x, t):
        traces.append(1)
        return denoiser(x, t, COND)

    for w in (2.0, 3.0):
        answer = chain(COSINE, order, w)(x, t, COND)
        for a, b in zip(answer, compiled(chain(COSINE, order, w), x, t)): np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)
        alpha, sigma = COSINE.get_rates(t, (-1, 1))
        np.testing.assert_allclose(alpha * answer[0] + sigma * answer[1], x, rtol=1e-7)
    assert len(traces) == 1, "new scales, a new quantile, another φ: nothing is traced again"
    for a, b in zip(denoiser(x[:1], t[0], {"label": LABEL[:1]}), denoiser(x, t, COND)): np.testing.assert_allclose(a, b[:1], rtol=1e-7, atol=1e-9)


# What it costs

class Counted:
    "A network that writes down each call's batch, as the compiled program runs."
    null_condition = {"label": np.int32(10)}

    def __init__(self): self.batches = []

    def apply(self, params, x, temb, label=None):
        jax.debug.callback(lambda: self.batches.append(len(x)))
        return params["w"] * x + (0 if label is None else label[:, None] / 100)

    def ran(self):
        jax.effects_barrier()
        batches, self.batches[:] = list(self.batches), []
        return batches


def test_calls_are_counted_in_the_compiled_program():
    network, other = Counted(), Counted()
    d, weak = (Denoiser(n, Wave.params, EDM, EPSILON) for n in (network, other))
    null = Counted.null_condition
    u = np.array([9.0, 4.0, 2.0, 0.7, 0.3])
    x, steps = jnp.ones((3, 2), jnp.float32), np.asarray(EDM.get_timesteps(u), np.float64)

    def ran(denoiser, **options):
        EulerSampler(denoiser).sample(x, steps, rng=0, conditioning={"label": np.arange(3)}, denoise_final=False)
        return network.ran(), other.ran()

    assert ran(d) == ran(ClassifierFreeGuidance(d, null, 1)) == ran(ClassifierFreeGuidance(d, null, 1.0, interval=(1, 5))) == ([3] * 4, [])
    assert ran(ClassifierFreeGuidance(d, null, 3)) == ([6] * 4, [])
    assert ran(ClassifierFreeGuidance(d, null, 3, interval=(1, 5))) == ([3, 6, 6, 3], [])
    assert ran(ClassifierFreeGuidance(d, null, 3, interval=(2.5, np.inf))) == ([6, 6, 3, 3], [])
    assert ran(Autoguidance(d, weak, 2)) == ([3] * 4, [3] * 4) and ran(Autoguidance(d, weak, 1)) == ([3] * 4, [])
    assert ran(DynamicThreshold(d)) == ran(ClassifierGuidance(d, lambda x, t, c: -x.sum(1), 2)) == ([3] * 4, [])


def test_weights_travel_as_arguments():
    "Of both networks, of a classifier that is a pytree, and every number: none is a constant of the program."
    d = Denoiser(WAVE, Wave.params, EDM, EPSILON)
    classifier = jax.tree_util.Partial(lambda w, x, t, c: -w * x.sum(1), jnp.float32(2.0))
    guided = Autoguidance(ClassifierGuidance(d, classifier, 3.0), with_params(d, {"w": np.float32(0.1)}), 2.0)
    assert sorted(map(float, jax.tree.leaves(guided))) == sorted([float(Wave.params["w"]), 2.0, 3.0, float(np.float32(0.1)), 2.0])
    slope = jax.grad(lambda g: g(jnp.ones((2, 2)), 0.5)[0].sum())(guided)
    assert slope.scale != 0 and slope.weak.params["w"] != 0 and slope.denoiser.log_prob.args[0] != 0
    many = jax.vmap(lambda w: jax.jit(lambda w: Autoguidance(d, guided.weak, w)(jnp.ones((2, 2)), 0.5)[0])(w))(jnp.arange(3.0))
    assert many.shape == (3, 2, 2)


def test_new_parameters_reach_the_network_inside():
    d = exact(EDM, KARRAS)
    d = Denoiser(Counted(), Wave.params, EDM, EPSILON)
    guided = DynamicThreshold(ClassifierFreeGuidance(d, Counted.null_condition, 2.0))
    x, cond, other = jnp.ones((4, 2)), {"label": np.zeros(4, int)}, {"w": np.float32(0.2)}
    want = DynamicThreshold(ClassifierFreeGuidance(Denoiser(d.model, other, EDM, EPSILON), Counted.null_condition, 2.0))(x, 0.5, cond)
    np.testing.assert_array_equal(with_params(guided, other)(x, 0.5, cond), want)
    assert guided.params is Wave.params, "the old one stays as it was"
    assert jax.tree.structure(with_params(guided, other)) == jax.tree.structure(guided)
    sampler = HeunSampler(guided)
    first = sampler.sample(x, [0.9, 0.5], rng=0, conditioning=cond)
    sampler.params = other
    assert sampler.params is other and np.any(sampler.sample(x, [0.9, 0.5], rng=0, conditioning=cond) != first)
    assert len(sampler.programs.compiled) == 1


# A sampler's guidance_scale

def solvers_in(sampler): return [sampler, *(part for part in vars(sampler).values() if isinstance(part, DiffusionSampler))]


@over(cls=SAMPLER_CLASSES)
def test_guidance_scale_is_the_wrapper(cls):
    "Of the solver, and of those that it is made of; new parameters go inside."
    network, other = Counted(), {"w": np.float32(0.2)}
    sampler = cls(network, Wave.params, EDM, EPSILON, 3)
    assert sampler.guidance_scale == 3 and sampler.model is network and sampler.params is Wave.params and sampler.model_output_transform is EPSILON
    for part in solvers_in(sampler):
        assert isinstance(part.denoiser, ClassifierFreeGuidance) and part.denoiser.scale == 3 and part.denoiser.null == {"label": 10}
    sampler.params = other
    for part in solvers_in(sampler): assert part.denoiser.scale == 3 and part.params is other
    for w in (1, 1.0, np.float32(1)): assert all(isinstance(part.denoiser, Denoiser) for part in solvers_in(cls(network, Wave.params, EDM, EPSILON, guidance_scale=w)))


def test_guidance_scale_samples_what_the_wrapper_samples():
    network, x, cond = ExactModel(MIXTURE, EDM, KARRAS, (2, 1, 1)), jnp.ones((4, 2)), COND
    sampler, wrapped = HeunSampler(network, {}, EDM, KARRAS, guidance_scale=3), HeunSampler(ClassifierFreeGuidance(exact(EDM, KARRAS), NULL, 3))
    np.testing.assert_array_equal(sampler.sample(x, [0.9, 0.5], conditioning=cond), wrapped.sample(x, [0.9, 0.5], conditioning=cond))
    from_denoiser = HeunSampler(Denoiser(network, {}, EDM, KARRAS), guidance_scale=3)
    np.testing.assert_array_equal(from_denoiser.sample(x, [0.9, 0.5], conditioning=cond), sampler.sample(x, [0.9, 0.5], conditioning=cond))
    made = sampler.generate_images(4, 5, rng=0, conditioning=cond)
    assert made.shape == (4, 2, 1, 1) and np.all(np.isfinite(made))

    class Sized:
        "A network within one that knows its image's shape."
        def __init__(self, module): self.module, self.apply = module, module.apply

    assert guide(Denoiser(Sized(network), {}, EDM, KARRAS), 2).null == {"label": K}
    jax.jit(lambda w: guide(exact(EDM, KARRAS), w)(x, 0.5, cond)[0])(2.0)


def test_guidance_without_a_null_or_a_condition_is_refused():
    class Plain:
        def apply(self, params, x, temb, label=None): return x
    for model in (Plain(), ExactModel(Gaussian([0.0], [1.0]), EDM, KARRAS)):
        refused(f"null_condition.*{type(model).__name__}", EulerSampler, model, {}, EDM, KARRAS, guidance_scale=2)
        EulerSampler(model, {}, EDM, KARRAS, guidance_scale=1.0)
    refused("null_condition", HeunSampler, lambda x, t, c=(): (x, x), noise_schedule=EDM, guidance_scale=2)
    sampler = EulerSampler(Counted(), Wave.params, EDM, EPSILON, guidance_scale=2)
    refused("^conditioning must be a dict with", sampler.generate_images, 2, 3, image_size=2, rng=0)
    refused("^conditioning must be a dict with", sampler.sample, jnp.ones((2, 2)), [0.9, 0.5], conditioning=(np.zeros(2, int),))
    for bad in (np.nan, "3", None, np.ones(2)): refused("^guidance_scale must", EulerSampler, Counted(), Wave.params, EDM, EPSILON, bad)


# Likelihood, the way back, a fit, steps of its own length

def test_likelihood_and_encoding_take_it(x64):
    guided, x = ClassifierFreeGuidance(bells(EDM, KARRAS), BELL_NULL, 3), jnp.array([[3.2], [4.1], [4.9]])
    steps = np.asarray(EDM.get_timesteps(np.geomspace(80, 0.01, 60)))
    one = Gaussian([4.0], [0.25])
    got = log_likelihood(guided, x, steps, conditioning=mean(1, 3), prior=lambda x, alpha, sigma: one.log_prob(x, float(alpha), float(sigma)))
    np.testing.assert_allclose(got, one.log_prob(x, 1.0, 0.01), atol=1e-4)
    noise = RK4Sampler(guided).encode(x, steps, conditioning=mean(1, 3))
    np.testing.assert_allclose(noise, one.ode_solution(x, (1.0, 0.01), (1.0, 80.0)), rtol=1e-3)
    assert np.all(np.isfinite(variational_bound(guided, x, 5, rng=0, conditioning=mean(1, 3)).total))
    assert np.all(np.isfinite(log_likelihood(chain(COSINE, FOUR), noisy(COSINE, 0.1)[:3], 4, conditioning={"label": LABEL[:3]})))


@pytest.mark.slow
def test_a_fit_and_steps_of_its_own_length_take_it():
    guided = ClassifierFreeGuidance(bells(EDM, KARRAS), BELL_NULL, 3)
    x = 80 * jnp.asarray(np.random.default_rng(0).normal(size=(4, 1)), jnp.float32)
    goal = Gaussian([4.0], [0.25]).ode_solution(x, (1.0, 80.0), (1.0, 0.0))
    fitted = FewStepSampler(guided).fit(x, 4, target=goal, conditioning=mean(1), iterations=3, progress=False)
    assert isinstance(fitted.denoiser, ClassifierFreeGuidance) and fitted.denoiser.scale == 3
    assert np.abs(fitted.sample(x, fitted.steps, rng=0, conditioning=mean(1)) - goal).max() < 0.1
    within = ClassifierFreeGuidance(bells(EDM, KARRAS), BELL_NULL, 3, interval=(0, np.inf))
    end = AdaptiveSampler(within, rtol=1e-5, atol=1e-6).sample(x, np.array([1.0, 0.0]), rng=0, conditioning=mean(1))
    np.testing.assert_allclose(end, goal, atol=5e-3)


# Bad input

def refused(match, call, *args, **kwargs):
    with pytest.raises(ValueError, match=match): call(*args, **kwargs)


def test_what_is_no_guidance_is_refused():
    d = exact(EDM, KARRAS)
    for bad in (None, 3, d.model, lambda x, t, c=(): (x, x), EulerSampler(d)):
        refused("^denoiser must", ClassifierFreeGuidance, bad, NULL, 2)
        refused("^denoiser must", DynamicThreshold, bad)
        refused("^denoiser must", ClassifierGuidance, bad, posterior(EDM))
        refused("^weak must", Autoguidance, d, bad, 2)
    refused("^weak must have the alpha", Autoguidance, d, exact(LINEAR, EPSILON), 2)
    refused("^weak must have the alpha", Autoguidance, d, exact(COSINE, V), 2)
    for bad in (np.nan, np.inf, "3", None, np.ones(3), True):
        for build in (lambda s: ClassifierFreeGuidance(d, NULL, s), lambda s: Autoguidance(d, d, s), lambda s: ClassifierGuidance(d, posterior(EDM), s)): refused("^scale must", build, bad)
    for bad in (np.nan, -0.1, 1.1, "1", None): refused("^rescale must", ClassifierFreeGuidance, d, NULL, 2, rescale=bad)
    for bad in (np.nan, 0, 1.1, "1", None): refused("^quantile must", DynamicThreshold, d, bad)
    for bad in ((1, 0.5), (-1, 2), (1, 1), (np.nan, 1), 3, (1, 2, 3), "ab", (None, 1)): refused("^interval must", ClassifierFreeGuidance, d, NULL, 2, interval=bad)
    for bad in (None, {}, (3,), 3, {"label": "x"}, {"label": None}): refused("^null must", ClassifierFreeGuidance, d, bad, 2)
    for bad in (None, 3): refused("^log_prob must", ClassifierGuidance, d, bad)
    refused("^what log_prob returns must", ClassifierGuidance(d, lambda x, t, c: x, 1.0, null={}), jnp.ones((2, 2)), 0.5)


def test_conditions_that_do_not_fit_are_refused():
    guided, x = ClassifierFreeGuidance(exact(EDM, KARRAS), NULL, 2), jnp.ones((4, 2))
    for bad in ((), {}, (LABEL,), {"labels": LABEL}, {"label": LABEL, "text": LABEL}): refused("^conditioning must be a dict with \\['label'\\]", guided, x, 0.5, bad)
    refused("^conditioning must have one row", guided, x, 0.5, {"label": LABEL[:3]})
    refused("^conditioning\\['label'\\] must have shape", guided, x, 0.5, {"label": LABEL[:, None]})
    refused("^conditioning must be a dict with", EulerSampler(guided).sample, x, [0.9, 0.5])
    refused("^x must be floating", guided, np.ones((4, 2), int), 0.5, COND)
    refused("^t must be one time", guided, x, np.ones(3), COND)
