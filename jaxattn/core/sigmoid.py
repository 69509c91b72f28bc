"""Sigmoid attention in blocks: the monoid is plain addition.

Ramapuram et al. 2024, "Theory, Analysis, and Best Practices for Sigmoid
Self-Attention", https://arxiv.org/abs/2409.04431.

    o_t = sum_s sigmoid(x_ts) v_s,   x_ts = scale q_t . k_s + offset

No key competes with another, so a partial result is o itself, and partial
results add up. With p = sigmoid(x) and do the gradient of o,

    dv_s = p do    dx_s = p (1 - p) do . v_s

so the backward pass needs nothing from the forward but q, k and v.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels import masks, tiles
from pallas_kernels.blocks import Blocks
from pallas_kernels.masks import Everything, Mask
from pallas_kernels.problem import (
  accumulator,
  alike,
  floats,
  one_segment,
  problem,
  with_floats,
)
from pallas_kernels.scores import Score

EVERYTHING = Everything()


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  offset: ArrayLike = 0.0,
  mask: Mask = EVERYTHING,
  query_order: ArrayLike | None = None,
  key_order: ArrayLike | None = None,
  query_segments: ArrayLike | None = None,
  key_segments: ArrayLike | None = None,
  query_tags: dict[str, ArrayLike] | None = None,
  key_tags: dict[str, ArrayLike] | None = None,
  scale: float | None = None,
  score: Score | None = None,
  blocks: Blocks | None = None,
) -> jax.Array:
  """mask(sigmoid(scale q k^T + offset)) v, in memory linear in t and s.

  Arguments are those of `softmax.attention`, and besides

  Args:
    offset: a number, or one per query, `b t h` or what broadcasts to it; it
      gets a gradient.

  Returns:
    `b t h e` in the dtype of q; 0 for a query that sees no key.

  Raises:
    TypeError: an argument is of another kind than it has to be.
    ValueError: shapes that do not fit each other, or a block below 1.
  """
  rule, extras, query, key = problem(
    *(q, k, v),
    mask=mask,
    query=(query_order, query_segments, query_tags),
    key=(key_order, key_segments, key_tags),
    scale=scale,
    score=score,
    blocks=blocks,
  )
  (b, t, h, _), s = q.shape, k.shape[1]
  offset = jnp.asarray(offset, accumulator(q))
  offset = offset.reshape((1,) * (3 - offset.ndim) + offset.shape)
  offset = offset + jnp.zeros((b, t, h), offset.dtype)
  rule, single = tiles.sides(rule, b, h, t, s)
  if single:
    own = tiles.as_tile(extras)
    x, _, _ = tiles.at_once(rule, q, k, own, query, key)
    v = jnp.repeat(v.astype(x.dtype), h // v.shape[2], axis=2)
    p = jax.nn.sigmoid(x + jnp.moveaxis(offset, 2, 1)[..., None])
    return jnp.einsum('bhts,bshe->bthe', p, v).astype(rule.dtype)
  if s % rule.blocks.k:  # the last block holds padding, which nobody may see
    query, key = one_segment(query), one_segment(key)
  inputs = alike((q, k, v, offset, extras), (query, key))
  return _attend(rule, *inputs, query, key)


def _weights(rule, queries, keys, masked, extras):
  """p = sigmoid(x) 'b k s r' of a tile, and what takes dp to the inputs."""
  (q, offset, query), (k, key) = queries, keys

  def scores(q, offset, k, values):
    x = jnp.einsum('bksd,bkrd->bksr', k, rule.scale * q)
    if extras:
      own = with_floats(extras, values)
      x = tiles.by_head(rule.scored, x, query, key, own, rule.blocks.q)
    return x + offset[:, :, None]

  x, back = jax.vjp(scores, q, offset, k, floats(extras))
  if masked:
    across = jax.tree.map(lambda x: x[:, None, None, :], query)
    along = jax.tree.map(lambda x: x[:, None, :, None], key)
    x = jnp.where(masks.sees(rule.mask, across, along), x, -jnp.inf)
  p = jax.nn.sigmoid(x)
  return p, lambda dp: back(p * (1 - p) * dp)


def _exact(*arrays):
  return tuple(x.astype(accumulator(x)) for x in arrays)


@functools.partial(jax.jit, static_argnums=0)
def _forward(rule, q, k, v, offset, extras, query, key):
  queries, keys, extents, key_extents = tiles.arrange(
    rule, _exact(q, offset), _exact(k, v), query, key
  )
  laid = tiles.lay(rule, extras)

  def read(_, block):
    i, (q, offset, tokens), extent = block

    def visit(j, o, masked):
      k, v, key = tiles.at(keys, j)
      own = tiles.cut(rule, laid, i, j)
      p, _ = _weights(rule, (q, offset, tokens), (k, key), masked, own)
      return o + jnp.einsum('bksr,bkse->bkre', p, v)

    nothing = jnp.zeros_like(q[..., :1]) + jnp.zeros(v.shape[-1], q.dtype)
    return None, tiles.fold(rule, visit, nothing, extent, key_extents)

  i = jnp.arange(len(queries[0]))
  _, blocks = tiles.scan(read, None, (i, queries, extents))
  return tiles.join(blocks, *q.shape[1:3]).astype(rule.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _backward(rule, q, k, v, offset, extras, query, key, do):
  queries, keys, extents, key_extents = tiles.arrange(
    rule, _exact(q, offset, do), _exact(k, v), query, key
  )
  laid = tiles.lay(rule, extras)

  def read(totals, block):
    i, (q, offset, do, tokens), extent = block

    def visit(j, carry, masked):
      dq, doffset, dk, dv, dextras = carry
      k, v, key = tiles.at(keys, j)
      own = tiles.cut(rule, laid, i, j)
      p, back = _weights(rule, (q, offset, tokens), (k, key), masked, own)
      more = back(jnp.einsum('bkse,bkre->bksr', v, do))
      return (
        dq + more[0],
        doffset + more[1],
        tiles.add_at(dk, j, more[2]),
        tiles.add_at(dv, j, jnp.einsum('bksr,bkre->bkse', p, do)),
        tiles.paste(rule, dextras, more[3], i, j),
      )

    carry = jnp.zeros_like(q), jnp.zeros_like(offset), *totals
    dq, doffset, *totals = tiles.fold(rule, visit, carry, extent, key_extents)
    return tuple(totals), (dq, doffset)

  totals = *map(jnp.zeros_like, keys[:2]), tiles.nothing(laid)
  i = jnp.arange(len(queries[0]))
  totals, (dq, doffset) = tiles.scan(read, totals, (i, queries, extents))
  dk, dv, dextras = totals
  return *(
    tiles.join(dx, *x.shape[1:3]).astype(x.dtype)
    for x, dx in ((q, dq), (k, dk), (v, dv), (offset, doffset))
  ), tiles.gather(dextras, extras)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule, q, k, v, offset, extras, query, key):
  return _forward(rule, q, k, v, offset, extras, query, key)


def _attend_fwd(rule, *inputs):
  return _forward(rule, *inputs), inputs


def _attend_bwd(rule, inputs, do):
  return *_backward(rule, *inputs, do), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
