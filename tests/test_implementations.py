"""`policy.implementation` reaches the kernels, and is never ignored."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn
from jaxattn import registry
from jaxattn.mixer import Context
from jaxattn.nn import Policy
from pallas_kernels import flash
from tests import devices

NAMES = registry.names()
FLASH = [n for n in NAMES if 'plain' in jaxattn.make(n).implementations]


def test_who_runs_on_flash():
  assert {'multi_head', 'sliding_window', 'moba', 'gated'} <= set(FLASH)
  assert not {'gated_linear', 'delta_net', 's4d', 'sigmoid'} & set(FLASH)


@pytest.fixture
def ran(monkeypatch):
  """The names of those that ran."""
  names = []
  for backend, engine in flash.BACKENDS.items():
    said = lambda *args, backend=backend, engine=engine: (
      names.append(backend) or engine.attend(*args)
    )
    monkeypatch.setitem(flash.BACKENDS, backend, engine._replace(attend=said))
  return names


@pytest.mark.parametrize('name', FLASH)
def test_the_one_named_runs(name, ran):
  """And gives the same: 'plain' is another program."""
  x = jax.random.normal(jax.random.key(0), (2, 20, 32))
  outputs = {}
  for backend in ('plain', 'xla'):
    mixer = jaxattn.make(name, policy=Policy(implementation=backend))
    ran.clear()
    outputs[backend], _ = mixer.init_with_output(jax.random.key(1), x)
    assert set(ran) == {backend}
  np.testing.assert_allclose(
    outputs['plain'].y, outputs['xla'].y, rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize('name', NAMES)
def test_one_that_is_not_there_is_refused(name):
  with pytest.raises(NotImplementedError, match=r"'cuneiform', only .*xla"):
    jaxattn.make(name, policy=Policy(implementation='cuneiform'))


def test_one_that_others_have_is_refused():
  with pytest.raises(NotImplementedError, match=r"GatedLinear .*'plain'"):
    jaxattn.make('gated_linear', policy=Policy(implementation='plain'))


def test_cross_attention_passes_it_on(ran):
  mixer = jaxattn.make('multi_head', policy=Policy(implementation='plain'))
  x = jnp.ones((1, 4, 32))
  mixer.init(jax.random.key(0), x, context=Context(x))
  assert set(ran) == {'plain'}


def test_a_strategy_that_cannot_be_is_refused():
  with pytest.raises(NotImplementedError, match=r"Moba .*'ring'.*only gather"):
    jaxattn.make('moba', policy=Policy(strategy='ring'))
  with pytest.raises(NotImplementedError, match=r"MultiHead .*'halo'"):
    jaxattn.make('multi_head', policy=Policy(strategy='halo'))
  with pytest.raises(ValueError, match=r"'star' must be one of halo, .*ring"):
    Policy(strategy='star')


def test_a_strategy_is_for_those_who_attend():
  """A model may mix them: 'ring' is for its layers of attention."""
  for name in ('multi_head', 'sigmoid', 'gated_linear', 's4d'):
    jaxattn.make(name, policy=Policy(strategy='ring'))


ALONE = """
import importlib.abc, importlib.metadata, sys
JAX = {'jax', 'jaxlib', 'numpy', 'scipy', 'ml_dtypes', 'opt_einsum'}
known = importlib.metadata.packages_distributions()

class Nothing(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path, target=None):
    top = name.partition('.')[0]
    if top in known and top not in JAX and top != 'pallas_kernels':
      raise ModuleNotFoundError(f'No module named {top!r}', name=top)

sys.meta_path.insert(0, Nothing())
import jax
from pallas_kernels import flash
from pallas_kernels.flash import gpu
from pallas_kernels.masks import Causal

x = jax.numpy.ones((1, 5, 1, 64), 'float16')
loss = lambda x: flash.attention(x, x, x, mask=Causal()).sum()
print(jax.grad(loss)(x).sum())  # every value has a weight of 1 in all
assert not {'absl', 'flax', 'jaxattn'} & set(sys.modules)
assert gpu.plgpu is None or jax.__version_info__ > (0, 10, 9)
gpu.plgpu = None
flash.attention(x, x, x, implementation='gpu')
"""


def test_kernels_need_nothing_but_jax():
  """That of JAX 0.10 for GPUs wants absl, which it does not install."""
  ran = subprocess.run(
    [sys.executable, '-c', ALONE],
    cwd=devices.ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert ran.stdout.strip() == '320.0', ran.stderr
  assert 'pip install absl-py. Leave implementation out' in ran.stderr
