"""Finds mechanisms and positions: each is a file, named after its paper.

There is no list to add to. A file `jaxattn/mechanisms/<family>/<name>.py` is
the mechanism `<name>`; its class has the same name in CamelCase, and its claims
are `SPEC`. A dotted name (`mypackage.file`) is a file outside the tree.
"""

import dataclasses
import difflib
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jaxattn.mechanisms
import jaxattn.positions
from jaxattn.spec import Spec


@functools.cache
def _files(package: ModuleType) -> dict[str, str]:
  """File name -> dotted path, for every file below a package."""
  found = {}
  for entry in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):
    if not entry.ispkg:
      found[entry.name.rpartition('.')[2]] = entry.name
  return dict(sorted(found.items()))


def did_you_mean(word: str, known) -> str:
  """' Did you mean ...?' or a list of what there is, for error messages."""
  known = sorted(known)
  near = difflib.get_close_matches(str(word), known, n=3, cutoff=0.5)
  if near:
    return f' Did you mean {" or ".join(near)}?'
  return f' There are: {", ".join(known)}.'


def _find(package: ModuleType, kind: str, name: str) -> ModuleType:
  if not isinstance(name, str):
    raise ValueError(f'a {kind} is named by a string, not {name!r}')
  files = _files(package)
  if name in files:
    return importlib.import_module(files[name])
  if '.' in name:
    try:
      return importlib.import_module(name)
    except ModuleNotFoundError as error:
      raise ValueError(
        f'no {kind} {name!r}: {error}. A dotted name is a module on the '
        'import path, such as mypackage.file.'
      ) from error
  raise ValueError(f'no {kind} {name!r}.{did_you_mean(name, files)}')


def _class(module: ModuleType, kind: str, suffix: str = '') -> type:
  name = module.__name__.rpartition('.')[2]
  camel = ''.join(part.capitalize() for part in name.split('_')) + suffix
  for candidate, value in vars(module).items():
    if isinstance(value, type) and candidate.lower() == camel.lower():
      return value
  raise ValueError(
    f'{module.__name__} defines no class {camel}: a {kind} '
    'is a class that bears the name of its file'
  )


def _build(kind: str, name: str, cls: type, fields: dict[str, Any]):
  linen = ('parent', 'name')  # fields of every Linen module: taken, not told
  known = [
    f.name for f in dataclasses.fields(cls) if f.init and f.name not in linen
  ]
  for field in fields:
    if field not in (*known, *linen):
      raise ValueError(
        f'{kind} {name!r} has no field {field!r}.{did_you_mean(field, known)}'
      )
  return cls(**fields)


def module(name: str) -> ModuleType:
  """The file of a mechanism. Raises ValueError (did you mean) if unknown."""
  return _find(jaxattn.mechanisms, 'mechanism', name)


def make(name: str, /, **fields):
  """Builds a mechanism, a `Mixer`, from its name and fields.

  >>> jaxattn.make('gated_linear', heads=4)

  Args:
    name: a name out of `names()`, or the dotted path of a module outside the
      tree (`mypackage.file`).
    **fields: the mechanism's own fields, and `width` and `policy`.

  Raises:
    ValueError: an unknown name or field, with the nearest known one; values
      that cannot work together, with the reason.
  """
  return _build('mechanism', name, _class(module(name), 'mechanism'), fields)


def names() -> list[str]:
  """The mechanisms in the tree, in alphabetical order."""
  return list(_files(jaxattn.mechanisms))


def spec(name: str) -> Spec:
  """What a mechanism claims about itself."""
  return module(name).SPEC


def family(name: str) -> str:
  """The kind of mechanism: the folder in which its file lies."""
  path = module(name).__name__.split('.')
  return path[-2] if len(path) > 1 else ''


def position(name: str | Mapping[str, Any], /, **fields):
  """Builds a position encoding from its name, such as 'rope' or 'none'.

  A mapping gives its fields as well: {'name': 'rope', 'base': 500_000}.
  """
  if isinstance(name, Mapping):
    name, own = position_name(name), dict(name)
    del own['name']
    fields = own | fields
  found = _find(jaxattn.positions, 'position', name)
  return _build('position', name, _class(found, 'position', 'Position'), fields)


def position_name(name: str | Mapping[str, Any]) -> str:
  """The name in what `position` takes."""
  if isinstance(name, Mapping):
    if 'name' not in name:
      raise ValueError(f'a position needs a name, beside {dict(name)}')
    return name['name']
  return name


def position_module(name: str) -> ModuleType:
  """The file of a position encoding."""
  return _find(jaxattn.positions, 'position', name)


def positions() -> list[str]:
  """The position encodings in the tree, in alphabetical order."""
  return list(_files(jaxattn.positions))
