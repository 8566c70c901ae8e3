"""Distances between many vectors in bounded memory."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

BLOCK = 2**24  # numbers that are held at a time: 128 MiB in float64


def rows(count: int, width: int) -> Iterator[slice]:
  """The rows 0 .. count - 1 in parts of at most BLOCK numbers, `width` to a row."""
  step = max(1, BLOCK // width)
  return (slice(i, min(i + step, count)) for i in range(0, count, step))


def squared_distances(
  x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]
) -> Iterator[tuple[slice, Float[np.ndarray, "b m"]]]:
  """(rows of x, |x_i - y_j|^2 [b, m]) block by block; errs by rounding of |x - mean y|^2."""
  centre = np.mean(y, 0, dtype=np.float64)
  y = y - centre
  lengths = (y**2).sum(1)
  for part in rows(len(x), max(y.shape)):
    z = x[part] - centre
    distances = z @ (-2 * y.T)
    distances += (z**2).sum(1)[:, None]
    distances += lengths[None]
    yield part, np.maximum(distances, 0.0, out=distances)


def nearest(
  x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"], k: int, same: bool = False
) -> tuple[Float[np.ndarray, "n k"], Int[np.ndarray, "n k"]]:
  """(distances, indices into y) of the k nearest of y to each x, nearest first; where the sets are
  the `same` one, without the vector itself.
  """
  distances, indices = np.empty((len(x), k)), np.empty((len(x), k), int)
  for part, squared in squared_distances(x, y):
    if same:
      squared[np.arange(len(squared)), np.arange(part.start, part.stop)] = np.inf
    found = np.argpartition(squared, k - 1, axis=1)[:, :k]
    for i, row in zip(range(part.start, part.stop), found):
      exact = np.linalg.norm(y[row].astype(np.float64) - x[i], axis=1)
      order = np.argsort(exact, kind="stable")
      distances[i], indices[i] = exact[order], row[order]
  return distances, indices
