"""Attention over eight devices is that over one, by every strategy.

The oracle is the formula with a dense matrix of who sees whom, in float64. Time
over devices may err twice as much as the formula does in float32 (the error
rule), and a tenth more than one device does.

A process chooses once how many devices it simulates: this file, as a program,
prints what it found.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from jaxattn import registry
from jaxattn.core import sigmoid
from jaxattn.mixer import Context
from jaxattn.parallel import (
  between,
  gather,
  halo,
  place,
  prefix,
  ring,
  sequence,
  strategy,
  stripe,
  tensor,
  ulysses,
)
from jaxattn.parallel import mesh as meshes
from jaxattn.train import build, optimizer, step
from pallas_kernels import flash
from pallas_kernels.blocks import Blocks
from pallas_kernels.dropout import Dropout
from pallas_kernels.masks import (
  BlockCausal,
  Causal,
  Everything,
  Mask,
  Prefix,
  Sinks,
  Window,
)
from pallas_kernels.scores import Difference, Relative, Score, Slopes
from tests import devices
from tests.test_flash_features import Temperature
from tests.test_flash_tpu import WEIGHTS, draw, error, formula, number, seen

N, T = 8, 96
EPS = float(jnp.finfo(jnp.float32).eps)
AT = 'seq'
AUTO = (jax.sharding.AxisType.Auto,)


def packed():
  """Documents that end inside of parts, at their ends, and after several."""
  segments = np.stack(
    [
      np.repeat([1, 2, 3, 0], [30, 18, 40, 8]),
      np.repeat([0, 4, 5, 0, 5], [12, 24, 20, 24, 16]),
    ]
  )
  order = np.zeros_like(segments)
  for row, own in zip(order, segments):
    for segment in np.unique(own):
      row[own == segment] = np.arange((own == segment).sum())
  return {
    f'{side}_{what}': x
    for side in ('query', 'key')
    for what, x in (('order', order), ('segments', segments))
  }


def laid(layout):
  order = stripe.order(T, N, layout)
  return {'query_order': order, 'key_order': order}


def loud():
  """Scores of one head are all far above 0, of the other all far below."""
  q, k, *rest = draw(2, T, T, 2, 1, 64, 32, seed=3)
  q = 21 * np.abs(q) * np.array([1, -1])[:, None]
  return q, np.abs(k), *rest


@dataclasses.dataclass(frozen=True)
class Alternate(Mask):
  """One of a user's own, of which no tile is known to be empty, or full."""

  def __call__(self, query, key):
    return (query.order - key.order) % 3 != 1


@dataclasses.dataclass(frozen=True)
class Gain:
  """A factor of the numerator alone, for each query and each key."""

  def __call__(self, p, query, key, a, b):
    return p * a * b


PLAIN = draw(2, T, T, 4, 2, 16, 24)
LATE = {'query_order': np.arange(T) + 64}  # queries after 64 keys of 160
DENSE = {'query_order': np.arange(T), 'key_order': np.arange(T)}
# arrays, what `flash.attention` takes, and numbers for a score, bias or sinks.
CASES = {
  'causal': (PLAIN, {'mask': Causal(), **DENSE}, {}),
  'window': (PLAIN, {'mask': Causal() & Window(9), **DENSE}, {}),
  'far window': (PLAIN, {'mask': Causal() & Window(30), **DENSE}, {}),
  'both ways': (draw(1, T, T, 3, 3), {'mask': Window(9, 4), **DENSE}, {}),
  'first keys': (
    PLAIN,
    {'mask': Causal() & (Window(9) | Sinks(2)), **DENSE},
    {},
  ),
  'packed': (PLAIN, {'mask': Causal(), **packed()}, {}),
  'packed window': (PLAIN, {'mask': Causal() & Window(9), **packed()}, {}),
  'striped': (PLAIN, {'mask': Causal(), **laid('striped')}, {}),
  'zigzag': (PLAIN, {'mask': Causal() & Window(30), **laid('zigzag')}, {}),
  'loud': (loud(), {'mask': Everything(), **DENSE}, {}),
  'other keys': (
    draw(2, T, 160, 4, 1),
    {'mask': Causal(), **LATE, 'key_order': np.arange(160) * 2},
    {},
  ),
  'slopes': (
    draw(2, T, T, 3, 3),
    {'mask': Causal(), 'softcap': 2.0, 'score': Slopes(), **DENSE},
    {'heads': (number(3),)},
  ),
  'table': (
    PLAIN,
    {'mask': Causal(), 'score': Relative(4), **DENSE},
    {'heads': (number(4, 33),)},
  ),
  'forget': (
    draw(2, T, T, 4, 1),
    {'mask': Causal(), 'score': Difference(), **DENSE},
    {'queries': (number(2, T, 4),), 'keys': (number(1, T, 1),)},
  ),
  'bias': (
    PLAIN,
    {'mask': Causal() & Window(9), **DENSE},
    {'bias': number(1, 4, T, T)},
  ),
  'bias of all heads': (
    PLAIN,
    {'mask': Causal(), **laid('striped')},
    {'bias': number(2, 1, T, T)},
  ),
  'sinks': (PLAIN, {'mask': Causal(), **packed()}, {'sinks': number(4)}),
  'blocks': (PLAIN, {'mask': BlockCausal(7), **DENSE}, {}),
  'not': (PLAIN, {'mask': Causal() & ~Window(5), **DENSE}, {}),
  'own mask': (PLAIN, {'mask': Causal() & Alternate(), **packed()}, {}),
  'prefix': (
    PLAIN,
    {
      'mask': Causal() | Prefix(),
      'key_tags': {'prefix': (np.arange(2 * T) % T < 17).reshape(2, T)},
      **packed(),
    },
    {},
  ),
  'factor': (
    draw(2, T, T, 3, 3),
    {'mask': Causal(), 'factor': Gain(), **DENSE},
    {'queries': (number(2, T, 3),), 'keys': (number(1, T, 1),)},
  ),
  'temperature': (
    draw(1, T, T, 3, 3),
    {'mask': Window(9, 4), 'score': Temperature(), **DENSE},
    {'queries': (0.5 + number(1, T, 3),), 'keys': (0.5 + number(1, T, 1),)},
  ),
}
# Of which rounded numbers are tried, too.
ROUNDED = (
  *('causal', 'window', 'packed', 'other keys', 'table', 'forget'),
  *('bias of all heads', 'sinks'),
)
BF16 = jnp.bfloat16
RING = ring.Ring(AT)
PAIRS = ulysses.Group(AT, 2)
STRATEGIES = {
  'ring': ring.over(RING),
  'gather': gather.over(AT),
  'ulysses': ulysses.over(ulysses.Group(AT, N)),
  'hybrid': ulysses.over(PAIRS, ring.over(ring.Ring(AT, 2))),
}
# Those that are for some calls only.
MORE = {
  ('causal', 'dense ring'): ring.over(RING, True),
  ('far window', 'dense ring'): ring.over(RING, True),
  ('causal', 'dense hybrid'): ulysses.over(
    PAIRS, ring.over(ring.Ring(AT, 2), True)
  ),
  ('table', 'gather in groups'): gather.over(AT, 2),
  ('bias', 'gather in groups'): gather.over(AT, 2),
  ('bias of all heads', 'gather in groups'): gather.over(AT, 2),
  ('window', 'halo'): halo.over(AT, 8, 0),
  ('both ways', 'halo'): halo.over(AT, 8, 3),
  ('bias', 'halo'): halo.over(AT, 8, 0),
  ('temperature', 'halo'): halo.over(AT, 8, 3),
}


