"""The linear-time engines: every form against its formula.

One harness serves the gated recurrence, the delta rule, the diagonal state
space and the short convolution, since all are a state that a token updates.
`unroll` applies the formula token by token in any dtype; `separately` cuts a
row into its segments, drops the pads and runs each piece on its own, which is
what pads and starts are supposed to mean.

A form is run twice over a row, [0, p) and then [p, t) from the state of the
first, with p as data: p = 0 is one pass, and everything else is the
segmentation law, gradients through the state included.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.core import conv, delta, recurrence, ssm

B, T, H, D, E, M, N, W = 16, 37, 2, 8, 4, 8, 5, 4
CHUNK = 8
EPS = float(jnp.finfo(jnp.float32).eps)


# The formulas: step(state, tokens, weights) -> state, o, for any leading axes.


def gated_step(state, tokens, weights):
  q, k, v, *log_decay = tokens
  for w in log_decay:
    state = state * jnp.exp(w)[..., None]
  state = state + k[..., None] * v[..., None, :]
  return state, (q[..., None] * state).sum(-2)


def delta_step(state, tokens, weights):
  q, k, v, beta, *log_decay = tokens
  for w in log_decay:
    state = state * jnp.exp(w)[..., None, None]
  error = v - (k[..., None] * state).sum(-2)
  state = state + k[..., None] * (beta[..., None] * error)[..., None, :]
  return state, (q[..., None] * state).sum(-2)


def ssm_step(state, tokens, weights):
  log_a, b_bar, c = weights
  state = jnp.exp(log_a) * state + b_bar * tokens[0][..., None]
  return state, 2 * (c * state).real.sum(-1)


def short_step(state, tokens, weights):
  window = jnp.concatenate([state, tokens[0][..., None, :]], -2)
  return window[..., 1:, :], (weights[0] * window).sum(-2)


def unroll(step, tokens, weights, state, valid, starts):
  """The formula over a row with pads and segments, in the inputs' dtype."""

  def expand(mask, x):
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))

  def body(state, now):
    tokens, valid, start = now
    old = jnp.where(expand(start & valid, state), 0, state)
    new, o = step(old, tokens, weights)
    state = jnp.where(expand(valid, state), new, state)
    return state, jnp.where(expand(valid, o), o, 0)

  tokens = [jnp.where(expand(valid, x), x, 0) for x in tokens]
  now = jax.tree.map(lambda x: x.swapaxes(0, 1), (tokens, valid, starts))
  state, o = jax.lax.scan(body, state, now)
  return o.swapaxes(0, 1), state


def separately(step, tokens, weights, state, valid, starts):
  """The meaning of pads and segments: take rows apart, run, put together."""
  step = jax.jit(step)
  rows, states = [], []
  for b in range(8):
    row, s, o = [], state[b], None
    for t in np.flatnonzero(valid[b]):
      if starts[b, t]:
        s = jnp.zeros_like(s)
      s, o = step(s, [x[b, t] for x in tokens], weights)
      row.append((t, o))
    o = step(state[0], [x[0, 0] for x in tokens], weights)[1]
    full = np.zeros((T, *o.shape), o.dtype)
    for t, o in row:
      full[t] = o
    rows.append(full)
    states.append(s)
  return np.stack(rows), jnp.stack(states)


# The cases.


@dataclasses.dataclass
class Case:
  step: object
  tokens: list
  weights: list
  state: jax.Array
  forms: dict  # of f(tokens, weights, state, valid, starts) -> o, state

  def replace(self, **changes):
    return dataclasses.replace(self, **changes)


