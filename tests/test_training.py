"""The train step, the EMA, the schedule; resuming; devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import tiny_config

import data
import training
from checkpoint import Checkpoints
from errors import RunError
from experiment import build


@pytest.fixture(scope="module")
def experiment():
  return build(tiny_config())


def mesh_of(num_devices):
  axis = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((num_devices,), ("data",), axis, devices=jax.devices()[:num_devices])


def run_steps(experiment, config, mesh, num_steps, each=lambda state: None):
  """Trains from the initialisation: (state, losses, the compiled step)."""
  optimizer, shape = training.make_optimizer(config), experiment.dataset.shape
  state = training.init_state(experiment.model, optimizer, shape, config.seed, mesh)
  step = training.make_train_step(experiment.sde, experiment.model, optimizer, config, mesh)
  batches = data.batches(
    experiment.dataset.splits["train"], config.training.batch_size, config.seed
  )
  losses = []
  each(state)
  for _ in range(num_steps):
    batch = jax.device_put(next(batches), NamedSharding(mesh, PartitionSpec("data")))
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
    each(state)
  return state, losses, step


@pytest.fixture(scope="module")
def one_device(experiment):
  return run_steps(experiment, experiment.config, mesh_of(1), 5)


@pytest.mark.parametrize("num_devices", [2, 4])
def test_devices_change_nothing_but_rounding(experiment, one_device, num_devices):
  state, losses, _ = run_steps(experiment, experiment.config, mesh_of(num_devices), 5)
  np.testing.assert_allclose(losses, one_device[1], rtol=2e-6)
  for a, b in zip(jax.tree.leaves(state.ema_params), jax.tree.leaves(one_device[0].ema_params)):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_gradients_are_means_over_devices(experiment):
  """Adam hides a wrong scale of the gradients, so plain gradient descent is compared."""
  import optax

  updated = []
  for num_devices in (1, 4):
    mesh, optimizer = mesh_of(num_devices), optax.sgd(1.0)
    args = experiment.sde, experiment.model, optimizer, experiment.config, mesh
    step = training.make_train_step(*args)
    shape = experiment.dataset.shape
    state = training.init_state(experiment.model, optimizer, shape, 0, mesh)
    batch = {k: v[:8] for k, v in experiment.dataset.splits["train"].items()}
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    updated.append(step(state, batch)[0].params)
  for a, b in zip(*map(jax.tree.leaves, updated)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_step_compiles_once_and_donates_its_state(experiment, one_device):
  assert one_device[2]._cache_size() == 1
  states = []
  run_steps(experiment, experiment.config, mesh_of(1), 1, states.append)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(states[0].params))


def test_ema_equals_its_closed_form(experiment):
  """ema_n = sum_k w_k params_k, w_k = (1 - d_k) prod_{j > k} d_j; the start weighs prod d_j."""
  config, params = tiny_config(ema__half_life_images=20.0, ema__ramp_up=0.5), []
  keep = lambda state: params.append(jax.device_get(state.params))
  state, _, _ = run_steps(experiment, config, mesh_of(1), 5, keep)
  seen = 8 * np.arange(1, 6)
  decays = 0.5 ** (8 / np.minimum(20.0, 0.5 * seen))
  weights = [np.prod(decays)] + [(1 - d) * np.prod(decays[k + 1 :]) for k, d in enumerate(decays)]
  expected = jax.tree.map(
    lambda *p: sum(w * v.astype(np.float64) for w, v in zip(weights, p)), *params
  )
  raw = False
  leaves = zip(*map(jax.tree.leaves, (state.ema_params, expected, params[-1], params[0])))
  for ema, exact, last, first in leaves:
    np.testing.assert_allclose(ema, exact, atol=1e-7)
    raw |= not np.allclose(ema, last, atol=1e-6) and not np.allclose(ema, first, atol=1e-6)
  assert raw, "the EMA is neither the last nor the first parameters"


def test_ema_half_life_is_in_images():
  """After half-life / batch steps an old value weighs one half, whatever the batch size."""
  for batch_size in (10, 50):
    decay = training.ema_decay(jnp.asarray(10**6), batch_size, 1000.0, 0.05)
    np.testing.assert_allclose(decay ** (1000 / batch_size), 0.5, rtol=1e-4)


def test_learning_rate_warms_up_from_its_first_fraction_and_ends_at_zero():
  config = tiny_config(
    optimizer__warmup_steps=4, training__num_steps=100, optimizer__learning_rate=0.1
  )
  rate = training.learning_rate(config)
  np.testing.assert_allclose(rate(0), 0.1 / 4, rtol=1e-6)
  np.testing.assert_allclose(rate(50), 0.05, rtol=1e-6)
  assert rate(100) < 1e-8


class Killed(Exception):
  """Stands for a kill: nothing after it runs."""


def train(experiment, workdir, preview=lambda step, params: None, mesh=None):
  workdir.mkdir(exist_ok=True)
  parts = experiment.config, experiment.sde, experiment.model, experiment.dataset
  return training.train(*parts, mesh or mesh_of(1), workdir, preview)


def final_state(experiment, workdir, mesh):
  optimizer = training.make_optimizer(experiment.config)
  target = training.abstract_state(experiment.model, optimizer, experiment.dataset.shape, mesh)
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    return checkpoints.restore(checkpoints.latest(), target)


def test_a_killed_run_resumes_bit_for_bit(experiment, tmp_path, capsys):
  def kill(step, params):
    if step == 3:
      raise Killed

  ema = train(experiment, tmp_path / "straight")
  assert "fresh start" in capsys.readouterr().out
  with pytest.raises(Killed):
    train(experiment, tmp_path / "killed", kill)
  resumed = train(experiment, tmp_path / "killed")
  assert "resumed at step 3" in capsys.readouterr().out
  for a, b in zip(jax.tree.leaves(ema), jax.tree.leaves(resumed)):
    np.testing.assert_array_equal(a, b)
  states = [final_state(experiment, tmp_path / name, mesh_of(1)) for name in ("straight", "killed")]
  for a, b in zip(*map(jax.tree.leaves, states)):
    np.testing.assert_array_equal(a, b)


def test_a_checkpoint_restores_onto_another_number_of_devices(experiment, tmp_path):
  ema = train(experiment, tmp_path)
  state = final_state(experiment, tmp_path, mesh_of(4))
  for a, b in zip(jax.tree.leaves(ema), jax.tree.leaves(state.ema_params)):
    np.testing.assert_array_equal(a, b)
    assert len(b.sharding.device_set) == 4


def test_a_half_deleted_checkpoint_is_not_counted(experiment, tmp_path):
  train(experiment, tmp_path)
  (tmp_path / "checkpoints" / "6" / "commit_success.txt").unlink()
  with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
    assert checkpoints.latest() == 3


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
  bad = build(tiny_config(optimizer__learning_rate=1e30, training__checkpoint_every=1))
  with pytest.raises(RunError, match=r"the loss is (nan|inf) at step"):
    train(bad, tmp_path)
  steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
  assert steps == [1]


def test_metrics_are_written_as_lines_and_for_tensorboard(experiment, tmp_path):
  import json

  train(experiment, tmp_path)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [2, 3, 4, 6]
  assert all(
    {"loss", "grad_norm", "learning_rate", "images_per_second"} <= line.keys() for line in lines
  )
  assert list((tmp_path / "tensorboard").iterdir())
