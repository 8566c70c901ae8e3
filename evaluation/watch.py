"""Evaluates the checkpoints of a training that is running, as they appear."""

import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from checkpoint import complete_steps
from errors import check
from evaluation import jobs, records, trained

PAUSE = 10.0  # seconds between two looks at the folder


def run(config: ConfigDict, workdir: Path, minutes: float) -> dict[str, dict]:
  """{"evaluate": record} of the last checkpoint, after that of every one before it that was newest
  at some look; ends with the training, or when nothing new came for so many minutes.
  """
  check(jax.process_count() == 1, "--wait", minutes, "0 on several hosts")
  results, seen, until = {}, -1, time.monotonic() + 60 * minutes
  while seen < config.training.num_steps:
    step = max(complete_steps(workdir / "checkpoints"), default=-1)
    if step > seen:
      job = trained.start(config, workdir, train=False)
      results, seen = {"evaluate": jobs.run_evaluate(job)}, job.step
      if seen < config.training.num_steps:  # else the caller shows it
        print(records.summary(results, workdir), flush=True)
      until = time.monotonic() + 60 * minutes
    elif time.monotonic() > until:
      print(f"no checkpoint after step {seen} for {minutes:g} minutes: stopped waiting", flush=True)
      break
    else:
      time.sleep(min(PAUSE, 60 * minutes))
  return results
