"""The vector fields of a diffusion model as diffrax sees them: reverse SDE, probability flow, flow
with log-density.
"""

from collections.abc import Callable
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import lineax
import optimistix
from jaxtyping import Array, Bool, Int, Key, PyTree

from divergence import Probe, traces
from errors import lookup
from parameterization import ScoreFn
from sde_lib import SDE, Time, coefficients, log_snr, log_snr_rate, marginal, time_of_log_snr

VectorField = Callable  # (t, state, args) -> d state / dt

# name: the diffrax solver of an ODE with adaptive steps
SOLVERS = {
  "tsit5": diffrax.Tsit5,
  "dopri5": diffrax.Dopri5,
  "dopri8": diffrax.Dopri8,
  "heun": diffrax.Heun,
  "bosh3": diffrax.Bosh3,
}


def state_scale(sde: SDE, t, exponential: bool):
  """c(t) of the state y = x / c that is solved for: 1, or alpha in the exponential form."""
  return marginal(sde, t)[0] if exponential else 1.0


def _scaling(sde: SDE, t, exponential: bool):
  """(c, f, g^2) at t such that y = x / c follows dy = [f y - g^2 / c score(c y)] dt + g / c dw."""
  f, g_squared = coefficients(sde, t)
  return state_scale(sde, t, exponential), jnp.zeros_like(f) if exponential else f, g_squared


def probability_flow(sde: SDE, score_fn: ScoreFn, *, exponential: bool = False) -> VectorField:
  """dx/dt = f x - g^2 / 2 score (Song et al. 2021, eq. 13); `args` are the labels handed to
  `score_fn`.

  Args:
    exponential: the state is y = x / alpha, whose flow has no linear part.
  """

  def field(t, y, args):
    scale, f, g_squared = _scaling(sde, t, exponential)
    return f * y - 0.5 * g_squared / scale * score_fn(scale * y, t, args)

  return field


def reverse_sde(
  sde: SDE,
  score_fn: ScoreFn,
  key: Key[Array, ""],
  shape: tuple[int, ...],
  *,
  exponential: bool = False,
  refinable: bool = False,
) -> diffrax.AbstractTerm:
  """dx = [f x - g^2 score] dt + g dw backwards (Song et al. 2021, eq. 6) as terms in s = t_max - t,
  from 0 upwards.

  diffrax's stochastic Runge-Kutta solvers are wrong for decreasing time, so time runs forward here.
  Needs the adjoint `ForwardMode` or `DirectAdjoint`; `args` are the labels.

  Args:
    exponential: the state is y = x / alpha, whose drift has no linear part.
    refinable: a Brownian path that `key` alone fixes, however it is cut into steps: for adaptive
      steps and to compare step sizes. Else its increments are drawn anew for each cut, which is
      much faster.
  """

  def drift(s, y, args):
    scale, f, g_squared = _scaling(sde, sde.t_max - s, exponential)
    return g_squared / scale * score_fn(scale * y, sde.t_max - s, args) - f * y

  def diffusion(s, y, _):
    scale, _, g_squared = _scaling(sde, sde.t_max - s, exponential)
    return lineax.DiagonalLinearOperator(jnp.broadcast_to(jnp.sqrt(g_squared) / scale, y.shape))

  area, length = diffrax.SpaceTimeLevyArea, sde.t_max - sde.t_min
  path = diffrax.UnsafeBrownianPath(shape, key, levy_area=area)
  if refinable:
    path = diffrax.VirtualBrownianTree(0.0, length, finest_step(sde), shape, key, levy_area=area)
  return diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, path))


def finest_step(sde: SDE) -> float:
  """Length below which a refinable Brownian path is interpolated: no step may be shorter."""
  return (sde.t_max - sde.t_min) / 2**14


def with_log_density(
  field: VectorField, probe: Probe, linear: Callable | None = None
) -> VectorField:
  """The flow of (x, log p) for one example x [*d]: d log p / dt = -div field (Chen et al. 2018, eq.
  8).

  Drift and divergence come from one linearization: the network runs once, and once more forward for
  each product with its Jacobian.

  Args:
    probe: of a law of `divergence.DIVERGENCES`, or None for the exact trace.
    linear: (t, x) -> (velocity, its trace), a part of `field` of known trace, as
      `divergence.linear_part`: the probes see only the rest.

  A state whose log p is [m] follows each of the m estimates; one whose log p is a number, their
  mean.
  """

  def augmented(t, state, args):
    x, log_prob = state

    def rest(y):
      drift = field(t, y, args)
      velocity, trace = linear(t, y) if linear else (jnp.zeros(()), 0.0)
      return drift - velocity, (drift, trace)

    _, push, (drift, trace) = jax.linearize(rest, x, has_aux=True)
    change = -(trace + traces(push, probe, x))
    return drift, change if log_prob.ndim else change.mean()

  return augmented


