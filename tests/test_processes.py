"""Training with two processes equals training with one.

Two processes of four simulated CPU devices each, which talk by gloo, are
started by the launcher; this file is the program that they run. What they
found, and what one process with one device did, is compared here.
"""

import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app, flags

from experiments import processes as together
from experiments.pod import local
from jaxattn.parallel import mesh as meshes
from jaxattn.parallel import place, processes
from jaxattn.tasks.mqar import MQAR
from jaxattn.train import build, checkpoint, log, loop, step
from tests import devices, test_train_mesh
from tests.test_train_mesh import CONFIG

TIMEOUT = 5  # seconds
STEPS = 5
RUN = CONFIG | {'log_every': 1, 'eval_every': 2, 'checkpoint_every': 2}
BOTH = 'multi_head gated_linear'
# mixers, what `meshes.make` takes, and a strategy.
MESHES = {
  'data': (BOTH, {}, None),
  'data and time': (BOTH, {'seq': 4}, None),
  'time': ('multi_head', {'seq': 8}, 'ring'),
  'time, auto': (BOTH, {'seq': 8, 'axis_types': 'auto'}, None),
}


# --------------------------------------------------------- what processes do


def trained(name, mesh):
  mixer, _, strategy = MESHES[name]
  config = CONFIG | {'policy': {'strategy': strategy}}
  # Adam begins with the signs of gradients, which round either way about 0: by
  # this they count by their size there.
  config |= {'optimizer': CONFIG['optimizer'] | {'options': {'eps': 0.1}}}
  with mock.patch.object(test_train_mesh, 'CONFIG', config):
    return test_train_mesh.over(mesh, mixer)


def one(workdir):
  """What one process with one device has to say."""
  mesh, known = meshes.make(), {}
  for name, (mixer, _, _) in MESHES.items():  # the same model comes again
    if mixer not in known:
      known[mixer] = trained(name, mesh)
  found = {
    'trained': {name: known[mixer] for name, (mixer, *_) in MESHES.items()}
  }
  found['fit'] = loop.fit(RUN, workdir / 'unbroken')
  found['resumed'] = loop.fit(RUN, workdir / 'copy')
  return found


def dies(workdir):
  """A run in which process 1 is killed after the first checkpoint."""

  def progress(done, steps, numbers):
    if done == 3 and jax.process_index() == 1:
      while not (workdir / 'run/checkpoints/2').exists():
        time.sleep(0.01)
      print('the last words of process 1', flush=True)
      os.kill(os.getpid(), signal.SIGKILL)

  loop.fit(RUN, workdir / 'run', progress=progress)


