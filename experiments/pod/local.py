"""Several processes on this machine, each with simulated CPU devices.

  python -m experiments.pod.local --processes=2 --devices=4 -- \\
      --config=configs/lm.py:gated_linear,quick --workdir=runs/two

What stands behind `--` goes to experiments.train, in every process: a trial of
what runs on several hosts. The first process is shown, and all of them write to
WORKDIR/logs. When one dies the others end, within twice --timeout seconds; then
the last lines here say which it was, and the exit status is 1. The same command
carries on from the last checkpoint. Ctrl-C stops all.
"""

import argparse
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

POLL = 0.02  # seconds
LAST = 8  # lines of a process that died
# What jaxlib says of connections, and of its own stack when it aborts.
NOISE = re.compile(r'\[Gloo\]|peer ranks|^    @ |^\*\*\* Check failure')


class Process:
  """A process whose output goes to a file, and of the first here as well.

  Attributes:
    number: which of them it is.
    log: where its output is.
    popen: the process.
    ended: when it was seen to have ended, or None.
    shown: whether what it writes is shown.
  """

  def __init__(
    self,
    number: int,
    command: Sequence[str],
    log: Path,
    env: Mapping[str, str],
  ):
    self.number, self.log, self.ended = number, log, None
    self._before = log.stat().st_size if log.exists() else 0
    self._reader = None
    self.shown = number == 0
    with open(log, 'ab') as file:
      self.popen = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if self.shown else file,
        stderr=subprocess.STDOUT,
        # Ctrl-C is for the launcher alone, which kills them: to be interrupted
        # in the middle of a collective leaves the others waiting.
        start_new_session=True,
      )
    if self.shown:
      self._reader = threading.Thread(target=self._show, daemon=True)
      self._reader.start()

  def poll(self) -> int | None:
    """The exit status, once it has one; negative for a signal."""
    status = self.popen.poll()
    if status is not None and self.ended is None:
      self.ended = time.monotonic()
    return status

  def kill(self) -> None:
    """Ends it, if it still runs, and waits until all it wrote has come."""
    self.popen.kill()
    self.popen.wait()
    if self._reader:
      self._reader.join()

  def fate(self) -> str:
    """How it ended."""
    status = self.popen.returncode
    if status >= 0:
      return f'ended with exit status {status}'
    return f'was ended by {signal.Signals(-status).name}'

  def last(self) -> list[str]:
    """The last lines that it wrote."""
    with open(self.log, 'rb') as file:
      file.seek(self._before)
      lines = file.read().decode(errors='replace').splitlines()
    wanted = [x for x in lines if x.strip() and not NOISE.search(x)]
    return wanted[-LAST:]

  def _show(self) -> None:
    with self.popen.stdout as lines, open(self.log, 'ab', buffering=0) as file:
      for line in lines:
        if self.shown and not NOISE.search(line.decode(errors='replace')):
          sys.stdout.buffer.write(line)
          sys.stdout.flush()
        file.write(line)


def watched(
  commands: Sequence[Sequence[str]],
  logs: Path,
  timeout: float,
  env: Mapping[str, str] = os.environ,
) -> int:
  """`run` for the command line: to be terminated is to be interrupted.

  Started in the background by a shell, it would ignore an interrupt.
  """
  for kind in (signal.SIGINT, signal.SIGTERM):
    signal.signal(kind, signal.default_int_handler)
  try:
    return run(commands, logs, timeout, env)
  except KeyboardInterrupt:
    print('Stopped. The same command carries on from the last checkpoint.')
    return 130


def run(
  commands: Sequence[Sequence[str]],
  logs: Path,
  timeout: float,
  env: Mapping[str, str] = os.environ,
) -> int:
  """Runs commands together, until all have ended or one has died.

  Args:
    commands: one a process.
    logs: folder for what they write: process-0.log, ...
    timeout: seconds after which they should know that one of them died. Who
      still runs after twice that is killed.
    env: their environment.

  Returns:
    An exit status; if it is 1, the reason has been printed to stderr.
  """
  logs.mkdir(parents=True, exist_ok=True)
  processes, dead, silent = [], None, []
  try:
    with _guard() as guarded:
      for i, command in enumerate(commands):
        process = Process(i, command, logs / f'process-{i}.log', env)
        processes.append(process)
        guarded(process)
      dead = _first_dead(processes)
      if dead:
        processes[0].shown = False  # how it was aborted is for its log
        silent = _outlive(processes, dead.ended + 2 * timeout)
  finally:
    for process in processes:
      process.kill()
  if dead is None:
    return 0
  print(_explained(processes, dead, silent), file=sys.stderr)
  return 1


