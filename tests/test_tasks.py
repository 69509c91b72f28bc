"""Tasks: batches are pure, questions have answers, references are right."""

import dataclasses
import hashlib
import json
import lzma
import math
from collections import Counter, defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.tasks import batch as batches
from jaxattn.tasks import bytes as byte_task
from jaxattn.tasks import (
  draw,
  induction,
  linear_regression,
  mqar,
  ngram,
  registry,
  selective_copy,
)

WORDS = (
  'def',
  'class',
  'return',
  'self',
  'import',
  'for',
  'if',
  'None',
  'in',
  '=',
)


def prose(seed: int, words: int) -> str:
  picks = draw.below(draw.keys(seed, rows=np.zeros(1)), words, 10, 0)[0]
  return f'# {seed}\n' + ' '.join(WORDS[i] for i in picks) + '\n'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """60 documents, and beside them what must be passed over."""
  root = tmp_path_factory.mktemp('text')
  (root / 'deep').mkdir()
  for i in range(60):
    place = root / 'deep' if i % 3 else root
    (place / f'{i:02}.txt').write_text(prose(i, 100))
  (root / 'copy.txt').write_text(prose(7, 100))
  (root / 'empty.txt').write_text('')
  (root / 'binary.dat').write_bytes(b'MARK\0\1')
  (root / 'latin.txt').write_bytes('MARK é'.encode('latin-1'))
  (root / '.hidden').write_text('MARK')
  for name in ('.git', 'site-packages', '__pycache__'):
    (root / name).mkdir()
    (root / name / 'a.txt').write_text('MARK')
  return root


def small_bytes(folder, **fields):
  fields = {'length': 16, 'test_rows': 20, **fields}
  return registry.make('bytes', path=str(folder), **fields)


TOKENS = (
  'mqar',
  'mqar random',
  'mqar finite',
  'bytes',
  'induction',
  'selective_copy',
)


@pytest.fixture(params=[*TOKENS, 'linear_regression'])
def task(request, folder):
  if request.param == 'bytes':
    return small_bytes(folder)
  return {
    'mqar': mqar.make('quick', test_rows=20),
    'mqar random': mqar.make('quick', filler='random', test_rows=20),
    'mqar finite': mqar.make(
      'quick', train_size=100, step_rows=20, test_rows=20
    ),
    'induction': induction.make('quick', test_rows=20),
    'selective_copy': selective_copy.make('quick', length=24, test_rows=20),
    'linear_regression': linear_regression.make('quick', test_rows=20),
  }[request.param]


def arrays(batch):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(batch)]


def equal(one, other) -> bool:
  return all(map(np.array_equal, arrays(one), arrays(other)))


# Random numbers


def test_bits_are_splitmix64():
  """The published first outputs of the generator with state 0."""
  words = draw.bits(np.zeros(1, np.uint64), 3, stream=0)[0]
  assert [hex(word) for word in words] == [
    '0xe220a8397b1dcdaf',
    '0x6e789e6aa1b965f4',
    '0x6c45d188009454f',
  ]


def test_distinct_draws_every_arrangement_equally_often():
  count, bound, n = 60_000, 5, 3
  key = draw.keys(3, rows=np.arange(count))
  drawn = Counter(map(tuple, draw.distinct(key, n, bound, stream=1).tolist()))
  assert all(len(set(one)) == n for one in drawn)
  assert len(drawn) == 60
  expected = count / 60
  chi2 = sum((seen - expected) ** 2 / expected for seen in drawn.values())
  assert chi2 < 59 + 5 * math.sqrt(2 * 59)


def test_streams_rows_and_words_are_unrelated():
  rows = np.arange(50)
  key = draw.keys(1, 0, 0, rows=rows)
  drawn = [
    draw.bits(key, 20, 0),
    draw.bits(key, 20, 1),
    draw.bits(draw.keys(1, 0, 1, rows=rows), 20, 0),
    draw.bits(draw.keys(0, 1, 0, rows=rows), 20, 0),
    draw.bits(draw.keys(2, 0, 0, rows=rows), 20, 0),
  ]
  assert len(np.unique(np.concatenate(drawn))) == 5 * 50 * 20
  mean = draw.uniform(key, 2000, 0).mean()
  assert abs(mean - 0.5) < 5 / math.sqrt(12 * 50 * 2000)


