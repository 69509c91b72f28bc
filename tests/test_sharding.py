"""Time over eight devices equals time on one, for every mechanism.

A process chooses once how many devices it simulates. So all of it runs in one
process of its own: this file as a program, which prints what it found.
"""

import json
import sys

import pytest

from jaxattn import registry
from tests import devices, laws, mutants
from tests.conftest import module_name


def subjects(names):
  """Case -> how to make its subject; mutants, if no names are given."""
  for name in names:
    module = registry.module(module_name(name))
    cls = type(registry.make(module_name(name)))
    for i, fields in enumerate(module.SPEC.examples):
      if module.SPEC.claim('sharding'):
        yield (
          f'{name}-{i}',
          lambda c=cls, m=module, f=fields: laws.Subject(c, m, f),
        )
  if not names:
    for mutant in mutants.MUTANTS['sharding']:
      yield mutant.__name__, lambda mutant=mutant: mutants.subject(mutant)


def main(names):
  """Prints case -> what the law found wrong, or None."""
  found = {}
  for case, make in subjects(names):
    try:
      found[case] = laws.sharding(make())
    except Exception as error:
      found[case] = f'{type(error).__name__}: {error}'[:1000]
  print(json.dumps(found))


def run(names):
  return json.loads(devices.run('-m', 'tests.test_sharding', *names))


@pytest.fixture(scope='module')
def found(request):
  """What the law says of every mechanism asked for."""
  return run(request.config.getoption('--mechanism') or registry.names())


def test_law(mechanism, found, request):
  name, example = mechanism
  if not registry.spec(name).claim('sharding'):
    return
  asked = request.config.getoption('--mechanism')
  case = next((path for path in asked if module_name(path) == name), name)
  assert found[f'{case}-{example}'] is None


def test_mutants_are_rejected():
  found = run([])
  assert set(found) == {m.__name__ for m in mutants.MUTANTS['sharding']}
  for name, wrong in found.items():
    assert wrong, name
    assert wrong.startswith('AssertionError'), wrong


if __name__ == '__main__':
  main(sys.argv[1:])
