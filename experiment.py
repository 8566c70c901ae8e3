"""From a configuration to the objects of a run, everything checked before anything compiles."""

import dataclasses
import functools
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

import data
import devices
import ema
import losses
import models
import optimizers
import run_log
import tasks
import training
from classification import make_log_prob_fn
from dequantization import DECODERS, DEQUANTIZATIONS, TRAINED
from divergence import DIVERGENCES
from dynamics import SOLVERS
from errors import ConfigError, check, invalid, lookup
from guidance import classifier_free, classifier_guidance
from likelihood import STARTS
from models.classifier import Model as Classifier
from parameterization import (
  C_NOISE,
  OUTPUTS,
  VARIANCES,
  NoiseFn,
  make_noise_fn,
  make_score_fn,
)
from sampling import (
  ADAPTIVE_SDE_SOLVERS,
  INITS,
  SAMPLERS,
  SDE_SOLVERS,
  SPACINGS,
  sample,
  sample_ode,
  sample_sde,
  sample_trajectory,
  time_grid,
)
from sde_lib import SDE, SDES, Keys, fold_in, make_sde

# name: (diffrax solve, its solvers); of these only "reverse_sde" takes the steps of the time grid
SOLVES = {
  "probability_flow": (sample_ode, SOLVERS),
  "reverse_sde": (sample_sde, SDE_SOLVERS),
  "adaptive_reverse_sde": (sample_sde, ADAPTIVE_SDE_SOLVERS),
}

# name: `sample`'s denoise
DENOISE = {"mean": "mean", "tweedie": "tweedie", "none": None}


