"""Trains a small network on digits, killed again and again, and compares the end with a training
that nothing disturbed:

python -m evaluation.kill_run [kills=20] [steps=200] [config.section.field=value ...]

Every start is `python main.py --mode=train` with the same arguments, as a process group of its own
that gets SIGKILL at a random moment: half of them while it starts, half while it trains and saves.
After the last kill it runs to its end; then parameters, optimizer state, averages and losses must
be equal to the last bit.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parent.parent
SMALL = {
  "model.args.nf": 8,
  "model.args.ch_mult": (1,),
  "model.args.attn_resolutions": (),
  "training.batch_size": 32,
  "training.log_every": 5,
  "training.checkpoint_every": 5,
  "training.sample_every": 0,
  "training.evaluate_every": 0,
}


def start(workdir: Path, log: Path, settings: dict) -> subprocess.Popen:
  """main.py in a process group of its own, printing into `log`."""
  arguments = [f"--config.{name}={value}" for name, value in settings.items()]
  command = [sys.executable, "main.py", "--mode=train", f"--workdir={workdir}", *arguments]
  with open(log, "w") as file:
    options = {"stdout": file, "stderr": file, "start_new_session": True}
    return subprocess.Popen(command, cwd=ROOT, **options)


def first_report(process: subprocess.Popen, log: Path) -> float:
  """Seconds until the process tells its first step or ends."""
  began = time.perf_counter()
  while process.poll() is None and "\nstep " not in log.read_text():
    time.sleep(0.02)
  return time.perf_counter() - began


def run_to_end(workdir: Path, settings: dict) -> tuple[str, float, float]:
  """What the undisturbed process printed, the seconds to its first report and from there to its
  end.
  """
  log = workdir.with_suffix(".log")
  process = start(workdir, log, settings)
  first, began = first_report(process, log), time.perf_counter()
  if process.wait():
    sys.exit(f"the training ended with exit code {process.returncode}:\n{log.read_text()}")
  return log.read_text(), first, time.perf_counter() - began


def kill(seconds: float, training: bool, workdir: Path, settings: dict) -> str:
  """What the process printed until it and its workers were killed, so long after its start or, if
  `training`, its first report.
  """
  log = workdir.with_suffix(".log")
  process = start(workdir, log, settings)
  if training:
    first_report(process, log)
  try:
    process.wait(seconds)
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
  return log.read_text()


def said(output: str) -> str:
  """How far a process came, in its own words: where it began and the last step that it told."""
  began = re.findall(r"training: ((?:fresh|resumed|finished).*)", output)
  steps = re.findall(r"^step (\d+)/", output, re.MULTILINE)
  wrong = re.findall(r"^(?:error|Traceback).*", output, re.MULTILINE)
  last = [f"last told step {steps[-1]}"] if steps else []
  return "; ".join([*(began or ["killed before it began"]), *last, *wrong])


def final_arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
  """Every array of the checkpoint: parameters, optimizer state, averages."""
  arrays = {}
  folder = workdir / "checkpoints" / str(step)
  for item in sorted(path for path in folder.iterdir() if (path / "_METADATA").is_file()):
    tree = ocp.StandardCheckpointer().restore(item.absolute())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      arrays[item.name + jax.tree_util.keystr(path)] = np.asarray(leaf)
  return arrays


def losses(workdir: Path) -> list[tuple[int, float]]:
  """(step, loss) of every report."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [(line["step"], line["loss"]) for line in map(json.loads, lines) if "loss" in line]


def differences(straight: Path, killed: Path, step: int) -> list[str]:
  """Names of the arrays that are not the same to the last bit."""
  a, b = (final_arrays(workdir, step) for workdir in (straight, killed))
  names = [n for n in a.keys() | b.keys() if n not in a or n not in b]
  names += [n for n in a.keys() & b.keys() if a[n].tobytes() != b[n].tobytes()]
  return sorted(names) + ["metrics.jsonl"] * (losses(straight) != losses(killed))


def kill_run(kills: int, folder: Path, settings: dict) -> list[str]:
  """Prints the table of the kills and returns what differs in the end."""
  straight, killed = folder / "straight", folder / "killed"
  run_to_end(straight, settings)
  _, first, rest = run_to_end(folder / "warm", settings)  # with a compile cache
  print(f"undisturbed: first report after {first:.1f} s, end {rest:.1f} s later")
  print(f"{'kill':>4}  {'after':<20}  what the process said")
  rng = random.Random(0)
  for number in range(1, kills + 1):
    training = rng.random() < 0.5
    seconds = rng.uniform(0, 2 * rest / kills if training else first)
    words = said(kill(seconds, training, killed, settings))
    after = f"{seconds:4.1f} s {'of training' if training else ''}"
    print(f"{number:4d}  {after:<20}  {words}", flush=True)
  print(f"{'end':>4}  {'':<20}  {said(run_to_end(killed, settings)[0])}")
  return differences(straight, killed, settings["training.num_steps"])


def main() -> None:
  """Reads the arguments and prints the verdict."""
  given = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
  kills, steps = int(given.pop("kills", 20)), int(given.pop("steps", 200))
  changes = {name.removeprefix("config."): value for name, value in given.items()}
  settings = SMALL | {"training.num_steps": steps} | changes
  with tempfile.TemporaryDirectory() as folder:
    different = kill_run(kills, Path(folder), settings)
  if different:
    sys.exit(f"verdict: NOT the same after {kills} kills: {', '.join(different)}")
  print(
    f"verdict: {kills} kills, {steps} steps: every array and every loss the same to the last bit"
  )


if __name__ == "__main__":
  main()
