"""Training: the step, the loop, what survives a crash, and bad input."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags
from rich.console import Console

from configs import lm as lm_config
from experiments import train as train_program
from jaxattn import registry
from jaxattn.models.lm import LM, Modelled
from jaxattn.nn import Policy
from jaxattn.parallel import mesh as meshes
from jaxattn.tasks.batch import Batch
from jaxattn.tasks.mqar import MQAR
from jaxattn.train import build, checkpoint, log, loop, optimizer, step

# Where a file is damaged, orbax leaves reads behind that nobody waits for.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = 9
CONFIG = {
  'steps': STEPS,
  'batch': 4,
  'task': {
    'name': 'mqar',
    'vocab': 16,
    'length': 16,
    'pairs': 2,
    'test_rows': 6,
  },
  'model': {'width': 16, 'depth': 1, 'mixer': 'multi_head', 'hidden': 16},
  'policy': {'dropout': 0.1},
  'optimizer': {'schedule': {'name': 'warmup_cosine', 'peak': 1e-2}},
  'log_every': 2,
  'eval_every': 3,
  'eval_batches': 2,
  'checkpoint_every': 4,
}


# Records: one JSON object a line.


def test_records_survive_a_torn_line(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  assert log.read(path) == []
  log.append(path, {'step': 1, 'loss': 0.1 + 0.2})
  written = log.append(path, {'step': 2, 'loss': float('nan')})
  log.sync(path)
  records = log.read(path)
  assert records == [{'step': 1, 'loss': 0.1 + 0.2}, {'step': 2, 'loss': None}]
  assert written == records[1]
  with open(path, 'a') as torn:
    torn.write('{"step": 3, "lo')
  assert log.read(path) == records
  log.rewrite(path, records[:1])
  assert log.read(path) == records[:1]
  assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']
  path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
  with pytest.raises(ValueError, match='line 2'):
    log.read(path)


# Optimisers and schedules, by name.


def small_weights():
  return {'a': {'kernel': jnp.ones((3, 4)), 'bias': jnp.ones((2, 4))}}


@pytest.mark.parametrize(
  ('name', 'fields'),
  [
    ('adamw', {'weight_decay': 0.1, 'options': {'b2': 0.95}}),
    ('lion', {'weight_decay': 0.1}),
    ('adafactor', {'weight_decay': 0.1}),
    ('sgd', {'options': {'momentum': 0.9}}),
    ('contrib.adopt', {}),
  ],
)
def test_optimisers_by_name(name, fields):
  update, _ = optimizer.make(10, name, **fields)
  weights = small_weights()
  state = update.init(weights)
  for _ in range(2):  # some make no move at the first step
    moves, state = update.update(weights, state, weights)
  moved = jax.tree.map(lambda m: float(jnp.abs(m).max()), moves)
  assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize('name', ['adamw', 'adafactor'])
def test_only_matrices_decay(name):
  update, _ = optimizer.make(10, name, weight_decay=0.1)
  weights = small_weights()
  still = jax.tree.map(jnp.zeros_like, weights)
  moves, _ = update.update(still, update.init(weights), weights)
  assert np.all(moves['a']['kernel'] < 0)
  assert np.all(moves['a']['bias'] == 0)


def test_what_decays_in_a_model():
  model = LM(16, 16, 3, ['gated_linear', 's4d', 'multi_head'])
  ids = jnp.zeros((1, 4), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), ids)['params']
  marked = jax.tree_util.tree_flatten_with_path(optimizer.matrices(params))[0]
  decays = {path[-1].key for path, decays in marked if decays}
  stays = {path[-1].key for path, decays in marked if not decays}
  assert decays == {'kernel', 'table'}
  assert {'gain', 'bias'} < stays  # and s4d's rates, and its step sizes
  assert len(stays) > 4


def test_clip_bounds_the_gradient():
  update, _ = optimizer.make(
    10, 'sgd', {'name': 'constant', 'peak': 1.0}, clip=0.5
  )
  weights = small_weights()
  large = jax.tree.map(lambda w: 100 * w, weights)
  moves, _ = update.update(large, update.init(weights), weights)
  assert optax.tree.norm(moves) == pytest.approx(0.5)


@pytest.mark.parametrize(
  ('fields', 'values'),
  [
    ({'name': 'constant', 'peak': 2.0}, {0: 2.0, 99: 2.0}),
    ({'name': 'linear', 'peak': 2.0, 'end': 0.5}, {0: 2.0, 50: 1.5, 100: 1.0}),
    ({'name': 'cosine', 'peak': 2.0}, {0: 2.0, 50: 1.0, 100: 0.0}),
    (
      {'name': 'warmup_cosine', 'peak': 2.0, 'warmup': 0.2},
      {0: 0.1, 9: 1.0, 19: 2.0, 20: 2.0, 60: 1.0, 100: 0.0},
    ),
    (
      {
        'name': 'exponential_decay',
        'init_value': 2.0,
        'transition_steps': 10,
        'decay_rate': 0.5,
      },
      {0: 2.0, 10: 1.0},
    ),
  ],
)
def test_schedules_by_name(fields, values):
  rate = optimizer.schedule_of(100, **fields)
  for at, value in values.items():
    assert float(rate(at)) == pytest.approx(value, abs=1e-6)


# From a configuration to objects; what cannot work says so, and why.


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'optimiser': {}}, 'Did you mean optimizer'),
    ({'mesh': {'dat': 2}}, "section 'mesh' has no 'dat'. Did you mean data"),
    ({'mesh': 8}, 'mesh is a section'),
    ({'policy': {'dtyp': 'bfloat16'}}, 'Did you mean dtype'),
    ({'policy': {'dtype': 'int32'}}, 'int32'),
    ({'steps': 0}, 'steps=0'),
    ({'batch': 2.5}, 'batch=2.5'),
    ({'keep': True}, 'keep=True'),
    ({'task': {'name': 'mqr'}}, 'Did you mean mqar'),
    ({'task': {'name': 'mqar', 'pares': 3}}, 'Did you mean pairs'),
    ({'task': {'name': 'bytes', 'path': '/no/such/text'}}, '/no/such/text'),
    ({'model': {'name': 'ml'}}, "no model 'ml'"),
    ({'model': {'widht': 3}}, 'Did you mean width'),
    ({'model': {'vocab': 3}}, 'vocab'),
    ({'model': {'mixer': 'gated_liner'}}, 'Did you mean gated_linear'),
    ({'model': {'width': 18}}, 'width=18 does not divide by heads=4'),
    (
      {'model': {'mechanisms': {'multi_head': {'causal': False}}}},
      'not causal.*gated_linear',
    ),
    ({'optimizer': {'name': 'adamv'}}, 'Did you mean .*adamw'),
    ({'optimizer': {'options': {'b3': 1}}}, "no option 'b3'"),
    ({'optimizer': {'name': 'sgd'}}, 'no masked weight decay'),
    ({'optimizer': {'clip': -1}}, 'clip=-1'),
    ({'optimizer': {'name': 'contrib.dpsgd', 'weight_decay': 0}}, 'dpsgd'),
    ({'optimizer': {'schedule': {'name': 'warmup'}}}, "no schedule 'warmup'"),
    ({'optimizer': {'schedule': {'peek': 1}}}, 'Did you mean peak'),
    ({'optimizer': {'schedule': {'peak': -1.0}}}, 'peak=-1.0'),
    (
      {'optimizer': {'schedule': {'name': 'exponential_decay'}}},
      'exponential_decay',
    ),
    ({'accumulate': 3}, 'batch=64 rows do not divide.*accumulate=3'),
    ({'mesh': {'data': 3}}, 'data=3.*does not fit'),
    ({'steps': {1, 2}}, 'plain values'),
  ],
  ids=str,
)
def test_a_bad_configuration_says_why(tmp_path, change, message):
  with pytest.raises(ValueError, match=f'(?s){message}'):
    loop.fit(change, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_complete_fills_in_what_is_left_out():
  config = build.complete({'batch': 8, 'optimizer': {'clip': None}})
  assert config['batch'] == 8
  assert config['optimizer']['name'] == 'adamw'
  assert config['optimizer']['clip'] is None
  assert build.complete(config) == config
  # What is named brings no default of something else along.
  named = {'name': 'exponential_decay', 'init_value': 1.0}
  config = build.complete({'optimizer': {'schedule': named}})
  assert config['optimizer']['schedule'] == named


# The step.


@dataclasses.dataclass(frozen=True)
class Uneven(MQAR):
  """Rows of different weight; those of step `broken` weigh NaN."""

  vocab: int = 16
  length: int = 16
  pairs: int = 2
  test_rows: int = 6
  broken: int | None = None

  def batch(self, split, step, rows):
    batch = super().batch(split, step, rows)
    scale = (1.0 + np.asarray(rows)[:, None]).astype(np.float32)
    if split == 'train' and step == self.broken:
      scale = scale * np.nan
    return dataclasses.replace(batch, weights=batch.weights * scale)


def programs(task=None, model=None, *, accumulate=1, update=None, rate=None):
  """The programs of a small run, on all devices."""
  task = task or Uneven()
  model = model or LM(16, 16, 1, hidden=16)
  default = optimizer.make(10, 'adamw', {'peak': 1e-2}, weight_decay=0.1)
  feed = step.Feed(task, 4, accumulate, meshes.make())
  return feed, step.programs(
    model, feed, update or default[0], rate or default[1], seed=3
  )


def run(feed, made, count, state=None):
  """Losses of so many steps, and the state after them."""
  losses = []
  with jax.set_mesh(feed.mesh):
    state = state or made.init()
    for _ in range(count):
      state, metrics = made.train(state, feed.train(int(state.step)))
      losses.append(float(metrics['loss'][0] / metrics['loss'][1]))
  return losses, state, metrics


def same_bits(a, b):
  same = jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)
  return all(jax.tree.leaves(same))


@pytest.fixture(scope='module')
def whole():
  """The steps whose batch is not cut: losses, state, last metrics, programs."""
  feed, made = programs()
  return (*run(feed, made, 3), made)


def test_slices_add_up_to_the_batch(whole):
  losses, state, metrics, _ = whole
  cut = run(*programs(accumulate=4), 3)
  np.testing.assert_allclose(cut[0], losses, rtol=1e-5)
  assert float(cut[2]['grad_norm']) == pytest.approx(
    float(metrics['grad_norm']), rel=1e-4
  )
  difference = jax.tree.map(
    lambda a, b: np.abs(a - b).max(), cut[1].params, state.params
  )
  assert max(jax.tree.leaves(difference)) < 1e-4

  # The mean of the slices' means, as it is often computed, is another loss.
  task, (feed, made) = Uneven(), programs()
  with jax.set_mesh(feed.mesh):
    start = jax.device_get(made.init().variables())
  rows = task.batch('train', 0, range(4))
  logits, _ = jax.jit(LM(16, 16, 1, hidden=16).apply)(start, rows.inputs)
  score = jax.jit(lambda *row: task.metrics(row[0], Batch(*row[1:]))['loss'])
  parts = [
    score(logits[i : i + 1], *(a[i : i + 1] for a in fields))
    for fields in [(rows.inputs, rows.targets, rows.weights)]
    for i in range(4)
  ]
  sums, counts = np.array(parts).T
  assert sums.sum() / counts.sum() == pytest.approx(losses[0], rel=1e-5)
  assert abs(np.mean(sums / counts) - losses[0]) > 1e-3


def test_the_step_is_compiled_once(whole):
  assert whole[-1].train._cache_size() == 1


def test_randomness_is_a_function_of_seed_and_step():
  model = LM(16, 16, 1, hidden=16, policy=Policy(dropout=0.5))
  feed, made = programs(model=model)
  losses, _, _ = run(feed, made, 3)
  assert run(feed, made, 3)[0] == losses
  with jax.set_mesh(feed.mesh):  # the same batch and weights at another step
    batch, start = feed.train(0), made.init()
    later = dataclasses.replace(made.init(), step=jnp.int32(1))
    first, _ = made.train(start, batch)[1]['loss']
    other, _ = made.train(later, batch)[1]['loss']
  assert float(first) != float(other)


def test_bfloat16_computes_and_float32_remembers(whole):
  model = LM(16, 16, 1, hidden=16, policy=Policy(dtype='bfloat16'))
  feed, made = programs(model=model)
  losses, state, metrics = run(feed, made, 3)
  floats = [
    leaf.dtype
    for leaf in jax.tree.leaves((state.params, state.opt_state, metrics))
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
  assert set(floats) == {jnp.dtype('float32')}
  assert losses != whole[0]
  np.testing.assert_allclose(losses, whole[0], rtol=2e-2)


@pytest.mark.parametrize('kind', ['loss', 'update'])
def test_a_step_that_is_not_finite_changes_nothing(kind):
  if kind == 'loss':
    feed, made = programs(Uneven(broken=2))
  else:  # gradients are finite, what the optimiser makes of them is not
    rate = lambda step: jnp.where(step == 2, jnp.inf, 1e-2)
    feed, made = programs(update=optax.sgd(rate), rate=rate)
  _, good, _ = run(feed, made, 2)
  kept = jax.device_get(good)
  assert int(kept.stopped_at) == -1
  with jax.set_mesh(feed.mesh):
    state = good
    for batch in (2, 3, 4):
      state, metrics = made.train(state, feed.train(batch))
      assert int(metrics['stopped_at']) == 2
  assert int(state.step) == 2
  assert same_bits(state.params, kept.params)
  assert same_bits(state.opt_state, kept.opt_state)


class Counting(nn.Module):
  """A model with statistics: it counts the calls in which it learns."""

  @nn.compact
  def __call__(self, ids, packing=None, *, deterministic=True, judge=None):
    calls = self.variable('stats', 'calls', lambda: jnp.float32(0))
    if not deterministic:
      calls.value += 1
    table = self.param('table', nn.initializers.ones, (16, 16))
    logits = table[ids.astype(jnp.int32)] * calls.value
    if judge is not None:
      read, batch = judge
      logits = read(logits, batch)
    return Modelled(logits, None)


def test_statistics_pass_through_slices_and_steps():
  feed = step.Feed(Uneven(), 4, 2, meshes.make(axis_types='auto'))
  made = step.programs(
    Counting(), feed, optax.sgd(0.1), optax.constant_schedule(0.1)
  )
  with jax.set_mesh(feed.mesh):
    state = made.init()
    for i in range(3):
      state, _ = made.train(state, feed.train(i))
    made.evaluate(state.variables(), feed.test(0))
  assert float(state.stats['calls']) == 3 * 2


# The feed.


def test_a_batch_is_the_rows_of_its_slices():
  task = Uneven()
  feed = step.Feed(task, 4, 2, meshes.make())
  rows = task.batch('train', 5, range(4))
  fed = feed.train(5)
  assert fed.inputs.shape == (2, 2, 16)
  flat = lambda array: np.asarray(array).reshape(4, 16)
  np.testing.assert_array_equal(flat(fed.inputs), rows.inputs)
  np.testing.assert_array_equal(flat(fed.weights), rows.weights)


def test_the_test_set_is_read_once():
  task = Uneven()
  feed = step.Feed(task, 4, 2, meshes.make())
  assert feed.tests(100) == 2
  assert feed.tests(1) == 1
  read = [np.asarray(feed.test(number).weights) for number in range(2)]
  weights = np.concatenate(read).reshape(8, 16)
  rows = task.batch('test', 0, range(6))
  np.testing.assert_array_equal(weights[:6], rows.weights)
  assert not weights[6:].any()


# Checkpoints.


def tiny_state(value):
  update = optax.adam(1e-3)
  params = {'a': {'kernel': jnp.full((2, 3), value)}}
  return step.TrainState(
    jnp.int32(value), params, {}, update.init(params), jnp.int32(-1)
  )


def shapes_of(state):
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
  )


@pytest.mark.parametrize(
  ('better', 'kept'), [('lower', [2, 4, 5]), ('higher', [1, 4, 5])]
)
def test_the_newest_and_the_best_are_kept(tmp_path, better, kept):
  headlines = {1: 9.0, 2: 1.0, 3: 2.0, 4: float('nan'), 5: 3.0}
  for steps in ((1, 2, 3), (4, 5)):  # the best is known to a later process
    store = checkpoint.Store(tmp_path, keep=2, better=better)
    for number in steps:
      store.save(number, tiny_state(float(number)), headlines[number])
    store.close()
  left = sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
  assert left == kept
  store = checkpoint.Store(tmp_path, keep=2, better=better)
  state = store.newest(shapes_of(tiny_state(0.0)))
  store.close()
  assert same_bits(state, tiny_state(5.0))
  assert store.notes == []


@pytest.mark.parametrize(
  'dtype', ['float32', 'bfloat16', 'int32', 'uint8', 'bool', 'complex64']
)
def test_one_changed_number_changes_the_sum(dtype):
  array = np.ones((3, 5), dtype)
  other = array.copy()
  other[2, 1] = 0
  sums = checkpoint._sums({'a': jnp.asarray(array)})
  assert sums == checkpoint._sums({'a': jnp.asarray(array)})
  assert sums != checkpoint._sums({'a': jnp.asarray(other)})


# The loop: runs that are stopped end as those that are not.


class Stop(Exception):
  pass


def stopping(at, how=None):
  """A progress that ends the run at a step."""

  def progress(step, steps, numbers):
    if step >= at:
      raise how or Stop

  return progress


def outcome(workdir):
  """All that two runs must agree upon, to the bit."""
  timed = ('seconds', 'steps_per_second')
  plain = lambda record: {k: v for k, v in record.items() if k not in timed}
  records = [plain(r) for r in log.read(workdir / 'metrics.jsonl')]
  store = checkpoint.Store(workdir)
  task, model = build.build(json.loads((workdir / 'config.json').read_text()))
  feed = step.Feed(task, 4, 1, meshes.make())
  update, rate = optimizer.make(STEPS, **build.complete(CONFIG)['optimizer'])
  with jax.set_mesh(feed.mesh):
    shapes = step.programs(model, feed, update, rate).shapes
    state = jax.device_get(store.newest(shapes))
  store.close()
  return records, state


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run that nothing stopped: its folder, its result, what it reported."""
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  seen = []
  result = loop.fit(
    CONFIG, workdir, progress=lambda *report: seen.append(report)
  )
  return workdir, result, seen


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
  """The same run, stopped behind its second checkpoint, at 8."""
  workdir = tmp_path_factory.mktemp('stopped') / 'run'
  with pytest.raises(Stop):
    loop.fit(CONFIG, workdir, progress=stopping(STEPS))
  return workdir


