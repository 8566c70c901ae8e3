"""The trained law of dequantization: fitted to the frozen network before the blocks of the
likelihood, by one program on one device, and kept in the workdir.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from jaxtyping import PyTree
from tqdm import tqdm

import devices
import settings
from dequantization import DEQUANTIZATIONS, TRAINED, Dequantizer, dequantization_loss
from errors import RunError
from evaluation import files
from evaluation.batches import labels_of
from evaluation.trained import Job
from experiment import Experiment
from sde_lib import fold_in


def law(experiment: Experiment, trained: PyTree | None) -> Callable:
  """The law that the configuration names, with the parameters of `trained_law`."""
  options = experiment.config.likelihood
  if options.dequantization in TRAINED:
    return TRAINED[options.dequantization](Dequantizer(options.dequantizer.features), trained)
  return DEQUANTIZATIONS[options.dequantization]


def is_trained(experiment: Experiment) -> bool:
  """Whether the configuration's law has parameters; data without levels need none."""
  options = experiment.config.likelihood
  uses = experiment.transform.levels and options.kind == "exact"
  return bool(uses) and options.dequantization in TRAINED


def description(experiment: Experiment) -> str:
  """How a record calls the law."""
  options = experiment.config.likelihood
  if not experiment.transform.levels:
    return "none: continuous values"
  if not is_trained(experiment):
    return options.dequantization
  return f"variational: conditional Gaussian, {options.dequantizer.num_steps} steps"


def _fit(experiment: Experiment, params: PyTree) -> PyTree:
  """Adam, its learning rate decayed by a cosine, on random batches of the training split. No scan
  over the steps: on CPU gradients of convolutions are slow inside of one.
  """
  options, train = experiment.config.likelihood.dequantizer, experiment.dataset.splits["train"]
  key = jax.random.key(experiment.config.seed)
  adam = optax.adam(optax.cosine_decay_schedule(options.learning_rate, options.num_steps))

  def loss(trained, params, key, k, labels):
    parts = law(experiment, trained), experiment.sde, experiment.transform
    labels, noise_fn = experiment.labels(labels), experiment.noise_fn(params)
    return dequantization_loss(key, *parts, noise_fn, k, labels=labels).mean()

  @jax.jit
  def step(params, state, number, k, labels):
    trained, moments = state
    with jax.default_matmul_precision("highest"):
      value, slope = jax.value_and_grad(loss)(trained, params, fold_in(key, number), k, labels)
    change, moments = adam.update(slope, moments)
    return (optax.apply_updates(trained, change), moments), value

  module, centres = Dequantizer(options.features), jnp.zeros((1, *experiment.spec.shape))
  trained = jax.jit(module.init)(key, centres)["params"]
  state, params = (trained, adam.init(trained)), jax.device_put(params)
  draw = np.random.default_rng(experiment.config.seed)
  for number in tqdm(range(options.num_steps), "dequantizer", disable=devices.no_bar()):
    rows = np.sort(draw.integers(len(train["image"]), size=options.batch_size))
    batch = np.asarray(train["image"][rows]), labels_of(train, rows)
    state, value = step(params, state, number, *batch)
  if not np.isfinite(value):
    raise RunError(
      "the loss of the dequantizer is not finite\n"
      f"  mend:  lower likelihood.dequantizer.learning_rate ({options.learning_rate})"
    )
  return jax.device_get(state[0])


def trained_law(job: Job, params: PyTree) -> PyTree | None:
  """Parameters of the law of dequantization for the network `params` of the host; None where it has
  none. The first host trains it, once for each network and `likelihood.dequantizer`; the others
  wait for its file.
  """
  experiment = job.experiment
  if not is_trained(experiment):
    return None
  digest = settings.digest(experiment.config, "likelihood.dequantizer")
  path = job.workdir / "results" / f"dequantizer-step{job.step}-{digest}.msgpack"
  fill = lambda file: file.write(serialization.msgpack_serialize(_fit(experiment, params)))
  return serialization.msgpack_restore(files.made_once(path, fill).read_bytes())
