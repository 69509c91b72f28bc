"""ALiBi: scores fall linearly with distance, at a slope of each head's own.

Press, Smith, Lewis 2021, "Train Short, Test Long",
https://arxiv.org/abs/2108.12409.

    x_ts - slope_h |t - s|,   slope_h = 2^(-8 (h + 1) / heads)

For head counts that are no power of two the slopes of the next lower one, and
every second of those of the next higher, as in the authors' code.
"""

import math

import jax.numpy as jnp
import numpy as np

from jaxattn.position import Position
from pallas_kernels.scores import Score, Slopes


def reference(params, order, heads, width):
  """The whole bias, 'h t s'."""
  del params, width
  far = np.abs(np.asarray(order)[:, None] - np.asarray(order)[None, :])
  return {'bias': -np.array(slopes(heads))[:, None, None] * far}


def slopes(heads: int) -> list[float]:
  """One slope a head."""
  power = 2 ** math.floor(math.log2(heads))
  own = [2 ** (-8 * (i + 1) / power) for i in range(power)]
  between = [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * power, 2)]
  return own + between[: heads - power]


class AlibiPosition(Position):
  """Subtracts a fixed multiple of the distance from each score."""

  scores = True

  def score(self, heads, causal):
    del causal  # what a mask hides needs no bias
    return Score(Slopes(), (jnp.array(slopes(heads), jnp.float32),))
