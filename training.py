"""Training: the state, the optimizer, the train step mapped over all devices, the loop."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import tensorboardX
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree
from tqdm import tqdm

import data
import losses
from checkpoint import Checkpoints
from errors import RunError, lookup
from parameterization import make_noise_fn
from sde_lib import SDE, example_keys, fold_in


class TrainState(NamedTuple):
  """What a run carries from step to step; hyper-parameters come from the config, keys from the
  step.
  """

  step: Int[Array, ""]
  params: PyTree
  opt_state: PyTree
  ema_params: PyTree


# name: (peak, number of steps) -> schedule after the warm-up
SCHEDULES = {
  "constant": lambda peak, num_steps: optax.constant_schedule(peak),
  "cosine": lambda peak, num_steps: optax.cosine_decay_schedule(peak, num_steps),
}


def learning_rate(config: ml_collections.ConfigDict) -> optax.Schedule:
  """Step (from 0) -> learning rate: linear warm-up (step + 1) / warmup_steps times the named
  schedule.
  """
  settings = config.optimizer
  schedule = lookup(SCHEDULES, settings.schedule, "optimizer.schedule")
  decay = schedule(settings.learning_rate, config.training.num_steps)
  return lambda step: jnp.minimum(1.0, (step + 1) / max(1, settings.warmup_steps)) * decay(step)


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """Adam on gradients clipped by their global norm."""
  settings = config.optimizer
  adam = optax.adam(learning_rate(config), b1=settings.beta1, b2=settings.beta2, eps=settings.eps)
  return optax.chain(optax.clip_by_global_norm(settings.grad_clip), adam)


def ema_decay(step: Array, batch_size: int, half_life_images: float, ramp_up: float) -> Array:
  """0.5^(batch / half-life) with the half-life at most `ramp_up` times the images seen (Karras et
  al. 2022, appendix F.2).
  """
  seen = (step + 1) * batch_size
  return 0.5 ** (batch_size / jnp.minimum(half_life_images, jnp.maximum(ramp_up * seen, 1e-8)))


def data_mesh() -> Mesh:
  """All devices along one axis `data`."""
  return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def init_params(model: nn.Module, shape: tuple[int, ...], seed: int) -> PyTree:
  """Initial parameters for examples of `shape`, a function of the seed alone."""
  return model.init(jax.random.key(seed), jnp.zeros((1, *shape)), jnp.ones((1,)))["params"]


def init_state(
  model: nn.Module, optimizer: optax.GradientTransformation, shape, seed: int, mesh: Mesh
) -> TrainState:
  """The state at step 0, replicated over the mesh."""

  def init():
    params = init_params(model, shape, seed)
    return TrainState(
      jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.tree.map(jnp.copy, params)
    )

  # XLA's CPU backend spends 4x longer optimising the initialisers than it saves
  fast = {"xla_backend_optimization_level": "0"} if mesh.devices.flat[0].platform == "cpu" else None
  return jax.jit(init, out_shardings=NamedSharding(mesh, PartitionSpec()), compiler_options=fast)()


def abstract_state(
  model: nn.Module, optimizer: optax.GradientTransformation, shape, mesh: Mesh
) -> TrainState:
  """Shapes, dtypes and shardings of the state, nothing computed: the target of a restore."""
  params = jax.eval_shape(lambda: init_params(model, shape, 0))
  state = TrainState(
    jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params), params
  )
  replicated = NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), state)


def make_loss(sde: SDE, model: nn.Module, config: ml_collections.ConfigDict) -> Callable:
  """(params, key, batch, first, total) -> mean loss per dimension of this part of a global batch.

  The part starts at position `first` of `total`; `key` is the step's, the same on all devices.
  """
  transform = data.transform_of(config.data.name, config.data.centered)
  weighting = lookup(losses.WEIGHTINGS, config.loss.weighting, "loss.weighting")
  quantile = lookup(losses.TIME_SAMPLERS, config.loss.time_sampler, "loss.time_sampler")

  def loss_fn(params, key, batch, first, total):
    integers = batch["image"]
    b = len(integers)
    keys = example_keys(jax.random.fold_in(key, 0), b, first)
    dequantize = config.training.dequantize
    x0 = (
      transform.dequantize(fold_in(keys, 0), integers)
      if dequantize
      else transform.forward(integers)
    )
    times = losses.stratified(quantile, jax.random.fold_in(key, 1), first + jnp.arange(b), total)
    rngs = {"dropout": jax.random.fold_in(jax.random.fold_in(key, 2), first)}
    noise_fn = make_noise_fn(sde, model, params, train=True, rngs=rngs, **config.parameterization)
    labels = batch["label"] if getattr(model, "num_classes", 0) else None
    draw = {"weighting": weighting, "time_sampler": times, "labels": labels}
    return losses.denoising_loss(fold_in(keys, 1), sde, noise_fn, x0, **draw).mean() / x0[0].size

  return loss_fn


def make_train_step(
  sde: SDE,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  config: ml_collections.ConfigDict,
  mesh: Mesh,
) -> Callable:
  """(state, batch) -> (state, metrics), jitted, mapped over the axis `data` of the mesh, donating.

  `batch` is global: {"image": integers [b, *d], "label": [b]}, b a multiple of the devices. All
  randomness is a function of (seed, step, position in the global batch), so the number of devices
  changes nothing but rounding; only dropout masks are drawn per device.
  """
  loss_fn, schedule = make_loss(sde, model, config), learning_rate(config)

  def per_device(state: TrainState, batch):
    b = len(batch["image"])
    total, first = b * mesh.size, jax.lax.axis_index("data") * b
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    loss, grads = jax.value_and_grad(loss_fn)(state.params, key, batch, first, total)
    loss, grads = jax.lax.pmean((loss, grads), "data")
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = ema_decay(state.step, total, config.ema.half_life_images, config.ema.ramp_up)
    ema = jax.tree.map(lambda old, new: new + decay * (old - new), state.ema_params, params)
    norm, rate = optax.tree.norm(grads), schedule(state.step)
    metrics = {"loss": loss, "grad_norm": norm, "learning_rate": rate}
    return TrainState(state.step + 1, params, opt_state, ema), metrics

  # check_vma=False: the body is pmap's, with its own pmean; with the check the gradients of the
  # replicated parameters would be summed over the devices before it
  specs = {"in_specs": (PartitionSpec(), PartitionSpec("data")), "out_specs": PartitionSpec()}
  mapped = jax.shard_map(per_device, mesh=mesh, check_vma=False, **specs)
  return jax.jit(mapped, donate_argnums=0)


class MetricsWriter:
  """Appends scalars to `metrics.jsonl` and to TensorBoard files below the workdir."""

  def __init__(self, workdir: Path, first_step: int):
    self._file = open(workdir / "metrics.jsonl", "a", buffering=1)
    self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """One line {"step": ..., name: value, ...} and one point per scalar."""
    self._file.write(json.dumps({"step": step, **scalars, "time": round(time.time(), 3)}) + "\n")
    for name, value in scalars.items():
      self._board.add_scalar(name, value, step)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._file.close()
    self._board.close()


class Progress:
  """The progress of a run: a bar on a terminal, lines in a log. Previews do not count as training
  time.
  """

  def __init__(self, start: int, settings: ml_collections.ConfigDict):
    self._total, self._batch_size, self._from = settings.num_steps, settings.batch_size, start
    self._bar = tqdm(total=self._total, initial=start, desc="training", unit="step", disable=None)
    self._mark, self._began = start, time.perf_counter()

  def first_step(self, metrics: PyTree) -> None:
    """Waits for the first step, tells how long it took to come, and starts the clock after it."""
    jax.block_until_ready(metrics)
    tqdm.write(f"training: first step after {time.perf_counter() - self._began:.1f} s (compiled)")
    self._mark, self._began = self._from + 1, time.perf_counter()

  def report(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
    """Shows `metrics` and returns them with the images per second since the last report."""
    seconds = time.perf_counter() - self._began
    rate = (step - self._mark) * self._batch_size / seconds if step > self._mark else 0.0
    self._mark, self._began = step, time.perf_counter()
    self._bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {rate:.0f} images/s", refresh=False)
    self._bar.update(step - self._bar.n)
    if self._bar.disable:
      left = (self._total - step) * self._batch_size / rate if rate else float("nan")
      loss = f"loss {metrics['loss']:.4f}"
      print(f"step {step}/{self._total}  {loss}  {rate:.0f} images/s  ETA {left:.0f} s", flush=True)
    return {**metrics, "images_per_second": rate}

  @contextlib.contextmanager
  def paused(self):
    """Stops the clock meanwhile."""
    before = time.perf_counter()
    yield
    self._began += time.perf_counter() - before

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._bar.close()


def finite(step: int, metrics: dict[str, Array]) -> dict[str, float]:
  """The metrics as floats; a loss that is not finite ends the run, nothing overwritten."""
  scalars = {name: float(value) for name, value in metrics.items()}
  if not np.isfinite(scalars["loss"]):
    raise RunError(
      f"the loss is {scalars['loss']} at step {step}; the last checkpoint is intact.\n"
      "  mend:  a new workdir with a smaller optimizer.learning_rate or optimizer.grad_clip"
    )
  return scalars


def train(
  config: ml_collections.ConfigDict,
  sde: SDE,
  model: nn.Module,
  dataset: data.DataSet,
  mesh: Mesh,
  workdir: Path,
  preview: Callable[[int, PyTree], None],
) -> PyTree:
  """Trains to `training.num_steps`, resuming from the newest checkpoint of the workdir; returns the
  EMA parameters.

  Args:
    preview: (step, ema_params) called every `training.sample_every` steps.
  """
  settings, optimizer = config.training, make_optimizer(config)
  with Checkpoints(workdir / "checkpoints", keep=settings.keep_checkpoints) as checkpoints:
    start = checkpoints.latest() or 0
    if start >= settings.num_steps:
      print(f"training: finished at step {start}", flush=True)
      return checkpoints.restore_ema(
        start, abstract_state(model, optimizer, dataset.shape, mesh).ema_params
      )
    if start:
      print(f"training: resumed at step {start} of {settings.num_steps}", flush=True)
      state = checkpoints.restore(start, abstract_state(model, optimizer, dataset.shape, mesh))
    else:
      print(f"training: fresh start, {settings.num_steps} steps", flush=True)
      state = init_state(model, optimizer, dataset.shape, config.seed, mesh)
    train_step = make_train_step(sde, model, optimizer, config, mesh)
    batches = data.batches(dataset.splits["train"], settings.batch_size, config.seed, start)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    with MetricsWriter(workdir, start) as writer, Progress(start, settings) as progress:
      for step in range(start + 1, settings.num_steps + 1):
        batch = jax.tree.map(
          lambda x: jax.make_array_from_process_local_data(sharding, x), next(batches)
        )
        state, metrics = train_step(state, batch)
        if step == start + 1:
          progress.first_step(metrics)
        last = step == settings.num_steps
        save = step % settings.checkpoint_every == 0 or last
        if save or step % settings.log_every == 0:
          scalars = progress.report(step, finite(step, jax.device_get(metrics)))
          writer.write(step, scalars)
        if save:
          checkpoints.save(step, state)
        if step % settings.sample_every == 0 or last:
          with progress.paused():
            preview(step, state.ema_params)
  return state.ema_params
