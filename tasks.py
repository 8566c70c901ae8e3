"""What `config.guidance` asks of the samples: the tables of its names, the checks of what cannot
work.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

from flax import linen as nn
from ml_collections import ConfigDict

import data
import guidance
from errors import ConfigError, check, lookup
from operators import Operator, make_operator
from sampling import SAMPLERS

DETERMINISTIC = ("ddim", "dpm_solver", "edm", "probability_flow", "unipc")
STOCHASTIC = ("eta", "gamma")  # options that make noise of them


class Method(NamedTuple):
  """How a measurement enters: `hook`(sde, noise_fn, operator, **options) to a noise function of a
  `Condition`, `wrapper`(sde, step, operator, measurement, **options), or a `step` of its own, (sde,
  operator, measurement, **options). Of two the last has the options.
  """

  hook: Callable | None = None
  wrapper: Callable | None = None
  step: Callable | None = None

  @property
  def options(self) -> tuple[str, ...]:
    """Names of its keyword arguments."""
    parameters = inspect.signature(self.step or self.wrapper or self.hook).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


METHODS = {
  "null_space": Method(guidance.null_space),
  "replacement": Method(guidance.null_space, guidance.replacement),
  "repaint": Method(guidance.null_space, guidance.repaint),
  "dps": Method(wrapper=guidance.dps),
  "pigdm": Method(guidance.posterior_guidance),
  "moment_matching": Method(
    functools.partial(guidance.posterior_guidance, covariance="tweedie"),
  ),
  "smc": Method(step=guidance.smc),
}
# name: the options of `config.guidance.options` that the hook takes
CLASSES = {
  "none": (),
  "classifier": ("scale",),
  "classifier_free": ("scale", "low", "high"),
}
# those that need no measurement: from the noised example, or from its latent
TRANSPORTS = ("image_to_image", "latent_edit", "interpolation")
TASKS = dict.fromkeys(("none", *METHODS, *TRANSPORTS))


def operator_of(config: ConfigDict, shape: tuple[int, ...]) -> Operator:
  """The measurement of `config.guidance` for examples of `shape`."""
  settings = config.guidance
  return make_operator(settings.operator, shape, **settings.operators.get(settings.operator, {}))


def method_options(config: ConfigDict) -> dict:
  """The options of the method of `guidance.task`, the noise of the measurement among them."""
  settings = config.guidance
  options = dict(settings.options.get(settings.task, {}))
  if "noise_std" in METHODS[settings.task].options:
    options["noise_std"] = settings.noise_std
  return options


def has_classes(config: ConfigDict, model: nn.Module) -> bool:
  """Whether something is told which class is asked for: the network, or a classifier."""
  return bool(getattr(model, "num_classes", 0)) or config.guidance.classes == "classifier"


def check_guidance(config: ConfigDict, model: nn.Module, spec: data.Spec) -> None:
  """Raises a `ConfigError` that tells what of `config.guidance` cannot work, before anything
  compiles. Whether a classifier was trained is found out where it is restored.
  """
  settings = config.guidance
  lookup(CLASSES, settings.classes, "guidance.classes")
  lookup(TASKS, settings.task, "guidance.task")
  for name, legal in (
    (settings.classes, CLASSES[settings.classes]),
    (settings.task, METHODS.get(settings.task, Method(lambda: ())).options),
  ):
    _check_options(name, settings.options.get(name, {}), legal)
  _check_classes(config, model, spec)
  for field in ("num_inputs", "num_results"):
    value = settings[field]
    check(value > 0, f"guidance.{field}", value, "a whole number from 1 up")
  if settings.task in METHODS:
    _check_method(config, spec)
  elif settings.task != "none":
    _check_transport(config)


def _check_options(name: str, options: ConfigDict | dict, legal: tuple[str, ...]) -> None:
  """Every option is one of the method's; counts and standard deviations are above 0."""
  for option, value in options.items():
    field, known = f"guidance.options.{name}.{option}", ", ".join(legal) or "it has none"
    check(option in legal, field, value, known)
    positive = option.startswith("num_") or option == "data_std"
    check(value > 0 or not positive, field, value, "a number above 0")


