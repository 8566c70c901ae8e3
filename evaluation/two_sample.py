"""Are two sets of vectors drawn from one law? Energy distance with a permutation test."""

import numpy as np
from jaxtyping import Float
from scipy.spatial.distance import cdist


def _statistic(distances: np.ndarray, first: np.ndarray) -> float:
  """2 E|X - Y| - E|X - X'| - E|Y - Y'| (unbiased) where `first` marks the rows of X."""
  n, m = first.sum(), (~first).sum()
  cross = distances[np.ix_(first, ~first)].sum() / (n * m)
  within = distances[np.ix_(first, first)].sum() / (n * (n - 1))
  return float(2 * cross - within - distances[np.ix_(~first, ~first)].sum() / (m * (m - 1)))


def energy_test(
  x: Float[np.ndarray, "n d"],
  y: Float[np.ndarray, "m d"],
  num_permutations: int = 200,
  seed: int = 0,
) -> tuple[float, float]:
  """(energy distance, p-value of equal laws by permutation) (Székely & Rizzo 2004)."""
  distances = cdist(both := np.concatenate([x, y]).astype(np.float64), both)
  first = np.arange(len(both)) < len(x)
  observed, rng = _statistic(distances, first), np.random.default_rng(seed)
  shuffled = [_statistic(distances, rng.permutation(first)) for _ in range(num_permutations)]
  return observed, (1 + sum(s >= observed for s in shuffled)) / (1 + num_permutations)
