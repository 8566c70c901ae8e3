"""What a network predicts and what it is told about time; the one conversion to noise, score and
data.

noise_hat = c_skip x + c_out F(c_in x, c_noise); score = -noise_hat / sigma; data = (x - sigma
noise_hat) / alpha.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from errors import check, lookup
from sde_lib import SDE, Time, expand, log_snr, marginal, posterior

NoiseFn = Callable  # (x [b, *d], t scalar or [b], labels=None) -> predicted noise [b, *d]
ScoreFn = Callable  # the same arguments -> score [b, *d]


def _edm(alpha, sigma, sigma_data):
  """Karras et al. 2022, table 1, for y = x / alpha at noise level r = sigma / alpha."""
  r = sigma / alpha
  total = r**2 + sigma_data**2
  return 1 / (alpha * jnp.sqrt(total)), r / (alpha * total), -sigma_data / jnp.sqrt(total)


# name: (alpha, sigma, sigma_data) -> (c_in, c_skip, c_out)
OUTPUTS = {
  "noise": lambda alpha, sigma, _: (1.0, 0.0, 1.0),
  "score": lambda alpha, sigma, _: (1.0, 0.0, -sigma),
  "scaled_score": lambda alpha, sigma, _: (1.0, 0.0, -1.0),
  "data": lambda alpha, sigma, _: (1.0, 1 / sigma, -alpha / sigma),
  "v": lambda alpha, sigma, _: (1.0, sigma / (alpha**2 + sigma**2), alpha / (alpha**2 + sigma**2)),
  "velocity": lambda alpha, sigma, _: (1.0, 1 / (alpha + sigma), alpha / (alpha + sigma)),
  "edm": _edm,
}


def nearest_level(sde: SDE, t: Float[Array, " b"]) -> Float[Array, " b"]:
  """Index (from 0) of the level of a discrete-time model nearest to each time, rounded not cut."""
  times = jnp.asarray(sde.times, t.dtype)
  return jnp.argmin(jnp.abs(times[None] - t[:, None]), 1).astype(t.dtype)


# name: (sde, t) -> what the network is told about time
C_NOISE = {
  "t999": lambda sde, t: 999 * t / sde.t_max,
  "index": nearest_level,
  "index_from_noise": lambda sde, t: len(sde.times) - 1 - nearest_level(sde, t),
  "log_sigma": lambda sde, t: jnp.log(marginal(sde, t)[1]),
  "log_sigma4": lambda sde, t: -log_snr(sde, t) / 8,
  "log_snr": log_snr,
  "sigma": lambda sde, t: marginal(sde, t)[1],
}


def make_noise_fn(
  sde: SDE,
  model: nn.Module,
  params,
  *,
  output: str,
  c_noise: str,
  train: bool = False,
  rngs=None,
  sigma_data: float = 0.5,
  inputs: dict | None = None,
) -> NoiseFn:
  """The noise prediction (x [b, *d], t scalar or [b], labels [b] or None) -> noise_hat [b, *d] of a
  network.

  A network with twice the channels of x predicts the variance of the reverse step too (Nichol &
  Dhariwal 2021, eq. 15): `noise_fn.with_variance`, of the same arguments, returns (noise_hat, v),
  v = 0 for the variance of q(x_s | x_t, x_0) and 1 for that of q(x_t | x_s); None without it.

  Args:
    model: linen module called as `model.apply({"params": params}, x, c_noise, labels, train)`.
    output: what the network predicts, a name in `OUTPUTS`.
    c_noise: what it is told about time, a name in `C_NOISE`.
    sigma_data: std of the data, used by the output "edm" only.
    inputs: further keyword arguments of the network, such as {"augmentation": conditions [b, 9]} of
      `augment.augment`; the same at every call.
  """
  coefficients, tell = (
    lookup(OUTPUTS, output, "parameterization.output"),
    lookup(C_NOISE, c_noise, "parameterization.c_noise"),
  )

  def with_variance(x: Float[Array, "b *d"], t: Time, labels=None):
    t = jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1])
    c_in, c_skip, c_out = (expand(c, x) for c in coefficients(*marginal(sde, t), sigma_data))
    told = tell(sde, t), labels, train
    out = model.apply({"params": params}, c_in * x, *told, rngs=rngs, **(inputs or {}))
    channels = x.shape[-1]
    noise = c_skip * x + c_out * out[..., :channels]
    return noise, 0.5 * (1 + out[..., channels:]) if out.shape[-1] == 2 * channels else None

  def noise_fn(x, t, labels=None):
    return with_variance(x, t, labels)[0]

  noise_fn.with_variance = with_variance
  return noise_fn


def score_from_noise(sde: SDE, noise: Float[Array, "b *d"], t: Time) -> Float[Array, "b *d"]:
  """score = -noise / sigma(t)."""
  return -noise / expand(marginal(sde, t)[1], noise)


def data_from_noise(
  sde: SDE, x: Float[Array, "b *d"], noise: Float[Array, "b *d"], t: Time
) -> Float[Array, "b *d"]:
  """The predicted clean data E[x_0 | x_t] = (x - sigma(t) noise) / alpha(t)."""
  alpha, sigma = marginal(sde, t)
  return (x - expand(sigma, x) * noise) / expand(alpha, x)


def predictions(noise_fn: NoiseFn) -> Callable:
  """(x, t, labels) -> (noise_hat, v), v None of a network that predicts no variance."""
  return getattr(noise_fn, "with_variance", lambda *at: (noise_fn(*at), None))


def _with_variance(noise_fn: NoiseFn, *at):
  both = predictions(noise_fn)(*at)
  legal = "beta, posterior: the network predicts no variance"
  check(both[1] is not None, "variance", "learned", legal)
  return both


# name: (noise_fn, x, t, ...) -> (noise_hat, v): log var = v log beta + (1 - v) log beta~ of a
# reverse step, where beta~ is that of q(x_s | x_t, x_0) and beta that of q(x_t | x_s)
VARIANCES = {
  "posterior": lambda noise_fn, *at: (noise_fn(*at), 0.0),
  "beta": lambda noise_fn, *at: (noise_fn(*at), 1.0),
  "learned": _with_variance,
}


def reverse_kernel(
  sde: SDE, x: Float[Array, "b *d"], noise: Array, v: Array | float, t: Time, s: Time, clip: bool
) -> tuple[Float[Array, "b *d"], Array]:
  """Mean and std of p(x_s | x_t), s < t: q(x_s | x_t, x_0) at the predicted data (Ho et al. 2020,
  eq. 11), its std times (sigma_t / sigma_s)^v (Nichol & Dhariwal 2021, eq. 15).

  beta / beta~ = (sigma_t / sigma_s)^2 for every process. `v` is a number or of the shape of x; std
  is of the rank of x, or a scalar; `clip` keeps the predicted data in [-1, 1].
  """
  data = data_from_noise(sde, x, noise, t)
  mean, std = posterior(sde, x, jnp.clip(data, -1, 1) if clip else data, t, s)
  return mean, expand(std, x) * expand(marginal(sde, t)[1] / marginal(sde, s)[1], x) ** v


def make_score_fn(sde: SDE, noise_fn: NoiseFn) -> ScoreFn:
  """The score of p_t: (x [b, *d], t scalar or [b], labels=None) -> [b, *d]."""
  return lambda x, t, labels=None: score_from_noise(sde, noise_fn(x, t, labels), t)
