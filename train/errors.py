"""How a command line ends: what a user can put right is one line on stderr, a defect keeps its traceback.

A message to the user is an `InputError` of the library, a `UserError` of the command lines, or what the system says of
a file, a disk or a device. All else, such as a `ValueError` out of JAX or NumPy, is a defect and must stay visible.
"""

import errno
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gsdd_jax.data import DataNotice
from gsdd_jax.errors import InputError

DEBUG_VARIABLE = "GSDD_DEBUG"
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Storage libraries written in C++ and Rust report a full disk under classes of their own; the system's text survives.
_DISK_FULL_TEXTS = tuple(os.strerror(code) for code in _DISK_FULL)


class UserError(Exception):
    """Something the user can put right; the message says what, in one line, and needs no traceback."""


class ConfigError(UserError):
    """A configuration that cannot be run: the message names the key, what was found and what is allowed."""


class DivergedError(UserError):
    """Numbers that are not finite any more, where a smaller rate or another start may help."""


@contextmanager
def exit_cleanly(*, debug: bool = False) -> Iterator[None]:
    """Turns the user's errors into one line on stderr and an exit code; works as a decorator too.

    Handled: `UserError`, `InputError`, missing or forbidden paths, a full disk, optional packages and platforms of JAX
    that are not there, Ctrl-C. Everything else passes through with its traceback, and with `debug`, `--debug` on the
    command line or GSDD_DEBUG set to anything but 0 these do as well. Notices of data are lines on stderr, too.

    Raises:
        SystemExit: 2 after an error of the user, 130 after Ctrl-C.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", DataNotice)
        show = warnings.showwarning

        def one_line(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, DataNotice):
                print(f"note: {_one_line(message)}", file=sys.stderr)
            else:
                show(message, category, *where, **more)

        warnings.showwarning = one_line
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            message = explain(error)
            debug = debug or "--debug" in sys.argv[1:] or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
            if message is None or debug:
                raise
            print(message, file=sys.stderr)
            raise SystemExit(EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_USER_ERROR) from None


def explain(error: BaseException) -> str | None:
    """Returns the one line that tells the user what is wrong, or None where the error is a defect of the program."""
    text = _one_line(error) or type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if (full := _disk_full(error)) is not None:
        name = getattr(full, "filename", None)
        where, found = (f" while writing {_one_line(name)}", "") if name else ("", f" ({_one_line(full)})")
        remedy = "free some space and run the same command again"
        return f"error: disk full{where}: nothing saved so far is lost; {remedy}{found}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"error: {_one_line(error.filename)}: {error.strerror.lower()}"
    # The import system names the module; what is raised here says how to install it.
    absent = isinstance(error, ImportError) and error.name is None
    if absent or isinstance(error, UserError | InputError | FileNotFoundError | PermissionError):
        return f"error: {text}"
    if isinstance(error, RuntimeError) and "Unable to initialize backend" in text:
        asked = os.environ.get("JAX_PLATFORMS", "")
        return (
            f"error: JAX_PLATFORMS: found {asked!r}, but JAX cannot start that here ({text}); allowed: cpu, or "
            "cuda with an NVIDIA GPU, its driver and the extra gsdd_jax[cuda]"
        )
    return None


def _disk_full(error: BaseException | None) -> BaseException | None:
    """Finds the report of a full disk in the error or in what it was raised from."""
    if error is None or getattr(error, "errno", None) in _DISK_FULL:
        return error
    return error if any(text in str(error) for text in _DISK_FULL_TEXTS) else _disk_full(error.__cause__)


def _one_line(text: object) -> str:
    return " ".join(line.strip() for line in str(text).splitlines() if line.strip())
