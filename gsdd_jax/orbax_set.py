"""A stored set as an orbax checkpoint: its arrays under their names, and the manifest as JSON metadata.

Any program with orbax restores it without this library, onto the devices of its own. The manifest is that of
`synset`, to the letter; its sizes and its sum are those of the safetensors file of the same arrays, since orbax itself
returns other numbers where a bit was flipped. Beside the arrays may lie what a distillation goes on from, float32
masters and the optimizer's state, as a checkpoint of its own in ``state``.

Reading stays what it is for the other form: JSON and numbers of zarr, no code, and names, dtypes and shapes are known
before a number is read. Orbax is imported where it is needed: it brings JAX.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gsdd_jax import exchange, files
from gsdd_jax.errors import InputError
from gsdd_jax.exchange import Array
from gsdd_jax.schema import show

if TYPE_CHECKING:
    from gsdd_jax.synset import SynSet

# Where orbax keeps the metadata of its user, under this key, and those of the arrays.
METADATA, KEY, TREE = "_CHECKPOINT_METADATA", "custom_metadata", "_METADATA"
STATE = "state"
STATE_FORMAT = "gsdd_jax state/1"
# Zeros compress well, and chunks of zeros need not be there: arrays may take so much, or so many times their files.
UNPACKED, UNPACKED_PER_BYTE = 1 << 28, 64


def write(path: Path, arrays: dict[str, Any], manifest: dict[str, Any], state: Any = None) -> None:
    """Writes a checkpoint, all of it or nothing.

    Args:
        path: Absent, or an empty directory.
        arrays: As they are written, by their names.
        manifest: JSON-able.
        state: A pytree of numbers and arrays that is kept beside them, or None.

    Raises:
        ValueError: There is something at the path, or the manifest could not be read again.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: expected an absent or empty directory: checkpoints are not written over")
    # One level deeper than in a file of its own.
    exchange.parse_json(json.dumps({KEY: manifest}, indent=1).encode())

    def fill(folder: Path) -> None:
        _save(folder, _on_host(arrays), manifest)
        if state is not None:
            save_state(folder / STATE, state)

    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_folder(path, fill)


def _on_host(tree: Any) -> Any:
    """Returns a tree with arrays of NumPy, which are bound to no device."""
    import jax

    return jax.tree.map(np.asarray, tree)


def save_state(folder: Path, tree: Any, **meta: Any) -> None:
    """Writes a pytree of numbers and arrays, the sum of what is written, and JSON-able values beside it."""
    kept = _on_host(tree)
    _save(folder, kept, {"format": STATE_FORMAT, "sha256": _sum(named(kept), meta), **({"meta": meta} if meta else {})})