def test_permutation_holds_everything_once():
  order = draw.permutation(1, 2, size=1000)
  assert np.array_equal(np.sort(order), np.arange(1000))
  assert not np.array_equal(order, draw.permutation(1, 3, size=1000))


# What every task keeps


def check_pure(task):
  whole = task.batch('train', 3, range(20))
  odd = task.batch('train', 3, np.arange(1, 20, 2))
  assert equal(odd, jax.tree.map(lambda x: x[1::2], whole))
  tail = task.batch('train', 3, range(13, 20))
  assert equal(tail, jax.tree.map(lambda x: x[13:], whole))
  test = task.batch('test', 0, range(20))
  assert equal(
    task.batch('test', 0, range(5, 9)), jax.tree.map(lambda x: x[5:9], test)
  )
  assert equal(task.batch('train', 3, range(20)), whole)
  assert not equal(task.batch('train', 4, range(20)), whole)
  assert not equal(test, whole)
  other = dataclasses.replace(task, seed=task.seed + 1)
  assert not equal(other.batch('train', 3, range(20)), whole)
  inputs = np.concatenate([whole.inputs, test.inputs])
  assert len(np.unique(inputs, axis=0)) == 40


def test_batches_are_pure(task):
  check_pure(task)


@dataclasses.dataclass(frozen=True)
class DrawsInOrder(mqar.MQAR):
  """Mutant: a row depends on how many were drawn before it."""

  def batch(self, split, step, rows):
    key = draw.keys(self.seed, split == 'test', step, rows=np.zeros(1))
    start = draw.bits(key, len(rows), 0)[0] >> 40
    return super().batch('train', step, start.astype(np.int64))


@dataclasses.dataclass(frozen=True)
class ForgetsTheStep(mqar.MQAR):
  """Mutant: every step is the same."""

  def batch(self, split, step, rows):
    return super().batch(split, 0, rows)


@dataclasses.dataclass(frozen=True)
class TestsOnTraining(mqar.MQAR):
  """Mutant: the test rows are the training rows."""

  __test__ = False

  def batch(self, split, step, rows):
    return super().batch('train', 3, rows)


@pytest.mark.parametrize(
  'mutant', [DrawsInOrder, ForgetsTheStep, TestsOnTraining]
)
def test_purity_rejects(mutant):
  with pytest.raises(AssertionError):
    check_pure(mutant(vocab=64))


def test_batch_is_a_pytree_of_the_promised_arrays(task):
  batch = task.batch('train', 0, range(3))
  shape = (3, task.length)
  kind, wide = np.int32, shape
  if not hasattr(task, 'vocab'):
    kind, wide = np.float32, (*shape, task.features)
  for name, dtype, size in [
    ('inputs', kind, wide),
    ('targets', kind, shape),
    ('weights', np.float32, shape),
  ]:
    array = getattr(batch, name)
    assert isinstance(array, np.ndarray)
    assert array.shape == size
    assert array.dtype == dtype
  assert batch.packing is None
  if hasattr(task, 'vocab'):
    assert batch.inputs.max() < task.vocab
    assert batch.targets.max() < task.vocab
    assert batch.inputs.min() >= 0
  assert np.array_equal(batch.weights.sum(1), np.full(3, task.asked))
  doubled = jax.jit(lambda b: jax.tree.map(lambda x: 2 * x, b))(batch)
  assert isinstance(doubled, batches.Batch)
  assert task.batch('train', 0, range(0)).inputs.shape == (0, *wide[1:])


@pytest.mark.parametrize(
  ('split', 'step', 'rows', 'message'),
  [
    ('valid', 0, range(2), 'known splits: train, test'),
    ('test', 1, range(2), 'the test set is one batch'),
    ('test', 0, range(19, 21), 'row 20 asked of .* test_rows=20'),
    ('train', 0, np.array([-1]), 'integers >= 0'),
    ('train', -1, range(2), 'step >= 0'),
  ],
)
def test_batches_that_do_not_exist(task, split, step, rows, message):
  with pytest.raises(ValueError, match=message):
    task.batch(split, step, rows)


