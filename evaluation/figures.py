"""The pictures of a run, written as PNG files."""

import textwrap
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


def _enlarged(x: np.ndarray, transform: Transform) -> np.ndarray:
  """Colours [n, H, W, 3] of examples [n, h, w, c] in model units, continuous ones in [-1, 1]; small
  images are enlarged smoothly, to be read.
  """
  transform = transform if transform.levels else Transform(256)
  levels = np.asarray(transform.inverse(jnp.asarray(x))) / (transform.levels - 1)
  colours = to_colours(levels)
  scale = max(1, -(-64 // colours.shape[2]))
  size = colours.shape[2] * scale, colours.shape[1] * scale
  images = [Image.fromarray((255 * image).round().astype(np.uint8)) for image in colours]
  return np.stack(
    [np.asarray(image.resize(size, Image.Resampling.BICUBIC)) / 255 for image in images]
  )


def save_grid(path: Path, x: np.ndarray, transform: Transform, columns: int = 10) -> None:
  """Examples [n, h, w, c] in model units as a grid."""
  canvas = tile(_enlarged(x, transform), columns, border=4)
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
  path: Path,
  values: np.ndarray,
  name: str,
  p_values: np.ndarray | None,
  x: np.ndarray,
  transform: Transform,
  count: int = 8,
) -> None:
  """The histogram of the examples' values and, of images, those of the lowest, of the highest, and
  of the smallest p-values where there are some.
  """
  label, order = name.replace("_", " "), np.argsort(values)
  extremes = {"lowest": order[:count], "highest": order[-count:]}
  rows = [(f"{which} {label}:", chosen, values) for which, chosen in extremes.items()]
  if p_values is not None:
    least = np.argsort(p_values)[:count]
    rows.append(("least typical latents: p-values", least, p_values))
  rows = rows if x.ndim == 4 else []
  heights = [2] + [1] * len(rows)
  options = {"height_ratios": heights, "squeeze": False}
  figure, axes = plt.subplots(len(heights), 1, figsize=(8, 1.4 * sum(heights)), **options)
  axis = axes[0, 0]
  axis.hist(values, bins=min(50, max(10, len(values) // 10)), color="tab:blue", alpha=0.8)
  axis.axvline(values.mean(), color="black", linewidth=1)
  axis.set_xlabel(label)
  axis.set_ylabel("examples")
  for axis, (title, chosen, numbers) in zip(axes[1:, 0], rows):
    axis.imshow(tile(_enlarged(x[chosen], transform), count, border=4))
    axis.set_title(f"{title} {', '.join(f'{v:.3g}' for v in numbers[chosen])}", fontsize=9)
    axis.set_axis_off()
  figure.tight_layout()
  _save(figure, path)


def save_interpolation(
  path: Path, first: np.ndarray, between: np.ndarray, second: np.ndarray, transform: Transform
) -> None:
  """Rows of images [n, h, w, c]: one of the data, the decoded ones [n, k, h, w, c] from its latent
  to that of another, that other.
  """
  n, k = between.shape[:2]
  parts = first, between.reshape(n * k, *between.shape[2:]), second
  parts = [tile(_enlarged(x, transform), len(x) // n, border=4) for x in parts]
  width = (parts[1].shape[1] - 4) / k
  gap = np.ones((len(parts[0]), int(width / 2), 3))
  canvas = np.hstack([parts[0], gap, parts[1], gap, parts[2]])
  figure, axis = plt.subplots(figsize=(0.8 * (k + 3), 0.8 * n + 0.7), layout="constrained")
  axis.imshow(canvas)
  begin = parts[0].shape[1] + gap.shape[1]
  places = [width / 2, *(begin + width * (np.arange(k) + 0.5)), canvas.shape[1] - width / 2]
  axis.set_xticks(places, ["data", *(f"{i}/{k - 1}" for i in range(k)), "data"])
  axis.set_yticks([])
  axis.tick_params(length=0)
  axis.spines[:].set_visible(False)
  axis.set_title("Data, and what is decoded from the arc between their latents")
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


def save_sweep(path: Path, rows: list[dict]) -> None:
  """Every figure of quality against network evaluations, a line for each sampler and checkpoint."""
  names = list(rows[0]["quality"])
  columns = min(3, len(names))
  shape = -(-len(names) // columns), columns
  size = 4 * shape[1], 3 * shape[0]
  figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
  lines = sorted({(row["sampler"], row["checkpoint"]) for row in rows})
  for axis, name in zip(axes.flat, names):
    for line in lines:
      points = sorted(
        (row["nfe"], row["quality"][name]["value"], row["quality"][name]["standard_error"] or 0.0)
        for row in rows
        if (row["sampler"], row["checkpoint"]) == line
      )
      nfe, values, errors = zip(*points)
      axis.errorbar(nfe, values, errors, marker="o", capsize=3, label=f"{line[0]}, step {line[1]}")
    axis.set_title(name, fontsize=8)
    axis.set_xlabel("network evaluations")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
  for axis in axes.flat[len(names) :]:
    axis.set_axis_off()
  axes[0, 0].legend(fontsize=7)
  _save(figure, path)


def save_accuracy(path: Path, record: dict) -> None:
  """The accuracy of a classifier against log-SNR, noise on the right as in time, beside clean data
  and chance.
  """
  figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
  errors = 1.96 * np.asarray(record["standard_error"])
  axis.errorbar(record["log_snr"], record["accuracy"], errors, marker="o", ms=4, capsize=2)
  axis.axhline(record["clean_accuracy"], color="C2", ls=":", label="without noise")
  axis.axhline(record["chance"], color="grey", ls="--", label="commonest class")
  axis.invert_xaxis()
  axis.set(xlabel="log-SNR", ylabel="accuracy", ylim=(0, 1.02))
  axis.set_title(f"Noised {record['split']} examples classified right, and 95 % interval")
  axis.grid(alpha=0.3)
  axis.legend()
  _save(figure, path)


MEAN, SPREAD = "mean", "standard deviation"  # columns of `save_conditional` with a meaning


def save_conditional(path: Path, columns: dict[str, np.ndarray], transform: Transform) -> None:
  """Conditional samples in model units: a titled column for each [n, *d], k for each [n, k, *d].

  Images: a row for each input; the column "standard deviation" is grey from 0 to its maximum.
  Points of a plane and other examples: a panel for each input, clouds or lines, with the standard
  deviation around the column "mean".

  Args:
    columns: title -> values; at least one of them has one example for each input.
  """
  rank = min(values.ndim for values in columns.values())
  groups = {
    title: values[:, None] if values.ndim == rank else values for title, values in columns.items()
  }
  if rank == 4:
    _conditional_images(path, groups, transform)
  else:
    _conditional_panels(path, groups)


def _conditional_images(path: Path, groups: dict, transform: Transform) -> None:
  """`save_conditional` of images [n, k, h, w, c]: one canvas, so that the rows are level."""
  parts, places, begin = [], [], 0
  for title, values in groups.items():
    k = values.shape[1]
    title, colours = _titled(title, values.reshape(-1, *values.shape[2:]), transform)
    part = tile(colours, k, border=4)
    parts += [part, np.ones((len(part), colours.shape[2] // 5, 3))]
    places.append((begin + part.shape[1] / 2, title, k))
    begin += part.shape[1] + parts[-1].shape[1]
  canvas = np.hstack(parts[:-1])
  inches = min(2.0, max(1.0, colours.shape[2] / 120))  # the width of one image
  height, width = np.array(canvas.shape[:2]) * inches / colours.shape[2]
  left, top = 0.1, 0.65  # room beside the images and for titles, in inches
  size = left + width, top + height
  figure = plt.figure(figsize=size)
  axis = figure.add_axes([left / size[0], 0, width / size[0], height / size[1]])
  axis.imshow(canvas, aspect="auto")
  for place, title, k in places:
    text = textwrap.fill(title, round(14 * inches * k), break_long_words=False)
    axis.text(place, 0, text, fontsize=9, ha="center", va="bottom")
  axis.set_xticks([])
  axis.set_yticks([])
  axis.spines[:].set_visible(False)
  _save(figure, path)


def _titled(title: str, images: np.ndarray, transform: Transform) -> tuple[str, np.ndarray]:
  """Title and colours of a column of images; standard deviations have a scale of their own."""
  if title == SPREAD:
    grey = images.mean(-1, keepdims=True)
    top = float(grey.max())
    shown = 2 * grey / (top or 1) - 1
    return f"{title} (white:\N{NO-BREAK SPACE}{top:.2g})", _enlarged(shown, Transform(256))
  return title, _enlarged(images, transform)


def _conditional_panels(path: Path, groups: dict) -> None:
  """`save_conditional` of vectors and sequences [n, k, *d], of which the first channel is drawn."""
  n, std = len(next(iter(groups.values()))), groups.get(SPREAD)
  shape = -(-n // 4), min(n, 4)
  size = 3.4 * shape[1], 3.2 * shape[0] + 0.6
  figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
  for i, axis in enumerate(axes.flat[:n]):
    drawn = {title: values for title, values in groups.items() if title != SPREAD}
    for colour, (title, values) in enumerate(drawn.items()):
      error = std[i] if title == MEAN and std is not None else None
      draw = _points if values.shape[2:] == (2,) else _lines
      draw(axis, values[i], error, title, f"C{colour}")
    axis.grid(alpha=0.3)
  for axis in axes.flat[n:]:
    axis.set_axis_off()
  handles, labels = axes[0, 0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=len(groups))
  _save(figure, path)


def _points(axis: plt.Axes, x: np.ndarray, std: np.ndarray | None, title: str, colour: str) -> None:
  """Points [k, 2]: a cloud, or one with its standard deviation [1, 2]."""
  style = {"marker": "X", "markersize": 8} if len(x) == 1 else {"marker": ".", "alpha": 0.4}
  errors = {} if std is None else dict(zip(("xerr", "yerr"), std.T))
  axis.errorbar(*x.T, **errors, **style, linestyle="", label=title, color=colour)
  axis.set_aspect("equal", adjustable="datalim")


def _lines(axis: plt.Axes, x: np.ndarray, std: np.ndarray | None, title: str, colour: str) -> None:
  """Examples [k, n, ...] against the position, the standard deviation [1, n, ...] as a band."""
  y = x.reshape(*x.shape[:2], -1)[..., 0]
  style = {"linewidth": 1.5} if len(x) == 1 else {"linewidth": 0.7, "alpha": 0.5}
  labels = [title, *["_"] * (len(x) - 1)]  # the legend leaves out what begins so
  axis.plot(y.T, **style, color=colour, label=labels)
  if std is not None:
    error = std.reshape(*std.shape[:2], -1)[0, :, 0]
    axis.fill_between(range(len(error)), y[0] - error, y[0] + error, color=colour, alpha=0.2)
  axis.set_xlabel("position")
