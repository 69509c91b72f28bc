"""The TPU kernels of attention, compiled for chips that are not here.

  pip install '.[test,aot]' && pytest -m aot -n0 tests/test_flash_aot.py

Forward and backward go through the compilers of five generations, in 30 cells:
what passes fits in VMEM and HBM there. With JAXATTN_AOT=1 a missing compiler is
a failure.
"""

import jax.numpy as jnp
import pytest

from experiments import bench_kernels
from experiments.bench_compiled import FEATURES, compiled, verdict
from pallas_kernels import chips
from pallas_kernels.blocks import Blocks
from pallas_kernels.masks import Everything

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures('compiler')]


@pytest.mark.parametrize('chip', chips.TOPOLOGIES)
def test_chosen_blocks(chip):
  program = compiled(chip, 8192, k=2, blocks=None)
  text = program.as_text()
  assert 'flash_forward' in text
  assert 'flash_backward' in text


@pytest.mark.parametrize(
  ('direction', 'chip', 'width', 'tile'),
  [
    ('forward', 'v6e', 128, (2048, 512)),
    ('backward', 'v5p', 128, (1024, 512)),
    ('backward', 'v5e', 256, (1024, 512)),
  ],
)
def test_chosen_blocks_spill_nothing(direction, chip, width, tile):
  """The page of schedules has the others."""
  assert bench_kernels.chosen(direction, chip, width) == tile
  found = bench_kernels.schedule(('ours', direction, chip, *tile, width))
  assert found.masked
  assert found.spills == found.masked_spills == 0


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


def test_a_million_tokens():
  """Memory is a few copies of the inputs: nothing of t x s."""
  t = 2**20
  memory = compiled('v5e', t, h=1, blocks=None).memory_analysis()
  assert memory.temp_size_in_bytes < 8 * (t * 128 * 2)


def test_the_gradient_of_a_shared_bias_is_as_large_as_the_bias():
  """Of 2 rows and 16 heads, each of which would have one of its own."""
  t, own = 2048, 2048 * 2048 * 4
  program = compiled('v5p', t, b=2, h=16, bias=(1, 1))
  assert program.memory_analysis().temp_size_in_bytes < 16 * own


@pytest.mark.parametrize('feature', FEATURES)
def test_features(feature):
  """Each on one of the chips, in turn."""
  place = list(FEATURES).index(feature) % len(chips.TOPOLOGIES)
  compiled(list(chips.TOPOLOGIES)[place], **FEATURES[feature])


def test_the_page_says_where_it_does_not_fit():
  more = {'h': 64, 'k': 64, 'blocks': Blocks(512, 512)}
  assert verdict('v5e', t=2**19, **more) == '**not in HBM**'
  # One tile of all queries, of which v4's 16 MiB hold no buffers.
  tall = {'t': 5120, 's': 128, 'd': 256, 'blocks': Blocks(5120, 128)}
  assert verdict('v4', mask=Everything(), **tall) == '**not in VMEM**'
