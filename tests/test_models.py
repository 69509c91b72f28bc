"""The language model: patterns of mechanisms, states, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn
from jaxattn.mixer import Context
from jaxattn.models import pattern
from jaxattn.models.lm import LM
from jaxattn.nn import Policy
from jaxattn.packing import Packing
from jaxattn.state import nbytes

SMALL = {'vocab': 11, 'width': 8, 'depth': 3, 'hidden': 16}
FIELDS = {
  'multi_head': {'heads': 2},
  'sliding_window': {'heads': 2, 'window': 3},
  'gated_linear': {'heads': 2, 'rank': 2},
  'delta_net': {'heads': 2},
  's4d': {'modes': 2},
}


def fields(*names):
  return {name: FIELDS[name] for name in names}


@pytest.mark.parametrize(
  ('text', 'depth', 'layers'),
  [
    ('a', 3, 'aaa'),
    ('a b', 5, 'ababa'),
    ('3:1 a b', 6, 'aaabaa'),
    ('1:2 a b', 3, 'abb'),
    (['a', 'c', 'b'], 3, 'acb'),
  ],
)
def test_patterns(text, depth, layers):
  assert ''.join(pattern.layers(text, depth)) == layers


@pytest.mark.parametrize(
  ('text', 'depth', 'message'),
  [
    ('', 2, 'empty'),
    ('a', 0, 'depth=0'),
    ('3:1 a', 4, '2 numbers for 1'),
    ('3:x a b', 4, 'not a ratio'),
    ('0:1 a b', 4, 'not a ratio'),
    (['a'], 2, '1 mechanisms are listed for depth=2'),
  ],
)
def test_patterns_that_cannot_be(text, depth, message):
  with pytest.raises(ValueError, match=message):
    pattern.layers(text, depth)


@pytest.mark.parametrize(
  'layers', ['a', 'aaaa', 'aabaaba', 'abc', 'aaabb', 'abab', 'aabb', 'abcc']
)
def test_groups_cover_the_layers(layers):
  groups = pattern.groups(layers)
  assert ''.join(''.join(unit) * n for unit, n in groups) == layers


def test_groups_loop_over_what_repeats():
  assert pattern.groups('aab' * 4) == ((('a', 'a', 'b'), 4),)
  assert pattern.groups('aaaa') == ((('a',), 4),)


@pytest.mark.parametrize('mixer', ['multi_head', '2:1 gated_linear multi_head'])
def test_scan_and_remat_change_nothing(mixer):
  """A scanned model equals the same layers listed in a way that unrolls."""
  names = pattern.layers(mixer, 3)
  model = LM(**SMALL, mixer=mixer, mechanisms=fields(*set(names)))
  ids = jax.random.randint(jax.random.key(0), (2, 7), 0, 11)
  variables = jax.jit(model.init)(jax.random.key(1), ids)

  def loss(model):
    return jax.jit(
      jax.value_and_grad(lambda v: jnp.mean(model.apply(v, ids).logits ** 2))
    )(variables)

  value, grads = loss(model)
  again, remat = loss(model.clone(remat=True))
  assert np.allclose(value, again, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(remat)):
    assert np.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
  'mixer', ['s4d delta_net sliding_window', 'gated_linear']
)
def test_a_stream_in_chunks(mixer):
  names = pattern.layers(mixer, 3)
  model = LM(**SMALL, mixer=mixer, mechanisms=fields(*set(names)))
  ids = jax.random.randint(jax.random.key(0), (2, 9), 0, 11)
  variables = jax.jit(model.init)(jax.random.key(1), ids)
  whole = jax.jit(model.apply)(variables, ids).logits

  @jax.jit
  def in_chunks(variables, ids):
    state = model.init_state(2, 9)
    first, state = model.apply(
      variables, ids[:, :4], state=state, return_state=True
    )
    second, state = model.apply(
      variables, ids[:, 4:], state=state, return_state=True
    )
    return first, second, state

  first, second, state = in_chunks(variables, ids)
  assert np.allclose(np.concatenate([first, second], 1), whole, atol=1e-5)
  counters = 3 * 2 * 2 * 4  # layers, rows, order and segment of the clock
  assert nbytes(state) - counters == 2 * model.state_bytes(9)


def test_packed_rows_and_bfloat16():
  policy = Policy(dtype='bfloat16')
  model = LM(**SMALL, mixer='multi_head', policy=policy)
  ids = jax.random.randint(jax.random.key(0), (2, 6), 0, 11)
  variables = jax.jit(model.init)(jax.random.key(1), ids)
  kinds = {leaf.dtype.name for leaf in jax.tree.leaves(variables)}
  assert kinds == {'float32'}
  packing = Packing.from_segments([[1, 1, 1, 2, 2, 2]] * 2)
  logits = jax.jit(model.apply)(variables, ids, packing).logits
  assert logits.dtype == jnp.float32
  alone = jax.jit(model.apply)(variables, ids[:, 3:]).logits
  assert np.allclose(logits[:, 3:], alone, atol=0.02)


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    ({'mixer': 'mult_head'}, 'Did you mean multi_head'),
    (
      {'mixer': 'multi_head', 'mechanisms': {'multi_head': {'causal': False}}},
      'is not causal.*Mechanisms that are causal: .*delta_net',
    ),
    (
      {'mixer': 'multi_head', 'mechanisms': {'multi_head': {'heads': 3}}},
      'does not divide by heads=3',
    ),
    (
      {'mixer': 'multi_head', 'mechanisms': {'multihead': {'heads': 2}}},
      'no layer uses. Did you mean multi_head',
    ),
  ],
)
def test_refused_when_built(config, message):
  with pytest.raises(ValueError, match=message):
    LM(**SMALL, **config)


def test_mixers_refuse_what_does_not_fit():
  mixer = jaxattn.make('multi_head', width=8, heads=2)
  x = jnp.ones((2, 3, 8))
  variables = mixer.init(jax.random.key(0), x)
  call = lambda x, *args, **kw: mixer.apply(variables, x, *args, **kw)
  with pytest.raises(ValueError, match='batch, time, width'):
    call(x[0])
  with pytest.raises(ValueError, match='width 4'):
    call(x[..., :4])
  with pytest.raises(ValueError, match='packing is for'):
    call(x, Packing.dense(2, 4))
  with pytest.raises(ValueError, match='share a segment and an order'):
    call(x, Packing(jnp.zeros((2, 3), int), jnp.ones((2, 3), int)))
  with pytest.raises(ValueError, match='does not start at order 0'):
    call(
      x,
      Packing(
        jnp.arange(3)[None] + jnp.zeros((2, 1), int), jnp.array([[1, 2, 2]] * 2)
      ),
    )
  with pytest.raises(ValueError, match='a state of 1'):
    call(x, state=mixer.init_state(1, 4))
  with pytest.raises(ValueError, match='takes no context'):
    jaxattn.make('gated_linear').init(jax.random.key(0), x, context=Context(x))
  with pytest.raises(ValueError, match='no decoding state'):
    jaxattn.make('multi_head', width=8, causal=False).init_state(1, 4)
  with pytest.raises(ValueError, match='width='):
    jaxattn.make('multi_head').init_state(1, 4)


@pytest.mark.parametrize('name', jaxattn.names())
def test_empty_inputs_and_one_token(name):
  mixer = jaxattn.make(name, width=12, **jaxattn.spec(name).examples[0])
  x = jax.random.normal(jax.random.key(0), (2, 1, 12))
  # Weights that mean nothing: to compile how they are drawn takes the longest.
  shapes = jax.eval_shape(mixer.init, jax.random.key(1), x[:, :0])
  assert shapes == jax.eval_shape(mixer.init, jax.random.key(1), x)
  variables = jax.tree.map(lambda x: jnp.full(x.shape, 0.1, x.dtype), shapes)
  assert mixer.apply(variables, x[:, :0]).y.shape == (2, 0, 12)
  call = functools.partial(mixer.apply, return_state=True)
  y, state = jax.jit(call)(variables, x)
  same, after = mixer.apply(variables, x[:, :0], state=state, return_state=True)
  assert same.shape == (2, 0, 12)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after)):
    assert np.array_equal(a, b)
  assert np.all(np.isfinite(y))
