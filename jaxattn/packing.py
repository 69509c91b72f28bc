"""Packing: how the tokens of a row are ordered, grouped and placed.

A row of a batch need not be one dense sequence. It may hold several documents
(`segments` 1, 2, ...), padding anywhere (`segments` 0), and tokens in any order
(`order` says where each stands). Masks, windows, decays and rotary phases read
these arrays, never an index into the row, so padding, packing, striping and
caching are permutations of data and not special cases.

Two rules, which `Packing.validate` checks on concrete arrays:

* inside a row no two tokens share both segment and order;
* a segment starts at order 0, unless it continues one that a state holds. Order
  0 is therefore what resets a recurrence.

Segment ids grow along a stream: the document that a state is in the middle of
is the one with the largest id it has seen.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.typing import Array, Flags, Int, PerRow, PerToken


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packing:
  """Where each token of a batch stands. A pytree of int32 arrays.

  Attributes:
    order: 'b t', place in causal order inside its segment, from 0. Causality,
      windows and decay read this.
    segments: 'b t', 0 for padding, 1.. for documents.
    positions: 'b t' or 'b t p', what position encodings read; `None` means
      `order`. May repeat; p > 1 for images, video and geometry.
    tags: name -> 'b t', what masks may read besides (prefix, frame, role).
    whole: it is known, before any array is looked at, that every row is one
      document, in its order, with padding behind it or none. Engines may then
      take a shorter way; who cuts or permutes the arrays takes it back.
  """

  order: PerToken
  segments: PerToken
  positions: Int[Array, 'b t'] | Int[Array, 'b t p'] | None = None
  tags: dict[str, PerToken] = dataclasses.field(default_factory=dict)
  whole: bool = dataclasses.field(default=False, metadata={'static': True})

  @classmethod
  def dense(cls, batch: int, length: int) -> 'Packing':
    """Every row one document without padding: what `packing=None` means."""
    order = jnp.broadcast_to(
      jnp.arange(length, dtype=jnp.int32), (batch, length)
    )
    return cls(order, jnp.ones_like(order))

  @classmethod
  def from_lengths(
    cls, lengths: PerRow, length: int, *, left: bool = False, start: PerRow = 0
  ) -> 'Packing':
    """One document a row, padded to `length`, on the right or on the left.

    `start` is the order of each row's first token: more than 0 when the row
    continues a document that a state has begun.
    """
    lengths = jnp.asarray(lengths, jnp.int32)[:, None]
    place = jnp.arange(length, dtype=jnp.int32)[None, :]
    place = (
      place - (length - lengths)
      if left
      else jnp.broadcast_to(place, (lengths.shape[0], length))
    )
    valid = (place >= 0) & (place < lengths)
    order = place + jnp.reshape(jnp.asarray(start, jnp.int32), (-1, 1))
    return cls(jnp.where(valid, order, 0), valid.astype(jnp.int32))

  @classmethod
  def from_segments(cls, segments: PerToken) -> 'Packing':
    """Documents by id, each in row order; 0 is padding. Ids need not touch."""
    segments = jnp.asarray(segments, jnp.int32)
    # A token's order is the number of earlier tokens with its id: a running
    # maximum finds where the id's run began, pads inside a run counted out.
    valid = segments > 0
    rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    seen = jax.lax.cummax(jnp.where(valid, segments, 0), axis=1)
    before = jnp.pad(seen[:, :-1], ((0, 0), (1, 0)))
    first = valid & (segments != before)
    begun = jax.lax.cummax(jnp.where(first, rank, 0), axis=1)
    return cls(jnp.where(valid, rank - begun, 0), segments)

  def validate(self) -> None:
    """Raises ValueError, with the row, if the rules above are broken."""
    order, segments = np.asarray(self.order), np.asarray(self.segments)
    if order.shape != segments.shape or order.ndim != 2:
      raise ValueError(
        f'order {order.shape} and segments {segments.shape} must both be '
        '(batch, time)'
      )
    if (segments < 0).any() or (order < 0).any():
      raise ValueError('segments and order must not be negative (0 is padding)')
    for row in range(order.shape[0]):
      valid = segments[row] > 0
      pairs = np.stack([segments[row][valid], order[row][valid]])
      if np.unique(pairs, axis=1).shape[1] != pairs.shape[1]:
        raise ValueError(
          f'row {row}: two tokens share a segment and an order; '
          'Packing.from_segments numbers them'
        )
      ids = np.unique(pairs[0])
      count = pairs.shape[1]
      if self.whole and (
        len(ids) > 1
        or not valid[:count].all()
        or (pairs[1] != np.arange(count)).any()
      ):
        raise ValueError(
          f'row {row} is not one document in its order with padding behind it,'
          ' as whole=True says'
        )
      for segment in ids[1:]:  # the first may continue what a state holds
        if pairs[1][pairs[0] == segment].min() != 0:
          raise ValueError(
            f'row {row}: segment {segment} does not start at order 0'
          )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Clock:
  """Where a stream stands: what `packing=None` continues from.

  Attributes:
    order: 'b', the order of the next token of the current segment.
    segment: 'b', the current segment; 0 before the first token.
  """

  order: PerRow
  segment: PerRow

  @classmethod
  def start(cls, batch: int) -> 'Clock':
    return cls(jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))

  def after(self, tokens: 'Tokens') -> 'Clock':
    """The clock once `tokens` have passed; rows of pads leave it alone."""
    segment = jnp.max(tokens.segments, axis=1, initial=0)
    in_it = tokens.segments == segment[:, None]
    order = jnp.max(jnp.where(in_it, tokens.order, -1), axis=1, initial=-1) + 1
    moved = segment > 0
    return Clock(
      jnp.where(moved, order, self.order),
      jnp.where(moved, segment, self.segment),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tokens:
  """A resolved Packing: what mechanisms read.

  `valid` and `starts` are `None` where it is known, before any array is looked
  at, that there are no pads and that no segment begins; engines then take
  their short way. For a fresh state every segment may be taken to begin.
  `dense` says that every row is one segment from order 0, with padding behind
  it or none: then the place of a token is its order, and orders need not be
  read. Who permutes the arrays takes it back.
  """

  order: PerToken
  segments: PerToken
  positions: Int[Array, 'b t'] | Int[Array, 'b t p']
  tags: dict[str, PerToken]
  valid: Flags | None
  starts: Flags | None
  dense: bool = dataclasses.field(default=False, metadata={'static': True})


def resolve(
  packing: Packing | None, clock: Clock | None, batch: int, length: int
) -> Tokens:
  """Fills in what a caller left out: the packing, its order, its positions."""
  if packing is None:
    packing = Packing.dense(batch, length)
    order, segments = packing.order, packing.segments
    if clock is not None:
      order = order + clock.order[:, None]
      segments = segments * jnp.maximum(clock.segment, 1)[:, None]
    return Tokens(order, segments, order, {}, None, None, clock is None)
  positions = packing.order if packing.positions is None else packing.positions
  valid = packing.segments > 0
  # A fresh state begins every row anyhow.
  begun = packing.whole and clock is None
  return Tokens(
    packing.order,
    packing.segments,
    positions,
    packing.tags,
    valid,
    None if begun else valid & (packing.order == 0),
    dense=begun,
  )
