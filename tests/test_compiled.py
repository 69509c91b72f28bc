"""Where compiled programs stay, and which do not."""

import pytest

from tests import devices

PROGRAM = """
import jax
from experiments import compiled
jax.config.update('jax_enable_compilation_cache', True)
compiled.keep()
print(jax.config.jax_enable_compilation_cache)
"""


@pytest.mark.parametrize('count', [1, 2])
def test_those_for_several_cpu_devices_are_not_kept(count):
  kept = devices.run('-c', PROGRAM, devices=count).strip()
  assert kept == str(count == 1)
