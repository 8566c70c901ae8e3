"""`--mode=inspect`: what the data are like, the settings that follow from it, and the network.

Needs no trained run and writes nothing; of data that cannot be loaded it tells what is declared.
"""

import dataclasses
import math
import textwrap

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import data
import noise_levels
import settings
from errors import ConfigError
from evaluation import network
from evaluation.batches import spread
from experiment import outline

MOST_VALUES = 2**28  # of a split that are looked at
TOLERANCE = 0.2  # relative difference above which the present configuration is warned about
LANGEVIN = "sampling.options.annealed_langevin"


@dataclasses.dataclass(frozen=True)
class Statistics:
  """What `inspect` measures on the training split; lengths are in model units."""

  num_dims: int
  levels_seen: tuple[float, float]
  counts: dict[int, int]
  low: float
  high: float
  mean: float
  std: float
  sigma_data: float  # std of what the network sees: dequantized where training does so
  largest: tuple[float, float]  # certified bracket, equal where it is exact
  median: float
  duplicates: dict[str, int]


def measure(dataset: data.DataSet, dequantize: bool) -> Statistics:
  """The statistics of a data set's training split, and duplicates in and across its splits."""
  count, transform = MOST_VALUES // math.prod(dataset.shape), dataset.transform
  looked_at = lambda images: images[spread(len(images), count)]
  splits = {name: looked_at(split["image"]) for name, split in dataset.splits.items()}
  train, stored = splits.pop("train"), dataset.splits["train"]
  x = np.asarray(transform.forward(jnp.asarray(train)))
  labels, counts = np.unique(stored.get("label", ()), return_counts=True)
  duplicates = {"within train": noise_levels.count_duplicates(train)}
  for name, images in splits.items():
    duplicates[f"of {name} in train"] = noise_levels.count_duplicates(images, train)
  width = transform.bin_width if dequantize and transform.levels else 0.0
  return Statistics(
    num_dims=x[0].size,
    levels_seen=(train.min().item(), train.max().item()),
    counts=dict(zip(labels.astype(int).tolist(), counts.tolist())),
    low=float(x.min()),
    high=float(x.max()),
    mean=float(x.mean(dtype=np.float64)),
    std=noise_levels.sigma_data(x),
    sigma_data=noise_levels.sigma_data(x, width),
    largest=noise_levels.distance_bracket(x),
    median=noise_levels.median_distance(x),
    duplicates=duplicates,
  )


def _rounded(value: float) -> float:
  return float(f"{value:.3g}")


def propose(statistics: Statistics, config: ConfigDict) -> dict[str, float | int]:
  """{field: value}: sigma_data, and the noise levels of Song & Ermon 2020, techniques 1, 2 and 4.

  In fewer than 5 dimensions technique 2 has no solution: no number of levels, no step.
  """
  given, num_dims = settings.flatten(config), statistics.num_dims
  sigma_max = _rounded(statistics.largest[0])
  fields = {
    "parameterization.sigma_data": _rounded(statistics.sigma_data),
    "sde.args.sigma_max": sigma_max,
  }
  sigma_min = given.get("sde.args.sigma_min", 0.01)
  if num_dims > 4 and sigma_max > sigma_min:
    levels = noise_levels.num_levels(sigma_max, sigma_min, num_dims)
    num_steps = given.get(f"{LANGEVIN}.num_steps", 5)
    step = noise_levels.langevin_step_size(np.geomspace(sigma_min, sigma_max, levels), num_steps)
    fields["sde.args.num_scales"] = levels
    if given["sampling.sampler"] == "annealed_langevin":
      fields["sampling.num_steps"] = levels - 1
    fields |= {f"{LANGEVIN}.step_lr": _rounded(step), f"{LANGEVIN}.num_steps": num_steps}
  return fields


