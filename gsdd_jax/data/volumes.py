"""Folders of voxels by class: binvox files (Patrick Min), as they are made of ModelNet and ShapeNet."""

from pathlib import Path
from typing import Any

import numpy as np

from gsdd_jax.data.decode import Converter, Unreadable, attempt, large
from gsdd_jax.data.folder import files, open_folder
from gsdd_jax.data.source import Source


def open_volumes(path: str | Path, **options: Any) -> Source:
    """Opens a folder of binvox files; decodes nothing yet.

    A volume is [z, y, x, 1], 255 where a voxel is set and 0 elsewhere; what is done to images is done to its slices.

    Args:
        path: The root; in ModelNet's layout, `root/<class>/{train, test}/*.binvox`, or `root/{train, test}/<class>/`.
        **options: As of `gsdd_jax.data.folder.open_folder`.

    Raises:
        FileNotFoundError: As of `open_folder`.
        ValueError: As of `open_folder`.
    """
    kind = files("volumes", "*.binvox", frozenset({".binvox"}), lambda path: True, _read)
    return open_folder(path, kind=kind, **options)


def _read(file: Path, convert: Converter) -> np.ndarray | Unreadable:
    def decode() -> np.ndarray | Unreadable:
        found = parse(file.read_bytes(), convert.max_pixels)
        return found if isinstance(found, Unreadable) else convert.array(found)

    return attempt(decode)


def parse(data: bytes, max_voxels: int) -> np.ndarray | Unreadable:
    """Reads a binvox file.

    Its header is lines of text, "#binvox 1", "dim d h w" and others, the last "data"; pairs of bytes follow, a value
    and how often it comes. Voxels are stored with y fastest, then z, then x.

    Args:
        data: The content of the file.
        max_voxels: Most voxels.

    Returns:
        uint8 [z, y, x, 1], 0 or 255.
    """
    head, found, body = data.partition(b"\ndata\n")
    lines = [line.split() for line in head.decode("latin-1").splitlines()]
    if not found or not lines or lines[0] != ["#binvox", "1"]:
        return Unreadable('no binvox file: expected "#binvox 1" and, later, a line "data"')
    dims = next((line[1:] for line in lines if line[:1] == ["dim"]), [])
    if len(dims) != 3 or not all(side.isascii() and side.isdigit() and int(side) > 0 for side in dims):
        return Unreadable(f'expected a line "dim d h w" of whole numbers from 1, found {" ".join(dims) or "none"}')
    depth, height, width = map(int, dims)
    refusal = large(depth, height, width, max_pixels=max_voxels)
    if refusal:
        return Unreadable(refusal)
    if len(body) % 2:
        return Unreadable("ends within a run")
    values, counts = np.frombuffer(body, np.uint8).reshape(-1, 2).T
    total = int(counts.sum(dtype=np.int64))
    if total != depth * height * width:
        return Unreadable(f"runs of {total} voxels, expected {depth}x{height}x{width} = {depth * height * width}")
    if len(values) and values.max() > 1:
        return Unreadable(f"voxel {values.max()}, expected 0 or 1")
    voxels = np.repeat(values * np.uint8(255), counts).reshape(depth, height, width)
    # d, h and w are the sides along x, z and y.
    return np.ascontiguousarray(voxels.transpose(1, 2, 0))[..., None]
