"""Squared maximum mean discrepancy without bias; with the cubic kernel of features it is KID."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from evaluation.distances import rows
from evaluation.estimate import Estimate, jackknife_variance, normal, require

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (x [b, d], y [m, d]) -> [b, m]
NEEDED = 4  # of either set, for a variance of pairs


class _Sums(NamedTuple):
  """Sums of a kernel matrix, without its diagonal where the two sets are one."""

  by_row: np.ndarray
  by_column: np.ndarray
  squares: float


def cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """(x^T y / d + 1)^3 (Bińkowski et al. 2018, sec. 4)."""
  return (x @ y.T / x.shape[1] + 1) ** 3


def _sums(kernel: Kernel, x: np.ndarray, y: np.ndarray) -> _Sums:
  by_row, by_column, squares = np.empty(len(x)), np.zeros(len(y)), 0.0
  for part in rows(len(x), max(y.shape)):
    values = kernel(np.asarray(x[part], np.float64), y)
    if x is y:
      values[np.arange(len(values)), np.arange(part.start, part.stop)] = 0.0
    by_row[part], squares = values.sum(1), squares + (values**2).sum()
    by_column += values.sum(0)
  return _Sums(by_row, by_column, float(squares))


def _pair_variance(sums: _Sums, n: int, m: int) -> float:
  """Variance of the part of k(x, y) that neither x nor y alone explains; m values to a row, n to a
  column.
  """
  mean = sums.by_row.sum() / (len(sums.by_row) * m)
  parts = ((sums.by_row / m) ** 2).mean() + ((sums.by_column / n) ** 2).mean()
  return max(0.0, sums.squares / (len(sums.by_row) * m) - parts + mean**2)


def _draw_variance(within: _Sums, across: np.ndarray, m: int) -> float:
  """The variance of MMD^2 over draws of the n vectors that `across` sums over m others."""
  n = len(across)
  pairs = (within.by_row.sum() - 2 * within.by_row) / ((n - 1) * (n - 2))
  values = pairs - 2 * (across.sum() - across) / ((n - 1) * m)
  return jackknife_variance(values)


def mmd_squared(
  x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"], kernel: Kernel
) -> tuple[float, float]:
  """(MMD^2, its standard error) by the unbiased U-statistic over all pairs (Gretton et al. 2012,
  eq. 3).

  The error is that of the jackknife over both sets, less what it counts twice: the variance of
  pairs, all that is left where the laws are equal.
  """
  y = np.asarray(y, np.float64)
  x = np.asarray(x, np.float64)
  n, m = len(x), len(y)
  xx, yy, xy = _sums(kernel, x, x), _sums(kernel, y, y), _sums(kernel, x, y)
  value = xx.by_row.sum() / (n * (n - 1)) + yy.by_row.sum() / (m * (m - 1))
  value -= 2 * xy.by_row.sum() / (n * m)
  pairs = 2 * _pair_variance(xx, n - 1, n - 1) / (n * (n - 1))
  pairs += 2 * _pair_variance(yy, m - 1, m - 1) / (m * (m - 1))
  pairs += 4 * _pair_variance(xy, n, m) / (n * m)
  total = _draw_variance(xx, xy.by_row, m) + _draw_variance(yy, xy.by_column, n)
  return float(value), float(np.sqrt(max(total - pairs, pairs)))


def kid(
  generated: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"]
) -> dict[str, Estimate]:
  """Kernel inception distance (Bińkowski et al. 2018) over all pairs, not over random subsets."""
  require("kid", "generated samples", len(generated), NEEDED)
  require("kid", "reference samples", len(reference), NEEDED)
  value, error = mmd_squared(generated, reference, cubic)
  what = "unbiased MMD^2 of the cubic kernel; interval of it over draws of both sets"
  return {"kernel_distance": normal(value, error, what)}
