"""Optimizers and learning rates: any of optax by its name, warmed up, clipped, and guarded against
gradients that are not finite.
"""

import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

import losses
from errors import check, lookup
from sde_lib import SDE

# what the schedules of optax call the learning rate, and the steps that it takes to decay
RATES = ("value", "init_value", "peak_value")
DURATIONS = ("decay_steps", "transition_steps")


def _named(module, wanted: Callable[[inspect.Signature], bool]) -> dict[str, Callable]:
  """The public functions of a module whose signature is wanted."""
  functions = {k: f for k, f in vars(module).items() if inspect.isfunction(f) and k[0] != "_"}
  return {name: f for name, f in functions.items() if wanted(inspect.signature(f))}


OPTIMIZERS = _named(optax, lambda s: next(iter(s.parameters), "") == "learning_rate")
SCHEDULES = _named(
  optax.schedules, lambda s: "warmup_steps" not in s.parameters and {*RATES} & {*s.parameters}
)
SCHEDULES |= {"constant": optax.constant_schedule, "cosine": optax.cosine_decay_schedule}


def _arguments(section: str, function: Callable, options: dict, given: dict) -> dict:
  """`options` over those of `given` that the function takes; every option must be one of its."""
  parameters = inspect.signature(function).parameters
  for name, value in options.items():
    legal = ", ".join(name for name in parameters if name != "learning_rate")
    check(name in parameters, f"{section}.{name}", value, legal)
  arguments = {name: v for name, v in given.items() if name in parameters} | {**options}
  for name, parameter in parameters.items():
    missing = parameter.default is parameter.empty and name not in arguments
    mend = f"set {section}.{name} in the configuration file"
    check(not missing, f"{section}.{name}", None, "a value: it has no default", mend)
  return arguments


def learning_rate(config: ConfigDict) -> optax.Schedule:
  """Step (from 0) -> learning rate: linear warm-up (step + 1) / warmup_steps times the named
  schedule, which ends at `training.num_steps`.
  """
  settings = config.optimizer
  schedule = lookup(SCHEDULES, settings.schedule, "optimizer.schedule")
  given = dict.fromkeys(RATES, settings.learning_rate)
  given |= dict.fromkeys(DURATIONS, config.training.num_steps)
  options = settings.schedule_options.get(settings.schedule, {})
  section = f"optimizer.schedule_options.{settings.schedule}"
  decay = schedule(**_arguments(section, schedule, options, given))
  return lambda step: jnp.minimum(1.0, (step + 1) / max(1, settings.warmup_steps)) * decay(step)


def is_fixed(path: tuple, _) -> bool:
  """Whether the parameter at `path` is drawn once and never trained: Fourier frequencies."""
  return jax.tree_util.keystr(path[-1:], simple=True) == "frequencies"


def _keep_fixed(params: PyTree) -> PyTree:
  return jax.tree_util.tree_map_with_path(is_fixed, params)


def record_losses(sde: SDE) -> optax.GradientTransformationExtraArgs:
  """Leaves the updates as they are and keeps the newest losses of each noise level
  (`losses.LossHistory`), given as `times` and `losses` [b].
  """

  def update(updates, state, params=None, *, times: Array, losses_seen: Array, **_):
    return updates, losses.update_history(state, sde, times, losses_seen)

  return optax.GradientTransformationExtraArgs(lambda _: losses.init_history(sde), update)


def loss_history(opt_state: PyTree) -> losses.LossHistory | None:
  """What `record_losses` keeps in the state of an optimizer, None where it is no part of it."""
  is_history = lambda node: isinstance(node, losses.LossHistory)
  return next(filter(is_history, jax.tree.leaves(opt_state, is_leaf=is_history)), None)


def global_norm(grads: PyTree) -> Array:
  """L2 norm of all gradients. Vectors are laid end to end, so that XLA compiles one sum instead of
  hundreds.
  """
  leaves = jax.tree.leaves(grads)
  arrays = [leaf for leaf in leaves if leaf.ndim > 1]
  vectors = [leaf.ravel() for leaf in leaves if leaf.ndim < 2]
  arrays += [jnp.concatenate(vectors)] if vectors else []
  return jnp.sqrt(sum(jnp.sum(jnp.square(array)) for array in arrays))


def clip(largest: float) -> optax.GradientTransformationExtraArgs:
  """Gradients whose global norm, given as `norm`, is above `largest` are scaled down to it.

  As `optax.clip_by_global_norm`, by a factor instead of a quotient of each, which XLA would keep.
  """

  def update(updates, state, params=None, *, norm: Array, **_):
    scale = jnp.minimum(1.0, largest / norm)
    return jax.tree.map(lambda u: u * scale.astype(u.dtype), updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def guard(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """What `inner` does to gradients that are `usable`; others change nothing but the counts.

  As `optax.apply_if_finite`, without its branches, which keep XLA from fusing the update: each
  number is chosen: of the 11,579 kernels of DDPM++'s step then, 7,638 were left.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params):
    count = jnp.zeros((), jnp.int32)
    return optax.ApplyIfFiniteState(count, jnp.array(True), count, inner.init(params))

  def update(updates, state, params=None, *, usable: Array, **extra):
    updates, new = inner.update(updates, state.inner_state, params, **extra)
    choose = functools.partial(jax.lax.select, usable)  # half the time of jnp.where to trace
    updates = jax.tree.map(lambda u: choose(u, jnp.zeros_like(u)), updates)
    in_a_row = jnp.where(usable, 0, state.notfinite_count + 1)
    total = state.total_notfinite + ~usable
    kept = jax.tree.map(choose, new, state.inner_state)
    return updates, optax.ApplyIfFiniteState(in_a_row, usable, total, kept)

  return optax.GradientTransformationExtraArgs(init, update)


def make_optimizer(config: ConfigDict, sde: SDE) -> optax.GradientTransformationExtraArgs:
  """The named optimizer of optax on gradients clipped by their global norm, behind a `guard`: its
  update takes `norm`, their global norm, and `usable`.
  """
  settings = config.optimizer
  function = lookup(OPTIMIZERS, settings.name, "optimizer.name")
  options = settings.options.get(settings.name, {})
  given = {"learning_rate": learning_rate(config)}
  arguments = _arguments(f"optimizer.options.{settings.name}", function, options, given)
  # fixed parameters have no gradient, but weight decay would change them
  fixed = optax.masked(optax.set_to_zero(), _keep_fixed)
  chain = optax.chain(clip(settings.grad_clip), function(**arguments), fixed)
  aware = [record_losses(sde)] if config.loss.time_sampler == losses.LOSS_AWARE else []
  return optax.with_extra_args_support(optax.chain(guard(chain), *aware))
