"""The FID network against PyTorch with the same random weights, through the files that are
published; its resizing against the formulas; what a user without the weights is told.
"""

import urllib.error

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from errors import ConfigError, RunError
from evaluation import inception, inception_weights


def torch_network():
  """The FID network in PyTorch, its state named as in the published file."""
  torch = pytest.importorskip("torch", reason="the reference; needs requirements-torch.txt")
  nn, f = torch.nn, torch.nn.functional

  class ConvNorm(nn.Module):
    def __init__(self, c, n, window=1, stride=1, padding=0):
      super().__init__()
      self.conv = nn.Conv2d(c, n, window, stride, padding, bias=False)
      self.bn = nn.BatchNorm2d(n, eps=1e-3, momentum=1.0)

    def forward(self, x):
      return f.relu(self.bn(self.conv(x)))

  def inside(x):
    return f.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

  class Block(nn.Module):
    def chain(self, x, *names):
      for name in names:
        x = getattr(self, name)(x)
      return x

    def add(self, **layers):
      for name, arguments in layers.items():
        setattr(self, name, ConvNorm(*arguments))

  class A(Block):
    def __init__(self, c, pooled):
      super().__init__()
      self.add(branch1x1=(c, 64), branch5x5_1=(c, 48), branch5x5_2=(48, 64, 5, 1, 2))
      self.add(branch3x3dbl_1=(c, 64), branch3x3dbl_2=(64, 96, 3, 1, 1))
      self.add(branch3x3dbl_3=(96, 96, 3, 1, 1), branch_pool=(c, pooled))

    def forward(self, x):
      double = self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
      five = self.chain(x, "branch5x5_1", "branch5x5_2")
      return torch.cat([self.branch1x1(x), five, double, self.branch_pool(inside(x))], 1)

  class B(Block):
    def __init__(self, c):
      super().__init__()
      self.add(branch3x3=(c, 384, 3, 2), branch3x3dbl_1=(c, 64))
      self.add(branch3x3dbl_2=(64, 96, 3, 1, 1), branch3x3dbl_3=(96, 96, 3, 2))

    def forward(self, x):
      double = self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
      return torch.cat([self.branch3x3(x), double, f.max_pool2d(x, 3, 2)], 1)

  class C(Block):
    def __init__(self, c, k):
      super().__init__()
      row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
      self.add(branch1x1=(c, 192), branch7x7_1=(c, k), branch7x7_2=(k, k, *row))
      self.add(branch7x7_3=(k, 192, *column), branch7x7dbl_1=(c, k))
      self.add(branch7x7dbl_2=(k, k, *column), branch7x7dbl_3=(k, k, *row))
      self.add(branch7x7dbl_4=(k, k, *column), branch7x7dbl_5=(k, 192, *row))
      self.add(branch_pool=(c, 192))

    def forward(self, x):
      seven = self.chain(x, *[f"branch7x7_{i}" for i in (1, 2, 3)])
      double = self.chain(x, *[f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)])
      return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(inside(x))], 1)

  class D(Block):
    def __init__(self, c):
      super().__init__()
      self.add(branch3x3_1=(c, 192), branch3x3_2=(192, 320, 3, 2), branch7x7x3_1=(c, 192))
      self.add(branch7x7x3_2=(192, 192, (1, 7), 1, (0, 3)))
      self.add(branch7x7x3_3=(192, 192, (7, 1), 1, (3, 0)), branch7x7x3_4=(192, 192, 3, 2))

    def forward(self, x):
      three = self.chain(x, "branch3x3_1", "branch3x3_2")
      seven = self.chain(x, *[f"branch7x7x3_{i}" for i in (1, 2, 3, 4)])
      return torch.cat([three, seven, f.max_pool2d(x, 3, 2)], 1)

  class E(Block):
    def __init__(self, c, pool):
      super().__init__()
      row, column, self.pool = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0)), pool
      self.add(branch1x1=(c, 320), branch3x3_1=(c, 384), branch3x3_2a=(384, 384, *row))
      self.add(branch3x3_2b=(384, 384, *column), branch3x3dbl_1=(c, 448))
      self.add(branch3x3dbl_2=(448, 384, 3, 1, 1), branch3x3dbl_3a=(384, 384, *row))
      self.add(branch3x3dbl_3b=(384, 384, *column), branch_pool=(c, 192))

    def forward(self, x):
      three, double = self.branch3x3_1(x), self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2")
      parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
      parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
      return torch.cat([*parts, self.branch_pool(self.pool(x))], 1)

  class Network(Block):
    def __init__(self):
      super().__init__()
      self.add(Conv2d_1a_3x3=(3, 32, 3, 2), Conv2d_2a_3x3=(32, 32, 3))
      self.add(Conv2d_2b_3x3=(32, 64, 3, 1, 1), Conv2d_3b_1x1=(64, 80), Conv2d_4a_3x3=(80, 192, 3))
      self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
      self.Mixed_6a, self.Mixed_6b, self.Mixed_6c = B(288), C(768, 128), C(768, 160)
      self.Mixed_6d, self.Mixed_6e, self.Mixed_7a = C(768, 160), C(768, 192), D(768)
      self.Mixed_7b = E(1280, inside)
      self.Mixed_7c = E(2048, lambda x: f.max_pool2d(x, 3, 1, 1))
      self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
      x = self.chain(x, "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3")
      x = self.chain(f.max_pool2d(x, 3, 2), "Conv2d_3b_1x1", "Conv2d_4a_3x3")
      x = self.chain(f.max_pool2d(x, 3, 2), *[f"Mixed_{n}" for n in "5b 5c 5d 6a 6b 6c".split()])
      x = self.chain(x, *[f"Mixed_{n}" for n in "6d 6e 7a 7b 7c".split()]).mean((2, 3))
      return x, x @ self.fc.weight.T

  return torch, Network()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """(folder with a state file of random weights, images [2, 3, 299, 299], PyTorch's outputs)."""
  torch, network = torch_network()
  torch.manual_seed(0)
  x = torch.nn.functional.interpolate(torch.randn(2, 3, 40, 40), size=(299, 299), mode="bilinear")
  with torch.no_grad():
    for name, p in network.named_parameters():
      if ".bn." in name:
        p.uniform_(0.5, 1.5) if name.endswith("weight") else p.uniform_(0, 1)
      else:
        torch.nn.init.kaiming_normal_(p) if p.ndim > 1 else p.normal_()
    network.train()(x)  # sets the statistics of every norm to those of its input
    outputs = network.eval()(x)
  folder = tmp_path_factory.mktemp("inception")
  torch.save(network.state_dict(), folder / inception_weights.PUBLISHED)
  return folder, x.numpy(), [np.asarray(out) for out in outputs]


