"""SIGTERM, as schedulers send it before they take a machine away: save, say how to go on, end with exit code 0.

The stages of a run ask `raise_if_requested` where everything is saved or is about to be. A second signal does not wait
for that.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_AT_ONCE = 128 + signal.SIGTERM  # as shells report it

_requested = False


class Stopped(Exception):
    """The run was asked to end, and everything that it computed is saved."""


def requested() -> bool:
    """Tells whether the process was asked to end."""
    return _requested


def raise_if_requested() -> None:
    """Raises `Stopped` if the process was asked to end; to be called where everything is saved."""
    if _requested:
        raise Stopped


@contextmanager
def on_sigterm() -> Iterator[None]:
    """Lets SIGTERM ask for an orderly end, which exits with 0 and the command that goes on; a second one exits at once.

    Raises:
        SystemExit: 0 after an orderly end.
    """
    global _requested

    def handler(*_: object) -> None:
        global _requested
        if _requested:
            os._exit(EXIT_AT_ONCE)
        _requested = True
        # A write of its own: print may be what was interrupted.
        os.write(2, b"\nSIGTERM: saving; a second one ends at once\n")

    _requested = False
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    except Stopped:
        command = shlex.join(["python", *sys.orig_argv[1:]])
        print(f"stopped by SIGTERM, everything is saved; the same command goes on: {command}")
        raise SystemExit(0) from None
    finally:
        signal.signal(signal.SIGTERM, before)
        _requested = False
