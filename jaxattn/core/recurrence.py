"""The gated linear recurrence, token by token, in chunks, or all at once.

Linear attention (Katharopoulos et al. 2020, https://arxiv.org/abs/2006.16236)
keeps one matrix per head and forgets by a gate a_t (RetNet, Mamba-2, GLA):

    S_t = diag(a_t) S_{t-1} + k_t v_t^T          S 'b h d e', a in (0, 1]
    o_t = S_t^T q_t

Unrolled from the state S that enters a chunk, with w = log a,

    o_i = S^T (q_i * exp(w_1 + .. + w_i))
          + sum_{j <= i} (sum_d q_id k_jd exp(D_ijd)) v_j
    D_ij = w_{j+1} + .. + w_i <= 0

so a chunk of c tokens is three matrix products, and only one state per chunk
goes through a sequential loop (Yang et al. 2023, Gated Linear Attention
Transformers, https://arxiv.org/abs/2312.06635). Where a is one number per
head, exp(D) leaves the sum over d and the scores are q k^T times a 'c c'
matrix; where it differs per channel, the exact 'c c d' form costs d
exponentials per pair, hence the smaller chunk.

D is a running sum that begins anew at every j, never a difference of two
prefix sums: a decay of e^-50 among mild ones would leave the difference with
four correct digits. Every exponent is then a sum of log-decays, so nothing
overflows, and a gate that is exactly zero (w = -inf) is served as well.

A new segment inside a chunk divides it into runs, numbered by counting the
starts. Whatever crosses a border between runs is multiplied by False.
"""

import math

import jax
import jax.numpy as jnp


def recurrent(q, k, v, log_decay=None, *, state=None, valid=None, starts=None):
  """Token by token: the definition, and the step of a decoder.

  Args:
    q: queries 'b t h d', scaled by the caller.
    k: keys 'b t h d'.
    v: values 'b t h e'.
    log_decay: log of the gate, at most 0: 'b t h d' for one gate per channel,
      'b t h 1' for one per head, None for no forgetting.
    state: what came before, 'b h d e'; None for nothing.
    valid: bool 'b t'. Where it is False the token is a pad: its output is
      zero, the state passes it unchanged, its content is never read.
    starts: bool 'b t'. Where it is True a segment begins: all that came
      before, the incoming state included, is forgotten. Not read at pads.

  Returns:
    o 'b t h e' in the dtype of v, and the state 'b h d e' after the last
    token, in float32 or better.

  Raises:
    ValueError: if the last axis of log_decay is neither d nor 1.
  """
  _check(k, log_decay)

  def step(state, token):
    q, k, v, log_decay, start = token
    if start is not None:
      state = state * ~start[..., None, None]
    if log_decay is not None:
      state = state * jnp.exp(log_decay)[..., None]
    state = state + k[..., None] * v[..., None, :]
    return state, jnp.einsum('bhd,bhde->bhe', q, state)

  return by_token(step, q, k, v, log_decay, state, valid, starts)


def chunked(
  q, k, v, log_decay=None, *, state=None, valid=None, starts=None, chunk=None
):
  """In chunks: matrix products inside, one state carried between them.

  Arguments, results and errors are those of `recurrent`. The backward pass
  keeps the states between chunks and computes everything else again.

  Args:
    chunk: tokens per chunk; None for 16 with a gate per channel, else 64.
      The length need not divide.
  """
  _check(k, log_decay)
  if chunk is None:
    chunk = 64 if log_decay is None or log_decay.shape[-1] == 1 else 16
  return by_chunk(_chunk, q, k, v, log_decay, state, valid, starts, chunk)


def parallel(q, k, v, log_decay=None, *, state=None, valid=None, starts=None):
  """All at once, as one chunk: every pair of tokens, as attention would.

  Arguments, results and errors are those of `recurrent`. Time and memory grow
  with t^2, and per-channel gates take a 't t d' array: for short lengths.
  """
  t = q.shape[1]
  return chunked(
    q, k, v, log_decay, state=state, valid=valid, starts=starts, chunk=t
  )


