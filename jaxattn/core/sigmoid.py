"""Sigmoid attention in blocks: the monoid is plain addition.

Ramapuram et al. 2024, "Theory, Analysis, and Best Practices for Sigmoid
Self-Attention", https://arxiv.org/abs/2409.04431.

    o_t = sum_s sigmoid(x_ts) v_s,   x_ts = scale q_t . k_s + offset

No key competes with another, so a partial result is o itself, and partial
results add up. With p = sigmoid(x) and do the gradient of o,

    dv_s = p do    dx_s = p (1 - p) do . v_s

so the backward pass needs nothing from the forward but q, k and v.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxattn.core import masks, tiles
from jaxattn.core.masks import Everything, Mask
from jaxattn.core.scores import Score

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
  block_q: int | None = None,
  block_k: int | None = None,
) -> jax.Array:
  """mask(sigmoid(scale q k^T + offset)) v, in memory linear in t and s.

  Arguments are those of `softmax.attention`, and besides

  Args:
    offset: a number, or one per query, `b t h` or what broadcasts to it; it
      gets a gradient.

  Returns:
    `b t h e` in the dtype of q; 0 for a query that sees no key.

  Raises:
    ValueError: shapes that do not fit each other, or a block below 1.
  """
  rule, query, key, operands = tiles.problem(
    *(q, k, v),
    mask=mask,
    query=(query_order, query_segments, query_tags),
    key=(key_order, key_segments, key_tags),
    scale=scale,
    score=score,
  )
  (b, t, h, _), s = q.shape, k.shape[1]
  offset = jnp.asarray(offset, tiles.accumulator(q))
  offset = offset.reshape((1,) * (3 - offset.ndim) + offset.shape)
  offset = offset + jnp.zeros((b, t, h), offset.dtype)
  block_q, block_k, single = tiles.sides(b, h, t, s, block_q, block_k)
  if single:
    x = tiles.plain(rule, q, k, query, key, operands)
    v = jnp.repeat(v.astype(x.dtype), h // v.shape[2], axis=2)
    p = jax.nn.sigmoid(x + jnp.moveaxis(offset, 2, 1)[..., None])
    return jnp.einsum('bhts,bshe->bthe', p, v).astype(rule.dtype)
  if s % block_k:  # the last block will hold padding, which nobody may see
    query, key = tiles.one_segment(query), tiles.one_segment(key)
  rule = dataclasses.replace(rule, block_q=block_q, block_k=block_k)
  inputs = tiles.alike((q, k, v, offset, operands), (query, key))
  return _attend(rule, *inputs, query, key)


def _weights(rule, queries, keys, masked, operands):
  """p = sigmoid(x) 'b k s r' of a tile, and what takes dp to the inputs."""
  (q, offset, query), (k, key) = queries, keys

  def scores(q, offset, k, operands):
    x = jnp.einsum('bksd,bkrd->bksr', k, rule.scale * q)
    x = tiles.modified(rule, x, query, key, operands)
    return x + offset[:, :, None]

  x, back = jax.vjp(scores, q, offset, k, operands)
  if masked:
    query = jax.tree.map(lambda x: x[:, None, None, :], query)
    key = jax.tree.map(lambda x: x[:, None, :, None], key)
    x = jnp.where(masks.sees(rule.mask, query, key), x, -jnp.inf)
  p = jax.nn.sigmoid(x)
  return p, lambda dp: back(p * (1 - p) * dp)


def _exact(*arrays):
  return tuple(x.astype(tiles.accumulator(x)) for x in arrays)


@functools.partial(jax.jit, static_argnums=0)
def _forward(rule, q, k, v, offset, operands, query, key):
  queries, keys, extents, key_extents = tiles.arrange(
    rule, _exact(q, offset), _exact(k, v), query, key
  )

  def read(_, block):
    (q, offset, tokens), extent = block

    def visit(j, o, masked):
      k, v, key = tiles.at(keys, j)
      p, _ = _weights(rule, (q, offset, tokens), (k, key), masked, operands)
      return o + jnp.einsum('bksr,bkse->bkre', p, v)

    nothing = jnp.zeros_like(q[..., :1]) + jnp.zeros(v.shape[-1], q.dtype)
    return None, tiles.fold(rule, visit, nothing, extent, key_extents)

  _, blocks = tiles.scan(read, None, (queries, extents))
  return tiles.join(blocks, *q.shape[1:3]).astype(rule.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _backward(rule, q, k, v, offset, operands, query, key, do):
  queries, keys, extents, key_extents = tiles.arrange(
    rule, _exact(q, offset, do), _exact(k, v), query, key
  )

  def read(totals, block):
    (q, offset, do, tokens), extent = block

    def visit(j, carry, masked):
      dq, doffset, dk, dv, doperands = carry
      k, v, key = tiles.at(keys, j)
      p, back = _weights(rule, (q, offset, tokens), (k, key), masked, operands)
      more = back(jnp.einsum('bkse,bkre->bksr', v, do))
      return (
        dq + more[0],
        doffset + more[1],
        tiles.add_at(dk, j, more[2]),
        tiles.add_at(dv, j, jnp.einsum('bksr,bkre->bkse', p, do)),
        jax.tree.map(jnp.add, doperands, more[3]),
      )

    carry = jnp.zeros_like(q), jnp.zeros_like(offset), *totals
    dq, doffset, *totals = tiles.fold(rule, visit, carry, extent, key_extents)
    return tuple(totals), (dq, doffset)

  totals = *(jnp.zeros_like(x) for x in keys[:2]), operands
  totals = jax.tree.map(jnp.zeros_like, totals)
  totals, (dq, doffset) = tiles.scan(read, totals, (queries, extents))
  dk, dv, doperands = totals
  return *(
    tiles.join(dx, *x.shape[1:3]).astype(x.dtype)
    for x, dx in ((q, dq), (k, dk), (v, dv), (offset, doffset))
  ), doperands


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule, q, k, v, offset, operands, query, key):
  return _forward(rule, q, k, v, offset, operands, query, key)


def _attend_fwd(rule, *inputs):
  return _forward(rule, *inputs), inputs


def _attend_bwd(rule, inputs, do):
  return *_backward(rule, *inputs, do), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
