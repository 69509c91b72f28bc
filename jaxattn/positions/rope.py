"""Rotary position embedding: scores that depend on distance alone.

Su et al. 2021, https://arxiv.org/abs/2104.09864. Channel pair i of a query or
key at position p turns by p / base^(2i / d); the dot product of two turned
vectors depends on the difference of their positions.
"""

from dataclasses import dataclass

from jaxattn.core import rope
from jaxattn.typing import Array


@dataclass(frozen=True)
class RopePosition:
  """Rotates queries and keys.

  Attributes:
    base: the longest wavelength is about 2 pi base tokens.
    width: how many of the first channels turn; None means all.
  """

  base: float = 10_000.0
  width: int | None = None

  def rotate(self, x: Array, positions: Array) -> Array:
    """Queries or keys 'b t h d' at `positions` 'b t', as scores see them."""
    return rope.rotate(x, positions, base=self.base, width=self.width)
