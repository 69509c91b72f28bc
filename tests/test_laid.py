"""What a compiler has decided is known before it is done."""

import os
import threading
import time
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from configs import long_context
from experiments import laid, planned
from jaxattn.analysis import traffic
from pallas_kernels import chips

ROOM = 32_000
# As two versions of a compiler write it: the second has pages.
MEMORY = """BufferAssignment:
allocation 0: size 512,{0} thread-local:
 value: <2 reduce_sum.346 @0> (size=512,offset=0): f32[]{{:T(128)}}
allocation 1: size 6000,{0} parameter 2, shape |f32[1500]| at ShapeIndex {{}}:
 value: <7419 param.193 @0> (size=6000,offset=0): f32[1500]
allocation 2: size 8,{0} output shape is |(s32[])|, maybe-live-out:
allocation 3: size {1},{0} preallocated-temp:
allocation 4: size 9999999, color 1,{0} preallocated-temp:
"""
REPORT = """Memory Space: default (color=0)
Total bytes: {0} (0.01GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
Memory Space: vmem (color=1)
Total bytes: 9999999 (0.01GiB)
"""


def write(folder, temporaries, last=True, page='', more=0):
  """What a compiler writes down; the last of it, or not yet."""
  name = folder / 'module_0000.jit_train.after_optimizations'
  of = lambda end: name.with_name(f'{name.name}{end}.txt')
  of('').write_text('HloModule jit_train')
  of('-buffer-assignment').write_text(MEMORY.format(page, temporaries))
  if last:
    report = REPORT.format(6520 + temporaries + more)
    of('-memory-usage-report').write_text(report)


class Slow:
  """A compiler that is done when it is told to be."""

  def __init__(self):
    self.go = threading.Event()

  def lower(self):
    return SimpleNamespace(compile=self.compile)

  def compile(self):
    assert self.go.wait(20)
    memory = SimpleNamespace(
      argument_size_in_bytes=6000,
      output_size_in_bytes=50,
      alias_size_in_bytes=20,
      temp_size_in_bytes=7000,
      generated_code_size_in_bytes=123,
    )
    return SimpleNamespace(
      memory_analysis=lambda: memory, as_text=lambda: 'HloModule jit_train'
    )


@pytest.fixture
def slow(monkeypatch):
  monkeypatch.setattr(laid, 'EVERY', 0.01)
  slow = Slow()
  yield slow
  slow.go.set()


@pytest.mark.parametrize('page', ['', ' page 0,'])
def test_what_is_read(tmp_path, page):
  write(tmp_path, 1000, last=False)
  assert laid.read(tmp_path) is None
  write(tmp_path, 1000, page=page)
  assert laid.read(tmp_path) == ('HloModule jit_train', 6000, 1520, None)


def test_what_does_not_add_up_is_not_understood(tmp_path):
  write(tmp_path, 1000, more=1)
  assert laid.read(tmp_path) is None


@pytest.mark.parametrize('temporaries', [1000, 40_000])
def test_code_is_not_awaited_where_it_decides_nothing(
  tmp_path, slow, temporaries
):
  write(tmp_path, temporaries)
  found = laid.soon(slow.lower(), tmp_path, ROOM)
  assert not slow.go.is_set()
  assert found.temporaries == temporaries + 520
  assert found.code is None


def test_code_is_awaited_where_it_may_decide(tmp_path, slow):
  write(tmp_path, ROOM - 6000 - 520 - 900)  # less than 1/32 of it is left
  threading.Timer(0.1, slow.go.set).start()
  found = laid.soon(slow.lower(), tmp_path, ROOM)
  assert found.code == 123
  assert found.temporaries == ROOM - 6000 - 900


def test_all_is_awaited_of_a_compiler_that_writes_nothing(tmp_path, slow):
  write(tmp_path, 1000, last=False)
  threading.Timer(0.1, slow.go.set).start()
  found = laid.soon(slow.lower(), tmp_path, ROOM)
  assert found == ('HloModule jit_train', 6000, 7030, 123)


def test_what_the_compiler_raises_is_raised(tmp_path):
  def fails():
    raise MemoryError('too much')

  with pytest.raises(MemoryError, match='too much'):
    laid.soon(SimpleNamespace(compile=fails), tmp_path, ROOM)


# ----------------------------------------------------------- another process


def told(word, dumps):
  """Its compiler is told; and a thread that never ends does not keep it."""
  threading.Thread(target=time.sleep, args=(1000,)).start()
  flags = os.environ['XLA_FLAGS']
  assert f'--xla_dump_to={dumps}' in flags
  assert '--xla_dump_hlo_module_re=jit_f' in flags
  return word, os.getpid()


def refuses(dumps):
  raise NotImplementedError('7 heads and 8 devices')


def breaks(dumps):
  return 1 / 0


def dies(dumps):
  os._exit(7)


def test_a_function_runs_apart(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')
  began = time.monotonic()
  word, process = laid.apart(told, 'so', name='jit_f')
  assert (word, process != os.getpid()) == ('so', True)
  assert time.monotonic() - began < 500
  assert os.environ['XLA_FLAGS'] == '--xla_backend_optimization_level=0'
  with pytest.raises(NotImplementedError, match='7 heads and 8 devices'):
    laid.apart(refuses, name='jit_f')
  with pytest.raises(RuntimeError, match='ZeroDivisionError'):
    laid.apart(breaks, name='jit_f')
  with pytest.raises(laid.Ended, match='status 7, before it said anything'):
    laid.apart(dies, name='jit_f')


# ------------------------------------------------- with a compiler of TPUs


def twice(config, topology, length, dumps):
  """What is known soon, and what is at the end, of one compilation."""
  seen = []

  def both(lowered, dumps, room):
    done = laid.whole(lowered)
    seen.extend([laid.read(dumps), done])
    return done

  with mock.patch.object(laid, 'soon', both):
    planned.here(config, topology, length, dumps)
  count = lambda x: [
    x.arguments,
    *(
      traffic.total(traffic.exchanges(x.text), hidden=h) for h in (False, True)
    ),
  ]
  return [(*count(x), x.temporaries) for x in seen]


def exceeded(dumps):
  """What the compiler says that a program needs; and what it has laid out."""
  where = jax.sharding.SingleDeviceSharding(chips.devices('v5e')[0])
  x = jax.ShapeDtypeStruct((5 * 2**30,), jnp.float32, sharding=where)
  try:
    jax.jit(lambda x: x + 1).lower(x).compile()
  except jax.errors.JaxRuntimeError as error:
    found = laid.read(dumps)
    return planned._exceeded(error)[0], found.arguments + found.temporaries


@pytest.mark.aot
@pytest.mark.usefixtures('compiler')
class TestCompiled:
  def test_what_is_known_soon_is_what_is_known_at_the_end(self):
    config = long_context.get_config('quick,ring').to_dict()
    config['policy']['implementation'] = 'xla'  # compiles sooner
    soon, late = laid.apart(twice, config, 'v5e', 4096, name='jit_train')
    assert soon[:3] == late[:3]
    # JAX counts more temporaries than the compiler, who decides.
    assert 0.5 * late[3] < soon[3] <= late[3]

  def test_it_counts_as_the_compiler_does_when_it_refuses(self):
    says, counted = laid.apart(exceeded, name='.*')
    assert says == counted == 40 * 2**30
