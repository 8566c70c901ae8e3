"""From a configuration to the objects of a run, everything checked before anything compiles."""

import dataclasses
import functools
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

import data
import losses
import models
import training
from dynamics import SOLVERS
from errors import ConfigError, check, invalid, lookup
from likelihood import DIVERGENCES, LogLikelihood, log_likelihood
from parameterization import C_NOISE, OUTPUTS, NoiseFn, make_noise_fn, make_score_fn
from sampling import SAMPLERS, SPACINGS, sample, sample_ode, sample_trajectory, time_grid
from sde_lib import SDE, SDES, Keys, make_sde

ODE_SAMPLER = "probability_flow"


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The validated objects of a run; its methods are compiled once each and take the parameters as
  an argument.
  """

  config: ConfigDict
  sde: SDE
  model: nn.Module
  dataset: data.DataSet
  mesh: Mesh

  def noise_fn(self, params: PyTree) -> NoiseFn:
    """The network as a noise prediction, in evaluation mode."""
    return make_noise_fn(self.sde, self.model, params, **self.config.parameterization)

  @property
  def num_dims(self) -> int:
    """D, the number of values of an example."""
    return math.prod(self.dataset.shape)

  def abstract_ema(self) -> PyTree:
    """Shapes and shardings of the EMA parameters: the target of a restore."""
    optimizer = training.make_optimizer(self.config)
    return training.abstract_state(self.model, optimizer, self.dataset.shape, self.mesh).ema_params

  def _over_devices(self, function: Callable, num_batched: int) -> Callable:
    """Jits function(params, *batched), each device with its part of the leading axis of `batched`,
    at full matmul precision.
    """
    specs = (PartitionSpec(), *[PartitionSpec("data")] * num_batched)
    mapped = jax.shard_map(
      function, mesh=self.mesh, in_specs=specs, out_specs=PartitionSpec("data"), check_vma=False
    )

    def call(*args):
      with jax.default_matmul_precision("highest"):
        return mapped(*args)

    return jax.jit(call)

  def _step_and_times(self):
    settings = self.config.sampling
    step = SAMPLERS[settings.sampler](self.sde, **settings.options[settings.sampler])
    return step, time_grid(self.sde, settings.num_steps, settings.spacing)

  @functools.cached_property
  def sampler(self) -> Callable[[PyTree, Keys], tuple[Array, Array]]:
    """(params, one key per example) -> (x [b, *d], network evaluations per example [b])."""
    settings, sde = self.config.sampling, self.sde

    def draw(params, keys):
      shape, noise_fn = (len(keys), *self.dataset.shape), self.noise_fn(params)
      if settings.sampler == ODE_SAMPLER:
        score_fn = make_score_fn(sde, noise_fn)
        x, nfe = sample_ode(keys, sde, score_fn, shape, **settings.options[ODE_SAMPLER])
      else:
        step, times = self._step_and_times()
        grid = {"step": step, "times": times, "denoise": settings.denoise}
        x, nfe = sample(keys, sde, noise_fn, shape, **grid)
      return x, jnp.full(shape[0], nfe)

    return self._over_devices(draw, 1)

  @functools.cached_property
  def trajectory(self) -> Callable[[PyTree, Keys], Array]:
    """(params, one key per example) -> every state of the sampler [num_steps + 1, b, *d]."""

    @jax.jit
    def draw(params, keys):
      step, times = self._step_and_times()
      shape = (keys.shape[0], *self.dataset.shape)
      return sample_trajectory(keys, self.sde, self.noise_fn(params), shape, step=step, times=times)

    return draw

  @functools.cached_property
  def likelihood(self) -> Callable[[PyTree, Keys, Array], LogLikelihood]:
    """(params, one key per example, x [b, *d]) -> the exact log-likelihood of each example."""
    names = ("divergence", "num_probes", "solver", "rtol", "atol", "max_steps")
    options = {name: self.config.likelihood[name] for name in names}

    def evaluate(params, keys, x):
      score_fn = make_score_fn(self.sde, self.noise_fn(params))
      return log_likelihood(keys, self.sde, score_fn, x, **options)

    return self._over_devices(evaluate, 2)


def _make_model(config: ConfigDict) -> nn.Module:
  """`models/<name>.py`'s Model with the arguments of the configuration."""
  names = {m.name: m.name for m in pkgutil.iter_modules(models.__path__) if not m.ispkg}
  model_class = importlib.import_module(f"models.{lookup(names, config.name, 'model.name')}").Model
  _check_arguments("model.args", config.args, model_class)
  return model_class(**config.args)


