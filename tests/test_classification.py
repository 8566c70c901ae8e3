"""The law of the class of a noised example: against Bayes' rule for a mixture, for every process;
its training, resumed and straight; what it refuses.
"""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import classification
import experiment
import settings
from errors import ConfigError
from evaluation import train_classifier
from models.classifier import Model
from sde_lib import log_snr, make_sde, marginal, perturb, time_of_log_snr
from tests.analytic import Mixture
from tests.tiny import tiny_config, toy_config

SIGMA_DATA = 2.5
# toy:gmm, whose modes are its classes
MIXTURE = Mixture(np.array([[0.8, 0.2]]), np.array([[5.0, 5.0], [-5.0, -5.0]]), 1.0)
QUICK = {"xla_backend_optimization_level": "0"}
PROCESSES = ("vp", "ve", "sub_vp", "edm", "rectified")
SHORT = {"num_steps": 600, "batch_size": 128, "args__hidden": (32, 32)}
STEPS = {f"classifier__{name}": value for name, value in SHORT.items()}
GMM = toy_config(data__name="toy:gmm")
STEPS |= {"classifier__log_every": 600, "classifier__checkpoint_every": 300}


class Bayes:
  """The network whose logits are the joint log-densities of `MIXTURE`'s classes and y = x / alpha.

  It gets y / sqrt(r^2 + sigma_data^2) and log r, r = sigma / alpha.
  """

  def apply(self, _, z, log_ratio, train, rngs=None):
    r = jnp.exp(log_ratio)
    y = z * jnp.sqrt(r**2 + SIGMA_DATA**2)[:, None]
    return MIXTURE._noised(y, jnp.ones_like(r), r)[2]


def posterior(sde, x, t):
  """log p(y | x_t) by Bayes' rule in x itself."""
  return jax.nn.log_softmax(MIXTURE._noised(x, *marginal(sde, t))[2])


def between(sde, count):
  """Times from all over the process, even in log-SNR."""
  return time_of_log_snr(sde, jnp.linspace(*log_snr(sde, jnp.array([sde.t_min, sde.t_max])), count))


@pytest.mark.parametrize("name", [*PROCESSES, "ddpm"])
def test_bayes_rule_and_its_gradient(x64, name):
  """grad log p(y | x_t) is the score of the class less that of the mixture."""
  sde, second = make_sde(name), Mixture(np.ones((1, 1)), MIXTURE.means[1:], 1.0)
  log_prob_fn = classification.make_log_prob_fn(sde, Bayes(), None, sigma_data=SIGMA_DATA)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def pairs(x0, noise):
    t = between(sde, 22)[1:-1]
    x, noised = perturb(sde, 5 * x0, noise, t), marginal(sde, t)
    gradient = jax.grad(lambda x: log_prob_fn(x, t)[:, 1].sum())(x)
    expected = second.score(x, *noised) - MIXTURE.score(x, *noised)
    return (log_prob_fn(x, t), posterior(sde, x, t)), (gradient, expected)

  for found, expected in pairs(*np.random.default_rng(0).normal(size=(2, 20, 2))):
    np.testing.assert_allclose(found, expected, atol=1e-9, rtol=1e-7)


def test_one_network_is_one_law_of_every_process(x64):
  """At equal x / alpha and sigma / alpha; the gradients differ by alpha alone."""
  model, rng = Model("mlp", num_classes=3, hidden=(8, 8)), np.random.default_rng(0)
  y, level = jnp.asarray(rng.normal(size=(6, 4))), jnp.linspace(-3.0, 3.0, 6)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(1), y, level))["params"]
  params = jax.tree.map(lambda leaf: rng.normal(scale=0.3, size=leaf.shape), shapes)

  def both(name, params, y):
    sde = make_sde(name)
    law = classification.make_log_prob_fn(sde, model, params, sigma_data=SIGMA_DATA)
    t = time_of_log_snr(sde, level)
    alpha = marginal(sde, t)[0][:, None]
    gradient = jax.grad(lambda x: law(x, t)[:, 0].sum())(alpha * y)
    return law(alpha * y, t), alpha * gradient

  run = jax.jit(both, static_argnums=0, compiler_options=QUICK)
  first, *others = [run(name, params, y) for name in PROCESSES]
  assert all(np.ptp(values) > 0.01 for values in first)
  for other in others:
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), other, first)