@pytest.fixture
def copied(stopped, tmp_path):
  return pathlib.Path(shutil.copytree(stopped, tmp_path / 'run'))


def ends_like(workdir, finished):
  records, state = outcome(workdir)
  expected_records, expected_state = outcome(finished[0])
  assert records == expected_records
  assert same_bits(state, expected_state)
  result = json.loads((workdir / 'result.json').read_text())
  for key in ('metrics', 'best', 'train_loss'):
    assert result[key] == finished[1][key]


def test_a_run_records_what_it_did(finished):
  workdir, result, seen = finished
  records = log.read(workdir / 'metrics.jsonl')
  steps = lambda kind: [r['step'] for r in records if r['kind'] == kind]
  assert steps('train') == [2, 3, 4, 6, 8, 9]
  assert steps('eval') == [3, 4, 6, 8, 9]
  assert [report[:2] for report in seen] == [(s, STEPS) for s in steps('train')]
  assert seen[0][2]['headline'] is None
  assert seen[-1][2]['headline'] is not None
  assert result == json.loads((workdir / 'result.json').read_text())
  assert result['step'] == STEPS
  assert result['metrics']['loss'] == records[-1]['loss']
  best = max(r['accuracy'] for r in records if r['kind'] == 'eval')
  assert result['best']['accuracy'] == best
  assert result['train_loss'] == records[-2]['loss']
  assert result['notes'] == []
  task, model = build.build(CONFIG)
  params = checkpoint.load(workdir).params['params']
  assert result['parameters'] == sum(w.size for w in jax.tree.leaves(params))
  assert result['flops'] == model.flops(task.length)
  assert result['state_bytes'] == model.state_bytes(task.length)
  assert result['steps_per_second'] > 0


