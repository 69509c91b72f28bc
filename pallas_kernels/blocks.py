"""How large the tiles of a kernel are."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Blocks:
  """The sides of a tile of attention; what is None is chosen.

  Lengths need not be multiples of them.

  Attributes:
    q: queries in a tile.
    k: keys in a tile.
  """

  q: int | None = None
  k: int | None = None

  def __post_init__(self):
    for name, size in dataclasses.asdict(self).items():
      if size is not None and size < 1:
        raise ValueError(f'blocks: {name} must be at least 1, not {size}')
