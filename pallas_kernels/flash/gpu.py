"""Softmax attention on a Hopper GPU: warpgroups that take turns.

The mathematics is that of `xla`. Two warpgroups compute, each for rows of its
own, and a third fetches what they need ahead of them. Three kernels:

  forward          a block of queries stays, tiles of keys and values pass by:
                   while one warpgroup has the matrix units, the other takes
                   powers, and a barrier hands over the turn
  backward, dq     likewise, and do stays with the queries
  backward, dk dv  a block of keys and values stays, tiles of q and do pass by,
                   of all query heads that share them; scores are `s t`

So nothing is added up by two blocks, and results are the same in every run.
Heads wider than 128 have dk and dv made by two kernels, for one warpgroup has
registers for one of the two sums.

They have been compiled for an H200 and interpreted, and have not run on
hardware: `python -m experiments.bench --kernels --gpu` is what to run there.

A modification of scores is done as `gpu_scores` says; the gradients of what it
reads are for `xla` to find, which is left out where nobody asks for them.
Widths of heads are filled up with zeros to 64, 128 or 256.

Which tiles are visited stands in a table (`runs`). Those that need no mask come
first and the others after them, so that each kind has a loop of its own; sums
do not mind. Scores are in units of log2(e), as a GPU computes powers of 2.
"""

import dataclasses
import functools
import inspect
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import elementwise, masks, runs
from pallas_kernels.blocks import Tile, chip
from pallas_kernels.flash import tpu_layout as layout
from pallas_kernels.flash import xla
from pallas_kernels.flash.gpu_scores import COARSE, Modification
from pallas_kernels.flash.partial import MONOID
from pallas_kernels.masks import Side, Tokens
from pallas_kernels.problem import (
  Engine,
  Extras,
  Operands,
  Rule,
  alike,
  floats,
  once,
  one_segment,
  reverse,
  unfit,
)
from pallas_kernels.tiles import filled

try:
  from jax.experimental.pallas import mosaic_gpu as plgpu
except ModuleNotFoundError as missing:  # they import absl, JAX installs none
  if missing.name != 'absl':
    raise
  plgpu = None

LOWEST = -0.7 * float(np.finfo(np.float32).max)  # below every score, but finite
LOG2E = math.log2(math.e)
COMPUTE = 2  # warpgroups that do; one more fetches
ROWS = 64  # of a tile, for one warpgroup: what a matrix instruction takes
BLOCK = COMPUTE * ROWS
# Registers of a thread that computes, and of one that fetches. Three warpgroups
# have 168 each to begin with.
MANY, FEW = 240, 24
WIDTHS = 64, 128, 256  # of heads, that the kernels have
HOPPER = re.compile(r'\b(H100|H200|H800|H20|GH200)\b')


def refuses(
  rule: Rule, q, k, v, extras: Extras, query: Tokens, key: Tokens
) -> str | None:
  """Why this backend cannot serve a call, or None; arguments as of `attend`."""
  d, e = q.shape[3], v.shape[3]
  if plgpu is None:
    return "JAX's part for GPUs imports absl: pip install absl-py"
  if chip() != 'cpu' and not HOPPER.search(chip()):
    return f'it is for Hopper GPUs, as an H100 or H200, not {chip()}'
  if why := unfit(q, k, v, ('bfloat16', 'float16')):
    return why
  if max(d, e) > WIDTHS[-1]:
    return f'heads are at most {WIDTHS[-1]} wide, not {max(d, e)}'
  rule = rule.elementwise()
  for fn, own in zip(
    (*rule.scores, *rule.weights), (*extras.scores, *extras.weights)
  ):
    if why := elementwise.refuses(fn, own, query, key):
      return why
  if why := elementwise.holds(rule.mask, query.side, key.side):
    return why
  for function in _functions(rule, extras, query, key).values():
    if function is not None and function.lacks:
      lacks = ', '.join(function.lacks)
      return f'what happens to scores uses {lacks}, which its compiler lacks'
  return None