class Weights(NamedTuple):
  """What samples are drawn with: the parameters of the network, and of a classifier that guides
  it.
  """

  network: PyTree
  classifier: PyTree = None


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The validated objects of a run; its methods are compiled once each and take the parameters as
  an argument.
  """

  config: ConfigDict
  sde: SDE
  model: nn.Module
  spec: data.Spec
  mesh: Mesh

  @functools.cached_property
  def dataset(self) -> data.DataSet:
    """The data, read when first asked for: sampling needs none."""
    return data.load(self.config.data)

  @property
  def transform(self) -> data.Transform:
    """Between the stored values and the network's."""
    return data.transform_of(self.spec, self.config.data.centered)

  def labels(self, labels: Array | None) -> Array | None:
    """Of examples, where the network has classes."""
    return labels if getattr(self.model, "num_classes", 0) else None

  def noise_fn(self, params: PyTree) -> NoiseFn:
    """The network as a noise prediction, in evaluation mode."""
    return make_noise_fn(self.sde, self.model, params, **self.config.parameterization)

  @property
  def classifier(self) -> nn.Module:
    """The network of `config.classifier` for the classes of the data."""
    return Classifier(num_classes=self.spec.num_classes, **self.config.classifier.args)

  @property
  def num_dims(self) -> int:
    """D, the number of values of an example."""
    return math.prod(self.spec.shape)

  def abstract_ema(self) -> PyTree:
    """Shapes and shardings of an average of the parameters: the target of a restore."""
    return training.on_mesh(abstract_init(self.model, self.spec.shape)[1], self.mesh)

  def over_devices(self, function: Callable, num_batched: int) -> Callable:
    """Jits function(params, *batched), each device with its part of the leading axis of `batched`,
    at full matmul precision. On several hosts each gives the whole of `batched`.
    """
    batched = devices.batch_spec(self.mesh)
    specs = (PartitionSpec(), *[batched] * num_batched)
    mapped = jax.shard_map(
      function, mesh=self.mesh, in_specs=specs, out_specs=batched, check_vma=False
    )

    @jax.jit
    def call(*args):
      with jax.default_matmul_precision("highest"):
        return mapped(*args)

    if jax.process_count() == 1:
      return call
    return lambda params, *batched: call(params, *devices.replicated(batched, self.mesh))

  @property
  def times(self) -> Array:
    """The grid of the sampler, without the part that is skipped; Langevin steps are at the end of
    each interval, so that their first one is empty.
    """
    settings = self.config.sampling
    grid = time_grid(self.sde, settings.num_steps, settings.spacing)
    grid = grid[round(settings.skip * settings.num_steps) :]
    return jnp.concatenate([grid[:1], grid]) if settings.sampler == "annealed_langevin" else grid

  def asked(self, keys: Keys, index: Array) -> Array | None:
    """The class of each example to be drawn, where something is told of classes: those of
    `guidance.labels` in turn, by the examples' indices, else a random one.
    """
    if not tasks.has_classes(self.config, self.model):
      return None
    wanted = self.config.guidance.labels
    if wanted:
      return jnp.asarray(wanted, jnp.int32)[index % len(wanted)]
    draw = lambda key: jax.random.randint(key, (), 0, self.spec.num_classes)
    return jax.vmap(draw)(fold_in(keys, 2**31 - 1))

  def guided(self, weights: Weights) -> NoiseFn:
    """The network, its classes guided as `config.guidance` says; without a classifier's weights it
    is not guided by one.
    """
    noise_fn, settings = self.noise_fn(weights.network), self.config.guidance
    options = dict(settings.options.get(settings.classes, {}))
    if settings.classes == "classifier_free":
      null_label = {"null_label": self.spec.num_classes}
      return classifier_free(self.sde, noise_fn, **null_label, **options)
    if weights.classifier is None:
      return noise_fn
    sigma_data = {"sigma_data": self.config.parameterization.sigma_data}
    law = make_log_prob_fn(self.sde, self.classifier, weights.classifier, **sigma_data)
    return classifier_guidance(self.sde, noise_fn, law, **options)

  def _run(self) -> dict:
    """The sampler that scans a step over the grid."""
    settings = self.config.sampling
    step = SAMPLERS[settings.sampler](self.sde, **settings.options[settings.sampler])
    return {"step": step, "times": self.times, "init": settings.init}

  def _solve(self) -> dict:
    """The options of a diffrax solve."""
    settings = self.config.sampling
    options = {**settings.options[settings.sampler], "init": settings.init}
    if settings.sampler == "probability_flow":
      options["t_start"] = self.times[0]
    if settings.sampler == "reverse_sde":
      options |= {"num_steps": settings.num_steps, "spacing": settings.spacing}
    return options

  def draw(
    self, keys: Keys, noise_fn: NoiseFn, labels: PyTree, *, wrap: Callable | None = None, **changes
  ) -> tuple[Array, Array]:
    """(x [b, *d], network evaluations per example [b]) of the sampler of the configuration.

    Args:
      keys: one per example.
      wrap: from its `Step` to the one that is taken.
      changes: of the arguments of the sampler, such as init.
    """
    settings, sde, shape = self.config.sampling, self.sde, (len(keys), *self.spec.shape)
    if settings.sampler in SOLVES:
      solve, options = SOLVES[settings.sampler][0], self._solve() | changes
      score_fn = make_score_fn(sde, noise_fn)
      x, nfe = solve(keys, sde, score_fn, shape, labels=labels, **options)
    else:
      options = self._run() | changes
      if wrap:
        options["step"] = wrap(options["step"])
      denoise = DENOISE[settings.denoise]
      x, nfe = sample(keys, sde, noise_fn, shape, denoise=denoise, labels=labels, **options)
    twice = self.config.guidance.classes == "classifier_free"
    return x, jnp.full(shape[0], nfe * (2 if twice else 1))

  @functools.cached_property
  def sampler(self) -> Callable[[Weights, Keys, Array | None], tuple[Array, Array]]:
    """(weights, one key per example, labels) -> (x [b, *d], network evaluations of each [b])."""
    draw = lambda weights, keys, labels: self.draw(keys, self.guided(weights), labels)
    return self.over_devices(draw, 2)

  @functools.cached_property
  def trajectory(self) -> Callable[[Weights, Keys, Array | None], Array]:
    """The same arguments -> every state of the sampler [len(times), b, *d]."""

    @jax.jit
    def draw(weights, keys, labels):
      shape = (keys.shape[0], *self.spec.shape)
      noise_fn = self.guided(weights)
      return sample_trajectory(keys, self.sde, noise_fn, shape, labels=labels, **self._run())

    return draw


