r"""NCSN++ of twice the depth on CIFAR-10 under the sub-VP SDE.

Published: no figure
Source:    score_sde, configs/subvp/cifar10_ncsnpp_deep_continuous.py
Command:   python main.py --config=configs/subvp/cifar10_ncsnpp_deep_continuous.py \
             --workdir=runs/subvp_cifar10_ncsnpp_deep_continuous
"""

from ml_collections import ConfigDict

from configs.bases import score_sde


def get_config() -> ConfigDict:
  """The settings of the run."""
  return score_sde.cifar10(score_sde.SUB_VP, score_sde.NCSNPP, score_sde.DEEP)
