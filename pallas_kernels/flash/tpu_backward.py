"""The backward kernel of attention on a TPU; see `tpu`."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash import tpu_feed, tpu_scores
from pallas_kernels.flash import tpu_layout as layout
from pallas_kernels.flash.tpu_feed import Block, Feed
from pallas_kernels.problem import Extras, floats

RING = 4  # blocks of dq on their way: read, added to, and two written


def kernel(
  rule, plan, blocks, sums, likes, table, totals, ins, outs, ringed, scratch
):
  """A row of tiles: block j of keys, and the queries of a head that see them.

  Args:
    rule, plan, blocks, likes, table, ins, outs, ringed, scratch: as forward.
    sums: which blocks of the sums of dq, and of a bias's gradient, a tile adds.
    totals: these sums, which are among the results.
  """
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
      k_turned[...], x_buffer[:, columns], layout.NN
    )
    if own['queries'] is not None:
      more = pl.ds(layout.aligned(plan.d), layout.MORE)
      dq[0][slot, more, columns] += own['queries'][:, columns]

  def add_keys(rows, columns, q, do):
    """dv += w do and dk += dx q, of the tile before."""
    dv[rows, :] += plan.dot(p_buffer[rows, columns], do[columns, :], layout.NN)
    dk[rows, :] += plan.dot(x_buffer[rows, columns], q[columns, :], layout.NN)

  def weigh(rows, columns, n, come, now, scoring, masked):
    """w and dx, of tile n, which has come."""
    x = plan.dot(k[rows, :], come['q'][columns, :], layout.NT)
    part = scoring.part(rows, columns)
    if plan.modified:
      x, to_scores = tpu_scores.modified(
        *(scoring.rule.scored, x, now, part._replace(weights=())),
        *(rows, columns),
      )
    if masked:
      x = tpu_scores.masked(rule, plan, x, now, rows, columns)
    m, share, delta = (come['known'][pl.ds(at, 1), columns] for at in range(3))
    p = plan.power(x - m) * share
    dw = plan.dot(v[rows, :], come['do'][columns, :], layout.NT)
    w, dp, dextras = p, dw, Extras()
    if rule.weights:
      part = Extras(weights=part.weights)
      w, to_weights = tpu_scores.modified(
        rule.weighed, p, now, part, rows, columns
      )
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
      ref[rows, :] += tpu_scores.by_lane(dx[0, 0])
    for at, dx in enumerate(dextras['queries']):
      at = pl.ds(at, 1)
      more = dx[0, 0]
      if rows.start:
        more += own['queries'][at, columns]
      own['queries'][at, columns] = more

  def stages(parts, n, add, i=None, masked=None):
    """dq, dk and dv of tile n - 1, if `add`, and, if i, weights of tile n."""
    come, before = feed.at(n), feed.at(n - 1)
    now = tpu_scores.Standing(plan, come['query'], come['key'], i, j, *kept)
    if i is not None and (masked or plan.modified or rule.weights):
      now.keep_queries()
    extras = Extras(
      tpu_scores.kept(come['extras'].scores, of_scores, fill=False),
      tpu_scores.kept(come['extras'].weights, of_weights, fill=False),
      come['extras'].bias,
    )
    exact = tpu_scores.Scoring(rule, extras, likes, own['heads'])
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
    tpu_scores.Standing(plan, None, ins['key'], 0, j, *kept).keep_keys()

  tpu_scores.kept(ins['extras'].scores, of_scores)
  tpu_scores.kept(ins['extras'].weights, of_weights)
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


@functools.partial(jax.jit, static_argnums=0)
def backward(rule, q, k, v, extras, query, key, o, m, l, do, dm, dl):  # noqa: E741
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
  laid = layout.lay_extras(plan, extras)
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
    'extras': layout.extras_blocks(plan, laid, 'queries'),
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
    layout.bias_block(plan, totals[1]),
  )
  far = jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.HBM), totals)
  buffer = lambda *shape, dtype=f32: pltpu.VMEM(shape, dtype)
  outs = pl.pallas_call(
    functools.partial(
      kernel, rule, plan, blocks, sums, tpu_scores.likes(extras)
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
          tpu_scores.columns_of(laid.scores, sides.k),
          tpu_scores.columns_of(laid.weights, sides.k),
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
