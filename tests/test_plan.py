"""The planner: its search and its words here, its verdicts with a compiler."""

import dataclasses
import io
import re
import subprocess
import sys
import types
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from rich.console import Console

from configs import lm, long_context
from experiments import laid, planned
from experiments import plan as program
from experiments.planned import Plan
from experiments.screen import Clock
from jaxattn.parallel import mesh as meshes
from jaxattn.train import build, step
from pallas_kernels import chips
from tests.devices import ROOT

GIB = 2**30
BLANK = Plan(
  length=0,
  unit=4,
  batch=1,
  devices=4,
  kind='TPU v5 lite',
  mesh='data=1, seq=4, model=1',
  parameters=1000,
  pattern='2 x multi_head',
  layout='contiguous',
  strategies=('ring (asked for): ...',),
  held=dict.fromkeys(
    ('parameters', 'optimiser', 'batch', 'program', 'temporaries'), GIB
  ),
  needs=0,
  room=16 * GIB,
  sent=4 * GIB,
  hidden=GIB,
  advice=(),
  seconds=1.0,
)


def console():
  return Console(file=io.StringIO(), width=200)


def searched(monkeypatch, start, needs):
  """What `longest` finds where a row of n tokens needs needs(n) bytes."""
  seen = []

  def fake(config, topology, length):
    made = dataclasses.replace(BLANK, length=length)
    made = dataclasses.replace(made, needs=int(needs(made.filled)))
    seen.append(length)
    return made

  monkeypatch.setattr(program, 'plan', fake)
  fits, fails, found = program.longest({}, 'v5e', start, Clock(console()))
  assert list(found) == seen
  return fits, fails, seen


@pytest.mark.parametrize('start', [2**10, 2**14, 2**20])
@pytest.mark.parametrize('most', [2**14, 2**14 + 4096, 2**15 - 1])
def test_the_longest_that_fits(monkeypatch, start, most):
  line = lambda length: 2 * GIB + 14 * GIB * length / most
  fits, fails, seen = searched(monkeypatch, start, line)
  assert fits.length <= most < fails.length
  assert fails.length - fits.length == 2**14 // program.STEPS
  assert len(seen) == len(set(seen))
  assert len(seen) <= 13


