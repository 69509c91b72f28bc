"""From a configuration to objects: the one place where names become things.

A run is one nested dict of plain values. `DEFAULTS` shows all of it; a caller
gives what differs, and `complete` fills in the rest.
"""

import copy
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn.models.lm import LM
from jaxattn.models.regressor import Regressor
from jaxattn.nn import Policy
from jaxattn.registry import did_you_mean
from jaxattn.tasks import registry as tasks

DEFAULTS = {
  'seed': 0,
  'steps': 1000,
  'batch': 64,
  'task': {'name': 'mqar', 'preset': 'quick'},  # and the task's own fields
  'model': {'name': 'lm'},  # and the model's own fields
  'policy': {
    'dtype': 'float32',
    'param_dtype': 'float32',
    'dropout': 0.0,
    'implementation': None,
    'strategy': None,
  },
  'optimizer': {
    'name': 'adamw',
    'schedule': {'name': 'warmup_cosine', 'peak': 3e-3},  # and its own fields
    'weight_decay': 0.1,
    'clip': 1.0,
    'options': {},
  },
  'accumulate': 1,
  'mesh': {'data': -1, 'seq': 1, 'model': 1, 'axis_types': 'explicit'},
  'layout': None,  # of time over `seq`: contiguous, striped, zigzag; or chosen
  'log_every': 50,
  'eval_every': 500,
  'eval_batches': 4,
  'checkpoint_every': 500,
  'keep': 2,
}

# Sections whose keys depend on what they name: they are checked where that is
# built, and once they name something no default of something else gets in.
OPEN = ('task', 'model', 'optimizer.schedule', 'optimizer.options')

COUNTS = (
  'steps',
  'batch',
  'accumulate',
  'log_every',
  'eval_every',
  'eval_batches',
  'checkpoint_every',
  'keep',
)

MODELS = {'lm': LM, 'regressor': Regressor}

# Fields of a model that its task sets.
TOLD = {'lm': ('vocab',), 'regressor': ('features', 'outputs')}


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
  """A configuration with every default filled in, as JSON would give it back.

  Raises:
    ValueError: an unknown section or key (did you mean), or a value of the
      wrong kind.
  """
  try:
    config = json.loads(json.dumps(config))
  except TypeError as error:
    raise ValueError(f'a configuration holds plain values: {error}') from error
  config = _fill(DEFAULTS, config)
  for key in COUNTS:
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise ValueError(f'{key}={value!r} must be an integer of at least 1')
  return config


def build(config: Mapping[str, Any]) -> tuple[Any, nn.Module]:
  """The task and the model of a configuration.

  Raises:
    ValueError: anything in it that cannot work, with the reason.
  """
  config = complete(config)
  task = tasks.make(**config['task'])
  return task, model(config, facts(task))


def facts(task: Any) -> dict[str, int]:
  """What must be known of a task to build a model for it."""
  names = ('length', 'vocab', 'features', 'outputs')
  return {name: getattr(task, name) for name in names if hasattr(task, name)}


def model(config: Mapping[str, Any], facts: Mapping[str, Any]) -> nn.Module:
  """The model of a configuration, for a task of these `facts`."""
  config = complete(config)
  fields = dict(config['model'])
  name = fields.pop('name')
  if name not in MODELS:
    raise ValueError(f'no model {name!r}.{did_you_mean(name, MODELS)}')
  # `policy` has a section of its own; `parent` and `name` are Linen's.
  taken = (*TOLD[name], 'policy', 'parent', 'name')
  known = {f.name for f in dataclasses.fields(MODELS[name])}.difference(taken)
  for field in fields:
    if field not in known:
      raise ValueError(
        f'model {name!r} has no field {field!r}.{did_you_mean(field, known)}'
      )
  missing = [field for field in TOLD[name] if field not in facts]
  if missing:
    fitting = [
      other for other, told in TOLD.items() if all(f in facts for f in told)
    ]
    raise ValueError(
      f'model {name!r} needs {" and ".join(missing)}, which the task '
      f'{config["task"]["name"]!r} does not have; models that fit it: '
      f'{", ".join(fitting)}'
    )
  told = {field: facts[field] for field in TOLD[name]}
  policy = Policy(**config['policy'])
  return MODELS[name](**told, policy=policy, **fields)


def blank(facts: Mapping[str, Any], rows: int) -> jax.Array:
  """Inputs of a task, all zero: what its model is initialised on."""
  if 'vocab' in facts:
    return jnp.zeros((rows, facts['length']), jnp.int32)
  return jnp.zeros((rows, facts['length'], facts['features']), jnp.float32)


def _fill(defaults: Any, given: Any, path: str = '') -> Any:
  """`given` over `defaults`, section by section."""
  if not isinstance(defaults, dict):
    return given
  if not isinstance(given, dict):
    raise ValueError(f'{path} is a section, not {given!r}')
  named = path in OPEN and 'name' in given
  filled = {} if named else copy.deepcopy(defaults)
  for key, value in given.items():
    below = f'{path}.{key}' if path else key
    if path in OPEN:
      filled[key] = value
    elif key in defaults:
      filled[key] = _fill(defaults[key], value, below)
    else:
      where = f'section {path!r}' if path else 'the configuration'
      raise ValueError(f'{where} has no {key!r}.{did_you_mean(key, defaults)}')
  return filled
