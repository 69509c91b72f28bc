"""Heads for time: each device gets all tokens of some of the heads.

Jacobs et al. 2023, "DeepSpeed Ulysses", https://arxiv.org/abs/2309.14509.

One exchange of all with all before, and one after; between them attention is
that of one device. Where key heads are fewer than devices they are repeated, as
often as each device needs to have one, and their gradients are summed; where
query heads do not divide, heads of zeros are added.

Only the devices of a group may exchange: then each holds the group's tokens of
some heads, and the groups form a ring, or gather (USP; Fang, Zhao 2024,
https://arxiv.org/abs/2405.07719).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn.parallel import between
from pallas_kernels.problem import (
  Engine,
  Extras,
  Operands,
  Over,
  accumulator,
)


@dataclasses.dataclass(frozen=True)
class Group:
  """`size` neighbours along a mesh axis, who exchange."""

  axis: str
  size: int

  @property
  def _groups(self):
    n = lax.axis_size(self.axis)
    if self.size == n:
      return None
    return [[*range(i, i + self.size)] for i in range(0, n, self.size)]

  def _exchange(self, x, split, concat):
    return lax.all_to_all(
      x, self.axis, split, concat, tiled=True, axis_index_groups=self._groups
    )

  def heads_for_time(self, x, heads: int = 2, time: int = 1):
    """Some heads of all tokens of the group."""
    return self._exchange(x, heads, time)

  def time_for_heads(self, x, heads: int = 2, time: int = 1):
    """All heads of one's own tokens again."""
    return self._exchange(x, time, heads)

  def all_of_time(self, x, time: int = 1):
    return lax.all_gather(
      x, self.axis, axis=time, tiled=True, axis_index_groups=self._groups
    )

  def my_heads(self, x):
    """One's own part of what leads with the heads."""
    count = x.shape[0] // self.size
    here = lax.axis_index(self.axis) % self.size
    return lax.dynamic_slice_in_dim(x, here * count, count)


def heads(h: int, k: int, size: int) -> tuple[int, int]:
  """How often key heads are repeated, and how many heads there are then.

  Args:
    h, k: query heads and key heads.
    size: devices that share them.

  Returns:
    repeats of each key head, and the number of query heads, at least h.
  """
  for repeat in range(1, h // k + 1):
    if h // k % repeat == 0 and k * repeat % size == 0:
      return repeat, h
  return h // k, math.ceil(h / size) * size


def over(group: Group, inner: Over | None = None):
  """Spreads an engine over the devices of a group.

  Args:
    group: who exchanges.
    inner: spreads what a device then has over the groups; None where there is
      one group alone.
  """

  def spread(engine: Engine):
    if inner is not None:
      engine = inner(engine)

    def attend(rule, q, k, v, extras, query, key):
      h = q.shape[2]
      repeat, total = heads(h, k.shape[2], group.size)

      def filled(x, axis, mode='constant'):
        fill = [(0, 0)] * x.ndim
        fill[axis] = (0, total - h)
        return jnp.pad(x, fill, mode) if total > h else x

      def of_keys(x):
        x = jnp.repeat(x, repeat, axis=2) if repeat > 1 else x
        x = filled(x, 2) if x.shape[2] == h else x
        return group.heads_for_time(x)

      def per_token(x):
        """'b t h' or 'b t 1'."""
        if x.shape[2] == 1:
          return group.all_of_time(x)
        return group.heads_for_time(filled(x, 2, 'edge'))

      def own(operands):
        # Filled up with what occurs: a score may divide by it.
        return Operands(
          tuple(group.my_heads(filled(x, 0, 'edge')) for x in operands.heads),
          tuple(map(per_token, operands.queries)),
          tuple(map(per_token, operands.keys)),
        )

      def bring(q, k, v, extras, query, key):
        bias = extras.bias
        if bias is not None and bias.shape[1] == 1:
          # Each device has the sum of some heads, which is not to be rounded.
          bias = group.all_of_time(bias, 2).astype(accumulator(bias))
        elif bias is not None:
          bias = group.heads_for_time(filled(bias, 1), 1, 2)
        scores, weights = (
          tuple(map(own, x)) for x in (extras.scores, extras.weights)
        )
        return (
          group.heads_for_time(filled(q, 2)),
          of_keys(k),
          of_keys(v),
          Extras(scores, weights, bias),
          jax.tree.map(group.all_of_time, query),
          jax.tree.map(group.all_of_time, key),
        )

      give = lambda results: tuple(
        group.time_for_heads(x)[:, :, :h] for x in results
      )
      moved = between.engine(engine, bring, give, keep=True, shared=repeat > 1)
      return moved.attend(rule, q, k, v, extras, query, key)

    return Engine(attend)

  return spread
