"""The TPU kernels of attention, interpreted: values, gradients and races.

The oracle is the formula in a few lines with a dense matrix of who sees whom,
in float64; a kernel may err twice as much as the formula does in float32, in
gradients as it does in the worst of a few draws. Races are what the
interpreter's vector clocks find; memory begins as NaN. That the kernels lower
for a TPU is tested here too, and in `test_flash_aot` that they compile.
"""

import dataclasses
import functools
import itertools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.pallas.mosaic.lowering import lowering_rules as RULES
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import blocks, elementwise, flash, masks
from pallas_kernels.blocks import Blocks
from pallas_kernels.dropout import Dropout
from pallas_kernels.flash import apart, plain, tpu, tpu_forward
from pallas_kernels.flash import tpu_layout as layout
from pallas_kernels.masks import Causal, Everything, Mask, Sinks, Window
from pallas_kernels.problem import Operands, problem
from pallas_kernels.scores import (
  Buckets,
  Difference,
  Relative,
  RelativeFactor,
  Score,
  Slopes,
  Table,
  bucket,
)
from tests import devices

BLOCKS = Blocks(128, 128)
# Of what is differentiated: by each, the same gradients round differently.
WEIGHTS = 1.0, 0.7, 1.3, 0.9, 1.1
PADDED = np.repeat([1, 2, 3, 0], [90, 100, 60, 50])
LATE = np.repeat([0, 5, 6], [30, 200, 70])
COUNTED = np.concatenate([np.arange(n) for n in (90, 100, 60, 50)])


def draw(b=1, t=200, s=256, h=2, k=1, d=32, e=32, seed=0):
  """q, k, v, and the weights of o and lse in what is differentiated."""
  rng = np.random.default_rng(seed)
  shapes = (b, t, h, d), (b, s, k, d), (b, s, k, e), (b, t, h, e), (b, t, h)
  return [rng.uniform(-1.7, 1.7, shape) for shape in shapes]


def number(*shape, seed=1):
  return np.random.default_rng(seed).uniform(0.1, 1, shape)


def loud():
  """Scores of one head are all far above 0, of the other all far below."""
  q, k, *rest = draw(d=64, seed=3)
  q = 15 * np.abs(q) * np.array([1, -1])[:, None]
  return q, np.abs(k), *rest


STRIDE = {
  'query_order': np.arange(200) * 2 - 60,
  'key_order': np.arange(256) * 2,
}
BOTH = {
  f'{side}_{name}': x
  for side in ('query', 'key')
  for name, x in (
    ('segments', np.stack([PADDED, LATE])),
    ('order', np.stack([COUNTED, np.arange(300)])),
  )
}
LATER = {'query_order': np.arange(200) + 56}
# name: arrays, what `problem` takes, and numbers for a score or a bias.
CASES = {
  'causal': (draw(2, 300, 300, 4, 2, 64, 48), {'mask': Causal()}, {}),
  'sinks': (
    draw(1, 384, 384, 2, 2),
    {'mask': Causal() & (Window(64) | Sinks(4))},
    {},
  ),
  'packed': (draw(2, 300, 300), {'mask': Causal(), **BOTH}, {}),
  'striped': (draw(e=40), {'mask': Causal(), **STRIDE}, {}),
  'loud': (loud(), {}, {}),
  'ragged': (draw(2, 130, 200, d=40, e=200), {}, {}),
  'softcap': (
    draw(),
    {'mask': Causal(), 'softcap': 2.0, 'score': Slopes(), **LATER},
    {'heads': (number(2),)},
  ),
  'table': (
    draw(),
    {'mask': Causal(), 'score': Relative(4), **LATER},
    {'heads': (number(2, 33),)},
  ),
  'far': (
    draw(t=640, s=640),
    {'mask': Causal(), 'score': Relative(4), 'query_order': np.arange(640)},
    {'heads': (number(2, 33),)},
  ),
  'a table of one': (
    draw(),
    {'mask': Causal(), 'score': Relative(), **LATER},
    {'heads': (number(2, 1),)},
  ),
  'far on both sides': (
    draw(t=500, s=620),
    {'score': Buckets(24, False), 'query_order': np.arange(500) + 60},
    {'heads': (number(2, 16),)},
  ),
  'factor': (
    draw(t=400, s=400),
    {'mask': Causal(), 'factor': RelativeFactor(4)},
    {'heads': (number(2, 33),)},
  ),
  'forget': (
    draw(2),
    {'mask': Causal(), 'score': Difference(), **LATER},
    {'queries': (number(2, 200, 2),), 'keys': (number(1, 256, 1),)},
  ),
  'bias': (
    draw(2),
    {'mask': Causal(), **STRIDE},
    {'bias': number(1, 2, 200, 256)},
  ),
  'bias of many tiles': (
    draw(t=640, s=300),
    {},
    {'bias': number(1, 2, 640, 300)},
  ),
  'bias of all heads': (
    draw(2, h=4, k=2),
    {'mask': Causal(), 'score': Difference(), **LATER},
    {
      'bias': number(2, 1, 200, 256),
      'queries': (number(2, 200, 4),),
      'keys': (number(1, 256, 1),),
    },
  ),
  'bias of all': (
    draw(2, h=4, k=2),
    {'mask': Causal(), 'score': Slopes(), **LATER},
    {'bias': number(1, 1, 200, 256), 'heads': (number(4),)},
  ),
}


