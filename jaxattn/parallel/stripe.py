"""Which device holds which tokens, for all to have the same work.

Under a causal mask later tokens see more keys. If devices hold one piece of a
sequence each, in a ring the first have nothing to do while the last compute.

  contiguous   0 1 2 3 | 4 5 6 7    neighbours in time are neighbours in memory
  striped      0 2 4 6 | 1 3 5 7    every tile of every hop is half seen:
                                    Brandon et al. 2023, "Striped Attention",
                                    https://arxiv.org/abs/2311.09431
  zigzag       0 1 6 7 | 2 3 4 5    an early chunk and a late one each (Llama 3,
                                    https://arxiv.org/abs/2407.21783, 3.3.2)

A layout is a permutation of the data, made once where batches are made; order,
segments and positions travel with the tokens, and say all that a mechanism has
to know.
"""

import jax
import numpy as np

from pallas_kernels import masks, tiles
from pallas_kernels.masks import Mask, Side, Tokens

LAYOUTS = ('contiguous', 'striped', 'zigzag')


def order(length: int, devices: int, layout: str) -> np.ndarray:
  """Which token stands at each place, int 't'.

  Raises:
    ValueError: there is no such layout, or the length does not divide.
  """
  if layout not in LAYOUTS:
    raise ValueError(f'layout={layout!r} must be one of {", ".join(LAYOUTS)}')
  tokens = np.arange(length)
  if devices == 1 or layout == 'contiguous':
    return tokens
  if length % _parts(devices, layout):
    raise ValueError(
      f'{length} tokens cannot be laid {layout} over {devices} devices: make'
      f' the length a multiple of {_parts(devices, layout)}'
    )
  if layout == 'striped':
    return tokens.reshape(-1, devices).T.ravel()
  chunks = tokens.reshape(2, devices, -1)
  chunks[1] = chunks[1, ::-1].copy()
  return chunks.swapaxes(0, 1).ravel()


def filled(length: int, devices: int, layout: str) -> int:
  """The least length from this on that devices can share in a layout."""
  parts = _parts(devices, layout)
  return -(-length // parts) * parts


def _parts(devices: int, layout: str) -> int:
  """Pieces of equal length that a row is cut into."""
  return 2 * devices if layout == 'zigzag' and devices > 1 else devices


def lay(tree, devices: int, layout: str, axis: int = 1):
  """Arrays 'b t ...' in a layout."""
  return _take(tree, lambda t: order(t, devices, layout), axis)


def restore(tree, devices: int, layout: str, axis: int = 1):
  """Arrays 'b t ...' in their own order again; the inverse of `lay`."""
  return _take(tree, lambda t: np.argsort(order(t, devices, layout)), axis)


def _take(tree, places, axis):
  return jax.tree.map(lambda x: x.take(places(x.shape[axis]), axis=axis), tree)


def work(
  mask: Mask,
  length: int,
  devices: int,
  layout: str,
  tile: tuple[int, int] = (512, 512),
) -> np.ndarray:
  """Tiles that each device computes in each hop of a ring, 'devices hops'.

  Args:
    mask: who sees whom, of tokens in one segment.
    length: tokens of all devices.
    devices: in the ring.
    layout: of the tokens.
    tile: queries and keys in a tile; at most what a device has.
  """
  places = order(length, devices, layout).reshape(devices, 1, -1)

  def extents(size):
    cut = lambda x: tiles.token_blocks(Tokens(Side(x)), size)
    with jax.ensure_compile_time_eval():
      found = [masks.extent(cut(part)) for part in places]  # 'n 1'
    return jax.tree.map(lambda *x: np.stack(x)[..., 0], *found)

  queries, keys = (extents(min(size, places.shape[2])) for size in tile)
  query = jax.tree.map(lambda x: x[:, :, None], queries)
  found = np.zeros((devices, devices), int)
  for hop in range(devices):
    key = jax.tree.map(lambda x, n=hop: np.roll(x, n, 0)[:, None], keys)
    empty, _ = masks.judge(mask, query, key)
    shape = (devices, query.uniform.shape[1], key.uniform.shape[2])
    found[:, hop] = np.sum(~np.broadcast_to(empty, shape), (1, 2))
  return found
