"""Cross attention: every mechanism that takes a context."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn
from jaxattn import registry
from jaxattn.mixer import Context
from jaxattn.packing import Packing
from tests import laws

CROSS = [name for name in jaxattn.names() if jaxattn.spec(name).cross]


@pytest.fixture(scope='module', params=CROSS)
def subject(request):
  module = registry.module(request.param)
  cls = type(registry.make(request.param))
  return laws.Subject(cls, module, {'heads': 2, 'position': 'none'})


@pytest.fixture(scope='module')
def source():
  """A context that is longer than the queries."""
  return jax.random.normal(jax.random.key(5), (laws.BATCH, 17, laws.WIDTH))


def test_reference(subject, source):
  got, grads = jax.value_and_grad(
    lambda v: jnp.sum(
      subject(v, subject.x, context=Context(source)).y * subject.cotangent
    )
  )(subject.variables)
  want, exact = jax.value_and_grad(
    lambda v: jnp.sum(
      subject.reference()(v['params'], subject.x, context=source)
      * subject.cotangent
    )
  )(subject.variables)
  assert np.allclose(got, want, rtol=1e-5)
  laws.assert_close(grads, exact, 'gradient')


def test_pads_of_the_context_are_invisible(subject, source):
  whole = subject(subject.variables, subject.x, context=Context(source)).y
  padded = jnp.concatenate([source, jnp.full_like(source[:, :4], jnp.nan)], 1)
  packing = Packing.from_lengths(np.full(laws.BATCH, 17), 21)
  got = subject(subject.variables, subject.x, context=Context(padded, packing))
  laws.assert_close(got.y, whole, 'y')


def test_a_query_sees_the_context_of_its_segment(subject, source):
  """Two documents packed into a row, on both sides."""
  queries = Packing.from_segments([[1] * 6 + [2] * 7] * laws.BATCH)
  keys = Packing.from_segments([[1] * 10 + [2] * 7] * laws.BATCH)
  got = subject(
    subject.variables, subject.x, queries, context=Context(source, keys)
  ).y
  for mine, theirs in (
    (slice(0, 6), slice(0, 10)),
    (slice(6, 13), slice(10, 17)),
  ):
    alone = subject(
      subject.variables, subject.x[:, mine], context=Context(source[:, theirs])
    ).y
    laws.assert_close(got[:, mine], alone, f'queries {mine}')


def test_keys_and_values_are_computed_once(subject, source):
  """The state of a call holds them, for later calls."""
  whole = subject(subject.variables, subject.x, context=Context(source)).y
  first, state = subject(
    subject.variables,
    subject.x[:, :4],
    context=Context(source),
    return_state=True,
  )
  rest, _ = subject(
    subject.variables, subject.x[:, 4:], state=state, return_state=True
  )
  laws.assert_close(jnp.concatenate([first, rest], 1), whole, 'y')
  again = subject(subject.variables, subject.x, context=state.memory).y
  laws.assert_close(again, whole, 'y from keys and values')
