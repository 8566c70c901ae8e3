"""Are two sets of vectors drawn from one law? Permutation tests of two distances."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy.spatial.distance import cdist

from evaluation.fid import sample_frechet_distance


def _statistic(distances: np.ndarray, first: np.ndarray) -> float:
  """2 E|X - Y| - E|X - X'| - E|Y - Y'| (unbiased) where `first` marks the rows of X."""
  n, m = first.sum(), (~first).sum()
  cross = distances[np.ix_(first, ~first)].sum() / (n * m)
  within = distances[np.ix_(first, first)].sum() / (n * (n - 1))
  return float(2 * cross - within - distances[np.ix_(~first, ~first)].sum() / (m * (m - 1)))


def _p_value(statistic: Callable, first: np.ndarray, num_permutations: int, seed: int):
  """(statistic(first), share of random splits at least as large, this one among them)."""
  observed, rng = statistic(first), np.random.default_rng(seed)
  shuffled = [statistic(rng.permutation(first)) for _ in range(num_permutations)]
  return observed, (1 + sum(s >= observed for s in shuffled)) / (1 + num_permutations)


def energy_test(
  x: Float[np.ndarray, "n d"],
  y: Float[np.ndarray, "m d"],
  num_permutations: int = 200,
  seed: int = 0,
) -> tuple[float, float]:
  """(energy distance, p-value of equal laws by permutation) (Székely & Rizzo 2004)."""
  distances = cdist(both := np.concatenate([x, y]).astype(np.float64), both)
  split = np.arange(len(both)) < len(x)
  return _p_value(lambda first: _statistic(distances, first), split, num_permutations, seed)


def frechet_test(
  x: Float[np.ndarray, "n d"],
  y: Float[np.ndarray, "m d"],
  num_permutations: int = 200,
  seed: int = 0,
) -> tuple[float, float]:
  """(Fréchet distance of the fitted Gaussians, p-value of equal laws by permutation)."""
  both = np.concatenate([x, y]).astype(np.float64)
  split = np.arange(len(both)) < len(x)
  distance = lambda first: sample_frechet_distance(both[first], both[~first])
  return _p_value(distance, split, num_permutations, seed)
