"""No position encoding: what a causal mask alone tells about places.

Haviv et al. 2022, https://arxiv.org/abs/2203.16634: causal models without
position encodings learn places from the mask.
"""

from jaxattn.position import Position


def reference(params, order, heads, width):
  """What the formula of a mechanism is given: nothing."""
  del params, order, heads, width
  return {}


class NonePosition(Position):
  """Leaves everything as it is."""
