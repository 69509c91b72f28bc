"""Feature maps: what they estimate, what range they keep, when they are drawn.

Random claims are tested as such: a mean over many draws must lie within a few
standard errors of what it estimates, and the wrong formula must not.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn
from jaxattn.core import features, recurrence
from jaxattn.models.lm import LM

D = 4
ERRORS = 5  # standard errors: chance passes this once in a million times


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


# Fixed maps.


def test_elu():
  x = np.concatenate([np.linspace(-80, 5, 97), [0.0]]).astype(np.float32)
  exact = np.where(x > 0, np.float64(x) + 1, np.exp(np.minimum(x, 0.0)))
  value, slope = jax.vmap(jax.value_and_grad(features.elu))(x)
  np.testing.assert_allclose(value, exact, rtol=1e-6)
  np.testing.assert_allclose(slope, np.where(x > 0, 1, exact), rtol=1e-6)
  assert features.elu(jnp.bfloat16(-1)).dtype == jnp.float32
  careless = jax.nn.elu(x) + 1  # rounds to 0 where weights are still positive
  assert not np.allclose(careless, exact, rtol=1e-6)


# Random directions.


@functools.cache
def directions(draws, count, width, seed=0):
  """Independent draws, 'draws r d'."""
  draw = functools.partial(features.orthogonal, count=count, width=width)
  keys = jax.random.split(jax.random.key(seed), draws)
  return np.asarray(jax.jit(jax.vmap(draw))(keys))


@pytest.mark.parametrize('count', [1, D, 2 * D + 1])
def test_directions_are_orthogonal_in_blocks(count):
  for w in directions(8, count, D):
    for block in np.split(w, range(D, count, D)):
      unit = block / np.linalg.norm(block, axis=1, keepdims=True)
      np.testing.assert_allclose(unit @ unit.T, np.eye(len(unit)), atol=1e-5)
    if count > D:  # and blocks are not copies of each other
      assert np.abs(w[D] @ w[0]) > 1e-3


def is_gaussian(w) -> bool:
  """Whether rows 'draws r d' have the moments of N(0, I_d)."""

  def close(samples, expected):
    mean, bar = samples.mean(0), samples.std(0) / len(samples) ** 0.5
    return np.all(np.abs(mean - expected) <= ERRORS * bar)

  square = (w**2).sum(-1)
  pairs = w[..., :, None] * w[..., None, :]
  d = w.shape[-1]
  return (
    close(w, 0)
    and close(pairs, np.eye(d))
    and close(square**2, d * (d + 2))  # of a chi-squared variable
  )


def test_each_direction_is_gaussian():
  w = directions(4000, D + 1, D)
  assert is_gaussian(w)
  unit = w / np.linalg.norm(w, axis=-1, keepdims=True)
  assert not is_gaussian(unit * D**0.5)  # lengths that do not vary
  assert not is_gaussian(-np.abs(w[..., :1]) * unit)  # QR's own signs
  raw = np.linalg.qr(np.asarray(normal(1, 4000, D, D)))[0] * D**0.5
  assert abs(raw[:, 0, 0].mean()) > 0.1


# The softmax kernel.


def kernel(log_map, w, q, k):
  """phi(q) . phi(k) for every draw and every pair, 'draws pairs'."""

  def one(w):
    phi = lambda x: jnp.exp(log_map(x[None, :, None], w)[0, :, 0])
    return jnp.sum(phi(q) * phi(k), axis=-1)

  return np.asarray(jax.jit(jax.vmap(one))(w), np.float64)


def unscaled(x, w):
  """A mutant: softmax without its 1 / sqrt(d)."""
  return features.log_softmax(x * D**0.25, w)


def without_square(x, w):
  """A mutant: exp(w . x), whose mean is too large by exp(|x|^2 / 2)."""
  square = jnp.sum((x * D**-0.25) ** 2, axis=-1, keepdims=True)
  return features.log_softmax(x, w) + square / 2


def without_count(x, w):
  """A mutant: a sum over features where the mean is meant."""
  return features.log_softmax(x, w) + jnp.log(len(w)) / 2


def bias(log_map):
  """Bias of the estimate, in standard errors and in parts of the kernel."""
  q, k = 0.7 * normal(2, 6, D), 0.7 * normal(3, 6, D)
  exact = np.exp(np.sum(q * k, axis=-1) * D**-0.5)
  samples = kernel(log_map, directions(20_000, D, D), q, k)
  bias = np.abs(samples.mean(0) - exact)
  return bias / (samples.std(0) / len(samples) ** 0.5), bias / exact


def test_features_are_unbiased():
  in_errors, in_parts = bias(features.log_softmax)
  assert np.all(in_errors <= ERRORS)
  assert np.all(in_parts <= 0.1)  # the bars are short


@pytest.mark.parametrize('mutant', [unscaled, without_square, without_count])
def test_a_biased_map_is_seen(mutant):
  in_errors, _ = bias(mutant)
  assert np.max(in_errors) > 2 * ERRORS


def test_orthogonal_draws_vary_less_than_independent_ones():
  q, k = 0.5 * normal(4, 6, 16), 0.5 * normal(8, 6, 16)
  w = directions(2000, 16, 16)
  independent = np.asarray(normal(5, *w.shape))
  spread = [
    kernel(features.log_softmax, w, q, k).var(0) for w in (w, independent)
  ]
  assert np.mean(spread[0]) < 0.8 * np.mean(spread[1])


# Range.


def summed(log_k, v, in_range, state=None, valid=None, starts=None):
  """sum_{s <= t} exp(l_s) v_s / sum_{s <= t} exp(l_s) through the engine."""
  peak, state = (None, None) if state is None else state
  places = {'valid': valid, 'starts': starts}
  phi, decay, peak = in_range(log_k, peak=peak, **places)
  values = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
  q = jnp.ones_like(phi)
  o, state = recurrence.gated(q, phi, values, decay, state=state, **places)
  return o[..., :-1] / jnp.maximum(o[..., -1:], 1e-18), (peak, state)


def weighted_means(log_k, v, valid, starts):
  """The same in float64, token by token and in full."""
  log_k, v = np.float64(log_k), np.float64(v)
  out = np.zeros_like(v)
  for b, t in np.argwhere(valid):
    run = np.cumsum(starts[b] & valid[b])
    seen = (np.arange(log_k.shape[1]) <= t) & valid[b] & (run == run[t])
    weights = log_k[b, seen] - log_k[b, seen].max((0, 2), keepdims=True)
    weights = np.exp(weights).sum(-1)  # 's h'
    out[b, t] = np.einsum('sh,she->he', weights, v[b, seen])
    out[b, t] /= weights.sum(0)[:, None]
  return out


def exponents(spread, t=40):
  """Rows with pads and segments, and log features from -spread to spread."""
  rng = np.random.default_rng(0)
  log_k = rng.uniform(-spread, spread, (3, t, 2, 5)).astype(np.float32)
  log_k[1] = np.sort(log_k[1], axis=0)  # a new peak at every token
  log_k[2, 11] = 1.5 * spread  # in the first of two documents
  v = rng.uniform(-1, 1, (3, t, 2, 3)).astype(np.float32)
  valid, starts = np.ones((3, t), bool), np.zeros((3, t), bool)
  valid[0, :3] = valid[0, 9:14] = valid[1, 30:] = False
  starts[:, 0] = starts[2, 17] = True
  return log_k, v, valid, starts


def no_shift(log_k, *, peak, valid, starts):
  """A mutant: plain exponentials."""
  log_k = jnp.where(valid[..., None, None], log_k, 0)
  return jnp.exp(log_k), jnp.zeros_like(log_k[..., :1]), log_k[:, 0, :, 0]


def own_shift(log_k, *, peak, valid, starts):
  """A mutant: every key off its own largest, as is right for queries."""
  _, decay, peak = features.keys_in_range(
    log_k, peak=peak, valid=valid, starts=starts
  )
  return features.query_in_range(log_k), decay * 0, peak


def no_decay(log_k, *, peak, valid, starts):
  """A mutant: the peak grows, but sums are not restated."""
  phi, decay, peak = features.keys_in_range(
    log_k, peak=peak, valid=valid, starts=starts
  )
  return phi, decay * 0, peak


def kept_peak(log_k, *, peak, valid, starts):
  """A mutant: a document's keys stay below the peak of the one before."""
  return features.keys_in_range(log_k, peak=peak, valid=valid, starts=None)