def test_a_scalar_time_is_that_of_every_example():
  sde, x = make_sde("vp"), jnp.array([[1.0, 2.0], [-1.0, 0.0]])
  law = classification.make_log_prob_fn(sde, Bayes(), None, sigma_data=SIGMA_DATA)
  np.testing.assert_array_equal(law(x, 0.3), law(x, jnp.full(2, 0.3)))
  np.testing.assert_allclose(jnp.exp(law(x, 0.3)).sum(1), 1.0, rtol=1e-6)


def entropy(r):
  """H(y | x_t) of `MIXTURE` by quadrature along the line through its means."""
  u = np.linspace(-15.0, 15.0, 4001)[:, None] * np.sqrt(1 + r**2)
  joint = [p * norm.pdf(u, m, np.sqrt(1 + r**2)) for p, m in ((0.8, 50**0.5), (0.2, -(50**0.5)))]
  total = np.log(np.maximum(sum(joint), 1e-300))
  integrand = sum(p * (total - np.log(np.maximum(p, 1e-300))) for p in joint)
  return np.trapezoid(integrand, u, axis=0)


def loss_of(labels, first=0, total=None):
  """(mean, (t, loss)) of the exact classifier under the training's objective."""
  noise = jax.random.normal(jax.random.key(7), (len(labels), 2))
  batch = {"image": MIXTURE.means[labels] + noise, "label": labels}
  if first:
    batch = jax.tree.map(lambda a: a[first:], batch)
  loss = classification.make_loss(make_sde("vp", t_min=1e-4), Bayes(), GMM)
  return jax.jit(lambda batch: loss(None, jax.random.key(3), batch, first, total, None))(batch)


def test_the_loss_of_the_exact_classifier_is_the_entropy_of_the_class():
  """Averaged over log-SNR, by quadrature."""
  n = 40_000
  labels = (jax.random.uniform(jax.random.key(2), (n,)) > 0.8).astype(int)
  mean, (t, loss) = loss_of(labels, total=n)
  log_snrs = np.sort(log_snr(make_sde("vp"), np.asarray(t)))
  exact = entropy(np.exp(-0.5 * np.linspace(log_snrs[0], log_snrs[-1], 400))).mean()
  assert abs(float(mean) - exact) < 4 * float(loss.std()) / n**0.5
  assert np.diff(log_snrs).max() < 1.1 * np.ptp(log_snrs) / n  # evenly, stratified


