"""What reaches into a training run from outside: a notice to end, a trace of some steps, a second
run in the same folder.
"""

import contextlib
import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from ml_collections import ConfigDict

from errors import ConfigError, invalid


@contextlib.contextmanager
def only_run(workdir: Path) -> Iterator[None]:
  """Makes the workdir and holds its lock; the lock of a killed process is gone with it."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = open(workdir / "lock", "a+")
  except OSError as error:
    reason = f"a folder that can be created and written ({error.strerror})"
    raise invalid("--workdir", str(workdir), reason, "choose another --workdir") from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise ConfigError(
        f"--workdir = {str(workdir)!r} is in use: {file.read().strip()} trains there.\n"
        "  mend:  wait until it ends, stop it, or choose another --workdir"
      ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield


class Stop:
  """Whether the run was asked to end: SIGTERM, or on several hosts jax's preemption notice, which
  a SIGTERM to any of them gives and all of them see after the same call of the train step.
  """

  def __init__(self):
    self._asked, self._calls, self._several = False, 0, jax.process_count() > 1

  def __enter__(self):
    note = lambda *_: setattr(self, "_asked", True)
    if not self._several:
      self._before = signal.signal(signal.SIGTERM, note)
    return self

  def __exit__(self, *_):
    # jax's own handler, which Python does not see, would swallow the signal for ever
    signal.signal(signal.SIGTERM, signal.SIG_DFL if self._several else self._before)

  def asked(self) -> bool:
    """To be asked once after every call of the train step; it waits for no device."""
    if not self._several:
      return self._asked
    self._calls += 1  # jax waits for the number after the largest seen, which steps may leave out
    return multihost_utils.reached_preemption_sync_point(self._calls)


class Profiler:
  """Traces `training.profile_steps` steps, a few after the first, into `workdir/profile`."""

  def __init__(self, workdir: Path, start: int, settings: ConfigDict):
    self._path, self._from = str(workdir / "profile"), start + 5 * settings.steps_per_call
    self._num_steps, self._running = settings.profile_steps, False

  def step(self, step: int, metrics: PyTree) -> None:
    """To be called after every call of the train step."""
    if self._running and step >= self._from + self._num_steps:
      jax.block_until_ready(metrics)
      jax.profiler.stop_trace()
      self._running, self._num_steps = False, 0
      print(f"training: the trace of the steps up to {step} is in {self._path}", flush=True)
    elif self._num_steps and not self._running and step >= self._from:
      jax.block_until_ready(metrics)
      jax.profiler.start_trace(self._path)
      self._running, self._from = True, step
