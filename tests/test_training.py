"""The train step on any mesh, the loop, resuming, what ends a run."""

import contextlib
import itertools
import json
import os
import re
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import tiny_config, toy_config

import data
import devices
import ema
import losses
import training
from checkpoint import Checkpoints
from errors import ConfigError, RunError, Stopped
from experiment import build
from optimizers import loss_history, make_optimizer
from run_control import only_run


@pytest.fixture(scope="module")
def experiment():
  return build(toy_config())


def some(table, *names):
  """The names of the table; those not given are for the exhaustive run."""
  return [
    name if name in names else pytest.param(name, marks=pytest.mark.exhaustive) for name in table
  ]


def mesh_of(num_devices, fsdp=1):
  return devices.make_mesh(fsdp, jax.devices()[:num_devices])


def stacked(config, experiment, mesh, num_steps, start=0, edit=lambda batch: batch):
  """Batches [1, b, ...] on the mesh."""
  split = experiment.dataset.splits["train"]
  source = data.batches(split, config.training.batch_size, config.seed, start)
  sharding = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
  for batch in itertools.islice(source, num_steps):
    one = {name: values[None] for name, values in edit(batch).items()}
    yield devices.to_devices(one, sharding)


def run_steps(config, mesh, num_steps, num_parts=1, each=lambda state: None, **options):
  """Trains from the initialisation: (state, losses, the compiled step)."""
  experiment = build(config)
  optimizer = make_optimizer(config, experiment.sde)
  shape, averages = experiment.spec.shape, len(ema.decays(config))
  state = training.init_state(experiment.model, optimizer, shape, config.seed, mesh, averages)
  parts = experiment.sde, experiment.model, optimizer, config, mesh
  step, seen = training.make_train_step(*parts, num_parts), []
  each(state)
  for batch in stacked(config, experiment, mesh, num_steps, **options):
    state, metrics = step(state, batch)
    seen.append(float(metrics["loss"][-1]))
    each(state)
  return state, seen, step


def assert_close(first, second, **tolerance):
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance)


def assert_same(first, second):
  assert_close(first, second, rtol=0, atol=0)


@pytest.fixture(scope="module")
def one_device():
  return run_steps(tiny_config(), mesh_of(1), 50)


@pytest.mark.parametrize(
  "num_devices, fsdp",
  [(4, 2), *(pytest.param(*row, marks=pytest.mark.exhaustive) for row in ((4, 1), (2, 1)))],
)
def test_devices_change_nothing_but_rounding(monkeypatch, one_device, num_devices, fsdp):
  monkeypatch.setattr(devices, "SMALLEST_SHARDED", 16)
  _, seen, _ = run_steps(tiny_config(), mesh_of(num_devices, fsdp), 50)
  np.testing.assert_allclose(seen, one_device[1], rtol=1e-5)


@pytest.mark.parametrize(
  "num_devices, num_parts", [(2, 2), pytest.param(1, 4, marks=pytest.mark.exhaustive)]
)
def test_parts_of_a_batch_change_nothing_but_rounding(one_device, num_devices, num_parts):
  _, seen, _ = run_steps(tiny_config(), mesh_of(num_devices), 20, num_parts)
  np.testing.assert_allclose(seen, one_device[1][:20], rtol=1e-5)


def test_several_steps_in_one_call_are_the_same_steps(one_device):
  config, mesh = tiny_config(), mesh_of(1)
  experiment = build(config)
  optimizer = make_optimizer(config, experiment.sde)
  parts = experiment.sde, experiment.model, optimizer, config, mesh
  step = training.make_train_step(*parts)
  state = training.init_state(experiment.model, optimizer, (8, 8, 1), config.seed, mesh)
  batches = list(stacked(config, experiment, mesh, 10))
  state, metrics = step(state, jax.tree.map(lambda *x: jnp.concatenate(x), *batches))
  np.testing.assert_allclose(metrics["loss"], one_device[1][:10], rtol=1e-5)
  assert int(state.step) == 10


