"""Diffusion of bits, q(x_t = 1 | x_{t-1}) = (1 - b_t) x_{t-1} + b_t / 2: kernel, posterior, bound,
loss, sampler.

Sohl-Dickstein et al. 2015, "Deep Unsupervised Learning using Nonequilibrium Thermodynamics",
section 2.4 and table App. 1, binomial column. Data are floats in {0, 1} of shape [b, *d], every
bit diffuses on its own, and times are whole steps 0 .. T, a scalar or one per example. The network
is `predict(x_t, t)`: the probability, of the shape of x_t, that each bit of x_0 is 1 given x_t.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from errors import check
from sampling import State, Step
from sde_lib import Keys, example_keys, expand, fold_in

Bits = Float[Array, "b *d"]  # values in {0, 1}
Probs = Float[Array, "b *d"]  # probabilities that a bit is 1
Time = Int[Array, ""] | Int[Array, " b"] | int
Predict = Callable  # (x_t [b, *d], t scalar or [b]) -> P(x_0 = 1 | x_t) [b, *d]

MAX_ENUMERATED_BITS = 12


@dataclasses.dataclass(frozen=True, eq=False)
class Binomial:
  """The chain x_t ~ Bernoulli((1 - b_t) x_{t-1} + b_t / 2), t = 1 .. T (Sohl-Dickstein et al. 2015,
  table App. 1): each step keeps a bit with probability 1 - b_t, else tosses a fair coin.

  `betas` [T] are any numbers in (0, 1], kept in float64 on the host and cast last; others raise a
  `ConfigError`. Bernoulli(1/2) is the law of x_T only where some b_t = 1; elsewhere the bound pays.
  """

  betas: Sequence | np.ndarray

  def __post_init__(self):
    betas = np.array(self.betas, np.float64)
    legal = "a non-empty list of numbers in (0, 1], one per step"
    usable = betas.ndim == 1 and betas.size > 0 and bool(np.all((betas > 0) & (betas <= 1)))
    check(usable, "betas", self.betas, legal, "uniform_erasure(num_steps) is the paper's choice")
    betas.setflags(write=False)
    object.__setattr__(self, "betas", betas)

  @property
  def num_steps(self) -> int:
    """T."""
    return len(self.betas)

  @cached_property
  def log_keep(self) -> np.ndarray:
    """log(1 - b_t) [T], float64; -inf where b_t = 1."""
    with np.errstate(divide="ignore"):
      return np.log1p(-self.betas)


def uniform_erasure(num_steps: int) -> Binomial:
  """b_t = 1 / (T - t + 1), t = 1 .. T: each step erases a fraction 1 / T of the signal, A_t = 1 - t
  / T, and x_T is exactly Bernoulli(1/2) (Sohl-Dickstein et al. 2015, section 2.4.1).
  """
  check(num_steps >= 1, "num_steps", num_steps, "a whole number from 1 up")
  return Binomial(1 / np.arange(num_steps, 0, -1))


def flip_probability(process: Binomial, t: Time, s: Time = 0) -> Array:
  """q(x_t != x_s | x_s) = (1 - A_t / A_s) / 2, A_t = prod_{i <= t} (1 - b_i), of the shape of `t`.

  The logs are summed over s < i <= t alone, so that nothing cancels when t - s is small and b_i = 1
  is legal. A plain int outside 0 .. T raises a `ConfigError`; s <= t.
  """
  for name, value in {"t": t, "s": s}.items():
    inside = not isinstance(value, int) or 0 <= value <= process.num_steps
    check(inside, name, value, f"a whole step from 0 to {process.num_steps}")
  steps = jnp.arange(1, process.num_steps + 1)
  log_keep = jnp.asarray(process.log_keep, jnp.result_type(float))

  @jnp.vectorize
  def flip(t, s):
    return -0.5 * jnp.expm1(jnp.where((s < steps) & (steps <= t), log_keep, 0).sum())

  return flip(t, s)


def _through(flip: Array, x: Array | float) -> Array:
  """Probability of 1 after a bit that is 1 with probability `x` is flipped with probability `flip`:
  a sum of positive terms, for x and for 1 - x.
  """
  return x * (1 - flip) + (1 - x) * flip


def transition(process: Binomial, x_s: Probs, t: Time, s: Time) -> Probs:
  """q(x_t = 1 | x_s) = x_s A_t / A_s + (1 - A_t / A_s) / 2, s <= t; with s = t - 1, the kernel of
  table App. 1.

  `x_s` may be probabilities: then those of x_t.
  """
  return _through(expand(flip_probability(process, t, s), x_s), x_s)


def marginal(process: Binomial, x0: Probs, t: Time) -> Probs:
  """q(x_t = 1 | x_0) = x_0 A_t + (1 - A_t) / 2, with A_t = prod_{i <= t} (1 - b_i)."""
  return transition(process, x0, t, 0)


def bernoulli(key: Keys, probs: Probs) -> Bits:
  """Bits that are 1 with probability `probs`, example i from the i-th key of `example_keys`."""
  draw = jax.vmap(jax.random.bernoulli)(example_keys(key, probs.shape[0]), probs)
  return draw.astype(probs.dtype)


def perturb(key: Keys, process: Binomial, x0: Bits, t: Time) -> Bits:
  """A draw of x_t given x_0; `key` is one key, or one per example."""
  return bernoulli(key, marginal(process, x0, t))


def posterior(
  process: Binomial, x_t: Bits, x0: Probs, t: Time, s: Time | None = None
) -> Float[Array, "b *d"]:
  """Probability that x_s = 1 given x_t and x_0 by Bayes' rule, s < t, by default s = t - 1.

  Where `x0` is a probability, it is P(x_0 = 1 | x_t), x_t already seen, and the result is P(x_s = 1
  | x_t) = sum over k in {0, 1} of P(x_0 = k | x_t) q(x_s = 1 | x_t, x_0 = k): the mixture of the
  two posteriors, not Bayes' rule under the prior Bernoulli(x0).
  """
  s = t - 1 if s is None else s
  step = expand(flip_probability(process, t, s), x_t)
  past = expand(flip_probability(process, s), x_t)

  def given(bit):
    one = _through(step, x_t) * _through(past, bit)
    zero = _through(step, 1 - x_t) * _through(past, 1 - bit)
    return one / (one + zero)

  return x0 * given(1.0) + (1 - x0) * given(0.0)


def _predicted(predict: Predict, x_t: Bits, t: Time) -> Probs:
  """The network's P(x_0 = 1 | x_t), kept one rounding unit inside (0, 1): the bound, the loss and
  the sampler share this model, and its bound is finite.
  """
  probs = jnp.asarray(predict(x_t, t), x_t.dtype)
  check(probs.shape == x_t.shape, "predict(x_t, t).shape", probs.shape, f"{x_t.shape}, as x_t")
  unit = jnp.finfo(x_t.dtype).eps
  return jnp.clip(probs, unit, 1 - unit)


def _divergence(q: tuple[Array, Array], p: tuple[Array, Array]) -> Float[Array, " b"]:
  """KL(q || p) in nats summed over each example's bits; each law is the pair (P(1), P(0))."""
  terms = sum(jax.scipy.special.rel_entr(*pair) for pair in zip(q, p))
  return terms.reshape(terms.shape[0], -1).sum(1)


