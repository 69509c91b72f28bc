"""What the TPU kernels of attention read, and how it is laid out for them.

Tiles are keys by queries, `s t`. So what a query has of its own is a row of a
tile, and arrays end with the time axis where they can: 'b h d t', 'rows f t'.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import runs
from pallas_kernels.blocks import LANES, Tile, tile
from pallas_kernels.flash.tpu_feed import Block
from pallas_kernels.masks import Everything, Tokens
from pallas_kernels.problem import (
  Extras,
  Operands,
  Rule,
  one_segment,
)
from pallas_kernels.tiles import filled

VMEM = 64 * 2**20  # bytes that a kernel may use, where a chip has as many
SHORT = 2048  # tokens of which, in float32, a smaller tile does better
NT = (((1,), (1,)), ((), ()))  # products of rows with rows
NN = (((1,), (0,)), ((), ()))
MORE = 8  # rows below those of dq, for gradients of numbers of queries


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes and choices that are known while tracing.

  Attributes:
    tile: queries and keys in a tile, and in the parts that it is cut into.
    b, h, heads, t, s, d, e: sizes, with `heads` those of k and v.
    rows: rows of tokens, b or 1.
    dtype: of q, k and v.
    mask: whether any tile may need a mask, or more than one entry of a table.
    tables: how many of the scores read one.
    tokens: whether where tokens stand is read from arrays.
    tags: their names, of queries and of keys.
    segments: whether there are any.
    ragged: the last block of keys holds padding.
    modified: scores are, by a function or a bias.
    varying: over which mesh axes results vary, under shard_map.
  """

  tile: Tile
  b: int
  h: int
  heads: int
  t: int
  s: int
  d: int
  e: int
  rows: int
  dtype: np.dtype
  mask: bool
  tables: int
  tokens: bool
  tags: tuple[tuple[str, ...], tuple[str, ...]]
  segments: bool
  ragged: bool
  modified: bool
  varying: Any

  @property
  def blocks_q(self):
    return math.ceil(self.t / self.tile.q)

  @property
  def blocks_k(self):
    return math.ceil(self.s / self.tile.k)

  @property
  def long_q(self):
    return self.blocks_q * self.tile.q

  @property
  def long_k(self):
    return self.blocks_k * self.tile.k

  @property
  def group(self):
    return self.h // self.heads

  @property
  def fields(self):
    """Numbers that a token has: its order, segment and tags; or 0s."""
    return 1 + (self.segments or self.ragged) + max(map(len, self.tags))

  @property
  def kept(self):
    """The shapes of the buffers of `Standing`, of keys and of queries."""
    keys = self.fields, self.tile.k, LANES
    return keys, (aligned(self.fields), self.tile.q)

  def table(self, rule, extras, query: Tokens, key: Tokens, by_query):
    """Which tiles are visited, see `runs.table`."""
    if self.ragged:
      query, key = one_segment(query), one_segment(key)
    same = functools.partial(rule.same, extras) if self.tables else None
    sides = self.tile.q, self.tile.k
    return runs.table(rule.mask, query, key, *sides, by_query, same)

  def runs(self, table, row, block, by_query):
    """Those of one block of one row of the batch."""
    blocks = self.blocks_q if by_query else self.blocks_k
    return runs.Runs(table, (row * blocks if self.rows > 1 else 0) + block)

  @property
  def unit(self):
    """Scores are in these units: log2(e) if a weight is a power of 2."""
    narrow = self.dtype == jnp.bfloat16 and not self.modified
    return math.log2(math.e) if narrow else 1.0

  def power(self, x):
    """What a score means as a weight."""
    return jnp.exp(x) if self.unit == 1 else jnp.exp2(x)

  def head(self, h):
    """The key head of a query head."""
    return h if self.group == 1 else lax.div(h, jnp.int32(self.group))

  def dot(self, x, y, dims):
    wide = self.dtype == jnp.float32
    return lax.dot_general(
      *(x, y, dims),
      precision=lax.Precision.HIGHEST if wide else None,
      preferred_element_type=jnp.float32,
    )

  def like(self, shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=self.varying)


