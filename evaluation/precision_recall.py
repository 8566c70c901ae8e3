"""Precision, recall, density and coverage: which samples lie where the data are, and which data lie
where the samples are.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from evaluation.distances import nearest, squared_distances
from evaluation.estimate import Estimate, jackknife_variance, normal, require, share

MANIFOLD, NEIGHBOURS = 3, 5  # k of precision and recall, k of density and coverage, as published
NEEDED = NEIGHBOURS + 2  # of either set


class _Balls(NamedTuple):
  """Around each of n vectors the ball that reaches to its k-th nearest, and how it grows when one
  of these k is left out.
  """

  neighbours: np.ndarray  # [n, k]
  radii: np.ndarray  # [n], squared
  wider: np.ndarray  # [n], squared: to the (k + 1)-th

  def gains(self, grown: np.ndarray) -> np.ndarray:
    """What leaving out each vector gains, where a ball that grows gains `grown`."""
    k = self.neighbours.shape[1]
    return np.bincount(self.neighbours.ravel(), np.repeat(grown, k), minlength=len(self.radii))


def _balls(x: np.ndarray) -> tuple[_Balls, _Balls]:
  """The balls of 3 and of 5 neighbours."""
  distances, indices = nearest(x, x, NEIGHBOURS + 1, same=True)
  of = lambda k: _Balls(indices[:, :k], distances[:, k - 1] ** 2, distances[:, k] ** 2)
  return of(MANIFOLD), of(NEIGHBOURS)


def _judge(squared: np.ndarray, balls: _Balls, gains: np.ndarray) -> np.ndarray:
  """Which rows lie in a ball; adds to `gains` how many more would, were each centre left out."""
  inside = squared <= balls.radii
  counts = inside.sum(1)
  for row in np.flatnonzero(counts <= 1):
    grown = (squared[row] <= balls.wider) & ~inside[row]
    rescued = np.unique(balls.neighbours[grown])
    if counts[row] == 0:
      gains[rescued] += 1
    elif (only := np.argmax(inside[row])) not in rescued:
      gains[only] -= 1
  return counts > 0


def _support(hits: np.ndarray, gains: np.ndarray, what: str) -> Estimate:
  """Share of hits; its error over draws of the vectors judged and of the centres of the balls."""
  variance = hits.var(ddof=1) / len(hits) + jackknife_variance(gains / len(hits))
  return share(hits.mean(), np.sqrt(variance), len(hits), what)


def _recall(generated: np.ndarray, reference: np.ndarray) -> Estimate:
  balls, _ = _balls(generated)
  hits, gains = np.empty(len(reference), bool), np.zeros(len(generated))
  for part, squared in squared_distances(reference, generated):
    hits[part] = _judge(squared, balls, gains)
  return _support(hits, gains, "share of references within the 3-neighbour ball of a sample")


def precision_recall(
  generated: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"]
) -> dict[str, Estimate]:
  """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 2) with 3 neighbours, density and
  coverage (Naeem et al. 2020, eqs. 3, 4) with 5.

  The intervals are those of the jackknife over both sets: leaving out a centre removes its ball and
  widens those that reached to it.
  """
  n, m = len(generated), len(reference)
  require("precision_recall", "generated samples", n, NEEDED)
  require("precision_recall", "reference samples", m, NEEDED)
  small, wide = _balls(reference)
  precise, dense, gains = np.empty(n, bool), np.empty(n), np.zeros(m)
  held, shell, owner = np.zeros((3, m))
  for part, squared in squared_distances(generated, reference):
    precise[part] = _judge(squared, small, gains)
    inside = squared <= wide.radii
    dense[part] = inside.sum(1) / NEIGHBOURS
    held += inside.sum(0)
    shell += ((squared <= wide.wider) & ~inside).sum(0)
    owner += np.arange(part.start, part.stop) @ inside
  covered = held > 0
  lost = np.bincount(owner[held == 1].astype(int), minlength=n)
  coverage = jackknife_variance(lost / m)
  coverage += jackknife_variance((wide.gains(~covered & (shell > 0)) - covered) / (m - 1))
  density = dense.var(ddof=1) / n + jackknife_variance((wide.gains(shell) - held) / NEIGHBOURS / n)
  held_by = "references whose 5-neighbour ball holds a sample"
  return {
    "precision": _support(
      precise, gains, "share of samples within the 3-neighbour ball of a reference"
    ),
    "recall": _recall(generated, reference),
    "density": normal(dense.mean(), np.sqrt(density), f"{held_by}, a fifth of their mean number"),
    "coverage": share(covered.mean(), np.sqrt(coverage), m, f"share of {held_by}"),
  }
