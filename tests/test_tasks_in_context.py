"""Tasks that are solved in the row: what they ask, and what theory says.

Monte-Carlo means are held against closed forms to five standard errors; beside
each stands a value close by that the same bound rejects.
"""

import dataclasses
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.models.lm import LM
from jaxattn.models.regressor import Regressor
from jaxattn.nn import Policy
from jaxattn.state import nbytes
from jaxattn.tasks import (
  draw,
  induction,
  linear_regression,
  registry,
  selective_copy,
)
from jaxattn.tasks.batch import nats
from jaxattn.train import build, checkpoint, loop

FILES = [induction, selective_copy, linear_regression]


def off(values, expected) -> float:
  """Distance of a mean from what is expected, in standard errors."""
  values = np.asarray(values, np.float64)
  error = values.std() / math.sqrt(values.size)
  return abs(values.mean() - expected) / error


def off_shares(counts, shares=None) -> float:
  """Distance of a chi-squared statistic from its mean, in deviations."""
  shares = np.ones(len(counts)) if shares is None else np.array(shares)
  expected = np.sum(counts) * shares / shares.sum()
  chi2 = np.sum((counts - expected) ** 2 / expected)
  freedom = len(counts) - 1
  return abs(chi2 - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize('file', FILES)
def test_every_preset_is_a_task(file):
  assert {'quick', 'cpu', 'paper'} <= set(file.PRESETS)
  name = file.__name__.rpartition('.')[2]
  for preset in file.PRESETS:
    task = registry.make(name, preset)
    batch = task.batch('train', 0, range(2))
    assert batch.inputs.shape[:2] == (2, task.length)
    assert set(task.chance) == set(
      jax.eval_shape(task.metrics, answers(task, batch), batch)
    )


def answers(task, batch):
  """Outputs that answer as the oracle does, sure of it."""
  found = task.oracle(batch.inputs)
  if not hasattr(task, 'vocab'):
    return found
  return 100.0 * (np.arange(task.vocab) == found[..., None])


# Tasks of token ids.


def check_answered(task):
  """The oracle, who sees the inputs alone, is right wherever it is asked."""
  batch = task.batch('train', 3, range(64))
  scores = task.metrics(answers(task, batch), batch)
  assert float(scores['accuracy'][0]) == scores['accuracy'][1]
  assert scores['accuracy'][1] == 64 * task.asked
  assert float(scores['loss'][0]) < 1e-3
  assert not task.oracle(batch.inputs)[batch.weights == 0].any()


@pytest.mark.parametrize('file', [induction, selective_copy])
def test_the_oracle_answers_right(file):
  for preset in ('quick', 'cpu'):
    task = file.make(preset)
    check_answered(task)
    batch = task.batch('test', 0, range(2))
    assert task.losses(answers(task, batch), batch).shape == (2, task.length)


@pytest.mark.parametrize('file', [induction, selective_copy])
@pytest.mark.parametrize('mistake', ['shifted', 'unanswered', 'elsewhere'])
def test_the_oracle_rejects(file, mistake):
  whole = file.make('quick')

  class Mutant(type(whole)):
    def batch(self, split, step, rows):
      batch = super().batch(split, step, rows)
      change = {
        'shifted': {'targets': np.roll(batch.targets, 1, axis=1)},
        'unanswered': {'inputs': np.roll(batch.inputs, 1, axis=0)},
        'elsewhere': {'weights': np.roll(batch.weights, -1, axis=1)},
      }
      return dataclasses.replace(batch, **change[mistake])

  with pytest.raises(AssertionError):
    check_answered(Mutant(**dataclasses.asdict(whole)))


@pytest.mark.parametrize('file', [induction, selective_copy])
def test_chance_is_measured(file):
  task = file.make('cpu')
  batch = task.batch('test', 0, range(1024))
  first = 1 if file is induction else selective_copy.FIRST
  known = np.arange(task.vocab) >= first
  flat = np.where(known, 0.0, -1e9)
  flat = np.broadcast_to(flat, (*batch.inputs.shape, task.vocab))
  noise = np.random.default_rng(0).normal(size=flat.shape)
  total, count = task.metrics(flat + 1e-4 * noise, batch)['accuracy']
  p = task.chance['accuracy']
  assert p == 1 / known.sum()
  assert abs(total / count - p) < 5 * math.sqrt(p * (1 - p) / count)
  total, count = task.metrics(flat, batch)['loss']
  np.testing.assert_allclose(total / count, task.chance['loss'], rtol=1e-5)


def test_induction_asks_for_what_followed():
  """As the top of the file draws it, token by token."""
  task = induction.make('cpu')
  batch = task.batch('train', 0, range(8000))
  special = batch.inputs == induction.SPECIAL
  assert (special.sum(1) == 2).all()
  assert special[:, -1].all()
  assert (batch.weights == np.eye(30)[-1]).all()
  first = special.argmax(1)
  assert first.max() == task.length - 4
  for row, place, targets in zip(batch.inputs, first, batch.targets):
    assert targets[-1] == row[place + 1]
    assert not targets[:-1].any()
  others = batch.inputs[~special]
  assert off_shares(np.bincount(first)) < 5
  assert off_shares(np.bincount(batch.targets[:, -1])[1:]) < 5
  assert off_shares(np.bincount(others)[1:]) < 5
  assert off_shares(np.bincount(np.append(others, others[:5000] % 4))[1:]) > 5


def test_selective_copy_asks_in_order():
  task = selective_copy.make('quick')
  batch = task.batch('train', 0, range(8000))
  field = task.length - task.tokens
  assert (batch.inputs[:, field:] == selective_copy.MARKER).all()
  assert (batch.inputs[:, :field] != selective_copy.MARKER).all()
  weights = (np.arange(task.length) >= field).astype(np.float32)
  assert (batch.weights == weights).all()
  assert not batch.targets[:, :field].any()
  for row, targets in zip(batch.inputs, batch.targets):
    tokens = [i for i in row if i >= selective_copy.FIRST]
    assert tokens == targets[field:].tolist()
  # Every set of places is as likely, and so is every place. Of these sets
  # C(field - gap, tokens - 1) have their first two places `gap` apart.
  places = np.nonzero(batch.inputs[:, :field])[1].reshape(-1, task.tokens)
  assert off_shares(np.bincount(places.ravel())) < 5
  gaps = np.bincount(places[:, 1] - places[:, 0])[1:11]
  sets = lambda n: [math.comb(field - gap, n) for gap in range(1, 11)]
  assert off_shares(gaps, sets(task.tokens - 1)) < 5
  assert off_shares(gaps, sets(task.tokens)) > 5
  assert off_shares(np.bincount(batch.targets[batch.weights > 0])[2:]) < 5


# Normal numbers.


def off_normal(values) -> float:
  """Kolmogorov's distance times sqrt(n); over 2.2 once in ten thousand."""
  values = np.sort(np.ravel(values))
  cdf = np.array([statistics.NormalDist().cdf(value) for value in values])
  steps = np.arange(values.size + 1) / values.size
  distance = max((cdf - steps[:-1]).max(), (steps[1:] - cdf).max())
  return distance * math.sqrt(values.size)


def test_normal_numbers_are_normal():
  key = draw.keys(5, rows=np.arange(4000))
  values = draw.normal(key, 7, stream=3)
  assert values.shape == (4000, 7)
  assert off_normal(values) < 2.2
  assert off_normal(1.05 * values) > 2.2
  assert off_normal(values + 0.05) > 2.2
  for power, moment in [(1, 0), (2, 1), (3, 0), (4, 3)]:
    assert off(values**power, moment) < 5
  pairs = np.triu_indices(7, 1)
  for i, j in zip(*pairs):  # both of a point of the plane, and of others
    assert off(values[:, i] * values[:, j], 0) < 5
    assert off(values[:, i] ** 2 * values[:, j] ** 2, 1) < 5
  assert np.array_equal(values[:, :4], draw.normal(key, 4, stream=3))
  assert np.array_equal(values[9:], draw.normal(key[9:], 7, stream=3))
  assert draw.normal(key[:0], 3, stream=0).shape == (0, 3)


# Linear regression: rows, and the closed forms.

ROWS = 60_000


def rows_of(task, rows=ROWS):
  """x 'b n d', y 'b n', x_q 'b d' and the target 'b', of training rows."""
  batch = task.batch('train', 0, range(rows))
  inputs = batch.inputs.astype(np.float64)
  x, y = inputs[..., :-1], inputs[..., -1]
  return x[:, :-1], y[:, :-1], x[:, -1], batch.targets[:, -1].astype(np.float64)


def normalised(answer, target, task):
  return (answer - target) ** 2 / task.dimension


def test_linear_regression_shows_what_it_promises():
  task = linear_regression.make('quick')
  batch = task.batch('train', 0, range(ROWS))
  assert batch.inputs.shape == (ROWS, 11, 5)
  assert not batch.inputs[:, -1, -1].any()
  assert not batch.targets[:, :-1].any()
  assert (batch.weights == np.eye(11)[-1]).all()
  assert off_normal(batch.inputs[:2000, :, :-1]) < 2.2
  x, y, query, target = rows_of(task)
  w = np.linalg.pinv(x) @ y[..., None]
  assert off_normal(w[:5000]) < 2.2
  assert np.abs(y - (x @ w)[..., 0]).max() < 1e-4
  assert np.abs(target - (query[:, None] @ w)[:, 0, 0]).max() < 1e-4
  assert off(target**2, 4) < 5
  assert off(target**2, 4.3) > 5

  # Noise is added to the values that are shown, and to nothing else.
  noisy = dataclasses.replace(task, noise=0.5)
  noisy_x, noisy_y, noisy_query, noisy_target = rows_of(noisy)
  assert np.array_equal(noisy_x, x)
  assert np.array_equal(noisy_query, query)
  assert np.array_equal(noisy_target, target)
  assert off_normal((noisy_y - y)[:5000] / 0.5) < 2.2


@pytest.mark.parametrize(
  ('dimension', 'pairs', 'noise'),
  [(4, 1, 0), (4, 3, 0), (4, 4, 0), (9, 5, 0), (4, 10, 0.5), (9, 3, 0.7)],
)
def test_least_squares_is_as_good_as_it_says(dimension, pairs, noise):
  task = linear_regression.LinearRegression(dimension, pairs, noise)
  x, y, query, target = rows_of(task)
  w = np.linalg.pinv(x) @ y[..., None]
  errors = normalised((query[:, None] @ w)[:, 0, 0], target, task)
  expected = task.least_squares()
  if noise == 0 and pairs >= dimension:
    assert expected == 0
    assert np.median(errors) < 1e-10
    return
  assert off(errors, expected) < 5
  for near in ({'dimension': dimension + 2}, {'pairs': pairs + 1}):
    near = dataclasses.replace(task, **near)
    assert off(errors, near.least_squares()) > 5


def test_least_squares_at_its_ends():
  task = linear_regression.make('quick')
  assert [task.least_squares(n) for n in (0, 1, 2, 4, 9)] == [
    1,
    0.75,
    0.5,
    0,
    0,
  ]
  noisy = dataclasses.replace(task, noise=0.1)
  assert noisy.least_squares(0) == 1
  assert [noisy.least_squares(n) for n in (3, 4, 5)] == 3 * [math.inf]
  assert noisy.least_squares(6) == pytest.approx(0.01)


GRADIENT = [(4, 10, 0), (6, 3, 0), (4, 10, 0.5), (3, 8, 1.0)]


@pytest.mark.parametrize(('dimension', 'pairs', 'noise'), GRADIENT)
def test_linear_attention_is_as_good_as_it_says(dimension, pairs, noise):
  task = linear_regression.LinearRegression(dimension, pairs, noise)
  x, y, query, target = rows_of(task)
  moment = np.einsum('bnd,bn->bd', x, y) / pairs
  step = np.einsum('bd,bd->b', query, moment)
  expected = task.linear_attention()
  rest = dimension + 1 + noise**2
  assert expected == pytest.approx(rest / (pairs + rest))
  errors = normalised((1 - expected) * step, target, task)
  assert off(errors, expected) < 5
  for wrong in (rest - 1, rest + 1):
    assert off(errors, wrong / (pairs + wrong)) > 5
  # Another size of the step is worse, on the same rows.
  for size in (0.8, 1.25):
    worse = normalised(size * (1 - expected) * step, target, task) - errors
    assert worse.mean() > 5 * worse.std() / math.sqrt(ROWS)
  # Whatever queries, keys, values and output the layer has, only x_q^T M moment
  # can be correlated with the target; the best M of all gains nothing.
  features = np.einsum('bd,be->bde', query, moment).reshape(ROWS, -1)
  best, *_ = np.linalg.lstsq(features, target, rcond=None)
  assert off(normalised(features @ best, target, task), expected) < 5
  assert (
    np.abs(
      best.reshape(dimension, dimension) - (1 - expected) * np.eye(dimension)
    ).max()
    < 0.05
  )


def answered(task, rows=ROWS):
  batch = task.batch('train', 0, range(rows))
  outputs = task.oracle(batch.inputs)
  assert outputs.shape == (rows, task.length, 1)
  assert not outputs[:, :-1].any()
  return outputs, batch


@pytest.mark.parametrize('pairs', [2, 10])
def test_the_oracle_of_noisy_rows_is_the_best(pairs):
  """Its error is the variance that w has left, and other ridges are worse."""
  task = linear_regression.LinearRegression(4, pairs, noise=0.5)
  outputs, batch = answered(task)
  x, y, query, target = rows_of(task)
  errors = normalised(outputs[:, -1, 0], target, task)
  gram = np.swapaxes(x, 1, 2) @ x
  spread = np.linalg.inv(np.eye(4) + gram / 0.5**2)
  left = np.trace(spread, axis1=1, axis2=2) / 4
  assert off(errors - left, 0) < 5
  assert off(errors - 1.2 * left, 0) > 5
  moment = np.swapaxes(x, 1, 2) @ y[..., None]
  for ridge in (1e-9, 0.5**2 / 3, 0.5**2 * 3):
    w = np.linalg.solve(gram + ridge * np.eye(4), moment)
    other = normalised((query[:, None] @ w)[:, 0, 0], target, task)
    assert np.mean(other - errors) > 0
    if ridge > 1e-9:  # that of least squares has a heavy tail
      assert off(other - errors, 0) > 5
  total, count = task.metrics(outputs, batch)['normalised_error']
  assert count == ROWS
  np.testing.assert_allclose(total / count, errors.mean(), rtol=1e-5)


def test_the_oracle_of_clean_rows_is_exact():
  outputs, batch = answered(linear_regression.make('quick'), 500)
  wrong = np.abs(outputs[:, -1, 0] - batch.targets[:, -1])
  assert wrong.max() < 1e-4
  few = linear_regression.make('quick', pairs=2)
  outputs, batch = answered(few)
  errors = normalised(outputs[:, -1, 0], batch.targets[:, -1], few)
  assert off(errors, few.least_squares()) < 5


def test_scores_of_linear_regression_equal_a_slow_sum():
  task = linear_regression.make('quick')
  batch = task.batch('test', 0, range(6))
  outputs = np.random.default_rng(0).normal(size=(6, task.length, 1))
  losses = task.losses(outputs.astype(np.float32), batch)
  assert losses.shape == (6, task.length)
  scores = jax.jit(task.metrics)(outputs.astype(np.float32), batch)
  square = sum(
    (outputs[b, -1, 0] - batch.targets[b, -1]) ** 2 for b in range(6)
  )
  for name, expected in [('loss', square), ('normalised_error', square / 4)]:
    total, count = scores[name]
    assert count == 6
    np.testing.assert_allclose(total, expected, rtol=1e-5)
  half = task.metrics(jnp.asarray(outputs, jnp.bfloat16), batch)
  assert half['loss'][0].dtype == jnp.float32
  zero = task.metrics(np.zeros((6, task.length, 1)), batch)
  total, count = zero['loss']
  np.testing.assert_allclose(total, np.sum(batch.targets**2), rtol=1e-6)
  assert task.chance == {'normalised_error': 1, 'loss': 4}
  assert (task.headline, task.better) == ('normalised_error', 'lower')


@pytest.mark.parametrize(
  ('file', 'fields', 'message'),
  [
    (induction, {'length': 3}, 'length=3'),
    (induction, {'vocab': 2}, 'vocab=2'),
    (induction, {'test_rows': 0}, 'test_rows=0'),
    (selective_copy, {'tokens': 17}, 'tokens=17 and length=32'),
    (selective_copy, {'tokens': 0}, 'tokens=0'),
    (selective_copy, {'vocab': 3}, 'vocab=3 must be at least 4'),
    (selective_copy, {'seed': -1}, 'seed=-1'),
    (linear_regression, {'dimension': 0}, 'dimension=0'),
    (linear_regression, {'pairs': 0}, 'pairs=0'),
    (linear_regression, {'noise': -0.1}, r'noise=-0\.1'),
    (linear_regression, {'noise': math.nan}, 'noise=nan'),
    (linear_regression, {'test_rows': 0}, 'test_rows=0'),
    (linear_regression, {'length': 3}, "no field 'length'.*dimension"),
  ],
)
def test_what_cannot_be_built(file, fields, message):
  with pytest.raises(ValueError, match=message):
    file.make('quick', **fields)


# The model of numbers.

PLAIN = {'feature': 'identity', 'normalise': False}
SMALL = {
  'features': 3,
  'outputs': 2,
  'width': 8,
  'depth': 2,
  'mixer': 'delta_net sliding_window',
  'mechanisms': {
    'delta_net': {'heads': 2},
    'sliding_window': {'heads': 2, 'window': 3},
  },
  'hidden': 16,
}
BARE = {
  **SMALL,
  'depth': 1,
  'mixer': 'linear',
  'mechanisms': {'linear': PLAIN},
  'hidden': 0,
  'norm': False,
}


def started(model, rows=2, length=9):
  shape = (rows, length, model.features)
  inputs = jax.random.normal(jax.random.key(0), shape)
  return inputs, jax.jit(model.init)(jax.random.key(1), inputs)


@pytest.mark.parametrize('fields', [SMALL, {**BARE, 'depth': 2}])
def test_a_regressor_takes_a_stream_in_chunks(fields):
  model = Regressor(**fields)
  inputs, variables = started(model)
  whole, none = jax.jit(model.apply)(variables, inputs)
  assert whole.shape == (2, 9, 2)
  assert none is None

  @jax.jit
  def in_chunks(variables, inputs, state):
    first, after = model.apply(
      variables, inputs[:, :4], state=state, return_state=True
    )
    second, after = model.apply(
      variables, inputs[:, 4:], state=after, return_state=True
    )
    return jnp.concatenate([first, second], axis=1), after

  y, state = in_chunks(variables, inputs, model.init_state(2, 9))
  np.testing.assert_allclose(y, whole, rtol=1e-5, atol=1e-5)
  counters = model.depth * 2 * 2 * 4  # layers, rows, order and segment
  assert nbytes(state) - counters == 2 * model.state_bytes(9)
  # A state of other inputs is another stream.
  y, _ = in_chunks(variables, 2 * inputs, state)
  assert not np.allclose(y, 2 * whole, atol=1e-2)


def test_remat_changes_nothing_but_memory():
  model = Regressor(**BARE)
  inputs, variables = started(model)

  def gradients(model):
    loss = lambda v: jnp.sum(model.apply(v, inputs).outputs ** 2)
    grads = jax.grad(loss)
    return jax.jit(grads)(variables), str(jax.make_jaxpr(grads)(variables))

  kept, plain = gradients(model)
  again, text = gradients(model.clone(remat=True))
  assert text.count('remat') > plain.count('remat')  # engines have their own
  for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_what_a_regressor_costs():
  """As a language model of like layers does, but for its ends."""
  model = Regressor(**SMALL)
  shared = {k: v for k, v in SMALL.items() if k not in ('features', 'outputs')}
  lm = LM(vocab=7, **shared)
  assert model.state_bytes(9) == lm.state_bytes(9)
  ends = 2 * 9 * 8 * (3 + 2)
  assert model.flops(9) - ends == lm.flops(9) - 2 * 9 * 8 * 7
  direct = model.clone(features=8, read_in=False)
  assert direct.flops(9) == model.flops(9) - 2 * 9 * 8 * 3
  shapes = jax.eval_shape(direct.init, jax.random.key(0), jnp.zeros((1, 9, 8)))
  assert set(shapes['params']) == {'block_0', 'block_1', 'norm', 'read_out'}


def test_a_bare_regressor_is_its_mixer():
  """Linear attention is a cubic in x, and the way around it is linear."""

  def third(model):
    inputs, variables = started(model)
    once, twice, thrice = (
      np.asarray(model.apply(variables, c * inputs).outputs) for c in (1, 2, 3)
    )
    cubic = (twice - 2 * once) / 6
    linear = once - cubic
    wrong = np.abs(thrice - 3 * linear - 27 * cubic).max()
    return wrong / np.abs(thrice).max()

  model = Regressor(**BARE)
  assert third(model) < 1e-5
  assert third(model.clone(norm=True)) > 1e-2
  assert third(model.clone(hidden=16)) > 1e-2
  _, variables = started(model)
  assert set(variables['params']) == {'read_in', 'block_0', 'read_out'}
  assert set(variables['params']['block_0']) == {'mixer'}


def test_a_regressor_computes_as_its_policy_says():
  model = Regressor(**BARE, policy=Policy(dtype='bfloat16'))
  inputs, variables = started(model)
  outputs = model.apply(variables, inputs).outputs
  assert outputs.dtype == jnp.float32
  assert np.array_equal(outputs, outputs.astype(jnp.bfloat16))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'mixer': 'delta_nett'}, 'mean delta_net'),
    ({'mechanisms': {'s4d': {}}}, "fields for 's4d', which no layer uses"),
    ({'mechanisms': {'delta_net': {'heads': 3}}}, 'heads=3'),
    ({'mixer': ['s4d']}, '1 mechanisms are listed for depth=2'),
    ({'read_in': False}, 'features=3 and width=8'),
    ({'depth': 0}, 'depth=0'),
  ],
)
def test_a_regressor_that_cannot_be(fields, message):
  with pytest.raises(ValueError, match=message):
    Regressor(**{**SMALL, **fields})


