"""A model of numbers: features in, numbers out, any mechanism between.

    x = u W_in
    x = x + mixer(norm(x));  x = x + feed_forward(norm(x))      per layer
    outputs = norm(x) W_out

With `hidden=0` and `norm=False` nothing but the mixer is left between two
matrices: a linear mixer then makes the linear transformers that theory writes
down (von Oswald et al. 2022, https://arxiv.org/abs/2212.07677).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxattn import registry
from jaxattn.mixer import Mixer
from jaxattn.models import pattern
from jaxattn.models.lm import Block, FeedForward
from jaxattn.nn import Linear, Norm, Policy
from jaxattn.packing import Packing
from jaxattn.typing import Array, Float, PyTree


class Regressed(NamedTuple):
  """outputs 'b t o' in float32 or wider, and the state if one was asked for."""

  outputs: Float[Array, 'b t o']
  state: PyTree


class BareBlock(nn.Module):
  """A `Block` without norms and dropout: linear in x wherever its mixer is."""

  mixer: str
  fields: Mapping[str, Any]
  hidden: int
  policy: Policy

  @nn.compact
  def __call__(self, x, packing, state, return_state, deterministic):
    mixer = registry.make(
      self.mixer,
      width=x.shape[-1],
      policy=self.policy,
      name='mixer',
      **self.fields,
    )
    y, state = mixer(
      x,
      packing,
      state=state,
      return_state=return_state,
      deterministic=deterministic,
    )
    x = x + y
    if self.hidden:
      x = x + FeedForward(self.hidden, self.policy, name='feed_forward')(x)
    return x, state


class Regressor(nn.Module):
  """Linear read-in, `depth` blocks, linear read-out.

  Attributes:
    features: numbers that come in at every position.
    outputs: numbers that go out at every position.
    width: m.
    depth: number of layers.
    mixer: the mechanism of each layer, as `models.pattern` reads it.
    mechanisms: name -> fields of that mechanism; those not named keep their
      defaults.
    hidden: width inside the feed-forward; None means 8/3 width, rounded up to
      16; 0 leaves the feed-forward out.
    norm: False leaves out every norm but those of the mechanisms themselves,
      and dropout.
    read_in: False feeds the features to the first layer as they are; they must
      be as many as the width.
    remat: recompute activations in the backward pass, layer by layer.
    policy: dtypes, dropout, initialiser and kernel of all layers.

  Raises:
    ValueError, when built: an unknown mechanism or field (did you mean), fields
    that cannot work at this width, features that do not fit it.
  """

  features: int
  outputs: int = 1
  width: int = 128
  depth: int = 4
  mixer: str | Sequence[str] = 'multi_head'
  mechanisms: Mapping[str, Mapping[str, Any]] = nn.FrozenDict()
  hidden: int | None = None
  norm: bool = True
  read_in: bool = True
  remat: bool = False
  policy: Policy = Policy()

  def __post_init__(self):
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
      self._mixer(name)  # says what cannot work
    if not self.read_in and self.features != self.width:
      raise ValueError(
        f'features={self.features} and width={self.width} differ: without '
        'read_in they must be equal'
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
    """The state of `batch` streams before their first token, layer by layer.

    See `Mixer.init_state`.
    """
    return tuple(
      self._mixer(name).init_state(batch, max_length, dtype)
      for name in self.layers()
    )

  @nn.nowrap
  def flops(self, length: int) -> int:
    """Floating point operations of a forward pass over one sequence."""
    mixers = sum(
      registry.spec(name).flops(self._mixer(name), self.width, length)
      for name in self.layers()
    )
    ends = self.width * (self.features * self.read_in + self.outputs)
    feed_forward = 3 * self.width * self.hidden_width() * self.depth
    return mixers + 2 * length * (feed_forward + ends)

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
    inputs: Float[Array, 'b t f'],
    packing: Packing | None = None,
    *,
    state: PyTree = None,
    return_state: bool = False,
    deterministic: bool = True,
    judge: tuple[Callable[..., PyTree], PyTree] | None = None,
  ) -> Regressed:
    """Outputs at each position of `inputs` 'b t f'.

    Args and semantics are those of `Mixer.__call__`. A `judge` is (read, batch)
    with arrays 'b t ...' in `batch`: what `read(outputs, batch)` says then
    stands for the outputs.
    """
    x = inputs.astype(self.policy.dtype)
    if self.read_in:
      x = Linear(self.width, policy=self.policy, name='read_in')(x)
    kind = Block if self.norm else BareBlock
    if self.remat:  # return_state and deterministic are static; 0 is self
      kind = nn.remat(kind, static_argnums=(4, 5))
    after = []
    for i, name in enumerate(self.layers()):
      block = kind(
        name,
        self.mechanisms.get(name, {}),
        self.hidden_width(),
        self.policy,
        name=f'block_{i}',
      )
      before = None if state is None else state[i]
      x, new = block(x, packing, before, return_state, deterministic)
      after.append(new)
    if self.norm:
      x = Norm(self.policy, name='norm')(x)
    outputs = Linear(self.outputs, policy=self.policy, name='read_out')(x)
    outputs = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
    if judge is not None:
      read, batch = judge
      outputs = read(outputs, batch)
    return Regressed(outputs, tuple(after) if return_state else None)
