"""The handwritten digits that scikit-learn ships, the data of the examples and the tests."""

import contextlib
import io

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from data_sources.cache import data_dir, unwritable
from data_sources.spec import Spec, Split, stored_as_is

SPEC = Spec((8, 8, 1), levels=17, num_classes=10)


class Digits(tfds.core.GeneratorBasedBuilder):
  """The handwritten digits that scikit-learn ships: 1,797 images of 8x8 pixels, 17 grey levels, 10
  classes.

  Optical Recognition of Handwritten Digits, Alpaydin & Kaynak 1998, UCI repository (CC BY 4.0). The
  first 1,500 images are the training split, the last 297 the test split.
  """

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      "image": tfds.features.Tensor(shape=SPEC.shape, dtype=np.uint8),
      "label": tfds.features.ClassLabel(num_classes=SPEC.num_classes),
    }
    return tfds.core.DatasetInfo(
      builder=self, description=self.__doc__, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(0, 1500), "test": self._generate_examples(1500, 1797)}

  def _generate_examples(self, start, stop):
    from sklearn.datasets import load_digits  # only while preparing: the import takes a second

    digits = load_digits()
    for i in range(start, stop):
      yield (
        i,
        {"image": digits.images[i].astype(np.uint8)[..., None], "label": int(digits.target[i])},
      )


def declared(settings: ConfigDict, _: str) -> Spec:
  """Shape, levels and classes."""
  return stored_as_is(SPEC, settings)


def read(settings: ConfigDict, _: str) -> tuple[Spec, dict[str, Split]]:
  """The digits in memory, prepared in `data.dir` (array_record) the first time."""
  folder, spec = data_dir(settings), declared(settings, _)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    builder = Digits(data_dir=folder, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):
      tfds.disable_progress_bar()
      builder.download_and_prepare()
  except OSError as error:
    raise unwritable(folder, error) from error
  return spec, {split: _in_memory(builder.as_data_source(split)) for split in spec.splits}


def _in_memory(source) -> Split:
  """All examples of a tfds data source, stacked."""
  examples = source.__getitems__(list(range(len(source))))
  return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
