"""Real images as WebP, AVIF and JPEG: the bytes that a distilled set of the same size has to beat.

Only what tells one image from another is counted. Of a file that is the compressed data alone; what a set would hold
once for all its images, as they have one size and one quality, is not:

- WebP: the VP8 frame without its ten bytes of tag, start code and size, and without the 20 of RIFF and chunk headers.
- AVIF: the payload of the frame's units (OBU) in the coded image item, without their headers, the sequence header and
  the boxes of the container, about 300 bytes.
- JPEG: the entropy-coded data of the scan, without tables and markers. The Huffman tables are those of the standard,
  the same for every image.

Videos are animated files, whose frames AV1 predicts from each other and WebP from what stands still; as JPEG, every
frame is an image. Of them all frames are counted in the same way.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from gsdd_jax.errors import InputError

# What Pillow is asked for beside the quality. Slower settings of AVIF save a few percent at ten times the time.
OPTIONS: dict[str, dict[str, Any]] = {
    "webp": {"method": 6},
    "avif": {"speed": 6, "max_threads": 1, "subsampling": "4:2:0"},
    "jpeg": {"subsampling": "4:2:0"},
}
# Milliseconds of a frame; the header of a file says it.
_DURATION = 100
# AV1 specification, section 6.2.2: the units that hold an image.
FRAME_UNITS = (3, 4, 6)


def compress(image: np.ndarray, format: str, quality: int) -> tuple[np.ndarray, int]:
    """Compresses an image or a video.

    Args:
        image: ``[h, w, c]``, or ``[t, h, w, c]``, uint8, of 1 or 3 channels.
        format: A key of ``OPTIONS``.
        quality: 0 to 100; the scales of the formats are not the same.

    Returns:
        The image as it is read back, of the same shape and dtype, and the bytes that count, see above.

    Raises:
        ValueError: Another number of channels.
    """
    if image.ndim == 4 and (format == "jpeg" or len(image) == 1):
        frames, sizes = zip(*(compress(frame, format, quality) for frame in image), strict=True)
        return np.stack(frames), sum(sizes)
    file = encode(image, format, quality)
    decoded = []
    for frame in ImageSequence.Iterator(Image.open(io.BytesIO(file))):
        shown = np.asarray(frame.convert(mode(image.shape[-1])))
        # Equal frames are one that lasts longer.
        decoded += [shown] * (frame.info["duration"] // _DURATION if image.ndim == 4 else 1)
    return np.stack(decoded).reshape(image.shape), PAYLOADS[format](file)


def encode(image: np.ndarray, format: str, quality: int) -> bytes:
    """Returns the file of an image or a video; arguments and errors as in `compress`."""
    channels = image.shape[-1]
    if channels not in (1, 3):
        raise InputError(f"image: expected 1 or 3 channels, found {channels}")
    first, *others = (
        Image.fromarray(frame[..., 0] if channels == 1 else frame) for frame in image.reshape(-1, *image.shape[-3:])
    )
    settings = {"quality": max(quality, 1) if format == "jpeg" else quality, **OPTIONS[format]}
    moving = {"save_all": True, "append_images": others, "duration": _DURATION} if others else {}
    first.save(file := io.BytesIO(), format, **settings, **moving)
    return file.getvalue()


def mode(channels: int) -> str:
    """Returns Pillow's name of gray and of colored images."""
    return "L" if channels == 1 else "RGB"


def strip(file: bytes, format: str) -> tuple[bytes, bytes]:
    """Cuts the file of an image in two: what all of one size and quality share, and what is its own.

    Args:
        file: From `encode`.
        format: ``webp`` or ``avif``.

    Returns:
        The shared bytes, in which lengths are 0, and the others: the payload that is counted, of WebP also the three
        bytes of the frame's tag.
    """
    if format == "webp":
        size = int.from_bytes(file[16:20], "little")
        return _webp_header(0) + file[23:30], file[20:23] + file[30 : 20 + size]
    (data,) = (content for kind, content in _boxes(file) if kind == b"mdat")
    *_, (_, size) = _units(data)
    shared = file[: len(file) - size - len(_leb128(size))]
    return _avif_lengths(shared, 0, 0), file[len(file) - size :]


def restore(shared: bytes, own: bytes, format: str) -> bytes:
    """Returns the file that `strip` has cut; of other bytes, anything.

    Raises:
        ValueError: Shared bytes without the boxes of an AVIF file.
    """
    if format == "webp":
        frame = own[:3] + shared[20:] + own[3:]
        return _webp_header(len(frame)) + frame + b"\0" * (len(frame) % 2)
    unit = _leb128(len(own)) + own
    item = len(shared) - shared.rindex(b"mdat") - 4 + len(unit)
    return _avif_lengths(shared, item, item + 8) + unit


def _webp_header(size: int) -> bytes:
    """RIFF and chunk headers of a lossy frame of so many bytes."""
    return b"RIFF" + (12 + size + size % 2).to_bytes(4, "little") + b"WEBPVP8 " + size.to_bytes(4, "little")


def _avif_lengths(shared: bytes, item: int, box: int) -> bytes:
    """Writes the lengths of an AVIF file's one item (ISO/IEC 14496-12, iloc) and of its mdat."""
    location, data = shared.index(b"iloc") - 4, shared.rindex(b"mdat") - 4
    end = location + int.from_bytes(shared[location : location + 4], "big")
    return shared[: end - 4] + item.to_bytes(4, "big") + shared[end:data] + box.to_bytes(4, "big") + shared[data + 4 :]


def _leb128(value: int) -> bytes:
    """AV1 specification, section 4.10.5."""
    found = []
    while value >= 128:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def fill(
    images: np.ndarray, candidates: Sequence[np.ndarray], format: str, quality: int, budget: int, *, beside: int = 0
) -> tuple[np.ndarray, int]:
    """Compresses images until a budget is full, as many of each class.

    Args:
        images: ``[n, h, w, c]``, or ``[n, t, h, w, c]``, uint8.
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
    return sum(size - 10 for size in _vp8(file[12:]))


def _vp8(chunks: bytes) -> Iterator[int]:
    """Yields the sizes of lossy frames: WebP container specification, RIFF and ANMF."""
    while chunks:
        kind, size = chunks[:4], int.from_bytes(chunks[4:8], "little")
        if kind == b"VP8 ":
            yield size
        elif kind == b"ANMF":
            yield from _vp8(chunks[24 : 8 + size])
        elif kind not in (b"VP8X", b"ANIM"):
            raise InputError(f"expected a lossy WebP file without extensions, found {kind!r}")
        chunks = chunks[8 + size + size % 2 :]


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
