"""The capability table: what each mechanism claims, what it costs, what held.

A fragment is the record of one mechanism, plain JSON: facts read off its Spec
and its module, and what its laws said when they were last run. The pages are
made from fragments alone (`capability_pages`), so `experiments.capabilities`
runs laws only for those whose source changed, and two people who add mechanisms
write two files.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn import registry
from jaxattn.nn import Policy
from jaxattn.spec import LAWS
from jaxattn.state import nbytes

WIDTH = 1024  # of the layer whose state and parameters are counted
DTYPE = 'bfloat16'  # of what it caches; sums over time stay wider
LENGTHS = (8192, 131072)
RUN = ('examples', 'jax', 'python', 'platform', 'date', 'source')

Fragment = Mapping[str, Any]


def facts(name: str) -> dict[str, Any]:
  """What can be said of a mechanism without running it, as JSON has it.

  Shapes are traced and nothing is allocated. A law that is claimed is 'holds'
  here, and {'no': reason} if not.
  """
  spec = registry.spec(name)
  mixer = registry.make(name, width=WIDTH, policy=Policy(dtype=DTYPE))
  shared = {'width', 'policy', 'parent', 'name'}
  own = [f for f in dataclasses.fields(mixer) if f.name not in shared]
  x = jax.ShapeDtypeStruct((1, 8, WIDTH), jnp.dtype(DTYPE))
  weights = jax.eval_shape(mixer.init, jax.random.key(0), x)['params']
  found = {
    'mechanism': name,
    'family': registry.family(name),
    'paper': spec.paper,
    'authors': spec.authors,
    'year': spec.year,
    'link': spec.link,
    'fields': {f.name: f.default for f in own},
    'causal': _causal(mixer, own),
    'streams': bool(spec.claim('segmentation')),
    'cross': spec.cross,
    'packing': bool(spec.claim('packing')),
    'layout': spec.layout,
    'fft': spec.fft,
    'implementations': list(mixer.implementations),
    'sequence_parallelism': (
      list(mixer.strategies) if spec.claim('sharding') else []
    ),
    **_state(mixer),
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(weights)),
    'laws': {law: _claim(spec, law) for law in LAWS},
  }
  return json.loads(json.dumps(found))


def _causal(mixer, own) -> str:
  if any(field.name == 'causal' for field in own):
    return 'optional'
  return 'always' if mixer.causal else 'never'


def _state(mixer) -> dict[str, Any]:
  """What the layer remembers of one sequence, and how many bytes that takes."""
  if not mixer.causal:
    return {'memory': [], 'state_bytes': dict.fromkeys(map(str, LENGTHS))}
  memory = {
    length: jax.eval_shape(lambda n=length: mixer.init_state(1, n)).memory
    for length in LENGTHS
  }
  parts = jax.tree.leaves(memory[LENGTHS[0]], is_leaf=_whole)
  return {
    'memory': [_kind(part) for part in parts],
    'state_bytes': {str(n): nbytes(memory[n]) for n in LENGTHS},
  }


def _whole(part) -> bool:
  return dataclasses.is_dataclass(part)


def _kind(part) -> str:
  return type(part).__name__ if _whole(part) else 'array'


def _claim(spec, law: str) -> str | dict[str, str]:
  claim = spec.claim(law)
  return 'holds' if claim else {'no': claim.reason}


def wrong(name: str, fragment: Fragment) -> list[str]:
  """What keeps a fragment from being the record of this mechanism as it is.

  Empty if its facts are those of the code, every law that is claimed held when
  it was last run, every other has its reason, and the run is on record.
  """
  now, said = facts(name), []
  for key in sorted({*now, *fragment} - {'run', 'laws'}):
    if fragment.get(key) != now.get(key):
      said.append(
        f'{key} is {fragment.get(key)!r}, the code says {now.get(key)!r}'
      )
  laws = fragment.get('laws', {})
  for law in sorted({*LAWS, *laws}):
    got, want = laws.get(law), now['laws'].get(law)
    if got != want:
      said.append(f'law {law} is {got!r}, and should be {want!r}')
  run = fragment.get('run', {})
  said += [f'its run has no {key}' for key in RUN if not run.get(key)]
  examples = len(registry.spec(name).examples)
  if run.get('examples') not in (None, examples):
    said.append(f'ran on {run["examples"]} examples, there are {examples}')
  return said


def told(result: str | Mapping[str, str], word: str) -> str:
  """The reason of a law's 'no', or how it 'failed'; '' if it did not."""
  return '' if result == 'holds' else result.get(word, '')


def declined(fragments: Iterable[Fragment]) -> dict[str, int]:
  """law -> how many mechanisms do not claim it."""
  count = Counter(
    law
    for fragment in fragments
    for law, result in fragment['laws'].items()
    if told(result, 'no')
  )
  return {law: count[law] for law in LAWS}
