"""Samplers: one-step functions run by a scan, and the probability-flow ODE by diffrax.

A `Step` maps (key, noise_fn, state, t, s) to the state at s < t; all noise is keyed by each
example's global index.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from dynamics import finest_step, probability_flow, reverse_sde, solve, state_scale
from errors import check, invalid, lookup
from parameterization import (
  VARIANCES,
  NoiseFn,
  ScoreFn,
  data_from_noise,
  predictions,
  reverse_kernel,
  score_from_noise,
)
from sde_lib import (
  SDE,
  Keys,
  Time,
  coefficients,
  example_keys,
  fold_in,
  log_snr,
  marginal,
  normal,
  posterior,
  sample_prior,
  time_of_log_snr,
  transition,
)


class State(NamedTuple):
  """What a step hands to the next: x at its time, the noise-free part of x, memory of multistep
  methods.
  """

  x: Array
  mean: Array
  memory: Any = None


Step = Callable  # (key, noise_fn, state, t, s) -> state


def _noised(key, mean, std) -> State:
  """The end of a stochastic step."""
  return State(mean + std * normal(key, mean.shape), mean)


def euler_maruyama(sde: SDE, temperature: float = 1.0) -> Step:
  """One Euler-Maruyama step of the reverse SDE (Song et al. 2021, eq. 6), of the grid's own length
  t - s.

  Args:
    temperature: here and below, factor on the std of the noise that a step adds.
  """

  def step(key, noise_fn, state, t, s):
    f, g_squared = coefficients(sde, t)
    score = score_from_noise(sde, noise_fn(state.x, t), t)
    mean = state.x - (t - s) * (f * state.x - g_squared * score)
    return _noised(key, mean, temperature * jnp.sqrt((t - s) * g_squared))

  return step


def ancestral(
  sde: SDE, variance: str = "posterior", clip: bool = False, temperature: float = 1.0
) -> Step:
  """Ancestral sampling (Ho et al. 2020, algorithm 2; Song et al. 2021, eq. 4 and 47) for any
  process.

  Args:
    variance: "posterior" is that of q(x_s | x_t, x_0), exact for data at a point; "beta" that of
      q(x_t | x_s), exact for standard normal data under VP; "learned" is between them where the
      network says (Nichol & Dhariwal 2021, eq. 15).
    clip: keep the predicted data in [-1, 1], as the code of both papers does.
  """
  predict = lookup(VARIANCES, variance, "variance")

  def step(key, noise_fn, state, t, s):
    noise, v = predict(noise_fn, state.x, t)
    mean, std = reverse_kernel(sde, state.x, noise, v, t, s, clip)
    return _noised(key, mean, temperature * std)

  return step


def reverse_diffusion(sde: SDE, temperature: float = 1.0) -> Step:
  """The reverse of the discretised forward chain (Song et al. 2021, appendix E, eq. 46).

  With x_t = a x_s + G z, a = alpha_t / alpha_s, G^2 = sigma_t^2 - a^2 sigma_s^2:
  x_s = (2 - a) x_t + G^2 score + G z.
  """

  def step(key, noise_fn, state, t, s):
    keep, variance = transition(sde, s, t)
    score = score_from_noise(sde, noise_fn(state.x, t), t)
    mean = (2 - keep) * state.x + variance * score
    return _noised(key, mean, temperature * jnp.sqrt(variance))

  return step


def ddim(sde: SDE, eta: float = 0.0, temperature: float = 1.0) -> Step:
  """DDIM (Song, Meng & Ermon 2021, eq. 12): eta 0 is deterministic, 1 is `ancestral`."""

  def step(key, noise_fn, state, t, s):
    noise = noise_fn(state.x, t)
    data = data_from_noise(sde, state.x, noise, t)
    alpha, sigma = marginal(sde, s)
    std = eta * posterior(sde, state.x, data, t, s)[1]
    mean = alpha * data + jnp.sqrt(sigma**2 - std**2) * noise
    return _noised(key, mean, temperature * std) if eta else State(mean, mean)

  return step


def edm(
  sde: SDE,
  gamma: float = 0.0,
  churn_min: float = 0.0,
  churn_max: float = float("inf"),
  noise_scale: float = 1.0,
) -> Step:
  """Heun's second-order step with churn (Karras et al. 2022, algorithm 2), for any process.

  The state is y = x / alpha at the noise level r = sigma / alpha, where dy / dr is the predicted
  noise. With a grid of N levels, denoise="tweedie" is the last Euler step to zero: 2 N - 1
  evaluations.

  Args:
    gamma: relative rise of the noise level before each step, the paper's min(S_churn / N, sqrt(2) -
      1).
    churn_min, churn_max: noise levels r between which gamma applies (S_min, S_max).
    noise_scale: std of the added noise (S_noise).
  """

  def step(key, noise_fn, state, t, s):
    level, end = (jnp.exp(-0.5 * log_snr(sde, time)) for time in (t, s))
    y = state.x / marginal(sde, t)[0]
    if gamma:
      inside = (level >= churn_min) & (level <= churn_max)
      top = jnp.exp(-0.5 * log_snr(sde, sde.t_max))
      raised = jnp.minimum(jnp.where(inside, 1 + gamma, 1.0) * level, top)
      added = jnp.sqrt(jnp.maximum(raised**2 - level**2, 0.0))
      y, level = y + noise_scale * added * normal(key, y.shape), raised
      t = time_of_log_snr(sde, -2 * jnp.log(raised))
    alpha_t, alpha_s = marginal(sde, t)[0], marginal(sde, s)[0]
    slope = noise_fn(alpha_t * y, t)
    euler = y + (end - level) * slope
    y = y + 0.5 * (end - level) * (slope + noise_fn(alpha_s * euler, s))
    return State(alpha_s * y, alpha_s * y)

  return step


def _moments(h: Array) -> tuple[Array, Array, Array]:
  """I_k = integral over [0, h] of exp(-(h - u)) (u / h)^k du for k = 0, 1, 2; exact for small h."""
  h = jnp.asarray(h)
  series, safe = [], jnp.where(h < 0.5, 1.0, h)
  for k in range(3):
    term = total = h / (k + 1)
    for j in range(1, 14):
      term = -term * h / (k + j + 1)
      total = total + term
    series.append(total)
  first = -jnp.expm1(-safe)
  second = 1 - first / safe
  exact = first, second, 1 - 2 * second / safe
  return tuple(jnp.where(h < 0.5, a, b) for a, b in zip(series, exact))


class Past(NamedTuple):
  """Memory of the multistep solvers: the last data prediction, and the step (in log-SNR / 2) to
  it.
  """

  data: Array
  length: Array


def _slope(data: Array, past: Past | None, length: Array) -> Array:
  """Change of the data prediction over one step of `length`, from the last two; 0 without a
  past.
  """
  if past is None:
    return jnp.zeros_like(data)
  ratio = jnp.where(past.length > 0, length / jnp.where(past.length > 0, past.length, 1.0), 0.0)
  return ratio * (data - past.data)


def dpm_solver(sde: SDE, order: int = 2, eta: float = 0.0, temperature: float = 1.0) -> Step:
  """DPM-Solver++(2M) and its SDE form (Lu et al. 2022, eq. 14-19): one evaluation a step.

  Exponential Adams-Bashforth in log-SNR on the data prediction, the linear part solved exactly. The
  noise follows the family with drift f x - (1 + eta^2) / 2 g^2 score and diffusion eta g.

  Args:
    order: 1 (eta 0: `ddim`; eta 1: `ancestral`) or 2.
    eta: 0 for the ODE, 1 for the reverse SDE.
  """
  check(order in (1, 2), "order", order, "1 or 2")

  def step(key, noise_fn, state, t, s):
    data = data_from_noise(sde, state.x, noise_fn(state.x, t), t)
    length = 0.5 * (log_snr(sde, s) - log_snr(sde, t))
    (alpha, sigma), before = marginal(sde, s), marginal(sde, t)[1]
    level, rise, _ = _moments((1 + eta**2) * length)
    change = _slope(data, state.memory, length) if order == 2 else 0.0
    mean = sigma / before * jnp.exp(-(eta**2) * length) * state.x
    mean = mean + alpha * (level * data + rise * change)
    std = sigma * jnp.sqrt(-jnp.expm1(-2 * eta**2 * length))
    x = _noised(key, mean, temperature * std).x if eta else mean
    return State(x, mean, Past(data, length))

  return step


class UniPCMemory(NamedTuple):
  """The corrected state at the last time, that time, the data prediction there, and its own
  past.
  """

  x: Array
  time: Array
  data: Array
  past: Past


def unipc(sde: SDE) -> Step:
  """UniPC with second-order predictor and third-order corrector (Zhao et al. 2023, algorithms 5 and
  8).

  The evaluation at the predicted state also corrects it, so a step costs one; the polynomials
  through the data predictions are integrated exactly (varying coefficients).
  """

  def correct(state, data, t):
    x, time, old, past = state.memory
    length = 0.5 * (log_snr(sde, t) - log_snr(sde, time))
    level, rise, bend = _moments(length)
    change, slope = data - old, _slope(old, past, length)
    ratio = past.length / jnp.where(length > 0, length, 1.0)
    curve = (change - slope) / (1 + ratio) * (past.length > 0)
    (alpha, sigma), before = marginal(sde, t), marginal(sde, time)[1]
    integral = level * old + rise * (change - curve) + bend * curve
    corrected = sigma / before * x + alpha * integral
    return jnp.where(time > 0, corrected, state.x), Past(old, jnp.where(time > 0, length, 0.0))

  def step(key, noise_fn, state, t, s):
    data = data_from_noise(sde, state.x, noise_fn(state.x, t), t)
    x, past = state.x, Past(jnp.zeros_like(data), jnp.zeros_like(t))
    if state.memory is not None:
      x, past = correct(state, data, t)
    length = 0.5 * (log_snr(sde, s) - log_snr(sde, t))
    level, rise, _ = _moments(length)
    (alpha, sigma), before = marginal(sde, s), marginal(sde, t)[1]
    predicted = sigma / before * x + alpha * (level * data + rise * _slope(data, past, length))
    return State(predicted, predicted, UniPCMemory(x, t, data, past))

  return step


def langevin_step(
  key: Keys,
  score: Array,
  x: Array,
  size: Array | float,
  convention: str = "report",
  temperature: float = 1.0,
) -> State:
  """x and its noise-free part after one Langevin step from `score` at x.

  Args:
    size: step size, a scalar or of the rank of x.
    convention: "report" is x + size / 2 score + sqrt(size) z (Song & Ermon 2019, eq. 4), "code" is
      x + size score + sqrt(2 size) z (their code, and Song et al. 2021, algorithms 4 and 5).
  """
  size = size * lookup({"report": 1.0, "code": 2.0}, convention, "convention")
  return _noised(key, x + 0.5 * size * score, temperature * jnp.sqrt(size))


def langevin(
  key: Keys,
  score_fn: Callable[[Array], Array],
  x: Float[Array, "b *d"],
  *,
  step_size: float,
  num_steps: int,
  convention: str = "report",
) -> Float[Array, "b *d"]:
  """Plain Langevin dynamics on a fixed law from `x` (Song & Ermon 2019, eq. 4); conventions as
  above.
  """
  keys = example_keys(key, x.shape[0])

  def body(i, x):
    return langevin_step(fold_in(keys, i), score_fn(x), x, step_size, convention).x

  return jax.lax.fori_loop(0, num_steps, body, x)


def annealed_langevin(
  sde: SDE, step_lr: float = 2e-5, num_steps: int = 100, temperature: float = 1.0
) -> Step:
  """Annealed Langevin dynamics (Song & Ermon 2019, algorithm 1, "code" convention): at level s.

  The step size is step_lr sigma(s)^2 / sigma_min^2. To start at the largest level repeat the first
  time of the grid; NCSNv2's last denoising is denoise="tweedie", both papers start with
  init="uniform".
  """

  def step(key, noise_fn, state, t, s):
    size = step_lr * (marginal(sde, s)[1] / marginal(sde, sde.t_min)[1]) ** 2

    def body(i, state):
      score = score_from_noise(sde, noise_fn(state.x, s), s)
      return langevin_step(fold_in(key, i), score, state.x, size, "code", temperature)

    return repeat(body, num_steps, state, noise_fn)

  return step


def repeat(body: Callable, num_steps: int, carry, noise_fn) -> Any:
  """A loop of body(i, carry); a counting `noise_fn` hears of every turn, however often jax traces
  one.
  """
  before = getattr(noise_fn, "calls", 0)
  jax.eval_shape(body, 0, carry)
  each = getattr(noise_fn, "calls", 0) - before
  carry = jax.lax.fori_loop(0, num_steps, body, carry)
  if each:
    noise_fn.calls = before + each * num_steps
  return carry


def predictor_corrector(
  sde: SDE,
  predictor: str = "reverse_diffusion",
  corrector: str = "langevin",
  snr: float = 0.16,
  num_corrector_steps: int = 1,
  per_example: bool = False,
  temperature: float = 1.0,
) -> Step:
  """A predictor step to s, then Langevin steps there (Song et al. 2021, algorithms 1-5), any
  process.

  Args:
    predictor: one of `PREDICTORS`.
    corrector: "langevin" (step 2 (snr ||z|| / ||score||)^2) or "ald" (step 2 (snr sigma)^2).
    snr: the signal-to-noise ratio of the corrector.
    per_example: norms of each example; else their means over the batch, as published.
  """
  predict = lookup(PREDICTORS, predictor, "predictor")(sde, temperature=temperature)

  def norm(x):
    norms = jnp.sqrt((x**2).reshape(len(x), -1).sum(1))
    return (norms if per_example else norms.mean(keepdims=True)).reshape(
      (-1,) + (1,) * (x.ndim - 1)
    )

  sizes = {
    "langevin": lambda z, score, s: 2 * (snr * norm(z) / norm(score)) ** 2,
    "ald": lambda z, score, s: 2 * (snr * marginal(sde, s)[1]) ** 2,
  }
  size_of = lookup(sizes, corrector, "corrector")

  def step(key, noise_fn, state, t, s):
    state = predict(fold_in(key, 0), noise_fn, state, t, s)
    for i in range(1, num_corrector_steps + 1):
      score, keys = score_from_noise(sde, noise_fn(state.x, s), s), fold_in(key, i)
      size = size_of(normal(keys, state.x.shape), score, s)
      state = langevin_step(keys, score, state.x, size, "code", temperature)
    return state

  return step


# name: (sde, temperature) -> Step without memory
PREDICTORS = {
  "euler_maruyama": euler_maruyama,
  "reverse_diffusion": reverse_diffusion,
  "ancestral": ancestral,
  "ddim": ddim,
  "none": lambda sde, temperature: lambda key, noise_fn, state, t, s: state,
}

# name: (sde, **options) -> Step
SAMPLERS = {
  "euler_maruyama": euler_maruyama,
  "reverse_diffusion": reverse_diffusion,
  "ancestral": ancestral,
  "ddim": ddim,
  "edm": edm,
  "dpm_solver": dpm_solver,
  "unipc": unipc,
  "predictor_corrector": predictor_corrector,
  "annealed_langevin": annealed_langevin,
}


def _karras(sde: SDE, u: Array, rho: float = 7.0) -> Array:
  """Karras et al. 2022, eq. 5, in the noise level sigma / alpha."""
  low, high = (jnp.exp(-0.5 * log_snr(sde, t) / rho) for t in (sde.t_min, sde.t_max))
  return time_of_log_snr(sde, -2 * rho * jnp.log(high + u * (low - high)))


def _trained(sde: SDE, u: Array) -> Array:
  """Levels of a discrete-time model, evenly respaced."""
  if sde.times is None or len(u) > len(sde.times):
    count = 0 if sde.times is None else len(sde.times)
    legal = f"a process with more than {len(u) - 1} levels; this one has {count}"
    raise invalid("spacing", "trained", legal, "take another spacing or fewer steps")
  last = len(sde.times) - 1
  return jnp.asarray(sde.times)[jnp.round((1 - u) * last).astype(int)]


# name: (sde, u in [0, 1]) -> times from t_max to t_min
SPACINGS = {
  "time": lambda sde, u: sde.t_max + u * (sde.t_min - sde.t_max),
  "log_snr": lambda sde, u: time_of_log_snr(
    sde, log_snr(sde, sde.t_max) * (1 - u) + log_snr(sde, sde.t_min) * u
  ),
  "karras": _karras,
  "trained": _trained,
}


def time_grid(sde: SDE, num_steps: int, spacing: str) -> Float[Array, " n"]:
  """num_steps + 1 decreasing times from exactly t_max to exactly t_min; `spacing` is a name in
  `SPACINGS`.
  """
  check(num_steps >= 1, "num_steps", num_steps, "a whole number from 1 up")
  times = lookup(SPACINGS, spacing, "spacing")(sde, jnp.linspace(0.0, 1.0, num_steps + 1))
  return times.at[0].set(sde.t_max).at[-1].set(sde.t_min)


class _Counted:
  """What a step calls: a noise function that counts its calls while the step is traced, its network
  evaluations.
  """

  def __init__(self, noise_fn: NoiseFn, labels):
    self.noise_fn, self.labels, self.calls = noise_fn, labels, 0
    self._known = None, None, None

  def __call__(self, x, t):
    return self.with_variance(x, t)[0]

  def with_variance(self, x, t):
    """The noise and v, None of a network that predicts no variance."""
    *at, predicted = self._known
    if x is at[0] and t is at[1]:
      return predicted
    self.calls += 1
    return predictions(self.noise_fn)(x, t, self.labels)

  def remember(self, x, t, predicted):
    """Answers a further call at the same x and t, which costs nothing."""
    self._known = x, t, predicted


def _uniform(low: float) -> Callable:
  draw = lambda key, shape: jax.random.uniform(key, shape, minval=low)
  return lambda keys, sde, shape: jax.vmap(lambda key: draw(key, shape[1:]))(keys)


# name: (keys, sde, shape) -> x at t_max; the uniform ones on [-1, 1] and [0, 1]
INITS = {"prior": sample_prior, "uniform": _uniform(-1.0), "unit_uniform": _uniform(0.0)}
Init = str | Float[Array, "b *d"]


def _start(keys: Keys, sde: SDE, shape: tuple[int, ...], init: Init, t: Time) -> Array:
  """x at time t: `init` itself, or a draw of that name, scaled by sigma(t) / sigma(t_max)."""
  if not isinstance(init, str):
    return init
  draw = lookup(INITS, init, "init")(fold_in(keys, 0), sde, shape)
  return draw * (marginal(sde, t)[1] / marginal(sde, sde.t_max)[1])


def _check_grid(sde: SDE, times: Array) -> None:
  """Times that are known before the compile must not increase, nor leave [t_min, t_max]."""
  if isinstance(times, jax.core.Tracer):
    return
  grid, (low, high) = np.asarray(times), np.float32([sde.t_min, sde.t_max])
  legal = f"2 or more times that do not increase, from {low:g} to {high:g}"
  inside = grid.ndim == 1 and len(grid) > 1 and (low <= np.float32(grid)).all()
  legit = inside and (np.float32(grid) <= high).all() and (np.diff(grid) <= 0).all()
  check(bool(legit), "times", grid, legal, "make the grid by time_grid")


def _run(key, sde, noise_fn, shape, step, times, labels, first_index, init, record):
  """Scans `step` over the grid: (last state, NFE, start, record(state) of each step)."""
  _check_grid(sde, times)
  keys = example_keys(key, shape[0], first_index)
  x = _start(keys, sde, shape, init, times[0])

  def one(state, i, t, s):
    counted = _Counted(noise_fn, labels)
    return step(fold_in(keys, i), counted, state, t, s), counted.calls

  def body(state, position):
    state, calls = one(state, *position)
    return state, (calls, record(state))

  memory = jax.eval_shape(lambda: one(State(x, x), 1, times[0], times[1])[0].memory)
  start = State(x, x, jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), memory))
  grid = jnp.arange(1, len(times)), times[:-1], times[1:]
  state, (calls, frames) = jax.lax.scan(body, start, grid)
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
  labels: PyTree = None,
  first_index: int | Array = 0,
  init: Init = "prior",
) -> tuple[Float[Array, "b *d"], Int[Array, ""]]:
  """Draws `shape` = [b, *d] examples by `step` over the decreasing grid `times`: (x, network
  evaluations).

  Args:
    labels: classes [b], or whatever `noise_fn` takes as its third argument: arrays [b, ...].
    denoise: what is returned: "mean", the last step without its noise; "tweedie", E[x_0 | x] by one
      more evaluation; None, x itself.
    first_index: global index of the first example; example i depends on (key, i) alone.
    init: x at times[0], or a name in `INITS`: a draw from the prior, or uniform. With
      `times` cut short the first part of the reverse process is skipped, and a named draw is scaled
      by sigma(times[0]) / sigma(t_max); perturb(sde, data, noise, times[0]) starts from data.
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
    key, sde, noise_fn, shape, step, times, labels, first_index, init, record=lambda _: None
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
  labels: PyTree = None,
  first_index: int | Array = 0,
  init: Init = "prior",
) -> Float[Array, "n b *d"]:
  """The states of `sample` at every time of the grid, the last without its noise."""
  state, _, start, frames = _run(
    key, sde, noise_fn, shape, step, times, labels, first_index, init, record=lambda state: state.x
  )
  return jnp.concatenate([start[None], frames]).at[-1].set(state.mean)


