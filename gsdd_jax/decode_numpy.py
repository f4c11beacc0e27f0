"""Distilled sets as images, with NumPy alone: for readers without JAX.

An independent implementation of what the codecs decode, for one purpose, looking at finished sets: no gradients, no
subsets of a set. It agrees with them to 1e-5 of the range of an image, where numbers are of that range. An exception
of Gaussians: a sample at which one of them falls to the very ``cutoff`` may count it in one and not in the other, which
moves a pixel by at most ``cutoff`` times its color.

Codecs that would need a page and more of their own are not here; a program with JAX exports their images instead.

Example::

    found = gsdd_jax.decode_numpy.load("runs/digits")
    found.images.shape, found.labels
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from gsdd_jax import exchange, merged, packing, synset
from gsdd_jax.exchange import SETTING, Array, Manifest, check_integer, short, widened

# Of `codecs.base`, `gaussians` and `codecs.packed`, which import JAX.
CENTER, SPREAD = 0.5, 0.25
CHOLESKY_SHIFT, PREFILTER, MAX_PIXELS = (0.5, 0.0, 0.5), 1 / 12, 1e6
FINEST_STEP = 2.0**-16
PADDING = 0.5
# Of `storage`: the number that stands for 0 in a byte, and the distance of its values.
BYTE_ZERO, BYTE_STEP = 85, 1 / 85
# Of the specs: what takes long beyond it.
SUPERSAMPLE, FACTOR, SORTED_POINTS = 64, 16, 1 << 12

Arrays = dict[str, np.ndarray]
Size = tuple[int, int]


class Images(NamedTuple):
    """The images of a set.

    Attributes:
        images: ``[n, h, w, c]`` float32 around [0,1].
        labels: ``[n]`` int32.
        class_names: One per class.
        soft_labels: ``[n, k]`` float32, each row with sum 1, or None where the set has none.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    soft_labels: np.ndarray | None = None


class Decoder(NamedTuple):
    """What is known of a set before its arrays are read.

    Attributes:
        layout: ``() -> dict`` of the arrays as they are written.
        decode: ``(arrays, size) -> images``, bfloat16 arrays as float32.
    """

    layout: Callable[[], Mapping[str, Array]]
    decode: Callable[[Arrays, Size], np.ndarray]


