"""Next-byte prediction on real text that every machine already has.

The text is the source of Python's own standard library (about 30 MB): the
`*.py` files of the folder that `sysconfig` names, but for `_sysconfigdata*`,
which describes the machine. Or, with `path`, any local text:

- a folder: every file below it, `.jsonl` files line by line;
- a `.jsonl` file: the field 'text' of every line is a document;
- any other file: one document, memory-mapped, so it may exceed the memory.

In folders, hidden files, installed packages, caches and what is not UTF-8 are
passed over. Documents are taken in order of their relative paths, exact
duplicates and empty ones dropped, and each is closed by a NUL byte.

Whole documents are held out: those of the smallest content hashes, until they
make 5% of the bytes. So a document keeps its side when others come or go, but
for a few at the border. Of a single document the last 5% are held out.

Training rows are random crops. The test rows are crops of `length` targets
spread evenly over the held-out bytes, none overlapping another.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxattn.tasks import draw, registry
from jaxattn.tasks.batch import (
  SPLITS,
  Batch,
  checked_rows,
  fingerprint,
  nats,
  right,
  weighed,
)

HELD_OUT = 0.05  # of the bytes
SEPARATOR = b'\0'  # closes every document
NOT_OURS = ('site-packages', 'dist-packages', '__pycache__')

PRESETS = {
  'quick': {'length': 128, 'test_rows': 256},
  'cpu': {'length': 256, 'test_rows': 512},
  'paper': {'length': 1024, 'test_rows': 256},
}


def make(preset: str = 'quick', **fields: Any) -> 'Bytes':
  """The task of a preset; fields given here replace the preset's."""
  return registry.configure(Bytes, PRESETS, preset, fields)


