"""Conditional generation from a score model: hooks from `NoiseFn` to `NoiseFn`, which every sampler
and solver takes, and wrappers from `Step` to `Step`, which act between the steps of a sampler.

All hooks say score of p(x_t | y) = score of p(x_t) + grad_x log p(y | x_t), that is noise -
sigma(t) grad_x log p(y | x_t) (Song et al. 2021, section 5 and appendix I).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from errors import check, lookup
from operators import Operator
from parameterization import NoiseFn, data_from_noise, predictions
from sampling import State, Step, repeat
from sde_lib import (
  SDE,
  Keys,
  Time,
  example_keys,
  expand,
  fold_in,
  log_snr,
  marginal,
  normal,
  posterior,
  transition,
)

Measurement = Float[Array, "b *m"]


class Condition(NamedTuple):
  """What the hooks for measurements take as `labels`: y [b, *m] of every example, and its class
  where the network or a hook below has classes.
  """

  measurement: Array
  labels: Array | None = None


def _hook(with_variance: Callable) -> NoiseFn:
  """The noise function of this pair of predictions."""
  noise_fn = lambda x, t, labels=None: with_variance(x, t, labels)[0]
  noise_fn.with_variance = with_variance
  return noise_fn


def classifier_guidance(
  sde: SDE, noise_fn: NoiseFn, log_prob_fn: Callable, *, scale: float = 1.0
) -> NoiseFn:
  """noise - scale sigma(t) grad_x log p(label | x_t) (Song et al. 2021, eq. 14; the scale is of
  Dhariwal & Nichol 2021, section 4.3). Without labels nothing is guided.

  Args:
    log_prob_fn: (x [b, *d], t) -> log-probabilities of the classes [b, k] of noised examples.
    scale: 1 is Bayes' rule; above it p(label | x_t) is sharpened to its power.
  """

  def with_variance(x, t, labels=None):
    noise, v = predictions(noise_fn)(x, t, labels)
    if labels is None:
      return noise, v
    chosen = lambda x: jnp.take_along_axis(log_prob_fn(x, t), labels[:, None], axis=1).sum()
    return noise - expand(scale * marginal(sde, t)[1], x) * jax.grad(chosen)(x), v

  return _hook(with_variance)


def classifier_free(
  sde: SDE,
  noise_fn: NoiseFn,
  *,
  null_label: int,
  scale: float = 1.0,
  low: float = 0.0,
  high: float = float("inf"),
) -> NoiseFn:
  """(1 + scale) noise(label) - scale noise(no class) by one call of the network on both (Ho &
  Salimans 2022, eq. 6). Without labels nothing is guided.

  Args:
    null_label: the label that stands for "no class": the network's number of classes.
    scale: 0 is the conditional model.
    low, high: noise levels sigma / alpha between which it guides; outside of them it is the
      conditional model (Kynkäänniemi et al. 2024).
  """

  def with_variance(x, t, labels=None):
    if labels is None:
      return predictions(noise_fn)(x, t, None)
    twice = lambda a: jnp.concatenate([a, a])
    both = jnp.concatenate([labels, jnp.full_like(labels, null_label)])
    t = jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1])
    noise, v = predictions(noise_fn)(twice(x), twice(t), both)
    level = jnp.exp(-0.5 * log_snr(sde, t))
    w = expand(jnp.where((level >= low) & (level <= high), scale, 0.0), x)
    conditional, unconditional = jnp.split(noise, 2)
    guided = (1 + w) * conditional - w * unconditional
    return guided, None if v is None else v[: len(x)]

  return _hook(with_variance)


def null_space(sde: SDE, noise_fn: NoiseFn, operator: Operator) -> NoiseFn:
  """The predicted data agree with the measurement: A^+ y + (I - A^+ A) E[x_0 | x_t] (Wang et al.
  2023, "Zero-shot image restoration using denoising diffusion null-space model").

  What is measured then follows the exact reverse process to y; the rest is told of it through the
  network's input alone. The labels are a `Condition`.
  """

  def with_variance(x, t, condition):
    noise, v = predictions(noise_fn)(x, t, condition.labels)
    alpha, sigma = marginal(sde, t)
    error = condition.measurement - operator.forward(data_from_noise(sde, x, noise, t))
    return noise - expand(alpha / sigma, x) * operator.pseudo_inverse(error), v

  return _hook(with_variance)


def consistent(
  operator: Operator, x: Float[Array, "b *d"], measurement: Measurement
) -> Float[Array, "b *d"]:
  """A^+ y + (I - A^+ A) x, in an order that leaves known pixels bit-equal to the measurement."""
  return operator.pseudo_inverse(measurement) + (x - operator.pseudo_inverse(operator.forward(x)))


def noised_measurement(
  key: Keys, sde: SDE, operator: Operator, x: Array, measurement: Measurement, t: Time
) -> Float[Array, "b *d"]:
  """x with what is measured replaced by a draw of alpha(t) y + sigma(t) noise."""
  alpha, sigma = (expand(c, x) for c in marginal(sde, t))
  noised = sigma * operator.forward(normal(key, x.shape))
  return consistent(operator, x, expand(alpha, measurement) * measurement + noised)


def replacement(sde: SDE, step: Step, operator: Operator, measurement: Measurement) -> Step:
  """After each step what is measured is replaced by the measurement noised to the step's end (Song
  et al. 2021, appendix I.2). Biased, even with the exact score.

  `step` takes the hook `null_space`, so that evaluations within a step (correctors, Langevin steps)
  see it too; start from `noised_measurement` at t_max.
  """

  def replaced(key, noise_fn, state, t, s):
    state = step(fold_in(key, 0), noise_fn, state, t, s)
    x = noised_measurement(fold_in(key, 1), sde, operator, state.x, measurement, s)
    alpha = expand(marginal(sde, s)[0], measurement)
    return State(x, consistent(operator, state.mean, alpha * measurement), state.memory)

  return replaced


def repaint(
  sde: SDE,
  step: Step,
  operator: Operator,
  measurement: Measurement,
  *,
  num_resamplings: int = 10,
) -> Step:
  """`replacement`, each step taken `num_resamplings` times: between them x_s is noised back to t
  (Lugmayr et al. 2022, "RePaint", algorithm 1). Less biased than one, by as many evaluations.
  """
  check(num_resamplings >= 1, "num_resamplings", num_resamplings, "a whole number from 1 up")
  down = replacement(sde, step, operator, measurement)

  def resampled(key, noise_fn, state, t, s):
    keep, variance = transition(sde, s, t)

    def down_and_up(i, state):
      keys = fold_in(key, i + 1)
      x = down(fold_in(keys, 0), noise_fn, state, t, s).x
      x = keep * x + jnp.sqrt(variance) * normal(fold_in(keys, 1), x.shape)
      return State(x, x, jax.tree.map(jnp.zeros_like, state.memory))  # a multistep method restarts

    state = repeat(down_and_up, num_resamplings - 1, state, noise_fn)
    return down(fold_in(key, 0), noise_fn, state, t, s)

  return resampled


def dps(
  sde: SDE,
  step: Step,
  operator: Operator,
  measurement: Measurement,
  *,
  step_size: float = 1.0,
) -> Step:
  """Diffusion posterior sampling: after each step x -= step_size grad ||y - A E[x_0 | x_t]|| (Chung
  et al. 2023, algorithm 1, whose zeta_i grad ||.||^2 with zeta_i = zeta / ||.|| is twice that).

  Its law depends on the number of steps; the size is to be tuned. The step's own evaluation at x_t
  is the one that is differentiated.
  """

  def guided(key, noise_fn, state, t, s):
    def total_distance(x):
      predicted = noise_fn.with_variance(x, t)
      error = measurement - operator.forward(data_from_noise(sde, x, predicted[0], t))
      squares = (error**2).reshape(len(x), -1).sum(1)
      return jnp.sqrt(squares + 1e-30).sum(), predicted  # of no distance the gradient is 0

    gradient, predicted = jax.grad(total_distance, has_aux=True)(state.x)
    noise_fn.remember(state.x, t, predicted)
    state = step(key, noise_fn, state, t, s)
    return State(state.x - step_size * gradient, state.mean - step_size * gradient, state.memory)

  return guided


# name: (alpha, sigma, std of the data, u -> (d E[x_0 | x_t] / d x_t)^T u) -> Cov[x_0 | x_t] times
COVARIANCES = {
  "isotropic": lambda alpha, sigma, data_std, _: (
    lambda u: (sigma * data_std) ** 2 / ((alpha * data_std) ** 2 + sigma**2) * u
  ),
  "tweedie": lambda alpha, sigma, _, pull_back: lambda u: sigma**2 / alpha * pull_back(u)[0],
}


def _conjugate_gradients(matrix: Callable, b: Array, num_iterations: int) -> Array:
  """The solution of matrix(v) = b, each example its own; of a singular matrix the least one."""
  dot = lambda u, v: (u * v).sum(tuple(range(1, u.ndim)), keepdims=True)
  ratio = lambda a, b: jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)

  def body(_, carry):
    v, rest, direction = carry
    image, before = matrix(direction), dot(rest, rest)
    length = ratio(before, dot(direction, image))
    v, rest = v + length * direction, rest - length * image
    return v, rest, rest + ratio(dot(rest, rest), before) * direction

  return jax.lax.fori_loop(0, num_iterations, body, (jnp.zeros_like(b), b, b))[0]


class Likelihood(NamedTuple):
  """At x_t: the prediction (noise, v), log p(y | x_t) [b] but for a term of t alone, its gradient
  in x_t.
  """

  predicted: tuple
  log_prob: Array
  gradient: Array


def gaussian_likelihood(
  sde: SDE,
  predict: Callable,
  operator: Operator,
  x: Float[Array, "b *d"],
  t: Time,
  measurement: Measurement,
  *,
  covariance: str = "isotropic",
  data_std: float = 1.0,
  noise_std: float = 0.0,
  num_iterations: int = 10,
) -> Likelihood:
  """p(y | x_t) = N(A E[x_0 | x_t], A C A^T + noise_std^2 I), with C = Cov[x_0 | x_t].

  Args:
    predict: x -> (noise, v) at time t.
    covariance: of x_0 given x_t, a name in `COVARIANCES`: "isotropic" is that of N(0, data_std^2 I)
      data; "tweedie" is sigma^2 / alpha d E[x_0 | x_t] / d x_t, exact for Gaussian data (its
      log_prob lacks the determinant, which then depends on x_t).
    noise_std: of y.
    num_iterations: conjugate gradients, where no closed form is known; for "tweedie" each goes back
      through the network.
  """
  alpha, sigma = (expand(c, x) for c in marginal(sde, t))

  def denoise(x):
    predicted = predict(x)
    return data_from_noise(sde, x, predicted[0], t), predicted

  data, pull_back, predicted = jax.vjp(denoise, x, has_aux=True)
  error = measurement - operator.forward(data)
  times_covariance = lookup(COVARIANCES, covariance, "covariance")(
    alpha, sigma, data_std, pull_back
  )
  if covariance == "isotropic" and not noise_std:
    variance, rest = times_covariance(1.0), operator.pseudo_inverse(error)
    weighted, distance = rest / variance, rest**2 / variance
  else:
    adjoint = lambda v: jax.linear_transpose(operator.forward, data)(v)[0]
    matrix = lambda v: operator.forward(times_covariance(adjoint(v))) + noise_std**2 * v
    solution = _conjugate_gradients(matrix, error, num_iterations)
    weighted, distance = adjoint(solution), solution * error
  log_prob = -0.5 * distance.reshape(len(x), -1).sum(1)
  return Likelihood(predicted, log_prob, pull_back(weighted)[0])


def posterior_guidance(
  sde: SDE,
  noise_fn: NoiseFn,
  operator: Operator,
  *,
  covariance: str = "isotropic",
  data_std: float = 1.0,
  noise_std: float = 0.0,
  num_iterations: int = 10,
) -> NoiseFn:
  """The gradient of `gaussian_likelihood`, of the same options: with covariance "isotropic" Pi-GDM
  (Song et al. 2023, "Pseudoinverse-guided diffusion models for inverse problems"), with
  "tweedie" moment matching (Rozet et al. 2024, "Learning diffusion priors from observations by
  expectation maximization", section 4.2), exact for Gaussian data. The labels are a `Condition`.
  """

  options = {"covariance": covariance, "data_std": data_std}
  options |= {"noise_std": noise_std, "num_iterations": num_iterations}

  def with_variance(x, t, condition):
    predict = lambda x: predictions(noise_fn)(x, t, condition.labels)
    seen = gaussian_likelihood(sde, predict, operator, x, t, condition.measurement, **options)
    noise, v = seen.predicted
    return noise - expand(marginal(sde, t)[1], x) * seen.gradient, v

  return _hook(with_variance)


class Particles(NamedTuple):
  """Memory of `smc`, each [b]: the logarithms of the weight before the last move, of p(y | x) at
  it, and of the model's density of the move over the proposal's.
  """

  weight: Array
  likelihood: Array
  ratio: Array


def _resampled(
  keys: Keys, log_weights: Float[Array, "n p"], always: Array | bool
) -> tuple[Array, Array]:
  """(index of each particle's ancestor within its group, log-weights after it): systematic
  resampling of the groups whose effective size is below half of the particles, or `always`.
  """
  p = log_weights.shape[1]
  weights = jax.nn.softmax(log_weights)
  u = jax.vmap(jax.random.uniform)(keys)[:, None]
  positions = (u + jnp.arange(p)[None]) / p
  ancestors = jax.vmap(jnp.searchsorted)(jnp.cumsum(weights, axis=1), positions)
  due = (always | (1 / (weights**2).sum(1) < p / 2))[:, None]
  ancestors = jnp.where(due, jnp.minimum(ancestors, p - 1), jnp.arange(p)[None])
  return ancestors, jnp.where(due, 0.0, log_weights)


def smc(
  sde: SDE,
  operator: Operator,
  measurement: Measurement,
  *,
  num_particles: int = 64,
  data_std: float = 1.0,
  noise_std: float = 0.0,
) -> Step:
  """Sequential Monte Carlo by twisted ancestral steps (Wu et al. 2023, "Practical and
  asymptotically exact conditional sampling in diffusion models", algorithm 1).

  A batch is groups of `num_particles` consecutive examples, each group of one measurement. The
  particles move by `ancestral` guided with Pi-GDM; weights correct for its errors, so that with
  their number the law tends to the model's own law given y, whatever the guidance. The last time of
  the grid must stand there twice: the last step only resamples.
  """
  check(num_particles >= 1, "num_particles", num_particles, "a whole number from 1 up")
  options = {"data_std": data_std, "noise_std": noise_std}

  def step(key, noise_fn, state, t, s):
    predict = lambda x: noise_fn.with_variance(x, t)
    seen = gaussian_likelihood(sde, predict, operator, state.x, t, measurement, **options)
    old = state.memory or Particles(*[jnp.zeros_like(seen.log_prob)] * 3)
    keys, size = example_keys(key, len(state.x)), (-1, num_particles)
    log_weights = old.weight + old.ratio + seen.log_prob - old.likelihood
    group_keys = fold_in(keys, 0)[::num_particles]
    ancestors, log_weights = _resampled(group_keys, log_weights.reshape(size), s == t)
    rows = (ancestors + num_particles * jnp.arange(len(ancestors))[:, None]).reshape(-1)
    x, seen = jax.tree.map(lambda a: a[rows], (state.x, seen))
    mean, std = posterior(sde, x, data_from_noise(sde, x, seen.predicted[0], t), t, s)
    shift, z = std * seen.gradient, normal(fold_in(keys, 1), x.shape)
    ratio = -(shift * (z + 0.5 * shift)).reshape(len(x), -1).sum(1)
    memory = Particles(log_weights.reshape(-1), seen.log_prob, ratio)
    return State(mean + std * (shift + z), mean + std * shift, memory)

  return step
