"""Log-likelihood by the probability-flow ODE, divergence estimators, bits per dimension."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from data import Transform
from dynamics import probability_flow, solve, with_log_density
from errors import ConfigError, lookup
from parameterization import ScoreFn
from sde_lib import SDE, Keys, example_keys, prior_log_prob

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
