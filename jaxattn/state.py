"""Decoding states: fixed shapes, so that they live inside jit.

A `State` is a `Clock` (where the stream stands) and a mechanism's memory of it.
Every leaf leads with the batch, so that beam search reorders a state with
`jax.tree.map(lambda a: a[beams], state)`, and a stack of layers scans over a
leading axis of layers. Pads are never written, so a memory's capacity counts
real tokens.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxattn.packing import Clock, Tokens
from jaxattn.typing import (
  Array,
  Float,
  Keys,
  Matrices,
  PerRow,
  PerToken,
  PyTree,
  Values,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
  """What a mixer carries from one call to the next.

  Attributes:
    clock: the order and segment that the stream has reached.
    memory: what the mechanism keeps, one of the classes below or several.
  """

  clock: Clock
  memory: PyTree


def nbytes(state: PyTree) -> int:
  """Bytes that a state holds; works on arrays and on their shapes alike."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _rank(tokens: Tokens) -> PerToken:
  """How many real tokens of the row stand before each token."""
  if tokens.valid is None:
    return jnp.broadcast_to(
      jnp.arange(tokens.order.shape[1], dtype=jnp.int32), tokens.order.shape
    )
  return jnp.cumsum(tokens.valid, axis=1, dtype=jnp.int32) - 1


def _count(tokens: Tokens) -> PerRow:
  """How many real tokens each row brings."""
  if tokens.valid is None:
    return jnp.full_like(tokens.order[:, 0], tokens.order.shape[1])
  return jnp.sum(tokens.valid, axis=1, dtype=jnp.int32)


def _write(buffer: Array, slots: PerToken, new: Array) -> Array:
  """Writes each token of a row into its slot; slots past the end drop."""
  put = lambda row, at, what: row.at[at].set(what, mode='drop')
  return jax.vmap(put)(buffer, slots, new.astype(buffer.dtype))


