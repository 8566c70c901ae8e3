"""Training: the state, the train step mapped over all devices, the loop."""

import collections
import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

import augment
import data
import devices
import ema
import losses
from checkpoint import Checkpoints, average
from errors import RunError, Stopped, lookup
from initialization import joined
from optimizers import global_norm, learning_rate, loss_history, make_optimizer
from parameterization import make_noise_fn
from run_control import Profiler, Stop
from run_log import MetricsWriter, Progress
from sde_lib import SDE, Keys, example_keys, fold_in


class TrainState(NamedTuple):
  """What a run carries from step to step; hyper-parameters come from the config, keys from the
  step. `ema_params` holds one tree for each average of `ema.decays`.
  """

  step: Int[Array, ""]
  params: PyTree
  opt_state: PyTree
  ema_params: tuple


def init_params(model: nn.Module, shape: tuple[int, ...], seed: int) -> PyTree:
  """Initial parameters for examples of `shape`, a function of the seed alone."""
  return model.init(jax.random.key(seed), jnp.zeros((1, *shape)), jnp.ones((1,)))["params"]


def first_state(
  params: PyTree, optimizer: optax.GradientTransformation, num_averages: int
) -> TrainState:
  """The state at step 0 of these parameters: each average is a copy of them."""
  averages = tuple(jax.tree.map(jnp.copy, params) for _ in range(num_averages))
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), averages)


def on_mesh(tree: PyTree, mesh: Mesh) -> PyTree:
  """The abstract arrays with the shardings that a state has on the mesh."""
  where = devices.shardings(devices.state_specs(tree, mesh), mesh)
  place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(place, tree, where)


def abstract_state(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  shape,
  mesh: Mesh,
  num_averages: int = 1,
) -> TrainState:
  """Shapes, dtypes and shardings of the state, nothing computed: the target of a restore."""
  init = lambda: first_state(init_params(model, shape, 0), optimizer, num_averages)
  return on_mesh(jax.eval_shape(init), mesh)


def init_state(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  shape,
  seed: int,
  mesh: Mesh,
  num_averages: int = 1,
) -> TrainState:
  """The state at step 0, on the mesh."""
  target = abstract_state(model, optimizer, shape, mesh, num_averages)
  where = jax.tree.map(lambda leaf: leaf.sharding, target)
  params = lambda: init_params(model, shape, seed)
  init = lambda: first_state(joined(params), optimizer, num_averages)
  # XLA's CPU backend spends more on optimising the initialisers than it saves
  fast = {"xla_backend_optimization_level": "0"} if mesh.devices.flat[0].platform == "cpu" else None
  return jax.jit(init, out_shardings=where, compiler_options=fast)()


def _bound(table: dict, settings: ml_collections.ConfigDict, field: str, **given) -> Callable:
  """The entry of `table` that `loss.<field>` names, with its options and those of `given` that it
  takes.
  """
  name = settings[field]
  function = lookup(table, name, f"loss.{field}")
  parameters = inspect.signature(function).parameters
  options = dict(settings.options.get(name, {}))
  return functools.partial(
    function, **options, **{k: v for k, v in given.items() if k in parameters}
  )


def make_loss(
  sde: SDE,
  model: nn.Module,
  config: ml_collections.ConfigDict,
  transform: data.Transform | None = None,
) -> Callable:
  """(params, key, batch, first, total, history) -> (mean loss per dimension, (t [b], loss [b])) of
  this part of a global batch.

  The part starts at position `first` of `total`; `key` is the step's, the same on all devices;
  `history` is what the time sampler "loss_second_moment" learns from the pairs. The transform is
  that of the data set; None asks what `config.data` declares, which may read its folder.
  """
  settings = config.loss
  transform = transform or data.transform_of(data.declared(config.data), config.data.centered)
  weighting = _bound(losses.WEIGHTINGS, settings, "weighting")
  objective = _bound(losses.OBJECTIVES, settings, "objective", transform=transform)

  def loss_fn(params, key, batch, first, total, history):
    b = len(batch["image"])
    keys = example_keys(jax.random.fold_in(key, 0), b, first)
    x0, inputs = examples(keys, batch["image"], transform, config)
    quantile = _bound(losses.TIME_SAMPLERS, settings, "time_sampler", history=history)
    law = losses.independent(quantile)
    if settings.stratified:
      law = losses.stratified(quantile, jax.random.fold_in(key, 1), first + jnp.arange(b), total)
    t, ratio = law(fold_in(keys, 2), sde)
    rngs = {"dropout": jax.random.fold_in(jax.random.fold_in(key, 2), first)}
    noise_fn = make_noise_fn(
      sde, model, params, train=True, rngs=rngs, inputs=inputs, **config.parameterization
    )
    draw = {"weighting": weighting, "time_sampler": lambda *_: (t, ratio)}
    labels = _labels(fold_in(keys, 3), batch, model, settings.label_dropout)
    loss = objective(fold_in(keys, 1), sde, noise_fn, x0, labels=labels, **draw) / x0[0].size
    return loss.mean(), (t, loss / ratio)

  return loss_fn


