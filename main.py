"""Trains a score model, samples from it, computes its exact likelihood, evaluates it.

python main.py [--config=configs/x.py] [--workdir=runs/x]
               [--mode=train|sample|likelihood|evaluate|run] [--config.section.field=value ...]
"""

import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

import settings
from errors import ConfigError, RunError

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

  import jax  # after the checks: a wrong argument need not wait for it

  cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/pakhsh/compiled")
  jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
  from evaluation import jobs

  modes = list(jobs.JOBS) if mode == "run" else [mode] if mode in jobs.JOBS else []
  records = jobs.finished(config, workdir) if mode == "run" else {}
  if len(records) < len(modes) or mode == "train":
    job = jobs.start(config, workdir, train=mode in ("train", "run"))
    for name in modes:
      if name not in records:
        records[name] = jobs.JOBS[name](job)
  else:
    print(f"finished before at step {config.training.num_steps}")
  if records:
    print(jobs.summary(records, workdir))


def main(_: list[str]) -> None:
  """Turns what a user can mend into one message and exit code 1."""
  try:
    run(flags.FLAGS.mode, Path(flags.FLAGS.workdir))
  except (ConfigError, RunError) as error:
    sys.exit(f"error: {error}")
  except KeyboardInterrupt:
    sys.exit("\ninterrupted; the same command goes on from the last checkpoint")


if __name__ == "__main__":
  try:
    settings.check_command_line(sys.argv)  # first: the config flag reads the overrides when defined
  except ConfigError as error:
    sys.exit(f"error: {error}")
  config_flags.DEFINE_config_file("config", settings.DEFAULT_CONFIG, "The experiment.")
  flags.DEFINE_string("workdir", "runs/digits", "Checkpoints, pictures and results.")
  flags.DEFINE_enum("mode", "run", settings.MODES, "run: train and all the others.")
  app.run(main)