def ask(attend, q, k, v, numbers, blocks=BLOCKS, **given):
  """Finished o, m and l."""
  numbers = dict(numbers)
  sides = [
    tuple(given.pop(f'{side}_{name}', None) for name in ('order', 'segments'))
    for side in ('query', 'key')
  ]
  bias = numbers.pop('bias', None)
  if numbers:
    names = {'heads': 'operands'}
    numbers = {names.get(name, name): x for name, x in numbers.items()}
    what = 'factor' if 'factor' in given else 'score'
    given[what] = Score(given[what], **numbers)
  rule, extras, query, key = problem(
    *(q, k, v),
    query=(*sides[0], None),
    key=(*sides[1], None),
    bias=bias,
    blocks=blocks,
    **{'mask': Everything(), **given},
  )
  if attend is tpu.attend:
    assert tpu.refuses(rule, q, k, v, extras, query, key) is None
  return attend(rule, q, k, v, extras, query, key)


def seen(mask, t, s, given):
  """`b t s`, pair by pair."""
  at = lambda name, default: jnp.atleast_2d(given.get(name, default))
  query = masks.Side(at('query_order', np.arange(t))[..., None], {})
  tags = {n: x[..., None, :] for n, x in given.get('key_tags', {}).items()}
  key = masks.Side(at('key_order', np.arange(s))[:, None], tags)
  one = at('query_segments', np.ones(t, int))[..., None]
  other = at('key_segments', np.ones(s, int))[:, None]
  return mask(query, key) & (one == other) & (other != 0)


def formula(q, k, v, numbers, mask=None, softcap=None, score=None, **given):
  """o and lse."""
  t, s, h = q.shape[1], k.shape[1], q.shape[2]
  k, v = (jnp.repeat(x, h // x.shape[2], axis=2) for x in (k, v))
  x = jnp.einsum('bthd,bshd->bhts', q, k) / np.sqrt(q.shape[3])
  x = x if softcap is None else softcap * jnp.tanh(x / softcap)
  if isinstance(score, Slopes):
    far = given['query_order'][:, None] - np.arange(s)
    x = x - numbers['heads'][0][:, None, None] * np.abs(far)
  if isinstance(score, Relative):
    far = given['query_order'][:, None] - np.arange(s)
    (table,) = numbers['heads']
    last = table.shape[1] - 1
    x = x + table[:, np.clip(far + score.ahead, 0, last)]
  if isinstance(score, Buckets):
    far = given['query_order'][:, None] - np.arange(s)
    x = x + numbers['heads'][0][:, bucket(far, 16, 24, False)]
  if isinstance(score, Difference):
    (a,), (b,) = numbers['queries'], numbers['keys']
    x = x + a.mT[..., None] - b.mT[:, :, None]
  x = x + numbers.get('bias', 0)
  visible = seen(mask or Everything(), t, s, given)[:, None]
  x = jnp.where(visible, x, -jnp.inf)
  # Held constant, which changes nothing: compared with scores that are computed
  # a second time, to other last bits, the derivative of max is 0 / 0.
  m = jax.lax.stop_gradient(jnp.max(x, -1, keepdims=True))
  p = jnp.where(visible, jnp.exp(x - jnp.where(m == -jnp.inf, 0, m)), 0)
  total = p.sum(-1, keepdims=True)
  if isinstance(given.get('factor'), RelativeFactor):  # of tokens in order
    far = np.arange(t)[:, None] - np.arange(s)
    p = p * numbers['heads'][0][:, np.clip(far + 4, 0, 32)]
  o = jnp.einsum('bhts,bshe->bthe', p / jnp.where(total == 0, 1, total), v)
  lse = jnp.where(total > 0, m + jnp.log(jnp.where(total > 0, total, 1)), m)
  return o, jnp.swapaxes(lse[..., 0], 1, 2)


def results(attend, arrays, numbers, given, weight=1.0):
  """o, lse, and the gradients of a sum of both, times `weight`."""

  def loss(q, k, v, numbers, weight):
    w, u = (jnp.asarray(x, q.dtype) for x in arrays[3:])
    o, lse = attend(q, k, v, numbers, **given)
    seen = lse > -jnp.inf
    total = jnp.sum(o * w) + jnp.sum(jnp.where(seen, lse * u, 0))
    return weight * total, (o, lse)

  gradient = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))
  wide = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
  given_arrays = jax.tree.map(lambda x: jnp.asarray(x, wide), arrays[:3])
  numbers = jax.tree.map(lambda x: jnp.asarray(x, wide), numbers)
  gradients, (o, lse) = gradient(*given_arrays, numbers, weight)
  q, k, v, rest = (
    jax.tree.map(lambda x: np.asarray(x, np.float64) / weight, dx)
    for dx in gradients
  )
  found = {'o': o, 'lse': lse, 'dq': q, 'dk': k, 'dv': v, 'rest': rest}
  return jax.tree.map(lambda x: np.asarray(x, np.float64), found)


