"""A memory in parts, on eight devices, is what it is on one.

Streams are read in chunks: some of tokens that divide among the devices, some
that do not, some of one. The oracle is the formula with a dense matrix of who
sees whom, in float64; over devices they may err twice as much as the formula
does in float32 (the error rule).

A process chooses once how many devices it simulates: this file, as a program,
prints what it found.
"""

import functools
import itertools
import json
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxattn import registry
from jaxattn.core import cached, sigmoid
from jaxattn.decode import contexts
from jaxattn.decode import generate as decode
from jaxattn.mechanisms.softmax import multi_head
from jaxattn.models.lm import LM
from jaxattn.packing import Packing, resolve
from jaxattn.parallel import mesh as meshes
from jaxattn.parallel import sequence, strategy, tree
from jaxattn.positions import rope
from jaxattn.state import FullKV
from pallas_kernels import flash
from pallas_kernels.flash import partial
from pallas_kernels.masks import Causal, Sinks, Window
from pallas_kernels.scores import Score, Slopes
from tests import devices, test_parallel
from tests.test_flash_tpu import WEIGHTS, draw, error, number
from tests.test_generate import (
  DRAWN,
  GREEDY,
  PROMPTS,
  ROUNDING,
  made,
  single,
)
from tests.test_parallel import patched

N, T = 8, 40
EPS = float(jnp.finfo(jnp.float32).eps)
CUTS = (0, 16, 29, 30, 31, T)
ROOM = 37  # slots, in which all that is real has room, and which do not divide
MODES = ('auto', 'explicit')

SEGMENTS = np.stack(
  [
    np.repeat([1, 2, 0], [14, 20, 6]),
    np.repeat([0, 1, 0, 1, 4], [3, 9, 2, 20, 6]),
  ]
).astype(np.int32)


def loud():
  """Scores of some heads are all far above 0, of the others all far below."""
  q, k, *rest = draw(2, T, T, 4, 2, 16, 24, seed=3)
  q = 40 * np.abs(q) * np.array([1, -1, -1, 1])[:, None]
  return q, np.abs(k), *rest


PLAIN = draw(2, T, T, 4, 2, 16, 24)
NEAR = Causal() & (Window(9) | Sinks(2))
# arrays, the rule, and numbers that get gradients.
CASES = {
  'causal': (PLAIN, {'mask': Causal()}, {}),
  'window': (PLAIN, {'mask': NEAR}, {}),
  'loud': (loud(), {'mask': Causal()}, {}),
  'slopes': (
    draw(2, T, T, 3, 3),
    {'mask': Causal(), 'softcap': 2.0},
    {'slopes': number(3)},
  ),
  'sinks': (PLAIN, {'mask': Causal()}, {'sinks': number(4)}),
  'sigmoid': (PLAIN, {'mask': Causal()}, {'offset': number(4)}),
}


def formula(q, k, v, numbers, mask, softcap=None):
  """The whole stream at once."""
  packing = Packing.from_segments(SEGMENTS)
  order, segments = packing.order, packing.segments
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  x = jnp.einsum('bthd,bshd->bhts', q, k) / np.sqrt(q.shape[3])
  x = x if softcap is None else softcap * jnp.tanh(x / softcap)
  far = order[:, :, None] - order[:, None]
  if 'slopes' in numbers:
    x -= numbers['slopes'][:, None, None] * jnp.abs(far)[:, None]
  visible = (segments[:, :, None] == segments[:, None]) & (far >= 0)
  visible &= segments[:, None] > 0
  if mask is NEAR:
    visible &= (far < 9) | (order[:, None] < 2)
  visible = visible[:, None]
  if 'offset' in numbers:
    x = jax.nn.sigmoid(x + numbers['offset'][:, None, None])
    return jnp.einsum('bhts,bshe->bthe', jnp.where(visible, x, 0), v)
  if 'sinks' in numbers:
    sink = numbers['sinks'][:, None, None] + jnp.zeros_like(x[..., :1])
    x = jnp.concatenate([x, sink], -1)
    visible = jnp.pad(visible, [(0, 0)] * 3 + [(0, 1)], constant_values=True)
    v = jnp.pad(v, ((0, 0), (0, 1), (0, 0), (0, 0)))
  x = jnp.where(visible, x, -jnp.inf)
  m = lax.stop_gradient(jnp.max(x, -1, keepdims=True))
  p = jnp.where(visible, jnp.exp(x - jnp.where(m == -jnp.inf, 0, m)), 0)
  total = p.sum(-1, keepdims=True)
  return jnp.einsum('bhts,bshe->bthe', p / jnp.where(total == 0, 1, total), v)


