"""Does a model copy its training data? Nearest neighbours of its samples, beside those of held-out
data.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import norm

from evaluation.distances import nearest
from evaluation.estimate import Estimate, proportion, require, share

RATIO = 1 / 3  # of the distances to nearest and second nearest, below which a sample is a copy
NEEDED = 20


class Memorization(NamedTuple):
  """The figures, and for a picture the samples nearest to being copies, worst first: `generated`
  indices, the `training` example that each resembles, the `ratios` of the two distances.
  """

  estimates: dict[str, Estimate]
  generated: Int[np.ndarray, " w"]
  training: Int[np.ndarray, " w"]
  ratios: Float[np.ndarray, " w"]


def _ratios(distances: np.ndarray) -> np.ndarray:
  """Nearest over second nearest distance; 0 of an exact copy even where it was trained on twice."""
  first, second = distances.T
  return np.divide(first, second, out=np.zeros(len(first)), where=first > 0)


def _placements(values: np.ndarray, among: np.ndarray) -> np.ndarray:
  """The share of the others that lie below each value; ties count half."""
  among = np.sort(among)
  return sum(np.searchsorted(among, values, side) for side in ("left", "right")) / (2 * len(among))


def _closeness(copies: np.ndarray, fair: np.ndarray) -> dict[str, Estimate]:
  """The Mann-Whitney test of distances of samples against those of held-out data, and the error of
  its probability (DeLong et al. 1988).
  """
  n, m = len(copies), len(fair)
  farther, nearer_too = _placements(copies, fair), _placements(fair, copies)
  z = (farther.mean() - 0.5) / np.sqrt((n + m + 1) / (12 * n * m))
  error = np.sqrt(farther.var(ddof=1) / n + nearer_too.var(ddof=1) / m)
  nearer = "probability that a sample is nearer to the training set than held-out data; 0.5 is fair"
  return {
    "copying_z": Estimate(float(z), "negative: samples are too near", p_value=float(norm.cdf(z))),
    "nearer_than_held_out": share(1 - farther.mean(), error, min(n, m), nearer),
  }


def memorization(
  generated: Float[np.ndarray, "n d"],
  training: Float[np.ndarray, "t d"],
  held_out: Float[np.ndarray, "m d"],
  num_worst: int = 16,
) -> Memorization:
  """The data-copying test of Meehan et al. 2020 (eq. 2, one cell): are samples nearer to the
  training set than held-out data are? And the share of samples whose nearest training example is
  three times nearer than the second (Yoon et al. 2023, sec. 4), beside that of held-out data.
  """
  for which, z in (("generated", generated), ("training", training), ("held-out", held_out)):
    require("memorization", f"{which} samples", len(z), NEEDED)
  distances, neighbours = nearest(generated, training, 2)
  fair, _ = nearest(held_out, training, 2)
  ratios = _ratios(distances)
  worst = np.lexsort((distances[:, 0], ratios))[:num_worst]
  copied = "share whose nearest training example is 3 times nearer than the second"
  estimates = {
    **_closeness(distances[:, 0], fair[:, 0]),
    "copied": proportion(ratios <= RATIO, copied),
    "copied_held_out": proportion(_ratios(fair) <= RATIO, f"{copied}, of held-out data"),
  }
  return Memorization(estimates, worst, neighbours[worst, 0], ratios[worst])
