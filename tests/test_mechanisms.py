"""Every law that a mechanism claims, for every mechanism.

A new file under `jaxattn/mechanisms` brings its tests with it. For one of them,
in the tree or outside of it:

    pytest --mechanism=gated_linear
    pytest --mechanism=path/to/my_mechanism.py
"""

import pytest

from jaxattn import registry
from jaxattn.spec import LAWS
from tests import laws

HERE = [law for law in LAWS if law != 'sharding']  # for that, test_sharding.py


@pytest.fixture(scope='module')
def subject(mechanism):
  name, example = mechanism
  module = registry.module(name)
  return laws.Subject(
    type(registry.make(name)), module, module.SPEC.examples[example]
  )


@pytest.mark.parametrize('law', HERE)
def test_law(law, subject):
  """A law that is claimed holds; one that is not has a reason (see Spec)."""
  if subject.spec.claim(law):
    getattr(laws, law)(subject)


def test_state_bytes(subject):
  laws.state_bytes(subject)
