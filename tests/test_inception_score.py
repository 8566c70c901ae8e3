"""Inception score: its bounds, and its interval by simulation."""

import numpy as np

from evaluation.inception_score import inception_score


def score(p):
  return {name: e.value for name, e in inception_score(p).items()}


def test_bounds():
  """1 where all samples get one answer, the number of classes where all are sure and even."""
  same = np.tile([0.2, 0.3, 0.5, 0.0], (100, 1))
  np.testing.assert_allclose([*score(same).values()], [1, 1, 0], atol=1e-12)
  sure = np.eye(4)[np.arange(400) % 4]
  np.testing.assert_allclose(score(sure)["inception_score"], 4)
  assert 3.5 < score(sure)["inception_score_mean"] < 4 > score(sure)["inception_score_std"] > 0


def test_two_answers_by_hand():
  p = np.tile([[0.9, 0.1], [0.1, 0.9]], (50, 1))
  information = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
  np.testing.assert_allclose(score(p)["inception_score"], np.exp(information))


def test_order_does_not_matter_and_interval_covers():
  rng = np.random.default_rng(0)
  draw = lambda: rng.dirichlet([0.3, 0.2, 0.1, 0.1], size=200)
  p = draw()
  for name, value in score(rng.permutation(p)).items():
    np.testing.assert_allclose(value, score(p)[name], rtol=1e-12)
  found = [inception_score(draw())["inception_score"] for _ in range(300)]
  mean = np.mean([e.value for e in found])
  covered = np.mean([e.low <= mean <= e.high for e in found])
  assert abs(covered - 0.95) < 3 * np.sqrt(0.95 * 0.05 / 300)
