"""Several processes: main.py as two of them with two devices each, the order of the data, how the
processes find each other.
"""

import itertools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from jax._src.clusters import OmpiCluster, SlurmCluster

import data
import devices
from errors import ConfigError
from run_control import only_run

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = """
from configs import bases

def get_config():
  return bases.config(
    bases.network("mlp", hidden=(16,)),
    bases.process("vp", beta_min=0.1, beta_max=20.0, t_min=1e-5),
    {
      "optimizer": {"schedule": "constant", "warmup_steps": 2},
      "training": {"num_steps": 50, "batch_size": 8, "log_every": 1, "checkpoint_every": 25},
      "sampling": {"num_steps": 4, "num_samples": 12, "batch_size": 8},
      "likelihood": {"batch_size": 160, "rtol": 1e-2, "atol": 1e-2},
      "evaluation": {"batch_size": 160, "num_levels": 3, "num_draws": 1},
    },
  )
"""

TO_55 = "--config.training.num_steps=55"


def start(workdir, *arguments, num_devices=1):
  """main.py as a process of its own."""
  # without optimisations: the second process can use no compile cache
  flags = f"--xla_force_host_platform_device_count={num_devices}"
  flags += " --xla_backend_optimization_level=0"
  cache = os.path.expanduser("~/.cache/pakhsh/tests")
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": cache}
  config = workdir.with_suffix(".py")
  config.write_text(CONFIG)
  command = [sys.executable, "main.py", f"--config={config}", f"--workdir={workdir}", *arguments]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def start_two(workdir, *arguments):
  """The same as two processes with two devices each."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  flags = [f"--coordinator={address}", "--num_processes=2"]
  processes = (f"--process_id={i}" for i in range(2))
  return [start(workdir, *flags, i, *arguments, num_devices=2) for i in processes]


def end(process):
  """(exit code, stdout, stderr)."""
  try:
    out, error = process.communicate(timeout=150)
  finally:
    process.kill()
  return process.returncode, out, error


def succeeded(process):
  code, out, error = end(process)
  assert code == 0, error
  return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The folders of the same training by one device and by two processes; what the processes
  printed.
  """
  folder = tmp_path_factory.mktemp("hosts")
  one, two = folder / "one", folder / "two"
  processes = [start(one, "--mode=train"), *start_two(two, "--mode=train")]
  _, *printed = map(succeeded, processes)
  return one, two, printed


def losses_of(workdir):
  """{step: loss}."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_two_processes_train_as_one_device(runs):
  one, two, _ = runs
  a, b = losses_of(one), losses_of(two)
  assert list(a) == list(b) == list(range(1, 51))
  np.testing.assert_allclose(list(b.values()), list(a.values()), rtol=1e-5)


def test_only_the_first_process_talks(runs):
  _, _, (first, second) = runs
  assert "4 devices of 2 processes, 2 of them here" in first and "step 50/50" in first
  assert "training" not in second and "devices" not in second


@pytest.mark.exhaustive
def test_two_processes_have_the_likelihood_of_one_device(runs, tmp_path):
  """Of one checkpoint, bit by bit, with a trained law of dequantization; the hosts share the blocks
  and none overwrites another's (PITFALLS, row 35).
  """
  one, two = tmp_path / "one", tmp_path / "two"
  for folder in (one, two):
    shutil.copytree(runs[0], folder)
  options = {"num_examples": 50, "batch_size": 20, "dequantization": "variational"}
  options |= {"dequantizer.num_steps": 3}
  flags = ["--mode=likelihood", *(f"--config.likelihood.{k}={v}" for k, v in options.items())]
  printed = [succeeded(process) for process in [start(one, *flags), *start_two(two, *flags)]]
  assert "bits/dim, 50 examples" in printed[1] and "bits/dim" not in printed[2]
  tables = [dict(np.load(folder / "results" / "likelihood.npz")) for folder in (one, two)]
  for name, column in tables[0].items():
    np.testing.assert_array_equal(column, tables[1][name], err_msg=name)
  assert (np.diff(tables[0]["index"]) > 0).all() and len(tables[0]["index"]) == 50
  names = lambda folder: sorted(p.name for p in folder.rglob("results/likelihood-*/*"))
  blocks = [*(f"draw0_{i:05d}.npz" for i in range(3)), "replicates_00000.npz"]
  assert names(one) == names(two) == blocks


@pytest.mark.exhaustive
def test_two_processes_evaluate_as_one_device(tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  for process in [start(one), *start_two(two)]:
    succeeded(process)
  files = lambda workdir: sorted(p.name for p in (workdir / "results").iterdir())
  assert files(one) == files(two)
  assert {"likelihood.npz", "samples.npz", "evaluate.json"} < set(files(one))
  values = lambda workdir, name: np.load(workdir / "results" / f"{name}.npz")
  assert (values(one, "likelihood")["index"] == values(two, "likelihood")["index"]).all()
  bits = [values(workdir, "likelihood")["bits_per_dim"] for workdir in (one, two)]
  np.testing.assert_allclose(*bits, rtol=1e-3)
  images = [values(workdir, "samples")["image"].astype(int) for workdir in (one, two)]
  assert (images[0] != images[1]).mean() < 0.01
  record = lambda workdir: json.loads((workdir / "results" / "evaluate.json").read_text())
  assert np.isclose(record(one)["loss"], record(two)["loss"], rtol=1e-4)
  assert len(record(two)["devices"]) == 4


def test_a_run_of_two_processes_goes_on_as_one(runs):
  """The processes' checkpoint, on another number of devices; the run on one device goes on too."""
  one, two, _ = runs
  extended = "--mode=train", TO_55
  for process in [start(one, *extended), start(two, *extended)]:
    assert "resumed at step 50 of 55" in succeeded(process)
  a, b = losses_of(one), losses_of(two)
  assert list(b) == list(range(1, 56))
  np.testing.assert_allclose(list(b.values()), list(a.values()), rtol=1e-5)