@pytest.mark.parametrize('task', TOKENS, indirect=True)
def test_metrics_equal_a_slow_sum(task):
  rng = np.random.default_rng(0)
  batch = task.batch('test', 0, range(4))
  logits = rng.normal(size=(4, task.length, task.vocab)).astype(np.float32)
  scores = jax.jit(task.metrics)(logits, batch)
  logp = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1))[..., None]
  loss, right = [], []
  for b, t in zip(*np.nonzero(batch.weights)):
    loss.append(-logp[b, t, batch.targets[b, t]])
    right.append(logits[b, t].argmax() == batch.targets[b, t])
  assert len(loss) == 4 * task.asked
  for name, values in [('loss', loss), ('accuracy', right)]:
    total, count = scores[name]
    assert count == len(values)
    np.testing.assert_allclose(total, np.sum(values), rtol=1e-6)
  losses = task.losses(logits, batch)
  assert losses.shape == batch.weights.shape
  np.testing.assert_allclose(
    np.sum(losses * batch.weights), scores['loss'][0], rtol=1e-6
  )
  assert task.headline in scores
  assert task.better in ('higher', 'lower')
  assert set(task.chance) <= set(scores)

  # What is not asked does not count, and half precision is not summed in.
  asked = batch.weights[..., None] > 0
  same = task.metrics(np.where(asked, logits, 7), batch)
  np.testing.assert_allclose(same['loss'][0], scores['loss'][0], rtol=1e-6)
  half = task.metrics(jnp.asarray(logits, jnp.bfloat16), batch)
  assert half['loss'][0].dtype == jnp.float32


def test_fingerprints_follow_the_data(task):
  print_ = task.fingerprint()
  assert len(print_) == 16
  assert print_ == dataclasses.replace(task).fingerprint()
  changes = [{'seed': 1}, {'test_rows': 10}]
  if isinstance(task, linear_regression.LinearRegression):
    changes += [{'pairs': 9}, {'dimension': 3}, {'noise': 0.1}]
  else:
    changes += [{'length': 32}]
  if isinstance(task, mqar.MQAR):
    changes += [{'pairs': 3}, {'power': 0.5}, {'vocab': 66}]
  if isinstance(task, selective_copy.SelectiveCopy):
    changes += [{'tokens': 3}, {'vocab': 9}]
  prints = {
    dataclasses.replace(task, **change).fingerprint() for change in changes
  }
  assert len(prints | {print_}) == len(changes) + 1


def test_fingerprint_shows_a_changed_generator():
  @dataclasses.dataclass(frozen=True)
  class MQAR(mqar.MQAR):
    def _slots(self, key):
      return super()._slots(key)[:, ::-1]

  assert MQAR().fingerprint() != mqar.MQAR().fingerprint()


# Finding tasks