def examples(
  keys: Keys, images: Array, transform: data.Transform, config: ml_collections.ConfigDict
) -> tuple[Array, dict]:
  """(x0 in model units, further inputs of the network) of stored images with one key each: flipped,
  dequantized, augmented.
  """
  if config.data.flip:
    images = augment.flip(fold_in(keys, 4), images)
  dequantize = config.training.dequantize
  x0 = transform.dequantize(fold_in(keys, 0), images) if dequantize else transform.forward(images)
  if not config.data.augment:
    return x0, {}
  x0, conditions = augment.augment(fold_in(keys, 5), x0, config.data.augment)
  return x0, {"augmentation": conditions}


def _labels(keys, batch, model: nn.Module, dropout: float) -> Array | None:
  """The labels where the network has classes, each replaced by "no class" with this
  probability.
  """
  num_classes = getattr(model, "num_classes", 0)
  if not num_classes:
    return None
  drop = jax.vmap(lambda key: jax.random.bernoulli(key, dropout))(keys)
  return jnp.where(drop, num_classes, batch["label"])


def _in_parts(function: Callable, batch: PyTree, num_parts: int) -> tuple[PyTree, PyTree]:
  """(mean, all) of the (values, per-example arrays) that `function(part, offset)` returns, one part
  of the batch after the other.
  """
  if num_parts == 1:
    return function(batch, 0)
  split = lambda x: x.reshape(num_parts, len(x) // num_parts, *x.shape[1:])
  parts = jax.tree.map(split, batch)
  offsets = jnp.arange(num_parts) * len(parts["image"][0])

  def add(total, position):
    values, each = function(*position)
    return jax.tree.map(jnp.add, total, values), each

  shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], (parts, offsets)))[0]
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  total, each = jax.lax.scan(add, zeros, (parts, offsets))
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), each)
  return jax.tree.map(lambda x: x / num_parts, total), flat


def _make_gradients(loss_fn: Callable, specs: PyTree, mesh: Mesh, num_parts: int) -> Callable:
  """(params, key, batch, history) -> (loss, gradients, (t, loss) of every example), mapped over the
  mesh, the parameters lying on it as `specs` say.
  """
  axes, batched = mesh.axis_names, devices.batch_spec(mesh)

  def per_device(shards, key, batch, history):
    b = len(batch["image"])
    first = jax.lax.axis_index(axes) * b

    def part(batch, offset):
      def loss_of(shards):
        whole = devices.gather(shards, specs)
        return loss_fn(whole, key, batch, first + offset, b * mesh.size, history)

      (loss, seen), grads = jax.value_and_grad(devices.regather(loss_of, mesh), has_aux=True)(
        shards
      )
      return (loss, grads), seen

    mean, seen = _in_parts(part, batch, num_parts)
    loss, grads = devices.mean_over_devices(mean, (PartitionSpec(), specs), mesh)
    return loss, grads, seen

  # check_vma=False: the body is pmap's, with its own pmean; with the check the gradients of the
  # replicated parameters would be summed over the devices before it
  whole = PartitionSpec()
  return jax.shard_map(
    per_device,
    mesh=mesh,
    in_specs=(specs, whole, batched, whole),
    out_specs=(whole, specs, batched),
    check_vma=False,
  )


