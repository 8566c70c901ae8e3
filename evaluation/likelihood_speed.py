"""How fast the exact likelihood is: python -m evaluation.likelihood_speed [config or workdir
[images]] [channels=N] [tolerance=T] [at_once=N] [rounds=N].

Against a written-out baseline of the usual way (Song et al. 2021's released code): scipy's RK45 on
the host over the whole flattened batch and its log-densities, rtol = atol = 1e-5; drift and
divergence are two compiled passes of the network for each evaluation, forward, and forward with a
backward pass for Hutchinson's estimate. Same network, same probes, float32. Rounds alternate, so
that a busy machine slows both; medians are compared. Errors are against a solve in float64 at
tolerance 1e-6 with the same probes.

A config gives a random network, its kernels perturbed so that its output is not zero, on random
images; a workdir its trained one on its data. `channels` replaces `nf` of a config, `tolerance`
that of ours (1e-5), `rounds` are timed (3) after one that is not. Ours runs as the job does: blocks
of `at_once` images (8), each of which waits for its slowest image, on a CPU one on every core.
"""

import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict
from scipy.integrate import solve_ivp

import devices
import settings
from divergence import DIVERGENCES
from evaluation import trained
from experiment import Experiment, build
from likelihood import log_likelihood
from parameterization import make_noise_fn, make_score_fn
from sde_lib import coefficients, example_keys, prior_log_prob

KEY = 1
SOURCE, COUNT = "configs/digits.py", 16
OPTIONS = {"channels": 0, "tolerance": 1e-5, "at_once": 8, "rounds": 3}
BASELINE = {"rtol": 1e-5, "atol": 1e-5, "method": "RK45"}
REFERENCE = {"rtol": 1e-6, "atol": 1e-6, "solver": "dopri8", "max_steps": 10_000}


class Run(NamedTuple):
  """log p of each image, evaluations of drift and divergence, network passes of an evaluation."""

  log_prob: np.ndarray
  nfe: float
  passes: int


def score_of(experiment: Experiment, params: PyTree, dtype: str = "float32") -> Callable:
  """The network's score, computed in `dtype`."""
  model, sde = experiment.model.clone(dtype=dtype), experiment.sde
  noise_fn = make_noise_fn(sde, model, params, **experiment.config.parameterization)
  return make_score_fn(sde, noise_fn)


def baseline(experiment: Experiment, params: PyTree, x: jax.Array) -> Callable[[], Run]:
  """A solve on the host; a backward pass counts as one."""
  sde, (b, *_) = experiment.sde, x.shape
  draw = lambda key, x: DIVERGENCES["rademacher"](key, x, 1)[0]
  probes = jax.vmap(draw)(example_keys(jax.random.key(KEY), b), x)

  @jax.jit
  def drift(params, x, t):
    f, g_squared = coefficients(sde, t)
    return f * x - 0.5 * g_squared * score_of(experiment, params)(x, jnp.full(b, t))

  @jax.jit
  def divergence(params, x, t):
    pulled = jax.grad(lambda x: jnp.sum(drift(params, x, t) * probes))(x)
    return jnp.sum((pulled * probes).reshape(b, -1), axis=1)

  def field(t, state):
    at = jnp.asarray(state[:-b].reshape(x.shape), jnp.float32), jnp.float32(t)
    parts = np.asarray(drift(params, *at)), np.asarray(divergence(params, *at))
    return np.concatenate([part.ravel() for part in parts])

  def run():
    start = np.concatenate([np.asarray(x).ravel(), np.zeros(b)])
    solution = solve_ivp(field, (sde.t_min, sde.t_max), start, **BASELINE)
    end = solution.y[:, -1]
    prior = prior_log_prob(sde, jnp.asarray(end[:-b].reshape(x.shape), jnp.float32))
    return Run(np.asarray(prior) + end[-b:], solution.nfev, 3)

  return run


def ours(
  experiment: Experiment, params: PyTree, x: jax.Array, at_once: int, **options
) -> Callable[[], Run]:
  """`log_likelihood` compiled; a Jacobian-vector product counts as one pass."""
  keys, dtype = example_keys(jax.random.key(KEY), len(x)), str(x.dtype)

  @jax.jit
  def evaluate(params, keys, x):
    score_fn = score_of(experiment, params, dtype)
    return log_likelihood(keys, experiment.sde, score_fn, x, **options)

  def run():
    parts = np.split(np.arange(len(x)), range(at_once, len(x), at_once))

    def solve(part):
      with jax.enable_x64(dtype == "float64"):  # of this thread
        return jax.device_get(evaluate(params, keys[part], x[part]))

    results = list(devices.in_threads(solve, parts, devices.programs_at_once()))
    log_prob, nfe = (np.concatenate([getattr(r, n) for r in results]) for n in ("log_prob", "nfe"))
    return Run(log_prob, float(nfe.mean()), 2)

  return run


