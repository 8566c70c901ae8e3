"""Noise levels from data: the published numbers of NCSNv2, brute force, and `--mode=inspect`."""

import numpy as np
import pytest
from scipy.spatial.distance import pdist
from scipy.stats import norm
from test_main import call
from tiny import tiny_config

import noise_levels
import sampling
import sde_lib
import settings
from errors import ConfigError
from evaluation import inspection

# NCSNv2: sigma_1 (to 0.01), pixels, levels as published, levels for C = 0.5, C of the published
# levels, step_lr and steps per level as published, technique 4's value there
PUBLISHED = {
  "cifar10": (50, 32, 232, 219, 0.5670, 6.2e-6, 5, 1.055),
  "celeba": (90, 64, 500, 472, 0.5669, 3.3e-6, 5, 1.031),
  "church": (140, 96, 788, 745, 0.5662, 4.9e-6, 4, 1.025),
  "bedroom": (190, 128, 1086, 1026, 0.5665, 1.8e-6, 3, 1.017),
  "ffhq": (348, 256, 2311, 2182, 0.5669, 0.9e-6, 3, 1.009),
}
sets = pytest.mark.parametrize("name", PUBLISHED)


@pytest.mark.parametrize("num_dims", [5, 64, 784, 3072, 196608])
def test_the_ratio_of_overlap_one_half_is_the_closed_form(num_dims):
  """Phi(sqrt(2 D) (g - 1) + 3 g) is 1 - 3e-10 at most, so the other argument is zero."""
  root = np.sqrt(2 * num_dims)
  ratio = noise_levels.level_ratio(num_dims)
  np.testing.assert_allclose(ratio, root / (root - 3), rtol=1e-9)
  np.testing.assert_allclose(noise_levels.level_overlap(ratio, num_dims), 0.5, rtol=1e-12)


@pytest.mark.parametrize("overlap", [0.01, 0.3, 0.567, 0.9, 0.99])
def test_the_ratio_solves_its_equation(overlap):
  for num_dims in (5, 3072):
    ratio = noise_levels.level_ratio(num_dims, overlap)
    np.testing.assert_allclose(noise_levels.level_overlap(ratio, num_dims), overlap, rtol=1e-10)


def test_the_overlap_is_a_difference_of_two_normal_probabilities():
  shift, ratio = np.sqrt(10) * 0.2, 1.2
  expected = norm.cdf(shift + 3.6) - norm.cdf(shift - 3.6)
  np.testing.assert_allclose(noise_levels.level_overlap(ratio, 5), expected, rtol=1e-14)
  np.testing.assert_allclose(noise_levels.level_overlap(1.0, 5), 0.9973002, rtol=1e-7)
  low = noise_levels.level_overlap(0.5, 5)  # the first probability counts below 1
  np.testing.assert_allclose(low, norm.cdf(1.5 - 1.5811388) - norm.cdf(-3.0811388), rtol=1e-6)


@sets
def test_the_number_of_levels_of_ncsnv2(name):
  sigma, pixels, published, ours, overlap, *_ = PUBLISHED[name]
  num_dims = 3 * pixels**2
  assert noise_levels.num_levels(sigma, 0.01, num_dims) == ours
  ratio = (sigma / 0.01) ** (1 / (published - 1))
  np.testing.assert_allclose(noise_levels.level_overlap(ratio, num_dims), overlap, atol=6e-5)
  assert noise_levels.num_levels(sigma, 0.01, num_dims, overlap) == pytest.approx(published, abs=1)


def test_the_ten_levels_of_ncsn_do_not_overlap():
  assert noise_levels.level_overlap(100 ** (1 / 9), 3072) < 1e-100
  assert noise_levels.num_levels(1.0, 0.01, 3072) == 119


