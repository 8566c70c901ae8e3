"""`--mode=validate`: every shipped process passes, every injected error is found and named."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_main import call
from tiny import tiny_config

import sde_lib
import settings
from errors import ConfigError, RunError
from evaluation.validation import report, run, validate


def failures(sde, rebuild=None, **options):
  """{name: check} of what failed."""
  checks = validate(sde, rebuild or (lambda: sde), **{"num_steps": 20} | options)
  return {
    check.name.partition(",")[0].partition(":")[0]: check for check in checks if not check.passed
  }


SHIPPED = ["vp", "sub_vp", "ve", "cosine", "edm", "rectified", "ddpm", "iddpm"]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_processes_pass(name):
  assert not failures(sde_lib.SDES[name](), sde_lib.SDES[name])


def test_a_process_with_tables_needs_to_be_built_again():
  with pytest.raises(ConfigError, match="pass rebuild"):
    validate(sde_lib.iddpm())


def naive(t_min=1e-5, prior_std=1.0, log_sigma=None, log_alpha=None):
  """The variance-preserving process as one first writes it, or with a part replaced."""
  base = sde_lib.vp()
  log_alpha = log_alpha or base.log_alpha
  return sde_lib.SDE(log_alpha, log_sigma or base.log_sigma, t_min, 1.0, prior_std)


def test_a_process_of_a_user_passes():
  alpha, sigma = lambda t: jnp.cos(1.5 * t), lambda t: jnp.sin(1.5 * t)
  user = sde_lib.user(alpha, sigma, t_min=1e-4, t_max=1.0, prior_std=1.0)
  failed = failures(user)
  assert not failed, report(list(failed.values()))


def test_a_noise_level_that_falls_is_found():
  wavy = lambda t: sde_lib.vp().log_sigma(t) + 0.5 * jnp.sin(20 * t)
  failed = failures(naive(log_sigma=wavy))
  assert {"rise of log-SNR between times", "-g^2 where it is negative"} <= failed.keys()
  assert "alpha / sigma must fall" in failed["rise of log-SNR between times"].mend


def test_a_flat_stretch_is_found():
  base = sde_lib.vp()
  stop = lambda f: lambda t: f(jnp.where(t > 0.5, 0.5, t))
  failed = failures(naive(log_alpha=stop(base.log_alpha), log_sigma=stop(base.log_sigma)))
  assert "rise of log-SNR between times" in failed
  assert "-g^2 where it is negative" not in failed


def test_cancellation_is_found():
  """sqrt(1 - exp(.)) is 2.4 % low at t = 1e-5 in float32."""
  cancels = lambda t: 0.5 * jnp.log(1 - jnp.exp(2 * sde_lib.vp().log_alpha(t)))
  failed = failures(naive(log_sigma=cancels))
  assert failed.keys() == {"float32 sigma"}
  assert 0.01 < failed["float32 sigma"].value < 0.1 and "expm1" in failed["float32 sigma"].mend


def test_a_t_min_too_small_for_float32_is_found():
  cancels = lambda t: 0.5 * jnp.log(1 - jnp.exp(2 * sde_lib.vp().log_alpha(t)))
  assert "values that are not finite" in failures(naive(1e-9, log_sigma=cancels))
  assert "values that are not finite" in failures(sde_lib.vp(t_min=0.0))
  assert not failures(sde_lib.vp(t_min=1e-9), num_steps=20)


def test_a_prior_twice_too_wide_is_found():
  failed = failures(naive(prior_std=2.0))
  assert failed.keys() == {"prior"}
  np.testing.assert_allclose(failed["prior"].value, 0.5 * (0.25 - 1 + np.log(4)), rtol=1e-3)


def test_the_prior_divergence_is_that_of_the_data():
  """N(0, 1 + s^2) to N(0, 1) for VE with sigma_max = 1: Technique 1's reason."""
  make = lambda: sde_lib.ve(sigma_max=1.0)
  value = failures(make(), make, sigma_data=0.75)["prior"].value
  np.testing.assert_allclose(value, 0.5 * (0.5625 - np.log(1.5625)), rtol=1e-6)
  assert not failures(sde_lib.ve(), sde_lib.ve, sigma_data=1.0)


def test_a_jump_and_a_missing_derivative_are_found():
  jump = lambda t: sde_lib.vp().log_alpha(t) - jnp.where(t > 0.305, 0.1, 0.0)
  assert "moments" in failures(naive(log_alpha=jump))
  stopped = lambda t: 1.0 * sde_lib.jax.lax.stop_gradient(sde_lib.vp().log_alpha(t))
  assert "moments" in failures(naive(log_alpha=stopped))


def test_nan_is_found():
  hole = lambda t: jnp.where(jnp.abs(t - 0.5) < 0.01, jnp.nan, sde_lib.vp().log_alpha(t))
  failed = failures(naive(log_alpha=hole))
  assert {"values that are not finite", "moments", "float32 alpha"} <= failed.keys()
  assert np.isinf(failed["moments"].value)


def test_a_constant_in_float32_counts_as_rounding_only_when_rebuilt():
  """sigma_min as a JAX array is float32 in a closure; rebuilt under float64 it is exact."""

  def make():
    scale = jnp.asarray(1.0) + jnp.asarray(3e-4) - jnp.asarray(1.0)  # 3e-4, to 1e-4 in float32
    return sde_lib.SDE(jnp.zeros_like, lambda t: jnp.log(scale) + 10 * t, 0.0, 1.0, 3e-4 * np.e**10)

  assert "float32 sigma" not in failures(make(), sigma_data=0.1)
  assert "float32 sigma" in failures(make(), make, sigma_data=0.1)


def test_a_grid_finer_than_float32_is_found():
  make = lambda: sde_lib.edm(sigma_min=79.9999, sigma_max=80.0)
  assert {"time grid", "log_snr grid", "karras grid"} <= failures(
    make(), make, num_steps=200
  ).keys()


def test_the_table_names_what_failed_and_how_to_mend_it(capsys):
  config = tiny_config(sampling__num_steps=20)
  run(config)
  text = capsys.readouterr().out
  assert "vp(beta_max=20.0, beta_min=0.1, t_min=1e-05)" in text and "all 12 checks passed" in text
  config.sde.args.t_min = 0.0
  with pytest.raises(RunError, match="of 12 checks failed: values that are not finite"):
    run(config)
  text = capsys.readouterr().out
  assert "FAIL  values that are not finite" in text and "mend: raise t_min" in text


def test_an_empty_interval_is_refused():
  config = tiny_config()
  config.sde.args.t_min = 2.0
  with pytest.raises(ConfigError, match=r"sde.args.t_min = 2.0"):
    run(config)


@pytest.mark.exhaustive
def test_validate_needs_no_run_and_may_change_a_saved_one(tmp_path):
  settings.save(tiny_config(), tmp_path)
  before = sorted(tmp_path.rglob("*"))
  arguments = "--mode=validate", f"--workdir={tmp_path}", "--config.sde.args.t_min=0.0"
  code, output = call(*arguments)
  assert code == 1 and "Traceback" not in output, output
  assert "changed: sde.args.t_min: 1e-05 -> 0.0" in output and "FAIL" in output
  assert "error: " in output and "values that are not finite" in output
  assert sorted(tmp_path.rglob("*")) == before