def test_tasks_are_found_by_file_name(tmp_path, monkeypatch):
  assert {
    'bytes',
    'induction',
    'linear_regression',
    'mqar',
    'selective_copy',
  } <= set(registry.names())
  assert 'ngram' not in registry.names()
  assert registry.find('mqar') is mqar
  assert registry.make('mqar', 'cpu', pairs=8).pairs == 8
  (tmp_path / 'owntasks').mkdir()
  (tmp_path / 'owntasks' / 'echo.py').write_text('PRESETS = {}\n')
  monkeypatch.syspath_prepend(tmp_path)
  assert registry.find('owntasks.echo').PRESETS == {}


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: registry.find('mqra'), "no task 'mqra'.*mean mqar"),
    (lambda: registry.find('zzz'), 'There are: .*bytes.*mqar'),
    (lambda: registry.find('no.such'), "no task 'no.such'"),
    (lambda: mqar.make('qick'), "no preset 'qick'.*mean quick"),
    (lambda: mqar.make(pair=3), "no field 'pair'.*mean pairs.*vocab, length"),
    (lambda: byte_task.make(lenght=3), "no field 'lenght'.*mean length"),
  ],
)
def test_unknown_names_are_told_the_nearest(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize('name', ['bytes', 'mqar'])
def test_every_preset_makes_batches(name):
  presets = registry.find(name).PRESETS
  assert {'quick', 'cpu', 'paper'} <= set(presets)
  for preset in presets:
    task = registry.make(name, preset)
    for split in batches.SPLITS:
      assert task.batch(split, 0, range(2)).inputs.shape == (2, task.length)


# MQAR


def check_mqar(task, batch):
  """The definition, one row and one place at a time."""
  for inputs, targets, weights in zip(
    batch.inputs.tolist(), batch.targets.tolist(), batch.weights.tolist()
  ):
    head = inputs[: 2 * task.pairs]
    bound = dict(zip(head[::2], head[1::2]))
    assert len(bound) == len(set(bound.values())) == task.pairs
    assert all(1 <= key < task.vocab // 2 for key in bound)
    assert all(task.vocab // 2 <= v < task.vocab for v in bound.values())
    asked = [t for t, weight in enumerate(weights) if weight]
    assert {weights[t] for t in asked} == {1.0}
    assert {inputs[t] for t in asked} == set(bound)
    assert len(asked) == task.pairs
    for t in range(task.length):
      if t in asked:
        assert t >= 2 * task.pairs
        assert t % 2 == 0
        assert targets[t] == bound[inputs[t]]
      else:
        assert targets[t] == 0
        if task.filler == 'zero' and t >= 2 * task.pairs:
          assert inputs[t] == 0
  answers = task.oracle(batch.inputs)
  assert (answers == batch.targets)[batch.weights > 0].all()


MQARS = {
  'zero': {},
  'random': {'filler': 'random'},
  'tight': {'vocab': 34, 'pairs': 16},
  'odd vocabulary': {'vocab': 13, 'pairs': 5},
  'shortest': {'vocab': 4, 'length': 4, 'pairs': 1},
}


@pytest.mark.parametrize('fields', MQARS.values(), ids=MQARS)
@pytest.mark.parametrize('split', batches.SPLITS)
def test_mqar_questions_are_about_the_pairs(fields, split):
  task = mqar.make('quick', **fields)
  check_mqar(task, task.batch(split, 0, range(50)))


def rotated(x, by=1):
  return np.roll(x, by, axis=1)


MQAR_MUTANTS = {
  'answer of another key': lambda b: dataclasses.replace(
    b, targets=b.targets[::-1]
  ),
  'answer one place late': lambda b: dataclasses.replace(
    b, targets=rotated(b.targets), weights=rotated(b.weights)
  ),
  'weight where nothing is asked': lambda b: dataclasses.replace(
    b, weights=np.maximum(b.weights, rotated(b.weights))
  ),
  'values swapped in the prompt': lambda b: dataclasses.replace(
    b, inputs=b.inputs[:, [0, 3, 2, 1, *range(4, 64)]]
  ),
  'half a weight': lambda b: dataclasses.replace(b, weights=b.weights / 2),
}


@pytest.mark.parametrize('mutant', MQAR_MUTANTS.values(), ids=MQAR_MUTANTS)
def test_mqar_check_rejects(mutant):
  task = mqar.make('quick')
  with pytest.raises(AssertionError):
    check_mqar(task, mutant(task.batch('train', 0, range(50))))


def test_mqar_oracle_reads_the_prompt():
  """With two values swapped it is wrong on exactly these two of four."""
  task = mqar.make('quick')
  batch = task.batch('train', 0, range(200))
  swapped = MQAR_MUTANTS['values swapped in the prompt'](batch)
  right = task.oracle(swapped.inputs) == batch.targets
  assert right[batch.weights > 0].mean() == 0.5


def test_mqar_random_filler_is_any_token():
  task = mqar.make('quick', vocab=16, filler='random')
  batch = task.batch('train', 0, range(500))
  filler = batch.inputs[:, 8:][batch.weights[:, 8:] == 0]
  share = np.bincount(filler, minlength=16) / len(filler)
  assert abs(share - 1 / 16).max() < 5 * math.sqrt(1 / 16 / len(filler))


@pytest.mark.parametrize('reference', ['chance', 'chance_in_row'])
def test_mqar_chance_is_what_guessing_scores(reference):
  task = mqar.make('quick')
  batch = task.batch('test', 0, range(512))
  rng = np.random.default_rng(0)
  allowed = np.broadcast_to(
    np.arange(task.vocab) >= task.vocab // 2, (512, task.vocab)
  )
  if reference == 'chance_in_row':
    allowed = np.zeros((512, task.vocab), bool)
    np.put_along_axis(allowed, batch.inputs[:, 1:8:2], True, axis=1)
  allowed = allowed[:, None, :]
  flat = np.where(allowed, 0.0, -1e9) + np.zeros((512, 64, 1))
  guess = flat + 1e-4 * rng.normal(size=flat.shape)
  expected = getattr(task, reference)
  total, count = task.metrics(guess, batch)['accuracy']
  p = expected['accuracy']
  assert abs(total / count - p) < 5 * math.sqrt(p * (1 - p) / count)
  total, count = task.metrics(flat, batch)['loss']
  np.testing.assert_allclose(total / count, expected['loss'], rtol=1e-5)


def slot_shares(task, rows=20_000):
  """How often the first and the second key stand in each slot."""
  batch = task.batch('train', 0, range(rows))
  shares = []
  for place in (0, 2):
    key = batch.inputs[:, place, None]
    slots = ((batch.inputs == key) & (batch.weights > 0))[:, 2 * task.pairs :]
    shares.append(slots[:, ::2].mean(0))
  return np.stack(shares)


def test_mqar_distances_follow_the_power_law():
  rows = 20_000

  def off(power, expected):
    share = slot_shares(mqar.make('quick', power=power), rows)
    return (abs(share - expected) / np.sqrt(expected / rows)).max()

  for power, other in [(0.01, 0.3), (1.0, 0.8)]:
    # p(g) ~ a g^(a-1); the second key draws from what the first one left.
    p = power * np.arange(1.0, 29.0) ** (power - 1)
    p /= p.sum()
    left = p[None, :] / (1 - p[:, None])
    np.fill_diagonal(left, 0)
    expected = np.stack([p, p @ left])
    assert off(power, expected) < 5
    assert off(other, expected) > 5


def test_mqar_finite_set_comes_once_an_epoch():
  size, rows = 40, 16
  task = mqar.make('quick', train_size=size, step_rows=rows)
  seen = np.concatenate(
    [task.batch('train', step, range(rows)).inputs for step in range(10)]
  )
  epochs = seen.reshape(4, size, task.length)
  sets = [{row.tobytes() for row in epoch} for epoch in epochs]
  assert all(len(one) == size for one in sets)
  assert all(one == sets[0] for one in sets)
  assert len({epoch.tobytes() for epoch in epochs}) == 4
  test = task.batch('test', 0, range(512)).inputs
  assert not sets[0] & {row.tobytes() for row in test}
  with pytest.raises(ValueError, match=r'row 16 .* step_rows=16'):
    task.batch('train', 0, range(17))


def test_mqar_keeps_to_the_published_settings():
  settings = [
    (task.length, task.pairs, task.vocab, task.train_size, task.test_rows)
    for task in map(mqar.make, mqar.PUBLISHED)
  ]
  assert settings == [
    (length, pairs, 8192, 100_000, 3000)
    for length, pairs in [(64, 4), (128, 8), (256, 16), (512, 64)]
  ]


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'pairs': 17}, 'pairs=17 and length=64'),
    ({'pairs': 0}, 'pairs=0'),
    ({'length': 65}, 'length=65.*even'),
    ({'vocab': 8}, 'vocab=8 has 3 keys'),
    ({'power': 0.0}, 'power=0'),
    ({'filler': 'none'}, "filler='none'"),
    ({'test_rows': 0}, 'test_rows=0'),
    ({'seed': -1}, 'seed=-1'),
    ({'train_size': 10}, 'step_rows=None'),
    ({'train_size': 0, 'step_rows': 4}, 'train_size=0'),
  ],
)
def test_mqar_that_cannot_be_built(fields, message):
  with pytest.raises(ValueError, match=message):
    mqar.make('quick', **fields)


