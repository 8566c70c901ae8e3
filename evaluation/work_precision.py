"""Error against network evaluations for all samplers: python -m evaluation.work_precision
[workdir [samples]].

Without a workdir: a Gaussian mixture in one dimension with its exact score, by the energy distance
between the samples and the law itself. With the workdir of a trained run: its samples against those
of 1,000 ancestral steps, by permutation tests of the Fréchet distance in pixels and of the energy
distance, beside a second set of 1,000-step samples. Writes docs/work_precision.{csv,png}, or
work_precision.json into the workdir's results.
"""

import functools
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from scipy.stats import norm

import settings
from evaluation import trained
from evaluation.two_sample import energy_test, frechet_test
from parameterization import make_score_fn
from sampling import SAMPLERS, sample, sample_ode, sample_sde, time_grid
from sde_lib import SDE, example_keys, make_sde, marginal

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WEIGHTS, MEANS, STD = np.array([0.7, 0.3]), np.array([1.0, -1.0]), 0.1
PROCESSES = {
  "vp": {"t_min": 1e-4},
  "sub_vp": {"t_min": 1e-3},
  "ve": {"sigma_max": 20.0},
  "cosine": {"t_min": 1e-4},
  "edm": {},
  "rectified": {},
}
BUDGETS = (8, 12, 20, 32, 64)
NUM_SAMPLES = 20_000

# label: (sampler, options, evaluations per step)
STEPS = {
  "Euler-Maruyama": ("euler_maruyama", {}, 1),
  "reverse diffusion": ("reverse_diffusion", {}, 1),
  "ancestral": ("ancestral", {}, 1),
  "predictor-corrector": ("predictor_corrector", {}, 2),
  "DDIM": ("ddim", {}, 1),
  "EDM Heun": ("edm", {}, 2),
  "EDM Heun with churn": ("edm", {"gamma": 0.1}, 2),
  "DPM-Solver++ 2M": ("dpm_solver", {}, 1),
  "DPM-Solver++ 2M SDE": ("dpm_solver", {"eta": 1.0}, 1),
  "UniPC": ("unipc", {}, 1),
}
# label: (solver of the reverse SDE, evaluations per step); below 32 evaluations they are far off
SDE_STEPS = {"Heun, reverse SDE": ("heun", 2), "ShARK": ("shark", 2), "SRA1": ("sra1", 2)}


def mixture_noise_fn(sde):
  """The exact noise prediction of the mixture."""

  def noise_fn(x, t, labels=None):
    alpha, sigma = marginal(sde, t)
    variance = alpha**2 * STD**2 + sigma**2
    away = [x - alpha * mean for mean in MEANS]
    logits = jnp.stack([jnp.log(w) - 0.5 * d**2 / variance for w, d in zip(WEIGHTS, away)])
    share = jax.nn.softmax(logits, axis=0)
    return sigma / variance * sum(s * d for s, d in zip(share, away))

  return noise_fn


def energy_distance(sde, x: np.ndarray) -> tuple[float, float]:
  """Root of 2 * integral of (F_n - F)^2 between samples at t_min and the law there, and what it is
  on average for as many draws of the law itself (Székely & Rizzo 2004).
  """
  alpha, sigma = (float(c) for c in marginal(sde, sde.t_min))
  std = np.hypot(alpha * STD, sigma)
  ends = np.array([x.min(), x.max(), -alpha - 8 * std, alpha + 8 * std])
  grid = np.linspace(ends.min(), ends.max(), 200_001)
  law = sum(w * norm.cdf(grid, alpha * m, std) for w, m in zip(WEIGHTS, MEANS))
  empirical = np.searchsorted(np.sort(x.ravel()), grid, side="right") / x.size
  width = grid[1] - grid[0]
  floor = 2 * width * (law * (1 - law)).sum() / x.size
  return float(np.sqrt(2 * width * ((empirical - law) ** 2).sum())), float(np.sqrt(floor))