def attend(q, k, v, numbers, over=None, softcap=None, score=None, **given):
  """o and lse through `flash.attention`, on one device or inside of many."""
  numbers = dict(numbers)
  bias, sinks = numbers.pop('bias', None), numbers.pop('sinks', None)
  if score is not None:
    names = {'heads': 'operands'}
    numbers = {names.get(name, name): x for name, x in numbers.items()}
    score = Score(score, **numbers)
  if 'factor' in given:
    given['factor'] = Score(given['factor'], **numbers)
  partial = flash.attention(
    *(q, k, v),
    softcap=softcap,
    score=score,
    bias=bias,
    sinks=sinks,
    over=over,
    return_partial=True,
    **given,
  )
  return flash.finish(partial)


def with_sinks(q, k, v, numbers, **given):
  """The formula, and one more key."""
  if isinstance(given.get('score'), Temperature):  # of the scores q k
    (a,), (b,) = numbers['queries'], numbers['keys']
    q, k = q / a[..., None], k / b[..., None]
  sinks, gain = numbers.get('sinks'), 1
  if 'factor' in given:
    (gain,), (b,) = numbers['queries'], numbers['keys']
    gain, v = gain[..., None], v * b[..., None]
  o, lse = formula(q, k, v, numbers, **given)
  o = o * gain
  if sinks is None:
    return o, lse
  both = jnp.logaddexp(lse, sinks)
  return o * jnp.exp(lse - both)[..., None], both


ROWS = {  # where arrays of a call lie, and by the name of numbers
  'time': jax.P(None, AT),
  'bias': jax.P(None, None, AT),
  'heads': jax.P(),
  'sinks': jax.P(),
}


def spread(over):
  """`attend` inside a shard_map, with the places of tokens as arguments."""

  def run(q, k, v, numbers, **given):
    where = ROWS['time']
    places = {
      name: jax.tree.map(jnp.atleast_2d, given.pop(name))
      for name in list(given)
      if name.endswith(('order', 'segments', 'tags'))
    }
    specs = {name: ROWS.get(name, where) for name in numbers}
    inner = lambda q, k, v, numbers, places: attend(
      q, k, v, numbers, over, **given, **places
    )
    return jax.shard_map(
      inner,
      in_specs=(where, where, where, specs, where),
      out_specs=(where, where),
    )(q, k, v, numbers, places)

  return run


def whole(f):
  """Compiled; what it returns is whole on each device, and in each process."""
  mesh = meshes.current()
  return jax.jit(f, out_shardings=None if mesh is None else jax.P())


def results(attend, arrays, given, numbers, *weights, dtype=None):
  """o, lse, and gradients of a weighed sum of both; for each weight.

  The inputs are of `dtype`, or what those were, in wider numbers.
  """

  def loss(q, k, v, numbers, weight):
    w, u = (jnp.asarray(x, wide) for x in arrays[3:])
    o, lse = attend(q, k, v, numbers, **given)
    total = jnp.sum(o * w) + jnp.sum(jnp.where(lse > -jnp.inf, lse * u, 0))
    return weight * total, (o.astype(q.dtype), lse)

  run = whole(jax.grad(loss, (0, 1, 2, 3), has_aux=True))
  wide = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
  given_in = dtype or wide
  kept_in = wide if wide == jnp.float64 else given_in
  cast = lambda x: np.asarray(x, given_in).astype(kept_in)
  inputs = jax.tree.map(cast, (tuple(arrays[:3]), numbers))
  for weight in weights:
    (q, k, v, rest), (o, lse) = run(*inputs[0], inputs[1], weight)
    found = {'o': o, 'lse': lse, 'dq': q, 'dk': k, 'dv': v, 'rest': rest}
    yield {
      jax.tree_util.keystr(path): np.asarray(x, np.float64)
      / (1 if path[0].key in ('o', 'lse') else weight)
      for path, x in jax.tree_util.tree_leaves_with_path(found)
    }


