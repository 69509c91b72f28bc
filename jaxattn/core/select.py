"""Choosing keys: blocks of a sequence, scored by their mean key.

A sequence is cut into blocks of equal length by the order of its tokens, so
padding, packing and caching move no border. A block can be chosen once it is
complete, that is once its last token has been read: what a query may choose
from then never depends on what comes after it. The block that a query stands
in is not chosen but always read, up to the query (`SameBlock`).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxattn.core.softmax import Partial
from pallas_kernels.masks import Mask


@dataclasses.dataclass(frozen=True)
class SameBlock(Mask):
  """A query sees the keys of its own block of `size` tokens."""

  size: int

  def __call__(self, query, key):
    return query.order // self.size == key.order // self.size

  def empty(self, query, key):
    first, last = query.order_min // self.size, query.order_max // self.size
    return (key.order_max // self.size < first) | (
      key.order_min // self.size > last
    )


class Blocks(NamedTuple):
  """The complete blocks of each row; at most s // size of them.

  Attributes:
    keys: 'b n c h d', c tokens a block; values: 'b n c h e'.
    mean: 'b n h d', the mean key.
    number: 'b n', which block of its segment it is.
    segments: 'b n', 0 where there is no block.
  """

  keys: jax.Array
  values: jax.Array
  mean: jax.Array
  number: jax.Array
  segments: jax.Array


def complete_blocks(k, v, order, segments, size: int) -> Blocks:
  """Finds the complete blocks among keys that lie in any order.

  Args:
    k, v: 'b s h d', 'b s h e'.
    order, segments: 'b s', segments 0 where there is no key.
    size: tokens a block.
  """
  b, s = order.shape
  n = s // size
  # Keys by segment and order, those that are none at the end: then a block is
  # the `size` keys that end with its last one.
  outside = jnp.where(segments > 0, segments, jnp.iinfo(jnp.int32).max)
  by_order = jnp.argsort(order, axis=1, stable=True)
  by_segment = jnp.argsort(
    jnp.take_along_axis(outside, by_order, 1), axis=1, stable=True
  )
  sorting = jnp.take_along_axis(by_order, by_segment, 1)
  order, segments = (
    jnp.take_along_axis(a, sorting, 1) for a in (order, segments)
  )
  last = (segments > 0) & (order % size == size - 1)
  index = jnp.where(last, jnp.cumsum(last, axis=1) - 1, n)
  put = lambda row, at, what: row.at[at].set(what, mode='drop')
  ends = jax.vmap(put)(
    jnp.zeros_like(order[:, :n]) - 1,
    index,
    jnp.zeros_like(order) + jnp.arange(s),
  )
  exists = ends >= 0
  places = jnp.maximum(ends, size - 1)[..., None] + jnp.arange(1 - size, 1)
  slots = jnp.take_along_axis(sorting, places.reshape(b, -1), 1)

  def gather(a):
    rows = jnp.take_along_axis(a, slots[..., None, None], 1)
    return rows.reshape(b, n, size, *a.shape[2:])

  at_end = lambda a: jnp.take_along_axis(a, jnp.maximum(ends, 0), 1)
  keys = gather(k)
  exact = keys.astype(jnp.promote_types(k.dtype, jnp.float32))
  return Blocks(
    keys,
    gather(v),
    jnp.mean(exact, axis=2),
    at_end(order) // size,
    jnp.where(exists, at_end(segments), 0),
  )


def attend_chosen(
  q, blocks: Blocks, order, segments, *, size: int, chosen: int, chunk: int = 64
) -> Partial:
  """Attention of each query to the blocks that fit it best.

  The blocks are the `chosen` of largest q . mean, among the complete ones of
  its segment before its own. The choice itself has no gradient. Queries go
  through in chunks, and the backward pass gathers their blocks again.

  Args:
    q: queries 'b t h d'.
    blocks: of `complete_blocks`.
    order, segments: 'b t' of the queries.
    size, chosen: tokens a block, blocks a query.
    chunk: queries whose blocks are gathered at once.

  Returns:
    A Partial, to be merged with attention to other keys.
  """
  b, t, h, d = q.shape
  n, e = blocks.number.shape[1], blocks.values.shape[-1]
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  chosen = min(chosen, n)
  if chosen == 0 or t == 0:
    nothing = jnp.sum(q.astype(dtype)[..., :0], axis=-1)
    return Partial(nothing - jnp.inf, nothing, jnp.zeros((b, t, h, e), dtype))
  chunk = min(chunk, t)

  @jax.checkpoint
  def read(_, part):
    q, order, segments = part
    q = q.astype(dtype)
    fit = jnp.einsum('bchd,bnhd->bchn', q, blocks.mean)
    before = blocks.number[:, None] < order[..., None] // size
    may = before & (blocks.segments[:, None] == segments[..., None])
    fit = jnp.where(may[:, :, None], fit, -jnp.inf)
    best, which = jax.lax.top_k(fit, chosen)  # 'b c h j'
    k, v = (_gathered(a, which) for a in (blocks.keys, blocks.values))
    x = jnp.einsum('bchd,bchjwd->bchjw', q, k.astype(dtype)) * d**-0.5
    x = jnp.where((best > -jnp.inf)[..., None], x, -jnp.inf)
    m = jax.lax.stop_gradient(jnp.max(x, axis=(-2, -1)))
    p = jnp.exp(x - jnp.where(m == -jnp.inf, 0, m)[..., None, None])
    o = jnp.einsum('bchjw,bchjwe->bche', p, v.astype(dtype))
    return None, Partial(m, jnp.sum(p, axis=(-2, -1)), o)

  def split(a):
    a = jnp.pad(a, ((0, 0), (0, -t % chunk)) + ((0, 0),) * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(b, -1, chunk, *a.shape[2:]), 1, 0)

  _, parts = jax.lax.scan(read, None, jax.tree.map(split, (q, order, segments)))
  join = lambda a: jnp.moveaxis(a, 0, 1).reshape(b, -1, *a.shape[3:])[:, :t]
  return jax.tree.map(join, parts)


def _gathered(table, which):
  """Blocks 'b n c h d' picked by 'b t h j': 'b t h j c d'."""
  pick = lambda table, which: table[which]  # 'n c d' by 't j'
  by_head = jax.vmap(pick, in_axes=(2, 1), out_axes=1)
  return jax.vmap(by_head)(table, which)
