"""The results page: every number, picture and record of a run, in one well-formed file."""

import base64
import html
import json
import math
import re
from html.parser import HTMLParser

import pytest

import settings
from evaluation import page

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
NAMES = ("value", "standard_error", "low", "high", "p_value")
VOID = ("meta", "img")


def estimate(*numbers):
  return {**dict(zip(NAMES, (*numbers, *[None] * 5))), "what": "a < b"}


CONFIG = {
  "seed": 3,
  "data": {"name": "digits"},
  "sde": {"name": "vp", "args": {"beta_min": 0.1}},
  "model": {"name": "ddpm", "args": {"nf": 32}},
  "training": {"num_steps": 2500},
  "sampling": {"num_steps": 50},
  "likelihood": {"num_levels": 500},
}
SHARED = {"seconds": 4.31, "checkpoint_step": 2500, "seed": 7, "config": CONFIG}
LIKELIHOOD = {
  "bits_per_dim": 2.0948765,
  "standard_error": 0.0213637,
  "num_examples": 297,
  "kind": "exact",
  "split": "test",
  "dequantization": "uniform",
  "nfe_mean": 67.46,
  "baseline_bits_per_dim": 2.8472925,
  "baseline_standard_error": 0.0379993,
  "baseline": "Gaussian mixture",
  "gain_standard_error": 0.0345256,
  "versions": {"jax": "0.10.2"},
  **SHARED,
}
QUALITY = {
  "fid297_test_classifier": estimate(22.5775, 5.8471, 11.1174, 34.0377),
  "copied_297_test_classifier": estimate(0.0, 0.0, 0.0, 0.0128),
  "copying_z_297_test_classifier": estimate(math.nan, None, None, None, 0.25),
}
EVALUATE = {
  "split": "test",
  "num_examples": 297,
  "loss": 0.397288,
  "standard_error": 0.0012,
  "gaussian_predictor_loss": 0.4523118,
  "nfe": 40,
  "quality": QUALITY,
  "floor": {"fid250_test_classifier": estimate(21.4077, 5.8593)},
  "num_samples": 297,
  "reference": "test, 297 examples",
  **SHARED,
}
SAMPLE = {"sampler": "<b>unipc</b>", "num_samples": 100, "nfe": 20, **SHARED}
FORMER = LIKELIHOOD | {"bits_per_dim": 6.5567, "config": CONFIG | {"likelihood": {"num_levels": 9}}}
SWEEP = {"rows": [{"checkpoint": 1500, "sampler": "heun", "nfe": 20, "quality": QUALITY}]}
RECORDS = {
  "likelihood": LIKELIHOOD,
  "evaluate": EVALUATE,
  "sample": SAMPLE,
  "likelihood-step2500-fe3a7791d669": FORMER,
  "sweep": SWEEP,
}


class Reader(HTMLParser):
  """The text of a page; fails at a tag that is not closed in turn."""

  def __init__(self, text):
    super().__init__()
    self.open, self.texts, self.tags, self.images = [], [], [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    if tag == "img":
      self.images.append(dict(attributes)["src"])
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] not in ("style", "pre"):
      self.texts.append(data.replace("\u00a0", " "))


def made(workdir, records=RECORDS, pictures=()):
  (workdir / "results").mkdir(parents=True)
  settings.write_text(workdir / "config.json", json.dumps(CONFIG))
  settings.write_text(workdir / "data.json", json.dumps({"shape": [8, 8, 1], "levels": 17}))
  for name, record in records.items():
    settings.write_text(workdir / "results" / f"{name}.json", json.dumps(record))
  for name in pictures:
    (workdir / "results" / name).write_bytes(PNG + name.encode())
  return page.write(workdir)


@pytest.mark.parametrize(
  ("numbers", "text"),
  [
    ((2.0948765, 0.0213637), "2.095 ± 0.021"),
    ((131.8079, 57.4106), "132 ± 57"),
    ((12345.6, 678.9), "12350 ± 680"),
    ((-0.001, 0.57), "0.00 ± 0.57"),
    ((1.234e-5, 2.1e-7), "1.234e-05 ± 2.1e-07"),
    ((0.4523118, None), "0.4523"),
    ((2500, None), "2500"),
    ((0.0, 0.0), "0"),
    ((math.inf, 0.1), "inf"),
    ((math.nan, 0.1), ""),
    ((None, None), ""),
  ],
)
def test_numbers_have_two_digits_of_their_error(numbers, text):
  assert page._number(*numbers).replace("\u00a0", " ") == text


