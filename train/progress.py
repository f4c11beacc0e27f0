"""Progress bars with rate and time left on standard error; in a log file, one in half a minute and one at the end."""

from __future__ import annotations

import sys

from tqdm import tqdm

# Seconds between bars where they do not overwrite each other.
_LOG_SECONDS = 30.0


class Bar(tqdm):
    """One phase in progress."""

    # The thread that it would start wakes a bar that has been slow.
    monitor_interval = 0

    def advance(self, count: int, note: str = "") -> None:
        """Moves on by ``count`` steps and shows a note."""
        self.set_postfix_str(note, refresh=False)
        self.update(count)


class Progress:
    """Shows the phases of a run, one after the other."""

    def __init__(self, *, quiet: bool = False):
        self._quiet = quiet

    def say(self, text: str) -> None:
        """Prints a line, above what is in progress."""
        if not self._quiet:
            tqdm.write(text, file=sys.stderr)

    def phase(self, name: str, *, total: int, done: int = 0) -> Bar:
        """Shows a phase of ``total`` steps, of which ``done`` were done before, while in its ``with`` block."""
        every = 0.1 if sys.stderr.isatty() else _LOG_SECONDS
        return Bar(desc=name, total=total, initial=done, disable=self._quiet or done >= total, mininterval=every)
