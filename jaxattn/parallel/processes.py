"""Several processes: what one of them does for all, and what all agree on.

With several hosts each has a process that runs the same program, and all must
come to the same collectives in the same order. So whatever a process may find
another answer to than its neighbours, such as what lies on a disk, is found by
the first, and told to all.

With one process these functions do nothing.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

CHUNK = 2**12  # bytes that a message is filled up to: few programs to compile


def first() -> bool:
  """Whether this process is the one that writes for all."""
  return jax.process_index() == 0


def agreed(make: Callable[[], Any]) -> Any:
  """What `make` returns in the first process, where alone it is called.

  All processes must call this; none returns before `make` has.

  Args:
    make: returns what JSON can hold.

  Raises:
    ValueError: if `make` raises one, in all processes.
  """
  if jax.process_count() == 1:
    return make()
  said = {}
  if first():
    try:
      said = {'value': make()}
    except ValueError as error:
      said = {'error': str(error)}
  said = _from_first(said)
  if 'error' in said:
    raise ValueError(said['error'])
  return said['value']


def worst(error: str | None) -> str | None:
  """An error that some process has met, in all of them; None if none has.

  All processes must call this. Whoever met none is told whose it is.
  """
  if jax.process_count() == 1:
    return error
  failed = multihost_utils.process_allgather(np.int32(error is not None))
  where = np.flatnonzero(failed)
  if not where.size:
    return None
  return error or f'process {where[0]} could not read its part'


def _from_first(value: Any) -> Any:
  text = json.dumps(value).encode() if first() else b''
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
  room = np.zeros(-(-size // CHUNK) * CHUNK, np.uint8)
  room[: len(text)] = np.frombuffer(text, np.uint8)
  room = multihost_utils.broadcast_one_to_all(room)
  return json.loads(room[:size].tobytes())
