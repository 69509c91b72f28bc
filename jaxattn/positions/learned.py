"""Learned absolute positions, added to the input.

Gehring et al. 2017, https://arxiv.org/abs/1705.03122; as in GPT-2 and BERT.
"""

import flax.linen as nn
import jax.numpy as jnp

from jaxattn.parallel import place, sequence
from jaxattn.position import Position


def reference(params, order, heads, width):
  """The row of each position."""
  del heads, width
  return {'add': params['table'][order]}


class LearnedPosition(Position):
  """Adds a learned vector for each position.

  Attributes:
    length: positions that have a vector. A chunk longer than this is an error;
      a position beyond it, met while decoding, gives NaN rather than the
      vector of another position.
  """

  length: int = 2048

  @nn.compact
  def add(self, x, positions):
    # For devices to share them, rows are filled up with so many pads at most.
    devices = sequence.devices()
    pads = 2 * devices - 1 if devices > 1 else 0
    if self.is_initializing():
      pads = 0
    if x.shape[1] - pads > self.length:
      raise ValueError(
        f'learned positions: {x.shape[1]} tokens, but length={self.length}'
      )
    table = self.param(
      'table',
      nn.initializers.normal(0.02),
      (self.length, x.shape[-1]),
      self.policy.param_dtype,
    )
    look_up = lambda at, table: jnp.take(
      table, at, axis=0, mode='fill', fill_value=jnp.nan
    )
    rows = sequence.run(look_up, positions, weights=(place.whole(table),))
    return x + rows.astype(x.dtype)
