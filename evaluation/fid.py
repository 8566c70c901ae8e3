"""Fréchet distance between Gaussians; with Inception features of images it is FID."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from evaluation.distances import rows
from evaluation.estimate import Estimate, normal, require, shuffled

NEEDED = 2  # of either set


class Moments(NamedTuple):
  """Number, mean and covariance (divisor count - 1) of a set of vectors, in float64."""

  count: int
  mean: Float[np.ndarray, " d"]
  covariance: Float[np.ndarray, "d d"]


class _Gaussian(NamedTuple):
  mean: np.ndarray  # [d]
  factor: np.ndarray  # [d, r], covariance = factor factor^T


class _Transport(NamedTuple):
  """The distance between two Gaussians and the optimal maps x -> maps^T (x - mean), in whose
  coordinates the covariance of either set is diagonal, with these `roots` squared.
  """

  distance: float
  roots: np.ndarray  # [r]
  maps: tuple[np.ndarray, np.ndarray]  # [d, r] each


def _blocks(x: Float[np.ndarray, "n d"]) -> Iterator[np.ndarray]:
  return (np.asarray(x[part], np.float64) for part in rows(*x.shape))


def _moments(x: np.ndarray) -> Moments:
  centred = x - (mean := x.mean(0))
  return Moments(len(x), mean, centred.T @ centred / max(len(x) - 1, 1))


def merge(a: Moments, b: Moments) -> Moments:
  """The moments of two sets together (Chan, Golub & LeVeque 1983, eq. 2.1): the order in which
  batches are merged and their sizes change nothing but rounding.
  """
  count, away = a.count + b.count, b.mean - a.mean
  scatter = (a.count - 1) * a.covariance + (b.count - 1) * b.covariance
  scatter += a.count * b.count / count * np.outer(away, away)
  return Moments(count, a.mean + b.count / count * away, scatter / (count - 1))


def moments(x: Float[np.ndarray, "n d"]) -> Moments:
  """The moments of a set of vectors, block by block; those of a stream are merged."""
  return functools.reduce(merge, map(_moments, _blocks(x)))


def _gaussian(mean: np.ndarray, covariance: np.ndarray) -> _Gaussian:
  values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
  keep = values > len(values) * np.finfo(np.float64).eps * values[-1]
  return _Gaussian(np.asarray(mean, np.float64), vectors[:, keep] * np.sqrt(values[keep]))


def _fit(x: np.ndarray | Moments) -> _Gaussian:
  """The Gaussian of a set or of its moments; of few vectors they are themselves the factor."""
  if isinstance(x, Moments):
    return _gaussian(x.mean, x.covariance)
  if len(x) > x.shape[1]:
    return _fit(moments(x))
  mean = np.asarray(x, np.float64).mean(0)
  return _Gaussian(mean, (x - mean).T / np.sqrt(len(x) - 1))


def _singular(matrix: np.ndarray, floor: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """U, s, V of the singular values above rounding, by way of the smaller Gram matrix.

  It squares them, so only those above 1e-4 of the largest are good; the others are found in what
  is left, which errs by 1e-12 of the largest.
  """
  if matrix.shape[0] > matrix.shape[1]:
    v, s, u = _singular(matrix.T, floor)
    return u, s, v
  values, u = np.linalg.eigh(matrix @ matrix.T)
  top = np.sqrt(values.max(initial=0.0))
  if top <= floor:
    return u[:, :0], np.zeros(0), matrix.T[:, :0]
  keep = values > 1e-8 * top**2
  large, rest = u[:, keep], u[:, ~keep]
  s = np.sqrt(values[keep])
  small = _singular(rest.T @ matrix, floor or 1e-11 * top)
  parts = zip((rest @ small[0], *small[1:]), (large, s, matrix.T @ large / s))
  return tuple(np.concatenate(part, axis=-1) for part in parts)


def _transport(a: _Gaussian, b: _Gaussian) -> _Transport:
  """|m1 - m2|^2 + tr(C1 + C2) - 2 sum of singular values of F1^T F2, where C = F F^T."""
  u, s, v = _singular(a.factor.T @ b.factor)
  spread = (a.factor**2).sum() + (b.factor**2).sum() - 2 * s.sum()
  return _Transport(float(((a.mean - b.mean) ** 2).sum() + spread), s, (b.factor @ v, a.factor @ u))


def frechet_distance(
  mean1: Float[np.ndarray, " d"],
  cov1: Float[np.ndarray, "d d"],
  mean2: Float[np.ndarray, " d"],
  cov2: Float[np.ndarray, "d d"],
) -> float:
  """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) (Dowson & Landau 1982, eq. 4), in
  float64.
  """
  return _transport(_gaussian(mean1, cov1), _gaussian(mean2, cov2)).distance


def sample_frechet_distance(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
  """Fréchet distance of the Gaussians fitted to two sets of vectors."""
  return _transport(_fit(x), _fit(y)).distance


def _influence(x: np.ndarray, mean: np.ndarray, other: np.ndarray, map_, roots) -> np.ndarray:
  """What each vector adds to the distance, to first order: the dual potential of W2 between the two
  Gaussians, |x - m|^2 - |map^T (x - m)|^2 / roots + 2 (m - m')(x - m), up to a constant.
  """
  parts = []
  for block in _blocks(x):
    z = block - mean
    parts.append((z**2).sum(1) - ((z @ map_) ** 2) @ (1 / roots) + 2 * z @ (mean - other))
  return np.concatenate(parts)


def _variance(x: np.ndarray, a: _Gaussian, b: _Gaussian, map_, roots) -> float:
  """The infinitesimal jackknife variance of the distance over draws of x."""
  return float(_influence(x, a.mean, b.mean, map_, roots).var() / len(x))


def fid(
  generated: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"] | Moments
) -> dict[str, Estimate]:
  """Fréchet distance of two sets (Heusel et al. 2017, eq. 6) with an infinitesimal-jackknife
  interval.

  The interval covers the expected distance at these sizes, bias included, over draws of both sets;
  where the reference is given by its moments, over draws of the generated set alone. A bootstrap is
  no use here: fewer distinct vectors raise the distance.
  """
  require("fid", "generated samples", len(generated), NEEDED)
  a, b = _fit(generated), _fit(reference)
  distance, roots, maps = _transport(a, b)
  variance, drawn = _variance(generated, a, b, maps[0], roots), "the generated set"
  if not isinstance(reference, Moments):
    require("fid", "reference samples", len(reference), NEEDED)
    variance, drawn = variance + _variance(reference, b, a, maps[1], roots), "both sets"
  what = f"Fréchet distance; interval of its mean at these sizes over draws of {drawn}"
  return {"frechet_distance": normal(distance, np.sqrt(variance), what)}


def _bias(x: np.ndarray, a: _Gaussian, map_, roots) -> float:
  """The part of the expected distance that falls as 1/n, to the order 1/n: tr C for the mean, half
  the second derivative of the trace of the root for the covariance (fourth moments of x).
  """
  squares = [((block - a.mean) @ map_) ** 2 for block in _blocks(x)]
  products = sum(s.T @ s for s in squares) / len(x) - np.diag(roots**4)
  curvature = 2 * np.outer(roots, roots) * np.add.outer(roots, roots)
  return float(((a.factor**2).sum() + (products / curvature).sum()) / len(x))


def needed_for_infinity(d: int) -> int:
  """Generated samples that `fid_infinity` needs in d dimensions: both halves have full rank."""
  return -(-9 * d // 4)


def fid_infinity(
  generated: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"] | Moments
) -> dict[str, Estimate]:
  """The Fréchet distance that infinitely many generated samples would have to this reference, given
  as it is (Chong & Forsyth 2020), with an interval.

  They fit a line in 1/n to random subsets. The slope of that line is known from the fourth moments,
  so the distance less its bias errs by 1/n^2 only; two halves remove that (Richardson). What this
  last step changes is an error besides the jackknife's.
  """
  require(
    "fid_infinity", "generated samples", len(generated), needed_for_infinity(len(generated.T))
  )
  b = _fit(reference)

  def unbiased(x):
    a = _fit(x)
    distance, roots, maps = _transport(a, b)
    return distance - _bias(x, a, maps[0], roots), _variance(x, a, b, maps[0], roots)

  whole, variance = unbiased(generated)
  halves = np.array_split(shuffled(generated), 2)
  change = (whole - np.mean([unbiased(half)[0] for half in halves])) / 3
  what = "Fréchet distance of infinitely many generated samples to this reference; interval of it"
  error = np.sqrt(variance + change**2)
  return {"frechet_distance_infinity": normal(whole + change, error, what)}
