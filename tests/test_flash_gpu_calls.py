"""Which calls go to the kernels for GPUs, and what cuDNN is asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash
from pallas_kernels.flash import gpu
from pallas_kernels.flash.gpu_scores import Modification
from pallas_kernels.masks import BlockCausal, Causal, Everything, Side, Window
from pallas_kernels.problem import Extras, Operands
from pallas_kernels.scores import Score, Slopes, SoftCap

NOWHERE = Side(np.zeros((1, 1), int), {})
H200, A100 = 'NVIDIA H200', 'NVIDIA A100-SXM4-80GB'


def draw(t=24, s=24, d=64, dtype='bfloat16', h=4, k=2):
  rng = np.random.default_rng(0)
  shapes = (2, t, h, d), (2, s, k, d), (2, s, k, d)
  return [jnp.asarray(rng.normal(size=x), dtype) for x in shapes]


@pytest.fixture
def ran(monkeypatch):
  """The names of those that ran; all of them as 'xla' does."""
  names = []
  xla = flash.BACKENDS['xla'].attend
  for name, engine in flash.BACKENDS.items():
    said = lambda *args, name=name: names.append(name) or xla(*args)
    monkeypatch.setitem(flash.BACKENDS, name, engine._replace(attend=said))
  return names


@pytest.fixture
def library(monkeypatch):
  """cuDNN's place is taken by XLA; what it is asked for."""
  asked = []
  real = jax.nn.dot_product_attention

  def attend(*args, implementation, **given):
    assert implementation == 'cudnn'
    asked.append(given)
    return real(*args, implementation='xla', **given)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', attend)
  return asked


def on(monkeypatch, device):
  for module in (flash, gpu):
    monkeypatch.setattr(module, 'chip', lambda: device)


@pytest.mark.parametrize(
  ('device', 'shape', 'given', 'name'),
  [
    (H200, {}, {}, 'gpu'),
    ('NVIDIA GH200 480GB', {'dtype': 'float16'}, {}, 'gpu'),
    (H200, {}, {'softcap': 3.0, 'return_partial': True}, 'gpu'),
    (H200, {'d': 40}, {'mask': BlockCausal(4)}, 'gpu'),
    (H200, {'dtype': 'float32'}, {}, 'xla'),
    (H200, {'d': 320}, {}, 'cudnn'),
    (A100, {}, {}, 'cudnn'),
    (A100, {}, {'mask': Causal() & Window(5)}, 'cudnn'),
    (A100, {}, {'softcap': 3.0}, 'xla'),
    (A100, {}, {'return_partial': True}, 'xla'),
    (A100, {}, {'query_segments': np.ones(24, int)}, 'xla'),
    (A100, {}, {'mask': BlockCausal(4)}, 'xla'),
    (A100, {'s': 30}, {'mask': Causal()}, 'xla'),
    (A100, {'s': 30}, {}, 'cudnn'),
    (A100, {}, {'mask': Causal(), 'key_order': np.arange(24)}, 'xla'),
    ('AMD Instinct MI300X', {}, {}, 'xla'),
    ('cpu', {}, {}, 'xla'),
  ],
)
def test_choice(monkeypatch, ran, library, device, shape, given, name):
  on(monkeypatch, device)
  flash.attention(*draw(**shape), **given)
  assert ran == [name]


def test_without_cudnn_it_is_xla(monkeypatch, ran):
  """Here there is none, and JAX says so."""
  on(monkeypatch, A100)
  flash.attention(*draw())
  assert ran == ['xla']
  with pytest.raises(NotImplementedError, match='cuDNN'):
    flash.attention(*draw(), implementation='cudnn')


@pytest.mark.parametrize(
  ('mask', 's'),
  [
    (Everything(), 30),
    (Causal(), 24),
    (Causal() & Window(2), 24),
    (Window(7) & Causal(), 24),
  ],
)
def test_cudnn_is_asked_for_the_same(library, mask, s):
  """A window of n tokens is n - 1 to the left: both count the query itself."""
  arrays = draw(s=s)
  attend = functools.partial(flash.attention, mask=mask, scale=0.3)

  def both(name):
    loss = lambda *x: jnp.sum(
      jnp.sin(attend(*x, implementation=name).astype(jnp.float32))
    )
    o = attend(*arrays, implementation=name)
    return o, *jax.grad(loss, (0, 1, 2))(*arrays)

  found, wanted = both('cudnn'), both('xla')
  assert library
  for one, other in zip(found, wanted):
    np.testing.assert_allclose(
      np.float64(one), np.float64(other), atol=0.03 * np.abs(other).max()
    )


