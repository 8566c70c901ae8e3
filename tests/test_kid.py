"""Unbiased MMD^2: by hand, in closed form for Gaussians, and its standard error by simulation."""

import itertools

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from evaluation import distances
from evaluation.kid import cubic, kid, mmd_squared

gaussian = lambda x, y: np.exp(-cdist(x, y, "sqeuclidean") / 2)


def test_the_sums_by_hand():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(5, 3)), rng.normal(size=(7, 3))
  k = lambda a, b: (a @ b / 3 + 1) ** 3
  within = [np.mean([k(a, b) for a, b in itertools.permutations(z, 2)]) for z in (x, y)]
  expected = sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])
  np.testing.assert_allclose(kid(x, y)["kernel_distance"].value, expected, rtol=1e-12)


def test_blocks_change_nothing(monkeypatch):
  x, y = np.random.default_rng(0).normal(size=(2, 50, 8)).astype(np.float32)
  whole = mmd_squared(x, y, cubic)
  monkeypatch.setattr(distances, "BLOCK", 7 * 50)
  np.testing.assert_allclose(mmd_squared(x, y, cubic), whole, rtol=1e-12)


def test_expectation_is_that_of_the_laws():
  """N(0, 1) and N(a, 1) with exp(-|x - y|^2 / 2): 2 / sqrt 3 (1 - exp(-a^2 / 6)), at any size."""
  rng = np.random.default_rng(0)
  values = [
    mmd_squared(rng.normal(size=(6, 1)), 1 + rng.normal(size=(9, 1)), gaussian)[0]
    for _ in range(4000)
  ]
  expected = 2 / np.sqrt(3) * (1 - np.exp(-1 / 6))
  assert abs(np.mean(values) - expected) < 4 * np.std(values) / np.sqrt(4000)


def check_coverage(shift, n, m, repeats):
  rng = np.random.default_rng(0)
  draw = lambda: kid(shift / 8 + rng.normal(size=(n, 64)), rng.normal(size=(m, 64)))
  found = [draw()["kernel_distance"] for _ in range(repeats)]
  values = np.array([e.value for e in found])
  covered = np.mean([e.low <= values.mean() <= e.high for e in found])
  assert abs(covered - 0.95) < 0.02 + 3 * np.sqrt(0.95 * 0.05 / repeats)
  rms = np.sqrt(np.mean([e.standard_error**2 for e in found]))
  assert 0.85 < rms / values.std() < 1.25
  if shift == 0:
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(repeats)


@pytest.mark.parametrize("n, m", [(40, 40), (100, 300)])
@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_interval_covers_the_expectation(shift, n, m):
  check_coverage(shift, n, m, 200)


@pytest.mark.exhaustive
@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_interval_covers_the_expectation_at_length(shift):
  check_coverage(shift, 200, 300, 2000)
