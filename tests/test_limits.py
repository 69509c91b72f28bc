"""Limits that the theory gives: where one mechanism must become another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn
from jaxattn import registry
from jaxattn.core import delta, recurrence
from tests.laws import assert_close

WIDTH, LENGTH = 16, 19
X = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))


def multi_head(**fields):
  """Parameters of multi-head attention and what it answers."""
  mixer = jaxattn.make('multi_head', width=WIDTH, **fields)
  params = jax.jit(mixer.init)(jax.random.key(1), X)['params']
  return params, jax.jit(mixer.apply)({'params': params}, X).y


def answer(name, params, **fields):
  mixer = jaxattn.make(name, width=WIDTH, **fields)
  return jax.jit(mixer.apply)({'params': params}, X).y


# Mechanism -> its fields at which it is multi-head attention of 4 heads, and
# others at which it is not.
SAME = {
  'sliding_window': ({'window': LENGTH}, {'window': LENGTH - 1}),
  'moba': ({'block': 4, 'top_k': 4}, {'block': 4, 'top_k': 2}),
  'grouped_query': ({'kv_heads': 4}, None),
}


@pytest.mark.parametrize('name', SAME)
def test_is_multi_head(name):
  params, y = multi_head()
  fields, other = SAME[name]
  assert_close(answer(name, params, **fields), y, name)
  if other:
    with pytest.raises(AssertionError):
      assert_close(answer(name, params, **other), y, name)


def test_heads_that_agree_may_be_grouped():
  """Uptraining starts from the same function if a group's heads are equal."""
  params, _ = multi_head()
  for name in ('key', 'value'):
    kernel = params[name]['kernel']
    params[name]['kernel'] = jnp.repeat(kernel[:, ::2], 2, axis=1)
  y = answer('multi_head', params)
  convert = registry.module('grouped_query').from_multi_head
  grouped = convert(params, 2)
  assert grouped['key']['kernel'].shape[1] == 2
  assert_close(answer('grouped_query', grouped, kv_heads=2), y, 'grouped')
  with pytest.raises(ValueError, match='do not divide into kv_heads=3'):
    convert(params, 3)


def test_a_group_is_the_mean_of_its_heads():
  params, _ = multi_head()
  one = registry.module('grouped_query').from_multi_head(params, 1)
  for name in ('key', 'value'):
    mean = params[name]['kernel'].mean(axis=1, keepdims=True)
    np.testing.assert_allclose(one[name]['kernel'], mean, rtol=1e-6)


@pytest.mark.parametrize('shared', [0, 1, 3])
def test_all_heads_routed_on(shared):
  params, y = multi_head()
  convert = registry.module('mixture_of_heads').from_multi_head
  own = convert(params, shared)
  fields = {'heads': 4, 'shared': shared}
  every = answer('mixture_of_heads', own, top_k=4 - shared, **fields)
  assert_close(every, y, 'all heads on')
  if shared < 3:
    fewer = answer('mixture_of_heads', own, top_k=3 - shared, **fields)
    with pytest.raises(AssertionError):
      assert_close(fewer, y, 'one head off')
  with pytest.raises(ValueError, match='must be less than the 4 heads'):
    convert(params, 4)


@pytest.mark.parametrize('gate', ['output', 'value', 'dense'])
def test_an_undecided_gate_halves(gate):
  params, y = multi_head()
  shape = (WIDTH, WIDTH) if gate == 'dense' else (WIDTH, 4, WIDTH // 4)
  params = {**params, 'gate': {'kernel': jnp.zeros(shape)}}
  assert_close(answer('gated', params, gate=gate), y / 2, gate)


def draw(*last):
  keys = jax.random.split(jax.random.key(2), len(last))
  return [
    jax.random.normal(key, (2, 50, 3, *own)) for key, own in zip(keys, last)
  ]


@pytest.mark.parametrize('width', [1, 4])
def test_without_decay_it_is_linear_attention(width):
  q, k, v = draw((4,), (4,), (5,))
  scores = jnp.einsum('bthd,bshd->bhts', q, k) * jnp.tri(50)
  want = jnp.einsum('bhts,bshe->bthe', scores, v)
  ones = jnp.zeros((2, 50, 3, width))
  for log_decay in (None, ones):
    o, state = recurrence.gated(q, k, v, log_decay)
    assert_close(o, want, 'o')
    assert_close(state, jnp.einsum('bshd,bshe->bhde', k, v), 'state')


def test_decay_zero_sees_the_token_alone():
  q, k, v = draw((4,), (4,), (5,))
  o, _ = recurrence.gated(q, k, v, jnp.full((2, 50, 3, 1), -jnp.inf))
  alone = jnp.einsum('bthd,bthd,bthe->bthe', q, k, v)
  assert_close(o, alone, 'o')


def test_beta_zero_writes_nothing():
  q, k, v, beta = draw((4,), (4,), (5,), ())
  state = jax.random.normal(jax.random.key(3), (2, 3, 4, 5))
  o, after = delta.delta(q, k, v, 0 * beta, state=state)
  assert_close(o, jnp.einsum('bthd,bhde->bthe', q, state), 'o')
  np.testing.assert_array_equal(after, state)


def test_orthogonal_keys_make_the_delta_rule_plain():
  """Nothing that was stored stands in the way of what is new."""
  q, v = draw((64,), (5,))
  k = jnp.broadcast_to(jnp.eye(50, 64)[None, :, None], q.shape)
  o, _ = delta.delta(q, k, v, jnp.ones(q.shape[:3]))
  want, _ = recurrence.gated(q, k, v)
  assert_close(o, want, 'o')
