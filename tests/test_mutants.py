"""Every law rejects mixers that break it, and only a broken one."""

import pytest

from jaxattn import registry
from jaxattn.spec import LAWS
from tests import laws, mutants

CASES = [
  pytest.param(law, mutant, id=f'{law}-{mutant.__name__}')
  for law, broken in mutants.MUTANTS.items()
  for mutant in broken
  if law != 'sharding'  # for that, test_sharding.py
]


def test_every_law_has_a_mutant():
  assert set(mutants.MUTANTS) == {*LAWS, 'state_bytes'}


@pytest.mark.parametrize(('law', 'mutant'), CASES)
def test_rejected(law, mutant):
  subject = mutants.subject(mutant)
  with pytest.raises(AssertionError) as rejected:
    getattr(laws, law)(subject)
  # By the law, not by an accident on the way to it.
  assert rejected.traceback[-1].path.name == 'laws.py'


def test_a_sound_subclass_passes():
  """What rejects the mutants is the mistake, not that they are subclasses."""

  class Sound(mutants.GATED):
    pass

  module = registry.module('gated_linear')
  fields = mutants.FIELDS[mutants.GATED]
  laws.batch(laws.Subject(Sound, module, fields))
