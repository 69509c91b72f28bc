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

Inside, the queries of the g heads that share a key head are rows r = (g t) of
one matrix `b k r d`, beside the keys `b k s d`. Scores are `b k r s` forward
and `b k s r` backward: so the matrix products never transpose a tile.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxattn.core import masks
from jaxattn.core.masks import Everything, Mask, Side, Tokens

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
    block_q: queries in a tile; by default chosen from the lengths.
    block_k: keys in a tile. Lengths need not be multiples of the blocks.
    return_partial: return a Partial, to be merged with attention to other keys
      and finished.

  Returns:
    `b t h e` in the dtype of q; or a Partial in float32, or wider if q is.

  Raises:
    ValueError: shapes that do not fit each other, or a block below 1.
  """
  rule, query, key = _problem(
    *(q, k, v, mask, scale, softcap, return_partial),
    (query_order, query_segments, query_tags),
    (key_order, key_segments, key_tags),
  )
  (b, t, h, _), s = q.shape, k.shape[1]
  side = _side(b * h, max(t, s))
  block_q = _block('block_q', block_q, t, side)
  block_k = _block('block_k', block_k, s, max(side, side**2 // block_q))
  if 0 in (t, s) or (t <= block_q and s <= min(block_k, side)):
    o, m, total = _plain(rule, q, k, v, query, key)
  else:
    if s % block_k:  # the last block will hold padding, which nobody may see
      query, key = _one_segment(query), _one_segment(key)
    rule = dataclasses.replace(rule, block_q=block_q, block_k=block_k)
    o, m, total = _attend(rule, *_alike(q, k, v, (query, key)), query, key)
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
  return_partial: bool = False,
) -> jax.Array | Partial:
  """The same as `attention`, by the plain formula and in memory t x s.

  JAX differentiates it, in any mode and to any order.
  """
  rule, query, key = _problem(
    *(q, k, v, mask, scale, softcap, return_partial),
    (query_order, query_segments, query_tags),
    (key_order, key_segments, key_tags),
  )
  o, m, total = _plain(rule, q, k, v, query, key)
  return Partial(m, total, total[..., None] * o) if return_partial else o


@dataclasses.dataclass(frozen=True)
class _Rule:
  """What is known while tracing."""

  mask: Mask
  scale: float
  softcap: float | None
  dtype: np.dtype  # of o
  block_q: int = 0
  block_k: int = 0


def _problem(q, k, v, mask, scale, softcap, return_partial, query, key):
  """Checks the arguments of a call and fills in what was left out."""
  if not (
    q.ndim == k.ndim == v.ndim == 4
    and q.shape[0] == k.shape[0]
    and q.shape[3] == k.shape[3]
    and k.shape[:3] == v.shape[:3]
  ):
    raise ValueError(
      'q, k and v must be `b t h d`, `b s k d` and `b s k e`, not'
      f' {q.shape}, {k.shape} and {v.shape}'
    )
  if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
    raise ValueError(
      f'{q.shape[2]} query heads cannot share {k.shape[2]} key heads evenly'
    )
  query, key = _tokens('query', q, *query), _tokens('key', k, *key)
  if (query.segments is None) != (key.segments is None):
    query, key = _one_segment(query), _one_segment(key)
  rule = _Rule(
    mask=mask,
    scale=1 / math.sqrt(q.shape[3]) if scale is None else float(scale),
    softcap=None if softcap is None else float(softcap),
    dtype=_accumulator(q) if return_partial else q.dtype,
  )
  return rule, query, key


def _tokens(name, x, order, segments, tags):
  b, t = x.shape[:2]

  def per_token(what, values):
    values = jnp.atleast_2d(jnp.asarray(values, jnp.int32))
    if values.shape not in ((b, t), (1, t)):
      raise ValueError(
        f'{name} {what} must have shape {(b, t)} or {(t,)}, not {values.shape}'
      )
    return values

  order = per_token('order', np.arange(t) if order is None else order)
  tags = {tag: per_token(f'tag {tag}', x) for tag, x in (tags or {}).items()}
  if segments is not None:
    segments = per_token('segments', segments)
  return Tokens(Side(order, tags), segments)


def _one_segment(tokens):
  if tokens.segments is not None:
    return tokens
  return tokens._replace(segments=jnp.ones_like(tokens.side.order))


def _side(heads, length):
  """The side of a tile: what keeps a CPU busy and, over all heads, in cache.

  Cut in four or more, a causal sequence has tiles to skip.
  """
  side = 512
  while side > 128 and 4 * side > length:
    side //= 2
  while side > 64 and heads * side**2 > 2**20:
    side //= 2
  return side


def _block(name, block, length, default):
  if block is None:  # blocks of equal size need the least padding
    block = math.ceil(length / math.ceil(max(1, length) / default))
  elif block < 1:
    raise ValueError(f'{name} must be at least 1, not {block}')
  return max(1, min(block, length))


def _alike(q, k, v, tokens):
  """Adds to q, k and v a zero made of all inputs.

  Under shard_map they then vary over the same mesh axes, and so do the carries
  made from them; and the gradient of an input is summed over the axes along
  which it did not vary. Elsewhere it is a constant that costs nothing.
  """
  leaves = jax.tree.leaves((q, k, v, tokens))
  zero = sum(jnp.sum(x[:, :0]).astype(q.dtype) for x in leaves)
  return tuple(x + zero.astype(x.dtype) for x in (q, k, v))


def _plain(rule, q, k, v, query, key):
  """Finished o, m and l."""
  dtype, g = _accumulator(q), q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x.astype(dtype), g, axis=2) for x in (k, v))
  scores = rule.scale * jnp.einsum('bthd,bshd->bhts', q.astype(dtype), k)
  if rule.softcap is not None:
    scores = rule.softcap * jnp.tanh(scores / rule.softcap)
  query = jax.tree.map(lambda x: x[:, None, :, None], query)
  key = jax.tree.map(lambda x: x[:, None, None, :], key)
  scores = jnp.where(masks.sees(rule.mask, query, key), scores, -jnp.inf)
  m = lax.stop_gradient(jnp.max(scores, -1, keepdims=True, initial=-jnp.inf))
  p = jnp.exp(scores - _finite(m))
  total = p.sum(-1, keepdims=True)
  o = jnp.einsum('bhts,bshe->bthe', p / jnp.where(total == 0, 1, total), v)
  m, total = (jnp.swapaxes(x[..., 0], 1, 2) for x in (m, total))
  return o.astype(rule.dtype), m, total


def _tile(rule, queries, keys, masked):
  """Attention of queries `b k r d` to keys `b k s d`."""
  (q, query), (k, v, key) = queries, keys
  dtype = _accumulator(q)
  q, k, v = rule.scale * q.astype(dtype), k.astype(dtype), v.astype(dtype)
  scores = jnp.einsum('bkrd,bksd->bkrs', q, k)
  if rule.softcap is not None:
    scores = rule.softcap * jnp.tanh(scores / rule.softcap)
  if masked:
    query = jax.tree.map(lambda x: x[:, None, :, None], query)
    key = jax.tree.map(lambda x: x[:, None, None, :], key)
    scores = jnp.where(masks.sees(rule.mask, query, key), scores, -jnp.inf)
  m = jnp.max(scores, -1)
  p = jnp.exp(scores - _finite(m)[..., None])
  return Partial(m, p.sum(-1), jnp.einsum('bkrs,bkse->bkre', p, v))


def _tile_gradient(rule, queries, keys, masked):
  """dq, dk and dv of a tile; delta is do . o - l dl, and share is 1 / l."""
  (q, do, m, share, delta, query), (k, v, key) = queries, keys
  dtype = _accumulator(q)
  q, k, v = rule.scale * q.astype(dtype), k.astype(dtype), v.astype(dtype)
  scores = jnp.einsum('bksd,bkrd->bksr', k, q)
  if rule.softcap is not None:
    capped = jnp.tanh(scores / rule.softcap)
    scores = rule.softcap * capped
  if masked:
    query = jax.tree.map(lambda x: x[:, None, None, :], query)
    key = jax.tree.map(lambda x: x[:, None, :, None], key)
    scores = jnp.where(masks.sees(rule.mask, query, key), scores, -jnp.inf)
  p = jnp.exp(scores - m[:, :, None]) * share[:, :, None]
  dv = jnp.einsum('bksr,bkre->bkse', p, do)
  dp = jnp.einsum('bkse,bkre->bksr', v, do)
  dx = p * (dp - delta[:, :, None])
  if rule.softcap is not None:
    dx *= 1 - capped**2
  dq = rule.scale * jnp.einsum('bksd,bksr->bkdr', k, dx)
  dk = jnp.einsum('bksr,bkrd->bksd', dx, q)
  return jnp.swapaxes(dq, 2, 3), dk, dv


def _accumulator(x):
  return jnp.promote_types(jnp.float32, x.dtype)


def _finite(m):
  """What to subtract where nothing was seen: -inf - -inf would be NaN."""
  return jnp.where(m == -jnp.inf, 0, m)


def _blocks(x, block, k=None):
  """`b t h ...` to `n b k r ...`: n blocks of rows r = (g c), for h = (k g)."""
  b, t, h, *rest = x.shape
  n, g = math.ceil(t / block), h // (k or h)
  x = jnp.pad(x, [(0, 0), (0, n * block - t)] + [(0, 0)] * (x.ndim - 2))
  # One axis at a time: so batch and heads may be sharded in Explicit mode.
  x = x.reshape(b, n, block, h, *rest).reshape(b, n, block, h // g, g, *rest)
  return jnp.moveaxis(x, (1, 2), (0, 4)).reshape(n, b, h // g, g * block, *rest)


def _unblocks(x, t, h):
  """`n b k r ...` back to `b t h ...`."""
  n, b, k, r, *rest = x.shape
  g, c = h // k, r * k // h
  x = jnp.moveaxis(x.reshape(n, b, k, g, c, *rest), (0, 4), (1, 2))
  x = x.reshape(b, n * c, k, g, *rest).reshape(b, n * c, h, *rest)
  return x[:, :t]


def _token_blocks(tokens, block):
  """`b t` to `n b c`."""

  def blocks(x, **mode):
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), **mode)
    return jnp.moveaxis(x.reshape(len(x), -1, block), 1, 0)

  # Padding is in segment 0. It repeats the last order and tags, for ranges to
  # stay tight where there are no segments (that is, among queries only).
  side = jax.tree.map(functools.partial(blocks, mode='edge'), tokens.side)
  return Tokens(side, jax.tree.map(blocks, tokens.segments))


def _fold(rule, visit, carry, query, keys):
  """carry = visit(j, carry, masked) for each block j of keys that may be seen.

  `query` is the extent of the queries, `b`; `keys` are those of all blocks of
  keys, `n b`. A tile counts as empty or full if it is so in all rows of the
  batch. The full ones are visited first, those that need the mask second, in
  two loops: a branch in a single loop would copy what it returns.
  """
  if len(keys.uniform) == 1:
    return visit(0, carry, True)
  empty, full = masks.judge(rule.mask, query, keys)
  kind = jnp.where(empty.all(-1), 2, jnp.where(full.all(-1), 0, 1))
  order = jnp.argsort(kind, stable=True)
  unmasked, seen = jnp.sum(kind == 0), jnp.sum(kind < 2)
  carry = lax.fori_loop(
    0, unmasked, lambda i, carry: visit(order[i], carry, False), carry
  )
  return lax.fori_loop(
    unmasked, seen, lambda i, carry: visit(order[i], carry, True), carry
  )


def _arrange(rule, like_q, like_k, query, key):
  """Blocks of all that travels with queries, with keys; and their extents."""
  heads = like_k[0].shape[2]
  queries = [_blocks(x, rule.block_q, heads) for x in like_q]
  keys = [_blocks(x, rule.block_k) for x in like_k]
  query = _token_blocks(query, rule.block_q)
  key = _token_blocks(key, rule.block_k)
  g = like_q[0].shape[2] // heads
  rows = jax.tree.map(lambda x: jnp.tile(x, g), query)
  return (*queries, rows), (*keys, key), masks.extent(query), masks.extent(key)


def _scan(f, carry, blocks):
  """A loop over blocks, unless there is only one."""
  return lax.scan(f, carry, blocks, unroll=len(blocks[0][0]) == 1)


def _at(blocks, j):
  return jax.tree.map(
    lambda x: lax.dynamic_index_in_dim(x, j, keepdims=False), blocks
  )


def _add_at(blocks, j, more):
  more = more + _at(blocks, j)
  return lax.dynamic_update_index_in_dim(blocks, more, j, 0)


@functools.partial(jax.jit, static_argnums=0)
def _forward(rule, q, k, v, query, key):
  """The finished o, m and l."""
  queries, keys, extents, key_extents = _arrange(rule, [q], [k, v], query, key)

  def read(_, block):
    queries, extent = block

    def visit(j, partial, masked):
      return merge(partial, _tile(rule, queries, _at(keys, j), masked))

    zero = jnp.zeros_like(queries[0][..., 0], _accumulator(q))
    zeros = zero[..., None] + jnp.zeros(v.shape[-1], zero.dtype)
    nothing = Partial(jnp.full_like(zero, -jnp.inf), zero, zeros)
    partial = _fold(rule, visit, nothing, extent, key_extents)
    o, _ = finish(partial)
    return None, (o.astype(rule.dtype), partial.m, partial.l)

  _, blocks = _scan(read, None, (queries, extents))
  return tuple(_unblocks(x, *q.shape[1:3]) for x in blocks)


@functools.partial(jax.jit, static_argnums=0)
def _backward(rule, q, k, v, query, key, o, m, total, do, dm, dtotal):
  """dq, dk and dv; m is a constant."""
  dtype = _accumulator(q)
  do = do.astype(dtype)
  delta = jnp.sum(do * o, -1) - total * dtotal
  unseen = total == 0
  m, share = jnp.where(unseen, jnp.inf, m), 1 / jnp.where(unseen, 1, total)
  queries, keys, extents, key_extents = _arrange(
    rule, [q, do, m, share, delta], [k, v], query, key
  )

  def read(totals, block):
    queries, extent = block

    def visit(j, carry, masked):
      dq, dk, dv = carry
      more = _tile_gradient(rule, queries, _at(keys, j), masked)
      return dq + more[0], _add_at(dk, j, more[1]), _add_at(dv, j, more[2])

    carry = jnp.zeros_like(queries[0], dtype), *totals
    dq, *totals = _fold(rule, visit, carry, extent, key_extents)
    return tuple(totals), dq

  totals = tuple(jnp.zeros_like(x, dtype) for x in keys[:2])
  (dk, dv), dq = _scan(read, totals, (queries, extents))
  return tuple(
    _unblocks(dx, *x.shape[1:3]).astype(x.dtype)
    for x, dx in ((q, dq), (k, dk), (v, dv))
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule, q, k, v, query, key):
  return _forward(rule, q, k, v, query, key)


def _attend_fwd(rule, *inputs):
  results = _forward(rule, *inputs)
  return results, (*inputs, *results)


def _attend_bwd(rule, residuals, gradients):
  return *_backward(rule, *residuals, *gradients), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