class Seen(NamedTuple):
  """What the queries of a chunk may look at, as a cache gives it.

  Attributes:
    keys: 'b s k d'; values: 'b s k e'.
    order: 'b s'; segments: 'b s', 0 where there is nothing.
    positions: 'b s', or None if the cache keeps none.
  """

  keys: Keys
  values: Values
  order: PerToken
  segments: PerToken
  positions: PerToken | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FullKV:
  """Every key and value so far.

  A stream's tokens take slots in the order in which they come. Slots may lie
  striped, for as many devices to hold the same number of keys each, whatever
  the length: the arrays are then `stripes` parts, one behind the other, and
  slot i is number i // stripes of part i % stripes. Where each key stands is
  data (`order`, `segments`), so a reader attends to them as they lie.

  Attributes:
    keys: 'b s k d'.
    values: 'b s k e'.
    order: 'b s'; segments: 'b s', 0 where a slot is empty.
    positions: 'b s', for encodings that score distances; else None.
    used: 'b', how many slots are taken.
    stripes: parts that slots are dealt to in turn (static); None where a reader
      wants all of them on each device. Wherever a state goes, its slots stay
      where they are, and so does this number.
  """

  keys: Keys
  values: Values
  order: PerToken
  segments: PerToken
  positions: PerToken | None
  used: PerRow
  stripes: int | None = dataclasses.field(
    default=None, metadata={'static': True}
  )

  @classmethod
  def empty(
    cls, batch, length, heads, width, value_width, dtype, positions=False
  ) -> 'FullKV':
    slots = jnp.zeros((batch, length), jnp.int32)
    return cls(
      jnp.zeros((batch, length, heads, width), dtype),
      jnp.zeros((batch, length, heads, value_width), dtype),
      slots,
      slots,
      slots if positions else None,
      jnp.zeros(batch, jnp.int32),
    )

  def striped(self, stripes: int) -> 'FullKV':
    """An empty memory with its slots dealt to so many parts of one length."""
    fill = -self.keys.shape[1] % stripes
    pad = lambda x: jnp.pad(x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2))
    longer = jax.tree.map(lambda x: pad(x) if x.ndim > 1 else x, self)
    return dataclasses.replace(longer, stripes=stripes)

  def read(self, keys, values, tokens, part=None) -> tuple[Seen, 'FullKV']:
    """What a chunk's queries may see, and the memory with the chunk in it."""
    after = self.extend(keys, values, tokens, part)
    seen = Seen(
      after.keys, after.values, after.order, after.segments, after.positions
    )
    return seen, after

  def extend(
    self, keys: Keys, values: Values, tokens: Tokens, part=None
  ) -> 'FullKV':
    """Appends the real tokens. What exceeds the capacity is dropped.

    Args:
      keys, values: of the chunk, 'b t k d' and 'b t k e'.
      tokens: where they stand.
      part: which of the stripes the arrays are, where a device holds no other;
        None where they are all.
    """
    slots = self.used[:, None] + _rank(tokens)
    slots = self._places(slots, tokens.valid, part)
    return FullKV(
      _write(self.keys, slots, keys),
      _write(self.values, slots, values),
      _write(self.order, slots, tokens.order),
      _write(self.segments, slots, tokens.segments),
      _write_positions(self.positions, slots, tokens),
      self.used + _count(tokens),
      self.stripes,
    )

  def _places(self, slots, valid, part):
    """Where slots lie in the arrays; past their end, where nowhere."""
    size = self.keys.shape[1]
    if (self.stripes or 1) > 1:
      owner, slots = slots % self.stripes, slots // self.stripes
      if part is None:
        room = size // self.stripes
        slots = jnp.where(slots < room, owner * room + slots, size)
      else:
        slots = jnp.where(owner == part, slots, size)
    return slots if valid is None else jnp.where(valid, slots, size)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RollingKV:
  """The last `window` keys and values, and the first `sinks` of the segment.

  The window is a ring: token number n of the stream lies in slot n % window.
  Where each key stands is data (`order`, `segments`), so a reader attends to
  the slots as they lie and a mask sorts them out. A read comes before the
  write: the queries of a chunk see the ring as it was, and the chunk itself.

  Attributes:
    keys: 'b s k d' with s = sinks + window; values: 'b s k e'.
    order, segments: 'b s', segments 0 where a slot is empty.
    positions: 'b s', for encodings that score distances; else None.
    used: 'b', how many tokens the stream has brought.
    window: size of the ring (static).
  """

  keys: Keys
  values: Values
  order: PerToken
  segments: PerToken
  positions: PerToken | None
  used: PerRow
  window: int = dataclasses.field(metadata={'static': True})

  @classmethod
  def empty(
    cls, batch, window, sinks, heads, width, value_width, dtype, positions=False
  ) -> 'RollingKV':
    size = sinks + window
    slots = jnp.zeros((batch, size), jnp.int32)
    return cls(
      jnp.zeros((batch, size, heads, width), dtype),
      jnp.zeros((batch, size, heads, value_width), dtype),
      slots,
      slots,
      slots if positions else None,
      jnp.zeros(batch, jnp.int32),
      window,
    )

  def read(self, keys, values, tokens) -> tuple[Seen, 'RollingKV']:
    """What a chunk's queries may see, and the memory with the chunk in it."""
    join = lambda old, new: jnp.concatenate(
      [old, new.astype(old.dtype)], axis=1
    )
    positions = None
    if self.positions is not None:
      positions = join(self.positions, tokens.positions)
    seen = Seen(
      join(self.keys, keys),
      join(self.values, values),
      join(self.order, tokens.order),
      join(self.segments, tokens.segments),
      positions,
    )
    return seen, self.extend(keys, values, tokens)

  def extend(self, keys: Keys, values: Values, tokens: Tokens) -> 'RollingKV':
    """Writes the chunk's last `window` real tokens, and the sinks in it."""
    slots_in_all = self.keys.shape[1]
    sinks = slots_in_all - self.window
    count = _count(tokens)
    rank = _rank(tokens)
    # Only the last segment can be continued, so only its sinks are kept. They
    # have slots of their own and stay out of the ring: no key lies twice.
    last = jnp.max(tokens.segments, axis=1, keepdims=True, initial=1)
    sink = (tokens.segments == last) & (tokens.order < sinks)
    stays = (tokens.segments > 0) & (rank >= count[:, None] - self.window)
    ring = sinks + (self.used[:, None] + rank) % self.window
    slots = jnp.where(stays, ring, slots_in_all)
    slots = jnp.where(sink, tokens.order, slots)
    return RollingKV(
      _write(self.keys, slots, keys),
      _write(self.values, slots, values),
      _write(self.order, slots, tokens.order),
      _write(self.segments, slots, tokens.segments),
      _write_positions(self.positions, slots, tokens),
      self.used + count,
      self.window,
    )