def kernel(q, k, v, numbers, engine=None, **given):
  """o and lse by the kernels, or by another engine."""
  o, m, total = ask(engine or tpu.attend, q, k, v, numbers, **given)
  unseen = total == 0
  lse = m + jnp.log(jnp.where(unseen, 1, total))
  return o, jnp.where(unseen, -jnp.inf, lse)


@functools.cache
def exactly(name):
  arrays, given, numbers = CASES[name]
  with jax.enable_x64(True):
    return results(formula, arrays, numbers, given)


def error(x, exact):
  finite = np.isfinite(exact)
  np.testing.assert_array_equal(finite, np.isfinite(x))
  x, exact = x[finite], exact[finite]
  rms = np.sqrt(np.mean(np.square(exact)))
  return np.abs(x - exact).max() / (rms or 1)


def broken(fast, naive, exact):
  """Where `fast` breaks the error rule, given some naive results."""
  off = jax.tree.map(error, fast, exact)
  draws = [jax.tree.map(error, x, exact) for x in naive]
  allowed = jax.tree.map(lambda *x: 2 * max(x), *draws)
  eps = float(jnp.finfo(jnp.float32).eps)
  return [
    f'{jax.tree_util.keystr(path)}: {x:.1e}, allowed {most:.1e}'
    for (path, x), most in zip(
      jax.tree_util.tree_leaves_with_path(off), jax.tree.leaves(allowed)
    )
    if not x <= most + eps
  ]


COMPLAINTS = 'RACE DETECTED', 'non-zero count'  # the latter of semaphores


def complaints(capfd):
  """What the interpreter found wrong, which it prints."""
  said = capfd.readouterr().out
  return [what for what in COMPLAINTS if what in said]


def interpreted(call, mode='on_wait', seed=0):
  """call() with the product kernels interpreted."""
  params = pltpu.InterpretParams(
    detect_races=True,
    dma_execution_mode=mode,
    uninitialized_memory='nan',
    out_of_bounds_reads='raise',
    random_seed=seed,
  )
  try:
    with pltpu.force_tpu_interpret_mode(params):
      return jax.block_until_ready(call())
  finally:
    pltpu.reset_tpu_interpret_mode_state()
    jax.clear_caches()  # the parameters are no part of a program's key


@pytest.mark.parametrize('name', CASES)
def test_exact(name, capfd, monkeypatch):
  monkeypatch.setattr(apart, 'ROOM', 0)
  arrays, given, numbers = CASES[name]
  naive = [results(formula, arrays, numbers, given, w) for w in WEIGHTS]
  even = list(CASES).index(name) % 2 == 0
  mode = ('on_wait', 0) if even else ('eager', 1)
  fast = interpreted(lambda: results(kernel, arrays, numbers, given), *mode)
  assert complaints(capfd) == []
  assert broken(fast, naive, exactly(name)) == []


