"""Error against network evaluations for all samplers: python -m evaluation.work_precision
[workdir].

Without a workdir: a Gaussian mixture in one dimension with its exact score, where the distance to
the law is known without a second sample. With the workdir of a trained run: its samples against
those of 1,000 ancestral steps, by the Fréchet distance in pixels and an energy two-sample test,
beside a second set of 1,000-step samples. Writes a table and a plot below docs/ or into the
workdir's results.
"""

import functools
import itertools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from scipy.stats import norm

import settings
from evaluation import jobs
from evaluation.fid import sample_frechet_distance
from evaluation.two_sample import energy_test
from parameterization import make_score_fn
from sampling import SAMPLERS, sample, sample_ode, sample_sde, time_grid
from sde_lib import example_keys, make_sde, marginal

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WEIGHTS, MEANS, STD = np.array([0.7, 0.3]), np.array([1.0, -1.0]), 0.1
PROCESSES = {"vp": {"t_min": 1e-4}, "ve": {"sigma_max": 20.0}, "cosine": {}, "edm": {}}
BUDGETS = (8, 12, 16, 20, 32, 64, 128, 256)
NUM_SAMPLES = 20_000

# label: (sampler, options, evaluations per step)
STEPS = {
  "Euler-Maruyama": ("euler_maruyama", {}, 1),
  "reverse diffusion": ("reverse_diffusion", {}, 1),
  "ancestral": ("ancestral", {}, 1),
  "predictor-corrector": ("predictor_corrector", {}, 2),
  "DDIM": ("ddim", {}, 1),
  "EDM Heun": ("edm", {}, 2),
  "DPM-Solver++ 2M": ("dpm_solver", {}, 1),
  "DPM-Solver++ 2M SDE": ("dpm_solver", {"eta": 1.0}, 1),
  "UniPC": ("unipc", {}, 1),
}


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


@functools.cache
def mixture_quantiles(scale: float, extra: float) -> np.ndarray:
  """Quantiles of scale x_0 + N(0, extra^2) at NUM_SAMPLES midpoints, from its distribution
  function.
  """
  std = np.hypot(scale * STD, extra)
  grid = np.linspace(-scale - 6 * std, scale + 6 * std, 400_001)
  cdf = sum(w * norm.cdf(grid, scale * m, std) for w, m in zip(WEIGHTS, MEANS))
  return np.interp((np.arange(NUM_SAMPLES) + 0.5) / NUM_SAMPLES, cdf, grid)


def wasserstein2(sde, x: np.ndarray) -> float:
  """W2 between samples at t_min and the law there, by sorting."""
  alpha, sigma = (float(c) for c in marginal(sde, sde.t_min))
  return float(np.sqrt(np.mean((np.sort(x.ravel()) - mixture_quantiles(alpha, sigma)) ** 2)))


