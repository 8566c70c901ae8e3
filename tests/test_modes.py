"""Mode counting on the grid of 25 Gaussians and with 1,000 classes."""

import numpy as np
import pytest

from errors import ConfigError
from evaluation.modes import count_modes, gaussian_modes

GRID = 2.0 * np.stack(np.meshgrid(range(-2, 3), range(-2, 3)), -1).reshape(25, 2)


def test_the_grid_of_gaussians():
  """All modes, 1 - exp(-9/2) of the samples within 3 standard deviations, weights as they are."""
  rng = np.random.default_rng(0)
  x = GRID[rng.integers(0, 25, 2500)] + 0.05 * rng.normal(size=(2500, 2))
  found = gaussian_modes(x, GRID, 0.05)
  assert found["modes"].value == 25
  assert found["high_quality"].low < 1 - np.exp(-4.5) < found["high_quality"].high
  assert found["mode_kl"].p_value > 0.01
  half = gaussian_modes(np.concatenate([x[x[:, 0] > 1], [[7.0, 7.0]]]), GRID, 0.05)
  assert half["modes"].value == 10 and half["mode_kl"].p_value < 1e-6
  np.testing.assert_allclose(half["mode_kl"].value, np.log(2.5), rtol=0.05)


def test_a_thousand_classes():
  """A perfect sampler misses 1000 (1 - 1/1000)^n classes; the law of its KL is chi-squared."""
  rng = np.random.default_rng(0)
  found = [count_modes(rng.integers(0, 1000, 3000), np.ones(1000)) for _ in range(50)]
  counts = np.array([one["modes"].value for one in found])
  expected = 1000 * (1 - 0.999**3000)
  assert abs(counts.mean() - expected) < 4 * counts.std() / np.sqrt(50)
  assert f"{expected:.1f} on average" in found[0]["modes"].what


def test_p_values_of_true_weights_are_uniform():
  rng = np.random.default_rng(0)
  weights = np.array([0.5, 0.3, 0.2])
  p = [
    count_modes(rng.choice(3, 500, p=weights), 10 * weights)["mode_kl"].p_value for _ in range(500)
  ]
  for level in (0.1, 0.5, 0.9):
    assert abs(np.mean(np.array(p) <= level) - level) < 4 * np.sqrt(level * (1 - level) / 500)


def test_impossible_modes_cost_infinitely():
  assert count_modes(np.array([0, 1]), np.array([1.0, 0.0]))["mode_kl"].value == np.inf


def test_samples_far_from_all_modes_are_refused():
  with pytest.raises(ConfigError, match="near a mode"):
    gaussian_modes(np.full((5, 2), 1.0), GRID, 0.05)
