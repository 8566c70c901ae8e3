"""Trains a score model, samples from it, computes its exact likelihood, evaluates it.

python main.py [--config=configs/x.py] [--workdir=runs/x]
               [--mode=train|train_classifier|sample|likelihood|evaluate|run|inspect|validate|import]
               [--wait=minutes] [--config.section.field=value ...]
"""

import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import settings
from errors import check, told
from evaluation import records

logging.set_verbosity(logging.ERROR)
if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
  os.environ.setdefault("NPROC", "8")  # with fewer threads fake CPU devices wait for ever


def run(mode: str, workdir: Path) -> None:
  """Settles the configuration and carries out the mode; a run that is finished only shows its
  table.
  """
  flag = flags.FLAGS["config"]
  overrides = config_flags.get_override_values(flag)
  config = settings.resolve(flag.value, flag.present > 0, overrides, workdir, mode)

  wanted = {"train": [], "train_classifier": [], "run": list(records.SECTIONS)}.get(mode, [mode])
  results = records.finished(config, workdir) if mode == "run" else {}
  if mode == "run" and len(results) == len(wanted):
    print(f"finished before at step {config.training.num_steps}")
  else:
    missing = [name for name in wanted if name not in results]
    results |= work(config, workdir, mode, missing) or {}
  if results:
    print(records.summary(results, workdir))


def work(config: ConfigDict, workdir: Path, mode: str, wanted: list[str]) -> dict | None:
  """Trains or restores, then does the wanted jobs: {job: record}; inspecting and validating need
  neither.
  """
  import jax  # only now: neither a wrong argument nor a finished run need wait for it

  cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/pakhsh/compiled")
  jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
  import devices

  devices.start(flags.FLAGS.coordinator, flags.FLAGS.num_processes, flags.FLAGS.process_id)
  from evaluation import (
    importing,
    inspection,
    jobs,
    page,
    sample_quality,
    train_classifier,
    trained,
    validation,
    watch,
  )
  from tasks import refuse_task

  with devices.ending_together():
    if mode == "import":
      return importing.run(config, workdir)
    if mode in settings.UNTRAINED:
      return {"inspect": inspection.run, "validate": validation.run}[mode](config)
    if mode == "train_classifier":
      train_classifier.run(config, workdir)
      return None
    refuse_task(config, mode)
    if flags.FLAGS.wait:
      results = watch.run(config, workdir, flags.FLAGS.wait)
    else:
      more = {"check_more": sample_quality.plan} if "evaluate" in wanted else {}
      job = trained.start(config, workdir, train=mode in ("train", "run"), **more)
      results = {name: jobs.JOBS[name](job) for name in wanted}
    if results and devices.is_first():
      page.write(workdir)
    return results


def main(_: list[str]) -> None:
  """Runs with the flags, now read."""
  with told():
    wait, mode = flags.FLAGS.wait, flags.FLAGS.mode
    check(not wait or mode == "evaluate", "--wait", wait, "for --mode=evaluate alone")
    run(mode, Path(flags.FLAGS.workdir))


if __name__ == "__main__":
  with told():
    sys.argv = settings.check_command_line(sys.argv)  # first: the config flag reads it when defined
  config_flags.DEFINE_config_file("config", settings.DEFAULT_CONFIG, "The experiment.")
  flags.DEFINE_string("workdir", "runs/digits", "Checkpoints, pictures and results.")
  flags.DEFINE_string("coordinator", "", "host:port of process 0, to run on several hosts.")
  flags.DEFINE_integer("num_processes", 1, "How many processes the run has.")
  flags.DEFINE_integer("process_id", 0, "Which of them this is.")
  flags.DEFINE_float("wait", 0.0, "With --mode=evaluate: minutes to wait for the next checkpoint.")
  flags.DEFINE_enum("mode", "run", settings.MODES, "run: train and all the others.")
  app.run(main)
