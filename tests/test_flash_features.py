"""What may happen to scores and weights: bias, sinks, operands, dropout.

Every implementation is compared with one formula in float64 that makes t x s
arrays, for values and for the gradients of every array that is given.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, dropout, flash, tiles
from pallas_kernels.flash import Blocks, Dropout, Score, partial, plain, xla
from pallas_kernels.masks import Causal, Window
from pallas_kernels.scores import (
  POSITION,
  Difference,
  Relative,
  RelativeFactor,
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
    x = x + jnp.moveaxis(given['of_query'], 2, 1)[..., None]
    x = x - jnp.moveaxis(given['of_key'], 2, 1)[..., None, :]
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


def ours(q, k, v, *, cap=None, form='xla', blocks=None, **given):
  """The same through `flash.attention`."""
  score = factor = bias = drop = None
  if 'of_query' in given:
    numbers = (given['of_query'],), (given['of_key'],)
    score = Score(Difference(), (), *numbers)
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


def results(attend, arrays, w):
  """o and the gradients of sum(o w), by the name of the array."""

  @functools.partial(jax.jit, compiler_options=QUICK)
  def run(arrays):
    loss = lambda arrays: jnp.sum(attend(**arrays) * w)
    return {'o': attend(**arrays), **jax.grad(loss)(arrays)}

  return jax.tree.map(np.asarray, run(arrays))


def dropped():
  """What dropout multiplies each weight by, seen through values of ones."""
  q, k = jnp.zeros((B, T, H, D)), jnp.zeros((B, S, H, D))
  v = jnp.broadcast_to(jnp.eye(S)[:, None], (B, S, H, S))
  attend = functools.partial(flash.attention, implementation='plain', **PLACE)
  with_it = attend(q, k, v, dropout=Dropout(0.3, 7))
  without = attend(q, k, v)
  return np.moveaxis(np.where(without > 0, with_it / without, 0), 2, 1)


def compare(names, form, cap=None, blocks=None):
  """Where a form breaks the error rule."""
  drawn = draw()
  w = drawn['w']
  arrays = {name: drawn[name] for name in ('q', 'k', 'v', *names)}
  if 'dropped' in arrays:
    raise ValueError('not an input')
  fixed = {'cap': cap}
  naive = functools.partial(formula, **fixed)
  fast = functools.partial(ours, **fixed, form=form, blocks=blocks)
  with jax.enable_x64(True):
    wide = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    exact = results(naive, wide, w.astype(np.float64))
  naive, fast = results(naive, arrays, w), results(fast, arrays, w)
  error = lambda x, z: np.abs(x - z).max() / np.sqrt(np.mean(z**2))
  # Gradients of what scores share are sums of terms that cancel; see
  # test_core_scores.
  summed = {name: 4 for name in drawn if name not in 'qkvw'}
  return [
    f'{name}: {error(fast[name], z):.1e}, naively {error(naive[name], z):.1e}'
    for name, z in exact.items()
    if not error(fast[name], z)
    <= summed.get(name, 2) * error(naive[name], z) + 8 * EPS
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
  naive = results(
    functools.partial(formula, dropped=factor), arrays, drawn['w']
  )
  fast = functools.partial(ours, dropped=True, form=form)
  fast = results(fast, arrays, drawn['w'])
  for name, x in naive.items():
    np.testing.assert_allclose(fast[name], x, atol=3e-5)


def gradient_of_scores_by_p(rule, queries, keys, masked, extras):
  """A tile's gradient that takes weights for what the softmax made."""
  return TILE_GRADIENT(rule, queries, keys, masked, extras._replace(weights=()))


def last_bias(rule, laid, i, j):
  return CUT(rule, laid, i, 0 * j)


def deaf_sink(sinks, like):
  return SINK(jax.lax.stop_gradient(sinks), like)


TILE_GRADIENT, CUT, SINK = xla._tile_gradient, tiles.cut, partial.sink
MUTANTS = {
  'bias of another block': ('bias', tiles, 'cut', last_bias),
  'sinks without gradient': ('sinks', flash, 'sink', deaf_sink),
  'rows added twice': (
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


def test_a_gradient_without_the_factor_is_rejected(monkeypatch):
  whole = xla._tile_gradient

  def mutant(rule, *args):
    *gradients, extras = whole(rule, *args)
    return gradients[0], gradients[1], 0.9 * gradients[2], extras

  monkeypatch.setattr(xla, '_tile_gradient', mutant)
  jax.clear_caches()
  try:
    assert compare(CASES['factors of the numerator'], 'xla')
  finally:
    jax.clear_caches()


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


def loss(form, blocks, q, k, v, sinks, table):
  # Gradients of a constant scale only: a sum alone has no curvature in v.
  o = flash.attention(
    *(q, k, v),
    mask=Causal(),
    sinks=sinks,
    score=Score(Relative(), (table,)),
    softcap=3.0,
    implementation=form,
    blocks=blocks,
  )
  return jnp.sum(jnp.square(o))


def small():
  rng = np.random.default_rng(1)
  shapes = (2, 12, 4, 4), (2, 12, 2, 4), (2, 12, 2, 3), (4,), (4, 5)
  number = lambda shape: jnp.asarray(rng.normal(size=shape))
  return tuple(map(number, shapes)), tuple(map(number, shapes))


HESSIANS = {
  'forward over reverse': lambda f, x, u: jax.jvp(jax.grad(f, range(5)), x, u)[
    1
  ],
  'reverse over forward': lambda f, x, u: jax.grad(
    lambda x: jax.jvp(f, x, u)[1]
  )(x),
  'reverse over reverse': lambda f, x, u: jax.grad(
    lambda x: sum(map(jnp.vdot, jax.grad(f, range(5))(*x), u))
  )(x),
}


@pytest.mark.parametrize(
  ('form', 'mode'),
  [('xla', 'forward over reverse'), *(('plain', mode) for mode in HESSIANS)],
)
def test_second_order(form, mode):
  """Hessian-vector products in float64, against the formula in one tile."""
  with jax.enable_x64(True):
    x, u = small()
    times = jax.jit(
      lambda f, x, u: HESSIANS[mode](f, x, u),
      static_argnums=0,
      compiler_options=QUICK,
    )
    tiled = functools.partial(loss, form, Blocks(5, 4))
    whole = functools.partial(loss, 'plain', Blocks(12, 12))
    step = 1e-5
    moved = [
      jax.grad(whole, range(5))(*(a + s * step * b for a, b in zip(x, u)))
      for s in (1, -1)
    ]
    for got, plus, minus in zip(times(tiled, x, u), *moved):
      want = (plus - minus) / (2 * step)
      np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_forward_mode_belongs_to_plain():
  x, u = small()
  blocks = Blocks(5, 4)
  _, tangent = jax.jvp(functools.partial(loss, 'plain', blocks), x, u)
  gradient = jax.grad(functools.partial(loss, 'xla', blocks), range(5))(*x)
  np.testing.assert_allclose(
    tangent, sum(map(jnp.vdot, gradient, u)), rtol=1e-4
  )
  with pytest.raises(TypeError, match='forward-mode'):
    jax.jvp(functools.partial(loss, 'xla', blocks), x, u)


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
  ],
)
def test_what_does_not_fit_is_refused(given, message):
  drawn = draw()
  with pytest.raises(ValueError, match=message):
    flash.attention(drawn['q'], drawn['k'], drawn['v'], **given)


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


def test_plain_and_xla_are_two_things():
  assert plain.attend is not xla.attend
