"""Copies of the training set are found, fair samples are not."""

import numpy as np

from evaluation.memorization import memorization

RNG = np.random.default_rng(0)
TRAINING = RNG.normal(size=(300, 5))


def test_copies_are_found_with_what_they_copy():
  samples = RNG.normal(size=(100, 5))
  samples[[7, 40]] = TRAINING[[123, 5]]
  samples[60] = TRAINING[77] + 0.01
  found = memorization(samples, TRAINING, RNG.normal(size=(100, 5)), num_worst=3)
  assert set(found.generated[:2]) == {7, 40} and found.generated[2] == 60
  assert dict(zip(found.generated, found.training)) == {7: 123, 40: 5, 60: 77}
  assert (found.ratios[:2] == 0).all() and found.ratios[2] < 0.05
  assert found.estimates["copied"].value >= 0.03


def test_copies_of_what_was_trained_on_twice_are_copies():
  twice = np.concatenate([TRAINING, TRAINING])
  held_out = RNG.normal(size=(50, 5))
  assert memorization(TRAINING[:50], twice, held_out).estimates["copied"].value == 1


def test_the_test_of_copying():
  """Uniform p-values for fair samples; noisy copies are near, an overdispersed model is far."""
  p = []
  for _ in range(300):
    estimates = memorization(*RNG.normal(size=(3, 60, 2))).estimates
    p.append(estimates["copying_z"].p_value)
  for level in (0.1, 0.5, 0.9):
    assert abs(np.mean(np.array(p) <= level) - level) < 4 * np.sqrt(level * (1 - level) / 300)
  held_out = RNG.normal(size=(200, 5))
  noisy = TRAINING[:200] + 0.2 * RNG.normal(size=(200, 5))
  copied = memorization(noisy, TRAINING, held_out).estimates
  assert copied["copying_z"].value < -5 and copied["nearer_than_held_out"].low > 0.7
  far = memorization(2 * RNG.normal(size=(200, 5)), TRAINING, held_out).estimates
  assert far["copying_z"].value > 5 and far["copying_z"].p_value > 0.999


def test_interval_of_the_probability_covers():
  """Given the training set: P(a sample is nearer) over draws of samples and held-out data."""
  draw = lambda: memorization(
    0.8 * RNG.normal(size=(60, 2)), TRAINING[:, :2], RNG.normal(size=(80, 2))
  ).estimates["nearer_than_held_out"]
  found = [draw() for _ in range(200)]
  mean = np.mean([e.value for e in found])
  covered = np.mean([e.low <= mean <= e.high for e in found])
  assert abs(covered - 0.95) < 3 * np.sqrt(0.95 * 0.05 / 200)