def step_divergence(
  process: Binomial, predict: Predict, x_t: Bits, x0: Bits, t: Time
) -> Float[Array, " b"]:
  """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in nats per example (Sohl-Dickstein et al. 2015,
  eq. 14), where p mixes the posteriors by the network's P(x_0 = 1 | x_t).

  At t = 1 the first law is the bit itself, and this is the reconstruction -log p(x_0 | x_1).
  """
  guess = _predicted(predict, x_t, t)
  # P(0) as the posterior of the complements: 1 - P(1) rounds to zero, the divergence to infinity
  both = lambda x: (posterior(process, x_t, x, t), posterior(process, 1 - x_t, 1 - x, t))
  return _divergence(both(x0), both(guess))


def prior_divergence(process: Binomial, x0: Bits) -> Float[Array, " b"]:
  """KL(q(x_T | x_0) || Bernoulli(1/2)) in nats per example; 0 for `uniform_erasure`."""
  last = process.num_steps
  half = jnp.full_like(x0, 0.5)
  return _divergence((marginal(process, x0, last), marginal(process, 1 - x0, last)), (half, half))


class Bound(NamedTuple):
  """The terms of the bound on -log p(x_0), nats per example, of which the sum is `total`.

  `total / (D log 2)` is bits/dim: `likelihood.bits_per_dim(-total, D, Transform(2, -0.5, 1.5))`.
  """

  prior: Array  # [b] KL(q(x_T | x_0) || Bernoulli(1/2))
  diffusion: Array  # [b, T - 1] E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), t = 2 .. T
  reconstruction: Array  # [b] E -log p(x_0 | x_1)

  @property
  def total(self) -> Array:
    """[b] nats, at least -log p(x_0) in expectation."""
    return self.prior + self.diffusion.sum(1) + self.reconstruction


def variational_bound(key: Keys | None, process: Binomial, predict: Predict, x0: Bits) -> Bound:
  """Upper bound on -log p(x_0) and its terms, nats per example (Sohl-Dickstein et al. 2015, eq.
  13-14).

  Each of the T steps evaluates the network once. `key`, one or one per example: one draw of x_t for
  each step, an unbiased estimate. None: the exact expectation over all 2^D values of x_t, for D up
  to `MAX_ENUMERATED_BITS` bits, else a `ConfigError`.
  """

  def drawn(t):
    x_t = perturb(fold_in(keys, t), process, x0, t)
    return step_divergence(process, predict, x_t, x0, t)

  keys = None if key is None else example_keys(key, x0.shape[0])
  states = _all_bits(x0) if key is None else None
  exact = lambda t: _expected_divergence(process, predict, states, x0, t)
  terms = jax.lax.map(exact if key is None else drawn, jnp.arange(1, process.num_steps + 1)).T
  return Bound(prior_divergence(process, x0), terms[:, 1:], terms[:, 0])


