"""What long work shows meanwhile: bars in a terminal, else plain lines."""

import threading
import time
from statistics import fmean

from rich.console import Console
from rich.progress import (
  BarColumn,
  Progress,
  TextColumn,
  TimeElapsedColumn,
)

EVERY = 10.0  # seconds between the lines of a run where there is no terminal


class Screen:
  """Progress over the cells of an ablation and within the one that runs.

  with Screen(console, cells) as screen:
    screen.start(cell)
    fit(..., progress=screen.step)
    screen.finish(...)

  The time left of a cell to come is the mean of those that ran on its task, or
  of all that ran.
  """

  def __init__(self, console: Console, todo: list):
    self.console = console
    self.todo = list(todo)  # those that are neither finished nor running
    self.count = len(self.todo)
    self.seconds: dict[str, list[float]] = {}  # task -> of the cells that ran
    self.bars = Progress(
      TextColumn('{task.description}'),
      BarColumn(bar_width=10),
      TextColumn('{task.fields[text]}'),
      console=console,
      disable=not console.is_terminal,
    )
    self.all = self.bars.add_task('all cells', total=self.count or 1, text='')
    self.one = self.bars.add_task('', total=1, text='', visible=False)

  def __enter__(self):
    self.bars.start()
    return self

  def __exit__(self, *_):
    self.bars.stop()

  def start(self, cell) -> None:
    self.todo.remove(cell)
    self.cell = cell
    self.began = self.told = time.monotonic()
    self.first = None  # step and time of the first report: compiled by then
    self.number = self.count - len(self.todo)
    self.title = f'[{self.number}/{self.count}] {cell.name}'
    self.console.print(f'{self.title}: starts', markup=False, highlight=False)
    self.bars.update(
      self.one,
      description=f'{cell.task} {cell.mechanism}',
      completed=0,
      text='compiles',
      visible=True,
    )

  def step(self, step: int, steps: int, metrics: dict) -> None:
    """What `fit` reports to."""
    now = time.monotonic()
    self.first = self.first or (step, now)
    text, left = f'{step}/{steps}', None
    if step > self.first[0]:
      rate = (step - self.first[0]) / (now - self.first[1])
      left = (steps - step) / rate
      text += f'  {rate:.1f} steps/s'
    if 'loss' in metrics:
      text += f'  loss {metrics["loss"]:.3f}'
    if left is not None:
      text += f'  {clock(left)} left'
    whole = self._left(now, left)
    over = '' if whole is None else f'{clock(whole)} left'
    self.bars.update(self.one, completed=step, total=steps, text=text)
    self.bars.update(
      self.all, completed=self.number - 1 + step / steps, text=over
    )
    if not self.console.is_terminal and now - self.told > EVERY:
      self.told = now
      line = f'{self.title}: {text}' + (f'  (all: {over})' if over else '')
      self.console.print(line, markup=False, highlight=False)

  def finish(self, text: str) -> None:
    seconds = time.monotonic() - self.began
    self.seconds.setdefault(self.cell.task, []).append(seconds)
    self.bars.update(self.all, completed=self.number)
    self.bars.update(self.one, visible=False)
    line = f'{self.title}: {text}, {clock(seconds)}'
    self.console.print(line, markup=False, highlight=False)

  def _left(self, now: float, left: float | None) -> float | None:
    """Seconds until all is done, if there is anything to go by."""
    known = {task: list(took) for task, took in self.seconds.items()}
    if left is not None:
      took = now - self.began + left
      known.setdefault(self.cell.task, []).append(took)
    if not known:
      return None
    every = [seconds for took in known.values() for seconds in took]
    todo = sum(fmean(known.get(cell.task, every)) for cell in self.todo)
    return (left or 0) + todo


class Clock:
  """Says that something takes long, and how long so far.

  with Clock(console) as clock:
    clock.start('compiles')
    clock.say('4 of 7')

  A line that moves in a terminal, else one now and then.
  """

  def __init__(self, console: Console):
    self.console = console
    self.done = threading.Event()
    self.bars = Progress(
      TextColumn('{task.description} {task.fields[text]}'),
      TimeElapsedColumn(),
      console=console,
      disable=not console.is_terminal,
      transient=True,
    )
    self.bar = self.bars.add_task('', text='')
    self.title = self.text = ''
    self.began = time.monotonic()

  def start(self, title: str) -> None:
    self.title, self.text, self.began = title, '', time.monotonic()
    self.bars.reset(self.bar, description=title, text='')

  def say(self, text: str) -> None:
    self.text = text
    self.bars.update(self.bar, text=text)

  def note(self, text: str) -> None:
    """A line that stays, of what is done."""
    self.console.print(text, markup=False, highlight=False)

  def __enter__(self):
    self.bars.start()
    if not self.console.is_terminal:
      threading.Thread(target=self._tell, daemon=True).start()
    return self

  def __exit__(self, *_):
    self.done.set()
    self.bars.stop()

  def _tell(self) -> None:
    while not self.done.wait(EVERY):
      passed = clock(time.monotonic() - self.began)
      line = f'{self.title} {self.text} {passed}'
      self.console.print(' '.join(line.split()), markup=False, highlight=False)


def clock(seconds: float) -> str:
  """1:05, or 1:02:05."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f'{hours}:{minutes:02}:{seconds:02}'
    if hours
    else (f'{minutes}:{seconds:02}')
  )
