"""Heads and hidden units over devices along `model`.

Shoeybi et al. 2019, "Megatron-LM", https://arxiv.org/abs/1909.08053.

Devices along this axis have the same tokens. Of a feed-forward each has some of
the hidden units, whose results add up; of attention, some of the heads, whose
results are put side by side. A strategy for time may stand inside.
"""

import jax
from jax import lax

from pallas_kernels.problem import (
  Engine,
  Extras,
  Operands,
  Over,
  accumulator,
)


def size(axis: str) -> int:
  """Devices along the axis, inside a `shard_map` over it; else 1."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.shape[axis] if axis in mesh.manual_axes else 1


def heads(i, n: int, q, k, v, extras: Extras) -> tuple:
  """Of so many groups of heads the i-th: q, k, v, and all that belongs to it.

  Args:
    i: number of the group, which may be traced.
    n: groups; it has to divide the number of key heads.
    q, k, v, extras: as engines take them.
  """
  part = lambda axis: lambda x: _part(x, axis, i, n)
  own = lambda x: Operands(
    tuple(map(part(0), x.heads)),
    tuple(map(part(2), x.queries)),
    tuple(map(part(2), x.keys)),
  )
  return (
    *map(part(2), (q, k, v)),
    Extras(
      tuple(map(own, extras.scores)),
      tuple(map(own, extras.weights)),
      None if extras.bias is None else part(1)(extras.bias),
    ),
  )


def wide(extras: Extras) -> Extras:
  """The same, with a bias that heads share in numbers as wide as sums.

  Each group of heads makes a gradient of it: they are added up before they are
  rounded to what was given, not after. All other numbers are as wide already.
  """
  bias = extras.bias
  if bias is None or bias.shape[1] > 1:
    return extras
  return extras._replace(bias=bias.astype(accumulator(bias)))


def _part(x, axis, i, n):
  """Of what all heads share, all."""
  if x.shape[axis] == 1:
    return x
  some = x.shape[axis] // n
  return lax.dynamic_slice_in_dim(x, i * some, some, axis)


def over(axis: str, n: int, inner: Over | None = None):
  """Spreads an engine over devices along `axis`, each with some of the heads.

  Args:
    axis: of the mesh.
    n: devices along it; it has to divide the number of key heads.
    inner: how devices work together that each hold a part of time.
  """

  def spread(engine: Engine):
    if inner is not None:
      engine = inner(engine)

    def attend(rule, q, k, v, extras, query, key):
      mine = heads(lax.axis_index(axis), n, q, k, v, wide(extras))
      results = engine.attend(rule, *mine, query, key)
      # The same on all of them, and JAX has to know that it is.
      join = lambda x: lax.all_gather(
        x, axis, axis=2, tiled=True, to='invarying'
      )
      return jax.tree.map(join, results)

    return Engine(attend)

  return spread


def total(engine, axis: str):
  """`engine`, of which every device computes a part of each sum."""
  return lambda *inputs: jax.tree.map(
    lambda x: lax.psum(x, axis), engine(*inputs)
  )
