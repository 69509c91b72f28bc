"""A training step, compiled for devices that are not there."""

import contextlib
import dataclasses
import logging
import math
import pathlib
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import laid
from jaxattn.analysis import traffic
from jaxattn.models import pattern
from jaxattn.parallel import mesh as meshes
from jaxattn.parallel import place, strategy, stripe
from jaxattn.parallel.place import amount
from jaxattn.tasks.batch import Batch
from jaxattn.train import build, optimizer, step
from pallas_kernels import chips

UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
# "Ran out of memory ... memory required for HLO temporaries (2.00T) exceeds
# available HBM (30.75G)", or "Used 17.20G of 15.75G hbm".
EXCEEDED = (
  r'\(([\d.]+)([KMGT]?)B?\) exceeds available \w+ \(([\d.]+)([KMGT]?)B?\)',
  r'[Uu]sed ([\d.]+)([KMGT]?)B? of ([\d.]+)([KMGT]?)B? hbm',
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is known of a step. Bytes are those of one device.

  Attributes:
    length: tokens of a row; unit: of which a row is filled up to a multiple,
      for devices to share it; batch: rows of a step.
    devices: how many; kind: which; mesh: how they are laid out.
    parameters: of the model, in all; pattern: its layers, in words.
    layout: of tokens over devices.
    strategies: what each kind of attention call chose, with its reason.
    held: 'parameters', 'optimiser', 'batch', 'temporaries', and 'program', the
      machine code, where it was waited for; empty if the compiler gave up, who
      then says roughly what is needed.
    needs: bytes in all; room: what a device has.
    sent: bytes that it sends in a step; hidden: of these, behind other work.
    advice: what to change, if it does not fit.
    seconds: until it was known.
  """

  length: int
  unit: int
  batch: int
  devices: int
  kind: str
  mesh: str
  parameters: int
  pattern: str
  layout: str
  strategies: tuple[str, ...]
  held: Mapping[str, int]
  needs: int
  room: int
  sent: int
  hidden: int
  advice: tuple[str, ...]
  seconds: float

  @property
  def fits(self) -> bool:
    return self.needs <= self.room

  @property
  def filled(self) -> int:
    """Tokens of a row with those that fill it up."""
    return -(-self.length // self.unit) * self.unit

  @property
  def verdict(self) -> str:
    """Whether it fits, and by how much."""
    of = f'{amount(self.needs)} of {amount(self.room)}'
    if self.fits:
      return f'{of}: fits, {amount(self.room - self.needs)} are left'
    return f'{of}: does not fit by {amount(self.needs - self.room)}'


class _Length:
  """A task at another length, of which no row is ever made."""

  def __init__(self, task: Any, length: int):
    self._task, self.length = task, length

  def __getattr__(self, name):
    return getattr(self._task, name)


def plan(config: Mapping[str, Any], topology: str, length: int) -> Plan:
  """Compiles the step of a configuration, as far as is needed to know.

  Args:
    config: see `jaxattn.train.build.DEFAULTS`; its `batch` may be 'devices', a
      row for each.
    topology: for which chips; see `pallas_kernels.chips.devices`.
    length: tokens of a row, in place of the task's.

  Raises:
    ValueError, NotImplementedError: what cannot work, with the reason.
    ModuleNotFoundError: there is no compiler for those chips.
    laid.Ended: it ended, and said nothing.
  """
  if topology.partition(':')[0] in chips.GPUS:  # whose compiler is quick
    return here(config, topology, length)
  return laid.apart(here, config, topology, length, name='jit_train')


def here(
  config: Mapping[str, Any],
  topology: str,
  length: int,
  dumps: pathlib.Path | None = None,
) -> Plan:
  """The same in this process, where the compiler writes to `dumps`, or not."""
  devices = chips.devices(topology)
  config = dict(config)
  if config.get('batch') == 'devices':
    config['batch'] = len(devices)
  # No row is made, so the task need not be able to make rows of this length.
  own = {k: v for k, v in config['task'].items() if k != 'length'}
  task, model = build.build({**config, 'task': own})
  config = build.complete({**config, 'task': own})
  mesh = meshes.make(**config['mesh'], devices=devices)
  with jax.set_mesh(mesh):
    feed = step.Feed.of(config, _Length(task, length), model, mesh)
    update, rate = optimizer.make(config['steps'], **config['optimizer'])
    programs = step.programs(model, feed, update, rate)
    began = time.perf_counter()
    with _Chosen() as chosen:
      lowered = programs.train.lower(programs.shapes, _batch(task, feed))
    try:
      with _unkept():
        if dumps is None:
          known = laid.whole(lowered)
        else:
          known = laid.soon(lowered, dumps, room(mesh))
    except jax.errors.JaxRuntimeError as error:
      needs, has = _exceeded(error)
      found = {'held': {}, 'needs': needs, 'room': has, 'sent': 0, 'hidden': 0}
    else:
      found = _found(known, programs.shapes, mesh, chosen.rounds)
  counts = [f'{n} x {" ".join(unit)}' for unit, n in _groups(model)]
  sizes = ', '.join(f'{k}={n}' for k, n in mesh.shape.items())
  weights = jax.tree.leaves(programs.shapes.params)
  made = Plan(
    length=length,
    unit=stripe.filled(1, mesh.shape[meshes.SEQ], feed.layout),
    batch=config['batch'],
    devices=len(devices),
    kind=devices[0].device_kind,
    mesh=sizes,
    parameters=sum(w.size for w in weights),
    pattern=', '.join(counts),
    layout=feed.layout,
    strategies=tuple(map(str, chosen.strategies)),
    advice=(),
    seconds=time.perf_counter() - began,
    **found,
  )
  if made.fits:
    return made
  return dataclasses.replace(
    made, advice=_advice(config, made, programs.shapes, mesh)
  )


def _groups(model):
  return pattern.groups(model.layers())


@contextlib.contextmanager
def _unkept():
  """No cache keeps what is compiled: it could not read it without the chips."""
  name = 'jax_persistent_cache_min_compile_time_secs'
  before = getattr(jax.config, name)
  jax.config.update(name, math.inf)
  try:
    yield
  finally:
    jax.config.update(name, before)


class _Chosen(logging.Handler):
  """Keeps what the chooser of strategies says."""

  def __init__(self):
    super().__init__(logging.INFO)
    self.strategies: dict[strategy.Strategy, None] = {}  # in their order

  def emit(self, record):
    *_, chosen = record.args
    self.strategies[chosen] = None

  @property
  def rounds(self) -> int:
    """How often a loop goes round at most whose length data decide."""
    # Of a hybrid's hops the first and the last are exchanges of heads.
    others = {'ring': 0, 'hybrid': 2}
    hops = [
      x.hops - others[x.name] for x in self.strategies if x.name in others
    ]
    return max(hops, default=1)

  def __enter__(self):
    strategy.say.cache_clear()  # each choice is said once
    self.before = strategy.log.level, strategy.log.propagate
    strategy.log.setLevel(logging.INFO)
    strategy.log.propagate = False
    strategy.log.addHandler(self)
    return self

  def __exit__(self, *_):
    strategy.log.removeHandler(self)
    strategy.log.level, strategy.log.propagate = self.before


def _batch(task, feed: step.Feed) -> Batch:
  """The shapes of a batch, as the feed would lay it."""
  row = task.batch('train', 0, np.arange(1))
  packing = jax.eval_shape(lambda: feed.packing(row, feed.layout))
  row = dataclasses.replace(row, packing=packing)
  spec = jax.P(None, *place.tokens(feed.rows, feed.length, feed.mesh))
  sharding = jax.NamedSharding(feed.mesh, spec)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (feed.accumulate, feed.rows, feed.length, *x.shape[2:]),
      jax.dtypes.canonicalize_dtype(x.dtype),
      sharding=sharding,
    ),
    row,
  )


def _share(tree) -> int:
  """Bytes of shapes with shardings that one device holds."""
  size = lambda x: np.prod(x.sharding.shard_shape(x.shape), dtype=int)
  return sum(
    int(size(x)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
    if x.sharding is not None
  )


def _found(
  known: laid.Laid, shapes: step.TrainState, mesh, rounds
) -> dict[str, Any]:
  held = {
    'parameters': _share((shapes.params, shapes.stats)),
    'optimiser': _share(shapes.opt_state),
  }
  held['batch'] = max(known.arguments - sum(held.values()), 0)
  if known.code is not None:
    held['program'] = known.code
  held['temporaries'] = known.temporaries
  exchanges = traffic.exchanges(known.text, unknown=rounds)
  return {
    'held': held,
    'needs': sum(held.values()),
    'room': room(mesh),
    'sent': traffic.total(exchanges),
    'hidden': traffic.total(exchanges, hidden=True),
  }


# Of each kind of device. A compiler for GPUs lets any program pass: it is what
# JAX takes of their memory unless told otherwise, three quarters.
ROOM = {'NVIDIA H200': 150_754_820_096 * 3 // 4}


def room(mesh) -> int:
  """Bytes that a program may use, which its compiler says if asked for more."""
  kind = mesh.devices.flat[0].device_kind
  if kind not in ROOM:
    sharding = jax.NamedSharding(mesh, jax.P())
    much = jax.ShapeDtypeStruct((2**42,), jnp.int8, sharding=sharding)
    try:
      jax.jit(lambda x: x + 1).lower(much).compile()
    except jax.errors.JaxRuntimeError as error:
      _, ROOM[kind] = _exceeded(error)
    else:
      raise ValueError(f'it is not known how much memory {kind} has')
  return ROOM[kind]


def _exceeded(error: Exception) -> tuple[int, int]:
  """Bytes needed, and bytes there are; anything else is raised again."""
  for pattern_ in EXCEEDED:
    if found := re.search(pattern_, str(error)):
      used, unit, room, of = found.groups()
      return int(float(used) * UNITS[unit]), int(float(room) * UNITS[of])
  raise error


def _advice(config, made: Plan, shapes, mesh) -> tuple[str, ...]:
  """What would need less, most effective first."""
  found = []
  model, policy = config['model'], config['policy']
  state = _share((shapes.params, shapes.opt_state))
  if not model.get('remat'):
    found.append(
      '--config.model.remat=True: layers are computed again backward'
    )
  if model['name'] == 'lm' and not model.get('block'):
    found.append(
      '--config.model.block=2048: feed-forward and loss of so many tokens at a'
      ' time'
    )
  if mesh.shape[meshes.SEQ] == 1 and made.devices > 1:
    found.append(f'{_spread(config, mesh)}: a row is spread over the devices')
  if any(text.startswith('gather') for text in made.strategies):
    found.append('--config.policy.strategy=ring: holds keys of one device more')
  if made.batch > config['accumulate'] * mesh.shape[meshes.DATA]:
    rows = made.batch // mesh.shape[meshes.DATA]
    found.append(
      f'--config.accumulate={rows}: one row after another, the same step'
    )
  if policy['dtype'] == 'float32':
    found.append(
      "--config.policy.dtype=bfloat16: half of the activations' bytes"
    )
  even = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
  even //= made.devices
  if state > 2 * even + 2**26:
    found.append(
      f'--config.model.width and hidden: multiples of {made.devices}, so that'
      f' weights divide among the devices; {amount(even)} of each would do'
    )
  if state > made.room // 2:
    found.append(
      f'more devices: parameters and optimiser alone take {amount(state)} of'
      ' each'
    )
  if state < made.room < made.needs:
    share = (made.room - state) / (made.needs - state)
    fits = int(made.length * share * 0.95)
    if fits >= made.devices:
      fits = fits // made.devices * made.devices
      found.append(f'--length={fits}: about what would fit (see --longest)')
  return tuple(found)


def _spread(config, mesh) -> str:
  """Flags of a mesh whose devices share rows, as far as heads leave any."""
  alone = mesh.shape[meshes.DATA] == 1
  sizes = {
    meshes.DATA: 1,
    meshes.SEQ: -1,  # one axis alone may take the rest
    meshes.MODEL: 1 if alone else mesh.shape[meshes.MODEL],
  }
  flags = (
    f'--config.mesh.{axis}={size}'
    for axis, size in sizes.items()
    if size != config['mesh'][axis]
  )
  return ' '.join(flags)
