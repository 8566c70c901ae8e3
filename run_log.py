"""What a training run tells: scalars in files, TensorBoard and Weights & Biases, progress on the
terminal.
"""

import contextlib
import importlib.util
import json
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import tensorboardX
from jaxtyping import PyTree
from ml_collections import ConfigDict
from tqdm import tqdm

import devices
import settings
from errors import check

# dense bfloat16 (V100: float16) FLOP/s of one device, by how jax calls it
PEAK_FLOPS = {
  "NVIDIA H200": 989e12,
  "NVIDIA H100": 989e12,
  "NVIDIA A100": 312e12,
  "Tesla V100": 125e12,
  "TPU v6": 918e12,
  "TPU v5p": 459e12,
  "TPU v5": 197e12,
  "TPU v4": 275e12,
  "TPU v3": 123e12,
}


def peak_flops(peak_tflops: float) -> float:
  """FLOP/s of one device: as given, else of the table, 0 where it is not known."""
  kind = jax.devices()[0].device_kind
  known = (peak for name, peak in PEAK_FLOPS.items() if kind.startswith(name))
  return peak_tflops * 1e12 or next(known, 0.0)


def check_wandb(project: str) -> None:
  """Weights & Biases must be installed where a project is named."""
  missing = project and importlib.util.find_spec("wandb") is None
  mend = "pip install wandb, or leave training.wandb empty"
  check(not missing, "training.wandb", project, "empty: the package wandb is not installed", mend)


class MetricsWriter:
  """Writes scalars to `metrics.jsonl`, to TensorBoard files below the workdir and, where
  `training.wandb` names a project, to Weights & Biases.

  A resumed run writes the steps after `first_step` again, so what an earlier one said of them goes.
  """

  def __init__(self, workdir: Path, first_step: int, config: ConfigDict):
    path = workdir / "metrics.jsonl"
    _drop_after(path, first_step)
    self._file = open(path, "a", buffering=1)
    self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)
    self._wandb = None
    if config.training.wandb:
      import wandb  # optional, and slow to import

      options = {"project": config.training.wandb, "dir": str(workdir), "resume": "allow"}
      run_id = settings.digest(config, str(workdir.absolute()))
      self._wandb = wandb.init(**options, id=run_id, config=json.loads(config.to_json()))

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """One line {"step": ..., name: value, ...} and one point per scalar."""
    self._file.write(json.dumps({"step": step, **scalars, "time": round(time.time(), 3)}) + "\n")
    for name, value in scalars.items():
      self._board.add_scalar(name, value, step)
    if self._wandb:
      self._wandb.log(dict(scalars), step=step)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._file.close()
    self._board.close()
    if self._wandb:
      self._wandb.finish()


def _drop_after(path: Path, step: int) -> None:
  """Leaves only whole lines of steps up to `step` in the file."""
  if not path.is_file():
    return
  kept = []
  for line in path.read_text().splitlines():
    with contextlib.suppress(ValueError):  # a kill cut it
      if json.loads(line)["step"] <= step:
        kept.append(line + "\n")
  settings.write_text(path, "".join(kept))


class Progress:
  """The progress of a run: a bar on a terminal, lines in a log. Previews do not count as training
  time.

  Args:
    flops_per_image: of a training step, for the utilisation of the devices; 0: not told.
  """

  def __init__(self, start: int, training: ConfigDict, num_devices: int, flops_per_image: float):
    self._num_devices = num_devices
    self._total, self._batch_size = training.num_steps, training.batch_size
    peak = peak_flops(training.peak_tflops) * num_devices
    self._utilisation = flops_per_image / peak if peak else 0.0
    total, off = self._total, devices.no_bar()
    self._bar = tqdm(total=total, initial=start, desc="training", unit="step", disable=off)
    self._mark, self._began, self._waited = start, time.perf_counter(), 0.0

  def first_step(self, step: int, metrics: PyTree) -> None:
    """Waits for the first call, tells how long it took to come, and starts the clock after it."""
    jax.block_until_ready(metrics)
    tqdm.write(f"training: first step after {time.perf_counter() - self._began:.1f} s (compiled)")
    self._mark, self._began, self._waited = step, time.perf_counter(), 0.0

  @contextlib.contextmanager
  def waiting(self):
    """Counts the time meanwhile as waiting for input."""
    before = time.perf_counter()
    yield
    self._waited += time.perf_counter() - before

  @contextlib.contextmanager
  def paused(self):
    """Stops the clock meanwhile."""
    before = time.perf_counter()
    yield
    self._began += time.perf_counter() - before

  def report(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
    """Shows `metrics` and returns them with the speed since the last report."""
    seconds, steps = time.perf_counter() - self._began, step - self._mark
    rate = steps * self._batch_size / seconds if steps else 0.0
    speed = {
      "images_per_second": rate,
      "images_per_second_per_device": rate / self._num_devices,
      "input_wait": self._waited / seconds if steps else 0.0,
      "eta_seconds": (self._total - step) * self._batch_size / rate if rate else 0.0,
    }
    if self._utilisation:
      speed["model_flop_utilisation"] = rate * self._utilisation
    self._mark, self._began, self._waited = step, time.perf_counter(), 0.0
    self._show(step, metrics, speed)
    return {**metrics, **speed}

  def _show(self, step, metrics, speed):
    words = [f"loss {metrics['loss']:.4f}", f"{speed['images_per_second']:.0f} images/s"]
    if speed["input_wait"] > 0.05:
      words.append(f"waiting for input {speed['input_wait']:.0%}")
    if "model_flop_utilisation" in speed:
      words.append(f"MFU {speed['model_flop_utilisation']:.1%}")
    if metrics["skipped_steps"]:
      words.append(f"{metrics['skipped_steps']:.0f} steps skipped")
    self._bar.set_postfix_str(", ".join(words), refresh=False)
    self._bar.update(step - self._bar.n)
    if self._bar.disable:
      words.append(f"ETA {speed['eta_seconds']:.0f} s")
      print(f"step {step}/{self._total}  {'  '.join(words)}", flush=True)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._bar.close()