def mixture_rows(sde: SDE) -> Iterator[tuple[str, str, int, np.ndarray]]:
  """(sampler, grid, evaluations, samples) of every sampler on the mixture."""
  key, shape = jax.random.key(0), (NUM_SAMPLES, 1)
  noise_fn = mixture_noise_fn(sde)
  score_fn = make_score_fn(sde, noise_fn)
  for (label, (name, options, cost)), budget in itertools.product(STEPS.items(), BUDGETS):
    run = {"step": SAMPLERS[name](sde, **options), "denoise": None}
    draw = jax.jit(functools.partial(sample, key, sde, noise_fn, shape, **run))
    for spacing in ("time", "log_snr", "karras"):
      yield label, spacing, *draw(times=time_grid(sde, budget // cost, spacing))[::-1]
  for tolerance in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
    options = {"solver": "tsit5", "rtol": tolerance, "atol": tolerance}
    yield "Tsit5 (adaptive)", "", *sample_ode(key, sde, score_fn, shape, **options)[::-1]
  for (label, (solver, cost)), budget in itertools.product(SDE_STEPS.items(), (32, 64)):
    for spacing in ("time", "log_snr", "karras"):
      options = {"num_steps": budget // cost, "spacing": spacing}
      draw = functools.partial(sample_sde, key, sde, score_fn, shape, solver=solver, **options)
      yield label, spacing, *jax.jit(draw)()[::-1]


def mixture_table() -> list[tuple[str, str, str, int, float, float]]:
  """(process, sampler, grid, evaluations, energy distance, its floor) on the mixture."""
  rows = []
  for process, args in PROCESSES.items():
    sde = make_sde(process, **args)
    for label, spacing, nfe, x in mixture_rows(sde):
      rows.append((process, label, spacing, int(nfe), *energy_distance(sde, np.asarray(x))))
    print(f"{process}: {sum(row[0] == process for row in rows)} runs", flush=True)
  return rows


def plot_mixture(rows, path: Path) -> None:
  """One panel per process: the best grid of each sampler."""
  figure, axes = plt.subplots(2, 3, figsize=(16, 9), layout="constrained", sharex=True, sharey=True)
  labels = dict.fromkeys(row[1] for row in rows)
  colors = dict(zip(labels, plt.get_cmap("tab20").colors))
  for axis, process in zip(axes.flat, PROCESSES):
    mine = [row for row in rows if row[0] == process]
    for label in labels:
      best = {}
      for _, name, _, nfe, error, _ in mine:
        if name == label and np.isfinite(error):
          best[nfe] = min(error, best.get(nfe, np.inf))
      nfes = sorted(best)
      axis.loglog(
        nfes, [best[n] for n in nfes], "o-", markersize=3, label=label, color=colors[label]
      )
    axis.axhline(mine[0][-1], color="k", linestyle=":", label="the law itself, as many draws")
    axis.set_title(process)
    axis.set_ylim(1e-3, 2)
    axis.grid(alpha=0.3)
  figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
  figure.supxlabel("network evaluations")
  figure.supylabel("energy distance to the exact law (best of three grids)")
  figure.savefig(path, dpi=120)
  plt.close(figure)


# label: (sampler, options, steps); the comparison on a trained network, at most 20 evaluations
FEW = {
  label: (name, options, 20 // cost - 1)
  for label, (name, options, cost) in STEPS.items()
  if label in ("ancestral", "DDIM", "EDM Heun") or label.startswith(("DPM", "UniPC"))
} | {"UniPC, 10": ("unipc", {}, 9)}
# label: (sampler, options, steps, grid, denoise)
CANDIDATES = {
  f"{label} ({grid})": (*choice, grid, "tweedie")
  for label, choice in FEW.items()
  for grid in ("time", "log_snr", "karras")
}
REFERENCE = ("ancestral", {}, 1000, "log_snr", "mean")


def network_table(
  workdir: Path, num_samples: int
) -> list[tuple[str, int, float, float, float, float, float]]:
  """(sampler, evaluations, Fréchet, energy distance, its p-value, seconds) against the
  reference.
  """
  job = trained.start(settings.read(workdir), workdir, train=False)
  experiment, shape = job.experiment, (num_samples, *job.experiment.spec.shape)

  def draw(choice, seed):
    name, options, steps, spacing, denoise = choice
    sde, keys = experiment.sde, example_keys(jax.random.key(seed), num_samples)
    run = {"step": SAMPLERS[name](sde, **options), "denoise": denoise}
    times = time_grid(sde, steps, spacing)
    function = jax.jit(
      lambda p: sample(keys, sde, experiment.noise_fn(p), shape, times=times, **run)
    )
    compiled = function.lower(job.params).compile()
    begin = time.perf_counter()
    x, nfe = jax.device_get(compiled(job.params))
    return x.reshape(num_samples, -1), int(nfe), time.perf_counter() - begin

  reference, _, _ = draw(REFERENCE, 0)
  rows = []
  for label, choice in {"ancestral, 1000 steps again": REFERENCE, **CANDIDATES}.items():
    x, nfe, seconds = draw(choice, 1)
    rows.append((label, nfe, *frechet_test(x, reference), *energy_test(x, reference), seconds))
    numbers = "{:>10.4f}{:>8.3f}{:>12.5f}{:>8.3f}{:>8.1f} s".format(*rows[-1][2:])
    print(f"{label:<32}{nfe:>6}{numbers}", flush=True)
  return rows


def main() -> None:
  """Prints the table and saves the plot."""
  if len(sys.argv) > 1:
    workdir, num_samples = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 500
    print(f"{'sampler':<32}{'NFE':>6}{'Fréchet':>10}{'p':>8}{'energy':>12}{'p':>8}{'time':>10}")
    rows = network_table(workdir, num_samples)
    names = "sampler nfe frechet_pixels frechet_p energy energy_p seconds".split()
    record = {"num_samples": num_samples, "rows": [dict(zip(names, row)) for row in rows]}
    path = workdir / "results" / "work_precision.json"
    settings.write_text(path, json.dumps(record, indent=2) + "\n")
    return
  rows = mixture_table()
  plot_mixture(rows, Path("docs/work_precision.png"))
  names = "process,sampler,grid,evaluations,energy_distance,floor"
  lines = [",".join([*row[:3], str(row[3]), f"{row[4]:.5f}", f"{row[5]:.5f}"]) for row in rows]
  settings.write_text(Path("docs/work_precision.csv"), "\n".join([names, *lines]) + "\n")
  for process, budget in itertools.product(PROCESSES, (12, 20, 64)):
    near = [row for row in rows if row[0] == process and row[3] <= budget]
    best = {}
    for _, label, spacing, nfe, error, _ in sorted(near, key=lambda row: row[4]):
      best.setdefault(label, f"{label} ({spacing or '-'}, {nfe}) {error:.4f}")
    shown = "; ".join(list(best.values())[:4])
    print(f"{process:<10} at most {budget:>3}: {shown}")


if __name__ == "__main__":
  main()