@sets
def test_technique_4_at_the_published_settings(name):
  """The published step is the best one to 5 %, but for church: 0.0024 above the best value."""
  sigma, _, levels, _, _, step_lr, num_steps, value = PUBLISHED[name]
  ratio = (sigma / 0.01) ** (1 / (levels - 1))
  at = lambda step_lr: noise_levels.technique4(ratio, step_lr / 0.01**2, num_steps)
  assert round(at(step_lr), 3) == value
  best = noise_levels.langevin_step_size(np.geomspace(sigma, 0.01, levels), num_steps)
  assert at(best) <= at(step_lr) < at(best) + 0.0025
  assert name == "church" or abs(best / step_lr - 1) < 0.05


@pytest.mark.parametrize(("ratio", "num_steps"), [(1.5, 1), (1.04, 5), (1.01, 100)])
def test_the_langevin_step_is_a_minimum(ratio, num_steps):
  best = noise_levels.langevin_step_size(0.02 * ratio ** np.arange(7), num_steps) / 0.02**2
  values = [noise_levels.technique4(ratio, c * best, num_steps) for c in (0.98, 1, 1.02)]
  assert values[1] < min(values[0], values[2]) and values[1] > 1


def test_technique_4_is_the_variance_of_the_chain():
  """x + step s^2 score + sqrt(2 step) s z on N(0, s^2), from N(0, (ratio s)^2)."""
  variance = 1.3**2
  for _ in range(4):
    variance = (1 - 0.1) ** 2 * variance + 2 * 0.1
  np.testing.assert_allclose(noise_levels.technique4(1.3, 0.1, 4), variance, rtol=1e-14)


def clouds():
  rng = np.random.default_rng(0)
  normal = rng.normal(size=(300, 2, 5)).astype(np.float32)
  sphere = normal.reshape(300, -1) / np.linalg.norm(normal.reshape(300, -1), axis=1)[:, None]
  shifted = normal + 1000  # far from the origin
  line = rng.normal(size=(299, 1)) * np.ones(3)
  lonely = normal + 30 * (np.arange(300) == 5)[:, None, None]
  return {"normal": normal, "sphere": sphere, "shifted": shifted, "line": line, "lonely": lonely}


@pytest.mark.parametrize("name", clouds())
def test_the_largest_distance_is_exact_and_bracketed(name):
  x = clouds()[name]
  exact = pdist(np.asarray(x, np.float64).reshape(len(x), -1)).max()
  for block in (7, 300, 1024):
    np.testing.assert_allclose(noise_levels.largest_distance(x, block), exact, rtol=1e-12)
  np.testing.assert_allclose(noise_levels.distance_bracket(x), exact, rtol=1e-12)
  some = 150**2 * x[0].size  # products for half of the points
  np.testing.assert_allclose(noise_levels.distance_bracket(x, some)[0], exact, rtol=0.1)
  lower, upper = noise_levels.distance_bracket(x, budget=0)
  assert lower <= exact * (1 + 1e-12) and exact <= upper * (1 + 1e-12)
  assert 0.9 * exact < lower and upper < 1.6 * exact


def test_a_pair_that_one_walk_misses_is_found():
  """The farthest from the farthest of the mean is 2.0; the farthest pair is 2.02."""
  x = np.array([[1.15, 0], [-0.85, 0], [0.0, 1.01], [0.0, -1.01], [-0.5, 0.0]])
  exact = pdist(x).max()
  assert exact == 2.02 and noise_levels.distance_bracket(x) == (exact, exact)


def test_the_median_distance():
  x = clouds()["normal"]
  expected = np.median(pdist(x.reshape(300, -1)))
  np.testing.assert_allclose(noise_levels.median_distance(x), expected, rtol=1e-6)
  assert abs(noise_levels.median_distance(x, 100) / expected - 1) < 0.05


def test_duplicates_are_counted():
  images = np.arange(12, dtype=np.uint8).reshape(6, 2)[[0, 1, 0, 0, 0, 2, 1]]
  assert noise_levels.count_duplicates(images) == 4
  assert noise_levels.count_duplicates(images, images[1:2]) == 2