@pytest.mark.parametrize('name', ['far', 'far on both sides'])
def test_far_tiles_read_one_entry_of_a_table(name, monkeypatch):
  """A mutant, whose entry is that of another pair, is wrong there alone."""
  arrays, given, numbers = CASES[name]
  naive = [results(formula, arrays, numbers, given, w) for w in WEIGHTS]
  first = Table.first
  monkeypatch.setattr(
    Table,
    'first',
    lambda self, query, key, table, dtype: first(
      self, query, key, table[:, ::-1], dtype
    ),
  )
  fast = interpreted(lambda: results(kernel, arrays, numbers, given))
  wrong = broken(fast, naive, exactly(name))
  assert {at.split(':')[0] for at in wrong} >= {"['o']", "['dq']"}
  near = fast['o'][0, :128] - exactly(name)['o'][0, :128]
  assert name != 'far' or np.abs(near).max() < 1e-5


@pytest.mark.parametrize(('d', 'e'), [(256, 256), (256, 32), (32, 256)])
def test_wide_heads(d, e, capfd):
  """In the same tiles: a sum of 128 products errs as that of `plain` does."""
  arrays = draw(2, 200, 200, 2, 1, d, e)
  in_tiles = functools.partial(kernel, engine=plain.attend)
  naive = [results(in_tiles, arrays, {}, {}, w) for w in WEIGHTS]
  with jax.enable_x64(True):
    exact = results(formula, arrays, {}, {})
  fast = interpreted(lambda: results(kernel, arrays, {}, {}))
  assert complaints(capfd) == []
  assert broken(fast, naive, exact) == []


def in_parts(chip, numbers=None):
  """What breaks the rule where tiles have parts, as they have on a chip.

  Five tiles of keys for a block of queries, of 2 x 2 parts on a v5e, and on a
  v6e of one product with v for two; the largest score rises from tile to tile.
  """
  numbers = numbers or {}
  q, k, *rest = draw(1, 300, 1100)
  arrays = q, k * np.linspace(0.5, 2, 1100)[:, None, None], *rest
  given = {'mask': Causal(), 'query_order': np.arange(300) + 800}
  given |= {'score': Difference()} if numbers else {}
  with jax.enable_x64(True):
    exact = results(formula, arrays, numbers, given)
  naive = [results(formula, arrays, numbers, given, w) for w in WEIGHTS]
  given['blocks'] = Blocks(256, 256)
  with mock.patch.object(blocks, 'chip', return_value=chip):
    fast = interpreted(lambda: results(kernel, arrays, numbers, given))
  return broken(fast, naive, exact)


OWN = {'queries': (number(1, 300, 2),), 'keys': (number(1, 1100, 1),)}


@pytest.mark.parametrize(
  ('chip', 'numbers'),
  [('TPU v5 lite', {}), ('TPU v6 lite', {}), ('TPU v6 lite', OWN)],
)
def test_exact_in_parts(chip, numbers, capfd):
  assert in_parts(chip, numbers) == []
  assert complaints(capfd) == []


def test_weights_that_are_replaced_too_early_are_noticed(monkeypatch):
  """A mutant: of each part first come new scores, and old weights last."""
  in_turn = tpu_forward.itertools.zip_longest
  late = types.SimpleNamespace(
    zip_longest=lambda *stages: in_turn(*reversed(stages)),
    repeat=tpu_forward.itertools.repeat,
  )
  monkeypatch.setattr(tpu_forward, 'itertools', late)
  assert 'o' in ' '.join(in_parts('TPU v5 lite'))


@pytest.mark.parametrize('mode', [('eager', 0), ('on_wait', 1)])
def test_exact_in_the_other_mode(mode, capfd):
  arrays, given, numbers = CASES['causal']
  fast = interpreted(lambda: results(kernel, arrays, numbers, given), *mode)
  assert complaints(capfd) == []
  off = jax.tree.map(error, fast, exactly('causal'))
  assert max(jax.tree.leaves(off)) < 1e-5


def test_rows_that_see_nothing():
  """They have o = 0, l = 0, m = -inf and no gradient, and give none."""
  arrays, given, numbers = CASES['striped']
  fast = interpreted(lambda: results(kernel, arrays, numbers, given))
  blind = given['query_order'] < 0
  assert blind.any()
  assert not fast['o'][:, blind].any()
  assert not fast['dq'][:, blind].any()
  assert (fast['lse'][:, blind] == -np.inf).all()