def config_lines(fields: dict[str, float | int], config: ConfigDict) -> tuple[list[str], list[str]]:
  """(flags for the fields that `config` has, lines of a configuration file for the others).

  A process without sigma_max has no levels to set: it gets whole lines for processes that do.
  """
  given = settings.flatten(config)
  leveled = "sde.args.sigma_max" in given
  flagged = {k for k in fields if k in given and (leveled or not k.startswith(LANGEVIN))}
  flags = [f"--config.{name}={value!r}" for name, value in fields.items() if name in flagged]
  sigma_min = given.get("sde.args.sigma_min", 0.01)
  args, lines = {"sigma_min": sigma_min, "sigma_max": fields["sde.args.sigma_max"]}, []
  if not leveled:
    lines.append(f"config.sde = { ({'name': 've', 'args': args})!r}")
  if "sde.args.num_scales" in fields.keys() - flagged:
    levels = args | {"num_scales": fields["sde.args.num_scales"]}
    lines.append(f"config.sde = { ({'name': 'ncsn', 'args': levels})!r}")
  if f"{LANGEVIN}.step_lr" in fields.keys() - flagged:
    options = {name: fields[f"{LANGEVIN}.{name}"] for name in ("step_lr", "num_steps")}
    lines.append(f"config.{LANGEVIN} = {options!r}")
  return flags, lines


def disagreements(fields: dict[str, float | int], config: ConfigDict) -> list[str]:
  """One line for each field in use whose present value is more than 20 % from the proposed one."""
  given, lines = settings.flatten(config), []
  for name, value in fields.items():
    present = given.get(name, value)
    used = not name.startswith(LANGEVIN) or given["sampling.sampler"] == "annealed_langevin"
    if used and abs(present - value) > TOLERANCE * value:
      far = f"{present / value - 1:+.0%}"
      lines.append(f"{name} is {present:g}, {far} from the {value:g} that the data propose")
  return lines


def _table(dataset: data.DataSet, s: Statistics) -> list[tuple[str, str]]:
  """(name, text) of every statistic."""
  splits = ", ".join(f"{name} {len(s['image']):,}" for name, s in dataset.splits.items())
  low, high = s.levels_seen
  exact = s.largest[0] == s.largest[1]
  bracket = f"{s.largest[0]:.4g}" + (" (exact)" if exact else f" to {s.largest[1]:.4g}")
  classes = ", ".join(f"{label}: {count:,}" for label, count in s.counts.items())
  sizes, declared = s.counts.values(), dataset.transform.levels
  fewest = f"{len(s.counts)} with {min(sizes):,} to {max(sizes):,} examples" if sizes else "none"
  seen = f"{declared} declared, {low} .. {high} seen" if declared else "continuous"
  duplicates = ", ".join(f"{count:,} {where}" for where, count in s.duplicates.items())
  return [
    ("examples", splits),
    ("shape", f"{dataset.shape}, {s.num_dims:,} values each"),
    ("levels", seen),
    ("classes", fewest),
    ("", classes if len(s.counts) <= 20 else ""),
    ("values", f"min {s.low:.4f}, max {s.high:.4f}, mean {s.mean:.4f}, std {s.std:.4f}"),
    ("distances", f"largest {bracket}, median {s.median:.4g}"),
    ("duplicates", duplicates),
  ]


def run(config: ConfigDict) -> None:
  """Prints what is known of the data and of the network."""
  parts = outline(config)
  try:
    _print_data(config, data.load(config.data))
  except ConfigError as error:
    print(f"no statistics of the data of shape {parts.spec.shape}, they cannot be read:\n{error}")
  print(f"\n{network.report(parts.model, parts.spec.shape, config)}")


def _print_data(config: ConfigDict, dataset: data.DataSet) -> None:
  """Prints the statistics, the lines that set what they propose, and where `config` disagrees."""
  statistics = measure(dataset, config.training.dequantize)
  fields = propose(statistics, config)
  flags, lines = config_lines(fields, config)
  print(f"data set {dataset.name!r}, training split, in model units\n")
  for name, text in _table(dataset, statistics):
    if text:
      print(textwrap.fill(text, 98, initial_indent=f"  {name:<12}", subsequent_indent=" " * 14))
  print("\nproposed, on the command line:\n")
  print("\n".join(f"  {flag}" for flag in flags))
  if lines:
    print("\nproposed, in a configuration file (one config.sde, for a process without drift):\n")
    print("\n".join(f"  {line}" for line in lines))
  if f"{LANGEVIN}.step_lr" not in fields:
    print("\nno annealed Langevin levels: the data have fewer than 5 dimensions, or one value only")
  warnings = disagreements(fields, config)
  if 0 < dataset.transform.levels <= statistics.levels_seen[1]:
    warnings.append("the data hold values above the declared levels: they are cut off")
  print()
  for line in warnings or ["the configuration agrees with the data within 20 %"]:
    print(f"warning: {line}" if warnings else line)