def _check_arguments(section: str, args: ConfigDict, function: Callable, mend: str = "") -> None:
  """Every entry of `args` must be an argument with a default of `function`."""
  parameters = inspect.signature(function).parameters.values()
  legal = [p.name for p in parameters if p.default is not p.empty and p.name not in NOT_OPTIONS]
  for name in args:
    mend = mend or f"remove {section}.{name} from the configuration"
    check(name in legal, f"{section}.{name}", args[name], ", ".join(legal), mend)


# defaults that are no matter of configuration: of linen modules, of samplers
NOT_OPTIONS = ("parent", "name", "labels", "first_index")

# (table, field): every name that a configuration chooses
NAMES = (
  (SDES, "sde.name"),
  (OUTPUTS, "parameterization.output"),
  (C_NOISE, "parameterization.c_noise"),
  (losses.WEIGHTINGS, "loss.weighting"),
  (losses.TIME_SAMPLERS, "loss.time_sampler"),
  (training.SCHEDULES, "optimizer.schedule"),
  (SAMPLERS | {ODE_SAMPLER: sample_ode}, "sampling.sampler"),
  (SPACINGS, "sampling.spacing"),
  ({"mean": None, "tweedie": None}, "sampling.denoise"),
  (DIVERGENCES, "likelihood.divergence"),
  (SOLVERS, "likelihood.solver"),
)
MAY_BE_ZERO = ("seed", "warmup_steps", "beta1", "beta2")


def _check_values(config: ConfigDict, num_devices: int) -> None:
  """Names, signs, and batches that the devices can share."""
  for table, field in NAMES:
    section, name = field.split(".")
    lookup(table, config[section][name], field)
  for section in ("optimizer", "ema", "training", "sampling", "likelihood", "evaluation"):
    for field, value in config[section].items():
      if isinstance(value, int | float) and field not in MAY_BE_ZERO:
        positive = value > 0 or isinstance(value, bool)
        check(positive, f"{section}.{field}", value, "a number above 0")
  for section in ("training", "sampling", "likelihood"):
    size = config[section].batch_size
    below = size // num_devices * num_devices
    nearest = " or ".join(str(n) for n in (below, below + num_devices) if n)
    legal = f"a multiple of the {num_devices} devices"
    mend = f"set --config.{section}.batch_size to {nearest}"
    check(size % num_devices == 0, f"{section}.batch_size", size, legal, mend)


def _check_sampler(config: ConfigDict, sde: SDE) -> None:
  """The options of the chosen sampler."""
  name = config.sampling.sampler
  options = lookup(dict(config.sampling.options), name, "sampling.options")
  section = f"sampling.options.{name}"
  if name == ODE_SAMPLER:
    _check_arguments(section, options, sample_ode)
    lookup(SOLVERS, options.get("solver", "tsit5"), f"{section}.solver")
  else:
    _check_arguments(section, options, SAMPLERS[name])
    SAMPLERS[name](sde, **options)


def build(config: ConfigDict) -> Experiment:
  """The objects of a run; a `ConfigError` tells what cannot work before anything compiles."""
  _check_values(config, jax.device_count())
  variants = "each process has its own sde.args: choose a variant, --config=<file>:<process>"
  _check_arguments("sde.args", config.sde.args, SDES[config.sde.name], variants)
  sde = make_sde(config.sde.name, **config.sde.args)
  _check_sampler(config, sde)
  if config.parameterization.c_noise == "index" and sde.times is None:
    others = ", ".join(sorted(C_NOISE.keys() - {"index"}))
    raise invalid("parameterization.c_noise", "index", f"{others}: {config.sde.name!r} has no grid")
  model = _make_model(config.model)
  dataset = data.load(config.data.name, config.data.dir)
  for section in ("likelihood", "evaluation"):
    lookup(dataset.splits, config[section].split, f"{section}.split")
  try:
    jax.eval_shape(lambda: training.init_params(model, dataset.shape, 0))
  except (ValueError, TypeError, ZeroDivisionError) as error:
    raise ConfigError(f"model.args do not fit images of shape {dataset.shape}: {error}") from error
  return Experiment(config, sde, model, dataset, training.data_mesh())