def test_the_figures_stand_beside_what_they_are_compared_with(tmp_path):
  path = made(tmp_path / "run")
  assert path == tmp_path / "run" / "results" / "index.html"
  rows = re.findall(r"<tr>(.*?)</tr>", path.read_text(), re.S)
  rows = [[html.unescape(c).replace("\u00a0", " ") for c in re.split(r"<.*?>", r)] for r in rows]
  row = lambda start: next([c for c in r if c] for r in rows if start in r)
  assert row("test bits/dim")[2:5] == [
    "2.095 ± 0.021",
    "2.847 ± 0.038",
    "Gaussian mixture; difference -0.752 ± 0.035",
  ]
  assert row("test bits/dim")[5:] == ["67.46", "4.31", "2500"]
  assert row("test denoising loss per dimension")[2:4] == ["0.3973 ± 0.0012", "0.4523"]
  assert row("fid") == ["fid", "a < b", "22.6 ± 5.8", "95 %: 11.1 to 34.0", "21.4 ± 5.9"]
  assert row("copied") == ["copied", "a < b", "0", "95 %: 0.0000 to 0.0128"]
  assert row("copying_z") == ["copying_z", "a < b", "p = 0.25"]
  assert row("train against test")[1::2] == ["297_test_classifier", "250_test_classifier"]
  assert row("process") == ["process", "vp", "beta_min 0.1"]
  assert row("heun")[:4] == ["1500", "heun", "20", "22.6 ± 5.8"]
  former = next([c for c in r if c] for r in rows if "6.557 ± 0.021" in r)
  assert former[-1] == "likelihood.num_levels 9 (500)"
  assert "sampling.num_steps 50 (200)" in path.read_text()  # of the defaults


def test_the_page_is_well_formed_and_needs_nothing_else(tmp_path):
  reader = Reader(made(tmp_path / "a<&b", pictures=("samples.png", "x&<y.png")).read_text())
  assert "a<&b" in reader.texts
  assert "x&<y.png" in reader.texts
  assert "<b>unipc</b>, ? a second" in reader.texts
  assert reader.tags.count("details") == len(RECORDS)
  assert not {"b", "script", "link", "iframe", "a"} & {*reader.tags}
  assert all(source.startswith("data:image/png;base64,") for source in reader.images)


def test_pictures_are_embedded_as_they_are_the_known_ones_first(tmp_path):
  names = ["a.png", "process.png", "samples.png", "sweep.png"]
  images = Reader(made(tmp_path / "run", pictures=names).read_text()).images
  values = [base64.b64decode(source.partition(",")[2], validate=True) for source in images]
  order = ["samples.png", "process.png", "sweep.png", "a.png"]
  assert values == [PNG + name.encode() for name in order]


@pytest.mark.parametrize("missing", RECORDS)
def test_a_record_that_is_missing_is_not_shown(tmp_path, missing):
  records = {name: record for name, record in RECORDS.items() if name != missing}
  text = made(tmp_path / "run", records).read_text()
  assert f"<summary>{missing}.json</summary>" not in text
  assert Reader(text).tags.count("details") == len(RECORDS) - 1
  titles = {
    "sweep": "Sweep",
    "evaluate": "Quality of",
    "likelihood-step2500-fe3a7791d669": "Former",
  }
  for name, title in titles.items():
    assert (f"<h2>{title}" in text) == (name != missing)


def test_an_empty_folder_and_files_of_others_make_a_page(tmp_path):
  Reader(page.write(tmp_path / "empty").read_text())
  workdir = tmp_path / "others"
  made(workdir, {"likelihood": {}, "list": [1, 2], "evaluate": {"loss": 0.5, "split": "test"}})
  (workdir / "results" / "torn.json").write_text('{"a": <')
  text = page.write(workdir).read_text()
  assert "torn.json" in text
  assert "test denoising loss per dimension" in Reader(text).texts


def test_the_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path = made(tmp_path / "run")
  before = path.read_bytes()
  assert before.isascii()

  def fail(*_):
    raise OSError

  monkeypatch.setattr(settings.os, "replace", fail)
  (path.parent / "sample.json").unlink()
  with pytest.raises(OSError):
    page.write(tmp_path / "run")
  assert path.read_bytes() == before