def make_train_step(
  sde: SDE,
  model: nn.Module,
  optimizer: optax.GradientTransformationExtraArgs,
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  num_parts: int = 1,
  transform: data.Transform | None = None,
  make_loss: Callable = make_loss,
) -> Callable:
  """(state, batches) -> (state, metrics), jitted, its gradients mapped over the mesh, donating.

  `batches` is global: {"image": [k, b, *d], "label": [k, b]}, k steps in one call, b a multiple of
  the devices times `num_parts`, the parts that a device takes one after the other. All randomness
  is a function of (seed, step, position in the global batch), so the number of devices and of parts
  changes nothing but rounding; only dropout masks are drawn per part.

  The optimizer works outside of the mapped function: it may need the norm of all gradients, which
  `fsdp` splits. `transform` is for `make_loss`, the training's objective.
  """
  loss_fn, schedule = make_loss(sde, model, config, transform), learning_rate(config)

  def one_step(state: TrainState, batch):
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    specs = devices.state_specs(state.params, mesh)
    gradients = _make_gradients(loss_fn, specs, mesh, num_parts)
    loss, grads, seen = gradients(state.params, key, batch, loss_history(state.opt_state))
    norm, count = global_norm(grads), optax.tree.get(state.opt_state, "total_notfinite")
    usable = jnp.isfinite(loss) & jnp.isfinite(norm)
    told = {"norm": norm, "usable": usable, "times": seen[0], "losses_seen": seen[1]}
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **told)
    params = optax.apply_updates(state.params, updates)
    averages = ema.update(state.ema_params, params, state.step, config)
    keep = functools.partial(jax.lax.select, usable)
    averages = jax.tree.map(keep, averages, state.ema_params)
    metrics = {
      "loss": loss,
      "grad_norm": norm,
      "learning_rate": schedule(state.step - count),
      "skipped_steps": optax.tree.get(opt_state, "total_notfinite"),
      "skipped_in_a_row": optax.tree.get(opt_state, "notfinite_count"),
    }
    new = TrainState(state.step + 1, params, opt_state, averages)
    where = devices.shardings(devices.state_specs(new, mesh), mesh)
    return jax.lax.with_sharding_constraint(new, where), metrics

  def steps(state: TrainState, batches):
    if len(batches["image"]) > 1:
      return jax.lax.scan(one_step, state, batches)
    # no loop around a single step: XLA's CPU backend is slow in loops
    state, metrics = one_step(state, jax.tree.map(lambda x: x[0], batches))
    return state, jax.tree.map(lambda x: x[None], metrics)

  return jax.jit(steps, donate_argnums=0)


def fitting_step(
  make_step: Callable[[int], Callable],
  state: PyTree,
  batches: PyTree,
  per_device: int,
  config: ml_collections.ConfigDict,
  traced: Callable[[], Any],
) -> Callable:
  """The train step, compiled, of the fewest parts per device that `training.batch_per_device` and
  the memory allow, by what XLA says that its program needs.

  Args:
    make_step: number of parts -> train step.
    state, batches: as the step is called, abstract.
    per_device: examples of a batch on each device.
    traced: called before each program is compiled.
  """
  settings = config.training
  memory = settings.memory_gib * 2**30 or devices.memory_limit() or float("inf")
  for num_parts in (n for n in range(1, per_device + 1) if per_device % n == 0):
    if settings.batch_per_device and per_device > num_parts * settings.batch_per_device:
      continue
    step = make_step(num_parts)
    lowered = step.lower(state, batches)
    traced()
    needed = _memory(lowered)
    if needed <= memory:
      if num_parts > 1:
        print(f"training: each batch in {num_parts} parts of {per_device // num_parts} per device")
      return step
  raise RunError(
    f"a training step needs {needed / 2**30:.2f} GiB with one example per device, and there are "
    f"{memory / 2**30:.2f} GiB.\n"
    "  mend:  model.args.remat=True, training.fsdp, or a smaller network"
  )


def _memory(lowered) -> float:
  """Bytes of a program on a device, infinite where the compiler runs out of memory."""
  try:
    sizes = lowered.compile().memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return float("inf")
  held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
  return held + sizes.temp_size_in_bytes


def _calls(start: int, settings: ml_collections.ConfigDict) -> Iterator[tuple[int, int]]:
  """(last step, number of steps) of each call of the train step."""
  step = start
  while step < settings.num_steps:
    size = min(settings.steps_per_call, settings.num_steps - step)
    step += size
    yield step, size


