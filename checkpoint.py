"""Checkpoints by orbax: written in the background, atomic, restored onto the devices at hand."""

import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import preservation_policy, save_decision_policy

from errors import RunError

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells every step of every save


class Checkpoints:
  """The checkpoints of a run below `directory`: the train state, and the EMA parameters as an item
  of their own.

  Use as a context manager: leaving it waits for the last save.

  Args:
    keep: how many of the newest checkpoints stay.
  """

  def __init__(self, directory: str | Path, *, keep: int = 2, read_only: bool = False):
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

  def latest(self) -> int | None:
    """The newest complete step, None without one. A half-deleted step has lost its commit file: not
    counted.
    """
    steps = self._manager.all_steps() if self.directory.is_dir() else []
    complete = (s for s in steps if (self.directory / str(s) / "commit_success.txt").exists())
    return max(complete, default=None)

  def save(self, step: int, state: PyTree) -> None:
    """Writes `state` (a `TrainState`) in the background; donating it afterwards is safe."""
    if step == self.latest():
      return
    resume = state._replace(ema_params=None)
    items = {"state": ocp.args.StandardSave(resume), "ema": ocp.args.StandardSave(state.ema_params)}
    self._manager.save(step, args=ocp.args.Composite(**items))

  def restore(self, step: int, target: PyTree) -> PyTree:
    """The `TrainState` saved at `step`, in the shapes, dtypes and shardings of `target` (abstract
    or real).
    """
    resume = self._read(step, "state", target._replace(ema_params=None))
    return resume._replace(ema_params=self._read(step, "ema", target.ema_params))

  def restore_ema(self, step: int, target: PyTree) -> PyTree:
    """The EMA parameters saved at `step`, in the shapes, dtypes and shardings of `target`."""
    return self._read(step, "ema", target)

  def _read(self, step, item, target):
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
    try:
      args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
      return self._manager.restore(step, args=args)[item]
    except (ValueError, KeyError, FileNotFoundError) as error:
      raise RunError(f"checkpoint {self.directory}/{step} cannot be read: {error}") from error

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._manager.wait_until_finished()
    self._manager.close()
