"""Random draws of an initialisation, joined: XLA compiles one program for each shape that is drawn
instead of one for each array.
"""

import collections
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import PyTree


def joined(function: Callable[[], PyTree]) -> PyTree:
  """function(), for use inside jit: draws that are alike but for their keys are one draw, vmapped
  over the keys, of the same numbers.
  """
  program, shapes = jax.make_jaxpr(function, return_shape=True)()
  together = _groups(program)
  values = dict(zip(program.jaxpr.constvars, program.consts))

  def value(atom):
    if isinstance(atom, Literal):
      return jnp.asarray(atom.val, atom.aval.dtype)
    if atom not in values:
      make(together[atom])
    return values[atom]

  def make(equations):
    inputs = [[value(atom) for atom in equation.invars] for equation in equations]
    apply = lambda *row: _apply(equations[0], *row)
    if len(equations) == 1:
      rows = [apply(*inputs[0])]
    else:
      columns = jax.vmap(apply)(*map(jnp.stack, zip(*inputs)))
      rows = [[column[i] for column in columns] for i in range(len(equations))]
    for equation, row in zip(equations, rows):
      values.update(zip(equation.outvars, row))

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
