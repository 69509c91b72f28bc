"""Mixture-of-head attention (MoH): each token switches on some of its heads.

Jin et al. 2024, "MoH: Multi-Head Attention as Mixture-of-Head Attention",
https://arxiv.org/abs/2410.11842.

    y_t = sum_i g_i(x_t) head_i(t) W_o^i
    g_i = s a_1 softmax(x W_s)_i               the s shared heads, always on
    g_i = r a_2 softmax(x W_r)_i  if i is among the top_k, else 0
                                               the r = h - s routed heads
    (a_1, a_2) = 2 softmax(x W_a)

The factors 2, s and r make every gate 1 where the routers are undecided: there
it is multi-head attention, switched heads apart, and a trained multi-head layer
can be carried on as one (`from_multi_head`).

The auxiliary loss r sum_i f_i p_i (f_i: share of tokens that choose head i,
p_i: mean probability) is sown into the collection `losses` as a pair (sum,
count), times `balance`; it is least when all heads are chosen equally often.

Cost for one row: time O(t^2 d) per head (all are computed here), state 2 t h d
numbers, parameters 4 m h d + m (h + 2).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn.core import cached, softmax
from jaxattn.mixer import Mixer
from jaxattn.nn import Linear
from jaxattn.parallel import sequence
from jaxattn.registry import position
from jaxattn.spec import Spec
from jaxattn.state import FullKV
from pallas_kernels import masks


def _gates(params, x, shared, top_k):
  """All gates 'b t h', and how clear each token's choice is, 'b t'."""
  softmax = lambda name: jax.nn.softmax(x @ params[name]['kernel'])
  p, a = softmax('router'), 2 * softmax('router_kinds')
  routed = p.shape[-1]
  ranked = jnp.sort(p, axis=-1)[..., ::-1]
  on = p >= ranked[..., top_k - 1 : top_k]
  gates = routed * a[..., 1:] * p * on
  if shared:
    always = a[..., :1]
    if shared > 1:
      always = shared * always * softmax('router_shared')
    gates = jnp.concatenate([always, gates], axis=-1)
  if top_k == routed:
    return gates, jnp.full(x.shape[:2], jnp.inf)
  return gates, ranked[..., top_k - 1] - ranked[..., top_k]


def reference(
  params, x, *, shared, top_k, causal=True, add=0, rotate=None, bias=0, **_
):
  """The formula on x 'b t m', all heads, all scores at once.

  A position encoding may add to x, rotate q and k, and bias the scores.
  """
  x = x + add
  q, k, v = (
    jnp.einsum('btm,mhd->bthd', x, params[name]['kernel'])
    for name in ('query', 'key', 'value')
  )
  if rotate is not None:
    q, k = rotate(q), rotate(k)
  scores = jnp.einsum('bthd,bshd->bhts', q, k) * q.shape[-1] ** -0.5 + bias
  if causal:
    scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
  o = jnp.einsum('bhts,bshe->bthe', jax.nn.softmax(scores), v)
  gates, _ = _gates(params, x, shared, top_k)
  return jnp.einsum('bth,bthe,hem->btm', gates, o, params['out']['kernel'])


def margin(params, x, *, shared, top_k, add=0, **_):
  """How clear each token's closest choice of a head is, 'b t'."""
  return _gates(params, x + add, shared, top_k)[1]


def attend(q, k, v, tokens, memory, score, **rule):
  """The same in blocks. Gates are of a token, and stay outside."""
  return cached.attend(
    *(q, k, v, tokens, memory, score), engine=sequence.attention, **rule
  )


def from_multi_head(params, shared: int):
  """Parameters of `multi_head` as those of `mixture_of_heads`.

  Routers start undecided (zeros), so with all heads routed on it is the same
  function.

  Raises:
    ValueError: there are not more than `shared` heads.
  """
  m, heads, _ = params['query']['kernel'].shape
  if not 0 <= shared < heads:
    raise ValueError(f'shared={shared} must be less than the {heads} heads')
  zeros = lambda n: {
    'kernel': jnp.zeros((m, n), params['query']['kernel'].dtype)
  }
  routers = {'router': zeros(heads - shared), 'router_kinds': zeros(2)}
  if shared > 1:
    routers['router_shared'] = zeros(shared)
  return {**params, **routers}