def _check_classes(config: ConfigDict, model: nn.Module, spec: data.Spec) -> None:
  """Labels, and what guidance by class needs of the data and of the training."""
  settings, classes = config.guidance, getattr(model, "num_classes", 0)
  legal = f"none: the data {config.data.name!r} have no class labels"
  guided = settings.classes != "none"
  check(not guided or spec.num_classes > 1, "guidance.classes", settings.classes, legal)
  if settings.classes == "classifier_free":
    mend = "train with model.args.num_classes and loss.label_dropout=0.1"
    legal = "none or classifier: the network has no classes"
    check(classes > 0, "guidance.classes", settings.classes, legal, mend)
    legal = "none or classifier: it was trained with loss.label_dropout = 0, never without a class"
    dropped = config.loss.label_dropout > 0
    check(dropped, "guidance.classes", settings.classes, legal, mend)
  legal = f"the classes of the results, which guidance.classes={settings.classes} guides to"
  guides = settings.task == "none" or not guided or bool(settings.labels)
  check(guides, "guidance.labels", settings.labels, legal, "--config.guidance.labels=(3,)")
  never = classes and not config.loss.label_dropout and settings.task != "none"
  legal = "the classes of the results: the network was trained with loss.label_dropout = 0"
  check(not never or bool(settings.labels), "guidance.labels", settings.labels, legal)
  legal = "another one: the network was never told of no class (loss.label_dropout = 0)"
  latent = settings.task in ("latent_edit", "interpolation")
  check(not (never and latent), "guidance.task", settings.task, legal)
  mend = "set guidance.classes=classifier, or train a network with model.args.num_classes"
  legal = "() here: nothing is told of classes"
  told = has_classes(config, model) or not settings.labels
  check(told, "guidance.labels", settings.labels, legal, mend)
  legal = f"classes of the data, whole numbers from 0 to {spec.num_classes - 1}"
  inside = all(isinstance(k, int) and 0 <= k < spec.num_classes for k in settings.labels)
  check(inside, "guidance.labels", settings.labels, legal)


def _check_method(config: ConfigDict, spec: data.Spec) -> None:
  """The measurement, and that the sampler has what the method needs of it."""
  settings, sampler = config.guidance, config.sampling.sampler
  operator_of(config, spec.shape)
  options, skip = method_options(config), config.sampling.skip
  check(skip == 0, "sampling.skip", skip, f"0 for guidance.task={settings.task}")
  std, legal = settings.noise_std, "a number from 0 up"
  check(std >= 0, "guidance.noise_std", std, legal)
  noisy = ", ".join(name for name, m in METHODS.items() if "noise_std" in m.options)
  legal = f"0 with {settings.task}, which takes a measurement as exact; {noisy} know its noise"
  check("noise_std" in options or not std, "guidance.noise_std", std, legal)
  between = settings.task in ("repaint", "dps")
  legal = f"a sampler of single steps for guidance.task={settings.task}, such as ancestral"
  check(sampler in SAMPLERS or not between, "sampling.sampler", sampler, legal)
  legal = "ancestral for guidance.task=smc"
  check(settings.task != "smc" or sampler == "ancestral", "sampling.sampler", sampler, legal)


def _check_transport(config: ConfigDict) -> None:
  """Where the sampler begins, and that what goes through latents has no other noise."""
  task, settings = config.guidance.task, config.sampling
  if task == "image_to_image":
    legal = "above 0 for guidance.task=image_to_image: the share of the noising that is left out"
    check(settings.skip > 0, "sampling.skip", settings.skip, legal, "--config.sampling.skip=0.5")
    return
  check(settings.skip == 0, "sampling.skip", settings.skip, f"0 for guidance.task={task}")
  count = config.guidance.num_inputs
  legal = "2 or more for guidance.task=interpolation"
  check(task != "interpolation" or count > 1, "guidance.num_inputs", count, legal)
  options = settings.options[settings.sampler]
  noise = any(options.get(name, 0) for name in STOCHASTIC)
  quiet = settings.sampler in DETERMINISTIC and not noise
  legal = f"one without noise for guidance.task={task}: {', '.join(DETERMINISTIC)}"
  check(quiet, "sampling.sampler", settings.sampler, legal)


def refuse_task(config: ConfigDict, mode: str) -> None:
  """Only the mode sample carries out a task."""
  task = config.guidance.task
  if task != "none" and mode in ("run", "evaluate"):
    raise ConfigError(
      f"guidance.task = {task!r} is for --mode=sample, not for --mode={mode}.\n"
      "  mend:  --mode=sample, or --config.guidance.task=none"
    )
