"""What GPU kernels take, as their compiler says it."""

import pytest

from experiments import bench
from experiments import bench_gpu_static as static
from experiments.bench_gpu_static import Cell, Kernel

NINE = 'i32 1, ' * 9
# Two kernels, of which the first has a second number of registers, and spills.
TEXT = f"""
.visible .entry flash_forward_mosaic_gpu_kernel(
  setmaxnreg.inc.sync.aligned.u32  240;
ptxas info    : (C7512) Potential Performance Loss: they are serialized
ptxas info    : Compiling entry function 'flash_forward_mosaic_gpu_kernel' for 'sm_90a'
    40 bytes stack frame, 36 bytes spill stores, 108 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 40 bytes cumulative stack
  call void @mosaic_gpu_launch_kernel(ptr %7, {NINE}i32 165976, ptr %8)
.visible .entry flash_backward_dq_mosaic_gpu_kernel(
ptxas info    : Compiling entry function 'flash_backward_dq_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers
  call void @mosaic_gpu_launch_kernel(ptr %7, {NINE}i32 51280, ptr %8)
"""  # noqa: E501


def test_what_the_compiler_writes_is_read():
  found = static.read(TEXT)
  assert list(found) == ['flash_forward', 'flash_backward_dq']
  one = found['flash_forward']
  assert (one.registers, one.most, one.stores, one.loads) == (168, 240, 36, 108)
  assert (one.shared, one.barriers, len(one.warnings)) == (165976, 16, 1)
  two = found['flash_backward_dq']
  assert two == Kernel(255, 255, 0, 0, 51280, 0)


def test_what_is_not_said_is_an_error():
  with pytest.raises(ValueError, match='says nothing of flash_forward'):
    static.read(TEXT.replace('Compiling', 'Reading'))


def test_a_row_for_each_kernel_and_a_word_for_a_refusal():
  ours = Cell('ours', 'all', 128, True)
  theirs = Cell('attention_mgpu', 'dq', 128, True, 'float16')
  kernel = Kernel(168, 240, 36, 108, 165976, 16)
  rows, said = static.table(
    {theirs: 'it has no mask', ours: {'forward': ('128 x 128', kernel)}}
  )
  assert said == ['it has no mask']
  *_, forward, dq = rows.splitlines()
  assert '| 168 | 240 | 36 | 108 | 165,976 | 16 |' in forward
  assert 'no (1)' in dq


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
  why = "jax-cuda13-plugin is not installed: pip install '.[aot]'"
  monkeypatch.setattr(static.chips, 'missing', lambda chip: why)
  with pytest.raises(SystemExit, match=r"pip install '\.\[aot\]'"):
    bench.main(['--kernels', '--static', '--gpu'])


@pytest.mark.aot
@pytest.mark.parametrize('compiler', ['h200'], indirect=True)
def test_a_cell_is_compiled(compiler):
  """In registers that a thread can have, and with nothing spilled."""
  found = static.compiled(Cell('ours', 'all', 64, True))
  assert set(found) == {'forward', 'dq', 'dk, dv'}
  for tile, kernel in found.values():
    assert tile in ('128 x 128', '128 x 64', '64 x 128')
    assert (kernel.registers, kernel.most) == (168, 240)
    assert kernel.stores == kernel.loads == 0
    assert 0 < kernel.shared <= 232_448
