"""Latents of the likelihood job: how typical each is, their file, and what lies between them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.stats import chi2

from evaluation import figures
from evaluation.batches import labels_of, spread
from evaluation.evidence import Held, process
from experiment import Experiment
from likelihood import decode
from parameterization import make_score_fn
from sampling import interpolate

NUM_PAIRS, NUM_POINTS = 8, 9
ENCODING = ("solver", "rtol", "atol", "max_steps")  # of config.likelihood: what `decode` takes


def typicality(
  norm: Float[np.ndarray, " b"], prior_std: float, num_dims: int
) -> Float[np.ndarray, " b"]:
  """Two-sided p-value of |z|^2 / prior_std^2 under the chi-square law of `num_dims` degrees that it
  has for draws of the model (Nalisnick et al. 2019, "Detecting out-of-distribution inputs to deep
  generative models using typicality", for the typical set of the latents instead of the density).

  Small for anomalies. Two-sided, because a smooth or empty image may lie near the mode of the prior
  and have a higher density than any of the data; and of the latent, because its law is known: log p
  itself would need the log p of training examples as a reference.
  """
  below = chi2.cdf(np.square(np.asarray(norm, np.float64) / prior_std), num_dims)
  return 2 * np.minimum(below, 1 - below)


def summary(p_values: Float[np.ndarray, " b"]) -> dict[str, float]:
  """The share of examples with p-values of `typicality` below 5 %, which is 5 % if the latents
  follow the prior.
  """
  return {"atypical_share": float((p_values < 0.05).mean()), "atypical_below": 0.05}


def between(
  experiment: Experiment,
  held: Held,
  latent: Float[np.ndarray, "n *d"],
  labels: np.ndarray,
  num_points: int = NUM_POINTS,
) -> Float[Array, "b k *d"]:
  """Decoded latents on the arcs from those of the first half of the examples to those of the second
  half, the ends among them; a network with classes is told that of the nearer end.
  """
  sde, options = process(experiment), experiment.config.likelihood
  half = len(latent) // 2
  z = jnp.moveaxis(interpolate(*jnp.split(jnp.asarray(latent), 2), num_points), 0, 1)
  nearer = half * (np.arange(num_points) > num_points // 2)
  labels = jnp.asarray(labels)[np.arange(half)[:, None] + nearer].reshape(-1)

  @jax.jit
  def run(params, z, labels):
    score_fn, given = make_score_fn(sde, experiment.noise_fn(params)), experiment.labels(labels)
    with jax.default_matmul_precision("highest"):
      return decode(sde, score_fn, z, labels=given, **{name: options[name] for name in ENCODING})

  x, _ = run(held.params, z.reshape(-1, *z.shape[2:]), labels)
  return x.reshape(z.shape)


def save(
  folder: Path, experiment: Experiment, held: Held, rows: np.ndarray, latent: np.ndarray
) -> None:
  """Writes `latents.npz` of the examples `rows` of the split and, of images, the picture
  `interpolation.png` of what lies between pairs of them.
  """
  split = experiment.dataset.splits[experiment.config.likelihood.split]
  columns = {"label": split["label"][rows]} if "label" in split else {}
  np.savez_compressed(folder / "latents.npz", index=rows, latent=latent, **columns)
  finite = np.flatnonzero(np.isfinite(latent).reshape(len(latent), -1).all(1))
  chosen = finite[spread(len(finite), 2 * min(NUM_PAIRS, len(finite) // 2))]
  if latent.ndim == 4 and len(chosen):
    x = np.asarray(between(experiment, held, latent[chosen], labels_of(split, rows[chosen])))
    data = np.asarray(experiment.transform.forward(jnp.asarray(split["image"][rows[chosen]])))
    first, second = np.split(data, 2)
    figures.save_interpolation(folder / "interpolation.png", first, x, second, experiment.transform)
