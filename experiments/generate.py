"""Continues a prompt with a trained model.

  python -m experiments.generate --workdir=DIR --prompt='def ' \\
      --max_new=200 --temperature=0.8 --top_p=0.95 --seed=0

DIR is what `experiments.train` trained in. A model of bytes (the task `bytes`)
reads and writes UTF-8 text and stops where it ends a document; an empty prompt
begins one. Models of other tasks read and write token ids: --prompt='3 1 4'.
"""

import argparse
import sys
from collections.abc import Sequence

import jax
import numpy as np

import jaxattn
from jaxattn.decode.generate import generate
from jaxattn.tasks.bytes import SEPARATOR


def encode(prompt: str, text: bool) -> list[int]:
  """Token ids of a prompt. Raises ValueError if they cannot be read."""
  if text:
    # What was not UTF-8 on the command line comes back as the bytes it was.
    return list(prompt.encode('utf-8', 'surrogateescape') or SEPARATOR)
  words = prompt.replace(',', ' ').split()
  if not all(word.isdecimal() for word in words):
    raise ValueError(
      f'prompt {prompt!r}: this is no model of bytes, so its prompt is token '
      "ids, such as '3 1 4'"
    )
  return [int(word) for word in words]


def decode(ids: Sequence[int], text: bool) -> str:
  """What is shown of token ids."""
  if not text:
    return ' '.join(str(int(id)) for id in ids)
  shown = bytes(int(id) for id in ids).decode('utf-8', 'replace')
  # A model may write anything, but not steer the reader's terminal.
  return ''.join(
    c if c.isprintable() or c in '\n\t' else '\N{REPLACEMENT CHARACTER}'
    for c in shown
  )


def answer(loaded, prompt: str, *, max_new: int, seed: int, **rules) -> str:
  """The prompt and what the model makes of it.

  Args:
    loaded: (model, params, config), of `jaxattn.load`.
    prompt: text for a model of bytes, otherwise ids separated by spaces.
    max_new: the most tokens to add.
    seed: of the draws.
    **rules: temperature, top_k and top_p, as `generate` takes them.

  Raises:
    ValueError: a prompt that is empty or cannot be read; numbers out of range.
  """
  text = loaded.config['task']['name'] == 'bytes'
  ids = encode(prompt, text)
  end = SEPARATOR[0] if text else None
  generated = generate(
    loaded.model,
    loaded.params,
    [np.array(ids, int)],
    max_new=max_new,
    key=jax.random.key(seed),
    end=end,
    **rules,
  )
  new = generated.tokens[0, : generated.lengths[0]].tolist()
  whole = [id for id in (*ids, *new) if id != end]
  return decode(whole, text)


def parser() -> argparse.ArgumentParser:
  description, _, epilog = __doc__.partition('\n\n')
  flags = argparse.ArgumentParser(
    'python -m experiments.generate',
    description=description,
    epilog=epilog,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  flags.add_argument('--workdir', required=True, help='where the model is')
  flags.add_argument('--prompt', default='', help='what to continue')
  flags.add_argument('--max_new', type=int, default=200, help='tokens to add')
  flags.add_argument(
    '--temperature', type=float, default=1.0, help='0 takes the best token'
  )
  flags.add_argument('--top_k', type=int, help='draw from the k best only')
  flags.add_argument(
    '--top_p', type=float, help='draw from the best of this mass only'
  )
  flags.add_argument('--seed', type=int, default=0, help='of the draws')
  return flags


def main(argv: Sequence[str] | None = None) -> None:
  """Prints an answer, or what is wrong, and then exits with status 1."""
  flags = vars(parser().parse_args(argv))
  try:
    loaded = jaxattn.load(flags.pop('workdir'))
    print(answer(loaded, **flags))
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  main()
