"""Pixels of a few bits: numbers of the colors of a palette that an image, a class or the whole set shares.

Training goes through the rounding. A pixel is drawn in the nearest color, and its gradient passes straight through;
after every step each color is the mean of the pixels drawn in it (Lloyd's step), so that palettes follow the pixels and
need no learning rate. The strong form of the pixel baseline: 4 colors an image hold 45 times the images of float32.

In the line of QuADD (arXiv 2603.02411: a quantizer inside the loop, learned levels) and of 2-bit quantization after
distillation (arXiv 2603.13346: a range for each patch), and no reimplementation of either: colors are quantized as
vectors, as in AutoPalette (NeurIPS 2024), whose palette is the output of a network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Gt, Le
from typing_extensions import Doc

from gsdd_jax import packing, storage
from gsdd_jax.codecs.base import MOST, Codec, Layout, Shape, Spec, descent, resized
from gsdd_jax.errors import InputError
from gsdd_jax.later import optax

IMAGES, PALETTES, CODES = "images", "palettes", "codes"
# Lloyd steps from the start, which come to rest long before on small images.
START_STEPS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaletteSpec(Spec):
    """Settings of the palette codec."""

    name: Annotated[Literal["palette"], Doc("the parameterization")] = "palette"
    bits: Annotated[int, Ge(1), Le(8), Doc("bits of a pixel, of all its channels: 2^bits colors")] = 2
    images_per_class: Annotated[int, Ge(0), Doc("images per class; 0 = as many as the budget holds")] = 0
    shared: Annotated[Literal["image", "class", "set"], Doc("what has a palette of its own")] = "image"
    optimizer: Annotated[Literal["sgd", "adam"], Doc("sgd has momentum 0.5, as for pixel")] = "adam"
    lr: Annotated[float, Gt(0), Doc("learning rate in distillation, for pixels in [0, 1]")] = 0.01

    def sizes(self, image_shape: Shape) -> dict[str, Sequence[int]]:
        return {"images_per_class": range(1, MOST), "bits": range(1, 9)}

    def layout(self, image_shape: Shape, num_classes: int) -> Layout:
        h, w, c = image_shape
        n = num_classes * self.images_per_class
        palettes = {"image": n, "class": num_classes, "set": 1}[self.shared]
        return {
            CODES: jax.ShapeDtypeStruct((-(-n * h * w * self.bits // 8),), np.uint8),
            PALETTES: jax.ShapeDtypeStruct((palettes, 2**self.bits, c), np.uint8),
        }

    def numbers(self, image_shape: Shape, num_classes: int) -> tuple[int, str]:
        h, w, _ = image_shape
        return num_classes * self.images_per_class * h * w, f"palettes of {2**self.bits} colors"


def make(spec: PaletteSpec, image_shape: tuple[int, int, int], num_classes: int) -> Codec:
    """Builds the codec; see `gsdd_jax.codecs.make`.

    Parameters: ``images [n, h, w, c]`` and ``palettes [p, 2^bits, c]``, of which each image, class or the set has one.
    Colors are written as the bytes of uint8 pixels, see `gsdd_jax.storage.byte_codes`.
    """
    h, w, c = image_shape
    n = num_classes * spec.images_per_class
    written = spec.layout(image_shape, num_classes)
    count = written[PALETTES].shape[0]

    def grouped(images):
        return images.reshape(count, -1, c)

    def init(key, images):
        images = jnp.asarray(images, jnp.float32)
        palettes = start(grouped(images), 2**spec.bits)
        palettes = jax.lax.fori_loop(0, START_STEPS, lambda _, colors: means(grouped(images), colors), palettes)
        return {IMAGES: images, PALETTES: palettes}

    def decode(params, index=None, *, size=None, key=None):
        del key
        index = jnp.arange(n) if index is None else jnp.asarray(index)
        pixels = params[IMAGES][index].reshape(len(index), h * w, c)
        colors = storage.as_uint8(jax.lax.stop_gradient(params[PALETTES]))[index // (n // count)]
        return resized(in_color(pixels, colors).reshape(-1, h, w, c), size)

    def project(params):
        # What a step carries beyond the ends would have no gradient to come back by.
        images = jnp.clip(params[IMAGES], storage.BYTE_LOW, storage.BYTE_HIGH)
        return {IMAGES: images, PALETTES: means(grouped(images), params[PALETTES])}

    def quantize(params):
        chosen = nearest(grouped(params[IMAGES]), storage.as_uint8(params[PALETTES]))
        return {CODES: chosen.astype(jnp.uint16).reshape(n, h, w), PALETTES: storage.cast(params[PALETTES], "uint8")}

    def dequantize(tree):
        palettes = storage.widen(jnp.asarray(tree[PALETTES]))
        chosen = jnp.asarray(tree[CODES], jnp.int32).reshape(count, -1, 1)
        images = jnp.take_along_axis(palettes, chosen, axis=1)
        return {IMAGES: images.reshape(n, h, w, c), PALETTES: palettes}

    def optimizer():
        labels = {IMAGES: "trained", PALETTES: "fixed"}
        return optax.partition({"trained": descent(spec), "fixed": optax.set_to_zero()}, labels)

    def pack(tree):
        codes = np.packbits(packing.to_bits(np.asarray(tree[CODES]), spec.bits))
        return {CODES: codes, PALETTES: np.asarray(tree[PALETTES])}

    def unpack(arrays):
        bits, padding = np.split(np.unpackbits(np.asarray(arrays[CODES])), [n * h * w * spec.bits])
        if padding.any():
            raise InputError(f"{CODES}: the {padding.size} bits after the last code must be 0")
        codes = packing.from_bits(bits, spec.bits).reshape(n, h, w)
        return {CODES: codes, PALETTES: arrays[PALETTES]}

    return Codec(
        name="palette",
        spec=spec,
        image_shape=image_shape,
        num_classes=num_classes,
        images_per_class=spec.images_per_class,
        init=init,
        decode=decode,
        quantize=quantize,
        dequantize=dequantize,
        nbytes=lambda params: storage.nbytes(written),
        project=project,
        optimizer=optimizer,
        fitter=lambda steps: optax.set_to_zero(),
        fitted_by_init=True,
        layout=lambda: written,
        pack=pack,
        unpack=unpack,
    )


def start(pixels: jax.Array, colors: int) -> jax.Array:
    """Returns colors ``[p, colors, c]`` for pixels ``[p, m, c]``: those at evenly spaced ranks of their brightness."""
    m = pixels.shape[1]
    order = jnp.argsort(pixels.sum(-1), axis=1)
    ranks = (2 * jnp.arange(colors) + 1) * m // (2 * colors)
    return jnp.take_along_axis(pixels, order[:, ranks, None], axis=1)


def nearest(pixels: jax.Array, colors: jax.Array) -> jax.Array:
    """Returns the number ``[p, m]`` of the color nearest to each pixel, the first of several."""
    return jnp.argmin(jnp.sum((pixels[:, :, None] - colors[:, None]) ** 2, axis=-1), axis=-1)


def means(pixels: jax.Array, colors: jax.Array) -> jax.Array:
    """Returns for each color the mean of the pixels nearest to it; without any, the color itself.

    What is not finite has no say.
    """
    chosen = jnp.where(jnp.isfinite(pixels).all(-1), nearest(pixels, storage.as_uint8(colors)), -1)

    # One color at a time, with sums that are the same on every run, unlike those of a scatter on a GPU.
    def mean(code):
        own = (chosen == code)[..., None]
        return jnp.where(own, pixels, 0).sum(1) / jnp.maximum(own.sum(1), 1), own.any(1)

    found, there = jax.lax.map(mean, jnp.arange(colors.shape[1]))
    return jnp.where(jnp.moveaxis(there, 0, 1), jnp.moveaxis(found, 0, 1), colors)


@jax.custom_jvp
def in_color(pixels: jax.Array, colors: jax.Array) -> jax.Array:
    """Returns pixels ``[p, m, c]`` in the nearest of the colors ``[p, colors, c]``; NaN stays.

    The gradient passes straight through to the pixels; colors have none.
    """
    chosen = jnp.take_along_axis(colors, nearest(pixels, colors)[..., None], axis=1)
    return jnp.where(jnp.isnan(pixels), pixels, chosen)


@in_color.defjvp
def _in_color_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return in_color(*primals), tangents[0]
