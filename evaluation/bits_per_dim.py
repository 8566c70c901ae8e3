"""The mode likelihood: bits/dim of every example of a split, block by block, so that a killed job
goes on and any number of devices gives the same bits.
"""

import itertools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

import devices
import settings
from dequantization import importance_bound
from errors import RunError
from evaluation import decoder, dequantizer, figures, files, latents, likelihood_study
from evaluation.batches import keys_of, labels_of, spread
from evaluation.evidence import OPTIONS, Held, chain, exact, hold, process, standard_error, unit
from evaluation.mixture import mixture_log_prob
from evaluation.records import SECTIONS
from evaluation.trained import Job, training_examples
from experiment import Experiment
from likelihood import variational_bound
from sde_lib import fold_in

Columns = dict[str, np.ndarray]
LARGEST_MIXTURE = 512  # dimensions of an example
# of the key of an example: its dequantization (or noise), and its probes; again for replicates
DRAW, PROBE, REDRAW, REPROBE = range(4)


def _exact(experiment: Experiment, held: Held, draws, probes, k, labels) -> dict[str, Array]:
  """The exact log-likelihood of one dequantized draw (or of continuous values)."""
  result, log_q = exact(experiment, process(experiment), held, draws, probes, k, labels)
  columns = {"log_weight": result.log_prob - log_q, "log_q": log_q, **result._asdict()}
  columns["latent_norm"] = jnp.linalg.norm(result.latent.reshape(len(k), -1), axis=1)
  if not experiment.config.likelihood.save_latents:
    columns.pop("latent")
  return columns


def _variational(experiment: Experiment, held: Held, draws, probes, k, labels) -> dict[str, Array]:
  """The variational bound of the chain, one draw of the noise at every level."""
  options = experiment.config.likelihood
  levels, transform = chain(experiment), experiment.transform
  fitted = None
  if held.decoder is not None:
    fitted = lambda predicted: decoder.log_prob(held.decoder, predicted, k, transform)
  bound = variational_bound(
    draws,
    levels,
    experiment.noise_fn(held.params),
    transform.forward(k),
    variance=options.variance,
    transform=transform if transform.levels else None,
    labels=experiment.labels(labels),
    decoder=fitted,
  )
  terms = {"prior": bound.prior, "decoder": bound.terms[0], "terms": bound.terms.T}
  return {
    "log_weight": -bound.total,
    "nfe": jnp.full(len(k), len(levels.times) + (fitted is not None)),
    **terms,
  }


# likelihood.kind: (what is computed, how a result calls it)
KINDS = {
  "exact": (_exact, "exact (probability-flow ODE)"),
  "variational": (_variational, "variational bound of the chain"),
}


