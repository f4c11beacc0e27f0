"""Checkpoints of a run: a thin layer over orbax's CheckpointManager.

Orbax commits a step by renaming a finished folder, so a process killed while saving leaves the older steps as they
were. What this layer adds is a list of the leaves (shape, dtype, CRC-32), stored beside them. Orbax itself notices a
truncated file, but not a flipped bit in array data (tried: it returned other numbers); with the list every damage is
found, and a tree of another shape is refused by naming the leaf.

Leaves are stored flat under their dotted path ("opt.1.mu.mean"), so that a checkpoint can be checked and read without
the Python classes of the program that wrote it. Random keys travel as integers (seed, step), not as key arrays.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from gsdd_jax import orbax_set
from train.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Checkpoints:
    """The checkpoints in one directory, newest `keep` of them.

    Writing is asynchronous: `save` returns when it holds a copy of everything, and the step is on disk before the next
    `save` begins to write, or at the latest when the checkpoints are closed; a failure to write shows there.

    Args:
        path: The directory; made if absent.
        keep: How many of the newest steps stay.

    Raises:
        ValueError: `keep` is below 1.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least 1 checkpoint must stay")
        self.path = Path(path).resolve()
        # One process of a run writes, whatever the others do meanwhile: the state is the same in all.
        own = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"checkpoints-of-{own}"
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            # Orbax makes directories in all processes or leaves it to its user.
            create=False,
            cleanup_tmp_directories=True,
            multiprocessing_options=alone if jax.process_count() > 1 else ocp.options.MultiprocessingOptions(),
        )
        self.path.mkdir(parents=True, exist_ok=True)
        self._writing: int | None = None
        with _quiet():
            self._manager = ocp.CheckpointManager(self.path, options=options)

    def __enter__(self) -> Checkpoints:
        """Returns itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes the manager; an error that is under way is not replaced by one of writing."""
        try:
            self.close()
        except OSError:
            if kind is None:
                raise

    def close(self) -> None:
        """Waits until everything is on disk and ends orbax's threads.

        Raises:
            OSError: As `save`.
        """
        try:
            self.wait()
        finally:
            with _quiet():
                self._manager.close()

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
            OSError: As `save`.
        """
        step, self._writing = self._writing, None
        if step is not None:
            with self._telling(step), _quiet():
                self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """Waits until everything is on disk and returns the newest step, or None if there is none."""
        self.wait()
        return self._manager.latest_step()

    def save(self, step: int, tree: Any, meta: dict[str, Any]) -> None:
        """Begins to write a checkpoint; those beyond `keep` are deleted once it is there.

        Args:
            step: Its number, above the newest one.
            tree: Pytree of numbers and arrays (numpy or JAX; sharded ones must be addressable from this process).
            meta: JSON-able values stored with it.

        Raises:
            ValueError: `step` is not above the newest one, or the tree has no leaves or two leaves of one path.
            TypeError: A leaf is no number or array, or `meta` is not JSON-able.
            OSError: The disk is full or not writable, now or for the step before, with `filename` set; the older
                checkpoints stay.
        """
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(f"step is {step}, but {self.path} already holds step {latest}: steps must grow")
        arrays = {name: _to_numpy(name, leaf) for name, leaf in _named_leaves(tree).items()}
        if not arrays:
            raise ValueError("tree has no leaves: there is nothing to save")
        document: dict[str, Any] = {"meta": meta, "leaves": {name: _describe(array) for name, array in arrays.items()}}
        try:
            document["crc32"] = _crc_of_json(document)
        except (TypeError, ValueError) as error:
            raise TypeError(f"meta is not JSON-able: {error}") from error
        # Orbax refuses arrays without elements; their shape and dtype in the list say all there is to them.
        stored = {name: array if array.size else np.zeros(1, array.dtype) for name, array in arrays.items()}
        arguments = ocp.args.Composite(tree=ocp.args.StandardSave(stored), meta=ocp.args.JsonSave(document))
        with self._telling(step), _quiet():
            self._manager.save(step, args=arguments, force=True)
        self._writing = step

    @contextlib.contextmanager
    def _telling(self, step: int) -> Iterator[None]:
        """Turns a failure to write a step into one that names the file, and removes what is half written."""
        try:
            yield
        except Exception as error:
            for unfinished in self.path.glob(f"{step}.*tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)
            code = _os_error_code(error)
            if code is not None:
                raise OSError(code, os.strerror(code), str(self.path / str(step))) from error
            raise

    def newest(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Reads the newest intact checkpoint; newer ones that are damaged are named on stderr and removed.

        Args:
            like: As in `restore`.

        Returns:
            Its step, tree and meta dict; None if there is no checkpoint.

        Raises:
            UserError: All are damaged, or a leaf differs from `like`.
        """
        latest = self.latest()
        if latest is None:
            return None
        try:
            return latest, *self.restore(latest, like)
        except DamagedError as damage:
            if damage.intact is None:
                raise
            for step in damage.steps:
                print(f"warning: {self.path / str(step)} is damaged ({damage.why}) and was removed", file=sys.stderr)
                shutil.rmtree(self.path / str(step))
            print(f"warning: going on from step {damage.intact}", file=sys.stderr)
            with _quiet():
                self._manager.reload()
            return damage.intact, *self.restore(damage.intact, like)

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint back, bit by bit.

        Args:
            step: A saved step.
            like: Pytree of the same structure, shapes and dtypes. Its leaves decide what comes back: numpy arrays for
                numpy arrays, Python numbers for Python numbers, JAX arrays with the same sharding for JAX arrays and
                `jax.ShapeDtypeStruct`s.

        Returns:
            The tree, with the node types of `like`, and the meta dict.

        Raises:
            DamagedError: The step is damaged; the message names the folder, an older intact step and the way on.
            UserError: The step is absent, or a leaf differs from `like` in path, shape or dtype.
        """
        self.wait()
        if step not in self._manager.all_steps():
            held = ", ".join(map(str, sorted(self._manager.all_steps()))) or "none"
            raise UserError(f"{self.path} holds no checkpoint of step {step} (steps there: {held})")
        wanted = _named_leaves(like)
        try:
            document = self._read_document(step)
            self._refuse_mismatch(step, document["leaves"], wanted)
            arrays = self._read_arrays(step, document["leaves"])
        except _UnreadableError as error:
            raise self._damage(step, error) from error
        leaves = [_like(arrays[name], leaf) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), document["meta"]

    def _read_document(self, step: int) -> dict[str, Any]:
        try:
            with _quiet():
                document = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
            crc = document.pop("crc32")
            if crc == _crc_of_json(document):
                return document
        except Exception as error:
            raise _UnreadableError(f"its meta file cannot be read: {_first_line(error)}") from error
        raise _UnreadableError("its meta file was altered: the checksum does not match")

    def _read_arrays(self, step: int, leaves: dict[str, Any]) -> dict[str, np.ndarray]:
        abstract = {
            name: np.zeros(shape if math.prod(shape) else 1, dtype) for name, (shape, dtype, _) in leaves.items()
        }
        try:
            with _quiet():
                arguments = ocp.args.Composite(tree=ocp.args.StandardRestore(abstract))
                stored = self._manager.restore(step, args=arguments).tree
        except Exception as error:
            raise _UnreadableError(f"its arrays cannot be read: {_first_line(error)}") from error
        arrays = {
            name: np.asarray(stored[name]).reshape(-1)[: math.prod(leaf[0])].reshape(leaf[0])
            for name, leaf in leaves.items()
        }
        for name, array in arrays.items():
            if _describe(array) != leaves[name]:
                raise _UnreadableError(f"leaf {name} was altered: the checksum does not match")
        return arrays

    def _refuse_mismatch(self, step: int, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
        differences = []
        for name in dict.fromkeys([*stored, *wanted]):
            there = _signature(*stored[name][:2]) if name in stored else "absent"
            now = _signature(*_shape_dtype(wanted[name])) if name in wanted else "absent"
            if there != now:
                differences.append(f"leaf {name} is {there} in the checkpoint and {now} in this program")
        if differences:
            more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
            raise UserError(
                f"checkpoint {self.path / str(step)} does not fit: {differences[0]}{more}. "
                "Continue with the code and config that wrote it, or choose another run directory"
            )

    def _damage(self, step: int, error: _UnreadableError) -> DamagedError:
        damaged, intact = [step], None
        for older in sorted((s for s in self._manager.all_steps() if s < step), reverse=True):
            try:
                self._read_arrays(older, self._read_document(older)["leaves"])
            except _UnreadableError:
                damaged.append(older)
            else:
                intact = older
                break
        folders = " and ".join(str(self.path / str(s)) for s in damaged)
        way = f"step {intact} is intact: delete" if intact is not None else "no older step is intact: delete"
        end = f"continue from step {intact}" if intact is not None else "start this phase afresh"
        return DamagedError(
            f"checkpoint {self.path / str(step)} is damaged ({error}); {way} {folders} and run the same command again "
            f"to {end}",
            why=str(error),
            steps=damaged,
            intact=intact,
        )


class DamagedError(UserError):
    """A checkpoint that is not what was written.

    Attributes:
        why: What is wrong with it.
        steps: It and the older ones that are damaged as well, down to the first intact one.
        intact: The newest older step that is intact, or None.
    """

    def __init__(self, message: str, *, why: str, steps: list[int], intact: int | None):
        super().__init__(message)
        self.why, self.steps, self.intact = why, steps, intact


class _UnreadableError(Exception):
    """What is wrong with the files of a checkpoint."""


def _named_leaves(tree: Any) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "value"
        if name in named:
            raise ValueError(f"tree has two leaves with the path {name}: rename one")
        named[name] = leaf
    return named


def _to_numpy(name: str, leaf: Any) -> np.ndarray:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    if is_key:
        raise TypeError(f"leaf {name} is a random key: keep its seed and step as integers instead")
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float)):
        raise TypeError(f"leaf {name} is a {type(leaf).__name__}: only numbers and arrays can be saved")
    # A copy: the step that comes next may overwrite the array while it is being written.
    array = np.array(leaf)
    if array.dtype.kind in "OSUMm":
        raise TypeError(f"leaf {name} has dtype {array.dtype}: only numbers and booleans can be saved")
    return array


def _shape_dtype(leaf: Any) -> tuple[tuple[int, ...], np.dtype]:
    if not hasattr(leaf, "shape"):
        leaf = np.asarray(leaf)
    return tuple(leaf.shape), leaf.dtype


def _signature(shape: Any, dtype: Any) -> str:
    return f"{np.dtype(dtype).name}[{','.join(map(str, shape))}]"


def _describe(array: np.ndarray) -> list[Any]:
    """The entry of one leaf in the list: shape, dtype and CRC-32 of its bytes in C order."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return [list(array.shape), array.dtype.name, zlib.crc32(data.data)]


