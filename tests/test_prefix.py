"""Engines over eight devices equal engines on one; what they send is constant.

And they err as little: a tenth more, at most.

All of it runs in one process of its own, which simulates the devices: this file
as a program, which prints what it found.

A row of the batch stands for each way in which pads and segments may lie across
devices. So a case is two programs with masks, on eight devices and on one, and
two without.
"""

import dataclasses
import functools
import json
import logging
import re
import types
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxattn import registry
from jaxattn.core import conv, delta, features, recurrence, ssm
from jaxattn.packing import Packing
from jaxattn.parallel import halo, prefix, sequence, strategy
from jaxattn.parallel import mesh as meshes
from tests import devices, laws, test_parallel

DEVICES = 8
B, T, H, D, E, M, N, R = 8, 24, 2, 4, 3, 6, 3, 5  # three tokens a device
LONG, SHORT = 6, 3  # taps that reach back beyond the neighbour, and to it


def masks(rng):
  """valid, starts 'b t': a row for each way in which tokens may lie."""
  valid, starts = np.ones((B, T), bool), np.zeros((B, T), bool)
  starts[1, [3, 6, 10, 20]] = True  # at borders, inside, and over many devices
  starts[2, [5, 6, 7, 23]] = True  # of one token
  valid[3, :7] = valid[3, -4:] = False  # devices of pads alone, at both ends
  valid[4, 4:16] = False  # and in the middle
  starts[4, 0] = True
  valid[5:7] = rng.random((2, T)) < 0.6
  starts[5] = rng.random(T) < 0.3  # pads among them, where it means nothing
  starts[6] = rng.random(T) < 0.08
  valid[7] = False
  return valid, starts


@dataclasses.dataclass
class Case:
  """An engine and what it is given.

  Attributes:
    run: (functions, arrays, weights, state, places) -> o, state; functions are
      `prefix`, or CORE for one device.
    arrays: 'b t ...'.
    weights: what every device has whole.
    state: what came before.
  """

  run: Callable
  arrays: list
  weights: list
  state: np.ndarray | None


CORE = types.SimpleNamespace(
  gated=recurrence.gated,
  delta=delta.delta,
  scan=ssm.scan,
  dense=ssm.dense,
  keys_in_range=features.keys_in_range,
  short=conv.short,
  fft=conv.fft,
)


def gated(of, arrays, weights, state, places):
  return of.gated(*arrays, state=state, **places)


def rule(of, arrays, weights, state, places):
  return of.delta(*arrays, state=state, **places)


def scan(of, arrays, weights, state, places):
  return of.scan(*arrays, *weights, state=state, **places)


def dense(of, arrays, weights, state, places):
  return of.dense(*arrays, *weights), ()


def peak(of, arrays, weights, state, places):
  *o, state = of.keys_in_range(*arrays, peak=state, **places)
  return o, state


def short(of, arrays, weights, state, places):
  return of.short(*arrays, *weights, tail=state, **places)


def fft(of, arrays, weights, state, places):
  return of.fft(*arrays, *weights), ()