def test_gradients_are_means_over_devices(experiment):
  """Adam hides a wrong scale of the gradients, so plain gradient descent is compared."""
  config = toy_config(optimizer__name="sgd", optimizer__warmup_steps=0)
  updated = [run_steps(config, mesh_of(n), 1)[0].params for n in (1, 4)]
  assert_close(*updated, rtol=1e-4, atol=1e-6)


def collectives(config, mesh):
  """How often each collective stands in the compiled train step."""
  experiment = build(config)
  optimizer = make_optimizer(config, experiment.sde)
  state = training.abstract_state(experiment.model, optimizer, (8, 8, 1), mesh)
  step = training.make_train_step(experiment.sde, experiment.model, optimizer, config, mesh)
  text = step.lower(state, next(stacked(config, experiment, mesh, 1))).compile().as_text()
  names = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"
  return {name: len(re.findall(rf"= .*? {name}(-start)?\(", text)) for name in names}


def test_a_step_has_one_all_reduce_and_no_other_collective():
  counts = collectives(tiny_config(), mesh_of(4))
  assert counts.pop("all-reduce") == 1 and not any(counts.values())


def test_fsdp_splits_state_and_gradients(monkeypatch):
  monkeypatch.setattr(devices, "SMALLEST_SHARDED", 16)
  config, mesh = tiny_config(), mesh_of(4, 2)
  counts = collectives(config, mesh)
  assert counts["all-gather"] and counts["reduce-scatter"]
  state, _, _ = run_steps(config, mesh, 1)
  for tree in (state.params, state.opt_state, state.ema_params):
    large = [leaf for leaf in jax.tree.leaves(tree) if leaf.size >= 64]
    halves = [leaf.addressable_shards[0].data.size * 2 == leaf.size for leaf in large]
    assert np.mean(halves) > 0.8, "state that is not split"


def test_step_compiles_once_and_donates_its_state(one_device):
  assert one_device[2]._cache_size() == 1
  states = []
  run_steps(tiny_config(), mesh_of(1), 1, each=states.append)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(states[0].params))


def nan_in_batch(number):
  """Edits the batches so that one of them has values far outside of the floats."""
  count = itertools.count()
  return lambda batch: (
    batch | {"image": batch["image"] * np.float32(np.nan)} if next(count) == number else batch
  )


def test_a_step_without_finite_gradients_is_skipped_and_counted():
  config, states = toy_config(), []
  keep = lambda state: states.append(jax.device_get(state))
  state, seen, _ = run_steps(config, mesh_of(2), 4, each=keep, edit=nan_in_batch(2))
  assert np.isnan(seen[2]) and np.isfinite([seen[0], seen[1], seen[3]]).all()
  assert_same(states[2].params, states[3].params)
  assert_same(states[2].ema_params, states[3].ema_params)
  assert int(state.step) == 4 and not np.allclose(*map(first_leaf, (states[3], states[4])))


def first_leaf(state):
  return np.asarray(jax.tree.leaves(state.params)[-1])


CHAIN = {"sde__name": "ddpm", "sde__args": {"num_steps": 20}, "training__dequantize": False}
DIGITS = {"data__name": "digits", "data__dir": "runs/data"}
TRAININGS = {
  "score_matching": (toy_config, {"loss__objective": "score_matching"}),
  "sliced": (toy_config, {"loss__objective": "sliced_vr", "loss__weighting": "sigmoid"}),
  "edm": (toy_config, {"loss__weighting": "edm", "loss__time_sampler": "log_normal"}),
  "vlb": (
    toy_config,
    CHAIN | DIGITS | {"loss__objective": "vlb", "loss__time_sampler": "loss_second_moment"},
  ),
  "hybrid": (
    tiny_config,
    CHAIN
    | {
      "loss__objective": "hybrid",
      "data__flip": True,
      "loss__time_sampler": "levels",
      "model__args": {"learned_variance": True},
    },
  ),
  "augmented": (
    tiny_config,
    {"data__augment": 0.5, "model__args": {"augment_dim": 9}, "loss__weighting": "min_snr"},
  ),
}


