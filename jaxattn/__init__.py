"""jaxattn: the attention family in JAX and Flax, under one contract.

>>> mixer = jaxattn.make('gated_linear', heads=4)
>>> variables = mixer.init(jax.random.key(0), x)  # x: (batch, time, width)
>>> y, _ = mixer.apply(variables, x)
"""

# Binds the function `spec` over the submodule of that name, which it imports.
from jaxattn.registry import make, names, spec

__all__ = ['load', 'make', 'names', 'spec']


def load(workdir):
  """A trained run: Loaded(model, params, config), ready for a notebook.

  See `jaxattn.train.checkpoint.load`, which is imported on the first call: who
  only wants a mechanism need not wait for the checkpointing library.
  """
  from jaxattn.train import checkpoint

  return checkpoint.load(workdir)
