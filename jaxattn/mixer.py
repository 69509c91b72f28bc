"""Mixer: the boundary that every mechanism shares.

A mechanism writes `mix`; `Mixer.__call__` does the rest once for all of them:
it validates, resolves packing and state, makes pads exactly zero on the way in
and out, answers empty inputs, and moves the clock.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn.nn import Policy
from jaxattn.packing import Clock, Packing, Tokens, resolve
from jaxattn.parallel import place, sequence
from jaxattn.state import FullKV, Recompute, State
from jaxattn.typing import Array, Keys, PerToken, PyTree, Stream, Values


class Mixed(NamedTuple):
  """What a mixer answers: `y` 'b t m', and a State if one was asked for."""

  y: Stream
  state: State | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
  """What cross attention reads: an encoder's output and its packing.

  A query sees the context tokens of its own segment; a dense row is segment 1.
  """

  x: Stream
  packing: Packing | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ContextKV:
  """Keys and values of a context, computed once.

  The state that a cross-attention call returns holds one as its memory; it may
  stand wherever a Context may.
  """

  keys: Keys
  values: Values
  segments: PerToken


class Mixer(nn.Module):
  """Base of all mechanisms: y, state = mixer(x, packing, state=state).

  Subclasses define `mix`, and `memory` unless they are served by `Recompute`,
  which remembers the inputs and runs `mix` on all of them again.

  Attributes:
    width: m, the model width. None reads it off the input; `init_state` and
      checks before the first call need it.
    policy: dtypes, dropout, initialiser and kernel, shared with other layers.
  """

  width: int | None = None
  policy: Policy = Policy()

  causal = True  # a mechanism that can be both makes this a field
  reads_context = False  # True where `mix` does cross attention
  implementations = ('xla',)  # names that `policy.implementation` may take
  # How devices that each hold a part of time work together on `mix`; one that
  # attends may leave a choice to `policy.strategy`. If it may be any that
  # reaches every key (`sequence.FAR`), a FullKV is in parts as well.
  strategies = ('gather',)

  def __post_init__(self):
    if self.policy.implementation not in (None, *self.implementations):
      raise NotImplementedError(
        f'{type(self).__name__} has no'
        f' implementation={self.policy.implementation!r}, only'
        f' {", ".join(self.implementations)}: leave it out to have one chosen'
      )
    asked = self.policy.strategy
    attends = not sequence.STRATEGIES.keys().isdisjoint(self.strategies)
    if attends and asked not in (None, *self.strategies):
      raise NotImplementedError(
        f'{type(self).__name__} has no strategy={asked!r}, only'
        f' {", ".join(self.strategies)}: leave it out to have one chosen'
      )
    if self.width is not None:
      self.check(self.width)
    super().__post_init__()

  def check(self, width: int) -> None:
    """Raises ValueError if the fields cannot work at this width."""

  def mix(
    self,
    x: Stream,
    tokens: Tokens,
    memory: PyTree,
    context: Context | ContextKV | None,
    deterministic: bool,
  ) -> tuple[Stream, PyTree]:
    """The mechanism, under `nn.compact`: y 'b t m', and the memory after it.

    Args:
      x: 'b t m', zero where a token is a pad, t >= 1.
      tokens: where each token stands.
      memory: what `memory` makes or `mix` returned, or None if no state is
        kept; then the second result is not looked at.
      context: for cross attention.
      deterministic: False while training.
    """
    raise NotImplementedError(f'{type(self).__name__} does not define mix')

  def memory(self, batch: int, length: int, width: int, dtype: Any) -> PyTree:
    """An empty memory with room for `length` tokens."""
    return Recompute.empty(batch, length, width, dtype)

  def init_state(self, batch: int, max_length: int, dtype: Any = None) -> State:
    """The state of `batch` streams before their first token.

    Args:
      batch: number of rows.
      max_length: the most tokens that a row will ever hold; memories of fixed
        size do not depend on it.
      dtype: of cached activations; the policy's by default.
    """
    if not self.causal:
      raise ValueError(
        f'{type(self).__name__} is not causal, so it has no decoding state'
      )
    if self.width is None:
      raise ValueError(
        f'init_state needs the model width: {type(self).__name__}(width=...)'
      )
    dtype = self.policy.dtype if dtype is None else dtype
    memory = self._empty(batch, max_length, self.width, dtype)
    return place.state(State(Clock.start(batch), memory), batch)

  def _empty(self, batch, length, width, dtype) -> PyTree:
    """`memory`, dealt to devices where any of them may hold any key."""
    memory = self.memory(batch, length, width, dtype)
    if isinstance(memory, FullKV) and set(sequence.FAR) <= {*self.strategies}:
      memory = memory.striped(sequence.devices())
    return memory

  def __call__(
    self,
    x: Array,  # 'b t m'; another shape gets a message that says so
    packing: Packing | None = None,
    *,
    state: State | None = None,
    context: Context | ContextKV | None = None,
    return_state: bool = False,
    deterministic: bool = True,
  ) -> Mixed:
    """Mixes a chunk of a stream over time.

    Args:
      x: 'b t m'. t may be 0 or 1: a decoding step is a chunk of one token.
      packing: where each token stands; None means one dense segment that
        continues from the state.
      state: what earlier chunks left; None for the start of a stream.
      context: what cross attention reads.
      return_state: also return the state after this chunk. Without a `state` it
        has room for just these t tokens.
      deterministic: False while training (dropout, statistics).

    Returns:
      Mixed(y 'b t m', state or None). y is 0 at pads.

    Raises:
      ValueError: shapes that do not belong together; a state asked of a
            mechanism that is not causal.
    """
    self._validate(x, packing, state, return_state, context)
    batch, length, width = x.shape
    x = place.over_time(x.astype(self.policy.dtype))
    if isinstance(context, Context):
      context = place.rows(context, batch)
    if length == 0:
      if not self.is_initializing():
        return Mixed(x, self._kept(x, state, return_state))
      x, packing = jnp.zeros((batch, 1, width), x.dtype), None

    kept = place.state(self._kept(x, state, return_state), batch)
    packing = place.over_time(packing)
    tokens = resolve(packing, kept and kept.clock, batch, x.shape[1])
    tokens = place.over_time(tokens)
    x = _zero_pads(x, tokens)
    memory = None if kept is None else kept.memory
    if isinstance(memory, Recompute):
      y, memory = self._recompute(x, tokens, memory, context, deterministic)
    else:
      y, memory = self.mix(x, tokens, memory, context, deterministic)
    y = _zero_pads(y, tokens)
    if length == 0:
      y = y[:, :0]
    if not return_state:
      return Mixed(y, None)
    return Mixed(y, State(kept.clock.after(tokens), memory))

  def _kept(self, x, state, return_state) -> State | None:
    """The state to start from: the caller's, or a new one if he wants it."""
    if state is not None or not return_state:
      return state
    batch, length, width = x.shape
    memory = None
    if self.causal:
      memory = self._empty(batch, length, width, self.policy.dtype)
    return State(Clock.start(batch), memory)

  def _recompute(self, x, tokens, memory, context, deterministic):
    """Runs `mix` on all that was ever read, and picks the new outputs."""
    memory, slots = sequence.rows(
      lambda memory, x, tokens: memory.extend(x, tokens), memory, x, tokens
    )
    y, _ = self.mix(
      *place.over_time((memory.inputs.astype(x.dtype), memory.tokens())),
      None,
      context,
      deterministic,
    )
    pick = lambda row, at: row.at[at].get(mode='fill', fill_value=0)
    return place.over_time(sequence.rows(jax.vmap(pick), y, slots)), memory

  def _validate(self, x, packing, state, return_state, context) -> None:
    name = type(self).__name__
    if x.ndim != 3:
      raise ValueError(f'{name}: x must be (batch, time, width), not {x.shape}')
    if self.width is None:
      self.check(x.shape[-1])
    elif x.shape[-1] != self.width:
      raise ValueError(
        f'{name}: x has width {x.shape[-1]}, but the mixer width={self.width}'
      )
    if context is not None and not self.reads_context:
      raise ValueError(f'{name} takes no context: it has no cross attention')
    if (state is not None or return_state) and not (self.causal or context):
      raise ValueError(f'{name} is not causal, so it has no decoding state')
    if state is not None and state.clock.order.shape[0] != x.shape[0]:
      raise ValueError(
        f'{name}: {x.shape[0]} rows of x, but a state of '
        f'{state.clock.order.shape[0]}'
      )
    if packing is not None:
      if packing.segments.shape != x.shape[:2]:
        raise ValueError(
          f'{name}: packing is for (batch, time) = {packing.segments.shape}, '
          f'x is {x.shape[:2]}'
        )
      if not isinstance(packing.order, jax.core.Tracer):
        packing.validate()


def _zero_pads(x: Array, tokens: Tokens) -> Array:
  """Exactly zero at pads, whatever stands there: NaN cannot leak."""
  if tokens.valid is None:
    return x
  return jnp.where(tokens.valid[..., None], x, 0)
