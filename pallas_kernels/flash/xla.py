"""Softmax attention in tiles, in plain JAX, with its gradient written by hand.

Rabe, Staats 2021, "Self-attention Does Not Need O(n^2) Memory",
https://arxiv.org/abs/2112.05682; Dao 2023, "FlashAttention-2",
https://arxiv.org/abs/2307.08691.

`attend` folds `merge` over tiles of queries by keys. Its gradient keeps m, l
and finished o, and computes each tile again. With x_j the scores, p_j =
exp(x_j - m) / l, w_j = f_j p_j where f is what happens to the weights (1 if
nothing does), o = sum_j w_j v_j, and do and dl the gradients of o and l,

  dv_j = w_j do
  dp_j = f_j do . v_j
  dx_j = p_j (dp_j - do . o + l dl)

for dp_i/dx_j = p_i (1[i=j] - p_j), do . o = sum_j p_j dp_j, and dl/dx_j = l p_j
if m is held constant. Both directions take memory linear in the lengths. Only
what is shorter than a tile is left to the plain formula and to JAX's gradient.

Scores of a tile are `b k r s` forward and `b k s r` backward: so the matrix
products never transpose a tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import masks, tiles
from pallas_kernels.flash import plain
from pallas_kernels.flash.partial import (
  MONOID,
  Partial,
  finish,
  finite,
  merge,
  nothing,
)
from pallas_kernels.problem import (
  Engine,
  accumulator,
  alike,
  floats,
  reverse,
  with_floats,
)


def attend(rule, q, k, v, extras, query, key):
  """Finished o, m and l; arguments as in `problem`.

  Differentiate it in reverse mode, or in forward mode over reverse.
  """
  *_, single = tiles.prepare(rule, q, k, query, key)
  if single:
    return plain.whole(rule, q, k, v, extras, query, key)
  return _attend(rule, *alike((q, k, v, extras), (query, key)), query, key)


def _scores(rule, queries, keys, masked, extras):
  """Scores `b k r s` of scaled queries `b k r d` and keys `b k s d`."""
  (q, query), (k, key) = queries, keys
  x = jnp.einsum('bkrd,bksd->bkrs', q, k)
  if extras.scores or extras.bias is not None:
    x = tiles.by_head(rule.scored, x.mT, query, key, extras, rule.blocks.q).mT
  if masked:
    across = jax.tree.map(lambda x: x[:, None, :, None], query)
    along = jax.tree.map(lambda x: x[:, None, None, :], key)
    x = jnp.where(masks.sees(rule.mask, across, along), x, -jnp.inf)
  # What is computed apart, from the same, has the same bits.
  return lax.optimization_barrier(x) if _apart(q, k) else x


def _apart(q, k):
  """Whether both directions have to make scores in the same way, apart.

  exp makes much of the last bit of a large score: weights of other bits would
  not sum to l, nor their gradients to 0. How XLA for CPUs sums a product may
  depend on what divides its columns. Where 16 divides both sides of a tile the
  transposed product has the same bits, and is the faster.
  """
  return q.shape[2] % 16 != 0 or k.shape[2] % 16 != 0


def _tile(rule, queries, keys, masked, extras):
  """Attention of queries `b k r d` to keys `b k s d`."""
  (q, query), (k, v, key) = queries, keys
  dtype = accumulator(q)
  q, k, v = rule.scale * q.astype(dtype), k.astype(dtype), v.astype(dtype)
  x = _scores(rule, (q, query), (k, key), masked, extras)
  # A derivative of max would compare scores that XLA computes twice, and not
  # to the same bit, with their largest: 0 / 0 where none is equal.
  m = lax.stop_gradient(jnp.max(x, -1))
  w = p = jnp.exp(x - finite(m)[..., None])
  if extras.weights:
    w = tiles.by_head(rule.weighed, p.mT, query, key, extras, rule.blocks.q).mT
  return Partial(m, p.sum(-1), jnp.einsum('bkrs,bkse->bkre', w, v))


def _tile_gradient(rule, queries, keys, masked, extras):
  """dq, dk, dv of a tile, and the gradient of its extras.

  delta is do . o - l dl, and share is 1 / l.
  """
  (q, do, m, share, delta, query), (k, v, key) = queries, keys
  dtype = accumulator(q)
  q, k, v = rule.scale * q.astype(dtype), k.astype(dtype), v.astype(dtype)

  def by_head(fn, x):
    """fn(x), and the function from its gradient to that of x and extras."""
    if not extras:
      return x, lambda dx: (dx, ())
    return jax.vjp(
      lambda x, values: tiles.by_head(
        fn, x, query, key, with_floats(extras, values), rule.blocks.q
      ),
      *(x, floats(extras)),
    )

  x, to_scores = by_head(rule.scored, jnp.einsum('bksd,bkrd->bksr', k, q))
  if _apart(q, k):
    x = _scores(rule, (q, query), (k, key), masked, extras).mT
  elif masked:
    across = jax.tree.map(lambda x: x[:, None, None, :], query)
    along = jax.tree.map(lambda x: x[:, None, :, None], key)
    x = jnp.where(masks.sees(rule.mask, across, along), x, -jnp.inf)
  m = jnp.where(share == 0, jnp.inf, m)  # padded: exp must not overflow there
  p = jnp.exp(x - m[:, :, None]) * share[:, :, None]
  w, to_weights = by_head(rule.weighed, p)
  dv = jnp.einsum('bksr,bkre->bkse', w, do)
  dp, dextras = to_weights(jnp.einsum('bkse,bkre->bksr', v, do))
  dx, more = to_scores(p * (dp - delta[:, :, None]))
  dq = rule.scale * jnp.einsum('bksd,bksr->bkdr', k, dx)
  dk = jnp.einsum('bksr,bkrd->bksd', dx, q)
  return dq.mT, dk, dv, jax.tree.map(jnp.add, dextras, more)


@functools.partial(jax.jit, static_argnums=0)
def forward(rule, q, k, v, extras, query, key):
  """The finished o, m and l."""
  rule, query, key, _ = tiles.prepare(rule, q, k, query, key)
  queries, keys, extents, key_extents = tiles.arrange(
    rule, [q], [k, v], query, key
  )
  laid = tiles.lay(rule, extras)

  def read(_, block):
    i, queries, extent = block

    def visit(j, partial, masked):
      own = tiles.cut(rule, laid, i, j)
      return merge(
        partial, _tile(rule, queries, tiles.at(keys, j), masked, own)
      )

    partial = nothing(queries[0], v)
    partial = tiles.fold(rule, visit, partial, extent, key_extents)
    o, _ = finish(partial)
    return None, (o.astype(rule.dtype), partial.m, partial.l)

  i = jnp.arange(len(queries[0]))
  _, blocks = tiles.scan(read, None, (i, queries, extents))
  return tuple(tiles.join(x, *q.shape[1:3]) for x in blocks)


@functools.partial(jax.jit, static_argnums=0)
def backward(rule, q, k, v, extras, query, key, o, m, l, do, dm, dl):  # noqa: E741
  """dq, dk, dv and the gradient of extras; m is a constant."""
  del dm
  rule, query, key, _ = tiles.prepare(rule, q, k, query, key)
  dtype = accumulator(q)
  do = do.astype(dtype)
  delta = jnp.sum(do * o, -1) - l * dl
  unseen = l == 0
  m, share = jnp.where(unseen, jnp.inf, m), 1 / jnp.where(unseen, 1, l)
  queries, keys, extents, key_extents = tiles.arrange(
    rule, [q, do, m, share, delta], [k, v], query, key
  )
  laid = tiles.lay(rule, extras)

  def read(totals, block):
    i, queries, extent = block

    def visit(j, carry, masked):
      dq, dk, dv, dextras = carry
      own = tiles.cut(rule, laid, i, j)
      more = _tile_gradient(rule, queries, tiles.at(keys, j), masked, own)
      return (
        dq + more[0],
        tiles.add_at(dk, j, more[1]),
        tiles.add_at(dv, j, more[2]),
        tiles.paste(rule, dextras, more[3], i, j) if extras else dextras,
      )

    carry = jnp.zeros_like(queries[0], dtype), *totals
    dq, *totals = tiles.fold(rule, visit, carry, extent, key_extents)
    return tuple(totals), dq

  totals = tuple(jnp.zeros_like(x, dtype) for x in keys[:2])
  i = jnp.arange(len(queries[0]))
  (dk, dv, dextras), dq = tiles.scan(
    read, (*totals, tiles.nothing(laid)), (i, queries, extents)
  )
  dq, dk, dv = (
    tiles.join(dx, *x.shape[1:3]) for x, dx in ((q, dq), (k, dk), (v, dv))
  )
  return dq, dk, dv, tiles.gather(dextras, extras)


# Looked up when called, as everything in a module is.
_attend = reverse(lambda *x: forward(*x), lambda *x: backward(*x))
ENGINE = Engine(attend, forward, backward, MONOID)
