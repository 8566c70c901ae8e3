"""Decoded arrays below `data.dir`: written once, then memory-mapped.

A folder `data.dir/cache/<source>-<hash>` holds {split}_image.npy, {split}_label.npy, rejects.txt
and spec.json. It gets its name when it is whole, so that one that has the name can be used.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from data_sources.rows import Appender
from data_sources.spec import Spec, Split, held_out, with_held_out
from errors import ConfigError, check, invalid

VERSION = 1  # of the format: a change makes all caches anew
STALE_SECONDS = 3600
SHOWN = 10


class Chunk(NamedTuple):
  """Consecutive examples of one split, the first of them number `first` of what was found."""

  split: str
  first: int
  image: np.ndarray
  label: np.ndarray | None = None


class Contents(NamedTuple):
  """What a source holds, known before it is decoded. `chunks()` gives the examples in order, and
  a line of text for every one that turns out to be unusable.
  """

  spec: Spec
  sizes: dict[str, int]
  chunks: Callable[[], Iterator[Chunk | str]]
  classes: tuple[str, ...] = ()
  rejects: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Source:
  """A source by what its decoded arrays depend on; `contents()` may take long."""

  name: str
  key: tuple
  contents: Callable[[], Contents]

  def folder(self, settings: ConfigDict) -> Path:
    """Where its decoded arrays lie."""
    key = json.dumps([VERSION, settings.held_out, *self.key]).encode()
    name = f"{self.name}-{hashlib.sha256(key).hexdigest()[:16]}"
    return data_dir(settings) / "cache" / name


def data_dir(settings: ConfigDict) -> Path:
  """The absolute path of `data.dir`."""
  return Path(os.path.abspath(os.path.expanduser(settings.dir)))


def unwritable(folder: Path, error: OSError) -> ConfigError:
  """The error of a `data.dir` that nothing can be prepared in."""
  legal = f"a folder that can be written ({error})"
  return invalid("data.dir", str(folder), legal, "set --config.data.dir to another")


def declared(settings: ConfigDict, source: Source) -> Spec:
  """The spec of the decoded arrays, from the cache or, where there is none, from the source."""
  folder = source.folder(settings)
  if _whole(folder):
    return _read_spec(folder)
  return _spec(source.contents(), settings)


def read(settings: ConfigDict, source: Source) -> tuple[Spec, dict[str, Split]]:
  """The spec and the memory-mapped splits; host 0 prepares what is not there, the others wait."""
  folder = source.folder(settings)
  if not _whole(folder):
    if jax.process_index() == 0:
      _prepare(settings, source.contents(), folder)
    else:
      _wait_for(folder)
  spec = _read_spec(folder)
  names = ["image", "label"] if spec.num_classes else ["image"]
  splits = {
    split: {name: np.load(folder / f"{split}_{name}.npy", mmap_mode="r") for name in names}
    for split in spec.splits
  }
  return spec, splits


def _whole(folder: Path) -> bool:
  return (folder / "spec.json").exists()


def _read_spec(folder: Path) -> Spec:
  return Spec.of_json(json.loads((folder / "spec.json").read_text())["spec"])


def _spec(contents: Contents, settings: ConfigDict) -> Spec:
  spec = contents.spec
  return spec._replace(splits=with_held_out(spec.splits, settings.held_out))


def _wait_for(folder: Path, seconds: float = 2.0) -> None:
  print(
    f"waiting for host 0 to prepare {folder}; where hosts do not share data.dir, prepare it on each"
    " of them first: main.py --mode=inspect",
    flush=True,
  )
  while not _whole(folder):
    time.sleep(seconds)


def _prepare(settings: ConfigDict, contents: Contents, folder: Path) -> None:
  """Writes `folder`: under another name, then renamed."""
  spec, parent = _spec(contents, settings), folder.parent
  num_bytes = sum(contents.sizes.values()) * (math.prod(spec.shape) * spec.dtype.itemsize + 4)
  temporary = parent / f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
  try:
    parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    free = shutil.disk_usage(parent).free
    legal = f"a folder on a disk with {num_bytes / 1e9:.3g} GB free; here {free / 1e9:.3g} GB are"
    check(num_bytes < free, "data.dir", str(parent.parent), legal, "set --config.data.dir")
    print(f"preparing {folder}: {num_bytes / 1e9:.3g} GB", flush=True)
    temporary.mkdir()
    _write(temporary, contents, spec, settings)
    temporary.rename(folder)
  except OSError as error:
    if not _whole(folder):  # else another process was faster
      raise unwritable(parent.parent, error) from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _remove_stale(folder: Path) -> None:
  """Removes what killed preparations left: nothing was written to it for an hour."""
  for left in folder.parent.glob(f"{folder.name}.*.tmp"):
    with contextlib.suppress(FileNotFoundError):  # its process has just finished
      written = max(path.stat().st_mtime for path in [left, *left.iterdir()])
      if time.time() - written > STALE_SECONDS:
        shutil.rmtree(left, ignore_errors=True)


def _write(folder: Path, contents: Contents, spec: Spec, settings: ConfigDict) -> None:
  """All files of a cache; spec.json is the last."""
  _announce(settings.name, contents.rejects)
  arrays = {"image": (spec.shape, spec.dtype)}
  if spec.num_classes:
    arrays["label"] = ((), np.dtype(np.int32))
  files = {
    (split, name): Appender(folder / f"{split}_{name}.npy", *kind)
    for split in spec.splits
    for name, kind in arrays.items()
  }
  divided = spec.splits != contents.spec.splits
  test = held_out(sum(contents.sizes.values()), settings.held_out) if divided else None
  rejects = _copy(contents, files, test, tuple(arrays))
  _announce(settings.name, rejects)
  num_rows = {split: files[split, "image"].num_rows for split in spec.splits}
  legal = f"a data set of {contents.sizes} examples; {num_rows} were found: is a file missing?"
  whole = sum(num_rows.values()) + len(rejects) == sum(contents.sizes.values())
  check(whole, "data.name", settings.name, legal)
  for split, found in num_rows.items():
    legal = f"a data set with examples in each of its splits; {split!r} is empty"
    check(found > 0, "data.name", settings.name, legal)
  _finish(folder, [*contents.rejects, *rejects], spec, contents.classes, settings.name)


def _copy(contents: Contents, files: dict, test: np.ndarray | None, names: tuple) -> list[str]:
  """Writes every example to its files; returns what turned out to be unusable."""
  rejects = []
  with tqdm(total=sum(contents.sizes.values()), unit="example", disable=None) as progress:
    for chunk in contents.chunks():
      if isinstance(chunk, str):
        rejects.append(chunk)
        progress.update()
        continue
      for split, rows in _divide(chunk, test):
        for name in names:
          files[split, name].append(getattr(chunk, name)[rows])
      progress.update(len(chunk.image))
  for file in files.values():
    file.close()
  return rejects


def _divide(chunk: Chunk, test: np.ndarray | None) -> list[tuple[str, slice | np.ndarray]]:
  """The rows of `chunk` that go to each split; `test` [n] says which examples are held out."""
  if test is None:
    return [(chunk.split, slice(None))]
  chosen = test[chunk.first : chunk.first + len(chunk.image)]
  return [("train", ~chosen), ("test", chosen)]


def _announce(name: str, rejects: Sequence[str]) -> None:
  if rejects:
    shown = "".join(f"\n  {line}" for line in rejects[:SHOWN])
    more = "\n  ... all of them in rejects.txt" if len(rejects) > SHOWN else ""
    print(f"{name}: {len(rejects)} left out{shown}{more}", flush=True)


def _finish(folder: Path, rejects: list, spec: Spec, classes: tuple[str, ...], name: str) -> None:
  (folder / "rejects.txt").write_text("".join(f"{line}\n" for line in rejects))
  about = {"spec": spec._asdict(), "classes": classes, "source": name}
  (folder / "spec.json").write_text(json.dumps(about, indent=2))
