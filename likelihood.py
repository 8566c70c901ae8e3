"""Log-likelihood by the probability-flow ODE, divergence estimators, bits per dimension; the
variational bound and the importance-weighted likelihood of a discrete chain.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bounds import level_term, level_times, log_weight, predict, prior_term
from data import Transform
from dynamics import probability_flow, solve, with_log_density
from errors import ConfigError, lookup
from parameterization import NoiseFn, ScoreFn
from sde_lib import SDE, Keys, example_keys, fold_in, normal, perturb, prior_log_prob

# name: (key, one example x [*d], number of probes) -> probes [k, *d], or None for the exact trace
DIVERGENCES = {
  "exact": lambda key, x, k: None,
  "rademacher": lambda key, x, k: jax.random.rademacher(key, (k, *x.shape), x.dtype),
}


class LogLikelihood(NamedTuple):
  """Per example: log-density in nats (NaN where the solve failed), latent at t_max, network
  evaluations.
  """

  log_prob: Float[Array, " b"]
  latent: Float[Array, "b *d"]
  nfe: Int[Array, " b"]


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
) -> LogLikelihood:
  """log p(x) by the instantaneous change of variables (Song et al. 2021, eq. 39), x taken as the
  state at t_min.

  Each example has its own step sizes, so its result does not depend on its batch mates.

  Args:
    key: one key, or one per example, for the probes.
    divergence: a name in `DIVERGENCES`: "rademacher" averages num_probes Hutchinson estimates,
      fixed along the path.
  """
  draw = lookup(DIVERGENCES, divergence, "divergence")

  def one(key, x, label):
    batched = None if label is None else label[None]
    field = probability_flow(sde, lambda x, t, _: score_fn(x[None], t, batched)[0])
    flow = with_log_density(field, draw(key, x, num_probes))
    start = (x, jnp.zeros((), x.dtype))
    return solve(
      flow, start, sde.t_min, sde.t_max, solver=solver, rtol=rtol, atol=atol, max_steps=max_steps
    )

  (latent, change), nfe, ok = jax.vmap(one, (0, 0, None if labels is None else 0))(
    example_keys(key, x.shape[0]), x, labels
  )
  return LogLikelihood(jnp.where(ok, prior_log_prob(sde, latent) - change, jnp.nan), latent, nfe)


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
) -> VariationalBound:
  """Upper bound on -log p(x) of a discrete chain, as `sampling.ancestral` draws from it (Ho et al.
  2020, eq. 5 and 13); one draw of the noise and one network evaluation for each level.

  Args:
    x: centres of the bins of `transform`, that is `transform.forward(k)`; where that is None or has
      no levels, any values.
    variance: of the reverse steps, a name in `parameterization.VARIANCES`.
    clip: keep the predicted data in [-1, 1], as the code of the paper does.
  """
  keys, times = example_keys(key, x.shape[0]), level_times(sde)

  def term(level):
    noised = perturb(sde, x, normal(fold_in(keys, level), x.shape), times[level])
    prediction = predict(noise_fn, noised, times[level], labels, variance)
    return level_term(sde, x, noised, prediction, level, transform, clip)

  return VariationalBound(prior_term(sde, x), jax.lax.map(term, jnp.arange(len(times))))


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
