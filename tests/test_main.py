"""The program as a user runs it: one tiny run with all modes, the second run, bad input."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_arguments

ROOT = pathlib.Path(__file__).parent.parent
ENVIRONMENT = os.environ | {
  "JAX_COMPILATION_CACHE_DIR": os.path.expanduser("~/.cache/pakhsh/tests"),
  "XLA_FLAGS": "",
}


def call(*arguments):
  """(exit code, everything printed) of main.py."""
  command = [sys.executable, "main.py", *map(str, arguments)]
  done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
  return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The workdir of a tiny run and what it printed."""
  workdir = tmp_path_factory.mktemp("run") / "digits"
  code, output = call(f"--workdir={workdir}", *tiny_arguments())
  assert code == 0, output
  return workdir, output


def record(workdir, mode):
  return json.loads((workdir / "results" / f"{mode}.json").read_text())


def test_a_run_leaves_everything_a_user_looks_for(run):
  workdir, output = run
  for words in (
    "fresh start",
    "step 6/6",
    "ETA",
    "test bits/dim, 297 examples",
    "Gaussian mixture",
  ):
    assert words in output
  likelihood = record(workdir, "likelihood")
  assert likelihood["num_examples"] == 297
  keys = {"bits_per_dim", "standard_error", "nfe_mean", "seconds", "baseline_bits_per_dim"}
  assert keys <= likelihood.keys()
  for mode in ("sample", "likelihood", "evaluate"):
    entries = record(workdir, mode)
    assert entries["checkpoint_step"] == 6 and entries["config"]["model"]["args"]["nf"] == 8
    assert {"versions", "seed", "seconds", "config_digest", "devices"} <= entries.keys()
  pictures = (
    "results/samples",
    "results/process",
    "results/loss_per_noise_level",
    "samples/step_000003",
  )
  for picture in pictures:
    assert np.asarray(Image.open(workdir / f"{picture}.png")).std() > 10


def test_every_test_image_is_counted_once(run):
  table = np.load(run[0] / "results" / "likelihood.npz")
  assert table["index"].tolist() == list(range(297))
  assert np.isclose(table["bits_per_dim"].mean(), record(run[0], "likelihood")["bits_per_dim"])


def test_a_second_run_says_that_it_is_finished_and_shows_the_table(run):
  workdir, output = run
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
  code, again = call(f"--workdir={workdir}")
  assert code == 0 and "finished before at step 6" in again and "training:" not in again
  assert again.splitlines()[-8:] == output.splitlines()[-8:]
  assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_run_cannot_be_trained_to_fewer_steps_than_it_has(run):
  config = (run[0] / "config.json").read_bytes()
  code, output = call(f"--workdir={run[0]}", "--mode=train", "--config.training.num_steps=2")
  assert code == 1 and "Traceback" not in output
  assert "training.num_steps = 2" in output and "6 or more" in output
  assert (run[0] / "config.json").read_bytes() == config


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--config.training.batch_sise=8"], ["batch_sise", "did you mean", "batch_size"]),
    (["--config.training.batch_size=x"], ["--config.training.batch_size = 'x'", "int"]),
    (["--config.sde.name=vpp"], ["sde.name = 'vpp'", "'sub_vp'", "'ve'"]),
    (["--mode=sample"], ["--workdir", "trained before", "train first"]),
    (["--mode=smaple"], ["mode", "smaple", "sample"]),
    (["--config=configs/none.py"], ["configs/none.py", "configs/digits.py"]),
    (["--workdir=/dev/null/run"], ["--workdir", "/dev/null/run", "choose another"]),
  ],
)
def test_bad_input_gets_one_message_and_exit_code_1(tmp_path, arguments, words):
  workdir = [] if "--workdir" in arguments[0] else [f"--workdir={tmp_path / 'run'}"]
  code, output = call(*arguments, *workdir)
  assert code == 1 and "Traceback" not in output, output
  assert all(word in output for word in words), output
  assert not (tmp_path / "run").exists()
