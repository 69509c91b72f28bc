"""What a TPU kernel does to the scores of a part of a tile.

Masks and modifications of scores read where the queries and keys of the part
stand, and numbers that each of them, or their head, has.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import elementwise, masks
from pallas_kernels.blocks import LANES
from pallas_kernels.flash.tpu_layout import Plan, kinds
from pallas_kernels.masks import Side, Tokens
from pallas_kernels.problem import Extras, Operands, Rule, floats, with_floats


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
    rule, extras, like: as of the kernel.
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
