"""Softmax attention on a TPU: kernels in which tiles overlap.

The mathematics is that of `xla`. What differs is how a tile is computed, for on
a TPU a tile's chain of products, exponentials and products again leaves the
matrix units idle while it waits for itself. So a grid step computes different
stages of different tiles, which do not depend on each other:

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

Which tiles are visited stands in a table (`runs`). The grid is as wide as the
longest row of tiles, which is known only when the program runs.

A modification of scores sees a tile with its last two axes exchanged: it has to
be elementwise in them.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import elementwise
from pallas_kernels.blocks import chip
from pallas_kernels.flash import apart
from pallas_kernels.flash import tpu_layout as layout
from pallas_kernels.flash.partial import MONOID
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


def _forward_kernel(rule, plan, rests, table, ins, outs, scratch):
  b, i, n = (pl.program_id(axis) for axis in (0, 2, 3))
  runs = plan.runs(table, b, i, True)
  total = runs.total
  q, k, v = ins['q'], ins['k'], ins['v']
  x_buffer, p_buffer, o, m, l, shrink, keys = scratch  # noqa: E741
  standing = functools.partial(layout.Standing, plan, ins['query'])
  now = standing(ins['key'], i, runs.tile(n), keys)
  before = standing(ins['key_before'], i, runs.tile(n, 1))
  side_q, side_k = plan.tile.q, plan.tile.k
  row = pl.ds(0, 1)

  def add(parts, columns):
    """o += p v, of the tile before the one before."""
    for keys in layout.cut(side_k, parts.depth):
      o[:, columns] += plan.dot(v[:, keys], p_buffer[keys, columns], NN)
      yield from itertools.repeat(None, parts.depth // parts.rows)

  def weigh(parts, columns):
    """p = exp(x - m), of the tile before; o is then in units of its m, too."""
    most, factor, sums = m[row, columns], shrink[row, columns], None
    for rows in layout.cut(side_k, parts.rows):
      p = plan.power(x_buffer[rows, columns] - most)
      more = layout.folded(jnp.sum, p)
      sums = more if sums is None else sums + more
      if rule.weights:
        own = Extras(weights=ins['extras_before'])
        own = layout.part_of(Extras((), rests.weights), own, rows, columns)
        p, _ = layout.modified(rule.weighed, p, before, own, rows, columns)
      p_buffer[rows, columns] = p.astype(p_buffer.dtype)
      yield
    l[row, columns] = factor * l[row, columns] + sums.sum(0, keepdims=True)
    o[:, columns] = factor * o[:, columns]

  def score(parts, columns, masked):
    """x = q k and m, of the tile that has come."""
    best = None
    for rows in layout.cut(side_k, parts.rows):
      x = plan.dot(k[rows, :], q[columns, :], NT)
      if plan.modified:
        own = layout.part_of(
          rests._replace(weights=()), ins['extras'], rows, columns
        )
        x, _ = layout.modified(rule.scored, x, now, own, rows, columns)
      if masked:
        x = layout.masked(rule, plan, x, now, rows, columns)
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

  @pl.when(n == 0)
  def _():
    o[...] = jnp.zeros_like(o)
    l[...] = jnp.zeros_like(l)
    m[...] = jnp.full_like(m, LOWEST)

  def visit(masked, *others):
    """A tile comes, and other stages beside it."""
    parts = plan.tile.masked if masked else plan.tile.clear
    stages(parts, *others, functools.partial(score, masked=masked))

  steady = (n >= 2) & (n < total)
  needs_mask = runs.needs_mask(now.j)
  if plan.mask or plan.modified:
    read = needs_mask | ~steady | plan.modified
    pl.when((n < total) & read)(now.keep_keys)

  @pl.when(steady)
  def _():
    if not plan.mask:
      return visit(False, add, weigh)
    pl.when(needs_mask)(lambda: visit(True, add, weigh))
    pl.when(~needs_mask)(lambda: visit(False, add, weigh))

  @pl.when(~steady)
  def _():
    pl.when((n >= 2) & (n <= total + 1))(lambda: stages(plan.tile.clear, add))
    pl.when((n >= 1) & (n <= total))(lambda: stages(plan.tile.clear, weigh))
    pl.when(n < total)(lambda: visit(plan.mask))

  @pl.when(n == pl.num_programs(3) - 1)
  def _():
    seen = l[row, :] > 0
    share = 1 / jnp.where(seen, l[row, :], 1)
    outs['o'][...] = (o[...] * share).astype(outs['o'].dtype)
    outs['m'][...] = jnp.where(seen, m[row, :] / plan.unit, -jnp.inf)
    outs['l'][...] = l[row, :]


@once('tpu', 'tpu')
@functools.partial(jax.jit, static_argnums=0)
def forward(rule, q, k, v, extras, query, key):
  """The finished o, m and l."""
  plan = layout.make(rule, q, k, v, extras, query, key, 'forward')
  sides = plan.tile
  table, width = plan.table(rule, query, key, True)
  laid = Extras(
    tuple(layout.lay_operands(plan, one) for one in extras.scores),
    tuple(layout.lay_operands(plan, one) for one in extras.weights),
    layout.lay_bias(plan, extras.bias),
  )
  keys = layout.lay_tokens(plan, key, plan.long_k)
  ins = {
    'q': layout.rows_first(
      layout.scaled(q, rule.scale * plan.unit), plan.long_q, last=True
    ),
    'k': layout.rows_first(k, plan.long_k, last=True),
    'v': layout.rows_last(v, plan.long_k),
    'query': layout.lay_tokens(plan, query, plan.long_q),
    'key': keys,
    'key_before': keys if rule.weights else None,
    'extras': laid._replace(weights=()),
    'extras_before': laid.weights,
  }

  def place(lag):
    def at(b, h, i, n, table):
      return b, h, i, plan.runs(table, b, i, True).tile(n, lag)

    return at

  def spec(block, index, lag=0):
    return pl.BlockSpec(block, lambda *grid: index(*place(lag)(*grid)))

  tokens = [layout.token_specs(plan, place(lag)) for lag in (0, 1)]
  head = plan.head
  specs = {
    'q': spec((None, None, sides.q, plan.d), lambda b, h, i, j: (b, h, i, 0)),
    'k': spec(
      (None, None, sides.k, plan.d), lambda b, h, i, j: (b, head(h), j, 0)
    ),
    'v': spec(
      (None, None, plan.e, sides.k), lambda b, h, i, j: (b, head(h), 0, j), 2
    ),
    'query': tokens[0][0],
    'key': tokens[0][1],
    'key_before': tokens[1][1] if rule.weights else None,
    'extras': Extras(
      tuple(layout.operand_specs(plan, one, place(0)) for one in laid.scores),
      (),
      None
      if laid.bias is None
      else spec(
        (None, None, sides.k, sides.q),
        lambda b, h, i, j: (*layout.pick(laid.bias, b, h), j, i),
      ),
    ),
    'extras_before': tuple(
      layout.operand_specs(plan, one, place(1)) for one in laid.weights
    ),
  }
  row = pl.BlockSpec((None, None, 1, sides.q), lambda b, h, i, *_: (b, h, 0, i))
  rows = plan.like((plan.b, plan.h, 1, plan.long_q), jnp.float32)
  buffer = lambda *shape, dtype=jnp.float32: pltpu.VMEM(shape, dtype)
  one = buffer(8, sides.q)
  outs = pl.pallas_call(
    functools.partial(_forward_kernel, rule, plan, layout.rests(extras)),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(plan.b, plan.h, plan.blocks_q, width + 2),
      in_specs=[specs],
      out_specs={
        'o': pl.BlockSpec(
          (None, None, plan.e, sides.q), lambda b, h, i, *_: (b, h, 0, i)
        ),
        'm': row,
        'l': row,
      },
      scratch_shapes=[
        [
          buffer(sides.k, sides.q),
          buffer(sides.k, sides.q, dtype=q.dtype),
          buffer(plan.e, sides.q),
          *[one] * 3,
          buffer(*plan.kept[0], dtype=jnp.int32),
        ]
      ],
    ),
    out_shape={
      'o': plan.like((plan.b, plan.h, plan.e, plan.long_q), rule.dtype),
      'm': rows,
      'l': rows,
    },
    compiler_params=layout.params(
      ('parallel', 'parallel', 'arbitrary', 'arbitrary')
    ),
    cost_estimate=layout.cost(plan, rule, 2),
    name='flash_forward',
  )(table, ins)
  o = jnp.moveaxis(outs['o'], 3, 1)[:, : plan.t]
  m, l = (  # noqa: E741
    jnp.swapaxes(outs[name][:, :, 0, : plan.t], 1, 2) for name in 'ml'
  )
  return o, m, l


# --------------------------------------------------------------------- backward

RING = 4  # blocks of dq on their way: read, added to, and two written


def _backward_kernel(rule, plan, rests, table, totals, ins, outs, scratch):
  b, head, j, g, n = (pl.program_id(axis) for axis in range(5))
  h = head * plan.group + g
  runs = plan.runs(table, b, j, False)
  total = runs.total
  q, k, v, do = (ins[name] for name in ('q', 'k', 'v', 'do'))
  p_buffer, x_buffer, dk, dv, ring, reads, writes, own, kept = scratch
  now = layout.Standing(plan, ins['query'], ins['key'], runs.tile(n), j, *kept)
  side_q, side_k = plan.tile.q, plan.tile.k
  last = n == pl.num_programs(4) - 1
  del totals  # they are where the results are

  def copy(at, out):
    """Of the block of dq that step `at` adds to."""
    where = pl.ds(pl.multiple_of(runs.tile(at, 1) * side_q, side_q), side_q)
    slot = at & (RING - 1)
    far, near = outs['totals'][0].at[b, h, :, where], ring.at[slot]
    if out:
      return pltpu.make_async_copy(near, far, writes.at[slot])
    return pltpu.make_async_copy(far, near, reads.at[slot])

  def add_queries(columns):
    """dq += k^T dx, of the tile before."""
    slot = n & (RING - 1)
    dq = pl.ds(0, plan.d)
    ring[slot, dq, columns] += plan.dot(
      ins['k_turned'][...], x_buffer[:, columns], NN
    )
    if own['queries'] is not None:
      more = pl.ds(layout.aligned(plan.d), layout.MORE)
      ring[slot, more, columns] += own['queries'][:, columns]

  def add_keys(rows, columns):
    """dv += w do and dk += dx q, of the tile before."""
    dv[rows, :] += plan.dot(
      p_buffer[rows, columns], ins['do_before'][columns, :], NN
    )
    dk[rows, :] += plan.dot(
      x_buffer[rows, columns], ins['q_before'][columns, :], NN
    )

  def weigh(rows, columns, masked):
    """w and dx, of the tile that has come."""
    x = plan.dot(k[rows, :], q[columns, :], NT)
    part = layout.part_of(rests, ins['extras'], rows, columns)
    if plan.modified:
      x, to_scores = layout.modified(
        *(rule.scored, x, now, part._replace(weights=()), rows, columns)
      )
    if masked:
      x = layout.masked(rule, plan, x, now, rows, columns)
    m, share, delta = (ins['known'][pl.ds(at, 1), columns] for at in range(3))
    p = plan.power(x - m) * share
    dw = plan.dot(v[rows, :], do[columns, :], NT)
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
      outs['totals'][1][rows, columns] = dextras.bias[0, 0].astype(jnp.float32)
    dextras = layout.kinds(dextras)
    for ref, dx in zip(own['heads'], dextras['heads']):
      ref[...] += dx.reshape(ref.shape)
    for ref, dx in zip(own['keys'], dextras['keys']):
      ref[rows, :] += dx[0, 0]
    for at, dx in enumerate(dextras['queries']):
      at = pl.ds(at, 1)
      more = dx[0, 0]
      if rows.start:
        more += own['queries'][at, columns]
      own['queries'][at, columns] = more

  def stages(parts, add, masked=None):
    if masked or (plan.modified and masked is not None):
      now.keep_queries()
    for columns in layout.cut(side_q, parts.columns):
      if add:
        add_queries(columns)
      for rows in layout.cut(side_k, parts.rows):
        if add:
          add_keys(rows, columns)
        if masked is not None:
          weigh(rows, columns, masked)

  @pl.when((n == 0) & (g == 0))
  def _():
    dk[...] = jnp.zeros_like(dk)
    dv[...] = jnp.zeros_like(dv)
    now.keep_keys()

  @pl.when(n == 0)
  def _():
    for ref in (*own['heads'], *own['keys']):
      ref[...] = jnp.zeros_like(ref)
    if own['queries'] is not None:
      own['queries'][...] = jnp.zeros_like(own['queries'])

  @pl.when(n < total)
  def _():
    # The block that goes where the next will come has had two steps to leave.
    pl.when(n >= RING)(lambda: copy(n + 1 - RING, True).wait())
    copy(n + 1, False).start()

  active = (n >= 1) & (n <= total)
  pl.when(active)(lambda: copy(n, False).wait())
  steady = (n >= 1) & (n < total)

  @pl.when(steady)
  def _():
    if not plan.mask:
      return stages(plan.tile.clear, True, False)
    needs_mask = runs.needs_mask(now.i)
    pl.when(needs_mask)(lambda: stages(plan.tile.masked, True, True))
    pl.when(~needs_mask)(lambda: stages(plan.tile.clear, True, False))

  @pl.when(~steady)
  def _():
    pl.when(active)(lambda: stages(plan.tile.clear, True))
    pl.when(n < total)(lambda: stages(plan.tile.masked, False, plan.mask))

  pl.when(active)(lambda: copy(n, True).start())

  @pl.when((n == total) & active)
  def _():
    for back in range(RING):
      at = n - back
      pl.when(at >= 1)(lambda at=at: copy(at, True).wait())

  if outs['totals'][1] is not None:

    @pl.when(total == 0)
    def _():
      outs['totals'][1][...] = jnp.zeros_like(outs['totals'][1])

  @pl.when(last & (g == plan.group - 1))
  def _():
    outs['dk'][...] = dk[...] / plan.unit
    outs['dv'][...] = dv[...]

  @pl.when(last)
  def _():
    for out, ref in zip(outs['heads'], own['heads']):
      out[...] = ref[...]
    for out, ref in zip(outs['keys'], own['keys']):
      out[...] = jnp.broadcast_to(ref[...], (side_k, 128)).T[:1]


@once('tpu', 'tpu')
def backward(rule, *inputs):
  """See `_backward`. Under vmap one after the other.

  For JAX cannot map over arrays that a kernel takes as a whole, as it does the
  sums of dq.
  """
  run = functools.partial(apart.gradients, functools.partial(_backward, rule))
  return jax.custom_batching.sequential_vmap(run)(*inputs)


@functools.partial(jax.jit, static_argnums=0)
def _backward(rule, q, k, v, extras, query, key, o, m, l, do, dm, dl):  # noqa: E741
  """dq, dk, dv and the gradient of extras; m is a constant."""
  del dm
  plan = layout.make(rule, q, k, v, extras, query, key, 'backward')
  sides = plan.tile
  table, width = plan.table(rule, query, key, False)
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
  q_laid = layout.rows_first(
    layout.scaled(q, rule.scale * plan.unit), plan.long_q, last=True
  )
  do_laid = layout.rows_first(do.astype(q.dtype), plan.long_q)
  ins = {
    'q': q_laid,
    'q_before': q_laid,
    'do': do_laid,
    'do_before': do_laid,
    'known': layout.rows_last(jnp.stack(known, 3), plan.long_q),
    'k': layout.rows_first(k, plan.long_k, last=True),
    'k_turned': layout.rows_last(k, plan.long_k, last=True),
    'v': layout.rows_first(v, plan.long_k),
    'query': layout.lay_tokens(plan, query, plan.long_q),
    'key': layout.lay_tokens(plan, key, plan.long_k),
    'extras': laid,
  }

  def place(lag):
    def at(b, head, j, g, n, table):
      i = plan.runs(table, b, j, False).tile(n, lag)
      return b, head * plan.group + g, i, j

    return at

  def spec(block, index, lag=0):
    return pl.BlockSpec(block, lambda *grid: index(*place(lag)(*grid)))

  def of_keys(*block):
    return pl.BlockSpec(
      (None, None, *block), lambda b, head, j, *_: (b, head, j, 0)
    )

  rows = lambda b, h, i, j: (b, h, i, 0)
  of_q, of_do = (None, None, sides.q, plan.d), (None, None, sides.q, plan.e)
  token_specs = layout.token_specs(plan, place(0))
  operand_specs = lambda group: tuple(
    layout.operand_specs(plan, one, place(0)) for one in group
  )
  of_tile = lambda x: spec(
    (None, None, sides.k, sides.q),
    lambda b, h, i, j: (*layout.pick(x, b, h), j, i),
  )
  specs = {
    'q': spec(of_q, rows),
    'q_before': spec(of_q, rows, 1),
    'do': spec(of_do, rows),
    'do_before': spec(of_do, rows, 1),
    'known': spec((None, None, 3, sides.q), lambda b, h, i, j: (b, h, 0, i)),
    'k': of_keys(sides.k, plan.d),
    'k_turned': pl.BlockSpec(
      (None, None, plan.d, sides.k), lambda b, head, j, *_: (b, head, 0, j)
    ),
    'v': of_keys(sides.k, plan.e),
    'query': token_specs[0],
    'key': token_specs[1],
    'extras': Extras(
      operand_specs(laid.scores),
      operand_specs(laid.weights),
      None if laid.bias is None else of_tile(laid.bias),
    ),
  }
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
  anywhere = jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), totals)
  buffer = lambda *shape, dtype=f32: pltpu.VMEM(shape, dtype)
  outs = pl.pallas_call(
    functools.partial(_backward_kernel, rule, plan, layout.rests(extras)),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(b, plan.heads, plan.blocks_k, plan.group, width + 1),
      in_specs=[anywhere, specs],
      out_specs={
        'dk': of_keys(sides.k, plan.d),
        'dv': of_keys(sides.k, plan.e),
        'totals': (
          anywhere[0],
          None if laid.bias is None else of_tile(totals[1]),
        ),
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
        [
          buffer(sides.k, sides.q, dtype=q.dtype),
          buffer(sides.k, sides.q, dtype=q.dtype),
          buffer(sides.k, plan.d),
          buffer(sides.k, plan.e),
          buffer(RING, rows_dq, sides.q),
          pltpu.SemaphoreType.DMA((RING,)),
          pltpu.SemaphoreType.DMA((RING,)),
          {
            'heads': [buffer(1, n) for _, n in like_heads],
            'keys': [buffer(sides.k, 1) for _ in kinds['keys']],
            'queries': buffer(more, sides.q) if more else None,
          },
          [buffer(*shape, dtype=jnp.int32) for shape in plan.kept],
        ]
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
      ('parallel', 'parallel', 'arbitrary', 'arbitrary', 'arbitrary')
    ),
    cost_estimate=layout.cost(plan, rule, 5),
    name='flash_backward',
  )(table, totals, ins)
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