def _crc_of_json(document: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def _like(array: np.ndarray, leaf: Any) -> Any:
    if isinstance(leaf, (bool, int, float)) and not isinstance(leaf, np.generic):
        return array.item()
    if isinstance(leaf, (np.ndarray, np.generic)):
        return array if isinstance(leaf, np.ndarray) else array[()]
    if getattr(leaf, "weak_type", False):
        # A strongly typed array in its place would be promoted differently, and compile the step once more. JAX makes
        # weakly typed arrays of Python numbers only; setting all elements of one keeps it weak.
        return jnp.full(array.shape, array.dtype.type(0).item()).at[...].set(array)
    # An array that was free to move must stay free, or it cannot meet arrays on other devices.
    return jax.device_put(array, leaf.sharding if getattr(leaf, "committed", True) else None)


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."


def _os_error_code(error: BaseException) -> int | None:
    """The errno behind an error of a save: tensorstore reports a full disk as a ValueError that only says so."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno:
            return seen.errno
        for code in _FULL:
            if os.strerror(code) in str(seen):
                return code
        seen = seen.__cause__ or seen.__context__
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax's own log lines, and the tracebacks of its abandoned reads, off stderr; errors are raised as ever."""

    def not_of_orbax(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(not_of_orbax)
    try:
        with orbax_set.ignoring_abandoned_reads():
            yield
    finally:
        logger.removeFilter(not_of_orbax)
