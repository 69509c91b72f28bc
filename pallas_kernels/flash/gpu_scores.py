"""What happens to scores, as operations on the tiles of a GPU.

A modification of scores is a function of arrays `b h t s`. A kernel for a GPU
has tiles of two axes instead, spread over registers in a layout in which a
reshape means nothing. So the function is traced for one query and one key, and
each of its equations is done for all pairs of a tile at once: where it was
traced with one number there is a tile, and where with a table, as many numbers.
What but moves elements, as a slice of a table does, moves them while tracing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from pallas_kernels import elementwise
from pallas_kernels.masks import Side
from pallas_kernels.problem import Extras, Operands

# What the compiler of kernels can do to a tile.
# fmt: off
ELEMENTWISE = {
  'abs', 'add', 'and', 'atan2', 'clamp', 'convert_element_type', 'cos', 'div',
  'eq', 'erf', 'exp', 'exp2', 'ge', 'gt', 'integer_pow', 'le', 'log', 'lt',
  'max', 'min', 'mul', 'ne', 'neg', 'not', 'or', 'rem', 'round', 'rsqrt',
  'select_n', 'shift_left', 'shift_right_arithmetic', 'shift_right_logical',
  'sign', 'sin', 'square', 'sub', 'tanh', 'xor',
}
# fmt: on
# What it can do by way of others.
ADDED = {
  'add_any': lax.add,
  'logistic': lambda x, **_: 1 / (1 + lax.exp(-x)),
  'one_minus_square': lambda x, **_: (1 - x) * (1 + x),  # jax 0.12
}
# It has these in a fast form as well, which is too coarse for scores: with it
# a soft cap of 50 would be off by 0.02.
COARSE = {'tanh', 'sin', 'cos', 'log'}
NUMBER = (1, 1, 1, 1)


def _broadcast(x, shape, broadcast_dimensions, **_):
  kept = [1] * len(shape)
  for axis, size in zip(broadcast_dimensions, x.shape):
    kept[axis] = size
  return np.broadcast_to(x.reshape(kept), shape)


def _as_is(x, **_):
  return x


def _cut(x, start_indices, limit_indices, strides, **_):
  strides = strides or [1] * x.ndim
  return x[tuple(map(slice, start_indices, limit_indices, strides))]


# Equations that only move elements, as NumPy has them.
MOVES: dict[str, Callable[..., np.ndarray]] = {
  'broadcast_in_dim': _broadcast,
  'concatenate': lambda *xs, dimension, **_: np.concatenate(xs, dimension),
  'copy': _as_is,
  'pvary': _as_is,
  'reshard': _as_is,
  'reshape': lambda x, new_sizes, **_: x.reshape(new_sizes),
  'slice': _cut,
  'squeeze': lambda x, dimensions, **_: np.squeeze(x, tuple(dimensions)),
  'transpose': lambda x, permutation, **_: x.transpose(permutation),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Modification:
  """A function of a score and of what bears on it, with its derivative.

  Attributes:
    traced: (x, query, key, extras) of one pair -> y and dy/dx.
  """

  traced: core.ClosedJaxpr

  @classmethod
  def of(cls, fn, extras: Extras, query: Side, key: Side) -> 'Modification':
    """fn is as `Rule.scored`; only shapes of extras and names matter."""

    def both(x, query, key, extras):
      y, back = jax.vjp(lambda x: fn(x, query, key, extras), x)
      return y, back(jnp.ones_like(y))[0]

    shape = lambda dtype, *at: jax.ShapeDtypeStruct(at or NUMBER, dtype)
    number = lambda x: shape(x.dtype)
    own = lambda one: Operands(
      tuple(shape(x.dtype, 1, *x.shape[1:]) for x in one.heads),
      tuple(map(number, one.queries)),
      tuple(map(number, one.keys)),
    )
    side = lambda like: jax.tree.map(lambda _: shape(jnp.int32), like)
    like = Extras(
      tuple(map(own, extras.scores)),
      tuple(map(own, extras.weights)),
      None if extras.bias is None else number(extras.bias),
    )
    return cls(
      jax.make_jaxpr(both)(*(shape(jnp.float32), side(query), side(key), like))
    )

  @property
  def lacks(self) -> list[str]:
    """Operations that a kernel does not have."""
    return sorted(self.operations - ELEMENTWISE - ADDED.keys() - MOVES.keys())

  @property
  def operations(self) -> set[str]:
    found = set()

    def walk(jaxpr):
      for equation in jaxpr.eqns:
        inner = elementwise.inner(equation)
        if inner is None:
          found.add(equation.primitive.name)
        else:
          walk(getattr(inner, 'jaxpr', inner))

    walk(self.traced.jaxpr)
    return found

  def __call__(self, x, query: Side, key: Side, extras: Extras):
    """y and dy/dx of a tile; the latter is None where it is 1.

    Leaves of sides and extras are tiles of the shape of x, and operands of
    heads object arrays '1 ...' of numbers.
    """
    given = map(_boxed, jax.tree.leaves((x, query, key, extras)))
    closed = self.traced
    y, slope = (
      out.item() for out in _run(closed.jaxpr, closed.consts, list(given))
    )
    constant = isinstance(slope, np.generic) and slope == 1
    return _spread(y, x.shape), None if constant else _spread(slope, x.shape)


def _boxed(x) -> np.ndarray:
  """One thing as an array of traced shape; arrays of things as they are."""
  if isinstance(x, np.ndarray) and x.dtype == object:
    return x
  box = np.empty(NUMBER, object)
  box[0, 0, 0, 0] = x
  return box


def _constant(x) -> np.ndarray:
  """A constant, of which each element is a NumPy scalar."""
  x = np.asarray(x)
  box = np.empty(x.shape, object)
  for at in np.ndindex(x.shape):
    box[at] = x[at]
  return box


def _spread(x, shape):
  return x if np.shape(x) == shape else lax.broadcast_in_dim(x, shape, ())


def _elementwise(equation, values):
  """Of each element, be it a number or a tile."""
  name = equation.primitive.name
  do = ADDED.get(name, equation.primitive.bind)

  def one(*elements):
    shape = max(map(np.shape, elements), key=len)
    return do(*(_spread(x, shape) for x in elements), **equation.params)

  values = np.broadcast_arrays(*values)
  found = np.empty(values[0].shape, object)
  for at in np.ndindex(found.shape):
    found[at] = one(*(x[at] for x in values))
  return found


def _run(jaxpr: core.Jaxpr, consts, given: list[np.ndarray]):
  """The results of what was traced, for other elements."""
  known: dict[Any, np.ndarray] = dict(zip(jaxpr.invars, given))
  known |= {
    variable: _constant(x) for variable, x in zip(jaxpr.constvars, consts)
  }
  read = lambda x: _constant(x.val) if isinstance(x, core.Literal) else known[x]
  for equation in jaxpr.eqns:
    values = list(map(read, equation.invars))
    inner, name = elementwise.inner(equation), equation.primitive.name
    if inner is not None:
      closed = isinstance(inner, core.ClosedJaxpr)
      found = _run(
        *(inner.jaxpr, inner.consts) if closed else (inner, ()), values
      )
    elif name in MOVES:
      found = [MOVES[name](*values, **equation.params)]
    else:
      found = [_elementwise(equation, values)]
    known |= dict(zip(equation.outvars, found))
  return list(map(read, jaxpr.outvars))