def interpolate(
  first: Float[Array, "b *d"], second: Float[Array, "b *d"], num_points: int
) -> Float[Array, "k b *d"]:
  """`num_points` latents from `first` to `second` along the arc between them, each example its own.

  Spherical interpolation (Song, Meng & Ermon 2021, eq. 67): latents between two prior draws have
  the norm of prior draws. Decode them by `sample_ode(init=...)` or a deterministic `sample`.
  """
  flat = [z.reshape(len(z), -1) for z in (first, second)]
  norms = [jnp.linalg.norm(z, axis=1) for z in flat]
  cosine = (flat[0] * flat[1]).sum(1) / (norms[0] * norms[1])
  angle = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
  w = jnp.linspace(0.0, 1.0, num_points)[:, None] * jnp.ones_like(angle)[None]

  def weight(part):
    safe = jnp.where(angle < 1e-3, 1.0, angle)
    share = jnp.where(angle[None] < 1e-3, part, jnp.sin(part * angle[None]) / jnp.sin(safe)[None])
    return share.reshape(share.shape + (1,) * (first.ndim - 1))

  return weight(1 - w) * first[None] + weight(w) * second[None]


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
  exponential: bool = False,
  temperature: float = 1.0,
  t_start: Time | None = None,
  labels: PyTree = None,
  first_index: int | Array = 0,
  init: Init = "prior",
) -> tuple[Float[Array, "b *d"], Int[Array, ""]]:
  """Draws examples by the probability-flow ODE from t_start to t_min (Song et al. 2021, section
  4.3): (x, nfe).

  One step size for the whole batch. A solve that fails or hits max_steps returns NaN, never a
  truncated sample.

  Args:
    exponential: solve for x / alpha, whose flow has no linear part.
    temperature: factor on the latent at t_start (Song et al. 2021, section 4.3).
    t_start: where to start instead of t_max, to skip the first part.
    init: x at t_start, or a name in `INITS`, as in `sample`.
  """
  start = sde.t_max if t_start is None else t_start
  keys = example_keys(key, shape[0], first_index)
  latent = temperature * _start(keys, sde, shape, init, start)
  solution = solve(
    probability_flow(sde, score_fn, exponential=exponential),
    latent / state_scale(sde, start, exponential),
    start,
    sde.t_min,
    solver=solver,
    rtol=rtol,
    atol=atol,
    max_steps=max_steps,
    args=labels,
  )
  x = solution.state * state_scale(sde, sde.t_min, exponential)
  return jnp.where(solution.ok, x, jnp.nan), solution.nfe