def read_state(folder: Path, *, bounded: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads what `save_state` wrote: arrays by their dotted paths, and the values beside them.

    Raises:
        ValueError: It is damaged, or no such tree; or, if `bounded`, as `contents`.
    """
    with (folder / METADATA).open("rb") as file:
        document = metadata(exchange.parse_json(file.read(exchange.MANIFEST_BYTES + 1)))
    if document["format"] != STATE_FORMAT:
        raise InputError(f"format: expected {STATE_FORMAT!r}, found {show(document['format'])}")
    arrays, expected, meta = contents(folder, bounded=bounded)[1](), document.get("sha256"), document.get("meta", {})
    if (digest := _sum(arrays, meta)) != expected:
        raise InputError(f"sha256: expected {show(expected)}, found {digest!r}")
    return arrays, meta


def _sum(arrays: dict[str, Any], meta: Any) -> str:
    digest = hashlib.sha256(exchange.serialize(arrays))
    if meta:
        digest.update(json.dumps(meta, sort_keys=True).encode())
    return digest.hexdigest()


def _save(folder: Path, tree: Any, metadata: dict[str, Any]) -> None:
    import jax

    ocp = _orbax()
    # The other processes of a run do not wait for this one.
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"set-of-{own}"
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    with _quietly(), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(folder.resolve(), args=ocp.args.StandardSave(tree), force=True, custom_metadata=metadata)


def metadata(document: Any) -> dict[str, Any]:
    """Returns what a checkpoint's ``METADATA`` say of themselves: a manifest, or what is none by its format."""
    found = document.get(KEY) if type(document) is dict else None
    return {"format": None} | (found if type(found) is dict else {})


def contents(folder: Path, *, bounded: bool = True) -> tuple[dict[str, Array], Callable[[], dict[str, np.ndarray]]]:
    """Returns the arrays of a checkpoint as it describes them, by their dotted paths, and a function that reads them.

    Raises:
        ValueError: It is damaged, or, if `bounded`, its arrays stand for more than its files could hold.
    """
    ocp = _orbax()
    import jax

    folder = folder.resolve()
    size = 0
    for file in folder.rglob("*"):
        if not file.is_dir() and not file.is_file():
            raise InputError(f"{file.relative_to(folder)}: expected a regular file")
        size += file.stat().st_size
    handler = ocp.StandardCheckpointHandler()
    with _damage():
        if (folder / TREE).stat().st_size > exchange.MANIFEST_BYTES:
            raise InputError(f"{TREE}: expected at most {exchange.MANIFEST_BYTES} bytes, found more")
        tree = handler.metadata(folder).tree
        described = named(tree)
        found = exchange.described(described)
        for name, array in found.items():
            if array.dtype not in exchange.CODES.values():
                raise InputError(f"{name}: expected one of {', '.join(exchange.CODES.values())}, found {array}")
            # A chunk is allocated as a whole.
            if math.prod(described[name].storage.chunk_shape) > max(math.prod(array.shape), 1):
                raise InputError(f"{name}: expected chunks no larger than {array}")
    needed, allowed = sum(array.nbytes for array in found.values()), max(UNPACKED, UNPACKED_PER_BYTE * size)
    if bounded and needed > allowed:
        raise InputError(f"expected at most {allowed} bytes of arrays in {size} bytes of files, found {needed}")

    def restore() -> dict[str, np.ndarray]:
        with _damage():
            target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)
            return named(handler.restore(folder, args=ocp.args.StandardRestore(target)))

    return found, restore


def with_masters(path: str | Path, synset: SynSet) -> SynSet:
    """Returns a set with the float32 masters that lie beside it in its checkpoint, or as it is where none do.

    Args:
        path: Where the set was read.
        synset: The set; its parameters are replaced.

    Raises:
        ValueError: They are damaged, or of another set.
    """
    import jax

    folder = Path(path) / STATE
    if not (folder / METADATA).exists():
        return synset
    try:
        arrays, _ = read_state(folder, bounded=True)
        found = exchange.described(arrays)
        shape = jax.ShapeDtypeStruct((synset.codec.num_images, *synset.codec.image_shape), np.float32)
        like = jax.eval_shape(synset.codec.init, jax.eval_shape(lambda: jax.random.key(0)), shape)
        expected = exchange.described(named({"params": like}))
        exchange.compare({name: array for name, array in found.items() if name.startswith("params.")}, expected)
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from error
    masters = jax.tree.unflatten(jax.tree.structure(like), [jax.numpy.asarray(arrays[name]) for name in expected])
    return dataclasses.replace(synset, params=masters)


def named(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their dotted paths, the same for a tuple with names and a dictionary."""
    import jax

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    found = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(found) < len(leaves):
        raise InputError("two leaves of the tree have one dotted path: rename one")
    return found


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps off stderr what orbax logs of an error, which it raises too, and the tracebacks of its abandoned reads.

    When one read fails, orbax closes the event loop on which tensorstore's threads want to report the others, or nobody
    asks for what they report. They do so at any later time, so after a failure these filters stay.
    """

    def unless_abandoned(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is not RuntimeError or str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    def unless_raised(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname and " exception was never retrieved" not in record.getMessage()

    hook, loggers = sys.unraisablehook, [logging.getLogger(name) for name in ("absl", "asyncio")]
    sys.unraisablehook = unless_abandoned
    for logger in loggers:
        logger.addFilter(unless_raised)
    yield
    sys.unraisablehook = hook
    for logger in loggers:
        logger.removeFilter(unless_raised)


@contextmanager
def _damage() -> Iterator[None]:
    """Turns whatever orbax raises of files that it cannot read into one line."""
    try:
        with _quietly():
            yield
    except MemoryError:
        raise
    except Exception as error:
        raise InputError(f"damaged checkpoint ({exchange.one_line(error)})") from error


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError("an orbax checkpoint needs orbax: pip install orbax-checkpoint") from error
    return orbax.checkpoint
