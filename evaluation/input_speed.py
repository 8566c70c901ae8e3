"""How fast batches come: python -m evaluation.input_speed [rounds].

Images a second of `data.batches` at 32x32x3, uint8, 128 a batch, with nothing else running; the
median of rounds of two seconds, and how many times the 20,000 that it must reach.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import data

REQUIRED = 20_000
NUM_IMAGES, SHAPE, BATCH_SIZE = 50_000, (32, 32, 3), 128


def images_per_second(batches: Iterator, rounds: int, seconds: float = 2.0) -> float:
  """The median over `rounds`, after a first one that is not counted."""
  rates = []
  for _ in range(rounds + 1):
    begin, num_batches = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
      next(batches)
      num_batches += 1
    rates.append(num_batches * BATCH_SIZE / (time.perf_counter() - begin))
  return float(np.median(rates[1:]))


def main() -> None:
  """Prints a line for each way to hold the images and each number of workers."""
  rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
  image = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, *SHAPE), np.uint8)
  label = np.arange(NUM_IMAGES) % 10
  with tempfile.TemporaryDirectory() as folder:
    np.save(Path(folder) / "image.npy", image)
    mapped = np.load(Path(folder) / "image.npy", mmap_mode="r")
    for held, array in (("in memory", image), ("memory-mapped", mapped)):
      for num_workers in (0, 2):
        split = {"image": array, "label": label}
        batches = data.batches(split, BATCH_SIZE, seed=0, num_workers=num_workers)
        rate = images_per_second(batches, rounds)
        print(
          f"{held:13s} {num_workers} workers {rate:9,.0f} images/s, {rate / REQUIRED:.1f} times"
          f" {REQUIRED:,}",
          flush=True,
        )


if __name__ == "__main__":
  main()
