"""jaxattn: the attention family in JAX and Flax, under one contract.

>>> mixer = jaxattn.make('gated_linear', heads=4)
>>> params = mixer.init(jax.random.key(0), x)  # x: (batch, time, width)
>>> y, _ = mixer.apply(params, x)
"""

# Binds the function `spec` over the submodule of that name, which it imports.
from jaxattn.registry import make, names, spec

__all__ = ['make', 'names', 'spec']
