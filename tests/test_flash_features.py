"""What may happen to scores and weights: bias, sinks, operands, dropout.

Every implementation is compared with one formula in float64 that makes t x s
arrays, for values and for the gradients of every array that is given.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core import sigmoid
from pallas_kernels import dispatch, dropout, flash, problem, tiles
from pallas_kernels.flash import Blocks, Dropout, Score, partial
from pallas_kernels.masks import (
  BlockCausal,
  Causal,
  Mask,
  Prefix,
  Sinks,
  Window,
)
from pallas_kernels.scores import (
  POSITION,
  Difference,
  Relative,
  RelativeFactor,
  Slopes,
)

B, T, S, H, K, D, E = 4, 29, 41, 8, 2, 8, 6
EPS = float(jnp.finfo(jnp.float32).eps)
QUICK = {'xla_backend_optimization_level': 0}
FORMS = {'xla': Blocks(16, 8), 'plain': Blocks(16, 8)}
MASK = Causal() & Window(30)
TABLE = 17  # entries of a table of distances, 4 of them ahead


def place():
  """Where tokens stand: permuted orders, documents, pads, and positions."""
  rng = np.random.default_rng(3)
  of = lambda length: np.stack([rng.permutation(length) for _ in range(B)])
  query_order, key_order = of(T) + 6, of(S)
  document = lambda order: 1 + (order > 17) - (order % 11 == 3)
  return {
    'query_order': query_order,
    'key_order': key_order,
    'query_segments': document(query_order),
    'key_segments': document(key_order),
    'query_tags': {POSITION: 2 * query_order + 1},
    'key_tags': {POSITION: 2 * key_order},
  }


PLACE = place()
BEHIND = PLACE['query_order'][:, :, None] - PLACE['key_order'][:, None, :]
FAR = 2 * BEHIND + 1  # in positions
SEEN = (BEHIND >= 0) & (BEHIND < 30)
SEEN &= PLACE['query_segments'][:, :, None] == PLACE['key_segments'][:, None]
SEEN &= PLACE['query_segments'][:, :, None] > 0
SEEN = SEEN[:, None]  # 'b 1 t s'
ENTRY = np.clip(FAR + 4, 0, TABLE - 1)


def draw(seed=0):
  rng = np.random.default_rng(seed)
  number = lambda *shape: rng.uniform(-1.7, 1.7, shape).astype(np.float32)
  return {
    'q': number(B, T, H, D),
    'k': number(B, S, K, D),
    'v': number(B, S, K, E),
    'w': number(B, T, H, E),  # the gradient of the output
    'bias': number(B, H, T, S),
    'bias of all rows': number(1, H, T, S),
    'bias of all heads': number(B, 1, T, S),
    'sinks': number(H),
    'of_query': number(B, T, H),
    'of_key': number(1, S, 1),
    'table': number(H, TABLE),
    'factors': 1.5 + number(H, TABLE) / 2,
  }


def formula(q, k, v, *, cap=None, **given):
  """o, with t x s arrays; `dropped` is what dropout multiplies weights by."""
  k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
  x = jnp.einsum('bthd,bshd->bhts', q, k) * D**-0.5
  x = x if cap is None else cap * jnp.tanh(x / cap)
  entry = lambda table: jnp.moveaxis(jnp.asarray(table)[:, ENTRY], 0, 1)
  if 'of_query' in given:
    of_query, of_key = (
      jnp.moveaxis(given[name], 2, 1) for name in ('of_query', 'of_key')
    )
    x = x + of_query[..., None] * of_key[..., None, :]
  if 'table' in given:
    x = x + entry(given['table'])
  x = x + sum(given[name] for name in given if name.startswith('bias'))
  m = jnp.max(x, -1, keepdims=True, where=SEEN, initial=-20)
  p = jnp.exp(jnp.where(SEEN, x - m, -jnp.inf))
  total = p.sum(-1, keepdims=True)
  if 'sinks' in given:
    total = total + jnp.exp(given['sinks'][:, None, None] - m)
  if 'factors' in given:
    p = p * entry(given['factors'])
  p = p * given.get('dropped', 1)
  o = jnp.einsum('bhts,bshe->bthe', p, v)
  return o / jnp.moveaxis(jnp.where(total == 0, 1, total), 2, 1)


@dataclasses.dataclass(frozen=True)
class Product:
  """x + a b. (Of x + a the gradient by a is nothing but rounding errors.)"""

  def __call__(self, x, query, key, of_query, of_key):
    return x + of_query * of_key


def ours(q, k, v, *, cap=None, form='xla', blocks=None, **given):
  """The same through `flash.attention`."""
  score = factor = bias = drop = None
  if 'of_query' in given:
    numbers = (given['of_query'],), (given['of_key'],)
    score = Score(Product(), (), *numbers)
  if 'table' in given:
    score = Score(Relative(ahead=4), (given['table'],))
  if 'factors' in given:
    factor = Score(RelativeFactor(ahead=4), (given['factors'],))
  if 'dropped' in given:
    drop = Dropout(0.3, 7)
  for name in given:
    bias = given[name] if name.startswith('bias') else bias
  return flash.attention(
    *(q, k, v),
    mask=MASK,
    **PLACE,
    softcap=cap,
    score=score,
    factor=factor,
    bias=bias,
    sinks=given.get('sinks'),
    dropout=drop,
    implementation=form,
    blocks=blocks or FORMS[form],
  )


def results(attend, arrays, *ws):
  """o and the gradients of sum(o w), by the name of the array, for each w."""

  @functools.partial(jax.jit, compiler_options=QUICK)
  def run(arrays, w):
    def loss(arrays):
      o = attend(**arrays)
      return jnp.sum(o * w), o

    grads, o = jax.grad(loss, has_aux=True)(arrays)
    return {'o': o, **grads}

  return [jax.tree.map(np.asarray, run(arrays, w)) for w in ws]


def dropped():
  """What dropout multiplies each weight by, seen through values of ones."""
  q, k = jnp.zeros((B, T, H, D)), jnp.zeros((B, S, H, D))
  v = jnp.broadcast_to(jnp.eye(S)[:, None], (B, S, H, S))
  attend = functools.partial(flash.attention, implementation='plain', **PLACE)
  with_it = attend(q, k, v, dropout=Dropout(0.3, 7))
  without = attend(q, k, v)
  return np.moveaxis(np.where(without > 0, with_it / without, 0), 2, 1)


ERROR = lambda x, z: np.abs(x - z).max() / np.sqrt(np.mean(z**2))


@functools.cache
def known(names, cap):
  """Exact results by the formula, and its errors: the same for all forms."""
  drawn = draw()
  w = drawn['w']
  arrays = {name: drawn[name] for name in ('q', 'k', 'v', *names)}
  naive = functools.partial(formula, cap=cap)
  with jax.enable_x64(True):
    wide = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    (exact,) = results(naive, wide, w.astype(np.float64))
  # By multiples of what is differentiated, gradients round differently; o does
  # not depend on it.
  scales = np.float32([1.0, 0.7, 1.3])
  draws = results(naive, arrays, *(scale * w for scale in scales))
  return exact, {'o': ERROR(draws[0]['o'], exact['o'])} | {
    name: max(
      ERROR(naive[name], scale * exact[name])
      for naive, scale in zip(draws, scales)
    )
    for name in arrays
  }


def compare(names, form, cap=None, blocks=None):
  """Where a form breaks the error rule."""
  drawn = draw()
  arrays = {name: drawn[name] for name in ('q', 'k', 'v', *names)}
  if 'dropped' in arrays:
    raise ValueError('not an input')
  exact, allowed = known(names, cap)
  fast = functools.partial(ours, cap=cap, form=form, blocks=blocks)
  (fast,) = results(fast, arrays, drawn['w'])
  # Gradients of what scores share are sums of terms that cancel; see
  # test_core_scores.
  summed = {name: 4 for name in drawn if name not in 'qkvw'}
  return [
    f'{name}: {ERROR(fast[name], z):.1e}, naively {allowed[name]:.1e}'
    for name, z in exact.items()
    if not ERROR(fast[name], z) <= summed.get(name, 2) * allowed[name] + 8 * EPS
  ]


CASES = {
  'bias': ('bias',),
  'bias of all rows': ('bias of all rows',),
  'bias of all heads': ('bias of all heads',),
  'sinks': ('sinks',),
  'numbers of queries and keys': ('of_query', 'of_key'),
  'table of distances': ('table',),
  'factors of the numerator': ('factors',),
  'all of them': ('bias', 'sinks', 'of_query', 'of_key', 'factors'),
}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('case', CASES)
def test_values_and_gradients(case, form):
  assert not compare(CASES[case], form, 2.0 if 'all' in case else None)


def test_one_tile():
  assert not compare(CASES['all of them'], 'xla', 2.0, Blocks(T, S))


@pytest.mark.parametrize('form', FORMS)
def test_dropout_is_a_constant_factor(form):
  drawn, factor = draw(), dropped()
  arrays = {name: drawn[name] for name in ('q', 'k', 'v', 'sinks')}
  (naive,) = results(
    functools.partial(formula, dropped=factor), arrays, drawn['w']
  )
  fast = functools.partial(ours, dropped=True, form=form)
  (fast,) = results(fast, arrays, drawn['w'])
  for name, x in naive.items():
    np.testing.assert_allclose(fast[name], x, atol=3e-5)


def last_bias(rule, laid, i, j):
  return CUT(rule, laid, i, 0 * j)


def deaf_sink(sinks, like):
  return SINK(jax.lax.stop_gradient(sinks), like)


CUT, SINK = tiles.cut, partial.sink
MUTANTS = {
  'bias of another block': ('bias', tiles, 'cut', last_bias),
  'sinks without gradient': ('sinks', flash, 'sink', deaf_sink),
  'gradients of keys in another block': (
    'numbers of queries and keys',
    tiles,
    'paste',
    lambda rule, totals, tile, i, j: PASTE(rule, totals, tile, i, i),
  ),
}
PASTE = tiles.paste


@pytest.mark.parametrize('name', MUTANTS)
def test_mutants_are_rejected(name, monkeypatch):
  case, *change = MUTANTS[name]
  monkeypatch.setattr(*change)
  jax.clear_caches()
  try:
    assert compare(CASES[case], 'xla')
  finally:
    jax.clear_caches()


def test_a_factor_without_gradient_is_rejected(monkeypatch):
  weighed = problem.Rule.weighed

  def mutant(self, p, query, key, extras):
    return weighed(self, p, query, key, jax.lax.stop_gradient(extras))

  monkeypatch.setattr(problem.Rule, 'weighed', mutant)
  jax.clear_caches()
  try:
    assert compare(CASES['factors of the numerator'], 'xla')
  finally:
    jax.clear_caches()


# Padding of the last blocks.


@dataclasses.dataclass(frozen=True)
class Temperature:
  """x / a, which is no number where a is 0."""

  def __call__(self, x, query, key, of_query, of_key):
    return x / (of_query * of_key)


PADDED = {  # t leaves a rest, s leaves one, both do
  'queries': (13, 16),
  'keys': (16, 13),
  'both': (13, 13),
}


def _power(x, query, key, a, b):
  return 2 * jnp.log(jnp.abs(x)) + 0 * (a + b)


@pytest.mark.parametrize('form', [*FORMS, 'sigmoid'])
@pytest.mark.parametrize('lengths', PADDED)
def test_nothing_leaks_from_the_rest_of_a_block(lengths, form):
  """Not even where scores overflow there, or divide by what there is."""
  t, s = PADDED[lengths]
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.normal(size=(1, n, 1, 4)), jnp.float32) for n in (t, s, s)
  )
  high = jnp.full((1, t, 1), 300.0), jnp.full((1, s, 1), 100.0)
  mild = jnp.full((1, t, 1), 2.0), jnp.full((1, s, 1), 0.5)
  if form == 'sigmoid':
    attend = sigmoid.attention
  else:
    attend = functools.partial(flash.attention, implementation=form)

  def gradients(fn, operands, blocks):
    def loss(q, k, v, a, b):
      o = attend(q, k, v, score=Score(fn, (), (a,), (b,)), blocks=blocks)
      return jnp.sum(jnp.sin(o))

    return jax.jit(jax.grad(loss, range(5)))(q, k, v, *operands)

  # The last has no derivative at 0, nor at any score of zeros.
  for fn, operands in (
    (Difference(), high),
    (Temperature(), mild),
    (_power, mild),
  ):
    got = gradients(fn, operands, Blocks(8, 8))
    want = gradients(fn, operands, Blocks(16, 16))
    for one, other in zip(got, want):
      np.testing.assert_allclose(one, other, atol=1e-4)


# Dropout.


def kept(drop, order=None, segments=None, **rule):
  """Which weights are kept, 'b h t s', of 2 rows, 3 heads, 64 tokens."""
  t = 64
  q = jnp.zeros((2, t, 3, 4))
  v = jnp.broadcast_to(jnp.eye(t)[:, None], (2, t, 3, t))
  order = np.arange(t) if order is None else order
  o = flash.attention(
    *(q, q, v),
    query_order=order,
    key_order=order,
    query_segments=segments,
    key_segments=segments,
    dropout=drop,
    **rule,
  )
  return np.asarray(jnp.moveaxis(o, 2, 1) > 0)


def independent(a, b):
  """Two masks of share 0.5 that agree in half of the places."""
  return abs(np.mean(a == b) - 0.5) < 0.02


def test_dropout_is_fair_and_differs_everywhere():
  got = kept(Dropout(0.5, 3))
  assert abs(got.mean() - 0.5) < 0.01
  assert np.abs(got.mean(-1) - 0.5).max() < 0.3  # each query loses some
  assert independent(got[0], got[1])
  assert independent(got[:, 0], got[:, 1])
  assert independent(got[..., 1:, :], got[..., :-1, :])
  assert independent(got[..., 1:], got[..., :-1])
  assert independent(got, np.swapaxes(got, 2, 3))
  assert independent(got, kept(Dropout(0.5, 4)))
  other = kept(Dropout(0.5, 3), segments=np.full(64, 2))
  assert independent(got, other)
  assert (kept(Dropout(0.5, 3)) == got).all()


@pytest.mark.parametrize('form', FORMS)
def test_dropout_follows_the_tokens(form):
  """The same for other blocks, another layout, a part of rows and heads."""
  got = kept(Dropout(0.5, 3))
  rule = {'implementation': form, 'blocks': Blocks(16, 24)}
  assert (kept(Dropout(0.5, 3), **rule) == got).all()
  there = np.random.default_rng(0).permutation(64)
  moved = kept(Dropout(0.5, 3), order=there, **rule)
  assert (moved == got[:, :, there][..., there]).all()
  swapped = kept(
    Dropout(0.5, 3, batch=np.array([1, 0]), heads=np.array([2, 0, 1])), **rule
  )
  assert (swapped == got[::-1][:, [2, 0, 1]]).all()


def test_a_dropout_by_place_in_the_array_is_rejected(monkeypatch):
  by_order = dropout.Dropout.score

  def by_place(self, rows, heads, query, key):
    side = lambda x: x._replace(
      side=x.side._replace(order=jnp.arange(64)[None])
    )
    return by_order(self, rows, heads, side(query), side(key))

  monkeypatch.setattr(dropout.Dropout, 'score', by_place)
  with pytest.raises(AssertionError):
    test_dropout_follows_the_tokens('xla')


def test_the_expectation_is_left_alone():
  q = jnp.zeros((1, 256, 64, 4))
  v = jnp.ones((1, 256, 64, 1))
  o = flash.attention(q, q, v, dropout=Dropout(0.25, 0))
  assert abs(float(o.mean()) - 1) < 0.003
  assert (flash.attention(q, q, v, dropout=Dropout(0.0, 0)) == 1).all()


@pytest.mark.parametrize('rate', [-0.1, 1.0])
def test_a_rate_that_is_none(rate):
  q = jnp.zeros((1, 4, 1, 4))
  with pytest.raises(ValueError, match=f'rate={rate}'):
    flash.attention(q, q, q, dropout=Dropout(rate, 0))


# Derivatives.


def loss(form, blocks, q, k, v, sinks, table, bias, gain):
  """With all that attention can do, of two halves of the keys."""
  segments = np.array([[1] * 5 + [2] * 7, [1] * 12])
  order = np.array([[*range(5), *range(7)], range(12)])
  halves = [
    flash.attention(
      *(q, k[:, part], v[:, part]),
      mask=Causal(),
      query_order=order,
      key_order=order[:, part],
      query_segments=segments,
      key_segments=segments[:, part],
      sinks=None if part.start else sinks,
      score=Score(Relative(), (table,)),
      bias=bias[..., part],
      factor=Score(lambda p, query, key, gain: p * gain, queries=(gain,)),
      dropout=Dropout(0.3, 7),
      softcap=3.0,
      implementation=form,
      blocks=blocks,
      return_partial=True,
    )
    for part in (slice(0, 7), slice(7, 12))
  ]
  o, lse = flash.finish(flash.merge(*halves))
  # Gradients of a constant scale only: a sum alone has no curvature in v.
  return jnp.sum(jnp.square(o)) + jnp.sum(jnp.sin(lse))


INPUTS = range(7)


def small():
  rng = np.random.default_rng(1)
  shapes = (2, 12, 4, 4), (2, 12, 2, 4), (2, 12, 2, 3), (4,), (4, 5)
  shapes += (2, 4, 12, 12), (2, 12, 4)
  number = lambda shape: jnp.asarray(rng.normal(size=shape))
  return tuple(map(number, shapes)), tuple(map(number, shapes))


HESSIANS = {
  'forward over reverse': lambda f, x, u: jax.jvp(jax.grad(f, INPUTS), x, u)[1],
  'reverse over forward': lambda f, x, u: jax.grad(
    lambda x: jax.jvp(f, x, u)[1]
  )(x),
  'reverse over reverse': lambda f, x, u: jax.grad(
    lambda x: sum(map(jnp.vdot, jax.grad(f, INPUTS)(*x), u))
  )(x),
}


@functools.cache
def differences():
  """Hessian-vector products by differences, of the formula in one tile."""
  x, u = small()
  whole = functools.partial(loss, 'plain', Blocks(12, 12))
  gradient = jax.jit(jax.grad(whole, INPUTS), compiler_options=QUICK)
  step = 1e-5
  plus, minus = (
    gradient(*(a + s * step * b for a, b in zip(x, u))) for s in (1, -1)
  )
  return [np.asarray(p - m) / (2 * step) for p, m in zip(plus, minus)]


@pytest.mark.parametrize(
  ('form', 'mode'),
  [('xla', 'forward over reverse'), *(('plain', mode) for mode in HESSIANS)],
)
def test_second_order(form, mode):
  """Hessian-vector products in float64."""
  with jax.enable_x64(True):
    tiled = functools.partial(loss, form, Blocks(5, 4))
    times = jax.jit(
      functools.partial(HESSIANS[mode], tiled), compiler_options=QUICK
    )
    for got, want in zip(times(*small()), differences()):
      np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_forward_mode_belongs_to_plain():
  x, u = small()
  plain, xla = (
    functools.partial(loss, form, Blocks(5, 4)) for form in ('plain', 'xla')
  )
  run = functools.partial(jax.jit, compiler_options=QUICK)
  _, tangent = run(lambda x, u: jax.jvp(plain, x, u))(x, u)
  gradient = run(jax.grad(xla, INPUTS))(*x)
  np.testing.assert_allclose(
    tangent, sum(map(jnp.vdot, gradient, u)), rtol=1e-4
  )
  with pytest.raises(TypeError, match='forward-mode'):
    run(lambda x, u: jax.jvp(xla, x, u))(x, u)


def test_reverse_over_reverse_belongs_to_plain():
  x, u = small()
  f = functools.partial(loss, 'xla', Blocks(5, 4))
  with pytest.raises(NotImplementedError, match="use implementation='plain'"):
    jax.eval_shape(functools.partial(HESSIANS['reverse over reverse'], f), x, u)


def temporary(form, t):
  """Bytes of temporaries of a gradient at t tokens."""
  x = jax.ShapeDtypeStruct((1, t, 1, 64), jnp.float32)
  f = lambda q, k, v: jnp.sum(
    flash.attention(q, k, v, mask=Causal(), implementation=form)
  )
  f = jax.jit(jax.grad(f, (0, 1, 2)), compiler_options=QUICK)
  return f.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes


def test_plain_takes_linear_memory_too():
  assert temporary('plain', 8192) < 2.1 * temporary('plain', 4096)


# Partial results, and what does not fit.


def test_partials_with_a_sink_in_one_of_them():
  drawn = draw()
  q, k, v = drawn['q'], drawn['k'], drawn['v']
  attend = functools.partial(
    flash.attention, return_partial=True, blocks=Blocks(16, 8)
  )
  halves = [
    attend(q, k[:, here], v[:, here], sinks=sinks)
    for here, sinks in (
      (slice(20), drawn['sinks']),
      (slice(20, None), None),
    )
  ]
  o, lse = flash.finish(flash.merge(*halves))
  want = flash.attention(q, k, v, sinks=drawn['sinks'])
  np.testing.assert_allclose(o, want, atol=1e-5)
  rest = flash.attention(q, k[:, :0], v[:, :0], sinks=drawn['sinks'])
  assert not rest.any()
  nothing = attend(q, k[:, :0], v[:, :0], sinks=drawn['sinks'])
  np.testing.assert_allclose(
    flash.finish(nothing)[1],
    np.broadcast_to(drawn['sinks'], lse.shape),
    rtol=1e-6,
  )


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'bias': np.zeros((B, H, T, 3))}, 'a bias must be'),
    ({'bias': np.zeros((T, S))}, 'a bias must be'),
    ({'sinks': np.zeros(3)}, 'sinks must have shape'),
    ({'score': Score(Relative(), (np.zeros(3),))}, 'lead with the 8 heads'),
    (
      {'score': Score(Difference(), (), (np.zeros((B, T)),), ())},
      'numbers of each query',
    ),
    (
      {'score': Score(Difference(), (), (), (np.zeros((B, T, H)),))},
      'numbers of each key',
    ),
    ({'implementation': 'xli'}, "Did you mean 'xla'"),
    (
      {'dropout': Dropout(0.1, 0, heads=np.arange(3))},
      'dropout: heads must have',
    ),
    ({'dropout': Dropout(0.1, 0.5)}, 'seed is one integer'),
    ({'softcap': 0.0}, 'None is for no cap'),
    ({'mask': Prefix('pre')}, r"give key_tags=\{'pre'"),
    ({'query_order': 2**40 + np.arange(T)}, 'query order must fit'),
    (
      {
        'score': Score(Slopes(), (np.ones(H),)),
        'query_tags': {POSITION: np.arange(T)},
      },
      "both have the tag 'position'",
    ),
  ],
)
def test_what_does_not_fit_is_refused(given, message):
  drawn = draw()
  with pytest.raises(ValueError, match=message):
    flash.attention(drawn['q'], drawn['k'], drawn['v'], **given)


def test_a_key_is_no_seed():
  drawn = draw()
  given = {'dropout': Dropout(0.1, jax.random.key(0))}
  with pytest.raises(ValueError, match=r'jax.random.bits\(key\)'):
    flash.attention(drawn['q'], drawn['k'], drawn['v'], **given)


class Last(Mask):
  """Wrong: n is no field, so all of them are equal."""

  def __init__(self, n):
    self.n = n


@dataclasses.dataclass(frozen=True)
class Unlike(Mask):
  """Wrong: all of them are equal."""

  n: int = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Among(Mask):
  keys: list


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'mask': None}, 'mask must be a Mask'),
    ({'mask': Causal}, 'mask must be a Mask'),
    ({'mask': Last(3)}, 'Last has n besides its fields'),
    ({'mask': Causal() & Last(3)}, 'Last has n besides its fields'),
    ({'mask': Unlike(3)}, 'Unlike has n besides its fields that are compared'),
    ({'mask': Among([1])}, 'must be hashable'),
    ({'blocks': (8, 8)}, 'blocks must be a Blocks'),
    ({'dropout': 0.1}, 'dropout must be a Dropout'),
    ({'score': lambda x, *_: x}, 'score must be a Score'),
    ({'score': Score(Relative(), [np.ones((H, 3))])}, 'are tuples'),
    ({'score': Score(Slopes(), (1.0,))}, 'must be an array, not a float'),
    ({'bias': np.ones((1, 1, T, S), bool)}, 'for a mask to say'),
    ({'query_order': np.arange(T) / 2}, 'query order must be integers'),
    ({'key_segments': np.ones(S)}, 'key segments must be integers'),
    ({'sinks': [0.0] * H}, 'sinks must be an array, not a list'),
    ({'key_tags': np.ones(S, int)}, 'key_tags must be a dict'),
  ],
)
def test_what_is_of_another_kind_is_refused(given, message):
  drawn = draw()
  with pytest.raises(TypeError, match=message):
    flash.attention(drawn['q'], drawn['k'], drawn['v'], **given)
  with pytest.raises(TypeError, match='q must be of a float type'):
    flash.attention(drawn['q'].astype(int), drawn['k'], drawn['v'])


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    (lambda x: {'scale': x}, 'scale must be a Python number.* multiply q'),
    (lambda x: {'softcap': x}, 'softcap must be a Python number.* a Score'),
    (lambda x: {'score': Score(lambda y, *_: x * y)}, 'one of the operands'),
    (
      lambda x: {'score': Score(functools.partial(lambda x, y, *_: x * y, x))},
      'one of the operands',
    ),
  ],
)
def test_what_is_static_is_not_traced(given, message):
  q, k, v = (draw()[name] for name in 'qkv')
  with pytest.raises(TypeError, match=message):
    jax.jit(lambda x: flash.attention(q, k, v, **given(x)))(2.0)


@pytest.mark.parametrize('form', FORMS)
def test_segments_below_one_are_padding(form):
  q, k, v = (draw()[name] for name in 'qkv')
  segments = lambda n, pad: np.where(np.arange(n) % 3 == 0, pad, 1)
  attend = lambda pad: flash.attention(
    *(q, k, v),
    query_segments=segments(T, pad),
    key_segments=segments(S, pad),
    implementation=form,
    blocks=FORMS[form],
  )
  assert not attend(-1)[:, ::3].any()
  np.testing.assert_array_equal(attend(-1), attend(0))


@pytest.mark.parametrize('form', FORMS)
def test_a_batch_of_none(form):
  x, none = jnp.zeros((0, T, 2, 4)), jnp.zeros((0, T), int)
  for given in (
    {},
    {'bias': jnp.zeros((1, 1, T, T)), 'softcap': 2.0},
    {'dropout': Dropout(0.1, seed=1)},
    {'query_segments': none, 'key_segments': none, 'mask': Causal()},
  ):
    attend = lambda x, given=given: flash.attention(
      x, x, x, implementation=form, blocks=FORMS[form], **given
    )
    assert jax.grad(lambda x, f=attend: f(x).sum())(x).shape == x.shape


@pytest.mark.parametrize(
  'mask',
  [
    lambda: Window(0),
    lambda: Window(3, 0),
    lambda: Window(2**33),
    lambda: Sinks(-1),
    lambda: BlockCausal(0),
    lambda: Blocks(8.5, 8),
  ],
)
def test_what_would_see_nothing_is_refused(mask):
  with pytest.raises(ValueError, match='must be'):
    mask()


def test_a_sink_of_minus_infinity_is_none():
  drawn = draw()
  attend = lambda sinks: flash.attention(
    drawn['q'], drawn['k'], drawn['v'], mask=MASK, **PLACE, sinks=sinks
  )
  none = jnp.full(H, -jnp.inf)
  np.testing.assert_allclose(attend(none), attend(None), atol=1e-6)


def test_dispatch(caplog):
  refusals = {'fast': lambda: 'no such chip', 'slow': lambda: None}
  choose = functools.partial(dispatch.choose, 'thing', refusals)
  with caplog.at_level('INFO', 'pallas_kernels.dispatch'):
    for _ in range(2):
      assert choose(None, ('fast', 'slow')) == 'slow'
  assert caplog.messages == ["thing runs as 'slow'; not fast: no such chip"]
  assert choose('slow', ()) == 'slow'
  with pytest.raises(NotImplementedError, match=r"'fast'.* no such chip"):
    choose('fast', ('slow',))
  with pytest.raises(NotImplementedError, match=r'nothing serves .*no such'):
    choose(None, ('fast',))