def test_a_part_of_a_batch_has_its_share_of_the_loss():
  """What makes the number of devices change nothing."""
  labels = jnp.arange(8) % 2
  _, whole = loss_of(labels, total=8)
  _, part = loss_of(labels, first=4, total=8)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a[4:], b, atol=1e-6), whole, part)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(configuration, workdir, record) of a classifier of toy:gmm after a short training."""
  config = toy_config(data__name="toy:gmm", **STEPS, evaluation__num_levels=10)
  with config.unlocked():
    config.evaluation.num_examples = 4000
    config.evaluation.batch_size = 1000
  workdir = tmp_path_factory.mktemp("gmm")
  return config, workdir, train_classifier.run(config, workdir)


def test_a_short_training_comes_close_to_the_exact_posterior(trained):
  config, _, record = trained
  exact = train_classifier.report(experiment.build(config), Bayes(), {})
  assert exact["log_snr"] == record["log_snr"]
  difference = np.subtract(record["accuracy"], exact["accuracy"])
  np.testing.assert_array_less(np.abs(difference), 0.02)
  assert min(exact["accuracy"]) < 0.85 and record["clean_accuracy"] == 1.0
  assert record["chance"] == pytest.approx(0.8, abs=0.03)
  assert record["standard_error"][-1] == pytest.approx((0.8 * 0.2 / 4000) ** 0.5, rel=0.2)


def test_a_finished_classifier_is_restored_and_told(trained, capsys):
  config, workdir, record = trained
  again = train_classifier.run(config, workdir)
  assert "finished at step 600" in capsys.readouterr().out
  assert again | {"seconds": 0} == record | {"seconds": 0}
  assert (workdir / "results" / "classifier.png").is_file()
  saved = settings.read(workdir)
  assert saved.classifier.to_dict() == config.classifier.to_dict() != GMM.classifier.to_dict()
  parts = experiment.build(saved)
  report = train_classifier.report(parts, *train_classifier.restore(parts, workdir))
  assert report["accuracy"] == record["accuracy"]


def test_resumed_is_straight_bit_for_bit(tmp_path):
  """As after a kill: the last checkpoint is missing."""
  steps = {"num_steps": 4, "batch_size": 8, "checkpoint_every": 2, "log_every": 2}
  config = toy_config(
    data__name="toy:gmm", **STEPS | {f"classifier__{k}": v for k, v in steps.items()}
  )
  with config.unlocked():
    config.evaluation.num_examples = 8
  train_classifier.run(config, tmp_path)
  parts = experiment.build(config)
  straight = jax.device_get(train_classifier.restore(parts, tmp_path)[1])
  shutil.rmtree(tmp_path / "classifier" / "checkpoints" / "4")
  half = jax.device_get(train_classifier.restore(parts, tmp_path)[1])
  train_classifier.run(config, tmp_path)
  resumed = jax.device_get(train_classifier.restore(parts, tmp_path)[1])
  jax.tree.map(np.testing.assert_array_equal, resumed, straight)
  assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (half, straight))))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"classifier__learning_rate": 0.5}, r"classifier.learning_rate: 0.002 there, 0.5 asked for"),
    ({"sde__args__beta_max": 10.0}, r"sde.args.beta_max: 20.0 there, 10.0 asked for"),
    ({"classifier__args__depth": 16}, r"remove .*/classifier,\n *or choose another"),
    ({"classifier__num_steps": 10}, r"classifier.num_steps = 10 is not usable.\n.*600 or more"),
  ],
)
def test_another_classifier_than_the_one_in_the_folder(trained, changes, message):
  config, workdir, _ = trained
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
  with pytest.raises(ConfigError, match=message):
    train_classifier.run(config, workdir)


@pytest.mark.parametrize(
  "config, message",
  [
    (toy_config(data__name="toy:checkerboard"), "data.name = 'toy:checkerboard' .*\n.*with labels"),
    (toy_config(classifier__batch_size=6), "classifier.batch_size = 6 .*\n.*the 4 devices"),
    (toy_config(classifier__num_steps=0), "classifier.num_steps = 0 .*\n.*above 0"),
    (toy_config(classifier__weight_decay=-1.0), "classifier.weight_decay = -1.0 .*\n.*from 0 up"),
    (tiny_config(classifier__args={"deep": 3}), "classifier.args.deep = 3 .*\n.*depth, widen"),
    (tiny_config(classifier__args={"num_classes": 3}), "classifier.args.num_classes = 3"),
    (
      tiny_config(classifier__args={"architecture": "wide_resnet", "depth": 11}),
      "depth 11 is not 6 n .* 10, 16",
    ),
    (
      toy_config(classifier__args={"architecture": "wide_resnet"}),
      "shape \\(2,\\): .*is for images",
    ),
  ],
)
def test_what_cannot_be_trained_leaves_no_folder(config, message, tmp_path):
  with pytest.raises(ConfigError, match=message):
    train_classifier.run(config, tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_guidance_without_a_classifier_tells_how_to_train_one(tmp_path):
  with pytest.raises(ConfigError, match=r"python main\.py --mode=train_classifier --workdir="):
    train_classifier.restore(experiment.build(toy_config()), tmp_path)
