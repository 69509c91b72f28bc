"""Diagonal state spaces: one small complex linear system per channel.

S4D (Gu et al. 2022, On the Parameterization and Initialization of Diagonal
State Space Models, https://arxiv.org/abs/2206.11893) runs, in each of the m
channels, n independent complex modes

    dx/dt = a x + b u(t),     y(t) = 2 Re sum_n c x(t)       Re a < 0

where the factor 2 Re stands for the conjugate modes that are not stored.
Holding u constant over a step of length dt (zero-order hold) gives exactly

    x_t = a_bar x_{t-1} + b_bar u_t
    a_bar = exp(dt a),     b_bar = (exp(dt a) - 1) / a * b

Nothing depends on the token, so the same map is a convolution with

    kernel_l = 2 Re sum_n c b_bar a_bar^l,     a_bar^l = exp(l dt a)

Everything here takes log_a = dt a rather than a_bar: powers are then one
multiplication and one exponential, with no logarithm of a rounded number, no
branch cut, and no product of l rounded factors.
"""

import math

import jax
import jax.numpy as jnp

from jaxattn.core import conv
from jaxattn.core.recurrence import join, silence, split


def discretise(a, b, log_dt):
  """Zero-order hold.

  Args:
    a: the modes 'm n', complex with Re a < 0.
    b: how the input drives them 'm n', real or complex.
    log_dt: log of the step 'm'; steps have the unit of 1 / a.

  Returns:
    log_a 'm n' and b_bar 'm n', complex.
  """
  dt = jnp.exp(log_dt)[:, None]
  log_a = dt * a
  x, y = log_a.real, log_a.imag
  # exp(x + iy) - 1 for small steps: e^x cos y - 1 would lose all its digits,
  # but equals (e^x - 1) cos y - 2 sin^2(y / 2), in which nothing cancels.
  real = jnp.expm1(x) * jnp.cos(y) - 2 * jnp.sin(y / 2) ** 2
  grown = jax.lax.complex(real, jnp.exp(x) * jnp.sin(y))
  return log_a, grown / a * b


def kernel(log_a, b_bar, c, length):
  """The impulse response, real 'length m', for `convolve`.

  Distances are laid out in a square, l = i r + j with r^2 >= length, so that
  exp(l log_a) = exp(i r log_a) exp(j log_a): 2 r exponentials per mode and a
  matrix product over the modes, not `length` exponentials.

  Args:
    log_a: dt a, 'm n' complex.
    b_bar: from `discretise`, 'm n'.
    c: how the modes are read, 'm n' complex.
    length: how many taps.
  """
  rows, columns = _powers(log_a, length)
  rows = rows * (c * b_bar)[..., None]
  square = _real_product('mni,mnj->mij', rows, columns)
  return 2 * square.reshape(square.shape[0], -1)[:, :length].T


def convolve(u, kernel):
  """Causal convolution of u 'b t m' with kernel 't m', by FFT.

  For a dense row that starts from a zero state; `dense` and `scan` do the rest.
  """
  return conv.fft(u, kernel)


def echo(state, log_a, c, length):
  """What a state gives if nothing more comes, real 'b length m'.

  It is the zero-input response, 2 Re sum_n c exp((l + 1) log_a) x; exponentials
  are laid out as in `kernel`.

  Args:
    state: x, 'b m n' complex.
    log_a: dt a, 'm n' complex.
    c: how the modes are read, 'm n' complex.
    length: how many tokens come after the state.
  """
  rows, columns = _powers(log_a, length)
  rows = rows * (state * c * jnp.exp(log_a))[..., None]
  square = _real_product('bmni,mnj->bijm', rows, columns)
  return 2 * square.reshape(len(square), -1, square.shape[-1])[:, :length]


def dense(u, log_a, b_bar, c, *, state=None):
  """`scan` without pads and segments, by FFT: y 'b t m' alone."""
  y = convolve(u, kernel(log_a, b_bar, c, u.shape[1]))
  if state is None:
    return y
  return y + echo(state, log_a, c, u.shape[1]).astype(y.dtype)


