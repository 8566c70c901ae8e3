"""Settings of every test: four CPU devices, strict ranks, checked annotations, a compile cache."""

import os
import sys

flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4".strip()
os.environ["NPROC"] = "8"  # as many threads as four devices need: collectives hang with fewer
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jaxtyping import install_import_hook  # noqa: E402

CHECKED = "errors sde_lib parameterization dynamics losses sampling likelihood data models binomial"
CHECKED += (
  " checkpoint_import checkpoint_formats augment bounds data_sources divergence dequantization"
  " guidance operators tasks"
)
install_import_hook(CHECKED.split(), "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental import io_callback  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/pakhsh/tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture
def x64():
  """Float64 for tests that compare to more than seven digits; build the SDE inside the test."""
  with jax.enable_x64(True):
    yield


class Executions:
  """Counts how often a marked value is computed at run time: executions, not traces."""

  def __init__(self):
    self._count = 0

    @jax.custom_jvp
    def mark(x):
      io_callback(self._add, None)
      return x

    mark.defjvp(lambda primals, tangents: (mark(*primals), *tangents))
    self.mark = mark

  def _add(self):
    self._count += 1

  def count(self) -> int:
    """Executions so far."""
    jax.effects_barrier()
    return self._count


@pytest.fixture
def executions():
  return Executions()