def stays_in_range(in_range, spread) -> bool:
  log_k, v, valid, starts = exponents(spread)
  exact = weighted_means(log_k, v, valid, starts)
  noisy = np.where(valid[..., None, None], log_k, np.nan)
  run = jax.jit(functools.partial(summed, in_range=in_range))
  y, _ = run(noisy, v, valid=valid, starts=starts)
  # Exponents of this size are themselves rounded.
  return np.allclose(y, exact, atol=1e-5 + 2e-7 * spread)


@pytest.mark.parametrize('spread', [1.0, 300.0])
def test_keys_stay_in_range(spread):
  assert stays_in_range(features.keys_in_range, spread)


@pytest.mark.parametrize(
  ('mutant', 'spread'),
  [(no_shift, 300.0), (own_shift, 1.0), (no_decay, 1.0), (kept_peak, 300.0)],
)
def test_what_leaves_the_range_is_seen(mutant, spread):
  assert not stays_in_range(mutant, spread)


def test_a_cut_stream_stays_in_range():
  log_k, v, valid, starts = exponents(300.0)
  run = jax.jit(functools.partial(summed, in_range=features.keys_in_range))
  whole, final = run(log_k, v, valid=valid, starts=starts)
  for cut in (1, 12, 39):
    parts, state = [], None
    for at in (slice(cut), slice(cut, None)):
      y, state = run(
        log_k[:, at],
        v[:, at],
        state=state,
        valid=valid[:, at],
        starts=starts[:, at],
      )
      parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)
    for got, want in zip(state, final):
      np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_peak_does_not_look_ahead():
  log_k, v, *_ = exponents(300.0)
  run = jax.jit(functools.partial(summed, in_range=features.keys_in_range))
  before, _ = run(log_k, v)
  log_k[:, 20:] += 50
  after, _ = run(log_k, v)
  assert np.array_equal(before[:, :20], after[:, :20])


