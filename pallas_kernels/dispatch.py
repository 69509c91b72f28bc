"""Which implementation of a kernel runs.

A name that was asked for is never replaced in silence: what it cannot serve
raises `NotImplementedError` with the reason. Without a name the first that can
serve is taken, and the choice is logged once.
"""

import difflib
import functools
import logging
from collections.abc import Callable

import jax
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

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


def bound(kernel: str, name: str, platform: str) -> Callable:
  """For programs to say where they run: x -> x.

  A program that holds it and is made for another platform raises
  `NotImplementedError`, with what to do. It has no derivative.

  Args:
    kernel, name: what is implemented, and the implementation.
    platform: as JAX calls it, 'tpu' or 'cuda'.
  """

  def refuse(context, _):
    others = ', '.join(context.module_context.platforms)
    raise NotImplementedError(
      f'{kernel}, implementation={name!r}: it is for {platform}, and this'
      f' program is for {others}. Leave implementation out, and one that can'
      " will be chosen; to try a kernel elsewhere, see JAX's"
      ' force_tpu_interpret_mode'
    )

  here = Primitive(f'for_{platform}')
  here.def_impl(jax.jit(here.bind))
  here.def_abstract_eval(lambda x: x)
  batching.defvectorized(here)
  mlir.register_lowering(here, refuse)
  mlir.register_lowering(here, lambda _, x: [x], platform=platform)
  return lambda x: x if interpreted(x) else here.bind(x)


def interpreted(x: jax.Array) -> bool:
  """Whether a kernel of x would be, as `force_tpu_interpret_mode` has it."""
  like = jax.typeof(x).manual_axis_type  # shard_map wants to know
  nothing = jax.ShapeDtypeStruct((8, 128), x.dtype, manual_axis_type=like)
  program = jax.make_jaxpr(pl.pallas_call(lambda _: None, out_shape=nothing))()
  return any(bool(one.params.get('interpret')) for one in program.eqns)
