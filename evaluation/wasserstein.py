"""Wasserstein distances of order two between sets of vectors: exact, and averaged over projections
to a line.
"""

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import eye_array, kron, vstack
from scipy.spatial.distance import cdist

from errors import check
from evaluation.estimate import Estimate, normal, require, shuffled

MOST = 1000  # vectors of either set that are matched: the cost grows as the cube
NEEDED = 2  # of either set
MOST_PAIRS = 250_000  # of a linear programme
BLOCK = 64  # projections that are held at a time


def _root(square: float, error: float, what: str) -> Estimate:
  """The root of a square with this standard error."""
  root = np.sqrt(max(square, 0.0))
  return normal(root, error / (2 * root) if root > 0 else 0.0, what)


def squared_on_lines(
  x: Float[np.ndarray, "n l"], y: Float[np.ndarray, "m l"]
) -> Float[np.ndarray, " l"]:
  """W2^2 between the columns of x and those of y: the integral of the squared difference of the
  quantile functions, exact for any two sizes.
  """
  n, m = len(x), len(y)
  x, y = np.sort(x, axis=0), np.sort(y, axis=0)
  levels = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)  # in units of 1 / (n m)
  at = levels[:-1]
  return np.diff(levels) / (n * m) @ (x[at // m] - y[at // n]) ** 2


def sliced_wasserstein(
  generated: Float[np.ndarray, "n d"],
  reference: Float[np.ndarray, "m d"],
  num_projections: int = 1024,
  seed: int = 0,
) -> dict[str, Estimate]:
  """Root of the mean of W2^2 over random directions (Rabin et al. 2011; Bonneel et al. 2015), with
  the Monte-Carlo error of the directions.
  """
  require("sliced_wasserstein", "generated samples", len(generated), NEEDED)
  rng, parts = np.random.default_rng(seed), []
  for first in range(0, num_projections, BLOCK):
    directions = rng.normal(size=(generated.shape[1], min(BLOCK, num_projections - first)))
    directions /= np.linalg.norm(directions, axis=0)
    parts.append(squared_on_lines(generated @ directions, reference @ directions))
  squares = np.concatenate(parts)
  error = squares.std(ddof=1) / np.sqrt(num_projections)
  what = "sliced Wasserstein-2 distance; interval over the random directions alone"
  return {"sliced_wasserstein": _root(squares.mean(), error, what)}


def _potentials(cost: np.ndarray, match: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Dual potentials u_i + v_j <= cost_ij, equal on the optimal `match`, by shortest paths."""
  across = cost[:, match]
  edges, u = across - np.diag(across), np.zeros(len(cost))
  for _ in range(len(cost)):
    shorter = np.minimum(u, (edges + u).min(1))
    if np.array_equal(shorter, u):
      break
    u = shorter
  return u, np.diag(across) - u


def wasserstein(
  generated: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"]
) -> dict[str, Estimate]:
  """Exact W2 between two sets of equal size, by optimal assignment; of larger sets, 1,000 vectors
  chosen by their values.

  The interval covers the expected distance at this size, bias included: the variance of W2^2 is
  that of the dual potentials (del Barrio & Loubes 2019, theorem 4.1).
  """
  n = min(len(generated), len(reference), MOST)
  require("wasserstein", "samples of either set", n, NEEDED)
  x, y = (shuffled(z)[:n].astype(np.float64) for z in (generated, reference))
  cost = cdist(x, y, "sqeuclidean")
  _, match = linear_sum_assignment(cost)
  u, v = _potentials(cost, match)
  error = np.sqrt((u.var() + v.var()) / n)
  what = f"Wasserstein-2 distance of {n} and {n} vectors; interval of its mean at this size"
  return {"wasserstein": _root(cost[np.arange(n), match].mean(), error, what)}


def weighted_wasserstein(
  x: Float[np.ndarray, "n d"],
  x_weights: Float[np.ndarray, " n"],
  y: Float[np.ndarray, "m d"],
  y_weights: Float[np.ndarray, " m"],
) -> float:
  """Exact W2 between two weighted sets, by linear programming; weights are scaled to sum to one."""
  n, m = len(x), len(y)
  mend = "give fewer, or sets of equal size to wasserstein"
  check(n * m <= MOST_PAIRS, "pairs of vectors", n * m, f"at most {MOST_PAIRS}", mend)
  sums = vstack([kron(eye_array(n), np.ones((1, m))), kron(np.ones((1, n)), eye_array(m))])
  weights = np.concatenate([w / np.sum(w, dtype=np.float64) for w in (x_weights, y_weights)])
  plan = linprog(cdist(x, y, "sqeuclidean").ravel(), A_eq=sums.tocsc(), b_eq=weights)
  return float(np.sqrt(max(plan.fun, 0.0)))
