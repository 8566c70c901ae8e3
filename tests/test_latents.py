"""Latents of the likelihood job: how typical they are by closed forms, their file, the points
between them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import rotated
from scipy.stats import kstest
from test_bits_per_dim import SMALL
from tiny import toy_config

from errors import ConfigError
from evaluation import bits_per_dim, latents, trained
from experiment import build
from likelihood import encode
from sde_lib import make_sde

D = 20


@pytest.fixture(scope="module")
def norms_of():
  """x -> norms of the latents of a Gaussian model of D dimensions under VP."""
  sde = make_sde("vp")
  law = rotated(np.linspace(-0.5, 0.5, D), np.geomspace(0.02, 3.0, D))
  run = jax.jit(lambda x: encode(sde, law.score_fn(sde), x, rtol=1e-4, atol=1e-4)[0])
  return law, lambda x: np.linalg.norm(run(x), axis=1)


def test_p_values_of_the_models_own_data_are_uniform(norms_of):
  law, norms = norms_of
  p_values = latents.typicality(norms(law.sample(jax.random.key(0), 4000)), 1.0, D)
  assert kstest(p_values, "uniform").pvalue > 0.01
  assert abs(latents.summary(p_values)["atypical_share"] - 0.05) < 0.011


def test_outliers_of_both_kinds_are_found(norms_of):
  """Far from the data, and nearer to the mean than any of them: the densest point of all."""
  law, norms = norms_of
  off = (jnp.sqrt(law.variances) * jnp.ones((1, D))) @ law.basis.T
  x = jnp.concatenate([law.mean + 3 * off, law.mean + 0.1 * off])
  assert law.log_prob(x)[1] > law.log_prob(law.sample(jax.random.key(1), 1000)).max()
  p_values = latents.typicality(norms(x), 1.0, D)
  assert (p_values < 1e-3).all()


def test_the_prior_of_another_width():
  z = 7.0 * np.random.default_rng(0).normal(size=(4000, D))
  p_values = latents.typicality(np.linalg.norm(z, axis=1), 7.0, D)
  assert kstest(p_values, "uniform").pvalue > 0.01
  assert np.isnan(latents.typicality(np.array([np.nan]), 1.0, D)).all()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """(a job that keeps the latents, of a network at its start, and where its results are)."""
  workdir = tmp_path_factory.mktemp("run")
  options = {"likelihood__num_examples": 21, "likelihood__save_latents": True}
  options |= {"likelihood__rtol": 1e-4, "likelihood__atol": 1e-4}
  experiment = build(toy_config(**SMALL | options))
  params = jax.jit(experiment.model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.ones(1))
  job = trained.Job(experiment, jax.device_get(params["params"]), 0, workdir)
  bits_per_dim.run(job)
  return job, workdir / "results"


def test_latents_have_a_file_of_their_own(saved):
  job, results = saved
  table, stored = (dict(np.load(results / f"{n}.npz")) for n in ("likelihood", "latents"))
  assert "latent" not in table and stored["latent"].shape == (21, 8, 8, 1)
  split = job.experiment.dataset.splits["test"]
  np.testing.assert_array_equal(stored["index"], table["index"])
  np.testing.assert_array_equal(stored["label"], split["label"][table["index"]])
  norm = np.linalg.norm(stored["latent"].reshape(21, -1), axis=1)
  np.testing.assert_allclose(norm, table["latent_norm"], rtol=1e-5)
  p_values = latents.typicality(norm, 1.0, 64)
  np.testing.assert_allclose(p_values, table["typicality"], rtol=1e-3, atol=1e-6)
  assert (results / "interpolation.png").is_file()


def test_the_ends_of_an_interpolation_are_the_examples(saved):
  """Decoded into the bins they were drawn from."""
  job, results = saved
  stored = np.load(results / "latents.npz")
  latent, labels = stored["latent"][:6], stored["label"][:6]
  held = bits_per_dim.hold(job)
  x = np.asarray(latents.between(job.experiment, held, latent, labels, 3))
  k = job.experiment.dataset.splits["test"]["image"][stored["index"][:6]]
  ends = np.concatenate([x[:, 0], x[:, 2]])
  centres = np.asarray(job.experiment.transform.forward(jnp.asarray(k)))
  assert np.abs(ends - centres).max() < 0.5 * job.experiment.transform.bin_width + 5e-3


def test_each_point_is_told_the_class_of_the_nearer_end(saved, monkeypatch):
  job, _ = saved
  seen = []
  monkeypatch.setattr(type(job.experiment), "labels", lambda _, labels: seen.append(labels))
  monkeypatch.setattr(latents, "decode", lambda sde, score_fn, z, **_: (z, None))
  monkeypatch.setattr(jax, "jit", lambda function: function)
  z = np.ones((4, 8, 8, 1), np.float32)
  latents.between(job.experiment, bits_per_dim.hold(job), z, np.array([1, 2, 3, 4]), 5)
  np.testing.assert_array_equal(seen[0], [1, 1, 1, 3, 3, 2, 2, 2, 4, 4])


def test_the_bound_of_the_chain_has_no_latents():
  with pytest.raises(ConfigError, match=r"likelihood.save_latents = True .*\n.*kind=variational"):
    build(toy_config(likelihood__kind="variational", likelihood__save_latents=True))