def wait_for_steps(workdir, num_steps, processes):
  """Returns when the run has logged so many steps."""
  until = time.time() + 120
  path = workdir / "metrics.jsonl"
  while not path.is_file() or len(path.read_text().splitlines()) < num_steps:
    assert time.time() < until and all(process.poll() is None for process in processes)
    time.sleep(0.1)


@pytest.mark.exhaustive
def test_a_sigterm_to_one_process_saves_and_ends_both(tmp_path):
  workdir = tmp_path / "run"
  long = "--config.training.num_steps=1000000", "--config.training.sample_every=0"
  options = *long, "--config.training.evaluate_every=0", "--config.training.steps_per_call=3"
  processes = start_two(workdir, "--mode=train", *options)
  wait_for_steps(workdir, 3, processes)
  processes[1].send_signal(signal.SIGTERM)
  (code, out, _), (second, *_) = map(end, processes)
  last = max(losses_of(workdir))
  assert (code, second) == (0, 0)
  assert f"stopped at step {last} as asked; the last checkpoint: {last}" in out
  assert (workdir / "checkpoints" / str(last) / "commit_success.txt").is_file()


@pytest.mark.exhaustive
def test_a_failure_of_one_process_ends_both_with_its_message(tmp_path):
  workdir = tmp_path / "run"
  with only_run(workdir):
    begin = time.time()
    (code, _, error), (second, *_) = map(end, start_two(workdir, "--mode=train"))
  assert code == 1 and error.startswith("error:") and "is in use" in error
  assert second != 0 and time.time() - begin < 60, "nobody waits for the others"