@pytest.mark.parametrize('mode', [('eager', 0), ('on_wait', 1)])
def test_dropout_is_that_of_plain(mode, capfd):
  """Over rows of four tiles: its numbers of keys are those of a tile before."""
  q, k, v, w, _ = (jnp.asarray(x, jnp.float32) for x in draw(s=400))

  def both(attend):
    def loss(q, k, v):
      o, _, _ = ask(
        *(attend, q, k, v, {}),
        mask=Causal(),
        dropout=Dropout(0.3, seed=7),
        query_order=np.arange(200) + 200,
      )
      return jnp.sum(o * w), o

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

  fast = interpreted(lambda: both(tpu.attend), *mode)
  assert complaints(capfd) == []
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5),
    *(fast, both(plain.attend)),
  )


@jax.custom_vjp
def _steep(x, slope):
  return x * slope


_steep.defvjp(
  lambda x, slope: (x * slope, (x, slope)),
  lambda kept, dy: (dy * kept[1], jnp.sum(dy * kept[0]).reshape(1, 1, 1)),
)


def _picked(x, query, key, slopes, of_query, of_key):
  x = jnp.where(of_query & ~of_key, x / 2, x)
  return _steep(x, slopes[:, None, None])


def test_flags_and_gradients_of_their_own():
  """Copies know no bool, and forward mode no custom_vjp."""
  q, k, v, w, _ = (jnp.asarray(x, jnp.float32) for x in draw(h=1))
  flags = [(jnp.arange(n) % 3 > 0)[None, :, None] for n in (200, 256)]

  def loss(attend, q, k, v, slopes):
    score = Score(_picked, (slopes,), (flags[0],), (flags[1],))
    o, _, _ = ask(attend, q, k, v, {}, score=score)
    return jnp.sum(o * w)

  inputs = q, k, v, jnp.asarray([1.3])
  gradient = lambda attend: jax.jit(
    jax.grad(functools.partial(loss, attend), range(4))
  )
  fast = interpreted(lambda: gradient(tpu.attend)(*inputs))
  for x, y in zip(fast, gradient(plain.attend)(*inputs)):
    np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)
  jax.export.export(gradient(tpu.attend), platforms=['tpu'])(*inputs)


def test_nothing_leaks_from_the_rest_of_a_block():
  """Padded queries would have scores of 300, whose exp is no number."""
  q, k, v, w, _ = (jnp.asarray(x, jnp.float32) for x in draw(t=130))
  high = jnp.full((1, 130, 1), 300.0), jnp.full((1, 256, 1), 100.0)

  def gradients(attend):
    def loss(q, k, v, a, b):
      score = Score(Difference(), (), (a,), (b,))
      o, _, _ = ask(attend, q, k, v, {}, mask=Everything(), score=score)
      return jnp.sum(o * w)

    return jax.jit(jax.grad(loss, range(5)))(q, k, v, *high)

  fast = interpreted(lambda: gradients(tpu.attend))
  for x, y in zip(fast, gradients(plain.attend)):
    np.testing.assert_allclose(x, y, atol=1e-4)


@pytest.mark.parametrize('length', [130, 256])
def test_padding_has_derivatives_as_others_have(length):
  """Where scores divide by tags, or have none at 0."""
  q, k, v, w, _ = (jnp.asarray(x, jnp.float32) for x in draw(t=130, s=length))
  tags = {'warm': 1 + jnp.arange(130) % 3}, {'warm': 1 + jnp.arange(length) % 3}

  def score(x, query, key):
    x = x / query.tags['warm'] + x / jnp.square(key.tags['warm'])
    return 2 * jnp.log(jnp.abs(x))

  def gradients(attend):
    def loss(q, k, v):
      rule, extras, query, key = problem(
        *(q, k, v),
        mask=Everything(),
        query=(None, None, tags[0]),
        key=(None, None, tags[1]),
        score=Score(score),
        blocks=BLOCKS,
      )
      assert tpu.refuses(rule, q, k, v, extras, query, key) is None
      return jnp.sum(attend(rule, q, k, v, extras, query, key)[0] * w)

    return jax.jit(jax.grad(loss, range(3)))(q, k, v)

  fast = interpreted(lambda: gradients(tpu.attend))
  for x, y in zip(fast, gradients(plain.attend)):
    np.testing.assert_allclose(x, y, atol=2e-4)


