"""Masks as predicates on the data that travels with the tokens.

A mask says whether a query may see a key, from each one's order and tags; never
from where they lie in an array. So padding, packing, caching and every layout
over devices are permutations of data, and no mask knows about them.

  mask = Causal() & (Window(128) | Sinks(4))

Masks hold Python scalars only: they are hashable, hence static under jax.jit.
Blockwise attention asks a mask to judge a whole tile from the ranges of its
orders and tags. `empty` promises that no pair in the tile is visible (the tile
is skipped), `full` that every pair is (the tile needs no mask). Both may
always answer False, which means "unknown": the tile is then tested pair by
pair. Orders are int32 and their differences must fit.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


class Side(NamedTuple):
  """What a mask may read of queries or of keys: int32 arrays.

  A mask is given two sides whose arrays broadcast against each other, such as
  `b t 1` for the queries and `b 1 s` for the keys.
  """

  order: jax.Array
  tags: dict[str, jax.Array] | None = None


class Range(NamedTuple):
  """The least and the greatest order and tags found in a block of tokens."""

  order_min: jax.Array
  order_max: jax.Array
  tags_min: dict[str, jax.Array] | None = None
  tags_max: dict[str, jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class Mask:
  """A predicate on (query, key); combine with `&`, `|` and `~`."""

  def __call__(self, query: Side, key: Side) -> ArrayLike:
    """True where the query sees the key, of the sides' broadcast shape."""
    raise NotImplementedError(
      f'{type(self).__name__} does not say what it sees'
    )

  def empty(self, query: Range, key: Range) -> ArrayLike:
    """True only where no query in the range sees any key in the range."""
    return np.False_

  def full(self, query: Range, key: Range) -> ArrayLike:
    """True only where every query in the range sees every key in the range."""
    return np.False_

  def reach(self) -> tuple[float, float]:
    """How many orders before and after its own a query may see, at most."""
    return math.inf, math.inf

  def __and__(self, other: 'Mask') -> 'Mask':
    return And(self, other)

  def __or__(self, other: 'Mask') -> 'Mask':
    return Or(self, other)

  def __invert__(self) -> 'Mask':
    return Not(self)


@dataclasses.dataclass(frozen=True)
class And(Mask):
  """Seen by both masks."""

  left: Mask
  right: Mask

  def __call__(self, query, key):
    return self.left(query, key) & self.right(query, key)

  def empty(self, query, key):
    return self.left.empty(query, key) | self.right.empty(query, key)

  def full(self, query, key):
    return self.left.full(query, key) & self.right.full(query, key)

  def reach(self):
    return tuple(map(min, self.left.reach(), self.right.reach()))


@dataclasses.dataclass(frozen=True)
class Or(Mask):
  """Seen by either mask."""

  left: Mask
  right: Mask

  def __call__(self, query, key):
    return self.left(query, key) | self.right(query, key)

  def empty(self, query, key):
    return self.left.empty(query, key) & self.right.empty(query, key)

  def full(self, query, key):
    return self.left.full(query, key) | self.right.full(query, key)

  def reach(self):
    return tuple(map(max, self.left.reach(), self.right.reach()))


@dataclasses.dataclass(frozen=True)
class Not(Mask):
  """Not seen by the mask."""

  mask: Mask

  def __call__(self, query, key):
    return ~self.mask(query, key)

  def empty(self, query, key):
    return self.mask.full(query, key)

  def full(self, query, key):
    return self.mask.empty(query, key)


@dataclasses.dataclass(frozen=True)
class Everything(Mask):
  """Every query sees every key."""

  def __call__(self, query, key):
    shape = jnp.broadcast_shapes(query.order.shape, key.order.shape)
    return jnp.ones(shape, bool)

  def full(self, query, key):
    return np.True_


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
  """A query sees itself and what came before: key.order <= query.order."""

  def __call__(self, query, key):
    return key.order <= query.order

  def empty(self, query, key):
    return key.order_min > query.order_max

  def full(self, query, key):
    return key.order_max <= query.order_min

  def reach(self):
    return math.inf, 0


@dataclasses.dataclass(frozen=True)
class Window(Mask):
  """A query sees the last `left` keys, itself included, and `right` likewise.

  That is, query.order - key.order < left and, when `right` is given,
  key.order - query.order < right. Without `right` the future is not limited:
  `Causal() & Window(n)` is the usual sliding window of n tokens.
  """

  left: int
  right: int | None = None

  def __post_init__(self):
    for name in ('left', 'right'):
      size = getattr(self, name)
      if size is not None and not 1 <= size < 2**31:
        raise ValueError(
          f'Window: {name}={size} must be at least 1, which is the query'
          ' itself, and fit into 32 bits'
        )

  def __call__(self, query, key):
    seen = query.order - key.order < self.left
    if self.right is not None:
      seen &= key.order - query.order < self.right
    return seen

  def empty(self, query, key):
    unseen = query.order_min - key.order_max >= self.left
    if self.right is not None:
      unseen |= key.order_min - query.order_max >= self.right
    return unseen

  def full(self, query, key):
    seen = query.order_max - key.order_min < self.left
    if self.right is not None:
      seen &= key.order_max - query.order_min < self.right
    return seen

  def reach(self):
    after = math.inf if self.right is None else self.right - 1
    return self.left - 1, after


