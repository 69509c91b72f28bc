"""Attention round a ring of devices: queries stay, keys travel.

Liu, Zaharia, Abbeel 2023, "Ring Attention with Blockwise Transformers for
Near-Infinite Context", https://arxiv.org/abs/2310.01889.

Each device holds a part of the time axis. Keys, and all that belongs to them,
go from device to device; each computes attention of its queries to the keys
that it holds for now, and merges it with what it has. While it computes, the
keys go on. In the backward pass the gradients of the keys travel behind them,
one hop late, so that they too are on their way while something else is
computed; and then home. What is kept for it is what one device would keep.

Who sees whom is decided by data that travels along: so contiguous, striped and
packed layouts are one ring. Hops after the last one in which any device may see
something are neither computed nor sent.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import masks
from pallas_kernels.masks import Extent, Mask, Range, Tokens
from pallas_kernels.problem import (
  Engine,
  Extras,
  Operands,
  accumulator,
  alike,
  reverse,
)


@dataclasses.dataclass(frozen=True)
class Ring:
  """Devices along a mesh axis whose neighbours are `stride` apart."""

  axis: str
  stride: int = 1

  @property
  def size(self) -> int:
    return lax.axis_size(self.axis) // self.stride

  def owner(self, hop):
    """Whose keys are here after so many hops."""
    here = lax.axis_index(self.axis) // self.stride
    return (here - hop) % self.size

  def shift(self, tree, hops: int = 1):
    """Everything `hops` places on."""
    n = lax.axis_size(self.axis)
    to = lambda i: (i + hops * self.stride) % n
    return lax.ppermute(tree, self.axis, [(i, to(i)) for i in range(n)])


class Block(NamedTuple):
  """What travels: keys, values, and what bears on them."""

  k: jax.Array
  v: jax.Array
  own: tuple  # numbers of each key, for each function of scores and of weights
  key: Tokens


@functools.cache
def over(ring: Ring, dense: bool = False):
  """Spreads an engine over a ring.

  Args:
    ring: the devices.
    dense: tokens stand in their order over the devices, and have no tags: then
      it is known while tracing who may see whom.
  """

  @functools.cache
  def spread(engine: Engine):
    if engine.backward is None:
      raise NotImplementedError(
        'a ring wants an engine with a backward pass of its own, for JAX would'
        " keep the keys of every hop: take implementation='xla', or"
        " strategy='gather'"
      )

    monoid = engine.monoid

    def forward(rule, q, k, v, extras, query, key):
      wide = dataclasses.replace(rule, dtype=np.dtype(accumulator(q)))

      def visit(hop, block):
        seen = _with_keys(extras, block, ring.owner(hop))
        inputs = q, block.k, block.v, seen, query, block.key
        return engine.forward(wide, *inputs)

      hops = _hops(rule.mask, query, key, ring, dense)
      block = alike(Block(k, v, _of_keys(extras), key), ())
      nothing = monoid.nothing(q, v)
      partial = _fold(
        *(ring, visit, monoid.merge, monoid.open, nothing, block, hops)
      )
      o, *rest = monoid.finish(partial)
      return o.astype(rule.dtype), *rest

    def backward(rule, q, k, v, extras, query, key, *known):
      def visit(hop, block):
        owner = ring.owner(hop)
        seen = _with_keys(extras, block, owner)
        dq, dk, dv, dextras = engine.backward(
          rule, q, block.k, block.v, seen, query, block.key, *known
        )
        stays = dq, _without_keys(dextras, extras, owner)
        return stays, (dk, dv, _of_keys(dextras))

      hops = _hops(rule.mask, query, key, ring, dense)
      block = alike(Block(k, v, _of_keys(extras), key), ())
      (dq, dextras), (dk, dv, own) = _fold_back(ring, visit, block, hops)
      return dq, dk, dv, _put_keys(dextras, own)

    around = reverse(forward, backward)

    def attend(rule, q, k, v, extras, query, key):
      inputs = alike((q, k, v, extras), (query, key))
      return around(rule, *inputs, query, key)

    return Engine(attend, forward, backward)

  return spread


def _fold(ring, visit, merge, opened, carry, block, hops):
  """The merger of all opened(*visit(hop, block)): one's own and those to come.

  They are opened after `_meanwhile`, see there.
  """

  def step(hop, state):
    carry, block = state
    coming, more = _meanwhile(ring.shift(block), visit(hop, block))
    return merge(carry, opened(*more)), coming

  carry, block = lax.fori_loop(0, hops, step, (carry, block))
  return merge(carry, opened(*visit(hops, block)))


def _fold_back(ring, visit, block, hops):
  """The sums of both results of visit(hop, block).

  The first is of what stays; the second of what goes with the block, and home.
  The last step sends the block once more, for no one: to leave that out, it
  would have to be a third copy of the kernels in the program.
  """
  add = functools.partial(jax.tree.map, jnp.add)

  def step(hop, state):
    stays, *moving = state
    own, more = visit(hop, moving[1])
    moved, more = _meanwhile(ring.shift(moving), more)
    goes, coming = moved
    return add(stays, own), add(goes, more), coming

  stays, goes = visit(0, block)
  coming, goes = _meanwhile(ring.shift(block), goes)
  stays, goes, _ = lax.fori_loop(1, hops + 1, step, (stays, goes, coming))
  return stays, _home(ring, goes, hops)


def _meanwhile(moved, computed):
  """Both, when both are done.

  The compiler hides the way behind what it can do meanwhile. Without this it
  would be content with the little that comes after the kernel. So what is
  computed is best what a kernel leaves, with nothing done to it: those of TPU
  v5p and v6e would send after the kernel, and wait for that little alone.
  """
  return lax.optimization_barrier((moved, computed))


def _home(ring, goes, hops):
  """What is `hops` places on, at its own again."""
  if isinstance(hops, int):
    return ring.shift(goes, -hops) if hops else goes
  step = lambda by: lambda _, x: ring.shift(x, by)
  on, back = ring.size - hops, hops
  return lax.cond(
    on < back,
    lambda x: lax.fori_loop(0, on, step(1), x),
    lambda x: lax.fori_loop(0, back, step(-1), x),
    goes,
  )


# ------------------------------------------------------------- which hops count


def _hops(mask: Mask, query: Tokens, key: Tokens, ring: Ring, dense: bool):
  """The last hop in which any device may see anything: a number, or traced."""
  n = ring.size
  if dense:
    return last_hop(mask, n, *(x.side.order.shape[1] for x in (query, key)))
  groups = [
    [i * ring.stride + at for i in range(n)] for at in range(ring.stride)
  ]
  mine, theirs = masks.extent(query), masks.extent(key)
  gather = functools.partial(
    lax.all_gather, axis_name=ring.axis, axis_index_groups=groups
  )
  theirs = jax.tree.map(gather, theirs)  # 'n rows'
  empty, _ = masks.judge(mask, mine, theirs)
  needed = (ring.owner(0) - jnp.arange(n)) % n
  hops = jnp.max(jnp.where(empty.all(-1), 0, needed))
  # All devices go round together, whatever rows they hold.
  return lax.pmax(hops, tuple(jax.typeof(hops).manual_axis_type.varying))


def last_hop(mask: Mask, n: int, t: int, s: int) -> int:
  """The same of n devices with t queries and s keys each, in their order."""
  # A mask may ask JAX, which then has to answer now, and as outside.
  nowhere = jax.sharding.AbstractMesh((), ())
  with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(nowhere):
    empty = _empty(mask, _places(n, t), _places(n, s))
  needed = (np.arange(n)[:, None] - np.arange(n)) % n
  return int(np.max(np.where(empty, 0, needed)))


def _places(n: int, length: int) -> Extent:
  """Extents of the parts of a sequence that is whole and in order."""
  first = np.arange(n) * length
  one = np.ones(n, int)
  return Extent(Range(first, first + length - 1), one, one, one > 0)


def _empty(mask: Mask, query: Extent, key: Extent):
  """'n n': which pairs of parts surely see nothing of each other."""
  by = lambda x, axis: jax.tree.map(lambda x: np.expand_dims(x, axis), x)
  empty, _ = masks.judge(mask, by(query, 1), by(key, 0))
  return np.broadcast_to(empty, (len(query.uniform), len(key.uniform)))


# ---------------------------------------------------- extras that go with a key


def _of_keys(extras: Extras) -> tuple:
  """The numbers of each key, for each function of scores and of weights."""
  return tuple(own.keys for own in (*extras.scores, *extras.weights))


def _put_keys(extras: Extras, numbers: tuple) -> Extras:
  """Extras with other numbers of keys; the inverse of `_of_keys`."""
  put = lambda own, keys: Operands(own.heads, own.queries, keys)
  scores = len(extras.scores)
  return extras._replace(
    scores=tuple(map(put, extras.scores, numbers[:scores])),
    weights=tuple(map(put, extras.weights, numbers[scores:])),
  )


def _with_keys(extras: Extras, block: Block, owner) -> Extras:
  """Extras for the keys of a block, which are those of `owner`.

  A bias holds a device's rows, and the columns of all.
  """
  extras = _put_keys(extras, block.own)
  if extras.bias is None:
    return extras
  s = block.k.shape[1]
  columns = lax.dynamic_slice_in_dim(extras.bias, owner * s, s, 3)
  return extras._replace(bias=columns)


def _without_keys(dextras: Extras, extras: Extras, owner) -> Extras:
  """The gradient of what stays: zero at columns of the bias not seen now."""
  dextras = _put_keys(dextras, tuple(() for _ in _of_keys(dextras)))
  if extras.bias is None:
    return dextras
  more = dextras.bias
  start = (0, 0, 0, owner * more.shape[3])
  bias = jnp.zeros_like(extras.bias, more.dtype)
  return dextras._replace(bias=lax.dynamic_update_slice(bias, more, start))
