"""The forward kernel of attention on a TPU; see `tpu`."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash import tpu_feed, tpu_scores
from pallas_kernels.flash import tpu_layout as layout
from pallas_kernels.flash.tpu_feed import Block, Feed
from pallas_kernels.problem import Extras

LOWEST = -0.7 * float(np.finfo(np.float32).max)  # below every score, but finite


def kernel(rule, plan, blocks, likes, table, ins, outs, ringed, scratch):
  """A row of tiles: block i of queries, and the keys that it sees.

  Args:
    rule, plan: see `problem.Rule` and `layout.Plan`.
    blocks, ins, ringed: see `Feed`.
    likes: see `tpu_scores.likes`.
    table: see `runs.table`.
    outs, scratch: refs, as in the call.
  """
  b, h, i = (pl.program_id(axis) for axis in range(3))
  runs = plan.runs(table, b, i, True)
  total = runs.total
  begin, x_buffer, p_buffer, o, m, l, shrink, keys, *more = scratch  # noqa: E741
  of_scores, of_weights, entries = more
  side_q, side_k = plan.tile.q, plan.tile.k
  row = pl.ds(0, 1)

  @pl.when(i == 0)
  def _():
    begin[0] = 0

  feed = Feed(blocks, ins, ringed, begin[0])
  first = runs.tile(0)
  pl.when((i == 0) & (total > 0))(lambda: feed.start(0, (b, h, i, first)))

  def add(parts, columns, n):
    """o += p v, of tile n."""
    v = feed.at(n)['v']
    for keys in layout.cut(side_k, parts.depth):
      o[:, columns] += plan.dot(v[:, keys], p_buffer[keys, columns], layout.NN)
      yield from itertools.repeat(None, parts.depth // parts.rows)

  def weigh(parts, columns, n, j):
    """p = exp(x - m), of tile n; o is then in units of its m, too."""
    most, factor, sums = m[row, columns], shrink[row, columns], None
    own = feed.at(n)
    at = tpu_scores.Standing(plan, own['query'], own['key'], i, j)
    weights = own['extras'].weights, of_weights
    weights = tpu_scores.kept(*weights, fill=columns.start == 0)
    for rows in layout.cut(side_k, parts.rows):
      p = plan.power(x_buffer[rows, columns] - most)
      more = tpu_scores.folded(jnp.sum, p)
      sums = more if sums is None else sums + more
      if rule.weights:
        part = Extras(weights=weights)
        part = tpu_scores.part_of(
          Extras((), likes.weights), part, rows, columns
        )
        p, _ = tpu_scores.modified(rule.weighed, p, at, part, rows, columns)
      p_buffer[rows, columns] = p.astype(p_buffer.dtype)
      yield
    l[row, columns] = factor * l[row, columns] + sums.sum(0, keepdims=True)
    o[:, columns] = factor * o[:, columns]

  def score(parts, columns, own, at, scoring, masked):
    """x = q k and m, of the tile that has come."""
    best = None
    q, k = own['q'], own['k']
    for rows in layout.cut(side_k, parts.rows):
      x = plan.dot(k[rows, :], q[columns, :], layout.NT)
      if plan.modified:
        part = scoring.part(rows, columns)
        x, _ = tpu_scores.modified(
          scoring.rule.scored, x, at, part, rows, columns
        )
      if masked:
        x = tpu_scores.masked(rule, plan, x, at, rows, columns)
      x_buffer[rows, columns] = x
      more = tpu_scores.folded(jnp.max, x)
      best = more if best is None else jnp.maximum(best, more)
      yield
    old = m[row, columns]
    new = jnp.maximum(old, best.max(0, keepdims=True))
    m[row, columns], shrink[row, columns] = new, plan.power(old - new)

  def stages(parts, *which):
    """Part by part in turn: a part leaves its buffer for another that comes.

    Else what waits for the room would wait in registers, of which there are 64.
    """
    for columns in layout.cut(side_q, parts.columns):
      turns = (stage(parts, columns) for stage in which)
      for _ in itertools.zip_longest(*turns):
        pass

  o[...] = jnp.zeros_like(o)
  l[...] = jnp.zeros_like(l)
  m[...] = jnp.full_like(m, LOWEST)

  def step(n, tiles):
    """Tile n comes; the stages of those before are computed beside it."""
    before, j = tiles
    after = runs.tile(n + 1)
    feed.wait(n)
    pl.when(n + 1 < total)(lambda: feed.start(n + 1, (b, h, i, after)))
    own = feed.at(n)
    at = tpu_scores.Standing(plan, own['query'], own['key'], i, j, keys)
    others = (
      functools.partial(add, n=n - 2),
      functools.partial(weigh, n=n - 1, j=before),
    )

    def visit(masked, *others):
      parts = plan.tile.masked if masked else plan.tile.clear
      scores = tpu_scores.kept(own['extras'].scores, of_scores)
      extras = Extras(scores, bias=own['extras'].bias)
      scoring = tpu_scores.Scoring(rule, extras, likes._replace(weights=()))
      if plan.tables and not masked:
        scoring = scoring.of_one(at, entries)
      now = dict(own=own, at=at, scoring=scoring, masked=masked)
      stages(parts, *others, functools.partial(score, **now))

    steady = n >= 2
    needs_mask = runs.needs_mask(j)
    if plan.mask or plan.modified:
      pl.when(needs_mask | ~steady | plan.modified)(at.keep_keys)

    @pl.when(steady)
    def _():
      if not plan.mask:
        return visit(False, *others)
      pl.when(needs_mask)(lambda: visit(True, *others))
      pl.when(~needs_mask)(lambda: visit(False, *others))

    pl.when(n == 1)(lambda: visit(plan.mask, others[1]))
    pl.when(n == 0)(lambda: visit(plan.mask))

    return j, after

  last, _ = lax.fori_loop(jnp.int32(0), total, step, (first, first))

  @pl.when(i + 1 < plan.blocks_q)
  def _():
    following = plan.runs(table, b, i + 1, True)
    where = b, h, i + 1, following.tile(0)
    pl.when(following.total > 0)(lambda: feed.start(total, where))
    begin[0] = begin[0] + total

  # The stages of the last tiles, which no other comes to follow.
  weigh_last = functools.partial(weigh, n=total - 1, j=last)
  add_last, add_before = (
    functools.partial(add, n=total - back) for back in (1, 2)
  )
  end = functools.partial(stages, plan.tile.clear)
  pl.when(total == 1)(lambda: end(weigh_last))
  pl.when(total >= 2)(lambda: end(add_before, weigh_last))
  pl.when(total >= 1)(lambda: end(add_last))

  seen = l[row, :] > 0
  share = 1 / jnp.where(seen, l[row, :], 1)
  outs['o'][...] = (o[...] * share).astype(outs['o'].dtype)
  outs['m'][...] = jnp.where(seen, m[row, :] / plan.unit, -jnp.inf)
  outs['l'][...] = l[row, :]


@functools.partial(jax.jit, static_argnums=0)
def forward(rule, q, k, v, extras, query, key):
  plan = layout.make(rule, q, k, v, extras, query, key, 'forward')
  sides = plan.tile
  table = plan.table(rule, extras, query, key, True)
  laid = layout.lay_extras(plan, extras)
  ins = {
    'q': layout.rows_first(
      layout.scaled(q, rule.scale * plan.unit), plan.long_q, last=True
    ),
    'k': layout.rows_first(k, plan.long_k, last=True),
    'v': layout.rows_last(v, plan.long_k),
    'query': layout.lay_tokens(plan, query, plan.long_q),
    'key': layout.lay_tokens(plan, key, plan.long_k),
    'extras': laid,
  }
  of_weights = 1 if rule.weights else 0
  tokens = layout.token_blocks(plan, 'keys', of_weights)
  head = plan.head
  blocks = {
    'q': Block((None, None, sides.q, plan.d), lambda b, h, i, j: (b, h, i, 0)),
    'k': Block(
      *((None, None, sides.k, plan.d), lambda b, h, i, j: (b, head(h), j, 0)),
      flows=True,
    ),
    'v': Block(
      *((None, None, plan.e, sides.k), lambda b, h, i, j: (b, head(h), 0, j)),
      flows=True,
      lag=2,
    ),
    'query': tokens[0],
    'key': tokens[1],
    'extras': layout.extras_blocks(plan, laid, 'keys', lag=1),
  }
  place = lambda b, h, i, table: (b, h, i, 0)
  row = pl.BlockSpec((None, None, 1, sides.q), lambda b, h, i, *_: (b, h, 0, i))
  rows = plan.like((plan.b, plan.h, 1, plan.long_q), jnp.float32)
  buffer = lambda *shape, dtype=jnp.float32: pltpu.VMEM(shape, dtype)
  one = buffer(8, sides.q)
  outs = pl.pallas_call(
    functools.partial(kernel, rule, plan, blocks, tpu_scores.likes(extras)),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(plan.b, plan.h, plan.blocks_q),
      in_specs=[jax.tree.map(lambda block: block.spec(place), blocks)],
      out_specs={
        'o': pl.BlockSpec(
          (None, None, plan.e, sides.q), lambda b, h, i, *_: (b, h, 0, i)
        ),
        'm': row,
        'l': row,
      },
      scratch_shapes=[
        tpu_feed.rings(blocks, ins),
        [
          pltpu.SMEM((1,), jnp.int32),
          buffer(sides.k, sides.q),
          buffer(sides.k, sides.q, dtype=q.dtype),
          buffer(plan.e, sides.q),
          *[one] * 3,
          buffer(*plan.kept[0], dtype=jnp.int32),
          tpu_scores.columns_of(laid.scores, sides.k),
          tpu_scores.columns_of(laid.weights, sides.k),
          [(buffer(1, 1), None)] * plan.tables,
        ],
      ],
    ),
    out_shape={
      'o': plan.like((plan.b, plan.h, plan.e, plan.long_q), rule.dtype),
      'm': rows,
      'l': rows,
    },
    compiler_params=layout.params(('parallel', 'parallel', 'arbitrary')),
    cost_estimate=layout.cost(plan, rule, 2),
    name='flash_forward',
  )(table, tpu_feed.laid(blocks, ins))
  o = jnp.moveaxis(outs['o'], 3, 1)[:, : plan.t]
  m, l = (  # noqa: E741
    jnp.swapaxes(outs[name][:, :, 0, : plan.t], 1, 2) for name in 'ml'
  )
  return o, m, l
