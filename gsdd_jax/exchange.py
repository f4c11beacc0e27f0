"""The file of a set's arrays, in the safetensors format, and what is checked of it before any of it is believed.

A set comes from anyone. Every number is bounded before it is used, nothing is allocated that the file does not hold,
and whatever does not fit is one ValueError that names the key, what was expected and what was found. JAX is not needed
to read; paths belong to `synset`, and what a set says of itself to `manifest`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pydantic_core
import safetensors.numpy

from gsdd_jax.errors import InputError
from gsdd_jax.schema import key_text

# What a JSON document and the header of a file of arrays may have; the latter is enough for a thousand arrays.
MANIFEST_BYTES, HEADER_BYTES = 1 << 20, 1 << 16
# Largest side of an image, and size of anything. Far above any set that is known.
SIDE, BUDGET = 1 << 13, 1 << 40
# What a set may seem to need beyond what its file holds: its shapes are still compared, which says more.
SLACK = 1 << 16
# The names of the safetensors format, of what sets are written in.
CODES = {
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
}  # fmt: skip
# The arrays of soft labels.
LABELS, LABEL_INDICES = "labels", "label_indices"

# Settings by the names that they had before, in manifests, configurations and results of then.
FORMER_NAMES = {
    "gpc": "images_per_class",
    "ipc": "images_per_class",
    "lpc": "images_per_class",
    "optimiser": "optimizer",
}


class Array(NamedTuple):
    """An array that a file should hold, or says it holds."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes; a Python integer, so that no shape overflows it."""
        return math.prod(self.shape) * (2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def described(arrays: Mapping[str, Any]) -> dict[str, Array]:
    """Returns what arrays are, or their shapes and dtypes."""
    return {name: Array(str(array.dtype), tuple(array.shape)) for name, array in arrays.items()}


def nbytes(arrays: Mapping[str, Array]) -> int:
    """Returns the bytes of all of them."""
    return sum(array.nbytes for array in arrays.values())


def narrowed(arrays: Mapping[str, np.ndarray], layout: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns arrays that were read in the dtypes of their layout: bfloat16 is known to NumPy where JAX is."""

    def one(array: np.ndarray, dtype: Any) -> np.ndarray:
        # Bits, since a cast of NaN warns.
        return (array.view(np.uint32) >> 16).astype(np.uint16).view(dtype) if str(dtype) == "bfloat16" else array

    return {name: one(array, layout[name].dtype) for name, array in arrays.items()}


def compare(found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    """Compares names, shapes and dtypes of the arrays of a file with those of the set that its manifest describes.

    Raises:
        ValueError: They differ.
    """
    for name in sorted(expected.keys() | found.keys()):
        want, have = expected.get(name), found.get(name)
        if want != have:
            raise InputError(f"{key_text(name)}: expected {want or 'nothing'}, found {have or 'nothing'}")


def parse_json(raw: bytes) -> Any:
    """Parses JSON of at most ``MANIFEST_BYTES`` and 200 levels.

    NaN and infinities are read: a run that diverged records them.

    Raises:
        ValueError: The bytes are not such a document.
    """
    if len(raw) > MANIFEST_BYTES:
        raise InputError(f"expected at most {MANIFEST_BYTES} bytes of JSON, found more")
    return pydantic_core.from_json(raw)


def serialize(arrays: Mapping[str, Any]) -> bytes:
    """Returns the safetensors file of arrays of NumPy or JAX; its sum is that of a set, in whatever form it is kept."""
    return safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()})


class File(NamedTuple):
    """A safetensors file that was read.

    Attributes:
        arrays: What it says that it holds.
        raw: All bytes of it.
        data: The bytes of each array.
    """

    arrays: dict[str, Array]
    raw: bytes
    data: dict[str, bytes]

    def values(self, sizes: Mapping[str, int], sha256: str) -> dict[str, np.ndarray]:
        """Returns the arrays, if the file is the one that a manifest was written for; bfloat16 numbers as float32.

        Args:
            sizes: What the manifest says of ``payload``, ``header``, ``file`` and ``labels``, as far as it does.
            sha256: Of the file, by the manifest; '' = not known.

        Raises:
            ValueError: It is another one.
        """
        payload = nbytes(self.arrays)
        labels = {name: array for name, array in self.arrays.items() if name in (LABELS, LABEL_INDICES)}
        found = {"payload": payload, "header": len(self.raw) - payload, "file": len(self.raw), LABELS: nbytes(labels)}
        for key, value in sizes.items():
            if value != found[key]:
                raise InputError(f"sizes.{key}: the manifest expects {value} bytes, found {found[key]}")
        if sha256 and (digest := hashlib.sha256(self.raw).hexdigest()) != sha256:
            raise InputError(f"sha256: the manifest expects {sha256}, found {digest}: not its file")
        return {name: _array(array, self.data[name]) for name, array in self.arrays.items()}


def read(raw: bytes) -> File:
    """Reads a safetensors file.

    Raises:
        ValueError: It is damaged: the arrays that it names do not fill it exactly, one behind the other.
    """
    if (length := int.from_bytes(raw[:8], "little")) > HEADER_BYTES:
        raise InputError(f"damaged file (expected a header of at most {HEADER_BYTES} bytes, found {length})")
    try:
        entries = dict(safetensors.deserialize(raw))
    except safetensors.SafetensorError as error:
        raise InputError(f"damaged file ({one_line(error)})") from error
    for name, entry in entries.items():
        if entry["dtype"] not in CODES:
            raise InputError(f"{key_text(name)}: expected one of {', '.join(CODES)}, found {entry['dtype']}")
    arrays = {name: Array(CODES[entry["dtype"]], tuple(entry["shape"])) for name, entry in entries.items()}
    return File(arrays, raw, {name: entry["data"] for name, entry in entries.items()})


def _array(array: Array, data: bytes) -> np.ndarray:
    if array.dtype == "bfloat16":
        wide = np.frombuffer(data, np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32).reshape(array.shape)
    return np.frombuffer(data, array.dtype).reshape(array.shape)


def one_line(error: BaseException) -> str:
    """Returns what a library says of an error, in a part of a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."


def constants(meta: Mapping[str, Any], key: str) -> tuple[float, ...] | None:
    """Returns the numbers that a set recorded, such as ``channel_mean``; None if it recorded anything else."""
    value = meta.get(key)
    if not isinstance(value, list) or not all(isinstance(x, int | float) and abs(x) < 1e30 for x in value):
        return None
    return tuple(map(float, value))


def renamed(settings: Any, section: str = "") -> Any:
    """Returns settings by their present names, see ``FORMER_NAMES``, those of sections within them too.

    Args:
        settings: A section, or a list or a value in one.
        section: Its dotted name; "" for a whole configuration, whose own keys keep their names: ``ipc`` is the budget.

    Raises:
        ValueError: A setting is there by both names.
    """
    if isinstance(settings, list):
        return [renamed(value, f"{section}.{i}") for i, value in enumerate(settings)]
    if not isinstance(settings, dict):
        return settings
    found: dict[Any, Any] = {}
    for key, value in settings.items():
        name = FORMER_NAMES.get(key, key) if section else key
        if name in found:
            names = [key for key in settings if FORMER_NAMES.get(key, key) == name]
            raise InputError(f"{key_text(section)}.{name}: expected once, found as {' and '.join(names)}")
        found[name] = renamed(value, f"{section}.{name}" if section else str(name))
    return found