def _make_model(config: ConfigDict) -> nn.Module:
  """`models/<name>.py`'s Model with the arguments of the configuration."""
  names = {m.name: m.name for m in pkgutil.iter_modules(models.__path__) if not m.ispkg}
  model_class = importlib.import_module(f"models.{lookup(names, config.name, 'model.name')}").Model
  check_arguments("model.args", config.args, model_class)
  return model_class(**config.args)


# defaults that are no matter of configuration: of linen modules, of samplers
NOT_OPTIONS = ("parent", "name", "labels", "first_index", "init", "t_start")
# what a solve takes from the grid of `sampling`
GRID = ("num_steps", "spacing")


def check_arguments(
  section: str, args: ConfigDict, function: Callable, mend: str = "", hidden: tuple = ()
) -> None:
  """Every entry of `args` must be an argument with a default of `function`, and not `hidden`."""
  parameters = inspect.signature(function).parameters.values()
  given = [p.name for p in parameters if p.default is not p.empty]
  legal = [name for name in given if name not in NOT_OPTIONS + hidden]
  for name in args:
    mend = mend or f"remove {section}.{name} from the configuration"
    check(name in legal, f"{section}.{name}", args[name], ", ".join(legal), mend)


# (table, field): every name that a configuration chooses
NAMES = (
  (SDES, "sde.name"),
  (OUTPUTS, "parameterization.output"),
  (C_NOISE, "parameterization.c_noise"),
  (losses.WEIGHTINGS, "loss.weighting"),
  (losses.TIME_SAMPLERS, "loss.time_sampler"),
  (losses.OBJECTIVES, "loss.objective"),
  (optimizers.OPTIMIZERS, "optimizer.name"),
  (optimizers.SCHEDULES, "optimizer.schedule"),
  (SAMPLERS | SOLVES, "sampling.sampler"),
  (INITS, "sampling.init"),
  (SPACINGS, "sampling.spacing"),
  (DENOISE, "sampling.denoise"),
  (dict.fromkeys(("exact", "variational")), "likelihood.kind"),
  (DEQUANTIZATIONS | TRAINED, "likelihood.dequantization"),
  (DIVERGENCES, "likelihood.divergence"),
  (STARTS, "likelihood.start"),
  (VARIANCES, "likelihood.variance"),
  (DECODERS, "likelihood.decoder"),
  (SOLVERS, "likelihood.solver"),
)
MAY_BE_ZERO = {
  "seed",
  "skip",
  "warmup_steps",
  "ramp_up",
  "snapshot_every",
  "use",
  "post_hoc",
  "batch_per_device",
  "memory_gib",
  "sample_every",
  "evaluate_every",
  "frechet_samples",
  "profile_steps",
  "peak_tflops",
  "num_examples",
  "evaluation.num_samples",
}


def _check_values(config: ConfigDict, num_devices: int) -> None:
  """Names, signs, and batches that the devices can share."""
  for table, field in NAMES:
    section, name = field.split(".")
    lookup(table, config[section][name], field)
  names = ("optimizer", "ema", "training", "sampling", "likelihood", "evaluation")
  sections = {name: config[name] for name in names}
  sections["likelihood.dequantizer"] = config.likelihood.dequantizer
  for section, fields in sections.items():
    for field, value in fields.items():
      if isinstance(value, int | float) and not {field, f"{section}.{field}"} & MAY_BE_ZERO:
        positive = value > 0 or isinstance(value, bool)
        check(positive, f"{section}.{field}", value, "a number above 0")
  for section in ("training", "sampling"):
    check_batch(section, config[section].batch_size, num_devices)


def check_batch(section: str, size: int, num_devices: int) -> None:
  """The devices can share batches of this size."""
  below = size // num_devices * num_devices
  nearest = " or ".join(str(n) for n in (below, below + num_devices) if n)
  legal = f"a multiple of the {num_devices} devices"
  mend = f"set --config.{section}.batch_size to {nearest}"
  check(size % num_devices == 0, f"{section}.batch_size", size, legal, mend)


