"""Feature maps: kernels phi(q) . phi(k) that linear attention can sum over.

A fixed map turns each query and each key into a vector of positive numbers, as
elu + 1 (Katharopoulos et al. 2020, https://arxiv.org/abs/2006.16236).

Random ones estimate the softmax kernel without bias (FAVOR+, Choromanski et
al. 2020, https://arxiv.org/abs/2009.14794): for w drawn from N(0, I_d),

    exp(q . k) = E[exp(w . q - |q|^2 / 2) exp(w . k - |k|^2 / 2)]

so r draws and a division by sqrt(r) make r positive features whose dot product
is exp(q . k) on average. Draws that are orthogonal to each other, each still
N(0, I_d) by itself, lower the variance.

Their exponents know no bound, so features are handled by their logarithms and
a shift is taken off before exp. What is shifted cancels in attention's ratio:
the shift of a query in its own numerator and denominator, the shift of the keys
if all keys that a query sees share it. The largest exponent of the sequence
would be shared but looks ahead; `keys_in_range` takes the largest so far,
p_t = max_{s <= t} l_s, and restates the sums over keys whenever it grows:

    N_t = sum_{s <= t} exp(l_s - p_t) v_s
        = exp(p_{t-1} - p_t) N_{t-1} + exp(l_t - p_t) v_t

which is a linear recurrence whose decay is p_{t-1} - p_t <= 0, one number a
head: what a streaming softmax does to its sums, on features.
"""

import jax
import jax.numpy as jnp

LOWEST = -1e30  # the largest exponent of no keys; finite, so that it subtracts


def elu(x):
  """elu(x) + 1: x + 1 above 0 and exp(x) below, in float32 or wider."""
  x = _exact(x)
  return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


def identity(x):
  """x itself, in float32 or wider: the dot product as a kernel."""
  return _exact(x)


# Fixed maps by name, and whether they are positive: a ratio wants that.
FIXED = {'elu': (elu, True), 'identity': (identity, False)}


def orthogonal(key, count: int, width: int):
  """`count` random directions 'r d', each N(0, I_d), orthogonal in blocks.

  A block holds d directions or, the last one, fewer. Directions are the rows of
  a uniformly random rotation; lengths are those of independent Gaussians.
  """
  blocks = -(-count // width)
  turn, length = jax.random.split(key)
  q, r = jnp.linalg.qr(jax.random.normal(turn, (blocks, width, width)))
  # QR leaves the signs to its algorithm; these make the rotation uniform.
  q = q * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
  rows = q.reshape(blocks * width, width)[:count]
  lengths = jax.random.normal(length, (count, width))
  return rows * jnp.linalg.norm(lengths, axis=-1, keepdims=True)


def log_softmax(x, directions):
  """Logs of features whose dot product estimates exp(q . k / sqrt(d)).

  Args:
    x: queries or keys 'b t h d', not scaled.
    directions: from `orthogonal`, 'r d'.

  Returns:
    'b t h r' in float32 or wider, log(r) / 2 taken off.
  """
  count, d = directions.shape
  x = _exact(x) * d**-0.25
  along = jnp.einsum(
    'bthd,rd->bthr',
    x,
    directions.astype(x.dtype),
    precision=jax.lax.Precision.HIGHEST,
  )
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return along - square / 2 - jnp.log(count) / 2


def query_in_range(log_q):
  """exp(log_q - its own largest), 'b t h r': the largest feature is 1."""
  peak = jnp.max(log_q, axis=-1, keepdims=True)
  return jnp.exp(log_q - jax.lax.stop_gradient(peak))


def keys_in_range(log_k, *, peak=None, valid=None, starts=None):
  """exp(log_k - the largest so far), and the decay that this costs the past.

  Args:
    log_k: 'b t h r'.
    peak: the largest exponent of earlier calls 'b h'; None for no keys yet.
    valid: bool 'b t', False at pads, whose exponents are not read.
    starts: bool 'b t', True where a segment begins and the past is forgotten.

  Returns:
    features 'b t h r' at most 1, log_decay 'b t h 1' at most 0, and the largest
    exponent after the last token, 'b h'. No gradient flows through the peaks,
    on which attention does not depend.
  """
  if valid is not None:
    valid = valid[..., None, None]
    log_k = jnp.where(valid, log_k, 0)
  own = jax.lax.stop_gradient(jnp.max(log_k, axis=-1))  # 'b t h'
  zeros = jnp.zeros_like(own[:, :1]).sum(1)
  peak = zeros + (LOWEST if peak is None else peak.astype(own.dtype))
  start = jnp.zeros_like(own, bool)
  if starts is not None:
    start |= starts[..., None]
  if valid is not None:
    own = jnp.where(valid[..., 0], own, LOWEST)
    start &= valid[..., 0]

  def then(first, second):
    (begun, top), (begins, own) = first, second
    return begun | begins, jnp.where(begins, own, jnp.maximum(top, own))

  begun, top = jax.lax.associative_scan(then, (start, own), axis=1)
  top = jnp.where(begun, top, jnp.maximum(top, peak[:, None]))
  before = jnp.concatenate([peak[:, None], top[:, :-1]], axis=1)
  # A segment's first token forgets the past, whose peak may have been higher.
  log_decay = jnp.minimum(before - top, 0)
  shift = top[..., None]
  if valid is not None:  # a pad before any key has no peak to stay below
    shift = jnp.where(valid, shift, 0)
  return jnp.exp(log_k - shift), log_decay[..., None], top[:, -1]


def _exact(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
