"""The shape of the code: who imports whom, and how long files are."""

import ast
import pathlib

import pytest

from jaxattn import registry

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = sorted(
  path.relative_to(ROOT)
  for top in ('jaxattn', 'pallas_kernels', 'experiments', 'configs')
  for path in (ROOT / top).rglob('*.py')
)

# Downwards only. A package may import itself and what is listed for it.
GROUND = {
  'jaxattn.typing',
  'jaxattn.packing',
  'jaxattn.state',
  'jaxattn.spec',
  'jaxattn.nn',
  'jaxattn.mixer',
  'jaxattn.registry',
  'jaxattn.core',
  'jaxattn.parallel',
  'jaxattn.position',
  'jaxattn.positions',
}
MAY_IMPORT = {
  'jaxattn.typing': set(),
  'jaxattn.spec': set(),
  'jaxattn.core': {'pallas_kernels'},
  'jaxattn.packing': {'jaxattn.typing'},
  'jaxattn.state': {'jaxattn.typing', 'jaxattn.packing'},
  'jaxattn.parallel': {'jaxattn.typing', 'jaxattn.core', 'pallas_kernels'},
  'jaxattn.nn': {
    'jaxattn.typing',
    'jaxattn.packing',
    'jaxattn.parallel',
    'pallas_kernels',
  },
  'jaxattn.position': {
    'jaxattn.typing',
    'jaxattn.core',
    'jaxattn.nn',
    'pallas_kernels',
  },
  'jaxattn.positions': {
    'jaxattn.position',
    'jaxattn.core',
    'jaxattn.parallel',
    'jaxattn.typing',
    'pallas_kernels',
  },
  # The registry reaches mechanisms by name, at run time.
  'jaxattn.registry': {
    'jaxattn.spec',
    'jaxattn.mechanisms',
    'jaxattn.positions',
  },
  'jaxattn.mixer': GROUND - {'jaxattn.registry', 'jaxattn.positions'},
  'jaxattn.mechanisms': GROUND | {'pallas_kernels'},
  'jaxattn.models': GROUND,
  'jaxattn.tasks': GROUND,
  'jaxattn.analysis': GROUND | {'jaxattn.models'},
  'jaxattn.decode': GROUND | {'jaxattn.models'},
  'jaxattn.train': GROUND | {'jaxattn.models', 'jaxattn.tasks'},
  'pallas_kernels': set(),
}
NO_FLAX = ('jaxattn.core', 'jaxattn.parallel', 'pallas_kernels')
TOOLS_ONLY = {'ml_collections', 'absl.app', 'absl.flags', 'rich'}


def dotted(path: pathlib.Path) -> str:
  return '.'.join(path.with_suffix('').parts).removesuffix('.__init__')


def package(module: str) -> str:
  """The entry of MAY_IMPORT that a module belongs to."""
  return '.'.join(module.split('.')[: 1 if module[0] == 'p' else 2])


def imports(source: str) -> list[str]:
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found += [name.name for name in node.names]
    elif isinstance(node, ast.ImportFrom):
      found += [f'{node.module}.{name.name}' for name in node.names]
  return found


def trespasses(module: str, source: str) -> list[str]:
  """The imports of a module that the order of layers forbids."""
  own = package(module)
  if own not in MAY_IMPORT:
    return []
  allowed = MAY_IMPORT[own] | {own}
  bad = []
  for name in imports(source):
    top = name.split('.')[0]
    ours = top in ('jaxattn', 'pallas_kernels', 'experiments', 'configs')
    # `from jaxattn import registry` imports a module, not the package's face.
    if ours and package(name) not in allowed:
      bad.append(name)
    if top == 'flax' and own in NO_FLAX:
      bad.append(name)
    if any((name + '.').startswith(tool + '.') for tool in TOOLS_ONLY):
      bad.append(name)
    if own == 'jaxattn.mechanisms' and package(name) == own:
      bad.append(name)  # what two mechanisms need moves into core
  return bad


@pytest.mark.parametrize('path', FILES, ids=str)
def test_imports_go_down(path):
  module = dotted(path)
  if module == 'jaxattn':  # the face shows what the layers hold
    return
  assert not trespasses(module, (ROOT / path).read_text())


@pytest.mark.parametrize(
  ('module', 'source'),
  [
    ('jaxattn.core.softmax', 'import flax.linen as nn'),
    ('pallas_kernels.flash.xla', 'from jaxattn.core import rope'),
    ('jaxattn.core.softmax', 'from jaxattn import nn'),
    ('jaxattn.mechanisms.ssm.s4d', 'from jaxattn.models.lm import LM'),
    (
      'jaxattn.mechanisms.ssm.s4d',
      'from jaxattn.mechanisms.softmax import multi_head',
    ),
    ('jaxattn.train.loop', 'import ml_collections'),
    ('jaxattn.tasks.mqar', 'from jaxattn.train import loop'),
    ('jaxattn.models.lm', 'from experiments import train'),
  ],
)
def test_a_trespass_is_seen(module, source):
  assert trespasses(module, source)


def limit(path: pathlib.Path) -> int:
  if path.parts[:2] == ('jaxattn', 'mechanisms'):
    return 250
  return 900 if path.parts[0] == 'pallas_kernels' else 500


@pytest.mark.parametrize('path', FILES, ids=str)
def test_files_stay_short(path):
  lines = (ROOT / path).read_text().count('\n')
  assert lines <= limit(path), f'{lines} lines, at most {limit(path)}'


@pytest.mark.parametrize('path', FILES, ids=str)
def test_every_file_says_what_it_is(path):
  tree = ast.parse((ROOT / path).read_text())
  if tree.body:
    assert ast.get_docstring(tree), f'{path} has no docstring'


def test_families_hold_no_code():
  for path in (ROOT / 'jaxattn' / 'mechanisms').rglob('__init__.py'):
    assert not path.read_text().strip(), path


@pytest.mark.parametrize('name', registry.names())
def test_mechanisms_read_alike(name):
  """Docstring, reference, attend or mix, the module, SPEC: in this order."""
  module = registry.module(name)
  tree = ast.parse(pathlib.Path(module.__file__).read_text())
  order = {}
  for i, node in enumerate(tree.body):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      order[node.name] = i
    elif isinstance(node, ast.Assign):
      order[node.targets[0].id] = i
  kind = type(registry.make(name)).__name__
  places = [order[part] for part in ('reference', 'attend', kind, 'SPEC')]
  assert places == sorted(places)
  assert module.SPEC.link in module.__doc__
  own = set(type(registry.make(name)).__dataclass_fields__)
  shared = {'width', 'policy', 'parent', 'name'}
  assert len(own - shared) <= 10
