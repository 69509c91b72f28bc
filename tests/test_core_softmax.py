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

from jaxattn.core import masks, rope, softmax
from jaxattn.core.masks import Causal, Everything, Mask, Sinks, Window
from jaxattn.core.softmax import Partial, attention, dense, finish, merge

T = 37
BLOCKS = {'block_q': 16, 'block_k': 8}

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
    x = jnp.einsum('bthd,bshd->bhts', q, k)
    x = x * (q.shape[3] ** -0.5 if scale is None else scale)
    x = x if softcap is None else softcap * jnp.tanh(x / softcap)
    x = jnp.where(seen[:, None], x, -1e30)
    p = jnp.where(seen[:, None], jnp.exp(x - x.max(-1, keepdims=True)), 0)
    total = p.sum(-1, keepdims=True)
    o = jnp.einsum('bhts,bshe->bhte', p, v) / jnp.where(total == 0, 1, total)
    o = jnp.swapaxes(o, 1, 2)
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

  return results(*arrays, data)


def error(x, exact):
  rms = np.sqrt(np.mean(np.square(exact)))
  return np.abs(np.asarray(x, np.float64) - exact).max() / (rms or 1)


def wrong(fast, naive, exact):
  """The results in which `fast` breaks the error rule."""
  eps = float(jnp.finfo(fast[0].dtype).eps)
  return [
    f'{name}: {error(x, z):.1e}, naively {error(y, z):.1e}'
    for name, x, y, z in zip(('o', 'dq', 'dk', 'dv'), fast, naive, exact)
    if not error(x, z) <= 2 * error(y, z) + eps
  ]


def draw(t=T, s=T, h=4, k=4, d=8, e=8, seed=0):
  """q, k, v and the gradient of the output."""
  rng = np.random.default_rng(seed)
  shapes = (2, t, h, d), (2, s, k, d), (2, s, k, e), (2, t, h, e)
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
  return seen


def both(**data):
  """The same data for queries and keys."""
  return {
    f'{side}_{name}': np.array(x)
    for name, x in data.items()
    for side in ('query', 'key')
  }


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
  'causal, blocks of 1': Case(Causal(), causal, blocks={'block_k': 1}),
  'window': Case(Causal() & Window(6), lambda i, j: 0 <= i - j < 6),
  'window of both sides': Case(Window(6, 3), lambda i, j: -3 < i - j < 6),
  'sinks': Case(
    Causal() & (Window(6) | Sinks(3)),
    lambda i, j: j <= i and (i - j < 6 or j < 3),
  ),
  'future, last query blind': Case(~Causal(), lambda i, j: j > i),
  'packed': Case(Causal(), causal, data=PACKED),
  'packed, one tile': Case(Causal(), causal, data=PACKED, blocks={}),
  'padded': Case(data=PADDED),
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
  'scale': Case(Causal(), causal, rule={'scale': 1.7}),
}


@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
  """Causal, but all see what is tagged as prefix."""

  def __call__(self, query, key):
    return (key.order <= query.order) | (key.tags['prefix'] == 1)

  def empty(self, query, key):
    return Causal().empty(query, key) & (key.tags_max['prefix'] == 0)

  def full(self, query, key):
    return Causal().full(query, key) | (key.tags_min['prefix'] == 1)


PREFIX = np.arange(T) < 11
CASES['prefix'] = Case(
  Prefix(),
  lambda i, j: j <= i or PREFIX[j],
  data={'key_tags': {'prefix': PREFIX}},
)


def compare(case, dtype=jnp.float32, attend=attention, arrays=None):
  """What is wrong with a case; and its results, and who saw whom."""
  arrays = [x.astype(dtype) for x in arrays or draw(**case.shape)]
  t, s = arrays[0].shape[1], arrays[1].shape[1]
  seen = who_sees_whom(case.see, t, s, case.data)
  exact = exactly(arrays, seen, **case.rule)
  naive = plain(*arrays, seen, **case.rule)
  rule = case.rule | (case.blocks if attend is attention else {})
  fast = blockwise(arrays, case.data, attend, mask=case.mask, **rule)
  return wrong(fast, naive, exact), fast, seen


@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients(name):
  broken, (o, dq, *_), seen = compare(CASES[name])
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
  assert max(error(x, y) for x, y in zip(fast, exact)) < 1e-13


def test_outlying_scores():
  q, k, v, w = draw()
  q = q.at[..., 0].set(40)
  k = k.at[..., 0].set(np.array([20, -20])[:, None, None])  # 283 and -283
  broken, _, seen = compare(CASES['causal'], arrays=(q, k, v, w))
  assert not broken
  _, lse = finish(
    attention(q, k, v, mask=Causal(), return_partial=True, **BLOCKS)
  )
  assert lse[0].min() > 100
  assert lse[1].max() < -100


@pytest.mark.parametrize('blocks', [(5, 37), (37, 5), (64, 7), (16, 16)])
def test_blocks_do_not_matter(blocks):
  blocks = dict(zip(('block_q', 'block_k'), blocks))
  assert not compare(
    dataclasses.replace(CASES['padded causal'], blocks=blocks)
  )[0]


@pytest.mark.parametrize(('t', 's'), [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(t, s):
  q, k, v, _ = draw(t=t, s=s)
  o, (dq, dk, dv) = jax.value_and_grad(
    lambda q, k, v: attention(q, k, v).sum(), (0, 1, 2)
  )(q, k, v)
  assert (o, dq.shape, dk.shape, dv.shape) == (0, q.shape, k.shape, v.shape)
  partial = attention(q, k, v, return_partial=True)
  assert partial.o.shape == (2, t, 4, 8)
  assert (finish(partial)[1] == -jnp.inf).all()


def rounded(x, *_, **__):
  return x


def one_too_wide(self, query, key):
  return query.order_min - key.order_max >= self.left - 1


def unscaled(x, y):
  m = jnp.maximum(x.m, y.m)
  return Partial(m, x.l + y.l, x.o + y.o)


def without_delta(rule, queries, keys, *args):
  *others, delta, tokens = queries
  return GRADIENT(rule, (*others, 0 * delta, tokens), keys, *args)


def own_tile_only(rule, queries, keys, *args):
  return GRADIENT(rule, queries, keys, *args[:-1], True)


GRADIENT = softmax._tile_gradient
MUTANTS = {
  'padding is seen': ('everything', softmax, '_one_segment', lambda x: x),
  'partials not rescaled': ('everything', softmax, 'merge', unscaled),
  'no do . o in the gradient': (
    'everything',
    softmax,
    '_tile_gradient',
    without_delta,
  ),
  'do . o of one tile only': (
    'everything',
    softmax,
    '_tile_gradient',
    own_tile_only,
  ),
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