def test_a_finished_run_returns_at_once(finished, monkeypatch):
  monkeypatch.setattr(step, 'programs', None)
  assert loop.fit(CONFIG, finished[0]) == finished[1]


def test_a_stopped_run_carries_on_to_the_same_bits(copied, finished):
  loop.fit(CONFIG, copied)
  ends_like(copied, finished)


def test_a_killed_run_carries_on_to_the_same_bits(tmp_path, finished):
  """kill -9, with records written past the last checkpoint, and a torn one."""
  script = (
    'import json, os, signal, sys\n'
    'import jax\n'
    'from jaxattn.train import loop\n'
    'jax.config.update("jax_compilation_cache_dir", sys.argv[3])\n'
    'def progress(step, steps, numbers):\n'
    '  if step == 6:\n'
    '    os.kill(os.getpid(), signal.SIGKILL)\n'
    'loop.fit(json.loads(sys.argv[1]), sys.argv[2], progress=progress)\n'
  )
  workdir = tmp_path / 'run'
  cache = str(jax.config.jax_compilation_cache_dir or tmp_path / 'cache')
  killed = subprocess.run(
    [sys.executable, '-c', script, json.dumps(CONFIG), str(workdir), cache],
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )
  assert killed.returncode == -9, killed.stderr
  records = log.read(workdir / 'metrics.jsonl')
  assert records[-1]['step'] == 6
  with open(workdir / 'metrics.jsonl', 'a') as torn:
    torn.write('{"step": 7, "ki')
  loop.fit(CONFIG, workdir)
  ends_like(workdir, finished)