def first_dies(workdir):
  """Process 0 is killed, which all others look to."""
  processes.agreed(lambda: 0)  # now all are there
  if processes.first():
    print('the last words of process 0', flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
  processes.agreed(lambda: 0)


class Recorded(MQAR):
  """Remembers which rows it was asked for."""

  asked = []  # noqa: RUF012

  def batch(self, split, step, rows):
    Recorded.asked.append(sorted(map(int, rows)))
    return super().batch(split, step, rows)


def fed(axes):
  """Rows that this process made, and what its devices hold of a batch."""
  mesh = meshes.make(**axes)
  task = Recorded(vocab=64, length=16, pairs=2, test_rows=24)
  feed = step.Feed(task, 16, 2, mesh)
  Recorded.asked.clear()
  batches = {'train': feed.train(3), 'test': feed.test(1)}
  made = list(Recorded.asked)
  right = True
  for split, batch in batches.items():
    at, rows = (
      (3, np.arange(16)) if split == 'train' else (0, np.arange(16, 32))
    )
    whole = task.batch(split, at, np.minimum(rows, 23))
    weights = np.where(rows[:, None] < 24, whole.weights, 0)
    for many, alone in (
      (batch.inputs, whole.inputs),
      (batch.targets, whole.targets),
      (batch.weights, weights),
    ):
      alone = alone.reshape(2, 8, 16)
      for shard in many.addressable_shards:
        right &= np.array_equal(shard.data, alone[shard.index])
  held = [
    shard.data.size for shard in batches['train'].inputs.addressable_shards
  ]
  return {'made': made, 'held': held, 'right': bool(right)}


def all_rows(feed):
  return np.arange(feed.batch).reshape(feed.accumulate, feed.rows)


def feeds():
  found = {name: fed(axes) for name, (_, axes, _) in MESHES.items()}
  with mock.patch.object(step.Feed, '_mine', all_rows):
    found['mutant: all rows'] = fed({})
  with mock.patch.object(
    place, 'tokens', lambda rows, _, mesh: place.batch(rows, mesh)
  ):
    found['mutant: all of time'] = fed({'seq': 8})
  return found


def state(value):
  """A state of which each process holds a half."""
  mesh = meshes.make()
  parts = jax.NamedSharding(mesh, jax.P(meshes.DATA))
  whole = jax.NamedSharding(mesh, jax.P())
  place = lambda x, where: jax.make_array_from_callback(
    x.shape, where, lambda index: x[index]
  )
  draw = np.random.default_rng(value).normal(size=(64, 64))
  return step.TrainState(
    step=place(np.int32(value), whole),
    params={'w': place(draw.astype(np.float32), parts)},
    stats={},
    opt_state={},
    stopped_at=place(np.int32(-1), whole),
  )


def damaged(workdir):
  """What is restored if process 1 cannot read its part of the newest."""
  store = checkpoint.Store(workdir)
  for value in (1, 2):
    store.save(value, state(value))
  store.close()

  def harm():
    folder = workdir / 'checkpoints/2/variables/ocdbt.process_1/d'
    for file in folder.iterdir():
      file.write_bytes(file.read_bytes()[:100])

  processes.agreed(harm)
  store = checkpoint.Store(workdir)
  newest = store.newest(jax.tree.map(lambda x: x, state(0)))
  notes = store.notes
  store.close()
  same = jnp.array_equal(newest.params['w'], state(1).params['w'])
  return {
    'step': int(newest.step),
    'same': bool(same),
    'notes': notes,
    'aside': sorted(p.name for p in (workdir / 'damaged').iterdir()),
  }


def refused(workdir, **change):
  """What `claim` says to a configuration."""
  config = build.complete(RUN | change)
  try:
    checkpoint.claim(workdir, config, build.build(config)[0])
  except ValueError as error:
    return str(error)
  return None


def both(workdir):
  """What two processes have to say."""
  me = jax.process_index()
  found = {
    'agreed': processes.agreed(lambda: [me, 'x' * 10_000]),
    'feeds': feeds(),
    'claimed': [
      refused(workdir / 'claim', seed=1),
      refused(workdir / 'claim', seed=2),
      refused(workdir / 'claim', seed=1, batch=16 * (1 + me)),
    ],
    'damaged': damaged(workdir / 'damaged'),
    'fit': loop.fit(RUN, workdir / 'run'),
  }
  found['trained'] = {
    name: trained(name, meshes.make(**axes))
    for name, (_, axes, _) in MESHES.items()
  }
  return found


def main(argv):
  workdir = pathlib.Path(flags.FLAGS.workdir)
  with together.connected():
    runs = {'one': one, 'dies': dies, 'first_dies': first_dies, 'both': both}
    found = runs[argv[1]](workdir)
    name = f'{argv[1]}-{jax.process_index()}.json'
    (workdir / name).write_text(json.dumps(found))


# ----------------------------------------------------------------------- tests


def launched(workdir, *args, module='tests.test_processes', timeout=100):
  """The launcher's exit status and what it printed."""
  return subprocess.run(
    [
      *(sys.executable, '-m', 'experiments.pod.local'),
      *(f'--module={module}', f'--timeout={timeout}'),
      *('--', f'--workdir={workdir}', *args),
    ],
    cwd=devices.ROOT,
    capture_output=True,
    text=True,
  )


@pytest.fixture(scope='module')
def killed(tmp_path_factory):
  """A folder in which a run's process 1 was killed, and what was said."""
  workdir = tmp_path_factory.mktemp('processes')
  ran = launched(workdir, 'dies', timeout=TIMEOUT)
  assert ran.returncode == 1, ran.stderr
  shutil.copytree(workdir / 'run', workdir / 'copy')
  return workdir, ran


@pytest.fixture(scope='module')
def found(killed):
  workdir, _ = killed
  ran = launched(workdir, 'both')
  assert ran.returncode == 0, ran.stderr
  devices.run(
    *('-m', 'tests.test_processes', 'one', f'--workdir={workdir}'), devices=1
  )
  read = lambda name: json.loads((workdir / name).read_text())
  return {
    'workdir': workdir,
    'one': read('one-0.json'),
    'both': [read('both-0.json'), read('both-1.json')],
  }


@pytest.mark.parametrize('name', MESHES)
def test_losses_and_scores_are_those_of_one(found, name):
  alone = found['one']['trained'][name]
  assert len(set(alone['losses'])) == STEPS
  for here in found['both']:
    many = here['trained'][name]
    np.testing.assert_allclose(many['losses'], alone['losses'], rtol=1e-5)
    assert many['grad_norm'] == pytest.approx(alone['grad_norm'], rel=1e-3)
    for score, pair in alone['scores'].items():
      np.testing.assert_allclose(many['scores'][score], pair, rtol=1e-4)
    assert many['compiled'] == 1
    even = name == 'time'
    assert many['layout'] == ('zigzag' if even else 'contiguous')


def own(feed, process, name):
  """Whether a process made its own rows alone, and holds its part alone."""
  half = np.concatenate([np.arange(4), 8 + np.arange(4)]) + 4 * process
  mine = np.arange(16) if name.startswith('time') else half
  made = [[*mine], sorted(np.minimum(16 + mine, 23))]
  return feed['made'] == made and feed['held'] == [256 // 8] * 4


@pytest.mark.parametrize('name', MESHES)
def test_each_makes_its_own_rows_and_holds_its_part(found, name):
  for process, here in enumerate(found['both']):
    assert here['feeds'][name]['right']
    assert own(here['feeds'][name], process, name)


@pytest.mark.parametrize(
  ('mutant', 'name'),
  [('mutant: all rows', 'data'), ('mutant: all of time', 'time')],
)
def test_who_makes_or_holds_more_is_seen(found, mutant, name):
  for process, here in enumerate(found['both']):
    assert here['feeds'][mutant]['right']
    assert not own(here['feeds'][mutant], process, name)


def test_what_the_first_says_is_agreed(found):
  for here in found['both']:
    assert here['agreed'] == [0, 'x' * 10_000]


def test_all_refuse_a_folder_and_one_another_run(found):
  first, second = (here['claimed'] for here in found['both'])
  assert first[0] is second[0] is None
  assert 'seed was 1 and is 2' in first[1]
  assert first[1] == second[1]
  assert first[2] is None
  assert 'process 1 was given another run' in second[2]
  assert 'batch is 32 here and 16 there' in second[2]


def test_what_one_cannot_read_none_restores(found):
  for here in found['both']:
    assert here['damaged']['step'] == 1
    assert here['damaged']['same']
    assert here['damaged']['aside'] == ['2']
    assert 'checkpoint 2 is damaged' in here['damaged']['notes'][0]


def test_a_death_is_explained(killed):
  workdir, ran = killed
  assert ran.returncode == 1
  assert 'process 1 was ended by SIGKILL' in ran.stderr
  assert '| the last words of process 1\n' in ran.stderr
  after = re.search(r'process 0 was ended by SIGABRT, (.*) s later', ran.stderr)
  assert float(after[1]) <= 2 * TIMEOUT
  assert 'the same command carries on from the last checkpoint' in ran.stderr
  assert 'last words' not in ran.stdout
  assert (workdir / 'logs/process-0.log').exists()


def test_a_death_of_the_first_is_explained(tmp_path):
  ran = launched(tmp_path, 'first_dies', timeout=TIMEOUT)
  assert ran.returncode == 1
  assert 'process 0 was ended by SIGKILL' in ran.stderr
  assert '| the last words of process 0\n' in ran.stderr
  after = re.search(r'process 1 .*ended .*, (.*) s later', ran.stderr)
  assert float(after[1]) <= 2 * TIMEOUT


def carried_on(found, result, folder):
  """A run that was broken ends as one that never was."""
  plain = found['one']['fit']
  for key in ('metrics', 'best', 'train_loss'):
    assert result[key] == pytest.approx(plain[key], rel=1e-4)
  assert result['step'] == STEPS
  read = lambda name: log.read(found['workdir'] / name / 'metrics.jsonl')
  many, alone = read(folder), read('unbroken')
  assert [(r['step'], r['kind']) for r in many] == [
    (r['step'], r['kind']) for r in alone
  ]
  losses = lambda records: [record['loss'] for record in records]
  np.testing.assert_allclose(losses(many), losses(alone), rtol=1e-5)


def test_the_same_command_carries_on(found):
  first, second = (here['fit'] for here in found['both'])
  assert first == second
  written = (found['workdir'] / 'run/result.json').read_text()
  assert first == json.loads(written)
  carried_on(found, first, 'run')


def test_one_carries_on_what_two_began(found):
  result = found['one']['resumed']
  carried_on(found, result, 'copy')
  assert any('devices was 8' in note for note in result['notes'])
  assert not any('damaged' in note for note in result['notes'])


def test_the_first_alone_is_on_the_screen(found, tmp_path):
  """experiments.train, on a run that is finished."""
  config = tmp_path / 'config.py'
  config.write_text(
    'from ml_collections import ConfigDict\n'
    f'get_config = lambda: ConfigDict({RUN!r})\n'
  )
  shutil.copytree(found['workdir'] / 'run', tmp_path / 'run')
  ran = launched(
    tmp_path / 'run', f'--config={config}', module='experiments.train'
  )
  assert ran.returncode == 0, ran.stderr
  assert ran.stdout.count('loss in training') == 1
  assert 'Gloo' not in ran.stdout
  second = (tmp_path / 'run/logs/process-1.log').read_text()
  assert 'Gloo' in second
  assert 'loss in training' not in second


# ---------------------------------------------------------------- the launcher

HOLDS = (
  'import fcntl, sys, time; file = open(sys.argv[1], "w");'
  'fcntl.flock(file, fcntl.LOCK_EX); time.sleep(60)'
)


WATCHED = (
  'import json, pathlib, sys; from experiments.pod import local;'
  'commands, logs = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]);'
  'sys.exit(local.watched(commands, logs, 5))'
)


def waits(until, seconds=20.0):
  began = time.monotonic()
  while not until():
    assert time.monotonic() - began < seconds
    time.sleep(0.02)


def free(path):
  with open(path, 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return False
    return True


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGKILL'])
def test_all_end_with_the_launcher(tmp_path, name):
  """Even with one that had no time to do anything about it."""
  locks = [str(tmp_path / f'lock-{i}') for i in range(2)]
  commands = [[sys.executable, '-c', HOLDS, lock] for lock in locks]
  with subprocess.Popen(
    [sys.executable, '-c', WATCHED, json.dumps(commands), str(tmp_path)],
    cwd=devices.ROOT,
    stdout=subprocess.PIPE,
    text=True,
  ) as launcher:
    waits(lambda: not any(map(free, locks)))
    launcher.send_signal(signal.Signals[name])
    said, _ = launcher.communicate(timeout=60)
  waits(lambda: all(map(free, locks)))
  if name != 'SIGKILL':
    assert launcher.returncode == 130
    assert 'carries on from the last checkpoint' in said


def test_who_does_not_follow_is_killed(tmp_path, capfd):
  begins = 'import os, sys, time; print("working", flush=True)\n'
  ends = (
    'time.sleep(60)',
    'while not os.path.getsize(sys.argv[1]): time.sleep(0.02)\n'
    'sys.exit("error: out of luck")',
  )
  other = str(tmp_path / 'process-0.log')
  commands = [[sys.executable, '-c', begins + end, other] for end in ends]
  (tmp_path / 'process-1.log').write_text('words of an earlier run\n')
  began = time.monotonic()
  assert local.run(commands, tmp_path, timeout=0.5) == 1
  assert time.monotonic() - began < 20
  out, err = capfd.readouterr()
  assert out == 'working\n'
  assert 'process 1 ended with exit status 1' in err
  assert '  | working\n  | error: out of luck\n' in err
  assert 'earlier run' not in err
  assert 'process 0 still ran after twice the timeout, and was killed' in err


def test_work_that_is_done_is_no_death(tmp_path, capfd):
  commands = [[sys.executable, '-c', f'print({i})'] for i in range(2)]
  assert local.run(commands, tmp_path, timeout=0.5) == 0
  assert capfd.readouterr() == ('0\n', '')


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['--', '--config=x'], '--workdir'),
    (['--devices=0', '--', '--workdir=x'], 'at least 1'),
  ],
)
def test_a_bad_command_says_what_is_wrong(argv, message):
  with pytest.raises(SystemExit, match=message):
    local.main(argv)


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['--coordinator=here:1', '--processes=2'], 'go together'),
    (['--process=0'], 'go together'),
    (
      ['--coordinator=here:1', '--processes=2', '--process=2'],
      'counts from 0',
    ),
  ],
)
def test_bad_flags_say_what_is_wrong(argv, message):
  values = flags.FlagValues()
  together.define(values)
  with pytest.raises(flags.Error, match=message):
    values(['program', *argv])


