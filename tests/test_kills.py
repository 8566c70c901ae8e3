"""Runs that are killed: by SIGKILL at random and in their first save; and a second run beside."""

import os
import random
import signal
import time

import pytest
from test_hosts import end, losses_of, start, succeeded, wait_for_steps

from evaluation import kill_run

TRAIN = "--mode=train", "--config.training.checkpoint_every=5", "--config.training.num_steps=60"


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """The folder of a training that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("kills") / "straight"
  succeeded(start(workdir, *TRAIN))
  return workdir


def kill(process):
  """SIGKILL; whether it was still running."""
  running = process.poll() is None
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  return running


def half_saved(workdir):
  """Whether a checkpoint is being written."""
  return any((workdir / "checkpoints").glob("*tmp*"))


@pytest.mark.exhaustive
def test_a_kill_in_the_first_save_costs_nothing_but_time(straight, tmp_path):
  workdir = tmp_path / "run"
  process = start(workdir, *TRAIN)
  while not half_saved(workdir):
    assert process.poll() is None
  assert kill(process) and half_saved(workdir) and (workdir / "lock").is_file()
  assert "training: fresh start" in succeeded(start(workdir, *TRAIN))
  assert kill_run.differences(straight, workdir, 60) == []
  assert not half_saved(workdir)


def test_killed_at_random_a_run_ends_the_same(straight, tmp_path):
  workdir, rng = tmp_path / "run", random.Random(time.time_ns())
  process = start(workdir, *TRAIN)
  wait_for_steps(workdir, 12, [process])
  time.sleep(rng.uniform(0, 0.3))
  assert kill(process)
  output = succeeded(start(workdir, *TRAIN))
  assert "resumed at step" in output or "finished at step 60" in output
  assert kill_run.differences(straight, workdir, 60) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("num_workers", [0, 1])
def test_many_kills(tmp_path, num_workers):
  small = {"training.num_steps": 60, "data.num_workers": num_workers}
  assert kill_run.kill_run(4, tmp_path, kill_run.SMALL | small) == []


def test_a_run_in_use_is_not_touched_and_ends_when_asked(tmp_path):
  workdir = tmp_path / "run"
  long = "--mode=train", "--config.training.num_steps=1000000"
  first = start(workdir, *long)
  wait_for_steps(workdir, 3, [first])
  config = (workdir / "config.json").read_bytes()
  code, _, error = end(start(workdir, "--mode=train", "--config.training.num_steps=1000001"))
  assert code == 1 and f"in use: process {first.pid} on" in error and "Traceback" not in error
  assert (workdir / "config.json").read_bytes() == config
  first.send_signal(signal.SIGTERM)
  code, output, error = end(first)
  assert code == 0 and not error, error
  last = max(losses_of(workdir))
  assert f"stopped at step {last} as asked; the last checkpoint: {last}; the same" in output