def spreads(x, exact):
  """RMS error, relative to the RMS of the exact result."""
  finite = np.isfinite(exact)
  x, exact = x[finite], exact[finite]
  rms = lambda x: np.sqrt(np.mean(np.square(x)))
  return rms(x - exact) / (rms(exact) or 1)


def errors(attend, case, exact, dtype, weights=WEIGHTS):
  """The largest error, and the RMS error, of some weights."""
  draws = list(results(attend, *CASES[case], *weights, dtype=dtype))
  most = {at: max(error(x[at], exact[at]) for x in draws) for at in exact}
  square = lambda at: [spreads(x[at], exact[at]) ** 2 for x in draws]
  return most, {at: np.sqrt(np.mean(square(at))) for at in exact}


@functools.cache
def expected(case, dtype=None):
  """Exact results; and errors on one device, by the formula and in tiles."""
  with jax.enable_x64(True):
    (exact,) = results(with_sinks, *CASES[case], 1.0, dtype=dtype)
  naive, _ = errors(with_sinks, case, exact, dtype)
  return exact, naive, errors(attend, case, exact, dtype)


@functools.cache
def in_tiles(case, queries, keys, dtype):
  """Errors on one device, in tiles of so many."""
  exact, *_ = expected(case, dtype)
  in_blocks = functools.partial(attend, blocks=Blocks(queries, keys))
  return errors(in_blocks, case, exact, dtype)


