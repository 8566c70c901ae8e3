"""What `--mode=inspect` tells of a network, against counts by hand on networks small enough."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from tiny import tiny_config

from evaluation import inspection, network
from experiment import abstract_init, outline
from models import adm, ddpm, mlp, ncsn, ncsnpp
from settings import load_config_file

SHAPE = (8, 8, 2)


class Convolution(nn.Module):
  """One 3x3 convolution without bias or padding, and a 1x1 convolution of what is above 0."""

  @nn.compact
  def __call__(self, x, c_noise, labels=None, train=False):
    h = nn.Conv(5, (3, 3), padding="VALID", use_bias=False)(x)
    return nn.Conv(2, (1, 1), use_bias=False)(h * h)


def test_floating_point_operations_are_two_per_multiply_add():
  by_hand = 36 * (2 * 9 * 2 * 5 + 5 + 2 * 5 * 2)  # 6x6 pixels: convolution, square, convolution
  assert network.flops(Convolution(), SHAPE) == by_hand


def test_activations_are_what_the_backward_pass_needs_of_each_image():
  x, h = 8 * 8 * 2, 6 * 6 * 5  # the input; the features, and their square
  assert network.activations(Convolution(), SHAPE) == 4 * (x + 2 * h)


def test_state_is_parameters_optimizer_average_and_gradients():
  size = 4 * (9 * 2 * 5 + 5 * 2)
  counts = 8 + 9  # steps, counted by Adam and by its schedule; those that were not finite
  expected = {"parameters": size, "optimizer": 2 * size + counts, "EMA": size, "gradients": size}
  assert network.state_bytes(Convolution(), SHAPE, tiny_config()) == expected


@pytest.mark.parametrize("memory, batch", [(99, 0), (100, 0), (129, 2), (130, 3)])
def test_the_largest_batch_fits_beside_the_state(memory, batch):
  assert network.largest_batch(memory, 100, 10) == batch


@pytest.mark.exhaustive
def test_recomputing_blocks_keeps_less():
  args = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": ()}
  plain, remat = (network.activations(ddpm.Model(remat=r, **args), SHAPE) for r in (False, True))
  assert remat < 0.7 * plain


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_fixed_frequencies_are_told_from_trained_parameters(remat):
  model = ncsnpp.Model(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), remat=remat)
  cost, blocks = network.measure(model, SHAPE)
  leaves = jax.tree.leaves(abstract_init(model, SHAPE)[1])
  assert cost.num_fixed == 8 and cost.num_parameters == sum(leaf.size for leaf in leaves)
  assert blocks == {
    "residual blocks": "10: 2 (+1) / 2 / 4 (+1)",
    "attention blocks": "3: 1 / 1 / 1",
    "resampling layers": "1: 1 / 0 / 0",
  }


def blocks_of(model, size):
  shape = (size, size, 3)
  return network.count_blocks(model, network._trace(model, shape)[0])


@pytest.mark.exhaustive
@pytest.mark.parametrize(
  "name, residual, attention",
  [
    ("ddpm/cifar10", "22: 8 / 2 / 12", "6: 2 / 1 / 3"),
    ("vp/ddpm/cifar10", "22: 8 / 2 / 12", "4: 2 / 1 / 1"),
    ("ddpm/church", "32: 12 / 2 / 18", "6: 2 / 1 / 3"),
    ("vp/ddpm/church", "32: 12 / 2 / 18", "4: 2 / 1 / 1"),
    ("vp/cifar10_ddpmpp", "44: 16 (+3) / 2 / 20 (+3)", "6: 4 / 1 / 1"),
    ("vp/cifar10_ddpmpp_deep_continuous", "76: 32 (+3) / 2 / 36 (+3)", "10: 8 / 1 / 1"),
    ("ve/cifar10_ncsnpp_continuous", "44: 16 (+3) / 2 / 20 (+3)", "6: 4 / 1 / 1"),
    ("ve/church_ncsnpp_continuous", "49: 14 (+6) / 2 / 21 (+6)", "4: 2 / 1 / 1"),
    ("ve/ffhq_ncsnpp_continuous", "40: 8 (+7) / 2 / 16 (+7)", "3: 1 / 1 / 1"),
    ("ncsn/cifar10", "8", None),
    ("ncsnv2/cifar10", "8", None),
  ],
)
def test_blocks_of_the_published_networks(name, residual, attention):
  parts = outline(load_config_file(f"configs/{name}.py"))
  blocks = network.count_blocks(parts.model, network._trace(parts.model, parts.spec.shape)[0])
  assert blocks["residual blocks"] == residual and blocks.get("attention blocks") == attention
  assert blocks.get("RefineBlocks") == (None if attention else "4")


@pytest.mark.exhaustive
def test_other_networks_have_totals_or_nothing():
  assert blocks_of(ncsn.Model(nf=8, num_scales=2), 8) == {
    "residual blocks": "8",
    "RefineBlocks": "4",
  }
  assert network.measure(mlp.Model(hidden=(4,)), (3,))[1] == {}
  narrow = adm.Model(nf=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), num_classes=3)
  assert network.measure(narrow, (8, 8, 3))[0].flops > 0


@pytest.mark.exhaustive
def test_inspect_of_data_that_are_not_there_tells_the_rest(capsys):
  inspection.run(load_config_file("configs/ddpm/cifar10.py"))
  text = capsys.readouterr().out
  words = "'tfds:cifar10'", "cifar-10-binary.tar.gz", "35,746,307, of them 0 fixed", "22: 8 / 2"
  assert all(word in text for word in words), text
  assert "80 GiB: " in text and "statistics" in text


def test_inspect_of_the_digits_has_both_parts(capsys):
  inspection.run(tiny_config())
  text = capsys.readouterr().out
  assert "train 1,500, test 297" in text and "network 'ddpm', images of (8, 8, 1)" in text
  assert np.all([f"{size} GiB: " in text for size in network.MEMORIES])