def mixture_table() -> list[tuple[str, str, str, int, float]]:
  """(process, sampler, grid, evaluations, W2) of every sampler on the mixture."""
  rows, key, shape = [], jax.random.key(0), (NUM_SAMPLES, 1)
  for process, args in PROCESSES.items():
    sde = make_sde(process, **args)
    noise_fn, score_fn = mixture_noise_fn(sde), make_score_fn(sde, mixture_noise_fn(sde))
    for (label, (name, options, cost)), budget in itertools.product(STEPS.items(), BUDGETS):
      step = SAMPLERS[name](sde, **options)
      draw = jax.jit(
        lambda times, run={"step": step, "denoise": None}, noise_fn=noise_fn, sde=sde: sample(
          key, sde, noise_fn, shape, times=times, **run
        )
      )
      for spacing in ("time", "log_snr", "karras"):
        x, nfe = draw(time_grid(sde, budget // cost, spacing))
        rows.append((process, label, spacing, int(nfe), wasserstein2(sde, np.asarray(x))))
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4):
      options = {"solver": "tsit5", "rtol": tolerance, "atol": tolerance}
      x, nfe = sample_ode(key, sde, score_fn, shape, **options)
      rows.append((process, "Tsit5 (adaptive)", "-", int(nfe), wasserstein2(sde, np.asarray(x))))
    for budget in (32, 64, 128, 256):
      options = {"solver": "shark", "num_steps": budget // 2}
      x, nfe = sample_sde(key, sde, score_fn, shape, **options)
      rows.append((process, "ShARK", "time", nfe, wasserstein2(sde, np.asarray(x))))
  return rows


def plot_mixture(rows, path: Path) -> None:
  """One panel per process: the best grid of each sampler."""
  figure, axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained", sharex=True)
  for axis, process in zip(axes.flat, PROCESSES):
    for label in dict.fromkeys(row[1] for row in rows):
      best = {}
      for p, name, _, nfe, error in rows:
        if (p, name) == (process, label) and np.isfinite(error):
          best[nfe] = min(error, best.get(nfe, np.inf))
      axis.loglog(best.keys(), best.values(), "o-", markersize=3, label=label)
    axis.set_title(process)
    axis.set_ylim(1e-3, 3)
    axis.grid(alpha=0.3, which="both")
  axes[0, 0].legend(fontsize=8)
  figure.supxlabel("network evaluations")
  figure.supylabel("W2 to the exact law (best of three grids)")
  figure.savefig(path, dpi=120)
  plt.close(figure)


# label: (sampler, options, steps, grid, denoise) of the comparison on a trained network
CANDIDATES = {
  "ancestral, 20 steps": ("ancestral", {}, 20, "log_snr", "mean"),
  "DDIM, 20 steps": ("ddim", {}, 20, "log_snr", "mean"),
  "EDM Heun, 10 steps": ("edm", {}, 10, "log_snr", "mean"),
  "DPM-Solver++ 2M, 10 steps": ("dpm_solver", {}, 10, "log_snr", "mean"),
  "DPM-Solver++ 2M, 20 steps": ("dpm_solver", {}, 20, "log_snr", "mean"),
  "DPM-Solver++ 2M SDE, 20 steps": ("dpm_solver", {"eta": 1.0}, 20, "log_snr", "mean"),
  "UniPC, 10 steps": ("unipc", {}, 10, "log_snr", "mean"),
  "UniPC, 20 steps": ("unipc", {}, 20, "log_snr", "mean"),
}
REFERENCE = ("ancestral", {}, 1000, "log_snr", "mean")


def network_table(
  workdir: Path, num_samples: int
) -> list[tuple[str, int, float, float, float, float]]:
  """(sampler, evaluations, Fréchet, energy distance, its p-value, seconds) against the
  reference.
  """
  job = jobs.start(settings.read(workdir), workdir, train=False)
  experiment, shape = job.experiment, (num_samples, *job.experiment.dataset.shape)

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
    rows.append(
      (label, nfe, sample_frechet_distance(x, reference), *energy_test(x, reference), seconds)
    )
    numbers = "{:>10.4f}{:>12.5f}{:>8.3f}{:>8.1f} s".format(*rows[-1][2:])
    print(f"{label:<32}{nfe:>6}{numbers}", flush=True)
  return rows


def main() -> None:
  """Prints the table and saves the plot."""
  if len(sys.argv) > 1:
    print(f"{'sampler':<32}{'NFE':>6}{'Fréchet':>10}{'energy':>12}{'p':>8}{'time':>9}")
    network_table(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 500)
    return
  rows = mixture_table()
  plot_mixture(rows, Path("docs/work_precision.png"))
  for process, budget in itertools.product(PROCESSES, (16, 20, 64)):
    near = [row for row in rows if row[0] == process and 0.8 * budget <= row[3] <= budget]
    best = sorted(near, key=lambda row: row[4])[:3]
    shown = "; ".join(f"{label} ({spacing}) {error:.4f}" for _, label, spacing, _, error in best)
    print(f"{process:<8} at most {budget:>3} evaluations: {shown}")


if __name__ == "__main__":
  main()
