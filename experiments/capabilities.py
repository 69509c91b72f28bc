"""Runs the laws and writes the capability table.

  python -m experiments.capabilities

For every mechanism that has no fragment in docs/capabilities, or whose source
changed since, it runs `pytest --mechanism=NAME` and keeps what each law said in
docs/capabilities/NAME.json: about 30 seconds each. Then docs/capabilities.md
and docs/capabilities.html are made from the fragments. Stop it whenever you
like: the same command carries on.

  --mechanism=NAME  run the laws of this one, changed or not; may be repeated
  --all             run the laws of all, as after a change of an engine
  --render          run nothing, only make the pages

The exit status is 1 if a law failed; the pages then say which.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from experiments.screen import clock
from jaxattn import registry
from jaxattn.analysis import capabilities, capability_pages
from jaxattn.spec import LAWS
from jaxattn.train import log

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / 'docs'
# pytest's exit status: all passed, or some failed. Others mean that it did not
# come to that.
RAN = (0, 1)


def read(docs: Path = DOCS) -> dict[str, dict[str, Any]]:
  """mechanism -> its fragment, in alphabetical order."""
  return {
    path.stem: json.loads(path.read_text(encoding='utf-8'))
    for path in sorted((docs / 'capabilities').glob('*.json'))
  }


def pages(fragments: Mapping[str, Any], docs: Path = DOCS) -> dict[Path, str]:
  """path -> text of the pages that fragments make."""
  own = list(fragments.values())
  return {
    docs / 'capabilities.md': capability_pages.markdown(own),
    docs / 'capabilities.html': capability_pages.page(own),
  }


def source(name: str) -> str:
  """The fingerprint of a mechanism's file."""
  path = Path(registry.module(name).__file__)
  return hashlib.sha256(path.read_bytes()).hexdigest()


def stale(name: str, fragment: Mapping[str, Any] | None) -> bool:
  """Whether the laws must be run: never, on another file, or one failed."""
  if fragment is None or fragment['run']['source'] != source(name):
    return True
  laws = fragment['laws']
  failed = [capabilities.told(result, 'failed') for result in laws.values()]
  return any(failed) or {*laws} != {*LAWS}


# ------------------------------------------------------------ running the laws


def prove(
  name: str, progress: Callable[[int], None] = lambda percent: None
) -> tuple[dict[str, Any], list[str]]:
  """Runs the laws of a mechanism.

  Returns:
    Its fragment, and a line for each test that failed.

  Raises:
    RuntimeError: the tests did not run, or not all of them.
  """
  begun = source(name)
  with tempfile.TemporaryDirectory() as folder:
    report = Path(folder) / 'junit.xml'
    run_laws(name, report, progress)
    results = outcomes(name, report.read_text(encoding='utf-8'))
  if begun != source(name):
    raise RuntimeError(f'{name}: its file changed while its laws ran')
  run = {
    'examples': len(registry.spec(name).examples),
    'jax': jax.__version__,
    'python': platform.python_version(),
    'platform': os.environ.get('JAX_PLATFORMS') or 'cpu',  # as the tests take
    'date': datetime.date.today().isoformat(),
    'source': begun,
  }
  return judged(capabilities.facts(name), results, run)


