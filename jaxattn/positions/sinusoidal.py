"""Sinusoidal positions, added to the input.

Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.5.

    pe_{p, 2i} = sin(p / 10000^(2i / m))
    pe_{p, 2i+1} = cos(p / 10000^(2i / m))
"""

import jax.numpy as jnp
import numpy as np

from jaxattn.position import Position


def reference(params, order, heads, width, base=10_000.0):
  """The formula, number by number."""
  del params, heads
  table = np.zeros((len(order), width))
  for p, position in enumerate(np.asarray(order)):
    for c in range(width):
      angle = position / base ** (2 * (c // 2) / width)
      table[p, c] = np.sin(angle) if c % 2 == 0 else np.cos(angle)
  return {'add': table}


class SinusoidalPosition(Position):
  """Adds sines and cosines of the position.

  Attributes:
    base: the longest wavelength is 2 pi base tokens.
  """

  base: float = 10_000.0

  def add(self, x, positions):
    width = x.shape[-1]
    rates = self.base ** (-2 * (np.arange(width) // 2) / width)
    # Angles grow with the position: narrower than float32 they lose the phase.
    angles = positions[..., None] * rates.astype(jnp.result_type(float))
    even = np.arange(width) % 2 == 0
    return x + jnp.where(even, jnp.sin(angles), jnp.cos(angles)).astype(x.dtype)