@pytest.mark.parametrize("name", some(TRAININGS, "vlb"))
def test_what_a_configuration_can_ask_for_trains(name):
  make, changes = TRAININGS[name]
  config = make(**changes, parameterization__c_noise="log_snr")
  states = []
  _, seen, _ = run_steps(config, mesh_of(2), 3, each=lambda s: states.append(jax.device_get(s)))
  assert np.isfinite(seen).all()
  assert not np.array_equal(first_leaf(states[0]), first_leaf(states[3]))


def test_a_network_in_bfloat16_has_a_state_in_float32(one_device):
  state, seen, _ = run_steps(toy_config(model__args__dtype="bfloat16"), mesh_of(1), 3)
  floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert {x.dtype for x in floats} == {jnp.dtype("float32")}
  exact = run_steps(toy_config(), mesh_of(1), 3)[1]
  np.testing.assert_allclose(seen, exact, rtol=0.05)
  assert seen != exact


def test_labels_are_dropped_as_often_as_asked():
  model = build(tiny_config()).model.clone(num_classes=10)
  keys = jax.random.split(jax.random.key(0), 4000)
  labels = training._labels(keys, {"label": jnp.full(4000, 3)}, model, 0.25)
  assert set(np.unique(labels)) == {3, 10}
  assert abs(float((labels == 10).mean()) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)


def test_the_losses_of_the_noise_levels_are_remembered():
  config = toy_config(loss__time_sampler="loss_second_moment")
  states = [run_steps(config, mesh_of(n), 3)[0] for n in (1, 4)]
  history = loss_history(states[0].opt_state)
  assert int(history.counts.sum()) == 24 and isinstance(history, losses.LossHistory)
  assert_close(history, loss_history(states[1].opt_state), rtol=1e-4)


def train(experiment, workdir, callback=lambda step, params: {}, mesh=None):
  workdir.mkdir(exist_ok=True)
  parts = experiment.config, experiment.sde, experiment.model, experiment.dataset
  return training.train(*parts, mesh or mesh_of(1), workdir, {"sample_every": callback})


class Killed(Exception):
  """Stands for a kill: nothing after it runs."""


def kill_at(number):
  def callback(step, averages):
    if step == number:
      raise Killed
    return {}

  return callback


OPTIONS = {
  "plain": {},
  "steps_per_call": {"training__steps_per_call": 2},
  "averages": {"ema__half_life_images": (50.0, 100.0), "ema__sigma_rel": (0.1,)},
  "aware": {"loss__time_sampler": "loss_second_moment"},
}


@pytest.mark.parametrize("name", some(OPTIONS, "plain", "averages"))
def test_a_killed_run_resumes_bit_for_bit(tmp_path, capsys, name):
  experiment = build(toy_config(**OPTIONS[name], training__num_steps=8))
  straight = jax.device_get(train(experiment, tmp_path / "straight"))
  assert "fresh start" in capsys.readouterr().out
  with pytest.raises(Killed):
    train(experiment, tmp_path / "killed", kill_at(4 if "steps" in name else 3))
  resumed = jax.device_get(train(experiment, tmp_path / "killed"))
  assert re.search("resumed at step [34] of 8", capsys.readouterr().out)
  assert_same(straight, resumed)
  again = jax.device_get(train(experiment, tmp_path / "killed"))
  assert "finished at step 8" in capsys.readouterr().out
  assert_same(straight, again)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_the_step_of_a_run_compiles_once_fresh_or_resumed(
  experiment, tmp_path, caplog, num_devices
):
  """It is compiled beside the initialisation, for a state that is not there yet."""
  for begin in ("fresh", "resumed"):
    caplog.clear()
    with jax.log_compiles(), contextlib.suppress(Killed):
      train(experiment, tmp_path, kill_at({"fresh": 3}.get(begin)), mesh_of(num_devices))
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA" in r.getMessage()]
    assert sum("jit(steps)" in message for message in compiled) == 1, (begin, compiled)