@dataclasses.dataclass(frozen=True)
class Sinks(Mask):
  """The first `n` keys of a segment are seen: key.order < n.

  The attention sinks of Xiao et al. 2023, https://arxiv.org/abs/2309.17453.
  """

  n: int

  def __post_init__(self):
    if self.n < 0:
      raise ValueError(f'Sinks: n={self.n} must be at least 0')

  def __call__(self, query, key):
    shape = jnp.broadcast_shapes(query.order.shape, key.order.shape)
    return jnp.broadcast_to(key.order < self.n, shape)

  def empty(self, query, key):
    return key.order_min >= self.n

  def full(self, query, key):
    return key.order_max < self.n


@dataclasses.dataclass(frozen=True)
class BlockCausal(Mask):
  """A query sees its own block of `size` orders, and the blocks before."""

  size: int

  def __post_init__(self):
    if self.size < 1:
      raise ValueError(f'BlockCausal: size={self.size} must be at least 1')

  def __call__(self, query, key):
    return key.order // self.size <= query.order // self.size

  def empty(self, query, key):
    return key.order_min // self.size > query.order_max // self.size

  def full(self, query, key):
    return key.order_max // self.size <= query.order_min // self.size

  def reach(self):
    return math.inf, self.size - 1


@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
  """Keys whose tag is not 0 are seen: `Causal() | Prefix()` is a prefix LM."""

  tag: str = 'prefix'

  def __call__(self, query, key):
    if self.tag not in (key.tags or {}):
      raise ValueError(
        f'Prefix reads the tag {self.tag!r} of keys, of which there are'
        f' {sorted(key.tags or {})}: give key_tags={{{self.tag!r}: ...}}'
      )
    tagged = key.tags[self.tag] != 0
    orders = query.order.shape, key.order.shape
    return jnp.broadcast_to(tagged, jnp.broadcast_shapes(*orders, tagged.shape))

  def empty(self, query, key):
    if self.tag not in (key.tags_min or {}):
      return np.False_  # where pairs are tested, it says what is missing
    return (key.tags_min[self.tag] == 0) & (key.tags_max[self.tag] == 0)

  def full(self, query, key):
    if self.tag not in (key.tags_min or {}):
      return np.False_
    return (key.tags_min[self.tag] > 0) | (key.tags_max[self.tag] < 0)


class Tokens(NamedTuple):
  """All that decides who sees whom: tokens in different segments never do."""

  side: Side
  segments: jax.Array | None = None  # below 1: padding; None: all are in 1


def sees(mask: Mask, query: Tokens, key: Tokens) -> ArrayLike:
  """True where the query sees the key; their arrays broadcast, as in Side."""
  seen = mask(query.side, key.side)
  if key.segments is not None:
    seen &= (query.segments == key.segments) & (key.segments > 0)
  return seen


class Extent(NamedTuple):
  """What the tokens of a block have in common; padding is not counted."""

  range: Range
  segment_min: jax.Array
  segment_max: jax.Array
  uniform: jax.Array  # all in one segment, none is padding


def extent(tokens: Tokens) -> Extent:
  """The extent of each block, from tokens `... c` to arrays `...`."""
  (order, tags), segments = tokens
  if segments is None:
    segments = jnp.ones_like(order)
  bound, counted = jnp.iinfo(jnp.int32), segments > 0
  least = functools.partial(jnp.min, axis=-1, initial=bound.max, where=counted)
  most = functools.partial(jnp.max, axis=-1, initial=bound.min, where=counted)
  first, last = least(segments), most(segments)
  return Extent(
    range=Range(
      order_min=least(order),
      order_max=most(order),
      tags_min=jax.tree.map(least, tags),
      tags_max=jax.tree.map(most, tags),
    ),
    segment_min=first,
    segment_max=last,
    uniform=counted.all(-1) & (first == last),
  )


def judge(
  mask: Mask, query: Extent, key: Extent
) -> tuple[ArrayLike, ArrayLike]:
  """Which tiles are surely empty, and which of the others are surely full."""
  empty = mask.empty(query.range, key.range)
  # A block of padding alone has min > max, so its tiles are empty.
  empty |= query.segment_min > key.segment_max
  empty |= key.segment_min > query.segment_max
  full = mask.full(query.range, key.range)
  full &= query.uniform & key.uniform & (query.segment_min == key.segment_min)
  return empty, full & ~empty
