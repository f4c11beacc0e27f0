"""Checkpoints of a run: orbax writes and reads them, with one sum of all that is in them.

A step is a folder that appears whole, so that a process killed while saving leaves the older steps as they were. Orbax
notices a truncated file, but not a flipped bit in array data, in none of its formats: it returns other numbers. The sum
finds both.

Leaves are stored flat under their dotted path ("opt.1.mu.mean"), so that a checkpoint can be read without the classes
of the program that wrote it. Random keys travel as integers (seed, step), not as key arrays.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax import exchange, files, orbax_set
from train.errors import UserError

# Python waits for it at its end.
_WRITER = ThreadPoolExecutor(1)


class DamagedError(UserError):
    """Checkpoints that are not what was written, the newest one first, and what is wrong with it."""

    def __init__(self, folders: list[Path], why: str):
        others = " and ".join(map(str, folders))
        super().__init__(f"checkpoint {folders[0]} is damaged ({why}): delete {others} and run the same command again")
        self.why = why


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The newest `keep` checkpoints of a phase, in a directory of their own; behind a `with` block all are on disk."""

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 2):
        self.path, self.keep = Path(path).resolve(), keep
        self.path.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers([self.path])
        self._writing: Future[None] | None = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits until everything is on disk; an error that is under way is not replaced by one of writing."""
        with contextlib.suppress(*[OSError] if kind else []):
            self.wait()

    def wait(self) -> None:
        """Waits until everything is on disk; raises OSError as `save`."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def latest(self) -> int | None:
        """Waits until everything is on disk and returns the newest step, or None if there is none."""
        self.wait()
        return max(self._steps(), default=None)

    def _steps(self) -> list[int]:
        return sorted(int(folder.name) for folder in self.path.iterdir() if folder.name.isdecimal())

    def save(self, step: int, tree: Any, meta: dict[str, Any]) -> None:
        """Copies a pytree of arrays and begins to write it, with JSON-able values, as a step above the newest one.

        Sharded arrays must be addressable from this process.

        Raises:
            OSError: The disk is full or not writable, now or for the step before, with `filename` set; the older
                checkpoints stay.
        """
        self.wait()
        # Orbax refuses arrays without elements. The step that comes next may overwrite the others.
        leaves = {name: np.array(leaf) for name, leaf in orbax_set.named(tree).items() if leaf.size}
        self._writing = _WRITER.submit(self._write, self.path / str(step), leaves, meta)

    def _write(self, folder: Path, leaves: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
        try:
            files.write_folder(folder, lambda beside: orbax_set.save_state(beside / "tree", leaves, **meta))
        except ValueError as error:
            # Tensorstore says of a full disk in words alone that it is.
            for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                if os.strerror(code) in str(error):
                    raise OSError(code, os.strerror(code), str(folder)) from error
            raise
        for old in self._steps()[: -self.keep]:
            shutil.rmtree(self.path / str(old))

    def newest(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Returns step, tree and meta of the newest intact checkpoint, or None if there is no checkpoint.

        Newer ones that are damaged are named on stderr and removed.

        Raises:
            UserError: All are damaged, or as `restore`.
        """
        self.wait()
        damaged: dict[Path, str] = {}
        for step in reversed(self._steps()):
            try:
                found = step, *self.restore(step, like)
            except DamagedError as error:
                damaged[self.path / str(step)] = error.why
                continue
            for folder, why in damaged.items():
                print(f"warning: {folder} is damaged ({why}) and was removed", file=sys.stderr)
                shutil.rmtree(folder)
            if damaged:
                print(f"warning: going on from step {step}", file=sys.stderr)
            return found
        if damaged:
            raise DamagedError(list(damaged), next(iter(damaged.values())))
        return None

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the tree and the meta of a checkpoint, bit by bit.

        Leaves are as in `like`: JAX arrays for JAX arrays and `jax.ShapeDtypeStruct`s, NumPy arrays otherwise.

        Raises:
            UserError: The step is damaged or absent, or a leaf differs from `like` in path, shape or dtype.
        """
        self.wait()
        folder, wanted = self.path / str(step), orbax_set.named(like)
        try:
            arrays, meta = _read(folder)
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise DamagedError([folder], str(error)) from error
        arrays |= {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in wanted.items() if not leaf.size}
        there, here = (
            {name: exchange.Array(str(leaf.dtype), leaf.shape) for name, leaf in leaves.items()}
            for leaves in (arrays, wanted)
        )
        try:
            exchange.compare(there, here)
        except ValueError as error:
            why = "Continue with the code and config that wrote it, or choose another run directory"
            raise UserError(f"checkpoint {folder} does not fit: {error}. {why}") from error
        leaves = [_like(leaf, arrays[name]) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), meta


def _read(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if not (of_before := folder / "meta" / "metadata").exists():
        return orbax_set.read_state(folder / "tree", bounded=False)
    # A list of shape, dtype and sum of each leaf.
    document, arrays = json.loads(of_before.read_bytes()), orbax_set.contents(folder / "tree", bounded=False)[1]()
    for name, (_, _, crc) in document["leaves"].items():
        if zlib.crc32(arrays[name].tobytes()) != crc:
            raise ValueError(f"{name}: altered")
    return arrays, document["meta"]


def _like(leaf: Any, array: np.ndarray) -> Any:
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return array
    if not getattr(leaf, "weak_type", False):
        return jnp.asarray(array)
    # A strongly typed array in its place would be promoted differently, and compile the step once more. JAX makes
    # weakly typed arrays of Python numbers only; setting all elements of one keeps it weak.
    return jnp.full(array.shape, array.dtype.type(0).item()).at[...].set(array)
