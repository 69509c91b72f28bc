"""What may happen to a score between the dot product and the softmax.

A modification is a function of the score, of where query and key stand, and of
operands that are spelled out: arrays per head, which so get gradients. It is
computed tile by tile, from data that travels with the tokens; no bias of t x s
is ever made.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn.core.masks import Side

POSITION = 'position'  # the tag that holds a token's position, if not its order


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Score:
  """A modification of scores.

  Attributes:
    fn: (x, query, key, *operands) -> x, for scores x `b h t s` and two `Side`s
      whose arrays are `b 1 t 1` and `b 1 1 s`. Hashable, so a function of a
      module or a frozen dataclass, and differentiable by JAX.
    operands: arrays that lead with the heads, `h ...`.
  """

  fn: Callable[..., Any] = dataclasses.field(metadata={'static': True})
  operands: tuple = ()


def distance(query: Side, key: Side) -> jax.Array:
  """How far the key lies behind the query, in positions; negative if ahead."""
  place = lambda side: (side.tags or {}).get(POSITION, side.order)
  return place(query) - place(key)


@dataclasses.dataclass(frozen=True)
class SoftCap:
  """cap tanh(x / cap): scores stay within the cap (Gemma 2)."""

  cap: float

  def __call__(self, x, query, key):
    return self.cap * jnp.tanh(x / self.cap)


@dataclasses.dataclass(frozen=True)
class Slopes:
  """x - slope_h |distance|, with the slopes 'h' as operand (ALiBi)."""

  def __call__(self, x, query, key, slopes):
    far = jnp.abs(distance(query, key))
    return x - slopes[:, None, None].astype(x.dtype) * far.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Buckets:
  """x + table_h[bucket(distance)], with the table 'h n' as operand (T5).

  Half of the buckets are single distances; the others grow with the logarithm
  of the distance up to `furthest`, and the last holds all beyond. Without
  `causal` half of all buckets are for keys ahead.
  """

  furthest: int
  causal: bool

  def __call__(self, x, query, key, table):
    number = bucket(
      distance(query, key), table.shape[1], self.furthest, self.causal
    )
    bias = jnp.take(table.astype(x.dtype), number[:, 0], axis=1)  # 'h b t s'
    return x + jnp.moveaxis(bias, 0, 1)


def bucket(behind, buckets: int, furthest: int, causal: bool) -> jax.Array:
  """The bucket of each distance, in [0, buckets)."""
  if causal:
    first, far = 0, jnp.maximum(behind, 0)
  else:
    buckets //= 2
    first, far = jnp.where(behind < 0, buckets, 0), jnp.abs(behind)
  exact = buckets // 2
  # The bounds are integers, worked out here: a logarithm in float32 would put
  # a distance into another bucket on another device.
  ratio = furthest / exact
  bounds = [
    math.ceil(exact * ratio ** (i / (buckets - exact)) - 1e-9)
    for i in range(1, buckets - exact)
  ]
  above = sum((far >= bound).astype(jnp.int32) for bound in bounds)
  return first + jnp.where(far < exact, far, exact + above)
