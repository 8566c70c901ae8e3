"""What the settings of the likelihood change: tolerance, estimator of the divergence and t_min
against the answer, on a few examples, in bits/dim (of continuous values in nats).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from divergence import DIVERGENCES, fit_control
from evaluation.batches import keys_of, labels_of, spread
from evaluation.evidence import exact, hold, process, unit
from evaluation.trained import Job, training_examples
from sde_lib import fold_in

NUM_EXAMPLES = 32
LARGEST_EXACT = 1024  # dimensions whose trace is taken exactly for the answer
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
PRODUCTS = {"orthogonal": 3, "hutch_pp": 3}  # of the Jacobian; the others take one
TIMES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


class Study:
  """The log-weights of the same examples, dequantized alike, under changed settings."""

  def __init__(self, job: Job):
    experiment, options = job.experiment, job.experiment.config.likelihood
    split = experiment.dataset.splits[options.split]
    rows = spread(len(split["image"]), NUM_EXAMPLES)
    self._experiment, self._held, self.num_dims = experiment, hold(job), experiment.num_dims
    self._keys, self._labels = keys_of(job.key("likelihood"), rows), labels_of(split, rows)
    self._stored = jnp.asarray(split["image"][rows])
    answer = "exact" if self.num_dims <= LARGEST_EXACT else "rademacher"
    self.answer = {"divergence": answer, "num_probes": 8, "rtol": 1e-6, "atol": 1e-6}
    self.control = fit_control(training_examples(job))

  def evaluate(self, t_min: float | None = None, **changes) -> tuple[np.ndarray, float]:
    """(bits/dim or nats of each example, mean NFE)."""
    experiment, sde = self._experiment, process(self._experiment)
    sde = sde if t_min is None else dataclasses.replace(sde, t_min=t_min)

    @jax.jit
    def run(held, keys, k, labels):
      at = sde, held, fold_in(keys, 0), fold_in(keys, 1), k, labels
      result, log_q = exact(experiment, *at, **changes)
      return result.log_prob - log_q, result.nfe

    with jax.default_matmul_precision("highest"):
      log_weight, nfe = run(self._held, self._keys, self._stored, self._labels)
    return unit(experiment)[1] * np.asarray(log_weight, np.float64), float(np.mean(nfe))


def _show(name: str, evaluated: tuple[np.ndarray, float], answer: np.ndarray) -> None:
  (values, nfe), difference = evaluated, evaluated[0] - answer
  numbers = difference.mean(), difference.std(), np.abs(difference).max()
  columns = "".join(f"{number:>12.1e}" for number in numbers)
  print(f"  {name:<28}{values.mean():>10.4f}{columns}{nfe:>7.0f}", flush=True)


def run(job: Job) -> None:
  """Prints the study."""
  study, options = Study(job), job.experiment.config.likelihood
  reference = study.evaluate(**study.answer)
  answer = reference[0]
  print(f"study on {len(answer)} examples; the answer: {study.answer}")
  print(f"\n  {'':<28}{'mean':>10}{'difference':>12}{'its std':>12}{'largest':>12}{'NFE':>7}")
  _show("answer", reference, answer)
  print("tolerance, divergence as for the answer")
  for tolerance in TOLERANCES:
    at = {"rtol": tolerance, "atol": tolerance}
    _show(f"{tolerance:.0e}", study.evaluate(**study.answer | at), answer)
  print(f"divergence, tolerance {options.rtol:g}")
  for name in DIVERGENCES:
    if name == "exact" and study.num_dims > LARGEST_EXACT:
      continue
    for control in (None, study.control):
      at = {"divergence": name, "num_probes": PRODUCTS.get(name, 1), "control": control}
      label = f"{name}, {at['num_probes']}" + (", with control" if control else "")
      _show(label, study.evaluate(**at), answer)
  print("t_min, everything else as for the answer")
  for t_min in (t for t in TIMES if job.experiment.sde.times is None):
    _show(f"{t_min:.0e}", study.evaluate(t_min=t_min, **study.answer), answer)
