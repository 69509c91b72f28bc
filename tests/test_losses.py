"""Losses that layers sow beside the task's: what they are; that they train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn
from jaxattn.models.lm import LM
from jaxattn.packing import Packing
from jaxattn.parallel import mesh as meshes
from jaxattn.train import build, optimizer, step

HEADS, SHARED, TOP_K = 5, 2, 2
FIELDS = {'heads': HEADS, 'shared': SHARED, 'top_k': TOP_K, 'head_dim': 4}


def sown(mixer, params, x, packing=None):
  _, changed = mixer.apply({'params': params}, x, packing, mutable=['losses'])
  return changed['losses']


def test_balance_of_heads_by_hand():
  """r sum_i f_i p_i over the real tokens, times its weight."""
  mixer = jaxattn.make('mixture_of_heads', balance=0.5, **FIELDS)
  x = jax.random.normal(jax.random.key(0), (2, 7, 12))
  params = jax.jit(mixer.init)(jax.random.key(1), x)['params']
  packing = Packing.from_lengths([7, 4], 7)
  (loss,) = step.auxiliary(sown(mixer, params, x, packing))

  real = np.asarray(packing.segments) > 0
  logits = np.asarray(x)[real] @ np.asarray(params['router']['kernel'])
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  best = np.argsort(-p, axis=-1)[:, :TOP_K]
  share = np.bincount(best.ravel(), minlength=HEADS - SHARED) / len(p)
  want = 0.5 * (HEADS - SHARED) * np.sum(share * p.mean(axis=0))
  assert loss == pytest.approx(want, rel=1e-5)


def test_no_layer_no_loss():
  assert step.auxiliary({}) == []


def test_layers_of_a_scan_sow_one_each():
  model = LM(
    11, 12, 3, 'mixture_of_heads', {'mixture_of_heads': FIELDS}, hidden=0
  )
  ids = jnp.zeros((2, 6), jnp.int32)
  variables = jax.jit(model.init)(jax.random.key(0), ids)
  assert set(variables) == {'params'}
  losses = sown(model, variables['params'], ids)
  (total,) = step.auxiliary(losses)
  pairs = jax.tree.leaves(losses)
  assert [leaf.shape for leaf in pairs] == [(3,), (3,)]
  assert total == pytest.approx(float(np.sum(pairs[0] / pairs[1])), rel=1e-6)


def routers_after(balance, accumulate=1):
  """The reported loss of a step, and what it does to the routers."""
  fields = {'mixture_of_heads': FIELDS | {'balance': balance}}
  config = build.complete(
    {
      'steps': 1,
      'batch': 4,
      'accumulate': accumulate,
      'task': {'name': 'mqar', 'length': 16, 'pairs': 2, 'test_rows': 4},
      'model': {
        'width': 12,
        'depth': 1,
        'mixer': 'mixture_of_heads',
        'mechanisms': fields,
      },
      'optimizer': {
        'name': 'sgd',
        'schedule': {'name': 'constant', 'peak': 1.0},
        'weight_decay': 0.0,
        'clip': None,
      },
    }
  )
  task, model = build.build(config)
  mesh = meshes.make(data=1)
  update, rate = optimizer.make(1, **config['optimizer'])
  with jax.set_mesh(mesh):
    feed = step.Feed(task, 4, accumulate, mesh)
    made = step.programs(model, feed, update, rate)
    state, metrics = made.train(made.init(), feed.train(0))
  mixer = state.params['layers_0']['block_0']['mixer']
  loss = float(metrics['loss'][0] / metrics['loss'][1])
  return loss, np.asarray(mixer['router']['kernel'])


def test_the_trainer_minimises_it_and_does_not_report_it():
  loss, without = routers_after(0.0)
  same, small = routers_after(0.5)
  _, large = routers_after(1.0)
  assert loss == same
  # The gradient is linear in the weight: that of the task, and twice as much.
  np.testing.assert_allclose(large - without, 2 * (small - without), atol=1e-6)
  assert np.max(np.abs(small - without)) > 1e-4
  # Each of two slices counts half.
  _, halves = routers_after(1.0, accumulate=2)
  _, none = routers_after(0.0, accumulate=2)
  scale = np.max(np.abs(large - without))
  assert 0.5 * scale < np.max(np.abs(halves - none)) < 2 * scale
