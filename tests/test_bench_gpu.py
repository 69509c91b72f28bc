"""`bench --kernels --gpu` tells right from wrong, seen without a GPU."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench, bench_gpu
from experiments import bench_gpu_cells as cells
from pallas_kernels.flash import xla


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(cells, 'T', 60)
  monkeypatch.setattr(cells, 'S', 70)
  monkeypatch.setattr(cells, 'DRAWS', 2)


def attend(*args):
  """By XLA, which other tests prove."""
  o, m, total = xla.attend(*args)
  seen = total > 0
  return o, jnp.where(seen, m + jnp.log(jnp.where(seen, total, 1)), -jnp.inf)


def shifted(rule, q, k, v, extras, query, key):
  """A mutant: keys are taken to stand one further on."""
  side = key.side._replace(order=key.side.order + 1)
  return attend(rule, q, k, v, extras, query, key._replace(side=side))


CHECKED = [
  'causal',
  'causal, d = 80, e = 40',
  'window, first keys, documents',
  'T5 buckets, float16',
  'numbers of tokens',
  'factor',
  'dropout',
]


@pytest.mark.parametrize('name', CHECKED)
def test_what_is_right_passes(name):
  cell = cells.CELLS[name]
  found = cells.check(cell, attend)
  assert set(found) == {
    *('o', 'lse', 'dq', 'dk', 'dv'),
    *(f'd {given}' for given in cell.given),
  }
  assert max(found.values()) <= 2


def test_what_is_wrong_does_not():
  found = cells.check(cells.CELLS['causal'], shifted)
  assert found['o'] > 2


def test_a_row_that_sees_nothing_has_to_say_so():
  exact = {'lse': np.array([0.5, -np.inf])}
  assert cells.off({'lse': np.array([0.5, -1e30])}, exact)['lse'] == np.inf


def test_cells_that_do_not_run_are_named(monkeypatch):
  """As here, where kernels are not interpreted."""
  names = 'causal', 'outliers'
  table, wrong = cells.checked({name: cells.CELLS[name] for name in names})
  assert wrong == ['causal', 'outliers']
  assert table.count('it is for cuda') == 2


def test_rates_and_ratios(monkeypatch):
  """Of contenders that take as long as they say."""
  times = {'ours': 0.002, 'cuDNN': 0.001}

  def make(name):
    def calls(case):
      if name not in times:
        raise ImportError('not here')
      return tuple(
        lambda took=took: np.array(took)
        for took in (times[name], 2 * times[name])
      )

    return calls

  rivals = {name: make(name) for name in bench_gpu.RIVALS}
  monkeypatch.setattr(bench_gpu, 'RIVALS', rivals)
  monkeypatch.setattr(bench_gpu, 'seconds', lambda call: float(call()))
  case = bench_gpu.Timed(1024, 128, True)
  table, missing = bench_gpu.compared([case], 3)
  flops = 4 * 32 * 1024**2 * 16 * 128 / 2
  assert case.flops(False) == flops
  assert case.flops(True) == 2.5 * flops
  rate = round(flops / 0.002 / 1e12)
  assert f'| causal | forward | 128 | 1,024 | {rate} |' in table
  assert table.count(' | 0.50 |') == 2
  assert set(missing) == {'attention_mgpu', 'torch SDPA'}


def test_without_a_gpu_it_says_so(tmp_path):
  with pytest.raises(SystemExit, match=r"JAX sees 'cpu'. Nothing was run"):
    bench.main(['--kernels', '--gpu', f'--out={tmp_path}'])