# Bytes


def check_split(corpus, texts):
  """Every text whole in one part and closed by NUL; nothing besides."""
  parts = [part.tobytes() for part in (corpus.train, corpus.test)]
  counts = [
    [part.count(text.encode() + b'\0') for part in parts] for text in texts
  ]
  assert all(sorted(count) == [0, 1] for count in counts)
  assert tuple(np.sum(counts, axis=0)) == corpus.documents
  assert sum(map(len, parts)) == sum(len(text.encode()) + 1 for text in texts)


def test_bytes_no_document_in_both_parts(folder):
  texts = [prose(i, 100) for i in range(60)]
  corpus = small_bytes(folder).corpus
  check_split(corpus, texts)
  share = len(corpus.test) / (len(corpus.train) + len(corpus.test))
  assert 0.05 <= share < 0.07
  moved = corpus.test[: len(corpus.test) // 2]
  for mutant in (
    dataclasses.replace(corpus, train=np.append(corpus.train, corpus.test)),
    dataclasses.replace(corpus, train=np.append(corpus.train, moved)),
    dataclasses.replace(corpus, test=corpus.test[:-1]),
  ):
    with pytest.raises(AssertionError):
      check_split(mutant, texts)


def test_bytes_a_document_keeps_its_side(folder, tmp_path):
  for i in range(61):
    (tmp_path / f'renamed{i}.md').write_text(prose(i, 100))
  before, after = (
    byte_task.load(str(root)).test.tobytes() for root in (folder, tmp_path)
  )
  sides = [
    [prose(i, 100).encode() in part for part in (before, after)]
    for i in range(60)
  ]
  assert sum(one != other for one, other in sides) <= 1


def check_shifted(task, batch):
  assert np.array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
  assert (batch.weights == 1).all()
  whole = np.concatenate([batch.inputs, batch.targets[:, -1:]], axis=1)
  return [row.astype(np.uint8).tobytes() for row in whole]


def test_bytes_targets_are_the_next_bytes(folder):
  task = small_bytes(folder)
  parts = {
    'train': task.corpus.train.tobytes(),
    'test': task.corpus.test.tobytes(),
  }
  for split, text in parts.items():
    for row in check_shifted(task, task.batch(split, 0, range(20))):
      assert row in text
  batch = task.batch('train', 0, range(20))
  with pytest.raises(AssertionError):
    check_shifted(task, dataclasses.replace(batch, targets=batch.inputs))


def test_bytes_test_rows_cover_the_held_out_text_evenly(folder):
  task = small_bytes(folder)
  text = task.corpus.test
  crops = (len(text) - 1) // task.length
  whole = dataclasses.replace(task, test_rows=crops)
  targets = whole.batch('test', 0, range(crops)).targets
  assert np.array_equal(targets.ravel(), text[1 : crops * task.length + 1])
  place = np.arange(len(text), dtype=np.int64)  # where each test row begins
  places = byte_task.Corpus('places', place, place, (1, 1), '')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(byte_task, 'load', lambda path: places)
    starts = task.batch('test', 0, range(20)).inputs[:, 0]
  gaps = np.diff(starts)
  assert gaps.min() >= task.length
  assert gaps.max() - gaps.min() <= task.length
  assert starts[-1] + gaps.max() + task.length >= crops * task.length
  other = dataclasses.replace(task, seed=5)
  assert equal(
    other.batch('test', 0, range(20)), task.batch('test', 0, range(20))
  )


def test_bytes_training_reaches_every_byte(tmp_path):
  (tmp_path / 'a.bin').write_bytes(bytes(range(60)))
  task = byte_task.make(path=str(tmp_path / 'a.bin'), length=1, test_rows=1)
  batch = task.batch('train', 0, range(2000))
  assert task.corpus.train.size == 57  # the last 5% of one document
  assert set(batch.inputs.ravel()) == set(range(56))
  assert set(batch.targets.ravel()) == set(range(1, 57))


def test_bytes_buckets_make_up_the_whole(folder):
  assert byte_task.buckets(128) == [(0, 32), (32, 64), (64, 128)]
  assert byte_task.buckets(100) == [(0, 32), (32, 64), (64, 100)]
  assert byte_task.buckets(32) == [(0, 32)]
  assert byte_task.buckets(8) == [(0, 8)]
  task = small_bytes(folder, length=80, test_rows=3)
  batch = task.batch('test', 0, range(3))
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(3, 80, 256))
  # The last third is known for certain, so its bucket alone costs nothing.
  logits[:, 64:] += 100 * np.eye(256)[batch.targets[:, 64:]]
  scores = task.metrics(logits, batch)
  parts = [scores[f'bits_per_byte@{name}'] for name in ('0-32', '32-64')]
  last = scores['bits_per_byte@64-80']
  assert [int(count) for _, count in [*parts, last]] == [96, 96, 48]
  assert last[0] < 1e-3
  assert min(part[0] / part[1] for part in parts) > 5
  total, count = scores['bits_per_byte']
  np.testing.assert_allclose(sum(p[0] for p in [*parts, last]), total, 1e-6)
  assert count == 240
  flat = task.metrics(np.zeros((3, 80, 256)), batch)
  for name in ('bits_per_byte', 'loss'):
    total, count = flat[name]
    np.testing.assert_allclose(total / count, task.chance[name], rtol=1e-6)


