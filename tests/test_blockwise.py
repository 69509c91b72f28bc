"""Blocks of tokens change nothing but the memory that is needed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.analysis import traffic
from jaxattn.models.lm import LM, swiglu
from jaxattn.parallel import blockwise
from jaxattn.parallel import mesh as meshes
from jaxattn.tasks.batch import nats
from tests import devices

M, HIDDEN = 8, 12


def draw(t, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(t), 4)
  normal = lambda key, *shape: jax.random.normal(key, shape, dtype)
  x = normal(keys[0], 2, t, M) * jnp.where(jnp.arange(M) == 0, 30, 1)
  sizes = (M, HIDDEN), (M, HIDDEN), (HIDDEN, M)
  return x, tuple(normal(k, *s) for k, s in zip(keys[1:], sizes))


def engine(x, weights):
  return swiglu(x, *weights)


def gradients(run, x, weights):
  loss = lambda x, w: jnp.sum(jnp.sin(run(x, w)))
  return run(x, weights), *jax.grad(loss, (0, 1))(x, weights)


@pytest.mark.parametrize('t', [1, 2, 3, 7, 9])
@pytest.mark.parametrize('size', [1, 3, 9])
def test_blocks_change_nothing(t, size):
  with jax.enable_x64(True):
    drawn = draw(t, jnp.float64)
    exact = gradients(engine, *drawn)
    inputs = jax.tree.map(lambda x: x.astype(jnp.float32), drawn)
    exact = jax.tree.map(np.asarray, exact)
  whole = gradients(engine, *inputs)
  blocks = gradients(blockwise.over(engine, size), *inputs)
  for f64, naive, ours in zip(*map(jax.tree.leaves, (exact, whole, blocks))):
    rms = np.sqrt(np.mean(np.square(f64)))
    err = lambda x, f64=f64, rms=rms: np.max(np.abs(x - f64)) / rms
    assert err(ours) <= 2 * err(naive) + jnp.finfo(jnp.float32).eps


def test_what_fills_the_last_block_is_finite():
  """Even where the engine is not at zero: NaN times 0 would be a gradient."""
  norm = lambda x, w: x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True)) * w
  x, w = jnp.ones((1, 5, M)), jnp.ones(M)
  loss = lambda run: lambda x, w: jnp.sum(run(x, w))
  whole = jax.grad(loss(norm), (0, 1))(x, w)
  blocks = jax.grad(loss(blockwise.over(norm, 3)), (0, 1))(x, w)
  for a, b in zip(whole, blocks):
    np.testing.assert_allclose(a, b, atol=1e-6)


def losses(block, ids, vocab=48, **more):
  model = LM(vocab, width=16, depth=1, block=block, **more)
  variables = model.init(jax.random.key(0), ids)
  judge = (lambda logits, ids: nats(logits, (ids + 1) % vocab), ids)
  return variables, lambda v: model.apply(v, ids, judge=judge).logits


def test_a_model_in_blocks_is_the_model():
  ids = jax.random.randint(jax.random.key(2), (2, 11), 0, 48)
  variables, whole = losses(None, ids)
  _, blocks = losses(4, ids)
  both = [
    jax.jit(jax.value_and_grad(lambda v, f=f: f(v).mean()))
    for f in (whole, blocks)
  ]
  for a, b in zip(*(jax.tree.leaves(f(variables)) for f in both)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  logits = LM(48, width=16, depth=1).apply(variables, ids).logits
  np.testing.assert_allclose(
    whole(variables), nats(logits, (ids + 1) % 48), rtol=1e-5
  )


@pytest.mark.parametrize('wide', ['vocab', 'hidden'])
def test_logits_and_hidden_units_of_one_block_alone_exist(wide):
  ids = jax.ShapeDtypeStruct((1, 1024), jnp.int32)

  def temporaries(block):
    def step(ids):
      # Wide in one place, narrow everywhere else.
      variables, run = losses(block, ids, **{wide: 4096})
      return jax.grad(lambda v: run(v).sum())(variables)

    compiled = jax.jit(step).lower(ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  all_at_once = 1024 * 4096 * 4
  assert temporaries(None) > all_at_once
  # Of hidden units there are gate, up, what comes of them, and gradients.
  assert temporaries(64) < all_at_once / {'vocab': 3, 'hidden': 1}[wide]


@pytest.mark.parametrize('block', [0, -1])
def test_a_block_has_tokens(block):
  with pytest.raises(ValueError, match=f'block={block} must be at least 1'):
    LM(16, block=block)


# ------------------------------------------------------------ over devices

PROGRAM = """
import json
from tests import test_blockwise
print(json.dumps(test_blockwise.summed()))
"""


def summed():
  """How often devices sum gradients of weights, as it is and without care."""
  found = {}
  mesh = meshes.make(data=1, seq=4)
  x, weights = draw(32)
  with jax.set_mesh(mesh):
    for name in ('ours', 'mutant'):
      if name == 'mutant':
        blockwise.alike = lambda inputs, _: inputs

      def loss(x, weights):
        run = blockwise.over(engine, 2)
        o = jax.shard_map(
          run,
          in_specs=(jax.P(None, 'seq'), jax.P()),
          out_specs=jax.P(None, 'seq'),
        )(x, weights)
        return jnp.sum(o)

      put = jax.device_put(x, jax.P(None, 'seq'))
      step = jax.jit(jax.grad(loss, 1)).lower(put, weights).compile()
      all_ = traffic.exchanges(step.as_text())
      found[name] = sum(x.times for x in all_ if x.kind == 'all-reduce')
  return found


def test_gradients_of_weights_are_summed_once():
  found = json.loads(devices.run('-c', PROGRAM, devices=4))
  assert 1 <= found['ours'] <= 3  # of each weight, or of all at once
  assert found['mutant'] >= 4  # once a block