def test_gradients_are_those_of_the_ratio():
  log_k, v, valid, starts = exponents(3.0)
  log_k = np.where(valid[..., None, None], log_k, np.nan)

  def loss(in_range, log_k):
    y, _ = summed(log_k, v, in_range, valid=valid, starts=starts)
    return jnp.sum(jnp.sin(3 * y))

  got, want = (
    jax.jit(jax.grad(functools.partial(loss, in_range)))(log_k)
    for in_range in (features.keys_in_range, no_shift)
  )
  assert np.all(np.isfinite(got))
  assert not np.any(np.asarray(got)[~valid])
  np.testing.assert_allclose(got, want, atol=1e-5)


# The mechanism that draws them.


def performer(**fields):
  mixer = jaxattn.make('performer', heads=2, **fields)
  x = normal(6, 2, 12, 16)
  return mixer, jax.jit(mixer.init)(jax.random.key(7), x), x


def test_attention_error_falls_as_features_grow():
  softmax = jaxattn.make('multi_head', heads=2, position='none')
  errors = []
  for count in (8, 32, 128, 512):
    mixer, variables, x = performer(features=count)
    x = 0.5 * x  # scores of ordinary size: variance grows with exp(|q + k|^2)
    exact = softmax.apply({'params': variables['params']}, x).y

    def error(w, mixer=mixer, variables=variables, x=x, exact=exact):
      stats = variables['stats'] | {'directions': w}
      return jnp.mean(
        (mixer.apply(variables | {'stats': stats}, x).y - exact) ** 2
      )

    draws = directions(16, count, 8)
    squares = np.asarray(jax.jit(lambda w, f=error: jax.lax.map(f, w))(draws))
    errors.append(np.sqrt(squares.mean() / np.mean(np.square(exact))))
  # Four times the features, half the error; while they are few, a little more.
  assert errors[-1] < 0.1
  for more, less in itertools.pairwise(errors):
    assert less < 0.7 * more, errors


