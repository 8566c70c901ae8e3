"""What guidance costs: python -m evaluation.guidance_cost [rounds].

Each round runs, one after the other, ten steps of ancestral sampling without guidance and with
every kind of it, and what each calls as often outside of a loop, so that a busy machine slows all
alike; medians of the ratios over the rounds are printed. XLA's CPU backend is slow at gradients of
convolutions within loops: "in a loop" tells whether ours are.
"""

import functools
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from classification import make_log_prob_fn
from guidance import Condition, classifier_free, classifier_guidance, dps, posterior_guidance
from models.classifier import Model as Classifier
from models.ddpm import Model
from operators import inpainting
from parameterization import make_noise_fn
from sampling import SAMPLERS, sample, time_grid
from sde_lib import make_sde

STEPS, CLASSES = 10, 10
UNET = {"nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "dropout": 0.0, "num_classes": CLASSES}
CLASSIFIERS = {
  "wide_resnet": {"architecture": "wide_resnet", "depth": 10, "widen": 2},
  "mlp": {"architecture": "mlp", "hidden": (512, 512, 512)},
}
# batch, and the resolution with attention
SIZES = {(64, 8, 8, 1): 4, (16, 32, 32, 3): 16}


def hooks(shape: tuple[int, ...], resolution: int) -> dict[str, tuple[Callable, jax.Array]]:
  """label: (parameters -> (noise function, what it takes as labels)), and the parameters."""
  sde, key, x = make_sde("vp"), jax.random.key(0), jnp.zeros(shape)
  model, t, labels = Model(**UNET, attn_resolutions=(resolution,)), x[:, 0, 0, 0], None
  labels = jnp.arange(len(x)) % CLASSES
  laws = {name: Classifier(num_classes=CLASSES, **args) for name, args in CLASSIFIERS.items()}
  params = {"network": jax.jit(model.init)(key, x, t)["params"]}
  params |= {name: jax.jit(law.init)(key, x, t)["params"] for name, law in laws.items()}
  operator = inpainting(shape[1:], "lower_half")
  base = lambda p: make_noise_fn(sde, model, p["network"], output="v", c_noise="log_snr")

  def by_classifier(name):
    law = lambda p: make_log_prob_fn(sde, laws[name], p[name], sigma_data=0.5)
    return lambda p: classifier_guidance(sde, base(p), law(p))

  def by_posterior(**options):
    return lambda p: posterior_guidance(sde, base(p), operator, **options)

  table = {
    "unguided": (base, labels),
    "classifier-free": (lambda p: classifier_free(sde, base(p), null_label=CLASSES), labels),
    **{f"classifier, {name}": (by_classifier(name), labels) for name in laws},
    "Pi-GDM": (by_posterior(), Condition(operator.forward(x), labels)),
    "moment matching, 2 iterations": (
      by_posterior(covariance="tweedie", num_iterations=2),
      Condition(operator.forward(x), labels),
    ),
    "DPS": (base, labels),
  }
  return table, params


def compiled(shape: tuple[int, ...], resolution: int) -> dict[str, dict[str, Callable]]:
  """label: {"scan": ten steps, "call": one call of the noise function}."""
  sde, key, x = make_sde("vp"), jax.random.key(0), jax.random.normal(jax.random.key(1), shape)
  times, (table, params) = time_grid(sde, STEPS, "log_snr"), hooks(shape, resolution)
  operator, ancestral = inpainting(shape[1:], "lower_half"), SAMPLERS["ancestral"](sde)
  programs = {}
  for label, (hook, labels) in table.items():
    step = dps(sde, ancestral, operator, operator.forward(x)) if label == "DPS" else ancestral
    run = {"step": step, "times": times, "labels": labels}
    functions = {
      "scan": lambda p, hook=hook, run=run: sample(key, sde, hook(p), shape, **run)[0],
      "call": lambda p, hook=hook, labels=labels: hook(p)(x, 0.5, labels),
    }
    programs[label] = {
      kind: functools.partial(jax.jit(function).lower(params).compile(), params)
      for kind, function in functions.items()
    }
  return programs


def measure(programs: dict[str, dict[str, Callable]], rounds: int) -> dict[str, np.ndarray]:
  """Seconds per step or call of each program, {label: [rounds, 2]}."""
  seconds = {label: [] for label in programs}
  for _ in range(rounds + 1):
    for label, kinds in programs.items():
      row = []
      for kind, program in kinds.items():
        begin = time.perf_counter()
        for _ in range(STEPS if kind == "call" else 1):
          program().block_until_ready()
        row.append((time.perf_counter() - begin) / STEPS)
      seconds[label].append(row)
  return {label: np.array(rows[1:]) for label, rows in seconds.items()}


def main() -> None:
  """Prints the cost of a guided step over an unguided one, and of the loop over a call outside."""
  rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
  for shape, resolution in SIZES.items():
    seconds = measure(compiled(shape, resolution), rounds)
    base = seconds["unguided"][:, 0]
    print(f"{shape}: unguided {1e3 * np.median(base):.1f} ms a step")
    print(f"{'':<32}{'over unguided':>16}{'in a loop':>12}")
    for label, rows in seconds.items():
      inside = "" if label == "DPS" else f"{np.median(rows[:, 0] / rows[:, 1]):>12.2f}"
      print(f"{label:<32}{np.median(rows[:, 0] / base):>16.2f}{inside}")


if __name__ == "__main__":
  main()
