"""docs/flash.md says what the implementations of attention do today."""

import pytest

from pallas_kernels import flash
from tests import flash_matrix as matrix
from tests.test_flash_tpu import COMPLAINTS


def cells():
  """The table of the page: row, implementation, what it says."""
  text = matrix.PAGE.read_text()
  lines = [line for line in text.splitlines() if line.startswith('| ')]
  names = [cell.strip(' `') for cell in lines[0].strip('|').split('|')[1:]]
  notes = dict(
    line.split('. ', 1) for line in text.splitlines() if line[:1].isdigit()
  )
  for line in lines[2:]:
    row, *found = (cell.strip() for cell in line.strip('|').split('|'))
    for name, cell in zip(names, found):
      reason = notes[cell[4:-1]] if cell.startswith('no (') else cell
      yield row, name, reason


CELLS = list(cells())
ROWS = {feature.name: feature for feature in matrix.FEATURES}


def test_every_cell_is_there():
  modes = [row for row, _, _ in CELLS if row.startswith('derivative')]
  rows = [*ROWS, *dict.fromkeys(modes)]
  assert len(set(modes)) == 4
  assert [(row, name) for row, name, _ in CELLS] == [
    (row, name) for row in rows for name in matrix.NAMES
  ]


@pytest.mark.parametrize(
  ('row', 'name', 'said'),
  [cell for cell in CELLS if cell[0] in ROWS and cell[1] != 'gpu'],
  ids=lambda x: x.replace(' ', '-')[:40],
)
def test_features(row, name, said, capfd):
  assert matrix.outcome(ROWS[row], name) == said, (
    'run python -m tests.flash_matrix'
  )
  said = capfd.readouterr().out
  assert not any(what in said for what in COMPLAINTS)


def column(name):
  return {row: cell for row, which, cell in CELLS if which == name}


def test_gpu():
  """All of its cells in one process."""
  assert matrix.elsewhere('gpu') == column('gpu'), (
    'run python -m tests.flash_matrix'
  )


@pytest.mark.parametrize('name', [n for n in matrix.NAMES if n != 'gpu'])
def test_derivatives(name):
  said = column(name)
  found = matrix.derivatives(name)
  assert found == {mode: said[mode] for mode in found}


def test_a_wrong_result_is_no_yes(monkeypatch):
  right = flash.BACKENDS['xla']
  wrong = lambda *args: tuple(1.01 * x for x in right.attend(*args))
  monkeypatch.setitem(flash.BACKENDS, 'xla', right._replace(attend=wrong))
  with pytest.raises(AssertionError, match='off by'):
    matrix.outcome(matrix.FEATURES[0], 'xla')