LEAVES = """
import atexit, sys, types
import jax
from experiments import processes
jax.distributed.initialize = lambda *args, **flags: None
atexit.register(print, 'waits for the others')
values = types.SimpleNamespace(distributed=True, coordinator=None)
values.processes = values.process = None
values.timeout = 1
with processes.connected(values):
  print('works')
  """


@pytest.mark.parametrize(
  ('end', 'status', 'said'),
  [
    ('sys.exit("error: out of luck")', 1, 'error: out of luck\n'),
    ('sys.exit(130)', 130, ''),
    ('{}["luck"]', 1, "KeyError: 'luck'\n"),
    ('sys.exit()', 0, ''),
  ],
)
def test_who_fails_waits_for_nobody(end, status, said):
  ran = subprocess.run(
    [sys.executable, '-c', LEAVES + end],
    cwd=devices.ROOT,
    capture_output=True,
    text=True,
  )
  assert ran.returncode == status
  assert ran.stderr.endswith(said)
  assert ran.stdout.startswith('works\n')
  assert ('waits for the others' in ran.stdout) == (status == 0)


def test_flags_that_go_together():
  values = flags.FlagValues()
  together.define(values)
  values(['program'])
  assert not values.distributed
  with together.connected(values):
    assert not jax.distributed.is_initialized()
  values(['program', '--coordinator=here:1', '--processes=2', '--process=1'])
  assert values.timeout == 100


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'where all is')
  together.define()
  app.run(main)
