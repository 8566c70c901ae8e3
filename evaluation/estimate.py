"""What every metric returns, how its interval is made, what it says when samples are too few."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy.stats import norm

from errors import check

QUANTILE = float(norm.ppf(0.975))  # every interval covers 95 %


class Estimate(NamedTuple):
  """A figure with its error; None where there is none. `what` says what the figure is and what the
  interval covers.
  """

  value: float
  what: str
  standard_error: float | None = None
  low: float | None = None
  high: float | None = None
  p_value: float | None = None


def normal(value: float, standard_error: float, what: str) -> Estimate:
  """value ± 1.96 standard errors."""
  value, standard_error = float(value), float(standard_error)
  away = QUANTILE * standard_error
  return Estimate(value, what, standard_error, value - away, value + away)


def share(value: float, standard_error: float, n: int, what: str) -> Estimate:
  """A share among n with the interval of Wilson (1927), which is right near 0 and 1 too; n is less
  where the standard error is larger than that of independent examples.
  """
  p, z, variance = float(value), QUANTILE, value * (1 - value)
  if variance > 0:
    n = min(n, variance / standard_error**2)
  centre, width = p + z**2 / (2 * n), z * np.sqrt(variance / n + z**2 / (4 * n**2))
  low, high = (float((centre + sign * width) / (1 + z**2 / n)) for sign in (-1, 1))
  return Estimate(p, what, float(standard_error), max(low, 0.0), min(high, 1.0))


def proportion(hits: Bool[np.ndarray, " n"], what: str) -> Estimate:
  """The share of hits among independent examples."""
  return share(hits.mean(), hits.std() / np.sqrt(len(hits)), len(hits), what)


def jackknife_variance(values: Float[np.ndarray, " n"]) -> float:
  """Variance of a figure over draws of n vectors, from its values without each of them (up to a
  constant) (Efron & Stein 1981): too large rather than too small.
  """
  return float((len(values) - 1) * values.var())


def require(metric: str, which: str, count: int, needed: int) -> None:
  """Raises the `ConfigError` that names the number of samples a metric needs."""
  mend = f"draw {needed} or leave {metric} out"
  check(count >= needed, f"number of {which} for {metric}", count, f"at least {needed}", mend)


def shuffled(x: Shaped[np.ndarray, "n *d"], seed: int = 0) -> Shaped[np.ndarray, "n *d"]:
  """The rows in an order that is random but decided by their values, not by the order given: by the
  fraction of a large multiple along a random direction, then permuted. Rounding moves few rows.
  """
  rng, flat = np.random.default_rng(seed), np.asarray(x, np.float64).reshape(len(x), -1)
  along = flat @ rng.normal(size=flat.shape[1])
  fraction = along * (997 / (along.std() or 1.0)) % 1.0
  return x[np.argsort(fraction, kind="stable")[rng.permutation(len(x))]]
