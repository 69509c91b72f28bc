"""Attention to some of the keys, and how two such results become one.

Milakov, Gimelshein 2018, "Online normalizer calculation for softmax",
https://arxiv.org/abs/1805.02867.

A query that has read some keys, with scores x_j and values v_j, remembers

  m = max_j x_j,   l = sum_j exp(x_j - m),   o = sum_j exp(x_j - m) v_j.

Two such triples over disjoint sets of keys merge into that of their union, so
keys may be read in any order, in blocks, on many devices. In the end o / l is
the attention and m + log l the log-sum-exp (lse) of the scores.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.problem import Monoid


class Partial(NamedTuple):
  """Attention to some of the keys; (-inf, 0, 0) is attention to none.

  (m, l, o) and (m + c, l exp(-c), o exp(-c)) mean the same. All functions here
  respect that; so they may hold m constant in a gradient, which loses nothing.
  """

  m: jax.Array  # b t h: a reference for the scores, to keep exp in range
  l: jax.Array  # b t h: sum of exp(score - m)  # noqa: E741
  o: jax.Array  # b t h e: sum of exp(score - m) value


def merge(x: Partial, y: Partial) -> Partial:
  """Attention to the keys of both: associative, commutative, -inf-safe."""
  m = lax.stop_gradient(jnp.maximum(x.m, y.m))
  reference = finite(m)
  x_share = jnp.exp(x.m - reference)
  y_share = jnp.exp(y.m - reference)
  return Partial(
    m=m,
    l=x_share * x.l + y_share * y.l,
    o=x_share[..., None] * x.o + y_share[..., None] * y.o,
  )


def total(partial: Partial, axis: str) -> Partial:
  """Attention to the keys of all devices along a mesh axis, each having some.

  With M the largest m of all devices, each rescales to what it would have with
  M for a reference, (M, l exp(m - M), o exp(m - M)). Of partials with the same
  m, `merge` is the sum of l and of o. It is associative, so its fold over
  devices is one pmax and two psums, of whatever number of devices.
  """
  own = lax.stop_gradient(partial.m)
  m = lax.pmax(own, axis)
  share = jnp.exp(own - finite(m))
  return Partial(
    m=m,
    l=lax.psum(share * partial.l, axis),
    o=lax.psum(share[..., None] * partial.o, axis),
  )


def finish(partial: Partial) -> tuple[jax.Array, jax.Array]:
  """Attention `b t h e`, and the log-sum-exp of the scores `b t h`.

  A query that saw no key has o = 0, lse = -inf and no gradient.
  """
  m, total, o = partial
  unseen = total == 0
  total = jnp.where(unseen, 1, total)
  lse = jnp.where(unseen, -jnp.inf, finite(m) + jnp.log(total))
  return jnp.where(unseen[..., None], 0, o / total[..., None]), lse


def opened(o: jax.Array, m: jax.Array, l: jax.Array) -> Partial:  # noqa: E741
  """What `finished` makes of a Partial as one again."""
  return Partial(m, l, l[..., None] * o)


def finished(partial: Partial) -> tuple[jax.Array, jax.Array, jax.Array]:
  """o as in `finish`, m and l: what a gradient needs."""
  return finish(partial)[0], partial.m, partial.l


def nothing(q: jax.Array, v: jax.Array) -> Partial:
  """Attention of q 'b t h d' to none of the keys."""
  total = jnp.zeros_like(q[..., 0], jnp.promote_types(jnp.float32, q.dtype))
  o = total[..., None] + jnp.zeros(v.shape[-1], total.dtype)
  return Partial(jnp.full_like(total, -jnp.inf), total, o)


def sink(sinks: jax.Array, like: Partial) -> Partial:
  """Attention to one more key a head, of score `sinks` 'h' and value 0."""
  m = lax.stop_gradient(sinks.astype(like.l.dtype))
  # 1, and carries the gradient; 0 for a sink of -inf, which is none.
  share = jnp.exp(sinks.astype(like.l.dtype) - finite(m))
  shape = like.l.shape
  return Partial(
    m=jnp.broadcast_to(m, shape),
    l=jnp.broadcast_to(share, shape),
    o=jnp.zeros_like(like.o),
  )


def finite(m):
  """What to subtract where nothing was seen: -inf - -inf would be NaN."""
  return jnp.where(m == -jnp.inf, 0, m)


MONOID = Monoid(nothing, opened, merge, finished, total)
