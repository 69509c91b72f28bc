"""The ablation: its cells, what survives a failure or a kill, its report."""

import copy
import functools
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from configs import quickstart
from experiments import ablate, cells, screen
from jaxattn.analysis import curves, recall_state, report, table
from jaxattn.analysis.summary import summarise
from jaxattn.train import build

ROOT = Path(__file__).parents[1]
REFERENCES = {'uniform': 8.0, 'unigram': 4.6, '5-gram': 1.9, 'xz -9': 2.9}


def config_of(arg: str = '', **changes) -> dict:
  config = quickstart.get_config(arg).to_dict()
  return json.loads(json.dumps(config | changes))


def tiny(**changes) -> dict:
  """Two mechanisms on one small task."""
  config = config_of('quick', **changes)
  config['mechanisms'] = {'multi_head': {'heads': 2}, 's4d': {}}
  config['tasks'] = {'mqar': config['tasks']['mqar']}
  return config


def console() -> Console:
  return Console(file=io.StringIO(), width=200)


def fake_fit(calls=None, fails=()):
  """Stands in for the trainer: writes a log, returns numbers, trains nothing.

  `fails`: mechanism -> the exception it raises.
  """

  def fit(config, workdir, *, progress=None):
    (mixer,) = config['model']['mechanisms']
    if calls is not None:
      calls.append(mixer)
    if mixer in fails:
      raise fails[mixer]
    log = ''
    for step in (10, 20):
      entry = {'step': step, 'kind': 'train', 'loss': 4 / step}
      log += json.dumps(entry) + '\n'
      progress(step, 20, entry)
    (workdir / 'metrics.jsonl').write_text(log)
    scores = {'accuracy': 0.5, 'loss': 1.0}
    if config['task']['name'] == 'bytes':
      scores |= {'bits_per_byte': 2.5, 'bits_per_byte@0-32': 3.25}
    return {
      'step': 20,
      'metrics': scores,
      'parameters': 1000,
      'flops': 128_000,
      'state_bytes': {'multi_head': 65536, 's4d': 2048}.get(mixer, 4096),
      'steps_per_second': 12.5,
      'seconds': 3.0,
    }

  return fit


# -- cells ---------------------------------------------------------------------


def apart(counts) -> float:
  return max(counts) / min(counts) - 1


def test_parameters_match_within_five_percent():
  config = config_of()
  planned = cells.plan(config)
  assert [cell.error for cell in planned] == [None] * 10
  for task in config['tasks']:
    counts = [
      cells.parameters(cell.config) for cell in planned if cell.task == task
    ]
    assert len(counts) == 5
    assert apart(counts) <= 0.05, counts


def test_matching_is_what_makes_them_equal():
  config = tiny()
  config['mechanisms'] = {'multi_head': {'heads': 2}, 'gated_linear': {}}
  config['tasks']['mqar']['model'] = {'hidden': 32, 'width': 64}
  matched = [cells.parameters(c.config) for c in cells.plan(config)]
  assert apart(matched) <= 0.01
  config['match'] = ''  # the mutant: all get the same hidden
  assert apart([cells.parameters(c.config) for c in cells.plan(config)]) > 0.05


def test_parameters_are_those_of_a_real_model():
  cell = cells.plan(tiny())[1]
  _, model = build.build(cell.config)
  token = np.zeros((2, 4), np.int32)
  params = jax.jit(model.init)(jax.random.key(0), token)['params']
  real = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert cells.parameters(cell.config) == real


def test_what_cannot_match_is_an_error_of_its_cells_alone():
  config = tiny()
  config['tasks']['mqar']['model'] = {'hidden': 1}
  config['mechanisms'] = {'multi_head': {'heads': 2}, 'gated_linear': {}}
  fits, fails = cells.plan(config)
  assert fits.error is None
  assert 'cannot match' in fails.error


def test_an_unknown_mechanism_is_an_error_of_its_cells_alone():
  config = tiny()
  config['mechanisms'] = {'multi_head': {'heads': 2}, 'delta_nett': {}}
  fits, fails = cells.plan(config)
  assert fits.error is None
  assert 'delta_net' in fails.error.replace('delta_nett', '')


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'match': 'multihead'}, 'Did you mean multi_head'),
    ({'tasks': {'mqar': {'mechanisms': {'s4': {}}}}}, 'Did you mean s4d'),
  ],
)
def test_a_config_that_does_not_hang_together(change, words):
  with pytest.raises(ValueError, match=words):
    cells.plan(tiny() | change)