@pytest.mark.parametrize(
  'mask', [Causal() & Window(3, 2), Causal() | Window(3)]
)
def test_cudnn_has_not_every_window(library, mask):
  with pytest.raises(NotImplementedError, match='it has no mask'):
    flash.attention(*draw(), mask=mask, implementation='cudnn')


def rare(x, query, key):
  return x + jax.lax.lgamma(jnp.abs(x) + 1)


def running(x, query, key):
  return jnp.cumsum(x, -1)


@pytest.mark.parametrize(
  ('device', 'shape', 'given', 'why'),
  [
    (A100, {}, {}, 'for Hopper GPUs, as an H100 or H200, not NVIDIA A100'),
    (H200, {'d': 257}, {}, 'at most 256 wide, not 257'),
    (H200, {'t': 0}, {}, 'there is nothing in q'),
    (H200, {'dtype': 'float32'}, {}, 'for bfloat16 and float16, not float32'),
    (H200, {}, {'score': Score(running)}, 'not elementwise: it uses cumsum'),
    (H200, {}, {'score': Score(rare)}, 'lgamma, which its compiler lacks'),
  ],
)
def test_refusals(monkeypatch, device, shape, given, why):
  on(monkeypatch, device)
  with pytest.raises(NotImplementedError, match=why):
    flash.attention(*draw(**shape), implementation='gpu', **given)


# ----------------------------------------------------------------------- scores


def of_users(x, query, key, weight, table):
  """With calls, slices, a table and what only some versions of JAX have."""
  near = jnp.clip(query.order - key.order, 0, 2)
  found = sum(
    jnp.where(near == i, table[:, i, None, None], 0) for i in range(3)
  )
  return jax.nn.silu(x) * weight[:, None, None] + jnp.tanh(x) ** 3 * found


@pytest.mark.parametrize(
  ('fn', 'shapes'),
  [(SoftCap(2.0), ()), (Slopes(), ((4,),)), (of_users, ((4,), (4, 3)))],
)
def test_a_modification_is_done_on_tiles(fn, shapes):
  """As on arrays of four axes, the derivative included."""
  rng = np.random.default_rng(0)
  heads = [rng.normal(size=shape).astype('float32') for shape in shapes]
  scored = lambda x, query, key, extras: fn(
    x, query, key, *extras.scores[0].heads
  )
  own = lambda heads: Extras((Operands(tuple(heads)),))
  function = Modification.of(scored, own(heads), NOWHERE, NOWHERE)
  assert not function.lacks
  x = jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)
  query = jnp.broadcast_to(jnp.arange(8)[:, None], x.shape)
  key = jnp.broadcast_to(jnp.arange(16)[None], x.shape)

  def numbers(operand):
    found = np.empty((1, *operand.shape[1:]), object)
    for at in np.ndindex(found.shape):
      found[at] = jnp.float32(operand[2][at[1:]])
    return found

  got = function(x, Side(query, {}), Side(key, {}), own(map(numbers, heads)))
  sides = [Side(side[None, None], {}) for side in (query, key)]
  one_head = own([operand[2:3] for operand in heads])
  y, back = jax.vjp(lambda x: scored(x, *sides, one_head), x[None, None])
  wanted = y[0, 0], back(jnp.ones_like(y))[0][0, 0]
  for one, other in zip(got, wanted):
    one = jnp.ones_like(x) if one is None else one
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_a_slope_of_one_is_known():
  """So that backward nothing is multiplied by it."""
  slopes = jnp.ones(4)
  function = Modification.of(
    lambda x, query, key, own: Slopes()(x, query, key, *own.scores[0].heads),
    Extras((Operands((slopes,)),)),
    *(NOWHERE, NOWHERE),
  )
  x = jnp.ones((8, 16))
  place = Side(jnp.zeros((8, 16), int), {})
  box = np.empty(1, object)
  box[0] = jnp.float32(1)
  _, slope = function(x, place, place, Extras((Operands((box,)),)))
  assert slope is None