def test_a_resumed_run_compiles_the_step_once(copied):
  made = []
  real = step.programs

  def watched(*args, **kw):
    made.append(real(*args, **kw))
    return made[-1]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step, 'programs', watched)
    loop.fit(CONFIG, copied)
  assert made[0].train._cache_size() == 1


def damage(folder):
  """Flips a byte in the middle of a checkpoint's weights."""
  files = [path for path in folder.rglob('variables/**/d/*')]
  largest = max(files, key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 0xFF
  largest.write_bytes(content)


def cut(folder):
  """Leaves half of every file, as a full disk might."""
  for path in folder.rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def forge(folder):
  """Other numbers, flawlessly written, where the checkpoint had its own."""
  about = folder / 'about' / 'metadata'
  content = json.loads(about.read_text())
  sums = content['sums']['variables']
  sums['params.embed.table'] += 1
  about.write_text(json.dumps(content))


@pytest.mark.parametrize('how', [damage, cut, forge, shutil.rmtree])
def test_a_damaged_checkpoint_falls_back(copied, finished, caplog, how):
  checkpoints = copied / 'checkpoints'
  assert sorted(p.name for p in checkpoints.iterdir()) == ['4', '8']
  how(checkpoints / '8')
  (checkpoints / '8.orbax-checkpoint-tmp').mkdir()  # killed while writing
  result = loop.fit(CONFIG, copied)
  ends_like(copied, finished)
  notes = ' '.join(result['notes'])
  assert '8.orbax-checkpoint-tmp was never completed' in notes
  if how is not shutil.rmtree:
    assert 'checkpoint 8 is damaged' in notes
    assert 'checkpoint 8 is damaged' in caplog.text
    assert (copied / 'damaged' / '8').is_dir()


def listing(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def test_no_good_checkpoint_is_an_error(copied):
  for name in ('4', '8'):
    damage(copied / 'checkpoints' / name)
  before = listing(copied)
  with pytest.raises(
    ValueError, match=r'(?s)no checkpoint.*8 is.*4 is damaged'
  ):
    loop.fit(CONFIG, copied)
  with pytest.raises(ValueError, match='no checkpoint'):
    checkpoint.load(copied)
  assert listing(copied) == before


def test_a_folder_without_its_records_is_refused(copied):
  (copied / 'metrics.jsonl').unlink()
  before = listing(copied)
  with pytest.raises(ValueError, match=r'metrics\.jsonl has no records'):
    loop.fit(CONFIG, copied)
  assert listing(copied) == before


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'seed': 1}, 'seed was 0 and is 1'),
    ({'steps': 10}, 'steps was 9 and is 10'),
    (
      {'model': {**CONFIG['model'], 'width': 32}},
      'model.width was 16 and is 32',
    ),
  ],
  ids=str,
)
def test_a_folder_of_another_configuration_is_refused(stopped, change, message):
  before = listing(stopped)
  with pytest.raises(ValueError, match=message):
    loop.fit(CONFIG | change, stopped)
  assert listing(stopped) == before