def test_bfloat16():
  """Scores and sums are in float32, whatever the inputs are."""
  arrays, given, numbers = CASES['causal']
  weights = jnp.asarray(arrays[3], jnp.bfloat16)

  def narrow(attend):
    def loss(q, k, v):
      o, _ = attend(q, k, v, numbers, **given)
      return jnp.sum((o * weights).astype(jnp.float32)), o

    inputs = (jnp.asarray(x, jnp.bfloat16) for x in arrays[:3])
    both = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    gradients, o = both(*inputs)
    return dict(zip(('o', 'dq', 'dk', 'dv'), (o, *gradients)))

  with jax.enable_x64(True):
    rounded = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    inputs = (*map(rounded, arrays[:4]), np.zeros_like(arrays[4]))
    exact = results(formula, inputs, numbers, given)
  fast, naive = interpreted(lambda: narrow(kernel)), narrow(formula)
  for name, x in fast.items():
    assert x.dtype == jnp.bfloat16
    off, most = (
      error(np.asarray(y, np.float64), exact[name]) for y in (x, naive[name])
    )
    assert off <= 2 * most + float(jnp.finfo(jnp.bfloat16).eps), name


def test_the_scale_is_rounded_once():
  """With q, not by itself before: that would shift all scores one way."""
  q = jnp.linspace(1, 2, 1000, dtype=jnp.bfloat16)
  scaled = np.asarray(layout.scaled(q, 0.2281), np.float64)
  once = np.asarray(q, np.float64) * 0.2281
  assert np.abs(scaled / once - 1).max() <= 2**-8
  assert np.abs(np.mean(scaled / once) - 1) < 2**-13


def test_interpreter_notices_a_missing_wait(monkeypatch, capfd):
  """A mutant that reads dq before it has come."""

  class Hasty:
    def __init__(self, copy):
      self.start, self.wait = copy.start, lambda: None

  real = pltpu.make_async_copy
  monkeypatch.setattr(
    pltpu, 'make_async_copy', lambda *ends: Hasty(real(*ends))
  )
  arrays, given, numbers = CASES['causal']
  try:
    fast = interpreted(lambda: results(kernel, arrays, numbers, given), 'eager')
    wrong = not jax.tree.map(error, fast, exactly('causal'))['dq'] < 1e-5
  except Exception:
    wrong = True
  assert wrong or complaints(capfd)


def on_a_mesh():
  """In a process with two devices: gradients, each device with its rows."""
  mesh = jax.make_mesh((2,), ('data',))
  rows = jax.NamedSharding(mesh, jax.P('data'))
  arrays = [jnp.asarray(x, jnp.float32) for x in draw(2, 128, 128, 1)[:3]]
  arrays = [jax.device_put(x, rows) for x in arrays]

  def gradient(attend):
    o = jax.shard_map(
      lambda q, k, v: ask(attend, q, k, v, {}, mask=Causal())[0],
      mesh=mesh,
      in_specs=jax.P('data'),
      out_specs=jax.P('data'),
    )
    loss = lambda *arrays: jnp.sum(jnp.sin(o(*arrays)))
    return jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)

  fast = interpreted(lambda: gradient(tpu.attend))
  for x, y in zip(fast, gradient(plain.attend)):
    np.testing.assert_allclose(x, y, atol=2e-5)


def test_on_a_mesh():
  """Under shard_map with its checks on, and nothing communicated."""
  call = 'from tests import test_flash_tpu; test_flash_tpu.on_a_mesh()'
  assert 'RACE DETECTED' not in devices.run('-c', call, devices=2)


def _all_of(x, query, key, *numbers):
  return x + sum(numbers)


def _by_head(x, query, key):
  """As one writes ALiBi for all heads: a kernel has one head at a time."""
  slopes = 2.0 ** -jnp.arange(1, x.shape[1] + 1)
  return x - slopes[:, None, None] * jnp.abs(query.order - key.order)


GAINS = np.array([1, 3], np.float32)
NOT_FOR_PARTS = {
  _by_head: 'it uses iota',
  lambda x, query, key: x - jnp.min(x, -1, keepdims=True): 'uses reduce_min',
  lambda x, query, key: x[..., ::-1]: 'uses rev',
  lambda x, query, key: x.reshape(-1).reshape(x.shape): 'uses reshape',
  lambda x, query, key: x.mT.mT: 'uses transpose',
  lambda x, query, key: x * GAINS[:, None, None]: 'holds an array',
  lambda x, query, key: lax.fori_loop(0, 3, lambda _, x: x / 2, x): 'uses scan',
  # Elementwise, but Mosaic has no rule for it.
  lambda x, query, key: jax.nn.elu(x): 'uses expm1, which its compiler lacks',
  lambda x, query, key: jax.nn.gelu(x, approximate=False): 'erfc',
}


@dataclasses.dataclass(frozen=True)
class _Sorted(Mask):
  def __call__(self, query, key):
    return jnp.sort(key.order, -1) <= query.order


