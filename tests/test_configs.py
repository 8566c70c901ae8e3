"""Every configuration file: it builds, has the published size, is short, says where it is from."""

import ast
import collections
import functools
import pathlib

import jax
import pytest

import experiment
import settings
from configs import bases
from ema import half_life_decay

ROOT = pathlib.Path(__file__).parent.parent
PATHS = sorted(
  path.relative_to(ROOT)
  for path in (ROOT / "configs").rglob("*.py")
  if path.stem != "__init__" and path.parent.name != "bases"
)
PUBLISHED = [path for path in PATHS if path.stem not in ("digits", "toy")]

DDPM, ONCE, DDPM_256, ONCE_256 = 35_746_307, 35_218_947, 113_673_219, 111_569_923
DDPMPP, DDPMPP_DEEP = 61_804_419, 106_632_579
AUGMENTED = 9 * 128  # the map of EDM's augmentation: of twice as many for Fourier features
NCSNPP, FOURIER, NCSNPP_DEEP, FOURIER_DEEP = 62_693_251, 62_758_915, 107_521_411, 107_587_075
NCSNPP_256, NCSNPP_1024 = 65_574_549, 105_785_896
NCSN, NCSNV2, NCSNV2_128 = 30_117_635, 29_694_083, 83_445_379
COUNTS = {
  "ddpm/cifar10": DDPM,
  **dict.fromkeys(("ddpm/bedroom", "ddpm/celebahq", "ddpm/church"), DDPM_256),
  **dict.fromkeys(("edm/afhqv2_64_ddpmpp", "edm/ffhq64_ddpmpp"), DDPMPP + AUGMENTED),
  **dict.fromkeys(("edm/afhqv2_64_ncsnpp", "edm/ffhq64_ncsnpp"), FOURIER + 2 * AUGMENTED),
  "iddpm/cifar10": 52_546_438,
  "iddpm/imagenet64_conditional": 273_049_350,
  **dict.fromkeys(("ncsn/celeba", "ncsn/cifar10"), NCSN),
  **dict.fromkeys(("ncsnv2/celeba", "ncsnv2/cifar10"), NCSNV2),
  **dict.fromkeys(("ncsnv2/bedroom", "ncsnv2/church", "ncsnv2/tower"), NCSNV2_128),
  "ncsnv2/ffhq": 94_132_611,
  "subvp/cifar10_ddpm_continuous": ONCE,
  "subvp/cifar10_ddpmpp_continuous": DDPMPP,
  "subvp/cifar10_ddpmpp_deep_continuous": DDPMPP_DEEP,
  "subvp/cifar10_ncsnpp_continuous": NCSNPP,
  "subvp/cifar10_ncsnpp_deep_continuous": NCSNPP_DEEP,
  "ve/bedroom_ncsnpp_continuous": NCSNPP_256,
  "ve/celeba_ncsnpp": NCSNPP,
  "ve/celebahq_256_ncsnpp_continuous": NCSNPP_256,
  "ve/celebahq_ncsnpp_continuous": NCSNPP_1024,
  "ve/church_ncsnpp_continuous": NCSNPP_256,
  "ve/cifar10_ddpm": ONCE,
  "ve/cifar10_ncsnpp": NCSNPP,
  "ve/cifar10_ncsnpp_continuous": FOURIER,
  "ve/cifar10_ncsnpp_deep_continuous": FOURIER_DEEP,
  "ve/ffhq_256_ncsnpp_continuous": NCSNPP_256,
  "ve/ffhq_ncsnpp_continuous": NCSNPP_1024,
  **dict.fromkeys(("ve/ncsn/celeba", "ve/ncsn/celeba_5"), 34_428_675),
  **dict.fromkeys(("ve/ncsn/celeba_124", "ve/ncsn/celeba_1245"), 57_384_195),
  **dict.fromkeys(("ve/ncsn/cifar10", "ve/ncsn/cifar10_5"), 34_428_675),
  **dict.fromkeys(("ve/ncsn/cifar10_124", "ve/ncsn/cifar10_1245"), 44_828_931),
  **dict.fromkeys(("ve/ncsnv2/celeba", "ve/ncsnv2/cifar10"), 33_970_563),
  "ve/ncsnv2/bedroom": NCSNV2_128,
  "vp/cifar10_ddpmpp": DDPMPP,
  "vp/cifar10_ddpmpp_continuous": DDPMPP,
  "vp/cifar10_ddpmpp_deep_continuous": DDPMPP_DEEP,
  "vp/cifar10_ncsnpp": NCSNPP,
  "vp/cifar10_ncsnpp_continuous": NCSNPP,
  "vp/cifar10_ncsnpp_deep_continuous": NCSNPP_DEEP,
  **dict.fromkeys(("vp/ddpm/bedroom", "vp/ddpm/celebahq", "vp/ddpm/church"), ONCE_256),
  **dict.fromkeys(("vp/ddpm/cifar10", "vp/ddpm/cifar10_continuous"), ONCE),
  "vp/ddpm/cifar10_unconditional": 32_329_347,
}
SHAPELESS = {"centered": True, "dropout": 0.0, "dtype": "float32"}  # no parameter depends on them


