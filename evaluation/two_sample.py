"""Are two sets of vectors drawn from one law? Permutation tests of three distances, and a trained
classifier.
"""

import warnings
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float
from scipy.spatial.distance import cdist
from scipy.stats import binom
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from evaluation.estimate import Estimate, normal, proportion, require, shuffled
from evaluation.fid import sample_frechet_distance
from evaluation.kid import mmd_squared

MOST = 2500  # vectors of either set that the discrepancy and the classifiers look at
NEEDED = 20  # of either set

# label: (vectors to train with) -> classifier (Lopez-Paz & Oquab 2017, sec. 5)
CLASSIFIERS = {
  "neighbours": lambda n: KNeighborsClassifier(int(np.sqrt(n))),
  "network": lambda n: MLPClassifier(20, max_iter=100, random_state=0),
}


def _statistics(
  distances: Float[np.ndarray, "t t"], splits: Bool[np.ndarray, "p t"]
) -> Float[np.ndarray, " p"]:
  """2 E|X - Y| - E|X - X'| - E|Y - Y'| (unbiased) of each split, true for the rows of X."""
  first, n = splits.astype(np.float64), splits[0].sum()
  m = len(distances) - n
  pairs = ((first @ distances) * first).sum(1)
  cross = first @ distances.sum(1) - pairs
  others = distances.sum() - pairs - 2 * cross
  return 2 * cross / (n * m) - pairs / (n * (n - 1)) - others / (m * (m - 1))


def _permuted(statistics: Callable, n: int, m: int, num_permutations: int, seed: int):
  """(statistic of the first n against the rest, share of random splits at least as large, this one
  among them).
  """
  first, rng = np.arange(n + m) < n, np.random.default_rng(seed)
  values = statistics(np.stack([first, *(rng.permutation(first) for _ in range(num_permutations))]))
  return float(values[0]), float(np.mean(values >= values[0]))


def energy_test(
  x: Float[np.ndarray, "n d"],
  y: Float[np.ndarray, "m d"],
  num_permutations: int = 200,
  seed: int = 0,
) -> tuple[float, float]:
  """(energy distance, p-value of equal laws by permutation) (Székely & Rizzo 2004)."""
  distances = cdist(both := np.concatenate([x, y]).astype(np.float64), both)
  statistics = lambda splits: _statistics(distances, splits)
  return _permuted(statistics, len(x), len(y), num_permutations, seed)


def frechet_test(
  x: Float[np.ndarray, "n d"],
  y: Float[np.ndarray, "m d"],
  num_permutations: int = 200,
  seed: int = 0,
) -> tuple[float, float]:
  """(Fréchet distance of the fitted Gaussians, p-value of equal laws by permutation)."""
  both = np.concatenate([x, y]).astype(np.float64)
  distance = lambda first: sample_frechet_distance(both[first], both[~first])
  statistics = lambda splits: np.array([distance(first) for first in splits])
  return _permuted(statistics, len(x), len(y), num_permutations, seed)


def _looked_at(metric: str, generated, reference, most: int) -> tuple[np.ndarray, np.ndarray]:
  """At most that many of either set, chosen by their values."""
  require(metric, "generated samples", len(generated), NEEDED)
  require(metric, "reference samples", len(reference), NEEDED)
  return tuple(shuffled(z)[:most].astype(np.float64) for z in (generated, reference))


def mmd(
  generated: Float[np.ndarray, "n d"],
  reference: Float[np.ndarray, "m d"],
  num_permutations: int = 999,
) -> dict[str, Estimate]:
  """Unbiased squared maximum mean discrepancy of the Gaussian kernel whose width is the median
  distance (Gretton et al. 2012, sec. 8), with its interval and a permutation p-value of equal laws.
  """
  x, y = _looked_at("mmd", generated, reference, MOST)
  squared = cdist(both := np.concatenate([x, y]), both, "sqeuclidean")
  width = np.median(squared[np.triu_indices(len(both), 1)]) or 1.0
  unlike = 1 - np.exp(-squared / (2 * width))
  statistics = lambda splits: _statistics(unlike, splits)
  _, p_value = _permuted(statistics, len(x), len(y), num_permutations, seed=0)
  kernel = lambda a, b: np.exp(-cdist(a, b, "sqeuclidean") / (2 * width))
  what = f"unbiased MMD^2, Gaussian kernel, {len(x)} and {len(y)} vectors; p-value of equal laws"
  return {"mmd_squared": normal(*mmd_squared(x, y, kernel), what)._replace(p_value=p_value)}


def classifier_test(
  generated: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"]
) -> dict[str, Estimate]:
  """How often a classifier trained on one half of both sets tells the other half apart, and the
  binomial p-value of equal laws (Lopez-Paz & Oquab 2017, eqs. 2, 3).

  One split, no cross-fitting: the answers of several folds depend on each other, and their binomial
  p-value is below 0.05 for a tenth of equal laws.
  """
  n = min(len(generated), len(reference), MOST)
  x, y = _looked_at("classifier_test", generated, reference, n)
  halves = [np.concatenate([x[i::2], y[i::2]]) for i in (0, 1)]
  labels = [np.repeat([0, 1], len(x[i::2])) for i in (0, 1)]
  found = {}
  for name, make in CLASSIFIERS.items():
    classifier = make_pipeline(StandardScaler(), make(len(halves[0])))
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", ConvergenceWarning)  # the test is valid at any stage
      classifier.fit(halves[0], labels[0])
    hits = classifier.predict(halves[1]) == labels[1]
    p_value = float(binom.sf(hits.sum() - 1, len(hits), 0.5))
    what = f"accuracy of a classifier ({name}) of samples against references; 0.5 for equal laws"
    found[f"classifier_{name}"] = proportion(hits, what)._replace(p_value=p_value)
  return found
