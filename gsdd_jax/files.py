"""Writes that are atomic and durable: beside, flushed to disk, renamed, and the folder flushed after them.

After a crash at any moment, of the process or of the machine, a path holds what it held before or what was written,
never a part. All that this project keeps is written through here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

# What is half written has such a name beside the final one; "*" is the process.
LEFTOVERS = ".*.tmp"
# What a file system answers that cannot flush a folder, and Windows, which does not open one.
_NO_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EISDIR, errno.ENOSYS)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Replaces a file.

    Args:
        path: The file; its folder must exist.
        data: Its new content.

    Returns:
        The path.

    Raises:
        OSError: As `replacing`.
    """
    with replacing(path) as file:
        file.write(data)
    return Path(path)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file for writing that gets its name once the block ends without an error.

    Args:
        path: The file; its folder must exist.

    Raises:
        OSError: With `filename` set, also for a full disk; what was there is then untouched.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename not in (None, str(temporary)):
            raise
        raise named(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(path: str | os.PathLike[str], fill: Callable[[Path], object]) -> Path:
    """Makes a folder with all that is in it, or nothing.

    Args:
        path: The folder; absent or empty.
        fill: Gets a folder and writes into it.

    Returns:
        The path.

    Raises:
        OSError: With `filename` set; nothing is left then.
    """
    # Of a path such as ".", too.
    path = Path(path).resolve()
    temporary = _beside(path)
    try:
        temporary.mkdir()
        fill(temporary)
        for folder, _, files in os.walk(temporary):
            for name in files:
                _sync(Path(folder, name))
            sync_folder(Path(folder))
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return path


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Removes what writers that were killed left in folders, where nobody writes now."""
    for path in [path for folder in folders for path in folder.glob(LEFTOVERS)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Flushes the names in a folder to disk, where the system can."""
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in _NO_FOLDERS:
            raise


def _sync(path: Path) -> None:
    # Windows flushes what is open for writing alone.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise named(error, path) from error
    finally:
        os.close(descriptor)


def named(error: OSError, path: Path) -> OSError:
    """Returns the same error with a file name: errors of writing carry none."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
