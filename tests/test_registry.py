"""Mechanisms are found by the name of their file; wrong names get help."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest

import jaxattn
from jaxattn.spec import No, Spec

MEAN = '''
"""Causal mean: an example of a mechanism outside the tree.

https://example.org/mean. y_t = mean of x_s over s <= t.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn.mixer import Mixer
from jaxattn.nn import Linear
from jaxattn.spec import Spec


def reference(params, x, **_):
  count = jnp.arange(1, x.shape[1] + 1)[:, None]
  return jnp.cumsum(x, axis=1) / count @ params['out']['kernel']


class CausalMean(Mixer):

  @nn.compact
  def mix(self, x, tokens, memory, context, deterministic):
    same = tokens.segments[:, :, None] == tokens.segments[:, None, :]
    seen = same & (tokens.order[:, None, :] <= tokens.order[:, :, None])
    seen = (seen & (tokens.segments > 0)[:, None, :]).astype(x.dtype)
    mean = seen @ x / jnp.maximum(seen.sum(-1, keepdims=True), 1)
    return Linear(x.shape[-1], policy=self.policy, name='out')(mean), None


SPEC = Spec(
  paper='None', authors='Nobody', year=2000, link='https://example.org/mean',
  examples=({},),
  flops=lambda mixer, width, length: length**2 * width,
  state_bytes=lambda mixer, width, length: length * (width * 4 + 12) + 4,
)
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
  package = tmp_path / 'theirs'
  package.mkdir()
  (package / '__init__.py').touch()
  (package / 'causal_mean.py').write_text(textwrap.dedent(MEAN))
  monkeypatch.syspath_prepend(str(tmp_path))
  return package / 'causal_mean.py'


def test_names():
  names = jaxattn.names()
  assert names == sorted(names)
  five = {'multi_head', 'sliding_window', 'gated_linear', 'delta_net', 's4d'}
  assert five <= set(names)
  for name in names:
    assert isinstance(jaxattn.spec(name), Spec)


def test_make_needs_no_width():
  mixer = jaxattn.make('gated_linear', heads=4)
  x = jnp.ones((1, 3, 16))
  variables = mixer.init(jax.random.key(0), x)
  assert mixer.apply(variables, x).y.shape == x.shape


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: jaxattn.make('gated_liner'), 'Did you mean gated_linear'),
    (lambda: jaxattn.make('zzz'), 'There are: base_conv'),
    (lambda: jaxattn.make('no.such.file'), 'no mechanism'),
    (lambda: jaxattn.make('multi_head', head=2), 'Did you mean heads'),
    (lambda: jaxattn.make('multi_head', width=10, heads=4), 'heads=4'),
    (lambda: jaxattn.make('gated_linear', width=10, heads=4), 'heads=4'),
    (lambda: jaxattn.make('delta_net', width=10, heads=4), 'heads=4'),
    (lambda: jaxattn.make('sliding_window', width=8, window=0), 'window=0'),
    (lambda: jaxattn.make('s4d', width=8, dt_min=1.0), 'dt_min=1.0'),
    (lambda: jaxattn.make('multi_head', width=8, position='rop'), 'rope'),
    (lambda: jaxattn.make(3), 'named by a string'),
    (lambda: No(' '), 'reason'),
  ],
)
def test_wrong_names_and_values(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_outside_the_tree(outside):
  """A file of one's own decodes and packs without a state of its own."""
  mixer = jaxattn.make('theirs.causal_mean', width=8)
  x = jax.random.normal(jax.random.key(0), (2, 5, 8))
  variables = mixer.init(jax.random.key(1), x)
  whole = mixer.apply(variables, x).y
  state = mixer.init_state(2, 5)
  parts = []
  for t in range(5):
    y, state = mixer.apply(
      variables, x[:, t : t + 1], state=state, return_state=True
    )
    parts.append(y)
  assert jnp.allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-6)


def run_laws(path, *args):
  return subprocess.run(
    [sys.executable, '-m', 'pytest', f'--mechanism={path}', '-n0', *args],
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_laws_judge_files_outside_the_tree(outside):
  """`pytest --mechanism=PATH` passes a sound file and fails a broken one."""
  laws = ('tests/test_mechanisms.py', '-k', 'causality or packing or bytes')
  sound = run_laws(outside, *laws)
  assert sound.returncode == 0, sound.stdout + sound.stderr
  assert '3 passed' in sound.stdout
  outside.write_text(
    outside.read_text().replace('<= tokens', '!= -1 + 0 * tokens')
  )
  broken = run_laws(outside, *laws)
  assert broken.returncode == 1
  assert 'reacts to a later input' in broken.stdout
