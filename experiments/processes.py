"""The flags by which a program learns that it is one of several processes."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

import jax
from absl import flags

ALL = ('coordinator', 'processes', 'process')


def define(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags. Not on import: not every program has them."""
  flags.DEFINE_bool(
    'distributed',
    False,
    'This is one process of several, on a TPU pod or under Slurm, which find '
    'each other by themselves.',
    flag_values=values,
  )
  flags.DEFINE_string(
    'coordinator',
    None,
    'HOST:PORT of process 0, where processes find each other.',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'processes', None, 'How many there are.', 1, flag_values=values
  )
  flags.DEFINE_integer(
    'process', None, 'Which of them this is, from 0.', 0, flag_values=values
  )
  flags.DEFINE_integer(
    'timeout',
    100,
    'Seconds of silence after which the others take a process for dead, and '
    'end.',
    1,
    flag_values=values,
  )
  flags.register_multi_flags_validator(
    ALL,
    lambda given: (
      len({value is None for value in given.values()}) == 1
      and (given['process'] or 0) < (given['processes'] or 1)
    ),
    '--coordinator, --processes and --process go together, and the last counts '
    'from 0',
    flag_values=values,
  )


@contextlib.contextmanager
def connected(values: flags.FlagValues = flags.FLAGS) -> Iterator[None]:
  """Inside, JAX has the devices of all processes; with no flag, its own.

  A process that fails ends at once, in here. Python's own way out would have it
  wait for the others first, who wait for it.
  """
  if not (values.distributed or values.coordinator):
    yield
    return
  jax.distributed.initialize(
    values.coordinator,
    values.processes,
    values.process,
    heartbeat_timeout_seconds=values.timeout,
    shutdown_timeout_seconds=values.timeout,
  )
  try:
    yield
  except SystemExit as error:
    if not error.code:
      raise
    if isinstance(error.code, str):
      print(error.code, file=sys.stderr)
    _leave(error.code if isinstance(error.code, int) else 1)
  except BaseException:
    traceback.print_exc()
    _leave(1)


def _leave(status: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)
