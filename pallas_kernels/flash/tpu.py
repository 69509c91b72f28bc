"""Softmax attention on a TPU: kernels in which tiles overlap.

The mathematics is that of `xla`. What differs is how a tile is computed, for on
a TPU a tile's chain of products, exponentials and products again leaves the
matrix units idle while it waits for itself. So a step computes different stages
of different tiles, which do not depend on each other:

  forward    scores of tile n       | weights of tile n-1 | o += of tile n-2
  backward   weights of tile n, and their gradient | dq, dk, dv += of tile n-1

What a stage leaves for the next lies in a buffer of the size of a tile, and is
replaced in place, part by part, as the next tile's takes its room. The compiler
sees one straight line of independent work.

Tiles are keys by queries, `s t`: then the maximum and the sum over keys are
taken along sublanes, elementwise, and what a query knows of itself is one row.
Accordingly o is computed as `e t`, dq as `d t`, and v comes as `e s`. The scale
is multiplied into q beforehand; for bfloat16 log2(e) is too, as a TPU computes
powers of 2. Float32 would lose a digit by it.

The backward kernel keeps a block of keys and goes over the queries. dk and dv
stay in VMEM meanwhile; dq is read, added to and written back in float32, by
copies that have a whole step to complete. So nothing is larger than the inputs.

Which tiles are visited stands in a table (`runs`). The grid has the rows of
tiles; over those of a row a kernel loops by itself, see `tpu_feed`.

A modification of scores sees a tile with its last two axes exchanged: it has to
be elementwise in them.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import elementwise
from pallas_kernels.blocks import chip
from pallas_kernels.flash import apart, tpu_feed
from pallas_kernels.flash import tpu_layout as layout
from pallas_kernels.flash.partial import MONOID
from pallas_kernels.flash.tpu_feed import Block, Feed
from pallas_kernels.masks import Tokens
from pallas_kernels.problem import (
  Engine,
  Extras,
  Rule,
  alike,
  floats,
  once,
  reverse,
  unfit,
)

LOWEST = -0.7 * float(np.finfo(np.float32).max)  # below every score, but finite
OLD = ('TPU v2', 'TPU v3')  # which cannot compile them
# fmt: off
LACKS = {  # what Mosaic has no rule for, of what is elementwise
  'accuracy', 'acos', 'acosh', 'asin', 'asinh', 'atan', 'atanh', 'cbrt', 'copy',
  'copy_p', 'cosh', 'digamma', 'erfc', 'expm1', 'lgamma',
  'optimization_barrier', 'polynomial', 'sinh',
}
# fmt: on
NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))


def refuses(
  rule: Rule, q, k, v, extras: Extras, query: Tokens, key: Tokens
) -> str | None:
  """Why this backend cannot serve a call, or None; arguments as of `attend`."""
  rule = rule.elementwise()
  d, e = q.shape[3], v.shape[3]
  if chip() in OLD:
    return f'it is for TPU v4 and later, not {chip()}'
  if why := unfit(q, k, v, ('bfloat16', 'float32')):
    return why
  if max(d, e) > 256:
    return f'heads are at most 256 wide, not {max(d, e)}'
  numbers = len(layout.kinds(floats(extras))['queries'])
  if numbers > layout.MORE:
    return f'queries have at most {layout.MORE} numbers, not {numbers}'
  for fn, own in zip(
    (*rule.scores, *rule.weights), (*extras.scores, *extras.weights)
  ):
    if why := elementwise.refuses(fn, own, query, key, LACKS):
      return why
  return elementwise.holds(rule.mask, query.side, key.side, LACKS)


def attend(rule, q, k, v, extras, query, key):
  """Finished o, m and l; arguments as in `problem`.

  Differentiate it in reverse mode.
  """
  inputs = alike((q, k, v, extras), (query, key))
  return _attend(rule.elementwise(), *inputs, query, key)


# ---------------------------------------------------------------------- forward


def _forward_kernel(
  rule, plan, blocks, likes, table, ins, outs, ringed, scratch
):
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
      o[:, columns] += plan.dot(v[:, keys], p_buffer[keys, columns], NN)
      yield from itertools.repeat(None, parts.depth // parts.rows)

  def weigh(parts, columns, n, j):
    """p = exp(x - m), of tile n; o is then in units of its m, too."""
    most, factor, sums = m[row, columns], shrink[row, columns], None
    own = feed.at(n)
    at = layout.Standing(plan, own['query'], own['key'], i, j)
    weights = own['extras'].weights, of_weights
    weights = layout.kept(*weights, fill=columns.start == 0)
    for rows in layout.cut(side_k, parts.rows):
      p = plan.power(x_buffer[rows, columns] - most)
      more = layout.folded(jnp.sum, p)
      sums = more if sums is None else sums + more
      if rule.weights:
        part = Extras(weights=weights)
        part = layout.part_of(Extras((), likes.weights), part, rows, columns)
        p, _ = layout.modified(rule.weighed, p, at, part, rows, columns)
      p_buffer[rows, columns] = p.astype(p_buffer.dtype)
      yield
    l[row, columns] = factor * l[row, columns] + sums.sum(0, keepdims=True)
    o[:, columns] = factor * o[:, columns]

  def score(parts, columns, own, at, scoring, masked):
    """x = q k and m, of the tile that has come."""
    best = None
    q, k = own['q'], own['k']
    for rows in layout.cut(side_k, parts.rows):
      x = plan.dot(k[rows, :], q[columns, :], NT)
      if plan.modified:
        part = scoring.part(rows, columns)
        x, _ = layout.modified(scoring.rule.scored, x, at, part, rows, columns)
      if masked:
        x = layout.masked(rule, plan, x, at, rows, columns)
      x_buffer[rows, columns] = x
      more = layout.folded(jnp.max, x)
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
    at = layout.Standing(plan, own['query'], own['key'], i, j, keys)
    others = (
      functools.partial(add, n=n - 2),
      functools.partial(weigh, n=n - 1, j=before),
    )

    def visit(masked, *others):
      parts = plan.tile.masked if masked else plan.tile.clear
      scores = layout.kept(own['extras'].scores, of_scores)
      extras = Extras(scores, bias=own['extras'].bias)
      scoring = layout.Scoring(rule, extras, likes._replace(weights=()))
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

    @pl.when(~steady)
    def _():
      pl.when(n == 1)(lambda: stages(plan.tile.clear, others[1]))
      visit(plan.mask)

    return j, after

  last, _ = lax.fori_loop(jnp.int32(0), total, step, (first, first))

  @pl.when(i + 1 < plan.blocks_q)
  def _():
    following = plan.runs(table, b, i + 1, True)
    where = b, h, i + 1, following.tile(0)
    pl.when(following.total > 0)(lambda: feed.start(total, where))
    begin[0] = begin[0] + total

  end = functools.partial(stages, plan.tile.clear)
  pl.when(total >= 2)(lambda: end(functools.partial(add, n=total - 2)))

  @pl.when(total >= 1)
  def _():
    end(functools.partial(weigh, n=total - 1, j=last))
    end(functools.partial(add, n=total - 1))

  seen = l[row, :] > 0
  share = 1 / jnp.where(seen, l[row, :], 1)
  outs['o'][...] = (o[...] * share).astype(outs['o'].dtype)
  outs['m'][...] = jnp.where(seen, m[row, :] / plan.unit, -jnp.inf)
  outs['l'][...] = l[row, :]


def _one_by_one(fn, rule, inputs):
  """fn(rule, *inputs); under vmap one after the other.

  For JAX cannot map over arrays that a kernel takes as a whole, such as those
  whose parts it copies itself.
  """
  run = jax.custom_batching.sequential_vmap(functools.partial(fn, rule))
  return run(*inputs)


@once('tpu', 'tpu')
def forward(rule, *inputs):
  """The finished o, m and l, of q, k, v, extras, query and key."""
  return _one_by_one(_forward, rule, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _forward(rule, q, k, v, extras, query, key):
  plan = layout.make(rule, q, k, v, extras, query, key, 'forward')
  sides = plan.tile
  table = plan.table(rule, extras, query, key, True)
  laid = Extras(
    tuple(layout.lay_operands(plan, one) for one in extras.scores),
    tuple(layout.lay_operands(plan, one) for one in extras.weights),
    layout.lay_bias(plan, extras.bias),
  )
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
  operands = lambda group, lag: tuple(
    layout.operand_blocks(plan, one, 'keys', lag) for one in group
  )
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
    'extras': Extras(
      operands(laid.scores, 0),
      operands(laid.weights, 1),
      None if laid.bias is None else layout.bias_block(plan, laid.bias),
    ),
  }
  place = lambda b, h, i, table: (b, h, i, 0)
  row = pl.BlockSpec((None, None, 1, sides.q), lambda b, h, i, *_: (b, h, 0, i))
  rows = plan.like((plan.b, plan.h, 1, plan.long_q), jnp.float32)
  buffer = lambda *shape, dtype=jnp.float32: pltpu.VMEM(shape, dtype)
  one = buffer(8, sides.q)
  outs = pl.pallas_call(
    functools.partial(
      _forward_kernel, rule, plan, blocks, layout.likes(extras)
    ),
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
          layout.columns_of(laid.scores, sides.k),
          layout.columns_of(laid.weights, sides.k),
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


# --------------------------------------------------------------------- backward

RING = 4  # blocks of dq on their way: read, added to, and two written


def _backward_kernel(
  rule, plan, blocks, sums, likes, table, totals, ins, outs, ringed, scratch
):
  b, head, j, g = (pl.program_id(axis) for axis in range(4))
  h = head * plan.group + g
  runs = plan.runs(table, b, j, False)
  total = runs.total
  begin, p_buffer, x_buffer, dk, dv, dq, dbias, own, kept, *more = scratch
  of_scores, of_weights, entries = more
  side_q, side_k = plan.tile.q, plan.tile.k
  of_dq, of_bias = sums
  k, v, k_turned = (ins[name] for name in ('k', 'v', 'k_turned'))
  first = (j == 0) & (g == 0)
  del totals  # they are where the results are

  @pl.when(first)
  def _():
    begin[0] = 0

  feed = Feed(blocks, ins, ringed, begin[0])
  place = lambda i: (b, h, i, j)
  begins = runs.tile(0)
  pl.when(first & (total > 0))(lambda: feed.start(0, place(begins)))
  # Of a copy that is awaited it does not matter where it went.
  anywhere = jnp.int32(0)

  def read(n, i=anywhere):
    """Of the block of dq that tile n adds to, which is i."""
    slot = n & (RING - 1)
    near, full, _ = dq
    far = of_dq.within(outs['totals'][0], place(i))
    return pltpu.make_async_copy(far, near.at[slot], full.at[slot])

  def write(n, i=anywhere):
    slot = n & (RING - 1)
    near, _, gone = dq
    far = of_dq.within(outs['totals'][0], place(i))
    return pltpu.make_async_copy(near.at[slot], far, gone.at[slot])

  def write_bias(n, i=anywhere):
    """Of the gradient of the bias of tile n."""
    near, gone = dbias
    far = of_bias.within(outs['totals'][1], place(i))
    return pltpu.make_async_copy(near.at[n & 1], far, gone.at[n & 1])

  def add_queries(columns, n):
    """dq += k^T dx, of tile n."""
    slot = n & (RING - 1)
    dq[0][slot, pl.ds(0, plan.d), columns] += plan.dot(
      k_turned[...], x_buffer[:, columns], NN
    )
    if own['queries'] is not None:
      more = pl.ds(layout.aligned(plan.d), layout.MORE)
      dq[0][slot, more, columns] += own['queries'][:, columns]

  def add_keys(rows, columns, q, do):
    """dv += w do and dk += dx q, of the tile before."""
    dv[rows, :] += plan.dot(p_buffer[rows, columns], do[columns, :], NN)
    dk[rows, :] += plan.dot(x_buffer[rows, columns], q[columns, :], NN)

  def weigh(rows, columns, n, come, now, scoring, masked):
    """w and dx, of tile n, which has come."""
    x = plan.dot(k[rows, :], come['q'][columns, :], NT)
    part = scoring.part(rows, columns)
    if plan.modified:
      x, to_scores = layout.modified(
        *(scoring.rule.scored, x, now, part._replace(weights=())),
        *(rows, columns),
      )
    if masked:
      x = layout.masked(rule, plan, x, now, rows, columns)
    m, share, delta = (come['known'][pl.ds(at, 1), columns] for at in range(3))
    p = plan.power(x - m) * share
    dw = plan.dot(v[rows, :], come['do'][columns, :], NT)
    w, dp, dextras = p, dw, Extras()
    if rule.weights:
      part = Extras(weights=part.weights)
      w, to_weights = layout.modified(rule.weighed, p, now, part, rows, columns)
      dp, dextras = to_weights(dw)
    dx = p * (dp - delta)
    if plan.modified:
      dx, more = to_scores(dx)
      dextras = more._replace(weights=dextras.weights)
    p_buffer[rows, columns] = w.astype(p_buffer.dtype)
    x_buffer[rows, columns] = dx.astype(x_buffer.dtype)
    if dextras.bias is not None:
      dbias[0][n & 1, rows, columns] = dextras.bias[0, 0].astype(jnp.float32)
    dextras = layout.kinds(dextras)
    for ref, dx in zip(scoring.sums, dextras['heads']):
      ref[...] += dx.reshape(ref.shape)
    for ref, dx in zip(own['keys'], dextras['keys']):
      ref[rows, :] += layout.by_lane(dx[0, 0])
    for at, dx in enumerate(dextras['queries']):
      at = pl.ds(at, 1)
      more = dx[0, 0]
      if rows.start:
        more += own['queries'][at, columns]
      own['queries'][at, columns] = more

  def stages(parts, n, add, i=None, masked=None):
    """dq, dk and dv of tile n - 1, if `add`, and, if i, weights of tile n."""
    come, before = feed.at(n), feed.at(n - 1)
    now = layout.Standing(plan, come['query'], come['key'], i, j, *kept)
    if i is not None and (masked or plan.modified or rule.weights):
      now.keep_queries()
    extras = Extras(
      layout.kept(come['extras'].scores, of_scores, fill=False),
      layout.kept(come['extras'].weights, of_weights, fill=False),
      come['extras'].bias,
    )
    exact = layout.Scoring(rule, extras, likes, own['heads'])
    once = bool(plan.tables and i is not None and not masked)
    scoring = exact.of_one(now, entries) if once else exact
    for columns in layout.cut(side_q, parts.columns):
      if add:
        add_queries(columns, n - 1)
      for rows in layout.cut(side_k, parts.rows):
        if add:
          add_keys(rows, columns, before['q'], before['do'])
        if i is not None:
          weigh(rows, columns, n, come, now, scoring, masked)
    if once:
      exact.add(now, entries)

  @pl.when(g == 0)
  def _():
    dk[...] = jnp.zeros_like(dk)
    dv[...] = jnp.zeros_like(dv)
    layout.Standing(plan, None, ins['key'], 0, j, *kept).keep_keys()

  layout.kept(ins['extras'].scores, of_scores)
  layout.kept(ins['extras'].weights, of_weights)
  for ref in (*own['heads'], *own['keys']):
    ref[...] = jnp.zeros_like(ref)
  if own['queries'] is not None:
    own['queries'][...] = jnp.zeros_like(own['queries'])

  def step(n, tiles):
    """Tile n comes; that before is added beside it."""
    before, i = tiles
    after = runs.tile(n + 1)
    # What leaves the place to which this one comes has had two steps for it.
    pl.when(n >= RING)(lambda: write(n - RING).wait())
    read(n, i).start()
    if dbias:
      pl.when(n >= 2)(lambda: write_bias(n - 2).wait())
    feed.wait(n)
    pl.when(n + 1 < total)(lambda: feed.start(n + 1, place(after)))

    @pl.when(n == 0)
    def _():
      stages(plan.tile.masked, n, False, i, plan.mask)

    @pl.when(n > 0)
    def _():
      read(n - 1).wait()
      visit = functools.partial(stages, n=n, add=True, i=i)
      if plan.mask:
        needs_mask = runs.needs_mask(i)
        pl.when(needs_mask)(lambda: visit(plan.tile.masked, masked=True))
        pl.when(~needs_mask)(lambda: visit(plan.tile.clear, masked=False))
      else:
        visit(plan.tile.clear, masked=False)
      write(n - 1, before).start()

    if dbias:
      write_bias(n, i).start()
    return i, after

  ends, _ = lax.fori_loop(jnp.int32(0), total, step, (begins, begins))

  # The next row is of the next head of the group, or of the next keys.
  last = g == plan.group - 1
  next_j = jnp.where(last, j + 1, j)

  @pl.when(next_j < plan.blocks_k)
  def _():
    following = plan.runs(table, b, next_j, False)
    next_h = head * plan.group + jnp.where(last, 0, g + 1)
    where = b, next_h, following.tile(0), next_j
    pl.when(following.total > 0)(lambda: feed.start(total, where))
    begin[0] = begin[0] + total

  @pl.when(total > 0)
  def _():
    read(total - 1).wait()
    stages(plan.tile.clear, total, True)
    write(total - 1, ends).start()

  for back in range(1, RING + 1):

    @pl.when(total >= back)
    def _(back=back):
      write(total - back).wait()
      if dbias and back <= 2:
        write_bias(total - back).wait()

  @pl.when(last)
  def _():
    outs['dk'][...] = dk[...] / plan.unit
    outs['dv'][...] = dv[...]

  for out, ref in zip(outs['heads'], own['heads']):
    x = ref[...]
    out[...] = x if x.shape == out.shape else x.sum(keepdims=True)
  for out, ref in zip(outs['keys'], own['keys']):
    out[...] = ref[...].T.sum(0, keepdims=True)


@once('tpu', 'tpu')
def backward(rule, *inputs):
  """See `_backward`."""

  def run(rule, *inputs):
    return apart.gradients(functools.partial(_backward, rule), *inputs)

  return _one_by_one(run, rule, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _backward(rule, q, k, v, extras, query, key, o, m, l, do, dm, dl):  # noqa: E741
  """dq, dk, dv and the gradient of extras; m is a constant."""
  del dm
  plan = layout.make(rule, q, k, v, extras, query, key, 'backward')
  sides = plan.tile
  table = plan.table(rule, extras, query, key, False)
  delta = jnp.sum(do.astype(jnp.float32) * o, -1) - l * dl
  unseen = l == 0
  rest = (0, 0), (0, plan.long_q - plan.t), (0, 0)
  # Of a query: exp(x - m) / l is 0 where there is nothing, and in the padding.
  known = [
    jnp.pad(
      jnp.where(unseen, jnp.inf, m * plan.unit), rest, constant_values=jnp.inf
    ),
    jnp.pad(1 / jnp.where(unseen, 1, l), rest),
    jnp.pad(delta, rest),
  ]
  laid = Extras(
    tuple(layout.lay_operands(plan, one) for one in extras.scores),
    tuple(layout.lay_operands(plan, one) for one in extras.weights),
    layout.lay_bias(plan, extras.bias),
  )
  # Padding is filled up with what occurs, and nobody sees it: its scores then
  # have a derivative as others have.
  ins = {
    'q': layout.rows_first(
      layout.scaled(q, rule.scale * plan.unit), plan.long_q, last=True
    ),
    'do': layout.rows_first(do.astype(q.dtype), plan.long_q),
    'known': layout.rows_last(jnp.stack(known, 3), plan.long_q),
    'k': layout.rows_first(k, plan.long_k, last=True),
    'k_turned': layout.rows_last(k, plan.long_k, last=True),
    'v': layout.rows_first(v, plan.long_k),
    'query': layout.lay_tokens(plan, query, plan.long_q),
    'key': layout.lay_tokens(plan, key, plan.long_k),
    'extras': laid,
  }

  head = plan.head
  of_q, of_do = (None, None, sides.q, plan.d), (None, None, sides.q, plan.e)
  of_k, of_v = (None, None, sides.k, plan.d), (None, None, sides.k, plan.e)
  queries, keys = (
    lambda b, h, i, j: (b, h, i, 0),
    lambda b, h, i, j: (b, head(h), j, 0),
  )
  tokens = layout.token_blocks(plan, 'queries')
  operands = lambda group: tuple(
    layout.operand_blocks(plan, one, 'queries') for one in group
  )
  blocks = {
    'q': Block(of_q, queries, flows=True, lag=1),
    'do': Block(of_do, queries, flows=True, lag=1),
    'known': Block(
      *((None, None, 3, sides.q), lambda b, h, i, j: (b, h, 0, i)), flows=True
    ),
    'k': Block(of_k, keys),
    'k_turned': Block(
      *((None, None, plan.d, sides.k), lambda b, h, i, j: (b, head(h), 0, j))
    ),
    'v': Block(of_v, keys),
    'query': tokens[0],
    'key': tokens[1],
    'extras': Extras(
      operands(laid.scores),
      operands(laid.weights),
      None if laid.bias is None else layout.bias_block(plan, laid.bias),
    ),
  }
  place = lambda b, head, j, g, table: (b, head * plan.group + g, 0, j)
  spec = lambda shape, index: Block(shape, index).spec(place)
  like = floats(extras)
  kinds = layout.kinds(like)
  like_heads = [(x.shape, math.prod(x.shape[1:])) for x in kinds['heads']]
  more = layout.MORE if kinds['queries'] else 0
  rows_dq = layout.aligned(plan.d) + more if more else plan.d
  b, h, f32 = plan.b, plan.h, jnp.float32
  # Made from an input: under shard_map it varies as the result does.
  zero = jnp.sum(q[..., :0]).astype(f32)
  totals = (
    jnp.full((b, h, rows_dq, plan.long_q), zero),
    None
    if laid.bias is None
    else jnp.full((b, h, plan.long_k, plan.long_q), zero),
  )
  sums = (
    Block((None, None, rows_dq, sides.q), lambda b, h, i, j: (b, h, 0, i)),
    None if laid.bias is None else layout.bias_block(plan, totals[1]),
  )
  far = jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.HBM), totals)
  buffer = lambda *shape, dtype=f32: pltpu.VMEM(shape, dtype)
  outs = pl.pallas_call(
    functools.partial(
      _backward_kernel, rule, plan, blocks, sums, layout.likes(extras)
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(b, plan.heads, plan.blocks_k, plan.group),
      in_specs=[
        far,
        jax.tree.map(lambda block: block.spec(place), blocks),
      ],
      out_specs={
        'dk': spec(of_k, keys),
        'dv': spec(of_v, keys),
        'totals': far,
        'heads': [
          spec((None, None, None, 1, n), lambda b, h, i, j: (b, h, j, 0, 0))
          for _, n in like_heads
        ],
        'keys': [
          spec((None, None, 1, sides.k), lambda b, h, i, j: (b, h, 0, j))
          for _ in kinds['keys']
        ],
      },
      scratch_shapes=[
        tpu_feed.rings(blocks, ins),
        [
          pltpu.SMEM((1,), jnp.int32),
          buffer(sides.k, sides.q, dtype=q.dtype),
          buffer(sides.k, sides.q, dtype=q.dtype),
          buffer(sides.k, plan.d),
          buffer(sides.k, plan.e),
          [
            buffer(RING, rows_dq, sides.q),
            pltpu.SemaphoreType.DMA((RING,)),
            pltpu.SemaphoreType.DMA((RING,)),
          ],
          []
          if laid.bias is None
          else [buffer(2, sides.k, sides.q), pltpu.SemaphoreType.DMA((2,))],
          {
            'heads': [
              buffer(*((1, n) if n > 1 else (8, layout.LANES)))
              for _, n in like_heads
            ],
            'keys': [buffer(sides.k, layout.LANES) for _ in kinds['keys']],
            'queries': buffer(more, sides.q) if more else None,
          },
          [buffer(*shape, dtype=jnp.int32) for shape in plan.kept],
          layout.columns_of(laid.scores, sides.k),
          layout.columns_of(laid.weights, sides.k),
          [(buffer(1, 1), buffer(8, layout.LANES))] * plan.tables,
        ],
      ],
    ),
    out_shape={
      'dk': plan.like((b, plan.heads, plan.long_k, plan.d), f32),
      'dv': plan.like((b, plan.heads, plan.long_k, plan.e), f32),
      'totals': jax.tree.map(lambda x: plan.like(x.shape, f32), totals),
      'heads': [
        plan.like((b, h, plan.blocks_k, 1, n), f32) for _, n in like_heads
      ],
      'keys': [plan.like((b, h, 1, plan.long_k), f32) for _ in kinds['keys']],
    },
    # After the table, the totals come first; outputs are flattened by name.
    input_output_aliases={
      1 + at: 2 + len(kinds['heads']) + len(kinds['keys']) + at
      for at in range(len(jax.tree.leaves(totals)))
    },
    compiler_params=layout.params(
      ('parallel', 'parallel', 'arbitrary', 'arbitrary')
    ),
    cost_estimate=layout.cost(plan, rule, 5),
    name='flash_backward',
  )(table, jax.tree.map(tpu_feed.far, totals), tpu_feed.laid(blocks, ins))
  dq = outs['totals'][0][:, :, : plan.d, : plan.t] * rule.scale
  back = lambda x, like: jnp.swapaxes(x[:, :, : like.shape[1]], 1, 2)
  dextras = layout.of_kinds(
    {
      'heads': [
        x.sum((0, 2)).reshape(shape)
        for x, (shape, _) in zip(outs['heads'], like_heads)
      ],
      'queries': [
        outs['totals'][0][:, :, layout.aligned(plan.d) + at, : plan.t].mT
        for at in range(len(kinds['queries']))
      ],
      'keys': [x[:, :, 0, : plan.s].mT for x in outs['keys']],
    },
    like,
  )
  bias = outs['totals'][1]
  if bias is not None:
    bias = bias[:, :, : plan.s, : plan.t].mT
  return (
    jnp.moveaxis(dq, 3, 1),
    back(outs['dk'], k),
    back(outs['dv'], v),
    jax.tree.map(layout.shared, dextras._replace(bias=bias), like),
  )


# Looked up when called, as everything in a module is.
_attend = reverse(lambda *x: forward(*x), lambda *x: backward(*x))
ENGINE = Engine(attend, forward, backward, MONOID)
