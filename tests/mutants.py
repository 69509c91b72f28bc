"""Mixers that are broken on purpose: one law each must reject them.

A law that no mutant fails is not a law. Each is a sound mechanism with one
mistake of a kind that users of other libraries have met.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn import registry
from jaxattn.packing import Packing
from jaxattn.state import RollingKV

GATED = type(registry.make('gated_linear'))
ATTENTION = type(registry.make('multi_head'))
WINDOW = type(registry.make('sliding_window'))


class WrongScale(ATTENTION):
  """Scores scaled by d^-1/2 twice, as when two layers each do it."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    return super().mix(0.7 * x, tokens, memory, context, deterministic)


class ZeroGradient(GATED):
  """A stop_gradient left in: values are right, training is not."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    frozen = x + 0.3 * (jax.lax.stop_gradient(x) - x)
    return super().mix(frozen, tokens, memory, context, deterministic)


class Peeks(GATED):
  """Sees one token ahead, as an off-by-one in a mask does."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    ahead = jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1)
    x = x + 1e-3 * ahead
    return super().mix(x, tokens, memory, context, deterministic)


class PeeksThroughNorm(ATTENTION):
  """Normalises over time: a leak that is tiny for each single token."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    x = x - 1e-4 * jnp.mean(x, axis=1, keepdims=True)
    return super().mix(x, tokens, memory, context, deterministic)


class DropsState(GATED):
  """Starts every chunk afresh."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    fresh = jax.tree.map(jnp.zeros_like, memory)
    return super().mix(x, tokens, fresh, context, deterministic)


class KeepsOldState(ATTENTION):
  """Reads the state, but does not write this chunk into it."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    y, _ = super().mix(x, tokens, memory, context, deterministic)
    return y, memory


class NoGradientThroughState(GATED):
  """Truncates back-propagation at every chunk."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    memory = jax.tree.map(jax.lax.stop_gradient, memory)
    return super().mix(x, tokens, memory, context, deterministic)


class ForgetsOrder(ATTENTION):
  """Counts positions from the start of the chunk, not of the stream."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    restart = jnp.broadcast_to(jnp.arange(x.shape[1]), tokens.order.shape)
    tokens = dataclasses.replace(tokens, positions=restart)
    return super().mix(x, tokens, memory, context, deterministic)


class ShortRing(WINDOW):
  """Keeps two keys of the three that a window of four looks back on."""

  def memory(self, batch, length, width, dtype):
    d = width // self.heads
    return RollingKV.empty(batch, 2, self.sinks, self.heads, d, d, dtype)


class IgnoresPads(GATED):
  """Lets pads into the recurrence, though they are zero."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    tokens = dataclasses.replace(tokens, valid=None)
    return super().mix(x, tokens, memory, context, deterministic)


class AttendsToPads(ATTENTION):
  """Puts pads into a segment of their own, in which they see each other."""

  def __call__(self, x, packing=None, **kw):
    if packing is not None:
      x = jnp.nan_to_num(x)
      packing = Packing(packing.order, jnp.maximum(packing.segments, 1))
    return super().__call__(x, packing, **kw)


class IgnoresStarts(GATED):
  """Carries the state from one document into the next."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    tokens = dataclasses.replace(tokens, starts=None)
    return super().mix(x, tokens, memory, context, deterministic)


class IgnoresSegments(ATTENTION):
  """Masks pads, but lets documents of a row attend to each other."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    one = jnp.minimum(tokens.segments, 1)
    tokens = dataclasses.replace(tokens, segments=one)
    return super().mix(x, tokens, memory, context, deterministic)


class MixesRows(GATED):
  """Normalises over the batch."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    x = x - 1e-3 * jnp.mean(x, axis=0, keepdims=True)
    return super().mix(x, tokens, memory, context, deterministic)


# Law -> the mutants that it must reject.
MUTANTS = {
  'reference': (WrongScale, ZeroGradient),
  'causality': (Peeks, PeeksThroughNorm),
  'segmentation': (
    DropsState,
    KeepsOldState,
    NoGradientThroughState,
    ForgetsOrder,
    ShortRing,
  ),
  'padding': (IgnoresPads, AttendsToPads),
  'packing': (IgnoresStarts, IgnoresSegments),
  'batch': (MixesRows,),
}
