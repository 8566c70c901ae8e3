"""The trace of a Jacobian: laws of probes and the estimates made of them, and the linear part of a
flow, whose trace is known and needs no estimate.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from errors import check
from sde_lib import SDE, coefficients, marginal

# columns of the Jacobian that the exact trace makes at once, per example: what bounds its memory
CHUNK = 64


class Sketched(NamedTuple):
  """Probes of Hutch++: the images of `sketch` span a subspace, `probe` sees what lies outside."""

  sketch: Float[Array, "s *d"]
  probe: Float[Array, "m *d"]


Probe = Float[Array, "k *d"] | Sketched | None


def _signs(key, x, k):
  """The same in every precision, which `jax.random.rademacher` is not."""
  heads = jax.random.bernoulli(key, jnp.float32(0.5), (k, *x.shape))
  return 2 * heads.astype(x.dtype) - 1


def _sphere(key, x, k):
  g = jax.random.normal(key, (k, x.size), x.dtype)
  radius = jnp.sqrt(x.size) / jnp.linalg.norm(g, axis=1, keepdims=True)
  return (radius * g).reshape(k, *x.shape)


def _orthogonal(key, x, k):
  check(k <= x.size, "likelihood.num_probes", k, f"for 'orthogonal' 1 to D = {x.size}")
  frame = jnp.linalg.qr(jax.random.normal(key, (x.size, k), x.dtype))[0]
  return jnp.sqrt(x.size) * frame.T.reshape(k, *x.shape)


def _hutch_pp(key, x, k):
  rank = k // 3
  legal = f"for 'hutch_pp' from 3 to 3 D = {3 * x.size}"
  check(1 <= rank <= x.size, "likelihood.num_probes", k, legal)
  signs = _signs(key, x, k - rank)
  return Sketched(signs[:rank], signs[rank : k - rank])


# name: (key, one example x [*d], number of products k) -> probes of identity covariance, or None
# for the exact trace: D products
DIVERGENCES = {
  "exact": lambda key, x, k: None,
  "rademacher": _signs,
  "gaussian": lambda key, x, k: jax.random.normal(key, (k, *x.shape), x.dtype),
  "sphere": _sphere,
  "orthogonal": _orthogonal,
  "hutch_pp": _hutch_pp,
}


def num_estimates(probe: Probe) -> int:
  """How many estimates `traces` makes of these probes."""
  return 1 if probe is None else len(jax.tree.leaves(probe)[-1])


def _inner(a: Float[Array, "k *d"], b: Float[Array, "k *d"]) -> Float[Array, " k"]:
  return (a * b).reshape(len(a), -1).sum(1)


def _exact_trace(push, x):
  def entry(i):
    column = push(jnp.zeros(x.size, x.dtype).at[i].set(1.0).reshape(x.shape))
    return column.reshape(-1)[i]

  return jax.lax.map(entry, jnp.arange(x.size), batch_size=min(CHUNK, x.size)).sum()


def _sketched_trace(push, sketch, probe):
  """Meyer et al. 2021, "Hutch++", algorithm 1: exact on the span Q of the sketch's images, and
  Hutchinson's estimates outside it.
  """
  images = jax.vmap(push)(sketch).reshape(len(sketch), -1)
  basis = jnp.linalg.qr(images.T)[0]
  outside = probe.reshape(len(probe), -1)
  outside = outside - (outside @ basis) @ basis.T
  both = jnp.concatenate([basis.T, outside]).reshape(-1, *probe.shape[1:])
  products = _inner(both, jax.vmap(push)(both))
  return products[: len(sketch)].sum() + products[len(sketch) :]


def traces(push: Callable, probe: Probe, x: Float[Array, "*d"]) -> Float[Array, " m"]:
  """Estimates of the trace of the linear map `push` [*d] -> [*d], each unbiased for its probe's
  law (Hutchinson 1990: E v^T A v = tr A); one exact value where `probe` is None.

  Hutch++ with k products, a third of them for the sketch and a third for its span, gives
  k - 2 (k // 3) estimates. The span is that of `push`, so along a path it follows the Jacobian;
  the sketch and the probes stay.
  """
  if probe is None:
    return _exact_trace(push, x)[None]
  if isinstance(probe, Sketched):
    return _sketched_trace(push, *probe)
  return _inner(probe, jax.vmap(push)(probe))


def standard_error(
  estimates: Float[Array, "b m"], divergence: str, num_dims: int
) -> Float[Array, " b"]:
  """Standard error of the mean of the estimates of each example, from their spread: unbiased in its
  square. 0 for the exact trace, NaN for one estimate.

  Orthogonal probes are drawn from a frame without replacement: D of them are exact, and the
  variance of k has the factor 1 - k / D of a finite population.
  """
  m = estimates.shape[1]
  if divergence == "exact":
    return jnp.zeros_like(estimates[:, 0])
  if m == 1:
    return jnp.full_like(estimates[:, 0], jnp.nan)
  left = 1 - m / num_dims if divergence == "orthogonal" else 1.0
  return estimates.std(1, ddof=1) * np.sqrt(left / m)


class GaussianControl(NamedTuple):
  """Mean and covariance of the data, diagonalised: covariance = eigenvectors diag(eigenvalues)
  eigenvectors^T, over the flattened example.
  """

  mean: Float[Array, " n"]
  eigenvectors: Float[Array, "n n"]
  eigenvalues: Float[Array, " n"]


def fit_control(x: Float[np.ndarray, "b *d"]) -> GaussianControl:
  """The Gaussian of the first two moments of examples in model units, dequantized as the model saw
  them; float64 on the host, D^3 operations.
  """
  flat = np.asarray(x, np.float64).reshape(len(x), -1)
  legal = "two examples or more, with finite values"
  check(len(flat) > 1 and bool(np.isfinite(flat).all()), "examples of the control", x.shape, legal)
  values, vectors = np.linalg.eigh(np.cov(flat, rowvar=False).reshape(flat.shape[1], -1))
  columns = flat.mean(0), vectors, np.maximum(values, 0.0)
  return GaussianControl(*(jnp.asarray(c, jnp.result_type(float)) for c in columns))


def linear_part(sde: SDE, control: GaussianControl | None) -> Callable:
  """(t, x [*d]) -> (velocity [*d], its trace) of the linear part of the probability flow: f x, and
  with a control -g^2 / 2 times the score -(alpha^2 C + sigma^2 I)^-1 (x - alpha m) of Gaussian
  data.
  """

  def part(t, x):
    f, g_squared = coefficients(sde, t)
    if control is None:
      return f * x, f * x.size
    alpha, sigma = marginal(sde, t)
    rates = 0.5 * g_squared / (alpha**2 * control.eigenvalues + sigma**2)
    y = (x.reshape(-1) - alpha * control.mean) @ control.eigenvectors
    velocity = f * x + ((rates * y) @ control.eigenvectors.T).reshape(x.shape)
    return velocity, f * x.size + rates.sum()

  return part