def test_a_folder_of_other_data_is_refused(stopped, monkeypatch):
  before = listing(stopped)
  monkeypatch.setattr(MQAR, 'fingerprint', lambda self: 'another corpus')
  with pytest.raises(ValueError, match=r'on other data.*another corpus'):
    loop.fit(CONFIG, stopped)
  assert listing(stopped) == before


def test_what_changes_no_number_may_change(copied, finished):
  loop.fit(CONFIG | {'log_every': 5, 'keep': 1}, copied)
  assert same_bits(outcome(copied)[1], outcome(finished[0])[1])


def test_loss_that_is_not_finite_stops_the_run(tmp_path, finished, monkeypatch):
  workdir = tmp_path / 'run'
  good = MQAR.batch

  def broken(self, split, step, rows):
    batch = good(self, split, step, rows)
    if split == 'train' and step == 6:
      batch.weights[0, 0] = np.nan
    return batch

  monkeypatch.setattr(MQAR, 'batch', broken)
  with pytest.raises(
    FloatingPointError, match=r'step 6 .*after 4 steps'
  ) as info:
    loop.fit(CONFIG, workdir)
  assert '6 updates before it were good' in str(info.value)
  assert [p.name for p in (workdir / 'checkpoints').iterdir()] == ['4']
  assert max(r['step'] for r in log.read(workdir / 'metrics.jsonl')) == 6
  monkeypatch.setattr(MQAR, 'batch', good)  # the data are mended
  loop.fit(CONFIG, workdir)
  ends_like(workdir, finished)


