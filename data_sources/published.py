"""Data sets published as folders of images: data.name is ffhq or afhqv2."""

from ml_collections import ConfigDict

from data_sources import folder
from data_sources.cache import data_dir
from data_sources.images import Framing
from data_sources.spec import Spec, Split, with_held_out
from errors import check

# name: what it holds, where it is published; its sub-folders are not taken for classes
PUBLISHED = {
  "ffhq": (Spec((1024, 1024, 3), splits=("train",)), "https://github.com/NVlabs/ffhq-dataset"),
  "afhqv2": (Spec((512, 512, 3)), "https://github.com/clovaai/stargan-v2"),
}


def declared(settings: ConfigDict, _: str) -> Spec:
  """What is known of the data set before it is here."""
  spec = PUBLISHED[settings.name][0]
  return spec._replace(
    shape=Framing.of(settings).shape(spec.shape, settings.name),
    splits=with_held_out(spec.splits, settings.held_out),
  )


def read(settings: ConfigDict, _: str) -> tuple[Spec, dict[str, Split]]:
  """The images below data.dir/manual/<name>, memory-mapped."""
  path, address = data_dir(settings) / "manual" / settings.name, PUBLISHED[settings.name][1]
  legal = f"a data set whose images lie in {path}"
  mend = f"put (or link) the images of {address} there, or --config.data.name=folder:<path>"
  check(path.is_dir(), "data.name", settings.name, legal, mend)
  return folder.read(settings, str(path), labelled=False)
