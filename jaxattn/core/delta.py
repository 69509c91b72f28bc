"""The delta rule, token by token or in chunks.

Schlag et al. 2021 (https://arxiv.org/abs/2102.11174) write into the matrix
memory only what it does not yet say:

    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T
        = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T     S 'b h d e'
    o_t = S_t^T q_t

In chunks (Yang et al. 2024, Parallelizing Linear Transformers with the Delta
Rule over Sequence Length, https://arxiv.org/abs/2406.06484): let
u_t = beta_t (v_t - S_{t-1}^T k_t) be what token t really writes. From the
state S that enters the chunk, S_{t-1} = S + sum_{j < t} k_j u_j^T, so

    u_t + beta_t sum_{j < t} (k_t . k_j) u_j = beta_t (v_t - S^T k_t)

which is a unit lower triangular system, (I + A) U = diag(beta) (V - K S) with
A_tj = beta_t k_t . k_j for j < t. Once U is known the chunk is plain linear
attention with values U:

    O = Q S + tril(Q K^T) U          S' = S + K^T U

Segments divide a chunk into runs, as in `recurrence`: A and tril(Q K^T) stop
at a run's border, S is seen by run 0 and lives on if there is no other.

A gate a_t per head (Yang et al. 2024, Gated Delta Networks,
https://arxiv.org/abs/2412.06464) lets the memory fade before it is corrected:

    S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T

What token t meets is then a_t S_{t-1} = exp(w_1 + .. + w_t) S
+ sum_{j < t} exp(D_tj) k_j u_j^T, with w = log a and the sums D_tj =
w_{j+1} + .. + w_t of `recurrence`. So every product of two tokens, in A and in
tril(Q K^T), takes a factor exp(D), and every product with S or S' takes the
decay from there or to there; all exponents are sums of log-decays, at most 0.
"""

import functools

import jax
import jax.numpy as jnp

from jaxattn.core.recurrence import (
  by_chunk,
  by_token,
  enter,
  runs,
  split,
  sums_between,
)


def recurrent(
  q, k, v, beta, log_decay=None, *, state=None, valid=None, starts=None
):
  """Token by token: the definition, and the step of a decoder.

  Args:
    q: queries 'b t h d', scaled by the caller.
    k: keys 'b t h d'. The memory is stable while beta |k|^2 <= 2.
    v: values 'b t h e'.
    beta: how much of the error is corrected, 'b t h'.
    log_decay: log of the gate, at most 0 and -inf where it is closed, 'b t h';
      None for no forgetting.
    state: what came before, 'b h d e'; None for nothing.
    valid: bool 'b t'. Where it is False the token is a pad: its output is
      zero, the state passes it unchanged, its content is never read.
    starts: bool 'b t'. Where it is True a segment begins: all that came
      before, the incoming state included, is forgotten. Not read at pads.

  Returns:
    o 'b t h e' in the dtype of v, and the state 'b h d e' after the last
    token, in float32 or better.
  """

  def step(state, token):
    q, k, v, gates, start = token
    beta, *log_decay = jnp.moveaxis(gates, -1, 0)
    if start is not None:
      state = state * ~start[..., None, None]
    for w in log_decay:
      state = state * jnp.exp(w)[..., None, None]
    error = v - jnp.einsum('bhd,bhde->bhe', k, state)
    state = state + k[..., None] * (beta[..., None] * error)[..., None, :]
    return state, jnp.einsum('bhd,bhde->bhe', q, state)

  gates = _together(beta, log_decay)
  return by_token(step, q, k, v, gates, state, valid, starts)


def chunked(
  q,
  k,
  v,
  beta,
  log_decay=None,
  *,
  state=None,
  valid=None,
  starts=None,
  chunk=32,
):
  """In chunks: matrix products inside, one state carried between them.

  Arguments and results are those of `recurrent`. The backward pass keeps the
  states between chunks and computes everything else again.

  Args:
    chunk: tokens per chunk. The length need not divide.
  """
  gates = _together(beta, log_decay)
  return by_chunk(_chunk, q, k, v, gates, state, valid, starts, chunk)


def delta(
  q, k, v, beta, log_decay=None, *, state=None, valid=None, starts=None
):
  """What mechanisms call: one step for one token, else chunks.

  Arguments and results are those of `recurrent`.
  """
  form = recurrent if q.shape[1] == 1 else chunked
  return form(q, k, v, beta, log_decay, state=state, valid=valid, starts=starts)


def effect(k, v, beta, log_decay=None, *, valid=None, starts=None, chunk=32):
  """What all these tokens do to a state, S -> kept S + written.

  From the last chunk to the first: then `written` is a sum, and all that the
  backward pass keeps of a chunk is what those after it keep of a state.

  Arguments are those of `chunked`.

  Returns:
    kept 'b h d d', and written 'b h d e', the state that they leave if there
    was none before.
  """
  tokens, written = enter(
    None, k, v, _together(beta, log_decay), None, valid, starts
  )
  chunk = max(1, min(chunk, k.shape[1]))
  tokens = jax.tree.map(lambda x: split(x, chunk), tokens)
  kept = jnp.eye(k.shape[-1], dtype=written.dtype)
  kept += jnp.zeros_like(written[..., :1])
  body = jax.checkpoint(_effect, prevent_cse=False)
  return jax.lax.scan(body, (kept, written), tokens, reverse=True)[0]


