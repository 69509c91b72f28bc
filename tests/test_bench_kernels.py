"""Reading the compiler's programs, on one that is written here."""

import argparse
import importlib.metadata

import pytest

from experiments import bench_kernels

# A loop whose step does two things, computes a tile in either of two ways, and
# at the end of a row something more.
PROGRAM = """= control target key start
LH: loop header
= control target key end

     0   :  { %s1 = smov 0 } /* Start region 1 */
   0x1 LB: > { %s2 = sadd.s32 1, %s1 }
   0x2   : > { sbr.rel (%p1) target = $region10 }
   0x3   : > { %1 = vmatmul.f32.gmra.mxu0 %v1 } /* Start region 9 */
   0x4   : > { %2 = vmatmul.f32.gmra.mxu0 %v2 } /* End region 9 */
   0x5 PF: > { sbr.rel (%p2) target = $region11 } /* Start region 10 */
   0x6   : > { %3 = vmatmul.f32.gmra.mxu0 %v3 }
   0x7   : > { vst [vmem:[#allocation9_spill]] %v3 }
   0x8   : > { %4 = vmatmul.f32.gmra.mxu0 %v4 }
   0x9 PF: > { sbr.rel (%p3) target = $region12 } /* Start region 11 */
   0xa   : > { %5 = vrcp.f32 %v5 }
   0xb PF: > { sbr.rel (%p4) target = $region1 } /* Start region 12 */
   0xc   :  { vsyncpa [#allocation3], 1 }
"""
WORK = {3: 2, 4: 2, 6: 2, 8: 2}
CAPACITY = [2, 2, 4]  # of matrix units, of what permutes, of arithmetic


def test_steady():
  bundles = bench_kernels.lines(PROGRAM)
  units = [[0] * 10 for _ in bundles]
  for at, slots in WORK.items():
    units[at][bench_kernels.MXU] = slots
  units[7][bench_kernels.SPILL] = 1
  units[3][bench_kernels.VALU], units[6][bench_kernels.VALU] = 1, 4
  found = bench_kernels.steady(bundles, units, CAPACITY)
  assert found == bench_kernels.Schedule(
    **dict(tile=2, step=7, masked=3, busy=4 / 14, vector=1 / 28),
    **dict(fills=0, spills=0, masked_spills=1),
  )


# The same in a loop over rows, which begins and ends each; no branch tells.
NESTED = (
  PROGRAM.replace(': >', ': >>')
  .replace(
    '     0   :  { %s1 = smov 0 } /* Start region 1 */\n',
    '     0   :  { %s1 = smov 0 } /* Start region 1 */\n'
    '     0 LB: > { %s0 = sadd.s32 1, %s0 }\n     0   : > { %s9 = smov 0 }\n',
  )
  .replace('   0xc   :  {', '   0xb   : > { %s8 = smov 0 }\n   0xc   :  {')
)


def test_a_step_is_of_the_loop_over_tiles():
  """What the loop around it does once a row is no part of it."""
  steps = []
  for program, shift in ((PROGRAM, 0), (NESTED, 2)):
    bundles = bench_kernels.lines(program)
    units = [[2 * (at - shift in WORK)] + [0] * 9 for at in range(len(bundles))]
    steps.append(bench_kernels.steady(bundles, units, CAPACITY))
  assert len(bundles) == 16
  assert steps[0] == steps[1]


def test_bundles_wait_for_the_matrix_units_that_they_use():
  both = '{ %1 = vmatmul.mxu0 %v1 ;; %2 = vmatmul.bf16.gmra.mxu1 %v2 }'
  program = [both, '{ %3 = vadd.f32 %v3 }', '{ %4 = vmatmul.f32.mxu1 %v4 }']
  # At 1, 2 and 5, where mxu1 is done; then at 9, though mxu0 is done at 5.
  assert bench_kernels.cycles([*program, both], hold=4) == 9
  assert bench_kernels.cycles([*program, both], hold=1) == 4
  pushed = ['{ vmatpush.bf16.msra.mxu0 %v1 }'] * 3  # into registers of its own
  assert bench_kernels.cycles([both, *pushed], hold=4) == 4


def test_steady_counts_what_a_step_does_besides():
  bundles = bench_kernels.lines(PROGRAM)
  units = [[2 * (at in WORK)] + [0] * 9 for at in range(len(bundles))]
  assert bench_kernels.steady(bundles, units, CAPACITY).cycles is None
  # Two products of the tile, one after the other, and 5 bundles around them.
  assert (
    bench_kernels.steady(bundles, units, CAPACITY, hold=16).cycles == 17 + 5
  )


def test_steady_checks_that_both_files_are_of_one_program():
  with pytest.raises(ValueError, match='13 bundles, but units of 1'):
    bench_kernels.steady(bench_kernels.lines(PROGRAM), [[0]], CAPACITY)


def test_the_page_has_all_rows(monkeypatch):
  one = bench_kernels.Schedule(
    tile=1000, step=1200, masked=None, busy=0.5, vector=0, fills=0, spills=0
  )
  monkeypatch.setattr(bench_kernels, 'schedule', lambda cell: one)
  monkeypatch.setattr(bench_kernels, 'chosen', lambda *_: (1024, 512))
  # The page names the compiler's version; this page needs no compiler.
  monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0.0')
  *_, table, _, _, more = bench_kernels.static(argparse.Namespace())
  # Each of the features, both ways, on each chip; and two lines above them.
  ways = len(bench_kernels.CHIPS) * len(bench_kernels.TILES)
  assert len(more.split('\n')) == 2 + len(bench_kernels.FEATURES) * ways
  head, _, *rows = [
    [x.strip() for x in row.strip('| ').split('|')] for row in table.split('\n')
  ]
  rows = [dict(zip(head, row, strict=True)) for row in rows]
  has = lambda **given: [
    row for row in rows if all(row[name] == x for name, x in given.items())
  ]
  for chip in bench_kernels.CHIPS:
    for direction in 'forward', bench_kernels.DKV, bench_kernels.DQ:
      assert len(has(chip=chip, direction=direction, whose='flash')) == 1
    for width in '64', '256':
      assert len(has(chip=chip, width=width, whose='ours')) == 2
  assert {row['step over splash'] for row in has(whose='ours')} == {'1.00'}
