"""Distilled sets as images, with NumPy: for readers without JAX.

An independent implementation of what the codecs decode, for one purpose, looking at finished sets: no gradients, no
subsets of a set. It agrees with them to 1e-5 of the range of an image, where numbers are of that range. An exception
of Gaussians: a sample at which one of them falls to the very ``cutoff`` may count it in one and not in the other, which
moves a pixel by at most ``cutoff`` times its color.

Other codecs are not here; a program with JAX exports their images instead.

Example::

    found = gsdd_jax.decode_numpy.load("runs/digits")
    found.images.shape, found.labels
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Le, Lt

from gsdd_jax import merged, packed_codes, schema, synset
from gsdd_jax.errors import InputError
from gsdd_jax.exchange import Array
from gsdd_jax.manifest import Manifest

# Of `gaussians` and `codecs.packed`, which import JAX.
CHOLESKY_SHIFT, PREFILTER, MAX_PIXELS = (0.5, 0.0, 0.5), 1 / 12, 1e6
# Of `spacetime`: the last of its shifts.
LASTING_SHIFT = 0.5
FINEST_STEP, SORTED_POINTS = 2.0**-16, 1 << 12
# Of `storage`: the number that stands for 0 in a byte, and the distance of its values.
BYTE_ZERO, BYTE_STEP = 85, 1 / 85

Bits = Annotated[int, Ge(1), Le(16)]
Arrays = dict[str, np.ndarray]
# (height, width), or (frames, height, width) of videos.
Size = tuple[int, ...]
# ``(arrays, size) -> images``, and the arrays that it takes, bfloat16 ones as float32.
Decode = Callable[[Arrays, Size], np.ndarray]
Decoder = tuple[Decode, Mapping[str, Array]]


class Images(NamedTuple):
    """The images of a set.

    Attributes:
        images: ``[n, h, w, c]``, or ``[n, t, h, w, c]``, float32 around [0,1].
        labels: ``[n]`` int32.
        class_names: One per class.
        soft_labels: ``[n, k]`` float32, each row with sum 1, or None where the set has none.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    soft_labels: np.ndarray | None = None