def masks():
  """A row for each way in which pads and segments may stand."""
  rng = np.random.default_rng(0)
  valid, starts = np.ones((8, T), bool), np.zeros((8, T), bool)
  valid[1, :11] = False  # left
  valid[2, 17:] = False  # right
  valid[3, 5:20] = False  # middle, across a whole chunk
  valid[4:6] = rng.random((2, T)) < 0.6
  valid[6] = False
  starts[3, 0] = True
  starts[4] = rng.random(T) < 0.3  # pads among them, where it means nothing
  starts[5] = rng.random(T) < 0.05
  starts[7, [8, 9, 16, 30]] = True  # first of a chunk, and one-token segments
  return np.tile(valid, (B // 8, 1)), np.tile(starts, (B // 8, 1))


def bind(form, **options):
  return lambda tokens, weights, state, valid, starts: form(
    *tokens, *weights, state=state, valid=valid, starts=starts, **options
  )


def cases():
  rng = np.random.default_rng(1)

  def normal(*shape):
    return rng.uniform(-1, 1, shape).astype(np.float32)

  q, k, v = normal(B, T, H, D), normal(B, T, H, D), normal(B, T, H, E)
  unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
  gate = -np.exp(2 * normal(B, T, H, D) - 3)
  state = normal(B, H, D, E)
  recurrent = {'recurrent': bind(recurrence.recurrent)}
  chunked = {'chunked': bind(recurrence.chunked, chunk=CHUNK)}
  parallel = {'parallel': bind(recurrence.parallel)}
  gated = recurrent | chunked | parallel
  beta = 1 / (1 + np.exp(normal(B, T, H)))
  rule = {
    'recurrent': bind(delta.recurrent),
    'chunked': bind(delta.chunked, chunk=CHUNK),
  }
  a = -0.5 + 1j * np.pi * np.arange(N) * np.ones((M, 1))
  log_dt = np.linspace(np.log(0.01), np.log(0.3), M)
  with jax.enable_x64(True):
    log_a, b_bar = ssm.discretise(a, np.ones((M, N)), log_dt)
  modes = [np.asarray(x, np.complex64) for x in (log_a, b_bar)]
  modes.append((normal(M, N) + 1j * normal(M, N)).astype(np.complex64))
  memory = (normal(B, M, N) + 1j * normal(B, M, N)).astype(np.complex64)
  return {
    'channel': Case(gated_step, [q, k, v, gate], [], state, gated),
    'head': Case(
      gated_step, [q, k, v, gate[..., :1]], [], state, chunked | parallel
    ),
    'plain': Case(gated_step, [q, k, v], [], state, recurrent | chunked),
    'delta': Case(delta_step, [q, unit, v, beta], [], state, rule),
    'gated_delta': Case(
      delta_step, [q, unit, v, beta, gate[..., 0]], [], state, rule
    ),
    'ssm': Case(
      ssm_step,
      [normal(B, T, M)],
      modes,
      memory,
      {'scan': bind(ssm.scan, chunk=CHUNK)},
    ),
    'short': Case(
      short_step,
      [normal(B, T, M)],
      [normal(W, M)],
      normal(B, W - 1, M),
      {
        'short': lambda tokens, weights, state, valid, starts: conv.short(
          *tokens, *weights, tail=state, valid=valid, starts=starts
        )
      },
    ),
  }


CASES = cases()
VALID, STARTS = masks()
DENSE = dict(valid=np.ones_like(VALID), starts=np.zeros_like(STARTS))
FORMS = [(name, form) for name, case in CASES.items() for form in case.forms]


def default(case):
  return 'chunked' if 'chunked' in case.forms else next(iter(case.forms))


# The harness.


@functools.cache
def program(run):
  """Two passes split at p, their cotangents pulled back, as one program."""

  def outputs(tokens, weights, state, valid, starts, p):
    early = jnp.arange(valid.shape[1]) < p

    def half(state, valid):
      return run(tokens, weights, state, valid, starts)[::-1]

    parts = jnp.stack([valid & early, valid & ~early])
    state, o = jax.lax.scan(half, state, parts)
    return o.sum(0), state

  def both(tokens, weights, state, valid, starts, p, pull):
    f = functools.partial(outputs, valid=valid, starts=starts, p=p)
    out, vjp = jax.vjp(f, tokens, weights, state)
    pull = jax.tree.map(lambda x, y: x.astype(y.dtype), pull, out)
    return out, vjp(pull)

  return jax.jit(both)


@functools.cache
def formula(step):
  return functools.partial(unroll, step)


def widen(tree):
  wide = {'f': np.float64, 'c': np.complex128}
  return jax.tree.map(lambda x: np.asarray(x, wide[x.dtype.kind]), tree)


def measure(run, case, p=0, valid=VALID, starts=STARTS, double=False):
  """o, state, and the gradients by tokens, weights and state, in a list."""
  rng = np.random.default_rng(2)
  b, t = valid.shape
  tokens = [
    np.where(valid.reshape(b, t, *[1] * (x.ndim - 2)), x, np.nan)
    for x in case.tokens
  ]
  args = tokens, case.weights, case.state
  o = case.tokens[2 if len(tokens) > 1 else 0]
  pull = tuple(
    rng.uniform(-1, 1, x.shape).astype(np.float32) for x in (o, case.state)
  )
  with jax.enable_x64(double):
    out = program(run)(
      *(widen(args) if double else args), valid, starts, p, pull
    )
    return [np.asarray(x) for x in jax.tree.leaves(out)]


def error(x, exact):
  """Largest difference over the RMS of the exact result."""
  worst = np.max(np.abs(np.asarray(x) - exact), initial=0)
  return worst / np.sqrt(np.mean(np.abs(exact) ** 2)) if worst else 0.0


def agree(fast, naive, exact, eps=EPS):
  """The error rule, for the worst of all arrays; NaN is disagreement.

  Array by array the largest of a few hundred rounding errors would be a
  lottery, which the naive form wins as often as it loses.
  """
  worst = max(error(x, y) for x, y in zip(fast, exact, strict=True))
  return worst <= 2 * max(error(x, y) for x, y in zip(naive, exact)) + eps


def lawful(run, case, p=0, **given):
  step = formula(case.step)
  return agree(
    measure(run, case, p, **given),
    measure(step, case, **given),
    measure(step, case, double=True, **given),
  )


# The laws.


@pytest.mark.parametrize(
  'name', ['channel', 'delta', 'gated_delta', 'ssm', 'short']
)
def test_the_formula_means_separate_segments(name):
  case = CASES[name]
  exact = measure(formula(case.step), case, double=True)
  with jax.enable_x64(True):
    args = widen((case.tokens, case.weights, case.state))
    apart = separately(case.step, *args, VALID, STARTS)
    for x, y in zip(apart, exact):
      assert error(np.asarray(x), y[:8]) < 1e-13


@pytest.mark.parametrize(('name', 'form'), FORMS)
def test_forms_agree_in_value_and_gradient_at_any_split(name, form):
  case = CASES[name]
  for p in (0, 1, 7, 8, 13, 20, T - 1, T):
    assert lawful(case.forms[form], case, p), p


@pytest.mark.parametrize(('name', 'form'), FORMS)
def test_pads_are_exactly_zero_both_ways(name, form):
  case = CASES[name]
  n = len(case.tokens)
  o, state, *gradients = measure(case.forms[form], case)
  for x in (o, *gradients[:n]):
    assert np.all(np.isfinite(x))
    assert not np.any(x[~VALID])
  assert np.array_equal(state[6], case.state[6])  # nothing but pads


@pytest.mark.parametrize(('name', 'form'), FORMS)
def test_the_past_is_bit_identical(name, form):
  case = CASES[name]
  late = np.arange(T) >= 20
  changed = [
    np.where(late.reshape(T, *[1] * (x.ndim - 2)), x[::-1], x)
    for x in case.tokens
  ]
  before = measure(case.forms[form], case)[0]
  after = measure(case.forms[form], case.replace(tokens=changed))[0]
  assert np.array_equal(before[:, :20], after[:, :20])
  assert not np.array_equal(before[:, 20], after[:, 20])


def dropped_reset(tokens, weights, state, valid, starts):
  return CASES['head'].forms['chunked'](tokens, weights, state, valid, None)


def pads_read(tokens, weights, state, valid, starts):
  tokens = [jnp.nan_to_num(x, nan=0.1) for x in tokens]
  return CASES['head'].forms['chunked'](tokens, weights, state, None, starts)


def reset_by_pads(tokens, weights, state, valid, starts):
  padded = jnp.pad(starts & ~valid, [(0, 0), (1, 0)])[:, :-1]
  run = CASES['head'].forms['chunked']
  return run(tokens, weights, state, valid, starts | padded)


def undecayed_state(tokens, weights, state, valid, starts):
  run = CASES['head'].forms['chunked']
  fresh = run(tokens, weights, state * 0, valid, starts)
  plain = run(tokens[:3], weights, state, valid, starts)
  bare = run(tokens[:3], weights, state * 0, valid, starts)
  return jax.tree.map(lambda x, y, z: x + y - z, fresh, plain, bare)


def late_decay(tokens, weights, state, valid, starts):
  *qkv, log_decay = tokens
  log_decay = jnp.pad(log_decay, [(0, 0), (1, 0), (0, 0), (0, 0)])[:, :-1]
  tokens = *qkv, jnp.nan_to_num(log_decay)
  return CASES['head'].forms['chunked'](tokens, weights, state, valid, starts)


def dropped_gradient(tokens, weights, state, valid, starts):
  state = jax.lax.stop_gradient(state)
  return CASES['head'].forms['chunked'](tokens, weights, state, valid, starts)


@pytest.mark.parametrize(
  'mutant',
  [
    dropped_reset,
    pads_read,
    reset_by_pads,
    undecayed_state,
    late_decay,
    dropped_gradient,
  ],
)
def test_the_law_rejects(mutant):
  case = CASES['head']
  assert all(np.isfinite(x).all() for x in measure(mutant, case)[:2])
  assert not lawful(mutant, case)


def test_without_masks_and_state_in_double():
  for case in CASES.values():
    case = case.replace(state=np.zeros_like(case.state))
    exact = measure(formula(case.step), case, **DENSE, double=True)[:2]
    for form, run in case.forms.items():
      if form == 'parallel':  # which is `chunked` by another name
        continue
      with jax.enable_x64(True):
        args = *widen((case.tokens, case.weights)), None, None, None
        fast = jax.tree.map(np.asarray, jax.jit(run)(*args))
      assert agree(fast, exact, exact, eps=1e-13)


def test_half_precision_outside_and_single_inside():
  names = 'channel', 'delta', 'gated_delta', 'ssm', 'short'
  for case in (CASES[name] for name in names):
    half = [jnp.asarray(x, jnp.bfloat16) for x in case.tokens]
    case = case.replace(tokens=[np.asarray(x, np.float32) for x in half])
    exact = measure(formula(case.step), case, double=True)[:2]
    naive = measure(formula(case.step), case)[:2]
    naive[0] = naive[0].astype(jnp.bfloat16).astype(np.float32)
    run = jax.jit(case.forms[default(case)])
    o, state = run(half, case.weights, case.state, VALID, STARTS)
    assert o.dtype == jnp.bfloat16
    assert state.dtype == case.state.dtype
    assert agree([o.astype(np.float32), state], naive, exact, 2**-8)


@pytest.mark.parametrize(
  'name', ['channel', 'delta', 'gated_delta', 'ssm', 'short']
)
def test_all_lengths_and_exact_splits(name):
  case, total = CASES[name], CHUNK + 1
  here = np.arange(T) < total
  naive, exact = (
    measure(formula(case.step), case, valid=VALID & here, double=double)[:2]
    for double in (False, True)
  )
  run = jax.jit(case.forms[default(case)])
  for t in (0, 1, 2, CHUNK - 1, CHUNK, total):
    o, state = [], case.state
    for part in (slice(t), slice(t, total)):
      tokens, valid, starts = jax.tree.map(
        lambda x, part=part: x[:, :total][:, part],
        (case.tokens, VALID, STARTS),
      )
      y, state = run(tokens, case.weights, state, valid, starts)
      o.append(np.asarray(y))
    o.append(np.zeros_like(exact[0][:, total:]))
    assert agree([np.concatenate(o, 1), state], naive, exact), t


# Where exponents, inverses and long sums go wrong.


def gates(kind, shape):
  rng = np.random.default_rng(3)
  return {
    'strong': np.full(shape, -50),
    'mixed': np.where(rng.random(shape) < 0.2, -50, -1e-3),
    'saturated': np.where(rng.random(shape) < 0.2, -np.inf, 0),
  }[kind].astype(np.float32)


def prefix_difference(tokens, weights, state, valid, starts):
  """The mutant that subtracts prefix sums of the log-decay."""
  q, k, v, w = (jnp.where(valid[..., None, None], x, 0) for x in tokens)
  g = jnp.cumsum(w, axis=1)[..., 0]
  pairs = g[:, :, None] - g[:, None]  # 'b t s h'
  pairs = jnp.exp(jnp.where(jnp.tri(T, dtype=bool)[..., None], pairs, -jnp.inf))
  o = jnp.einsum('bthd,bshd,btsh,bshe->bthe', q, k, pairs, v)
  o += jnp.einsum('bthd,bth,bhde->bthe', q, jnp.exp(g), state)
  state = state * jnp.exp(g[:, -1])[..., None, None]
  return o, state + jnp.einsum('bshd,bsh,bshe->bhde', k, pairs[:, -1], v)


@pytest.mark.parametrize('kind', ['strong', 'mixed', 'saturated'])
@pytest.mark.parametrize('name', ['channel', 'head'])
def test_extreme_gates(name, kind):
  case = CASES[name]
  *qkv, w = case.tokens
  case = case.replace(tokens=[*qkv, gates(kind, w.shape)])
  for form, run in case.forms.items():
    for p in (0, 13):
      assert lawful(run, case, p), form


def test_prefix_differences_are_rejected():
  case = CASES['head']
  assert lawful(prefix_difference, case, **DENSE)
  *qkv, w = case.tokens
  case = case.replace(tokens=[*qkv, gates('mixed', w.shape)])
  assert not lawful(prefix_difference, case, **DENSE)


def test_delta_with_identical_keys_and_full_overwriting():
  case = CASES['delta']
  q, k, v, beta = case.tokens
  same = np.broadcast_to(k[:, :1], k.shape)
  for tokens in (
    [q, same, v, np.ones_like(beta)],
    [q, k, v, np.round(beta)],
  ):
    for run in case.forms.values():
      assert lawful(run, case.replace(tokens=tokens))


def product_form(a):
  """The mutant (I - a)(I + a^2)(I + a^4) .., exact only on paper."""
  eye = np.eye(len(a), dtype=a.dtype)
  x, power = eye - a, a @ a
  for _ in range(6):
    x, power = x @ (eye + power), power @ power
  return x


def substitution(a):
  """Row by row, the naive inverse of I + a in a's own precision."""
  c = len(a)
  x = np.eye(c, dtype=a.dtype)
  for i in range(c):
    x[i] -= a[i, :i] @ x[:i]
  return x


@pytest.mark.parametrize('c', [1, 33, 64])
def test_inverse_unit_lower(c):
  rng = np.random.default_rng(4)
  ones = np.tri(c, k=-1, dtype=np.float32)
  noise = ones * rng.uniform(-1, 1, (c, c)).astype(np.float32) / c**0.5
  invert = jax.jit(delta.inverse_unit_lower)
  for a in (ones, noise):
    exact = substitution(a.astype(np.float64))
    assert agree([invert(a)], [substitution(a)], [exact])
    above = a + np.triu(np.ones_like(a))  # nothing there is read
    assert np.array_equal(invert(above), invert(a))
    if c == 64 and a is ones:
      assert not agree([product_form(a)], [substitution(a)], [exact])

  # d(L^-1) = -L^-1 dL L^-1, forwards and backwards.
  da = rng.uniform(-1, 1, (c, c)).astype(np.float32)
  pull = rng.uniform(-1, 1, (c, c)).astype(np.float32)
  exact = substitution(noise.astype(np.float64))
  forward = -exact @ (da * ones) @ exact
  backward = -ones * (exact.T @ pull @ exact.T)
  _, tangent = jax.jvp(invert, (noise,), (da,))
  _, vjp = jax.vjp(invert, noise)
  for x, y in ((tangent, forward), (vjp(pull)[0], backward)):
    assert error(x, y) <= 32 * EPS


@pytest.mark.parametrize(
  ('name', 'run'),
  [
    ('channel', recurrence.gated),
    ('head', recurrence.gated),
    ('delta', delta.delta),
    ('gated_delta', delta.delta),
    ('ssm', ssm.scan),
  ],
)
def test_long_range(name, run):
  t, rng = 4096, np.random.default_rng(5)

  def uniform(*shape):
    return rng.uniform(-1, 1, (1, t, *shape)).astype(np.float32)

  case = CASES[name]
  tokens = [uniform(*x.shape[2:]) for x in case.tokens]
  if name in ('channel', 'head'):
    tokens[3] = np.full_like(tokens[3], np.log(0.999))
  if 'delta' in name:
    tokens[1] /= np.linalg.norm(tokens[1], axis=-1, keepdims=True)
    tokens[3] = np.abs(tokens[3]) / 10
  if name == 'gated_delta':
    tokens[4] = np.full_like(tokens[4], np.log(0.999))
  args = tokens, case.weights, case.state[:1]
  args = *args, np.ones((1, t), bool), np.zeros((1, t), bool)
  step, run = jax.jit(formula(case.step)), jax.jit(bind(run))
  naive = jax.tree.map(np.asarray, step(*args))
  with jax.enable_x64(True):
    exact = jax.tree.map(np.asarray, step(*widen(args[:3]), *args[3:]))
  assert agree(run(*args), naive, exact)


# State spaces and long convolutions.


def test_zero_order_hold_for_small_steps():
  a = (-0.5 + 1j * np.pi * np.arange(N) * np.ones((16, 1))).astype(np.complex64)
  log_dt = np.linspace(-16, 0, 16).astype(np.float32)
  log_a, b_bar = jax.jit(ssm.discretise)(a, np.float32(1), log_dt)
  assert error(log_a, np.exp(np.float64(log_dt))[:, None] * a) < 4 * EPS
  exact = np.expm1(np.complex128(log_a)) / a
  assert np.max(np.abs(b_bar / exact - 1)) < 4 * EPS
  careless = (jnp.exp(log_a) - 1) / a
  assert np.max(np.abs(careless / exact - 1)) > 1e-2


@pytest.mark.parametrize('length', [0, 1, 2, 3, 10, 1000])
def test_kernel_is_the_impulse_response(length):
  log_a, b_bar, c = CASES['ssm'].weights
  lag = np.arange(length, dtype=np.float32)[:, None, None]
  naive, exact = (
    2 * (c * b * np.exp(lag.astype(a.real.dtype) * a)).real.sum(-1)
    for a, b in ((log_a, b_bar), widen((log_a, b_bar)))
  )
  fast = ssm.kernel(log_a, b_bar, c, length)
  assert fast.shape == (length, M)
  assert fast.dtype == np.float32
  assert length == 0 or agree([fast], [naive], [exact])


def test_convolution_is_the_recurrence():
  case = CASES['ssm']
  case = case.replace(state=np.zeros_like(case.state))
  naive = measure(formula(ssm_step), case, **DENSE)[0]
  exact = measure(formula(ssm_step), case, **DENSE, double=True)[0]
  kernel = ssm.kernel(*case.weights, T)
  for convolve in (ssm.convolve, conv.direct):
    # An FFT may be wrong by 1e-6 of the whole at every point.
    y = convolve(case.tokens[0], kernel)
    assert agree([y], [naive], [exact], eps=1e-6)
  wrapped = jnp.fft.irfft(
    jnp.fft.rfft(case.tokens[0], axis=1) * jnp.fft.rfft(kernel, axis=0),
    T,
    axis=1,
  )
  assert not agree([wrapped], [naive], [exact], eps=1e-6)


@pytest.mark.parametrize('convolve', [conv.fft, conv.direct])
@pytest.mark.parametrize(('t', 's'), [(0, 3), (1, 1), (2, 1), (37, 9), (9, 37)])
def test_long_convolutions(convolve, t, s):
  rng = np.random.default_rng(6)
  x = rng.uniform(-1, 1, (2, t, M)).astype(np.float32)
  kernel = rng.uniform(-1, 1, (s, M)).astype(np.float32)
  y = convolve(x, kernel)
  assert y.shape == x.shape
  for b, m in np.ndindex(2, M) if t else ():
    exact = np.convolve(np.float64(x[b, :, m]), np.float64(kernel[:, m]))[:t]
    assert error(y[b, :, m], exact) < 2e-6


def test_direct_is_exactly_causal_and_fft_is_not():
  x = CASES['ssm'].tokens[0][:1]
  kernel = np.ones((T, M), np.float32)
  leaks = [
    jax.grad(lambda x, f=f: f(x, kernel)[0, 5, 0])(x)[0, 6:].any()
    for f in (conv.direct, conv.fft)
  ]
  assert leaks == [False, True]


# What they promise to the rest of the library.


def test_backward_keeps_only_the_states_between_chunks():
  t, chunk = 16 * T, 16
  shape = jax.ShapeDtypeStruct
  k, s = shape((1, t, 1, 64), np.float32), shape((1, t, 1), np.float32)
  per_chunk = t // chunk * 64 * 64

  def largest(f, *args):
    kept = jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], *args)
    return max(x.size for x in jax.tree.leaves(kept))

  small = functools.partial(recurrence.chunked, chunk=chunk)
  assert largest(small, k, k, k, k) <= per_chunk
  assert (
    largest(functools.partial(delta.chunked, chunk=chunk), k, k, k, s)
    <= per_chunk
  )
  assert largest(recurrence.recurrent, k, k, k, k) >= t * 64 * 64


