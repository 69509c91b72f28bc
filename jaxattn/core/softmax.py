"""Softmax attention in blocks: a fold of partial results that merge.

Milakov, Gimelshein 2018, "Online normalizer calculation for softmax",
https://arxiv.org/abs/1805.02867; Rabe, Staats 2021, "Self-attention Does Not
Need O(n^2) Memory", https://arxiv.org/abs/2112.05682; Dao 2023,
"FlashAttention-2", https://arxiv.org/abs/2307.08691.

A query that has read some keys, with scores x_j and values v_j, remembers

  m = max_j x_j,   l = sum_j exp(x_j - m),   o = sum_j exp(x_j - m) v_j.

Two such triples over disjoint sets of keys merge into that of their union, so
keys may be read in any order, in blocks, on many devices. In the end o / l is
the attention and m + log l the log-sum-exp (lse) of the scores.

`attention` folds `merge` over tiles of block_q queries by block_k keys. Ranges
of orders and segments tell whether a tile is empty (skipped), full (no mask is
needed) or mixed. Its gradient is written by hand: it keeps m, l and finished o,
and computes each tile again. With o = sum_j p_j v_j, p_j = exp(x_j - m) / l, do
and dl the gradients of o and l,

  dv_j = p_j do
  dx_j = p_j (do . v_j - do . o + l dl)

for dp_i/dx_j = p_i (1[i=j] - p_j) and dl/dx_j = l p_j, if m is held constant.
Both directions take memory linear in the lengths. Only what is shorter than a
tile is left to the plain formula and to JAX's gradient of it.

Scores of a tile are `b k r s` forward and `b k s r` backward: so the matrix
products never transpose a tile.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxattn.core import masks, tiles
from jaxattn.core.masks import Everything, Mask
from jaxattn.core.scores import Score

EVERYTHING = Everything()


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
  reference = _finite(m)
  x_share = jnp.exp(x.m - reference)
  y_share = jnp.exp(y.m - reference)
  return Partial(
    m=m,
    l=x_share * x.l + y_share * y.l,
    o=x_share[..., None] * x.o + y_share[..., None] * y.o,
  )


def finish(partial: Partial) -> tuple[jax.Array, jax.Array]:
  """Attention `b t h e`, and the log-sum-exp of the scores `b t h`.

  A query that saw no key has o = 0, lse = -inf and no gradient.
  """
  m, total, o = partial
  unseen = total == 0
  total = jnp.where(unseen, 1, total)
  lse = jnp.where(unseen, -jnp.inf, _finite(m) + jnp.log(total))
  return jnp.where(unseen[..., None], 0, o / total[..., None]), lse


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  mask: Mask = EVERYTHING,
  query_order: ArrayLike | None = None,
  key_order: ArrayLike | None = None,
  query_segments: ArrayLike | None = None,
  key_segments: ArrayLike | None = None,
  query_tags: dict[str, ArrayLike] | None = None,
  key_tags: dict[str, ArrayLike] | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  score: Score | None = None,
  block_q: int | None = None,
  block_k: int | None = None,
  return_partial: bool = False,
) -> jax.Array | Partial:
  """softmax(mask(scale q k^T)) v, in memory linear in t and s.

  All inputs must be finite, masked or not. Differentiate it in reverse mode;
  `dense` serves forward mode and second order.

  Args:
    q: queries, `b t h d`.
    k: keys, `b s k d`. h is a multiple of k: each key head serves h / k query
      heads that stand together.
    v: values, `b s k e`.
    mask: which keys a query sees, besides the rule of segments.
    query_order: `b t`, or `t` for every row: what the mask reads; by default
      0, 1, ... t - 1. Likewise key_order, `b s` or `s`.
    query_segments: `b t` or `t`: tokens see each other iff their segments are
      equal and not 0. None stands for 1 everywhere. Likewise key_segments.
    query_tags: what else the mask reads, each `b t` or `t`. Likewise key_tags.
    scale: a Python number that multiplies the scores; by default 1 / sqrt(d).
    softcap: if given, scores become softcap tanh(score / softcap).
    score: what else happens to the scores, after the cap; its operands get
      gradients.
    block_q: queries in a tile; by default chosen from the lengths.
    block_k: keys in a tile. Lengths need not be multiples of the blocks.
    return_partial: return a Partial, to be merged with attention to other keys
      and finished.

  Returns:
    `b t h e` in the dtype of q; or a Partial in float32, or wider if q is.

  Raises:
    ValueError: shapes that do not fit each other, or a block below 1.
  """
  rule, query, key, operands = tiles.problem(
    *(q, k, v),
    mask=mask,
    query=(query_order, query_segments, query_tags),
    key=(key_order, key_segments, key_tags),
    scale=scale,
    softcap=softcap,
    score=score,
    wide=return_partial,
  )
  (b, t, h, _), s = q.shape, k.shape[1]
  block_q, block_k, single = tiles.sides(b, h, t, s, block_q, block_k)
  if single:
    o, m, total = _plain(rule, q, k, v, query, key, operands)
  else:
    if s % block_k:  # the last block will hold padding, which nobody may see
      query, key = tiles.one_segment(query), tiles.one_segment(key)
    rule = dataclasses.replace(rule, block_q=block_q, block_k=block_k)
    inputs = tiles.alike((q, k, v, operands), (query, key))
    o, m, total = _attend(rule, *inputs, query, key)
  return Partial(m, total, total[..., None] * o) if return_partial else o


def dense(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  mask: Mask = EVERYTHING,
  query_order: ArrayLike | None = None,
  key_order: ArrayLike | None = None,
  query_segments: ArrayLike | None = None,
  key_segments: ArrayLike | None = None,
  query_tags: dict[str, ArrayLike] | None = None,
  key_tags: dict[str, ArrayLike] | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  score: Score | None = None,
  return_partial: bool = False,
) -> jax.Array | Partial:
  """The same as `attention`, by the plain formula and in memory t x s.

  JAX differentiates it, in any mode and to any order.
  """
  rule, query, key, operands = tiles.problem(
    *(q, k, v),
    mask=mask,
    query=(query_order, query_segments, query_tags),
    key=(key_order, key_segments, key_tags),
    scale=scale,
    softcap=softcap,
    score=score,
    wide=return_partial,
  )
  o, m, total = _plain(rule, q, k, v, query, key, operands)
  return Partial(m, total, total[..., None] * o) if return_partial else o


def _finite(m):
  """What to subtract where nothing was seen: -inf - -inf would be NaN."""
  return jnp.where(m == -jnp.inf, 0, m)


def _plain(rule, q, k, v, query, key, operands):
  """Finished o, m and l."""
  scores = tiles.plain(rule, q, k, query, key, operands)
  v = jnp.repeat(v.astype(scores.dtype), q.shape[2] // v.shape[2], axis=2)
  m = lax.stop_gradient(jnp.max(scores, -1, keepdims=True, initial=-jnp.inf))
  p = jnp.exp(scores - _finite(m))
  total = p.sum(-1, keepdims=True)
  o = jnp.einsum('bhts,bshe->bthe', p / jnp.where(total == 0, 1, total), v)
  m, total = (jnp.swapaxes(x[..., 0], 1, 2) for x in (m, total))
  return o.astype(rule.dtype), m, total


def _tile(rule, queries, keys, masked, operands):
  """Attention of queries `b k r d` to keys `b k s d`."""
  (q, query), (k, v, key) = queries, keys
  dtype = tiles.accumulator(q)
  q, k, v = rule.scale * q.astype(dtype), k.astype(dtype), v.astype(dtype)
  scores = jnp.einsum('bkrd,bksd->bkrs', q, k)
  if rule.scores:
    scores = tiles.modified(rule, scores.mT, query, key, operands).mT
  if masked:
    query = jax.tree.map(lambda x: x[:, None, :, None], query)
    key = jax.tree.map(lambda x: x[:, None, None, :], key)
    scores = jnp.where(masks.sees(rule.mask, query, key), scores, -jnp.inf)
  m = jnp.max(scores, -1)
  p = jnp.exp(scores - _finite(m)[..., None])
  return Partial(m, p.sum(-1), jnp.einsum('bkrs,bkse->bkre', p, v))


def _tile_gradient(rule, queries, keys, masked, operands):
  """dq, dk, dv of a tile, and the operands' gradients.

  delta is do . o - l dl, and share is 1 / l.
  """
  (q, do, m, share, delta, query), (k, v, key) = queries, keys
  dtype = tiles.accumulator(q)
  q, k, v = rule.scale * q.astype(dtype), k.astype(dtype), v.astype(dtype)
  scores, back = jax.vjp(
    lambda x, operands: tiles.modified(rule, x, query, key, operands),
    jnp.einsum('bksd,bkrd->bksr', k, q),
    operands,
  )
  if masked:
    query = jax.tree.map(lambda x: x[:, None, None, :], query)
    key = jax.tree.map(lambda x: x[:, None, :, None], key)
    scores = jnp.where(masks.sees(rule.mask, query, key), scores, -jnp.inf)
  p = jnp.exp(scores - m[:, :, None]) * share[:, :, None]
  dv = jnp.einsum('bksr,bkre->bkse', p, do)
  dp = jnp.einsum('bkse,bkre->bksr', v, do)
  dx, doperands = back(p * (dp - delta[:, :, None]))
  dq = rule.scale * jnp.einsum('bksd,bksr->bkdr', k, dx)
  dk = jnp.einsum('bksr,bkrd->bksd', dx, q)
  return jnp.swapaxes(dq, 2, 3), dk, dv, doperands


@functools.partial(jax.jit, static_argnums=0)
def _forward(rule, q, k, v, operands, query, key):
  """The finished o, m and l."""
  queries, keys, extents, key_extents = tiles.arrange(
    rule, [q], [k, v], query, key
  )

  def read(_, block):
    queries, extent = block

    def visit(j, partial, masked):
      tile = _tile(rule, queries, tiles.at(keys, j), masked, operands)
      return merge(partial, tile)

    zero = jnp.zeros_like(queries[0][..., 0], tiles.accumulator(q))
    zeros = zero[..., None] + jnp.zeros(v.shape[-1], zero.dtype)
    nothing = Partial(jnp.full_like(zero, -jnp.inf), zero, zeros)
    partial = tiles.fold(rule, visit, nothing, extent, key_extents)
    o, _ = finish(partial)
    return None, (o.astype(rule.dtype), partial.m, partial.l)

  _, blocks = tiles.scan(read, None, (queries, extents))
  return tuple(tiles.join(x, *q.shape[1:3]) for x in blocks)


@functools.partial(jax.jit, static_argnums=0)
def _backward(rule, q, k, v, operands, query, key, o, m, total, do, dm, dtotal):
  """dq, dk, dv and the operands' gradients; m is a constant."""
  dtype = tiles.accumulator(q)
  do = do.astype(dtype)
  delta = jnp.sum(do * o, -1) - total * dtotal
  unseen = total == 0
  m, share = jnp.where(unseen, jnp.inf, m), 1 / jnp.where(unseen, 1, total)
  queries, keys, extents, key_extents = tiles.arrange(
    rule, [q, do, m, share, delta], [k, v], query, key
  )

  def read(totals, block):
    queries, extent = block

    def visit(j, carry, masked):
      dq, dk, dv, doperands = carry
      more = _tile_gradient(rule, queries, tiles.at(keys, j), masked, operands)
      return (
        dq + more[0],
        tiles.add_at(dk, j, more[1]),
        tiles.add_at(dv, j, more[2]),
        jax.tree.map(jnp.add, doperands, more[3]),
      )

    carry = jnp.zeros_like(queries[0], dtype), *totals
    dq, *totals = tiles.fold(rule, visit, carry, extent, key_extents)
    return tuple(totals), dq

  totals = tuple(jnp.zeros_like(x, dtype) for x in keys[:2])
  totals = (*totals, jax.tree.map(jnp.zeros_like, operands))
  (dk, dv, doperands), dq = tiles.scan(read, totals, (queries, extents))
  dq, dk, dv = (
    tiles.join(dx, *x.shape[1:3]).astype(x.dtype)
    for x, dx in ((q, dq), (k, dk), (v, dv))
  )
  return dq, dk, dv, doperands


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule, q, k, v, operands, query, key):
  return _forward(rule, q, k, v, operands, query, key)


def _attend_fwd(rule, *inputs):
  results = _forward(rule, *inputs)
  return results, (*inputs, *results)


def _attend_bwd(rule, residuals, gradients):
  return *_backward(rule, *residuals, *gradients), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