@pytest.mark.exhaustive
def test_two_processes_put_a_damaged_checkpoint_aside(runs, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(runs[1], workdir)
  last = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
  largest = max((p for p in last.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  os.truncate(largest, largest.stat().st_size // 2)
  outputs = [succeeded(p) for p in start_two(workdir, "--mode=train", TO_55)]
  assert "cannot be read" in outputs[0] and "resumed at step" in outputs[0]
  assert (workdir / "unreadable" / last.name).is_dir()


# the order of the data


def hosts_batches(monkeypatch, num_hosts, split, batch_size, num_batches):
  """The batches of the hosts: [batch, host, example]."""
  monkeypatch.setattr(jax, "process_count", lambda: num_hosts)
  parts = []
  for host in range(num_hosts):
    monkeypatch.setattr(jax, "process_index", lambda host=host: host)
    source = data.batches(split, batch_size, seed=1)
    parts.append([batch["image"] for batch in itertools.islice(source, num_batches)])
  return np.array(parts).swapaxes(0, 1)


def test_four_hosts_have_the_rows_of_one_hosts_batches(monkeypatch):
  split = {"image": np.arange(22)}  # neither the hosts nor the batch divide it
  whole = hosts_batches(monkeypatch, 1, split, 8, 11)
  parts = hosts_batches(monkeypatch, 4, split, 8, 11)
  np.testing.assert_array_equal(parts.reshape(11, 8), whole.reshape(11, 8))
  epochs = np.sort(parts.reshape(4, 22), axis=1)
  np.testing.assert_array_equal(epochs, np.broadcast_to(np.arange(22), (4, 22)))


def test_the_mesh_goes_host_by_host(monkeypatch):
  """However a pod numbers its chips."""
  chips = [types.SimpleNamespace(id=i, process_index=i // 2 % 2) for i in range(8)]
  monkeypatch.setattr(devices, "Mesh", lambda grid, names, axis_types: grid)
  for fsdp in (1, 2, 4):
    grid = devices.make_mesh(fsdp, chips)
    assert grid.shape == (8 // fsdp, fsdp)
    assert [chip.process_index for chip in grid.flat] == [0] * 4 + [1] * 4


# how the processes find each other

SLURM = {
  "SLURM_NTASKS": "4",
  "SLURM_JOB_ID": "7001",
  "SLURM_STEP_NODELIST": "node[01-04]",
  "SLURM_PROCID": "2",
  "SLURM_LOCALID": "0",
}
MPI = {
  "OMPI_COMM_WORLD_SIZE": "4",
  "OMPI_COMM_WORLD_RANK": "2",
  "OMPI_COMM_WORLD_LOCAL_RANK": "0",
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
FOUND = {
  "slurm": SLURM,
  "open mpi": MPI,
  "open mpi 5": {"OMPI_COMM_WORLD_SIZE": "4"},  # jax cannot join these: that is said
  "tpu on gke": {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"},
  "tpu processes": {"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_ID": "1"},
  "tpu slices": {"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "2"},
  "tpu virtual machine": {"TPU_ML_PLATFORM": "JAX"},
  "kubernetes": {"JAX_COORDINATOR_ADDRESS": "job-0.pods:1234"},
}
ALONE = {
  "laptop": {},
  "one task": SLURM | {"SLURM_NTASKS": "1"},
  "batch script without srun": {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"},
  "one mpi process": MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
  "one tpu host": {"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0", "TPU_ML_PLATFORM": "JAX"},
  "no tpu chip": {"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"},
  "indexed job": {"JOB_COMPLETION_INDEX": "2", "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
}


@pytest.fixture
def environment(monkeypatch):
  """Sets variables; those of launchers that are set already go."""

  def use(variables):
    for name in list(os.environ):
      if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_COORD")):
        monkeypatch.delenv(name)
    for name, value in variables.items():
      monkeypatch.setenv(name, value)

  return use


@pytest.mark.parametrize("name", [*FOUND, *ALONE])
def test_the_processes_of_a_launcher_are_found(environment, name):
  environment((FOUND | ALONE)[name])
  assert devices.several_hosts() == (name in FOUND)


def test_jax_finds_what_is_found_here(environment):
  environment(SLURM)
  assert SlurmCluster.is_env_present() and SlurmCluster.get_process_count() == 4
  for name in SLURM:
    environment({k: v for k, v in SLURM.items() if k != name})
    assert not SlurmCluster.is_env_present() and not devices.several_hosts()
  environment(MPI)
  assert OmpiCluster.is_env_present() and OmpiCluster.get_process_count() == 4


@pytest.mark.parametrize(
  "arguments, words",
  [
    (("", 2, 0), "--num_processes = 2 .*\n.*--coordinator"),
    (("", 1, 1), "--process_id = 1 .*\n.*--coordinator"),
    (("here", 2, 0), "--coordinator = 'here' .*\n.*host:port"),
    (("here:1", 0, 0), "--num_processes = 0"),
    (("here:1", 2, 2), "--process_id = 2 .*\n.*from 0 to 1"),
  ],
)
def test_flags_that_do_not_fit_are_refused(environment, arguments, words):
  environment({})
  with pytest.raises(ConfigError, match=words):
    devices.start(*arguments)


def test_processes_that_jax_cannot_join_are_told_what_to_do(environment):
  environment(FOUND["open mpi 5"])
  with pytest.raises(ConfigError, match=r"could not be joined.*\n.*--coordinator=host:port"):
    devices.start("", 1, 0)