def train(mixer, variables, x, calls):
  """`calls` training calls, and the directions that each of them used."""

  @jax.jit
  def call(variables, x):
    _, stats = mixer.apply(variables, x, deterministic=False, mutable=['stats'])
    return variables | stats

  used = []
  for _ in range(calls):
    variables = call(variables, x)
    used.append(np.asarray(variables['stats']['directions']))
  return variables, used


def drawn(used):
  """At which calls the directions changed."""
  return [i for i in range(1, len(used)) if np.any(used[i] != used[i - 1])]


def test_redraw_happens_and_only_then():
  mixer, variables, x = performer(features=8, redraw=3)
  first = np.asarray(variables['stats']['directions'])
  after, used = train(mixer, variables, x, 10)
  assert drawn([first, *used]) == [4, 7, 10]  # before the calls 3, 6 and 9
  assert after['stats']['calls'] == 10
  assert len({w.tobytes() for w in used}) == 4
  # Reproducible from the variables alone, also from the middle of a run.
  middle, early = train(mixer, variables, x, 5)
  _, late = train(mixer, middle, x, 5)
  assert np.array_equal(early + late, used)
  # What a call computes with is what it leaves behind.
  y, stats = mixer.apply(after, x, deterministic=False, mutable=['stats'])
  again = mixer.apply(after | stats, x)
  assert np.array_equal(y.y, again.y)


def test_nothing_is_drawn_outside_of_training():
  mixer, variables, x = performer(features=8, redraw=1)
  assert variables['stats']['calls'] == 0  # initialising is no training call
  _, stats = mixer.apply(variables, x, mutable=['stats'])
  for old, new in zip(
    jax.tree.leaves(variables['stats']), jax.tree.leaves(stats)
  ):
    assert np.array_equal(old, new)
  mixer.apply(variables, x, deterministic=False)  # stats not writable: no error
  never, variables, x = performer(features=8, redraw=0)
  assert drawn(train(never, variables, x, 4)[1]) == []


def test_layers_in_a_scan_draw_their_own():
  fields = {'heads': 2, 'features': 4, 'redraw': 2}
  ids = jnp.array([[1, 2, 3, 4]])
  runs = []
  for remat in (False, True):
    model = LM(
      vocab=5,
      width=8,
      depth=2,
      mixer='performer',
      mechanisms={'performer': fields},
      hidden=8,
      remat=remat,
    )
    variables = jax.jit(model.init)(jax.random.key(0), ids)

    def loss(params, stats, model=model):
      out, changed = model.apply(
        {'params': params, 'stats': stats},
        ids,
        deterministic=False,
        mutable=['stats'],
      )
      return jnp.sum(jax.nn.log_softmax(out.logits)[..., 0]), changed['stats']

    step = jax.jit(jax.grad(loss, has_aux=True))
    stats, seen = variables['stats'], []
    for _ in range(3):
      grads, stats = step(variables['params'], stats)
      seen.append(stats['layers_0']['block_0']['mixer'])
    runs.append((grads, seen))

  (grads, seen), (same, _) = runs
  w = [np.asarray(stats['directions']) for stats in seen]
  assert w[0].shape == (2, 4, 4)  # layers lead
  assert np.array_equal(seen[2]['calls'], [3, 3])
  assert np.array_equal(w[0], w[1])
  for layer in range(2):
    assert np.any(w[2][layer] != w[1][layer])
  assert np.any(w[2][0] != w[2][1])
  # The backward pass of call 2, a redraw, computes again with that same draw.
  for left, right in zip(jax.tree.leaves(grads), jax.tree.leaves(same)):
    np.testing.assert_allclose(left, right, atol=1e-5)
