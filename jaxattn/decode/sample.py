"""How a token is chosen from logits 'b v': pure functions on arrays.

`top_k` and `top_p` answer logits in which what they cut off is -inf, so that
they chain; `choose` applies them in the usual order, temperature first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxattn.typing import Array, Float, PerRow

Logits = Float[Array, 'b v']


class Rules(NamedTuple):
  """What is done to logits before a token is drawn. A pytree.

  Attributes:
    temperature: what logits are divided by; None takes the best token.
    top_k: draw from the k best only; None draws from all.
    top_p: draw from the nucleus of this mass only; None draws from all.
  """

  temperature: float | Array | None = None
  top_k: int | Array | None = None
  top_p: float | Array | None = None


def top_k(logits: Logits, k: int | Array) -> Logits:
  """Keeps the k best of each row; of equals, those of lower id.

  Fan et al. 2018, "Hierarchical Neural Story Generation",
  https://arxiv.org/abs/1805.04833. k may be traced, so that another k is not
  another program.
  """
  return jnp.where(_ranks(logits) < k, logits, -jnp.inf)


def top_p(logits: Logits, p: float | Array) -> Logits:
  """Keeps the nucleus: the fewest tokens whose probabilities reach p.

  Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration",
  https://arxiv.org/abs/1904.09751. The best token always stays, and p = 1
  keeps every token.
  """
  ranks = _ranks(logits)
  mass = -jnp.sort(-jax.nn.softmax(logits), axis=-1)
  # A token is needed if those before it have not reached p yet. With p = 1
  # rounding could reach it early, so that case is decided apart.
  before = jnp.cumsum(mass, axis=-1) - mass
  needed = jnp.take_along_axis(before, ranks, axis=-1) < p
  return jnp.where(needed | (p >= 1), logits, -jnp.inf)


def choose(
  logits: Logits, rules: Rules = Rules(), keys: Array | None = None
) -> PerRow:
  """One token id for each row.

  Args:
    logits: 'b v'.
    rules: temperature, then top_k, then top_p of what top_k has left.
    keys: 'b', a random key for each row; not read if the best is taken. A row
      draws with its own key alone, so whatever else is in the batch, it draws
      the same.
  """
  if rules.temperature is None:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  # The best token at 0: whatever the temperature, no +inf comes out.
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  logits = logits / rules.temperature
  if rules.top_k is not None:
    logits = top_k(logits, rules.top_k)
  if rules.top_p is not None:
    logits = top_p(logits, rules.top_p)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _ranks(logits: Logits) -> Array:
  """0 for the best of each row, 1 for the next, and so on."""
  best_first = jnp.argsort(logits, axis=-1, descending=True, stable=True)
  return jnp.argsort(best_first, axis=-1)