class MixtureOfHeads(Mixer):
  """Softmax attention with heads that each token switches on or off.

  Attributes:
    heads: h, all of them; it must divide the width unless `head_dim` is given.
    shared: s, the first heads, which are always on.
    top_k: how many of the other heads a token switches on.
    balance: weight of the auxiliary loss.
    head_dim: d; None means width / heads.
    causal: False lets every token see every other (encoders).
    position: the position encoding, 'rope' or {'name': 'rope', 'base': 5e5}.
  """

  heads: int = 8
  shared: int = 2
  top_k: int = 4
  balance: float = 0.01
  head_dim: int | None = None
  causal: bool = True
  position: str | Mapping[str, Any] = 'rope'

  implementations = softmax.IMPLEMENTATIONS
  strategies = sequence.FAR

  def check(self, width):
    if self.head_dim is None and width % self.heads:
      raise ValueError(
        f'mixture_of_heads: width={width} does not divide by heads='
        f'{self.heads}; choose another number of heads or give head_dim'
      )
    if self.shared < 0 or not 1 <= self.top_k <= self.heads - self.shared:
      raise ValueError(
        f'mixture_of_heads: top_k={self.top_k} must be at least 1 and at most '
        f'heads - shared = {self.heads} - {self.shared}'
      )
    head_dim = self.head_dim or width // self.heads
    position(self.position, parent=None).check(head_dim)

  def memory(self, batch, length, width, dtype):
    d = self.head_dim or width // self.heads
    keeps = position(self.position, parent=None).scores
    return FullKV.empty(batch, length, self.heads, d, d, dtype, keeps)

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    width = x.shape[-1]
    split = (self.heads, self.head_dim or width // self.heads)
    linear = lambda to, name, **kw: Linear(
      to, policy=self.policy, name=name, **kw
    )
    encoding = position(self.position, policy=self.policy, name='position')
    places = tokens.positions
    x = encoding.add(x, places)
    mask = masks.Causal() if self.causal else masks.Everything()
    o, memory = sequence.stream(
      lambda *arrays: attend(*arrays, mask=mask, **self.policy.attention),
      encoding.rotate(linear(split, 'query')(x), places),
      encoding.rotate(linear(split, 'key')(x), places),
      linear(split, 'value')(x),
      tokens,
      memory,
      weights=(encoding.score(self.heads, self.causal),),
    )
    gates = self._gates(x, tokens, linear).astype(o.dtype)
    return linear(width, 'out', axes=2)(o * gates[..., None]), memory

  def _gates(self, x, tokens, linear):
    """Gates 'b t h' in float32 or wider; sows the auxiliary loss."""
    exact = lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32))
    softmax = lambda n, name: jax.nn.softmax(exact(linear(n, name)(x)))
    routed = self.heads - self.shared
    p, a = softmax(routed, 'router'), 2 * softmax(2, 'router_kinds')
    chosen = lambda p: _chosen(p, self.top_k)
    on = sequence.run(chosen, p)
    gates = routed * a[..., 1:] * p * on
    self._sow_balance(p, on, tokens.valid)
    if not self.shared:
      return gates
    always = a[..., :1]
    if self.shared > 1:  # one alone has nothing to share with
      own = softmax(self.shared, 'router_shared')
      always = self.shared * always * own
    return jnp.concatenate([always, gates], axis=-1)

  def _sow_balance(self, p, on, valid):
    if self.is_initializing():
      return
    real = jnp.ones(p.shape[:2], p.dtype) if valid is None else valid
    count = jnp.sum(real, dtype=p.dtype)
    share = jnp.sum(on * real[..., None], axis=(0, 1)) / jnp.maximum(count, 1)
    loss = jnp.sum(p * share * real[..., None]) * p.shape[-1]
    self.sow('losses', 'head_balance', (self.balance * loss, count))


def _chosen(p, top_k):
  """1 for the top_k largest of 'b t r', else 0."""
  _, best = jax.lax.top_k(p, top_k)
  hits = best[..., None] == jnp.arange(p.shape[-1])
  return jnp.any(hits, axis=-2).astype(p.dtype)


def _flops(mixer, width, length):
  inner = mixer.heads * (mixer.head_dim or width // mixer.heads)
  pairs = length * (length + 1) // 2 if mixer.causal else length**2
  projections = width * (4 * inner + mixer.heads + 2)
  return 2 * length * projections + 2 * pairs * 2 * inner


def _state_bytes(mixer, width, length):
  inner = mixer.heads * (mixer.head_dim or width // mixer.heads)
  number = jnp.dtype(mixer.policy.dtype).itemsize
  # order, segment and perhaps position
  places = 2 + position(mixer.position, parent=None).scores
  return length * (2 * inner * number + 4 * places) + 4  # used


SPEC = Spec(
  paper='MoH: Multi-Head Attention as Mixture-of-Head Attention',
  authors='Jin, Zhu, Yuan, Yan',
  year=2024,
  link='https://arxiv.org/abs/2410.11842',
  examples=(
    {'heads': 5, 'shared': 2, 'top_k': 2, 'head_dim': 4},
    {'heads': 3, 'shared': 1, 'top_k': 1, 'position': 'none'},
  ),
  flops=_flops,
  state_bytes=_state_bytes,
)
