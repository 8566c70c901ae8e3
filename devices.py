"""Devices and hosts: the start of `jax.distributed`, the mesh, how the state lies on it, and how
arrays come from and go to the host.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from errors import ConfigError, RunError, Stopped, check

SMALLEST_SHARDED = 2**12  # values; smaller parameters are kept whole on every device


# launcher: (variable with the number of processes or a list of them, what else jax reads), as in
# jax/_src/clusters; without the latter (a batch script without srun) a process is alone
LAUNCHERS = {
  "Slurm": (
    "SLURM_NTASKS",
    ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"),
  ),
  "Open MPI": ("OMPI_COMM_WORLD_SIZE", ()),
  "TPU on Kubernetes": ("TPU_PROCESS_ADDRESSES", ("TPU_WORKER_ID",)),
  "TPU on Kubernetes, older": ("TPU_WORKER_HOSTNAMES", ("TPU_WORKER_ID",)),
  "TPU slices": ("MEGASCALE_NUM_SLICES", ()),
}


def several_hosts() -> bool:
  """Whether jax is to look for the other processes: one of `LAUNCHERS` started several, this is a
  TPU virtual machine, which only its metadata server tells the size of, or the user has set
  JAX_COORDINATOR_ADDRESS (on Kubernetes).
  """
  environment = os.environ
  for name, others in LAUNCHERS.values():
    told = environment.get(name, "")
    count = int(told) if told.isdigit() else len(told.split(","))
    if count > 1 and all(other in environment for other in others):
      return True
  # jax sets the first where it finds TPU chips, and the second, or the user does, where there is
  # nobody to ask
  virtual_machine = "TPU_ML_PLATFORM" in environment and "TPU_SKIP_MDS_QUERY" not in environment
  alone = "TPU_WORKER_HOSTNAMES" in environment or "TPU_PROCESS_ADDRESSES" in environment
  return "JAX_COORDINATOR_ADDRESS" in environment or (virtual_machine and not alone)


def start(coordinator: str, num_processes: int, process_id: int) -> None:
  """Joins the processes of one run: those of the flags, else those that a launcher started."""
  if coordinator:
    legal = "host:port of process 0, the same for every process"
    check(coordinator.rpartition(":")[2].isdigit(), "--coordinator", coordinator, legal)
    legal = "the number of processes of the run, the same for each of them"
    check(num_processes > 0, "--num_processes", num_processes, legal)
    legal = f"a number from 0 to {num_processes - 1}, another for each process"
    check(0 <= process_id < num_processes, "--process_id", process_id, legal)
    arguments = (coordinator, num_processes, process_id)
  else:
    check(num_processes < 2, "--num_processes", num_processes, "1 without --coordinator=host:port")
    check(process_id == 0, "--process_id", process_id, "0 without --coordinator=host:port")
    if not several_hosts():
      return
    arguments = ()
  try:
    jax.distributed.initialize(*arguments)
  except (RuntimeError, ValueError) as error:
    raise ConfigError(
      f"the processes of the run could not be joined: {error}\n"
      "  mend:  --coordinator=host:port --num_processes=n --process_id=i for each process"
    ) from error
  if not is_first():
    # one host tells the user what happens; errors go to stderr, from every host
    sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
  counts = f"{jax.device_count()} devices of {jax.process_count()} processes"
  print(f"devices: {counts}, {jax.local_device_count()} of them here", flush=True)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """What ends this process ends all of them, with its message: the others may wait for it, and it
  would wait for them before it leaves.
  """
  try:
    yield
  except Stopped:
    raise
  except BaseException as error:
    if jax.process_count() == 1:
      raise
    known = isinstance(error, ConfigError | RunError)
    text = f"error: {error}\n" if known else traceback.format_exc()
    sys.stderr.write(text)
    sys.stderr.flush()
    os._exit(1)


def is_first() -> bool:
  """Whether this is the host that writes files and talks."""
  return jax.process_index() == 0


def no_bar() -> bool | None:
  """`disable` of a tqdm bar: None, a bar on terminals alone, and none of the other hosts."""
  return None if is_first() else True


def make_mesh(fsdp: int = 1, devices: list | None = None) -> Mesh:
  """All devices (or the given ones) along the axes `data` and `fsdp`; groups of `fsdp` devices
  share one copy of the state.

  Host by host, unlike `jax.make_mesh`, which may reorder the chips of a pod: the rows of a batch
  that a host reads then are the rows that its devices have, whatever the number of hosts.
  """
  devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
  count = len(devices)
  legal = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
  check(count % fsdp == 0, "training.fsdp", fsdp, f"a divisor of the {count} devices: {legal}")
  axis_types = (jax.sharding.AxisType.Auto,) * 2
  grid = np.reshape(devices, (count // fsdp, fsdp))
  return Mesh(grid, ("data", "fsdp"), axis_types=axis_types)


def batch_spec(mesh: Mesh) -> PartitionSpec:
  """The leading axis over all devices."""
  return PartitionSpec(mesh.axis_names)


def state_specs(state: PyTree, mesh: Mesh) -> PyTree:
  """How each array of a (abstract) state lies on the mesh: its longest axis that `fsdp` divides is
  split, a small one is whole.
  """
  size = mesh.shape["fsdp"]

  def spec(leaf):
    lengths = [n if n % size == 0 else 0 for n in leaf.shape]
    if size == 1 or leaf.size < SMALLEST_SHARDED or not any(lengths):
      return PartitionSpec()
    axis = int(np.argmax(lengths))
    return PartitionSpec(*[None] * axis, "fsdp")

  return jax.tree.map(spec, state)


def shardings(specs: PyTree, mesh: Mesh) -> PyTree:
  """The specs as shardings of the mesh."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def split_axis(spec: PartitionSpec) -> int | None:
  """The axis that is split over `fsdp`, None for an array that every device has whole."""
  return spec.index("fsdp") if "fsdp" in spec else None


