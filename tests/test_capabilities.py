"""The capability table is in step with the code; no law is run here."""

import copy
import re
from collections import Counter
from pathlib import Path

import pytest

from experiments import capabilities as tool
from jaxattn import registry
from jaxattn.analysis import capabilities, capability_pages
from jaxattn.spec import LAWS

FRAGMENTS = tool.read()
AGAIN = 'run python -m experiments.capabilities'

# law -> how many mechanisms decline it, besides `layout`, which follows from
# the field of that name. A mechanism that declines one more changes this line,
# and whoever reviews it sees that.
DECLINED: dict[str, int] = {}


def test_a_fragment_for_each_mechanism():
  assert list(FRAGMENTS) == registry.names(), AGAIN


@pytest.mark.parametrize('name', registry.names())
def test_fragments_are_in_step(name):
  """Facts and claims are those of the code, and what is claimed held."""
  assert not capabilities.wrong(name, FRAGMENTS[name]), AGAIN


def test_fragments_are_written_as_the_tool_writes_them(tmp_path):
  for name, fragment in FRAGMENTS.items():
    tool.write(name, fragment, tmp_path)
    own = Path('capabilities', f'{name}.json')
    assert (tmp_path / own).read_bytes() == (tool.DOCS / own).read_bytes()


@pytest.mark.parametrize('path', tool.pages(FRAGMENTS), ids=lambda p: p.name)
def test_pages_are_what_the_fragments_make(path):
  text = tool.pages(FRAGMENTS)[path]
  assert path.read_text(encoding='utf-8') == text, AGAIN


def test_the_number_of_noes_is_committed():
  claims = [registry.spec(name) for name in registry.names()]
  noes = {law: sum(not s.claim(law) for s in claims) for law in LAWS}
  page = (tool.DOCS / 'capabilities.md').read_text(encoding='utf-8')
  rows = re.findall(r'^\| `(\w+)` \| [^|]+ \| (\d+) \| (\d+) \|$', page, re.M)
  assert {law: int(no) for law, _, no in rows} == noes
  assert {law: int(held) for law, held, _ in rows} == {
    law: len(claims) - no for law, no in noes.items()
  }
  contiguous = sum(spec.layout == 'contiguous' for spec in claims)
  assert noes.pop('layout') == contiguous
  assert {law: no for law, no in noes.items() if no} == DECLINED


def test_every_law_is_explained():
  assert tuple(capability_pages.MEANING) == LAWS


# --------------------------------------------------------------------- mutants


def _fact(key, value):
  return lambda fragment: fragment.update({key: value})


MUTANTS = {
  'another year': _fact('year', 1999),
  'another link': _fact('link', 'https://example.org'),
  'cross attention that is not there': _fact('cross', True),
  'parameters of an older layer': _fact('parameters', 7),
  'an unknown fact': _fact('fast', True),
  'another default': lambda f: f['fields'].update(heads=64),
  'a smaller state': lambda f: f['state_bytes'].update({'8192': 1}),
  'a fact is missing': lambda f: f.pop('family'),
  'a law is missing': lambda f: f['laws'].pop('packing'),
  'a law that is none': lambda f: f['laws'].update(beauty='holds'),
  'a law failed': lambda f: f['laws'].update(batch={'failed': 'far apart'}),
  'a law that is claimed has a No': lambda f: f['laws'].update(
    causality={'no': 'it looks ahead'}
  ),
  'a No that holds': lambda f: f['laws'].update(layout='holds'),
  'another reason': lambda f: f['laws'].update(layout={'no': 'who knows'}),
  'no run on record': lambda f: f.pop('run'),
  'a run without a date': lambda f: f['run'].pop('date'),
  'fewer examples': lambda f: f['run'].update(examples=1),
}


@pytest.mark.parametrize('mutant', MUTANTS)
def test_a_fragment_out_of_step_is_seen(mutant):
  name = 'gated_linear'
  fragment = copy.deepcopy(FRAGMENTS[name])
  MUTANTS[mutant](fragment)
  assert fragment != FRAGMENTS[name]
  assert capabilities.wrong(name, fragment)


