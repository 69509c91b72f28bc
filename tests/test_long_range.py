"""Engines over 32k tokens: what drifts, drifts there.

Decays of 0.999, gates that are shut or open, keys of norm up to a thousand.
The oracle is float64 at 64 rows; the rule is that of all fast paths, with the
token-by-token form in float32 as the naive one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core import delta, recurrence, softmax, ssm
from pallas_kernels.blocks import Blocks
from pallas_kernels.masks import Causal

T, H, D, E = 2**15, 2, 8, 6
ROWS = np.sort(np.random.default_rng(0).choice(T, 64, replace=False))
EPS = float(jnp.finfo(jnp.float32).eps)


def draw(*last, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=(1, T, *own)).astype(np.float32) for own in last]


def error(got, exact):
  got = np.asarray(got, np.float64)
  assert np.all(np.isfinite(got))
  return np.max(np.abs(got - exact)) / np.sqrt(np.mean(exact**2))


def check(fast, naive, exact):
  fast, naive = (error(a, exact) for a in (fast, naive))
  assert fast <= 2 * naive + 8 * EPS, f'{fast:.1e}, naively {naive:.1e}'


def gates(kind):
  """log decays 'b t h d' or 'b t h 1'."""
  rng = np.random.default_rng(1)
  if kind == 'steady':
    return np.full((1, T, H, 1), np.log(0.999), np.float32)
  shape = (1, T, H, D if kind == 'channels' else 1)
  mild = np.log(rng.uniform(0.99, 1, shape))
  # Saturated: some gates are open, a few shut, by e^-60 or wholly.
  mild = np.where(rng.random(shape) < 0.3, 0.0, mild)
  mild = np.where(rng.random(shape) < 1e-4, -60.0, mild)
  return np.where(rng.random(shape) < 1e-4, -np.inf, mild).astype(np.float32)


@pytest.mark.parametrize('kind', ['steady', 'saturated', 'channels'])
def test_recurrence(kind):
  q, k, v = draw((H, D), (H, D), (H, E))
  k = k * np.where(np.arange(T) % 1000 == 7, 1e3, 1)[:, None, None]
  k = k.astype(np.float32)
  w = gates(kind)
  # Sums of log-decays in float64; a shut gate ends what came before it.
  wide = np.maximum(w.astype(np.float64), -1e6)
  since = np.cumsum(wide, axis=1)
  exact = []
  for t in ROWS:
    seen = np.exp(since[0, t] - since[0, : t + 1])
    scores = np.sum(q[0, t].astype(float) * k[0, : t + 1] * seen, axis=-1)
    exact.append(np.einsum('sh,she->he', scores, v[0, : t + 1].astype(float)))
  run = lambda form: jax.jit(form)(q, k, v, w)[0][0, ROWS]
  check(run(recurrence.chunked), run(recurrence.recurrent), np.stack(exact))


def test_delta():
  q, k, v, x = draw((H, D), (H, D), (H, E), (H,))
  k = k / np.linalg.norm(k, axis=-1, keepdims=True)
  # Saturated: written wholly, hardly, or somewhere between.
  beta = (1 / (1 + np.exp(-8 * x))).astype(np.float32)
  state, exact = np.zeros((H, D, E)), []
  for t in range(T):
    key, value = k[0, t].astype(float), v[0, t].astype(float)
    wrong = value - np.einsum('hde,hd->he', state, key)
    state = state + np.einsum('h,hd,he->hde', beta[0, t], key, wrong)
    if t in ROWS:
      exact.append(np.einsum('hde,hd->he', state, q[0, t].astype(float)))
  run = lambda form: jax.jit(form)(q, k, v, beta)[0][0, ROWS]
  check(run(delta.chunked), run(delta.recurrent), np.stack(exact))


def slow_modes():
  """Modes that turn by some angle and lose 1e-5 to 1e-2 a step."""
  decay = np.geomspace(1e-5, 1e-2, 4)
  log_a = -decay + 1j * np.array([0.0, 0.1, 1.0, 3.0])
  log_a = np.broadcast_to(log_a, (E, 4)).astype(np.complex64)
  ones = np.ones((E, 4), np.complex64)
  return log_a, 1e-2 * ones, ones


def impulse(log_a, b, c):
  """The response of each channel, 't m', in float64."""
  log_a, b, c = (a.astype(np.complex128) for a in (log_a, b, c))
  steps = np.arange(T)[:, None, None]
  return 2 * np.sum(b * c * np.exp(steps * log_a), axis=-1).real


def past(u, response):
  """The response summed over the past of each row."""
  return np.stack(
    [np.sum(u[0, : t + 1] * response[t::-1], axis=0) for t in ROWS]
  )


def test_state_space():
  (u,) = draw((E,))
  log_a, b, c = slow_modes()
  exact = past(u.astype(float), impulse(log_a, b, c))
  scan = lambda chunk: jax.jit(functools.partial(ssm.scan, chunk=chunk))(
    u, log_a, b, c
  )[0][0, ROWS]
  fft = jax.jit(lambda: ssm.convolve(u, ssm.kernel(log_a, b, c, T)))()[0, ROWS]
  naive = scan(1)
  check(scan(64), naive, exact)
  check(fft, naive, exact)


def test_softmax():
  """Scores of norm 1e3: a softmax that is nearly a choice, beside mild ones."""
  heads = 8  # the more draws, the steadier the largest error
  q, k, v = draw((heads, D), (heads, D), (heads, E))
  k = k * np.where(np.arange(T) % 1000 == 7, 1e2, 1)[:, None, None]
  k = k.astype(np.float32)
  wide = [np.moveaxis(a[0].astype(float), 1, 0) for a in (q[:, ROWS], k, v)]
  scores = wide[0] @ wide[1].transpose(0, 2, 1) * D**-0.5
  scores = np.where(np.arange(T) <= ROWS[:, None], scores, -np.inf)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  exact = np.moveaxis((p / p.sum(-1, keepdims=True)) @ wide[2], 0, 1)
  attend = functools.partial(softmax.attention, mask=Causal(), query_order=ROWS)
  fast = jax.jit(attend)(q[:, ROWS], k, v)[0]
  whole = Blocks(len(ROWS), T)
  dense = functools.partial(attend, implementation='plain', blocks=whole)
  naive = jax.jit(dense)(q[:, ROWS], k, v)[0]
  check(fast, naive, exact)
  whole = jax.jit(functools.partial(softmax.attention, mask=Causal()))(q, k, v)
  check(whole[0, ROWS], naive, exact)


def test_differences_of_prefix_sums_are_rejected(monkeypatch):
  """The usual form of decays, which a gate that is nearly shut ruins."""

  def difference(w):
    since = jnp.cumsum(jnp.maximum(w, -1e30), axis=-2)
    return since[..., :, None, :] - since[..., None, :, :]

  monkeypatch.setattr(recurrence, 'sums_between', difference)
  jax.clear_caches()
  try:
    with pytest.raises(AssertionError):
      test_recurrence('saturated')
  finally:
    jax.clear_caches()
