"""Samples of a trained network, drawn by index and kept in files: a killed job goes on, more are
added to those that are there, those of another checkpoint or sampler lie in another folder.
"""

import time
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import devices
import settings
from evaluation import files, train_classifier
from evaluation.batches import drawn
from evaluation.records import SECTIONS
from evaluation.trained import Job
from experiment import Weights


class Samples(NamedTuple):
  """`values` [n, *d] as the data set stores them, network evaluations `nfe` [n] of each, `seconds`
  that their drawing took, the classes asked for [n] where something is told of them.
  """

  values: np.ndarray
  nfe: np.ndarray
  seconds: float
  labels: np.ndarray | None


def _folder(job: Job) -> Path:
  """That of all samples of the same checkpoint, guiding classifier and sampler, however many."""
  config = job.experiment.config.copy_and_resolve_references()
  with config.unlocked():
    config.sampling.num_samples = 0
  digest, trained = settings.digest(config, *SECTIONS["sample"]), ""
  if config.guidance.classes == "classifier":
    trained = f"-classifier{train_classifier.newest(config, job.workdir)}"
  return job.workdir / "results" / f"samples-step{job.step}-{digest}{trained}"


def _draw(job: Job, weights: Weights, block: int, path: Path) -> None:
  """Draws the samples of a block and writes them whole."""
  size, transform = job.experiment.config.sampling.batch_size, job.experiment.transform
  begin = time.perf_counter()
  index = block * size + np.arange(size)
  x, nfe, labels = drawn(job.experiment, weights, job.key("sampling"), index)
  seconds = time.perf_counter() - begin
  if not devices.is_first():
    return
  values = np.asarray(transform.inverse(jnp.asarray(x))).astype(job.experiment.spec.dtype)
  columns = {} if labels is None else {"labels": labels}
  files.write_arrays(path, {"values": values, "nfe": nfe, "seconds": seconds, **columns})


def draw(job: Job, num_samples: int) -> Samples:
  """The samples 0 .. num_samples - 1, of which those that are in no file are drawn now; sample i
  depends on the seed and i alone. Several hosts share a file system.
  """
  size, folder = job.experiment.config.sampling.batch_size, _folder(job)
  paths = [folder / f"{block:06d}.npz" for block in range(-(-num_samples // size))]
  devices.wait_for_all("samples")
  missing = [block for block, path in enumerate(paths) if not path.is_file()]
  devices.wait_for_all("samples are listed")
  done = len(paths) - len(missing)
  options = {"unit": "block", "desc": "sampling", "disable": devices.no_bar() if missing else True}
  weights = train_classifier.weights(job) if missing else None
  for block in tqdm(missing, initial=done, total=len(paths), **options):
    _draw(job, weights, block, paths[block])
  devices.wait_for_all("samples are written")
  blocks = [files.read_arrays(path) for path in paths]
  join = lambda name: np.concatenate([block[name] for block in blocks])[:num_samples]
  share = num_samples / (len(blocks) * size)
  seconds = share * sum(float(b["seconds"]) for b in blocks)
  labels = join("labels") if "labels" in blocks[0] else None
  return Samples(join("values"), join("nfe"), seconds, labels)
