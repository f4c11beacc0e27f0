"""Distilled sets and real images in one file that grows: the memory of a learner, the message of a client.

A zip file with a folder for each part: ``0``, ``1`` and so on. A part is a set as `SynSet.save` writes it, so that
`gsdd_jax.load` reads what any program has unpacked, or real images: their bytes in ``images.safetensors``, and what
they are in ``images.json``. Every byte of the file counts, names and manifests too.

A file comes from anyone. It is refused as a whole, by an `InputError` that names it, and nothing of it is run.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
from annotated_types import Ge, Le
from PIL import Image

from gsdd_jax import compressed, exchange, files, schema, synset
from gsdd_jax.errors import InputError
from gsdd_jax.manifest import Side
from gsdd_jax.synset import SynSet

# What stands around the arrays of a set in an archive: the manifest, compressed, names of arrays, entries of the zip.
OVERHEAD = 1024
SET_FILES = (synset.MANIFEST, synset.ARRAYS)
REAL_FILES = ("images.json", "images.safetensors")
# Real images of a part, and bytes of a file, unpacked and decoded ones too, unless a reader says otherwise.
MOST_IMAGES, MOST_BYTES = 1 << 20, 1 << 28
Format = Literal["raw", "webp", "avif"]
# What zipfile raises of damaged files.
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError, KeyError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealImages:
    """Real images as they are kept, class after class.

    Attributes:
        format: ``raw``, the pixels; or ``webp`` or ``avif``, files without what all of them share.
        image_shape: (h, w, c).
        class_names: One per class.
        counts: Images of each class.
        shared: What all files share, see `gsdd_jax.compressed.strip`; nothing of raw pixels.
        sizes: Bytes of each image; none where all have the same.
        data: Bytes of all images, one behind the other.
    """

    format: Format
    image_shape: tuple[Side, Side, Annotated[int, Ge(1), Le(3)]]
    class_names: tuple[str, ...]
    counts: tuple[Annotated[int, Ge(0), Le(MOST_IMAGES)], ...]
    shared: np.ndarray
    sizes: np.ndarray
    data: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """Labels ``[n]`` int32 among the classes of the part."""
        return np.repeat(np.arange(len(self.counts), dtype=np.int32), self.counts)

    def images(self) -> np.ndarray:
        """Images ``[n, h, w, c]``, uint8."""
        if self.format == "raw":
            return self.data.reshape(-1, *self.image_shape)
        ends, shared = np.cumsum(self.sizes, dtype=np.int64), self.shared.tobytes()
        own = [self.data[end - size : end].tobytes() for end, size in zip(ends, self.sizes, strict=True)]
        return np.stack([_decoded(shared, data, self.format, self.image_shape, i) for i, data in enumerate(own)])


Part = SynSet | RealImages


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Header:
    """What ``images.json`` holds."""

    format: Format
    image_shape: tuple[Side, Side, Annotated[int, Ge(1), Le(3)]]
    class_names: tuple[str, ...]
    counts: tuple[Annotated[int, Ge(0), Le(MOST_IMAGES)], ...]


def encoded(image: np.ndarray, format: Format, quality: int) -> tuple[bytes, bytes]:
    """Returns what an image shares with others and what is its own, see `compressed.strip`.

    Args:
        image: ``[h, w, c]`` uint8, of 1 or 3 channels.
        format: What to write it as.
        quality: 0 to 100; of raw pixels nothing.
    """
    if format == "raw":
        return b"", image.tobytes()
    return compressed.strip(compressed.encode(image, format, quality), format)


def _decoded(shared: bytes, own: bytes, format: Format, image_shape: Sequence[int], number: int) -> np.ndarray:
    h, w, c = image_shape
    try:
        file = compressed.restore(shared, own, format)
        with Image.open(io.BytesIO(file), formats=[format]) as image:
            # Before it is decoded: it may claim any size.
            found = image.size
            pixels = np.asarray(image.convert(compressed.mode(c))) if found == (w, h) else None
    except Exception as error:  # Pillow raises what it likes.
        raise InputError(f"image {number}: damaged ({exchange.one_line(error)})") from error
    if pixels is None:
        raise InputError(f"image {number}: expected {h} x {w} pixels, found {found[1]} x {found[0]}")
    return pixels.reshape(image_shape)


def append(path: str | os.PathLike[str], part: Part) -> int:
    """Adds a part to a file, which is made if it is not there, and returns the bytes of the whole file.

    After a crash the file is the one before or the one after.
    """
    held = Path(path).read_bytes() if Path(path).exists() else b""
    file = io.BytesIO(held)
    with zipfile.ZipFile(file, "a") as archive:
        number = len(_folders(archive))
        for name, data in _contents(part).items():
            # A fixed date: equal parts are equal files.
            entry = zipfile.ZipInfo(f"{number}/{name}")
            entry.compress_type = zipfile.ZIP_DEFLATED if name.endswith(".json") else zipfile.ZIP_STORED
            archive.writestr(entry, data, compresslevel=9)
    files.write_bytes(path, file.getvalue())
    return len(file.getvalue())


def read(path: str | os.PathLike[str], *, most_bytes: int = MOST_BYTES) -> list[Part]:
    """Reads all parts of a file.

    Args:
        path: The file.
        most_bytes: What it may have.

    Raises:
        FileNotFoundError: There is no file.
        ValueError: It is too large, damaged, or holds anything else; the message names the file and the part.
    """
    path = Path(path)
    with synset.naming(path):
        if (size := path.stat().st_size) > most_bytes:
            raise InputError(f"expected at most {most_bytes} bytes, found {size}")
        try:
            with zipfile.ZipFile(path) as archive:
                folders = _folders(archive)
                # Before a byte is unpacked: zipfile reads no more than an entry says.
                _check_sizes(archive, most_bytes)
                contents = [
                    {name: archive.read(f"{number}/{name}") for name in names} for number, names in folders.items()
                ]
        except _DAMAGED as error:
            raise (
                error if isinstance(error, InputError) else InputError(f"damaged file ({exchange.one_line(error)})")
            ) from error
        return [_part(number, content) for number, content in enumerate(contents)]


def labeled(part: Part, class_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns images ``[n, h, w, c]`` of a part, float32 or uint8, and their labels ``[n]`` among all classes.

    Raises:
        ValueError: A class of another data set.
    """
    if unknown := [name for name in part.class_names if name not in class_names]:
        raise InputError(f"class_names: expected those of {', '.join(class_names)}; found {unknown[0]!r}")
    own = np.array([class_names.index(name) for name in part.class_names], np.int32)
    return np.asarray(part.images()), own[part.labels]


