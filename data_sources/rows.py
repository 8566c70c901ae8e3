"""Rows of .npy files: appended while a data set is prepared, gathered while it is used.

Worker processes import this file, so it needs numpy alone.
"""

import mmap
from pathlib import Path

import numpy as np


class Appender:
  """Writes an .npy file row by row, their number unknown until it is closed."""

  def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype):
    self._shape, self._dtype, self.num_rows = shape, np.dtype(dtype), 0
    self._file = path.open("wb")
    self._write_header()

  def _write_header(self) -> None:
    # numpy pads the header so that the first axis can grow in place
    header = {"descr": self._dtype.str, "fortran_order": False}
    np.lib.format.write_array_header_1_0(
      self._file, header | {"shape": (self.num_rows, *self._shape)}
    )

  def append(self, rows: np.ndarray) -> None:
    """Appends `rows` [k, *shape]."""
    if rows.shape[1:] != self._shape:
      raise ValueError(f"rows of shape {rows.shape[1:]} in an array of {self._shape}")
    self._file.write(np.ascontiguousarray(rows, self._dtype).data)
    self.num_rows += len(rows)

  def close(self) -> None:
    """Writes the number of rows."""
    self._file.seek(0)
    self._write_header()
    self._file.close()


def _is_file(array: np.ndarray) -> bool:
  """Whether `array` is a whole memory-mapped file, not a part of one."""
  return isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap)


class Gather:
  """Takes rows of every array of a split. Memory-mapped arrays reach another process as names of
  files, not as gigabytes.
  """

  def __init__(self, split: dict[str, np.ndarray]):
    self._split = split

  def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of `indices` [b]."""
    return {name: array[indices] for name, array in self._split.items()}

  def __getstate__(self) -> dict:
    return {k: Path(v.filename) if _is_file(v) else v for k, v in self._split.items()}

  def __setstate__(self, state: dict) -> None:
    self._split = {
      k: np.load(v, mmap_mode="r") if isinstance(v, Path) else v for k, v in state.items()
    }