def streamed(q, k, v, numbers, **rule):
  """The same in chunks, each of which reads and writes the memory."""
  packing = Packing.from_segments(SEGMENTS)
  (b, _, heads, d), e = k.shape, v.shape[3]
  memory = FullKV.empty(b, ROOM, heads, d, e, k.dtype, positions=True)
  memory = memory.striped(sequence.devices())
  engine, score = sequence.attention, None
  rule = dict(rule)
  rest = {name: x for name, x in numbers.items() if name != 'slopes'}
  if 'slopes' in numbers:
    score = Score(Slopes(), (numbers['slopes'],))
  if 'offset' in numbers:
    engine = functools.partial(engine, engine=sigmoid.attention)
  attend = lambda *x: cached.attend(*x[:-1], engine=engine, **rule, **x[-1])
  found = []
  for start, end in itertools.pairwise(CUTS):
    cut = lambda x, at=slice(start, end): x[:, at]
    tokens = resolve(jax.tree.map(cut, packing), None, b, end - start)
    o, memory = sequence.stream(
      *(attend, cut(q), cut(k), cut(v), tokens, memory), weights=(score, rest)
    )
    found.append(o)
  return jnp.concatenate(jax.tree.map(whole, found), axis=1)


def whole(x):
  return x if meshes.current() is None else jax.reshard(x, jax.P())


def results(attend, case, *weights):
  """o, and gradients of a weighed sum of it; for each weight."""
  arrays, rule, numbers = CASES[case]
  real = SEGMENTS[:, :, None, None] > 0  # a mixer makes nothing of the others

  def loss(q, k, v, numbers, weight):
    o = attend(q, k, v, numbers, **rule) * real
    return weight * jnp.sum(o * jnp.asarray(arrays[3], o.dtype)), o

  run = test_parallel.whole(jax.grad(loss, (0, 1, 2, 3), has_aux=True))
  wide = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
  inputs = jax.tree.map(lambda x: np.asarray(x, wide), (*arrays[:3], numbers))
  for weight in weights:
    (q, k, v, rest), o = run(*inputs, weight)
    found = {'o': o * weight, 'dq': q, 'dk': k, 'dv': v, **rest}
    yield {at: np.asarray(x, np.float64) / weight for at, x in found.items()}


@functools.cache
def expected(case):
  """The exact results, and what the formula errs in float32."""
  with jax.enable_x64(True):
    (exact,) = results(formula, case, 1.0)
  return exact, worst(results(formula, case, *WEIGHTS), exact)


def loudness():
  """The least and the greatest lse of the case."""
  (q, k, v, *_), rule, _ = CASES['loud']
  packing = Packing.from_segments(SEGMENTS)
  tokens = {
    f'{side}_{what}': getattr(packing, what)
    for side in ('query', 'key')
    for what in ('order', 'segments')
  }
  arrays = (np.float32(x) for x in (q, k, v))
  found = flash.attention(*arrays, **rule, **tokens, return_partial=True)
  lse = np.asarray(flash.finish(found)[1])[SEGMENTS > 0]
  return [float(lse.min()), float(lse.max())]


def worst(draws, exact):
  draws = list(draws)
  return {at: max(error(x[at], exact[at]) for x in draws) for at in exact}


def compare(case):
  """Where many devices err too much."""
  exact, naive = expected(case)
  with jax.set_mesh(meshes.make(seq=N)):
    many = worst(results(streamed, case, 1.0), exact)
  return [
    f'{at}: {x:.1e}, naively {naive[at]:.1e}'
    for at, x in many.items()
    if not x <= 2 * naive[at] + EPS
  ]


# ---------------------------------------------------------------------- mutants

TOTAL, PLACES = partial.total, FullKV._places


