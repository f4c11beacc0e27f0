"""Progress bars with rate and time left; on a dumb terminal or a pipe, a line per phase."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

# Seconds between lines where bars cannot be drawn.
QUIET_SECONDS = 30.0


class Bar:
    """One phase in progress."""

    def __init__(self, console: Console, name: str, total: int, done: int, rich: RichProgress | None):
        self._console, self._name, self._total, self._done = console, name, total, done
        self._first, self._began, self._spoke = done, time.perf_counter(), time.perf_counter()
        self._rich = rich
        self._task = rich.add_task(name, total=total, completed=done, note="", rate="") if rich else None
        self.note = ""

    def advance(self, count: int, note: str = "") -> None:
        """Moves on by ``count`` steps and shows a note."""
        self._done, self.note = self._done + count, note
        now = time.perf_counter()
        rate = (self._done - self._first) / max(now - self._began, 1e-9)
        if self._rich is not None and self._task is not None:
            self._rich.update(self._task, completed=self._done, note=note, rate=f"{rate:.3g}/s")
        elif now - self._spoke > QUIET_SECONDS:
            left = (self._total - self._done) / max(rate, 1e-9)
            text = f"  {self._name} {self._done}/{self._total}, {rate:.3g}/s, {left:.0f} s left; {note}"
            self._console.print(text, markup=False, soft_wrap=True)
            self._spoke = now


class Progress:
    """Draws the phases of a run, one after the other, on standard error."""

    def __init__(self, *, quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet, highlight=False)

    def say(self, text: str) -> None:
        """Prints a line."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def phase(self, name: str, *, total: int, done: int = 0) -> Iterator[Bar]:
        """Shows a phase of ``total`` steps, of which ``done`` were done before; ends with a line of summary."""
        if done >= total:
            yield Bar(self.console, name, total, done, None)
            return
        began = time.perf_counter()
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description:<20}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            with RichProgress(*columns, console=self.console, transient=True) as rich:
                bar = Bar(self.console, name, total, done, rich)
                yield bar
        else:
            bar = Bar(self.console, name, total, done, None)
            yield bar
        again = f" (continued at {done})" if done else ""
        self.say(f"{name:<20} {total} steps{again} in {time.perf_counter() - began:.1f} s; {bar.note}")
