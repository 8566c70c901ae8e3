"""How much the training loop costs over the bare train step: python -m evaluation.loop_overhead
[rounds].

Rounds of the real loop (input, logging) alternate with rounds of the compiled step on one batch
that lies on the device, in one process, so that a busy machine slows both; the medians are
compared.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import settings
import training
from experiment import build
from optimizers import make_optimizer

STEPS = 40  # of each kind in a round


def measure(rounds: int) -> tuple[np.ndarray, np.ndarray]:
  """Seconds per step of each round: (in the loop, bare)."""
  config = settings.load_config_file(settings.DEFAULT_CONFIG)
  every = dict.fromkeys(("log_every", "sample_every"), STEPS)
  rare = dict.fromkeys(("checkpoint_every", "evaluate_every"), STEPS * (rounds + 1))
  config.training.update({"num_steps": STEPS * (rounds + 1), **every, **rare})
  experiment = build(config)
  sde, model, mesh, shape = experiment.sde, experiment.model, experiment.mesh, experiment.spec.shape
  optimizer, split = make_optimizer(config, sde), experiment.dataset.splits["train"]
  step = training.make_train_step(sde, model, optimizer, config, mesh)
  state = [training.init_state(model, optimizer, shape, config.seed, mesh)]
  size = config.training.batch_size
  batch = jax.device_put({name: values[None, :size] for name, values in split.items()})
  bare = []

  def time_bare(*_):
    begin = time.perf_counter()
    for _ in range(STEPS):
      state[0], metrics = step(state[0], batch)
    jax.block_until_ready(metrics)
    bare.append((time.perf_counter() - begin) / STEPS)

  time_bare()
  with tempfile.TemporaryDirectory() as workdir:
    parts = config, sde, model, experiment.dataset, mesh, Path(workdir)
    training.train(*parts, {"sample_every": time_bare})
    text = (Path(workdir) / "metrics.jsonl").read_text()
  loop = [size / json.loads(line)["images_per_second"] for line in text.splitlines()]
  return np.array(loop[1:]), np.array(bare[2:])  # without the rounds that compiled


def main() -> None:
  """Prints the medians and their ratio."""
  loop, bare = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
  pairs = np.median(loop / bare)
  print(f"bare step {np.median(bare) * 1e3:.2f} ms, in the loop {np.median(loop) * 1e3:.2f} ms")
  print(f"overhead, median of {len(loop)} rounds: {100 * (pairs - 1):+.1f} %")


if __name__ == "__main__":
  main()
