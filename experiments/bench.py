"""How fast the library is, beside what it is measured against.

  python -m experiments.bench                 everything, about 15 minutes
  python -m experiments.bench lm softmax      some sections
  python -m experiments.bench growth --mechanism=gated_linear

Sections:
  lm        training a softmax language model: the library's LM beside the same
            model written plainly with flax.linen.MultiHeadDotProductAttention
  softmax   causal attention at 8192 tokens, forward and backward: in blocks,
            dense, jax.nn.dot_product_attention and, if torch is installed, its
            scaled_dot_product_attention; time and temporary memory
  masks     windows, documents and prefixes: time against tiles not empty
  growth    time of linear-time mechanisms from 4k to 32k tokens
  balance   work of devices in a ring, by layout of the tokens: tiles, counted

  python -m experiments.bench --kernels --static

counts instead, with libtpu but no TPU, what TPU kernels do in a tile,

  python -m experiments.bench --kernels --compile

compiles them with every feature, width and length for five chips, and says what
does not fit, and

  python -m experiments.bench --kernels --static --gpu

with the compiler for GPUs but no GPU, which registers GPU kernels take and what
they spill; `pip install '.[report,aot]'` installs both compilers.

  python -m experiments.bench --kernels --gpu

on a Hopper GPU checks attention against float64 and then times it. It needs jax
and, to be compared with it, torch; nothing else.

Contenders take turns, and a ratio is the median over the turns of the ratio
within a turn: whatever else the machine does then hits all of them alike. Times
are forward and backward. Results go to docs/benchmarks/, one file a section,
with the command, versions, device and date.
"""

import argparse
import datetime
import difflib
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import compiled, machine

# Section -> where it is: what one does not run need not be installed.
SECTIONS = {
  'lm': 'bench_models:lm',
  'softmax': 'bench_models:attention',
  'masks': 'bench_models:mask_costs',
  'growth': 'bench_models:growth',
  'balance': 'bench_balance:page',
}
# Likewise of --kernels, by the flags that go with it.
KERNELS = {
  ('static',): {'flash_tpu': 'bench_kernels:static'},
  ('gpu',): {'flash_gpu': 'bench_gpu:page'},
  ('static', 'gpu'): {'flash_gpu_static': 'bench_gpu_static:page'},
  ('compile',): {'flash_tpu_compiled': 'bench_compiled:page'},
}


def parser() -> argparse.ArgumentParser:
  description, _, epilog = __doc__.partition('\n\n')
  flags = argparse.ArgumentParser(
    'python -m experiments.bench',
    description=description,
    epilog=epilog,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  flags.add_argument(
    'section', nargs='*', help=f'of {", ".join(SECTIONS)}; all by default'
  )
  flags.add_argument('--turns', type=int, help='how often each takes its turn')
  flags.add_argument(
    '--length',
    type=int,
    default=8192,
    help='tokens, of sections softmax and masks',
  )
  flags.add_argument(
    '--heads', type=int, default=1, help='of sections softmax and masks'
  )
  flags.add_argument(
    '--mechanism', action='append', help='of section growth; may be repeated'
  )
  flags.add_argument(
    '--kernels',
    action='store_true',
    help='kernels alone; needs --static, --gpu or both, or --compile',
  )
  flags.add_argument(
    '--static',
    action='store_true',
    help='by what their compilers say, nothing is run; those for TPUs',
  )
  flags.add_argument(
    '--gpu',
    action='store_true',
    help='those for Hopper GPUs, on one, or with --static without',
  )
  flags.add_argument(
    '--compile',
    action='store_true',
    help='all features for all TPUs, nothing is run: do they fit?',
  )
  flags.add_argument(
    '--out', type=Path, default=Path('docs/benchmarks'), help='folder'
  )
  return flags


def main(argv: Sequence[str] | None = None) -> None:
  flags = parser()
  args = flags.parse_args(argv)
  unknown = sorted(set(args.section) - set(SECTIONS))
  if unknown:
    close = difflib.get_close_matches(unknown[0], SECTIONS, 1)
    hint = f' Did you mean {close[0]}?' if close else ''
    flags.error(f'no section {unknown[0]!r}.{hint}')
  asked = ('static', 'gpu', 'compile')
  how = tuple(name for name in asked if getattr(args, name))
  if bool(how) != args.kernels or how not in ((), *KERNELS):
    flags.error('--kernels goes with --static, --gpu or both, or --compile')
  sections = KERNELS[how] if how else SECTIONS
  compiled.keep()
  for name in args.section or sections:
    args.out.mkdir(parents=True, exist_ok=True)
    module, function = sections[name].split(':')
    section = getattr(
      importlib.import_module(f'experiments.{module}'), function
    )
    title, *rest = section(args)
    words = shlex.join(['python', '-m', 'experiments.bench', *sys.argv[1:]])
    versions = ', '.join(f'{k} {v}' for k, v in machine.versions().items())
    today = datetime.date.today().isoformat()
    made = f'Made by `{words}`: {machine.device()}; {versions}; {today}.'
    page = '\n\n'.join([title, made, *rest]) + '\n'
    (args.out / f'{name}.md').write_text(page, encoding='utf-8')
    print(page)


if __name__ == '__main__':
  main()
