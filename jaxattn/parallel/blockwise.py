"""What each token has of itself, so many tokens at a time.

Liu, Abbeel 2023, "Blockwise Parallel Transformer for Large Context Models",
https://arxiv.org/abs/2305.19370.

Between two layers a token is m numbers; inside of a feed-forward it is many
times that, and at the loss as many as there are words. Done for `size` tokens
at a time, and again for the backward pass, only those of `size` tokens ever
exist, however long the sequence is.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.problem import alike


def over(engine, size: int):
  """`engine(arrays, weights)`, by blocks of `size` tokens.

  Args:
    engine: a function of each token on its own; arrays and results are pytrees
      whose leaves are all 'b t ...'.
    size: tokens of each row that are served at once; the last block is filled
      up with the last token, and what is made of that is dropped.
  """

  def run(arrays, weights):
    t = jax.tree.leaves(arrays)[0].shape[1]
    if t <= size:
      return engine(arrays, weights)
    # Else devices would sum the gradients of their weights block by block.
    weights = alike(weights, arrays)
    blocks = jax.tree.map(lambda x: _cut(x, size), arrays)
    serve = jax.checkpoint(lambda block: engine(block, weights))
    return jax.tree.map(lambda x: _join(x, t), lax.map(serve, blocks))

  return run


def _cut(x, size):
  """'b t ...' as 'n b size ...'."""
  fill = [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2)
  x = jnp.pad(x, fill, mode='edge')
  x = x.reshape(len(x), -1, size, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0)


def _join(x, t):
  """The inverse of `_cut`."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(len(x), -1, *x.shape[3:])[:, :t]
