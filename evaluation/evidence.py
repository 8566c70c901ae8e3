"""What the likelihood job and its study share: what they hold on a device, the log-weight of an
example, the unit that it is reported in, the standard error of a mean.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

import devices
from dequantization import DECODERS, bits_of_bound, matched
from divergence import GaussianControl, fit_control
from evaluation import decoder
from evaluation.dequantizer import law, trained_law
from evaluation.trained import Job, training_examples
from experiment import Experiment
from likelihood import LogLikelihood, log_likelihood
from parameterization import make_score_fn
from sampling import time_grid
from sde_lib import SDE, Keys

# of config.likelihood: what `log_likelihood` takes
OPTIONS = ("divergence", "num_probes", "solver", "rtol", "atol", "max_steps", "start")


class Held(NamedTuple):
  """What a program of the likelihood takes beside the examples."""

  params: PyTree
  trained: PyTree | None  # of the law of dequantization
  control: GaussianControl | None
  decoder: np.ndarray | None  # the table of a fitted one


def hold(job: Job) -> Held:
  """On the host; all hosts call it."""
  params = devices.to_host(job.params)
  options = job.experiment.config.likelihood
  control = fit_control(training_examples(job)) if options.control else None
  wanted = options.kind == "variational" and options.decoder == "fitted"
  table = decoder.fitted(job, chain(job.experiment), params) if wanted else None
  return Held(params, trained_law(job, params), control, table)


def chain(experiment: Experiment) -> SDE:
  """The process as a chain: at its own levels, else at levels even in log-SNR down to where noise
  can be told from the bins' width. A network that was trained on dequantized values knows no noise
  far below a bin.
  """
  sde, options = experiment.sde, experiment.config.likelihood
  if sde.times is not None:
    return sde
  with jax.ensure_compile_time_eval():
    fitted = options.decoder == "fitted"
    if experiment.transform.levels and (experiment.config.training.dequantize or fitted):
      sde = matched(sde, experiment.transform, bound=DECODERS[options.decoder])
    times = np.asarray(time_grid(sde, options.num_levels - 1, "log_snr")[::-1], np.float64)
  return dataclasses.replace(sde, times=times)


def process(experiment: Experiment) -> SDE:
  """The process of the exact log-likelihood: with the truncated normal law it ends where the noise
  fits the bin.
  """
  fitted = experiment.config.likelihood.dequantization == "truncated_normal"
  if not (fitted and experiment.transform.levels):
    return experiment.sde
  return matched(experiment.sde, experiment.transform)


def exact(
  experiment: Experiment,
  sde: SDE,
  held: Held,
  draws: Keys,
  probes: Keys,
  k: Array,
  labels: Array,
  **changes,
) -> tuple[LogLikelihood, Array]:
  """(the exact log-likelihood, log q [b]) of one dequantized draw of k [b, *d], or of continuous
  values; `changes` are laid over the options of the configuration.
  """
  options = experiment.config.likelihood
  score_fn = make_score_fn(sde, experiment.noise_fn(held.params))
  x, log_q = k.astype(jnp.float32), jnp.zeros(len(k))
  if experiment.transform.levels:
    x, log_q = law(experiment, held.trained)(draws, sde, experiment.transform, k)
  arguments = {name: options[name] for name in OPTIONS} | {"control": held.control} | changes
  labels = experiment.labels(labels)
  return log_likelihood(probes, sde, score_fn, x, labels=labels, **arguments), log_q


def unit(experiment: Experiment) -> tuple[str, float]:
  """The name of what a log-weight in nats is reported as, and the factor to it."""
  if not experiment.transform.levels:
    return "log_density_nats", 1.0
  return "bits_per_dim", float(bits_of_bound(jnp.ones(1), experiment.num_dims)[0])


def standard_error(values: np.ndarray) -> float:
  """Standard error of the mean of independent values."""
  return float(values.std(ddof=1) / np.sqrt(len(values)))
