"""What a modification of scores does to a tile: to each element, or more.

A kernel has a part of the scores at a time, of one row and one head, its axes
perhaps exchanged. A function of scores can be had there if each element of its
result is made of the same element of the scores, and of what it is given.
"""

from collections.abc import Callable, Set

import jax
import jax.numpy as jnp
from jax.extend import core

from pallas_kernels.masks import Side, Tokens
from pallas_kernels.problem import Operands
from pallas_kernels.scores import MOST_COMPARED, Table

# fmt: off
NAMES = {
  'abs', 'acos', 'acosh', 'add', 'add_any', 'and', 'asin', 'asinh', 'atan',
  'atan2', 'atanh', 'cbrt', 'ceil', 'clamp', 'convert_element_type', 'copy',
  'copy_p', 'cos', 'cosh', 'digamma', 'div', 'eq', 'erf', 'erf_inv', 'erfc',
  'exp', 'exp2', 'expm1', 'floor', 'ge', 'gt', 'integer_pow', 'is_finite', 'le',
  'lgamma', 'log', 'log1p', 'logistic', 'lt', 'max', 'min', 'mul', 'ne', 'neg',
  'nextafter', 'not', 'one_minus_square', 'optimization_barrier', 'or',
  'polynomial', 'pow', 'pvary', 'rem', 'reshard', 'round', 'rsqrt', 'select_n',
  'shift_left', 'shift_right_arithmetic', 'shift_right_logical', 'sign', 'sin',
  'sinh', 'sqrt', 'square', 'stop_gradient', 'sub', 'tan', 'tanh', 'xor',
}
# These may be done to operands of heads, and to a tile if it stays what it is.
MOVES = {
  'broadcast_in_dim', 'concatenate', 'reshape', 'slice', 'squeeze', 'transpose',
}
# fmt: on


def inner(equation) -> core.Jaxpr | core.ClosedJaxpr | None:
  """Of an equation that calls a function, that function."""
  return next(
    (
      equation.params[name]
      for name in ('jaxpr', 'call_jaxpr', 'fun_jaxpr')
      if name in equation.params
    ),
    None,
  )


def refuses(
  fn: Callable,
  own: Operands,
  query: Tokens,
  key: Tokens,
  lacks: Set[str] = frozenset(),
) -> str | None:
  """Why a kernel cannot do this to its scores, or None.

  Args:
    fn, own: what is done, as in `Score`, and what it reads.
    query, key: whose tags it reads.
    lacks: of NAMES, those that its compiler does not know.
  """
  name = getattr(fn, '__name__', type(fn).__name__)
  entries = own.heads[0].shape[1] if isinstance(fn, Table) else 0
  if entries > MOST_COMPARED:
    return (
      f'{name} has a table of {entries} entries, and kernels look through at'
      f' most {MOST_COMPARED}'
    )
  shape = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  side = lambda tokens, *at: jax.tree.map(
    lambda _: shape(jnp.int32, *at), tokens.side
  )
  tile = (
    shape(jnp.float32, 1, 1, 8, 16),
    side(query, 1, 1, 1, 16),
    side(key, 1, 1, 8, 1),
    tuple(shape(x.dtype, 1, 1, 1, 16) for x in own.queries),
    tuple(shape(x.dtype, 1, 1, 8, 1) for x in own.keys),
  )
  heads = tuple(shape(x.dtype, 1, *x.shape[1:]) for x in own.heads)
  whole = lambda heads, x, query, key, queries, keys: fn(
    x, query, key, *heads, *queries, *keys
  )
  traced = jax.make_jaxpr(whole)(heads, *tile)
  if traced.consts:
    return (
      f'{name} holds an array: let it be an operand, which leads with heads'
    )
  of_tile = [False] * len(heads) + [True] * len(jax.tree.leaves(tile))
  if why := _uses(name, traced.jaxpr, of_tile, lacks):
    return why

  def gradient(*inputs):  # which a kernel makes of its elements, too
    leaves, tree = jax.tree.flatten(inputs)
    inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]

    def call(*values):
      values = iter(values)
      own = [next(values) if is_ else x for x, is_ in zip(leaves, inexact)]
      return whole(*tree.unflatten(own))

    y, back = jax.vjp(call, *(x for x, is_ in zip(leaves, inexact) if is_))
    return back(y)

  back = jax.make_jaxpr(gradient)(heads, *tile).jaxpr
  used = set()
  _walk(back, [True] * len(back.invars), set(), used)
  return _unknown(f'the derivative of {name}', used, lacks)


def holds(
  mask: Callable, query: Side, key: Side, lacks: Set[str] = frozenset()
) -> str | None:
  """Why a kernel cannot have such a mask, or None."""
  like = lambda side, *shape: jax.tree.map(
    lambda _: jax.ShapeDtypeStruct(shape, jnp.int32), side
  )
  traced = jax.make_jaxpr(mask)(like(query, 1, 16), like(key, 8, 1))
  name = type(mask).__name__
  if traced.consts:
    return f'{name} holds an array: let a tag of the tokens hold it'
  return _uses(name, traced.jaxpr, [True] * len(traced.jaxpr.invars), lacks)


def _uses(name, jaxpr, of_tile, lacks) -> str | None:
  """Why a kernel cannot compute this, or None."""
  moved, used = set(), set()
  _walk(jaxpr, of_tile, moved, used)
  if moved:
    return f'{name} is not elementwise: it uses {", ".join(sorted(moved))}'
  return _unknown(name, used, lacks)


def _unknown(name, used, lacks) -> str | None:
  if unknown := ', '.join(sorted(used & lacks)):
    return f'{name} uses {unknown}, which its compiler lacks'
  return None


def _walk(jaxpr, of_tile, moved, used) -> list[bool]:
  """Adds what moves elements of a tile, or is used; says what is of a tile."""
  known = dict(zip(jaxpr.invars, of_tile))
  read = lambda x: not isinstance(x, core.Literal) and known.get(x, False)
  rest = lambda x: [size for size in x.aval.shape if size > 1]
  for equation in jaxpr.eqns:
    which, name = list(map(read, equation.invars)), equation.primitive.name
    function = None if name == 'scan' else inner(equation)
    if function is not None:
      function = getattr(function, 'jaxpr', function)
      found = _walk(function, which, moved, used)
    else:
      found = [any(which)] * len(equation.outvars)
      used.add(name)
      if equation.params.get('accuracy') is not None:
        used.add('accuracy')
      if name in MOVES:
        stays = name == 'broadcast_in_dim' or all(
          rest(x) == rest(y)
          for x, its in zip(equation.invars, which)
          for y in equation.outvars
          if its
        )
        if not stays:
          moved.add(name)
      elif name not in NAMES:
        moved.add(name)
    known |= dict(zip(equation.outvars, found))
  return list(map(read, jaxpr.outvars))
