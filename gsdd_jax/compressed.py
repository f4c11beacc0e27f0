"""Real images as WebP, AVIF and JPEG: the bytes that a distilled set of the same size has to beat.

Only what tells one image from another is counted. Of a file that is the compressed data alone; what a set would hold
once for all its images, as they have one size and one quality, is not:

- WebP: the VP8 frame without its ten bytes of tag, start code and size, and without the 20 of RIFF and chunk headers.
- AVIF: the payload of the frame's units (OBU) in the coded image item, without their headers, the sequence header and
  the boxes of the container, about 300 bytes.
- JPEG: the entropy-coded data of the scan, without tables and markers. The Huffman tables are those of the standard,
  the same for every image.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from gsdd_jax.errors import InputError

# What Pillow is asked for beside the quality. Slower settings of AVIF save a few percent at ten times the time.
OPTIONS: dict[str, dict[str, Any]] = {
    "webp": {"method": 6},
    "avif": {"speed": 6, "max_threads": 1, "subsampling": "4:2:0"},
    "jpeg": {"subsampling": "4:2:0"},
}
# AV1 specification, section 6.2.2: the units that hold an image.
FRAME_UNITS = (3, 4, 6)


def compress(image: np.ndarray, format: str, quality: int) -> tuple[np.ndarray, int]:
    """Compresses an image.

    Args:
        image: ``[h, w, c]`` uint8, of 1 or 3 channels.
        format: A key of ``OPTIONS``.
        quality: 0 to 100; the scales of the formats are not the same.

    Returns:
        The image as it is read back, ``[h, w, c]`` uint8, and the bytes that count, see above.

    Raises:
        ValueError: Another number of channels.
    """
    channels = image.shape[-1]
    if channels not in (1, 3):
        raise InputError(f"image: expected 1 or 3 channels, found {channels}")
    file, mode = io.BytesIO(), "L" if channels == 1 else "RGB"
    Image.fromarray(image[..., 0] if channels == 1 else image).save(
        file, format, quality=max(quality, 1) if format == "jpeg" else quality, **OPTIONS[format]
    )
    decoded = np.asarray(Image.open(file).convert(mode)).reshape(image.shape)
    return decoded, PAYLOADS[format](file.getvalue())


def fill(
    images: np.ndarray, candidates: Sequence[np.ndarray], format: str, quality: int, budget: int, *, beside: int = 0
) -> tuple[np.ndarray, int]:
    """Compresses images until a budget is full, as many of each class.

    Args:
        images: ``[n, h, w, c]`` uint8.
        candidates: Of each of the ``k`` classes the numbers of images, in the order in which they are taken.
        format: A key of ``OPTIONS``.
        quality: As in `compress`.
        budget: Bytes of all classes together.
        beside: Bytes that every image takes beside its own, such as those of its label.

    Returns:
        The images as they are read back, ``[k * m, h, w, c]`` uint8 and class-major, where ``m`` is 0 if the first
        image of each class is too much; and the bytes, at most ``budget``.
    """
    taken: list[list[np.ndarray]] = []
    spent = 0
    for round_ in zip(*candidates, strict=False):
        decoded, sizes = zip(*(compress(images[i], format, quality) for i in round_), strict=True)
        total = spent + sum(sizes) + beside * len(sizes)
        if total > budget:
            break
        taken.append(list(decoded))
        spent = total
    rows = [image for own in zip(*taken, strict=True) for image in own]
    return np.array(rows, np.uint8).reshape(-1, *images.shape[1:]), spent


def _webp(file: bytes) -> int:
    if file[12:16] != b"VP8 ":
        raise InputError(f"expected a lossy WebP file without extensions, found {file[12:16]!r}")
    return int.from_bytes(file[16:20], "little") - 10


def _jpeg(file: bytes) -> int:
    # In compressed data 0xFF is followed by 0x00, so that the last marker of a scan is one.
    scan = file.rindex(b"\xff\xda") + 2
    return len(file) - len(b"\xff\xd9") - scan - int.from_bytes(file[scan : scan + 2], "big")


def _avif(file: bytes) -> int:
    (data,) = (content for kind, content in _boxes(file) if kind == b"mdat")
    return sum(size for kind, size in _units(data) if kind in FRAME_UNITS)


def _boxes(file: bytes) -> Iterator[tuple[bytes, bytes]]:
    while file:
        size = int.from_bytes(file[:4], "big")
        yield file[4:8], file[8:size]
        file = file[size:]


def _units(data: bytes) -> Iterator[tuple[int, int]]:
    """Yields type and size of the payload of every unit: AV1 specification, sections 5.3 and 4.10.5."""
    while data:
        header, data = data[0], data[2 if data[0] & 4 else 1 :]
        size = shift = 0
        more = 128
        while more:
            more = data[0] & 128
            size |= (data[0] & 127) << shift
            data, shift = data[1:], shift + 7
        yield header >> 3 & 15, size
        data = data[size:]


PAYLOADS: dict[str, Callable[[bytes], int]] = {"webp": _webp, "avif": _avif, "jpeg": _jpeg}
