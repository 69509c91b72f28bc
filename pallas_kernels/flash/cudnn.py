"""Softmax attention by cuDNN, as far as it means the same.

It serves a GPU for which there is no kernel of ours. Its masks are by place, so
orders have to be places; of padding it knows the length alone. It keeps no sums
over keys that others could add to.
"""

import jax

from pallas_kernels.masks import And, Causal, Everything, Mask, Tokens, Window
from pallas_kernels.problem import Engine, Extras, Rule, unfit


def refuses(
  rule: Rule, q, k, v, extras: Extras, query: Tokens, key: Tokens, spread: bool
) -> str | None:
  """Why this backend cannot serve a call, or None; arguments as of `attend`.

  Args:
    spread: there are more keys on other devices.
  """
  if extras:
    return 'it leaves scores and weights as they are'
  tagged = query.side.tags or key.side.tags
  if not rule.ordered or query.segments is not None or tagged:
    return 'it is for tokens in order, of one document'
  if spread or rule.dtype != q.dtype:
    return 'it has no partial results, and so no sinks'
  if why := unfit(q, k, v, ('bfloat16', 'float16')):
    return why
  if q.shape[3] != v.shape[3]:
    return f'values have to be as wide as keys, {q.shape[3]}, not {v.shape[3]}'
  if _arguments(rule.mask) is None:
    return f'it has no mask {rule.mask}'
  if not isinstance(rule.mask, Everything) and q.shape[1] != k.shape[1]:
    return 'its masks are for as many keys as there are queries'
  try:
    jax.eval_shape(lambda *x: _attend(rule, *x), q, k, v)
  except Exception as error:  # of many kinds: no library, no such width, ...
    return str(error).partition('\n')[0].rstrip('.')
  return None


def _arguments(mask: Mask) -> dict | None:
  """A mask as `jax.nn.dot_product_attention` takes it, or None."""
  match mask:
    case Everything():
      return {}
    case Causal():
      return {'is_causal': True}
    case And(Causal(), Window(left, None)) | And(Window(left, None), Causal()):
      return {'is_causal': True, 'local_window_size': (left - 1, 0)}
  return None


def _attend(rule, q, k, v):
  return jax.nn.dot_product_attention(
    *(q, k, v),
    scale=rule.scale,
    implementation='cudnn',
    **_arguments(rule.mask) or {},
  )


def attend(rule, q, k, v, extras, query, key):
  """o, and None for m and l; arguments as in `problem`."""
  del extras, query, key
  return _attend(rule, q, k, v), None, None


ENGINE = Engine(attend)