def test_compilation_is_off_the_clock():
  metrics = {
    'loss': (jnp.float32(3), jnp.float32(2)),
    'grad_norm': jnp.float32(1),
    'learning_rate': jnp.float32(0.1),
    'stopped_at': jnp.int32(-1),
  }
  window = loop._Window()
  window.add(metrics)  # the step that compiles
  numbers, _ = window.read()
  assert numbers['steps_per_second'] is None
  assert numbers['loss'] == 1.5
  window.add(metrics)
  assert window.read()[0]['steps_per_second'] > 0


# What comes out.


def test_load_gives_the_best_model(finished):
  workdir, _, _ = finished
  loaded = checkpoint.load(workdir)
  assert loaded.config == build.complete(CONFIG)
  records = log.read(workdir / 'metrics.jsonl')
  saved = {int(p.name) for p in (workdir / 'checkpoints').iterdir()}
  scores = [r for r in records if r['kind'] == 'eval' and r['step'] in saved]
  best = max(scores, key=lambda r: (r['accuracy'], r['step']))
  task, _ = build.build(loaded.config)
  batch = task.batch('test', 0, range(6))
  logits, _ = jax.jit(loaded.model.apply)(loaded.params, batch.inputs)
  total, count = task.metrics(logits, batch)['loss']
  assert float(total / count) == pytest.approx(best['loss'], rel=1e-5)