def _check_likelihood(config: ConfigDict, levels: int) -> None:
  """The bound of the chain encodes nothing; a fitted decoder is one of levels."""
  options = config.likelihood
  legal = "'discretized': continuous data have no levels"
  check(bool(levels) or options.decoder != "fitted", "likelihood.decoder", "fitted", legal)
  legal = f"False with likelihood.kind={options.kind}: only kind=exact encodes the examples"
  keeps = options.save_latents and options.kind != "exact"
  check(not keeps, "likelihood.save_latents", True, legal)


def _check_levels(config: ConfigDict, sde: SDE) -> None:
  """What is defined on the levels of a discrete-time model has them."""
  settings, of_levels = config.loss, ("levels", losses.LOSS_AWARE)
  bound = settings.objective in ("vlb", "hybrid")
  if bound or settings.time_sampler == "levels":
    field = "objective" if bound else "time_sampler"
    legal = f"for processes with levels, such as ddpm or iddpm: sde.name is {config.sde.name!r}"
    check(sde.times is not None, f"loss.{field}", settings[field], legal)
  if bound:
    legal, sampler = f"with loss.objective={settings.objective}: {of_levels}", settings.time_sampler
    check(sampler in of_levels, "loss.time_sampler", sampler, legal)
    legal = f"False with loss.objective={settings.objective}: its decoder is of the stored values"
    check(not config.training.dequantize, "training.dequantize", True, legal)


def _check_training(config: ConfigDict, sde: SDE, model: nn.Module, spec: data.Spec) -> None:
  """The objective and the optimizer with their options, the averages, what the network must have
  for what the training asks.
  """
  settings = config.loss
  tables = losses.OBJECTIVES, losses.WEIGHTINGS, losses.TIME_SAMPLERS
  for table, field in zip(tables, ("objective", "weighting", "time_sampler")):
    name = settings[field]
    check_arguments(f"loss.options.{name}", settings.options.get(name, {}), table[name])
  _check_levels(config, sde)
  optimizers.make_optimizer(config, sde)
  run_log.check_wandb(config.training.wandb)
  count, share = len(ema.decays(config)), settings.label_dropout
  check(count > 0, "ema.half_life_images", (), "a half-life at least, or an ema.sigma_rel")
  check(config.ema.use < count, "ema.use", config.ema.use, f"a number below {count}, from 0")
  null = bool(getattr(model, "num_classes", 0)) and getattr(model, "null_class", True)
  legal = "0: the network has no row for 'no class'"
  check(not share or null, "loss.label_dropout", share, legal, "model.args.null_class=True")
  check(0 <= share < 1, "loss.label_dropout", share, "a probability below 1")
  p, images = config.data.augment, len(spec.shape) == 3
  check(0 <= p <= 1, "data.augment", p, "a probability; 0: no augmentation")
  legal = f"0 for data of shape {spec.shape}: it is for images"
  check(images or not (p or config.data.flip), "data.augment, data.flip", p, legal)
  told = getattr(model, "augment_dim", 0)
  legal = f"0 with model.args.augment_dim = {told}"
  check(not p or told == 9, "data.augment", p, legal, "set model.args.augment_dim to 9")


def _check_sampler(config: ConfigDict, sde: SDE) -> None:
  """The options of the chosen sampler, and that it can run with the process."""
  settings = config.sampling
  name, skip = settings.sampler, settings.skip
  options = lookup(dict(settings.options), name, "sampling.options")
  section = f"sampling.options.{name}"
  check(0 <= skip < 1, "sampling.skip", skip, "a share from 0 up, below 1")
  # checked while tracing: nothing is computed at the start of a run
  jax.eval_shape(lambda: time_grid(sde, settings.num_steps, settings.spacing))
  if name not in SOLVES:
    check_arguments(section, options, SAMPLERS[name])
    SAMPLERS[name](sde, **options)
    return
  function, solvers = SOLVES[name]
  check_arguments(section, options, function, hidden=GRID)
  default = inspect.signature(function).parameters["solver"].default
  lookup(solvers, options.get("solver", default), f"{section}.solver")
  if function is sample_sde:
    check(not skip, "sampling.skip", skip, f"0 with {name}", "take another sampler")