@pytest.mark.parametrize('kind', ['Auto', 'Explicit'])
def test_carries_pass_the_type_checks_of_a_mesh(kind):
  kind = jax.sharding.AxisType[kind]
  mesh = jax.make_mesh((1,), ('data',), axis_types=(kind,))

  def place(x, spec):
    sharding = jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  def constant_carry(tokens, weights, state, valid, starts):
    x = tokens[0].swapaxes(0, 1)
    return jax.lax.scan(lambda c, x: (c + x, x), jnp.zeros(x.shape[1:]), x)

  rows, whole = jax.P('data'), jax.P()
  for case in CASES.values():
    args = case.tokens, case.weights, case.state, VALID, STARTS
    specs = rows, whole, whole, rows, rows
    shapes = [
      jax.tree.map(functools.partial(place, spec=spec), x)
      for x, spec in zip(args, specs)
    ]
    for run in (*case.forms.values(), constant_carry):
      for masks in (shapes[3:], (None, None)):
        for state in (shapes[2], None):
          inside = jax.shard_map(run, in_specs=specs, out_specs=rows)
          given = *shapes[:2], state, *masks
          with jax.set_mesh(mesh):
            if run is constant_carry:
              with pytest.raises(TypeError, match='carry'):
                jax.eval_shape(inside, *given)
            else:
              jax.eval_shape(inside, *given)
              jax.eval_shape(run, *given)


