"""T5's relative positions: a learned bias for each bucket of distances.

Raffel et al. 2019, "Exploring the Limits of Transfer Learning with a Unified
Text-to-Text Transformer", https://arxiv.org/abs/1910.10683.

    x_ts + table_{h, bucket(t - s)}

Near distances have buckets of their own, farther ones share buckets that widen
with the logarithm of the distance. Scores are divided by sqrt(d) as everywhere
here; T5 itself leaves that to its initialiser.
"""

import flax.linen as nn
import numpy as np

from jaxattn.parallel import place
from jaxattn.position import Position
from pallas_kernels.scores import Buckets, Score


def reference(params, order, heads, width, furthest=128, causal=True):
  """The whole bias, 'h t s', bucket by bucket."""
  del heads, width
  buckets = params['table'].shape[1] // (1 if causal else 2)
  exact = buckets // 2
  number = np.zeros((len(order), len(order)), int)
  for t, here in enumerate(np.asarray(order)):
    for s, there in enumerate(np.asarray(order)):
      far = max(here - there, 0) if causal else abs(here - there)
      place = far
      if far >= exact:
        wide = np.log(far / exact) / np.log(furthest / exact)
        place = min(exact + int(wide * (buckets - exact)), buckets - 1)
      number[t, s] = place + (buckets if there > here and not causal else 0)
  return {'bias': params['table'][:, number]}


class T5Position(Position):
  """Adds a learned bias to each score.

  Attributes:
    buckets: how many biases a head has.
    furthest: distances from here on share the last bucket.
  """

  buckets: int = 32
  furthest: int = 128

  scores = True

  @nn.compact
  def score(self, heads, causal):
    table = self.param(
      'table',
      nn.initializers.normal(0.02),
      (heads, self.buckets),
      self.policy.param_dtype,
    )
    return Score(Buckets(self.furthest, causal), (place.whole(table),))