def engines(total):
  own = flash.BACKENDS['xla']
  return {'xla': own._replace(monoid=own.monoid._replace(total=total))}


def added(x, axis):
  """What is found, not rescaled."""
  return partial.Partial(lax.pmax(x.m, axis), *lax.psum((x.l, x.o), axis))


def flat(x, axis):
  """Values are right, gradients are not."""
  return TOTAL(x._replace(l=lax.stop_gradient(x.l)), axis)


def everywhere(self, slots, valid, part):
  """Each device writes what falls to its neighbour, too."""
  theirs = slots % N == (part + 1) % N
  slots = jnp.where(theirs, slots // N * N + part, slots)
  return PLACES(self, slots, valid, part)


MUTANTS = {
  'partials not rescaled': (flash, 'BACKENDS', engines(added)),
  'sums without a gradient': (flash, 'BACKENDS', engines(flat)),
  'keys that two devices write': (FullKV, '_places', everywhere),
  'pads are written': (
    *(FullKV, '_places'),
    lambda self, slots, valid, part: PLACES(self, slots, None, part),
  ),
  'the wrong part': (
    *(tree.Part, 'read'),
    lambda self, *chunk: self.memory.read(
      *chunk, (lax.axis_index(self.axis) + 1) % (N - 1)
    ),
  ),
}


def rejected(mutant):
  """What is found wrong with it."""
  with patched(*MUTANTS[mutant]):
    return compare('loud')


# -------------------------------------------------------------------- language


def under(mode, **sizes):
  return jax.set_mesh(meshes.make(axis_types=mode, **(sizes or {'seq': N})))


def apart(x, y):
  """How far two generations are from each other: inf, if in any token."""
  if not np.array_equal(x.tokens, y.tokens):
    return np.inf
  return float(np.abs(np.asarray(x.logprobs) - np.asarray(y.logprobs)).max())


def generated():
  """How far what is generated is from what one device generates."""
  found = {}
  wide = single('multi_head') | {'width': 64}  # weights are stored in parts
  pair = {'depth': 2, 'width': 16, 'mixer': 'multi_head linear'}
  for name, fields, sizes in (
    ('multi_head', wide, {'seq': N}),
    ('grouped_query', single('grouped_query'), {'seq': 4, 'data': 2}),
    ('pair', pair, {'seq': N}),
  ):
    model, variables = made(**fields)
    # What is the best token over devices is for `windows`.
    rules = DRAWN | {'key': jax.random.key(3)}
    one = decode.generate(model, variables, PROMPTS, **rules)
    for chunk, mode in ((8, 'auto'), (rules['chunk'], 'explicit')):
      with under(mode, **sizes):
        many = decode.generate(
          model, variables, PROMPTS, **rules | {'chunk': chunk}
        )
      found[f'{name} {mode}'] = apart(one, many)
  return found


def mixer():
  """One layer, its variables, and a stream."""
  layer = registry.make('multi_head', heads=2, width=12, position='alibi')
  x = jax.random.normal(jax.random.key(1), (3, 27, 12))
  variables = layer.init(jax.random.key(2), x)
  at = jnp.array([[27], [9], [14]])
  packing = Packing.from_segments(
    (jnp.arange(27) < at).astype(jnp.int32)
  )  # rows of several lengths

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def chunk(state, a, b):
    cut = lambda x: x[:, a:b]
    own = jax.tree.map(cut, packing)
    return layer.apply(variables, cut(x), own, state=state, return_state=True)

  return layer, chunk


def moved():
  """A state goes from one device to eight, or back, or to rows of another."""
  layer, chunk = mixer()
  found = {}
  start = lambda: layer.init_state(3, 27)
  _, state = chunk(start(), 0, 14)
  want, _ = chunk(state, 14, 27)
  beams = jnp.array([2, 2, 1])
  # What lies in parts is indexed with a word on where the result lies.
  take = {
    'auto': lambda x: x[beams],
    'explicit': lambda x: x.at[beams].get(out_sharding=jax.typeof(x).sharding),
  }
  for mode in MODES:
    with under(mode):
      part = chunk(start(), 0, 14)[1]
      many, after = chunk(state, 14, 27)  # of one device
      turned = jax.tree.map(take[mode], part)
      same, _ = chunk(turned, 14, 15)
    ends = jax.device_get(part)
    back, _ = chunk(jax.tree.map(jnp.asarray, ends), 14, 27)
    turned = jax.tree.map(lambda x: jnp.asarray(x)[beams], ends)
    rows, _ = chunk(turned, 14, 15)
    far = lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max())
    found[mode] = {
      'to eight': far(many, want),
      'to one': far(back, want),
      'beams': far(same, rows),
      'stripes': [after.memory.stripes, part.memory.stripes],
    }
  return found