def test_only_causal_mechanisms_stream():
  both = {'multi_head': {'heads': 2, 'causal': False}}
  model = Regressor(3, 2, 8, 1, 'multi_head', both)
  inputs, variables = started(model)
  before = model.apply(variables, inputs).outputs
  after = model.apply(variables, inputs.at[:, -1].add(1)).outputs
  assert not np.allclose(before[:, 0], after[:, 0], atol=1e-3)
  with pytest.raises(ValueError, match='not causal'):
    model.apply(variables, inputs, return_state=True)


# Training.


def config(mixer, fields, **other):
  """A run of one bare layer on linear regression in context."""
  steps = other.pop('steps', 400)
  return {
    'steps': steps,
    'batch': 256,
    'task': {'name': 'linear_regression', 'test_rows': 4096},
    'model': {
      'name': 'regressor',
      'width': 32,
      'depth': 1,
      'mixer': mixer,
      'mechanisms': {mixer: fields},
      'hidden': 0,
      'norm': False,
    },
    'optimizer': {
      'schedule': {'name': 'warmup_cosine', 'peak': 1e-2, 'warmup': 0.1},
      'weight_decay': 0.0,
    },
    'log_every': steps,
    'eval_every': steps,
    'checkpoint_every': steps,
    **other,
  }


