"""What a compiled program sends between devices, and what hides it.

`exchanges(compiled.as_text())` reads the program that will run, after every
choice of the compiler: also what nobody asked for, such as an array that is
gathered by accident. It reads the text of programs for CPU, GPU and TPU.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# By kind: of the bytes that come out, how many a device sends in a group of n,
# as rings of devices do it.
SHARES = {
  'all-gather': lambda n: (n - 1) / n,
  'all-reduce': lambda n: 2 * (n - 1) / n,
  'reduce-scatter': lambda n: n - 1,
  'all-to-all': lambda n: (n - 1) / n,
  'ragged-all-to-all': lambda n: (n - 1) / n,
  'collective-broadcast': lambda n: 1,
  'collective-permute': lambda n: 1,
}
BITS = {'pred': 8, 'bf16': 16}  # the others have their bits in their names
# The ends of an exchange that the compiler for TPUs cuts in pieces.
BEGINS, ENDS = 'async-collective-start', 'async-collective-done'
# What takes long enough to send something meanwhile.
WORK = ('custom-call', 'while', 'convolution', 'dot')


@dataclasses.dataclass(frozen=True)
class Exchange:
  """One place of a program that sends.

  Attributes:
    kind: as XLA calls it: 'all-gather', 'collective-permute', ...
    sent: bytes that each device sends, each time.
    times: how often it is run.
    hidden: something else is computed meanwhile.
    source: the operation that it comes from, as JAX names it.
  """

  kind: str
  sent: int
  times: int
  hidden: bool
  source: str


class _Line(NamedTuple):
  name: str
  shape: str
  op: str
  rest: str


def exchanges(
  text: str, unknown: int = 1, in_branches: int = 1
) -> list[Exchange]:
  """All exchanges of a compiled program.

  Args:
    text: what `compiled.as_text()` gives.
    unknown: how often loops are run whose length data decide.
    in_branches: the same where data decide, too, whether they are run: so the
      gradients of a ring go home, the shorter way. That is one hop for a ring
      that went all round, as it is counted.
  """
  program = _Program(text, unknown, in_branches)
  return list(program.walk(program.entry, 1))


def total(found: list[Exchange], hidden: bool | None = None) -> int:
  """Bytes that a device sends; of those hidden, or not, or all."""
  return sum(
    x.sent * x.times for x in found if hidden is None or x.hidden == hidden
  )


class _Program:
  """The computations of a program by name, each a list of lines."""

  def __init__(self, text: str, unknown: int, in_branches: int):
    self.unknown, self.in_branches, self.lines = unknown, in_branches, {}
    self.under_way = set()  # exchanges begun, and not yet ended
    for match in re.finditer(
      r'^(ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}', text, re.M | re.S
    ):
      entry, name, body = match.groups()
      self.lines[name] = [x for x in map(_line, body.split('\n')) if x]
      if entry:
        self.entry = name

  def walk(self, name: str, times: int, branch=False) -> Iterator[Exchange]:
    """The exchanges of a computation that is run so many times."""
    lines = self.lines[name]
    unknown = self.in_branches if branch else self.unknown
    channels = set()  # an exchange may be cut in pieces, between computations
    for at, line in enumerate(lines):
      kind = line.op.removesuffix('-start')
      if kind in SHARES:
        yield self.exchange(line, kind, times, self.hides(lines, at))
      elif line.op == 'while':
        condition, body = (_named(line, x) for x in ('condition', 'body'))
        trips = self.trips(lines, line, condition)
        trips = unknown if trips is None else trips
        yield from self.walk(body, times * trips, branch)
      elif line.op == 'conditional':
        branches = [
          list(self.walk(one, times, True)) for one in _branches(line.rest)
        ]
        yield from max(branches, key=total, default=[])
      elif line.op in ('fusion', 'call', 'async-start'):
        inner = _named(line, 'calls') or _named(line, 'to_apply')
        for part in self.lines.get(inner, ()):
          channel = re.search(r'channel_id=(\d+)', part.rest)
          if part.op in SHARES and channel:
            # A piece of it may stand in each tile of a loop between its ends.
            if line.name.startswith(ENDS):
              self.under_way.discard(channel[1])
            elif line.name.startswith(BEGINS):
              self.under_way.add(channel[1])
              yield self.exchange(part, part.op, times, self.hides(lines, at))
            elif channel[1] not in channels | self.under_way:
              work = line.op == 'async-start' and self.hides(lines, at)
              work = work or any(self.works(x) for x in self.lines[inner])
              yield self.exchange(part, part.op, times, work)
            channels.add(channel[1])
          elif line.op == 'call' and part.op == 'while':
            yield from self.walk(inner, times, branch)
            break

  def exchange(self, line: _Line, kind, times, hidden) -> Exchange:
    n = _group(line.rest)
    size = _bytes(line.shape)
    if line.op.endswith('-start') and line.shape.startswith('('):
      # What goes in and what comes out stand side by side; then, of a permute,
      # what the chip keeps of it.
      parts = [x for x in _parts(line.shape) if x != 'u32[]']
      size = sum(map(_bytes, parts[len(parts) // 2 :])) or size
    source = re.search(r'op_name="([^"]*)"', line.rest)
    return Exchange(
      kind,
      int(size * SHARES[kind](n)),
      times,
      hidden,
      source[1] if source else line.name,
    )

  def hides(self, lines, at) -> bool:
    """Whether anything is computed between this start and its end."""
    start = lines[at]
    ends = re.compile(rf'%?{re.escape(start.name)}(?![\w.-])')
    cut = start.name.startswith(BEGINS)
    if not cut and not start.op.endswith('-start'):
      return False
    for line in lines[at + 1 :]:
      if cut and line.name == start.name.replace(BEGINS, ENDS):
        return False
      if line.op.endswith('-done') and ends.search(line.rest):
        return False
      if self.works(line):
        return True
    return False

  def works(self, line: _Line) -> bool:
    if line.op in WORK:
      return True
    inner = _named(line, 'calls') if line.op == 'fusion' else None
    return any(self.works(x) for x in self.lines.get(inner, ()))

  def trips(self, lines, loop, condition) -> int | None:
    """How often a loop is run, if it counts up to a constant."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
      return int(known[1])
    names = {line.name: line for line in self.lines[condition]}
    test = self.lines[condition][-1]
    if test.op == 'fusion':
      return max(_constants(names.values()), default=None)
    ends = [
      value
      for name in re.findall(r'%([\w.-]+)', test.rest)
      if name in names and (value := _constant(names[name])) is not None
    ]
    if test.op != 'compare' or 'direction=LT' not in test.rest or not ends:
      return None
    return ends[0] - self.start(lines, loop)

  def start(self, lines, loop) -> int:
    """Where the counter of a loop begins, if that can be seen."""
    names = {line.name: line for line in lines}
    line = names.get(_operands(loop)[0])
    while line is not None and line.op in ('tuple', 'copy', 'bitcast'):
      line = names.get(_operands(line)[0])
    return (_constant(line) if line else 0) or 0