def unit(x):
  """`x` with norm 1 over its last axis, in float32 or wider.

  Queries and keys 'b t h d' want it: the correction of a longer key overshoots.
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(square + 1e-6)


@jax.custom_jvp
def inverse_unit_lower(a):
  """The inverse of I + tril(a, -1), for a '... c c', by block doubling.

  Let X hold the inverses of the diagonal blocks of size s. Two neighbours
  and the block of `a` below them make a block of size 2 s,

      [ L11   0  ]^-1   [      X11         0  ]
      [ L21  L22 ]    = [ -X22 L21 X11    X22 ]

  and since X is block diagonal, X - X L21 X does so for all pairs at once:
  log2(c) rounds of two products, from X = I at s = 1. It subtracts no more
  than forward substitution does. The product (I - a)(I + a^2)(I + a^4) ..
  is as short, but its factors grow like binomials and cancel to nothing.

  The derivative of an inverse is known, dX = -X da X, so neither mode of
  differentiation walks through the rounds.
  """
  c = a.shape[-1]
  i, j = jnp.arange(c)[:, None], jnp.arange(c)
  x = jnp.zeros_like(a) + jnp.eye(c, dtype=a.dtype)
  size = 1
  while size < c:
    low = (i // size == j // size + 1) & (i // size % 2 == 1)
    x = x - _product(x, jnp.where(low, a, 0), x)
    size *= 2
  return x


@inverse_unit_lower.defjvp
def _(primals, tangents):
  x = inverse_unit_lower(*primals)
  return x, -_product(x, jnp.tril(tangents[0], -1), x)


def _product(x, y, z):
  """x y z in full precision: errors made here compound."""
  matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  return matmul(matmul(x, y), z)


def _together(beta, log_decay):
  """Both gates of a token, 'b t h 2', or the one, 'b t h 1'."""
  if log_decay is None:
    return beta[..., None]
  return jnp.stack([beta, log_decay], axis=-1)


def _factors(gates, starts, chunk):
  """What the products of two tokens, and of one with a state, are times.

  Returns:
    pairs 'c c' or 'b h c c': exp(D_ij) where i may read j <= i, else 0;
    since 'b h c 1': of the state that enters, as a token meets it;
    until 'b h c 1': of a token's write at the end;
    whole 'b h 1 1': of the state that enters at the end.
  """
  pairs, fresh, final, whole = runs(starts, chunk)
  if gates.shape[-1] == 1:
    return pairs, fresh, final, whole
  log_decay = gates[..., 1:]
  between = jnp.exp(sums_between(log_decay))  # exp(D) 'b h i j 1'
  since = jnp.exp(jnp.cumsum(log_decay, axis=-2))  # start to i, inclusive
  return (
    pairs * between[..., 0],
    since * fresh,
    between[..., -1, :, :] * final,
    since[..., -1:, :] * whole,
  )


def _chunk(state, tokens):
  """The triangular form over one chunk, every array 'b h c ...'."""
  q, k, v, gates, starts = tokens
  pairs, since, until, whole = _factors(gates, starts, q.shape[2])
  beta = gates[..., :1]
  a = beta * jnp.einsum('bhid,bhjd->bhij', k, k) * pairs
  error = v - jnp.einsum('bhid,bhde->bhie', k * since, state)
  u = inverse_unit_lower(a) @ (beta * error)
  scores = jnp.einsum('bhid,bhjd->bhij', q, k) * pairs
  o = jnp.einsum('bhij,bhje->bhie', scores, u)
  o += jnp.einsum('bhid,bhde->bhie', q * since, state)
  state = state * whole
  state += jnp.einsum('bhjd,bhje->bhde', k * until, u)
  return state, o


def _effect(after, tokens):
  """The effect of one chunk more, before those of which `after` is it.

  From S the chunk makes S' = S + K^T U, U = (I + A)^-1 diag(beta) (V - K S),
  which at the end is kept S' + written. With what is left there of V - K S,

      R = kept K^T (I + A)^-1 diag(beta)

  that is (kept - R K) S + (R V + written); decays are those of `_chunk`.
  """
  kept, written = after
  _, k, v, gates, starts = tokens
  pairs, since, until, whole = _factors(gates, starts, k.shape[2])
  beta = gates[..., :1]
  a = beta * jnp.einsum('bhid,bhjd->bhij', k, k) * pairs
  r = jnp.einsum('bhxd,bhjd->bhxj', kept, k * until)
  r = r @ inverse_unit_lower(a) * beta.mT
  written += jnp.einsum('bhxj,bhje->bhxe', r, v)
  kept = kept * whole - jnp.einsum('bhxj,bhjd->bhxd', r, k * since)
  return (kept, written), None
