"""No position encoding: what a causal mask alone tells about places.

Haviv et al. 2022, https://arxiv.org/abs/2203.16634: causal models without
position encodings learn places from the mask.
"""

from dataclasses import dataclass

from jaxattn.typing import Array


@dataclass(frozen=True)
class NonePosition:
  """Leaves queries and keys as they are."""

  def rotate(self, x: Array, positions: Array) -> Array:
    """Queries or keys 'b t h d' at `positions` 'b t', as scores see them."""
    del positions
    return x
