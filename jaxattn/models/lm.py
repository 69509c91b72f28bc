"""A causal language model whose layers mix by any mechanism, or several.

    x = embed(ids)
    x = x + mixer(norm(x));  x = x + feed_forward(norm(x))      per layer
    logits = norm(x) table^T

Like layers are one `scan` over stacked weights, so compilation does not grow
with depth; with `remat` the backward pass keeps only what enters a layer.
The model has the calling convention of a mixer: chunks of a stream with a state
carried between them equal the whole stream at once.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn import registry
from jaxattn.mixer import Mixer
from jaxattn.models import pattern
from jaxattn.nn import Dropout, Embed, Matrix, Norm, Policy
from jaxattn.packing import Packing
from jaxattn.parallel import sequence
from jaxattn.typing import Array, Float, PerToken, PyTree, Stream

# What layers may have, stacked where layers are scanned over.
COLLECTIONS = ('params', 'stats', 'losses', 'intermediates')


class Modelled(NamedTuple):
  """logits 'b t v' in float32, and the state if one was asked for.

  Where the model was given a `judge`, what that says stands for the logits.
  """

  logits: Float[Array, 'b t v']
  state: PyTree


class FeedForward(nn.Module):
  """SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202).

  Attributes:
    hidden: units inside.
    policy: dtypes and initialiser.
    block: tokens at a time; see `parallel.blockwise`.
  """

  hidden: int
  policy: Policy
  block: int | None = None

  @nn.compact
  def __call__(self, x: Stream) -> Stream:
    width, matrix = x.shape[-1], functools.partial(Matrix, policy=self.policy)
    weights = (
      matrix(width, self.hidden, name='gate')(),
      matrix(width, self.hidden, name='up')(),
      matrix(self.hidden, width, name='out')(),
    )
    x = x.astype(self.policy.dtype)
    return sequence.run(
      swiglu, x, weights=weights, block=self.block, split=(1, 1, 0)
    )


def swiglu(x, gate, up, out):
  """(silu(x gate) * (x up)) out, in the dtype of x."""
  # Cast here, so that gradients of weights add up as they are kept.
  gate, up, out = (w.astype(x.dtype) for w in (gate, up, out))
  return (jax.nn.silu(x @ gate) * (x @ up)) @ out


class Block(nn.Module):
  """Two residual steps: over time by a mixer, over channels by itself."""

  mixer: str
  fields: Mapping[str, Any]
  hidden: int
  policy: Policy
  block: int | None = None

  @nn.compact
  def __call__(self, x, packing, state, return_state, deterministic):
    norm = lambda name: Norm(self.policy, name=name)
    drop = Dropout(self.policy)
    mixer = registry.make(
      self.mixer,
      width=x.shape[-1],
      policy=self.policy,
      name='mixer',
      **self.fields,
    )
    y, state = mixer(
      norm('mixer_norm')(x),
      packing,
      state=state,
      return_state=return_state,
      deterministic=deterministic,
    )
    x = x + drop(y, packing, deterministic)
    if self.hidden:
      feed_forward = FeedForward(
        self.hidden, self.policy, self.block, name='feed_forward'
      )
      y = feed_forward(norm('feed_forward_norm')(x))
      x = x + drop(y, packing, deterministic)
    return x, state


class Unit(nn.Module):
  """The blocks that a scan repeats."""

  mixers: Sequence[str]
  mechanisms: Mapping[str, Mapping[str, Any]]
  hidden: int
  policy: Policy
  block: int | None
  return_state: bool
  deterministic: bool

  @nn.compact
  def __call__(self, x, states, packing):
    after = []
    for i, name in enumerate(self.mixers):
      block = Block(
        name,
        self.mechanisms.get(name, {}),
        self.hidden,
        self.policy,
        self.block,
        name=f'block_{i}',
      )
      state = None if states is None else states[i]
      x, state = block(x, packing, state, self.return_state, self.deterministic)
      after.append(state)
    return x, tuple(after)


class LM(nn.Module):
  """Embedding, `depth` blocks, tied logits.

  Attributes:
    vocab: number of token ids.
    width: m.
    depth: number of layers.
    mixer: the mechanism of each layer, as `models.pattern` reads it.
    mechanisms: name -> fields of that mechanism ({'sliding_window': {'window':
      64}}); those not named keep their defaults.
    hidden: width inside the feed-forward; None means 8/3 width, rounded up to
      16; 0 leaves the feed-forward out.
    remat: recompute activations in the backward pass, layer by layer.
    block: tokens of a row that a device serves at a time in feed-forward and
      loss, and again in the backward pass (`parallel.blockwise`), so that
      hidden units and logits of no more tokens ever exist; None takes all.
    policy: dtypes, dropout, initialiser and kernel of all layers.

  Raises:
    ValueError, when built: an unknown mechanism or field (did you mean), fields
    that cannot work at this width, a mechanism that is not causal.
  """

  vocab: int
  width: int = 128
  depth: int = 4
  mixer: str | Sequence[str] = 'multi_head'
  mechanisms: Mapping[str, Mapping[str, Any]] = nn.FrozenDict()
  hidden: int | None = None
  remat: bool = False
  block: int | None = None
  policy: Policy = Policy()

  def __post_init__(self):
    if self.block is not None and self.block < 1:
      raise ValueError(f'block={self.block} must be at least 1, or None')
    # Frozen, so that a model is a key of jit's cache.
    if not isinstance(self.mixer, str):
      self.mixer = tuple(self.mixer)
    self.mechanisms = nn.FrozenDict(self.mechanisms)
    known = set(self.layers())
    for name in self.mechanisms:
      if name not in known:
        raise ValueError(
          f'mechanisms has fields for {name!r}, which no layer uses.'
          f'{registry.did_you_mean(name, known)}'
        )
    for name in known:
      if not self._mixer(name).causal:
        raise ValueError(
          f'{name} with {dict(self.mechanisms.get(name, {}))} is not causal: a '
          'language model would see the token it is to predict. Mechanisms '
          f'that are causal: {", ".join(_causal_names())}.'
        )
    super().__post_init__()

  @nn.nowrap
  def layers(self) -> tuple[str, ...]:
    """The mechanism of each layer."""
    return pattern.layers(self.mixer, self.depth)

  @nn.nowrap
  def _mixer(self, name: str) -> Mixer:
    return registry.make(
      name,
      width=self.width,
      policy=self.policy,
      parent=None,
      **self.mechanisms.get(name, {}),
    )

  @nn.nowrap
  def hidden_width(self) -> int:
    """Width inside the feed-forward."""
    if self.hidden is None:
      return -(-self.width * 8 // 3 // 16) * 16
    return self.hidden

  @nn.nowrap
  def init_state(self, batch: int, max_length: int, dtype: Any = None) -> tuple:
    """The state of `batch` streams before their first token.

    See `Mixer.init_state`. One entry for each group of like layers, whose
    arrays lead with the layer and then the batch.
    """
    states = []
    for unit, repeats in pattern.groups(self.layers()):
      state = tuple(
        self._mixer(name).init_state(batch, max_length, dtype) for name in unit
      )
      stack = lambda a, n=repeats: jnp.broadcast_to(a, (n, *a.shape))
      states.append(jax.tree.map(stack, state))
    return tuple(states)

  @nn.nowrap
  def flops(self, length: int) -> int:
    """Floating point operations of a forward pass over one sequence."""
    mixers = sum(
      registry.spec(name).flops(self._mixer(name), self.width, length)
      for name in self.layers()
    )
    feed_forward = 3 * self.width * self.hidden_width() * self.depth
    return mixers + 2 * length * (feed_forward + self.width * self.vocab)

  @nn.nowrap
  def state_bytes(self, length: int) -> int:
    """Bytes of decoding state of one sequence after `length` tokens."""
    return sum(
      registry.spec(name).state_bytes(self._mixer(name), self.width, length)
      for name in self.layers()
    )

  @nn.compact
  def __call__(
    self,
    ids: PerToken,
    packing: Packing | None = None,
    *,
    state: PyTree = None,
    return_state: bool = False,
    deterministic: bool = True,
    judge: tuple[Callable[..., PyTree], PyTree] | None = None,
  ) -> Modelled:
    """Logits for the token after each of `ids` 'b t'.

    Args and semantics are those of `Mixer.__call__`. A `judge` is (read, batch)
    with arrays 'b t ...' in `batch`: instead of logits there is then what
    `read(logits, batch)` says of each token, `block` tokens at a time.
    """
    embed = Embed(self.vocab, self.width, self.policy, name='embed')
    x = embed(ids)
    after = []
    for g, (unit, repeats) in enumerate(pattern.groups(self.layers())):
      module = nn.remat(Unit, prevent_cse=False) if self.remat else Unit
      scanned = nn.scan(
        module,
        variable_axes={name: 0 for name in COLLECTIONS},
        split_rngs={'params': True, 'dropout': True},
        in_axes=(0, nn.broadcast),
        length=repeats,
      )
      x, states = scanned(
        unit,
        self.mechanisms,
        self.hidden_width(),
        self.policy,
        self.block,
        return_state,
        deterministic,
        name=f'layers_{g}',
      )(x, None if state is None else state[g], packing)
      after.append(states)
    x = Norm(self.policy, name='norm')(x)
    logits = embed.attend(x, *(judge or ()), block=self.block)
    return Modelled(logits, tuple(after) if return_state else None)


def _causal_names() -> list[str]:
  """Mechanisms that a language model can take as they come."""
  return [name for name in registry.names() if registry.make(name).causal]
