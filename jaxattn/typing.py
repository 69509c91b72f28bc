"""The legend of axis letters, and the array types that annotations use.

One letter, one meaning, in annotations and in einsums alike:

    b  batch            h  query heads          d  query and key width
    t  query time       k  key and value heads  e  value width
    s  key time         g  queries per key head m  model width
    c  chunk            w  window               n  state size
    r  rank             l  latents              p  position axes

Public order is always `b t h d`. Shapes stand in annotations, never in names.
They are checked at run time under pytest only (see tests/conftest.py).
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Bool, Complex, Float, Int, Shaped

Stream = Float[Array, 'b t m']  # what flows between layers
Queries = Float[Array, 'b t h d']
Keys = Float[Array, 'b s k d']
Values = Float[Array, 'b s k e']
Heads = Float[Array, 'b t h e']  # what a mechanism reads out, head by head
PerToken = Int[Array, 'b t']  # order, segments, tags, token ids
Flags = Bool[Array, 'b t']
PerRow = Int[Array, 'b']
Matrices = Float[Array, 'b h d e']  # matrix-valued states

PyTree = Any
Initializer = Callable[..., Array]

__all__ = [
  'Array',
  'Bool',
  'Complex',
  'Flags',
  'Float',
  'Heads',
  'Initializer',
  'Int',
  'Keys',
  'Matrices',
  'PerRow',
  'PerToken',
  'PyTree',
  'Queries',
  'Shaped',
  'Stream',
  'Values',
]
