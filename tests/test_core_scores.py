"""Score modifications and sigmoid attention: values and all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core import sigmoid, softmax
from pallas_kernels import problem, scores, tiles
from pallas_kernels.blocks import Blocks
from pallas_kernels.masks import Causal, Everything, Window
from pallas_kernels.scores import POSITION, Buckets, Score, Slopes

B, T, H, K, D = 2, 41, 32, 8, 8
BLOCKS = {'blocks': Blocks(16, 8)}
EPS = float(jnp.finfo(jnp.float32).eps)
# An operand's gradient is a sum of dx over many pairs that cancel (all dx of a
# query add up to 0). The formula makes do . o from the very p that it
# multiplies it with, so there the errors cancel, too.
FACTOR = {'doperand': 4}


def published_bucket(behind, buckets, furthest, causal):
  """T5's rule as published: a logarithm, rounded down."""
  offset = 0
  if not causal:
    buckets //= 2
    offset = buckets * (behind < 0)
    behind = np.abs(behind)
  behind = np.maximum(behind, 0)
  exact = buckets // 2
  far = np.log(np.maximum(behind, 1) / exact) / np.log(furthest / exact)
  far = exact + np.floor(far * (buckets - exact) + 1e-9).astype(int)
  far = np.minimum(far, buckets - 1)
  return offset + np.where(behind < exact, behind, far)


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize(('buckets', 'furthest'), [(32, 128), (8, 20)])
def test_buckets_are_those_of_t5(buckets, furthest, causal):
  behind = np.arange(-300, 300)
  got = scores.bucket(behind, buckets, furthest, causal)
  want = published_bucket(behind, buckets, furthest, causal)
  np.testing.assert_array_equal(got, want)
  assert np.max(got) == buckets - 1


# Score, the bias that it makes of 'b t s' distances, and its operands.
CASES = {
  'slopes': (Slopes(), lambda far, slopes: -slopes * np.abs(far), (H,)),
  'buckets': (
    Buckets(20, causal=False),
    lambda far, table: jnp.moveaxis(
      table[:, published_bucket(far, 8, 20, False)], 0, 1
    ),
    (H, 8),
  ),
}
WEIGHTS = {
  'softmax': lambda x, seen: jnp.where(
    seen.any(-1, keepdims=True), jax.nn.softmax(jnp.where(seen, x, -1e30)), 0
  ),
  'sigmoid': lambda x, seen: jnp.where(seen, jax.nn.sigmoid(x), 0),
}


def inputs(shape):
  """q, k, v, cotangent, operand, offset; and where tokens stand."""
  rng = np.random.default_rng(5)
  draw = lambda *shape: rng.uniform(-1.7, 1.7, shape).astype(np.float32)
  order = np.stack([rng.permutation(T) for _ in range(B)]).astype(np.int32)
  place = {
    'order': order,
    'segments': np.sort(rng.integers(0, 3, (B, T)), axis=1).astype(np.int32),
    'position': 3 * order + 1,  # other than the order
  }
  arrays = draw(B, T, H, D), draw(B, T, K, D), draw(B, T, K, D)
  return arrays, draw(B, T, H, D), draw(*shape), draw(B, T, H), place


def results(attend, arrays, cotangent):
  @functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0}
  )
  def both(*arrays):
    loss = lambda *arrays: jnp.sum(attend(*arrays) * cotangent)
    return attend(*arrays), jax.grad(loss, range(len(arrays)))(*arrays)

  return jax.tree.map(np.asarray, jax.tree.leaves(both(*arrays)))


