"""Layouts are permutations, and give every device the same work."""

import jax
import numpy as np
import pytest

from jaxattn.parallel import stripe
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


@pytest.mark.parametrize('layout', ['striped', 'zigzag'])
@pytest.mark.parametrize('devices', [16, 256])
def test_a_million_tokens_are_even(layout, devices):
  found = stripe.work(Causal(), 2**20, devices, layout)
  assert (found.max(0) / found.mean(0) <= 1.02).all()
  if layout == 'striped':  # hops are alike, too
    assert found.max() / found.mean() <= 1.02
  contiguous = stripe.work(Causal(), 2**20, devices, 'contiguous')
  assert slowest(contiguous) > 1.8
  assert found.max(0).sum() < 0.6 * contiguous.max(0).sum()


@pytest.mark.parametrize('layout', ['striped', 'zigzag'])
@pytest.mark.parametrize('devices', [4, 64])
def test_a_million_tokens_are_almost_as_fast_as_can_be(layout, devices):
  """docs/benchmarks/balance.md has all numbers."""
  even, contiguous = (
    stripe.work(Causal(), 2**20, devices, name)
    for name in (layout, 'contiguous')
  )
  took = contiguous.max(0).sum()
  most = took / contiguous.mean(0).sum()
  assert took / even.max(0).sum() >= 0.95 * most


@pytest.mark.parametrize('devices', [4, 8, 16, 64])
@pytest.mark.parametrize('length', [2**9, 2**12, 2**16])
def test_zigzag_is_never_slower_than_striped(length, devices):
  zigzag, striped = (
    stripe.work(Causal(), length, devices, name).max(0).sum()
    for name in ('zigzag', 'striped')
  )
  assert zigzag <= striped


@pytest.mark.parametrize('layout', ['striped', 'zigzag'])
@pytest.mark.parametrize('length', [64, 512, 4096, 2**14])
def test_never_slower_than_contiguous(layout, length):
  even, contiguous = (
    stripe.work(Causal(), length, 8, name) for name in (layout, 'contiguous')
  )
  assert even.max(0).sum() <= contiguous.max(0).sum()


def test_work_is_that_of_the_mask():
  """Counted pair by pair."""
  mask = Causal() & Window(5)
  found = stripe.work(mask, 16, 4, 'zigzag', tile=1)
  at = stripe.order(16, 4, 'zigzag').reshape(4, 4)
  for device in range(4):
    for hop in range(4):
      far = at[device][:, None] - at[(device - hop) % 4]
      assert found[device, hop] == np.sum((far >= 0) & (far < 5))