class Blocks:
  """Evaluates examples in blocks of `likelihood.batch_size`, each by a program of one device, so
  that what a block gives depends on nothing but its examples, and keeps each in a file. Hosts,
  devices and the cores of a CPU share the blocks.
  """

  def __init__(self, job: Job, held: Held, folder: Path):
    self.experiment, self.folder = job.experiment, folder
    self.options, self.key = job.experiment.config.likelihood, job.key("likelihood")
    self.split = job.experiment.dataset.splits[self.options.split]
    local = job.experiment.mesh.local_devices
    self._held = [(device, jax.device_put(held, device)) for device in local]
    self._evaluate = jax.jit(self._columns)

  def _columns(self, held: Held, *block) -> dict[str, Array]:
    with jax.default_matmul_precision("highest"):
      return KINDS[self.options.kind][0](self.experiment, held, *block)

  def _call(self, rows: np.ndarray, folds: np.ndarray, device, held) -> dict[str, Array]:
    """Columns of the examples `rows` whose keys are folded with `folds` [2, n]."""
    keys = keys_of(self.key, rows)
    fold = jax.vmap(jax.random.fold_in)
    draws, probes = (fold(keys, jnp.asarray(f)) for f in folds)
    stored = np.asarray(self.split["image"][rows]), labels_of(self.split, rows)
    return self._evaluate(held, *jax.device_put((draws, probes, *stored), device))

  def evaluate(self, rows: np.ndarray, folds: np.ndarray, name: str) -> Columns:
    """Columns [n, ...] of the examples `rows`; blocks that are in files are read, the others are
    evaluated and written, whole or not at all.
    """
    size = self.options.batch_size
    count = -(-len(rows) // size)
    path = lambda block: self.folder / f"{name}_{block:05d}.npz"
    devices.wait_for_all(f"blocks {name}")
    missing = [block for block in range(count) if not path(block).is_file()]
    missing = missing[jax.process_index() :: jax.process_count()]

    def make(task):
      block, place = task
      # the last block repeats its last example
      positions = np.minimum(block * size + np.arange(size), len(rows) - 1)
      columns = jax.device_get(self._call(rows[positions], folds[:, positions], *place))
      valid = min(size, len(rows) - block * size)
      files.write_arrays(path(block), {name: c[:valid] for name, c in columns.items()})

    tasks = zip(missing, itertools.cycle(self._held))
    num_threads = len(self._held) * devices.programs_at_once()
    options = {"desc": name, "unit": "block", "disable": devices.no_bar()}
    with tqdm(total=count, initial=count - len(missing), **options) as bar:
      for _ in devices.in_threads(make, tasks, num_threads):
        bar.update()
    devices.wait_for_all(f"blocks {name} written")
    blocks = [files.read_arrays(path(block)) for block in range(count)]
    return {n: np.concatenate([block[n] for block in blocks]) for n in blocks[0]}


class Uncertainty(NamedTuple):
  """Variances of one evaluation of an example, from examples that were evaluated again."""

  probes: float  # other probes
  draws: float  # other dequantization (or noise of the chain), beyond the probes


def _replicate(blocks: Blocks, rows: np.ndarray, first: np.ndarray) -> Uncertainty:
  """Evaluates half a block of examples with other probes, and with other draws and probes.

  Args:
    rows, first: [n] the examples, and log_weight of their first evaluation.
  """
  picked = spread(len(rows), max(1, blocks.options.batch_size // 2))
  count = len(picked)
  folds = np.array([[DRAW] * count + [REDRAW] * count, [REPROBE] * 2 * count])
  again = blocks.evaluate(np.tile(rows[picked], 2), folds, "replicates")["log_weight"]
  differences = again.reshape(2, count).astype(np.float64) - first[picked]
  same, both = (0.5 * np.nanmean(d[np.isfinite(d)] ** 2) for d in differences)
  return Uncertainty(same, max(0.0, both - same))


def _standard_errors(values: np.ndarray, one: Uncertainty, num_draws: int) -> dict[str, float]:
  """That of the mean of the values, and its parts: the choice of examples, draws, probes."""
  n = len(values)
  total = standard_error(values) ** 2
  probes, draws = (variance / num_draws / n for variance in one)
  parts = {
    "standard_error": total,
    "standard_error_examples": max(0.0, total - probes - draws),
    "standard_error_draws": draws,
    "standard_error_probes": probes,
  }
  return {name: float(np.sqrt(value)) for name, value in parts.items()}


def _draw(blocks: Blocks, rows: np.ndarray, number: int) -> Columns:
  """The columns of every example for one draw of its dequantization."""
  folds = np.array([[DRAW], [PROBE]]) + 4 * number  # 4 folds to a draw
  return blocks.evaluate(rows, np.repeat(folds, len(rows), 1), f"draw{number}")


def _check_failures(ok: np.ndarray, rows: np.ndarray, options) -> None:
  """Says which examples failed; it is an error if all did."""
  if ok.all():
    return
  failed = rows[~ok]
  text = (
    f"{len(failed)} of {len(rows)} solves failed (examples {failed[:10].tolist()}"
    f"{' ...' if len(failed) > 10 else ''}): not finite, or more than likelihood.max_steps = "
    f"{options.max_steps}.\n  mend:  raise likelihood.max_steps or likelihood.rtol ({options.rtol})"
  )
  if not ok.any():
    raise RunError(text)
  print(f"warning: {text}\n  the result is that of the other {ok.sum()}", flush=True)


def _description(experiment: Experiment) -> dict[str, Any]:
  """What the number is and how it was made."""
  config, options = experiment.config, experiment.config.likelihood
  shared = {name: options[name] for name in ("split", "num_draws", "batch_size", "seed")}
  about = {"kind": KINDS[options.kind][1], **shared}
  if experiment.transform.levels:
    about["trained_on"] = "dequantized values" if config.training.dequantize else "centres of bins"
  if options.kind == "variational":
    times = chain(experiment).times
    levels = {"num_levels": len(times)}
    levels |= {"lowest_level": float(times[0]), "variance": options.variance}
    return about | levels | {"dequantization": f"none: {options.decoder} decoder"}
  used = {name: options[name] for name in ("control", *OPTIONS)}
  law = dequantizer.description(experiment)
  return about | {"t_min": process(experiment).t_min, **used, "dequantization": law}


def _warn_of_mismatch(experiment: Experiment) -> None:
  """A density that was never trained where it is evaluated has a likelihood of little meaning."""
  config, options = experiment.config, experiment.config.likelihood
  of_centres = options.dequantization == "truncated_normal"
  mismatch = of_centres == config.training.dequantize
  if experiment.transform.levels and options.kind == "exact" and mismatch:
    better = "uniform or variational" if of_centres else "truncated_normal"
    print(
      f"warning: the network was trained with training.dequantize={config.training.dequantize}, "
      f"and likelihood.dequantization={options.dequantization} evaluates it on other values\n"
      f"  mend:  likelihood.dequantization={better}, or likelihood.kind=variational",
      flush=True,
    )


def _comparison(name: str, values: np.ndarray, baseline: np.ndarray) -> dict[str, Any]:
  """The baseline beside the values of the same examples."""
  return {
    f"baseline_{name}": baseline.mean(),
    "baseline_standard_error": standard_error(baseline),
    "baseline": "Gaussian mixture, 10 full-covariance components, dequantized training split",
    "gain_standard_error": standard_error(values - baseline),
  }


def _baseline(job: Job, blocks: Blocks, rows: np.ndarray) -> np.ndarray:
  """log p - log q of the Gaussian mixture on the same values, uniformly dequantized."""
  transform, d = job.experiment.transform, job.experiment.num_dims
  keys = fold_in(keys_of(blocks.key, rows), DRAW)
  x = np.asarray(transform.dequantize(keys, jnp.asarray(blocks.split["image"][rows])))
  offset = d * np.log(transform.bin_width) if transform.levels else 0.0
  return mixture_log_prob(training_examples(job), x) + offset


def _write_files(job: Job, held: Held, blocks: Blocks, table: Columns, name: str) -> None:
  """The table, the pictures and the latents, by the first host."""
  if not devices.is_first():
    return
  results, transform = job.workdir / "results", job.experiment.transform
  latent = table.pop("latent", None)
  np.savez_compressed(results / "likelihood.npz", **table)
  ok = np.isfinite(table[name])
  images = transform.forward(jnp.asarray(blocks.split["image"][table["index"][ok]]))
  p_values = table["typicality"][ok] if "typicality" in table else None
  shown = table[name][ok], name, p_values, np.asarray(images)
  figures.save_likelihood(results / "likelihood.png", *shown, transform)
  if latent is not None:
    latents.save(results, job.experiment, held, table["index"], latent)


def run(job: Job) -> dict[str, Any]:
  """Bits/dim of a split (of continuous values the log-density in nats), each example once, with its
  standard error and what it is made of; a table, a histogram, and the baseline's; the latents.
  """
  options, experiment = job.experiment.config.likelihood, job.experiment
  _warn_of_mismatch(experiment)
  if options.check:
    likelihood_study.run(job)
  begin, held = time.perf_counter(), hold(job)
  digest = settings.digest(experiment.config, *SECTIONS["likelihood"])
  blocks = Blocks(job, held, job.workdir / "results" / f"likelihood-step{job.step}-{digest}")
  total = len(blocks.split["image"])
  rows = spread(total, options.num_examples or total)
  draws = [_draw(blocks, rows, number) for number in range(options.num_draws)]
  weights = np.stack([draw["log_weight"] for draw in draws]).astype(np.float64)
  log_p = np.asarray(importance_bound(jnp.asarray(weights)), np.float64)
  ok = np.isfinite(log_p)
  _check_failures(ok, rows, options)
  name, scale = unit(experiment)
  values, one = scale * log_p[ok], _replicate(blocks, rows, weights[0])
  one = Uncertainty(*(scale**2 * variance for variance in one))
  nfe = np.stack([draw["nfe"] for draw in draws])[:, ok]
  table = {"index": rows, name: scale * log_p, **draws[0]}
  result = {
    name: values.mean(),
    **_standard_errors(values, one, options.num_draws),
    "num_examples": len(values),
    "num_failed": int((~ok).sum()),
    **_description(experiment),
    **{f"nfe_{f}": float(getattr(np, f)(nfe)) for f in ("mean", "min", "max")},
  }
  if options.kind == "exact":
    prior_std, num_dims = experiment.sde.prior_std, experiment.num_dims
    table["typicality"] = latents.typicality(table["latent_norm"], prior_std, num_dims)
    result |= latents.summary(table["typicality"][ok])
  if experiment.num_dims <= LARGEST_MIXTURE:
    baseline = scale * _baseline(job, blocks, rows)[ok]
    table[f"baseline_{name}"] = np.full(len(rows), np.nan)
    table[f"baseline_{name}"][ok] = baseline
    result |= _comparison(name, values, baseline)
  seconds = time.perf_counter() - begin
  _write_files(job, held, blocks, table, name)
  return job.write("likelihood", seconds, result)