@dataclasses.dataclass(frozen=True, eq=False)
class _Held(Mask):
  orders: np.ndarray

  def __call__(self, query, key):
    return (key.order[..., None] == self.orders).any(-1)


def test_one_key_head_of_several_where_integers_are_wide():
  q, k, v, *_ = (jnp.asarray(x, jnp.float32) for x in draw())
  loss = lambda name: (
    lambda q: jnp.sum(
      flash.attention(q, k, v, mask=Causal(), implementation=name)
    )
  )
  with jax.enable_x64(True):
    fast = interpreted(lambda: jax.grad(loss('tpu'))(q))
    np.testing.assert_allclose(fast, jax.grad(loss('plain'))(q), atol=2e-5)


@pytest.mark.parametrize('jit', [True, False])
def test_a_program_for_another_device_is_refused(jit):
  q, k, v, *_ = (jnp.asarray(x, jnp.float32) for x in draw())
  run = lambda q: flash.attention(q, k, v, implementation='tpu')
  with pytest.raises(NotImplementedError, match=r'for tpu, .* is for cpu\. Le'):
    (jax.jit(run) if jit else run)(q)


def test_refuses():
  q, k, v, *_ = (jnp.asarray(x, jnp.float32) for x in draw())

  def reason(q=q, k=k, v=v, mask=Causal(), **given):
    side = (None, None, None)
    asked = problem(*(q, k, v), mask=mask, query=side, key=side, **given)
    return tpu.refuses(asked[0], q, k, v, *asked[1:])

  assert reason() is None
  assert reason(softcap=3.0, dropout=Dropout(0.1, seed=0)) is None
  table = lambda n: Score(Buckets(256, True), (jnp.zeros((2, n)),))
  assert reason(score=table(32)) is None
  assert 'table of 256 entries' in reason(score=table(256))
  for fn, why in NOT_FOR_PARTS.items():
    assert why in reason(score=Score(fn)), fn
  held = _Held(np.arange(3))
  assert '_Held holds an array' in reason(mask=held)
  assert '_Sorted is not elementwise' in reason(mask=_Sorted())
  half = (x.astype(jnp.float16) for x in (q, k, v))
  assert 'float16' in reason(*half)
  assert 'differ in type' in reason(v=v.astype(jnp.bfloat16))
  wide = (jnp.zeros((*x.shape[:3], 300)) for x in (q, k))
  assert '300' in reason(*wide)
  assert 'nothing' in reason(q=q[:, :0])
  many = Score(_all_of, queries=(jnp.zeros((1, 200, 1)),) * 9)
  assert 'at most 8 numbers, not 9' in reason(score=many)


def test_refuses_what_the_derivative_by_an_operand_lacks():
  """Of a number of each head; the function itself has a rule."""
  fn = lambda x, query, key, a: x + jnp.sin(a)[:, None, None]
  tokens = masks.Tokens(masks.Side(jnp.arange(8)))
  own = Operands((jnp.ones(2),))
  refuses = functools.partial(elementwise.refuses, fn, own, tokens, tokens)
  assert refuses(lacks={'tan'}) is None
  assert 'the derivative of <lambda> uses cos' in refuses(lacks={'cos'})


def test_a_bias_in_16_bits_is_laid_out_as_one_that_a_tpu_loads():
  for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
    q, bias = jnp.zeros((1, 128, 1, 32)), jnp.ones((1, 1, 128, 128), dtype)
    given = {'mask': Everything(), 'query': (None,) * 3, 'key': (None,) * 3}
    rule, extras, query, key = problem(q, q, q, bias=bias, **given)
    plan = layout.make(rule, q, q, q, extras, query, key, 'forward')
    laid = layout.lay_bias(plan, extras.bias)
    assert laid.dtype == (jnp.float32 if dtype == jnp.float16 else dtype)


def test_what_is_not_refused_has_a_rule():
  """Of Mosaic, whichever version of JAX this is."""
  (own,) = (own for core, own in RULES.items() if core.name == 'TC')
  rules = {primitive.name for primitive in own}
  known = elementwise.NAMES | elementwise.MOVES
  # A type of shard_map, of which a kernel sees nothing; and one that the
  # versions of JAX without a rule for it do not use.
  assert known - tpu.LACKS - rules <= {'pvary', 'one_minus_square'}


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
  'name', ['causal', 'packed', 'softcap', 'table', 'forget', 'bias']
)
def test_lowers(name, dtype):
  """With gradients of all, and numbers of the same type as q."""
  arrays, given, numbers = CASES[name]

  def loss(q, k, v, numbers):
    o, _, total = ask(tpu.attend, q, k, v, numbers, **given)
    return jnp.sum(o) + jnp.sum(total)

  inputs = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, dtype), (*arrays[:3], numbers)
  )
  exported = jax.export.export(
    jax.jit(jax.grad(loss, range(4))), platforms=['tpu']
  )(*inputs)
  assert 'flash_backward' in exported.mlir_module()
  assert jax.tree.leaves(exported.out_avals)[-1].dtype == dtype