def test_bytes_sources_of_text(tmp_path):
  """A .jsonl file, a folder with one, and a mapped file."""
  texts = [prose(i, 50) for i in range(40)] + ['ünïcode\u2028 and a line\n']
  lines = [json.dumps({'text': text, 'id': i}) for i, text in enumerate(texts)]
  alone = tmp_path / 'alone.jsonl'
  alone.write_text('\n\n'.join(lines) + '\n')
  check_split(byte_task.load(str(alone)), texts)

  (tmp_path / 'both').mkdir()
  (tmp_path / 'both' / 'a.jsonl').write_text('\n'.join(lines[:20]))
  (tmp_path / 'both' / 'b.jsonl').write_text('\n'.join(lines[10:]))
  check_split(byte_task.load(str(tmp_path / 'both')), texts)

  big = tmp_path / 'big.txt'
  big.write_text(''.join(texts))
  corpus = byte_task.load(str(big))
  assert isinstance(corpus.train, np.memmap)
  joined = np.concatenate([corpus.train, corpus.test]).tobytes()
  assert joined == big.read_bytes()
  assert corpus.train.size == round(0.95 * len(joined))


def test_bytes_fingerprint_follows_the_text_and_not_its_place(tmp_path):
  text = prose(1, 400)
  tasks = []
  for name, written in [('a', text), ('b', text), ('c', text[:-2] + '!\n')]:
    (tmp_path / name).write_text(written)
    tasks.append(
      byte_task.make(path=str(tmp_path / name), length=16, test_rows=2)
    )
  same, copy, changed = tasks
  assert same.fingerprint() == copy.fingerprint()
  assert same.corpus_hash == copy.corpus_hash
  assert same.corpus_hash != changed.corpus_hash
  assert same.fingerprint() != changed.fingerprint()
  cut = round(0.95 * len(text))
  assert (
    same.corpus_hash
    == hashlib.sha256(f'{cut} {len(text) - cut}\n{text}'.encode()).hexdigest()
  )


