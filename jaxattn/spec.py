"""Spec: what a mechanism claims about itself, for the laws to prove."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LAWS = (
  'reference',  # values and gradients equal the formula in float64
  'causality',  # no output depends on a later input
  'segmentation',  # cutting a stream anywhere changes nothing
  'padding',  # pads are invisible, wherever they stand
  'packing',  # packed documents equal separate ones
  'batch',  # rows do not see each other
  'layout',  # tokens may lie in any order (where layout='any')
  'bfloat16',  # as exact as the formula in bfloat16 throughout
  'lengths',  # every length works, down to none
  'initial',  # a new layer keeps the scale, and all of it learns
  'tracing',  # traced once for a shape, and with no array of t x s
  'sharding',  # time over devices changes nothing
)


@dataclass(frozen=True)
class No:
  """A law that a mechanism does not claim, and why."""

  reason: str

  def __post_init__(self):
    if not self.reason.strip():
      raise ValueError('No() wants the reason why the law is not claimed')

  def __bool__(self) -> bool:
    return False


@dataclass(frozen=True)
class Spec:
  """The claims of one mechanism.

  Attributes:
    paper: title; authors, year, link.
    examples: field values under which the laws are tested; the first is the
      plainest. Widths stay small: the laws run each of them.
    flops: (mixer, width, length) -> floating point operations of one forward
      pass over one sequence; a multiply and an add count as two.
    state_bytes: (mixer, width, length) -> bytes of memory that one sequence
      needs after `length` tokens, at the policy's dtype.
    layout: 'any' if the mechanism reads places from data only, 'contiguous' if
      neighbours in time must be neighbours in the array.
    near: True if a token reads what is near to it in order, so that devices
      whose parts are contiguous send each other little.
    fft: True if the fast form is a Fourier transform, whose rounding reaches
      back in time; causality is then held to 1e-6 relative.
    cross: True if it takes a `context`.
    reference, causality, ...: the laws, see LAWS; `True`, or `No(reason)`.
  """

  paper: str
  authors: str
  year: int
  link: str
  examples: tuple[dict[str, Any], ...]
  flops: Callable[[Any, int, int], int]
  state_bytes: Callable[[Any, int, int], int]
  layout: str = 'any'
  near: bool = False
  fft: bool = False
  cross: bool = False
  reference: bool | No = True
  causality: bool | No = True
  segmentation: bool | No = True
  padding: bool | No = True
  packing: bool | No = True
  batch: bool | No = True
  bfloat16: bool | No = True
  lengths: bool | No = True
  initial: bool | No = True
  tracing: bool | No = True
  sharding: bool | No = True

  def __post_init__(self):
    if self.layout not in ('any', 'contiguous'):
      raise ValueError(f"layout={self.layout!r} must be 'any' or 'contiguous'")
    if not self.examples:
      raise ValueError('a Spec needs at least one example to test')
    for law in LAWS:
      claim = self.claim(law)
      if claim is not True and not isinstance(claim, No):
        raise ValueError(f'{law}={claim!r} must be True or No(reason)')

  def claim(self, law: str) -> bool | No:
    """Whether a law is claimed: True, or No with the reason."""
    if law == 'layout' and self.layout == 'contiguous':
      return No('neighbours in time must be neighbours in the array')
    return True if law == 'layout' else getattr(self, law)
