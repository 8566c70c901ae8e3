"""What a process runs at a time."""

import os
import threading

import jax
import pytest

import devices


@pytest.mark.parametrize("num_threads", [1, 3])
def test_in_threads_keeps_the_order_and_the_number(num_threads):
  """As many meet as there are threads, and no more."""
  meeting, running, most = threading.Barrier(num_threads), [], []

  def function(item):
    running.append(item)
    most.append(len(running))
    meeting.wait(timeout=30)
    running.remove(item)
    return -item

  assert list(devices.in_threads(function, range(6), num_threads)) == [0, -1, -2, -3, -4, -5]
  assert max(most) == num_threads


def test_in_threads_drops_what_has_not_begun_when_one_raises():
  begun, failed = [], threading.Event()

  def function(item):
    begun.append(item)
    if item == 1:
      failed.set()
      raise KeyboardInterrupt
    if item > 1:
      failed.wait(timeout=30)

  with pytest.raises(KeyboardInterrupt):
    list(devices.in_threads(function, range(10_000), 2))
  assert len(begun) < 10_000


def test_a_cpu_runs_a_program_on_every_core_and_an_accelerator_one(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12), raising=False)
  assert jax.local_device_count() == 4 and devices.programs_at_once() == 3
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
  assert devices.programs_at_once() == 1
  monkeypatch.delattr(os, "sched_getaffinity")
  monkeypatch.setattr(os, "cpu_count", lambda: 8)
  assert devices.programs_at_once() == 2
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert devices.programs_at_once() == 1
