"""What a sampler costs over the network it calls: python -m evaluation.sampler_overhead [rounds].

Each round runs, one after the other, the compiled network alone as often as a sampler calls it, and
every sampler, so that a busy machine slows all alike; medians of the ratios over the rounds are
printed. diffrax's fixed steps are compared with the scan of the same scheme.
"""

import functools
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from models.ddpm import Model
from parameterization import make_noise_fn, make_score_fn
from sampling import SAMPLERS, sample, sample_sde, time_grid
from sde_lib import make_sde

SHAPE, STEPS = (16, 32, 32, 3), 10
NETWORK = {"nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (16,)}

# label: (sampler, options) with one evaluation a step
SCANS = {
  "Euler-Maruyama": ("euler_maruyama", {}),
  "ancestral": ("ancestral", {}),
  "DDIM": ("ddim", {}),
  "DPM-Solver++ 2M": ("dpm_solver", {}),
  "UniPC": ("unipc", {}),
}
# label: (solver, options, what it is compared with)
SOLVES = {
  "diffrax Euler": ("euler", {}, "Euler-Maruyama"),
  "diffrax Euler, x / alpha": ("euler", {"exponential": True}, "Euler-Maruyama"),
  "diffrax Euler, refinable path": ("euler", {"refinable": True}, "Euler-Maruyama"),
}


def compiled() -> dict[str, Callable[[], jax.Array]]:
  """label: a program of STEPS network evaluations; "network" is one evaluation."""
  model, sde, key = Model(**NETWORK, dropout=0.0), make_sde("vp"), jax.random.key(0)
  params = jax.jit(model.init)(key, jnp.zeros(SHAPE), jnp.ones(SHAPE[0]))["params"]
  make = lambda p: make_noise_fn(sde, model, p, output="noise", c_noise="t999")
  times = time_grid(sde, STEPS, "time")

  def scan(name, options):
    run = {"step": SAMPLERS[name](sde, **options), "times": times}
    return lambda p: sample(key, sde, make(p), SHAPE, **run)[0]

  def solve(solver, options):
    run = {"solver": solver, "num_steps": STEPS, **options}
    return lambda p: sample_sde(key, sde, make_score_fn(sde, make(p)), SHAPE, **run)[0]

  x = jax.random.normal(key, SHAPE)
  functions = {"network": lambda p: make(p)(x, 0.5)}
  functions |= {label: scan(*choice) for label, choice in SCANS.items()}
  functions |= {label: solve(*choice[:2]) for label, choice in SOLVES.items()}
  programs = {label: jax.jit(f).lower(params).compile() for label, f in functions.items()}
  return {label: functools.partial(program, params) for label, program in programs.items()}


def measure(rounds: int) -> dict[str, np.ndarray]:
  """Seconds per network evaluation of each program, [rounds]."""
  programs, seconds = compiled(), {}
  for _ in range(rounds + 1):
    for label, program in programs.items():
      begin = time.perf_counter()
      for _ in range(STEPS if label == "network" else 1):
        program().block_until_ready()
      seconds.setdefault(label, []).append((time.perf_counter() - begin) / STEPS)
  return {label: np.array(values[1:]) for label, values in seconds.items()}


def main() -> None:
  """Prints the overhead of every program over the network, and of diffrax over the scan."""
  seconds = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
  over = lambda label, base: 100 * (np.median(seconds[label] / seconds[base]) - 1)
  print(f"network {1e3 * np.median(seconds['network']):.1f} ms per evaluation, {SHAPE}")
  print(f"{'':<32}{'over the network':>18}{'over the scan':>16}")
  for label in SCANS:
    print(f"{label:<32}{over(label, 'network'):>+16.1f} %")
  for label, (_, _, base) in SOLVES.items():
    print(f"{label:<32}{over(label, 'network'):>+16.1f} %{over(label, base):>+14.1f} %")


if __name__ == "__main__":
  main()
