"""Inception score: how sure a classifier is of each sample, and how varied its answers are."""

import numpy as np
from jaxtyping import Float
from scipy.special import rel_entr

from evaluation.estimate import Estimate, normal, require, shuffled

NUM_SPLITS = 10


def _information(probabilities: np.ndarray) -> np.ndarray:
  """KL(p(y | x) || p(y)) of each sample, in nats."""
  return rel_entr(probabilities, probabilities.mean(0)).sum(1)


def inception_score(probabilities: Float[np.ndarray, "n k"]) -> dict[str, Estimate]:
  """exp E KL(p(y | x) || p(y)) (Salimans et al. 2016, sec. 4) of class probabilities.

  Over all samples, with a delta-method interval of its mean at this size, and as published: mean
  and standard deviation over ten parts.
  """
  require("inception_score", "generated samples", len(probabilities), 2 * NUM_SPLITS)
  probabilities = np.asarray(probabilities, np.float64)
  information = _information(probabilities)
  value = np.exp(information.mean())
  error = value * information.std(ddof=1) / np.sqrt(len(information))
  parts = np.array_split(shuffled(probabilities), NUM_SPLITS)
  scores = [np.exp(_information(part).mean()) for part in parts]
  of_parts = f"over {NUM_SPLITS} random parts, as published"
  return {
    "inception_score": normal(value, error, "over all samples; interval of its mean at this size"),
    "inception_score_mean": Estimate(float(np.mean(scores)), f"mean {of_parts}"),
    "inception_score_std": Estimate(float(np.std(scores)), f"standard deviation {of_parts}"),
  }