def test_bad_shapes_are_named():
  q, k, v, w = CASES['channel'].tokens
  for form in (recurrence.gated, recurrence.recurrent):
    with pytest.raises(ValueError, match='log_decay'):
      form(q, k, v, w[..., :2])
  x, taps = CASES['short'].tokens[0], CASES['short'].weights[0]
  with pytest.raises(ValueError, match='tail'):
    conv.short(x, taps, tail=x[:, :W])


# The delta rule with a gate.


@pytest.mark.parametrize('kind', ['strong', 'mixed', 'saturated'])
def test_extreme_gates_of_the_delta_rule(kind):
  case = CASES['gated_delta']
  *rest, w = case.tokens
  case = case.replace(tokens=[*rest, gates(kind, w.shape)])
  for form, run in case.forms.items():
    for p in (0, 13):
      assert lawful(run, case, p), form


def test_an_open_gate_is_the_plain_delta_rule():
  plain, gated = CASES['delta'], CASES['gated_delta']
  *rest, w = gated.tokens
  gated = gated.replace(tokens=[*rest, np.zeros_like(w)])
  for form, run in plain.forms.items():
    want = measure(run, plain)
    got = measure(run, gated)
    del got[6]  # the gradient of the gate, which the plain rule has not
    for x, y in zip(got, want, strict=True):
      assert error(x, y) <= 32 * EPS, form


