"""Noise levels from data: how large, how many, and the step of annealed Langevin dynamics.

Techniques 1, 2 and 4 of Song & Ermon 2020, "Improved Techniques for Training Score-Based Generative
Models". All in float64 on the host.
"""

import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import brentq, minimize_scalar
from scipy.special import ndtr

from errors import check


def _flat(x: Array) -> np.ndarray:
  return np.asarray(x).reshape(len(x), -1)


def _radii(points: np.ndarray, centre: np.ndarray, block: int = 1024) -> np.ndarray:
  """Distance of every point to `centre`; only one block is in float64 at a time."""
  starts = range(0, len(points), block)
  return np.concatenate([np.linalg.norm(points[i : i + block] - centre, axis=1) for i in starts])


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T


def largest_distance(x: Float[Array, "n *d"], block: int = 1024) -> float:
  """The largest distance between two examples, exact: sigma_max by Technique 1 (Song & Ermon 2020).

  By blocks of points sorted by their distance r to the mean; those with r_a + r_b below the best
  pair so far are passed over.
  """
  points = _flat(x)
  mean = points.mean(0, dtype=np.float64)
  radii = _radii(points, mean)
  order, best = np.argsort(-radii), 0.0
  starts = range(0, len(points), block)
  for i in starts:
    a = points[order[i : i + block]] - mean
    for j in starts[i // block :]:
      if radii[order[i]] + radii[order[j]] <= best:
        break
      b = points[order[j : j + block]] - mean
      best = max(best, float(np.sqrt(max(_squared_distances(a, b).max(), 0.0))))
  return best


def distance_bracket(
  x: Float[Array, "n *d"], budget: float = 2e11, num_rounds: int = 10
) -> tuple[float, float]:
  """Certified (lower, upper) of the largest distance between two examples; equal where it is exact.

  lower is the distance of a pair: what is farthest from the farthest point. upper is the sum of the
  two largest radii about a centre that moves to the smallest enclosing ball (Badoiu & Clarkson
  2003). A point with r + r_max < lower is in no farthest pair; as soon as few others are left, they
  are searched exactly.

  Args:
    budget: the largest number of products for the exact search.
  """
  points = _flat(x)
  centre, lower, upper = points.mean(0, dtype=np.float64), 0.0, np.inf
  for i in range(num_rounds):
    radii = _radii(points, centre)
    left = radii + radii.max() >= lower
    if float(left.sum()) ** 2 * points.shape[1] <= budget:
      lower = upper = max(lower, largest_distance(points[left]))
      break
    upper = min(upper, float(np.partition(radii, -2)[-2:].sum()))
    farthest = points[radii.argmax()].astype(np.float64)
    lower = max(lower, float(_radii(points, farthest).max()))
    centre = centre + (farthest - centre) / (i + 2)
  return lower, max(lower, upper)


def median_distance(x: Float[Array, "n *d"], max_examples: int = 2000, seed: int = 0) -> float:
  """The median distance between two examples, of a random `max_examples` of them in larger sets."""
  points = _flat(x)
  if len(points) > max_examples:
    points = points[np.random.default_rng(seed).choice(len(points), max_examples, replace=False)]
  centred = points - points.mean(0, dtype=np.float64)
  squared = _squared_distances(centred, centred)[np.triu_indices(len(points), 1)]
  return float(np.sqrt(np.median(np.maximum(squared, 0.0))))


def count_duplicates(x: Array, among: Array | None = None) -> int:
  """How many examples equal an earlier one bit for bit, or, with `among`, one of those."""
  if among is None:
    return len(x) - len({row.tobytes() for row in x})
  known = {row.tobytes() for row in among}
  return sum(row.tobytes() in known for row in x)


def sigma_data(x: Float[Array, "n *d"], bin_width: float = 0.0) -> float:
  """The std of all values (Karras et al. 2022, table 1), with uniform dequantization added."""
  return float(np.sqrt(np.var(x, dtype=np.float64) + bin_width**2 / 12))


def level_overlap(ratio: float, num_dims: int) -> float:
  """C of Song & Ermon 2020, eq. 2: the mass that N(0, s^2 I) puts on the 3-sigma shell of N(0, (s /
  ratio)^2 I).

  C = Phi(sqrt(2 D) (ratio - 1) + 3 ratio) - Phi(sqrt(2 D) (ratio - 1) - 3 ratio), Phi the normal
  CDF.
  """
  shift = np.sqrt(2 * num_dims) * (ratio - 1)
  return float(ndtr(shift + 3 * ratio) - ndtr(shift - 3 * ratio))


def level_ratio(num_dims: int, overlap: float = 0.5) -> float:
  """Technique 2 (Song & Ermon 2020): the ratio of neighbouring noise levels with `level_overlap`
  C.

  The paper writes 0.5; its published numbers of levels correspond to 0.567.
  """
  check(num_dims > 4, "num_dims", num_dims, "5 or more: in fewer, levels of any ratio overlap")
  check(0 < overlap < 0.997, "overlap", overlap, "a number between 0 and 0.997")
  root = np.sqrt(2 * num_dims)
  above = (root + 30) / (root - 3)  # Phi(30) = 1 in float64
  return brentq(lambda ratio: level_overlap(ratio, num_dims) - overlap, 1.0, above, xtol=1e-15)


def num_levels(sigma_max: float, sigma_min: float, num_dims: int, overlap: float = 0.5) -> int:
  """The number of geometric levels from sigma_max to sigma_min whose ratio is nearest to
  `level_ratio`.
  """
  check(sigma_max > sigma_min > 0, "sigma_max", sigma_max, f"a number above sigma_min, {sigma_min}")
  return max(2, 1 + round(np.log(sigma_max / sigma_min) / np.log(level_ratio(num_dims, overlap))))


def technique4(ratio: float, step: float, num_steps: int) -> float:
  """Variance after `num_steps` Langevin steps at a level, over the level's (Song & Ermon 2020,
  prop. 3).

  For data at a point, and a start from the level above, `ratio` times larger; best is 1.

  Args:
    step: step_lr / sigma_min^2, the "code" convention of `sampling.langevin_step`.
  """
  stationary = 2 / (2 - step)
  return (1 - step) ** (2 * num_steps) * (ratio**2 - stationary) + stationary


def langevin_step_size(sigmas: Float[Array, " n"], num_steps: int) -> float:
  """Technique 4 (Song & Ermon 2020): step_lr for which `technique4` of geometric levels is nearest
  to 1.

  For steps in (0, 1) the variance lies above 1, a mean of ratio^2 and 2 / (2 - step).
  """
  low, high = float(np.min(sigmas)), float(np.max(sigmas))
  ratio = (high / low) ** (1 / (len(sigmas) - 1))
  steps = np.geomspace(1e-8, 1, 400, endpoint=False)
  best = int(np.argmin(technique4(ratio, steps, num_steps)))
  bounds = steps[max(best - 1, 0)], steps[min(best + 1, len(steps) - 1)]
  value = lambda step: technique4(ratio, step, num_steps)
  return (
    minimize_scalar(value, bounds=bounds, method="bounded", options={"xatol": 1e-10}).x * low**2
  )