@pytest.mark.parametrize('start', [1, 999, 123_457, 2**20])
@pytest.mark.parametrize('most', [4, 7, 30, 20_000])
def test_any_length_may_be_the_longest(monkeypatch, start, most):
  line = lambda length: 2 * GIB + 14 * GIB * length / most
  fits, fails, seen = searched(monkeypatch, start, line)
  assert fits.length <= most < fails.length
  one = max(2 * fits.length / program.STEPS, BLANK.unit)
  assert fails.length - fits.length <= one
  assert seen[0] == start
  # Others are filled up to these, and no row is tried twice.
  assert all(length % 4 == 0 for length in seen[1:])
  assert len({-(-length // 4) for length in seen}) == len(seen)


def test_needs_that_are_no_line_are_found_all_the_same(monkeypatch):
  curve = lambda length: GIB + 15 * GIB * (length / 20_000) ** 3
  fits, fails, _ = searched(monkeypatch, 2**12, curve)
  assert fits.length <= 20_000 < fails.length
  assert fails.length - fits.length == 2**14 // program.STEPS


def test_nothing_fits(monkeypatch):
  for start in (3, 64, 1000):
    fits, fails, seen = searched(monkeypatch, start, lambda length: 17 * GIB)
    assert not fits.fits
    assert fails is None
    assert fits.filled == 4
    assert seen[-1] == min(start, 4)
  said = program.ends(fits, fails)
  assert said == (
    'none: not even 4 tokens a row fit, and devices cannot share fewer'
  )
  alone = dataclasses.replace(fits, length=1, unit=1)
  assert program.ends(alone, None) == 'none: not even one token a row fit'


def test_everything_fits(monkeypatch):
  fits, fails, _ = searched(monkeypatch, 2**20, lambda length: GIB)
  assert fails is None
  assert program.MOST // 2 < fits.length <= program.MOST
  assert program.ends(fits, None).endswith('fit, no longer were tried')


@pytest.mark.parametrize('most', [4096, 5000, 8191])
def test_a_length_that_is_refused_ends_the_search(monkeypatch, most):
  def needs(length):
    if length > most:
      raise ValueError(f'positions end at {most}')
    return GIB

  fits, fails, _ = searched(monkeypatch, 2**10, needs)
  assert fits.fits
  assert fits.length <= most < fails.length
  assert fails.length - fits.length == 2**12 // program.STEPS
  said = program.ends(fits, fails)
  assert said == (
    f'{fits.length:,} tokens a row fit, {fails.length:,} are refused: positions'
    f' end at {most}'
  )


def test_what_is_refused_before_anything_fits_is_an_error(monkeypatch):
  def needs(length):
    raise ValueError('the model has no layers')

  with pytest.raises(ValueError, match='has no layers'):
    searched(monkeypatch, 2**10, needs)


def test_ways():
  config = long_context.get_config('size=7b').to_dict()
  ring = program.way(config, 'striped')
  assert (ring['layout'], ring['policy']['strategy']) == ('striped', 'ring')
  assert program.way(config, 'ulysses')['policy']['strategy'] == 'ulysses'
  alone = program.way(config, 'blockwise')
  assert (alone['mesh']['data'], alone['mesh']['seq']) == (-1, 1)
  with pytest.raises(ValueError, match='--compare=rign is none of'):
    program.way(config, 'rign')
  assert config == long_context.get_config('size=7b').to_dict()


def test_what_a_compiler_says_is_understood():
  said = planned._exceeded
  assert said(
    ValueError('HLO temporaries (24.50G) exceeds available HBM (15.75G).')
  ) == (int(24.5 * GIB), int(15.75 * GIB))
  assert said(ValueError('Used 17.00G of 512.0M hbm. Exceeded by ...')) == (
    17 * GIB,
    2**29,
  )
  with pytest.raises(ValueError, match='else'):
    said(ValueError('something else'))


@pytest.mark.parametrize(
  ('sizes', 'seq', 'flags'),
  [
    ({'data': -1, 'seq': 1, 'model': 1}, 4, 'data=1 seq=-1'),
    ({'data': 4, 'seq': 1, 'model': 1}, 4, 'data=1 seq=-1'),
    ({'data': -1, 'seq': 1, 'model': 2}, 2, 'data=1 seq=-1'),
    ({'data': 2, 'seq': 1, 'model': -1}, 2, 'data=1 seq=-1 model=2'),
    ({'data': 1, 'seq': 1, 'model': -1}, 4, 'seq=-1 model=1'),
    ({'data': 1, 'seq': 1, 'model': 4}, 4, 'seq=-1 model=1'),
  ],
)
def test_a_mesh_that_is_advised_can_be_made(monkeypatch, sizes, seq, flags):
  monkeypatch.setattr(
    jax, 'make_mesh', lambda sizes, axes, **_: AbstractMesh(sizes, axes)
  )
  config = build.complete({'mesh': sizes | {'axis_types': 'explicit'}})
  made = dataclasses.replace(BLANK, needs=17 * GIB)
  one = np.int32(0)
  state = step.TrainState(one, {}, {}, {}, one)
  mesh = meshes.make(**config['mesh'], devices=range(4))
  words = [x for x in planned._advice(config, made, state, mesh) if 'seq' in x]
  assert words == [
    ' '.join(f'--config.mesh.{flag}' for flag in flags.split())
    + ': a row is spread over the devices'
  ]
  given = {k: int(v) for k, v in re.findall(r'mesh\.(\w+)=(-?\d+)', words[0])}
  spread = meshes.make(**config['mesh'] | given, devices=range(4))
  assert spread.shape[meshes.SEQ] == seq


def test_every_setting_of_a_run_can_be_set():
  for config in (lm.get_config('quick'), long_context.get_config('quick')):
    assert set(config) == set(build.DEFAULTS)
    assert config.to_dict()['layout'] is None
    config.layout = 'striped'  # a placeholder takes a word, and no number
    assert build.complete(config.to_dict())['layout'] == 'striped'
    with pytest.raises(TypeError):
      config.layout = 3


def test_words():
  out = console()
  made = dataclasses.replace(BLANK, length=8, needs=GIB)
  fails = dataclasses.replace(BLANK, length=12)
  program.report(made, out, program.ends(made, fails))
  told = out.file.getvalue()
  assert '8 a row, 1 rows a step' in told
  assert '8 tokens a row fit, 12 do not' in told
  assert '1.00 GiB of 16.00 GiB: fits, 15.00 GiB are left' in told
  assert '4.00 GiB by each device, 25% behind other work' in told
  assert 'program      1.00 GiB' in told
  out = console()
  early = {k: x for k, x in BLANK.held.items() if k != 'program'}
  program.report(dataclasses.replace(made, held=early), out)
  assert 'program      machine code was not waited for' in out.file.getvalue()
  out = console()
  advice = ('more devices: ...',)
  much = dataclasses.replace(BLANK, needs=20 * GIB, held={}, advice=advice)
  program.report(dataclasses.replace(much, length=1021), out)
  told = out.file.getvalue()
  assert '1,021 a row, filled up to 1,024 for devices to share' in told
  assert 'does not fit by 4.00 GiB' in told
  assert 'to change: more devices' in told
  assert 'sent' not in told
  assert 'the compiler gave up' in told
  out = console()
  why = '7 heads and 8 devices'
  program.compared({'ring': BLANK, 'gather': much, 'ulysses': why}, out)
  told = out.file.getvalue()
  assert 'not compiled' in told
  assert 'refused' in told
  assert f'ulysses: {why}' in told


# ---------------------------------------------------- with a compiler of TPUs

LARGE = ('--config=configs/long_context.py:gather,size=7b', '--topology=v5e')


def ran(*flags):
  command = [sys.executable, '-m', 'experiments.plan', *LARGE, *flags]
  return subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False
  )


@pytest.mark.aot
@pytest.mark.usefixtures('compiler')
class TestCompiled:
  def test_what_fits(self):
    config = long_context.get_config('quick,ring').to_dict()
    config['policy']['implementation'] = 'xla'  # compiles sooner
    made = planned.plan(config, 'v5e', 4096)
    assert made.fits
    assert made.devices == 4
    assert made.room == int(15.75 * GIB)
    assert made.needs == sum(made.held.values())
    # Adam's moments are as large as the weights, and there are two.
    weights = 4 * made.parameters / 4
    assert weights <= made.held['parameters'] < 1.1 * weights
    assert made.held['optimiser'] / made.held['parameters'] == pytest.approx(
      2, abs=0.01
    )
    # Keys and values of each layer go round: forward, again, and backward with
    # their gradients.
    (strategy,) = made.strategies
    assert strategy.startswith('ring (asked for)')
    heads = 4 * 1024 * 64 * 4  # rows, tokens, width, bytes
    least = 4 * (3 * 3 * 2 + 4 * 2) * heads / 2  # bfloat16 may be sent
    assert least < made.sent < 3 * least
    # A row of which devices cannot have equal parts is filled up to the same.
    uneven = planned.plan(config, 'v5e', 4093)
    assert (made.unit, uneven.filled) == (4, 4096)
    assert uneven.needs == pytest.approx(made.needs, rel=0.05)
    assert len(uneven.strategies) == 1

  def test_what_does_not(self):
    flags = '--config.batch=8', '--config.model.remat=False'
    found = ran(*flags, '--length=65536')
    assert found.returncode == 1, found.stdout + found.stderr
    assert 'does not fit by' in found.stdout
    advice = [x for x in found.stdout.split('\n') if x.startswith('to change')]
    for i, word in enumerate(
      ('remat', 'strategy=ring', 'accumulate=8', 'bfloat16', 'more devices')
    ):
      assert word in advice[i]

  def test_what_cannot_work_is_said(self):
    with pytest.raises(ValueError, match="topology='v5e:9x9'"):
      chips.devices('v5e:9x9')
    with pytest.raises(ValueError, match="topology='v9' must be one of v3"):
      chips.devices('v9')
    found = ran('--compare=rign')
    assert found.returncode == 1
    assert 'error: --compare=rign is none of' in found.stderr
    assert 'Traceback' not in found.stderr
    found = ran('--config=configs/quickstart.py:quick')
    assert 'error: this configuration is not of one run' in found.stderr


@pytest.mark.aot
@pytest.mark.parametrize('compiler', ['h200'], indirect=True)
def test_gpus_are_planned_too(compiler):
  config = long_context.get_config('quick,ring').to_dict()
  config['policy']['implementation'] = 'xla'
  config['model']['depth'] = 1
  made = planned.plan(config, 'h200:2', 1024)
  assert (made.fits, made.devices) == (True, 2)
  assert made.needs == sum(made.held.values())
  weights = 4 * made.parameters / 2
  assert weights <= made.held['parameters'] < 1.1 * weights
  assert made.strategies[0].startswith('ring (asked for)')
  assert made.sent > 0


@pytest.mark.aot
@pytest.mark.usefixtures('compiler')
class TestMillion:
  """7B parameters, a million tokens, 256 chips."""

  def test_it_fits(self):
    flags = '--topology=v5e:16x16', '--length=1048576'
    config = '--config=configs/long_context.py:size=7b'
    found = subprocess.run(
      [sys.executable, '-m', 'experiments.plan', config, *flags],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    told = found.stdout
    assert '256 x TPU v5 lite' in told
    assert '1,048,576 a row' in told
    held = re.search(r'in all +([\d.]+) GiB of 15.75 GiB: fits', told)
    assert float(held[1]) < 6
    assert int(re.search(r'known after +(\d+) s', told)[1]) < 60
    # Machine code would take longer than all else together.
    assert 'machine code was not waited for' in told


def test_a_machine_without_a_compiler_says_so(monkeypatch):
  chips.devices.cache_clear()
  monkeypatch.setattr(chips, 'missing', lambda: 'libtpu is not installed: ...')
  with pytest.raises(ModuleNotFoundError, match='libtpu is not installed'):
    chips.devices('v5e')
  chips.devices.cache_clear()


def test_a_compiler_that_dies_is_explained(monkeypatch):
  def dies(*_):
    raise laid.Ended('the compiler ended, with status -9')

  options = mock.MagicMock(
    config=long_context.get_config('quick,ring'),
    topology='v5e',
    length=None,
    longest=False,
    compare=[],
  )
  monkeypatch.setattr(program.flags, 'FLAGS', options)
  monkeypatch.setattr(program, 'plan', dies)
  device = types.SimpleNamespace(device_kind='TPU v5 lite')
  monkeypatch.setattr(chips, 'devices', lambda _: [device])
  with pytest.raises(SystemExit, match='error: the compiler ended'):
    program.main(['plan'])