def _first_dead(processes: Sequence[Process]) -> Process | None:
  """Waits for a process to fail; None once all have done their work."""
  while True:
    ended = [p for p in processes if p.poll() is not None]
    failed = [p for p in ended if p.popen.returncode]
    if failed:
      # An abort is how a process follows another.
      aborted = lambda p: p.popen.returncode == -signal.SIGABRT
      return min(failed, key=aborted)
    if len(ended) == len(processes):
      return None
    time.sleep(POLL)


def _outlive(processes: Sequence[Process], until: float) -> list[Process]:
  """Waits for all to end; returns those that have not."""
  while time.monotonic() < until:
    if all([p.poll() is not None for p in processes]):
      return []
    time.sleep(POLL)
  return [p for p in processes if p.poll() is None]


def _explained(
  processes: Sequence[Process], dead: Process, silent: Sequence[Process]
) -> str:
  lines = [
    '',
    f'process {dead.number} {dead.fate()}. The last that it wrote to '
    f'{dead.log}:',
    *(f'  | {line}' for line in dead.last() or ['(nothing)']),
  ]
  for other in processes:
    if other is dead:
      continue
    if other in silent:
      lines.append(
        f'process {other.number} still ran after twice the timeout, and was '
        'killed'
      )
    else:
      after = max(0, other.ended - dead.ended)
      lines.append(
        f'process {other.number} {other.fate()}, {after:.1f} s later'
      )
  lines.append(
    'Once the cause is gone, the same command carries on from the last '
    'checkpoint.'
  )
  return '\n'.join(lines)


@contextlib.contextmanager
def _guard() -> Iterator[Callable[[Process], None]]:
  """Whoever is given to it ends with this process, however that ends.

  A shell waits for the end of a pipe that only this process can write to.
  """
  guard = subprocess.Popen(
    ['sh', '-c', 'while read pid; do all="$all $pid"; done; kill -9 $all'],
    stdin=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    start_new_session=True,
  )

  def guarded(process: Process) -> None:
    guard.stdin.write(b'%d\n' % process.popen.pid)
    guard.stdin.flush()

  try:
    yield guarded
  finally:
    guard.kill()
    guard.wait()
    guard.stdin.close()


def free_port() -> int:
  """A port that nobody listens to."""
  with socket.socket() as bound:
    bound.bind(('localhost', 0))
    return bound.getsockname()[1]


def parser() -> argparse.ArgumentParser:
  description, _, epilog = __doc__.partition('\n\n')
  flags = argparse.ArgumentParser(
    'python -m experiments.pod.local',
    description=description,
    epilog=epilog,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  flags.add_argument('--processes', type=int, default=2, help='how many')
  flags.add_argument('--devices', type=int, default=4, help='of each')
  flags.add_argument(
    '--timeout',
    type=int,
    default=100,
    help='seconds of silence after which a process counts as dead',
  )
  flags.add_argument(
    '--module',
    default='experiments.train',
    help='program that has the flags of experiments.processes and --workdir',
  )
  flags.add_argument(
    'rest', nargs='*', metavar='-- FLAGS', help="the program's own flags"
  )
  return flags


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the program in all processes; returns an exit status."""
  flags = parser().parse_args(argv)
  inner = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  inner.add_argument('--workdir')
  workdir = inner.parse_known_args(flags.rest)[0].workdir
  if workdir is None:
    sys.exit('error: behind -- there must be --workdir=FOLDER')
  if min(flags.processes, flags.devices, flags.timeout) < 1:
    sys.exit('error: --processes, --devices and --timeout are at least 1')
  together = [
    f'--coordinator=localhost:{free_port()}',
    f'--processes={flags.processes}',
    f'--timeout={flags.timeout}',
  ]
  program = [sys.executable, '-m', flags.module, *flags.rest]
  commands = [
    [*program, *together, f'--process={i}'] for i in range(flags.processes)
  ]
  env = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(flags.devices),
    'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo',
    'PYTHONUNBUFFERED': '1',  # a process that is killed has said all it said
  }
  return watched(commands, Path(workdir) / 'logs', flags.timeout, env)


if __name__ == '__main__':
  sys.exit(main())
