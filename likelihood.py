"""Log-likelihood by the probability-flow ODE, encoding and decoding, bits per dimension; the
variational bound and the importance-weighted likelihood of a discrete chain.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from optimistix import rms_norm

from bounds import level_term, level_times, log_weight, predict, prior_term, sum_dims
from data import Transform
from divergence import DIVERGENCES, GaussianControl, linear_part, num_estimates, standard_error
from dynamics import (
  Solution,
  in_noise_time,
  noise_time,
  probability_flow,
  solve,
  with_log_density,
)
from errors import ConfigError, check, lookup
from losses import WEIGHTINGS, denoising_loss, importance_quantile, independent, noise_error
from parameterization import NoiseFn, ScoreFn, data_from_noise
from sde_lib import SDE, Keys, example_keys, fold_in, marginal, normal, perturb, prior_log_prob


class LogLikelihood(NamedTuple):
  """Per example, nats; NaN where the solve failed. log_prob = prior + divergence + offset.

  `standard_error` is that of the probes alone: 0 for the exact trace, NaN where there is one
  estimate and no spread.
  """

  log_prob: Float[Array, " b"]
  latent: Float[Array, "b *d"]
  nfe: Int[Array, " b"]  # evaluations of drift and divergence: each 1 + products network passes
  prior: Float[Array, " b"]  # log-density of the latent
  divergence: Float[Array, " b"]  # the divergence's integral over time, mean over the probes
  standard_error: Float[Array, " b"]
  offset: Float[Array, " b"]  # from the density at t_min to that of the data


def start_offset(
  sde: SDE,
  score_fn: ScoreFn,
  x: Float[Array, "b *d"],
  x_t: Float[Array, "b *d"],
  labels: Int[Array, " b"] | None = None,
) -> Float[Array, " b"]:
  """log p(x | x_t) - log q(x_t | x) at t_min, p the Gaussian about the predicted data of std
  sigma / alpha (Song, Durkan et al. 2021, "Maximum likelihood training", in the released code; Kim
  et al. 2022, "Soft truncation").

  log p(x) >= E_q[log p_{t_min}(x_t) + offset]. With x_t = alpha x + sigma noise and the predicted
  noise it is D log alpha + (|noise|^2 - |noise - prediction|^2) / 2.
  """
  alpha, sigma = marginal(sde, sde.t_min)
  noise, predicted = (x_t - alpha * x) / sigma, -sigma * score_fn(x_t, sde.t_min, labels)
  return sum_dims(predicted * (noise - 0.5 * predicted) + jnp.log(alpha))


def _perturbed(key, sde, score_fn, x, labels):
  x_t = perturb(sde, x, normal(fold_in(key, 1), x.shape), sde.t_min)
  return x_t, start_offset(sde, score_fn, x, x_t, labels), 1


# name: (keys, sde, score_fn, x, labels) -> the state at t_min, the offset [b], evaluations
STARTS = {
  "none": lambda key, sde, score_fn, x, labels: (x, jnp.zeros_like(x, shape=x.shape[:1]), 0),
  "perturb": _perturbed,
}


# Proportional-integral control (Hairer & Wanner 1996, "Solving ODEs II", section IV.2): an error
# that is small by chance, as of a network rough in time, does not lengthen the next step at once
GAINS = (0.3, 0.4)


def _solve_each(
  sde: SDE, score_fn: ScoreFn, flow_of: Callable, examples, labels, *, decode=False, **options
) -> Solution:
  """Solves from t_min to t_max, or back, each example with its own steps.

  `flow_of(field, *example)` makes (the flow, its start) of the probability flow of one example.
  """
  ends = [noise_time(sde, t) for t in (sde.t_min, sde.t_max)]

  def one(label, *example):
    label = None if label is None else label[None]
    field = probability_flow(sde, lambda x, t, _: score_fn(x[None], t, label)[0])
    flow, start = flow_of(field, *example)
    span = ends[::-1] if decode else ends
    return solve(in_noise_time(sde, flow), start, *span, gains=GAINS, **options)

  return jax.vmap(one, (None if labels is None else 0, *[0] * len(examples)))(labels, *examples)


def _error_norm(error: tuple[Array, Array]) -> Array:
  """That of the path, and of its log-density per dimension, which is what bits/dim are made of."""
  path, log_prob = error
  return jnp.maximum(rms_norm(path), jnp.abs(log_prob).max() / path.size)


def log_likelihood(
  key: Keys,
  sde: SDE,
  score_fn: ScoreFn,
  x: Float[Array, "b *d"],
  *,
  divergence: str = "rademacher",
  num_probes: int = 1,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  solver: str = "tsit5",
  max_steps: int = 1000,
  labels: Int[Array, " b"] | None = None,
  control: GaussianControl | None = None,
  start: str = "none",
) -> LogLikelihood:
  """log p(x) by the instantaneous change of variables (Song et al. 2021, eq. 39).

  Each example has its own step sizes, so its result does not depend on its batch mates.

  Args:
    key: one key, or one per example, for the probes and the start.
    divergence: a name in `DIVERGENCES`; the probes are fixed along the path.
    num_probes: Jacobian products for each evaluation, each a network pass more; the exact trace
      takes D.
    control: a Gaussian near the data, whose part of the divergence is taken exactly; that of the
      linear drift always is. The estimate stays unbiased.
    start: a name in `STARTS`. "none": x is the state at t_min, log_prob its log-density there.
      "perturb": x are data; one draw of a lower bound on log p(x) in expectation (`start_offset`).
  """
  draw = lookup(DIVERGENCES, divergence, "likelihood.divergence")
  resolution = float(jnp.finfo(x.dtype).eps)
  check(rtol >= resolution, "likelihood.rtol", rtol, f"{resolution:.1g} or more for {x.dtype}")
  keys, linear = example_keys(key, x.shape[0]), linear_part(sde, control)
  begin, offset, extra = lookup(STARTS, start, "likelihood.start")(keys, sde, score_fn, x, labels)

  def flow_of(field, key, x):
    probe = draw(key, x, num_probes)
    estimates = jnp.zeros(num_estimates(probe), x.dtype)
    return with_log_density(field, probe, linear), (x, estimates)

  options = {"solver": solver, "rtol": rtol, "atol": atol, "max_steps": max_steps}
  options["norm"] = _error_norm
  (latent, changes), nfe, ok = _solve_each(sde, score_fn, flow_of, (keys, begin), labels, **options)
  prior, integral = prior_log_prob(sde, latent), -changes.mean(1)
  error = standard_error(changes, divergence, x[0].size)
  parts = (prior + integral + offset, prior, integral, error, offset)
  total, *rest = (jnp.where(ok, part, jnp.nan) for part in parts)
  return LogLikelihood(total, latent, nfe + extra, *rest)


def continuous_bound(
  key: Keys,
  sde: SDE,
  noise_fn: NoiseFn,
  x: Float[Array, "b *d"],
  *,
  labels: Int[Array, " b"] | None = None,
) -> Float[Array, " b"]:
  """One draw of the bound on -log p(x) in continuous time, nats (Kingma et al. 2021, "Variational
  diffusion models", eq. 11-16): prior, diffusion at one time, Gaussian decoder of std sigma / alpha
  at t_min. Two network evaluations, differentiable in x.
  """
  keys = example_keys(key, x.shape[0])
  how = {"weighting": WEIGHTINGS["elbo"], "time_sampler": independent(importance_quantile)}
  loss = denoising_loss(fold_in(keys, 0), sde, noise_fn, x, labels=labels, **how)
  alpha, sigma = marginal(sde, sde.t_min)
  misfit = noise_error(fold_in(keys, 1), sde, noise_fn, x, sde.t_min, labels)
  decoder = 0.5 * misfit + x[0].size * jnp.log(sigma / alpha * jnp.sqrt(2 * jnp.pi))
  return prior_term(sde, x) + (sde.t_max - sde.t_min) * loss + decoder


def _transport(
  sde: SDE,
  score_fn: ScoreFn,
  x: Float[Array, "b *d"],
  *,
  decode: bool,
  rtol: float = 1e-5,
  atol: float = 1e-5,
  solver: str = "tsit5",
  max_steps: int = 1000,
  labels: Int[Array, " b"] | None = None,
) -> tuple[Float[Array, "b *d"], Int[Array, " b"]]:
  options = {"solver": solver, "rtol": rtol, "atol": atol, "max_steps": max_steps}
  flow_of = lambda field, x: (field, x)
  solution = _solve_each(sde, score_fn, flow_of, (x,), labels, decode=decode, **options)
  ok = solution.ok.reshape(-1, *[1] * (x.ndim - 1))
  return jnp.where(ok, solution.state, jnp.nan), solution.nfe


def encode(
  sde: SDE, score_fn: ScoreFn, x: Float[Array, "b *d"], **options
) -> tuple[Float[Array, "b *d"], Int[Array, " b"]]:
  """The latent at t_max of each x at t_min by the probability flow, and its network evaluations
  (Song et al. 2021, section 4.3); NaN where the solve failed. Each example has its own steps.

  `options`: rtol, atol, solver, max_steps and labels, as of `log_likelihood`. Points between two
  latents: `sampling.interpolate`.
  """
  return _transport(sde, score_fn, x, decode=False, **options)


def decode(
  sde: SDE, score_fn: ScoreFn, latent: Float[Array, "b *d"], **options
) -> tuple[Float[Array, "b *d"], Int[Array, " b"]]:
  """The inverse of `encode`, of the same options: x at t_min of each latent."""
  return _transport(sde, score_fn, latent, decode=True, **options)


def bits_per_dim(
  log_prob: Float[Array, " b"], num_dims: int, transform: Transform
) -> Float[Array, " b"]:
  """-log2 P(k) / D bounded by the log-density of dequantized data: P(k) = density x bin volume
  (Theis et al. 2016, eq. 3).

  Args:
    log_prob: log-density in nats in the model's units.
    num_dims: D, the number of values of an example.
    transform: declares the levels and the scaling; data without levels have no bits/dim.
  """
  if not transform.levels:
    raise ConfigError(
      "bits per dimension need data with declared levels; report the log-density in nats instead."
    )
  return -(log_prob / num_dims + jnp.log(transform.bin_width)) / jnp.log(2.0)


class VariationalBound(NamedTuple):
  """The terms of the bound on -log p(x_0) of each example, nats, of which the sum is `total`.

  `total / (D log 2)` is bits/dim where the data have levels; else it bounds a density.
  """

  prior: Float[Array, " b"]  # L_T
  terms: Float[Array, "n b"]  # row i: from level i down; row 0 is -log p(x_0 | x_1)

  @property
  def total(self) -> Float[Array, " b"]:
    """In expectation at least -log p(x_0)."""
    return self.prior + self.terms.sum(0)


def variational_bound(
  key: Keys,
  sde: SDE,
  noise_fn: NoiseFn,
  x: Float[Array, "b *d"],
  *,
  variance: str,
  transform: Transform | None,
  clip: bool = False,
  labels: Int[Array, " b"] | None = None,
  decoder: Callable[[Float[Array, "b *d"]], Float[Array, " b"]] | None = None,
) -> VariationalBound:
  """Upper bound on -log p(x) of a discrete chain, as `sampling.ancestral` draws from it (Ho et al.
  2020, eq. 5 and 13); one draw of the noise and one network evaluation for each level.

  Args:
    x: centres of the bins of `transform`, that is `transform.forward(k)`; where that is None or has
      no levels, any values.
    variance: of the reverse steps, a name in `parameterization.VARIANCES`.
    clip: keep the predicted data in [-1, 1], as the code of the paper does.
    decoder: log p(x_0 | x_1) given the predicted data, in place of the discretized Gaussian; one
      network evaluation more.
  """
  keys, times = example_keys(key, x.shape[0]), level_times(sde)

  def term(level):
    noised = perturb(sde, x, normal(fold_in(keys, level), x.shape), times[level])
    prediction = predict(noise_fn, noised, times[level], labels, variance)
    return level_term(sde, x, noised, prediction, level, transform, clip)

  terms = jax.lax.map(term, jnp.arange(len(times)))
  if decoder is not None:
    t = jnp.full(len(x), times[0])
    noised = perturb(sde, x, normal(fold_in(keys, 0), x.shape), t)
    predicted = data_from_noise(sde, noised, noise_fn(noised, t, labels), t)
    terms = terms.at[0].set(-decoder(predicted))
  return VariationalBound(prior_term(sde, x), terms)


def importance_weighted(
  key: Keys,
  sde: SDE,
  noise_fn: NoiseFn,
  x: Float[Array, "b *d"],
  num_samples: int,
  *,
  variance: str,
  transform: Transform | None,
  clip: bool = False,
  labels: Int[Array, " b"] | None = None,
) -> Float[Array, " b"]:
  """log of the mean of p(x_{0:T}) / q(x_{1:T} | x_0) over `num_samples` paths of q, nats
  (Sohl-Dickstein et al. 2015, eq. 9; Burda et al. 2016, eq. 8).

  Its exponential is unbiased for p(x), it is below log p(x) in expectation and grows with
  `num_samples`. A network evaluation for each level and path; arguments as for `variational_bound`.
  """
  keys = example_keys(key, x.shape[0])
  given = {"variance": variance, "transform": transform, "clip": clip, "labels": labels}

  def one(path):
    draw = lambda level: normal(fold_in(fold_in(keys, path), level), x.shape)
    return log_weight(draw, sde, noise_fn, x, **given)

  weights = jax.lax.map(one, jnp.arange(num_samples))
  return jax.nn.logsumexp(weights, axis=0) - jnp.log(num_samples)