def make(rule: Rule, q, k, v, extras, query, key, direction) -> Plan:
  (_, t, _, d), (_, s, _, e) = q.shape, v.shape
  row = max(d, e) * q.dtype.itemsize
  # In float32 a product is six, and a tile a program six times as long to
  # compile; of few tiles half of those on the diagonal are computed in vain.
  slow = q.dtype == jnp.float32 and (row > 256 or max(t, s) <= SHORT)
  # A tile of the bias, and of its gradient, takes room as wide rows do.
  small = slow or extras.bias is not None
  sides = tile(rule.blocks, direction, t, s, row, small)
  return Plan(**known(rule, q, k, v, extras, query, key, sides))


def known(rule: Rule, q, k, v, extras, query, key, sides: Tile) -> dict:
  """The fields of a `Plan` with such tiles."""
  b, t, h, d = q.shape
  _, s, heads, e = v.shape
  ragged = s % sides.k > 0
  segments = query.segments is not None
  tags = tuple(tuple(sorted(x.side.tags or {})) for x in (query, key))
  tokens = jax.tree.leaves((query, key))
  return dict(
    tile=sides,
    **dict(b=b, h=h, heads=heads, t=t, s=s, d=d, e=e),
    rows=max(len(x) for x in tokens),
    dtype=q.dtype,
    mask=bool(
      not isinstance(rule.mask, Everything)
      or (segments or ragged or rule.tables)
    ),
    tables=len(rule.tables),
    tokens=not rule.ordered or segments or any(tags),
    tags=tags,
    segments=segments,
    ragged=ragged,
    modified=bool(extras.scores or extras.bias is not None),
    varying=jax.typeof(q).manual_axis_type,
  )


def scaled(x, factor):
  """In the type of x, with but one rounding: of the product."""
  return (x.astype(jnp.float32) * factor).astype(x.dtype)


def rows_first(x, length, last=False):
  """'b t h d' to 'b h t d', filled up."""
  return filled(jnp.swapaxes(x, 1, 2), 2, length, last)


def rows_last(x, length, last=False):
  """'b t h d' to 'b h d t', filled up."""
  return filled(jnp.moveaxis(x, 1, 3), 3, length, last)


def lay_tokens(plan, tokens: Tokens, length):
  """Order, segments and tags as rows of one array 'rows f t', or None."""
  if not plan.tokens:
    return None
  # Padding is in segment 0; what a score or a mask reads there is what occurs.
  fields = [(tokens.side.order, True)]
  if plan.segments:
    fields.append((tokens.segments, False))
  elif plan.ragged:
    fields.append((jnp.ones_like(tokens.side.order), False))
  tags = sorted((tokens.side.tags or {}).items())
  fields += [(x, True) for _, x in tags]
  # One side may have fewer tags than the other.
  none = jnp.zeros_like(tokens.side.order)
  fields += [(none, False)] * (plan.fields - len(fields))
  shape = (plan.rows, tokens.side.order.shape[1])
  laid = [
    filled(jnp.broadcast_to(x, shape), 1, length, last) for x, last in fields
  ]
  return jnp.stack(laid, 1)


def lay_operands(plan, own: Operands) -> Operands:
  """'h 1 n', 'b h 1 t' and 'b h 1 s'."""

  def of_heads(x):
    return _copied(x).reshape(len(x), 1, -1)

  def per_token(x, length):
    # Filled up with what occurs: a score may divide by it.
    x = _copied(jnp.swapaxes(x, 1, 2))
    return filled(x, 2, length, last=True)[:, :, None]

  return Operands(
    tuple(map(of_heads, own.heads)),
    tuple(per_token(x, plan.long_q) for x in own.queries),
    tuple(per_token(x, plan.long_k) for x in own.keys),
  )


def _copied(x):
  """In a type that the copies of a kernel know: of bool they do not."""
  return x.astype(jnp.int32) if x.dtype == bool else x


def lay_bias(plan, bias):
  """'b h s t', padded, in a type that a TPU loads."""
  if bias is None:
    return None
  known = bias.dtype in (jnp.bfloat16, jnp.float32)
  bias = bias if known else bias.astype(jnp.float32)
  return filled(filled(bias.mT, 3, plan.long_q), 2, plan.long_k)


