"""The pictures of a run, written as PNG files."""

from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from data import Transform


def tile(images: np.ndarray, columns: int, *, border: int = 1) -> np.ndarray:
  """[n, h, w, c] in [0, 1] -> one image [H, W, c] of `columns` columns with white borders."""
  n, h, w, c = images.shape
  rows = -(-n // columns)
  canvas = np.ones((rows * (h + border) + border, columns * (w + border) + border, c))
  for i, image in enumerate(images):
    y, x = border + i // columns * (h + border), border + i % columns * (w + border)
    canvas[y : y + h, x : x + w] = image
  return canvas


def to_colours(values: np.ndarray) -> np.ndarray:
  """[..., c] -> [..., 3]: three channels are colours; of any other number the mean is grey."""
  return values if values.shape[-1] == 3 else values.mean(-1, keepdims=True).repeat(3, -1)


def to_unit(x: np.ndarray, transform: Transform) -> np.ndarray:
  """Model units to [0, 1], clipped."""
  return np.clip((np.asarray(x) - transform.low) / (transform.high - transform.low), 0, 1)


def _save(figure: plt.Figure, path: Path) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def save_samples(path: Path, x: np.ndarray, transform: Transform) -> None:
  """Examples [n, *d] in model units: images as a grid, points of a plane as a cloud, other vectors
  and sequences as lines.
  """
  if x.ndim == 4:
    save_grid(path, x, transform)
    return
  figure, axis = plt.subplots(figsize=(6, 6), layout="constrained")
  if x.ndim == 2 and x.shape[1] == 2:
    axis.scatter(*x.T, s=6, alpha=0.5, linewidths=0)
    axis.set_aspect("equal")
  else:
    axis.plot(x.reshape(len(x), x.shape[1], -1)[:16, :, 0].T, linewidth=0.8)
    axis.set_xlabel("position")
  axis.set_title(f"{len(x) if x.ndim == 2 else min(16, len(x))} samples")
  axis.grid(alpha=0.3)
  _save(figure, path)


def save_grid(path: Path, x: np.ndarray, transform: Transform, columns: int = 10) -> None:
  """Examples [n, h, w, c] in model units as a grid; small images are enlarged smoothly, to be
  read.
  """
  levels = np.asarray(transform.inverse(jnp.asarray(x))) / (transform.levels - 1)
  colours = to_colours(levels)
  scale = max(1, -(-64 // colours.shape[2]))
  size = colours.shape[2] * scale, colours.shape[1] * scale
  images = [Image.fromarray((255 * image).round().astype(np.uint8)) for image in colours]
  enlarged = [np.asarray(image.resize(size, Image.Resampling.BICUBIC)) / 255 for image in images]
  canvas = tile(np.stack(enlarged), columns, border=4)
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray((255 * canvas).round().astype(np.uint8)).save(path)


def save_process(
  path: Path, forward: np.ndarray, reverse: np.ndarray, log_snrs: np.ndarray, transform: Transform
) -> None:
  """Two panels of [frames, n, h, w, c]: data to noise, noise to data."""
  figure, axes = plt.subplots(2, 1, figsize=(10, 9), layout="constrained")
  titles = "Forward process: test images are noised", "Reverse process: samples are generated"
  for axis, frames, labels, title in zip(
    axes, (forward, reverse), (log_snrs, log_snrs[::-1]), titles
  ):
    count, n = frames.shape[:2]
    rows = np.moveaxis(frames, 0, 1).reshape(count * n, *frames.shape[2:])
    axis.imshow(tile(to_colours(to_unit(rows, transform)), count))
    width = frames.shape[3] + 1
    axis.set_xticks(width * np.arange(count) + width / 2, [f"{v:+.0f}" for v in labels])
    axis.set_yticks([])
    axis.set_title(title)
    axis.set_xlabel("log-SNR")
  _save(figure, path)


def save_likelihood(
  path: Path, values: np.ndarray, name: str, x: np.ndarray, transform: Transform, count: int = 8
) -> None:
  """The histogram of the examples' values and, of images, those of the lowest and the highest."""
  images = x.ndim == 4
  heights = [2, 1, 1] if images else [2]
  options = {"height_ratios": heights, "squeeze": False}
  figure, axes = plt.subplots(len(heights), 1, figsize=(8, 1.4 * sum(heights)), **options)
  axis, label = axes[0, 0], name.replace("_", " ")
  axis.hist(values, bins=min(50, max(10, len(values) // 10)), color="tab:blue", alpha=0.8)
  axis.axvline(values.mean(), color="black", linewidth=1)
  axis.set_xlabel(label)
  axis.set_ylabel("examples")
  order = np.argsort(values)
  for row, (title, chosen) in enumerate((("lowest", order[:count]), ("highest", order[-count:]))):
    if images:
      axis = axes[row + 1, 0]
      axis.imshow(tile(to_colours(to_unit(x[chosen], transform)), count))
      axis.set_title(
        f"{title} {label}: {', '.join(f'{v:.2f}' for v in values[chosen])}", fontsize=9
      )
      axis.set_axis_off()
  figure.tight_layout()
  _save(figure, path)


def save_loss_per_level(path: Path, log_snrs: np.ndarray, curves: dict[str, np.ndarray]) -> None:
  """Loss per dimension against the noise level, one line per predictor."""
  figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
  styles = ("o-", "s--", ":")
  for (name, values), style in zip(curves.items(), styles):
    axis.semilogy(log_snrs, values, style, markersize=4, label=name)
  axis.invert_xaxis()
  axis.set_xlabel("log-SNR  (data on the left, noise on the right)")
  axis.set_ylabel("E ||predicted noise - noise||² / D")
  axis.set_title("Denoising loss per noise level")
  axis.grid(alpha=0.3)
  axis.legend()
  _save(figure, path)
