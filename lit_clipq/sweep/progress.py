"""How far a sweep is: a bar with the time left where there is a terminal, else a line for each point."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from lit_clipq.analysis.records import PointRecord

CALIBRATION = 0.7
"""Share of the time of points that goes into what they share: a guess, for the time left alone."""


class SweepProgress:
    """Points that are done, as a context.

    Args:
        total: Points to measure.
        console: Where it is shown.
        quiet: Show nothing.
    """

    def __init__(self, total: int, console: Console, *, quiet: bool = False) -> None:
        self.total, self.console, self.quiet = total, console, quiet
        self.done = 0
        self._ahead = 0.0  # points' worth of work on those that are not done
        self._began = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _TimeLeft(self))
        self._bar = Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
        self._task = self._bar.add_task("float", total=total)

    def __enter__(self) -> "SweepProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def calibrating(self, points: int, name: str, done: int, total: int) -> None:
        """Show a layer that was fitted, for so many points at once."""
        self._ahead = points * CALIBRATION * done / max(1, total)
        self._bar.update(self._task, description=f"calibrating {name} ({done} of {total})")

    def measuring(self, what: str) -> None:
        """Show what is measured now."""
        self._bar.update(self._task, description=what)

    def point(self, record: PointRecord) -> None:
        """Show a point that is done."""
        self.done += 1
        self._ahead = max(0.0, self._ahead - CALIBRATION)
        self._bar.update(self._task, completed=self.done)
        if not self.quiet and not self.console.is_terminal:
            left = self.seconds_left()
            told = f", {_in_words(left)} left" if left else ""
            line = f"{self.done} of {self.total}: {describe(record)}{told}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def seconds_left(self) -> float | None:
        """Guess the time left from the points that are done and how far the others are."""
        worth = self.done + self._ahead
        if not worth:
            return None
        return (time.monotonic() - self._began) / worth * max(0.0, self.total - worth)


def describe(record: PointRecord) -> str:
    """Name a point and its first metrics in a line."""
    name = "float" if record.method is None else f"{record.method} {record.widths_in_words}, seed {record.seed}"
    if record.error is not None:
        return f"{name} failed: {record.error}"
    shown = list(record.metrics.items())[:3]
    return f"{name}: " + ", ".join(f"{metric} {100 * value:.2f} %" for metric, value in shown)


class _TimeLeft(ProgressColumn):
    def __init__(self, progress: SweepProgress) -> None:
        super().__init__()
        self.progress = progress

    def render(self, task: Task) -> Text:  # noqa: ARG002 rich's signature
        left = self.progress.seconds_left()
        return Text("" if left is None else f"{_in_words(left)} left", style="progress.remaining")


def _in_words(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
