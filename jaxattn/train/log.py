"""Metrics on disk: one JSON object a line, and what survives a crash."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def append(path: str | os.PathLike, record: dict[str, Any]) -> dict[str, Any]:
  """Adds a record, and returns it as a reader will find it.

  The line has gone to the operating system when this returns, so killing the
  process loses nothing; `sync` waits for the disk, so that losing power loses
  nothing either.
  """
  record = _finite(record)
  with open(path, 'a', encoding='utf-8') as file:
    file.write(json.dumps(record) + '\n')
  return record


def sync(path: str | os.PathLike) -> None:
  """Waits until all records are on the disk."""
  with open(path, 'a', encoding='utf-8') as file:
    os.fsync(file.fileno())


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The records of a file; none if there is no file.

  A last line without an end is a record that a crash tore: it is left out.

  Raises:
    ValueError: a line before it is not JSON, with its number.
  """
  if not Path(path).exists():
    return []
  *lines, _ = Path(path).read_text(encoding='utf-8').split('\n')
  records = []
  for number, line in enumerate(lines, start=1):
    try:
      records.append(json.loads(line))
    except ValueError as error:
      raise ValueError(f'{path}, line {number}: not JSON: {error}') from error
  return records


def rewrite(path: str | os.PathLike, records: Iterable[dict[str, Any]]) -> None:
  """Replaces the records of a file, all of them or none."""
  lines = [json.dumps(_finite(record)) + '\n' for record in records]
  replace(path, ''.join(lines))


def replace(path: str | os.PathLike, text: str) -> None:
  """Writes a file in one piece: readers see the old text or the new."""
  path = Path(path)
  beside = path.with_name(f'.{path.name}.{os.getpid()}')
  with open(beside, 'w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(beside, path)


def _finite(record: dict[str, Any]) -> dict[str, Any]:
  """JSON has no word for NaN and infinity: they become null."""
  bad = lambda value: isinstance(value, float) and not math.isfinite(value)
  return {k: None if bad(v) else v for k, v in record.items()}