def test_load_wants_the_folder_of_a_run(tmp_path):
  with pytest.raises(ValueError, match=r'no config\.json'):
    checkpoint.load(tmp_path)


# The command and its configuration.


@pytest.mark.parametrize(
  'arg',
  ['quick', 'quick,task=mqar,gated_linear'],
)
def test_a_quick_configuration_trains(tmp_path, arg):
  config = lm_config.get_config(arg)
  config.steps = 2
  config.batch = 2
  config.eval_batches = 1
  config.model.update(width=16, depth=1)  # so that they compile faster
  out = io.StringIO()
  console = Console(file=out, width=100)
  plain = config.to_dict()
  result = train_program.train(plain, tmp_path / 'run', console)
  train_program.report(result, plain, tmp_path / 'run', console)
  assert result['step'] == 2
  for name in result['metrics']:
    assert name.replace('_', ' ') in out.getvalue()
  assert str(tmp_path / 'run') in out.getvalue()


def test_a_configuration_has_the_fields_of_its_mechanisms():
  config = lm_config.get_config('sliding_window s4d,size=small,task=mqar')
  mechanisms = config.model.mechanisms
  assert sorted(mechanisms) == ['s4d', 'sliding_window']
  for name, own in mechanisms.items():
    known = {f.name for f in dataclasses.fields(registry.make(name))}
    assert set(own) == known - {'width', 'policy', 'parent', 'name'}
  for size in lm_config.SIZES:
    build.complete(lm_config.get_config(f'size={size}').to_dict())


