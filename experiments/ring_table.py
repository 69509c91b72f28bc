"""The longest contexts of Ring Attention's Table 3, by compilation.

  pip install -e '.[aot]'
  python -m experiments.ring_table

Liu, Zaharia, Abbeel 2023, https://arxiv.org/abs/2310.01889, Table 3: what is
the longest sequence that a model can be trained on, in full precision, with
weights over all devices and layers computed again backward? That is a claim
about memory, so a compiler can check it: each step is compiled for its chips,
at the paper's length and at the longest that fits.

Takes half an hour on two CPU cores; what is found is kept in --runs, and the
same command goes on from there. Writes docs/benchmarks/ring_attention.md.
"""

import argparse
import datetime
import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # see experiments.plan

from rich.console import Console

from configs import long_context
from experiments import machine
from experiments.plan import STEPS, longest, way
from experiments.planned import Plan
from experiments.screen import Clock
from jaxattn.analysis.table import markdown
from jaxattn.train import log

PAGE = Path('docs/benchmarks/ring_attention.md')
K = 1024
# As the paper calls the chips, our topology, model, and its contexts in
# thousands: of blockwise attention on one device each, and of Ring Attention.
ROWS = (
  ('TPUv3-512', 'v3:16x16', '7b', None, 2048),
  ('TPUv3-512', 'v3:16x16', '13b', None, 1024),
  ('TPUv4-1024', 'v4:8x8x8', '3b', None, 16384),
  ('TPUv4-1024', 'v4:8x8x8', '7b', None, 8192),
  ('TPUv4-1024', 'v4:8x8x8', '13b', None, 4096),
  ('TPUv4-1024', 'v4:8x8x8', '30b', None, 2048),
  ('TPUv5e-256', 'v5e:16x16', '3b', None, 4096),
  ('TPUv5e-256', 'v5e:16x16', '7b', 16, 2048),
)

ABOUT = f"""
A training step of `configs/long_context.py:ring,size=...` (AdamW, float32
weights, moments and activations; weights and moments over all devices; each
layer is computed again backward; feed-forward and loss 2,048 tokens at a time),
one row a step, compiled for chips that are not there. Thousands are of {K}
tokens. "GiB there" is what arrays take of a device at the paper's length, of
what the compiler lets it have. "Ours" is the longest that fits, of {STEPS}
lengths in an octave. "Blockwise" keeps a row on one device, and as many rows as
there are devices; the paper has 16 thousand for 7B on TPUv5e-256, where
memory-efficient attention has 8 and plain attention 2.

TPUv3-512 and TPUv4-1024 count cores, of which a chip has two. On v3 a core is
a device; a v4 chip is one device, so there are 512 of them. Models have the
shapes of LLaMA (3B that of Llama 3.2, whose sides divide by 512), but one table
for embedding and logits, and so 0.1e9 to 0.2e9 parameters less; they stand for
what the paper calls 3B, 7B, 13B and 30B. On v3
the attention is compiled by XLA alone, for the kernels are for v4 and later.
"""


def found(topology: str, size: str, name: str, asked: int, clock) -> dict:
  """The plan at the paper's length, and the longest that fits."""
  config = long_context.get_config(f'ring,size={size}').to_dict()
  if name == 'blockwise':
    config = way(config, name)
  clock.start(f'{size} on {topology}, {name}:')
  fits, fails, seen = longest(config, topology, asked, clock)
  at = seen[asked] if seen[asked].fits else None
  keep = lambda x: x and _kept(x)
  return {'asked': keep(at), 'fits': keep(fits), 'fails': keep(fails)}


def _kept(made: Plan) -> dict:
  names = ('length', 'devices', 'kind', 'parameters', 'needs', 'room', 'sent')
  return {name: getattr(made, name) for name in names} | {'fits': made.fits}


def page(kept: dict[str, dict]) -> list[str]:
  """The page: a title, and paragraphs."""
  gib = lambda n: f'{n / 2**30:.1f}'
  thousands = lambda n: f'{n // K:,}'
  rows = []
  for chip, topology, size, _, ring in ROWS:
    both = kept.get(f'{topology} {size} ring')
    alone = kept.get(f'{topology} {size} blockwise')
    if not both:
      continue
    most = both['fits']
    at = both['asked']
    rows.append(
      [
        *(chip, f'{topology}, {most["devices"]} devices', size.upper()),
        f'{most["parameters"] / 1e9:.1f}',
        f'{ring:,}',
        f'{gib(at["needs"])} of {gib(at["room"])}' if at else 'does not fit',
        f'**{thousands(most["length"])}**' if most['fits'] else 'none',
        f'{most["length"] / K / ring:.2f}' if most['fits'] else '-',
        thousands(alone['fits']['length'])
        if alone and alone['fits']['fits']
        else '-',
      ]
    )
  head = [
    *('in the paper', 'compiled for', 'model', 'parameters, 1e9'),
    *('paper, 1e3 tokens', 'GiB there', 'ours, 1e3 tokens', 'over the paper'),
    'blockwise, ours, 1e3 tokens',
  ]
  libtpu, versions = importlib.metadata.version('libtpu'), machine.versions()
  return [
    "# Ring Attention's longest contexts, by compilation",
    'Made by `python -m experiments.ring_table`: jax'
    f' {versions["jax"]}, libtpu {libtpu}, python {versions["python"]};'
    f' {datetime.date.today()}; nothing is run.',
    *(' '.join(part.split()) for part in ABOUT.split('\n\n')),
    markdown(head, rows),
  ]


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--runs', default='runs/ring_table', help='folder of what is found'
  )
  parser.add_argument(
    '--only', help='rows whose topology or model has this in it, as v5e'
  )
  options = parser.parse_args(argv)
  console = Console(stderr=True)
  path = Path(options.runs) / 'found.jsonl'
  path.parent.mkdir(parents=True, exist_ok=True)
  kept = {record.pop('name'): record for record in log.read(path)}
  with Clock(console) as clock:
    for name in ('ring', 'blockwise'):
      for _, topology, size, _, ring in ROWS:
        asked = ring * K if name == 'ring' else 16 * K
        key = f'{topology} {size} {name}'
        if key in kept or (options.only and options.only not in key):
          continue
        kept[key] = found(topology, size, name, asked, clock)
        log.append(path, {'name': key, **kept[key]})
        console.print(f'{key}: {kept[key]["fits"]["length"]:,} tokens fit')
  PAGE.write_text('\n\n'.join(page(kept)) + '\n', encoding='utf-8')
  console.print(f'written: {PAGE}')


if __name__ == '__main__':
  main()
