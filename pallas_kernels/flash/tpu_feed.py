"""How operands reach a TPU kernel that goes over the tiles of a row by itself.

The grid has a step for each row of tiles, and the kernel loops over the tiles
of a row. What is the same for a whole row comes as a block of the grid. What
each tile has of its own comes by copies that are started one tile ahead, into a
ring of buffers, in which stages that lag behind find it still.

With a step of the grid for each tile there would be less to write. But the
grid asks of each operand at each step whether its block is another, which takes
time; it would copy once more what is read by two stages; and it would have
steps for tiles that a row does not have.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass(frozen=True)
class Block:
  """Which part of an array a tile reads.

  Attributes:
    shape: of the part, as of a `BlockSpec`: None is one, of an axis that goes.
    index: which one, of (b, h, i, j): row, head, block of queries and of keys.
    flows: whether each tile of a row has its own.
    lag: how many tiles later it is read for the last time, at most 2.
  """

  shape: tuple[int | None, ...]
  index: Callable
  flows: bool = False
  lag: int = 0

  @property
  def slots(self):
    """A power of 2: one for the tile that comes, and those that are read."""
    return 4 if self.lag else 2

  def spec(self, place: Callable) -> pl.BlockSpec:
    """place(*grid) -> (b, h, i, j)."""
    if self.flows:
      return pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.BlockSpec(self.shape, lambda *grid: self.index(*place(*grid)))

  def ring(self, dtype) -> tuple:
    """The buffers of what flows, and what tells that they are full."""
    shape = [size for size in self.shape if size is not None]
    buffers = pltpu.VMEM((self.slots, *shape), dtype)
    return buffers, pltpu.SemaphoreType.DMA((self.slots,))

  def within(self, ref, where):
    """The part of the whole array."""

    def part(at, size):
      if size is None:
        return at
      start = at * size
      return pl.ds(
        start if type(at) is int else pl.multiple_of(start, size), size
      )

    return ref.at[tuple(map(part, self.index(*where), self.shape))]


def far(x):
  """x, held in HBM: from VMEM, where XLA may put it, copies are slow."""
  return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def laid(blocks, arrays):
  """The arrays, of which those that flow stay in HBM."""
  return jax.tree.map(
    lambda block, x: far(x) if block.flows else x, blocks, arrays
  )


def rings(blocks, arrays) -> list[tuple]:
  """Scratch of the operands that flow."""
  blocks, arrays = jax.tree.leaves(blocks), jax.tree.leaves(arrays)
  return [
    block.ring(x.dtype) for block, x in zip(blocks, arrays) if block.flows
  ]


@dataclasses.dataclass(frozen=True)
class Feed:
  """The operands of one row of tiles.

  Attributes:
    blocks: a tree of `Block`.
    refs: the same tree: of what flows whole arrays, of the rest the blocks.
    rings: see `rings`.
    begin: where in the rings the row begins.
  """

  blocks: Any
  refs: Any
  rings: Sequence[tuple]
  begin: Any

  def start(self, n, where):
    """Copies what tile n of the row reads, which is at (b, h, i, j)."""
    for copy in self._copies(n, where):
      copy.start()

  def wait(self, n):
    """Until it is there."""
    anywhere = (jnp.int32(0),) * 4  # of what is awaited the size matters alone
    for copy in self._copies(n, anywhere):
      copy.wait()

  def at(self, n):
    """What tile n reads: the tree, of blocks."""
    rings = iter(self.rings)
    leaves, tree = jax.tree.flatten(self.refs)
    blocks = jax.tree.leaves(self.blocks)
    near = [
      next(rings)[0].at[self._slot(block, n)] if block.flows else ref
      for block, ref in zip(blocks, leaves)
    ]
    return tree.unflatten(near)

  def _slot(self, block, n):
    return (self.begin + n) & (block.slots - 1)

  def _copies(self, n, where):
    flowing = [
      (block, ref)
      for block, ref in zip(
        jax.tree.leaves(self.blocks), jax.tree.leaves(self.refs)
      )
      if block.flows
    ]
    for (block, ref), (near, full) in zip(flowing, self.rings):
      slot = self._slot(block, n)
      yield pltpu.make_async_copy(
        block.within(ref, where), near.at[slot], full.at[slot]
      )
