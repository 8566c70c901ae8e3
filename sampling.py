"""Samplers: one-step functions run by a scan, and the probability-flow ODE by diffrax.

A `Step` maps (key, noise_fn, state, t, s) to the state at s < t; all noise is keyed by each
example's global index.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynamics import probability_flow, reverse_sde, solve
from errors import check, lookup
from parameterization import NoiseFn, ScoreFn, data_from_noise, score_from_noise
from sde_lib import (
  SDE,
  Keys,
  coefficients,
  example_keys,
  fold_in,
  log_snr,
  marginal,
  normal,
  posterior,
  sample_prior,
  time_of_log_snr,
)


class State(NamedTuple):
  """What a step hands to the next: x at its time, the noise-free part of x, memory of multistep
  methods.
  """

  x: Array
  mean: Array
  memory: Any = None


Step = Callable  # (key, noise_fn, state, t, s) -> state


def euler_maruyama(sde: SDE) -> Step:
  """One Euler-Maruyama step of the reverse SDE (Song et al. 2021, eq. 6), of the grid's own length
  t - s.
  """

  def step(key, noise_fn, state, t, s):
    f, g_squared = coefficients(sde, t)
    score = score_from_noise(sde, noise_fn(state.x, t), t)
    mean = state.x - (t - s) * (f * state.x - g_squared * score)
    return State(mean + jnp.sqrt((t - s) * g_squared) * normal(key, mean.shape), mean)

  return step


def ancestral(sde: SDE, variance: str = "posterior") -> Step:
  """Ancestral sampling (Ho et al. 2020, algorithm 2; Song et al. 2021, eq. 4 and 47) for any
  process.

  Args:
    variance: "posterior" is that of q(x_s | x_t, x_0), exact for data at a point; "beta" that of
      q(x_t | x_s), exact for standard normal data under VP.
  """
  scale = lookup(
    {"posterior": lambda t, s: 1.0, "beta": lambda t, s: marginal(sde, t)[1] / marginal(sde, s)[1]},
    variance,
    "variance",
  )

  def step(key, noise_fn, state, t, s):
    data = data_from_noise(sde, state.x, noise_fn(state.x, t), t)
    mean, std = posterior(sde, state.x, data, t, s)
    return State(mean + scale(t, s) * std * normal(key, mean.shape), mean)

  return step


# name: (sde, **options) -> Step
SAMPLERS = {"euler_maruyama": euler_maruyama, "ancestral": ancestral}


def _karras(sde: SDE, u: Array, rho: float = 7.0) -> Array:
  """Karras et al. 2022, eq. 5, in the noise level sigma / alpha."""
  low, high = (jnp.exp(-0.5 * log_snr(sde, t) / rho) for t in (sde.t_min, sde.t_max))
  return time_of_log_snr(sde, -2 * rho * jnp.log(high + u * (low - high)))


# name: (sde, u in [0, 1]) -> times from t_max to t_min
SPACINGS = {
  "time": lambda sde, u: sde.t_max + u * (sde.t_min - sde.t_max),
  "log_snr": lambda sde, u: time_of_log_snr(
    sde, log_snr(sde, sde.t_max) * (1 - u) + log_snr(sde, sde.t_min) * u
  ),
  "karras": _karras,
}


def time_grid(sde: SDE, num_steps: int, spacing: str) -> Float[Array, " n"]:
  """num_steps + 1 decreasing times from exactly t_max to exactly t_min; `spacing` is a name in
  `SPACINGS`.
  """
  check(num_steps >= 1, "num_steps", num_steps, "a whole number from 1 up")
  times = lookup(SPACINGS, spacing, "spacing")(sde, jnp.linspace(0.0, 1.0, num_steps + 1))
  return times.at[0].set(sde.t_max).at[-1].set(sde.t_min)


class _Counted:
  """A noise function that counts its calls while a step is traced: its network evaluations."""

  def __init__(self, noise_fn: NoiseFn, labels):
    self.noise_fn, self.labels, self.calls = noise_fn, labels, 0

  def __call__(self, x, t):
    self.calls += 1
    return self.noise_fn(x, t, self.labels)


def _run(key, sde, noise_fn, shape, step, times, labels, first_index, record):
  """Scans `step` from a prior draw: (last state, NFE, prior draw, record(state) of each step)."""
  keys = example_keys(key, shape[0], first_index)
  x = sample_prior(fold_in(keys, 0), sde, shape)

  def body(state, position):
    i, t, s = position
    counted = _Counted(noise_fn, labels)
    state = step(fold_in(keys, i), counted, state, t, s)
    return state, (counted.calls, record(state))

  grid = jnp.arange(1, len(times)), times[:-1], times[1:]
  state, (calls, frames) = jax.lax.scan(body, State(x, x), grid)
  return state, calls.sum(), x, frames


def sample(
  key: Keys,
  sde: SDE,
  noise_fn: NoiseFn,
  shape: tuple[int, ...],
  *,
  step: Step,
  times: Float[Array, " n"],
  denoise: str | None = "mean",
  labels: Int[Array, " b"] | None = None,
  first_index: int | Array = 0,
) -> tuple[Float[Array, "b *d"], Int[Array, ""]]:
  """Draws `shape` = [b, *d] examples by `step` over the decreasing grid `times`: (x, network
  evaluations).

  Args:
    denoise: what is returned: "mean", the last step without its noise; "tweedie", E[x_0 | x] by one
      more evaluation; None, x itself.
    first_index: global index of the first example; example i depends on (key, i) alone.
  """
  finish = {
    "mean": lambda state: (state.mean, 0),
    "tweedie": lambda state: (
      data_from_noise(sde, state.x, noise_fn(state.x, times[-1], labels), times[-1]),
      1,
    ),
    None: lambda state: (state.x, 0),
  }
  check(denoise in finish, "denoise", denoise, '"mean", "tweedie" or None')
  state, nfe, _, _ = _run(
    key, sde, noise_fn, shape, step, times, labels, first_index, record=lambda _: None
  )
  x, extra = finish[denoise](state)
  return x, nfe + extra


def sample_trajectory(
  key: Keys,
  sde: SDE,
  noise_fn: NoiseFn,
  shape: tuple[int, ...],
  *,
  step: Step,
  times: Float[Array, " n"],
  labels: Int[Array, " b"] | None = None,
  first_index: int | Array = 0,
) -> Float[Array, "n b *d"]:
  """The states of `sample` at every time of the grid, the last without its noise."""
  state, _, start, frames = _run(
    key, sde, noise_fn, shape, step, times, labels, first_index, record=lambda state: state.x
  )
  return jnp.concatenate([start[None], frames]).at[-1].set(state.mean)


def sample_ode(
  key: Keys,
  sde: SDE,
  score_fn: ScoreFn,
  shape: tuple[int, ...],
  *,
  solver: str = "tsit5",
  rtol: float = 1e-4,
  atol: float = 1e-4,
  max_steps: int = 1000,
  labels: Int[Array, " b"] | None = None,
  first_index: int | Array = 0,
) -> tuple[Float[Array, "b *d"], Int[Array, ""]]:
  """Draws examples by the probability-flow ODE from t_max to t_min (Song et al. 2021, section 4.3):
  (x, nfe).

  One step size for the whole batch. A solve that fails or hits max_steps returns NaN, never a
  truncated sample.
  """
  prior = sample_prior(fold_in(example_keys(key, shape[0], first_index), 0), sde, shape)
  field = probability_flow(sde, score_fn)
  solution = solve(
    field,
    prior,
    sde.t_max,
    sde.t_min,
    solver=solver,
    rtol=rtol,
    atol=atol,
    max_steps=max_steps,
    args=labels,
  )
  return jnp.where(solution.ok, solution.state, jnp.nan), solution.nfe


# name: (diffrax solver of an SDE with additive noise, score evaluations per step)
SDE_SOLVERS = {
  "euler": (diffrax.Euler, 1),
  "heun": (diffrax.Heun, 2),
  "sea": (diffrax.SEA, 1),
  "sra1": (diffrax.SRA1, 2),
  "shark": (diffrax.ShARK, 2),
}


def sample_sde(
  key: Keys,
  sde: SDE,
  score_fn: ScoreFn,
  shape: tuple[int, ...],
  *,
  solver: str = "heun",
  num_steps: int = 100,
  labels: Int[Array, " b"] | None = None,
  first_index: int | Array = 0,
) -> tuple[Float[Array, "b *d"], int]:
  """Draws examples by a diffrax solve of the reverse SDE in `num_steps` equal steps: (x, nfe).

  Args:
    solver: a name in `SDE_SOLVERS`.
  """
  method, evaluations = lookup(SDE_SOLVERS, solver, "solver")
  times = sde.t_max - time_grid(sde, num_steps, "time")
  keys = example_keys(key, shape[0], first_index)

  def one(key, x, label):
    batched = None if label is None else label[None]
    terms = reverse_sde(sde, lambda x, t, _: score_fn(x[None], t, batched)[0], key, x.shape)
    solution = diffrax.diffeqsolve(
      terms,
      method(),
      times[0],
      times[-1],
      dt0=None,
      y0=x,
      stepsize_controller=diffrax.StepTo(times),
      max_steps=num_steps,
      adjoint=diffrax.ForwardMode(),
      throw=False,
    )
    return solution.ys[-1]

  prior = sample_prior(fold_in(keys, 0), sde, shape)
  x = jax.vmap(one, (0, 0, None if labels is None else 0))(fold_in(keys, 1), prior, labels)
  return x, num_steps * evaluations
