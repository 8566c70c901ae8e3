"""`--mode=train_classifier`: the noise-conditional classifier that guides samplers, trained in
`<workdir>/classifier` by the loop of `training`, and its accuracy at each noise level.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree
from ml_collections import ConfigDict

import classification
import devices
import settings
import training
from checkpoint import Checkpoints, average, complete_steps
from configs import bases
from errors import ConfigError, check
from evaluation import figures, trained
from evaluation.batches import keys_of, parts, spread
from evaluation.denoising import HeldOut
from experiment import Experiment, Weights, abstract_init, build, check_arguments, check_batch
from models.classifier import Model
from sde_lib import fold_in, marginal, normal, perturb

# what the weights of a classifier depend on, and what of it may change all the same
DEPENDS = ("seed", "data.", "sde.", "parameterization.sigma_data", "training.dequantize")
DEPENDS += ("classifier.",)
MAY_CHANGE = ("data.dir", "data.num_workers")
MAY_CHANGE += tuple(f"classifier.{name}" for name in ("num_steps", "log_every", "checkpoint_every"))


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
  """Trains the classifier of the run's data, or goes on with it, to `classifier.num_steps`, and
  writes results/classifier.json and .png: the accuracy per noise level on `evaluation.split`.

  Raises:
    ConfigError: nothing has been compiled; the folder stays as it is.
  """
  begin, folder = time.perf_counter(), workdir / "classifier"
  experiment = build(config)
  check_values(config, experiment.mesh.size)
  model, derived = network(experiment), training_config(config)
  check_same(config, workdir)
  trained.check_goes_on(config, experiment.spec, folder, "classifier")
  experiment.dataset  # noqa: B018  data that cannot be read leave no folder behind
  run_parts = experiment.sde, model, experiment.dataset, experiment.mesh
  with trained.writing(derived, experiment.spec, folder):
    if devices.is_first():
      settings.save(remembered(config, workdir), workdir)
    made = {"make_loss": classification.make_loss}
    state = training.train(derived, *run_parts, folder, {}, **made)
  params = state.ema_params[0]
  record = report(experiment, model, params)
  record |= {
    "checkpoint_step": int(state.step),
    "seconds": round(time.perf_counter() - begin, 3),
    "config": config.classifier.to_dict(),
  }
  if devices.is_first():
    path = workdir / "results" / "classifier.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(path, json.dumps(record, indent=2) + "\n")
    figures.save_accuracy(path.with_suffix(".png"), record)
    print(summary(record), flush=True)
  return record


def newest(config: ConfigDict, workdir: Path) -> int:
  """The step of the newest classifier of the workdir, which has the settings of `config`."""
  step = max(complete_steps(workdir / "classifier" / "checkpoints"), default=None)
  if step is None:
    raise ConfigError(
      f"{workdir} holds no classifier of noised data, which guidance by classes needs.\n"
      f"  mend:  train it first: python main.py --mode=train_classifier --workdir={workdir}"
    )
  check_same(config, workdir)
  return step


def restore(experiment: Experiment, workdir: Path) -> tuple[nn.Module, PyTree]:
  """(network, averaged parameters on the mesh) of the newest classifier of the workdir, for
  `classification.make_log_prob_fn`.
  """
  step, model = newest(experiment.config, workdir), network(experiment)
  target = training.on_mesh(abstract_init(model, experiment.spec.shape)[1], experiment.mesh)
  with Checkpoints(workdir / "classifier" / "checkpoints", read_only=True) as checkpoints:
    return model, checkpoints.restore_item(step, average(0), target)


def weights(job: trained.Job) -> Weights:
  """What the samples of a job are drawn with: a classifier only where `guidance.classes` wants
  one.
  """
  if job.experiment.config.guidance.classes != "classifier":
    return Weights(job.params)
  return Weights(job.params, restore(job.experiment, job.workdir)[1])


def remembered(config: ConfigDict, workdir: Path) -> ConfigDict:
  """The configuration of the workdir with the section of the classifier trained there, which the
  modes that use it then find.
  """
  saved = settings.read(workdir) or config.copy_and_resolve_references()
  with saved.unlocked():
    saved.classifier = config.classifier
  return saved


def check_values(config: ConfigDict, num_devices: int) -> None:
  """Signs, and batches that the devices can share."""
  options = config.classifier
  for name in ("num_steps", "batch_size", "learning_rate", "log_every", "checkpoint_every"):
    check(options[name] > 0, f"classifier.{name}", options[name], "a number above 0")
  legal = "a number from 0 up"
  check(options.weight_decay >= 0, "classifier.weight_decay", options.weight_decay, legal)
  check_batch("classifier", options.batch_size, num_devices)


def network(experiment: Experiment) -> Model:
  """The network of `classifier.args` for the data, checked without compiling anything."""
  settings_, spec, config = experiment.config.classifier, experiment.spec, experiment.config
  check(spec.num_classes > 1, "data.name", config.data.name, "for a classifier, data with labels")
  check_arguments("classifier.args", settings_.args, Model, hidden=("num_classes",))
  model = experiment.classifier
  try:
    abstract_init(model, spec.shape)
  except (ValueError, TypeError, ZeroDivisionError) as error:
    mend = "--config.classifier.args.architecture=mlp takes any shape"
    raise ConfigError(
      f"classifier.args do not fit examples of shape {spec.shape}: {error}\n  mend:  {mend}"
    ) from error
  return model


def training_config(config: ConfigDict) -> ConfigDict:
  """The configuration of the classifier's training: that of the run, with the network, the
  optimizer and the length of the section `classifier`, and the default average of the parameters.
  """
  options, optimizer = config.classifier, bases.TREE["optimizer"]
  steps = ("num_steps", "batch_size", "log_every", "checkpoint_every")
  adamw = optimizer["options"]["adamw"] | {"weight_decay": options.weight_decay}
  part = {
    "loss": {"time_sampler": "importance"},
    "optimizer": optimizer
    | {"name": "adamw", "learning_rate": options.learning_rate, "options": {"adamw": adamw}},
    "ema": bases.TREE["ema"],
    "training": {name: options[name] for name in steps},
  }
  derived = bases.config(config.to_dict(), part)
  with derived.unlocked():
    derived.model = {"name": "classifier", "args": options.args}
  return derived


def check_same(config: ConfigDict, workdir: Path) -> None:
  """A classifier goes on, and guides, under the settings that it was trained with."""
  saved = settings.read(workdir / "classifier")
  if saved is None:
    return
  old, new = settings.flatten(saved), settings.flatten(training_config(config))
  fields = [k for k in sorted(old.keys() | new.keys()) if k.startswith(DEPENDS)]
  changed = [k for k in fields if old.get(k) != new.get(k) and k not in MAY_CHANGE]
  if changed:
    lines = [f"  {k}: {old.get(k)!r} there, {new.get(k)!r} asked for" for k in changed]
    raise ConfigError(
      f"{workdir}/classifier holds a classifier of other settings:\n"
      + "\n".join(lines)
      + f"\n  mend:  leave these fields as they are, remove {workdir}/classifier,\n"
      "         or choose another --workdir"
    )


def shares_right(experiment: Experiment, model: nn.Module, params: PyTree, grid: HeldOut):
  """[examples, 1 + levels]: the share of an example's draws that is classified right, without noise
  and at each level.
  """
  config, sde, transform = experiment.config, experiment.sde, experiment.transform
  options, split = config.evaluation, experiment.dataset.splits[config.evaluation.split]

  def right(params, keys, k, labels):
    sigma_data = config.parameterization.sigma_data
    log_prob_fn = classification.make_log_prob_fn(sde, model, params, sigma_data=sigma_data)
    hits = lambda x, t: (log_prob_fn(x, t).argmax(1) == labels).astype(float)
    x0 = transform.dequantize(fold_in(keys, 0), k)

    def level(position):
      i, t = position
      draws = [fold_in(keys, 1 + i * options.num_draws + j) for j in range(options.num_draws)]
      return sum(hits(perturb(sde, x0, normal(key, x0.shape), t), t) for key in draws) / len(draws)

    clean = hits(marginal(sde, sde.t_min)[0] * transform.forward(k), sde.t_min)
    noised = jax.lax.map(level, (jnp.arange(len(grid.times)), grid.times))
    return jnp.concatenate([clean[None], noised]).T

  right, shares = experiment.over_devices(right, 3), []
  rows = spread(len(split["label"]), options.num_examples or len(split["label"]))
  for position, valid in parts(len(rows), config.classifier.batch_size, "classifying"):
    index = rows[position]
    keys = keys_of(jax.random.key(options.seed), index)
    values = right(params, keys, split["image"][index], split["label"][index])
    shares.append(np.asarray(devices.to_host(values), np.float64)[:valid])
  return np.concatenate(shares)


def report(experiment: Experiment, model: nn.Module, params: PyTree) -> dict[str, Any]:
  """The share of the held-out examples that is classified right at each noise level, without noise,
  and by always naming the commonest class of the training.
  """
  options, grid, splits = (
    experiment.config.evaluation,
    HeldOut(experiment),
    experiment.dataset.splits,
  )
  shares = shares_right(experiment, model, params, grid)
  accuracy, error = shares.mean(0).tolist(), (shares.std(0) / np.sqrt(len(shares))).tolist()
  commonest = np.bincount(splits["train"]["label"]).argmax()
  return {
    "split": options.split,
    "num_examples": len(shares),
    "num_draws": options.num_draws,
    "clean_accuracy": accuracy[0],
    "clean_standard_error": error[0],
    "chance": float((splits[options.split]["label"] == commonest).mean()),
    "log_snr": grid.log_snrs.tolist(),
    "accuracy": accuracy[1:],
    "standard_error": error[1:],
  }


def summary(record: dict[str, Any]) -> str:
  """The line that a training ends with."""
  clean, error, chance = (
    100 * record[name] for name in ("clean_accuracy", "clean_standard_error", "chance")
  )
  levels = 100 * np.mean(record["accuracy"])
  return (
    f"classifier: {clean:.1f} ± {error:.1f} % of {record['num_examples']} {record['split']} "
    f"examples right without noise, {levels:.1f} % over all noise levels (chance {chance:.1f} %); "
    f"step {record['checkpoint_step']}, {record['seconds']:.0f} s"
  )