def lay_extras(plan, extras: Extras) -> Extras:
  own = lambda group: tuple(lay_operands(plan, one) for one in group)
  bias = lay_bias(plan, extras.bias)
  return Extras(own(extras.scores), own(extras.weights), bias)


def pick(x, *index):
  """An index of a block of x: 0 along axes that are shared."""
  return tuple(0 if n == 1 else i for n, i in zip(x.shape, index))


def operand_blocks(plan, own: Operands, flow: str, lag=0) -> Operands:
  """Those of 'queries' or of 'keys' flow, whichever a kernel loops over."""

  def of_queries(x):
    index = lambda b, h, i, j: (*pick(x, b, h), 0, i)
    return Block((None, None, 1, plan.tile.q), index, flow == 'queries', lag)

  def of_keys(x):
    index = lambda b, h, i, j: (*pick(x, b, h), 0, j)
    return Block((None, None, 1, plan.tile.k), index, flow == 'keys', lag)

  def of_head(x):
    return Block((None, 1, x.shape[2]), lambda b, h, i, j: (h, 0, 0))

  kinds = zip((of_head, of_queries, of_keys), own)
  return Operands(*(tuple(map(block, arrays)) for block, arrays in kinds))


def token_blocks(plan, flow: str, lag=0):
  """Of queries and of keys, or None."""
  if not plan.tokens:
    return None, None
  row = lambda b: b if plan.rows > 1 else 0
  return (
    Block(
      (None, plan.fields, plan.tile.q),
      lambda b, h, i, j: (row(b), 0, i),
      flow == 'queries',
      lag,
    ),
    Block(
      (None, plan.fields, plan.tile.k),
      lambda b, h, i, j: (row(b), 0, j),
      flow == 'keys',
      lag,
    ),
  )


def extras_blocks(plan, laid: Extras, flow: str, lag=0) -> Extras:
  """Of what `lay_extras` has laid; those of weights are read so much later."""
  own = lambda group, lag: tuple(
    operand_blocks(plan, one, flow, lag) for one in group
  )
  bias = bias_block(plan, laid.bias)
  return Extras(own(laid.scores, 0), own(laid.weights, lag), bias)


def bias_block(plan, bias):
  if bias is None:
    return None
  index = lambda b, h, i, j: (*pick(bias, b, h), j, i)
  return Block((None, None, plan.tile.k, plan.tile.q), index, flows=True)


def cut(length, size):
  return [
    pl.ds(start, min(size, length - start)) for start in range(0, length, size)
  ]


def params(semantics):
  return pltpu.CompilerParams(
    dimension_semantics=semantics,
    vmem_limit_bytes=VMEM,
    # Indices come from a table that is made here; the interpreter checks them.
    disable_bounds_checks=True,
  )


def cost(plan, rule, products):
  """What XLA's scheduler should think of a kernel: an upper bound."""
  pairs = plan.b * plan.h * plan.long_q * plan.long_k
  size = jnp.dtype(plan.dtype).itemsize
  moved = plan.b * plan.h * (plan.t + plan.s) * (plan.d + plan.e) * size
  return pl.CostEstimate(
    flops=products * pairs * (plan.d + plan.e),
    transcendentals=pairs,
    bytes_accessed=products * moved,
  )


def aligned(rows):
  return -(-rows // 8) * 8


def kinds(extras: Extras) -> dict[str, list]:
  """What has a gradient among operands, by kind; the inverse is of_kinds."""
  groups = (*extras.scores, *extras.weights)
  return {
    kind: [x for own in groups for x in getattr(own, kind) if x is not None]
    for kind in Operands._fields
  }


def of_kinds(kinds, like: Extras) -> Extras:
  left = {kind: iter(values) for kind, values in kinds.items()}

  def own(one):
    return Operands(
      *(
        tuple(
          None if x is None else next(left[kind]) for x in getattr(one, kind)
        )
        for kind in Operands._fields
      )
    )

  return Extras(tuple(map(own, like.scores)), tuple(map(own, like.weights)))


def shared(dx, x):
  """The gradient of x, summed over axes along which x is shared."""
  axes = [axis for axis in range(dx.ndim) if dx.shape[axis] != x.shape[axis]]
  return dx.sum(axes, keepdims=True)