def _functions(rule, extras, query, key) -> dict[str, Modification | None]:
  """What happens to scores and to weights, by the names that `Plan` has."""
  rule, sides = rule.elementwise(), (query.side, key.side)
  of = lambda fn, own: Modification.of(fn, own, *sides) if own else None
  return {
    'scored': of(rule.scored, extras._replace(weights=())),
    'weighed': of(rule.weighed, Extras(weights=extras.weights)),
  }


def attend(rule, q, k, v, extras, query, key):
  """Finished o, m and l; arguments as in `problem`.

  Differentiate it in reverse mode.
  """
  inputs = alike((q, k, v, extras), (query, key))
  return _attend(rule, *inputs, query, key)


@dataclasses.dataclass(frozen=True)
class Plan(layout.Plan):
  """Sizes and choices that are known while tracing.

  Attributes:
    stages: tiles that are there or on their way.
    scored, weighed: what happens to scores and to weights, or None.
  """

  stages: int
  scored: Modification | None
  weighed: Modification | None

  def slot(self, n):
    """In which buffer the n-th tile is."""
    return lax.rem(n, jnp.int32(self.stages))

  @property
  def exact(self):
    """Whether coarse forms of what happens to scores would be too coarse."""
    functions = self.scored, self.weighed
    return any(f is not None and f.operations & COARSE for f in functions)

  def row(self, b):
    """Which row of tokens belongs to row b of the batch."""
    return b if self.rows > 1 else 0


def make(rule, q, k, v, extras, query, key, side_q, side_k, stages=2) -> Plan:
  tile = Tile(side_q, side_k)
  found = layout.known(rule, q, k, v, extras, query, key, tile)
  found |= {'d': _width(found['d']), 'e': _width(found['e'])}
  return Plan(**found, stages=stages, **_functions(rule, extras, query, key))


def _width(d):
  """How wide a head is in the kernels."""
  return next(width for width in WIDTHS if d <= width)


class Order:
  """The tiles of one block: those that need no mask, then the others."""

  def __init__(self, table, block):
    field = [table[block * runs.FIELDS + at] for at in range(runs.FIELDS)]
    self._first, self._count = field[runs.FIRST], field[runs.COUNT]
    self._jump, self.total = field[runs.JUMP], field[runs.TOTAL]
    self._start = self._before(field[runs.CLEAR])
    self.clear = self._before(field[runs.CLEAR_END]) - self._start

  def _before(self, tile):
    """How many of the tiles that are visited lie before this one."""
    within = lambda x, most: jnp.minimum(jnp.maximum(x, 0), most)
    second = within(tile - self._jump - self._count, self.total - self._count)
    return within(tile - self._first, self._count) + second

  def tile(self, n):
    """Where the n-th lies."""
    others = n - self.clear
    others += jnp.where(others < self._start, 0, self.clear)
    n = jnp.where(n < self.clear, self._start + n, others)
    return n + jnp.where(n < self._count, self._first, self._jump)


# ------------------------------------------------ what a warpgroup does at once


def product(x, y, shape, meanwhile=lambda: None):
  """x y^T of two buffers, in float32, and what is done until it is there."""

  def multiply(total):
    plgpu.wgmma(total, x, y.transpose((1, 0)))
    meanwhile()
    return total[...]

  return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def added(total, x, y, meanwhile=lambda: None):
  """total + x y of a value x and a buffer y, likewise."""

  def add(total):
    plgpu.wgmma(total, x, y)
    meanwhile()

  return pl.run_state(add)(plgpu.ACC.init(total))


def full(shape, value):
  """A tile, or with one axis what its rows have, of one value."""
  whole = plgpu.Layout.WGMMA
  its = whole if len(shape) == 2 else whole.reduce(1)
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), its)


def iota(shape, axis):
  return plgpu.broadcasted_iota(
    jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA
  )


