"""Attention in tiles, but for its arithmetic: how tiles lie, which are visited.

A tile is block_q queries by block_k keys. Inside, the queries of the g heads
that share a key head are rows r = (g c) of one matrix `b k r d`, beside the
keys `b k s d`. Ranges of orders and segments tell whether a tile is empty
(skipped), full (no mask is needed) or mixed; an engine brings what it computes
in one.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from pallas_kernels import masks
from pallas_kernels.blocks import Blocks
from pallas_kernels.masks import Tokens
from pallas_kernels.problem import (
  Extras,
  Operands,
  Rule,
  accumulator,
  floats,
  one_segment,
)


def prepare(rule: Rule, q, k, query: Tokens, key: Tokens):
  """The rule with its blocks chosen, and the tokens for it.

  Returns:
    rule, query, key, and whether one tile holds all.
  """
  (b, t, h, _), s = q.shape, k.shape[1]
  side = chosen(t, s, b * h)
  q_side = _block(rule.blocks.q, t, side)
  k_side = _block(rule.blocks.k, s, max(side, side**2 // q_side))
  # A tile that was not asked for is not much wider than it is high.
  most = k_side if rule.blocks.k else min(k_side, side)
  single = 0 in (b, t, s) or (t <= q_side and s <= most)
  if s % k_side:  # the last block holds padding, which nobody may see
    query, key = one_segment(query), one_segment(key)
  rule = dataclasses.replace(rule, blocks=Blocks(q_side, k_side))
  return rule, query, key, single


def chosen(t: int, s: int, heads: int = 1) -> int:
  """The side of a tile that keeps a CPU busy, with all heads in its cache.

  Cut in four or more, a causal sequence has tiles to skip.
  """
  side = 512
  while side > 128 and 4 * side > max(t, s):
    side //= 2
  while side > 64 and heads * side**2 > 2**20:
    side //= 2
  return side


def _block(block, length, default):
  if block is None:  # blocks of equal size need the least padding
    block = math.ceil(length / math.ceil(max(1, length) / default))
  return max(1, min(block, length))


def by_head(fn, x, query: Tokens, key: Tokens, extras: Extras, block_q):
  """fn on a tile's `b k s r`, keys first, which itself wants `b h t s`."""
  b, k, s, r = x.shape
  g = r // block_q
  x = x.reshape(b, k, s, g, -1).transpose(0, 1, 3, 4, 2)
  across = jax.tree.map(lambda x: x[:, None, : r // g, None], query.side)
  along = jax.tree.map(lambda x: x[:, None, None, :], key.side)
  x = fn(x.reshape(b, k * g, -1, s), across, along, extras)
  return x.reshape(b, k, g, -1, s).transpose(0, 1, 4, 2, 3).reshape(b, k, s, r)


def at_once(rule: Rule, q, k, extras: Extras, query: Tokens, key: Tokens):
  """All scores `b h t s`, -inf where unseen; and where tokens stand, likewise.

  The extras are those of a tile, see `cut`.
  """
  (b, t, h, d), heads, dtype = q.shape, k.shape[2], accumulator(q)
  q = q.astype(dtype).reshape(b, t, heads, h // heads, d)
  x = rule.scale * jnp.einsum('btkgd,bskd->bkgts', q, k.astype(dtype))
  query = jax.tree.map(lambda x: x[:, None, :, None], query)
  key = jax.tree.map(lambda x: x[:, None, None, :], key)
  x = x.reshape(b, h, *x.shape[3:])
  x = rule.scored(x, query.side, key.side, extras)
  x = jnp.where(masks.sees(rule.mask, query, key), x, -jnp.inf)
  return x, query.side, key.side


def as_tile(extras: Extras) -> Extras:
  """Extras as those of the one tile that holds all."""

  def own(operands):
    return Operands(
      operands.heads,
      tuple(jnp.swapaxes(x, 1, 2)[..., None] for x in operands.queries),
      tuple(jnp.swapaxes(x, 1, 2)[..., None, :] for x in operands.keys),
    )

  return Extras(
    tuple(map(own, extras.scores)), tuple(map(own, extras.weights)), extras.bias
  )


def filled(x, axis, length, last=False):
  """x with zeros behind it along an axis, or with its last entry repeated.

  As `jnp.pad` does it, but that other axes may be sharded in Explicit mode.
  """
  more = length - x.shape[axis]
  if not more:
    return x
  if not last:
    return jnp.pad(x, [(0, more * (at == axis)) for at in range(x.ndim)])
  behind = lax.slice_in_dim(x, x.shape[axis] - 1, x.shape[axis], axis=axis)
  shape = [more if at == axis else n for at, n in enumerate(x.shape)]
  return jnp.concatenate([x, jnp.broadcast_to(behind, shape)], axis)


def split(x, block, k=None, last=False):
  """`b t h ...` to `n b k r ...`: n blocks of rows r = (g c), for h = (k g).

  The last block is filled up, see `filled`.
  """
  b, t, h, *rest = x.shape
  n, g = math.ceil(t / block), h // (k or h)
  x = filled(x, 1, n * block, last)
  # One axis at a time: so batch and heads may be sharded in Explicit mode.
  x = x.reshape(b, n, block, h, *rest).reshape(b, n, block, h // g, g, *rest)
  return jnp.moveaxis(x, (1, 2), (0, 4)).reshape(n, b, h // g, g * block, *rest)


def join(x, t, h):
  """`n b k r ...` back to `b t h ...`."""
  n, b, k, r, *rest = x.shape
  g, c = h // k, r * k // h
  x = jnp.moveaxis(x.reshape(n, b, k, g, c, *rest), (0, 4), (1, 2))
  x = x.reshape(b, n * c, k, g, *rest).reshape(b, n * c, h, *rest)
  return x[:, :t]


def token_blocks(tokens, block):
  """`b t` to `n b c`."""

  def blocks(x, last=False):
    n = math.ceil(x.shape[1] / block)
    x = filled(x, 1, n * block, last).reshape(len(x), n, block)
    return jnp.moveaxis(x, 1, 0)

  # Padding is in segment 0. It repeats the last order and tags, for ranges to
  # stay tight where there are no segments (that is, among queries only).
  side = jax.tree.map(functools.partial(blocks, last=True), tokens.side)
  return Tokens(side, jax.tree.map(blocks, tokens.segments))


def arrange(rule: Rule, like_q, like_k, query: Tokens, key: Tokens):
  """Blocks of all that travels with queries, with keys; and their extents.

  Queries and keys come first. They are filled up with what occurs: a score of
  the padding, which nobody sees, then has a derivative as others have.
  """
  heads = like_k[0].shape[2]
  queries = [
    split(x, rule.blocks.q, heads, at == 0) for at, x in enumerate(like_q)
  ]
  keys = [split(x, rule.blocks.k, last=at == 0) for at, x in enumerate(like_k)]
  query = token_blocks(query, rule.blocks.q)
  key = token_blocks(key, rule.blocks.k)
  g = like_q[0].shape[2] // heads
  rows = jax.tree.map(lambda x: jnp.tile(x, g), query)
  return (*queries, rows), (*keys, key), masks.extent(query), masks.extent(key)


def lay(rule: Rule, extras: Extras) -> Extras:
  """Extras whose queries and keys are blocks `n b h c`, and the bias is whole.

  The bias `b h t s` is padded to whole blocks.
  """
  blocks = rule.blocks

  def per_token(own):
    # Filled up with what occurs: a score may divide by it.
    return Operands(
      own.heads,
      tuple(split(x, blocks.q, last=True) for x in own.queries),
      tuple(split(x, blocks.k, last=True) for x in own.keys),
    )

  bias = extras.bias
  if bias is not None:
    _, _, t, s = bias.shape
    fill = (0, -t % blocks.q), (0, -s % blocks.k)
    bias = jnp.pad(bias, [(0, 0), (0, 0), *fill])
  return Extras(
    tuple(map(per_token, extras.scores)),
    tuple(map(per_token, extras.weights)),
    bias,
  )


def cut(rule: Rule, laid: Extras, i, j) -> Extras:
  """What the tile of query block i and key block j reads of `lay`'s result."""

  def per_token(own):
    return Operands(
      own.heads,
      tuple(x[..., :, None] for x in at(own.queries, i)),
      tuple(x[..., None, :] for x in at(own.keys, j)),
    )

  bias = laid.bias
  if bias is not None:
    q, k = rule.blocks.q, rule.blocks.k
    corner = (0, 0, i * q, j * k)
    bias = lax.dynamic_slice(bias, corner, (*bias.shape[:2], q, k))
  return Extras(
    tuple(map(per_token, laid.scores)),
    tuple(map(per_token, laid.weights)),
    bias,
  )


def paste(rule: Rule, totals: Extras, tile: Extras, i, j) -> Extras:
  """Adds a tile's gradient, as `cut` shaped it, to totals like `lay`'s."""

  def per_token(total, tile):
    return Operands(
      jax.tree.map(jnp.add, total.heads, tile.heads),
      jax.tree.map(
        lambda x, more: add_at(x, i, more[..., :, 0]),
        total.queries,
        tile.queries,
      ),
      jax.tree.map(
        lambda x, more: add_at(x, j, more[..., 0, :]), total.keys, tile.keys
      ),
    )

  bias = totals.bias
  if bias is not None:
    # Written, not added: a tile is visited once.
    corner = (0, 0, i * rule.blocks.q, j * rule.blocks.k)
    bias = lax.dynamic_update_slice(bias, tile.bias.astype(bias.dtype), corner)
  return Extras(
    tuple(map(per_token, totals.scores, tile.scores)),
    tuple(map(per_token, totals.weights, tile.weights)),
    bias,
  )


def nothing(laid: Extras) -> Extras:
  """Zero totals for `paste`, for what can have a gradient.

  Sums over tiles are as wide as all sums; an entry of a bias is not a sum.
  """
  wide = lambda x: jnp.zeros_like(x, accumulator(x))
  totals = jax.tree.map(wide, floats(laid._replace(bias=None)))
  return totals._replace(bias=jax.tree.map(jnp.zeros_like, laid.bias))


def gather(totals: Extras, extras: Extras) -> Extras:
  """The gradient of the extras, from totals."""
  like = floats(extras)

  def own(total, like):
    back = lambda x, to: join(x, *to.shape[1:])
    return Operands(
      total.heads,
      jax.tree.map(back, total.queries, like.queries),
      jax.tree.map(back, total.keys, like.keys),
    )

  bias = totals.bias
  if bias is not None:
    bias = bias[:, :, : like.bias.shape[2], : like.bias.shape[3]]
  return Extras(
    tuple(map(own, totals.scores, like.scores)),
    tuple(map(own, totals.weights, like.weights)),
    bias,
  )


def fold(rule: Rule, visit, carry, query, keys):
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
  carry = lax.fori_loop(
    unmasked, seen, lambda i, carry: visit(order[i], carry, True), carry
  )
  return jax.tree.map(_not_backwards.bind, carry)


def _refuse(dx, x):
  raise NotImplementedError(
    "attention, implementation='xla' or another in tiles: its loops are of"
    ' unknown length, so there is no reverse mode over reverse: use'
    " implementation='plain', or forward mode over reverse"
  )


# Does nothing, but that reverse mode, on its way to a loop, comes here first.
_not_backwards = Primitive('not_backwards')
_not_backwards.def_impl(lambda x: x)
_not_backwards.def_abstract_eval(lambda x: x)
ad.deflinear2(_not_backwards, _refuse)
batching.defvectorized(_not_backwards)
mlir.register_lowering(_not_backwards, lambda context, x: [x])


def scan(f, carry, blocks):
  """A loop over blocks, unless there is only one."""
  return lax.scan(f, carry, blocks, unroll=len(jax.tree.leaves(blocks)[0]) == 1)


def at(blocks, j):
  """Block j."""
  return jax.tree.map(
    lambda x: lax.dynamic_index_in_dim(x, j, keepdims=False), blocks
  )


def add_at(blocks, j, more):
  """Adds to block j."""
  more = more + at(blocks, j)
  return lax.dynamic_update_index_in_dim(blocks, more, j, 0)
