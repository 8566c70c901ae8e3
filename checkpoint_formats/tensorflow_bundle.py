"""TensorFlow checkpoints (PREFIX.index, PREFIX.data-?????-of-?????) read without TensorFlow.

The index is a sorted table in the format of LevelDB: blocks of keys with shared prefixes, found
through a block of blocks. Its values are protocol buffers that say where an array lies.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

MAGIC = 0xDB4775248B80FB57
FOOTER = 48  # two handles, padding, the magic number
DTYPES = {1: np.float32, 2: np.float64, 3: np.int32, 9: np.int64, 19: np.float16}


def _varint(data: bytes, at: int) -> tuple[int, int]:
  """The number at a position and the position after it."""
  value = shift = 0
  while True:
    byte = data[at]
    value |= (byte & 127) << shift
    at, shift = at + 1, shift + 7
    if byte < 128:
      return value, at


def _block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
  """The keys and values of a block."""
  if table[offset + size]:
    raise ValueError("the index is compressed")
  block, key, at = table[offset : offset + size], b"", 0
  (num_restarts,) = struct.unpack("<I", block[-4:])
  while at < size - 4 * (num_restarts + 1):
    shared, at = _varint(block, at)
    new, at = _varint(block, at)
    length, at = _varint(block, at)
    key = key[:shared] + block[at : at + new]
    yield key, block[at + new : at + new + length]
    at += new + length


def message(data: bytes) -> Iterator[tuple[int, int | bytes]]:
  """The numbered fields of a protocol buffer."""
  at = 0
  while at < len(data):
    tag, at = _varint(data, at)
    number, kind = tag >> 3, tag & 7
    if kind == 0:
      value, at = _varint(data, at)
    elif kind == 2:
      size, at = _varint(data, at)
      value, at = data[at : at + size], at + size
    else:
      size = {1: 8, 5: 4}[kind]
      value, at = data[at : at + size], at + size
    yield number, value


def _entry(prefix: str, num_shards: int, data: bytes) -> np.ndarray | None:
  """The array an entry describes, None for anything but numbers: dtype 1, shape 2, shard 3, offset
  4, size 5.
  """
  fields = dict(message(data))
  if fields.get(1) not in DTYPES:
    return None
  dims = [dict(message(dim)).get(1, 0) for _, dim in message(fields.get(2, b""))]
  shard = Path(f"{prefix}.data-{fields.get(3, 0):05d}-of-{num_shards:05d}")
  dtype = np.dtype(DTYPES[fields[1]]).newbyteorder("<")
  count = int(np.prod(dims, dtype=np.int64))
  if count * dtype.itemsize != fields.get(5, 0):
    raise ValueError(f"an entry of {fields.get(5, 0)} bytes has the shape {dims}")
  return np.fromfile(shard, dtype, count, offset=fields.get(4, 0)).reshape(dims)


def is_bundle(table: bytes) -> bool:
  """Whether the content is that of an index file."""
  return len(table) >= FOOTER and struct.unpack("<Q", table[-8:]) == (MAGIC,)


def read(prefix: str) -> dict[str, np.ndarray]:
  """{variable: array} of the checkpoint `prefix`; a ValueError where the index is damaged."""
  table = Path(f"{prefix}.index").read_bytes()
  footer, at = table[-FOOTER:], 0
  handles = []
  for _ in range(4):
    value, at = _varint(footer, at)
    handles.append(value)
  entries = {}
  for _, handle in _block(table, *handles[2:]):
    offset, after = _varint(handle, 0)
    entries |= _block(table, offset, _varint(handle, after)[0])
  num_shards = dict(message(entries.pop(b""))).get(1, 1)
  arrays = {k.decode(): _entry(prefix, num_shards, v) for k, v in entries.items()}
  return {name: array for name, array in arrays.items() if array is not None}
