"""Files that are there whole or not at all, and those that one host writes for all."""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

import devices
import settings


def write(path: Path, fill: Callable[[BinaryIO], None]) -> None:
  """Writes what `fill` puts into the file, and makes its folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with settings.written_whole(path) as temporary, open(temporary, "wb") as file:
    fill(file)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
  """The same of an npz file."""
  write(path, lambda file: np.savez(file, **arrays))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
  """The arrays of an npz file."""
  with np.load(path) as file:
    return {name: file[name] for name in file.files}


def made_once(path: Path, fill: Callable[[BinaryIO], None]) -> Path:
  """`path`, which the first host writes where it is not there yet and the others wait for."""
  if devices.is_first() and not path.is_file():
    write(path, fill)
  devices.wait_for_all(path.name)
  return path
