"""Data sets of the published configurations: name, size, and the split held out.

What is known of each stands in `data_sources/`.
"""


def _part(name: str, image_size: int = 0, split: str = "test", **framing) -> dict:
  """The part that chooses a data set, resized unless `image_size` is 0; all of "train" is trained
  on.
  """
  held_out = {"split": split}
  data = {"name": name, "image_size": image_size, "held_out": 0.0, **framing}
  return {"data": data, "likelihood": held_out, "evaluation": held_out}


def lsun(category: str, image_size: int = 256) -> dict:
  """One category of LSUN."""
  kernel = "bicubic" if image_size == 256 else "bilinear"
  return _part(f"tfds:lsun/{category}", image_size, "validation", resize=kernel)


def celeba(image_size: int = 64) -> dict:
  """CelebA, cropped around the faces and resized."""
  return _part("tfds:celeb_a", image_size, "validation", crop=140)


def ffhq(image_size: int, resize: str = "bilinear") -> dict:
  """Flickr-Faces-HQ, which has no held-out split."""
  return _part("ffhq", image_size, "train", resize=resize)


MNIST = _part("tfds:mnist")
CIFAR10 = _part("tfds:cifar10")
CELEBA_HQ_256 = _part("tfds:celeb_a_hq/256", split="train")
CELEBA_HQ_1024 = _part("tfds:celeb_a_hq/1024", split="train")
AFHQV2_64 = _part("afhqv2", 64, resize="lanczos")
IMAGENET_64 = _part("tfds:imagenet2012", 64, "validation", resize="adm")
IMAGENET_64_UNLABELLED = _part("tfds:downsampled_imagenet/64x64", split="validation")

# the data in [0, 1], for networks that map them to [-1, 1]
UNCENTERED = {"data": {"centered": False}, "model": {"args": {"centered": False}}}
