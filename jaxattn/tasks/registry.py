"""Finds tasks: a task is a file of this package that has PRESETS and make."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jaxattn.tasks
from jaxattn.registry import did_you_mean


def names() -> list[str]:
  """The tasks in the tree, in alphabetical order."""
  files = (file.name for file in pkgutil.iter_modules(jaxattn.tasks.__path__))
  return sorted(name for name in files if hasattr(_module(name), 'PRESETS'))


def find(name: str) -> ModuleType:
  """The file of a task.

  Args:
    name: a name out of `names()`, or the dotted path of a module outside the
      tree (`mypackage.file`).

  Raises:
    ValueError: there is no such task; with the nearest that there is.
  """
  if '.' in name:
    try:
      return importlib.import_module(name)
    except ModuleNotFoundError as error:
      raise ValueError(f'no task {name!r}: {error}') from error
  if name not in names():
    raise ValueError(f'no task {name!r}.{did_you_mean(name, names())}')
  return _module(name)


def make(name: str, preset: str = 'quick', **fields: Any) -> Any:
  """A task by its name, a preset, and the fields that differ from the preset.

  >>> task = make('mqar', preset='cpu', pairs=8)

  Raises:
    ValueError: an unknown task, preset or field, with the nearest known one.
  """
  return find(name).make(preset, **fields)


def configure(
  cls: type,
  presets: Mapping[str, Mapping[str, Any]],
  preset: str,
  fields: Mapping[str, Any],
) -> Any:
  """What a task's `make` does: cls of a preset's fields, replaced by these."""
  name = cls.__name__
  if preset not in presets:
    raise ValueError(
      f'{name} has no preset {preset!r}.{did_you_mean(preset, presets)}'
    )
  known = [field.name for field in dataclasses.fields(cls)]
  for field in fields:
    if field not in known:
      raise ValueError(
        f'{name} has no field {field!r}.{did_you_mean(field, known)} '
        f'Its fields: {", ".join(known)}.'
      )
  return cls(**{**presets[preset], **fields})


def _module(name: str) -> ModuleType:
  return importlib.import_module(f'{jaxattn.tasks.__name__}.{name}')