def cases(length=T, b=B, d=D, e=E, m=M):
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.uniform(-1, 1, shape).astype(np.float32)

  def complexes(*shape):
    return (normal(*shape) + 1j * normal(*shape)).astype(np.complex64)

  qkv = [normal(b, length, H, n) for n in (d, d, e)]
  q, k, v = qkv
  unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
  # Mild gates, with some that are closed, almost closed, and almost open.
  gate = -np.exp(2 * normal(b, length, H, d) - 3)
  gate[rng.random(gate.shape) < 0.05] = -np.inf
  gate[rng.random(gate.shape) < 0.05] = -50
  gate[rng.random(gate.shape) < 0.2] = -1e-6
  beta = 1 / (1 + np.exp(normal(b, length, H)))
  state, u = normal(b, H, d, e), normal(b, length, m)
  a = -0.5 + 1j * np.pi * np.arange(N) * np.ones((m, 1))
  log_dt = np.linspace(np.log(0.01), np.log(0.3), m)
  log_a, b_bar = (
    np.asarray(x, np.complex64)
    for x in ssm.discretise(a, np.ones((m, N)), log_dt)
  )
  bank, memory = [log_a, b_bar, complexes(m, N)], complexes(b, m, N)
  taps = lambda w: [normal(w, m)]
  return {
    'plain': Case(gated, qkv, [], state),
    'head': Case(gated, [*qkv, gate[..., :1]], [], state),
    'channel': Case(gated, [*qkv, gate], [], state),
    'delta': Case(rule, [q, unit, v, beta], [], state),
    'gated_delta': Case(rule, [q, unit, v, beta, gate[..., 0]], [], state),
    'scan': Case(scan, [u], bank, memory),
    'dense': Case(dense, [u], bank, None),
    'peak': Case(peak, [3 * normal(b, length, H, R)], [], normal(b, H)),
    'long': Case(short, [u], taps(LONG), normal(b, LONG - 1, m)),
    'short': Case(short, [u], taps(SHORT), normal(b, SHORT - 1, m)),
    # Filters that reach beyond the neighbour, and all of its part.
    'fft': Case(fft, [u], taps(length // DEVICES + 7), None),
    'near': Case(fft, [u], taps(T // DEVICES + 1), None),
  }


UNMASKED = ('dense', 'fft', 'near')


def compared():
  """Names of cases, with masks and without if they know of any."""
  for name in cases():
    yield name, False
    if name not in UNMASKED:
      yield name, True


def spread(run):
  """An engine over all devices; the state is that of the last."""
  time, whole = jax.P(None, meshes.SEQ), jax.P()

  def local(arrays, weights, state, places):
    o, after = run(prefix, arrays, weights, state, places)
    return o, jax.tree.map(lambda x: x[None], after)

  def spread(*inputs):
    o, after = jax.shard_map(
      local,
      in_specs=(time, whole, whole, time),
      out_specs=(time, jax.P(meshes.SEQ)),
    )(*inputs)
    return o, jax.tree.map(lambda x: x[-1], after)

  return spread


def compiled(run, case, masked, **jit):
  """The program of o, the state and all gradients, and its inputs.

  With masks, a state comes in and pads hold NaN; without, there is neither.
  """
  arrays, state, places = case.arrays, case.state, {}
  if masked:
    valid, starts = masks(np.random.default_rng(1))
    more = case.arrays[0].shape[1] - T
    valid = np.pad(valid, [(0, 0), (0, more)])
    starts = np.pad(starts, [(0, 0), (0, more)])
    places = {'valid': valid, 'starts': starts}
    widen = lambda x: valid.reshape(*valid.shape, *[1] * (x.ndim - 2))
    arrays = [np.where(widen(x), x, np.nan) for x in arrays]
  else:
    state = None

  def both(arrays, weights, state, places):
    f = functools.partial(run, places=places)
    out, back = jax.vjp(f, arrays, weights, state)
    # Numbers without a pattern, the same on any device and of any type.
    pull = lambda x: (jnp.cos(7 * jnp.arange(x.size)) + 0.1).reshape(x.shape)
    return out, back(jax.tree.map(lambda x: pull(x).astype(x.dtype), out))

  inputs = arrays, case.weights, state, places
  return jax.jit(both, **jit).lower(*inputs).compile(), inputs


@functools.cache
def on_one(name, masked):
  case = cases()[name]
  run = functools.partial(case.run, CORE)
  program, inputs = compiled(
    lambda *inputs, places: run(*inputs, places), case, masked
  )
  return jax.tree.map(np.asarray, program(*inputs))


def on_all(name, masked, length=T, **jit):
  case = cases(length)[name]
  run = spread(case.run)
  f = lambda *inputs, places: run(*inputs, places)
  return compiled(f, case, masked, **jit)


@functools.cache
def mesh():
  return meshes.make(data=1, seq=DEVICES, axis_types='auto')


def agree(name, masked):
  """The law: values, states and gradients are those of one device."""
  with jax.set_mesh(mesh()):
    # Whole on all devices: so that any process has them.
    program, inputs = on_all(name, masked, out_shardings=jax.P())
    (o, state), grads = program(*inputs)
  (want_o, want_state), want_grads = on_one(name, masked)
  laws.assert_close(o, want_o, 'o')
  laws.assert_close(state, want_state, 'state')
  laws.assert_close(grads, want_grads, 'gradient', 10 * laws.ROUNDING)


SENT = re.compile(
  r'= (.*?) (all-gather|all-to-all|collective-permute|all-reduce'
  r'|reduce-scatter)(?:-start)?\('
)


def sent(text):
  """Shapes of what devices exchange, in a compiled module."""
  return sorted(f'{kind} {shape}' for shape, kind in SENT.findall(text))


def constant(name, masked):
  """The law: what is sent does not depend on the length."""
  with jax.set_mesh(mesh()):
    one, two = (
      sent(on_all(name, masked, length)[0].as_text())
      for length in (2 * T, 4 * T)
    )
  assert one, 'nothing is sent'
  assert one == two, f'{one} becomes {two}'


# ----------------------------------------------------------------------- errors

# Several chunks a device, of any engine; and sums of many terms.
LARGER = {'length': 2048, 'b': 2, 'd': 16, 'e': 16, 'm': 16}
BF16 = jnp.bfloat16
STEADY = {  # 'channel' and 'short' have what there is to 'head' and 'long'
  jnp.float32: (
    *('plain', 'channel', 'delta', 'gated_delta'),
    *('scan', 'dense', 'short', 'fft', 'near'),
  ),
  BF16: ('plain', 'long', 'gated_delta', 'dense'),
}
EPS = float(jnp.finfo(jnp.float32).eps)


@functools.cache
def drawn(name):
  """A case of many tokens, and cotangents of o and of the state."""
  case, rng = cases(**LARGER)[name], np.random.default_rng(2)
  run = lambda *inputs: case.run(CORE, *inputs, {})
  shapes = jax.eval_shape(run, case.arrays, case.weights, case.state)

  def pull(x):
    numbers = rng.normal(size=(2, *x.shape)).astype(np.float32)
    return numbers[0] + 1j * numbers[1] if np.iscomplexobj(x) else numbers[0]

  return case, jax.tree.map(pull, shapes)


def results(run, name, dtype, wide=False):
  """o, the state and all gradients, where they are -> numbers.

  Of tokens in `dtype` and states in float32; or of the same in wide numbers.
  """
  case, (pull, pulls) = drawn(name)

  def given(x, dtype=jnp.float32):
    if np.iscomplexobj(x):
      return jnp.asarray(x, jnp.complex128 if wide else jnp.complex64)
    return jnp.asarray(x, dtype).astype(jnp.float64 if wide else dtype)

  # Most of the time is the compiler's.
  @functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0}
  )
  def both(inputs, pulls):
    out, back = jax.vjp(lambda *inputs: run(*inputs, {}), *inputs)
    return out, back(pulls)

  inputs = (
    [given(x, dtype) for x in case.arrays],
    [given(x, dtype) for x in case.weights],
    None if case.state is None else given(case.state),
  )
  # What is returned in the tokens' type is o, which of a peak is two.
  pull = jax.tree.map(lambda x: given(x, dtype), pull)
  found = both(inputs, (pull, jax.tree.map(given, pulls)))
  return {
    jax.tree_util.keystr(path): np.asarray(x, np.result_type(x, np.float64))
    for path, x in jax.tree_util.tree_leaves_with_path(found)
  }


def modes(u, log_a, b_bar, c, *, state=None):
  """`ssm.scan` token by token, and from no state `ssm.dense`."""
  if state is None:
    nothing = jnp.zeros((len(u), *log_a.shape), log_a.dtype)
    return modes(u, log_a, b_bar, c, state=nothing)[0]

  def step(x, u):
    x = jnp.exp(log_a) * x + b_bar * u[..., None]
    return x, 2 * jnp.sum(c * x, axis=-1).real

  state, y = lax.scan(step, state, jnp.moveaxis(u, 1, 0))
  return jnp.moveaxis(y, 0, 1), state


EXACT = types.SimpleNamespace(
  **vars(CORE)
  | {'gated': recurrence.recurrent, 'delta': delta.recurrent}
  | {'scan': modes, 'dense': modes}
)


@functools.cache
def exact(name, dtype):
  """The definition, in float64."""
  run = functools.partial(drawn(name)[0].run, EXACT)
  with jax.enable_x64(True):
    return results(run, name, dtype, wide=True)


@functools.cache
def on_one_of(name, dtype):
  run = functools.partial(drawn(name)[0].run, CORE)
  return results(run, name, dtype)


def steady(name, dtype):
  """The law: errors of eight devices are a tenth more than one's, at most.

  RMS errors, relative to the RMS of the exact result; as in `test_parallel`.
  """
  one = on_one_of(name, dtype)
  with jax.set_mesh(mesh()):
    many = results(spread(drawn(name)[0].run), name, dtype)
  rms = lambda x: np.sqrt(np.mean(np.square(np.abs(x))))
  wrong = []
  for at, x in exact(name, dtype).items():
    of_one, of_many = (rms(y[at] - x) / (rms(x) or 1) for y in (one, many))
    if not of_many <= 1.1 * of_one + EPS / 8:
      wrong.append(f'{at}: {of_many:.2e}, on one device {of_one:.2e}')
  assert not wrong, wrong


# ------------------------------------------------------------------ any length

MECHANISMS = (
  'gated_linear',
  'performer',
  'gated_delta_net',
  's4d',
  'base_conv',
)


def any_length(name, packed):
  """The law: mechanisms serve lengths that do not divide among devices."""
  module = registry.module(name)
  cls, fields = type(registry.make(name)), module.SPEC.examples[-1]
  subject = laws.Subject(cls, module, fields)
  segments = np.array([[1] * 3 + [2] * 10, [0, 0] + [1] * 10 + [0]], np.int32)
  packing = Packing.from_segments(segments) if packed else None
  inputs = subject.variables, subject.x, packing, subject.cotangent
  want = subject.value_and_grads(*inputs)
  with jax.set_mesh(meshes.make(data=2, seq=4)):
    got = subject.value_and_grads(*inputs)
  laws.assert_close(got[0], want[0], 'y')
  laws.assert_close(got[1], want[1], 'gradient', 10 * laws.ROUNDING)


# ------------------------------------------------------------- what is said

# Of whose exchanges all are said; others say those of keys and values.
TOLD = {
  *('base_conv', 'delta_net', 'gated_delta_net', 'gated_linear', 'linear'),
  *('mamba2', 'moba', 'performer', 'retention', 's4d'),
}


def told(name, packed=False):
  """The law: a mechanism says how devices work together, and what is sent.

  Returns:
    what it said: name, hops and bytes, once each.
  """
  mixer, said = registry.make(name, **registry.spec(name).examples[-1]), []
  x = jnp.zeros((2, DEVICES * 8, laws.WIDTH))  # weights this small are whole
  packing = None
  if packed:
    segments = np.repeat([[1, 2, 0], [3, 3, 4]], [20, 31, 13], axis=1)
    packing = Packing.from_segments(segments.astype(np.int32))
  variables = jax.eval_shape(mixer.init, jax.random.key(0), x)
  handler = logging.Handler()
  handler.emit = lambda record: said.append(record.args[-1])
  strategy.say.cache_clear()
  strategy.log.addHandler(handler)
  strategy.log.setLevel(logging.INFO)
  apply = lambda *inputs: mixer.apply(*inputs).y
  with jax.set_mesh(mesh()):
    program = jax.make_jaxpr(apply)(variables, x, packing)
  strategy.log.removeHandler(handler)
  assert said, 'nothing'
  for one in said:
    assert one.reason
    assert str(one).startswith(f'{one.name} ({one.reason}): each device sends')
  if name in TOLD:
    moved = test_parallel.sent(program.jaxpr, kind=np.generic)
    moved = sum(size * times for _, size, times in moved)
    assert sum(one.sent for one in said) == moved
  return [[one.name, one.hops, one.sent] for one in said]


# ---------------------------------------------------------------------- mutants


def of_the_one_before(enter):
  def broken(*args):
    n = lax.axis_size(meshes.SEQ)
    on = [(i, (i + 1) % n) for i in range(n)]
    return lax.ppermute(enter(*args), meshes.SEQ, on)

  return broken


def of_its_own(enter):
  def broken(state, effect, then):
    return then(enter(state, effect, then), effect)

  return broken


def no_gradient(enter):
  return lambda *args: lax.stop_gradient(enter(*args))


def nothing_enters(enter):
  return lambda state, effect, then: state


def no_starts(effect):
  return lambda *args, valid, starts: effect(*args, valid=valid)


def decaying_pads(effect):
  def broken(*tokens, valid, starts):
    at = valid[..., None, None]
    *kv, w = tokens
    kv = [jnp.where(at, x, 0) for x in kv]
    return effect(*kv, jnp.where(at, w, -0.1), starts=starts & valid)

  return broken


def all_of_time(effect):
  def broken(k, v, *gates, **places):
    k, v, *gates = sequence.everywhere((k, v, *gates))
    return effect(k, v, *gates, **sequence.everywhere(places))

  return broken


def in_one_sum(effect):
  """One token after the other: how a product sums is each processor's own."""

  def broken(k, v, log_decay, **places):
    kept, own = effect(k, v, log_decay, **places)
    add = lambda total, kv: (total + jnp.einsum('bhd,bhe->bhde', *kv), None)
    total, _ = lax.scan(add, 0 * own, jax.tree.map(by_time, (k, v)))
    return kept, total

  by_time = lambda x: jnp.moveaxis(x, 1, 0)
  return broken


def narrow(fade):
  return lambda state, effect: fade(state, effect).astype(BF16) + 0 * state


def no_segment_begins(begun):
  return lambda like, valid, starts: jnp.zeros_like(like, bool)


def silent(say):
  return lambda *args: None


def own_part_alone(by_channel):
  return lambda engine, x, *weights: engine(x, *weights)


ENTER, GATED, MODES = (prefix, 'enter'), (recurrence, 'effect'), (ssm, 'effect')
# Name -> the law that rejects it, its case, whether with masks (or of which
# type), and what is replaced by what.
MUTANTS = {
  'state of the one before': (agree, 'head', True, *ENTER, of_the_one_before),
  'tail of the one before': (agree, 'long', True, *ENTER, of_the_one_before),
  'peak of the one before': (agree, 'peak', True, *ENTER, of_the_one_before),
  'own tokens twice': (agree, 'delta', True, *ENTER, of_its_own),
  'no gradient across': (agree, 'scan', True, *ENTER, no_gradient),
  'start ignored': (agree, 'channel', True, *GATED, no_starts),
  'nothing enters a dense row': (
    agree,
    'dense',
    False,
    ssm,
    'echo',
    lambda echo: lambda *args: 0 * echo(*args),
  ),
  'start ignored by modes': (agree, 'scan', True, *MODES, no_starts),
  'start ignored by the peak': (
    agree,
    'peak',
    True,
    prefix,
    '_begun',
    no_segment_begins,
  ),
  'start ignored by the tail': (
    agree,
    'long',
    True,
    prefix,
    '_begun',
    no_segment_begins,
  ),
  'pads that decay': (agree, 'head', True, *GATED, decaying_pads),
  'tail dropped': (agree, 'short', True, *ENTER, nothing_enters),
  'tail dropped in a dense row': (
    agree,
    'short',
    False,
    halo,
    'extend',
    lambda extend: lambda x, *_: jnp.zeros_like(x),
  ),
  'nothing enters a filter': (
    agree,
    'near',
    False,
    prefix,
    '_last',
    lambda last: lambda *args: 0 * last(*args),
  ),
  'no transition': (
    agree,
    'head',
    True,
    prefix,
    '_fade',
    lambda fade: lambda state, effect: state + effect[1],
  ),
  'no transition of the delta rule': (
    agree,
    'delta',
    False,
    prefix,
    '_product',
    lambda product: lambda x, y: y,
  ),
  'own part of time alone': (
    agree,
    'fft',
    False,
    prefix,
    'by_channel',
    own_part_alone,
  ),
  'all of time is sent': (constant, 'head', True, *GATED, all_of_time),
  'gradients are summed where weights are used': (
    constant,
    'scan',
    True,
    prefix,
    '_varying',
    lambda varying: lambda weights, x: weights,
  ),
  'effects in one long sum': (
    steady,
    'plain',
    jnp.float32,
    *GATED,
    in_one_sum,
  ),
  'a narrow state between devices': (
    steady,
    'plain',
    jnp.float32,
    prefix,
    '_fade',
    narrow,
  ),
  'gradients are rounded before they are added up': (
    steady,
    'plain',
    BF16,
    prefix,
    '_wide',
    lambda wide: lambda tree: tree,
  ),
  'nothing is said': (told, 's4d', False, prefix, 'say', silent),
  'not all is said': (told, 'base_conv', True, sequence, 'say', silent),
  'nothing enters': (any_length, 'gated_linear', False, *ENTER, nothing_enters),
}


# -------------------------------------------------------------------- processes


def wrong(law, *args):
  """What is wrong, or None."""
  try:
    law(*args)
  except Exception as error:
    return f'{type(error).__name__}: {error}'[:1000]


def rejected(mutant):
  """What is found wrong with it."""
  law, name, masked, module, part, broken = MUTANTS[mutant]
  with mock.patch.object(module, part, broken(getattr(module, part))):
    return wrong(law, name, masked)


def main():
  """Prints what is tested -> what is wrong with it, or None."""
  found = {}
  for name, masked in compared():
    how = f'{name}{", masked" * masked}'
    found[how] = wrong(agree, name, masked)
    # Tails of dense rows are sent in another way; all else is the same.
    if name in ('short', 'dense', 'near') or masked:
      found[f'bytes: {how}'] = wrong(constant, name, masked)
  for dtype, names in STEADY.items():
    for name in names:
      how = f'error: {name}, {np.dtype(dtype)}'
      found[how] = wrong(steady, name, dtype)
  for name in MECHANISMS:
    for packed in (False, True):
      how = f'length: {name}{", packed" * packed}'
      found[how] = wrong(any_length, name, packed)
  for name in registry.names():
    for packed in (False, True):
      how = f'said: {name}{", packed" * packed}'
      found[how] = wrong(told, name, packed)
  for mutant in MUTANTS:
    found[f'mutant: {mutant}'] = rejected(mutant)
  print(json.dumps(found))


@pytest.fixture(scope='module')
def found():
  return json.loads(devices.run('-m', 'tests.test_prefix', devices=DEVICES))


def test_engines_over_devices(found):
  assert not {
    test: wrong
    for test, wrong in found.items()
    if wrong and not test.startswith('mutant')
  }


@pytest.mark.parametrize('mutant', MUTANTS)
def test_mutants_are_rejected(mutant, found):
  wrong = found[f'mutant: {mutant}']
  assert wrong, 'passes'
  assert wrong.startswith('AssertionError'), wrong


if __name__ == '__main__':
  main()
