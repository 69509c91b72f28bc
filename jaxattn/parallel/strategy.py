"""The only chooser: how devices that share the time axis work together.

For a call of attention a rule picks one of STRATEGIES, and says why, and what
it costs: what the program then does. All that devices exchange for a mechanism
is said here to the log, once.
"""

import dataclasses
import functools
import logging
import math

from jaxattn.parallel import gather, halo, place, ring, tree, ulysses
from jaxattn.parallel import mesh as meshes
from pallas_kernels.masks import Everything, Mask
from pallas_kernels.problem import Over

log = logging.getLogger(__name__)
EVERYTHING = Everything()

NO_ROUND = (
  'a ring wants an engine with a backward pass of its own, for JAX would keep'
  " the keys of every hop: take implementation='xla'"
)
# Bytes of keys and values of other devices that one device may hold: then one
# gather is no dearer than a ring, and waits once.
ROOM = 2**30


@dataclasses.dataclass(frozen=True)
class Call:
  """What the choice depends on.

  Attributes:
    devices: over which time is spread.
    b, t, h, d, s, k, e: sizes on one of them, by the usual letters.
    itemsize: bytes of a number.
    mask: who sees whom.
    dense: tokens stand in their order over the devices.
    tagged: they have tags, which the mask may read.
    backward: the engine has a backward pass of its own, without which it cannot
      go round a ring.
  """

  devices: int
  b: int
  t: int
  h: int
  d: int
  s: int
  k: int
  e: int
  itemsize: int
  mask: Mask = EVERYTHING
  dense: bool = False
  tagged: bool = False
  backward: bool = True

  @property
  def token(self) -> int:
    """Bytes of the keys and values that one device has at a time."""
    return self.b * self.k * (self.d + self.e) * self.itemsize

  @property
  def known(self) -> bool:
    """Whether no data decide who sees whom."""
    return self.dense and not self.tagged

  def hops(self, size: int = 1) -> int:
    """Of a ring of groups of so many devices, at most."""
    n = self.devices // size
    if not self.known:
      return n - 1
    return ring.last_hop(self.mask, n, self.t * size, self.s * size)


@dataclasses.dataclass(frozen=True)
class Strategy:
  """How devices work together, and what it costs each of them.

  Attributes:
    name: one of STRATEGIES; or another, of what is no attention.
    reason: why it was taken.
    hops: exchanges that wait for each other, forward.
    sent: bytes that a device sends, forward.
    held: bytes that it holds of what others have.
    over: the strategy itself, for an engine's `over`, if it has one.
  """

  name: str
  reason: str
  hops: int
  sent: int
  held: int
  over: Over | None = dataclasses.field(default=None, repr=False, compare=False)

  def __str__(self):
    hops = f', hops: {self.hops}'
    if self.hops > 1:
      hops += f', on average {place.amount(self.sent // self.hops)}'
    return (
      f'{self.name} ({self.reason}): each device sends'
      f' {place.amount(self.sent)} forward{hops}; it holds'
      f' {place.amount(self.held)} of others'
    )


def _halo(call: Call) -> tuple:
  before, after = call.mask.reach()
  if not call.dense:
    return ('tokens may stand in any order',)
  if call.t != call.s:
    # What is near in order then need not be a neighbour's.
    return ('queries and keys differ in length',)
  if max(before, after) > call.s:
    return ('a query may see keys beyond the neighbours',)
  before, after = (int(min(x, call.s)) for x in (before, after))
  size = (before + after) * call.token
  over = halo.over(meshes.SEQ, before, after)
  return None, int(size > 0), size, size, over


def _ulysses(call: Call, size: int | None = None, inner=None) -> tuple:
  size = size or call.devices
  repeat, heads = ulysses.heads(call.h, call.k, size)
  keys = heads if repeat * call.k % size else repeat * call.k
  width = call.b * (call.d + call.e) * call.itemsize
  sent = (call.t * heads + call.s * keys) * width * (size - 1) // size
  more = call.s * (keys - call.k) + 2 * call.t * (heads - call.h)
  over = ulysses.over(ulysses.Group(meshes.SEQ, size), inner)
  return None, 2, sent, more * width, over


def _gather(call: Call) -> tuple:
  size = (call.devices - 1) * call.s * call.token
  stride = math.ceil(size / ROOM)
  groups = next(
    n
    for n in range(1, call.k + 1)
    if call.k % n == 0 and (n >= stride or n == call.k)
  )
  return None, groups, size, size // groups, gather.over(meshes.SEQ, groups)