def held():
  """What each device holds of the state, and how many keys of each row."""
  model, variables = made(**single('multi_head'))
  ids = np.ones((3, 24), np.int32)
  lengths = np.array([24, 3, 12], np.int32)
  found = {}
  for mode in MODES:
    with under(mode):
      state, _ = decode._prefill(
        *(model, variables, ids, lengths, None), chunk=8, capacity=33
      )
    memory = state[0][0].memory
    size = lambda x: [x.nbytes, *(y.data.nbytes for y in x.addressable_shards)]
    found[mode] = {
      'bytes': [size(x) for x in jax.tree.leaves(memory) if x.ndim > 2],
      'keys': [
        (np.asarray(x.data) > 0).sum(-1).tolist()
        for x in memory.segments.addressable_shards
      ],
    }
  return found


MOVES = re.compile(r'= (\S.*?) (all-\w+|collective-\w+|reduce-scatter)[\w-]*\(')


def moves(compiled):
  """Shapes and kinds of what devices send each other."""
  return sorted(x.groups() for x in MOVES.finditer(compiled.as_text()))


def sums(jaxpr):
  """Bytes that are added up, or of which the largest is taken."""
  total = 0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name in ('pmax', 'psum_invariant', 'all_gather', 'ppermute'):
      total += sum(x.aval.size * x.aval.dtype.itemsize for x in equation.invars)
    for value in jax.tree.leaves(
      equation.params,
      is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'),
    ):
      inner = getattr(value, 'jaxpr', value)
      total += sums(inner) if hasattr(inner, 'eqns') else 0
  return total


