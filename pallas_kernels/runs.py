"""Which tiles a kernel visits: runs of tiles, in a table that is small.

A block of queries (or, going over the other side, of keys) has a few integers,
made from the ranges of orders and segments: two runs of tiles that may not be
empty, and one run of tiles that need no mask. What lies outside the two runs is
neither computed nor fetched; a hole inside the second is computed under the
mask. The table grows with the length, never with its square.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels import masks, tiles
from pallas_kernels.masks import Mask, Range, Tokens

FIELDS = 7
FIRST, COUNT, JUMP, TOTAL, LAST, CLEAR, CLEAR_END = range(FIELDS)


def table(
  mask: Mask,
  query: Tokens,
  key: Tokens,
  q: int,
  k: int,
  by_query: bool,
  plain: Callable[[Range, Range], ArrayLike] | None = None,
):
  """The runs of each block, int32 'rows * n * FIELDS'.

  Args:
    mask: which keys a query sees.
    query, key: tokens 'rows t' and 'rows s', where rows may be 1 in any array.
    q, k: queries and keys in a tile.
    by_query: blocks of queries have runs of keys, else the other way round.
    plain: what a tile must be besides, to need no mask.

  Tile n of a row lies at FIRST + n, or at JUMP + n from COUNT on. TOTAL counts
  the tiles, LAST is TOTAL - 1 or 0; those from CLEAR up to CLEAR_END need no
  mask: the last run of such tiles, and in all but odd masks the longest.
  """

  def extent(tokens, size, axis):
    blocks = masks.extent(tiles.token_blocks(tokens, size))  # 'n rows'
    return jax.tree.map(lambda x: jnp.expand_dims(x.T, axis), blocks)

  # As a kernel counts rows: what the mask reads may be the same for all.
  rows = max(map(len, jax.tree.leaves((query, key))))
  query, key = extent(query, q, 2), extent(key, k, 1)
  shape = rows, query.uniform.shape[1], key.uniform.shape[2]
  empty, full = masks.judge(mask, query, key)
  if plain is not None:
    full &= plain(query.range, key.range)
  empty, full = (jnp.broadcast_to(x, shape) for x in (empty, full))
  if not by_query:
    empty, full = empty.mT, full.mT
  n = empty.shape[-1]
  index = jnp.arange(n, dtype=jnp.int32)
  start = lambda x: jnp.min(jnp.where(x, index, n), -1)
  end = lambda x: jnp.max(jnp.where(x, index + 1, 0), -1)
  first = start(~empty) % n
  count = start(empty & (index > first[..., None])) - first
  count = jnp.where(empty.all(-1), 0, count)
  rest = ~empty & (index >= (first + count)[..., None])
  second = start(rest) % n
  total = count + jnp.maximum(end(rest) - second, 0)
  clear_end = end(full)
  clear = end(~full & (index < clear_end[..., None]))
  last = jnp.maximum(total - 1, 0)
  runs = [first, count, second - count, total, last, clear, clear_end]
  return jnp.stack(runs, -1).reshape(-1)


class Runs:
  """The runs of one block, read from the table in scalar memory."""

  def __init__(self, table, block):
    self._field = lambda field: table[block * FIELDS + field]

  @property
  def total(self):
    return self._field(TOTAL)

  def tile(self, n):
    """Where the n-th tile lies, or the last one."""
    n = jnp.minimum(n, self._field(LAST))
    return n + jnp.where(
      n < self._field(COUNT), self._field(FIRST), self._field(JUMP)
    )

  def needs_mask(self, tile):
    return (tile < self._field(CLEAR)) | (tile >= self._field(CLEAR_END))