def _ring(call: Call) -> tuple:
  if not call.backward:
    return (NO_ROUND,)
  hops = call.hops()
  size = call.s * call.token
  over = ring.over(ring.Ring(meshes.SEQ), call.known)
  return None, hops, hops * size, min(hops, 2) * size, over


def _hybrid(call: Call) -> tuple:
  if not call.backward:
    return (NO_ROUND,)
  size = group_size(call)
  if size == 1:
    both = f'{call.k} key heads and {call.devices} devices'
    return (
      f'{both} have no common divisor above 1 and below {call.devices}: a group'
      ' shares the key heads, and several groups form the ring',
    )
  hops = call.hops(size)
  inner = ring.over(ring.Ring(meshes.SEQ, size), call.known)
  _, two, sent, held, over = _ulysses(call, size, inner)
  block = call.s * call.token
  held += min(hops, 2) * block
  return None, two + hops, sent + hops * block, held, over


def group_size(call: Call) -> int:
  """The most devices, but not all, that can share the key heads evenly."""
  sizes = range(1, call.devices)
  return max(n for n in sizes if call.devices % n == 0 and call.k % n == 0)


# Each answers why it cannot serve a call; or None, hops, bytes sent and held,
# and how it is done.
STRATEGIES = {
  'halo': _halo,
  'ulysses': _ulysses,
  'gather': _gather,
  'hybrid': _hybrid,
  'ring': _ring,
}
# Those that reach every key; a halo is for windows.
FAR = ('ulysses', 'gather', 'hybrid', 'ring')


def _ends_early(call: Call) -> bool:
  """Whether a ring sends less than all others that reach every key."""
  # Most calls go all the way round, where a ring sends as much as a gather.
  if not call.backward or call.hops() == call.devices - 1:
    return False
  costs = {name: STRATEGIES[name](call) for name in FAR}
  sent = {name: cost[2] for name, cost in costs.items() if not cost[0]}
  return sent.pop('ring') < min(sent.values())


# The first that holds is taken.
RULES = (
  (
    'halo',
    'no query sees beyond the neighbours',
    lambda call: _halo(call)[0] is None,
  ),
  # Before Ulysses, for the queries and results that it sends may be more than
  # some hops of few key heads; and before a gather, which brings unseen keys.
  ('ring', 'a window reaches few devices: a ring ends after them', _ends_early),
  (
    'ulysses',
    'the key heads divide among the devices: fewest bytes, even work',
    lambda call: call.k % call.devices == 0,
  ),
  (
    'gather',
    f'all keys and values fit into {ROOM >> 30} GiB',
    lambda call: (call.devices - 1) * call.s * call.token <= ROOM,
  ),
  (
    'hybrid',
    'groups of devices share the key heads, and form a ring',
    lambda call: call.backward and group_size(call) > 1,
  ),
  ('ring', 'keys are many and key heads are few', lambda call: call.backward),
  (
    'gather',
    'keys are many, and the engine cannot go round: some heads at a time',
    lambda call: True,
  ),
)


def choose(call: Call, forced: str | None = None) -> Strategy:
  """The strategy for a call, with its reason, which is logged.

  Raises:
    ValueError: no strategy has the name that is asked for.
    NotImplementedError: it cannot serve the call.
  """
  chosen = _chosen(call, forced)
  say('attention', call.devices, chosen)
  return chosen


@functools.cache
def _chosen(call: Call, forced: str | None) -> Strategy:
  if forced is None:
    name, reason = next(rule[:2] for rule in RULES if rule[2](call))
  elif forced in STRATEGIES:
    name, reason = forced, 'asked for'
  else:
    raise ValueError(
      f'there is no strategy {forced!r}, only {", ".join(STRATEGIES)}'
    )
  refusal, *costs = STRATEGIES[name](call)
  if refusal:
    others = [other for other in STRATEGIES if not STRATEGIES[other](call)[0]]
    raise NotImplementedError(
      f'strategy={name!r} cannot serve this: {refusal}; {", ".join(others)} can'
    )
  return Strategy(name, reason, *costs)


def remember(call: Call) -> Strategy:
  """How devices that each hold a part of a memory attend; it is logged.

  Of the call t is a chunk's, and s are the slots of one device.
  """
  size = call.b * tree.sent(call.devices, call.t, call.h, call.e, call.itemsize)
  reason = f'parts of {place.amount(call.s * call.token)} stay'
  strategy = Strategy('tree', reason, 2, size, 0, tree.over(meshes.SEQ))
  say('attention', call.devices, strategy)
  return strategy


@functools.cache  # and so logged once, for all calls that cost the same
def say(what: str, devices: int, strategy: Strategy) -> None:
  """Says to the log how something runs."""
  log.info('%s over %d devices runs as %s', what, devices, strategy)