class Stored(NamedTuple):
    """A set as it is stored, whole or merged, before it is decoded.

    Attributes:
        parts: Manifest, decoding and arrays of each part; one of a set that is no merged one.
        labels: ``[n]`` int32.
        class_names: One per class.
        soft_labels: ``[n, k]`` float32, or None.
        meta: Whatever else was recorded.
    """

    parts: tuple[tuple[Manifest, Decode, Arrays], ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    soft_labels: np.ndarray | None
    meta: dict[str, Any]


def load(path: synset.Location, size: Size | None = None) -> Images:
    """Reads and decodes a set, whole or merged.

    Args:
        path: As for `gsdd_jax.load`.
        size: (height, width) of the images, or (frames, height, width) of videos; those of the set by default.

    Raises:
        FileNotFoundError: There is no set.
        ValueError: It is damaged, or its codec is not decoded without JAX.
    """
    stored = read(path)
    for manifest, *_ in stored.parts:
        synset.check_size(size, manifest.image_shape)
    # Numbers of any size are drawn as they are, without a warning, as JAX does.
    with np.errstate(over="ignore", invalid="ignore"):
        images = [
            decode(arrays, size or manifest.image_shape[:-1]).astype(np.float32)
            for manifest, decode, arrays in stored.parts
        ]
    return Images(np.concatenate(images), stored.labels, stored.class_names, stored.soft_labels)


def read(path: synset.Location) -> Stored:
    """Reads a set and checks it, as `load` does, without decoding its images."""
    folder, whole = merged.read_manifest(path)
    folders = [folder] if whole is None else [folder / name for name in whole.parts]
    parts = tuple(synset.read(one, decoder_of) for one in folders)
    manifests = [manifest for manifest, *_ in parts]
    sizes = [manifest.num_classes for manifest in manifests]
    own = [np.repeat(np.arange(each.num_classes, dtype=np.int32), each.images_per_class) for each in manifests]
    soft = [None if one.labels is None else one.labels.unpack(x, one.num_classes) for one, _, x in parts]
    if whole is None:
        return Stored(parts, own[0], manifests[0].class_names, soft[0], manifests[0].meta)
    labels, rows = merged.joined(own, sizes), merged.joined_soft(own, soft, sizes)
    with synset.naming(folder / synset.MANIFEST):
        names = merged.check_parts([(each.image_shape, each.bytes_per_class, each.class_names) for each in manifests])
        merged.check_names(names, whole)
        if whole.labels is not None:
            merged.check_own_labels(soft)
    if whole.labels is not None:
        rows = whole.labels.unpack(merged.read_labels(folder, whole, len(labels)), len(names))
    return Stored(parts, labels, names, rows, whole.meta)


def decoder_of(manifest: Manifest, payload: int) -> Decoder:
    """Returns the decoder of a set; its arrays are compared with the file's by `gsdd_jax.synset.read`.

    Raises:
        ValueError: Its codec is unknown here, or a setting makes no sense.
    """
    del payload
    name = manifest.codec.get("name")
    if not isinstance(name, str) or name not in DECODERS:
        raise InputError(
            f"codec.name: expected one of {', '.join(DECODERS)}, which are decoded without JAX; found "
            f"{schema.show(name)}, whose images python -m train.export writes where JAX is installed"
        )
    settings, decoder = DECODERS[name]
    known = {field.name for field in dataclasses.fields(settings)}
    spec: Any = schema.build(settings, {k: v for k, v in manifest.codec.items() if k in known}, section="codec")
    frames, *shape = manifest.image_shape
    if len(shape) == 2 or name in VIDEO:
        return decoder(manifest, spec)
    # Frame by frame; labels are those of videos.
    count = manifest.images_per_class * frames
    one = dataclasses.replace(manifest, image_shape=tuple(shape), images_per_class=count, labels=None)
    decode, layout = decoder(one, spec)

    def together(arrays: Arrays, size: Size) -> np.ndarray:
        images = decode(arrays, size[1:])
        return resized(images.reshape(-1, frames, *images.shape[1:]), size)

    return together, layout


# Gaussians


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Drawing:
    """Settings, of those that a manifest has, on which images of Gaussians depend."""

    num_points: Annotated[int, Ge(1), Le(1 << 16)]
    supersample: Annotated[int, Ge(1), Le(64)]
    cutoff: Annotated[float, Ge(0), Lt(1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Gaussian(_Drawing):
    dtype: Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PackedGaussian(_Drawing):
    bits_mean: Bits
    bits_cholesky: Bits
    bits_color: Bits
    bits_chroma: Annotated[int, Ge(0), Le(16)] = 0
    bits_gaussian: Annotated[float, Ge(0)] = 0.0
    order: Literal["sorted", "kept"]

    def __post_init__(self) -> None:
        if self.order == "sorted" and self.num_points > SORTED_POINTS:
            raise InputError(f"codec.num_points: expected an integer <= {SORTED_POINTS}, found {self.num_points}")


def _gaussian(manifest: Manifest, spec: _Gaussian) -> Decoder:
    (*native, c), lead = manifest.image_shape, (manifest.num_images, spec.num_points)
    # Coordinates, and rows of the triangle of a shape.
    d = len(native)
    shapes = {"mean": (*lead, d), "cholesky": (*lead, d * (d + 1) // 2), "color": (*lead, c), "opacity": lead}

    def decode(arrays: Arrays, size: Size) -> np.ndarray:
        colors = arrays["color"] * arrays["opacity"][..., None]
        return _splat(arrays["mean"], arrays["cholesky"], colors, native, size, spec)

    return decode, {name: Array(spec.dtype, shape) for name, shape in shapes.items()}


def _packed_gaussian(manifest: Manifest, spec: _PackedGaussian) -> Decoder:
    (*native, c), n = manifest.image_shape, manifest.num_images
    d = len(native)
    shape = d * (d + 1) // 2
    packed_codes.check_rate(spec, n, c, d)
    layout = {
        "codes": Array("uint8", (packed_codes.set_bytes(spec, n, c, d),)),
        "low": Array("bfloat16", (shape + c,)),
        "step": Array("bfloat16", (shape + c,)),
    }

    def decode(arrays: Arrays, size: Size) -> np.ndarray:
        mean, numbers = packed_codes.read(arrays["codes"], spec, n, c, d)
        values = arrays["low"] + numbers.astype(np.float32) * _step(arrays)
        cell = 2.0 ** (1 - spec.bits_mean)
        colors = _from_ycocg(values[..., shape:]) if spec.bits_chroma else values[..., shape:]
        return _splat(0.5 * cell - 1 + mean * cell, values[..., :shape], colors, native, size, spec)

    return decode, layout


def _from_ycocg(colors: np.ndarray) -> np.ndarray:
    y, co, cg = np.moveaxis(colors, -1, 0)
    rest = y - cg / 2
    return np.stack([rest + co / 2, rest + cg, rest - co / 2], axis=-1)


def _step(arrays: Arrays) -> np.ndarray:
    """Returns the steps of grids, none finer than codes come back from."""
    finest = np.float32(FINEST_STEP) * np.maximum(1, np.abs(arrays["low"]))
    return _as_bfloat16(np.maximum(arrays["step"], finest))


def _as_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounds finite float32 to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16 << 16).view(np.float32)


def _splat(
    mean: np.ndarray,
    cholesky: np.ndarray,
    colors: np.ndarray,
    native: Sequence[int],
    size: Size,
    spec: _Drawing,
) -> np.ndarray:
    """Draws Gaussians in float64; see `gsdd_jax.gaussians.to_pixels` and `gsdd_jax.spacetime.to_frames`."""
    mean, cholesky, colors = (np.asarray(x, np.float64) for x in (mean, cholesky, colors))
    (*_, height, width), limit = size, MAX_PIXELS
    centers = np.clip(0.5 * np.array([width, height]) * (mean[..., :2] + 1), -limit, limit)
    grow = np.array([width / native[-1], height / native[-2], height / native[-2]])
    l11, l21, l22 = np.moveaxis(np.clip((cholesky[..., :3] + np.array(CHOLESKY_SHIFT)) * grow, -limit, limit), -1, 0)
    variance_y = l21**2 + l22**2 + PREFILTER
    p = 1 / np.sqrt(PREFILTER + l11**2 * ((l22**2 + PREFILTER) / variance_y))
    r, s = -(l11 * l21 / variance_y) * p, 1 / np.sqrt(variance_y)
    if len(size) == 2:
        return _draw(centers, (p, r, s), colors, (height, width), spec)
    # From here on the frames are the second axis.
    frames = size[0]
    time = np.clip(0.5 * frames * (mean[..., 2] + 1), -limit, limit)
    u = np.clip(cholesky[..., 3:5] * grow[:2], -limit, limit)[:, None]
    lasts = np.clip((cholesky[..., 5] + LASTING_SHIFT) * (frames / native[0]), -limit, limit)[:, None]
    distance, variance = np.arange(frames)[:, None] + 0.5 - time[:, None], lasts**2 + PREFILTER
    moved = centers[:, None] + u * (lasts / variance * distance)[..., None]
    faded = colors[:, None] * np.exp(-0.5 * (distance**2 / variance))[..., None]
    # The blur of what moves, as `to_frames` adds it.
    p, r, s, k = p[:, None], r[:, None], s[:, None], PREFILTER / variance
    q1, q2 = p * u[..., 0] + r * u[..., 1], s * u[..., 1]
    one, all_ = 1 + k * q2**2, 1 + k * (q1**2 + q2**2)
    r11, r22 = np.sqrt(one / all_), 1 / np.sqrt(one)
    blurred = r11 * p, r11 * r - k / all_ * q1 * q2 / r11 * s, r22 * s
    flat = [np.broadcast_to(x, faded.shape[:3]).reshape(-1, faded.shape[2]) for x in blurred]
    images = _draw(
        moved.reshape(-1, *moved.shape[2:]), flat, faded.reshape(-1, *faded.shape[2:]), (height, width), spec
    )
    return images.reshape(len(mean), *size, -1)


def _draw(
    centers: np.ndarray, conics: Sequence[np.ndarray], colors: np.ndarray, size: Size, spec: _Drawing
) -> np.ndarray:
    """Draws splats, one at a time and only where it is not zero; see `kernels.splat`."""
    (height, width), (p, r, s), supersample = size, conics, spec.supersample
    reach = np.sqrt(-2 * np.log(spec.cutoff)) if spec.cutoff else np.inf
    half = np.stack([reach * np.sqrt(1 + (r / s) ** 2) / p, reach / s], axis=-1)
    broken = ~(np.isfinite(centers).all((1, 2)) & np.isfinite(p + r + s).all(1) & ~np.isnan(colors).any((1, 2)))
    images = np.zeros((len(colors), *size, colors.shape[-1]))
    offsets = (np.arange(supersample) + 0.5) / supersample
    first = np.clip(np.floor(np.nan_to_num(centers - half)), 0, [width, height]).astype(int)
    last = np.clip(np.ceil(np.nan_to_num(centers + half)), 0, [width, height]).astype(int)
    for i, j in zip(*np.nonzero((first < last).all(-1) & ~broken[:, None]), strict=True):
        (x0, y0), (x1, y1) = first[i, j], last[i, j]
        dx = (np.arange(x0, x1)[:, None] + offsets).reshape(-1) - centers[i, j, 0]
        dy = (np.arange(y0, y1)[:, None] + offsets).reshape(-1)[:, None] - centers[i, j, 1]
        weight = np.exp(-0.5 * ((p[i, j] * dx + r[i, j] * dy) ** 2 + (s[i, j] * dy) ** 2))
        weight[weight < spec.cutoff] = 0
        weight = weight.reshape(y1 - y0, supersample, x1 - x0, supersample).mean((1, 3))
        images[i, y0:y1, x0:x1] += weight[..., None] * colors[i, j]
    images[broken] = np.nan
    return images


# Pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pixel:
    dtype: Literal["float32", "bfloat16", "uint8"]


def _pixel(manifest: Manifest, spec: _Pixel) -> Decoder:
    def decode(arrays: Arrays, size: Size) -> np.ndarray:
        images = arrays["images"]
        if spec.dtype == "uint8":
            images = (images.astype(np.float32) - np.float32(BYTE_ZERO)) * np.float32(BYTE_STEP)
        return resized(images, size)

    return decode, {"images": Array(spec.dtype, (manifest.num_images, *manifest.image_shape))}


def resized(images: np.ndarray, size: Size) -> np.ndarray:
    """Enlarges images ``[n, h, w, c]`` bilinearly, or shrinks them with a triangle as wide as a new pixel.

    As ``jax.image.resize`` does, in the precision of the images.
    """
    for axis, length in enumerate(size, start=1):
        if images.shape[axis] != length:
            matrix = _interpolation(length, images.shape[axis]).astype(images.dtype)
            images = np.moveaxis(np.tensordot(matrix, images, (1, axis)), 0, axis)
    return images


def _interpolation(after: int, before: int) -> np.ndarray:
    """Returns the matrix ``[after, before]`` of linear interpolation, pixel centers at (i + 1/2)."""
    position = (np.arange(after) + 0.5) * before / after - 0.5
    weights = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(before)) / max(before / after, 1))
    return weights / weights.sum(1, keepdims=True)


DECODERS: dict[str, tuple[type, Callable[[Manifest, Any], Decoder]]] = {
    "gaussian": (_Gaussian, _gaussian),
    "packed_gaussian": (_PackedGaussian, _packed_gaussian),
    "pixel": (_Pixel, _pixel),
    "gaussian3d": (_Gaussian, _gaussian),
    "packed_gaussian3d": (_PackedGaussian, _packed_gaussian),
}
# Those to which videos are more than their frames.
VIDEO = ("gaussian3d", "packed_gaussian3d")
