"""Generation equals the slow way: a full pass over the whole text per token."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxattn
from experiments import generate as command
from jaxattn import registry
from jaxattn.decode import sample
from jaxattn.decode.generate import generate
from jaxattn.models.lm import LM
from jaxattn.nn import Policy
from jaxattn.packing import Packing
from jaxattn.parallel import mesh as meshes

VOCAB = 11
PROMPTS = ((1, 2, 3, 4, 5, 6, 7), (8,), (9, 10, 0, 2))
NEW = 8
ROOM = max(map(len, PROMPTS)) + NEW
ROUNDING = (
  2e-5  # of log-probabilities near -2, after float32 sums in two orders
)
# Tests that ask in the same way share a program, and compiling takes the time.
GREEDY = {'max_new': NEW, 'chunk': 3, 'temperature': 0}
DRAWN = {
  'max_new': NEW,
  'chunk': 3,
  'temperature': 2.0,
  'top_k': 9,
  'top_p': 0.95,
}
HYBRID = {
  'depth': 4,
  'mixer': 'sliding_window delta_net',
  'mechanisms': {
    'sliding_window': {'heads': 2, 'window': 3},
    'delta_net': {'heads': 2},
  },
}
# Matrices from zero, to which `made` adds noise: this compiles much sooner.
ZEROS = Policy(kernel_init=jax.nn.initializers.zeros)


def single(name):
  """Fields of a model of one layer, with the last example of a mechanism."""
  fields = registry.spec(name).examples[-1]
  return {'depth': 1, 'mixer': name, 'mechanisms': {name: fields}}


def made(cls=LM, **fields):
  """A model and its variables, large enough that its answers vary."""
  fields = {'vocab': VOCAB, 'width': 12, 'hidden': 16, 'policy': ZEROS} | fields
  key = jax.random.key(0, impl='rbg')
  variables = jax.jit(LM(**fields).init)(key, jnp.zeros((1, 1), jnp.int32))
  draws = np.random.default_rng(2)
  params = jax.tree.map(
    lambda leaf: np.float32(leaf + draws.normal(0, 0.4, leaf.shape)),
    variables['params'],
  )
  return cls(**fields), {**variables, 'params': jax.device_put(params)}


def mutated(model, cls):
  """The same model of another class."""
  names = [f.name for f in dataclasses.fields(LM) if f.name != 'parent']
  return cls(**{name: getattr(model, name) for name in names})


def scorer(model, variables):
  """Rows of ids -> log-probabilities 'b t v' of full passes, one program.

  Rows are padded on the right, which a causal model cannot see.
  """
  run = jax.jit(lambda ids: jax.nn.log_softmax(model.apply(variables, ids)[0]))

  def score(rows):
    ids = np.zeros((len(rows), ROOM), np.int32)
    for i, row in enumerate(rows):
      ids[i, : len(row)] = row
    return np.asarray(run(ids))

  return score


def naive(model, variables, prompts=PROMPTS):
  """Greedy tokens and their log-probabilities, a full pass for each."""
  score = scorer(model, variables)
  rows = [list(prompt) for prompt in prompts]
  logprobs = np.zeros((len(rows), NEW))
  for i in range(NEW):
    scores = score(rows)
    for r, row in enumerate(rows):
      last = scores[r, len(row) - 1]
      second, best = np.sort(last)[-2:]
      assert best - second > 1e-3, 'rounding would decide: change the weights'
      logprobs[r, i] = best
      row.append(int(last.argmax()))
  return np.array([row[-NEW:] for row in rows]), logprobs


def check(generated, expected):
  tokens, logprobs = expected
  np.testing.assert_array_equal(generated.tokens, tokens)
  np.testing.assert_allclose(generated.logprobs, logprobs, atol=ROUNDING)
  np.testing.assert_array_equal(generated.lengths, [NEW] * len(tokens))


@pytest.fixture(scope='module')
def hybrid():
  return made(**HYBRID)


@pytest.fixture(scope='module')
def softmax():
  return made(**single('multi_head'))


@pytest.fixture(scope='module')
def linear():
  return made(**single('gated_linear'))


@pytest.mark.parametrize('name', registry.names())
def test_greedy_is_the_naive_loop(name):
  fields = single(name)
  if registry.make(name, **fields['mechanisms'][name]).causal:
    model, variables = made(**fields)
    generated = generate(model, variables, PROMPTS, **GREEDY)
    check(generated, naive(model, variables))


def test_any_chunk(hybrid):
  """Also of layers in a scan, and past a window of 3, several times over."""
  expected = naive(*hybrid)
  assert len(np.unique(expected[0])) > 3  # no constant answer
  for chunk in (1, 3, 16):
    check(generate(*hybrid, PROMPTS, **GREEDY | {'chunk': chunk}), expected)


class OrderRestarts(LM):
  """A mutant: every chunk of a prompt begins at order 0."""

  def __call__(self, ids, packing=None, **kw):
    if packing is not None:
      packing = Packing(packing.order % ids.shape[1], packing.segments)
    return super().__call__(ids, packing, **kw)


class OrderSkips(LM):
  """A mutant: chunks after the first are one place too late."""

  def __call__(self, ids, packing=None, **kw):
    if packing is not None:
      late = packing.order >= ids.shape[1]
      packing = Packing(packing.order + late, packing.segments)
    return super().__call__(ids, packing, **kw)


class PadsAreRead(LM):
  """A mutant: what stands behind a short prompt counts."""

  def __call__(self, ids, packing=None, **kw):
    return super().__call__(ids, None, **kw)


class StateDropped(LM):
  """A mutant: decoding starts from the prompt, and then stays there."""

  def __call__(self, ids, packing=None, *, state=None, **kw):
    logits, after = super().__call__(ids, packing, state=state, **kw)
    return logits, after if ids.shape[1] > 1 else state


def test_mutants_are_rejected(softmax):
  model, variables = softmax
  expected = naive(model, variables)
  check(generate(model, variables, PROMPTS, **GREEDY), expected)
  for mutant in (OrderRestarts, OrderSkips, PadsAreRead, StateDropped):
    generated = generate(mutated(model, mutant), variables, PROMPTS, **GREEDY)
    with pytest.raises(AssertionError):
      check(generated, expected)


def test_greedy_is_temperature_0(linear):
  """Without a key; and the temperature that is given then does not matter."""
  cold = generate(*linear, PROMPTS, **GREEDY)
  greedy = generate(
    *linear, PROMPTS, **GREEDY | {'temperature': 1.0, 'greedy': True}
  )
  jax.tree.map(np.testing.assert_array_equal, cold, greedy)


def test_end_tokens(linear):
  """Rows stop after an end token of any kind, and only there."""
  tokens, _, logprobs = generate(*linear, PROMPTS, **GREEDY)
  ends = [int(tokens[0, 2]), int(tokens[2, 4])]
  lengths = [
    next((i + 1 for i, token in enumerate(row) if token in ends), NEW)
    for row in tokens.tolist()
  ]
  assert len(set(lengths)) > 1
  generated = generate(*linear, PROMPTS, **GREEDY, end=ends, pad=-1)
  np.testing.assert_array_equal(generated.lengths, lengths)
  new = np.arange(NEW) < np.array(lengths)[:, None]
  np.testing.assert_array_equal(generated.tokens, np.where(new, tokens, -1))
  np.testing.assert_array_equal(generated.logprobs, np.where(new, logprobs, 0))


def test_logprobs_are_those_of_the_full_pass(linear):
  """Of what was drawn, before temperature, top_k and top_p bend them."""
  generated = generate(*linear, PROMPTS, **DRAWN, key=jax.random.key(3))
  rows = [
    [*prompt, *new] for prompt, new in zip(PROMPTS, generated.tokens.tolist())
  ]
  scores = scorer(*linear)(rows)
  for r, prompt in enumerate(PROMPTS):
    at = len(prompt) - 1 + np.arange(NEW)
    np.testing.assert_allclose(
      generated.logprobs[r], scores[r, at, generated.tokens[r]], atol=ROUNDING
    )


def test_an_array_with_lengths(linear):
  ids = np.full((3, 7), 10)  # what is no prompt must not be read
  for row, prompt in zip(ids, PROMPTS):
    row[: len(prompt)] = prompt
  ragged = generate(*linear, PROMPTS, **GREEDY)
  for array in (ids, jnp.asarray(ids)):
    padded = generate(*linear, array, lengths=[7, 1, 4], **GREEDY)
    jax.tree.map(np.testing.assert_array_equal, ragged, padded)
  whole = generate(*linear, ids, **GREEDY)
  assert (whole.logprobs[0] == ragged.logprobs[0]).all()
  assert (whole.logprobs[1] != ragged.logprobs[1]).any()


def test_rows_do_not_depend_on_each_other(linear):
  draw = lambda *prompts: generate(
    *linear, prompts, **DRAWN, key=jax.random.key(4)
  )
  first, second, third = PROMPTS
  batch = draw(first, third, second)
  other = draw(second * 9, third, first)
  alone = draw(first)
  np.testing.assert_array_equal(other.tokens[1], batch.tokens[1])
  np.testing.assert_array_equal(other.logprobs[1], batch.logprobs[1])
  np.testing.assert_array_equal(alone.tokens[0], batch.tokens[0])
  np.testing.assert_allclose(
    alone.logprobs[0], batch.logprobs[0], atol=ROUNDING
  )
  assert (other.tokens[0] != batch.tokens[0]).any()


def test_draws_follow_the_key(linear):
  """And differ from row to row, and from step to step."""
  draw = lambda seed: np.asarray(
    generate(
      *linear,
      (PROMPTS[0],) * 3,
      **DRAWN | {'temperature': 100.0, 'top_k': VOCAB, 'top_p': 1.0},
      key=jax.random.key(seed),
    ).tokens
  )
  first = draw(0)
  np.testing.assert_array_equal(first, draw(0))
  assert (first != draw(1)).any()
  assert (first[0] != first[1]).any()
  assert (np.ptp(first, axis=1) > 0).all()


traced, ran = [], []


class Counting(LM):
  """Notes when it is traced, and how many tokens each run of it reads."""

  def __call__(self, ids, packing=None, **kw):
    traced.append(ids.shape)
    jax.debug.callback(lambda t=ids.shape[1]: ran.append(t))
    return super().__call__(ids, packing, **kw)


def test_programs_are_reused_and_stop_early(linear):
  """Other prompts, lengths, numbers and an equal model are the same program;
  and when every row has ended, the model is not run any more."""
  model, variables = linear

  def counted(prompts, seed, end, **rules):
    ran.clear()
    generated = generate(
      mutated(model, Counting),
      variables,
      prompts,
      **DRAWN | rules,
      key=jax.random.key(seed),
      end=end,
    )
    jax.block_until_ready(generated)
    jax.effects_barrier()
    return generated

  counted(PROMPTS, 0, end=[0] * VOCAB)
  before = len(traced)
  assert before > 0
  others = ((1,) * 8, (2, 3), (4,) * 5)
  generated = counted(others, 1, [7] * VOCAB, temperature=3, top_k=2, top_p=0.5)
  assert len(traced) == before
  # Prompts in chunks of 3. The first token needs no step; the last is not read.
  assert ran == [3, 3, 3] + [1] * (int(max(generated.lengths)) - 1)
  generated = counted(PROMPTS, 2, end=list(range(VOCAB)))
  assert len(traced) == before
  assert ran == [3, 3, 3]
  np.testing.assert_array_equal(generated.lengths, [1, 1, 1])


@pytest.mark.parametrize('axis_types', ['auto', 'explicit'])
def test_under_a_mesh(linear, axis_types):
  """Rows over however many devices there are: the same numbers."""
  prompts = PROMPTS * len(jax.devices())
  options = DRAWN | {'key': jax.random.key(5)}
  plain = generate(*linear, prompts, **options)
  with jax.set_mesh(meshes.make(axis_types=axis_types)):
    meshed = generate(*linear, prompts, **options)
  np.testing.assert_array_equal(meshed.tokens, plain.tokens)
  np.testing.assert_array_equal(meshed.lengths, plain.lengths)
  np.testing.assert_allclose(meshed.logprobs, plain.logprobs, atol=ROUNDING)


def test_nothing_new(linear):
  generated = generate(*linear, PROMPTS, max_new=0, temperature=0)
  assert generated.tokens.shape == generated.logprobs.shape == (3, 0)
  np.testing.assert_array_equal(generated.lengths, [0, 0, 0])


@pytest.mark.parametrize(
  ('prompts', 'options', 'message'),
  [
    ([], {}, 'no prompts'),
    ([[1], []], {}, r'prompts\[1\] is empty.*start token'),
    (np.zeros((2, 0), int), {}, r'prompts\[0\] is empty'),
    ([[1], [2, 11]], {}, r'prompts\[1\] holds the id 11.*0 to 10'),
    ([[-1]], {}, r'prompts\[0\] holds the id -1'),
    ([[1.5]], {}, 'float64, not integers'),
    ([1, 2], {}, r'prompts\[0\] must be a row'),
    (np.zeros(3, int), {}, r'\(batch, time\), not \(3,\)'),
    ([[1]], {'lengths': [1]}, 'lengths belong to prompts in one array'),
    (np.ones((2, 3), int), {'lengths': [1]}, 'for each of the 2 prompts'),
    (np.ones((2, 3), int), {'lengths': [1, 4]}, r'lengths\[1\]=4.* 3 ids'),
    (np.ones((2, 3), int), {'lengths': [0, 1]}, r'prompts\[0\] is empty'),
    ([[1]], {'max_new': -1}, 'max_new=-1'),
    ([[1]], {'chunk': 0}, 'chunk=0'),
    ([[1]], {'temperature': -1.0}, 'temperature=-1.0'),
    ([[1]], {'temperature': float('nan')}, 'temperature=nan'),
    ([[1]], {'temperature': 1.0}, r'key=jax.random.key\(seed\)'),
    ([[1]], {'top_k': 0}, 'top_k=0'),
    ([[1]], {'top_k': 2.5}, 'top_k=2.5'),
    ([[1]], {'top_p': 0.0}, 'top_p=0.0'),
    ([[1]], {'top_p': 1.1}, 'top_p=1.1'),
    ([[1]], {'end': 11}, 'end holds the id 11'),
    ([[1]], {'end': [0.5]}, 'end has ids of type float64'),
    ([[1]], {'params': {'embed': 0}}, r'model.init returned.*embed'),
  ],
)
def test_errors(linear, prompts, options, message):
  model, params = linear
  options = {'params': params, 'max_new': 2, 'temperature': 0} | options
  with pytest.raises(ValueError, match=message):
    generate(model, prompts=prompts, **options)


# The rules by themselves.

LOGITS = np.log([0.4, 0.25, 0.2, 0.1, 0.05])[[3, 0, 4, 2, 1]]
DRAWS = 20_000


def probabilities(temperature=1.0, top_k=None, top_p=None):
  """The distribution that rules ask for, by numpy, one token at a time."""
  weights = np.exp(LOGITS / temperature)
  best = np.argsort(-weights)
  weights[best[len(best) if top_k is None else top_k :]] = 0
  weights /= weights.sum()
  mass = 0.0
  for token in best:
    if top_p is not None and mass >= top_p:
      weights[token] = 0
    mass += weights[token]
  return weights / weights.sum()


def p_value(draws, expected):
  """Of draws, under the distribution expected (Pearson's chi-square)."""
  counts = np.bincount(draws, minlength=len(expected))
  if counts[expected == 0].any():
    return 0.0
  if np.count_nonzero(expected) == 1:
    return 1.0
  counts, expected = counts[expected > 0], expected[expected > 0]
  return stats.chisquare(counts, expected * counts.sum()).pvalue


@pytest.fixture(scope='module')
def draws():
  keys = jax.random.split(jax.random.key(0), DRAWS)
  logits = jnp.broadcast_to(jnp.asarray(LOGITS), (DRAWS, len(LOGITS)))
  choose = jax.jit(lambda rules: sample.choose(logits, rules, keys))
  return lambda **rules: np.asarray(choose(sample.Rules(**rules)))


@pytest.mark.parametrize(
  'rules',
  [
    {'temperature': 1.0},
    {'temperature': 0.5},
    {'temperature': 2.0},
    {'temperature': 1.0, 'top_k': 3},
    {'temperature': 1.0, 'top_p': 0.8},
    {'temperature': 1.5, 'top_k': 4, 'top_p': 0.7},
    {'temperature': 1.0, 'top_k': 9, 'top_p': 1.0},
  ],
  ids=str,
)
def test_draws_have_the_distribution(draws, rules):
  assert p_value(draws(**rules), probabilities(**rules)) > 1e-3


@pytest.mark.parametrize(
  ('asked', 'done'),
  [
    ({'temperature': 0.5}, {'temperature': 2.0}),
    ({'temperature': 1.0}, {'temperature': 1.05}),
    ({'temperature': 1.0, 'top_k': 3}, {'temperature': 1.0, 'top_k': 4}),
    # The nucleus without the token that crosses the border, and with one more.
    ({'temperature': 1.0, 'top_p': 0.8}, {'temperature': 1.0, 'top_p': 0.6}),
    ({'temperature': 1.0, 'top_p': 0.8}, {'temperature': 1.0, 'top_p': 0.9}),
    # top_p of what top_k has left is not top_p of everything.
    (
      {'temperature': 1.0, 'top_k': 2, 'top_p': 0.6},
      {'temperature': 1.0, 'top_p': 0.6},
    ),
  ],
  ids=str,
)
def test_another_distribution_is_rejected(draws, asked, done):
  assert p_value(draws(**done), probabilities(**asked)) < 1e-3


def test_top_p_is_the_smallest_set():
  logits = 3 * jax.random.normal(jax.random.key(2), (200, 30))
  mass = np.asarray(jax.nn.softmax(logits), np.float64)
  for p in (1e-6, 0.1, 0.5, 0.9, 0.999):
    cut = np.asarray(sample.top_p(logits, p))
    kept = cut > -np.inf
    np.testing.assert_array_equal(cut[kept], np.asarray(logits)[kept])
    assert kept[np.arange(200), mass.argmax(axis=1)].all()
    total = np.where(kept, mass, 0).sum(axis=1)
    least = np.where(kept, mass, 1).min(axis=1)
    assert (total >= p - 1e-6).all()
    assert (total - least < p + 1e-6).all()  # without its least, too little
    assert (np.where(kept, 0, mass).max(axis=1) <= least).all()
  # All of it, though the float32 sum of the first two is 1 already.
  steep = jnp.array([[0.0, -1.0, -40.0, -80.0]])
  np.testing.assert_array_equal(sample.top_p(steep, 1.0), steep)


def test_one_token_is_left():
  """By a temperature near 0, k = 1 or a small p: what greedy takes."""
  logits = 5 * jax.random.normal(jax.random.key(3), (200, 30))
  keys = jax.random.split(jax.random.key(4), 200)
  best = sample.choose(logits)
  np.testing.assert_array_equal(best, logits.argmax(axis=1))
  for rules in (
    sample.Rules(temperature=1e-30),
    sample.Rules(temperature=1.0, top_k=1),
    sample.Rules(temperature=1.0, top_p=1e-6),
  ):
    np.testing.assert_array_equal(sample.choose(logits, rules, keys), best)
  warm = sample.choose(logits, sample.Rules(temperature=1.0), keys)
  assert (warm != best).any()


def test_top_k_keeps_k():
  logits = jnp.array([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
  kept = lambda k: np.isfinite(sample.top_k(logits, k)).astype(int).tolist()
  assert kept(1) == [[0, 1, 0, 0], [1, 0, 0, 0]]  # of equals, the first
  assert kept(2) == [[0, 1, 0, 1], [1, 1, 0, 0]]
  assert kept(3) == [[0, 1, 1, 1], [1, 1, 1, 0]]
  assert kept(9) == [[1, 1, 1, 1], [1, 1, 1, 1]]


def test_choices_of_a_row_are_its_own():
  """A row draws the same, alone or in a batch; the keys decide."""
  keys = jax.random.split(jax.random.key(6), 50)
  logits = jax.random.normal(jax.random.key(7), (50, 9))
  rules = sample.Rules(temperature=1.0, top_k=5, top_p=0.9)
  whole = sample.choose(logits, rules, keys)
  np.testing.assert_array_equal(
    sample.choose(logits[7:8], rules, keys[7:8]), whole[7:8]
  )
  others = sample.choose(logits.at[:7].set(0), rules, keys)
  np.testing.assert_array_equal(others[7:], whole[7:])
  assert (sample.choose(logits, rules, keys[::-1]) != whole).any()


# The command.


@pytest.fixture(scope='module')
def bytes_model():
  return made(**single('gated_linear'), vocab=256)


@pytest.fixture
def trained(monkeypatch, bytes_model):
  """Says what task the model, which `jaxattn.load` finds, was trained on."""

  def say(task):
    found = types.SimpleNamespace(
      model=bytes_model[0],
      params=bytes_model[1],
      config={'task': {'name': task}},
    )

    def load(workdir):
      if workdir != 'here':
        raise ValueError(f'no checkpoint in {workdir}')
      return found

    monkeypatch.setattr(jaxattn, 'load', load, raising=False)

  return say


def test_command_on_text(trained, capsys):
  def printed(prompt, seed):
    command.main(
      [
        '--workdir=here',
        f'--prompt={prompt}',
        '--max_new=20',
        '--temperature=2',
        f'--seed={seed}',
      ]
    )
    return capsys.readouterr().out

  trained('bytes')
  first = printed('d\u00e9 ', 1)
  assert first.startswith('d\u00e9 ')
  assert len(first) > 4
  assert printed('d\u00e9 ', 1) == first
  assert printed('d\u00e9 ', 2) != first
  assert len(printed('', 1)) > 1  # a document from its start


def test_command_on_ids(trained, capsys):
  trained('mqar')
  command.main(
    ['--workdir=here', '--prompt=3, 1 4', '--max_new=20', '--temperature=2']
  )
  words = capsys.readouterr().out.split()
  assert words[:3] == ['3', '1', '4']
  assert len(words) == 23


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['--workdir=there', '--prompt=1'], 'error: no checkpoint in there'),
    (['--workdir=here', '--prompt=a'], "error: prompt 'a'.*token ids"),
    (['--workdir=here', '--prompt='], 'error: .*start token'),
    (['--workdir=here', '--prompt=999'], 'error: .*id 999'),
    (['--workdir=here', '--prompt=1', '--top_p=2'], 'error: top_p=2.0'),
  ],
)
def test_command_errors(trained, argv, message):
  trained('mqar')
  with pytest.raises(SystemExit, match=message) as raised:
    command.main(argv)
  assert isinstance(raised.value.code, str)  # printed to stderr, status 1


def test_text_cannot_steer_the_terminal():
  shown = command.decode(b'ok\n\x1b[2J\xff'.strip(), True)
  assert shown == 'ok\n\ufffd[2J\ufffd'
  assert command.encode('', True) == [0]