def gated(q, k, v, log_decay=None, *, state=None, valid=None, starts=None):
  """What mechanisms call: one step for one token, else chunks.

  Arguments, results and errors are those of `recurrent`.
  """
  form = recurrent if q.shape[1] == 1 else chunked
  return form(q, k, v, log_decay, state=state, valid=valid, starts=starts)


def effect(k, v, log_decay=None, *, valid=None, starts=None):
  """What all these tokens do to a state, S -> a S + s, without a loop.

  Arguments are those of `recurrent`.

  Returns:
    a 'b h d 1', or 'b h 1 1' where it is the same for all of d, and s
    'b h d e', the state that they leave if there was none before.
  """
  _check(k, log_decay)
  dtype = jnp.result_type(jnp.float32, k, v)
  k, v = silence(k, valid, dtype), silence(v, valid, dtype)
  kept = jnp.ones_like(k[:, 0, :, :1])
  if log_decay is not None:
    # From j to the end: a running sum again, not a difference of two.
    w = silence(log_decay, valid, dtype)
    w = jax.lax.cumsum(w, axis=1, reverse=True)
    kept = kept * jnp.exp(w[:, 0])
    k = k * jnp.exp(jnp.pad(w[:, 1:], [(0, 0), (0, 1), (0, 0), (0, 0)]))
  if starts is not None:
    starts = starts if valid is None else starts & valid
    run = jnp.cumsum(starts, axis=1)[..., None, None]
    kept = kept * (run[:, -1] == 0)
    k = k * (run == run[:, -1:])
  # The sum of a product's terms is rounded as often as there are terms: here
  # the root of t in each chunk, and as often in the sum of the chunks.
  k, v = (split(x, math.isqrt(max(k.shape[1] - 1, 0)) + 1) for x in (k, v))
  written = jnp.einsum('nbhcd,nbhce->nbhde', k, v)
  return kept[..., None], jnp.sum(written, axis=0)


def by_token(step, q, k, v, gate, state, valid, starts):
  """Scans `step(state, (q, k, v, gate, start)) -> state, o` over tokens.

  `gate` is whatever else a token brings, 'b t h' or 'b t h d' or None;
  `start` reaches the step as 'b 1', or None.
  """
  tokens, state = enter(q, k, v, gate, state, valid, starts)
  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
  state, o = jax.lax.scan(step, state, tokens)
  return jnp.moveaxis(o, 0, 1).astype(v.dtype), state


def by_chunk(body, q, k, v, gate, state, valid, starts, chunk):
  """Scans `body`, the same over whole chunks 'b h c ..', starts 'b 1 c'.

  What `body` computes is not kept for the backward pass but computed again:
  only the states between chunks are stored.
  """
  tokens, state = enter(q, k, v, gate, state, valid, starts)
  t = q.shape[1]
  chunk = max(1, min(chunk, t))
  tokens = jax.tree.map(lambda x: split(x, chunk), tokens)
  body = jax.checkpoint(body, prevent_cse=False)
  state, o = jax.lax.scan(body, state, tokens)
  return join(o, t).astype(v.dtype), state


def silence(x, valid, dtype):
  """`x` 'b t ..' in `dtype`, zero at the pads whatever stood there."""
  if valid is not None:
    x = jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 2)), x, 0)
  return x.astype(dtype)


