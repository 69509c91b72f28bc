"""Rotary position embedding: scores that depend on distance alone.

Su et al. 2021, https://arxiv.org/abs/2104.09864. Channel pair i of a query or
key at position p turns by p / base^(2i / d); the dot product of two turned
vectors depends on the difference of their positions.
"""

import jax.numpy as jnp

from jaxattn.core import rope
from jaxattn.position import Position


def reference(params, order, heads, width, base=10_000.0):
  """Pairs (i, i + d/2) as complex numbers, turned; for whole heads."""
  del params, heads, width

  def rotate(x):
    first, second = jnp.split(x, 2, axis=-1)
    half = first.shape[-1]
    angle = order[:, None] / base ** (jnp.arange(half, dtype=x.dtype) / half)
    turned = (first + 1j * second) * jnp.exp(1j * angle)[:, None, :]
    return jnp.concatenate([turned.real, turned.imag], axis=-1)

  return {'rotate': rotate}


class RopePosition(Position):
  """Rotates queries and keys.

  Attributes:
    base: the longest wavelength is about 2 pi base tokens.
    width: how many of the first channels turn; None means all.
  """

  base: float = 10_000.0
  width: int | None = None

  def check(self, head_dim):
    width = head_dim if self.width is None else self.width
    if width % 2 or not 0 < width <= head_dim:
      raise ValueError(
        f'rope turns pairs of channels: width={width} must be even and at most '
        f'the width of the heads, {head_dim}; choose another number of heads, '
        "or position='none'"
      )

  def rotate(self, x, positions):
    return rope.rotate(x, positions, base=self.base, width=self.width)
