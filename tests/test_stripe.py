"""Layouts are permutations, and give every device the same work."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench_balance
from jaxattn.parallel import stripe
from pallas_kernels import masks, runs
from pallas_kernels.masks import Causal, Window


def test_layouts():
  lay = lambda layout: stripe.order(8, 2, layout).tolist()
  assert lay('contiguous') == [0, 1, 2, 3, 4, 5, 6, 7]
  assert lay('striped') == [0, 2, 4, 6, 1, 3, 5, 7]
  assert lay('zigzag') == [0, 1, 6, 7, 2, 3, 4, 5]


@pytest.mark.parametrize('layout', stripe.LAYOUTS)
@pytest.mark.parametrize('devices', [1, 3, 4])
def test_restore_is_the_inverse(layout, devices):
  tree = {'x': np.arange(48).reshape(2, 24), 'y': np.ones((2, 24, 3))}
  tree['y'][0, 7] = 5
  laid = stripe.lay(tree, devices, layout)
  assert (laid['x'][0] == stripe.order(24, devices, layout)).all()
  again = stripe.restore(laid, devices, layout)
  assert jax.tree.all(jax.tree.map(np.array_equal, again, tree))


def test_what_cannot_be_laid():
  with pytest.raises(ValueError, match='one of contiguous, striped'):
    stripe.order(8, 2, 'spiral')
  with pytest.raises(ValueError, match=r'18 tokens .* zigzag over 4 .* of 8'):
    stripe.order(18, 4, 'zigzag')
  for layout, length in (('contiguous', 20), ('striped', 20), ('zigzag', 24)):
    assert stripe.filled(18, 4, layout) == length
    assert stripe.filled(length, 4, layout) == length
    assert (stripe.order(7, 1, layout) == np.arange(7)).all()


def slowest(found):
  """How much the devices wait: all hops of the slowest, over the mean."""
  return found.max(0).sum() / found.mean(0).sum()


KERNELS = bench_balance.KERNELS | {'small tiles': lambda t: (512, 512)}


def faster(length, devices, layout, kernel, each=None):
  """Than contiguous; in the tiles for what a device has, or for so many."""
  tile = lambda t: KERNELS[kernel](each or t)
  return bench_balance.compared(length, devices, tile)[layout]


# Of the tiles that kernels choose for what a device has.
own = pytest.mark.parametrize('kernel', KERNELS)


@own
@pytest.mark.parametrize('layout', ['striped', 'zigzag'])
@pytest.mark.parametrize('devices', [16, 256])
def test_a_million_tokens_are_even(layout, devices, kernel):
  tile = KERNELS[kernel](2**20 // devices)
  found = stripe.work(Causal(), 2**20, devices, layout, tile)
  assert (found.max(0) / found.mean(0) <= 1.02).all()
  if layout == 'striped':  # hops are alike, too
    assert found.max() / found.mean() <= 1.02
  contiguous = stripe.work(Causal(), 2**20, devices, 'contiguous', tile)
  assert slowest(contiguous) > 1.8
  if kernel == 'small tiles' or layout == 'zigzag':
    assert found.max(0).sum() < 0.6 * contiguous.max(0).sum()


@own
@pytest.mark.parametrize('devices', [4, 64])
def test_a_million_tokens_are_almost_as_fast_as_can_be(devices, kernel):
  """docs/benchmarks/balance.md has all numbers."""
  assert faster(2**20, devices, 'zigzag', kernel).share >= 0.95


@pytest.mark.parametrize('devices', [4, 64])
def test_so_are_stripes_in_small_tiles(devices):
  assert faster(2**20, devices, 'striped', 'small tiles').share >= 0.95


@pytest.mark.parametrize('kernel', bench_balance.KERNELS)
def test_a_zigzag_helps_where_a_device_has_two_tiles(kernel):
  """One of each chunk: they may not share a tile."""
  for length, devices in ((2**16, 64), (2**14, 16)):
    assert faster(length, devices, 'zigzag', kernel, 1024).speed > 1.9


@own
@pytest.mark.parametrize('devices', [4, 8, 16, 64])
@pytest.mark.parametrize('length', [2**9, 2**12, 2**16])
def test_zigzag_is_never_slower_than_striped(length, devices, kernel):
  zigzag, striped = (
    faster(length, devices, layout, kernel).speed
    for layout in ('zigzag', 'striped')
  )
  assert zigzag >= striped


@own
@pytest.mark.parametrize('layout', ['striped', 'zigzag'])
@pytest.mark.parametrize(
  ('length', 'devices'),
  [(64, 8), (128, 64), (512, 8), (4096, 8), (4096, 64), (2**14, 4), (2**14, 8)],
)
def test_never_slower_than_contiguous(layout, length, devices, kernel):
  assert faster(length, devices, layout, kernel).speed >= 1


@pytest.mark.parametrize('layout', stripe.LAYOUTS)
def test_work_is_what_kernels_visit(layout):
  """By the table from which those for TPUs read it."""
  length, devices, tile = 512, 4, (64, 32)
  found = stripe.work(Causal(), length, devices, layout, tile)
  places = stripe.order(length, devices, layout).reshape(devices, 1, -1)
  tokens = [masks.Tokens(masks.Side(jnp.asarray(x))) for x in places]
  for device, hop in itertools.product(range(devices), repeat=2):
    table = runs.table(
      *(Causal(), tokens[device], tokens[(device - hop) % devices]),
      *(*tile, True),
    )
    total = table.reshape(-1, runs.FIELDS)[:, runs.TOTAL].sum()
    assert found[device, hop] == total


def test_work_is_that_of_the_mask():
  """Counted pair by pair."""
  mask = Causal() & Window(5)
  found = stripe.work(mask, 16, 4, 'zigzag', tile=(1, 1))
  at = stripe.order(16, 4, 'zigzag').reshape(4, 4)
  for device in range(4):
    for hop in range(4):
      far = at[device][:, None] - at[(device - hop) % 4]
      assert found[device, hop] == np.sum((far >= 0) & (far < 5))
