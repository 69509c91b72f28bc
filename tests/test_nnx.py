"""Users of flax.nnx are served too: every mechanism wrapped by its bridge."""

import jax
import numpy as np
from flax import nnx

from jaxattn import registry


def test_every_mechanism_in_nnx(mechanism):
  name, example = mechanism
  fields = registry.spec(name).examples[example]
  mixer = registry.make(name, width=12, **fields)
  x = jax.random.normal(jax.random.key(0), (2, 9, 12))
  model = nnx.bridge.ToNNX(mixer, rngs=nnx.Rngs(0)).lazy_init(x)
  y, state = nnx.jit(lambda model, x: model(x))(model, x)
  variables = jax.jit(mixer.init)(nnx.Rngs(0).params(), x)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  kind = nnx.variablelib.variable_type_from_name('stats', allow_register=True)
  stats = nnx.to_pure_dict(nnx.state(model, kind))
  assert ('stats' in variables) == bool(stats)
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  assert count(params) == count(variables['params'])
  want = jax.jit(mixer.apply)({'params': params, 'stats': stats}, x).y
  np.testing.assert_allclose(y, want, atol=1e-5)
  assert state is None
