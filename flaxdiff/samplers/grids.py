"""Which noise levels to visit is a question of its own: the same solver with the same number of network calls can be twice as good."""

# %%
import jax
import numpy as np

from flaxdiff.utils import check_positive_int, check_real

# %%
def check_span(
    schedule,  # a `NoiseScheduler`
    t_start,  # the first time
    t_end,  # the last time
    n,  # how many
):
    "`n` as an int; a `ValueError` unless t_end < t_start lie in [0, T] and n is a whole number above 0."
    T = schedule.max_timesteps
    for name, t in (("t_start", t_start), ("t_end", t_end)):
        if not -1e-5 * T <= float(check_real(name, t)) <= (1 + 1e-5) * T:
            raise ValueError(f"{name} must lie in [0, {T}], got {t:g}")
    if not t_end < t_start:
        raise ValueError(f"t_end must lie below t_start={t_start:g}, got {t_end:g}")
    return check_positive_int("n", n)

def uniform_grid(
    schedule,  # a `NoiseScheduler`
    t_start,  # the first time
    t_end,  # the last time, below it
    n,  # how many
):
    "n times equally spaced in t; on the Karras schedules, whose t is the ramp itself, in σ^(1/ρ)."
    return np.linspace(t_start, t_end, check_span(schedule, t_start, t_end, n))

# %%
def spaced_grid(
    schedule,  # a `NoiseScheduler`
    t_start,  # the first time, α > 0 there
    t_end,  # the last time, below it
    n,  # how many
    forward,  # a rising or falling function of σ/α
    inverse,  # its inverse
):
    "n times whose σ/α is equally spaced after `forward`; both ends exact, in float64."
    n = check_span(schedule, t_start, t_end, n)
    with jax.enable_x64(True):
        ends = np.array([t_start, t_end], np.float64)
        alpha, sigma = np.asarray(schedule.alpha(ends)), np.asarray(schedule.sigma(ends))
        if np.any(alpha == 0) or np.any(sigma == 0):
            raise ValueError("this grid needs α > 0 and σ > 0 at both ends; "
                             "use uniform_grid, or another start_step or end_step")
        first, last = forward(sigma / alpha)
        times = np.array(schedule.get_timesteps(inverse(np.linspace(first, last, n))))
    times[-1] = t_end
    times[0] = t_start  # the last word where n is 1
    return times

# %%
def karras_grid(
    schedule,  # a `NoiseScheduler`
    t_start,  # the first time, α > 0 there
    t_end,  # the last time, below it
    n,  # how many
    rho=7,  # larger spends more levels at little noise
):
    "n times equally spaced in (σ/α)^(1/ρ) (Karras et al. 2022, eq. 5), on any schedule."
    check_real("rho", rho, 0, ends="(]")
    return spaced_grid(schedule, t_start, t_end, n, lambda u: u ** (1 / rho), lambda v: v ** rho)

# %%
def lambda_grid(
    schedule,  # a `NoiseScheduler`
    t_start,  # the first time, α > 0 there
    t_end,  # the last time, below it
    n,  # how many
):
    "n times equally spaced in λ = log(α/σ) (Lu et al. 2022, section 3.3); k-diffusion says exponential."
    return spaced_grid(schedule, t_start, t_end, n, np.log, np.exp)

exponential_grid = lambda_grid  # equal steps of λ are equal ratios of σ/α

# %%
def trailing_grid(
    schedule,  # a `NoiseScheduler`
    t_start,  # the first time
    t_end,  # the last is not below it
    n,  # how many
):
    "n times down from t_start, t_start/n apart, to max(t_start/n, t_end); the jump to 0 is one step more."
    n = check_span(schedule, t_start, t_end, n)
    return np.linspace(t_start, max(t_start / n, t_end), n)

def leading_grid(
    schedule,  # a `NoiseScheduler`
    t_start,  # the first time
    t_end,  # the last time, below it
    n,  # how many
):
    "n times up from t_end, t_start/n apart, the highest moved to t_start: the first step is the longest."
    n = check_span(schedule, t_start, t_end, n)
    times = np.linspace(t_start + t_end - max(t_start / n, t_end), t_end, n)
    times[0] = t_start
    return times

# %%
def check_steps(
    schedule,  # a `NoiseScheduler`
    steps,  # (N,): times
):
    "`steps` as NumPy float64, if they fall and lie where the network may be called; else a `ValueError`."
    steps = np.asarray(steps, np.float64)
    T, low = schedule.max_timesteps, schedule.min_time
    if steps.ndim != 1 or not len(steps):
        raise ValueError(f"steps must be a list of times, shape (N,), got shape {steps.shape}")
    if not np.all(np.isfinite(steps)) or not np.all(np.diff(steps) < 0):
        raise ValueError("steps must be finite and strictly decreasing times, without repeats")
    if steps[0] > T * (1 + 1e-5) or steps[-1] < low - 1e-5 * T:
        raise ValueError(f"steps must lie in [{low}, {T}], from the last level a network is called at to T, "
                         f"got {steps[0]:.6g} to {steps[-1]:.6g}; "
                         "the jump to no noise is made by denoise_final=True")
    return steps

def check_resolution(
    steps,  # (N,): rising or falling times
    dtype,  # of the computation
):
    "A `ValueError` where two neighbours are one number in `dtype`: a step of length 0 has no weights."
    if np.all(np.diff(steps.astype(dtype)) != 0):
        return
    closest = np.abs(np.diff(steps)).min()
    raise ValueError(f"steps must be further apart than {np.dtype(dtype).name} can resolve, "
                     f"got neighbours {closest:.3g} apart; use fewer steps, or float64")

# %%
def make_steps(
    schedule,  # a `NoiseScheduler`
    diffusion_steps=50,  # N: how many noise levels
    start_step=1000,  # the first, 1000 is T
    end_step=0,  # the last, or the schedule's smallest if that is larger
    grid=None,  # (schedule, t_start, t_end, N) -> N times; uniform in t by default
):
    "N decreasing times, the first exactly `start_step`·T/1000; step s is time s·T/1000."
    n = check_positive_int("diffusion_steps", diffusion_steps)
    check_real("start_step", start_step, 0, 1000, "(]")
    check_real("end_step", end_step, 0, 1000, "[)")
    if not end_step < start_step:
        raise ValueError("need 0 <= end_step < start_step <= 1000, "
                         f"got start_step={start_step} and end_step={end_step}")
    T = schedule.max_timesteps
    start, end = start_step * T / 1000, max(end_step * T / 1000, schedule.min_time)
    if not end < start:
        raise ValueError(f"start_step={start_step} is time {start:g}, below the smallest level {end:g}; "
                         "use a larger start_step")
    if grid is not None and not callable(grid):
        raise ValueError(f"grid must be a function (schedule, t_start, t_end, N) -> N times, got {grid!r}")
    steps = check_steps(schedule, (grid or uniform_grid)(schedule, start, end, n))
    if len(steps) != n or abs(steps[0] - start) > 1e-5 * T or steps[-1] < end - 1e-5 * T:
        raise ValueError(f"grid must give {n} times from {start:g} to {end:g} or above, "
                         f"got {len(steps)} from {steps[0]:g} to {steps[-1]:g}")
    return steps