# ------------------------------------------------------------ outcomes of tests

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_mechanisms" name="test_law[s4d-0-reference]" />
<testcase classname="tests.test_mechanisms" name="test_law[s4d-1-reference]">
  <failure message="AssertionError: too far&#10;assert 2 &lt;= 1">...</failure>
</testcase>
<testcase classname="tests.test_mechanisms" name="test_law[s4d-0-bfloat16]">
  <error message="ValueError: no inputs">...</error>
</testcase>
<testcase classname="tests.test_sharding" name="test_law[s4d-0]" />
<testcase classname="tests.test_nnx" name="test_in_nnx[s4d-0]" />
</testsuite></testsuites>"""


def test_outcomes():
  assert tool.outcomes('s4d', JUNIT) == {
    'reference': ['', 'AssertionError: too far'],
    'bfloat16': ['ValueError: no inputs'],
    'sharding': [''],
    'test_in_nnx': [''],
  }


def _results(**other):
  return {law: ['', ''] for law in LAWS} | other


RUN = {'examples': 2, 'source': ''}


def test_what_failed_is_written():
  facts = capabilities.facts('s4d')
  sound, failed = tool.judged(facts, _results(), RUN)
  assert sound['laws'] == facts['laws']
  assert sound['laws']['layout'].keys() == {'no'}
  assert not failed
  results = _results(batch=['', 'apart'], test_state_bytes=['more', ''])
  broken, failed = tool.judged(facts, results, RUN)
  assert broken['laws']['batch'] == {'failed': 'apart'}
  assert failed == ['batch: apart', 'test_state_bytes: more']
  assert '**failed**' in capability_pages.markdown([broken | {'run': _run()}])


@pytest.mark.parametrize('batch', [[], ['']])
def test_a_law_that_was_not_run_does_not_hold(batch):
  with pytest.raises(RuntimeError, match='batch was run on'):
    tool.judged(capabilities.facts('s4d'), _results(batch=batch), RUN)


def test_laws_run_again_when_the_source_changed():
  fragment = copy.deepcopy(FRAGMENTS['s4d'])
  fragment['run']['source'] = tool.source('s4d')
  assert not tool.stale('s4d', fragment)
  assert tool.stale('s4d', None)
  for change in (
    lambda f: f['run'].update(source='another'),
    lambda f: f['laws'].pop('batch'),  # a law that is new
    lambda f: f['laws'].update(batch={'failed': 'apart'}),
  ):
    other = copy.deepcopy(fragment)
    change(other)
    assert tool.stale('s4d', other)


# ----------------------------------------------------------------- the program


def _run():
  return {**FRAGMENTS['s4d']['run'], 'source': tool.source('s4d')}


@pytest.fixture
def docs(tmp_path, monkeypatch):
  """Fragments of two mechanisms, of which one has gone, and no third."""
  monkeypatch.setattr(registry, 'names', lambda: ['multi_head', 's4d'])
  known = FRAGMENTS['s4d'] | {'run': _run(), 'parameters': 1}
  tool.write('s4d', known, tmp_path)
  tool.write('gone', known | {'mechanism': 'gone'}, tmp_path)
  return tmp_path


def test_the_program_does_what_is_left_to_do(docs, monkeypatch, capsys):
  proved = []

  def prove(name, progress):
    proved.append(name)
    progress(50)
    return {**FRAGMENTS[name], 'run': _run()}, []

  monkeypatch.setattr(tool, 'prove', prove)
  with pytest.raises(SystemExit) as ended:
    tool.main([], docs)
  assert ended.value.code == 0
  assert proved == ['multi_head']
  left = tool.read(docs)
  assert list(left) == ['multi_head', 's4d']
  assert left['s4d']['parameters'] == FRAGMENTS['s4d']['parameters']
  page = (docs / 'capabilities.md').read_text(encoding='utf-8')
  assert '`s4d`' in page
  assert '`gone`' not in page
  assert 'holds what it claims' in capsys.readouterr().out


def test_a_failure_is_told(docs, monkeypatch, capsys):
  monkeypatch.setattr(
    tool, 'prove', lambda name, _: (FRAGMENTS[name], ['batch: apart'])
  )
  with pytest.raises(SystemExit) as ended:
    tool.main(['--mechanism=s4d'], docs)
  assert ended.value.code == 1
  assert 'FAILED s4d: batch: apart' in capsys.readouterr().out


def test_rendering_runs_nothing(docs, monkeypatch):
  monkeypatch.setattr(tool, 'prove', None)
  before = tool.read(docs)
  with pytest.raises(SystemExit) as ended:
    tool.main(['--render'], docs)
  assert ended.value.code == 0
  assert tool.read(docs) == before
  assert (docs / 'capabilities.html').exists()


def test_an_unknown_mechanism_is_an_error(docs):
  with pytest.raises(SystemExit, match='Did you mean gated_linear'):
    tool.main(['--mechanism=gated_liner'], docs)


# ------------------------------------------------------------------- the pages


@pytest.mark.parametrize(
  ('count', 'text'),
  [
    (None, '-'),
    (512, '512 B'),
    (1024, '1.00 KiB'),
    (16_842_756, '16.1 MiB'),
    (537_919_492, '513 MiB'),
    (3 * 2**40, '3.00 TiB'),
  ],
)
def test_sizes(count, text):
  assert capability_pages.size(count) == text


@pytest.mark.parametrize(
  ('authors', 'text'),
  [
    ('Vaswani, Shazeer, Parmar', 'Vaswani et al. 2020'),
    ('Lu et al.', 'Lu et al. 2020'),
    ('Dao, Gu', 'Dao, Gu 2020'),
    ('Graves', 'Graves 2020'),
  ],
)
def test_citations(authors, text):
  assert capability_pages.cite({'authors': authors, 'year': 2020}) == text


def test_pages_name_every_mechanism_and_need_no_other_file():
  page = capability_pages.page(list(FRAGMENTS.values()))
  for name in registry.names():
    assert page.count(f'<th scope="row" class="text"><code>{name}</code>') == 3
  assert not re.search(r'<(script|link|img|iframe)|url\(|@import', page)
  opened = Counter(re.findall(r'<(\w+)[ >]', page.partition('<body>')[2]))
  closed = Counter(re.findall(r'</(\w+)>', page.partition('<body>')[2]))
  assert opened + Counter(['body', 'html']) == closed


def test_what_is_not_markup_is_not_read_as_such():
  fragment = copy.deepcopy(FRAGMENTS['s4d']) | {'paper': 'A < B & "C" | D'}
  page = capability_pages.page([fragment])
  assert "A &lt; B &amp; 'C' | D" in page
  assert r"A < B & 'C' \| D" in capability_pages.markdown([fragment])


# ------------------------------------------------------------------- the README


README = (tool.ROOT / 'README.md').read_text(encoding='utf-8')


def _rows(head: str) -> list[list[str]]:
  """The cells of the README's table whose first column has this name."""
  table = re.search(rf'^\| {head} \|.*\n\|[-|: ]+\n((?:\|.*\n)+)', README, re.M)
  return [
    [cell.strip() for cell in line.strip('|').split('|')]
    for line in table[1].splitlines()
  ]


def test_the_readme_names_every_mechanism_once():
  rows = {row[0].strip('`'): row for row in _rows('mechanism')}
  assert len(rows) == len(_rows('mechanism'))
  assert sorted(rows) == registry.names()
  for name, fragment in FRAGMENTS.items():
    paper = f'[{capability_pages.cite(fragment)}]({fragment["link"]})'
    assert paper in rows[name], name


def test_the_readme_names_positions_and_laws():
  said = re.search(r'Position encodings: ([^.]*)\.', README)[1]
  assert sorted(re.findall(r'`(\w+)`', said)) == registry.positions()
  assert [row[0] for row in _rows('law')] == list(LAWS)
  assert '(docs/capabilities.md)' in README