def lines_of(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_written_once_per_step_and_for_tensorboard(experiment, tmp_path):
  with pytest.raises(Killed):
    train(experiment, tmp_path, kill_at(6))
  (tmp_path / "checkpoints" / "6" / "commit_success.txt").unlink()
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 6, "lo')
  train(experiment, tmp_path, lambda step, averages: {"seen": float(step)})
  lines = [line for line in lines_of(tmp_path) if "loss" in line]
  assert [line["step"] for line in lines] == [2, 3, 4, 6]
  names = {"loss", "grad_norm", "learning_rate", "images_per_second", "input_wait", "skipped_steps"}
  assert all(names <= line.keys() for line in lines)
  assert [line["step"] for line in lines_of(tmp_path) if "seen" in line] == [6]
  assert list((tmp_path / "tensorboard").iterdir())


def test_the_utilisation_of_the_devices_is_told_where_their_peak_is_known(tmp_path):
  config = toy_config(training__peak_tflops=1e-3)
  experiment = build(config)
  parts = config, experiment.sde, experiment.model, experiment.dataset, mesh_of(2), tmp_path
  training.train(*parts, {}, flops_per_image=100.0)
  for line in lines_of(tmp_path)[1:]:
    rate = line["images_per_second"]
    np.testing.assert_allclose(line["images_per_second_per_device"], rate / 2)
    np.testing.assert_allclose(line["model_flop_utilisation"], rate * 100 / 2e9)


def test_a_checkpoint_restores_onto_another_mesh(monkeypatch, experiment, tmp_path):
  monkeypatch.setattr(devices, "SMALLEST_SHARDED", 16)
  saved = train(experiment, tmp_path)
  optimizer = make_optimizer(experiment.config, experiment.sde)
  for mesh in (mesh_of(4), mesh_of(4, 2)):
    target = training.abstract_state(experiment.model, optimizer, (2,), mesh)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
      state = checkpoints.restore(6, target)
    assert_same(saved, state)
    assert all(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(state))


def damage(folder):
  """Cuts the largest file of a checkpoint in half."""
  files = sorted(folder.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
  os.truncate(files[-1], files[-1].stat().st_size // 2)


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_is_taken(
  experiment, tmp_path, capsys
):
  straight = jax.device_get(train(experiment, tmp_path))
  damage(tmp_path / "checkpoints" / "6")
  resumed = train(experiment, tmp_path)
  output = capsys.readouterr().out
  assert "6 cannot be read" in output and "resumed at step 3" in output
  assert (tmp_path / "unreadable" / "6").is_dir()
  assert_same(straight, jax.device_get(resumed))


def test_without_a_readable_checkpoint_nothing_is_overwritten(experiment, tmp_path):
  train(experiment, tmp_path)
  for step in ("3", "6"):
    damage(tmp_path / "checkpoints" / step)
  with pytest.raises(RunError, match="3 cannot be read"):
    train(experiment, tmp_path)
  assert (tmp_path / "checkpoints" / "3").is_dir()


def test_a_half_deleted_checkpoint_is_not_counted(experiment, tmp_path):
  train(experiment, tmp_path)
  (tmp_path / "checkpoints" / "6" / "commit_success.txt").unlink()
  with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
    assert checkpoints.latest() == 3


@contextlib.contextmanager
def small_disk(num_bytes):
  """No file may grow beyond this: writing fails as on a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_run_with_a_message_and_keeps_what_is_there(tmp_path):
  experiment = build(toy_config(training__num_steps=9, model__args__hidden=(64, 64)))
  with pytest.raises(Killed):
    train(experiment, tmp_path, kill_at(3))
  with small_disk(8000), pytest.raises(RunError, match="could not be written") as raised:
    train(experiment, tmp_path)
  assert "kept:" in str(raised.value) and "3" in str(raised.value)
  # a copy: threads of the failed write may still be at work in this process, as in no later one
  left = shutil.copytree(tmp_path, tmp_path.with_name("left"))
  resumed = jax.device_get(train(experiment, left))
  assert_same(resumed, jax.device_get(train(experiment, tmp_path.with_name("straight"))))


def test_steps_that_are_never_finite_end_the_run_and_keep_the_last_checkpoint(tmp_path):
  wild = {"optimizer__learning_rate": 1e30, "training__checkpoint_every": 1}
  bad = build(toy_config(**wild, training__max_skipped=3, training__num_steps=20))
  with pytest.raises(RunError, match=r"not finite in \d steps in a row.*max_skipped = 3"):
    train(bad, tmp_path)
  steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
  assert steps == [1]


def test_sigterm_saves_and_stops(experiment, tmp_path, capsys):
  def terminate(step, averages):
    if step == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return {}

  with pytest.raises(Stopped, match="stopped at step 4"):
    train(experiment, tmp_path / "stopped", terminate)
  with Checkpoints(tmp_path / "stopped" / "checkpoints", read_only=True) as checkpoints:
    assert checkpoints.latest() == 4
  resumed = jax.device_get(train(experiment, tmp_path / "stopped"))
  assert_same(resumed, jax.device_get(train(experiment, tmp_path / "straight")))


def test_the_host_looks_at_the_devices_only_to_log(monkeypatch, tmp_path):
  """Between two reports nothing waits for the devices."""
  config = toy_config(training__num_steps=30, training__log_every=10)
  with config.unlocked():
    config.training.update(checkpoint_every=30, sample_every=30)
  step, reads, wait, array = [0], set(), jax.block_until_ready, type(jnp.ones(1))
  value = array._value

  def counted(x):
    reads.add(step[0])
    return value.fget(x)

  def asked(self):
    step[0] += 1
    return False

  monkeypatch.setattr(array, "_value", property(counted))
  monkeypatch.setattr(jax, "block_until_ready", lambda x: reads.add(step[0]) or wait(x))
  monkeypatch.setattr(training.Stop, "asked", asked)
  train(build(config), tmp_path)
  assert reads == {0, 10, 20, 30}, "0: the first step, waited for before it is asked to stop"


@pytest.mark.exhaustive
def test_memory_decides_the_parts_of_a_batch(capsys, tmp_path):
  plain = toy_config(training__batch_size=64, training__num_steps=3)
  whole = jax.device_get(train(build(plain), tmp_path / "whole"))
  assert "parts" not in capsys.readouterr().out
  limited = toy_config(training__batch_size=64, training__num_steps=3, training__memory_gib=0.00018)
  parts = jax.device_get(train(build(limited), tmp_path / "parts"))
  assert re.search(r"each batch in \d+ parts of \d+ per device", capsys.readouterr().out)
  assert_close(whole.params, parts.params, rtol=1e-3, atol=1e-5)
  given = toy_config(training__batch_size=64, training__num_steps=3, training__batch_per_device=16)
  train(build(given), tmp_path / "given")
  assert "each batch in 4 parts of 16 per device" in capsys.readouterr().out
  impossible = toy_config(training__memory_gib=1e-6)
  with pytest.raises(RunError, match="one example per device"):
    train(build(impossible), tmp_path / "impossible")


def test_a_second_run_in_a_workdir_is_refused(tmp_path):
  with only_run(tmp_path):
    with pytest.raises(ConfigError, match=f"in use: process {os.getpid()} on "), only_run(tmp_path):
      pass
  with only_run(tmp_path):
    pass


def test_a_profile_is_written(tmp_path):
  train(build(toy_config(training__num_steps=9, training__profile_steps=2)), tmp_path)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_averages_put_together_afterwards_are_those_of_the_training(tmp_path):
  """The average of relative width 0.15 kept while training, and from snapshots of 0.1 and 0.25."""
  options = {"ema__sigma_rel": (0.1, 0.25, 0.15), "ema__snapshot_every": 4}
  config = toy_config(**options, training__num_steps=40, training__log_every=40)
  config.training.update(checkpoint_every=40, sample_every=40)
  state = train(build(config), tmp_path)
  with Checkpoints(tmp_path / "ema_snapshots", read_only=True) as snapshots:
    assert snapshots.steps() == list(range(4, 41, 4))
    stored = [(s, w, i) for s in snapshots.steps() for i, w in ((1, 0.1), (2, 0.25))]
    weights = ema.post_hoc_weights(*zip(*[x[:2] for x in stored]), 40, 0.15)
    trees = [snapshots.restore_item(s, f"ema{i}", state.params) for s, _, i in stored]
  together = jax.tree.map(lambda *x: sum(w * v for w, v in zip(weights, x)), *trees)
  change = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
  error = np.abs(change(together) - change(state.ema_params[3])).max()
  assert error < 0.02 * np.abs(change(state.params) - change(state.ema_params[3])).max()
