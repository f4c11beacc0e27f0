"""Checkpoints of a run: orbax writes and reads them, with one sum of all that is in them.

A step is a folder that appears whole, so that a process killed while saving leaves the older steps as they were. Orbax
notices a truncated file, but not a flipped bit in array data, in none of its formats: it returns other numbers. The sum
finds both.

Leaves are stored flat under their dotted path ("opt.1.mu.mean"), so that a checkpoint can be read without the classes
of the program that wrote it. Random keys travel as integers (seed, step), not as key arrays.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax import exchange, files, orbax_set
from train.errors import UserError


class DamagedError(UserError):
    """A checkpoint that is not what was written."""


class Checkpoints:
    """The newest `keep` checkpoints of a phase, in a directory of their own."""

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 2):
        self.path, self.keep = Path(path).resolve(), keep
        self.path.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers([self.path])

    def latest(self) -> int | None:
        """Returns the newest step, or None if there is none."""
        return max(self._steps(), default=None)

    def _steps(self) -> list[int]:
        return sorted(int(folder.name) for folder in self.path.iterdir() if folder.name.isdecimal())

    def save(self, step: int, tree: Any, meta: dict[str, Any]) -> None:
        """Writes a pytree of arrays, with JSON-able values, as a step above the newest one.

        Sharded arrays must be addressable from this process. The older checkpoints stay if it cannot be written.
        """
        # Orbax refuses arrays without elements.
        leaves = {name: leaf for name, leaf in orbax_set.named(tree).items() if leaf.size}
        files.write_folder(self.path / str(step), lambda beside: orbax_set.save_state(beside / "tree", leaves, **meta))
        for old in self._steps()[: -self.keep]:
            shutil.rmtree(self.path / str(old))

    def newest(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Returns step, tree and meta of the newest intact checkpoint, or None if there is no checkpoint.

        Newer ones that are damaged are named on stderr and removed.

        Raises:
            UserError: All are damaged, or as `restore`.
        """
        damaged: dict[Path, DamagedError] = {}
        for step in reversed(self._steps()):
            try:
                found = step, *self.restore(step, like)
            except DamagedError as error:
                damaged[self.path / str(step)] = error
                continue
            for folder, why in damaged.items():
                print(f"warning: {folder} is damaged ({why.__cause__}) and was removed", file=sys.stderr)
                shutil.rmtree(folder)
            if damaged:
                print(f"warning: going on from step {step}", file=sys.stderr)
            return found
        for first in damaged.values():
            raise first
        return None

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the tree and the meta of a checkpoint, bit by bit.

        Leaves are as in `like`: JAX arrays for JAX arrays and `jax.ShapeDtypeStruct`s, NumPy arrays otherwise.

        Raises:
            UserError: The step is damaged or absent, or a leaf differs from `like` in path, shape or dtype.
        """
        folder, wanted = self.path / str(step), orbax_set.named(like)
        try:
            arrays, meta = _read(folder)
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            remedy = "delete it and run the same command again"
            raise DamagedError(f"checkpoint {folder} is damaged ({error}): {remedy}") from error
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
