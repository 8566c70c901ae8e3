"""Precision, recall, density, coverage: by their definitions, what each sees, and their intervals
against leaving out every vector in turn and by simulation.
"""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from evaluation import distances
from evaluation.precision_recall import precision_recall

NAMES = ("precision", "recall", "density", "coverage")


def by_definition(x, y):
  """Values of the four for samples x, references y."""
  radius = lambda z, k: np.sort(cdist(z, z), 1)[:, k]
  d = cdist(x, y)
  inside = d <= radius(y, 5)
  return np.array(
    [
      (d <= radius(y, 3)).any(1).mean(),
      (d <= radius(x, 3)[:, None]).any(0).mean(),
      inside.sum() / (5 * len(x)),
      inside.any(0).mean(),
    ]
  )


def values(x, y):
  found = precision_recall(x, y)
  return np.array([found[name].value for name in NAMES])


def test_definitions_in_blocks_of_any_size(monkeypatch):
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(60, 3)), 0.3 + rng.normal(size=(80, 3))
  np.testing.assert_allclose(values(x, y), by_definition(x, y), rtol=1e-12)
  monkeypatch.setattr(distances, "BLOCK", 7 * 80)
  np.testing.assert_allclose(values(x, y), by_definition(x, y), rtol=1e-12)


def test_the_same_set_is_precise_and_recalled():
  x = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
  np.testing.assert_allclose(values(x, x)[[0, 1, 3]], 1)


@pytest.mark.parametrize("seed", range(10))
def test_errors_are_those_of_leaving_out_each_vector(seed):
  """The jackknife of both sets, done the slow way."""
  rng = np.random.default_rng(seed)
  x, y = 1.3 * rng.normal(size=(25, 2)), rng.normal(size=(30, 2))
  slow = np.zeros(4)
  for left in (
    [by_definition(np.delete(x, i, 0), y) for i in range(len(x))],
    [by_definition(x, np.delete(y, i, 0)) for i in range(len(y))],
  ):
    slow += (len(left) - 1) * np.var(left, axis=0)
  found = precision_recall(x, y)
  errors = [found[name].standard_error for name in NAMES]
  np.testing.assert_allclose(errors, np.sqrt(slow), rtol=1e-9)


def test_dropped_modes_are_seen_by_recall_and_coverage_alone():
  rng = np.random.default_rng(0)
  at = lambda modes, n: 10 * rng.integers(0, modes, (n, 1)) + rng.normal(size=(n, 2))
  precision, recall, density, coverage = values(at(2, 500), at(4, 500))
  assert precision > 0.9 and density > 0.8
  assert recall < 0.6 and coverage < 0.6


def test_samples_off_the_data_are_seen_by_precision_and_density_alone():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, 600, 2))
  x[::3] += 50
  precision, recall, density, coverage = values(x, y)
  assert precision < 0.7 and density < 0.75
  assert recall > 0.9 and coverage > 0.85


def test_coverage_of_equal_laws_is_its_closed_form():
  """1 - P(the 5 nearest of n - 1 + m vectors are all references) (Naeem et al. 2020, eq. 9)."""
  rng = np.random.default_rng(0)
  n = m = 60
  expected = 1 - np.prod([(m - 1 - i) / (n + m - 1 - i) for i in range(5)])
  found = [values(*rng.normal(size=(2, n, 3))) for _ in range(100)]
  mean, error = np.mean(found, 0), np.std(found, 0) / 10
  assert abs(mean[3] - expected) < 3 * error[3]
  assert abs(mean[2] - 1) < 3 * error[2]


@pytest.mark.parametrize("d, shift, scale", [(2, 0.0, 1.0), (2, 0.0, 0.6), (16, 0.1, 1.3)])
def test_intervals_cover_the_expectation(d, shift, scale):
  """At least as often as they say: the jackknife's variance is too large rather than too small."""
  rng = np.random.default_rng(0)
  found = [
    precision_recall(shift + scale * rng.normal(size=(100, d)), rng.normal(size=(150, d)))
    for _ in range(100)
  ]
  for name in NAMES:
    mean = np.mean([one[name].value for one in found])
    covered = np.mean([one[name].low <= mean <= one[name].high for one in found])
    assert covered > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 100), name