def reference(config: ConfigDict, params: PyTree, x: jax.Array, at_once: int) -> np.ndarray:
  """log p in float64 at a tight tolerance."""
  with jax.enable_x64(True):
    double = lambda tree: jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), tree)
    return ours(build(config), double(params), double(x), at_once, **REFERENCE)().log_prob


def perturbed(experiment: Experiment) -> PyTree:
  """Random parameters whose output layers are not zero."""
  x, key = jnp.zeros((1, *experiment.spec.shape)), jax.random.key(0)
  params = jax.jit(experiment.model.init)(key, x, jnp.zeros(1))["params"]

  def shake(path, a):
    key = jax.random.key(zlib.crc32(jax.tree_util.keystr(path).encode()))
    width = np.sqrt(np.prod(a.shape[:-1]))
    return a + 0.1 / width * jax.random.normal(key, a.shape) if a.ndim > 1 else a

  return jax.tree_util.tree_map_with_path(shake, params)


def compare(
  experiment: Experiment,
  params: PyTree,
  x: jax.Array,
  tolerance: float,
  at_once: int,
  rounds: int,
) -> None:
  """Prints time per image, evaluations, passes and errors of both, and the ratio."""
  options = {"rtol": tolerance, "atol": tolerance, "solver": "dopri5"}
  runs = {
    "baseline": baseline(experiment, params, x),
    "ours": ours(experiment, params, x, at_once, **options),
  }
  results, seconds = {name: run() for name, run in runs.items()}, {name: [] for name in runs}
  for _ in range(rounds):
    for name, run in runs.items():
      begin = time.perf_counter()
      run()
      seconds[name].append((time.perf_counter() - begin) / len(x))
  ratio = np.median(np.array(seconds["baseline"]) / np.array(seconds["ours"]))
  print(f"{ratio:.2f} times less time per image", flush=True)
  exact = reference(experiment.config, params, x, at_once)
  titles = f"{'median error':>14}{'rms':>10}{'largest':>10}{'of the mean (nats)':>20}"
  print(f"{'':<10}{'s/image':>10}{'NFE':>8}{'passes':>8}{titles}")
  for name, result in results.items():
    error = result.log_prob - exact
    cost = f"{np.median(seconds[name]):>10.4f}{result.nfe:>8.1f}{result.nfe * result.passes:>8.0f}"
    rms = np.sqrt(np.mean(error**2))
    size = np.abs(error)
    errors = f"{np.median(size):>14.2e}{rms:>10.2e}{size.max():>10.2e}{error.mean():>20.2e}"
    print(f"{name:<10}{cost}{errors}")
  print(f"log p {exact.mean():.2f} nats on average", flush=True)


def main() -> None:
  """Reads the arguments and compares."""
  jax.config.update("jax_default_matmul_precision", "highest")
  places = [word for word in sys.argv[1:] if "=" not in word]
  options = OPTIONS | dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
  if len(places) > 2 or options.keys() != OPTIONS.keys():
    sys.exit(__doc__)
  source, count = (*places, *(SOURCE, COUNT)[len(places) :])
  tolerance, count = float(options["tolerance"]), int(count)
  channels, at_once, rounds = (int(options[n]) for n in ("channels", "at_once", "rounds"))
  if Path(source).is_dir():
    job = trained.start(settings.read(Path(source)), Path(source), train=False)
    experiment, params = job.experiment, job.params
    values = experiment.dataset.splits["test"]["image"][:count]
    x = experiment.transform.dequantize(jax.random.key(0), jnp.asarray(values))
  else:
    config = settings.load_config_file(source)
    if channels:
      config.model.args.nf = channels
    experiment = build(config)
    params = perturbed(experiment)
    x = jax.random.uniform(jax.random.key(0), (count, *experiment.spec.shape), minval=-1.0)
  compare(experiment, params, x, tolerance, at_once, rounds)


if __name__ == "__main__":
  main()