@pytest.fixture
def trusted(monkeypatch, published):
  """Makes the hash of the random file the published one."""
  folder, *_ = published
  path = folder / inception_weights.PUBLISHED
  digest = inception_weights.hashlib.sha256(path.read_bytes()).hexdigest()
  monkeypatch.setattr(inception_weights, "SHA256", digest)


def test_equals_pytorch(published, trusted):
  folder, x, (features, logits) = published
  assert (features > 0).mean() > 0.9 and features.std(0).mean() > 1e-2  # the comparison sees much
  with jax.default_matmul_precision("highest"):
    ours = jax.jit(inception.Inception().apply)(
      inception_weights.load(folder).params, jnp.asarray(x.transpose(0, 2, 3, 1))
    )
  for value, reference in zip(ours, (features, logits)):
    assert np.abs(value - reference).max() < 1e-4 * np.abs(reference).max()  # 2e-5 as a rule


def test_the_cache_is_what_was_converted(published, trusted):
  folder, *_ = published
  first = inception_weights.load(folder)
  path = folder / inception_weights.PUBLISHED
  path.rename(folder / "away")
  again = inception_weights.load(folder)
  (folder / "away").rename(path)
  assert first.digest == again.digest
  jax.tree.map(np.testing.assert_array_equal, first.params, again.params)


def field(number, content):
  """One field of a protocol buffer."""
  if isinstance(content, int):
    return varint(number << 3) + varint(content)
  return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value):
  out = b""
  while value > 127:
    out, value = out + bytes([value & 127 | 128]), value >> 7
  return out + bytes([value])


def constant(name, array):
  """A node "Const" of a GraphDef; its content in one of the two ways that TensorFlow has."""
  shape = b"".join(field(2, field(1, n)) for n in array.shape)
  values = array.astype("<f4").tobytes()
  tensor = field(1, 1) + field(2, shape) + field(4 if array.ndim > 1 else 5, values)
  dtype = field(1, b"dtype") + field(2, field(6, 1))
  value = field(1, b"value") + field(2, field(8, tensor))
  node = field(1, name.encode()) + field(2, b"Const") + field(5, dtype) + field(5, value)
  return field(1, node)


def graph(state):
  """TensorFlow's frozen graph of a PyTorch state."""
  other = field(1, field(1, b"DecodeJpeg/contents") + field(2, b"Const")) + field(4, b"\x08\x15")
  nodes = [other, constant("softmax/weights", state["fc.weight"].T)]
  of_norm = {"gamma": "weight", "beta": "bias"}
  of_norm |= {"moving_mean": "running_mean", "moving_variance": "running_var"}
  for ours, theirs in inception_weights.names().items():
    kernel = state[f"{ours}.conv.weight"].transpose(2, 3, 1, 0)
    nodes.append(constant(f"{theirs}/conv2d_params", kernel))
    for key, name in of_norm.items():
      nodes.append(constant(f"{theirs}/batchnorm/{key}", state[f"{ours}.bn.{name}"]))
  return b"".join(nodes)


def test_tensorflows_graph_is_the_same_network(published, trusted, tmp_path):
  folder, *_ = published
  _, state = inception_weights.checkpoint_import.read(folder / inception_weights.PUBLISHED, "plain")
  (tmp_path / inception_weights.GRAPH).write_bytes(graph(state))
  assert inception_weights.load(tmp_path).digest == inception_weights.load(folder).digest


