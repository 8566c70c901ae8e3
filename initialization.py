"""Random draws of an initialisation, joined: XLA compiles one program for each shape that is drawn
instead of one for each array.
"""

import collections
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Array, PyTree


class _Row(NamedTuple):
  """A value that is one of a joined draw."""

  array: Array
  index: int


def joined(function: Callable[[], PyTree]) -> PyTree:
  """function(), for use inside jit: draws that are alike but for their keys are one draw, vmapped
  over the keys, of the same numbers.
  """
  program, shapes = jax.make_jaxpr(function, return_shape=True)()
  together = _groups(program)
  values = dict(zip(program.jaxpr.constvars, program.consts))

  def made(atom):
    if isinstance(atom, Literal):
      return jnp.asarray(atom.val, atom.aval.dtype)
    if atom not in values:
      make(together[atom])
    return values[atom]

  def value(atom):
    got = made(atom)
    return got.array[got.index] if isinstance(got, _Row) else got

  def column(atoms):
    parts = [made(atom) for atom in atoms]
    arrays = {id(part.array) if isinstance(part, _Row) else None for part in parts}
    if len(arrays) == 1 and None not in arrays:  # a gather: each slice would be a kernel of its own
      return parts[0].array[np.array([part.index for part in parts])]
    return jnp.stack([value(atom) for atom in atoms])

  def make(equations):
    inputs = [equation.invars for equation in equations]
    apply = functools.partial(_apply, equations[0])
    if len(equations) == 1:
      values.update(zip(equations[0].outvars, apply(*map(value, inputs[0]))))
      return
    columns = jax.vmap(apply)(*map(column, zip(*inputs)))
    for index, equation in enumerate(equations):
      rows = (_Row(array, index) for array in columns)
      values.update(zip(equation.outvars, rows))

  return jax.tree.unflatten(jax.tree.structure(shapes), map(value, program.jaxpr.outvars))


def _groups(program: ClosedJaxpr) -> dict:
  """Variable -> the equations to apply at once for it: the one that makes it, and if that is a
  draw all that are alike and depend on as many draws before them, so that none waits for another.
  """
  depths, alike, together = {}, collections.defaultdict(list), {}
  for equation in program.eqns:
    before = [depths.get(a, 0) for a in equation.invars if not isinstance(a, Literal)]
    depth, drawn = max(before, default=0), _is_draw(equation)
    shapes = (str(atom.aval) for atom in (*equation.invars, *equation.outvars))
    kind = depth, equation.primitive, id(equation.params.get("jaxpr")), *shapes
    equations = alike[kind] if drawn else []
    equations.append(equation)
    depths |= dict.fromkeys(equation.outvars, depth + drawn)
    together |= dict.fromkeys(equation.outvars, equations)
  return together


def _is_draw(equation) -> bool:
  """Whether it folds a number into a key, or is a jitted function of jax.random."""
  inner = equation.params.get("jaxpr")
  drawn = isinstance(inner, ClosedJaxpr) and any(map(_is_draw, inner.eqns))
  return drawn or equation.primitive.name in ("random_bits", "random_fold_in")


def _apply(equation, *inputs) -> list:
  primitive = equation.primitive
  outputs = primitive.bind(*inputs, **primitive.get_bind_params(equation.params))
  return outputs if primitive.multiple_results else [outputs]
