"""What a user sees when an input is wrong: one message that says how to mend it."""

import contextlib
import errno
import importlib
import sys
from collections.abc import Callable, Iterator

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class ConfigError(ValueError):
  """A configuration or a workdir that cannot be used; `main` prints it without a traceback and
  exits with 1.
  """


class RunError(RuntimeError):
  """A run that cannot go on (a loss that is not finite, a failed solve); printed like
  `ConfigError`.
  """


class Stopped(Exception):
  """The run was asked to end and has saved its state: no error."""


def invalid(field: str, value, legal: str, mend: str = "") -> ConfigError:
  """The message of every rejected setting: field, value, what is legal, how to mend it."""
  return ConfigError(
    f"{field} = {value!r} is not usable.\n  legal: {legal}" + (f"\n  mend:  {mend}" if mend else "")
  )


def lookup(table: dict, name: str, field: str):
  """`table[name]`; an unknown name raises a `ConfigError` that lists the legal ones."""
  if name not in table:
    raise invalid(
      field, name, ", ".join(sorted(map(repr, table))), f"set {field} to one of these names"
    )
  return table[name]


def users_function(name: str, field: str) -> Callable:
  """The function that "module:function" names; one that cannot be imported is a `ConfigError`."""
  module, _, attribute = name.partition(":")
  try:
    return getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError, TypeError, ValueError) as error:
    legal = f"module:function of a module that can be imported ({error})"
    raise invalid(field, name, legal) from error


def check(condition: bool, field: str, value, legal: str, mend: str = "") -> None:
  """Raises the `ConfigError` of `invalid` unless `condition` holds."""
  if not condition:
    raise invalid(field, value, legal, mend)


@contextlib.contextmanager
def told() -> Iterator[None]:
  """Turns what a user can mend into one message and exit code 1, without a traceback."""
  try:
    yield
  except (ConfigError, RunError) as error:
    sys.exit(f"error: {error}")
  except OSError as error:
    if error.errno not in UNWRITABLE:
      raise
    sys.exit(f"error: {error}\n  mend:  make room or take another folder; what is written stays")
  except Stopped as stopped:
    print(f"{stopped}; the same command goes on from there", flush=True)
  except KeyboardInterrupt:
    sys.exit("\ninterrupted; the same command goes on from the last checkpoint")