def test_bytes_texts_that_cannot_be_used(tmp_path, folder):
  def write(name, text):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)

  (tmp_path / 'bare').mkdir()
  (tmp_path / 'blobs').mkdir()
  write('blobs/a.bin', '\0\1')
  line = '{"text": "a"}\n'
  for path, message in [
    (str(tmp_path / 'missing'), 'there is no file or folder .*missing'),
    (write('empty.txt', ''), r'empty\.txt is empty'),
    (write('empty.jsonl', '\n'), r'no text in .*empty\.jsonl; give path='),
    (str(tmp_path / 'bare'), 'no text in .*bare; give path='),
    (str(tmp_path / 'blobs'), 'no text in .*blobs; give path='),
    (write('bad.jsonl', line + '{'), r'bad\.jsonl, line 2: not JSON'),
    (write('x.jsonl', '{"txt": "a"}'), r"x\.jsonl, line 1: no field 'text'"),
    (write('y.jsonl', line + '"text"'), r"y\.jsonl, line 2: no field 'text'"),
    (write('z.jsonl', '{"text": 1}'), r"z\.jsonl, line 1: no field 'text'"),
    (write('small.txt', 'abc'), r'small\.txt is too small'),
  ]:
    with pytest.raises(ValueError, match=message):
      byte_task.make(path=path)
  with pytest.raises(ValueError, match='hold 0 test rows of length=100000'):
    small_bytes(folder, length=100_000)
  with pytest.raises(ValueError, match='not test_rows=9999; ask for fewer'):
    small_bytes(folder, test_rows=9999)
  with pytest.raises(ValueError, match='length=0'):
    small_bytes(folder, length=0)