# name: (diffrax solver of an SDE with additive noise, score evaluations per step)
SDE_SOLVERS = {
  "euler": (diffrax.Euler, 1),
  "heun": (diffrax.Heun, 2),
  "sea": (diffrax.SEA, 1),
  "sra1": (diffrax.SRA1, 2),
  "shark": (diffrax.ShARK, 2),
}
# those that estimate their error, so that they can choose their steps
ADAPTIVE_SDE_SOLVERS = {name: SDE_SOLVERS[name] for name in ("heun", "sra1", "shark")}


def _stepping(sde: SDE, num_steps: int | None, spacing: str, rtol, atol, max_steps: int) -> dict:
  """How diffrax goes from 0 to t_max - t_min: on the grid, or without num_steps adaptively."""
  times = sde.t_max - time_grid(sde, num_steps or 1, spacing)
  ends = {"t0": times[0], "t1": times[-1]}
  if num_steps:
    grid = diffrax.StepTo(times)
    return {**ends, "dt0": None, "stepsize_controller": grid, "max_steps": num_steps}
  control = diffrax.PIDController(rtol, atol, dtmin=finest_step(sde), force_dtmin=False)
  first = 1e-3 * (times[-1] - times[0])
  return {**ends, "dt0": first, "stepsize_controller": control, "max_steps": max_steps}


