"""The TPU kernels of attention, compiled for chips that are not here.

  pip install '.[test,aot]' && pytest -m aot -n0 tests/test_flash_aot.py

Forward and backward go through the compilers of five generations: what passes
fits in VMEM and HBM there. With JAXATTN_AOT=1 a missing compiler is a failure.
"""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import chips
from pallas_kernels.blocks import Blocks
from pallas_kernels.dropout import Dropout
from pallas_kernels.flash import tpu
from pallas_kernels.masks import Causal, Everything, Sinks, Window
from pallas_kernels.problem import problem
from pallas_kernels.scores import (
  Buckets,
  Difference,
  RelativeFactor,
  Score,
  Slopes,
)

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures('compiler')]
SMALL = Blocks(256, 256)  # compiles in a second, and has the same code
GIB = 2**30


def compiled(
  chip,
  t=1024,
  s=None,
  b=1,
  h=2,
  k=1,
  d=128,
  e=None,
  dtype=jnp.bfloat16,
  mask=None,
  segments=False,
  score=None,
  factor=None,
  bias=False,
  blocks=SMALL,
  **given,
):
  """The program of o, m, l and all gradients."""
  s, e, mask = s or t, e or d, mask or Causal()
  shape = lambda *x, dtype=dtype: jax.ShapeDtypeStruct(x, dtype)
  arrays = shape(b, t, h, d), shape(b, s, k, d), shape(b, s, k, e)
  bias = shape(1, h, t, s) if bias else None
  ints = shape(b, t, dtype=jnp.int32), shape(b, s, dtype=jnp.int32)
  sides = ints if segments else (None, None)

  def loss(q, k, v, score, factor, bias, sides):
    query, key = ((None, segments, None) for segments in sides)
    rule, extras, query, key = problem(
      *(q, k, v),
      mask=mask,
      query=query,
      key=key,
      score=score,
      factor=factor,
      bias=bias,
      blocks=blocks,
      **given,
    )
    assert tpu.refuses(rule, q, k, v, extras, query) is None
    o, m, total = tpu.attend(rule, q, k, v, extras, query, key)
    return jnp.sum(o.astype(jnp.float32)) + jnp.sum(total), m

  gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4, 5), has_aux=True))
  shapes = chips.on(chip, (*arrays, score, factor, bias, sides))
  with jax.set_mesh(chips.mesh(chip)):
    return gradient.lower(*shapes).compile()


def heads(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize('chip', chips.TOPOLOGIES)
def test_chosen_blocks(chip):
  program = compiled(chip, 8192, k=2, blocks=None)
  text = program.as_text()
  assert 'flash_forward' in text
  assert 'flash_backward' in text


@pytest.mark.parametrize(
  ('chip', 'd', 'dtype'),
  [
    ('v4', 256, jnp.float32),
    ('v5e', 64, jnp.bfloat16),
    ('v6e', 256, jnp.bfloat16),
  ],
)
def test_head_sizes(chip, d, dtype):
  compiled(chip, 4096, d=d, dtype=dtype, blocks=None)


@pytest.mark.parametrize('chip', ['v5e', 'v5p'])
def test_a_million_tokens(chip):
  """Memory is a few copies of the inputs: nothing of t x s."""
  t = 2**20
  memory = compiled(chip, t, h=1, blocks=None).memory_analysis()
  assert memory.temp_size_in_bytes < 8 * (t * 128 * 2)


FEATURES = {
  'window and sinks': {'mask': Causal() & (Window(300) | Sinks(4))},
  'everything': {'mask': Everything()},
  'segments': {'segments': True, 'b': 2},
  'lengths': {'t': 1000, 's': 700},
  'odd heads': {'d': 40, 'e': 72},
  'float32': {'dtype': jnp.float32},
  'soft cap': {'softcap': 30.0},
  'slopes': {'score': Score(Slopes(), (heads(2),))},
  'buckets': {'score': Score(Buckets(128, causal=True), (heads(2, 32),))},
  'factors': {'factor': Score(RelativeFactor(), (heads(2, 33),))},
  'forget': {
    'score': Score(
      Difference(), queries=(heads(1, 1024, 2),), keys=(heads(1, 1024, 1),)
    )
  },
  'bias': {'bias': True},
  'dropout': {'dropout': Dropout(0.1, seed=3)},
}


@pytest.mark.parametrize('feature', FEATURES)
def test_features(feature):
  """Each on one of the chips, in turn."""
  place = list(FEATURES).index(feature) % len(chips.TOPOLOGIES)
  compiled(list(chips.TOPOLOGIES)[place], **FEATURES[feature])


def test_what_does_not_fit_is_refused():
  with pytest.raises(jax.errors.JaxRuntimeError, match='memory on HBM'):
    compiled('v5e', 2**19, h=64, k=64, blocks=Blocks(512, 512))