def test_names_in_the_graph():
  # facts of the published graph, one of every kind
  known = {
    "Conv2d_1a_3x3": "conv",
    "Conv2d_4a_3x3": "conv_4",
    "Mixed_5b.branch5x5_1": "mixed/tower/conv",
    "Mixed_5c.branch_pool": "mixed_1/tower_2/conv",
    "Mixed_6a.branch3x3": "mixed_3/conv",
    "Mixed_6a.branch3x3dbl_3": "mixed_3/tower/conv_2",
    "Mixed_6b.branch7x7dbl_5": "mixed_4/tower_1/conv_4",
    "Mixed_7a.branch3x3_2": "mixed_8/tower/conv_1",
    "Mixed_7a.branch7x7x3_1": "mixed_8/tower_1/conv",
    "Mixed_7b.branch3x3_2b": "mixed_9/tower/mixed/conv_1",
    "Mixed_7c.branch3x3dbl_3a": "mixed_10/tower_1/mixed/conv",
    "Mixed_7c.branch_pool": "mixed_10/tower_2/conv",
  }
  names = inception_weights.names()
  assert {name: names[name] for name in known} == known and len(names) == 94


@pytest.mark.parametrize("content", [b"", b"\x0a\x7fabc", b"no graph at all"])
def test_a_broken_graph_is_told(tmp_path, content):
  (tmp_path / inception_weights.GRAPH).write_bytes(content)
  with pytest.raises((ConfigError, RunError), match=inception_weights.GRAPH):
    inception_weights.load(tmp_path)
  assert not (tmp_path / inception_weights.CACHED).exists()


def test_other_weights_are_refused(tmp_path):
  (tmp_path / inception_weights.PUBLISHED).write_bytes(b"PK\x03\x04 something else")
  with pytest.raises(ConfigError, match=f"(?s)sha256.*{inception_weights.SHA256}.*remove"):
    inception_weights.load(tmp_path)


def test_without_weights_the_error_says_what_to_do(tmp_path, monkeypatch):
  def offline(url, timeout):
    raise urllib.error.URLError("no network")

  monkeypatch.setattr(inception_weights.urllib.request, "urlopen", offline)
  with pytest.raises(ConfigError) as caught:
    inception_weights.load(tmp_path / "new")
  told = ["6726825d0af5f729", "github.com/mseitzer", str(tmp_path / "new"), "no network"]
  told += ["classifier", "random_conv", "pixels", inception_weights.GRAPH]
  assert all(part in str(caught.value) for part in told)
  assert "6726825d" in inception_weights.PUBLISHED


def test_a_download_is_checked_and_converted(published, trusted, tmp_path, monkeypatch):
  folder, *_ = published
  address = (folder / inception_weights.PUBLISHED).as_uri()
  monkeypatch.setattr(inception_weights, "URL", address)
  assert inception_weights.load(tmp_path).digest == inception_weights.load(folder).digest


@pytest.mark.parametrize("shape", [(8, 5, 1), (32, 32, 3), (299, 299, 1), (640, 300, 1), (1, 1, 1)])
def test_published_resizing_is_tensorflows_formula(shape):
  x = np.random.default_rng(0).integers(0, 256, (1, *shape)).astype(np.uint8)
  found = np.asarray(inception.resize_published(jnp.asarray(x)))
  h, w, _ = shape
  rows, columns = [0, 1, 37, 150, 296, 297, 298], [0, 3, 149, 298]
  for i in rows:
    for j in columns:
      y, z = i * h / 299, j * w / 299
      a, b = min(int(y), h - 1), min(int(z), w - 1)
      c, d = min(a + 1, h - 1), min(b + 1, w - 1)
      near = x[0][[a, a, c, c], [b, d, b, d]].astype(np.float64)
      top = near[0] + (near[1] - near[0]) * (z - b)
      bottom = near[2] + (near[3] - near[2]) * (z - b)
      np.testing.assert_allclose(found[0, i, j], top + (bottom - top) * (y - a), atol=2e-2)
  assert found.shape == (1, 299, 299, shape[2])


def test_published_resizing_has_no_half_pixels_and_no_filter():
  x = np.random.default_rng(1).uniform(0, 255, (1, 598, 598, 3)).astype(np.float32)
  np.testing.assert_array_equal(inception.resize_published(jnp.asarray(x)), x[:, ::2, ::2])
  same = x[:, :299, :299]  # half-pixel centres would take the means of 2x2 pixels above
  np.testing.assert_array_equal(inception.resize_published(jnp.asarray(same)), same)


@pytest.mark.parametrize("shape", [(8, 5, 1), (32, 32, 3), (640, 400, 3)])
def test_clean_resizing_is_pillows(shape):
  x = np.random.default_rng(2).integers(0, 256, shape).astype(np.uint8)
  found = np.asarray(inception.resize_clean(jnp.asarray(x)[None]))[0]
  for channel in range(shape[2]):
    image = Image.fromarray(x[..., channel].astype(np.float32))
    expected = np.asarray(image.resize((299, 299), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(found[..., channel], expected, atol=2e-2)


def test_scaling_is_that_of_the_graph():
  np.testing.assert_array_equal(inception.scaled(np.float32([0, 128, 255])), [-1, 0, 127 / 128])