class Stored(NamedTuple):
    """A set as it is stored, whole or merged, before it is decoded.

    Attributes:
        parts: Manifest, decoder and arrays of each part; one of a set that is no merged one.
        labels: ``[n]`` int32.
        class_names: One per class.
        soft_labels: ``[n, k]`` float32, or None.
        meta: Whatever else was recorded.
    """

    parts: tuple[tuple[Manifest, Decoder, Arrays], ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    soft_labels: np.ndarray | None
    meta: dict[str, Any]


def load(path: synset.Location, size: Size | None = None) -> Images:
    """Reads and decodes a set, whole or merged.

    Args:
        path: As for :func:`gsdd_jax.load`.
        size: (height, width) of the images; those of the set by default.

    Raises:
        FileNotFoundError: There is no set.
        ValueError: It is damaged, or its codec is not decoded without JAX.
    """
    stored = read(path)
    # Numbers of any size are drawn as they are, without a warning, as JAX does.
    with np.errstate(over="ignore", invalid="ignore"):
        images = [
            part.decode(arrays, size or manifest.image_shape[:2]).astype(np.float32)
            for manifest, part, arrays in stored.parts
        ]
    return Images(np.concatenate(images), stored.labels, stored.class_names, stored.soft_labels)


def read(path: synset.Location) -> Stored:
    """Reads a set and checks it, as :func:`load` does, without decoding its images."""
    found = merged.read_manifest(path)
    folders = [path] if found is None else [found[0] / name for name in found[1]["parts"]]
    parts = tuple(synset.read(folder, decoder_of) for folder in folders)
    manifests = [manifest for manifest, *_ in parts]
    sizes = [manifest.num_classes for manifest in manifests]
    own = [np.repeat(np.arange(each.num_classes, dtype=np.int32), each.images_per_class) for each in manifests]
    soft = [_soft_labels(*part) for part in parts]
    if found is None:
        return Stored(parts, own[0], manifests[0].class_names, soft[0], manifests[0].meta)
    folder, manifest = found
    labels, rows = merged.joined(own, sizes), merged.joined_soft(own, soft, sizes)
    with synset.naming(folder / synset.MANIFEST):
        names = merged.check_parts([(each.image_shape, each.bytes_per_class, each.class_names) for each in manifests])
        merged.check_names(names, manifest)
        if manifest["format"] == merged.FORMATS[1]:
            merged.check_own_labels(soft)
    if manifest["format"] == merged.FORMATS[1]:
        entry, written, classes = synset.read_labels(folder, manifest, len(labels))
        rows = exchange.soft_labels(written, entry, classes)
    return Stored(parts, labels, names, rows, manifest["meta"])


def _soft_labels(manifest: Manifest, decoder: Decoder, arrays: Arrays) -> np.ndarray | None:
    del decoder
    entry = manifest.labels
    return None if entry is None else exchange.soft_labels(arrays, entry, manifest.num_classes)


def decoder_of(manifest: Manifest, payload: int) -> Decoder:
    """Returns the decoder of a set; its arrays are compared with the file's by :func:`gsdd_jax.synset.read`.

    Raises:
        ValueError: Its codec is unknown here, or a setting makes no sense.
    """
    del payload
    name = manifest.codec.get("name")
    if type(name) is not str or name not in DECODERS:
        raise ValueError(
            f"codec.name: expected one of {', '.join(DECODERS)}, which are decoded without JAX; found {short(name)}, "
            "whose images python -m train.export writes where JAX is installed"
        )
    return DECODERS[name](manifest)


def _setting(manifest: Manifest, name: str, high: int = SETTING) -> int:
    return check_integer(manifest.codec.get(name), f"codec.{name}", 1, high)


def _choice(manifest: Manifest, name: str, *allowed: str) -> str:
    found = manifest.codec.get(name)
    if type(found) is not str or found not in allowed:
        raise ValueError(f"codec.{name}: expected one of {', '.join(allowed)}; found {short(found)}")
    return found


def _dtype(manifest: Manifest) -> str:
    return _choice(manifest, "dtype", "float32", "bfloat16")


def _divided(manifest: Manifest, name: str, divisor: int) -> int:
    """Returns the groups of images of the whole set."""
    if manifest.images_per_class % divisor:
        raise ValueError(f"images_per_class: expected a multiple of {divisor} (codec.{name})")
    return manifest.num_images // divisor


# Gaussians


def _gaussian(manifest: Manifest) -> Decoder:
    (h, w, c), dtype = manifest.image_shape, _dtype(manifest)
    lead = (manifest.num_images, _setting(manifest, "num_points"))
    supersample, cutoff = _setting(manifest, "supersample", SUPERSAMPLE), _cutoff(manifest)
    shapes = {"mean": (*lead, 2), "cholesky": (*lead, 3), "color": (*lead, c), "opacity": lead}

    def decode(arrays: Arrays, size: Size) -> np.ndarray:
        colors = arrays["color"] * arrays["opacity"][..., None]
        return _splat(arrays["mean"], arrays["cholesky"], colors, (h, w), size, supersample, cutoff)

    return Decoder(lambda: {name: Array(dtype, shape) for name, shape in shapes.items()}, decode)


def _packed_gaussian(manifest: Manifest) -> Decoder:
    (h, w, c), n = manifest.image_shape, manifest.num_images
    sort = _choice(manifest, "order", "sorted", "kept") == "sorted"
    m = _setting(manifest, "num_points", SORTED_POINTS if sort else SETTING)
    bits = {name: _setting(manifest, f"bits_{name}", 16) for name in ("mean", "cholesky", "color")}
    supersample, cutoff = _setting(manifest, "supersample", SUPERSAMPLE), _cutoff(manifest)
    position_bits = packing.multiset_bits(m, 4 ** bits["mean"]) if sort else 2 * m * bits["mean"]
    sizes = [n * position_bits, n * m * 3 * bits["cholesky"], n * m * c * bits["color"]]
    layout = {
        "codes": Array("uint8", (-(-sum(sizes) // 8),)),
        "low": Array("bfloat16", (3 + c,)),
        "step": Array("bfloat16", (3 + c,)),
    }

    def decode(arrays: Arrays, size: Size) -> np.ndarray:
        positions, shapes, colors, padding = np.split(np.unpackbits(arrays["codes"]), np.cumsum(sizes))
        if padding.any():
            raise ValueError(f"codes: the {padding.size} bits after the last code must be 0")
        if sort:
            keys = packing.multisets_from_bits(positions, n, m, 4 ** bits["mean"])
            mean = np.stack([keys % 2 ** bits["mean"], keys >> bits["mean"]], axis=-1)
        else:
            mean = packing.from_bits(positions, bits["mean"]).reshape(n, m, 2)
        numbers = np.concatenate(
            [
                packing.from_bits(part, bits[name]).reshape(n, m, -1)
                for part, name in ((shapes, "cholesky"), (colors, "color"))
            ],
            axis=-1,
        )
        values = arrays["low"] + numbers.astype(np.float32) * _step(arrays)
        cell = 2.0 ** (1 - bits["mean"])
        return _splat(0.5 * cell - 1 + mean * cell, values[..., :3], values[..., 3:], (h, w), size, supersample, cutoff)

    return Decoder(lambda: layout, decode)


def _step(arrays: Arrays) -> np.ndarray:
    """Returns the steps of grids, none finer than codes come back from."""
    finest = np.float32(FINEST_STEP) * np.maximum(1, np.abs(arrays["low"]))
    return _as_bfloat16(np.maximum(arrays["step"], finest))


def _cutoff(manifest: Manifest) -> float:
    found: Any = manifest.codec.get("cutoff")
    if type(found) not in (int, float) or not 0 <= found < 1:
        raise ValueError(f"codec.cutoff: expected a number in [0, 1), found {short(found)}")
    return float(found)


def _as_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounds finite float32 to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return widened((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def _splat(
    mean: np.ndarray,
    cholesky: np.ndarray,
    colors: np.ndarray,
    native: Size,
    size: Size,
    supersample: int,
    cutoff: float,
) -> np.ndarray:
    """Draws Gaussians in float64; see :func:`gsdd_jax.gaussians.to_pixels` and :func:`kernels.splat`.

    One at a time and only where it is not zero.
    """
    mean, cholesky, colors = (np.asarray(x, np.float64) for x in (mean, cholesky, colors))
    height, width = size
    limit = MAX_PIXELS
    centers = np.clip(0.5 * np.array([width, height]) * (mean + 1), -limit, limit)
    grow = np.array([width / native[1], height / native[0], height / native[0]])
    l11, l21, l22 = np.moveaxis(np.clip((cholesky + np.array(CHOLESKY_SHIFT)) * grow, -limit, limit), -1, 0)
    variance_y = l21**2 + l22**2 + PREFILTER
    p = 1 / np.sqrt(PREFILTER + l11**2 * ((l22**2 + PREFILTER) / variance_y))
    r, s = -(l11 * l21 / variance_y) * p, 1 / np.sqrt(variance_y)
    reach = np.sqrt(-2 * np.log(cutoff)) if cutoff else np.inf
    half = np.stack([reach * np.sqrt(1 + (r / s) ** 2) / p, reach / s], axis=-1)
    broken = ~(np.isfinite(centers).all((1, 2)) & np.isfinite(p + r + s).all(1) & ~np.isnan(colors).any((1, 2)))
    images = np.zeros((len(mean), *size, colors.shape[-1]))
    offsets = (np.arange(supersample) + 0.5) / supersample
    first = np.clip(np.floor(np.nan_to_num(centers - half)), 0, [width, height]).astype(int)
    last = np.clip(np.ceil(np.nan_to_num(centers + half)), 0, [width, height]).astype(int)
    for i, j in zip(*np.nonzero((first < last).all(-1) & ~broken[:, None]), strict=True):
        (x0, y0), (x1, y1) = first[i, j], last[i, j]
        dx = (np.arange(x0, x1)[:, None] + offsets).reshape(-1) - centers[i, j, 0]
        dy = (np.arange(y0, y1)[:, None] + offsets).reshape(-1)[:, None] - centers[i, j, 1]
        weight = np.exp(-0.5 * ((p[i, j] * dx + r[i, j] * dy) ** 2 + (s[i, j] * dy) ** 2))
        weight[weight < cutoff] = 0
        weight = weight.reshape(y1 - y0, supersample, x1 - x0, supersample).mean((1, 3))
        images[i, y0:y1, x0:x1] += weight[..., None] * colors[i, j]
    images[broken] = np.nan
    return images


# Pixels


def _pixel_array(manifest: Manifest, count: int) -> Array:
    return Array(_choice(manifest, "dtype", "float32", "bfloat16", "uint8"), (count, *manifest.image_shape))


def _pixel_values(array: np.ndarray) -> np.ndarray:
    """Returns pixels as float32."""
    if array.dtype != np.uint8:
        return array
    return (array.astype(np.float32) - np.float32(BYTE_ZERO)) * np.float32(BYTE_STEP)


def _pixel(manifest: Manifest) -> Decoder:
    array = _pixel_array(manifest, manifest.num_images)
    return Decoder(lambda: {"images": array}, lambda arrays, size: resized(_pixel_values(arrays["images"]), size))


def _palette(manifest: Manifest) -> Decoder:
    (h, w, c), n = manifest.image_shape, manifest.num_images
    bits = _setting(manifest, "bits", 8)
    count = {"image": n, "class": manifest.num_classes, "set": 1}[_choice(manifest, "shared", "image", "class", "set")]
    total = n * h * w * bits
    layout = {"codes": Array("uint8", (-(-total // 8),)), "palettes": Array("uint8", (count, 2**bits, c))}

    def decode(arrays: Arrays, size: Size) -> np.ndarray:
        codes, padding = np.split(np.unpackbits(arrays["codes"]), [total])
        if padding.any():
            raise ValueError(f"codes: the {padding.size} bits after the last code must be 0")
        chosen = packing.from_bits(codes, bits).reshape(count, -1, 1).astype(np.int64)
        images = np.take_along_axis(_pixel_values(arrays["palettes"]), chosen, axis=1)
        return resized(images.reshape(n, h, w, c), size)

    return Decoder(lambda: layout, decode)


def _downscale(manifest: Manifest) -> Decoder:
    h, w, c = manifest.image_shape
    f = _setting(manifest, "factor", FACTOR)
    height, width = -(-h // f), -(-w // f)
    array = _pixel_array(manifest, _divided(manifest, "factor", f * f))

    def decode(arrays: Arrays, size: Size) -> np.ndarray:
        margins = [(0, 0), (0, f * height - h), (0, f * width - w), (0, 0)]
        padded = np.pad(_pixel_values(arrays["canvases"]), margins, constant_values=PADDING)
        cells = padded.reshape(-1, f, height, f, width, c).swapaxes(2, 3)
        return resized(cells.reshape(-1, height, width, c), size)

    return Decoder(lambda: {"canvases": array}, decode)


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


# Products of what images share


def _frequency(manifest: Manifest) -> Decoder:
    c, n = manifest.image_shape[2], manifest.num_images
    count, places = _places(manifest)
    layout = {"coefficients": Array(_dtype(manifest), (n, count, c))} | places

    def decode(arrays: Arrays, size: Size) -> np.ndarray:
        return _drawn(arrays["coefficients"], arrays, manifest, size)

    return Decoder(lambda: layout, decode)


def _packed_frequency(manifest: Manifest) -> Decoder:
    c, k, n = manifest.image_shape[2], manifest.num_classes, manifest.num_images
    count, places = _places(manifest)
    bits = _setting(manifest, "bits", 16)
    total = n * count * c * bits
    ends = Array("bfloat16", (k, count, c))
    layout = {"codes": Array("uint8", (-(-total // 8),)), "low": ends, "step": ends} | places

    def decode(arrays: Arrays, size: Size) -> np.ndarray:
        codes, padding = np.split(np.unpackbits(arrays["codes"]), [total])
        if padding.any():
            raise ValueError(f"codes: the {padding.size} bits after the last code must be 0")
        numbers = packing.from_bits(codes, bits).reshape(k, -1, count, c).astype(np.float32)
        low, step = arrays["low"], _step(arrays)
        return _drawn((low[:, None] + numbers * step[:, None]).reshape(n, count, c), arrays, manifest, size)

    return Decoder(lambda: layout, decode)


def _places(manifest: Manifest) -> tuple[int, dict[str, Array]]:
    """Returns how many coefficients a channel has, and the array that says where."""
    (h, w, _), k = manifest.image_shape, manifest.num_classes
    count = _setting(manifest, "coefficients", h * w)
    index = Array(str(np.min_scalar_type(h * w - 1)), (k, count))
    mask = Array("uint8", (-(-k * h * w // 8),))
    return count, {"mask": mask} if mask.nbytes < index.nbytes else {"index": index}


def _drawn(coefficients: np.ndarray, arrays: Arrays, manifest: Manifest, size: Size) -> np.ndarray:
    """Draws the images of coefficients ``[n, count, c]`` at the places of their classes."""
    (h, w, c), k, n = manifest.image_shape, manifest.num_classes, manifest.num_images
    count = coefficients.shape[1]
    if "mask" in arrays:
        chosen, padding = np.split(np.unpackbits(arrays["mask"]), [k * h * w])
        chosen = chosen.reshape(k, h * w)
        if padding.any() or (chosen.sum(1) != count).any():
            raise ValueError(f"mask: expected {count} bits of each of {k} classes and zeros after them")
        found = np.nonzero(chosen)[1].reshape(k, count)
    else:
        found = arrays["index"].astype(np.int64)
        if (np.diff(found) <= 0).any() or found.max() >= h * w:
            raise ValueError(f"index: expected {count} places below {h * w} for each class, in rising order")
    flat = np.zeros((n, h * w, c))
    found = np.repeat(found, manifest.images_per_class, axis=0)
    np.put_along_axis(flat, found[..., None], coefficients, axis=1)
    rows, columns = (_cosines(side, length) for side, length in zip((h, w), size, strict=True))
    spectra = flat.reshape(n, h, w, c)
    return CENTER + SPREAD * np.einsum("yh,nyxc,xw->nhwc", rows, spectra, columns, optimize=True)


def _cosines(frequencies: int, positions: int) -> np.ndarray:
    k, x = np.arange(frequencies)[:, None], (np.arange(positions) + 0.5) / positions
    scale = np.where(k == 0, 1.0, 2.0) / frequencies
    return np.where(k < positions, np.sqrt(scale) * np.cos(np.pi * k * x), 0.0)


def _memory(manifest: Manifest) -> Decoder:
    (h, w, c), dtype = manifest.image_shape, _dtype(manifest)
    f, bases = _setting(manifest, "factor", FACTOR), _setting(manifest, "bases")
    layout = {
        "coefficients": Array(dtype, (manifest.num_images, bases)),
        "bases": Array(dtype, (bases, -(-h // f), -(-w // f), c)),
    }

    def decode(arrays: Arrays, size: Size) -> np.ndarray:
        combined = np.tensordot(arrays["coefficients"].astype(np.float64), arrays["bases"].astype(np.float64), (1, 0))
        return CENTER + SPREAD * resized(combined, size)

    return Decoder(lambda: layout, decode)


def _spectral(manifest: Manifest) -> Decoder:
    h, w, c = manifest.image_shape
    dtype, sets, n = _dtype(manifest), _setting(manifest, "matrices"), manifest.num_images
    p, q, r = (_setting(manifest, f"rank_{axis}", SETTING) for axis in ("height", "width", "channels"))
    layout = {
        "tensors": Array(dtype, (_divided(manifest, "matrices", sets), p, q, r)),
        "rows": Array(dtype, (sets, h, p)),
        "columns": Array(dtype, (sets, w, q)),
        "channels": Array(dtype, (sets, c, r)),
    }

    def decode(arrays: Arrays, size: Size) -> np.ndarray:
        wide = {name: array.astype(np.float64) for name, array in arrays.items()}
        images = np.einsum(
            "tpqr,jhp,jwq,jcr->tjhwc", wide["tensors"], wide["rows"], wide["columns"], wide["channels"], optimize=True
        )
        return resized(CENTER + SPREAD * images.reshape(n, h, w, c), size)

    return Decoder(lambda: layout, decode)


def _factor(manifest: Manifest) -> Decoder:
    (h, w, c), dtype = manifest.image_shape, _dtype(manifest)
    styles, channels = _setting(manifest, "hallucinators"), _setting(manifest, "base_channels")
    if min(h, w) < 3:
        raise ValueError(f"image_shape: factor needs images of at least 3 x 3 pixels, found {h} x {w}")
    shapes = {
        "base": (_divided(manifest, "hallucinators", styles), h, w, channels),
        "conv": (styles, 3, 3, channels, c),
        "conv_bias": (styles, c),
        "scale": (styles, h - 2, w - 2, c),
        "shift": (styles, h - 2, w - 2, c),
        "deconv": (styles, 3, 3, c, c),
        "deconv_bias": (styles, c),
    }

    def decode(arrays: Arrays, size: Size) -> np.ndarray:
        wide = {name: array.astype(np.float64) for name, array in arrays.items()}
        images = []
        for j in range(styles):
            own = {name: array[j] for name, array in wide.items() if name != "base"}
            inner = own["scale"] * (_conv(wide["base"], own["conv"]) + own["conv_bias"]) + own["shift"]
            padded = np.pad(inner, ((0, 0), (2, 2), (2, 2), (0, 0)))
            images.append(_conv(padded, own["deconv"][::-1, ::-1]) + own["deconv_bias"])
        return resized(CENTER + SPREAD * np.stack(images, axis=1).reshape(-1, h, w, c), size)

    return Decoder(lambda: {name: Array(dtype, shape) for name, shape in shapes.items()}, decode)


def _conv(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Correlates ``[n, h, w, c]`` with ``[3, 3, c, d]``."""
    h, w = x.shape[1] - 2, x.shape[2] - 2
    return np.sum([x[:, y : y + h, z : z + w] @ kernel[y, z] for y in range(3) for z in range(3)], axis=0)


DECODERS: dict[str, Callable[[Manifest], Decoder]] = {
    "gaussian": _gaussian,
    "packed_gaussian": _packed_gaussian,
    "pixel": _pixel,
    "palette": _palette,
    "downscale": _downscale,
    "frequency": _frequency,
    "packed_frequency": _packed_frequency,
    "factor": _factor,
    "memory": _memory,
    "spectral": _spectral,
}
