"""How large the tiles of a kernel are."""

import dataclasses

import jax


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
      if size is not None and (size < 1 or size != int(size)):
        raise ValueError(
          f'blocks: {name} must be a whole number of at least 1, not {size}'
        )


@dataclasses.dataclass(frozen=True)
class Parts:
  """How a tile is cut: the compiler sees a part's work beside the next one's.

  Attributes:
    rows: keys in a part.
    columns: queries in a part.
    depth: keys over which a product with v sums at once, forward: at least as
      many as rows.
  """

  rows: int
  columns: int
  depth: int = 128

  def within(self, q: int, k: int) -> 'Parts':
    """The same of a tile that may be smaller."""
    rows, columns = min(self.rows, k), min(self.columns, q)
    return Parts(rows, columns, max(rows, min(self.depth, k)))


@dataclasses.dataclass(frozen=True)
class Tile:
  """A tile, and on a TPU the parts in which it is computed.

  Attributes:
    q, k: queries and keys in the tile.
    clear: parts of tiles that need no mask.
    masked: parts of those that do, if others.
    half: parts of both where the tile is halved on both sides, if others.
    wide: parts of both where it is not, for rows of more than 256 bytes.
    whole: bytes of the longest row whose tile is not halved.
  """

  q: int
  k: int
  clear: Parts | None = None
  masked: Parts | None = None
  half: Parts | None = None
  wide: Parts | None = None
  whole: int = 256


# Found by static schedules, see docs/benchmarks/flash_tpu.md: of those that
# spill nothing on v5e, v5p and v6e, the ones with fewest bundles; v4 and TPU7x
# have those of the same matrix units. A wide row's tile is whole where VMEM and
# registers hold it: v4 has 16 MiB, and forward v5e would spill.
TPU = {
  'TPU v4': {
    'forward': Tile(2048, 512, Parts(64, 128), Parts(128, 128)),
    'backward': Tile(1024, 512, Parts(512, 256), half=Parts(256, 128)),
  },
  'TPU v5 lite': {  # v5e
    'forward': Tile(2048, 512, Parts(64, 128), Parts(128, 128)),
    'backward': Tile(
      *(1024, 512, Parts(512, 256)),
      half=Parts(256, 128),
      wide=Parts(512, 128),
      whole=512,
    ),
  },
  'TPU v5': {  # v5p
    'forward': Tile(2048, 512, Parts(64, 128), Parts(128, 128)),
    'backward': Tile(
      *(1024, 512, Parts(512, 256)),
      half=Parts(256, 128),
      wide=Parts(512, 128),
      whole=512,
    ),
  },
  'TPU v6 lite': {  # v6e
    'forward': Tile(2048, 512, Parts(128, 256, 512), Parts(96, 256, 512)),
    'backward': Tile(
      *(1024, 512, Parts(256, 256)),
      half=Parts(128, 256),
      wide=Parts(512, 256),
      whole=512,
    ),
  },
  'TPU7x': {
    'forward': Tile(2048, 512, Parts(128, 256, 512), Parts(96, 256, 512)),
    'backward': Tile(
      *(1024, 512, Parts(512, 256)),
      half=Parts(128, 256),
      wide=Parts(512, 256),
      whole=512,
    ),
  },
}
OTHERS = 'TPU v5'  # whose blocks are taken where the chip is not known


def chip() -> str:
  """What is computed on, as JAX calls it: of the mesh, or of this process."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return (device or jax.devices()[0]).device_kind


LANES = 128


def tile(
  blocks: Blocks,
  direction: str,
  t: int,
  s: int,
  row: int = 256,
  small: bool = False,
) -> Tile:
  """The tile for t queries and s keys; what is asked is rounded up to 128.

  It depends on the chip, see `chip`.

  row is the size in bytes of a query or a key, whichever is larger: the larger,
  the smaller the tile, for all has to fit in VMEM. small says that there is
  something else for which it should be smaller.
  """
  best = TPU.get(chip(), TPU[OTHERS])[direction]
  halved = small or row > best.whole

  def side(asked, length, most):
    """Of the sides within `most`, the one that needs the least padding."""
    whole = lambda x: -(-x // LANES) * LANES
    most = whole(asked or most)
    return min(most, whole(-(-length // -(-length // most))))

  # Half of a tile on the diagonal is in vain: it should not be half of all. And
  # in a zigzag of many devices tokens may be near by halves, see `stripe`. But
  # up to 640 two tiles would be a fifth padding.
  few, parts = 640 if t <= 640 else 512, 1 + halved
  most = max(few, min(1024, t // 2) // parts, t // 4 // parts)
  q = side(blocks.q, t, min(best.q // parts, most))
  k = side(blocks.k, s, best.k // parts)
  own = best.half if halved else best.wide if row > 256 else None
  clear, masked = own or best.clear, own or best.masked or best.clear
  return Tile(q, k, clear.within(q, k), masked.within(q, k))