def write_weights(path: str | os.PathLike[str], weights: np.ndarray | jax.Array) -> int:
    """Writes flat weights ``[p]`` of a network, float32, and returns the bytes of the file."""
    data = exchange.serialize({"weights": np.asarray(weights, np.float32)})
    files.write_bytes(path, data)
    return len(data)


def read_weights(path: str | os.PathLike[str], num_params: int) -> np.ndarray:
    """Reads weights of a network.

    Raises:
        FileNotFoundError: There is no file.
        ValueError: It is damaged, of another network, or has a weight that is not finite.
    """
    path = Path(path)
    with synset.naming(path):
        expected = {"weights": exchange.Array("float32", (num_params,))}
        if (size := path.stat().st_size) > 4 * num_params + exchange.HEADER_BYTES:
            raise InputError(f"expected {num_params} weights, found {size} bytes")
        file = exchange.read(path.read_bytes())
        exchange.compare(file.arrays, expected)
        weights = file.values({}, "")["weights"]
        if not np.isfinite(weights).all():
            raise InputError("weights: expected finite numbers, found others")
        return weights


def _contents(part: Part) -> dict[str, bytes]:
    if isinstance(part, RealImages):
        header = {field.name: getattr(part, field.name) for field in dataclasses.fields(_Header)}
        arrays = {"data": part.data}
        arrays |= {} if part.format == "raw" else {"shared": part.shared, "sizes": part.sizes}
        return dict(zip(REAL_FILES, (json.dumps(header).encode(), exchange.serialize(arrays)), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        part.save(folder)
        return {name: Path(folder, name).read_bytes() for name in SET_FILES}


def _folders(archive: zipfile.ZipFile) -> dict[int, tuple[str, ...]]:
    """Returns the files of each part, and refuses a file that holds anything else."""
    names = archive.namelist()
    found: dict[int, tuple[str, ...]] = {}
    for number in range(len(names) // 2):
        found[number] = SET_FILES if f"{number}/{SET_FILES[0]}" in names else REAL_FILES
    expected = [f"{number}/{name}" for number, own in found.items() for name in own]
    if sorted(names) != sorted(expected):
        odd = next(iter(set(names).symmetric_difference(expected)), "a name twice")
        raise InputError(
            f"expected parts 0, 1, ... of {' and '.join(SET_FILES)} (or {' and '.join(REAL_FILES)}), "
            f"found {schema.key_text(odd)} without or beside them"
        )
    return found


def _check_sizes(archive: zipfile.ZipFile, most_bytes: int) -> None:
    left = most_bytes
    for entry in archive.infolist():
        document = entry.filename.endswith(".json")
        limit = exchange.MANIFEST_BYTES if document else left
        if entry.file_size > limit:
            number, name = entry.filename.split("/")
            raise InputError(f"part {number}, {name}: expected at most {limit} bytes, found {entry.file_size}")
        left -= 0 if document else entry.file_size


def _part(number: int, content: Mapping[str, bytes]) -> Part:
    with tempfile.TemporaryDirectory() as folder:
        try:
            if synset.MANIFEST not in content:
                return _real(content)
            for name, data in content.items():
                Path(folder, name).write_bytes(data)
            return synset.load(folder)
        except ValueError as error:
            raise InputError(f"part {number}, {str(error).removeprefix(f'{folder}/')}") from error


def _real(content: Mapping[str, bytes]) -> RealImages:
    header = schema.build(_Header, exchange.parse_json(content[REAL_FILES[0]]))
    if len(header.counts) != len(header.class_names):
        raise InputError(f"counts: expected one per class, {len(header.class_names)}; found {len(header.counts)}")
    count, values = sum(header.counts), math.prod(header.image_shape)
    most = min(MOST_IMAGES, MOST_BYTES // values)
    if not 0 < count <= most:
        raise InputError(f"counts: expected 1 to {most} images of {list(header.image_shape)}, found {count}")
    file = exchange.read(content[REAL_FILES[1]])
    raw, none = header.format == "raw", exchange.Array("uint8", (0,))
    expected = {"data": exchange.Array("uint8", (values * count,))}
    if not raw:
        expected = {name: exchange.Array("uint8", file.arrays.get(name, none).shape) for name in ("data", "shared")}
        expected["sizes"] = exchange.Array("uint16", (count,))
    exchange.compare(file.arrays, expected)
    arrays: dict[str, Any] = {"sizes": np.zeros(0, np.uint16), "shared": np.zeros(0, np.uint8)} | file.values({}, "")
    sizes = arrays["sizes"]
    if not raw and (total := int(sizes.sum(dtype=np.int64))) != arrays["data"].size:
        raise InputError(f"sizes: expected a sum of {arrays['data'].size} bytes, found {total}")
    found = RealImages(**vars(header), **arrays)
    found.images()  # which says what cannot be decoded
    return found
