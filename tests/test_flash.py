"""Blockwise softmax attention, its masks, and rotary positions.

The oracle is `plain`: the formula in a few lines, given as data a dense matrix
of who sees whom that Python fills in pair by pair. What is fast is compared
with it in float64, and may err twice as much as `plain` does in the dtype of
the inputs. `MUTANTS` break the engine in ways that this must notice.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxattn.core import rope
from pallas_kernels import masks, tiles
from pallas_kernels.flash import Blocks, Partial, attention, finish, merge, xla
from pallas_kernels.masks import (
  BlockCausal,
  Causal,
  Everything,
  Mask,
  Prefix,
  Sinks,
  Window,
)

T = 37
COPIES = 32  # draws of every two rows: one draw's largest error is a chance
BLOCKS = {'blocks': Blocks(16, 8)}
dense = functools.partial(
  attention, implementation='plain', blocks=Blocks(10**6, 10**6)
)

# Most of the time here is LLVM's; the programs are small and run once.
QUICK = {'xla_backend_optimization_level': 0}


# Values and gradients.


@functools.partial(
  jax.jit, static_argnames=('scale', 'softcap'), compiler_options=QUICK
)
def plain(q, k, v, w, seen, scale=None, softcap=None):
  """o, and the gradients of sum(o * w) by q, k and v."""

  def attend(q, k, v):
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    allowed = seen[:, None]
    x = jnp.einsum('bthd,bshd->bhts', q, k)
    x = x * (q.shape[-1] ** -0.5 if scale is None else scale)
    x = x if softcap is None else softcap * jnp.tanh(x / softcap)
    x = jnp.where(allowed, x, -1e30)
    p = jnp.where(allowed, jnp.exp(x - x.max(-1, keepdims=True)), 0)
    total = p.sum(-1, keepdims=True)
    o = jnp.einsum('bhts,bshe->bhte', p, v) / jnp.where(total == 0, 1, total)
    o = jnp.einsum('bhte->bthe', o)
    return jnp.sum(o * w), o

  gradient = jax.grad(attend, argnums=(0, 1, 2), has_aux=True)
  gradients, o = gradient(q, k, v)
  return o, *gradients


def exactly(arrays, seen, **rule):
  """`plain` in float64."""
  with jax.enable_x64(True):
    arrays = [np.asarray(x, np.float64) for x in arrays]
    return [np.asarray(x) for x in plain(*arrays, seen, **rule)]


def blockwise(arrays, data, attend=attention, **rule):
  """The same from one of ours; `data` are orders, segments and tags."""

  @functools.partial(jax.jit, compiler_options=QUICK)
  def results(q, k, v, w, data):
    def loss(q, k, v):
      o = attend(q, k, v, **data, **rule)
      return jnp.sum(o * w), o

    gradients, o = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return o, *gradients

  return results(*arrays, copied(data))


def error(x, exact, of=np.mean):
  """A draw's largest error over the RMS of the results: the mean of all draws.

  The largest of all would be one pair's out of a million: a weight that all but
  is 1, whose error is a chance of either formula.
  """
  rms = np.sqrt(np.mean(np.square(exact)))
  worst = np.abs(np.asarray(x, np.float64) - exact).reshape(COPIES, -1).max(1)
  return of(worst) / (rms or 1)


def wrong(fast, naive, exact):
  """The results in which `fast` breaks the error rule."""
  eps = float(jnp.finfo(fast[0].dtype).eps)
  return [
    f'{name}: {error(x, z):.1e}, naively {error(y, z):.1e}'
    for name, x, y, z in zip(('o', 'dq', 'dk', 'dv'), fast, naive, exact)
    if not error(x, z) <= 2 * error(y, z) + eps
    or not error(x, z, np.max) <= 4 * error(y, z, np.max) + eps
  ]


def draw(t=T, s=T, h=4, k=4, d=8, e=8, seed=0):
  """q, k, v and the gradient of the output."""
  rng = np.random.default_rng(seed)
  b = 2 * COPIES
  shapes = (b, t, h, d), (b, s, k, d), (b, s, k, e), (b, t, h, e)
  return [jnp.asarray(rng.uniform(-1.7, 1.7, x), jnp.float32) for x in shapes]


def who_sees_whom(see, t, s, data):
  """Fills in `b t s`; `see` takes two orders, and the place of each token."""
  seen = np.zeros((2, t, s), bool)
  rows = {
    name: np.broadcast_to(data.get(name, default), (2, length))
    for side, length in (('query', t), ('key', s))
    for name, default in (
      (f'{side}_order', np.arange(length)),
      (f'{side}_segments', np.ones(length, int)),
    )
  }
  for b, i, j in itertools.product(range(2), range(t), range(s)):
    one, other = rows['query_segments'][b, i], rows['key_segments'][b, j]
    if one == other != 0:
      order = int(rows['query_order'][b, i]), int(rows['key_order'][b, j])
      seen[b, i, j] = see(*order)
  return np.tile(seen, (COPIES, 1, 1))


def both(**data):
  """The same data for queries and keys."""
  return {
    f'{side}_{name}': np.array(x)
    for name, x in data.items()
    for side in ('query', 'key')
  }


def copied(data):
  """The same data for the copies of two rows; or for all, if it has no rows."""
  return jax.tree.map(
    lambda x: np.tile(x, (COPIES, 1)) if x.ndim == 2 else x, data
  )


def causal(i, j):
  return j <= i


PACKED = both(
  order=[[*range(10), *range(15), *range(12)], [*range(30), *range(7)]],
  segments=[[1] * 10 + [2] * 15 + [3] * 12, [5] * 30 + [4] * 7],
)
PADDED = both(
  segments=[[0] * 9 + [1] * 20 + [0] * 8, [1] * 11 + [0] * 10 + [1] * 16]
)
ORDERED = both(
  order=[[(7 * i) % T for i in range(T)], [(5 * i) % T for i in range(T)]]
)


@dataclasses.dataclass(frozen=True)
class Case:
  """A mask, the predicate it stands for, and the inputs to try it on."""

  mask: Mask = Everything()  # noqa: RUF009
  see: object = lambda i, j: True
  shape: dict = dataclasses.field(default_factory=dict)
  data: dict = dataclasses.field(default_factory=dict)
  rule: dict = dataclasses.field(default_factory=dict)
  blocks: dict = dataclasses.field(default_factory=lambda: BLOCKS)


CASES = {
  'everything': Case(),
  'causal': Case(Causal(), causal),
  'causal, one tile': Case(Causal(), causal, blocks={}),
  'window': Case(Causal() & Window(10), lambda i, j: 0 <= i - j < 10),
  'window of both sides': Case(Window(6, 3), lambda i, j: -3 < i - j < 6),
  'sinks': Case(
    Causal() & (Window(6) | Sinks(3)),
    lambda i, j: j <= i and (i - j < 6 or j < 3),
  ),
  'future, last query blind': Case(~Causal(), lambda i, j: j > i),
  'blocks of the order': Case(
    BlockCausal(7), lambda i, j: j // 7 <= i // 7, data=ORDERED
  ),
  'packed': Case(Causal(), causal, data=PACKED),
  'padded causal': Case(Causal(), causal, data=PADDED),
  'only keys padded': Case(data={'key_segments': PADDED['key_segments']}),
  'one row all padding': Case(
    Causal(), causal, data=both(segments=[[0] * T, [1] * T])
  ),
  'permuted': Case(
    Causal() & Window(9), lambda i, j: 0 <= i - j < 9, data=ORDERED
  ),
  'grouped queries': Case(Causal(), causal, {'k': 2}),
  'one key head': Case(Causal(), causal, {'k': 1, 'd': 6, 'e': 10}),
  'grouped, packed': Case(Causal(), causal, {'k': 2}, PACKED),
  'other lengths': Case(
    Causal(), causal, {'t': 23, 's': 41}, {'query_order': 18 + np.arange(23)}
  ),
  'one query': Case(
    Causal(), causal, {'t': 1, 's': 41}, {'query_order': np.array([[40], [17]])}
  ),
  'soft cap': Case(Causal(), causal, rule={'softcap': 1.5}),
  'scale': Case(Causal(), causal, rule={'scale': 0.5}),
}


PREFIX = np.arange(T) < 11
CASES['prefix'] = Case(
  Causal() | Prefix(),
  lambda i, j: j <= i or PREFIX[j],
  data={'key_tags': {'prefix': PREFIX}},
)
CASES['prefix, row by row'] = Case(
  *(Causal() | Prefix(), CASES['prefix'].see),
  data={'key_tags': {'prefix': np.stack([PREFIX, PREFIX])}},
)


def compare(case, dtype=jnp.float32, attend=attention, arrays=None):
  """What is wrong with a case; and its results, and who saw whom."""
  arrays = [x.astype(dtype) for x in arrays or draw(**case.shape)]
  t, s = arrays[0].shape[1], arrays[1].shape[1]
  seen = who_sees_whom(case.see, t, s, case.data)
  exact = exactly(arrays, seen, **case.rule)
  naive = plain(*arrays, seen, **case.rule)
  rule = case.rule | (case.blocks if attend is not dense else {})
  fast = blockwise(arrays, case.data, attend, mask=case.mask, **rule)
  return wrong(fast, naive, exact), fast, seen


FORMS = {
  name: functools.partial(attention, implementation=name)
  for name in ('xla', 'plain')
}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients(name, form):
  broken, (o, dq, *_), seen = compare(CASES[name], attend=FORMS[form])
  assert not broken
  blind = ~seen.any(-1)
  assert not np.asarray(o)[blind].any()
  assert not np.asarray(dq)[blind].any()


@pytest.mark.parametrize('name', ['sinks', 'grouped, packed', 'soft cap'])
def test_dense_is_the_plain_formula(name):
  assert not compare(CASES[name], attend=dense)[0]


def test_bfloat16_computes_in_float32():
  broken, fast, _ = compare(CASES['grouped, packed'], jnp.bfloat16)
  assert not broken
  assert {x.dtype for x in fast} == {jnp.dtype(jnp.bfloat16)}


def test_float64_stays_float64():
  with jax.enable_x64(True):
    _, fast, seen = compare(CASES['causal'], jnp.float64)
    exact = exactly([x.astype(np.float64) for x in draw()], seen)
  assert max(error(x, y, np.max) for x, y in zip(fast, exact)) < 1e-13


@pytest.mark.parametrize('blocks', [(16, 8), (5, 64), (16, 16)])
def test_outlying_scores(blocks):
  """Weights of the gradient are those that were summed, to the last bit."""
  q, k, v, w = draw()
  q = q.at[..., 0].set(40)
  k = k.at[::2, :, :, 0].set(20).at[1::2, :, :, 0].set(-20)  # 283 and -283
  blocks = {'blocks': Blocks(*blocks)}
  case = dataclasses.replace(CASES['causal'], blocks=blocks)
  assert not compare(case, arrays=(q, k, v, w))[0]
  _, lse = finish(
    attention(q, k, v, mask=Causal(), return_partial=True, **blocks)
  )
  assert lse[::2].min() > 100
  assert lse[1::2].max() < -100


@pytest.mark.parametrize('blocks', [(5, 64), (64, 1)])
def test_blocks_do_not_matter(blocks):
  blocks = {'blocks': Blocks(*blocks)}
  assert not compare(
    dataclasses.replace(CASES['padded causal'], blocks=blocks)
  )[0]


@pytest.mark.parametrize(('t', 's'), [(0, 5), (5, 0)])
def test_no_queries_or_no_keys(t, s):
  q, k, v, w = draw(t=t, s=s)
  results = blockwise((q, k, v, w), {})
  assert [x.shape for x in results] == [x.shape for x in (w, q, k, v)]
  assert not any(x.any() for x in results)
  partial = attention(q, k, v, return_partial=True)
  assert (finish(partial)[1] == -jnp.inf).all()


def one_too_wide(self, query, key):
  return query.order_min - key.order_max >= self.left - 1


def unscaled(x, y):
  m = jnp.maximum(x.m, y.m)
  return Partial(m, x.l + y.l, x.o + y.o)


def without_delta(rule, queries, keys, *args):
  *others, delta, tokens = queries
  return GRADIENT(rule, (*others, 0 * delta, tokens), keys, *args)


GRADIENT = xla._tile_gradient
MUTANTS = {
  'padding is seen': ('everything', tiles, 'one_segment', lambda x: x),
  'partials not rescaled': ('everything', xla, 'merge', unscaled),
  'no do . o': ('everything', xla, '_tile_gradient', without_delta),
  'window skips too much': ('window', Window, 'empty', one_too_wide),
  'diagonal taken as full': (
    'causal',
    Causal,
    'full',
    lambda self, query, key: key.order_min <= query.order_max,
  ),
}


@pytest.mark.parametrize('name', MUTANTS)
def test_mutants_are_rejected(name, monkeypatch):
  case, *change = MUTANTS[name]
  monkeypatch.setattr(*change)
  jax.clear_caches()
  try:
    assert compare(CASES[case])[0]
  finally:
    jax.clear_caches()


# Partial results.


def from_halves(attend, q, k, v, **rule):
  """Attention to the keys in two parts, the second shorter; and the lse."""
  cut = 20
  order = {'query_order': np.arange(T)}
  parts = [
    attend(
      q,
      k[:, here],
      v[:, here],
      key_order=np.arange(T)[here],
      return_partial=True,
      **order,
      **rule,
    )
    for here in (slice(cut), slice(cut, None))
  ]
  return finish(merge(*parts))


def whole(attend, q, k, v, **rule):
  return finish(attend(q, k, v, return_partial=True, **rule))


def with_lse(form, attend, arrays, **rule):
  """o, lse, and gradients that flow through both."""

  @functools.partial(jax.jit, compiler_options=QUICK)
  def results(q, k, v, w):
    def loss(q, k, v):
      o, lse = form(attend, q, k, v, mask=Causal(), **rule)
      return jnp.sum(o * w) + jnp.sum(lse * w[..., 0]), (o, lse)

    gradients, (o, lse) = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return o, *gradients, lse

  return results(*arrays)


def compare_halves():
  arrays = draw(k=2)
  with jax.enable_x64(True):
    exact = [np.asarray(x, np.float64) for x in arrays]
    exact = with_lse(whole, dense, [jnp.asarray(x) for x in exact])
  naive = with_lse(whole, dense, arrays)
  fast = with_lse(from_halves, attention, arrays, **BLOCKS)
  eps = float(jnp.finfo(jnp.float32).eps)
  return [
    (error(x, np.asarray(z)), error(y, np.asarray(z)))
    for x, y, z in zip(fast, naive, exact)
    if not error(x, np.asarray(z)) <= 2 * error(y, np.asarray(z)) + eps
  ]


def test_halves_of_the_keys_make_the_whole():
  assert not compare_halves()


def test_a_gradient_that_forgets_the_lse_is_rejected(monkeypatch):
  backward = xla.backward
  monkeypatch.setattr(
    xla, 'backward', lambda *args: backward(*args[:-1], 0 * args[-1])
  )
  assert compare_halves()


@st.composite
def partials(draw):
  """Partials `b t h` of one shape, some of them empty; l >= 1, as l is."""
  size = 6
  floats = functools.partial(st.floats, width=32)
  numbers = lambda *bounds: np.array(
    draw(st.lists(floats(*bounds), min_size=size, max_size=size))
  ).reshape(1, size, 1)
  full = np.array(
    draw(st.lists(st.booleans(), min_size=size, max_size=size))
  ).reshape(1, size, 1)
  m = np.where(full, numbers(-1000, 1000), -np.inf)
  return Partial(m, full * numbers(1, 50), (full * numbers(-5, 5))[..., None])


def apart(x, y):
  """How far apart two partials are, as attention and lse."""
  distances = [
    np.where(a == b, 0, np.abs(a - b) / (1 + np.abs(b)))
    for a, b in zip(finish(x), finish(y))
  ]
  return max(np.max(d) for d in distances)


def shifted(x, c):
  return Partial(x.m + c, x.l * np.exp(-c), x.o * np.exp(-c))


def broken_laws(merge, x, y, z):
  """The laws of the monoid that `merge` breaks."""
  with jax.enable_x64(True), np.errstate(invalid='ignore'):
    x, y, z = (jax.tree.map(jnp.asarray, p) for p in (x, y, z))
    none = Partial(jnp.full_like(x.m, -jnp.inf), 0 * x.l, 0 * x.o)
    pairs = {
      'commutative': (merge(x, y), merge(y, x)),
      'associative': (merge(merge(x, y), z), merge(x, merge(y, z))),
      'empty is neutral': (merge(none, x), x),
      'm is a reference only': (merge(shifted(x, 3.0), y), merge(x, y)),
    }
    return [law for law, pair in pairs.items() if not apart(*pair) < 1e-12]


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(partials(), partials(), partials())
def test_partials_are_a_commutative_monoid(x, y, z):
  assert not broken_laws(merge, x, y, z)


def unsafe(x, y):
  m = jnp.maximum(x.m, y.m)
  a, b = jnp.exp(x.m - m), jnp.exp(y.m - m)
  o = a[..., None] * x.o + b[..., None] * y.o
  return Partial(m, a * x.l + b * y.l, o)


@pytest.mark.parametrize('mutant', [unscaled, unsafe, lambda x, y: x])
def test_broken_merges_are_rejected(mutant):
  one = np.ones((1, 2, 1))
  x = Partial(
    np.array([[[-np.inf], [2]]]), one * [[[0], [1]]], one[..., None] * 0
  )
  y = Partial(
    np.array([[[-np.inf], [1]]]), one * [[[0], [3]]], one[..., None] * 0
  )
  y.o[0, 1] = 5
  assert broken_laws(mutant, x, y, y)


def test_nothing_seen_has_no_gradient():
  none = Partial(
    jnp.full((1, 2, 1), -jnp.inf), jnp.zeros((1, 2, 1)), jnp.zeros((1, 2, 1, 3))
  )

  @jax.jit
  def loss(total, o):
    x = Partial(none.m, total, o)
    o, lse = finish(merge(x, merge(none, x)))
    return jnp.sum(o) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0))

  for gradient in jax.grad(loss, (0, 1))(none.l, none.o):
    assert not gradient.any()


# Work and memory.


@dataclasses.dataclass(frozen=True)
class Counted(Mask):
  """Counts the tiles that are evaluated."""

  mask: Mask
  judged: bool = True

  def __call__(self, query, key):
    jax.debug.callback(lambda: VISITS.append(1))
    return self.mask(query, key)

  def empty(self, query, key):
    return self.mask.empty(query, key) if self.judged else np.False_


@dataclasses.dataclass(frozen=True)
class Filled(Counted):
  """And knows which tiles are full, if it is judged."""

  def full(self, query, key):
    return self.mask.full(query, key) if self.judged else np.False_


VISITS = []


ALIGNED = both(
  segments=np.repeat([1, 2], [96, 32]),
  order=np.concatenate([np.arange(96), np.arange(32)]),
)


@pytest.mark.parametrize(
  ('judged', 'data'),
  [(True, {}), (True, ALIGNED), (False, {})],
  ids=['one segment', 'two segments', 'mutant'],
)
def test_empty_tiles_are_skipped(judged, data):
  arrays = draw(t=128, s=128, h=1, k=1)
  mask = Counted(Causal() & (Window(20) | Sinks(3)), judged)
  VISITS.clear()
  blockwise(arrays, data, mask=mask, **BLOCKS)
  jax.effects_barrier()
  seen = who_sees_whom(
    lambda i, j: j <= i and (i - j < 20 or j < 3), 128, 128, data
  )
  needed = seen[0].reshape(8, 16, 16, 8).any((1, 3)).sum()
  # The tiles are visited once forward and once backward.
  assert (len(VISITS) == 2 * needed) == judged


@pytest.mark.parametrize('judged', [True, False], ids=['judged', 'mutant'])
def test_full_tiles_are_not_masked(judged):
  VISITS.clear()
  arrays = draw(t=128, s=128, h=1, k=1)
  blockwise(arrays, {}, mask=Filled(Causal(), judged), **BLOCKS)
  jax.effects_barrier()
  seen = who_sees_whom(causal, 128, 128, {})[0].reshape(8, 16, 16, 8)
  some, every = seen.any((1, 3)), seen.all((1, 3))
  # Once forward and once backward; an empty tile is asked for by neither.
  assert (len(VISITS) == 2 * (some & ~every).sum()) == judged


def test_skipped_tiles_are_not_read():
  q, k, v, _ = draw(t=1, s=64)
  v = v.at[:, :40].set(jnp.nan)
  mask = Causal() & Window(16)
  run = functools.partial(
    attention, mask=mask, query_order=np.array([63]), blocks=Blocks(k=8)
  )
  assert jnp.isfinite(run(q, k, v)).all()
  v = v.at[:, 63].set(jnp.nan)
  assert jnp.isnan(run(q, k, v)).all()


def memory(attend, t, gradient):
  x = jax.ShapeDtypeStruct((1, t, 1, 64), jnp.float32)
  f = lambda q, k, v: attend(q, k, v, mask=Causal())
  if gradient:
    f = jax.grad(lambda *args, f=f: f(*args).sum(), (0, 1, 2))
  f = jax.jit(f, compiler_options=QUICK)
  return f.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize('gradient', [False, True])
def test_memory_is_linear(gradient):
  short, long = (memory(attention, t, gradient) for t in (8192, 16384))
  assert long < 2.1 * short
  short, much = (memory(dense, t, gradient) for t in (8192, 16384))
  assert much > 3.9 * short
  assert long < much / 60


# Where it runs.


def test_under_transformations():
  def results(q, k, v, w, data):
    @jax.checkpoint
    def loss(q, k, v):
      o = attention(q, k, v, mask=Causal(), **data, **BLOCKS)
      return jnp.sum(o * w), o

    gradients, o = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return o, *gradients

  def one_row(row):
    row = jax.tree.map(lambda x: x[None], row)
    return jax.tree.map(lambda x: x[0], results(*row))

  auto = (jax.sharding.AxisType.Auto,)
  forms = {
    'vmap': lambda *rows: jax.vmap(one_row)(rows),
    'scan': lambda *rows: jax.lax.map(one_row, rows),
    'shard_map': jax.shard_map(
      results,
      mesh=jax.make_mesh((1,), ('data',), axis_types=auto),
      in_specs=jax.P('data'),
      out_specs=jax.P('data'),
    ),
  }
  arrays, data = draw(), jax.tree.map(jnp.asarray, copied(PACKED))
  seen = who_sees_whom(causal, T, T, PACKED)
  exact, naive = exactly(arrays, seen), plain(*arrays, seen)
  for name, form in forms.items():
    fast = jax.jit(form, compiler_options=QUICK)(*arrays, data)
    assert not wrong(fast, naive, exact), name


def test_dense_has_forward_mode():
  q, k, v, w = draw(t=5, s=5)
  f = jax.jit(functools.partial(dense, mask=Causal()))
  _, tangent = jax.jvp(f, (q, k, v), (k, v, q))
  gradients = jax.vjp(f, q, k, v)[1](w)
  paired = sum(jnp.sum(x * y) for x, y in zip(gradients, (k, v, q)))
  np.testing.assert_allclose(jnp.sum(tangent * w), paired, rtol=1e-5)


def zeros(*shape):
  return jnp.zeros(shape)


@pytest.mark.parametrize(
  ('shapes', 'rule', 'message'),
  [
    (((1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8)), {}, '3 query heads .* 2 key'),
    (((1, 4, 2, 8), (1, 4, 2, 6), (1, 4, 2, 8)), {}, r'\(1, 4, 2, 6\)'),
    (((1, 4, 2, 8), (2, 4, 2, 8), (2, 4, 2, 8)), {}, r'\(2, 4, 2, 8\)'),
    (((1, 4, 2, 8), (1, 5, 2, 8), (1, 4, 2, 8)), {}, r'\(1, 5, 2, 8\)'),
    (
      ((1, 4, 2, 8),) * 3,
      {'query_order': np.arange(5)},
      r'query order .* not \(1, 5\)',
    ),
    (
      ((1, 4, 2, 8),) * 3,
      {'key_segments': np.ones((2, 4), int)},
      r'key segments .* not \(2, 4\)',
    ),
  ],
)
def test_what_does_not_fit_is_refused(shapes, rule, message):
  with pytest.raises(ValueError, match=message):
    attention(*(zeros(*shape) for shape in shapes), **rule)


@pytest.mark.parametrize('sides', [(0, 8), (8, -2)])
def test_blocks_hold_something(sides):
  with pytest.raises(ValueError, match=f'at least 1, not {min(sides)}'):
    Blocks(*sides)


# Masks.


def span(start, length):
  return np.arange(start, start + length, dtype=np.int32)


def misjudged(mask, exactly=False):
  """Tiles of consecutive orders that a mask judges wrongly."""
  wrong = []
  for i, j, t, s in itertools.product(range(14), range(14), (1, 4), (1, 3)):
    q, k = span(i, t), span(j, s)
    ranges = [masks.Range(x.min(), x.max()) for x in (q, k)]
    seen = np.broadcast_to(
      mask(masks.Side(q[:, None]), masks.Side(k[None])), (t, s)
    )
    empty, full = (bool(judge(*ranges)) for judge in (mask.empty, mask.full))
    sound = empty <= (not seen.any()) and full <= seen.all()
    exact = empty == (not seen.any()) and full == seen.all()
    if not (exact if exactly else sound):
      wrong.append((q, k, empty, full))
  return wrong


LEAVES = [
  Everything(),
  Causal(),
  Window(3),
  Window(5, 2),
  Sinks(4),
  BlockCausal(3),
]


@pytest.mark.parametrize('mask', LEAVES, ids=repr)
def test_masks_judge_tiles_exactly(mask):
  assert not misjudged(mask, exactly=True)


@pytest.mark.parametrize(
  'mask',
  [
    Causal() & Window(3),
    Causal() & (Window(3) | Sinks(2)),
    ~Causal() | Window(2, 2),
    ~(Causal() & ~Sinks(3)),
  ],
  ids=repr,
)
def test_combined_masks_judge_tiles_soundly(mask):
  assert not misjudged(mask)
  ranges = masks.Range(8, 9), masks.Range(8, 9)
  assert not (mask.empty(*ranges) and mask.full(*ranges))


def misjudged_tags(mask):
  """Tags of a block of keys that a mask judges wrongly."""
  query, order = masks.Side(span(0, 1)[:, None]), span(0, 3)
  wrong = []
  for tags in itertools.product((-1, 0, 2), repeat=3):
    tags = np.array(tags)
    seen = mask(query, masks.Side(order[None], {'prefix': tags[None]}))
    keys = masks.Range(0, 2, {'prefix': tags.min()}, {'prefix': tags.max()})
    ranges = masks.Range(0, 0), keys
    if (
      mask.empty(*ranges) > (not seen.any()) or mask.full(*ranges) > seen.all()
    ):
      wrong.append(tags)
  return wrong


def test_masks_judge_tags():
  assert not misjudged_tags(Prefix())
  assert not misjudged_tags(~Prefix())
  some = lambda _, q, k: k.tags_max['prefix'] != 0
  assert misjudged_tags(mutant(Prefix(), full=some))
  first = lambda _, q, k: k.tags_min['prefix'] == 0
  assert misjudged_tags(mutant(Prefix(), empty=first))


def mutant(mask, **methods):
  """An instance of a class like that of `mask`, with some methods replaced."""
  cls = type('Mutant', (type(mask),), methods)
  return cls(
    **{f.name: getattr(mask, f.name) for f in dataclasses.fields(mask)}
  )


@pytest.mark.parametrize(
  'mask',
  [
    mutant(Causal(), empty=lambda _, q, k: k.order_min >= q.order_max),
    mutant(Causal(), full=lambda _, q, k: k.order_max <= q.order_min + 1),
    mutant(Window(3), empty=lambda _, q, k: q.order_min - k.order_max >= 2),
    mutant(Window(3), full=lambda _, q, k: q.order_max - k.order_min <= 3),
    mutant(Window(5, 2), empty=lambda _, q, k: k.order_min - q.order_max >= 1),
    mutant(Sinks(4), empty=lambda _, q, k: k.order_min >= 3),
    mutant(Sinks(4), full=lambda _, q, k: k.order_max <= 4),
    mutant(BlockCausal(3), empty=lambda _, q, k: k.order_min > q.order_max),
    mutant(BlockCausal(3), full=lambda _, q, k: k.order_max <= q.order_max),
    mutant(~Causal(), empty=lambda self, q, k: self.mask.empty(q, k)),
    mutant(
      Causal() | Sinks(2),
      empty=lambda self, q, k: self.left.empty(q, k) | self.right.empty(q, k),
    ),
    mutant(
      Causal() & Sinks(2),
      full=lambda self, q, k: self.left.full(q, k) | self.right.full(q, k),
    ),
  ],
  ids=repr,
)
def test_masks_that_misjudge_are_rejected(mask):
  assert misjudged(mask)


def test_masks_combine_as_booleans():
  q, k = masks.Side(span(0, 9)[:, None]), masks.Side(span(0, 9)[None])
  a, b = Causal(), Window(3, 2)
  np.testing.assert_array_equal((a & b)(q, k), a(q, k) & b(q, k))
  np.testing.assert_array_equal((a | b)(q, k), a(q, k) | b(q, k))
  np.testing.assert_array_equal((~a)(q, k), ~a(q, k))
  i, j = span(0, 9)[:, None], span(0, 9)[None]
  np.testing.assert_array_equal(a(q, k), j <= i)
  np.testing.assert_array_equal(b(q, k), (i - j < 3) & (j - i < 2))
  np.testing.assert_array_equal(Sinks(2)(q, k), (j < 2) & (i >= 0))
  assert Everything()(q, k).shape == (9, 9)
  assert hash(a & b) == hash(Causal() & Window(3, 2))
  assert a & b == Causal() & Window(3, 2) != b & a


def misjudged_segments(judge):
  """Random tiles with padding and packing that `judge` gets wrong."""
  rng = np.random.default_rng(0)
  orders = rng.integers(0, 9, (2, 400, 1)) + rng.integers(0, 4, (2, 400, 4))
  segments = rng.integers(1, 3, (2, 400, 1)) + (rng.random((2, 400, 4)) < 0.05)
  segments *= rng.random((2, 400, 4)) < 0.9
  sides = [
    masks.Tokens(masks.Side(jnp.asarray(o, jnp.int32), {}), jnp.asarray(g))
    for o, g in zip(orders, segments)
  ]
  at = lambda axis: lambda x: jnp.expand_dims(x, axis)
  query, key = jax.tree.map(at(2), sides[0]), jax.tree.map(at(1), sides[1])
  seen = masks.sees(Causal(), query, key)
  empty, full = judge(Causal(), *(masks.extent(x) for x in sides))
  assert empty.any()
  assert full.any()
  return bool(
    (empty & seen.any((1, 2))).any() | (full & ~seen.all((1, 2))).any()
  )


def test_tiles_are_judged_by_segments_too():
  assert not misjudged_segments(masks.judge)
  assert misjudged_segments(
    lambda mask, q, k: (
      mask.empty(q.range, k.range),
      mask.full(q.range, k.range),
    )
  )


# Rotary positions.


def scores(rotate, positions, shift):
  q, k, *_ = draw(t=5, s=5)
  q, k = rotate(q, positions + shift), rotate(k, positions + shift)
  return jnp.einsum('bthd,bshd->bhts', q, k)


def test_rotation_leaves_differences_only():
  positions = copied(np.array([[0, 1, 5, 2, 30], [3, 3, 0, 9, 4]]))
  kept = scores(rope.rotate, positions, 0)
  np.testing.assert_allclose(
    scores(rope.rotate, positions, 77), kept, atol=1e-4
  )

  def half_angle(x, positions):  # of one of the two: no difference is left
    return rope.rotate(x, positions) + x

  moved = scores(half_angle, positions, 77) - scores(half_angle, positions, 0)
  assert np.abs(moved).max() > 0.1


def test_rotation_is_the_published_one():
  q, *_ = draw(t=5)
  positions = copied(np.array([[0, 1, 5, 2, 30], [3, 3, 0, 9, 4]]))
  x = np.asarray(q, np.float64)
  pairs = x[..., :4] + 1j * x[..., 4:]
  angles = positions[..., None, None] * 10000.0 ** (-np.arange(4) / 4)
  turned = pairs * np.exp(1j * angles)
  expected = np.concatenate([turned.real, turned.imag], -1)
  np.testing.assert_allclose(rope.rotate(q, positions), expected, atol=1e-5)
  with jax.enable_x64(True):
    exact = rope.rotate(jnp.asarray(x), positions)
    np.testing.assert_allclose(exact, expected, atol=1e-14)
  unmoved = rope.rotate(q, np.zeros(5, int))
  np.testing.assert_array_equal(unmoved, q)
  assert rope.rotate(q.astype(jnp.bfloat16), positions).dtype == jnp.bfloat16


def test_rotation_of_some_channels():
  q, *_ = draw(t=5)
  positions = np.arange(5)
  some = rope.rotate(q, positions, width=6, base=100.0)
  np.testing.assert_array_equal(some[..., 6:], q[..., 6:])
  alone = rope.rotate(q[..., :6], positions, base=100.0)
  np.testing.assert_array_equal(some[..., :6], alone)
  for width in (0, 3, 10, -2):
    with pytest.raises(ValueError, match=f'rotary width {width} .* 8'):
      rope.rotate(q, positions, width=width)