def test_lowers_under_vmap():
  """The gradient too, and with arrays that are not mapped over."""
  segments = np.repeat([1, 2], [60, 70])

  def loss(q, segments=None):
    given = {'query_segments': segments, 'key_segments': segments}
    given |= {'mask': Causal(), 'implementation': 'tpu'}
    return flash.attention(q, q, q, **given).sum()

  within = jax.vmap(jax.grad(lambda q: loss(q, segments)))
  around = jax.grad(lambda q: jax.vmap(loss)(q).sum())
  x = jax.ShapeDtypeStruct((3, 1, 130, 2, 32), jnp.float32)
  for form in (within, around):
    exported = jax.export.export(jax.jit(form), platforms=['tpu'])(x)
    assert 'flash_backward' in exported.mlir_module()


def twice(name, dtype):
  """Tries each way to a second derivative, and says where it fails."""
  x = jnp.ones((1, 140, 1, 32), dtype)
  loss = lambda x: jnp.sum(flash.attention(x, x, x, implementation=name))
  gradient = jax.grad(loss)
  ways = {
    'reverse over reverse': jax.grad(lambda x: jnp.vdot(x, gradient(x))),
    'forward over reverse': lambda x: jax.jvp(gradient, (x,), (x,)),
    'hessian': jax.hessian(loss),
    'through a loop': jax.grad(
      lambda x: lax.scan(lambda x, _: (gradient(x), None), x, None, 2)[0].sum()
    ),
  }
  jax.eval_shape(gradient, x)
  for way, form in ways.items():
    for run in (form, jax.jit(form)):
      with pytest.raises(NotImplementedError) as refusal:
        jax.eval_shape(run, x)
      said = str(refusal.value)
      assert said.startswith(f'attention, implementation={name!r}: '), way
      assert "use implementation='plain'" in said


def test_not_differentiated_twice():
  """Nor is it interpreted: this fails while JAX traces."""
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
    twice('tpu', jnp.float32)


def test_short_rows_in_float32_have_smaller_tiles():
  """A product there is six: the tile of bfloat16 is long to compile."""

  def sides(length, dtype, d=64):
    x = jnp.zeros((1, length, 1, d), dtype)
    side = (None, None, None)
    rule, extras, query, key = problem(
      *(x, x, x), mask=Causal(), query=side, key=side
    )
    plans = (
      layout.make(rule, x, x, x, extras, query, key, direction)
      for direction in ('forward', 'backward')
    )
    return [(plan.tile.q, plan.tile.k) for plan in plans]

  large, small = [(1024, 512)] * 2, [(512, 256)] * 2
  assert sides(2048, jnp.float32) == small
  assert sides(2048, jnp.bfloat16) == large
  assert sides(4096, jnp.float32) == large
  assert sides(4096, jnp.float32, d=128) == small
  assert sides(1024, jnp.float32) == small


def test_wide_tiles_are_for_long_rows():
  """On the diagonal half of a tile is in vain; of few, much of all."""
  side = lambda length: blocks.tile(Blocks(), 'forward', length, length).q
  lengths = 500, 640, 1000, 1024, 2048, 4096, 8192, 2**20
  sides = [512, 640, 512, 512, 1024, 1024, 2048, 2048]
  assert [side(x) for x in lengths] == sides
  assert blocks.tile(Blocks(q=2048), 'forward', 4096, 4096).q == 2048


@pytest.mark.parametrize('k', [128, 384, 640])
def test_parts_lie_within_a_tile_that_is_asked_for(k):
  for chip, direction in itertools.product(blocks.TPU, blocks.TPU['TPU v4']):
    with mock.patch.object(blocks, 'chip', lambda chip=chip: chip):
      tile = blocks.tile(Blocks(k=k), direction, 4096, 4096)
    assert tile.k == k
    for parts in (tile.clear, tile.masked):
      assert parts.rows <= parts.depth <= k
      assert parts.columns <= tile.q
      assert parts.rows % 16 == parts.columns % 128 == 0
