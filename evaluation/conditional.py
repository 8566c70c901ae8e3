"""The tasks of the mode sample: several results for each input, what they are conditioned on beside
them.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import devices
import guidance
import tasks
from evaluation import figures, inputs, train_classifier
from evaluation.batches import check_finite, keys_of, parts
from evaluation.trained import Job
from experiment import Experiment, Weights
from likelihood import encode
from operators import Operator, read_mask
from parameterization import make_score_fn
from sampling import interpolate
from sde_lib import fold_in, normal, perturb, sample_prior

START = 2**31 - 2  # of the keys of examples; steps take the numbers from 1 up
ENCODING = ("solver", "rtol", "atol", "max_steps")  # of config.likelihood


def _measured(
  experiment: Experiment,
  operator: Operator,
  weights: Weights,
  keys: Array,
  measurement: Array,
  labels: Array | None,
) -> tuple[Array, Array]:
  """(results given their measurements, network evaluations)."""
  config, sde = experiment.config, experiment.sde
  method, options = tasks.METHODS[config.guidance.task], tasks.method_options(config)
  noise_fn, condition, changes, wrap = experiment.guided(weights), labels, {}, None
  if method.hook:
    hook_options = {} if method.wrapper else options
    noise_fn = method.hook(sde, noise_fn, operator, **hook_options)
    condition = guidance.Condition(measurement, labels)
  if method.hook is guidance.null_space:
    prior = sample_prior(fold_in(keys, 0), sde, (len(keys), *experiment.spec.shape))
    given = fold_in(keys, START), sde, operator, prior, measurement, sde.t_max
    changes["init"] = guidance.noised_measurement(*given)
  if method.wrapper:
    wrap = lambda step: method.wrapper(sde, step, operator, measurement, **options)
  if method.step:
    wrap = lambda step: method.step(sde, operator, measurement, **options)
    changes["times"] = jnp.append(experiment.times, experiment.times[-1])
  x, nfe = experiment.draw(keys, noise_fn, condition, wrap=wrap, **changes)
  exact = not config.guidance.noise_std
  return guidance.consistent(operator, x, measurement) if exact else x, nfe


def _transported(
  experiment: Experiment, weights: Weights, keys: Array, start: Array, labels: Array | None
) -> tuple[Array, Array]:
  """(results that begin at given states, network evaluations)."""
  return experiment.draw(keys, experiment.guided(weights), labels, init=start)


def _noised(experiment: Experiment, _: Weights, x: Array, keys: Array) -> Array:
  """Each row of [n, k, *d] noised to where the sampler begins (Meng et al. 2022, "SDEdit")."""
  flat = x.reshape(-1, *x.shape[2:])
  noise = normal(fold_in(keys, 0), flat.shape)
  return perturb(experiment.sde, flat, noise, experiment.times[0]).reshape(x.shape)


def _latents(experiment: Experiment, weights: Weights, x: Array) -> Array:
  """Latents [n, *d] of examples by the probability flow without guidance and classes."""
  options = {name: experiment.config.likelihood[name] for name in ENCODING}

  def run(params, x):
    score_fn = make_score_fn(experiment.sde, experiment.noise_fn(params))
    return encode(experiment.sde, score_fn, x, **options)[0]

  run = experiment.over_devices(run, 1)
  blocks = parts(len(x), experiment.config.sampling.batch_size, "encoding")
  z = [devices.to_host(run(weights.network, x[rows]))[:valid] for rows, valid in blocks]
  return jnp.concatenate(z)


def _own_latents(experiment: Experiment, weights: Weights, x: Array, keys: Array) -> Array:
  """The latent of each input, for all of its results (Su et al. 2023, "Dual diffusion implicit
  bridges": decoded under another condition).
  """
  return jnp.broadcast_to(_latents(experiment, weights, x[:, 0])[:, None], x.shape)


def _arcs(experiment: Experiment, weights: Weights, x: Array, keys: Array) -> Array:
  """Latents from that of each input to that of the next."""
  z = _latents(experiment, weights, x[:, 0])
  return jnp.moveaxis(interpolate(z, jnp.roll(z, -1, 0), x.shape[1]), 0, 1)


# task: (experiment, weights, inputs [n, k, *d], their keys [n k]) -> where its results begin
STARTS = {"image_to_image": _noised, "latent_edit": _own_latents, "interpolation": _arcs}


class Begin(NamedTuple):
  """`draw`(weights, keys, states, labels) makes one result of `size` consecutive rows, particles
  where there are several; `states` [n k, ...] is what results begin with, `given` [n, *d] the
  picture of it; `operator` of a task that measures.
  """

  draw: Callable
  size: int
  states: Array
  given: Array
  operator: Operator | None = None


def _begin(job: Job, weights: Weights, x: Float[np.ndarray, "n *d"], keys: Array) -> Begin:
  """What the task needs of these inputs; `keys` [n k] of the results."""
  experiment, config = job.experiment, job.experiment.config
  settings = config.guidance
  flat = lambda a: a.reshape(-1, *a.shape[2:])
  repeat = lambda a: jnp.repeat(jnp.asarray(a)[:, None], settings.num_results, 1)
  if settings.task in STARTS:
    states = STARTS[settings.task](experiment, weights, repeat(x), keys)
    return Begin(functools.partial(_transported, experiment), 1, flat(states), x)
  operator = tasks.operator_of(config, x.shape[1:])
  y = operator.forward(jnp.asarray(x))
  if settings.inputs in experiment.spec.splits:  # files are measurements, and have their noise
    y += settings.noise_std * normal(job.key("sampling"), y.shape)
  given = y if y.shape == x.shape else operator.pseudo_inverse(y)
  size = tasks.method_options(config).get("num_particles", 1)
  draw = functools.partial(_measured, experiment, operator)  # made, and tested, outside of jit
  return Begin(draw, size, flat(repeat(y)), given, operator)


def _results(job: Job, x: Float[np.ndarray, "n *d"]) -> tuple[np.ndarray, np.ndarray, Begin]:
  """(results [n, k, *d], network evaluations [n, k], what they begin with); of particles a random
  one is the result.
  """
  experiment, settings = job.experiment, job.experiment.config.guidance
  weights, n, k = train_classifier.weights(job), len(x), settings.num_results
  keys = keys_of(job.key("sampling"), np.arange(n * k))
  begin = _begin(job, weights, x, keys)
  run = experiment.over_devices(begin.draw, 3)
  num_devices, batches = experiment.mesh.size, []
  most = max(1, experiment.config.sampling.batch_size // (begin.size * num_devices))
  for index, valid in parts(n * k, min(most, -(-n * k // num_devices)) * num_devices, "sampling"):
    rows = np.repeat(index, begin.size)
    particle = np.arange(len(rows)) % begin.size
    row_keys = jax.vmap(jax.random.fold_in)(keys[rows], jnp.asarray(particle))
    wanted = settings.labels
    labels = np.asarray(wanted, np.int32)[rows % k % len(wanted)] if wanted else None
    out = devices.to_host(run(weights, row_keys, begin.states[rows], labels))
    one = jax.vmap(lambda key: jax.random.randint(key, (), 0, begin.size))(keys[index])
    chosen = begin.size * np.arange(len(index)) + np.asarray(one)
    batches.append([a[chosen][:valid] for a in out])
  values, nfe = (np.concatenate(a).reshape(n, k, *a[0].shape[1:]) for a in zip(*batches))
  check_finite(values)
  return values, nfe, begin


def _errors(x: np.ndarray, results: np.ndarray, operator: Operator | None) -> dict[str, float]:
  """How far results are from the input, and their measurements from its own."""
  error = lambda a: float(np.sqrt(np.square(a).mean()))
  figures_ = {
    "rms_difference": error(results - x[:, None]),
    "rms_difference_of_mean": error(results.mean(1) - x),
    "mean_standard_deviation": float(results.std(1).mean()),
  }
  if operator is None:
    return figures_
  flat = jnp.asarray(results.reshape(-1, *x.shape[1:]))
  rest = np.asarray(operator.forward(flat)).reshape(*results.shape[:2], -1)
  rest = rest - np.asarray(operator.forward(jnp.asarray(x))).reshape(len(x), 1, -1)
  return figures_ | {"largest_measurement_error": float(np.abs(rest).max())}


def _save(job: Job, x: np.ndarray, given: np.ndarray, results: np.ndarray, nfe: np.ndarray) -> None:
  """The picture, and stored values as npz."""
  transform, folder = job.experiment.transform, job.workdir / "results"
  stored = lambda a: np.asarray(transform.inverse(jnp.asarray(a)))
  columns = _columns(job, x, given, results)
  figures.save_conditional(folder / "conditional.png", columns, transform)
  values = {"input": stored(x), "result": stored(results), "nfe": nfe}
  np.savez_compressed(folder / "conditional.npz", **values)


def _mask(job: Job, x: np.ndarray) -> dict[str, np.ndarray]:
  """Of inpainting the picture of what is known of each input, white."""
  settings, transform = job.experiment.config.guidance, job.experiment.transform
  if settings.operator != "inpainting":
    return {}
  known = read_mask(settings.operators.inpainting.mask, x.shape[1:])
  return {"mask": np.where(np.broadcast_to(known, x.shape), transform.high, transform.low)}


def _columns(job: Job, x: np.ndarray, given: np.ndarray, results: np.ndarray) -> dict:
  """What stands beside each other in the picture; results for different classes, or along an arc,
  have no mean.
  """
  settings = job.experiment.config.guidance
  if settings.task == "interpolation":
    return {"input": x, "results": results, "next input": np.roll(x, -1, 0)}
  classes = ", ".join(map(str, settings.labels))
  title = f"results for class {classes}" if classes else "results"
  columns = {"input": x, title: results}
  if settings.task in tasks.METHODS:
    measured = {"measurement": given} | _mask(job, x)
    columns = {"input": x, **measured, title: results}
  if len(settings.labels) < 2 and settings.num_results > 1:
    columns |= {figures.MEAN: results.mean(1), figures.SPREAD: results.std(1)}
  return columns


def run(job: Job) -> dict[str, Any]:
  """Draws `guidance.num_results` results for each input: a picture of all, the values as npz."""
  experiment, config = job.experiment, job.experiment.config
  settings, begin = config.guidance, time.perf_counter()
  grey = settings.task in tasks.METHODS and settings.operator == "colorization"
  dataset_of = lambda: experiment.dataset
  source = settings.inputs, settings.num_inputs, experiment.spec, experiment.transform, dataset_of
  x = inputs.read(*source, grey=grey)
  results, nfe, start = _results(job, x)
  seconds = time.perf_counter() - begin
  if devices.is_first():
    _save(job, x, np.asarray(start.given), results, nfe)
  record = {
    "task": settings.task,
    **({"operator": settings.operator} if settings.task in tasks.METHODS else {}),
    "classes": settings.classes,
    "labels": settings.labels,
    "sampler": config.sampling.sampler,
    "num_samples": results.shape[0] * results.shape[1],
    "nfe": int(nfe.max()),
    "images_per_second": round(results.shape[0] * results.shape[1] / seconds, 2),
    **_errors(x, results, start.operator),
    "seed": config.sampling.seed,
    "grid": "conditional.png",
  }
  return job.write("sample", seconds, record)