def judged(
  facts: Mapping[str, Any],
  results: Mapping[str, Sequence[str]],
  run: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
  """The fragment that the outcomes of tests make, and what failed."""
  laws = dict(facts['laws'])
  for law in LAWS:
    if (count := len(results.get(law, ()))) != run['examples']:
      raise RuntimeError(
        f'{facts["mechanism"]}: {law} was run on {count} of '
        f'{run["examples"]} examples'
      )
  failed = {test: said for test in results if (said := first(results[test]))}
  laws |= {law: {'failed': failed[law]} for law in LAWS if law in failed}
  lines = [f'{test}: {message}' for test, message in failed.items()]
  return {**facts, 'laws': laws, 'run': dict(run)}, lines


def first(messages: Sequence[str]) -> str:
  """The first that is not empty."""
  return next(filter(None, messages), '')


def run_laws(name: str, report: Path, progress: Callable[[int], None]) -> None:
  """`pytest --mechanism=NAME`; raises RuntimeError unless it ran them all."""
  command = [
    sys.executable,
    '-m',
    'pytest',
    f'--mechanism={name}',
    '-vv',
    '-n0',
  ]
  with subprocess.Popen(
    [*command, f'--junitxml={report}'],
    cwd=ROOT,
    env={**os.environ, 'PYTHONUNBUFFERED': '1'},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  ) as tests:
    lines = []
    try:
      for line in tests.stdout:
        lines.append(line)
        if percent := re.search(r'\[ *(\d+)%\]$', line.rstrip()):
          progress(int(percent[1]))
    except BaseException:
      tests.terminate()
      raise
  if tests.returncode not in RAN:
    raise RuntimeError(f'{name}: pytest failed\n{"".join(lines[-20:])}')


def outcomes(name: str, junit: str) -> dict[str, list[str]]:
  """law, or name of another test -> what went wrong on each example, or ''."""
  found: dict[str, list[str]] = {}
  for case in ElementTree.fromstring(junit).iter('testcase'):
    test, _, rest = case.get('name').partition('[')
    law = rest.removesuffix(']').removeprefix(name).lstrip('-0123456789')
    if test == 'test_law':
      # tests/test_sharding.py is of that law alone, and does not name it.
      test = law or case.get('classname').rpartition('test_')[2]
    bad = [child for child in case if child.tag in ('failure', 'error')]
    said = [(child.get('message') or 'failed').splitlines()[0] for child in bad]
    found.setdefault(test, []).append(said[0][:300] if said else '')
  return found


# ------------------------------------------------------------------ the program


def update(
  todo: Sequence[str], fragments: dict[str, Any], console: Console, docs: Path
) -> list[str]:
  """Runs the laws of some mechanisms and writes their fragments.

  Returns:
    What failed.
  """
  bars = Progress(
    TextColumn('{task.description}'),
    BarColumn(),
    TextColumn('{task.fields[text]}'),
    console=console,
    disable=not console.is_terminal,
  )
  bar = bars.add_task('', total=max(len(todo), 1), text='')
  say = lambda text: console.print(text, markup=False, highlight=False)
  failed, began = [], time.monotonic()
  with bars:
    for i, name in enumerate(todo):
      started = time.monotonic()

      def progress(percent, i=i, name=name):
        done = i + percent / 100
        left = (time.monotonic() - began) / max(done, 1e-3) * (len(todo) - done)
        text = f'{i + 1}/{len(todo)}  {percent}%  {clock(left)} left'
        bars.update(bar, completed=done, description=name, text=text)

      bars.update(bar, description=name, text=f'{i + 1}/{len(todo)}  starts')
      if not console.is_terminal:
        say(f'[{i + 1}/{len(todo)}] {name}: starts')
      fragments[name], bad = prove(name, progress)
      write(name, fragments[name], docs)
      failed += [f'{name}: {line}' for line in bad]
      took = clock(time.monotonic() - started)
      said = f'{len(bad)} FAILED' if bad else 'holds what it claims'
      say(f'[{i + 1}/{len(todo)}] {name}: {said}, {took}')
  return failed


def write(name: str, fragment: Mapping[str, Any], docs: Path) -> None:
  path = docs / 'capabilities' / f'{name}.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  log.replace(path, json.dumps(fragment, indent=2, ensure_ascii=False) + '\n')


def tidy(fragments: dict[str, Any], console: Console, docs: Path) -> None:
  """Fragments follow the code: gone with a mechanism, their facts as now."""
  for name, old in list(fragments.items()):
    if name not in registry.names():
      del fragments[name]
      (docs / 'capabilities' / f'{name}.json').unlink()
      console.print(f'{name}: removed, there is no such mechanism')
    elif not stale(name, old):
      # Facts also rest on what mechanisms share, such as layers and states.
      ran = {key: old[key] for key in ('laws', 'run')}
      now = {**capabilities.facts(name), **ran}
      if now != old:
        fragments[name] = now
        write(name, now, docs)
        console.print(f'{name}: facts brought up to date')


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog='python -m experiments.capabilities',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  which = parser.add_mutually_exclusive_group()
  which.add_argument(
    '--mechanism',
    action='append',
    default=[],
    metavar='NAME',
    help='run the laws of this mechanism; may be given repeatedly',
  )
  which.add_argument(
    '--all', action='store_true', help='run the laws of every mechanism'
  )
  which.add_argument(
    '--render', action='store_true', help='only make the pages, of fragments'
  )
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, docs: Path = DOCS) -> None:
  asked = arguments(argv)
  terminal = sys.stdout.isatty()
  console = Console(soft_wrap=not terminal, width=None if terminal else 100)
  fragments, failed = read(docs), []
  try:
    if not asked.render:
      tidy(fragments, console, docs)
      names = asked.mechanism or registry.names()
      always = asked.all or asked.mechanism
      todo = [n for n in names if always or stale(n, fragments.get(n))]
      failed = update(todo, fragments, console, docs)
  except KeyboardInterrupt:
    console.print('Stopped. The same command carries on from here.')
    sys.exit(130)
  except (ValueError, RuntimeError) as error:
    sys.exit(f'error: {error}')
  for path, text in pages(fragments, docs).items():
    log.replace(path, text)
    console.print(f'Written: {path}', markup=False, highlight=False)
  for line in failed:
    console.print(f'FAILED {line}', markup=False, highlight=False)
  sys.exit(1 if failed else 0)


if __name__ == '__main__':
  main()