def _line(text: str) -> _Line | None:
  match = re.match(r' +(?:ROOT )?%?([\w.-]+) = (.*)', text)
  if not match:
    return None
  name, rest = match.groups()
  op = re.search(r'(?:^|\s)([a-z][a-z0-9-]*)\(', rest)
  if not op:
    return None
  return _Line(name, rest[: op.start()], op[1], rest[op.end() :])


def _named(line: _Line, what: str) -> str | None:
  found = re.search(rf'\b{what}=%?([\w.-]+)', line.rest)
  return found[1] if found else None


def _branches(rest: str) -> list[str]:
  found = re.search(r'branch_computations=\{([^}]*)\}', rest)
  if found:
    return re.findall(r'%?([\w.-]+)', found[1])
  return re.findall(r'(?:true|false)_computation=%?([\w.-]+)', rest)


def _operands(line: _Line) -> list[str]:
  return re.findall(r'%([\w.-]+)', line.rest) or ['']


def _constant(line: _Line) -> int | None:
  number = re.match(r'(-?\d+)\)', line.rest)
  return int(number[1]) if line.op == 'constant' and number else None


def _constants(lines) -> list[int]:
  return [x for x in map(_constant, lines) if x is not None]


def _parts(shape: str) -> list[str]:
  """The arrays of a tuple."""
  return re.findall(r'[a-z][a-z0-9]*\[[\d,]*\]', shape)


def _bytes(shape: str) -> int:
  size = 0
  for kind, sides in re.findall(r'([a-z][a-z0-9]*)\[([\d,]*)\]', shape):
    bits = BITS.get(kind) or int(re.search(r'\d+', kind)[0])
    size += math.prod(int(n) for n in sides.split(',') if n) * bits // 8
  return size


def _group(rest: str) -> int:
  """Devices that exchange with each other."""
  if found := re.search(r'replica_groups=\{\{([\d,]+)\}', rest):
    return len(found[1].split(','))
  if found := re.search(r'replica_groups=\[(\d+),(\d+)\]<=', rest):
    return int(found[2])
  if found := re.search(r'replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}', rest):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    return math.prod(int(sizes[n]) for n in re.findall(r"'(\w+)'", found[2]))
  return 1