def scan(u, log_a, b_bar, c, *, state=None, valid=None, starts=None, chunk=64):
  """The recurrence, by an associative scan inside chunks and a loop over them.

  x -> p x + r followed by x -> p' x + r' is x -> p' p x + (p' r + r'), which
  is associative; a pad is the identity, and a start has p = 0. The backward
  pass keeps the states between chunks and computes the rest again.

  Args:
    u: input 'b t m'.
    log_a: dt a, 'm n' complex.
    b_bar: from `discretise`, 'm n'.
    c: how the modes are read, 'm n' complex.
    state: what came before, 'b m n' complex; None for nothing.
    valid: bool 'b t'. Where it is False the token is a pad: its output is
      zero, the state passes it unchanged, its content is never read.
    starts: bool 'b t'. Where it is True a segment begins: all that came
      before, the incoming state included, is forgotten. Not read at pads.
    chunk: tokens per chunk. The length need not divide.

  Returns:
    y 'b t m' in the dtype of u, without any skip connection, and the state
    'b m n' after the last token, complex64 or better.
  """
  t, out = u.shape[1], u.dtype
  dtype = jnp.result_type(jnp.float32, u, log_a.real)
  log_a, b_bar, c = (
    x.astype(jnp.result_type(dtype, jnp.complex64)) for x in (log_a, b_bar, c)
  )
  u = silence(u, valid, dtype)
  # Made from inputs, so that the carry varies over the mesh as they do.
  zeros = jnp.zeros_like(u[:, :1]).sum(1)[..., None] * jnp.zeros_like(log_a)
  state = zeros if state is None else zeros + state.astype(zeros.dtype)
  if starts is not None and valid is not None:
    starts = starts & valid
  chunk = max(1, min(chunk, t))
  if valid is None and t % chunk:
    valid = jnp.ones_like(u[..., 0], bool)  # `split` appends False

  def then(first, second):
    (p, r), (p_next, r_next) = first, second
    return p_next * p, p_next * r + r_next

  def body(state, tokens):
    u, valid, starts = tokens  # 'b m c', 'b 1 c', 'b 1 c'
    p = jnp.exp(log_a)[None, :, None]
    r = b_bar[:, None] * u[..., None]
    if valid is not None:
      p = jnp.where(valid[..., None], p, 1)
    if starts is not None:
      p = p * ~starts[..., None]
    # Without masks p is the same for all rows, and stays so.
    p = jnp.broadcast_to(p, (p.shape[0], *r.shape[1:]))
    p, r = jax.lax.associative_scan(then, (p, r), axis=2)
    x = p * state[:, :, None] + r
    y = 2 * _real_product('mn,bmcn->bmc', c, x)
    if valid is not None:
      y = jnp.where(valid, y, 0)
    return x[:, :, -1], y

  masks = [None if x is None else x[..., None] for x in (valid, starts)]
  tokens = jax.tree.map(lambda x: split(x, chunk), (u, *masks))
  body = jax.checkpoint(body, prevent_cse=False)
  state, y = jax.lax.scan(body, state, tokens)
  return join(y, t).astype(out), state


def effect(u, log_a, b_bar, *, valid=None, starts=None):
  """What all these tokens do to a state, x -> p x + r, without a loop.

  r sums exp(l log_a) b_bar u over tokens, l of which are still to come; as in
  `kernel`, l = i r + j.

  Arguments are those of `scan`.

  Returns:
    p and r 'b m n'; r is the state that they leave if there was none before.
  """
  b, t, m = u.shape
  dtype = jnp.result_type(jnp.float32, u, log_a.real)
  log_a, b_bar = (
    x.astype(jnp.result_type(dtype, jnp.complex64)) for x in (log_a, b_bar)
  )
  u = silence(u, valid, dtype)
  here = jnp.ones_like(u[..., :1]) if valid is None else valid[..., None]
  p = jnp.exp(jnp.sum(here, axis=1)[..., None] * log_a)
  if starts is not None:
    starts = starts if valid is None else starts & valid
    run = jnp.cumsum(starts, axis=1)[..., None]
    p = p * (run[:, -1:] == 0)
    u = u * (run == run[:, -1:])
  if valid is not None:
    # A stable sort moves the pads before the tokens of their row.
    order = jnp.argsort(valid, axis=1, stable=True)
    u = jnp.take_along_axis(u, order[..., None], axis=1)
  rows, columns = _powers(log_a, t)
  root = rows.shape[-1]
  u = jnp.pad(u[:, ::-1], [(0, 0), (0, root * root - t), (0, 0)])
  u = u.reshape(b, root, root, m)
  exact = jax.lax.Precision.HIGHEST
  inner = jax.lax.complex(
    *(
      jnp.einsum('bijm,mnj->bimn', u, part, precision=exact)
      for part in (columns.real, columns.imag)
    )
  )
  r = jnp.einsum('bimn,mni->bmn', inner, rows, precision=exact)
  return p, b_bar * r


def _powers(log_a, length):
  """exp(i r log_a) and exp(j log_a), 'm n r', for i, j < r with r^2 >= length.

  Every power below `length` is a product of one and another.
  """
  root = math.isqrt(max(length - 1, 0)) + 1
  steps = jnp.arange(root, dtype=log_a.real.dtype)
  return tuple(jnp.exp(log_a[..., None] * i) for i in (steps * root, steps))


def _real_product(axes, x, y):
  """The real part of a complex einsum, as two real ones in full precision."""
  real, imag = (
    jnp.einsum(axes, *pair, precision=jax.lax.Precision.HIGHEST)
    for pair in ((x.real, y.real), (x.imag, y.imag))
  )
  return real - imag
