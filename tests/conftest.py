"""Shared by all tests: the mechanisms to test, and a compilation cache."""

import importlib.util
import os
import pathlib
import re
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxattn import registry
from pallas_kernels import chips
from tests import devices

# Most of the time of these tests is compilation of programs that run for
# milliseconds. Without LLVM's optimisations, and with the older of two ways to
# write a fused loop where XLA still has it, this takes a third of the processor
# time; XLA's own passes all stay.
FLAGS = ['--xla_backend_optimization_level=0']
if jax.__version_info__ < (0, 11):
  FLAGS.append('--xla_cpu_use_fusion_emitters=false')
os.environ['XLA_FLAGS'] = ' '.join([*FLAGS, os.environ.get('XLA_FLAGS', '')])

jax.config.update('jax_compilation_cache_dir', devices.CACHE)
jax.config.update('jax_persistent_cache_min_compile_time_secs', devices.KEPT)


def pytest_addoption(parser):
  parser.addoption(
    '--mechanism',
    action='append',
    default=[],
    metavar='NAME',
    help='run the laws on this mechanism alone: a name, the dotted path of a '
    'module, or the path of a file outside the tree; may be given repeatedly',
  )


def module_name(name: str) -> str:
  """A path as a module that the registry can import by name."""
  path = pathlib.Path(name)
  if path.suffix != '.py':
    return name
  if not path.exists():
    raise pytest.UsageError(f'--mechanism={name}: there is no such file')
  name = f'outside.{path.stem}'  # dotted, as modules outside the tree are
  if name in sys.modules:
    return name
  spec = importlib.util.spec_from_file_location(name, path)
  sys.modules[name] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(sys.modules[name])
  return name


def pytest_generate_tests(metafunc):
  """A test that takes `mechanism` runs on every example of every mechanism."""
  if 'mechanism' not in metafunc.fixturenames:
    return
  asked = metafunc.config.getoption('--mechanism')
  names = [module_name(name) for name in asked] or registry.names()
  cases = [
    pytest.param((name, i), id=f'{name}-{i}')
    for name in names
    for i in range(len(registry.spec(name).examples))
  ]
  metafunc.parametrize('mechanism', cases, scope='module')


@pytest.fixture
def compiler(request):
  """For tests with the mark `aot`: with JAXATTN_AOT=1 a skip is a failure.

  It is that for TPUs, or for the chip that the fixture is parametrized with.
  What they compile no cache keeps: without the chips it could not be read.
  """
  if why := chips.missing(getattr(request, 'param', 'v5e')):
    if os.environ.get('JAXATTN_AOT') == '1':
      pytest.fail(why)
    pytest.skip(why)
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()  # it asks once whether it is wanted
  yield
  jax.config.update('jax_enable_compilation_cache', True)
  compilation_cache.reset_cache()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Tests that share what takes long to make go to one process.

  Those of a file, or of a mechanism's laws; in the order of collection.
  """
  from xdist.scheduler import LoadScopeScheduling

  config.option.loadscopereorder = False

  class Together(LoadScopeScheduling):
    def _split_scope(self, nodeid):
      file, _, rest = nodeid.partition('::')
      mechanism = re.search(r'\[(\w+)-\d+', rest)
      laws = file.endswith('test_mechanisms.py')
      return f'{file}-{mechanism[1]}' if laws and mechanism else file

  return Together(config, log)


# What takes longest comes first: else one process is left with it at the end.
LONG = (
  *('train_mesh', 'parallel', 'sharding', 'time_over_processes'),
  *('flash_matrix', 'long_context', 'flash_tpu', 'processes', 'prefix'),
  *('flash_gpu', 'tree', 'flash', 'tasks_in_context', 'ablate', 'train'),
  *('long_range', 'filled', 'flash_features', 'tensor', 'models'),
)


def pytest_collection_modifyitems(config, items):
  """The longest first; with --mechanism, only the tests of mechanisms."""
  place = {f'test_{name}': i for i, name in enumerate(LONG)}
  items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
  if config.getoption('--mechanism'):
    kept = [item for item in items if 'mechanism' in item.fixturenames]
    config.hook.pytest_deselected(
      items=[item for item in items if item not in kept]
    )
    items[:] = kept