def load(ref, axes):
  """From far memory, in pieces: what lies along these axes of a tile."""
  layout = plgpu.Layout.WGMMA
  for axis in {0, 1} - set(axes):
    layout = layout.reduce(axis)
  with_index = 'idx' in inspect.signature(plgpu.load).parameters  # jax 0.10
  index = ((),) if with_index else ()
  return plgpu.load(ref, *index, layout=layout, optimized=False)


def along(ref, shape, axis):
  """The numbers of a row in memory, along one axis of a tile."""
  return lax.broadcast_in_dim(load(ref, [axis]), shape, [axis])


def across(row, shape):
  """What rows have, over a tile."""
  return lax.broadcast_in_dim(row, shape, [0])


# ------------------------------------------------------------- parts of kernels


def fetch(plan, total, *streams):
  """What the third warpgroup does: a tile comes when another has gone.

  A stream is (buffers, array, where(n) in the array, barriers of what has come,
  of what has gone).
  """
  plgpu.set_max_registers(FEW, action='decrease')

  @pl.loop(0, total)
  def _(n):
    at = plan.slot(n)
    for near, far, where, come, gone in streams:
      _wait_if(n >= plan.stages, gone.at[at])
      plgpu.copy_gmem_to_smem(far.at[where(n)], near.at[at], come.at[at])

  for at in range(plan.stages):  # the last ones go, too
    for *_, gone in streams:
      _wait_if(total > at, gone.at[at])


def _wait_if(condition, barrier):
  pl.when(condition)(lambda: plgpu.barrier_wait(barrier))


def stay(group, *pieces):
  """Brings what a warpgroup keeps: pieces are (buffers, ref, barriers)."""
  for near, far, come in pieces:
    plgpu.copy_gmem_to_smem(far, near.at[group], come.at[group])
  for _, _, come in pieces:
    plgpu.barrier_wait(come.at[group])


def visit_all(plan, visit, clear, total, carry):
  """visit(n, carry, masked) of all tiles, see `Order`."""
  unmasked = functools.partial(visit, masked=False)
  if not plan.mask:
    return lax.fori_loop(0, total, unmasked, carry)
  carry = lax.fori_loop(0, clear, unmasked, carry)
  masked = functools.partial(visit, masked=True)
  return lax.fori_loop(clear, total, masked, carry)


@dataclasses.dataclass
class Pairs:
  """The queries and keys of one tile, and what bears on their scores.

  Attributes:
    more: refs of tokens 'f t' and of extras, see `_more`.
    place: (row of the batch, query head).
    starts: where the queries of the tile begin, and where its keys do.
    axes: along which axis of it queries lie, and along which keys.
    shape: of the tile.
  """

  rule: Rule
  plan: Plan
  more: dict[str, Any]
  place: tuple
  starts: tuple
  axes: tuple[int, int]
  shape: tuple[int, int]

  def scores(self, x, masked):
    """x = q k modified and masked, and the derivative, or None if constant."""
    slope = None
    if self.plan.scored is not None:
      own = self.more['extras']._replace(weights=())
      x, slope = self._modified(self.plan.scored, x * self.rule.scale, own)
    if masked:
      x = jnp.where(masks.sees(self.rule.mask, *self._tokens), x, -jnp.inf)
    return x, slope

  @property
  def unit(self):
    """What makes a score of `scores` the logarithm of a weight to base 2."""
    return LOG2E * (1 if self.plan.scored is not None else self.rule.scale)

  def weights(self, p):
    """p as it is in the numerator, and the derivative, or None if it is 1."""
    if self.plan.weighed is None:
      return p, None
    own = Extras(weights=self.more['extras'].weights)
    return self._modified(self.plan.weighed, p, own)

  @functools.cached_property
  def _tokens(self) -> list[Tokens]:
    row = self.plan.row(self.place[0])
    refs = self.more['query'], self.more['key']
    return [
      _standing(
        *(self.plan, tags, None if ref is None else ref.at[row], start),
        *(self.shape, axis, length),
      )
      for tags, ref, start, axis, length in zip(
        self.plan.tags, refs, self.starts, self.axes, (None, self.plan.s)
      )
    ]

  def _modified(self, function, x, extras):
    sides = (tokens.side for tokens in self._tokens)
    own = lambda group: tuple(map(self._operands, group))
    bias = extras.bias
    if bias is not None:
      bias = load(self._here(bias, 0, 1), (0, 1)).astype(jnp.float32)
    extras = Extras(own(extras.scores), own(extras.weights), bias)
    return function(x, *sides, extras)

  def _operands(self, own: Operands):
    def numbers(ref):
      found = np.empty((1, *ref.shape[1:]), object)
      for at in np.ndindex(*ref.shape[1:]):
        found[0, *at] = ref[self.place[1], *at]
      return found

    of_tokens = lambda refs, side: tuple(
      along(self._here(ref, side), self.shape, self.axes[side]) for ref in refs
    )
    return Operands(
      tuple(map(numbers, own.heads)),
      of_tokens(own.queries, 0),
      of_tokens(own.keys, 1),
    )

  def _here(self, ref, *sides):
    """Of 'b h ...', with 1 where shared, what lies along sides of the tile."""
    cut = {
      self.axes[side]: pl.ds(self.starts[side], self.shape[self.axes[side]])
      for side in sides
    }
    where = (cut[axis] for axis in sorted(cut))
    return ref.at[*layout.pick(ref, *self.place), *where]