def _write_positions(buffer, slots, tokens):
  return None if buffer is None else _write(buffer, slots, tokens.positions)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MatrixState:
  """One matrix a head, as linear attention and the delta rule keep.

  Attributes:
    matrix: 'b h d e', float32 or wider: it is a sum over the whole past.
  """

  matrix: Matrices

  @classmethod
  def empty(cls, batch, heads, width, value_width, dtype) -> 'MatrixState':
    dtype = jnp.promote_types(dtype, jnp.float32)
    return cls(jnp.zeros((batch, heads, width, value_width), dtype))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VectorState:
  """One vector a channel, as diagonal state spaces keep.

  Attributes:
    vector: 'b m n', complex64 or wider.
  """

  vector: Array

  @classmethod
  def empty(cls, batch, width, size, dtype) -> 'VectorState':
    dtype = jnp.promote_types(dtype, jnp.complex64)
    return cls(jnp.zeros((batch, width, size), dtype))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ConvTail:
  """The last tokens before a short convolution.

  Attributes:
    tail: 'b w-1 m', oldest first; zeros before the segment's first token.
  """

  tail: Float[Array, 'b w m']

  @classmethod
  def empty(cls, batch, taps, width, dtype) -> 'ConvTail':
    return cls(jnp.zeros((batch, taps - 1, width), dtype))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recompute:
  """The inputs themselves: for causal mechanisms with no state of their own.

  `Mixer` writes the new tokens behind the old ones, runs the mechanism on all
  of them, and reads the new outputs back.

  Attributes:
    inputs: 'b s m'; order, segments: 'b s', segments 0 where a slot is empty.
    positions: 'b s' or 'b s p'; used: 'b', how many slots are taken.
  """

  inputs: Float[Array, 'b s m']
  order: PerToken
  segments: PerToken
  positions: Array
  used: PerRow

  @classmethod
  def empty(cls, batch, length, width, dtype) -> 'Recompute':
    whole = jnp.zeros((batch, length), jnp.int32)
    return cls(
      jnp.zeros((batch, length, width), dtype),
      whole,
      whole,
      whole,
      jnp.zeros(batch, jnp.int32),
    )

  def extend(self, inputs, tokens: Tokens) -> tuple['Recompute', PerToken]:
    """The longer memory, and the slot in which each new token lies."""
    capacity = self.inputs.shape[1]
    slots = self.used[:, None] + _rank(tokens)
    if tokens.valid is not None:
      slots = jnp.where(tokens.valid, slots, capacity)
    memory = Recompute(
      _write(self.inputs, slots, inputs),
      _write(self.order, slots, tokens.order),
      _write(self.segments, slots, tokens.segments),
      _write(self.positions, slots, tokens.positions),
      self.used + _count(tokens),
    )
    return memory, slots

  def tokens(self) -> Tokens:
    """The packing of everything remembered; empty slots are pads."""
    valid = self.segments > 0
    return Tokens(
      self.order,
      self.segments,
      self.positions,
      {},
      valid,
      valid & (self.order == 0),
    )
