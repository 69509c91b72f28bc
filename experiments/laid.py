"""What a compiler has decided before it makes machine code.

Nine tenths of the compilation of a large step for TPUs are machine code, which
a verdict does not need: what is computed when, where each array lies and what
is sent are decided before. A compiler cannot be stopped, but it writes down
what it has decided, if it is told to (`--xla_dump_to`), and a process can be
stopped. So `apart` calls a function in a process of its own, which ends when
the function returns, whatever its compiler is still at.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
import pathlib
import re
import signal
import tempfile
import traceback
from typing import NamedTuple

EVERY = 0.2  # seconds between two looks
# Of the memory of a device, what machine code surely does not need.
CODE = 1 / 32


class Ended(RuntimeError):
  """A process ended before it said anything."""


class Laid(NamedTuple):
  """A program whose memory is laid out. Bytes are those of one device.

  Attributes:
    text: the program, in the order in which it runs.
    arguments, temporaries: of arrays; what takes the place of an argument that
      is used up is counted there.
    code: of machine code; None where it was not waited for.
  """

  text: str
  arguments: int
  temporaries: int
  code: int | None


def whole(lowered) -> Laid:
  """When the compiler is done."""
  compiled = lowered.compile()
  memory = compiled.memory_analysis()
  news = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return Laid(
    compiled.as_text(),
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes + news,
    memory.generated_code_size_in_bytes,
  )


def soon(lowered, dumps: pathlib.Path, room: int) -> Laid:
  """When it is known whether it fits: for that the code may matter, or not.

  Args:
    lowered: what is compiled.
    dumps: where the compiler writes what it has decided. Of one that does not,
      or in other words, all is awaited.
    room: bytes that a device has.
  """
  working = concurrent.futures.ThreadPoolExecutor(1).submit(whole, lowered)
  found = None
  while not concurrent.futures.wait([working], EVERY).done:
    if found := found or read(dumps):
      left = room - found.arguments - found.temporaries
      if not 0 <= left < CODE * room:
        return found
  done = working.result()
  return found._replace(code=done.code) if found else done


def read(dumps: pathlib.Path) -> Laid | None:
  """What lies in a folder, of one program, if it is whole and understood."""
  name = lambda end: dumps.glob(f'*.after_optimizations{end}.txt')
  # The last of them is written after the others.
  ends = '', '-buffer-assignment', '-memory-usage-report'
  files = [next(name(end), None) for end in ends]
  if not all(files):
    return None
  text, memory, report = (file.read_text() for file in files)
  arguments = temporaries = 0
  line = r'^allocation \d+: size (\d+),([^|\n]*)'
  for size, kind in re.findall(line, memory, re.MULTILINE):
    if re.search(r'\bcolor [1-9]', kind):  # memory of another kind
      continue
    if re.search(r'\bparameter \d', kind):
      arguments += int(size)
    else:
      temporaries += int(size)
  total = re.search(r'\(color=0\)\s+Total bytes: (\d+)', report)
  if not total or int(total[1]) != arguments + temporaries:
    return None
  return Laid(text, arguments, temporaries, None)


@contextlib.contextmanager
def _told(folder: str, name: str):
  """Processes that begin inside have compilers that write to the folder."""
  before = os.environ.get('XLA_FLAGS')
  own = f'--xla_dump_to={folder} --xla_dump_hlo_as_text'
  own += f' --xla_dump_hlo_module_re={name}'
  os.environ['XLA_FLAGS'] = f'{before or ""} {own}'
  try:
    yield
  finally:
    if before is None:
      del os.environ['XLA_FLAGS']
    else:
      os.environ['XLA_FLAGS'] = before


def apart(function, *args, name: str):
  """`function(*args, dumps)`, whose compiler writes to the folder `dumps`.

  Args:
    function, *args: what can be pickled; so can what it returns.
    name: a pattern of the names of programs that are written down.

  Raises:
    Exception: what the function raises.
    Ended: the process did, and said nothing.
  """
  context = multiprocessing.get_context('spawn')
  ours, theirs = context.Pipe(duplex=False)
  with tempfile.TemporaryDirectory() as folder:
    process = context.Process(
      target=_call,
      args=(theirs, function, args, pathlib.Path(folder)),
      daemon=True,
    )
    with _told(folder, name):
      process.start()
    theirs.close()
    try:
      found, error = ours.recv()
    except EOFError:
      process.join()
      raise Ended(
        f'the compiler ended, with status {process.exitcode}, before it said'
        ' anything: there may be too little memory on this machine'
      ) from None
    finally:
      process.kill()
      process.join()
  if error is not None:
    raise error
  return found


# What is raised again as it is.
PLAIN = (ValueError, NotImplementedError, ModuleNotFoundError)


def _call(pipe, function, args, dumps: pathlib.Path) -> None:
  """In the other process."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # who called ends this one
  found = error = None
  try:
    found = function(*args, dumps)
  except PLAIN as plain:
    error = type(plain)(str(plain))
  except Exception:
    error = RuntimeError(traceback.format_exc())
  pipe.send((found, error))
  os._exit(0)  # without the compiler's threads
