"""Rows and heads one after the other, where they share a bias.

A kernel writes the gradient of a bias tile by tile, each tile once: it cannot
add to what another row or head has written. For all of them at once it would be
an array `b h t s`, whatever the bias is. One after the other they leave one.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.problem import Extras, Operands, floats


def gradients(run, q, k, v, extras, query, key, *known):
  """run(q, k, v, extras, query, key, *known), in parts that add up.

  Args:
    run: from these to the gradients of q, k, v and extras, in float32.
    q, k, v, extras, query, key: as engines take them.
    *known: 'b t h ...', what is known of queries.
  """
  bias, b, heads = extras.bias, len(q), k.shape[2]
  if bias is None or bias.shape[:2] == (b, q.shape[2]):
    return run(q, k, v, extras, query, key, *known)
  rows = b if bias.shape[0] == 1 else 1
  groups = heads if bias.shape[1] == 1 else 1
  wide = lambda x: jnp.zeros_like(x, jnp.float32)

  def part(number, totals):
    at = number // groups, number % groups
    some = lambda row, head: lambda x: _part(x, row, head, at, (rows, groups))
    taken = map(some(0, 2), (q, k, v))
    tokens = (jax.tree.map(some(0, None), x) for x in (query, key))
    rest = map(some(0, 2), known)
    more = run(*taken, _of_kind(some, extras), *tokens, *rest)
    add = lambda row, head: lambda total, x: _add(total, x, row, head, at)
    sums = (add(0, 2)(total, x) for total, x in zip(totals[:3], more[:3]))
    return *sums, _of_kind(add, totals[3], more[3])

  nothing = *map(wide, (q, k, v)), jax.tree.map(wide, floats(extras))
  return lax.fori_loop(0, rows * groups, part, nothing)


def _of_kind(of, *extras: Extras) -> Extras:
  """of(axis of rows, axis of heads) applied to each array of extras."""

  def own(*operands):
    each = lambda axes, *groups: jax.tree.map(of(*axes), *groups)
    return Operands(
      each((None, 0), *(x.heads for x in operands)),
      each((0, 2), *(x.queries for x in operands)),
      each((0, 2), *(x.keys for x in operands)),
    )

  return Extras(
    tuple(map(own, *(x.scores for x in extras))),
    tuple(map(own, *(x.weights for x in extras))),
    of(0, 1)(*(x.bias for x in extras)),
  )


def _part(x, row, head, at, parts):
  """Of what all share, all."""
  for axis, i, n in zip((row, head), at, parts):
    if axis is not None and x.shape[axis] > 1:
      size = x.shape[axis] // n
      x = lax.dynamic_slice_in_dim(x, i * size, size, axis)
  return x


def _add(total, x, row, head, at):
  """Adds where `_part` took it from."""
  start = [0] * x.ndim
  for axis, i in zip((row, head), at):
    if axis is not None and x.shape[axis] < total.shape[axis]:
      start[axis] = i * x.shape[axis]
  x += lax.dynamic_slice(total, start, x.shape)
  return lax.dynamic_update_slice(total, x, start)
