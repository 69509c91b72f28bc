"""The benchmarks run, on sizes that say nothing about speed."""

import importlib.util

import pytest

from experiments import bench, bench_models


def test_softmax_in_small(tmp_path, capsys):
  flags = ['softmax', '--length=64', '--turns=1', f'--out={tmp_path}']
  bench.main(flags)
  page = (tmp_path / 'softmax.md').read_text()
  assert page == capsys.readouterr().out.removesuffix('\n')
  assert '64 tokens' in page
  forms = 4 + bool(importlib.util.find_spec('torch'))
  assert page.count('\n| `') == forms
  assert page.count('\n| 64 | ') == page.count('\n| 128 | ') == 8
  assert 'jax 0' in page


def test_masks_in_small(tmp_path):
  bench.main(['masks', '--length=1024', '--turns=1', f'--out={tmp_path}'])
  page = (tmp_path / 'masks.md').read_text()
  assert '| causal | 3 |' in page
  assert '| all pairs | 4 |' in page
  assert '| causal, 8 documents | 2 |' in page


def test_growth_in_small(tmp_path, monkeypatch):
  monkeypatch.setattr(bench_models, 'LENGTHS', (8, 16))
  chosen = ['--mechanism=linear', '--mechanism=s4d']
  bench.main(['growth', *chosen, '--turns=1', f'--out={tmp_path}'])
  page = (tmp_path / 'growth.md').read_text()
  assert '| `linear` |' in page
  assert '| - |\n' in page  # linear is no Fourier transform
  assert '% |\n' in page  # s4d is


def test_linear_time_is_read_off_the_specs():
  names = bench_models.linear_time()
  assert {'gated_linear', 's4d', 'sliding_window', 'base_conv'} <= set(names)
  assert not {'multi_head', 'moba', 'sigmoid'} & set(names)


def test_ratios_are_within_a_turn():
  assert bench_models.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 50.0]) == 2.0


def test_unknown_section(capsys):
  with pytest.raises(SystemExit):
    bench.main(['softmx'])
  assert 'Did you mean softmax?' in capsys.readouterr().err


def test_flags_that_do_not_go_together(capsys):
  for flags in (
    ['--kernels'],
    ['--compile'],
    ['--kernels', '--compile', '--gpu'],
  ):
    with pytest.raises(SystemExit):
      bench.main(flags)
    assert '--kernels goes with' in capsys.readouterr().err
