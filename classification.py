"""The law of the class of a noised example, p(y | x_t), by a noise-conditional classifier.

The classifier sees x / alpha, scaled to unit variance, and is told log(sigma / alpha): p(y | x_t)
depends on nothing else, so the same weights serve every process, and the chain rule through the
scaling gives the right gradient in x.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float
from ml_collections import ConfigDict

import data
import losses
from parameterization import OUTPUTS
from sde_lib import SDE, Time, example_keys, expand, fold_in, log_snr, marginal, normal, perturb
from training import examples

LogProbFn = Callable  # (x [b, *d], t scalar or [b]) -> log p(y | x_t = x) [b, num_classes]


def make_log_prob_fn(
  sde: SDE, model: nn.Module, params, *, sigma_data: float, train: bool = False, rngs=None
) -> LogProbFn:
  """log p(y | x_t) of every class (Song et al. 2021, appendix I) from c_in x of Karras et al. 2022,
  table 1, and log(sigma / alpha).

  Args:
    model: linen module called as `model.apply({"params": params}, x, c_noise, train)` -> logits.
    sigma_data: std of the data, that of the training of the classifier.
  """

  def log_prob_fn(x: Float[Array, "b *d"], t: Time) -> Float[Array, "b k"]:
    t = jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1])
    c_in, *_ = OUTPUTS["edm"](*marginal(sde, t), sigma_data)
    told = expand(c_in, x) * x, -0.5 * log_snr(sde, t), train
    return jax.nn.log_softmax(model.apply({"params": params}, *told, rngs=rngs))

  return log_prob_fn


def make_loss(
  sde: SDE, model: nn.Module, config: ConfigDict, transform: data.Transform | None = None
) -> Callable:
  """`training.make_loss` of a classifier: the cross-entropy -log p(y | x_t) in nats, of times even
  in log-SNR over the whole range of the process.

  Examples are flipped, dequantized and augmented as for the score network, but the classifier is
  not told how.
  """
  transform = transform or data.transform_of(data.declared(config.data), config.data.centered)
  sigma_data = config.parameterization.sigma_data

  def loss_fn(params, key, batch, first, total, history):
    b = len(batch["image"])
    keys = example_keys(jax.random.fold_in(key, 0), b, first)
    x0, _ = examples(keys, batch["image"], transform, config)
    draws = jax.random.fold_in(key, 1), first + jnp.arange(b), total
    t, _ = losses.stratified(losses.importance_quantile, *draws)(keys, sde)
    x = perturb(sde, x0, normal(fold_in(keys, 1), x0.shape), t)
    rngs = {"dropout": jax.random.fold_in(jax.random.fold_in(key, 2), first)}
    given = {"sigma_data": sigma_data, "train": True, "rngs": rngs}
    log_prob = make_log_prob_fn(sde, model, params, **given)(x, t)
    loss = -log_prob[jnp.arange(b), batch["label"]]
    return loss.mean(), (t, loss)

  return loss_fn
