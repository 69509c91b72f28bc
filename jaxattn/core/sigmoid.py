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
from jax import lax
from jax.typing import ArrayLike

from pallas_kernels import masks, tiles
from pallas_kernels.blocks import Blocks
from pallas_kernels.masks import Everything, Mask
from pallas_kernels.problem import (
  Engine,
  Monoid,
  Operands,
  Over,
  accumulator,
  alike,
  floats,
  problem,
  reverse,
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
  over: Over | None = None,
) -> jax.Array:
  """mask(sigmoid(scale q k^T + offset)) v, in memory linear in t and s.

  Arguments are those of `softmax.attention`, and besides

  Args:
    offset: a number, or one per query, `b t h` or what broadcasts to it; it
      gets a gradient.

    over: spreads the work over devices, see `softmax.attention`.

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
  (b, t, h, _), accurate = q.shape, accumulator(q)
  offset = jnp.asarray(offset, accurate)
  offset = offset.reshape((1,) * (3 - offset.ndim) + offset.shape)
  if jnp.broadcast_shapes(offset.shape, (b, t, h)) != (b, t, h):
    raise ValueError(f'offset must fit {(b, t, h)}, not {offset.shape}')
  offset = jnp.broadcast_to(offset, (offset.shape[0], t, offset.shape[2]))
  rule = dataclasses.replace(rule, scores=(*rule.scores, _add))
  own = Operands(queries=(offset,))
  extras = extras._replace(scores=(*extras.scores, own))
  run = ENGINE if over is None else over(ENGINE)
  (o,) = run.attend(rule, q, k, v, extras, query, key)
  return o


def _add(x, query, key, offset):
  return x + offset


def attend(rule, q, k, v, extras, query, key):
  """o alone in a tuple; arguments as in `problem`."""
  prepared, *tokens, single = tiles.prepare(rule, q, k, query, key)
  if single:
    own = tiles.as_tile(extras)
    x, _, _ = tiles.at_once(prepared, q, k, own, *tokens)
    v = jnp.repeat(v.astype(x.dtype), q.shape[2] // v.shape[2], axis=2)
    o = jnp.einsum('bhts,bshe->bthe', jax.nn.sigmoid(x), v)
    return (o.astype(rule.dtype),)
  return _attend(rule, *alike((q, k, v, extras), (query, key)), query, key)


def _weights(rule, queries, keys, masked, extras):
  """p = sigmoid(x) 'b k s r' of a tile, and what takes dp to the inputs."""
  (q, query), (k, key) = queries, keys

  def scores(q, k, values):
    x = jnp.einsum('bksd,bkrd->bksr', k, rule.scale * q)
    own = with_floats(extras, values)
    return tiles.by_head(rule.scored, x, query, key, own, rule.blocks.q)

  x, back = jax.vjp(scores, q, k, floats(extras))
  if masked:
    across = jax.tree.map(lambda x: x[:, None, None, :], query)
    along = jax.tree.map(lambda x: x[:, None, :, None], key)
    x = jnp.where(masks.sees(rule.mask, across, along), x, -jnp.inf)
  p = jax.nn.sigmoid(x)
  return p, lambda dp: back(p * (1 - p) * dp)


def _exact(*arrays):
  return tuple(x.astype(accumulator(x)) for x in arrays)


@functools.partial(jax.jit, static_argnums=0)
def forward(rule, q, k, v, extras, query, key):
  """o alone in a tuple."""
  rule, query, key, _ = tiles.prepare(rule, q, k, query, key)
  queries, keys, extents, key_extents = tiles.arrange(
    rule, _exact(q), _exact(k, v), query, key
  )
  laid = tiles.lay(rule, extras)

  def read(_, block):
    i, (q, tokens), extent = block

    def visit(j, o, masked):
      k, v, key = tiles.at(keys, j)
      own = tiles.cut(rule, laid, i, j)
      p, _ = _weights(rule, (q, tokens), (k, key), masked, own)
      return o + jnp.einsum('bksr,bkse->bkre', p, v)

    o = nothing(q, v)
    return None, tiles.fold(rule, visit, o, extent, key_extents)

  i = jnp.arange(len(queries[0]))
  _, blocks = tiles.scan(read, None, (i, queries, extents))
  return (tiles.join(blocks, *q.shape[1:3]).astype(rule.dtype),)


@functools.partial(jax.jit, static_argnums=0)
def backward(rule, q, k, v, extras, query, key, o, do):
  """dq, dk, dv and the gradient of extras."""
  del o
  rule, query, key, _ = tiles.prepare(rule, q, k, query, key)
  queries, keys, extents, key_extents = tiles.arrange(
    rule, _exact(q, do), _exact(k, v), query, key
  )
  laid = tiles.lay(rule, extras)

  def read(totals, block):
    i, (q, do, tokens), extent = block

    def visit(j, carry, masked):
      dq, dk, dv, dextras = carry
      k, v, key = tiles.at(keys, j)
      own = tiles.cut(rule, laid, i, j)
      p, back = _weights(rule, (q, tokens), (k, key), masked, own)
      more = back(jnp.einsum('bkse,bkre->bksr', v, do))
      return (
        dq + more[0],
        tiles.add_at(dk, j, more[1]),
        tiles.add_at(dv, j, jnp.einsum('bksr,bkre->bkse', p, do)),
        tiles.paste(rule, dextras, more[2], i, j),
      )

    carry = jnp.zeros_like(q), *totals
    dq, *totals = tiles.fold(rule, visit, carry, extent, key_extents)
    return tuple(totals), dq

  totals = *map(jnp.zeros_like, keys[:2]), tiles.nothing(laid)
  i = jnp.arange(len(queries[0]))
  totals, dq = tiles.scan(read, totals, (i, queries, extents))
  dk, dv, dextras = totals
  return *(
    tiles.join(dx, *x.shape[1:3]) for x, dx in ((q, dq), (k, dk), (v, dv))
  ), tiles.gather(dextras, extras)


def nothing(q, v):
  """o of no keys."""
  zero = jnp.zeros_like(q[..., :1], accumulator(q))
  return zero + jnp.zeros(v.shape[-1], zero.dtype)


# Looked up when called, as everything in a module is.
_attend = reverse(lambda *x: forward(*x), lambda *x: backward(*x))
MONOID = Monoid(nothing, lambda o: o, jnp.add, lambda o: (o,), lax.psum)
ENGINE = Engine(attend, forward, backward, MONOID)