def _all_bits(x0: Bits) -> Float[Array, "n *d"]:
  """All 2^D values of an example."""
  num_bits = int(np.prod(x0.shape[1:]))
  legal, mend = f"at most {MAX_ENUMERATED_BITS} to be enumerated", "give a key, for an estimate"
  check(num_bits <= MAX_ENUMERATED_BITS, "bits per example", num_bits, legal, mend)
  bits = (np.arange(2**num_bits)[:, None] >> np.arange(num_bits)) & 1
  return jnp.asarray(bits.reshape(-1, *x0.shape[1:]), x0.dtype)


def _expected_divergence(process, predict, states, x0, t) -> Float[Array, " b"]:
  """The mean of `step_divergence` over q(x_t | x_0), by a sum over `states` [n, *d]."""
  n, b = len(states), len(x0)
  x_t, x0 = jnp.repeat(states, b, axis=0), jnp.tile(x0, (n,) + (1,) * (x0.ndim - 1))
  probs = _through(1 - marginal(process, x0, t), x_t).reshape(n * b, -1).prod(1)
  return (probs * step_divergence(process, predict, x_t, x0, t)).reshape(n, b).sum(0)


def uniform_steps(key: Keys, process: Binomial, b: int) -> Int[Array, " b"]:
  """One step of 1 .. T for each example, uniform and independent."""
  draw = lambda k: jax.random.randint(k, (), 1, process.num_steps + 1)
  return jax.vmap(draw)(example_keys(key, b))


def variational_loss(
  key: Keys, process: Binomial, predict: Predict, x0: Bits
) -> Float[Array, " b"]:
  """T times the bound's term at one random step, plus the prior's: nats per example, unbiased for
  `variational_bound` (Sohl-Dickstein et al. 2015, eq. 14).

  One network evaluation, `t` [b]. `key` is one key, or one per example.
  """
  keys = example_keys(key, x0.shape[0])
  t = uniform_steps(fold_in(keys, 0), process, x0.shape[0])
  x_t = perturb(fold_in(keys, 1), process, x0, t)
  term = step_divergence(process, predict, x_t, x0, t)
  return process.num_steps * term + prior_divergence(process, x0)


def ancestral(process: Binomial) -> Step:
  """One draw of p(x_s | x_t), the posterior mixed by the network's P(x_0 = 1 | x_t)
  (Sohl-Dickstein et al. 2015, table App. 1, reverse kernel); `mean` is its probability of 1.
  """

  def step(key, predict, state, t, s):
    mean = posterior(process, state.x, _predicted(predict, state.x, t), t, s)
    return State(bernoulli(key, mean), mean)

  return step


def _grid(process: Binomial, times) -> Array:
  """The steps that a sampler visits: all of them, or `times`, checked."""
  last = process.num_steps
  grid = np.arange(last, -1, -1) if times is None else np.asarray(times)
  whole = grid.ndim == 1 and grid.size > 1 and np.issubdtype(grid.dtype, np.integer)
  usable = whole and grid[0] == last and grid[-1] == 0 and np.all(np.diff(grid) < 0)
  check(bool(usable), "times", times, f"whole steps that decrease from {last} to 0")
  return jnp.asarray(grid)


class _Counted:
  """A network that counts its calls while a step is traced."""

  def __init__(self, predict: Predict):
    self.predict, self.calls = predict, 0

  def __call__(self, x, t):
    self.calls += 1
    return self.predict(x, t)


def sample(
  key: Keys,
  process: Binomial,
  predict: Predict,
  shape: tuple[int, ...],
  *,
  step: Step | None = None,
  times: Sequence | np.ndarray | None = None,
  first_index: int | Array = 0,
) -> tuple[Bits, Int[Array, ""]]:
  """Draws `shape` = [b, *d] examples from Bernoulli(1/2) at step T down to 0: (bits, network
  evaluations).

  Args:
    step: (key, predict, state, t, s) -> state, without memory; by default `ancestral(process)`.
    times: the steps visited, decreasing from T to 0; by default all of them.
    first_index: global index of the first example; example i depends on (key, i) alone.
  """
  step = step or ancestral(process)
  grid = _grid(process, times)
  keys = example_keys(key, shape[0], first_index)
  x = bernoulli(fold_in(keys, 0), jnp.full(shape, 0.5))

  def body(state, position):
    counted = _Counted(predict)
    state = step(fold_in(keys, position[0]), counted, state, *position[1:])
    return state, counted.calls

  positions = jnp.arange(1, len(grid)), grid[:-1], grid[1:]
  state, calls = jax.lax.scan(body, State(x, x), positions)
  return state.x, calls.sum()