def test_grid_of_rates_and_seeds():
  config = tiny(seeds=[0, 1], rates=[1e-3])
  config['tasks']['mqar']['rates'] = [1e-3, 1e-2]
  planned = cells.plan(config)
  assert len({cell.folder for cell in planned}) == 2 * 2 * 2
  last = planned[-1]
  assert last.name == 'mqar/s4d/rate=0.01/seed=1'
  assert last.config['optimizer']['schedule']['peak'] == 1e-2
  assert last.config['seed'] == last.config['task']['seed'] == 1
  hidden = {
    c.config['model']['hidden'] for c in planned if c.mechanism == 's4d'
  }
  assert len(hidden) == 1  # matched once for all rates and seeds


def test_fields_of_a_task_replace_those_of_all():
  config = config_of('quick')
  config['mechanisms']['sliding_window'] = {'heads': 2, 'window': 8}
  config['tasks']['bytes']['mechanisms'] = {'sliding_window': {'window': 32}}
  before = copy.deepcopy(config)
  windows = {
    cell.task: cell.config['model']['mechanisms']['sliding_window']
    for cell in cells.plan(config)
    if cell.mechanism == 'sliding_window'
  }
  assert windows['mqar'] == {'heads': 2, 'window': 8}
  assert windows['bytes'] == {'heads': 2, 'window': 32}
  assert config == before


def test_a_pattern_of_mechanisms_is_a_label():
  config = tiny()
  label = '1:1 sliding_window multi_head'
  config['mechanisms'][label] = {'sliding_window': {'window': 8}}
  cell = cells.plan(config)[-1]
  _, model = build.build(cell.config)
  assert cell.error is None
  assert model.layers() == ('sliding_window', 'multi_head')
  assert re.fullmatch(r'[\w-]+', cell.folder)


def test_key_changes_with_config_and_data_only():
  keys = [cell.key for cell in cells.plan(tiny())]
  assert keys == [cell.key for cell in cells.plan(tiny())]
  assert len(set(keys)) == len(keys)
  longer = tiny()
  longer['tasks']['mqar']['steps'] += 1
  other = tiny()
  other['tasks']['mqar']['task']['test_rows'] = 7
  for changed in (longer, other):
    assert not {cell.key for cell in cells.plan(changed)} & set(keys)
  cell = cells.plan(tiny())[0]
  moved = {'about': cell.about | {'fingerprint': 'another corpus'}}
  assert cells.dataclasses.replace(cell, **moved).key != cell.key


# -- running -------------------------------------------------------------------


def test_finished_cells_are_skipped(tmp_path):
  planned, calls = cells.plan(tiny()), []
  run = lambda cells: ablate.ablate(
    cells, tmp_path, console(), fit=fake_fit(calls)
  )
  first = run(planned)
  assert calls == ['multi_head', 's4d']
  assert run(planned) == first
  assert calls == ['multi_head', 's4d']

  longer = tiny()
  longer['tasks']['mqar']['steps'] += 1
  run(cells.plan(longer))  # other cells: trained
  assert calls == ['multi_head', 's4d'] * 2
  run(planned)  # and those before still stand
  assert calls == ['multi_head', 's4d'] * 2


def test_results_hold_what_judging_them_takes(tmp_path):
  planned = cells.plan(tiny())
  ablate.ablate(planned, tmp_path, console(), fit=fake_fit())
  lines = (tmp_path / 'results.jsonl').read_text().splitlines()
  assert len(lines) == 2
  record = json.loads(lines[0])
  assert record['config'] == planned[0].config
  assert record['seed'] == 0
  assert record['rate'] == 3e-3
  assert set(record['versions']) >= {'jax', 'flax', 'python'}
  assert record['metrics']['accuracy'] == 0.5
  assert record['device']
  assert record['date'][:2] == '20'
  for name in ('parameters', 'flops', 'state_bytes', 'steps_per_second'):
    assert record[name] > 0


@pytest.mark.parametrize(
  'error',
  [ValueError('width=64 does not divide'), FloatingPointError('NaN at step 7')],
)
def test_a_cell_that_fails_leaves_the_others_alone(tmp_path, error):
  planned, calls = cells.plan(tiny()), []
  failing = fake_fit(calls, fails={'multi_head': error})
  records = ablate.ablate(planned, tmp_path, console(), fit=failing)
  assert calls == ['multi_head', 's4d']
  assert str(error) in records[0]['error']
  assert 'error' not in records[1]
  trace = tmp_path / 'cells' / planned[0].folder / 'error.txt'
  assert 'Traceback' in trace.read_text()

  page = report.write(tmp_path, records, {}, 'command').read_text()
  assert str(error) in page
  assert '| `multi_head` | failed |' in page
  assert '| `s4d` | 0.500 |' in page

  records = ablate.ablate(planned, tmp_path, console(), fit=fake_fit(calls))
  assert calls == ['multi_head', 's4d', 'multi_head']  # it is tried again
  assert not any('error' in record for record in records)


