"""Fréchet distance between Gaussians; with network features of images it is FID."""

import numpy as np
from jaxtyping import Float


def _root(covariance: np.ndarray) -> np.ndarray:
  """Symmetric square root; eigenvalues below zero are rounding."""
  values, vectors = np.linalg.eigh(covariance)
  return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def frechet_distance(
  mean1: Float[np.ndarray, " d"],
  cov1: Float[np.ndarray, "d d"],
  mean2: Float[np.ndarray, " d"],
  cov2: Float[np.ndarray, "d d"],
) -> float:
  """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) (Dowson & Landau 1982, eq. 4), in
  float64.
  """
  mean1, cov1, mean2, cov2 = (np.asarray(a, np.float64) for a in (mean1, cov1, mean2, cov2))
  root = _root(cov1)
  product = np.linalg.eigvalsh(root @ cov2 @ root)
  cross = np.sqrt(np.maximum(product, 0.0)).sum()
  return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def sample_frechet_distance(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
  """Fréchet distance of the Gaussians fitted to two sets of vectors."""
  moments = ((z.mean(0), np.cov(z, rowvar=False)) for z in (np.asarray(x, np.float64), y))
  return frechet_distance(*next(moments), *next(moments))
