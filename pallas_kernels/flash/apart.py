"""Rows and heads one after the other, where they share a bias.

A kernel writes the gradient of a bias tile by tile, each tile once: it cannot
add to what another row or head has written. For all of them at once that is an
array `b h t s` in float32, whatever the bias is. Where this is large, they come
one after the other, and leave one; it costs as many calls of the kernel, and
the sum is read and written in each.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.problem import Extras, Operands, floats

ROOM = 2**28  # bytes that may be had for all at once


def gradients(run, q, k, v, extras, query, key, *known):
  """run(q, k, v, extras, query, key, *known), in parts that add up.

  Args:
    run: from these to the gradients of q, k, v and extras, in float32.
    q, k, v, extras, query, key: as engines take them.
    *known: 'b t h ...', what is known of queries.
  """
  bias, (b, t, h, _) = extras.bias, q.shape
  all_at_once = 4 * b * h * t * k.shape[1]
  if bias is None or bias.shape[:2] == (b, h) or all_at_once <= ROOM:
    return run(q, k, v, extras, query, key, *known)
  rows = b if bias.shape[0] == 1 else 1
  heads = h if bias.shape[1] == 1 else 1
  wide = lambda x: jnp.zeros_like(x, jnp.float32)

  def part(number, totals):
    at = (number // heads, rows), (number % heads, heads)
    some = lambda *axes: lambda x: _part(x, axes, at)
    taken = map(some(0, 2), (q, k, v))
    tokens = (jax.tree.map(some(0, None), x) for x in (query, key))
    rest = map(some(0, 2), known)
    more = run(*taken, _of_kind(some, extras), *tokens, *rest)
    add = lambda *axes: lambda total, x: _add(total, x, axes, at)
    sums = (add(0, 2)(total, x) for total, x in zip(totals[:3], more[:3]))
    return *sums, _of_kind(add, totals[3], more[3])

  nothing = *map(wide, (q, k, v)), jax.tree.map(wide, floats(extras))
  return lax.fori_loop(0, rows * heads, part, nothing)


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


def _part(x, axes, at):
  """Number i of n parts along each axis: of what several share, that."""
  start, sizes = _place(x, axes, at)
  return lax.dynamic_slice(x, start, sizes)


def _add(total, x, axes, at):
  """Adds where `_part` took it from."""
  start, _ = _place(total, axes, at)
  x += lax.dynamic_slice(total, start, x.shape)
  return lax.dynamic_update_slice(total, x, start)


def _place(x, axes, at):
  start, sizes = [0] * x.ndim, list(x.shape)
  for axis, (i, n) in zip(axes, at):
    if axis is not None:
      start[axis] = i * x.shape[axis] // n
      sizes[axis] = max(1, x.shape[axis] // n)
  return start, sizes
