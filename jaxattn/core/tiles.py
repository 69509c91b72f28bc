"""Attention in tiles, but for its arithmetic: how tiles lie, which are visited.

A tile is block_q queries by block_k keys. Inside, the queries of the g heads
that share a key head are rows r = (g c) of one matrix `b k r d`, beside the
keys `b k s d`. Ranges of orders and segments tell whether a tile is empty
(skipped), full (no mask is needed) or mixed; an engine (`softmax`, `sigmoid`)
brings what it computes in one.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxattn.core import masks
from jaxattn.core.masks import Mask, Side, Tokens
from jaxattn.core.scores import Score, SoftCap


@dataclasses.dataclass(frozen=True)
class Rule:
  """What is known of a call while tracing.

  Attributes:
    mask: which keys a query sees.
    scale: multiplies the scores.
    scores: what then happens to them, see `Score.fn`.
    dtype: of the result.
    block_q, block_k: the sides of a tile; 0 before they are chosen.
  """

  mask: Mask
  scale: float
  scores: tuple
  dtype: np.dtype
  block_q: int = 0
  block_k: int = 0

  def scored(self, x, query: Side, key: Side, operands):
    """Scores `b h t s` modified; sides `b 1 t 1`, `b 1 1 s`."""
    for fn, own in zip(self.scores, operands):
      x = fn(x, query, key, *own)
    return x


def problem(
  q,
  k,
  v,
  *,
  mask: Mask,
  query: tuple,
  key: tuple,
  scale: float | None = None,
  softcap: float | None = None,
  score: Score | None = None,
  wide: bool = False,
) -> tuple[Rule, Tokens, Tokens, tuple]:
  """Checks the arguments of a call and fills in what was left out.

  Args:
    q, k, v, mask, scale, softcap, score: see `softmax.attention`.
    query, key: (order, segments, tags), each as given or None.
    wide: the result is in float32 or wider, whatever q is.

  Returns:
    The rule, the tokens of both sides, and the operands of the scores.

  Raises:
    ValueError: shapes that do not fit each other.
  """
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
  scores = []
  if softcap is not None:
    scores.append(Score(SoftCap(float(softcap))))
  if score is not None:
    for operand in score.operands:
      if operand.shape[:1] != q.shape[2:3]:
        raise ValueError(
          f'operands of a score lead with the {q.shape[2]} heads, not'
          f' {operand.shape}'
        )
    scores.append(score)
  query, key = _tokens('query', q, *query), _tokens('key', k, *key)
  if (query.segments is None) != (key.segments is None):
    query, key = one_segment(query), one_segment(key)
  rule = Rule(
    mask=mask,
    scale=1 / math.sqrt(q.shape[3]) if scale is None else float(scale),
    scores=tuple(score.fn for score in scores),
    dtype=accumulator(q) if wide else q.dtype,
  )
  return rule, query, key, tuple(score.operands for score in scores)


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


def one_segment(tokens: Tokens) -> Tokens:
  """Tokens whose segments are spelled out: what was None is segment 1."""
  if tokens.segments is not None:
    return tokens
  return tokens._replace(segments=jnp.ones_like(tokens.side.order))


def sides(b: int, h: int, t: int, s: int, block_q, block_k):
  """block_q and block_k, chosen where None; and whether one tile holds all.

  The choice keeps a CPU busy and a tile of all heads in its cache. Cut in four
  or more, a causal sequence has tiles to skip.
  """
  side = 512
  while side > 128 and 4 * side > max(t, s):
    side //= 2
  while side > 64 and b * h * side**2 > 2**20:
    side //= 2
  block_q = _block('block_q', block_q, t, side)
  block_k = _block('block_k', block_k, s, max(side, side**2 // block_q))
  single = 0 in (t, s) or (t <= block_q and s <= min(block_k, side))
  return block_q, block_k, single


def _block(name, block, length, default):
  if block is None:  # blocks of equal size need the least padding
    block = math.ceil(length / math.ceil(max(1, length) / default))
  elif block < 1:
    raise ValueError(f'{name} must be at least 1, not {block}')
  return max(1, min(block, length))


def alike(inputs, tokens):
  """Adds to all inputs a zero made of them all.

  Under shard_map they then vary over the same mesh axes, and so do the carries
  made from them; and the gradient of an input is summed over the axes along
  which it did not vary. Elsewhere it is a constant that costs nothing.
  """
  leaves = jax.tree.leaves((inputs, tokens))
  nothing = [jnp.sum(x[..., :0]).astype(jnp.float32) for x in leaves]
  return jax.tree.map(lambda x: x + sum(nothing).astype(x.dtype), inputs)


def accumulator(x: ArrayLike) -> np.dtype:
  """What sums over keys are kept in."""
  return jnp.promote_types(jnp.float32, x.dtype)


def modified(rule: Rule, x, query: Tokens, key: Tokens, operands):
  """A tile's scores `b k s r`, keys first, as the rule modifies them."""
  if not rule.scores:
    return x
  b, k, s, r = x.shape
  g = r // rule.block_q
  x = x.reshape(b, k, s, g, -1).transpose(0, 1, 3, 4, 2)
  across = jax.tree.map(lambda x: x[:, None, : r // g, None], query.side)
  along = jax.tree.map(lambda x: x[:, None, None, :], key.side)
  x = rule.scored(x.reshape(b, k * g, -1, s), across, along, operands)
  return x.reshape(b, k, g, -1, s).transpose(0, 1, 4, 2, 3).reshape(b, k, s, r)


def plain(rule: Rule, q, k, query: Tokens, key: Tokens, operands):
  """All scores at once, `b h t s`, -inf where unseen."""
  k = jnp.repeat(k.astype(accumulator(q)), q.shape[2] // k.shape[2], axis=2)
  scores = rule.scale * jnp.einsum('bthd,bshd->bhts', q.astype(k.dtype), k)
  query = jax.tree.map(lambda x: x[:, None, :, None], query)
  key = jax.tree.map(lambda x: x[:, None, None, :], key)
  scores = rule.scored(scores, query.side, key.side, operands)
  return jnp.where(masks.sees(rule.mask, query, key), scores, -jnp.inf)


def split(x, block, k=None):
  """`b t h ...` to `n b k r ...`: n blocks of rows r = (g c), for h = (k g)."""
  b, t, h, *rest = x.shape
  n, g = math.ceil(t / block), h // (k or h)
  x = jnp.pad(x, [(0, 0), (0, n * block - t)] + [(0, 0)] * (x.ndim - 2))
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


def _token_blocks(tokens, block):
  """`b t` to `n b c`."""

  def blocks(x, **mode):
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), **mode)
    return jnp.moveaxis(x.reshape(len(x), -1, block), 1, 0)

  # Padding is in segment 0. It repeats the last order and tags, for ranges to
  # stay tight where there are no segments (that is, among queries only).
  side = jax.tree.map(functools.partial(blocks, mode='edge'), tokens.side)
  return Tokens(side, jax.tree.map(blocks, tokens.segments))


def arrange(rule: Rule, like_q, like_k, query: Tokens, key: Tokens):
  """Blocks of all that travels with queries, with keys; and their extents."""
  heads = like_k[0].shape[2]
  queries = [split(x, rule.block_q, heads) for x in like_q]
  keys = [split(x, rule.block_k) for x in like_k]
  query = _token_blocks(query, rule.block_q)
  key = _token_blocks(key, rule.block_k)
  g = like_q[0].shape[2] // heads
  rows = jax.tree.map(lambda x: jnp.tile(x, g), query)
  return (*queries, rows), (*keys, key), masks.extent(query), masks.extent(key)


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
  return lax.fori_loop(
    unmasked, seen, lambda i, carry: visit(order[i], carry, True), carry
  )


def scan(f, carry, blocks):
  """A loop over blocks, unless there is only one."""
  return lax.scan(f, carry, blocks, unroll=len(blocks[0][0]) == 1)


def at(blocks, j):
  """Block j."""
  return jax.tree.map(
    lambda x: lax.dynamic_index_in_dim(x, j, keepdims=False), blocks
  )


def add_at(blocks, j, more):
  """Adds to block j."""
  more = more + at(blocks, j)
  return lax.dynamic_update_index_in_dim(blocks, more, j, 0)
