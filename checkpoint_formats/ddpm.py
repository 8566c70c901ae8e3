"""The TensorFlow checkpoints of hojonathanho/diffusion: the names there of the parameters of our
ddpm. Blocks are numbered within their resolution level; arrays have our layout.
"""

from flax import linen as nn

from checkpoint_formats.layouts import Source
from checkpoint_formats.score_sde import trace

OUTSIDE = {
  "Dense_0": "temb/dense0",
  "Dense_1": "temb/dense1",
  "Conv_0": "conv_in",
  "GroupNorm_0": "norm_out",
  "Conv_1": "conv_out",
}
INSIDE = {
  "ResnetBlock": {
    "GroupNorm_0": "norm1",
    "Conv_0": "conv1",
    "Dense_0": "temb_proj",
    "GroupNorm_1": "norm2",
    "Conv_1": "conv2",
    "shortcut": "nin_shortcut",
  },
  "AttentionBlock": {
    "GroupNorm_0": "norm",
    "query": "q",
    "key": "k",
    "value": "v",
    "out": "proj_out",
  },
  "Downsample": {"Conv_0": "conv"},
  "Upsample": {"Conv_0": "conv"},
}


def tensorflow_names(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, Source]:
  """Sources among the variables of a TensorFlow checkpoint, for images [h, w, c]."""
  order, params = trace(model, shape)
  scopes, before = {}, ""
  for name in order:
    scopes[name] = before = _scope(model, name, before)
  sources = {}
  for path in params:
    module, *inner, leaf = path.split("/")
    if module in scopes:
      names = INSIDE.get(module.split("_")[0], {})
      norm = "GroupNorm" in path
      leaf = {"kernel": "W", "scale": "gamma", "bias": "beta" if norm else "b"}[leaf]
      scope = "/".join(["model", scopes[module], *[names[n] for n in inner], leaf])
      sources[path] = Source(scope)
  return sources


def _scope(model, name: str, before: str) -> str:
  """Of the module `name`, called after the one of scope `before`: attention follows its block."""
  kind, number = name.split("_")[0], int(name.rsplit("_", 1)[1])
  levels, blocks = len(model.ch_mult), model.num_res_blocks
  if kind == "AttentionBlock":
    return before.replace("block", "attn")
  if kind == "Downsample":
    return f"down_{number}/downsample"
  if kind == "Upsample":
    return f"up_{levels - 1 - number}/upsample"
  if kind != "ResnetBlock":
    return OUTSIDE[name]
  if number < levels * blocks:
    return f"down_{number // blocks}/block_{number % blocks}"
  number -= levels * blocks
  if number < 2:
    return f"mid/block_{number + 1}"
  level, block = divmod(number - 2, blocks + 1)
  return f"up_{levels - 1 - level}/block_{block}"