def to_devices(batch: PyTree, sharding: NamedSharding) -> PyTree:
  """Global arrays from this host's part of each, their leading axis over the devices."""
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def to_host(tree: PyTree) -> PyTree:
  """Global arrays as numpy arrays, whole on every host."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


def replicated(tree: PyTree, mesh: Mesh) -> PyTree:
  """Arrays of the host, the same on each, as global arrays that every device has whole."""
  sharding = NamedSharding(mesh, PartitionSpec())

  def whole(x):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(whole(jax.random.key_data(x)))
    values = np.asarray(x)
    return jax.make_array_from_callback(values.shape, sharding, lambda i: values[i])

  return jax.tree.map(whole, tree)


def wait_for_all(name: str) -> None:
  """Returns when every host is here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def memory_limit() -> int:
  """Bytes that a program may use on a device, 0 where the device does not tell."""
  return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)


def programs_at_once() -> int:
  """Independent programs that each device of this process should run at a time.

  A small network keeps one core busy, whatever XLA splits within a program, so a CPU runs as many
  as there are cores to a device; an accelerator runs one after the other.
  """
  if jax.default_backend() != "cpu":
    return 1
  # macOS does not tell which cores a process may use
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return max(1, cores // jax.local_device_count())


def in_threads(function: Callable, items: Iterable, num_threads: int) -> Iterator:
  """function(item) of each, in order, `num_threads` at a time; where one raises, those that have
  not begun are dropped. jax's context managers of the caller do not reach into the threads.
  """
  with ThreadPoolExecutor(num_threads) as threads:
    yield from threads.map(function, items)


def gather(shards: PyTree, specs: PyTree) -> PyTree:
  """Inside of a mapped function: the whole arrays from this device's shards."""

  def whole(shard, spec):
    axis = split_axis(spec)
    if axis is None:
      return shard
    return checkpoint_name(jax.lax.all_gather(shard, "fsdp", axis=axis, tiled=True), "gathered")

  return jax.tree.map(whole, shards, specs)


def regather(function: Callable, mesh: Mesh) -> Callable:
  """The function of shards that gathers them again for its derivative instead of keeping the whole
  arrays meanwhile.
  """
  if mesh.shape["fsdp"] == 1:
    return function
  policy = jax.checkpoint_policies.save_anything_except_these_names("gathered")
  return jax.checkpoint(function, policy=policy)


def mean_over_devices(tree: PyTree, specs: PyTree, mesh: Mesh) -> PyTree:
  """Inside of a mapped function: the mean of the devices' values, where `gather`'s derivative has
  already summed the split ones over `fsdp`; all whole arrays in one reduction.
  """
  leaves, structure = jax.tree.flatten(tree)
  split = [split_axis(spec) is not None for spec in jax.tree.leaves(specs)]
  whole = [leaf for leaf, is_split in zip(leaves, split) if not is_split]
  parts = [leaf for leaf, is_split in zip(leaves, split) if is_split]
  whole = iter(jax.lax.pmean(whole, mesh.axis_names) if whole else [])
  parts = iter(jax.lax.psum(parts, "data") if parts else [])
  mean = [next(parts) / mesh.size if is_split else next(whole) for is_split in split]
  return jax.tree.unflatten(structure, mean)
