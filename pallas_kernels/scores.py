"""What may happen to a score between the dot product and the softmax.

A modification is a function of the score, of where query and key stand, and of
operands that are spelled out: arrays, which so get gradients. It is computed
tile by tile, from data that travels with the tokens; no bias of t x s is ever
made. The same form serves what happens to a weight after the softmax.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.masks import Range, Side

POSITION = 'position'  # the tag that holds a token's position, if not its order


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Score:
  """A modification of scores.

  Attributes:
    fn: (x, query, key, *operands, *queries, *keys) -> x, for scores x `b h t s`
      and two `Side`s whose arrays are `b 1 t 1` and `b 1 1 s`. Hashable, so a
      function of a module or a frozen dataclass, and differentiable by JAX. A
      kernel hands it tiles of one row and one head, whose last two axes may be
      exchanged, x and sides alike: let it be elementwise in them, and what
      differs from head to head be an operand.
    operands: arrays that lead with the heads, `h ...`; fn gets them as they
      are.
    queries: numbers of each query, `b t h` or `b t 1`; fn gets them as
      `b h t 1`, to broadcast against x. b may be 1.
    keys: numbers of each key, `b s h` or `b s 1`; fn gets them as `b h 1 s`.
  """

  fn: Callable[..., Any] = dataclasses.field(metadata={'static': True})
  operands: tuple = ()
  queries: tuple = ()
  keys: tuple = ()


def distance(query: Side, key: Side) -> jax.Array:
  """How far the key lies behind the query, in positions; negative if ahead."""
  tagged = [POSITION in (side.tags or {}) for side in (query, key)]
  if any(tagged) and not all(tagged):
    raise ValueError(
      f'queries and keys both have the tag {POSITION!r}, or neither: orders and'
      ' positions have no distance'
    )
  place = lambda side: side.tags[POSITION] if all(tagged) else side.order
  return place(query) - place(key)


@dataclasses.dataclass(frozen=True)
class SoftCap:
  """cap tanh(x / cap): scores stay within the cap (Gemma 2)."""

  cap: float

  def __post_init__(self):
    if not self.cap > 0:
      raise ValueError(
        f'softcap={self.cap} must be above 0; None is for no cap'
      )

  def __call__(self, x, query, key):
    return self.cap * jnp.tanh(x / self.cap)


@dataclasses.dataclass(frozen=True)
class Difference:
  """x + a - b, with 'b t h' of each query and 'b s h' of each key.

  With a and b the running sums of log forget gates, it is the forgetting
  attention of Lin et al. 2025, https://arxiv.org/abs/2503.02130.
  """

  def __call__(self, x, query, key, of_query, of_key):
    return x + (of_query - of_key).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Slopes:
  """x - slope_h |distance|, with the slopes 'h' as operand (ALiBi)."""

  def __call__(self, x, query, key, slopes):
    far = jnp.abs(distance(query, key).astype(x.dtype))
    return x - slopes[:, None, None].astype(x.dtype) * far


MOST_COMPARED = 128  # entries of a table that a kernel looks through


@dataclasses.dataclass(frozen=True)
class Table:
  """What reads an entry of a table 'h n', its operand, for each pair.

  Where tokens are far apart all pairs of a tile read the same entry. A kernel
  may then look it up once, see `same`, `first` and `of_one`.

  Attributes:
    gathers: reads it by index, as suits a CPU. A kernel cannot: there each
      entry is put where it belongs, which is elementwise.
  """

  gathers: bool = dataclasses.field(default=True, kw_only=True)

  def number(self, behind, n: int):
    """Which of n entries is that of keys so far behind; monotone on each side.

    What is as far behind and what is as far ahead may share an entry only if
    all between do.
    """
    raise NotImplementedError(f'{type(self).__name__} has no order of entries')

  def elementwise(self):
    """The same function for a kernel."""
    return dataclasses.replace(self, gathers=False)

  def entries(self, table, number, dtype):
    """Entries 'b h t s' for numbers 'b 1 t s'."""
    table = table.astype(dtype)
    if self.gathers or table.shape[1] > MOST_COMPARED:
      return jnp.moveaxis(jnp.take(table, number[:, 0], 1, mode='clip'), 0, 1)
    shape = jnp.broadcast_shapes(number.shape, (len(table), 1, 1))
    found = jnp.zeros(shape, dtype)
    for i in range(table.shape[1]):
      found = jnp.where(number == i, table[:, i : i + 1, None], found)
    return found

  def of_pairs(self, query: Side, key: Side, table, dtype):
    """Entries 'b h t s'."""
    number = self.number(distance(query, key), table.shape[1])
    return self.entries(table, number, dtype)

  def same(self, query: Range, key: Range, n: int):
    """Whether all pairs of two blocks of tokens read the same of n entries."""
    (first, last), (first_key, last_key) = map(_places, (query, key))
    nearest, furthest = first - last_key, last - first_key
    return self.number(nearest, n) == self.number(furthest, n)

  def first(self, query: Side, key: Side, table, dtype):
    """The entry 'h 1' of the first pair of a tile."""
    query, key = jax.tree.map(lambda x: x[:1, :1, :1, :1], (query, key))
    return self.of_pairs(query, key, table, dtype)[0, :, :, 0]

  @staticmethod
  def of_one(x, query, key, entry):
    """What it does where all pairs read one entry: 'h', its operand then."""
    del query, key
    return x + entry[:, None, None].astype(x.dtype)


def _places(block: Range) -> tuple[jax.Array, jax.Array]:
  """The first and the last position, as `distance` counts them."""
  if POSITION in (block.tags_min or {}):
    return block.tags_min[POSITION], block.tags_max[POSITION]
  return block.order_min, block.order_max


@dataclasses.dataclass(frozen=True)
class Buckets(Table):
  """x + table_h[bucket(distance)], with the table 'h n' as operand (T5).

  Half of the buckets are single distances; the others grow with the logarithm
  of the distance up to `furthest`, and the last holds all beyond. Without
  `causal` half of all buckets are for keys ahead.
  """

  furthest: int
  causal: bool

  def number(self, behind, n):
    single = n // (2 if self.causal else 4)
    if not 0 < single < self.furthest:
      raise ValueError(
        f'of {n} buckets {single} are single distances: that must'
        f' be at least 1 and below furthest={self.furthest}'
      )
    return bucket(behind, n, self.furthest, self.causal)

  def __call__(self, x, query, key, table):
    return x + self.of_pairs(query, key, table, x.dtype)


@dataclasses.dataclass(frozen=True)
class Relative(Table):
  """x + table_h[distance], with the table 'h n' as operand, one number each.

  The first entry is for keys `ahead` ahead and more, the last for those
  n - 1 - ahead behind and more.
  """

  ahead: int = 0

  def number(self, behind, n):
    return jnp.clip(behind + self.ahead, 0, n - 1)

  def __call__(self, x, query, key, table):
    return x + self.of_pairs(query, key, table, x.dtype)


@dataclasses.dataclass(frozen=True)
class RelativeFactor(Relative):
  """p table_h[distance], likewise: what URPE does to the weights.

  Luo et al. 2022, "Your Transformer May Not be as Powerful as You Expect",
  https://arxiv.org/abs/2205.13401.
  """

  def __call__(self, p, query, key, table):
    return p * self.of_pairs(query, key, table, p.dtype)

  @staticmethod
  def of_one(x, query, key, entry):
    del query, key
    return x * entry[:, None, None].astype(x.dtype)


def bucket(behind, buckets: int, furthest: int, causal: bool) -> jax.Array:
  """The bucket of each distance, in [0, buckets)."""
  if causal:
    first, far = 0, jnp.maximum(behind, 0)
  else:
    buckets //= 2
    first, far = jnp.where(behind < 0, buckets, 0), jnp.abs(behind)
  exact = buckets // 2
  # The bounds are integers, worked out here: a logarithm in float32 would put
  # a distance into another bucket on another device.
  ratio = furthest / exact
  bounds = [
    math.ceil(exact * ratio ** (i / (buckets - exact)) - 1e-9)
    for i in range(1, buckets - exact)
  ]
  above = sum((far >= bound).astype(jnp.int32) for bound in bounds)
  return first + jnp.where(far < exact, far, exact + above)
