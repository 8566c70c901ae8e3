"""Mode counting: how many of the known modes the samples reach, and how often each."""

import numpy as np
from jaxtyping import Float, Int
from scipy.special import rel_entr
from scipy.stats import chi2

from evaluation.distances import nearest
from evaluation.estimate import Estimate, proportion, require

QUALITY = 3.0  # standard deviations from its mode that a good sample may lie, as published


def count_modes(
  modes: Int[np.ndarray, " n"], weights: Float[np.ndarray, " k"]
) -> dict[str, Estimate]:
  """Modes found, and KL(frequencies || true weights) with the p-value of the weights being true (G
  test): the protocol of StackedMNIST (Metz et al. 2017, sec. 3.3) given the class of each sample.
  """
  require("modes", "generated samples", len(modes), 1)
  n, weights = len(modes), np.asarray(weights, np.float64) / np.sum(weights)
  counts = np.bincount(modes, minlength=len(weights))
  divergence = float(rel_entr(counts / n, weights).sum())
  expected = (1 - (1 - weights) ** n).sum()
  found = f"modes found of {len(weights)}; {expected:.1f} on average by {n} perfect samples"
  law = f"KL of the frequencies to the weights, nats; {(len(weights) - 1) / (2 * n):.2g} if perfect"
  p_value = float(chi2.sf(2 * n * divergence, len(weights) - 1))
  return {
    "modes": Estimate(float((counts > 0).sum()), found),
    "mode_kl": Estimate(divergence, law, p_value=p_value),
  }


def gaussian_modes(
  generated: Float[np.ndarray, "n d"],
  centres: Float[np.ndarray, "k d"],
  std: float,
  weights: Float[np.ndarray, " k"] | None = None,
) -> dict[str, Estimate]:
  """The share of samples within 3 standard deviations of the nearest centre, and `count_modes` of
  those: the protocol of the ring and the grid of Gaussians (Srivastava et al. 2017, sec. 4.1).
  """
  require("modes", "generated samples", len(generated), 1)
  distances, modes = nearest(generated, centres, 1)
  good = distances[:, 0] <= QUALITY * std
  weights = np.ones(len(centres)) if weights is None else weights
  quality = proportion(good, f"share of samples within {QUALITY:g} standard deviations of a mode")
  require("modes", "generated samples near a mode", int(good.sum()), 1)
  return {"high_quality": quality, **count_modes(modes[good, 0], weights)}
