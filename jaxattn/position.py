"""Position: what position encodings may change, and the base of them all."""

import flax.linen as nn

from jaxattn.nn import Policy
from jaxattn.typing import Array, Stream
from pallas_kernels.scores import Score


class Position(nn.Module):
  """Changes nothing. An encoding overrides any of `add`, `rotate`, `score`.

  Encodings read `Tokens.positions`, never a place in an array.
  """

  policy: Policy = Policy()

  scores = False  # True where `score` answers: caches then keep positions

  def check(self, head_dim: int) -> None:
    """Raises ValueError if the fields cannot work on heads of this width."""

  def add(self, x: Stream, positions: Array) -> Stream:
    """The input 'b t m' of a mechanism, at `positions` 'b t'."""
    del positions
    return x

  def rotate(self, x: Array, positions: Array) -> Array:
    """Queries or keys 'b t h d' at `positions` 'b t', as scores see them."""
    del positions
    return x

  def score(self, heads: int, causal: bool) -> Score | None:
    """What happens to the scores of each head."""
    del heads, causal
    return None
