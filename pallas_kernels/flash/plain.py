"""Softmax attention in tiles without a rule of our own for its gradient.

JAX differentiates it, in any mode and to any order. Memory is linear in the
lengths both ways, for every tile is computed again where it is needed; time is
more than that of `xla`, which knows the gradient in closed form.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import masks, tiles
from pallas_kernels.flash.partial import (
  Partial,
  finish,
  finite,
  merge,
  nothing,
)
from pallas_kernels.problem import Engine, alike


def attend(rule, q, k, v, extras, query, key):
  """Finished o, m and l; arguments as in `problem`."""
  rule, query, key, single = tiles.prepare(rule, q, k, query, key)
  if single:
    return whole(rule, q, k, v, extras, query, key)
  q, k, v, extras = alike((q, k, v, extras), (query, key))
  return _folded(rule, q, k, v, extras, query, key)


def whole(rule, q, k, v, extras, query, key):
  """The same for what fits one tile: the formula itself."""
  extras = tiles.as_tile(extras)
  m, l, o = _tile(rule, q, k, v, extras, query, key)  # noqa: E741
  o, _ = finish(Partial(m, l, o))
  return o.astype(rule.dtype), m, l


def _tile(rule, q, k, v, extras, query, key):
  """Attention of queries `b t h d` to keys `b s k d`, a Partial."""
  x, query, key = tiles.at_once(rule, q, k, extras, query, key)
  m = lax.stop_gradient(jnp.max(x, -1, initial=-jnp.inf))
  p = jnp.exp(x - finite(m)[..., None])
  w = rule.weighed(p, query, key, extras)
  (b, h, *sides), heads = w.shape, k.shape[2]
  w = w.reshape(b, heads, h // heads, *sides)
  o = jnp.einsum('bkgts,bske->btkge', w, v.astype(w.dtype))
  at_token = lambda x: jnp.swapaxes(x, 1, 2)
  o = o.reshape(b, sides[0], h, v.shape[-1])
  return Partial(at_token(m), at_token(p.sum(-1)), o)


@functools.partial(jax.jit, static_argnums=0)
def _folded(rule, q, k, v, extras, query, key):
  laid = tiles.lay(rule, extras)
  query, key = (
    tiles.token_blocks(tokens, block)
    for tokens, block in ((query, rule.blocks.q), (key, rule.blocks.k))
  )
  extents, key_extents = masks.extent(query), masks.extent(key)
  # Filled up with what occurs, see `tiles.arrange`.
  in_blocks = lambda x, block: jnp.swapaxes(
    tiles.split(x, block, last=True), 2, 3
  )
  q_blocks = in_blocks(q, rule.blocks.q)  # 'n b c h d'
  k_blocks, v_blocks = in_blocks(k, rule.blocks.k), in_blocks(v, rule.blocks.k)

  @jax.checkpoint  # what the inner scan keeps lives for one block of queries
  def read(block):
    i, q, query, extent = block

    @jax.checkpoint
    def visit(partial, block):
      j, k, v, key, key_extent = block

      def seen(partial):
        own = tiles.cut(rule, laid, i, j)
        return merge(partial, _tile(rule, q, k, v, own, query, key))

      empty, _ = masks.judge(rule.mask, extent, key_extent)
      empty = jnp.all(empty)
      return lax.cond(empty, lambda partial: partial, seen, partial), None

    blocks = (jnp.arange(len(k_blocks)), k_blocks, v_blocks, key, key_extents)
    partial, _ = lax.scan(visit, nothing(q, v), blocks)
    o, _ = finish(partial)
    return o.astype(rule.dtype), partial.m, partial.l

  o, m, l = lax.map(  # noqa: E741
    read, (jnp.arange(len(q_blocks)), q_blocks, query, extents)
  )
  t = q.shape[1]
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(
    x.shape[1], x.shape[0] * x.shape[2], *x.shape[3:]
  )
  return join(o)[:, :t], join(m)[:, :t], join(l)[:, :t]


ENGINE = Engine(attend)
