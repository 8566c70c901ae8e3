"""What the devices have to tell each other in a training step of a configuration, and how long that
takes on some machines. Estimates from sizes and published bandwidths; nothing is timed.

python -m evaluation.collective_cost [config ...]

A step has one all-reduce, of the gradients: 4 bytes (float32) for each parameter; the loss beside
them is one number. With B bytes, n participants and a bandwidth of w bytes per second from each to
the next:

- all-reduce in a ring: each participant sends 2 (n - 1) / n B, so 2 (n - 1) / n B / w seconds;
- with training.fsdp = n: all-gather of the parameters for the forward pass and again for the
  backward pass, reduce-scatter of the gradients, each (n - 1) / n B: 3 (n - 1) / n B / w seconds.

Assumed: one ring in one direction at the full speed of the link, no latency, nothing hidden behind
computation. Trees, both directions of a torus and overlap make it faster, contention slower.
"""

import math
import sys
from typing import NamedTuple

import jax

import settings
from experiment import abstract_init, outline

CONFIGS = (
  "vp/cifar10_ddpmpp_continuous",
  "subvp/cifar10_ddpmpp_continuous",
  "ve/cifar10_ncsnpp_deep_continuous",
  "ve/ffhq_256_ncsnpp_continuous",
  "ve/ffhq_ncsnpp_continuous",
  "ddpm/cifar10",
  "ddpm/celebahq",
  "iddpm/imagenet64_conditional",
  "ncsn/cifar10",
  "ncsnv2/ffhq",
  "edm/cifar10_ddpmpp",
  "edm/imagenet64_adm",
)


class Machine(NamedTuple):
  """Participants of a ring, and bytes per second from one to the next."""

  name: str
  count: int
  bandwidth: float


MACHINES = (
  Machine("8 H100, NVLink", 8, 450e9),  # NVLink 4: 18 links of 25 GB/s each way (data sheet)
  Machine("8 GPUs, PCIe 4", 8, 25e9),  # x16: 31.5 GB/s each way less what is reached in practice
  # 16 chips; a link of 50 GB/s each way (Jouppi et al. 2023); no torus below 4 x 4 x 4
  Machine("TPU v4-32", 16, 50e9),
  Machine("4 hosts, 100 Gbit/s", 4, 12.5e9),  # between hosts whose devices have summed before
)


def gradient_bytes(path: str) -> int:
  """Bytes of the gradients of the network of configs/<path>.py, from shapes alone."""
  config = settings.load_config_file(f"configs/{path}.py")
  parts = outline(config)
  leaves = jax.tree.leaves(abstract_init(parts.model, parts.spec.shape)[1])
  return sum(4 * math.prod(leaf.shape) for leaf in leaves)


def all_reduce_seconds(num_bytes: int, machine: Machine) -> float:
  """Of a ring all-reduce."""
  return 2 * (machine.count - 1) / machine.count * num_bytes / machine.bandwidth


def fsdp_seconds(num_bytes: int, machine: Machine) -> float:
  """Of two all-gathers and a reduce-scatter in a ring, with the state split over all of it."""
  return 1.5 * all_reduce_seconds(num_bytes, machine)


def row(path: str) -> str:
  """A line of the table: MB per step, then for each machine the milliseconds of both."""
  num_bytes = gradient_bytes(path)
  seconds = [(all_reduce_seconds(num_bytes, m), fsdp_seconds(num_bytes, m)) for m in MACHINES]
  cells = [f"{a * 1e3:.1f} / {b * 1e3:.1f}" for a, b in seconds]
  return f"{path:<36}{num_bytes / 1e6:>8.0f}" + "".join(f"{cell:>21}" for cell in cells)


def main() -> None:
  """Prints the table."""
  print("estimated milliseconds per step: one all-reduce / with training.fsdp over all of them")
  print(f"{'configs/':<36}{'MB':>8}" + "".join(f"{m.name:>21}" for m in MACHINES))
  for path in sys.argv[1:] or CONFIGS:
    print(row(path.removeprefix("configs/").removesuffix(".py")))


if __name__ == "__main__":
  main()