def test_only_some_cells(tmp_path):
  planned, calls = cells.plan(tiny()), []
  run = lambda only: ablate.ablate(
    planned, tmp_path, console(), only=only, fit=fake_fit(calls)
  )
  assert len(run('mqar/s4')) == 1
  assert calls == ['s4d']
  assert len(run('multi')) == 2  # the finished one stays in the results
  assert calls == ['s4d', 'multi_head']


def test_without_a_terminal_lines_are_plain(tmp_path):
  out = console()
  ablate.ablate(cells.plan(tiny()), tmp_path, out, fit=fake_fit())
  lines = out.file.getvalue().splitlines()
  assert lines[0] == '[1/2] mqar/multi_head/rate=0.003/seed=0: starts'
  assert lines[-1].startswith('[2/2] mqar/s4d/rate=0.003/seed=0: accuracy 0.5')
  assert '\x1b' not in out.file.getvalue()


def test_time_left(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(screen.time, 'monotonic', lambda: now[0])
  out = console()
  planned = cells.plan(tiny(seeds=[0, 1]))
  with screen.Screen(out, planned) as shown:
    shown.start(planned[0])
    now[0] = 10.0  # compiled
    shown.step(10, 110, {'loss': 1.5})
    now[0] = 30.0  # 40 steps in 20 s: 60 more take 30 s, the cell 60 s
    shown.step(50, 110, {'loss': 1.25})
  said = out.file.getvalue().splitlines()[-1]
  assert '50/110  2.0 steps/s  loss 1.250  0:30 left' in said
  assert '(all: 3:30 left)' in said  # and three cells of 60 s
  assert screen.clock(3725) == '1:02:05'


# -- numbers -------------------------------------------------------------------


@functools.cache
def a_run() -> dict:
  return cells.plan(tiny())[0].config


def made(mechanism, rate, seed, value, better='higher', task='mqar', **more):
  headline = 'accuracy' if better == 'higher' else 'bits_per_byte'
  levels = {'chance': 1 / 32, 'chance within a row': 0.25}
  return {
    'task': task,
    'mechanism': mechanism,
    'rate': rate,
    'seed': seed,
    'folder': f'{task}-{mechanism}-{rate:g}-{seed}',
    'config': a_run() | {'task': {'name': task}},
    'about': {
      'headline': headline,
      'better': better,
      'length': 64,
      'vocab': 64,
      'test_rows': 512,
      'tested_rows': 100,
      'asked': 4,
      'levels': levels if better == 'higher' else {'chance': 8.0},
    },
    'metrics': {headline: value, 'loss': 1.0},
    'versions': {'jax': '0.10.2', 'python': '3.11.0'},
    'device': 'CPU',
    'date': '2026-01-02T03:04:05+00:00',
    'parameters': 1000,
    'flops': 64_000,
    'state_bytes': 4096,
    'steps_per_second': 10.0,
    'seconds': 30.0,
  } | more


# rate -> values over three seeds; by hand: means 0.5, 0.7, 0.6 and sample
# standard deviations 0.1, 0.2, 0.
VALUES = {1e-3: (0.4, 0.5, 0.6), 3e-3: (0.5, 0.7, 0.9), 1e-2: (0.6, 0.6, 0.6)}


def grid(better):
  return [
    made('s4d', rate, seed, value, better)
    for rate, values in VALUES.items()
    for seed, value in enumerate(values)
  ]


def check_best(row, better):
  best = {'higher': 3e-3, 'lower': 1e-3}[better]
  return row.rate == best and math.isclose(
    row.score.mean, {'higher': 0.7, 'lower': 0.5}[better]
  )


@pytest.mark.parametrize('better', ['higher', 'lower'])
def test_mean_spread_and_best_rate(better):
  (row,) = summarise(grid(better))
  assert check_best(row, better)
  assert [row.grid[r].mean for r in VALUES] == pytest.approx([0.5, 0.7, 0.6])
  assert [row.grid[r].spread for r in VALUES] == pytest.approx([0.1, 0.2, 0.0])
  assert row.score.seeds == 3
  assert len(row.records) == 3


def test_the_largest_where_the_smallest_is_best_is_rejected():
  records = grid('lower')
  for record in records:  # the mutant: the direction is not looked at
    record['about']['better'] = 'higher'
  (row,) = summarise(records)
  assert not check_best(row, 'lower')


def test_survivors_do_not_make_a_rate_the_best():
  records = grid('higher')
  del records[3]['metrics']  # of rate 3e-3: its mean over the others is 0.8
  records[3]['error'] = 'NaN'
  (row,) = summarise(records)
  assert row.rate == 1e-2
  assert row.grid[3e-3].failed == 1
  assert row.grid[3e-3].mean == pytest.approx(0.8)
  assert row.errors == ('NaN',)


def test_one_seed_has_no_spread():
  (row,) = summarise(grid('higher')[:1])
  assert row.score.spread is None
  assert row.score.text() == '0.400'
  (row,) = summarise(grid('higher')[:2])
  assert row.score.text() == '0.450 ± 0.071'


def test_table_states_cost_per_token():
  (row,) = summarise(grid('higher'))
  shown = table.cells(row)
  assert shown['FLOPs per token'] == '1,000'
  assert shown['accuracy'] == '0.700 ± 0.200'
  assert shown['bits per byte'] == '-'


def test_grid_of_rates_is_printed():
  text = table.rates(summarise(grid('lower')))
  assert '| learning rate | 0.001 | 0.003 | 0.01 |' in text
  assert '| `s4d` | **0.500 ± 0.100** | 0.700 ± 0.200 | 0.600 ± 0.000 |' in text


def test_report_says_how_sure_a_score_is(tmp_path):
  # 100 rows of 4 questions: at most sqrt(0.5 * 0.5 / 400) = 0.025.
  record = made('s4d', 1e-3, 0, 0.5)
  (tmp_path / 'cells' / record['folder']).mkdir(parents=True)
  (tmp_path / 'cells' / record['folder'] / 'metrics.jsonl').touch()
  page = report.write(tmp_path, [record], {}, 'command').read_text()
  assert 'tested on 100 of 512 sequences' in page
  assert '400 questions' in page
  assert 'at most 0.025' in page


def test_caveat_goes_only_with_three_seeds_and_a_grid():
  records = grid('higher')
  assert report.CAVEAT not in report.caveat(records)
  for fewer in (
    [r for r in records if r['seed'] == 0],
    [r for r in records if r['rate'] == 1e-3],
  ):
    assert report.CAVEAT in report.caveat(fewer)
  assert report.caveat(records[:1]).startswith('One seed (0) and one learning')


# -- figures and the report ----------------------------------------------------


def test_curves_of_a_killed_run(tmp_path):
  file = tmp_path / 'metrics.jsonl'
  lines = [
    {'step': 10, 'kind': 'train', 'loss': 3.0},
    {'step': 20, 'kind': 'train', 'loss': 2.0},
    {'step': 20, 'kind': 'eval', 'loss': 9.0},
    {'step': 20, 'kind': 'train', 'loss': 2.5},  # again, after resuming
    {'step': 30, 'kind': 'train', 'loss': None},  # was not finite
  ]
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  file.write_text(text + '{"step": 40, "ki')
  assert curves.read(file) == ([10, 20], [3.0, 2.5])


@pytest.mark.parametrize(
  ('value', 'text'),
  [(512, '512 B'), (4096, '4 KiB'), (1.5 * 2**20, '1.5 MiB')],
)
def test_bytes_in_words(value, text):
  assert recall_state.in_bytes(value) == text


@pytest.fixture(scope='module')
def reported(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp('runs') / 'both'
  planned = cells.plan(config_of('quick'))
  records = ablate.ablate(planned, folder, console(), fit=fake_fit())
  report.write(folder, records, {'bytes': REFERENCES}, 'the command')
  return folder


def test_every_figure_is_there_and_drawn(reported):
  page = (reported / 'report.md').read_text()
  linked = re.findall(r'!\[.+\]\((.+)\)', page)
  assert sorted(linked) == sorted(p.name for p in reported.glob('*.png'))
  assert set(linked) == {
    'recall-mqar.png',
    'loss-mqar.png',
    'loss-bytes.png',
    'bits-per-byte-bytes.png',
  }
  for name in linked:
    image = matplotlib.image.imread(reported / name)
    assert min(image.shape[:2]) > 400
    shades = (255 * image[..., :3]).astype(int) @ (1, 256, 65536)
    colours = np.unique(shades)
    assert len(colours) > 50, f'{name} is blank'
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (border == 1).all(), f'{name} is cut off at its border'


def check_report(page: str) -> list[str]:
  """What a reader misses in a report."""
  wanted = (
    '`the command`',
    'One seed (0) and one learning rate (mqar 0.003; bytes 0.003)',
    report.CAVEAT,
    'chance 0.062, chance within a row 0.250',
    'uniform 8.000, unigram 4.600, 5-gram 1.900, xz -9 2.900',
    'jax 0',
    'python 3',
    'CPU',
    '% apart',
    'FLOPs per token',
    'results.jsonl',
    '| position | 0-32 |',
    *(f'| `{name}` |' for name in quickstart.get_config().mechanisms),
  )
  return [words for words in wanted if words not in page]


def test_report_says_how_it_was_made(reported, tmp_path):
  assert check_report((reported / 'report.md').read_text()) == []

  lines = (reported / 'results.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  (tmp_path / 'cells').symlink_to(reported / 'cells')
  # The mutant: a report without its references.
  page = report.write(tmp_path, records, {}, 'the command').read_text()
  assert check_report(page) == [
    'uniform 8.000, unigram 4.600, 5-gram 1.900, xz -9 2.900'
  ]


def test_references_are_computed_once(reported, monkeypatch, tmp_path):
  calls = []
  monkeypatch.setattr(
    ablate, 'simple_models', lambda task: calls.append(task) or REFERENCES
  )
  lines = (reported / 'results.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  for _ in range(2):
    assert ablate.references(records, tmp_path) == {'bytes': REFERENCES}
  assert len(calls) == 1


# -- the command ---------------------------------------------------------------

CONFIG = """
from configs import quickstart

def get_config(arg=''):
  config = quickstart.get_config('quick')
  config.name = 'tiny'
  del config.tasks['bytes']
  config.run.model.update(width=16, depth=1)
  config.mechanisms = {'multi_head': {'heads': 2}, 'delta_net': {'heads': 3}}
  config.tasks.mqar.update(steps=STEPS, log_every=5, checkpoint_every=5)
  return config
"""


def command(folder: Path, *flags: str) -> subprocess.Popen:
  return subprocess.Popen(
    [
      *(sys.executable, '-m', 'experiments.ablate'),
      *(f'--config={folder / "tiny.py"}', f'--runs={folder}', *flags),
    ],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONUNBUFFERED': '1'},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def test_killed_then_carried_on_then_skipped(tmp_path):
  steps = 400
  text = CONFIG.replace('STEPS', str(steps))
  (tmp_path / 'tiny.py').write_text(text)
  running = command(tmp_path)
  log, deadline = None, time.monotonic() + 120
  while not log and time.monotonic() < deadline and running.poll() is None:
    time.sleep(0.02)
    for file in tmp_path.glob('tiny/cells/*/metrics.jsonl'):
      kept = [p for p in file.parent.glob('checkpoints/*') if p.name.isdigit()]
      log = file if len(kept) >= 2 else None
  running.send_signal(signal.SIGKILL)
  output, _ = running.communicate(timeout=60)
  assert running.returncode == -signal.SIGKILL, output
  before = log.read_text().splitlines()[:2]
  assert curves.read(log)[0][-1] < steps

  # It fails for the mechanism whose heads do not divide the width, and finishes
  # the other from its checkpoint: what was logged before that stands unchanged,
  # seconds and all, which no second start would hit again.
  running = command(tmp_path)
  output, _ = running.communicate(timeout=120)
  assert running.returncode == 1, output
  assert 'FAILED mqar/delta_net: ' in output
  assert 'heads=3' in output
  assert curves.read(log)[0] == list(range(5, steps + 1, 5))
  assert log.read_text().splitlines()[:2] == before
  assert 'seconds' in before[0]
  assert 'One seed (0) and one learning rate' in output
  folder = tmp_path / 'tiny'
  assert (folder / 'recall-mqar.png').exists()
  assert 'heads=3' in (folder / 'report.md').read_text()
  (record,) = [
    json.loads(line)
    for line in (folder / 'results.jsonl').read_text().splitlines()
    if 'metrics' in json.loads(line)
  ]
  assert record['step'] == steps

  running = command(tmp_path, '--only=multi_head')
  output, _ = running.communicate(timeout=120)
  assert running.returncode == 0, output
  assert '1 of 2 cells are finished already.' in output
  assert 'starts' not in output