def compare(kind, case, blocks):
  """Where the blockwise form breaks the error rule, against the formula."""
  fn, bias, shape = CASES[case]
  arrays, cotangent, operand, offset, place = inputs(shape)
  order, segments, position = place.values()
  mask = Causal() & Window(30)
  behind = order[:, :, None] - order[:, None, :]
  seen = (behind >= 0) & (behind < 30) & (segments[:, None, :] > 0)
  seen &= segments[:, :, None] == segments[:, None, :]
  far = position[:, :, None] - position[:, None, :]
  if case == 'slopes':
    far = far[:, None]

  def naive(q, k, v, operand, offset):
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    operand = operand[:, None, None] if case == 'slopes' else operand
    x = jnp.einsum('bthd,bshd->bhts', q, k) * D**-0.5 + bias(far, operand)
    if kind == 'sigmoid':
      x = x + jnp.moveaxis(offset, 2, 1)[..., None]
    p = WEIGHTS[kind](x, seen[:, None])
    return jnp.einsum('bhts,bshe->bthe', p, v)

  def fast(q, k, v, operand, offset):
    own = {'offset': offset} if kind == 'sigmoid' else {}
    engine = {'softmax': softmax, 'sigmoid': sigmoid}[kind].attention
    sides = {
      f'{side}_{name}': what
      for side in ('query', 'key')
      for name, what in (
        ('order', order),
        ('segments', segments),
        ('tags', {POSITION: position}),
      )
    }
    score = Score(fn, (operand,))
    return engine(q, k, v, mask=mask, score=score, **sides, **own, **blocks)

  arrays = (*arrays, operand, offset)
  if kind == 'softmax':  # has no offset to take a gradient by
    naive, fast = (functools.partial(f, offset=None) for f in (naive, fast))
    arrays = arrays[:-1]
  with jax.enable_x64(True):
    wide = [np.asarray(a, np.float64) for a in arrays]
    exact = results(naive, wide, np.asarray(cotangent, np.float64))
  error = lambda x, z: np.abs(x - z).max() / np.sqrt(np.mean(z**2))
  names = ('o', 'dq', 'dk', 'dv', 'doperand', 'doffset')
  rows = zip(
    names,
    results(fast, arrays, cotangent),
    results(naive, arrays, cotangent),
    exact,
  )
  return [
    f'{name}: {error(x, z):.1e}, naively {error(y, z):.1e}'
    for name, x, y, z in rows
    if not error(x, z) <= FACTOR.get(name, 2) * error(y, z) + 8 * EPS
  ]


@pytest.mark.parametrize('blocks', [BLOCKS, {}], ids=['blocks', 'one tile'])
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('kind', WEIGHTS)
def test_values_and_gradients(kind, case, blocks):
  assert not compare(kind, case, blocks)


MUTANTS = {
  'distance by order': (
    scores,
    'distance',
    lambda query, key: query.order - key.order,
  ),
  'a score without its gradient': (
    tiles,
    'by_head',
    lambda *args: jax.lax.stop_gradient(BY_HEAD(*args)),
  ),
  'heads in another order': (
    problem.Rule,
    'scored',
    lambda self, x, query, key, extras: SCORED(
      self, x, query, key, jax.tree.map(lambda a: a[::-1], extras)
    ),
  ),
}
BY_HEAD, SCORED = tiles.by_head, problem.Rule.scored


@pytest.mark.parametrize('kind', WEIGHTS)
@pytest.mark.parametrize('mutant', MUTANTS)
def test_mutants_are_rejected(mutant, kind, monkeypatch):
  monkeypatch.setattr(*MUTANTS[mutant])
  jax.clear_caches()
  try:
    assert compare(kind, 'slopes', BLOCKS)
  finally:
    jax.clear_caches()


def test_a_query_that_sees_nothing():
  q = jnp.ones((1, 20, 2, 4))
  segments = np.zeros((1, 20), np.int32)
  for blocks in ({'blocks': Blocks(8, 8)}, {}):
    attend = functools.partial(
      sigmoid.attention,
      query_segments=segments,
      key_segments=segments,
      **blocks,
    )
    o, back = jax.vjp(lambda q, attend=attend: attend(q, q, q), q)
    assert not np.any(o)
    assert not np.any(back(o + 1)[0])


def test_operands_lead_with_the_heads():
  q = jnp.ones((1, 4, 2, 4))
  with pytest.raises(ValueError, match='lead with the 2 heads'):
    softmax.attention(q, q, q, score=Score(Slopes(), (jnp.ones(3),)))


def test_sigmoid_of_everything_in_bfloat16():
  """A wide sum: bfloat16 inputs are added up in float32."""
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 300, 1, 8), 'bfloat16')
  o = sigmoid.attention(q, k, v, offset=-np.log(300), mask=Everything())
  x = jnp.einsum('bthd,bshd->bhts', *(a.astype(jnp.float32) for a in (q, k)))
  p = jax.nn.sigmoid(x * 8**-0.5 - np.log(300))
  want = jnp.einsum('bhts,bshe->bthe', p, v.astype(jnp.float32))
  assert o.dtype == jnp.bfloat16
  assert jnp.max(jnp.abs(o - want)) < 2**-8 * jnp.max(jnp.abs(want))
