"""Time over the devices of two processes: the comparisons of those of one.

Two processes of four simulated CPU devices each, which talk by gloo, run what
`test_parallel`, `test_prefix` and `test_tree` compare, for every case and every
strategy, with gradients. What one device finds is computed once, half of it by
each process. Left to one process are mechanisms, bfloat16, and what programs
say and send: those do not depend on who owns a device.
"""

import contextlib
import json
import math
import pathlib
import pickle
import time
from unittest import mock

import jax
import pytest
from absl import app, flags

from experiments import processes as together
from tests import test_parallel, test_prefix, test_tree
from tests.test_processes import launched

# Of each file, mistakes that are found between processes as well.
ATTENTION = ('one hop too few', 'heads of a neighbour')
PREFIXES = ('state of the one before', 'tail dropped in a dense row')
MEMORIES = ('partials not rescaled',)


@contextlib.contextmanager
def told(workdir, of, name, given):
  """Inside, a function of one device is not run, but known for what is given.

  A half of it is computed by each process, and told to the other.
  """
  me, find = jax.process_index(), getattr(of, name)
  file = lambda i: workdir / f'{of.__name__}-{i}'
  part = file(f'of-{me}')
  for i, own in enumerate(given):
    if i % jax.process_count() == me:
      part.write_bytes(pickle.dumps(find(*own)))
      part.rename(file(i))
  known = {}
  for i, own in enumerate(given):
    while not file(i).exists():  # no collective is so patient
      time.sleep(0.01)
    known[own] = pickle.loads(file(i).read_bytes())
  with mock.patch.object(of, name, lambda *own: known[own]):
    yield


def attention(workdir):
  """Case -> strategy -> what is wrong; and of mutants."""
  given = [(case, None) for case in test_parallel.CASES]
  mesh = jax.make_mesh(
    (jax.device_count(),), (test_parallel.AT,), axis_types=test_parallel.AUTO
  )
  told_all = told(workdir, test_parallel, 'expected', given)
  # The numbers of one process do not err more than one device does (which is
  # for `test_parallel` to say), and these are as right.
  rule = {'weights': (1.0,), 'growth': math.inf}
  with told_all, jax.set_mesh(mesh):
    found = {
      case: test_parallel.compare(case, test_parallel.overs(case), **rule)
      for case in test_parallel.CASES
    }
    wrong = {name: test_parallel.rejected(name, **rule) for name in ATTENTION}
  return found, wrong


def prefixes(workdir):
  """Engine -> what is wrong, or None; and of mutants."""
  given = [*test_prefix.compared()]
  with told(workdir, test_prefix, 'on_one', given):
    found = {str(x): test_prefix.wrong(test_prefix.agree, *x) for x in given}
    return found, {name: test_prefix.rejected(name) for name in PREFIXES}


def memories(workdir):
  """Case -> what is wrong; and of mutants."""
  given = [(case,) for case in test_tree.CASES]
  with told(workdir, test_tree, 'expected', given):
    found = {case: test_tree.compare(case) for case in test_tree.CASES}
    return found, {name: test_tree.rejected(name) for name in MEMORIES}


PARTS = (attention, prefixes, memories)


def main(_):
  workdir = pathlib.Path(flags.FLAGS.workdir)
  with together.connected():
    found = {'devices': [jax.local_device_count(), jax.device_count()]}
    for part in PARTS:
      began = time.monotonic(), time.process_time()
      found[part.__name__] = part(workdir)
      took = time.monotonic() - began[0], time.process_time() - began[1]
      print(part.__name__, '{:.0f} s, of a processor {:.0f}'.format(*took))
    name = f'found-{jax.process_index()}.json'
    (workdir / name).write_text(json.dumps(found))


# ------------------------------------------------------------------------ tests


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  """What each of the processes found."""
  workdir = tmp_path_factory.mktemp('time')
  ran = launched(workdir, module='tests.test_time_over_processes')
  assert ran.returncode == 0, ran.stderr
  read = lambda i: json.loads((workdir / f'found-{i}.json').read_text())
  return [read(0), read(1)]


def test_they_have_half_of_the_devices(found):
  assert [here['devices'] for here in found] == [[4, 8]] * 2


@pytest.mark.parametrize('case', test_parallel.CASES)
def test_attention(case, found):
  for here in found:
    strategies = here['attention'][0][case]
    assert set(strategies) == set(test_parallel.overs(case))
    assert {name: x for name, x in strategies.items() if x} == {}


def test_recurrences_and_convolutions(found):
  for here in found:
    engines = here['prefixes'][0]
    assert set(engines) == {str(x) for x in test_prefix.compared()}
    assert {name: x for name, x in engines.items() if x} == {}


@pytest.mark.parametrize('case', test_tree.CASES)
def test_a_memory_in_parts(case, found):
  for here in found:
    assert here['memories'][0][case] == []


@pytest.mark.parametrize('part', ['attention', 'prefixes', 'memories'])
def test_mutants_are_rejected(part, found):
  for here in found:
    assert here[part][1]
    assert all(here[part][1].values())


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'where all is')
  together.define()
  app.run(main)