def test_sigma_data_counts_the_width_of_the_bins():
  x = np.float32([0, 0, 1, 1]) + 1e4
  np.testing.assert_allclose(noise_levels.sigma_data(x), 0.5)
  np.testing.assert_allclose(noise_levels.sigma_data(x, 1.0), np.sqrt(0.25 + 1 / 12))


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: noise_levels.level_ratio(4), "num_dims = 4"),
    (lambda: noise_levels.level_ratio(64, 1.0), "overlap = 1.0"),
    (lambda: noise_levels.num_levels(0.01, 0.01, 64), "sigma_max = 0.01"),
  ],
)
def test_what_has_no_solution_is_refused(call, words):
  with pytest.raises(ConfigError, match=words):
    call()


def digits(process="vp", **changes):
  config = settings.load_config_file(f"configs/digits.py:{process}").unlock()
  config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
  return config


def printed(config, capsys):
  inspection.run(config)
  return capsys.readouterr().out


def test_inspect_prints_what_numpy_finds(capsys):
  from sklearn.datasets import load_digits

  x = (load_digits().images[:1500].reshape(1500, 64) + 0.5) * 2 / 17 - 1
  text = printed(tiny_config(), capsys)
  words = ["train 1,500, test 297", "(8, 8, 1)", "17 declared, 0 .. 16 seen", "  0 within train"]
  words += [f"mean {x.mean():.4f}, std {x.std():.4f}", f"min {x.min():.4f}, max {x.max():.4f}"]
  words += [f"largest {pdist(x).max():.4g} (exact)", f"median {np.median(pdist(x)):.4g}"]
  words += ["0: 151", f"sigma_data={np.sqrt(x.var() + (2 / 17) ** 2 / 12):.3g}\n", "agrees"]
  assert all(word in text for word in words), text
  assert "warning" not in text


def test_the_proposed_lines_can_be_used_as_they_are(capsys):
  for process in ("vp", "ve"):
    lines = [line.strip() for line in printed(digits(process), capsys).splitlines()]
    flags = [line for line in lines if line.startswith("--config.")]
    settings.check_command_line(["main.py", f"--config=configs/digits.py:{process}", *flags])
    assert all(any(w in f for f in flags) == (process == "ve") for w in ("sigma_max", "step_lr"))
    for line in (line for line in lines if line.startswith("config.")):
      config = digits(process)
      exec(line, {"config": config})
      sde = sde_lib.make_sde(config.sde.name, **config.sde.args)
      sampling.annealed_langevin(sde, **config.sampling.options.annealed_langevin)


def test_inspect_warns_above_twenty_percent(capsys):
  sigma = 0.7068
  for factor, warned in ((0.75, True), (0.85, False), (1.15, False), (1.25, True)):
    text = printed(tiny_config(parameterization__sigma_data=factor * sigma), capsys)
    assert text.count("warning: parameterization.sigma_data is") == warned


def test_inspect_proposes_every_level_setting_that_the_configuration_has(capsys):
  options = {"step_lr": 1e-3, "num_steps": 5}
  config = digits("ve", sampling__sampler="annealed_langevin")
  config.sampling.options.annealed_langevin = options
  config.sde = {"name": "ncsn", "args": {"sigma_max": 9.0, "sigma_min": 0.01, "num_scales": 23}}
  text = printed(config, capsys)
  flags = "sde.args.sigma_max=9.04", "sde.args.num_scales=23", "sampling.num_steps=22"
  assert all(f"--config.{flag}\n" in text for flag in flags), text
  assert "--config.sampling.options.annealed_langevin.step_lr=2.41e-05\n" in text
  assert text.count("warning:") == 2 and "configuration file" not in text


def test_few_dimensions_have_no_levels():
  statistics = inspection.measure(inspection.data.load(tiny_config().data), True)
  small = inspection.dataclasses.replace(statistics, num_dims=4)
  assert set(inspection.propose(small, tiny_config())) == {
    "parameterization.sigma_data",
    "sde.args.sigma_max",
  }


@pytest.mark.exhaustive
def test_inspect_needs_no_run_and_leaves_none(tmp_path):
  code, output = call("--mode=inspect", f"--workdir={tmp_path / 'none'}")
  assert code == 0 and "--config.parameterization.sigma_data=0.707" in output, output
  assert not (tmp_path / "none").exists()
