"""A folder data set of natural images without a download: python -m evaluation.photographs FOLDER.

32x32 crops of the two photographs that scikit-learn ships (china.jpg and flower.jpg, 640x427),
halving to sixth of their size: 4,000 for training from the left four fifths, 64 for tests from the
rest. To try and time what needs real images: two photographs are not a distribution.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

SIZE, SHORTEST, LONGEST = 32, 64, 200  # of an image; of a crop, pixels
SPLITS = {"train": (4000, 0.0, 0.8), "test": (64, 0.8, 1.0)}  # images, from and to which column


def crop(rng: np.random.Generator, photograph: np.ndarray, left: int, right: int) -> Image.Image:
  """A random square of the columns from `left` to `right`, averaged down to SIZE."""
  size = rng.integers(SHORTEST, min(LONGEST, right - left + 1))
  y = rng.integers(0, len(photograph) - size + 1)
  x = rng.integers(left, right - size + 1)
  square = Image.fromarray(photograph[y : y + size, x : x + size])
  return square.resize((SIZE, SIZE), Image.Resampling.BOX)


def write(folder: Path) -> None:
  """Writes folder/<split>/<number>.png."""
  rng, photographs = np.random.default_rng(0), load_sample_images().images
  for split, (count, *part) in SPLITS.items():
    (folder / split).mkdir(parents=True)
    for i in range(count):
      photograph = photographs[i % len(photographs)]
      left, right = (int(share * photograph.shape[1]) for share in part)
      crop(rng, photograph, left, right).save(folder / split / f"{i}.png")


def main() -> None:
  """Reads the folder and writes the images; one that exists is left alone."""
  if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
    sys.exit("python -m evaluation.photographs FOLDER, a folder that does not exist yet")
  write(Path(sys.argv[1]))


if __name__ == "__main__":
  main()
