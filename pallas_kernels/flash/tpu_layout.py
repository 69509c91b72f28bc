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

from pallas_kernels import elementwise, masks, runs
from pallas_kernels.blocks import LANES, Tile, tile
from pallas_kernels.flash.tpu_feed import Block
from pallas_kernels.masks import Everything, Side, Tokens
from pallas_kernels.problem import (
  Extras,
  Operands,
  Rule,
  floats,
  one_segment,
  with_floats,
)
from pallas_kernels.tiles import filled

VMEM = 64 * 2**20  # bytes that a kernel may use, where a chip has as many
SHORT = 2048  # tokens of which, in float32, a smaller tile does better
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


def bias_block(plan, bias):
  index = lambda b, h, i, j: (*pick(bias, b, h), j, i)
  return Block((None, None, plan.tile.k, plan.tile.q), index, flows=True)


def _column(row):
  """'1 n' to 'n 1'."""
  return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


@dataclasses.dataclass(frozen=True)
class Standing:
  """Where the queries and keys of one tile stand.

  What a key knows of itself is a column of a tile: the same in all lanes. Made
  where it is used it would be made for each part anew, or stay in registers and
  be spilled; so it is made once, for `part` to read, and so are queries where a
  kernel has no register for them.

  Attributes:
    query, key: refs of tokens, 'f c', or None if orders count up.
    i, j: which tile it is.
    keys: a buffer of tokens of keys, 'f k 128'; if None they are made in place.
    queries: the same of queries, 'f q'; not for those that are read.
  """

  plan: Plan
  query: Any
  key: Any
  i: Any
  j: Any
  keys: Any = None
  queries: Any = None

  def keep_keys(self):
    """Fills the buffer. Call it before `part` of any tile with other keys."""
    for f, field in enumerate(self._keys(pl.ds(0, self.plan.tile.k), LANES)):
      self.keys[f] = field

  def keep_queries(self):
    """The same for queries."""
    if self.plan.tokens:
      return
    for f, field in enumerate(self._queries(pl.ds(0, self.plan.tile.q))):
      self.queries[pl.ds(f, 1)] = field

  def part(self, rows, columns) -> tuple[Tokens, Tokens]:
    """Tokens of queries '1 c' and of keys: 'c 1', or as many as queries."""
    fields = range(self.plan.fields)
    if self.keys is None:
      keys = self._keys(rows, 1)
    else:
      keys = [_wide(self.keys[f, rows], columns) for f in fields]
    if self.plan.tokens:
      queries = [self.query[pl.ds(f, 1), columns] for f in fields]
    elif self.queries is None:
      queries = self._queries(columns)
    else:
      queries = [self.queries[pl.ds(f, 1), columns] for f in fields]
    names = self.plan.tags
    return self._tokens(queries, names[0]), self._tokens(keys, names[1])

  def _queries(self, columns):
    # Of 128 at a time: numbers beyond would be a constant that is spilled.
    start = self.i * self.plan.tile.q + columns.start
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    orders = [start + at + lane for at in range(0, columns.size, LANES)]
    order = jnp.concatenate(orders, 1)
    return [order, jnp.ones_like(order)][: self.plan.fields]

  def _keys(self, rows, lanes):
    plan = self.plan
    if plan.tokens:
      return [
        jnp.broadcast_to(
          _column(self.key[pl.ds(f, 1), rows]), (rows.size, lanes)
        )
        for f in range(plan.fields)
      ]
    order = self.j * plan.tile.k + rows.start
    order += lax.broadcasted_iota(jnp.int32, (rows.size, lanes), 0)
    return [order, (order < plan.s).astype(jnp.int32)][: plan.fields]

  def _tokens(self, fields, names) -> Tokens:
    order, *fields = fields
    segments = fields.pop(0) if self.plan.segments or self.plan.ragged else None
    return Tokens(Side(order, dict(zip(names, fields))), segments)


