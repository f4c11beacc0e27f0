"""Small images, several to a canvas: the multi-formation of IDC."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge, Gt, Le
from typing_extensions import Doc

from gsdd_jax import storage
from gsdd_jax.codecs.base import MOST, Codec, Layout, Shape, Spec, arrays, cast_storage, descent
from gsdd_jax.errors import InputError
from gsdd_jax.later import optax

# What the reference pads canvases with: gray, which an image keeps at its border where the factor does not divide.
PADDING = 0.5
# Adam's rate when fitting images: the start solves but for the clipping, which costs 0.14 dB on CIFAR-10; a fit wins
# 0.04 of them back, at any rate from 0.001 to 0.01.
FIT_RATE = 0.003


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownscaleSpec(Spec):
    """Settings of the codec of small images."""

    name: Annotated[Literal["downscale"], Doc("the parameterization")] = "downscale"
    factor: Annotated[
        int, Ge(1), Le(16), Doc("cells of a canvas along each axis, one image each (IDC: 2 at 32 px, 3 on ImageNet)")
    ] = 2
    images_per_class: Annotated[
        int, Ge(0), Doc("images per class, a multiple of factor^2; 0 = as many as the budget holds")
    ] = 0
    dtype: Annotated[
        Literal["float32", "bfloat16", "uint8"],
        Doc("precision on disk; the field counts float32; uint8: multiples of 1/85 from -1 to 2"),
    ] = "float32"
    optimizer: Annotated[Literal["sgd", "adam"], Doc("sgd has the momentum 0.5 of the reference")] = "sgd"
    lr: Annotated[
        float,
        Gt(0),
        Doc("learning rate in distillation, for pixels in [0, 1]; as for plain pixels (IDC, own objective: 5e-4 ipc)"),
    ] = 0.1

    def resolved(self, image_shape: Shape) -> DownscaleSpec:
        h, w, _ = image_shape
        possible = [f for f in range(1, self.factor + 1) if all((f - 1) * -(-x // f) < x for x in (h, w))]
        if self.factor not in possible:
            raise InputError(
                f"codec.factor: {self.factor} x {self.factor} cells of "
                f"{'x'.join(map(str, cell_size(self.factor, (h, w))))} pixels leave cells without a pixel on a canvas "
                f"of {h}x{w}; the next smaller factor that does not is {possible[-1]}"
            )
        return self

    def sizes(self, image_shape: Shape) -> dict[str, Sequence[int]]:
        return {"images_per_class": range(self.factor**2, MOST, self.factor**2)}

    def layout(self, image_shape: Shape, num_classes: int) -> Layout:
        canvases = num_classes * self.images_per_class // self.factor**2
        return arrays(self.dtype, {"canvases": (canvases, *image_shape)})


def make(spec: DownscaleSpec, image_shape: tuple[int, int, int], num_classes: int) -> Codec:
    """Builds the codec; see `gsdd_jax.codecs.make`.

    A canvas has the size of an image and is cut into ``factor`` x ``factor`` equal cells, padded at the bottom and the
    right where the factor does not divide. Image ``i`` is cell ``i % factor^2``, row by row, of canvas
    ``i // factor^2``, enlarged bilinearly. Pixels are in [0,1], as in the reference, which clips them after each step.

    Deviations: the start solves for the cells whose enlargements are nearest to the images; the reference takes every
    ``factor``-th pixel. Its variants with cells of several sizes (multi) or of at most 128 images (bound) are left out.
    """
    h, w, c = image_shape
    f, cell = spec.factor, cell_size(spec.factor, (h, w))

    def init(key, images):
        blocks = (jnp.asarray(images, jnp.float32) - PADDING).reshape(-1, f, f, h, w, c)
        rows, columns = _inverses(h, cell[0], f), _inverses(w, cell[1], f)
        bands = [
            jnp.concatenate([_both_axes(rows[i], blocks[:, i, j], columns[j]) for j in range(f)], axis=2)
            for i in range(f)
        ]
        return project({"canvases": PADDING + jnp.concatenate(bands, axis=1)})

    def project(params):
        return jax.tree.map(lambda x: jnp.clip(x, 0, 1), params)

    def decode(params, index=None, *, size=None, key=None):
        del key
        cells = split(storage.quantize(params["canvases"], spec.dtype), f)
        cells = cells if index is None else cells[index]
        return jax.image.resize(cells, (cells.shape[0], *(size or (h, w)), c), "bilinear")

    return Codec(
        name="downscale",
        spec=spec,
        image_shape=image_shape,
        num_classes=num_classes,
        images_per_class=spec.images_per_class,
        init=init,
        decode=decode,
        project=project,
        optimizer=lambda: descent(spec),
        fitter=lambda steps: optax.adam(optax.cosine_decay_schedule(FIT_RATE, steps, alpha=0.02)),
        **cast_storage(spec, image_shape, num_classes),
    )


def cell_size(factor: int, size: tuple[int, int]) -> tuple[int, int]:
    """Returns (height, width) of a cell."""
    return -(-size[0] // factor), -(-size[1] // factor)


def split(canvases: jax.Array, factor: int) -> jax.Array:
    """Cuts canvases ``[n, h, w, c]`` into their cells ``[n * factor^2, cell height, cell width, c]``, row by row."""
    n, h, w, c = canvases.shape
    height, width = cell_size(factor, (h, w))
    margins = [(0, 0), (0, factor * height - h), (0, factor * width - w), (0, 0)]
    padded = jnp.pad(canvases, margins, constant_values=PADDING)
    cells = padded.reshape(n, factor, height, factor, width, c).transpose(0, 1, 3, 2, 4, 5)
    return cells.reshape(-1, height, width, c)


def enlargement(large: int, small: int) -> jax.Array:
    """Returns the matrix ``[large, small]`` of bilinear interpolation along an axis, pixel centers at (i + 1/2)."""
    return jax.image.resize(jnp.eye(small, dtype=jnp.float32), (large, small), "bilinear")


def _inverses(length: int, cell: int, factor: int) -> list[jax.Array]:
    """Returns, for the cells along an axis, the pseudo-inverse of what enlarges their part that is on the canvas."""
    matrix = enlargement(length, cell)
    return [jnp.linalg.pinv(matrix[:, : min(cell, length - i * cell)]) for i in range(factor)]


def _both_axes(rows: jax.Array, images: jax.Array, columns: jax.Array) -> jax.Array:
    return jnp.einsum("ih,nhwc,jw->nijc", rows, images, columns, precision=jax.lax.Precision.HIGHEST)