def sample_sde(
  key: Keys,
  sde: SDE,
  score_fn: ScoreFn,
  shape: tuple[int, ...],
  *,
  solver: str = "heun",
  num_steps: int | None = None,
  spacing: str = "time",
  rtol: float | Array = 1e-2,
  atol: float | Array = 1e-2,
  max_steps: int = 1000,
  exponential: bool = False,
  refinable: bool = False,
  labels: PyTree = None,
  first_index: int | Array = 0,
  init: Init = "prior",
) -> tuple[Float[Array, "b *d"], Int[Array, ""]]:
  """Draws examples by a diffrax solve of the reverse SDE: (x, nfe).

  With `num_steps`, steps of the grid `spacing`; without, adaptive steps to rtol and atol, of each
  example its own, on a Brownian path that the key alone fixes. A solve that fails or hits max_steps
  returns NaN.

  Args:
    solver: a name in `SDE_SOLVERS`.
    exponential: solve for x / alpha, whose drift has no linear part.
    refinable: that fixed Brownian path for `num_steps` too: slower, the same path for each number.
  """
  method, evaluations = lookup(SDE_SOLVERS, solver, "solver")
  legal = f"{', '.join(ADAPTIVE_SDE_SOLVERS)}; or give num_steps"
  check(bool(num_steps) or solver in ADAPTIVE_SDE_SOLVERS, "solver", solver, legal)
  stepping = _stepping(sde, num_steps, spacing, rtol, atol, max_steps)
  kind = {"exponential": exponential, "refinable": refinable or num_steps is None}
  keys = example_keys(key, shape[0], first_index)
  start = _start(keys, sde, shape, init, sde.t_max) / state_scale(sde, sde.t_max, exponential)

  def one(key, y, label):
    batched = jax.tree.map(lambda a: a[None], label)
    score = lambda x, t, _: score_fn(x[None], t, batched)[0]
    terms = reverse_sde(sde, score, key, y.shape, **kind)
    how = {"y0": y, "adjoint": diffrax.ForwardMode(), "throw": False}
    solution = diffrax.diffeqsolve(terms, method(), **how, **stepping)
    ok = solution.result == diffrax.RESULTS.successful
    return jnp.where(ok, solution.ys[-1], jnp.nan), solution.stats["num_steps"]

  y, steps = jax.vmap(one)(fold_in(keys, 1), start, labels)
  return y * state_scale(sde, sde.t_min, exponential), evaluations * steps.max()
