"""Checkpoints by orbax: written in the background, atomic, restored onto the devices at hand."""

import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import preservation_policy, save_decision_policy

import devices
from errors import RunError

logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax tells every step of every save

STATE = "state"


def average(index: int) -> str:
  """The item of a checkpoint that holds one of the averages of the parameters."""
  return f"ema{index}"


def complete_steps(directory: Path) -> list[int]:
  """The steps of the checkpoints below `directory`, in order, also while another process writes
  there. A half-deleted step has lost its commit file: not counted.
  """
  commits = directory.glob("*/commit_success.txt")
  return sorted(int(path.parent.name) for path in commits if path.parent.name.isdigit())


def _first_line(error: Exception) -> str:
  """What an error says, in short: those of the storage go on for pages."""
  return str(error).splitlines()[0][:300] if str(error) else type(error).__name__


class Checkpoints:
  """The checkpoints of a run below `directory`: the train state, and each average of the parameters
  as an item of its own.

  Use as a context manager: leaving it waits for the last save.

  Args:
    keep: how many of the newest checkpoints stay; None: all.
  """

  def __init__(self, directory: str | Path, *, keep: int | None = 2, read_only: bool = False):
    self.directory = Path(directory).absolute()
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        read_only=read_only,
        create=not read_only,
        cleanup_tmp_directories=not read_only,
        save_decision_policy=save_decision_policy.FixedIntervalPolicy(1),
        preservation_policy=preservation_policy.LatestN(keep),
      ),
    )

  def steps(self) -> list[int]:
    """The complete steps."""
    return complete_steps(self.directory)

  def latest(self) -> int | None:
    """The newest complete step, None without one."""
    return max(self.steps(), default=None)

  def save(self, step: int, state: PyTree) -> None:
    """Writes `state` (a `TrainState`) in the background; donating it afterwards is safe."""
    averages = {average(i): tree for i, tree in enumerate(state.ema_params)}
    self.save_items(step, {STATE: state._replace(ema_params=None)} | averages)

  def save_items(self, step: int, items: dict[str, PyTree]) -> None:
    """Writes named trees in the background; a step that is there stays as it is."""
    if step in self.steps():
      return
    args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    try:
      self._manager.save(step, args=ocp.args.Composite(**args))
    except Exception as error:  # of the save before: whatever the file system raises
      raise self._unwritten(error) from error

  def restore(self, step: int, target: PyTree) -> PyTree:
    """The `TrainState` saved at `step`, in the shapes, dtypes and shardings of `target` (abstract
    or real).
    """
    resume = self.restore_item(step, STATE, target._replace(ema_params=None))
    averages = enumerate(target.ema_params)
    read = tuple(self.restore_item(step, average(i), tree) for i, tree in averages)
    return resume._replace(ema_params=read)

  def restore_newest(self, target: PyTree) -> tuple[int, PyTree] | None:
    """(step, state) of the newest checkpoint that can be read, None where there is none; those that
    cannot be are moved out of the way and said.
    """
    steps = self.steps()
    for step in reversed(steps):
      try:
        return step, self.restore(step, target)
      except RunError as error:
        failure = error
        if step != steps[0]:
          aside = self.directory.with_name("unreadable") / str(step)
          print(f"{error}\n  the one before it is taken; this one is kept as {aside}", flush=True)
          self._put_aside(step, aside)
    if steps:
      raise failure
    return None

  def _put_aside(self, step: int, aside: Path) -> None:
    if devices.is_first():
      aside.parent.mkdir(exist_ok=True)
      (self.directory / str(step)).rename(aside)
    devices.wait_for_all("put aside")
    self._manager.reload()

  def restore_item(self, step: int, item: str, target: PyTree) -> PyTree:
    """One named tree of the step, in the shapes, dtypes and shardings of `target`."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
    try:
      args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
      return self._manager.restore(step, args=args)[item]
    except Exception as error:  # a damaged file can raise anything
      reason = _first_line(error)
      raise RunError(f"checkpoint {self.directory}/{step} cannot be read: {reason}") from error

  def _unwritten(self, error: Exception) -> RunError:
    return RunError(
      f"a checkpoint could not be written below {self.directory}: {_first_line(error)}\n"
      f"  kept:  the checkpoints of the steps {', '.join(map(str, self.steps())) or 'none'}\n"
      "  mend:  make room there; the same command goes on from the newest of them"
    )

  def wait(self) -> None:
    """Returns when the last save is complete."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:  # whatever the file system raises
      raise self._unwritten(error) from error

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    try:
      self.wait()
    except RunError:
      if kind is None:  # else the first failure is the one to tell
        raise
    finally:
      self._manager.close()
