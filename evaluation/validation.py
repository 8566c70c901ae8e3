"""`--mode=validate`: whether a process, also a user's own, is one, in theory and in float32."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from scipy.integrate import solve_ivp

from errors import RunError, check
from sampling import SPACINGS, time_grid
from sde_lib import SDE, coefficients, log_snr, make_sde, marginal

NUM_TIMES = 1000
QUANTITIES = "alpha", "sigma", "f", "g^2"
WIDER = "raise t_min, or lower t_max, until every quantity is finite in float32"
STEEPER = "alpha / sigma must fall from t_min to t_max, by more than rounding"
CONTINUOUS = "log_alpha and log_sigma must be continuous, and differentiable in jnp"
PRIOR = "set prior_std to sigma(t_max), and make alpha(t_max) / sigma(t_max) smaller"
DIGITS = "write it with expm1, log1p, softplus; give SDE the logarithms; or raise t_min"


class Check(NamedTuple):
  """One row of the table: passed if value <= limit."""

  name: str
  passed: bool
  value: float
  limit: float
  mend: str


def _check(name: str, value: float, limit: float, mend: str) -> Check:
  return Check(name, bool(value <= limit), float(value), limit, mend)


def _times(sde: SDE) -> tuple[np.ndarray, np.ndarray]:
  """Increasing times of [t_min, t_max] as float32 and what they stand for in float64.

  NUM_TIMES even ones, crowded at both ends; the levels of a discrete-time model, where its
  tables have kinks.
  """
  if sde.times is not None:
    return np.float32(sde.times), np.float64(sde.times)
  u = np.concatenate([np.linspace(0, 1, NUM_TIMES // 2), np.geomspace(1e-9, 1, NUM_TIMES // 4)])
  u = np.sort(np.concatenate([u, 1 - np.geomspace(1e-6, 1, NUM_TIMES // 4)]))
  ends = np.float32([sde.t_min, sde.t_max])
  times = np.clip((sde.t_min + u * (sde.t_max - sde.t_min)).astype(np.float32), *ends)
  return times, times.astype(np.float64)


def _evaluate(sde: SDE, times: np.ndarray) -> dict[str, np.ndarray]:
  """alpha, sigma, f, g^2 and log-SNR at `times`, in the precision that JAX has now."""

  def quantities(t):
    return (*marginal(sde, t), *coefficients(sde, t), log_snr(sde, t))

  values = quantities(jnp.asarray(times, jnp.result_type(float)))
  return dict(zip((*QUANTITIES, "log-SNR"), (np.asarray(v, np.float64) for v in values)))


def _moment_error(sde: SDE, times: np.ndarray, variance: float = 0.3) -> float:
  """Largest relative error of the marginals against m' = f m, P' = 2 f P + g^2 (Sarkka & Solin
  2019, eq. 5.50-5.51), from data of `variance`; infinite where the solve fails.

  Every span between two `times` is integrated from its own marginals, all at once.
  """
  at, steps = _evaluate(sde, times), np.diff(times)
  moments = np.stack([at["alpha"], variance * at["alpha"] ** 2 + at["sigma"] ** 2])
  if not np.isfinite(moments).all():
    return np.inf
  rates = jax.jit(lambda t: jnp.stack(coefficients(sde, t)))

  def derivative(u, y):
    f, g_squared = np.asarray(rates(times[:-1] + u * steps))
    if not np.isfinite([f, g_squared]).all():
      raise FloatingPointError  # with a NaN the solver's step would shrink for ever
    mean, total = y.reshape(2, -1)
    return np.concatenate([steps * f * mean, steps * (2 * f * total + g_squared)])

  start, small = moments[:, :-1].ravel(), 1e-12 * moments[:, 1:].ravel()
  try:
    solution = solve_ivp(derivative, (0, 1), start, "DOP853", rtol=1e-10, atol=small)
  except FloatingPointError:
    return np.inf
  error = np.abs(solution.y[:, -1] / moments[:, 1:].ravel() - 1).max()
  return float(error) if solution.success else np.inf


def _prior_divergence(alpha: float, sigma: float, prior_std: float, sigma_data: float) -> float:
  """KL(q(x_T) || PRIOR) in nats per dimension for data N(0, sigma_data^2), in closed form."""
  ratio = ((alpha * sigma_data) ** 2 + sigma**2) / prior_std**2
  return 0.5 * (ratio - 1 - np.log(ratio))


def _relative_error(rounded: np.ndarray, exact: np.ndarray) -> float:
  """Largest |rounded / exact - 1|; 0 where both are 0."""
  error = np.abs(rounded - exact)
  return float(np.where(error == 0, 0.0, error / np.maximum(np.abs(exact), 1e-300)).max())


def _grid_checks(sde: SDE, num_steps: int) -> list[Check]:
  """Each spacing must run from exactly t_max to exactly t_min, strictly decreasing."""
  checks, ends = [], np.float32([sde.t_max, sde.t_min])
  levels = 0 if sde.times is None else len(sde.times)
  for name in SPACINGS:
    if name != "trained" or num_steps < levels:
      times = np.asarray(time_grid(sde, num_steps, name))
      wrong = np.sum(~(np.diff(times) < 0)) + np.sum(times[[0, -1]] != ends)
      mend = f"take fewer than {num_steps} steps, another spacing, or a larger t_min"
      checks.append(_check(f"{name} grid: steps that do not decrease, or ends", wrong, 0, mend))
  return checks


def validate(
  sde: SDE,
  rebuild: Callable[[], SDE] | None = None,
  *,
  sigma_data: float = 0.5,
  num_steps: int = 200,
) -> list[Check]:
  """Every check of a process, in theory (float64) and as it is computed (float32).

  Args:
    rebuild: makes the process once more, under float64: constants that its functions hold as JAX
      arrays are float32 otherwise, and JAX 0.10 mixes up the two precisions of a numpy table.
    sigma_data: std of the data, for the divergence of the prior.
    num_steps: steps of the time grids.
  """
  mend = "pass rebuild, a function that makes the same process"
  check(
    rebuild is not None or sde.times is None,
    "rebuild",
    None,
    "needed for a process with tables",
    mend,
  )
  times, exact_times = _times(sde)
  rounded = _evaluate(sde, times)
  with jax.enable_x64(True):
    exact_sde = rebuild() if rebuild else sde
    exact = _evaluate(exact_sde, exact_times)
    spans = np.linspace(sde.t_min, sde.t_max, 101) if sde.times is None else exact_times
    moment_error = _moment_error(exact_sde, spans)
  not_finite = sum(np.sum(~np.isfinite(v)) for v in (*rounded.values(), *exact.values()))
  with np.errstate(invalid="ignore"):
    rise = np.diff(exact["log-SNR"])[np.diff(times) > 0].max()
  end = exact["alpha"][-1], exact["sigma"][-1]
  prior_divergence = _prior_divergence(*end, sde.prior_std, sigma_data)
  lowest = min(rounded["g^2"].min(), exact["g^2"].min())
  errors = {name: _relative_error(rounded[name], exact[name]) for name in QUANTITIES}
  return [
    _check("values that are not finite", not_finite, 0, WIDER),
    Check("rise of log-SNR between times", bool(rise < 0), float(rise), 0.0, STEEPER),
    _check("-g^2 where it is negative", np.maximum(-lowest, 0.0), 0, STEEPER),
    _check("moments, error of the marginals", moment_error, 1e-6, CONTINUOUS),
    _check("prior, KL in nats/dim", prior_divergence, 1e-3, PRIOR),
    *[_check(f"float32 {name}, relative error", errors[name], 1e-4, DIGITS) for name in QUANTITIES],
    *_grid_checks(sde, num_steps),
  ]


def report(checks: list[Check]) -> str:
  """The table, with what mends a check below it."""
  lines = [f"  {'':<6}{'check':<54}{'value':>11}{'limit':>11}"]
  for row in checks:
    state = "pass" if row.passed else "FAIL"
    lines.append(f"  {state:<6}{row.name:<54}{row.value:>11.3g}{row.limit:>11.3g}")
    if not row.passed:
      lines.append(f"        mend: {row.mend}")
  return "\n".join(lines)


def run(config: ConfigDict) -> None:
  """Checks the process of `config`, prints the table; a `RunError` if a check fails."""
  name, args = config.sde.name, dict(config.sde.args)
  make = lambda: make_sde(name, **args)
  sde = make()
  check(sde.t_min < sde.t_max, "sde.args.t_min", sde.t_min, f"a time below t_max, {sde.t_max}")
  sigma_data, num_steps = config.parameterization.sigma_data, config.sampling.num_steps
  checks = validate(sde, make, sigma_data=sigma_data, num_steps=num_steps)
  arguments = ", ".join(f"{k}={v}" for k, v in args.items())
  print(f"process {name}({arguments}), times {sde.t_min:g} to {sde.t_max:g},")
  print(f"data of std {sigma_data:g}, {num_steps} steps\n")
  print(report(checks), flush=True)
  failed = [row.name for row in checks if not row.passed]
  if failed:
    raise RunError(f"{len(failed)} of {len(checks)} checks failed: {'; '.join(failed)}")
  print(f"\nall {len(checks)} checks passed")