def test_a_gate_without_writes_is_decay_alone():
  """Keys of zero write nothing: the state fades by the product of gates."""
  case = CASES['gated_delta']
  q, k, v, beta, w = case.tokens
  case = case.replace(tokens=[q, np.zeros_like(k), v, beta, w])
  faded = case.state * np.exp(w.sum(1, dtype=np.float64))[..., None, None]
  for run in case.forms.values():
    assert error(measure(run, case, **DENSE)[1], faded) <= 32 * EPS


def correct_before_decay(tokens, weights, state, valid, starts):
  """A mutant: the error is read from the memory before it fades."""

  def step(state, tokens, weights):
    q, k, v, beta, w = tokens
    error = v - (k[..., None] * state).sum(-2)
    state = state * jnp.exp(w)[..., None, None]
    state = state + k[..., None] * (beta[..., None] * error)[..., None, :]
    return state, (q[..., None] * state).sum(-2)

  return unroll(step, tokens, weights, state, valid, starts)


def gate_ignored_at_starts(tokens, weights, state, valid, starts):
  """A mutant: no document begins, for the gate is thought to see to it."""
  run = CASES['gated_delta'].forms['chunked']
  return run(tokens, weights, state, valid, None)


def gate_of_pads(tokens, weights, state, valid, starts):
  """A mutant: the memory fades while pads pass."""
  *rest, w = tokens
  w = jnp.where(valid[..., None], w, -0.1)
  rest = [jnp.nan_to_num(x, nan=0.0) for x in rest]
  run = CASES['gated_delta'].forms['chunked']
  return run([*rest, w], weights, state, None, starts & valid)


def gate_one_late(tokens, weights, state, valid, starts):
  """A mutant: each token fades by its predecessor's gate."""
  *rest, w = tokens
  late = jnp.pad(w, [(0, 0), (1, 0), (0, 0)])[:, :-1]
  run = CASES['gated_delta'].forms['chunked']
  return run([*rest, jnp.nan_to_num(late)], weights, state, valid, starts)


@pytest.mark.parametrize(
  'mutant',
  [correct_before_decay, gate_ignored_at_starts, gate_of_pads, gate_one_late],
)
def test_the_law_rejects_a_wrong_gate(mutant):
  case = CASES['gated_delta']
  assert all(np.isfinite(x).all() for x in measure(mutant, case)[:2])
  assert not lawful(mutant, case)
