"""Causal convolutions over time: short with a tail, long by FFT or directly.

A short depthwise convolution (H3, Mamba and most of their kin put one before
the mixer) reads the last w tokens of its own channel:

    y_t = sum_{i < w} kernel_i x_{t-(w-1)+i}

so kernel[-1] meets the current token and kernel[0] the oldest. What a later
call needs is the last w - 1 tokens, the tail.

A long one has a tap for every distance, y_t = sum_{j <= t} kernel_{t-j} x_j.
By the convolution theorem it costs t log t (Romero et al. 2021, CKConv,
https://arxiv.org/abs/2102.02611; Gu et al. 2022, S4,
https://arxiv.org/abs/2111.00396), but every output then has the rounding
errors of all inputs, future ones too; `direct` is the exactly causal form.
"""

import jax.numpy as jnp


def short(x, kernel, *, tail=None, valid=None, starts=None):
  """Depthwise causal convolution of a few taps, with its decoding state.

  Args:
    x: tokens 'b t m'.
    kernel: taps 'w m', the oldest token's first.
    tail: the w - 1 tokens before x, 'b w-1 m', oldest first and zeros where
      there were none; None for none at all.
    valid: bool 'b t'. Where it is False the token is a pad, which may stand
      anywhere: its output is zero, and its neighbours do not see it, so a
      token's predecessor is the last valid one before it.
    starts: bool 'b t'. Where it is True a segment begins: the token and its
      successors read zeros for all that came before. Not read at pads.

  Returns:
    y 'b t m' in the dtype of x, and the tail to hand to the next call.

  Raises:
    ValueError: if the tail is not 'b w-1 m'.
  """
  (b, t, m), w = x.shape, kernel.shape[0]
  dtype, out = jnp.result_type(jnp.float32, x, kernel), x.dtype
  # Made from x, so that it is laid out over the mesh as x is.
  zeros = jnp.zeros_like(x[:, :1]).sum(1, keepdims=True)
  if tail is None:
    tail = jnp.broadcast_to(zeros, (b, w - 1, m))
  if tail.shape != (b, w - 1, m):
    raise ValueError(f'tail must be {(b, w - 1, m)}, got {tail.shape}')
  if valid is not None:
    # A stable sort moves the pads behind the tokens of their row, which then
    # stand side by side: neighbours are shifts again.
    x = jnp.where(valid[..., None], x, 0)
    order = jnp.argsort(~valid, axis=1, stable=True)
    x = jnp.take_along_axis(x, order[..., None], axis=1)
    if starts is not None:
      starts = jnp.take_along_axis(starts & valid, order, axis=1)

  x = jnp.concatenate([tail.astype(dtype) + zeros, x.astype(dtype)], axis=1)
  taps = [x[:, i : i + t] for i in range(w)]
  if starts is not None:
    # Segments, the tail's being 0: a tap from another one reads zero.
    run = jnp.pad(jnp.cumsum(starts, axis=1), [(0, 0), (w - 1, 0)])[..., None]
    taps = [
      tap * (run[:, i : i + t] == run[:, w - 1 :]) for i, tap in enumerate(taps)
    ]
    x = x * (run == run[:, -1:])
  y = sum(tap * kernel[i].astype(dtype) for i, tap in enumerate(taps))

  if valid is None:
    new = x[:, t:]
  else:
    rank = jnp.cumsum(valid, axis=1)
    y = jnp.take_along_axis(y, jnp.maximum(rank - 1, 0)[..., None], axis=1)
    y = jnp.where(valid[..., None], y, 0)
    last = valid.sum(1, keepdims=True) + jnp.arange(w - 1)
    new = jnp.take_along_axis(x, last[..., None], axis=1)
  return y.astype(out), new.astype(tail.dtype)


def fft(x, kernel):
  """Long causal convolution of x 'b t m' with kernel 's m', by FFT.

  Zeros are appended so that nothing wraps around. float32 or better inside,
  for there is no FFT in less. Returns y 'b t m' in the dtype of x.
  """
  t = x.shape[1]
  if t == 0:  # there is no transform of nothing
    return x
  dtype = jnp.result_type(jnp.float32, x, kernel)
  kernel = kernel[:t].astype(dtype)
  size = 1 << (t + kernel.shape[0] - 2).bit_length()
  spectrum = jnp.fft.rfft(x.astype(dtype), size, axis=1)
  spectrum = spectrum * jnp.fft.rfft(kernel, size, axis=0)
  return jnp.fft.irfft(spectrum, size, axis=1)[:, :t].astype(x.dtype)


def direct(x, kernel):
  """The same sum written out: exactly causal, t^2 m time and memory.

  The gradient of an output by a later input is exactly zero, which `fft`
  cannot promise. Shapes are those of `fft`.
  """
  t = x.shape[1]
  dtype = jnp.result_type(jnp.float32, x, kernel)
  if t == 0:
    return x
  kernel = kernel[:t].astype(dtype)
  kernel = jnp.pad(kernel, [(0, t - kernel.shape[0]), (0, 0)])
  i, j = jnp.arange(t)[:, None], jnp.arange(t)
  toeplitz = jnp.where((j <= i)[..., None], kernel[i - j], 0)
  y = jnp.einsum('tsm,bsm->btm', toeplitz, x.astype(dtype))
  return y.astype(x.dtype)