def name_of(path):
  return str(path.relative_to("configs").with_suffix(""))


@functools.cache
def load(path):
  return settings.load_config_file(str(path))


@pytest.fixture(autouse=True)
def traced_once(monkeypatch):
  """Networks that differ in what changes no shape are traced once."""
  trace = experiment.abstract_init

  def shared(model, shape):
    return trace(model.clone(**{k: v for k, v in SHAPELESS.items() if hasattr(model, k)}), shape)

  monkeypatch.setattr(experiment, "abstract_init", shared)


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_every_configuration_builds(path):
  parts = experiment.outline(load(path))
  leaves = jax.tree.leaves(experiment.abstract_init(parts.model, parts.spec.shape)[1])
  count = sum(leaf.size for leaf in leaves)
  assert count == COUNTS.get(name_of(path), count)


def test_every_expected_configuration_is_there():
  assert COUNTS.keys() <= set(map(name_of, PATHS))
  score_sde = [name for name in map(name_of, PATHS) if name.startswith(("subvp", "ve/", "vp/"))]
  assert len(score_sde) == 39


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_the_saved_configuration_is_the_same(path, tmp_path):
  settings.save(load(path), tmp_path)
  assert settings.flatten(settings.read(tmp_path)) == settings.flatten(load(path))


def test_no_two_configurations_are_the_same():
  flat = [tuple(sorted(settings.flatten(load(path)).items())) for path in PATHS]
  assert len(set(flat)) == len(flat)


@pytest.mark.parametrize("path", PUBLISHED, ids=name_of)
def test_the_header_tells_figure_source_and_command(path):
  header = ast.get_docstring(ast.parse((ROOT / path).read_text()))
  assert all(f"\n{word}: " in header for word in ("Published", "Source", "Command")), header
  assert f"python main.py --config={path}" in header and "--workdir=" in header


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_a_configuration_is_short(path):
  assert len((ROOT / path).read_text().splitlines()) <= 25


def statements(path):
  """Lines of code without imports, docstrings and the line that defines `get_config`."""
  for node in ast.walk(ast.parse((ROOT / path).read_text())):
    prose = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    other = (ast.Import, ast.ImportFrom, ast.FunctionDef)
    if isinstance(node, ast.stmt) and not prose and not isinstance(node, other):
      yield ast.unparse(node)


def test_no_line_is_repeated():
  counts = collections.Counter(line for path in PATHS for line in statements(path))
  assert not [line for line, count in counts.items() if count > 1]


@pytest.mark.parametrize("rate, batch_size", [(0.0, 128), (0.999, 128), (0.9999, 64)])
def test_a_half_life_is_the_published_factor_per_step(rate, batch_size):
  half_life = bases.ema_half_life(rate, batch_size)
  late = half_life_decay(batch_size, half_life, 0.05)(jax.numpy.asarray(10**7))
  assert abs(float(late) - rate) < 1e-6


def test_parts_leave_the_tree_and_each_other_as_they_were():
  before = repr(bases.TREE)
  changed = bases.config({"optimizer": {"grad_clip": 1.0}}, bases.changed(nf=1), {"seed": 3})
  assert (changed.optimizer.grad_clip, changed.model.args.nf, changed.seed) == (1.0, 1, 3)
  assert repr(bases.TREE) == before and bases.config().seed == 0