# ml_collections loads configurations in the way of old.
old_loader = pytest.mark.filterwarnings('ignore:the load_module')


def parse(*argv):
  values = flags.FlagValues()
  argv = ['train', *argv]
  train_program.define(values, argv)
  train_program.parsed(argv, values)
  return values.config


CONFIG_FILE = f'--config={ROOT / "configs" / "lm.py"}'


@old_loader
def test_scalars_are_set_by_name():
  config = parse(
    f'{CONFIG_FILE}:multi_head,size=tiny',
    '--workdir=w',
    '--config.model.mechanisms.multi_head.head_dim=5',  # None by default
    '--config.optimizer.schedule.peak=0.5',
  )
  assert config.model.mechanisms.multi_head.to_dict()['head_dim'] == 5
  assert config.optimizer.schedule.peak == 0.5


@old_loader
@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ([f'{CONFIG_FILE}:gated_liner'], 'Did you mean gated_linear'),
    ([f'{CONFIG_FILE}:size=smal'], 'Did you mean small'),
    ([f'{CONFIG_FILE}:a,b'], 'two mechanisms'),
    ([f'{CONFIG_FILE}:sise=small'], 'write size='),
    ([f'{CONFIG_FILE}:task=byts'], 'Did you mean bytes'),
    ([f'{CONFIG_FILE}:preset=fast'], "no preset 'fast'"),
    ([CONFIG_FILE, '--config.bach=3'], 'Did you mean "batch"'),
    ([CONFIG_FILE, '--config.batch=x'], 'invalid literal'),
    (['--config=none.py'], 'none.py'),
    ([], '--config'),
  ],
  ids=str,
)
def test_a_bad_command_says_what_is_wrong(argv, message):
  with pytest.raises(SystemExit) as info:
    parse('--workdir=w', *argv)
  text = str(info.value)
  assert text.startswith('error: ')
  assert message in text
  assert '\n' not in text


def test_the_command_explains_itself():
  shown = subprocess.run(
    [sys.executable, '-m', 'experiments.train', '--help'],
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )
  for word in ('--workdir', '--config', 'configs/lm.py', 'resumes'):
    assert word in shown.stdout
