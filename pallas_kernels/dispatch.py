"""Which implementation of a kernel runs.

A name that was asked for is never replaced in silence: what it cannot serve
raises `NotImplementedError` with the reason. Without a name the first that can
serve is taken, and the choice is logged once.
"""

import difflib
import functools
import logging
from collections.abc import Callable

log = logging.getLogger(__name__)


def choose(
  kernel: str,
  refusals: dict[str, Callable[[], str | None]],
  named: str | None,
  preferred: tuple[str, ...],
) -> str:
  """The name of the implementation that will run.

  Args:
    kernel: what is implemented, for messages.
    refusals: for each implementation, a function that says why it cannot serve
      this call, or None if it can.
    named: what the caller asked for; None leaves the choice.
    preferred: which to try, in order, when the choice is left.

  Raises:
    ValueError: no implementation has this name.
    NotImplementedError: the one named, or each of those preferred, refuses.
  """
  if named is not None:
    if named not in refusals:
      close = difflib.get_close_matches(str(named), refusals, 1)
      hint = f' Did you mean {close[0]!r}?' if close else ''
      raise ValueError(
        f'{kernel} has no implementation {named!r}, only'
        f' {", ".join(refusals)}.{hint}'
      )
    reason = refusals[named]()
    if reason:
      raise NotImplementedError(
        f'{kernel}, implementation={named!r}: {reason}. Leave implementation'
        ' out, and one that can will be chosen'
      )
    return named
  reasons = {}
  for name in preferred:
    reasons[name] = refusals[name]()
    if not reasons[name]:
      _say(kernel, name, tuple(reasons.items())[:-1])
      return name
  why = '; '.join(f'{name}: {reason}' for name, reason in reasons.items())
  raise NotImplementedError(f'{kernel}: nothing serves this call ({why})')


@functools.cache  # once for each choice
def _say(kernel, name, passed_over):
  why = ''.join(f'; not {other}: {reason}' for other, reason in passed_over)
  log.info('%s runs as %r%s', kernel, name, why)