def _due(step: int, size: int, num_steps: int, every: int) -> bool:
  """Whether a multiple of `every` is among the `size` steps up to `step`, or this is the last; 0 is
  never.
  """
  return bool(every) and (step // every > (step - size) // every or step == num_steps)


def _batches(config, split: data.Batch, start: int, mesh: Mesh) -> Iterator[PyTree]:
  """The batches of each call after step `start`, stacked, two calls ahead on the devices."""
  settings, workers = config.training, config.data.num_workers
  source = data.batches(split, settings.batch_size, config.seed, start, num_workers=workers)
  sharding = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
  queue = collections.deque()
  for _, size in _calls(start, settings):
    parts = [next(source) for _ in range(size)]
    stacked = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    queue.append(devices.to_devices(stacked, sharding))
    if len(queue) == 3:
      yield queue.popleft()
  yield from queue


def _scalars(pending: list[PyTree], max_in_a_row: int, step: int) -> dict[str, float]:
  """The metrics of the last step, the loss the mean of those since the last report; too many
  skipped steps in a row end the run, nothing overwritten.
  """
  pending = jax.device_get(pending)
  scalars = {name: float(values[-1]) for name, values in pending[-1].items()}
  losses_seen = np.concatenate([metrics["loss"] for metrics in pending])
  finite = losses_seen[np.isfinite(losses_seen)]
  scalars["loss"] = float(finite.mean()) if len(finite) else float("nan")
  if scalars["skipped_in_a_row"] >= max_in_a_row:
    raise RunError(
      f"loss or gradients were not finite in {scalars['skipped_in_a_row']:.0f} steps in a row, up "
      f"to step {step} (training.max_skipped = {max_in_a_row}); the last checkpoint is intact.\n"
      "  mend:  a new workdir with a smaller optimizer.learning_rate or optimizer.grad_clip"
    )
  return scalars


def _begin(checkpoints: Checkpoints, target: TrainState, num_steps: int):
  """(step, state) of the newest checkpoint that can be read, else (0, None)."""
  found = checkpoints.restore_newest(target)
  if found is None:
    print(f"training: fresh start, {num_steps} steps", flush=True)
    return 0, None
  done = found[0] >= num_steps
  words = f"finished at step {found[0]}" if done else f"resumed at step {found[0]} of {num_steps}"
  print(f"training: {words}", flush=True)
  return found


def _power_averages(state: TrainState, config: ml_collections.ConfigDict) -> dict[str, PyTree]:
  """The items of a snapshot: the averages that `ema.sigma_rel` names."""
  first = len(config.ema.half_life_images)
  return {average(i): tree for i, tree in enumerate(state.ema_params) if i >= first}


def train(
  config: ml_collections.ConfigDict,
  sde: SDE,
  model: nn.Module,
  dataset: data.DataSet,
  mesh: Mesh,
  workdir: Path,
  callbacks: dict[str, Callable[[int, tuple], dict[str, float]]],
  flops_per_image: float = 0.0,
  make_loss: Callable = make_loss,
) -> TrainState:
  """Trains to `training.num_steps`, resuming from the newest checkpoint of the workdir that can be
  read.

  Args:
    callbacks: {"sample_every": ..., "evaluate_every": ...}: (step, ema_params) -> scalars, called
      as often as `training` says under that name, and at the end.
    flops_per_image: of a training step, to tell the utilisation of the devices.
    make_loss: the objective, called and returning as the function of that name.

  Raises:
    Stopped: the run was asked to end; its state is saved.
    RunError: too many steps in a row were skipped, or a checkpoint could not be written.
  """
  settings, optimizer, shape = config.training, make_optimizer(config, sde), dataset.shape
  parts = model, optimizer, shape, mesh, len(ema.decays(config))
  with contextlib.ExitStack() as stack:
    enter = stack.enter_context
    checkpoints = enter(Checkpoints(workdir / "checkpoints", keep=settings.keep_checkpoints))
    target = abstract_state(*parts)
    start, state = _begin(checkpoints, target, settings.num_steps)
    if start >= settings.num_steps:
      return state
    if config.ema.snapshot_every:
      snapshots = enter(Checkpoints(workdir / "ema_snapshots", keep=None))
    write = lambda *_: None
    if devices.is_first():
      write = enter(MetricsWriter(workdir, start, config)).write
    progress = enter(Progress(start, settings, mesh.size, flops_per_image))
    stop, profiler = enter(Stop()), Profiler(workdir, start, settings)
    batches = _batches(config, dataset.splits["train"], start, mesh)
    first = next(batches)
    given = {"transform": dataset.transform, "make_loss": make_loss}
    make_step = functools.partial(make_train_step, sde, model, optimizer, config, mesh, **given)
    begin = lambda: state or init_state(*parts[:3], config.seed, *parts[3:])
    with ThreadPoolExecutor(1) as beside:  # Python and a core are free while XLA compiles the step
      made = functools.cache(lambda: beside.submit(begin))
      per_device = settings.batch_size // mesh.size
      train_step = fitting_step(make_step, target, first, per_device, config, traced=made)
      state = made().result()
    batches, pending = itertools.chain([first], batches), []
    for step, size in _calls(start, settings):
      with progress.waiting():
        batch = next(batches)
      state, metrics = train_step(state, batch)
      pending.append(metrics)
      if step == start + size:
        progress.first_step(step, metrics)
      profiler.step(step, metrics)
      due = functools.partial(_due, step, size, settings.num_steps)
      asked = stop.asked()
      save = due(settings.checkpoint_every) or asked
      if save or due(settings.log_every):
        scalars = _scalars(pending, settings.max_skipped, step)
        write(step, progress.report(step, scalars))
        pending = []
        # parameters that give no finite gradient must not replace those that did
        save = save and not scalars["skipped_in_a_row"]
      if save:
        checkpoints.save(step, state)
      if due(config.ema.snapshot_every):
        snapshots.save_items(step, _power_averages(state, config))
      if asked:
        checkpoints.wait()
        latest = checkpoints.latest()
        raise Stopped(f"stopped at step {step} as asked; the last checkpoint: {latest}")
      for field, callback in callbacks.items():
        if due(settings[field]):
          with progress.paused():
            if told := callback(step, state.ema_params):
              write(step, told)
  return state