def test_bytes_files_that_may_not_be_read(tmp_path, monkeypatch):
  (tmp_path / 'locked.txt').write_text('text')

  def refuse(*_, **__):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(byte_task.Path, 'read_bytes', refuse)
  monkeypatch.setattr(byte_task.np, 'memmap', refuse)
  for path in (tmp_path, tmp_path / 'locked.txt'):
    with pytest.raises(ValueError, match=r'cannot read .*locked\.txt: Perm'):
      byte_task.load(str(path))


# References


def slow_surprisal(train, inputs, targets, order):
  """Witten-Bell from dictionaries, one byte at a time."""
  text = list(train) + [0] * (order - 1)
  seen = defaultdict(Counter)
  for start in range(len(train)):
    for n in range(1, order + 1):
      gram = tuple(text[start : start + n])
      seen[gram[:-1]][gram[-1]] += 1
  bits = np.empty((order, *targets.shape))
  for b, t in np.ndindex(targets.shape):
    p = 1 / 256
    for n in range(1, order + 1):
      context = tuple(inputs[b, max(t + 2 - n, 0) : t + 1])
      if len(context) == n - 1 and context in seen:
        counts = seen[context]
        kinds, total = len(counts), counts.total()
        p = (counts[targets[b, t]] + kinds * p) / (total + kinds)
      bits[n - 1, b, t] = -math.log2(p)
  return bits


@pytest.mark.parametrize(('order', 'length'), [(5, 12), (5, 2), (3, 1), (7, 9)])
def test_ngrams_equal_the_slow_ones(order, length):
  train = np.frombuffer(prose(1, 60).encode() + b'\0\0\xff', np.uint8)
  held = np.frombuffer(prose(2, 40).encode() + b'\xff\xfe\0\0', np.uint8)
  rows = len(held) // (length + 1)
  crops = held[-rows * (length + 1) :].reshape(rows, length + 1).astype(int)
  crops = crops[-20:]
  inputs, targets = crops[:, :-1], crops[:, 1:]
  fast = ngram.surprisal(train, inputs, targets, order)
  slow = slow_surprisal(train.tolist(), inputs, targets, order)
  np.testing.assert_allclose(fast, slow, rtol=1e-12)
  if order > 3 and length > 3:  # another order, or a peek, is another model
    assert not np.allclose(fast[-1], fast[-2])
    assert not np.allclose(fast, slow_surprisal(train, targets, targets, order))


def test_ngram_probabilities_sum_to_one():
  train = np.frombuffer(prose(1, 200).encode(), np.uint8)
  row = np.frombuffer(prose(2, 3).encode() + b'\xf0\xf1', np.uint8).astype(int)
  inputs = np.tile(row, (256, 1))
  targets = np.tile(np.arange(256)[:, None], (1, len(row)))
  bits = ngram.surprisal(train, inputs, targets)
  np.testing.assert_allclose((2.0**-bits).sum(axis=1), 1, rtol=1e-12)


def test_ngrams_do_not_look_beyond_the_crop():
  train = np.frombuffer(prose(1, 200).encode(), np.uint8)
  row = np.frombuffer(prose(2, 20).encode(), np.uint8)[:41].astype(int)
  whole = ngram.surprisal(train, row[None, :-1], row[None, 1:])[-1]
  halves = ngram.surprisal(
    train, row[:-1].reshape(2, 20), row[1:].reshape(2, 20)
  )[-1].reshape(1, 40)
  np.testing.assert_array_equal(halves[:, :20], whole[:, :20])
  np.testing.assert_array_equal(halves[:, 23:], whole[:, 23:])
  assert (halves[:, 20:23] != whole[:, 20:23]).any()
  with pytest.raises(ValueError, match='order=8'):
    ngram.surprisal(train, row[None, :-1], row[None, 1:], order=8)


def test_references_on_the_standard_library():
  """As a user meets them: on exactly the bytes that the model answers."""
  task = byte_task.make('quick')
  assert min(task.corpus.documents) > 10
  scores = ngram.references(task)
  assert list(scores) == ['uniform', 'unigram', '5-gram', 'xz -9']
  assert scores['uniform'] == 8
  assert 1 < scores['5-gram'] < 2.5 < scores['unigram'] < 5.5
  targets = task.batch('test', 0, range(task.test_rows)).targets
  packed = lzma.compress(bytes(targets.ravel().tolist()), preset=9)
  assert scores['xz -9'] == 8 * len(packed) / targets.size
