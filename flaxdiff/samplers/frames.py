"""Where a solver walks matters as much as how: the same steps are useless in one pair of coordinates and good to three digits in another."""

# %%
import jax.numpy as jnp

# %%
class Frame:
    """y = x/scale against z = position: dy/dz = f, or dy/dz = k (f - y) where `rate` k is not 0.

    Where f is ε̂ or x̂₀: x_s = DDIM's step + scale ∫ K(z_s - z) (f(z) - f(z_t)) dz,
    with the kernel K = 1, or k exp(-k (z_s - z)).
    """
    rate = 0.0  # k

    def position(self,
                 alpha,  # α, any shape
                 sigma,  # σ, the same shape
                ):
        "z of a level."
        raise NotImplementedError(f"{type(self).__name__} must define position(alpha, sigma)")

    def ratio(self,
              z,  # positions, any shape
             ):
        "σ/α at position z."
        raise NotImplementedError(f"{type(self).__name__} must define ratio(z)")

    def scale(self,
              alpha,  # α, any shape
              sigma,  # σ, the same shape
             ):
        "x/y."
        raise NotImplementedError(f"{type(self).__name__} must define scale(alpha, sigma)")

    def slope(self,
              x0,  # (B, …): x̂₀
              eps,  # (B, …): ε̂
              alpha,  # α there, broadcastable to both
              sigma,  # σ there, the same
             ):
        "f."
        raise NotImplementedError(f"{type(self).__name__} must define slope(x0, eps, alpha, sigma)")

    def kernel(self,
               ahead,  # z_s - z, any shape
              ):
        "K: what a slope at z, so far before the end of the step, still counts there."
        return self.rate * jnp.exp(-self.rate * ahead) if self.rate else jnp.ones_like(ahead)

# %%
class SigmaFrame(Frame):
    "y = x/α against z = σ/α: dy/dz = ε̂ (Song et al. 2021a, eq. 14; EDM's own frame where α ≡ 1)."
    def position(self, alpha, sigma):
        "σ/α."
        return sigma / alpha

    def ratio(self, z):
        "z itself."
        return z

    def scale(self, alpha, sigma):
        "α."
        return alpha

    def slope(self, x0, eps, alpha, sigma):
        "ε̂."
        return eps

# %%
class AngleFrame(Frame):
    "y = x/√(α²+σ²) against θ = atan2(σ, α): dy/dθ = v̂, bounded at both ends (Salimans & Ho 2022, app. D)."
    def position(self, alpha, sigma):
        "θ = atan2(σ, α), radians."
        return jnp.arctan2(sigma, alpha)

    def ratio(self, z):
        "tan θ."
        return jnp.tan(z)

    def scale(self, alpha, sigma):
        "√(α²+σ²)."
        return jnp.hypot(alpha, sigma)

    def slope(self, x0, eps, alpha, sigma):
        "v̂ = (α ε̂ - σ x̂₀)/√(α²+σ²) = cos θ ε̂ - sin θ x̂₀."
        n = jnp.hypot(alpha, sigma)
        return alpha / n * eps - sigma / n * x0

# %%
class LambdaFrame(AngleFrame):
    "y = x/√(α²+σ²) against λ = log(α/σ): dy/dλ = -sin θ cos θ v̂, which dies away at both ends."
    def position(self, alpha, sigma):
        "λ = log(α/σ)."
        return jnp.log(alpha) - jnp.log(sigma)

    def ratio(self, z):
        "exp(-λ)."
        return jnp.exp(-z)

    def slope(self, x0, eps, alpha, sigma):
        "-sin θ cos θ v̂."
        return -sigma * alpha / (alpha ** 2 + sigma ** 2) * super().slope(x0, eps, alpha, sigma)

# %%
class DataFrame(LambdaFrame):
    "y = x/α against λ, and dy/dλ = k (x̂₀ - y): k = 1 is the ODE, k = 1 + η an SDE's mean (Lu et al. 2022b)."
    def __init__(self,
                 rate=1.0,  # k
                ):
        self.rate = rate

    def scale(self, alpha, sigma):
        "α."
        return alpha

    def slope(self, x0, eps, alpha, sigma):
        "x̂₀."
        return x0

class NoiseFrame(LambdaFrame):
    "y = x/σ against λ, and dy/dλ = -(ε̂ - y) (Lu et al. 2022a)."
    rate = -1.0

    def scale(self, alpha, sigma):
        "σ."
        return sigma

    def slope(self, x0, eps, alpha, sigma):
        "ε̂."
        return eps

# %%
FRAMES = {"sigma": SigmaFrame(), "angle": AngleFrame(), "lambda": LambdaFrame()}  # by name

def make_frame(
    frame,  # "sigma", "angle", "lambda", a `Frame`, or None: σ/α where α ≡ 1, the angle elsewhere
    noise_schedule,  # a `NoiseScheduler`
):
    "The frame of that name, or the one that suits the schedule."
    if frame is None:
        frame = "sigma" if noise_schedule.variance_exploding else "angle"
    if isinstance(frame, type) and issubclass(frame, Frame):
        frame = frame()
    if isinstance(frame, Frame):
        return frame
    if isinstance(frame, str) and frame in FRAMES:
        return FRAMES[frame]
    raise ValueError(f"frame must be one of {', '.join(FRAMES)}, or a Frame, got {frame!r}")