@dataclasses.dataclass(frozen=True)
class Bytes:
  """Next-byte prediction; see the top of this file.

  Attributes:
    length: bytes of context a row.
    path: a text file, a .jsonl file or a folder; None for Python's standard
      library.
    test_rows: rows of the test set.
    seed: which crops are trained on. The test set does not depend on it.

  Raises:
    ValueError: the text cannot be read, or is too small for these numbers.
  """

  length: int = 256
  path: str | None = None
  test_rows: int = 512
  seed: int = 0

  headline: ClassVar[str] = 'bits_per_byte'
  better: ClassVar[str] = 'lower'
  vocab: ClassVar[int] = 256
  oracle: ClassVar[None] = None  # nobody knows the entropy of Python
  chance: ClassVar[dict[str, float]] = {
    'bits_per_byte': 8.0,
    'accuracy': 1 / 256,
    'loss': math.log(256),
  }

  def __post_init__(self):
    if self.length < 1 or self.test_rows < 1 or self.seed < 0:
      raise ValueError(
        f'length={self.length} and test_rows={self.test_rows} must be at '
        f'least 1, seed={self.seed} at least 0'
      )
    crops = (len(self.corpus.test) - 1) // self.length
    if crops < self.test_rows or len(self.corpus.train) <= self.length:
      raise ValueError(
        f'{self.corpus.name} is too small: its {len(self.corpus.train)} '
        f'training bytes and {len(self.corpus.test)} held-out bytes hold '
        f'{max(crops, 0)} test rows of length={self.length}, not '
        f'test_rows={self.test_rows}; ask for fewer or shorter rows, or give '
        'a larger text'
      )

  @property
  def corpus(self) -> 'Corpus':
    return load(self.path)

  @property
  def corpus_hash(self) -> str:
    """SHA-256 over the bytes used, and over how they are split."""
    return self.corpus.sha256

  @property
  def asked(self) -> int:
    """Positions a row at which weights are 1: all."""
    return self.length

  def batch(self, split: str, step: int, rows: np.ndarray | range) -> Batch:
    """Rows of a step as numpy arrays; see `jaxattn.tasks.batch`.

    Raises:
      ValueError: an unknown split; a row that the split does not have.
    """
    rows = checked_rows(self, split, step, rows)
    if split == 'train':
      text = self.corpus.train
      key = draw.keys(self.seed, SPLITS.index(split), step, rows=rows)
      starts = draw.below(key, 1, len(text) - self.length, stream=0)
    else:
      text = self.corpus.test
      crops = (len(text) - 1) // self.length
      starts = (rows[:, None] * crops // self.test_rows) * self.length
    crop = text[starts + np.arange(self.length + 1)].astype(np.int32)
    inputs, targets = crop[:, :-1], crop[:, 1:]
    return Batch(inputs, targets, np.ones(targets.shape, np.float32))

  def losses(self, logits, batch: Batch):
    """-log p of the right answer in nats, 'b t': what training lowers."""
    return nats(logits, batch.targets)

  def metrics(self, logits, batch: Batch) -> dict[str, tuple]:
    """(sum, count) of bits per byte, accuracy and loss in nats.

    `bits_per_byte@32-64` is over positions 32 to 63 of the row alone, which see
    33 to 64 bytes of context: does a longer context help?
    """
    loss = self.losses(logits, batch)
    bits = loss / math.log(2)
    scores = {
      'bits_per_byte': weighed(bits, batch.weights),
      'accuracy': weighed(right(logits, batch.targets), batch.weights),
      'loss': weighed(loss, batch.weights),
    }
    place = jnp.arange(bits.shape[-1])
    for low, high in buckets(self.length):
      here = batch.weights * ((place >= low) & (place < high))
      scores[f'bits_per_byte@{low}-{high}'] = weighed(bits, here)
    return scores

  def fingerprint(self) -> str:
    """16 hex digits that change when the text or the crops do."""
    fields = dataclasses.asdict(self)
    return fingerprint(self, **{**fields, 'path': self.corpus_hash})


def buckets(length: int) -> list[tuple[int, int]]:
  """Ranges of positions, each as long as all before it: 0-32, 32-64, 64-128."""
  ends = [0]
  while ends[-1] < length:
    ends.append(min(max(32, 2 * ends[-1]), length))
  return list(itertools.pairwise(ends))


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A text in two parts.

  Attributes:
    name: what it is, for messages.
    train, test: uint8, documents one after the other.
    documents: how many documents went into each part.
    sha256: over both parts.
  """

  name: str
  train: np.ndarray
  test: np.ndarray
  documents: tuple[int, int]
  sha256: str


@functools.cache
def load(path: str | None = None) -> Corpus:
  """The text at a path, or Python's standard library; once a process.

  Raises:
    ValueError: it cannot be read, or there is no text in it.
  """
  if path is None:
    root = Path(sysconfig.get_paths()['stdlib'])
    name = f"the source of Python's standard library in {root}"
    pieces = _documents(root, _is_source)
  else:
    root, name = Path(path), str(path)
    if not root.exists():
      raise ValueError(f'there is no file or folder {name}')
    if root.is_file() and root.suffix != '.jsonl':
      return _split_document(name, _mapped(root))
    pieces = _documents(root, lambda file: True)

  documents = {}  # by digest: the first of several equal ones stays
  for text in pieces:
    documents.setdefault(hashlib.sha256(text).digest(), text)
  if not documents:
    raise ValueError(
      f'there is no text in {name}; give path=, a text file, a .jsonl file '
      "with a field 'text', or a folder of text files"
    )
  if len(documents) == 1:
    (text,) = documents.values()
    return _split_document(name, np.frombuffer(text, np.uint8))

  held, size = set(), 0
  wanted = HELD_OUT * sum(map(len, documents.values()))
  for digest in sorted(documents):
    if size >= wanted or len(held) == len(documents) - 1:
      break
    held.add(digest)
    size += len(documents[digest])
  train = [documents[d] for d in documents if d not in held]
  test = [documents[d] for d in documents if d in held]
  counts = (len(train), len(test))
  return _corpus(name, _join(train), _join(test), counts)


def _is_source(file: Path) -> bool:
  return file.suffix == '.py' and not file.name.startswith('_sysconfigdata')


def _documents(root: Path, wanted: Callable[[Path], bool]) -> Iterator[bytes]:
  """The texts below a folder, or in a file, in order of their paths."""
  for file in _files(root):
    if not wanted(file):
      continue
    try:
      text = file.read_bytes()
    except OSError as error:
      raise ValueError(f'cannot read {file}: {error.strerror}') from error
    if file.suffix == '.jsonl':
      yield from filter(None, _lines(file, text))
    elif text and _is_text(text):
      yield text


def _files(root: Path) -> list[Path]:
  if root.is_file():
    return [root]
  found = []
  for folder, folders, files in os.walk(root):
    folders[:] = [
      f for f in folders if f not in NOT_OURS and not f.startswith('.')
    ]
    found += [Path(folder, f) for f in files if not f.startswith('.')]
  found = [file for file in found if file.is_file()]
  return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _lines(file: Path, text: bytes) -> Iterator[bytes]:
  """The texts of a .jsonl file."""
  for number, line in enumerate(text.splitlines(), start=1):
    if not line.strip():
      continue
    try:
      entry = json.loads(line)
    except ValueError as error:
      raise ValueError(f'{file}, line {number}: not JSON ({error})') from error
    if not isinstance(entry, dict) or not isinstance(entry.get('text'), str):
      raise ValueError(
        f"{file}, line {number}: no field 'text' with a string in it"
      )
    yield entry['text'].encode('utf-8', 'surrogatepass')


def _is_text(text: bytes) -> bool:
  try:
    text.decode('utf-8')
  except UnicodeDecodeError:
    return False
  return SEPARATOR not in text


def _mapped(file: Path) -> np.ndarray:
  try:
    if file.stat().st_size == 0:  # which cannot be mapped
      raise ValueError(f'{file} is empty; give path= a text that is not')
    return np.memmap(file, np.uint8, mode='r')
  except OSError as error:
    raise ValueError(f'cannot read {file}: {error.strerror}') from error


def _join(documents: list[bytes]) -> np.ndarray:
  joined = b''.join(text + SEPARATOR for text in documents)
  return np.frombuffer(joined, np.uint8)


def _split_document(name: str, text: np.ndarray) -> Corpus:
  cut = round(len(text) * (1 - HELD_OUT))
  return _corpus(name, text[:cut], text[cut:], (1, 1))


def _corpus(
  name: str, train: np.ndarray, test: np.ndarray, documents: tuple[int, int]
) -> Corpus:
  sha = hashlib.sha256(f'{len(train)} {len(test)}\n'.encode())
  sha.update(train.data)
  sha.update(test.data)
  return Corpus(name, train, test, documents, sha.hexdigest())