def _sides(standing, rows, columns):
  """As a modification of scores reads them: '1 1 1 t'; '1 1 s 1' or 't'."""
  query, key = standing.part(rows, columns)
  return jax.tree.map(lambda x: x[None, None], (query.side, key.side))


def _wide(x, columns):
  """'s 128', the same in all lanes, as wide as the columns are."""
  return jnp.concatenate([x] * (columns.size // LANES), 1)


def columns_of(arrays, size):
  """Buffers for `kept`."""
  return [
    pltpu.VMEM((size, LANES), x.dtype) for own in arrays for x in own.keys
  ]


def kept(group, buffers, fill=True):
  """Operands of which numbers of keys are columns, the same in all lanes.

  As in `Standing` they are made once for all parts of a tile: by the first
  call, and others have fill=False.
  """
  buffers = iter(buffers)

  def own(one):
    keys = [next(buffers) for _ in one.keys]
    for ref, x in zip(keys, one.keys if fill else ()):
      ref[...] = jnp.broadcast_to(_column(x[...]), ref.shape)
    return one._replace(keys=tuple(keys))

  return tuple(map(own, group))


def _own_part(like: Operands, own: Operands, rows, columns) -> Operands:
  """Operands of a part, as a modification of scores reads them."""
  parts = (
    lambda ref, x: ref[...].reshape(1, *x.shape),
    lambda ref, x: ref[:, columns][None, None],
    lambda ref, x: _wide(ref[rows], columns)[None, None],
  )

  def read(part, ref, x):
    y = part(ref, x)
    return y != 0 if x.dtype == bool else y

  return Operands(
    *(
      tuple(read(part, ref, x) for ref, x in zip(refs, xs))
      for part, refs, xs in zip(parts, own, like)
    )
  )


def part_of(like: Extras, extras: Extras, rows, columns) -> Extras:
  """Extras of a part; see `likes`."""
  own = lambda group, like: tuple(
    _own_part(x, one, rows, columns) for x, one in zip(like, group)
  )
  bias = extras.bias
  return Extras(
    own(extras.scores, like.scores),
    own(extras.weights, like.weights),
    None if bias is None else bias[rows, columns][None, None],
  )


def likes(extras: Extras) -> Extras:
  """What a kernel has to know of operands: types, and shapes behind 'h'."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
    extras._replace(bias=None),
  )


@dataclasses.dataclass(frozen=True)
class Scoring:
  """How scores of a tile are made: each pair by its own, or all by one entry.

  Attributes:
    rule, extras, like: as of the kernel, without what is for weights.
    sums: of backward, where gradients of numbers of heads are added up.
  """

  rule: Rule
  extras: Extras
  like: Extras
  sums: Any = None

  def part(self, rows, columns) -> Extras:
    return part_of(self.like, self.extras, rows, columns)

  def of_one(self, at: Standing, entries) -> 'Scoring':
    """The same for a tile of which all pairs read the same of each table.

    entries are buffers '1 1' of what is read, and where their gradients go.
    """
    rule = self.rule
    scores, like = list(self.extras.scores), list(self.like.scores)
    sums = None if self.sums is None else list(self.sums)
    for place, (entry, total) in zip(rule.tables, entries):
      entry[...] = _entry(rule.scores[place], at, self._table(place))
      scores[place] = scores[place]._replace(heads=(entry,))
      number = jax.ShapeDtypeStruct((), jnp.float32)
      like[place] = like[place]._replace(heads=(number,))
      if sums is not None:
        total[...] = jnp.zeros_like(total)
        sums[self._sum(place)] = total
    return Scoring(
      rule.of_one(),
      self.extras._replace(scores=tuple(scores)),
      self.like._replace(scores=tuple(like)),
      sums,
    )

  def add(self, at: Standing, entries):
    """Adds gradients of entries to those of the tables."""
    for place, (_, total) in zip(self.rule.tables, entries):
      read = functools.partial(_entry, self.rule.scores[place], at)
      _, back = jax.vjp(read, self._table(place))
      (dx,) = back(total[...].sum(keepdims=True))
      ref = self.sums[self._sum(place)]
      ref[...] += dx if dx.size > 1 else total[...]  # of one see `modified`

  def _table(self, place):
    (table,) = self.extras.scores[place].heads
    return table[...].astype(jnp.float32)

  def _sum(self, place):
    """Which of the sums is that of a table."""
    before = self.extras._replace(scores=self.extras.scores[:place], weights=())
    return len(kinds(floats(before))['heads'])


def _entry(fn, at: Standing, table):
  query, key = _sides(at, pl.ds(0, 8), pl.ds(0, LANES))
  return fn.first(query, key, table, jnp.float32)


def modified(fn, x, standing, extras: Extras, rows, columns):
  """fn of a part 's t' and the function back from its gradient.

  The gradient of an operand that is one number of each head is '8 128', which
  is left to be summed: the rest of the sum would have to wait for itself.
  """
  query, key = _sides(standing, rows, columns)
  x, values = x[None, None], floats(extras)
  alone = jax.tree.map(lambda x: x if x.size == 1 else None, _of_heads(values))
  leaves, tree = jax.tree.flatten(alone)
  call = lambda x, values: fn(x, query, key, with_floats(extras, values))
  forward = _has_jvp(functools.partial(call, x), alone)
  rest = jax.tree.map(
    lambda x, alone: None if forward and alone is not None else x,
    *(values, alone),
    is_leaf=lambda x: x is None,
  )
  y, back = jax.vjp(call, x, rest)

  def gradient(dy):
    dx, dextras = back(dy[None, None])
    if not forward:
      own = lambda one, dx: dx if one is None else _put(dx)
      is_none = lambda x: x is None
      return dx[0, 0], jax.tree.map(own, alone, dextras, is_leaf=is_none)
    sums = []
    for at in range(len(leaves)):
      ways = [jnp.full_like(x, at == i) for i, x in enumerate(leaves)]
      along = (tree.unflatten(leaves),), (tree.unflatten(ways),)
      _, slope = jax.jvp(functools.partial(call, x), *along)
      sums.append(by_lane(folded(jnp.sum, dy * slope[0, 0])))
    return dx[0, 0], with_floats(dextras, tree.unflatten(sums))

  return y[0, 0], gradient


def _of_heads(values: Extras) -> Extras:
  """Those of heads, and None for the others."""
  none = lambda group: (None,) * len(group)
  own = lambda one: Operands(one.heads, none(one.queries), none(one.keys))
  scores, weights = (
    tuple(map(own, group)) for group in (values.scores, values.weights)
  )
  return Extras(scores, weights)


def _has_jvp(call, values):
  """Whether JAX differentiates it forward, as it does not a custom_vjp."""

  def calls(jaxpr):
    for equation in jaxpr.eqns:
      function = elementwise.inner(equation)
      yield equation.primitive.name
      if function is not None:
        yield from calls(getattr(function, 'jaxpr', function))

  found = set(calls(jax.make_jaxpr(call)(values).jaxpr))
  return not any(name.startswith('custom_vjp') for name in found)


def _put(x):
  """One number as '8 128' that sum to it."""
  at = [lax.broadcasted_iota(jnp.int32, (8, LANES), axis) for axis in (0, 1)]
  return jnp.where((at[0] == 0) & (at[1] == 0), x.reshape(1, 1), 0)


def by_lane(x):
  """'s t' to 's 128': the sum as far as no lane meets another."""
  return sum(x[:, at : at + LANES] for at in range(0, x.shape[1], LANES))


def masked(rule, plan, x, standing, rows, columns):
  query, key = standing.part(rows, columns)
  return jnp.where(masks.sees(rule.mask, query, key), x, -jnp.inf)


def folded(reduce, x):
  """'s t' to '8 t': reduced as far as no sublane meets another."""
  return reduce(x.reshape(-1, 8, x.shape[1]), 0)


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