def split(x, chunk):
  """'b t h ..' to chunks 'n b h c ..', zeros past the end."""
  b, t, *rest = x.shape
  n = -(-t // chunk)
  x = jnp.pad(x, [(0, 0), (0, n * chunk - t)] + [(0, 0)] * len(rest))
  return x.reshape(b, n, chunk, *rest).swapaxes(0, 1).swapaxes(2, 3)


def join(x, t):
  """Chunks 'n b h c ..' back to the first `t` tokens, 'b t h ..'."""
  n, b, h, c, *rest = x.shape
  x = x.swapaxes(2, 3).swapaxes(0, 1)
  return x.reshape(b, n * c, h, *rest)[:, :t]


def runs(starts, chunk):
  """Who reaches whom in a chunk whose segments begin at `starts` 'b h c'.

  Returns boolean multipliers:
    pairs 'c c' or 'b h c c': token i may read token j <= i, same run;
    fresh 'b h c 1': the token may read the incoming state, being in run 0;
    final 'b h c 1': its write is there at the end, being in the last run;
    whole 'b h 1 1': the incoming state is there at the end: only one run.
  """
  pairs = jnp.tril(jnp.ones((chunk, chunk), bool))
  if starts is None:
    return pairs, True, True, True
  run = jnp.cumsum(starts, axis=-1)[..., None]
  last = run[..., -1:, :]
  return pairs & (run == run.mT), run == 0, run == last, last == 0


def _check(k, log_decay):
  d = k.shape[-1]
  if log_decay is not None and log_decay.shape[-1] not in (1, d):
    raise ValueError(
      f'log_decay needs 1 value per head or d = {d}, not {log_decay.shape}'
    )


def enter(q, k, v, gate, state, valid, starts):
  """Pads silenced, dtypes settled, and a state that is made from inputs."""
  inputs = [x for x in (q, k, v) if x is not None]
  dtype = jnp.result_type(jnp.float32, *inputs)
  tokens = [
    None if x is None else silence(x, valid, dtype) for x in (q, k, v, gate)
  ]
  # Zeros made from k and v vary over the same mesh axes as the updates do,
  # which a loop's carry must under shard_map.
  zeros = [jnp.zeros_like(x[:, :1]).sum(1) for x in tokens[1:3]]
  zeros = zeros[0][..., None] * zeros[1][..., None, :]
  state = zeros if state is None else zeros + state.astype(dtype)
  if starts is not None:
    starts = starts if valid is None else starts & valid
    starts = starts[..., None]
  return (*tokens, starts), state


def sums_between(w):
  """D_ij = w_{j+1} + .. + w_i, 'b h i j d' of w 'b h c d'; 0 for i <= j.

  One matrix product with the 0-1 tensor of j < l <= i adds up each sum by
  itself, and is several times as fast as a running sum over 'b h i j d'.
  """
  i = jnp.arange(w.shape[-2])
  taken = (i[:, None] < i) & (i <= i[:, None, None])  # 'i j l'
  # 0 times -inf is not 0: a closed gate counts as e^-1e30, which is 0 as well.
  return jnp.einsum(
    'ijl,bhld->bhijd',
    taken.astype(w.dtype),
    jnp.maximum(w, -1e30),
    precision=jax.lax.Precision.HIGHEST,
  )


def _chunk(state, tokens):
  """The unrolled form over one chunk, every array 'b h c ...'."""
  q, k, v, log_decay, starts = tokens
  chunk = q.shape[2]
  pairs, fresh, final, whole = runs(starts, chunk)
  if log_decay is None:
    scores = jnp.einsum('bhid,bhjd->bhij', q, k)
    since, until, total = 1, 1, 1
  else:
    between = jnp.exp(sums_between(log_decay))  # exp(D) 'b h i j d'
    if log_decay.shape[-1] == 1:
      scores = jnp.einsum('bhid,bhjd->bhij', q, k) * between[..., 0]
    else:
      scores = (q[..., :, None, :] * k[..., None, :, :] * between).sum(-1)
    since = jnp.exp(jnp.cumsum(log_decay, axis=-2))  # start to i, inclusive
    until = between[..., -1, :, :]  # j to end
    total = since[..., -1, :, None]
  o = jnp.einsum('bhij,bhje->bhie', scores * pairs, v)
  o += jnp.einsum('bhid,bhde->bhie', q * since * fresh, state)
  state = state * total * whole
  state += jnp.einsum('bhjd,bhje->bhde', k * until * final, v)
  return state, o