def _standing(plan, tags, ref, start, shape, axis, length) -> Tokens:
  """Where tokens stand; of keys so many are none of the padding."""
  if not plan.tokens:
    order = start + iota(shape, axis)
    inside = None
    if plan.ragged:
      inside = jnp.ones_like(order) if length is None else order < length
      inside = inside.astype(jnp.int32)
    return Tokens(Side(order, {}), inside)
  here = pl.ds(start, shape[axis])
  fields = [along(ref.at[f, here], shape, axis) for f in range(ref.shape[0])]
  order = fields.pop(0)
  segments = fields.pop(0) if plan.segments or plan.ragged else None
  return Tokens(Side(order, dict(zip(tags, fields))), segments)


# ---------------------------------------------------------------------- forward


def _forward_kernel(rule, plan, ins, outs, scratch):
  q, k, v, table, more = ins
  qs, ks, vs, q_come, k_come, v_come, k_gone, v_gone, turn = scratch
  b, h, i = (lax.axis_index(name) for name in ('batch', 'head', 'block'))
  i = plan.blocks_q - 1 - i  # under a causal mask the longest first
  group = lax.axis_index('warpgroup')
  order = Order(table, plan.row(b) * plan.blocks_q + i)
  total = order.total

  def hand_over():
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)

  @pl.when(group < COMPUTE)
  def _():
    plgpu.set_max_registers(MANY, action='increase')
    start = i * plan.tile.q + group * ROWS
    here = pl.ds(start, ROWS)
    stay(group, (qs, q.at[b, here, h], q_come))
    tile = ROWS, plan.tile.k
    _wait_if(total > 0, k_come.at[0])
    pl.when(group == 1)(hand_over)

    def visit(n, carry, masked):
      o, m, l = carry  # noqa: E741
      at = plan.slot(n)
      x = product(qs.at[group], ks.at[at], tile, hand_over)
      plgpu.barrier_arrive(k_gone.at[at])
      starts = start, order.tile(n) * plan.tile.k
      pairs = Pairs(rule, plan, more, (b, h), starts, (0, 1), tile)
      x, _ = pairs.scores(x, masked)
      new = jnp.maximum(m, x.max(axis=1) * pairs.unit)
      factor = jnp.exp2(m - new)
      p = jnp.exp2(x * pairs.unit - across(new, tile))
      o *= across(factor, o.shape)
      l = l * factor + p.sum(axis=1)  # noqa: E741
      p, _ = pairs.weights(p)
      # All of this before the turn is handed over, and nothing of it after.
      o, l, m, p = lax.optimization_barrier((o, l, new, p.astype(plan.dtype)))  # noqa: E741
      plgpu.barrier_arrive(turn)
      plgpu.barrier_wait(v_come.at[at])
      plgpu.barrier_wait(turn)
      after = n + 1
      o = added(
        *(o, p, vs.at[at]),
        lambda: _wait_if(after < total, k_come.at[plan.slot(after)]),
      )
      plgpu.barrier_arrive(v_gone.at[at])
      return o, m, l

    nothing = full((ROWS, plan.e), 0), full((ROWS,), LOWEST), full((ROWS,), 0)
    o, m, l = visit_all(plan, visit, order.clear, total, nothing)  # noqa: E741
    pl.when(group == 0)(hand_over)
    seen = l > 0
    share = 1 / jnp.where(seen, l, 1.0)
    o *= across(share, o.shape)
    if outs[0].dtype == plan.dtype:  # it leaves by where q has been
      qs[group] = o.astype(plan.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(qs.at[group], outs[0].at[b, here, h])
      plgpu.wait_smem_to_gmem(0)
    else:
      outs[0][b, here, h] = o
    outs[1][b, h, here] = jnp.where(seen, m / LOG2E, -jnp.inf)
    outs[2][b, h, here] = l

  @pl.when(group == COMPUTE)
  def _():
    head = lax.div(h, jnp.int32(plan.group))
    where = lambda n: (b, pl.ds(order.tile(n) * plan.tile.k, plan.tile.k), head)
    fetch(
      plan,
      total,
      (ks, k, where, k_come, k_gone),
      (vs, v, where, v_come, v_gone),
    )


@once('gpu', 'cuda')
def forward(rule, q, k, v, extras, query, key):
  """The finished o, m and l; arguments as in `problem`."""
  # What happens to scores needs registers, as wide heads do.
  narrow = max(q.shape[3], v.shape[3]) <= 128 and not extras
  side = 128 if narrow else 64
  plan = make(rule, q, k, v, extras, query, key, BLOCK, side)
  rows = plan.like((plan.b, plan.h, plan.long_q), jnp.float32)
  short = plan.d == plan.e and rule.dtype == plan.dtype
  dtype = rule.dtype if short else jnp.float32
  o = plan.like((plan.b, plan.long_q, plan.h, plan.e), dtype)
  o, m, l = _call(  # noqa: E741
    *(rule, plan, _forward_kernel, 'flash_forward', True, extras, query, key),
    # Padding is filled up with what occurs, see `tiles.arrange`.
    ins=(
      _filled(q, plan.long_q, plan.d, last=True),
      _filled(k, plan.long_k, plan.d, last=True),
      _filled(v, plan.long_k, plan.e),
    ),
    outs=[o, rows, rows],
    stays=(plan.d,),
    passes=(plan.d, plan.e),
    turn=True,
  )
  m, l = (jnp.swapaxes(x, 1, 2)[:, : plan.t] for x in (m, l))  # noqa: E741
  o = o[:, : plan.t, :, : v.shape[3]]
  return o.astype(rule.dtype), m, l


# --------------------------------------------------------------------- backward


def gradient(p, dw, delta, slope, factor):
  """Of the scores, where slope and factor are derivatives or None for 1."""
  dx = p * ((dw if factor is None else dw * factor) - delta)
  return dx if slope is None else dx * slope


def _queries_kernel(rule, plan, ins, outs, scratch):
  """dq: a block of queries stays."""
  q, k, v, do, lse, delta, table, more = ins
  qs, dos, ks, vs, q_come, do_come, k_come, v_come, k_gone, v_gone = scratch
  b, h, i = (lax.axis_index(name) for name in ('batch', 'head', 'block'))
  i = plan.blocks_q - 1 - i
  group = lax.axis_index('warpgroup')
  order = Order(table, plan.row(b) * plan.blocks_q + i)

  @pl.when(group < COMPUTE)
  def _():
    plgpu.set_max_registers(MANY, action='increase')
    start = i * plan.tile.q + group * ROWS
    here = pl.ds(start, ROWS)
    stay(
      group, (qs, q.at[b, here, h], q_come), (dos, do.at[b, here, h], do_come)
    )
    tile = ROWS, plan.tile.k
    most, less = (along(ref.at[b, h, here], tile, 0) for ref in (lse, delta))

    def visit(n, dq, masked):
      at = plan.slot(n)
      plgpu.barrier_wait(k_come.at[at])
      x = product(qs.at[group], ks.at[at], tile)
      starts = start, order.tile(n) * plan.tile.k
      pairs = Pairs(rule, plan, more, (b, h), starts, (0, 1), tile)
      x, slope = pairs.scores(x, masked)
      p = jnp.exp2(x * pairs.unit - most)
      plgpu.barrier_wait(v_come.at[at])
      dp = product(dos.at[group], vs.at[at], tile)
      plgpu.barrier_arrive(v_gone.at[at])
      dx = gradient(p, dp, less, slope, pairs.weights(p)[1])
      dq = added(dq, dx.astype(plan.dtype), ks.at[at])
      plgpu.barrier_arrive(k_gone.at[at])
      return dq

    nothing = full((ROWS, plan.d), 0)
    dq = visit_all(plan, visit, order.clear, order.total, nothing)
    outs[0][b, here, h] = dq * rule.scale

  @pl.when(group == COMPUTE)
  def _():
    head = lax.div(h, jnp.int32(plan.group))
    where = lambda n: (b, pl.ds(order.tile(n) * plan.tile.k, plan.tile.k), head)
    fetch(
      *(plan, order.total, (ks, k, where, k_come, k_gone)),
      (vs, v, where, v_come, v_gone),
    )


def _keys_kernel(wanted, rule, plan, ins, outs, scratch):
  """dk and dv, or one of them: a block of keys and values stays."""
  q, k, v, do, lse, delta, table, more = ins
  ks, vs, qs, dos, k_come, v_come, q_come, do_come, q_gone, do_gone = scratch
  b, head, j = (lax.axis_index(name) for name in ('batch', 'head', 'block'))
  group = lax.axis_index('warpgroup')
  order = Order(table, plan.row(b) * plan.blocks_k + j)
  clear, total = plan.group * order.clear, plan.group * order.total

  def place(n):
    """The query head of step n, and where its queries begin."""
    others = n >= clear
    skipped = jnp.where(others, order.clear, 0)
    count = jnp.where(others, order.total - order.clear, order.clear)
    count = jnp.maximum(count, 1)
    n -= jnp.where(others, clear, 0)
    tile = order.tile(skipped + lax.rem(n, count))
    return head * plan.group + lax.div(n, count), tile * plan.tile.q

  @pl.when(group < COMPUTE)
  def _():
    plgpu.set_max_registers(MANY, action='increase')
    start = j * plan.tile.k + group * ROWS
    here = pl.ds(start, ROWS)
    stay(
      *(group, (ks, k.at[b, here, head], k_come)),
      (vs, v.at[b, here, head], v_come),
    )
    tile = ROWS, plan.tile.q

    def visit(n, sums, masked):
      sums = dict(sums)
      at = plan.slot(n)
      h, begin = place(n)
      there = pl.ds(begin, plan.tile.q)
      most = along(lse.at[b, h, there], tile, 1)
      plgpu.barrier_wait(q_come.at[at])
      x = product(ks.at[group], qs.at[at], tile)
      pairs = Pairs(rule, plan, more, (b, h), (begin, start), (1, 0), tile)
      x, slope = pairs.scores(x, masked)
      p = jnp.exp2(x * pairs.unit - most)
      w, factor = pairs.weights(p)
      plgpu.barrier_wait(do_come.at[at])
      if 'dv' in sums:
        sums['dv'] = added(sums['dv'], w.astype(plan.dtype), dos.at[at])
      if 'dk' in sums:
        dp = product(vs.at[group], dos.at[at], tile)
        less = along(delta.at[b, h, there], tile, 1)
        dx = gradient(p, dp, less, slope, factor)
        sums['dk'] = added(sums['dk'], dx.astype(plan.dtype), qs.at[at])
      plgpu.barrier_arrive(do_gone.at[at])
      plgpu.barrier_arrive(q_gone.at[at])
      return sums

    wide = {'dk': plan.d, 'dv': plan.e}
    nothing = {name: full((ROWS, wide[name]), 0) for name in wanted}
    sums = visit_all(plan, visit, clear, total, nothing)
    for name, out in zip(wanted, outs):
      scale = rule.scale if name == 'dk' else 1.0
      out[b, here, head] = sums[name] * scale

  @pl.when(group == COMPUTE)
  def _():
    def where(n):
      h, begin = place(n)
      return b, pl.ds(begin, plan.tile.q), h

    fetch(
      plan,
      total,
      (qs, q, where, q_come, q_gone),
      (dos, do, where, do_come, do_gone),
    )


@once('gpu', 'cuda')
def backward(rule, q, k, v, extras, query, key, o, m, l, do, dm, dl):  # noqa: E741
  """dq, dk, dv and the gradient of extras; m is a constant."""
  dextras = floats(extras)
  if jax.tree.leaves(dextras):
    inputs = rule, q, k, v, extras, query, key, o, m, l, do, dm, dl
    *_, dextras = xla.backward(*inputs)
  seen = l > 0
  lse = m * LOG2E + jnp.log2(jnp.where(seen, l, 1))
  known = (
    (jnp.where(seen, lse, jnp.inf), jnp.inf),  # powers of nothing are 0
    (jnp.sum(do.astype(jnp.float32) * o, -1) - l * dl, 0),
  )
  do = do.astype(q.dtype)

  def call(plan, kernel, name, by_query, outs):
    rest = (0, 0), (0, 0), (0, plan.long_q - plan.t)
    rows = [
      jnp.pad(jnp.swapaxes(x, 1, 2), rest, constant_values=fill)
      for x, fill in known
    ]
    return _call(
      *(rule, plan, kernel, 'flash_backward_' + name, by_query),
      *(extras, query, key),
      ins=(
        _filled(q, plan.long_q, plan.d, last=True),
        _filled(k, plan.long_k, plan.d, last=True),
        _filled(v, plan.long_k, plan.e),
        _filled(do, plan.long_q, plan.e),
        *rows,
      ),
      outs=outs,
      stays=(plan.d, plan.e),
      passes=(plan.d, plan.e),
    )

  both = max(q.shape[3], v.shape[3]) <= 128
  # Of wide heads shared memory holds but one tile that passes by.
  stages = 2 if both else 1
  plan = make(rule, q, k, v, extras, query, key, BLOCK, 64, stages)
  dq = plan.like((plan.b, plan.long_q, plan.h, plan.d), jnp.float32)
  (dq,) = call(plan, _queries_kernel, 'dq', True, [dq])
  plan = make(rule, q, k, v, extras, query, key, 64, BLOCK, stages)
  found = {
    'dk': plan.like((plan.b, plan.long_k, plan.heads, plan.d), jnp.float32),
    'dv': plan.like((plan.b, plan.long_k, plan.heads, plan.e), jnp.float32),
  }
  for wanted in (('dk', 'dv'),) if both else (('dk',), ('dv',)):
    kernel = functools.partial(_keys_kernel, wanted)
    outs = [found[name] for name in wanted]
    outs = call(plan, kernel, '_'.join(wanted), False, outs)
    found |= dict(zip(wanted, outs))
  cut = lambda dx, x: dx[:, : x.shape[1], :, : x.shape[3]]
  return cut(dq, q), cut(found['dk'], k), cut(found['dv'], v), dextras


# Looked up when called, as everything in a module is.
_attend = reverse(lambda *x: forward(*x), lambda *x: backward(*x))
ENGINE = Engine(attend, forward, backward, MONOID)


# ------------------------------------------------------------------------ calls


def _call(
  rule,
  plan,
  kernel,
  name,
  by_query,
  extras,
  query,
  key,
  ins,
  outs,
  stays,
  passes,
  turn=False,
):
  """Runs a kernel: ins, a table, tokens and extras -> outs.

  Args:
    by_query: blocks of queries stay, and so one is what a block is of.
    stays, passes: how wide each array is that stays, or passes by.
    turn: warpgroups take turns.
  """
  sides = (query, key)
  if plan.ragged:
    sides = tuple(map(one_segment, sides))
  table = runs.table(rule.mask, *sides, plan.tile.q, plan.tile.k, by_query)
  tiled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
  buffer = lambda *shape: plgpu.SMEM(shape, plan.dtype, transforms=tiled)
  length = plan.tile.k if by_query else plan.tile.q
  gone = plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=plan.stages)
  scratch = [
    *(buffer(COMPUTE, ROWS, width) for width in stays),
    *(buffer(plan.stages, length, width) for width in passes),
    *[plgpu.Barrier(num_barriers=COMPUTE)] * len(stays),
    *[plgpu.Barrier(num_barriers=plan.stages)] * len(passes),
    *[gone] * len(passes),
    *[plgpu.Barrier(num_arrivals=COMPUTE)] * turn,
  ]
  more = _more(plan, extras, query, key, by_query)
  leaves, tree = jax.tree.flatten((*ins, table, more))
  heads = plan.h if by_query else plan.heads
  blocks = plan.blocks_q if by_query else plan.blocks_k

  def body(*refs):
    ends = len(leaves), len(leaves) + len(outs)
    ins = tree.unflatten(refs[: ends[0]])
    kernel(rule, plan, ins, refs[ends[0] : ends[1]], refs[ends[1] :])

  outs = plgpu.kernel(
    body,
    out_type=outs,
    scratch_types=scratch,
    compiler_params=plgpu.CompilerParams(approx_math=not plan.exact),
    grid=(heads, blocks, plan.b),
    grid_names=('head', 'block', 'batch'),
    num_threads=COMPUTE + 1,
    thread_name='warpgroup',
    kernel_name=name,
  )(*leaves)
  # Under shard_map they vary as what they are made of: it does not say so.
  for_all = lambda x: (
    plan.varying.varying - jax.typeof(x).manual_axis_type.varying
  )
  return [
    lax.pcast(x, tuple(sorted(axes)), to='varying')
    if (axes := for_all(x))
    else x
    for x in outs
  ]


def _more(plan, extras, query, key, by_query):
  """What kernels read of tokens, 'f t', and of extras; None where nothing."""

  def own(one):
    laid = layout.lay_operands(plan, one)
    flat = lambda xs: tuple(x[:, :, 0] for x in xs)
    return Operands(one.heads, flat(laid.queries), flat(laid.keys))

  bias = layout.lay_bias(plan, extras.bias)
  if bias is not None and by_query:
    bias = bias.mT
  return {
    'query': layout.lay_tokens(plan, query, plan.long_q),
    'key': layout.lay_tokens(plan, key, plan.long_k),
    'extras': Extras(
      tuple(map(own, extras.scores)), tuple(map(own, extras.weights)), bias
    ),
  }


def _filled(x, length, width, last=False):
  """'b t h d' up to whole tiles: zeros beside it; behind it see `filled`."""
  return filled(filled(x, 3, width), 1, length, last)