TESTED = 131_072


def trained_errors(workdir, mixer, fields):
  """Squared errors of a trained layer, and of the best linear attention.

  Both normalised, and on the same rows, which training has not seen.
  """
  loop.fit(config(mixer, fields), workdir)
  loaded = checkpoint.load(workdir)
  task, _ = build.build(loaded.config)
  task = dataclasses.replace(task, test_rows=TESTED)
  apply = jax.jit(lambda inputs: loaded.model.apply(loaded.params, inputs))
  found, best = [], []
  for start in range(0, TESTED, 16_384):
    batch = task.batch('test', 0, range(start, start + 16_384))
    target = batch.targets[:, -1]
    answer = apply(batch.inputs).outputs[:, -1, 0]
    x, y = batch.inputs[:, :-1, :-1], batch.inputs[:, :-1, -1]
    step = np.einsum('bd,bnd,bn->b', batch.inputs[:, -1, :-1], x, y)
    step *= (1 - task.linear_attention()) / task.pairs
    found.append(normalised(np.asarray(answer), target, task))
    best.append(normalised(step, target, task))
  return np.concatenate(found), np.concatenate(best), task.linear_attention()


def test_one_layer_of_linear_attention_learns_its_optimum(tmp_path):
  """Within 3% of (d + 1) / (N + d + 1), by the trainer as users run it."""
  found, best, optimum = trained_errors(
    tmp_path / 'run', 'linear', {'heads': 1, **PLAIN}
  )
  assert optimum == pytest.approx(5 / 15)
  # So many rows that the mean itself is known to a fraction of 3%.
  assert found.std() / math.sqrt(TESTED) < 0.01 * optimum
  assert abs(found.mean() - optimum) < 0.03 * optimum
  # On the same rows the best layer's errors are lower, and not by much.
  assert 0 < np.mean(found - best) < 0.03 * optimum