def compare(case, overs, dtype=None, weights=WEIGHTS, growth=1.1):
  """Strategy -> where it errs too much.

  By the error rule in float32; and by growth, in any dtype. One device may
  compute in tiles as it likes, or in as many as there are parts (a hybrid has
  parts of twice the size) or, as where keys are gathered, of all keys: of them
  the worst counts.
  """
  exact, naive, alone = expected(case, dtype)
  t, s = T // N, CASES[case][0][1].shape[1]
  worst = lambda draws: {at: max(x[at] for x in draws) for at in exact}
  # A slope a head: each is a sum over all pairs, whose terms cancel, and of so
  # few numbers the error is luck.
  few = [at for at, x in exact.items() if x.size < 8]
  found = {}
  for name, over in overs.items():
    many, even = errors(spread(over), case, exact, dtype, weights)
    known = [alone]
    tiles = [(t, s // N), (2 * t, 2 * s // N)] + [(t, s)] * ('gather' in name)
    while True:
      one, steady = map(worst, zip(*known))
      found[name] = [
        f'{at}: {x:.1e} ({even[at]:.1e}), naively {naive[at]:.1e}, on one'
        f' device {one[at]:.1e} ({steady[at]:.1e})'
        for at, x in many.items()
        if not (
          x <= (4 if at in few else 2) * max(naive[at], one[at]) + EPS
          and even[at] <= growth * steady[at] + EPS / (1 if at in few else 8)
        )
      ]
      if not (found[name] and tiles):
        break
      known.append(in_tiles(case, *tiles.pop(0), dtype))
  return found


# ---------------------------------------------------------------------- mutants


@contextlib.contextmanager
def patched(where, name, mutant):
  right = getattr(where, name)
  setattr(where, name, mutant)
  try:
    yield
  finally:
    setattr(where, name, right)


HOPS, FOLD, EXTEND = ring._hops, ring._fold, halo.extend
MUTANTS = {
  'gradients of keys stay abroad': (
    *('causal', 'ring', ring, '_home'),
    lambda ring, goes, hops: goes,
  ),
  'one hop too few': (
    *('causal', 'dense ring', ring, '_hops'),
    lambda *args: HOPS(*args) - 1,
  ),
  'a bias of the wrong columns': (
    *('bias', 'ring', ring.Ring, 'owner'),
    lambda self, hop: 0 * hop,
  ),
  'partials not rescaled': (
    *('causal', 'ring', ring, '_fold'),
    lambda ring, visit, merge, *rest: FOLD(
      ring, visit, lambda x, y: merge(x, y)._replace(l=x.l + y.l), *rest
    ),
  ),
  'heads of a neighbour': (
    *('slopes', 'ulysses', ulysses.Group, 'my_heads'),
    lambda self, x: jnp.roll(x, 1, 0)[: x.shape[0] // self.size],
  ),
  'a halo one token short': (
    *('window', 'halo', halo, 'extend'),
    lambda x, axis, before, after=0: EXTEND(x, axis, before - 1, after)[
      :, : x.shape[1] + before - 1
    ],
  ),
}

# Of rounded numbers, gradients that are rounded before they are added up.
NARROW = {
  'by a gather': ('causal', 'gather', *(between, '_wide'), lambda x, _: x),
  'by heads': ('other keys', 'ulysses', *(between, '_wide'), lambda x, _: x),
  'by groups of heads': (
    *('bias of all heads', 'gather in groups', tensor, 'wide'),
    lambda extras: extras,
  ),
}


def overs(case):
  return STRATEGIES | {name: x for (of, name), x in MORE.items() if of == case}


def rejected(mutant, **how):
  """What is found wrong with it."""
  case, name, where, what, wrong = (MUTANTS | NARROW)[mutant]
  dtype = BF16 if mutant in NARROW else None
  with patched(where, what, wrong):
    try:
      return compare(case, {name: overs(case)[name]}, dtype, **how)[name]
    except AssertionError:
      return 'not finite where it should be'


# ------------------------------------------------------------------- properties

READS_NAN = pltpu.InterpretParams(
  uninitialized_memory='nan', out_of_bounds_reads='raise'
)


def with_gradients(attend, q, k, v, w):
  """o and the gradients of q, k and v, in one row of numbers."""
  loss = lambda *x: (lambda o: (jnp.sum(o * w), o))(attend(*x))
  found = whole(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)])


def dropped(strategies=tuple(sequence.STRATEGIES)):
  """How far dropout over many devices is from that on one, by strategy."""
  arrays = [np.float32(x) for x in PLAIN[:4]]
  mesh = jax.make_mesh(
    (2, 4), ('data', AT), axis_types=AUTO * 2, devices=jax.devices()[:N]
  )
  found = {}
  for name in strategies:
    mask = Causal() & Window(9) if name == 'halo' else Causal()
    given = {'mask': mask, 'dropout': Dropout(0.5, 7)}
    one = with_gradients(functools.partial(flash.attention, **given), *arrays)
    inner = functools.partial(sequence.attention, strategy=name, **given)
    where = jax.P('data', AT)
    with jax.set_mesh(mesh):
      many = jax.shard_map(inner, in_specs=where, out_specs=where)
      found[name] = float(abs(with_gradients(many, *arrays) - one).max())
  return found


def kernels(strategies=('dense ring', 'halo')):
  """How far kernels for TPUs, interpreted, are from the formula, by strategy.

  Unchecked, as the interpreter does not know which arrays vary.
  """
  t, n = 40, 4
  arrays = [np.float32(x) for x in draw(1, n * t, n * t, 2, 1, 32, 32)[:4]]
  mesh = jax.make_mesh((n,), (AT,), axis_types=AUTO, devices=jax.devices()[:n])
  found = {}
  for name in strategies:
    mask = Causal() & Window(30) if name == 'halo' else Causal()
    over = {'dense ring': ring.over(RING, True), 'halo': halo.over(AT, 29, 0)}

    def plain(q, k, v, mask=mask):
      return flash.attention(q, k, v, mask=mask, implementation='plain')

    def inner(q, k, v, mask=mask, over=over[name]):
      order = lax.axis_index(AT) * t + jnp.arange(t)
      return flash.attention(
        *(q, k, v),
        mask=mask,
        query_order=order,
        key_order=order,
        over=over,
        implementation='tpu',
      )

    where = ROWS['time']
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode(READS_NAN):
      many = jax.shard_map(
        inner, in_specs=where, out_specs=where, check_vma=False
      )
      many = with_gradients(many, *arrays)
    pltpu.reset_tpu_interpret_mode_state()
    jax.clear_caches()  # the parameters are no part of a program's key
    found[name] = float(abs(many - with_gradients(plain, *arrays)).max())
  return found


# What is replaced by what, and what has to see it.
WRONG = {
  'dropout, a halo one token short': (
    *MUTANTS['a halo one token short'][2:],
    lambda: dropped(['halo']),
  ),
  'dropout, of rows with the same numbers': (
    *(sequence, '_numbered', lambda dropout, rows, x: dropout),
    lambda: dropped(['halo']),
  ),
  'kernels, a halo one token short': (
    *MUTANTS['a halo one token short'][2:],
    lambda: kernels(['halo']),
  ),
  'kernels, one hop too few': (
    *MUTANTS['one hop too few'][2:],
    lambda: kernels(['dense ring']),
  ),
}


def wrong(mutant):
  """How far it is from one device."""
  *what, look = WRONG[mutant]
  with patched(*what):
    (apart,) = look().values()
  return apart


def sigmoid_apart():
  """How far sigmoid attention is from that on one device, by strategy."""
  q, k, v, w, offset = (jnp.asarray(x, jnp.float32) for x in PLAIN)

  def gradients(attend):
    loss = lambda *arrays: (lambda o: (jnp.sum(o * w), o))(attend(*arrays))
    run = jax.jit(jax.grad(loss, range(4), has_aux=True))
    return jax.tree.leaves(run(q, k, v, offset))

  found = {}
  for name in sequence.STRATEGIES:
    mask = Causal() & Window(9) if name == 'halo' else Causal()
    alone = lambda q, k, v, offset, mask=mask: sigmoid.attention(
      q, k, v, offset=offset, mask=mask
    )
    inner = lambda q, k, v, offset, mask=mask, name=name: sequence.attention(
      *(q, k, v),
      mask=mask,
      offset=offset,
      strategy=name,
      engine=sigmoid.attention,
    )
    where = ROWS['time']
    many = jax.shard_map(inner, in_specs=where, out_specs=where)
    pairs = zip(gradients(many), gradients(alone))
    apart = [error(np.asarray(x), np.asarray(y)) for x, y in pairs]
    found[name] = float(max(apart))
  return found


def uneven(strategies=(*sequence.FAR, None)):
  """How far queries that are fewer than keys are from one device, by strategy.

  Neither have orders: so a window's keys are not the neighbours'.
  """
  # With 16 heads on 2, Ulysses repeats keys, and fills nothing up.
  arrays = [np.float32(x) for x in draw(2, T, 160, 16, 2, 16, 24)[:4]]
  mask = Causal() & Window(13)
  alone = lambda *x: sequence.attention(*x, mask=mask)
  one, found = with_gradients(alone, *arrays), {}
  for name in strategies:
    inner = functools.partial(sequence.attention, mask=mask, strategy=name)
    many = jax.shard_map(inner, in_specs=ROWS['time'], out_specs=ROWS['time'])
    found[str(name)] = float(abs(with_gradients(many, *arrays) - one).max())
  return found


def alike():
  """How far calls are from one device that cost what others before cost.

  By the strategy that both have, and what is other.
  """
  arrays = [np.float32(x) for x in PLAIN[:4]]
  where, order = ROWS['time'], stripe.order(T, N, 'zigzag')
  causal = {'mask': Causal()}
  orders = lambda x: {'query_order': x, 'key_order': x}
  found = {}
  for name, (forced, *calls) in {
    'halo': (None, {'mask': Causal() & Window(9)}, {'mask': Window(5, 5)}),
    'ring': ('ring', causal | orders(None), causal | orders(order[None])),
  }.items():
    for given in calls:
      mask, places = given['mask'], given.get('query_order')
      one = functools.partial(flash.attention, **given)
      inner = lambda q, k, v, x, mask=mask, forced=forced: sequence.attention(
        *(q, k, v), mask=mask, query_order=x, key_order=x, strategy=forced
      )
      many = jax.shard_map(inner, in_specs=(where,) * 4, out_specs=where)
      many = functools.partial(lambda f, x, *qkv: f(*qkv, x), many, places)
      apart = with_gradients(many, *arrays) - with_gradients(one, *arrays)
      found[name] = float(abs(apart).max())  # of the last of them
  return found


def documents(*parts):
  """Documents of so many parts each."""
  lengths = [n * T // N for n in parts]
  order = np.concatenate([np.arange(n) for n in lengths])
  segments = np.repeat(np.arange(len(parts)) + 1, lengths)
  given = {'order': order, 'segments': segments}
  return {
    f'{side}_{name}': x
    for side in ('query', 'key')
    for name, x in given.items()
  }


# Where data decide who sees whom.
DECIDED = {case: CASES[case][1] for case in ('causal', 'packed', 'zigzag')} | {
  'striped': {'mask': Causal() & Window(3 * N), **laid('striped')},
  'documents': {'mask': Causal(), **documents(3, 1, 2, 2)},
  'window': {'mask': Causal() & Window(14), **documents(5, 3)},
  'of one part': {'mask': Causal(), **documents(*[1] * N)},
}


def decided():
  """Case -> hops of a ring, and the last in which anything is seen."""
  found = {}
  for case, given in DECIDED.items():
    counted = []

    def count(*args, counted=counted):
      hops = HOPS(*args)
      jax.debug.callback(lambda n, to=counted: to.append(int(n)), hops)
      return hops

    with patched(ring, '_hops', count):
      run = whole(lambda *x, given=given: spread(ring.over(RING))(*x, **given))
      arrays = [jnp.asarray(x, jnp.float32) for x in PLAIN[:3]]
      jax.block_until_ready(run(*arrays, {}))
      jax.effects_barrier()
    (hops,) = set(counted)
    pairs = np.asarray(seen(given['mask'], T, T, given)).any(0)
    parts = pairs.reshape(N, T // N, N, T // N).any((1, 3))
    mine, theirs = np.nonzero(parts)
    found[case] = [hops, int(max((mine - theirs) % N))]
  return found


def explicit():
  """How far rows in Explicit mode are from those of one device.

  Outside of any `shard_map`, in tiles that are filled up, with orders in rows.
  """
  t, found = 150, {}
  q, k, v, w = (np.float32(x) for x in draw(N, t, t, 2, 1, 16, 16)[:4])
  order = np.broadcast_to(np.arange(t)[::-1], (N, t))

  def attend(q, k, v, order, name):
    given = {'query_order': order, 'key_order': order, 'mask': Causal()}
    given |= {'implementation': name, 'blocks': Blocks(64, 64)}
    return flash.attention(q, k, v, **given)

  def gradients(name, *arrays):
    loss = lambda *x: jnp.sum(attend(*x, *arrays[3:4], name) * arrays[4])
    return jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays[:3])

  mesh = meshes.make(data=N, devices=jax.devices()[:N], axis_types='explicit')
  for name in ('xla', 'plain'):
    one = gradients(name, q, k, v, order, w)
    with jax.set_mesh(mesh):
      rows = jax.P(meshes.DATA)
      spread = [jax.device_put(x, rows) for x in (q, k, v, order, w)]
      many = gradients(name, *spread)
    apart = jax.tree.map(
      lambda x, y: abs(x - y).max(), one, jax.device_get(many)
    )
    found[name] = float(max(apart))
  return found


def tagged():
  """How far a ring of tokens in their order, and with tags, is from one device.

  A prefix sees keys to come: so no hop may be left out.
  """
  arrays = [np.float32(x) for x in PLAIN[:4]]
  mask = Causal() & Window(9) | Prefix()
  tags = np.stack([np.arange(T) < 40, np.arange(T) < 3])
  alone = lambda *x: flash.attention(*x, mask=mask, key_tags={'prefix': tags})

  def inner(q, k, v, tags):
    given = {'mask': mask, 'strategy': 'ring', 'key_tags': {'prefix': tags}}
    return sequence.attention(q, k, v, **given)

  where = ROWS['time']
  many = jax.shard_map(inner, in_specs=(where,) * 4, out_specs=where)
  apart = with_gradients(lambda *x: many(*x, tags), *arrays)
  return float(abs(apart - with_gradients(alone, *arrays)).max())


def crossed():
  """How far cross attention is from one device, by the context's length.

  One length divides among the devices.
  """
  mixer, found = registry.make('multi_head', heads=4), {}
  rng = np.random.default_rng(5)
  x = np.float32(rng.normal(size=(2, 24, 32)))
  for length in (16, 13):
    other = np.float32(rng.normal(size=(2, length, 32)))
    given = mixer.init(jax.random.key(0), x, context=Context(other))

    def attend(x, other, kernels, given=given):
      variables = {'params': given['params'] | kernels}
      return mixer.apply(variables, x, context=Context(other)).y

    kernels = {'key': given['params']['key']}
    arrays = x, other, kernels, x[::-1]
    one = with_gradients(attend, *arrays)
    with jax.set_mesh(meshes.make(seq=N, devices=jax.devices()[:N])):
      found[length] = float(abs(with_gradients(attend, *arrays) - one).max())
  return found


class Refusal(NamedTuple):
  """What is forced, of which mixer; and what is said of it."""

  strategy: str
  said: str
  mixer: str = 'multi_head'
  fields: Mapping[str, Any] = MappingProxyType({})
  policy: Mapping[str, Any] = MappingProxyType({})
  layout: str | None = None


REFUSED = {
  'no group': Refusal(
    'hybrid', 'no common divisor above 1', fields={'heads': 3}
  ),
  'far': Refusal(
    'halo', 'beyond the neighbours', 'sliding_window', {'window': 64}
  ),
  'zigzag': Refusal(
    *('halo', 'any order', 'sliding_window', {'window': 4}), layout='zigzag'
  ),
  'no round': Refusal(
    'ring', 'a backward pass', policy={'implementation': 'plain'}
  ),
}


def refused():
  """What a training run says that it cannot serve, when it is built."""
  found = {}
  mesh = meshes.make(seq=N, devices=jax.devices()[:N])
  for name, one in REFUSED.items():
    model = {'width': 48, 'depth': 1, 'mixer': one.mixer}
    model |= {'mechanisms': {one.mixer: dict(one.fields)}, 'hidden': 32}
    task = {'name': 'mqar', 'vocab': 64, 'length': 64, 'pairs': 4}
    config = {'batch': 1, 'task': task, 'model': model, 'layout': one.layout}
    config = build.complete(config)
    config['policy'] |= {'strategy': one.strategy, **one.policy}
    task, model = build.build(config)
    with jax.set_mesh(mesh):
      feed = step.Feed.of(config, task, model, mesh)
      try:
        step.programs(model, feed, *optimizer.make(2, **config['optimizer']))
      except NotImplementedError as error:
        found[name] = str(error)
  return found


@dataclasses.dataclass(frozen=True)
class Asking(Mask):
  """One of a user's own, which asks JAX what it can do without."""

  def __call__(self, query, key):
    return key.order <= query.order

  def empty(self, query, key):
    return jnp.greater(key.order_min, query.order_max)


def unforced():
  """What is chosen for an engine that cannot go round, where a ring would be.

  And how far it is from one device; and what refuses the ring.
  """
  arrays = [np.float32(x) for x in PLAIN[:4]]
  given = {'mask': Asking(), 'implementation': 'plain'}
  one = with_gradients(functools.partial(flash.attention, **given), *arrays)
  found, said = {}, []
  handler = logging.Handler()
  handler.emit = lambda record: said.append(record.args[-1])
  strategy.log.addHandler(handler)
  strategy.log.setLevel(logging.INFO)
  for name, more in (
    ('plain', {}),
    ('xla', {'implementation': 'xla'}),
    ('forced', {'strategy': 'ring'}),
  ):
    inner = functools.partial(sequence.attention, **given | more)
    many = jax.shard_map(inner, in_specs=ROWS['time'], out_specs=ROWS['time'])
    try:
      with patched(strategy, 'ROOM', 2**12):
        apart = float(abs(with_gradients(many, *arrays) - one).max())
    except NotImplementedError as error:
      found[name] = str(error)
    else:
      found[name] = [said.pop().name, apart]
  strategy.log.removeHandler(handler)
  return found


# Of what a device holds, the share that it sends to n - 1 others.
SHARES = {
  'ppermute': lambda n: 1,
  'all_gather': lambda n: n - 1,
  'all_to_all': lambda n: (n - 1) / n,
}


def sent(jaxpr, times=1, kind=jnp.floating):
  """(primitive, bytes that a device sends, how often) in a program.

  Of arrays of a kind: by default not of the places of tokens.
  """
  nested = lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    avals = [x.aval for x in equation.invars]
    arrays = [x for x in avals if jnp.issubdtype(x.dtype, kind)]
    if name in SHARES and arrays:
      size = place.size(arrays)
      groups = params.get('axis_index_groups')
      yield name, size * SHARES[name](len(groups[0]) if groups else N), times
    for value in jax.tree.leaves(params, is_leaf=nested):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from sent(inner, times * params.get('length', 1), kind)


# Of parts of 24 tokens; groups of a hybrid are 4 devices, or 2 of 2 key heads.
CHOSEN = {name: (8, Causal()) for name in sequence.FAR} | {
  'halo': (8, Causal() & Window(9)),
  'ulysses of few key heads': (2, Causal()),
  'ring of a window': (2, Causal() & Window(50)),
  'hybrid of a window': (2, Causal() & Window(50)),
  'ring of one part': (2, Window(1, 1)),
  'hybrid of one group': (2, Window(1, 1)),
}


def chosen():
  """How -> hops and bytes, as the chooser says and as the program has."""
  b, t, h, d = 2, 24, 16, 32
  found = {}
  for how, (k, mask) in CHOSEN.items():
    name = how.partition(' ')[0]
    call = sequence.Call(N, b, t, h, d, t, k, d, 4, mask, dense=True)
    said = sequence.choose(call, name)
    inner = lambda q, k, v, name=name, mask=mask: sequence.attention(
      q, k, v, mask=mask, strategy=name
    )
    program = jax.make_jaxpr(
      lambda *x, inner=inner: jax.shard_map(
        inner, in_specs=ROWS['time'], out_specs=ROWS['time']
      )(*x)
    )(*(jnp.zeros((b, N * t, n, d)) for n in (h, k, k)))
    moved = [x for x in sent(program.jaxpr) if x[1] > 4000]  # not of m and l
    found[how] = {
      'said': [said.hops, said.sent],
      'moved': [sum(x[2] for x in moved), sum(x[1] * x[2] for x in moved)],
    }
  return found


def passed():
  """Recurrence -> bytes that are sent, as it says, and in each gather."""
  rng, said, found = np.random.default_rng(0), [], {}
  normal = lambda *shape: rng.normal(size=(2, N * 24, *shape))
  q, k, v = (normal(3, 16) for _ in range(3))
  handler = logging.Handler()
  handler.emit = lambda record: said.append(record.args[-1].sent)
  strategy.log.addHandler(handler)
  strategy.log.setLevel(logging.INFO)
  for name, run, inputs in (
    ('gated', prefix.gated, (q, k, v, -abs(normal(3, 1)))),
    ('delta', prefix.delta, (q, k, v, 1 / (1 + abs(normal(3))))),
  ):
    arrays = [jnp.asarray(x, jnp.float32) for x in inputs]
    many = jax.shard_map(
      lambda *x, run=run: run(*x)[0],
      in_specs=ROWS['time'],
      out_specs=ROWS['time'],
    )
    moved = list(sent(jax.make_jaxpr(many)(*arrays).jaxpr))
    found[name] = [said.pop(), [x for x in moved if x[0] == 'all_gather']]
    assert not said
    assert len(moved) == len(found[name][1])
  strategy.log.removeHandler(handler)
  return found


def hops():
  """How often keys are sent round, by window: forward, and backward."""
  found = {}
  for window in (1, 2, 13, 14, 25, 26, 90, 10**6):
    mask = Causal() & Window(window)
    attend = lambda q, mask=mask: jax.shard_map(
      lambda q: sequence.attention(q, q, q, mask=mask, strategy='ring'),
      in_specs=ROWS['time'],
      out_specs=ROWS['time'],
    )(q)
    x = jnp.zeros((1, 8 * 12, 1, 16))
    there, back = jax.vjp(jax.jit(attend), x)
    counts = []
    for program in (jax.make_jaxpr(attend)(x), jax.make_jaxpr(back)(there)):
      moved = [x for x in sent(program.jaxpr) if x[1] == 12 * 16 * 4]
      counts.append(sum(x[2] for x in moved) / 2)  # keys, and values
    found[window] = counts
  return found


def memory():
  """Bytes of temporaries of the gradient over a ring, by number of devices."""
  found = {}
  for n in (2, 4, 8, 16):
    mesh = jax.make_mesh(
      (n,), (AT,), axis_types=AUTO, devices=jax.devices()[:n]
    )
    loss = lambda q, k, v: jnp.sum(
      jax.shard_map(
        lambda q, k, v: sequence.attention(
          q, k, v, mask=Causal(), strategy='ring', implementation='xla'
        ),
        in_specs=ROWS['time'],
        out_specs=ROWS['time'],
      )(q, k, v)
    )
    with jax.set_mesh(mesh):
      where = jax.NamedSharding(mesh, ROWS['time'])
      shape = jax.ShapeDtypeStruct(
        (1, n * 1024, 2, 32), jnp.float32, sharding=where
      )
      lower = lambda f, shape=shape: jax.jit(f).lower(*[shape] * 3).compile()
      found[n] = [
        lower(f).memory_analysis().temp_size_in_bytes
        for f in (loss, jax.grad(loss, (0, 1, 2)))
      ]
  return found


def room():
  """Bytes of a gather's temporaries, and those it is said to hold, by groups.

  For the gradient of 8 key heads in bfloat16.
  """
  found = {}
  shape = jax.ShapeDtypeStruct(
    (1, N * 512, 8, 32),
    BF16,
    sharding=jax.NamedSharding(jax.sharding.get_mesh(), ROWS['time']),
  )
  call = sequence.Call(N, 1, 512, 8, 32, 512, 8, 32, 2)
  for groups in (1, 8):
    loss = lambda q, k, v, groups=groups: jnp.sum(
      jax.shard_map(
        functools.partial(
          flash.attention,
          mask=Causal(),
          over=gather.over(AT, groups),
          query_order=None,
        ),
        in_specs=ROWS['time'],
        out_specs=ROWS['time'],
      )(q, k, v).astype(jnp.float32)
    )
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*[shape] * 3).compile()
    with patched(
      strategy, 'ROOM', math.ceil(strategy._gather(call)[2] / groups)
    ):
      held = strategy._gather(call)[3]
    found[groups] = [held, compiled.memory_analysis().temp_size_in_bytes]
  return found


def main():
  here = jax.devices()[:N]
  mesh = jax.make_mesh((N,), (AT,), axis_types=AUTO, devices=here)
  with jax.set_mesh(mesh):
    found = {
      'exact': {case: compare(case, overs(case)) for case in CASES},
      'rounded': {case: compare(case, overs(case), BF16) for case in ROUNDED},
      'mutants': {mutant: rejected(mutant) for mutant in MUTANTS | NARROW},
      'loud': [
        float(f(expected('loud')[0]["['lse']"])) for f in (np.min, np.max)
      ],
      'chosen': chosen(),
      'hops': hops(),
      'passed': passed(),
      'room': room(),
      'sigmoid': sigmoid_apart(),
      'uneven': uneven(),
      'tagged': tagged(),
      'alike': alike(),
      'decided': decided(),
      'unforced': unforced(),
    }
  found |= {'crossed': crossed(), 'refused': refused()}
  found |= {'explicit': explicit()}
  found |= {'dropped': dropped(), 'kernels': kernels(), 'memory': memory()}
  found['wrong'] = {mutant: wrong(mutant) for mutant in WRONG}
  print(json.dumps(found))


# ------------------------------------------------------------------------ tests


@pytest.fixture(scope='module')
def found():
  return json.loads(devices.run('-m', 'tests.test_parallel', devices=16))


@pytest.mark.parametrize('case', CASES)
def test_exact(case, found):
  assert set(found['exact'][case]) == set(overs(case))
  assert {at: x for at, x in found['exact'][case].items() if x} == {}


def test_loud_is_beyond_what_exp_bears(found):
  """Its inverse too: whoever rescales by another's maximum finds 0 or inf."""
  least, most = found['loud']
  assert least < -100
  assert most > 100


@pytest.mark.parametrize('case', ROUNDED)
def test_errors_do_not_grow_in_bfloat16(case, found):
  """Gradients are added up as wide as sums are, wherever they come from."""
  assert set(found['rounded'][case]) == set(overs(case))
  assert {at: x for at, x in found['rounded'][case].items() if x} == {}


@pytest.mark.parametrize('mutant', MUTANTS | NARROW)
def test_mutants_are_rejected(mutant, found):
  assert found['mutants'][mutant]


@pytest.mark.parametrize('name', sequence.STRATEGIES)
def test_dropout_does_not_know_the_mesh(name, found):
  assert found['dropped'][name] < 1e-5


@pytest.mark.parametrize('name', ['dense ring', 'halo'])
def test_kernels_for_tpus(name, found):
  """Values and gradients, of kernels that are interpreted."""
  assert found['kernels'][name] < 1e-5


@pytest.mark.parametrize('mutant', WRONG)
def test_mutants_of_both_are_rejected(mutant, found):
  assert found['wrong'][mutant] > 0.01


@pytest.mark.parametrize('name', sequence.STRATEGIES)
def test_sigmoid_attention(name, found):
  """Another monoid: partial results add up. Gradients of the offset too."""
  assert found['sigmoid'][name] < 2e-5


def test_queries_may_be_fewer_than_keys(found):
  assert found['uneven'].keys() == {*sequence.FAR, 'None'}
  assert max(found['uneven'].values()) < 1e-5


@pytest.mark.parametrize('name', ['halo', 'ring'])
def test_calls_that_cost_the_same_are_not_the_same(name, found):
  assert found['alike'][name] < 1e-5


@pytest.mark.parametrize('case', DECIDED)
def test_hops_that_show_nothing_are_left_out_where_data_decide(case, found):
  hops, needed = found['decided'][case]
  # Ranges of parts with several documents say less than their tokens.
  assert hops == needed or (case == 'packed' and hops > needed)
  few = {'documents': 2, 'window': 2, 'of one part': 0}
  assert hops == few.get(case, N - 1)


@pytest.mark.parametrize('name', ['xla', 'plain'])
def test_rows_in_explicit_mode(name, found):
  assert found['explicit'][name] < 1e-5


def test_a_ring_of_tokens_with_tags(found):
  assert found['tagged'] < 1e-5


def test_cross_attention(found):
  assert found['crossed'].keys() == {'16', '13'}
  assert max(found['crossed'].values()) < 1e-5


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_served_is_said_when_a_run_is_built(name, found):
  """By shapes alone, before anything is compiled."""
  said = found['refused'][name]
  one = REFUSED[name]
  assert said.startswith(f'strategy={one.strategy!r} cannot serve this: ')
  assert one.said in said
  assert said.endswith(' can')  # what serves it


def test_what_cannot_go_round_is_not_sent_round(found):
  name, apart = found['unforced']['plain']
  assert (name, apart < 1e-5) == ('gather', True)
  name, apart = found['unforced']['xla']
  assert (name, apart < 1e-5) == ('hybrid', True)
  assert "strategy='ring' cannot serve this" in found['unforced']['forced']
  assert 'backward pass of its own' in found['unforced']['forced']


@pytest.mark.parametrize('name', CHOSEN)
def test_the_chooser_knows_the_costs(name, found):
  """Exchanges and bytes sent are those of the program."""
  hops, size = found['chosen'][name]['said']
  moves, moved = found['chosen'][name]['moved']
  assert moves == 2 * hops  # keys and values, or q, k and v, and o back
  assert size == moved


@pytest.mark.parametrize('name', ['gated', 'delta'])
def test_recurrences_know_the_costs(name, found):
  """Once, of each array that an effect has, and nothing else."""
  said, gathers = found['passed'][name]
  assert said == sum(size for _, size, _ in gathers)
  assert len(gathers) == {'gated': 2, 'delta': 1}[name]
  assert all(times == 1 for *_, times in gathers)


def test_a_gather_in_groups_holds_less(found):
  """Gradients too: no group's keys are kept for the backward pass."""
  (held, most), (share, least) = found['room'].values()
  assert share == held // 8
  assert most - least >= 3 * (held - share)  # with gradients, twice as wide
  assert least < most / 3


def test_windows_go_round_no_further_than_they_see(found):
  """ceil((w - 1) / part) hops, of parts of 12 tokens.

  Backward keys go as far, and one place on, with their gradients behind them;
  which go home by one hop more.
  """
  for window, (there, back) in found['hops'].items():
    hops = min(7, -(-(int(window) - 1) // 12))
    assert there == hops, window
    assert back == 2 * hops + 1 + (hops > 0), window


def test_memory_does_not_grow_with_the_ring(found):
  two, four, *more = found['memory'].values()
  for n in more:
    assert n == pytest.approx(four, rel=0.01)
  assert all(x <= y for x, y in zip(two, four))  # no room for a second hop


if __name__ == '__main__':
  main()