# c of the time u = asinh(r / c), r = sigma / alpha: below it u is the noise level, above its
# logarithm; of 0.001 to 3 it gave the least error per evaluation on digits
NOISE_SCALE = 0.3


def noise_time(sde: SDE, t: Time) -> Array:
  """u = asinh(sigma / (alpha c)), a time in which every process has the same flow up to a scale."""
  return jnp.arcsinh(jnp.exp(-0.5 * log_snr(sde, t)) / NOISE_SCALE)


def in_noise_time(sde: SDE, field: VectorField) -> VectorField:
  """`field` with `noise_time` as its time: dt/du = 2 / (tanh(u) (-d log-SNR / dt)).

  In t the flow of most processes has a singularity at the data (VP: sigma ~ sqrt(t)), which costs a
  solver of high order most of its steps.
  """

  def warped(u, state, args):
    t = time_of_log_snr(sde, -2 * jnp.log(NOISE_SCALE * jnp.sinh(u)))
    rate = 2 / (jnp.tanh(u) * log_snr_rate(sde, t))
    return jax.tree.map(lambda d: rate * d, field(t, state, args))

  return warped


class _CountingController(diffrax.PIDController):
  """A PID controller that counts the rejections before the first accepted step.

  A solver that hands its last stage to the next step (FSAL) has none to hand on until then, so each
  of these costs one evaluation more.
  """

  def init(self, *args):
    """diffrax's interface."""
    end, state = super().init(*args)
    return end, (state, jnp.zeros((), int), jnp.zeros((), bool))

  def adapt_step_size(self, *args):
    """diffrax's interface; the last argument is the controller's state."""
    *args, (state, rejections, started) = args
    keep, *times, state, result = super().adapt_step_size(*args, state)
    started = started | keep
    return keep, *times, (state, rejections + ~started, started), result


class Solution(NamedTuple):
  """End of an ODE solve: `ok` is False where it hit max_steps or left the finite numbers."""

  state: PyTree
  nfe: Int[Array, ""]
  ok: Bool[Array, ""]


def solve(
  field: VectorField,
  state: PyTree,
  t0: Time,
  t1: Time,
  *,
  solver: str,
  rtol: float,
  atol: float,
  max_steps: int,
  args=None,
  norm: Callable[[PyTree], Array] = optimistix.rms_norm,
  gains: tuple[float, float] = (0.0, 1.0),
) -> Solution:
  """Integrates `field` from t0 to t1 (either direction) with adaptive steps.

  Args:
    solver: a name in `SOLVERS`.
    max_steps: accepted and rejected steps allowed.
    norm: of the error of a step, a tree like `state` in units of the tolerance.
    gains: proportional and integral, of the control of the step size.
  """
  method = lookup(SOLVERS, solver, "solver")()
  solution = diffrax.diffeqsolve(
    diffrax.ODETerm(field),
    method,
    t0,
    t1,
    dt0=3e-3 * (t1 - t0),
    y0=state,
    args=args,
    stepsize_controller=_CountingController(
      rtol, atol, pcoeff=gains[0], icoeff=gains[1], norm=norm
    ),
    saveat=diffrax.SaveAt(t1=True, controller_state=True),
    max_steps=max_steps,
    adjoint=diffrax.ForwardMode(),
    throw=False,
  )
  end = jax.tree.map(lambda y: y[-1], solution.ys)
  finite = jnp.array([jnp.isfinite(y).all() for y in jax.tree.leaves(end)]).all()
  stages, reuses = method.tableau.num_stages, method.tableau.fsal
  firsts = 1 + solution.controller_state[1] if reuses else 0
  nfe = solution.stats["num_steps"] * (stages - reuses) + firsts
  return Solution(end, nfe, finite & (solution.result == diffrax.RESULTS.successful))