def sent():
  """What a step sends, by the room of the memory: said, traced, compiled."""
  said = []
  handler = logging.Handler()
  handler.emit = lambda record: said.append(record.getMessage())
  strategy.log.addHandler(handler)
  strategy.log.setLevel(logging.INFO)
  layer = registry.make('grouped_query', heads=4, kv_heads=2, width=64)
  x = jnp.ones((1, 1, 64))
  variables = layer.init(jax.random.key(0), x)
  found = {}
  strategy.say.cache_clear()
  with under('explicit'):
    for room in (64, 4096):
      state = layer.init_state(1, room)
      step = lambda x, state: layer.apply(
        variables, x, state=state, return_state=True
      )
      call = sequence.Call(*(N, 1, 1, 4, 16, room // N, 2, 16, 4), Causal())
      found[room] = {
        'said': sequence.remember(call).sent,
        'traced': sums(jax.make_jaxpr(step)(x, state).jaxpr),
        'moves': moves(jax.jit(step).lower(x, state).compile()),
      }
  strategy.log.removeHandler(handler)
  return {'rooms': list(found.values()), 'log': said}


# --------------------------------------------------------------------- contexts

PREFIX = (3, 4)
WINDOWS = [
  [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 0, 1], [2, 9, 2]],
  [[4, 10, 7, 5]],
  [[2, 1], [6, 3, 5, 1, 8, 9], [7, 7, 2, 0, 4, 1], [5, 9, 3], [1]],
]


@functools.partial(jax.jit, static_argnums=0)
def dense(model, params, ids, order, visible):
  """Log-probabilities 't v' of a row, by the formulas alone."""
  norm = lambda x, p: (
    x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p['gain']
  )
  rotate = rope.reference(None, order, None, None)['rotate']
  bias = jnp.where(visible, 0, -jnp.inf)
  table = params['embed']['table']
  x = table[ids][None]
  for i in range(model.depth):
    own = jax.tree.map(lambda x, i=i: x[i], params['layers_0']['block_0'])
    x += multi_head.reference(
      *(own['mixer'], norm(x, own['mixer_norm'])),
      causal=False,
      rotate=rotate,
      bias=bias,
    )
    weights = own['feed_forward']
    y = norm(x, own['feed_forward_norm'])
    gate, up, out = (weights[n]['kernel'] for n in ('gate', 'up', 'out'))
    x += (jax.nn.silu(y @ gate) * (y @ up)) @ out
  return jax.nn.log_softmax(norm(x, params['norm']) @ table.T)[0]


def explicitly(model, params, found, anew):
  """Log-probabilities of what was generated; each token has to be the best."""
  logprobs = []
  for windows, prompt, new in zip(WINDOWS, PROMPTS, found.tokens.tolist()):
    ids, order, window = [*PREFIX], [*range(len(PREFIX))], [-1] * len(PREFIX)
    start = len(PREFIX)
    for i, own in enumerate(windows):
      ids += own
      order += range(start, start + len(own))
      window += [i] * len(own)
      start += 0 if anew else len(own)
    start = max(order) + 1
    ids += [*prompt, *new]
    order += range(start, start + len(prompt) + len(new))
    window = np.array(window + [99] * (len(prompt) + len(new)))
    order = np.array(order)
    near = window[:, None] == window
    seen = near | (window == -1) | (window[:, None] == 99)
    seen &= order[:, None] >= order
    with jax.enable_x64(True):
      wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
      scores = dense(model, wide['params'], np.array(ids), order, seen)
    scores = np.asarray(scores)[-len(new) - 1 : -1]
    if not np.array_equal(scores.argmax(-1), new):
      return None
    logprobs.append(scores[np.arange(len(new)), new])
  return np.array(logprobs)


def read(model, variables, anew):
  state = contexts.read(
    model, variables, WINDOWS, room=20, prefix=PREFIX, anew=anew, chunk=4
  )
  return decode.generate(model, variables, PROMPTS, state=state, **GREEDY)


def language():
  fields = {'depth': 2, 'mixer': 'multi_head', 'mechanisms': {}}
  return made(**fields, width=16)


def windows():
  """How far from the explicit mask, by whether positions begin anew."""
  model, variables = language()
  found = {}
  for anew, sizes in ((True, {'seq': N}), (False, {'seq': 4, 'data': 2})):
    one = read(model, variables, anew)
    want = explicitly(model, variables, one, anew)
    found[f'{anew} alone'] = (
      np.inf if want is None else float(np.abs(one.logprobs - want).max())
    )
    for mode in MODES if anew else MODES[1:]:
      with under(mode, **sizes):
        many = read(model, variables, anew)
      found[f'{anew} {mode}'] = apart(one, many)
  return found


READ = contexts._read
WINDOW_MUTANTS = {
  'a question that is not behind': lambda *x, **rule: READ(
    *x[:-1], x[-1] // 2, **rule
  ),
  'a prefix seen by each window': lambda *x, **rule: READ(
    *x[:-2], x[-2] | True, x[-1], **rule
  ),
}


def wrong_windows():
  model, variables = language()
  found = {}
  for name, mutant in WINDOW_MUTANTS.items():
    with patched(contexts, '_read', mutant):
      one = read(model, variables, True)
    want = explicitly(model, variables, one, True)
    found[name] = (
      np.inf if want is None else float(np.abs(one.logprobs - want).max())
    )
  return found


def silent():
  """What devices send each other while they read windows."""
  model, variables = language()
  ids = np.ones((1, N, 4), np.int32)
  given = ids, ids * np.arange(4, dtype=np.int32), ids, ids > 0
  with under('explicit'):
    lowered = READ.lower(
      *(model, variables, *given, np.array([4], np.int32)), chunk=4, room=8
    )
    return moves(lowered.compile())


def main():
  found = {
    'exact': {case: compare(case) for case in CASES},
    'loud': loudness(),
    'mutants': {mutant: rejected(mutant) for mutant in MUTANTS},
    'generated': generated(),
    'moved': moved(),
    'held': held(),
    'sent': sent(),
    'windows': windows(),
    'wrong windows': wrong_windows(),
    'silent': silent(),
  }
  print(json.dumps(found))


# ------------------------------------------------------------------------ tests


@pytest.fixture(scope='module')
def found():
  return json.loads(devices.run('-m', 'tests.test_tree'))


@pytest.mark.parametrize('case', CASES)
def test_exact(case, found):
  """Outputs and gradients, through a state that is handed on."""
  assert found['exact'][case] == []


def test_loud_is_beyond_what_exp_bears(found):
  least, most = found['loud']
  assert least < -100
  assert most > 100


@pytest.mark.parametrize('mutant', MUTANTS)
def test_mutants_are_rejected(mutant, found):
  assert found['mutants'][mutant]


def test_generation_is_that_of_one_device(found):
  """Tokens, and log-probabilities; some layers keep time whole."""
  assert len(found['generated']) == 6
  for name, far in found['generated'].items():
    assert far < ROUNDING, name


@pytest.mark.parametrize('mode', MODES)
def test_a_state_may_move(mode, found):
  """From one device to eight, back, and its rows to other places."""
  stripes = found['moved'][mode].pop('stripes')
  assert stripes == [1, N]
  assert max(found['moved'][mode].values()) < ROUNDING


@pytest.mark.parametrize('mode', MODES)
def test_each_device_holds_its_part(mode, found):
  """An eighth of the bytes, and as many keys as any other, or one less."""
  for total, *parts in found['held'][mode]['bytes']:
    assert parts == [total / N] * N
  keys = np.array(found['held'][mode]['keys'])  # device, layer, row
  np.testing.assert_array_equal(keys.sum(0), [[24, 3, 12]])
  assert (np.ptp(keys, axis=0) <= 1).all()


def test_a_step_sends_the_same_at_any_length(found):
  few, many = found['sent']['rooms']
  assert few == many
  kinds = [kind for _, kind in few['moves']]
  # m, and then l and o in one; the gathers are those of weights.
  assert kinds.count('all-reduce') == 2
  assert set(kinds) == {'all-reduce', 'all-gather'}
  assert all('64' in shape for shape, kind in few['moves'] if 'gather' in kind)
  assert few['traced'] == 4 * (16 + 2) * 4
  assert few['said'] == 2 * (N - 1) / N * few['traced']
  assert len(found['sent']['log']) == 2  # once for each size
  assert 'runs as tree' in found['sent']['log'][0]


def test_windows_are_the_explicit_mask(found):
  """On one device to the formula, and on eight to one device."""
  assert len(found['windows']) == 5
  for name, far in found['windows'].items():
    assert far < ROUNDING, name


@pytest.mark.parametrize('mutant', WINDOW_MUTANTS)
def test_mutants_of_windows_are_rejected(mutant, found):
  assert found['wrong windows'][mutant] > 10 * ROUNDING


def test_windows_are_read_in_silence(found):
  assert found['silent'] == []


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'contexts': [[]]}, 'contexts hold no ids'),
    ({'contexts': np.zeros((2, 3), int)}, r'windows, time\), not \(2, 3\)'),
    ({'contexts': [[[1], [11]]]}, r'contexts\[0\]\[1\] holds the id 11'),
    ({'contexts': [[1]]}, r'contexts\[0\]\[0\] must be ids'),
    ({'prefix': [11]}, 'prefix holds the id 11'),
    ({'room': 0}, 'room=0'),
    (
      {'model': LM(11, 16, 2, 'multi_head moba')},
      'chooses keys by where they stand',
    ),
    ({'model': LM(11, 16, 1, 'sliding_window')}, 'keeps a RollingKV'),
  ],
)
def test_errors_of_windows(given, message):
  given = {'model': LM(11, 16, 1), 'contexts': [[[1]]], 'room': 9} | given
  with pytest.raises(ValueError, match=message):
    contexts.read(params={'params': {}}, **given)


def test_errors_of_a_state():
  model = LM(11, 16, 1)
  state = model.init_state(2, 9)
  for prompts, message in (
    ([[1]], 'of 2 rows, and prompts are 1'),
    ([[1, 2], [3]], r'room for 9 tokens, .* are 10: make it with more'),
  ):
    with pytest.raises(ValueError, match=message):
      decode.generate(
        *(model, {'params': {}}, prompts),
        state=state,
        max_new=8,
        temperature=0,
      )


if __name__ == '__main__':
  main()