def _check_model(model: nn.Module, centered: bool, num_classes: int) -> None:
  """The network's range and classes are those of the data."""
  expected, classes = getattr(model, "centered", centered), getattr(model, "num_classes", 0)
  check(expected == centered, "model.args.centered", expected, f"{centered}, as data.centered")
  legal = f"0, or the {num_classes} classes of the data"
  check(classes in (0, num_classes), "model.args.num_classes", classes, legal)


def _check_output(config: ConfigDict, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
  """A network predicts values of the shape of an example, and with a variance twice as many."""
  double = (*shape[:-1], 2 * shape[-1])
  if found not in (shape, double):
    raise ConfigError(f"model {config.model.name!r} maps images of {shape} to {found}")
  sampler, objective = config.sampling.sampler, config.loss.objective
  learned = lambda options, name: options.get(name, {}).get("variance") == "learned"
  asked = {
    f"sampling.options.{sampler}.variance": learned(config.sampling.options, sampler),
    f"loss.options.{objective}.variance": learned(config.loss.options, objective),
    "loss.objective": objective == "hybrid",
  }
  mend = "take a network that predicts the variance: model.args.learned_variance=True"
  legal = "another one: the network predicts no variance"
  for field, is_asked in asked.items():
    check(not is_asked or found == double, field, "learned", legal, mend)


@dataclasses.dataclass(frozen=True)
class Outline:
  """The validated parts of a run that need no data."""

  sde: SDE
  model: nn.Module
  spec: data.Spec


@functools.lru_cache(maxsize=64)
def abstract_init(model: nn.Module, shape: tuple[int, ...]) -> tuple[Any, PyTree]:
  """Shapes of the output for one image and of the parameters, nothing computed."""
  x, t = jnp.zeros((1, *shape)), jnp.ones(1)
  out, variables = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), x, t))
  return out, variables["params"]


def outline(config: ConfigDict, spec: data.Spec | None = None) -> Outline:
  """Checks everything that can be checked without reading the data; a `ConfigError` tells what
  cannot work before anything compiles.

  Args:
    spec: what the data were when the network was trained; None: asks them.
  """
  _check_values(config, jax.device_count())
  variants = "each process has its own sde.args: choose a variant, --config=<file>:<process>"
  check_arguments("sde.args", config.sde.args, SDES[config.sde.name], variants)
  sde = make_sde(config.sde.name, **config.sde.args)
  _check_sampler(config, sde)
  c_noise, tabled = config.parameterization.c_noise, {"index", "index_from_noise"}
  if c_noise in tabled and sde.times is None:
    others = ", ".join(sorted(C_NOISE.keys() - tabled))
    raise invalid("parameterization.c_noise", c_noise, f"{others}: {config.sde.name!r} has no grid")
  model, spec = _make_model(config.model), spec or data.declared(config.data)
  _check_likelihood(config, spec.levels)
  _check_training(config, sde, model, spec)
  for section in ("likelihood", "evaluation"):
    lookup(dict.fromkeys(spec.splits), config[section].split, f"{section}.split")
  _check_model(model, config.data.centered, spec.num_classes)
  tasks.check_guidance(config, model, spec)
  try:
    out, _ = abstract_init(model, spec.shape)
  except (ValueError, TypeError, ZeroDivisionError) as error:
    raise ConfigError(f"model.args do not fit images of shape {spec.shape}: {error}") from error
  _check_output(config, out.shape[1:], spec.shape)
  return Outline(sde, model, spec)


def build(config: ConfigDict, spec: data.Spec | None = None) -> Experiment:
  """The objects of a run, checked as by `outline`."""
  parts = outline(config, spec)
  mesh = devices.make_mesh(config.training.fsdp)
  return Experiment(config, parts.sde, parts.model, parts.spec, mesh)
