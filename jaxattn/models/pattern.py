"""Which mechanism each layer has, and which layers are alike.

A model names its mechanisms by a pattern:

    'multi_head'                          every layer
    'sliding_window multi_head'           in turn
    '3:1 sliding_window multi_head'       three of the first, one of the second
    ['multi_head', 's4d', 's4d']          layer by layer, as long as the depth
"""

from collections.abc import Sequence


def layers(pattern: str | Sequence[str], depth: int) -> tuple[str, ...]:
  """The mechanism of each of `depth` layers.

  Raises:
    ValueError: a pattern that cannot be read, or a list of another length.
  """
  if depth < 1:
    raise ValueError(f'depth={depth} must be at least 1')
  if not isinstance(pattern, str):
    if len(pattern) != depth:
      raise ValueError(
        f'{len(pattern)} mechanisms are listed for depth={depth} layers: '
        f'{list(pattern)}'
      )
    return tuple(pattern)
  words = pattern.split()
  if not words:
    raise ValueError('the pattern of mechanisms is empty')
  counts = [1] * len(words)
  if ':' in words[0]:
    ratio, *words = words
    parts = ratio.split(':')
    if not all(part.isdigit() and int(part) > 0 for part in parts):
      raise ValueError(f'pattern {pattern!r}: {ratio!r} is not a ratio as 3:1')
    counts = [int(part) for part in parts]
    if len(counts) != len(words):
      raise ValueError(
        f'pattern {pattern!r}: {len(counts)} numbers for {len(words)} '
        'mechanisms'
      )
  period = [word for word, count in zip(words, counts) for _ in range(count)]
  return tuple(period[i % len(period)] for i in range(depth))


def groups(names: Sequence[str]) -> tuple[tuple[tuple[str, ...], int], ...]:
  """Cuts layers into (unit, repeats): what `scan` runs as one loop.

  >>> groups(['a', 'a', 'b', 'a', 'a', 'b', 'a'])
  ((('a', 'a', 'b'), 2), (('a',), 1))

  Of the units that repeat from the start, the one that covers most layers is
  taken, and the shortest of those; then the rest is cut likewise.
  """
  names = tuple(names)
  if not names:
    return ()

  def repeats(size):
    count = 1
    while names[count * size : (count + 1) * size] == names[:size]:
      count += 1
    return count

  sizes = [s for s in range(1, len(names) // 2 + 1) if repeats(s) > 1]
  size = max(sizes, key=lambda s: (s * repeats(s), -s), default=0)
  if not size:  # nothing repeats from here on: one layer, then the rest
    return (((names[0],), 1), *groups(names[1:]))
  count = repeats(size)
  return ((names[:size], count), *groups(names[size * count :]))
