"""Mixers that are broken on purpose: one law each must reject them.

A law that no mutant fails is not a law. Each is a sound mechanism with one
mistake of a kind that users of other libraries have met.
"""

import dataclasses
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import registry
from jaxattn.packing import Packing
from jaxattn.parallel import mesh as meshes
from jaxattn.parallel import place
from jaxattn.state import RollingKV
from tests import laws

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


class ReadsTheArray(ATTENTION):
  """Takes a token's place in the array for its place in the text."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    index = jnp.broadcast_to(jnp.arange(x.shape[1]), tokens.order.shape)
    tokens = dataclasses.replace(tokens, order=index)
    return super().mix(x, tokens, memory, context, deterministic)


class FewBits(ATTENTION):
  """Rounds to fewer bits than bfloat16 has."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    if x.dtype == jnp.bfloat16:
      x = x.astype(jnp.float8_e4m3fn).astype(x.dtype)
    return super().mix(x, tokens, memory, context, deterministic)


class HalfGradients(ATTENTION):
  """Weights kept in bfloat16 on the way to the gradient."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    y, memory = super().mix(x, tokens, memory, context, deterministic)
    gain = self.param('gain', nn.initializers.ones, (1,), x.dtype)
    return y * gain, memory


class DropsTheRemainder(GATED):
  """Serves whole pairs of tokens only."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    y, memory = super().mix(x, tokens, memory, context, deterministic)
    return y.at[:, x.shape[1] // 2 * 2 :].set(0), memory


class Loud(GATED):
  """Starts at six times the scale that it should."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    y, memory = super().mix(x, tokens, memory, context, deterministic)
    return 10 * y, memory


class NeverLearns(GATED):
  """A weight that no gradient reaches."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    gain = self.param('gain', nn.initializers.ones, x.shape[-1:])
    x = x * jax.lax.stop_gradient(gain)
    return super().mix(x, tokens, memory, context, deterministic)


class DenseMask(ATTENTION):
  """Makes a mask of t x s on the host."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    length = x.shape[1]
    mask = np.tri(length, dtype=bool)
    x = x * mask[-1][:, None]
    return super().mix(x, tokens, memory, context, deterministic)


class ForgetsItsNeighbour(GATED):
  """Starts afresh on every device that time is spread over."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    mesh = meshes.current()
    if mesh is not None:
      part = x.shape[1] // mesh.shape[meshes.SEQ]
      first = jnp.broadcast_to(jnp.arange(x.shape[1]) % part == 0, x.shape[:2])
      first = place.rows(first, x.shape[0])
      tokens = dataclasses.replace(tokens, starts=first)
    return super().mix(x, tokens, memory, context, deterministic)


class NoGradientAcross(GATED):
  """Cuts the gradient where time crosses devices."""

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    if meshes.current() is not None:
      x = x + 0.3 * (jax.lax.stop_gradient(x) - x)
    return super().mix(x, tokens, memory, context, deterministic)


class SaysLess(GATED):
  """Keeps more than its Spec says."""

  def memory(self, batch, length, width, dtype):
    memory = super().memory(batch, length, width, dtype)
    return memory | {'more': jnp.zeros((batch, 1))}


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
  'layout': (ReadsTheArray,),
  'bfloat16': (FewBits, HalfGradients),
  'lengths': (DropsTheRemainder,),
  'initial': (Loud, NeverLearns),
  'tracing': (DenseMask,),
  'sharding': (ForgetsItsNeighbour, NoGradientAcross),
  'state_bytes': (SaysLess,),
}
FIELDS = {
  ATTENTION: {'heads': 2, 'position': 'rope'},
  GATED: {'heads': 2, 'rank': 4},
  WINDOW: {'heads': 2, 'window': 4},
}


def subject(mutant) -> laws.Subject:
  """A mutant under the laws of the mechanism that it breaks."""
  sound = mutant.__mro__[1]
  module = sys.modules[sound.__module__]
  return laws.Subject(mutant, module, FIELDS[sound], module.SPEC)