def test_one_layer_of_the_delta_rule_beats_it(tmp_path):
  """The same model, trained as long: an error is corrected, not only added."""
  found, best, optimum = trained_errors(
    tmp_path / 'run', 'delta_net', {'heads': 4, 'conv_taps': 1}
  )
  assert found.mean() < 0.9 * optimum
  assert np.mean(best - found) > 5 * np.std(best - found) / math.sqrt(TESTED)


def test_training_lowers_what_the_task_says(tmp_path):
  """The loss is the task's, and a regressor is saved, loaded and refused."""
  short = config('linear', PLAIN, steps=2, batch=8)
  result = loop.fit(short, tmp_path / 'run')
  assert set(result['metrics']) == {'normalised_error', 'loss'}
  loaded = checkpoint.load(tmp_path / 'run')
  assert loaded.model == build.build(short)[1]
  task, _ = build.build(short)
  batch = task.batch('test', 0, range(32))
  outputs = jax.jit(loaded.model.apply)(loaded.params, batch.inputs).outputs
  total, count = task.metrics(outputs, batch)['loss']
  assert result['metrics']['loss'] == pytest.approx(float(total / count), 1e-5)
  assert result['flops'] == loaded.model.flops(11)
  for change, message in [
    ({'name': 'lm'}, 'needs vocab.*linear_regression.*models that fit it: reg'),
    ({**short['model'], 'features': 5}, "no field 'features'"),
    ({**short['model'], 'wdith': 5}, 'mean width'),
  ]:
    with pytest.raises(ValueError, match=message):
      build.build({**short, 'model': change})
  with pytest.raises(
    ValueError, match=r'needs features and outputs.*fit it: lm'
  ):
    build.build({**short, 'task': {'name': 'induction'}})


@pytest.mark.parametrize('name', ['induction', 'selective_copy'])
def test_tasks_of_ids_train_a_language_model(name, tmp_path):
  """Their loss is the mean of `nats` over what is asked."""
  fields = {
    'steps': 1,
    'batch': 8,
    'task': {'name': name},
    'model': {'width': 16, 'depth': 1, 'hidden': 0, 'mixer': 's4d'},
    'optimizer': {'schedule': {'name': 'constant', 'peak': 1e-9}},
  }
  result = loop.fit(fields, tmp_path / 'run')
  loaded = checkpoint.load(tmp_path / 'run')
  task, model = build.build(fields)
  assert loaded.model == model
  batch = task.batch('train', 0, range(8))
  logits = jax.jit(model.apply)(loaded.params, batch.inputs).logits
  expected = np.sum(nats(logits, batch.targets) * batch.weights)
  expected /= batch.weights.sum()
  assert result['train_loss'] == pytest.approx(float(expected), rel=1e-5)
