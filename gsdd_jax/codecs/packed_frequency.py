"""FreD's coefficients as integer codes: the rival of packed Gaussians with the most images in the same bytes.

The coefficients and their places are those of `gsdd_jax.codecs.frequency`. Each coefficient and channel of a class
has a grid of its own over the images of that class, which follows the numbers after every step; every forward pass goes
through the rounding. FreD itself stores float32: this is no published method, but what stands to FreD as packed
Gaussians stand to Gaussians.
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
from gsdd_jax.codecs import frequency
from gsdd_jax.codecs.base import MOST, Codec, Layout, Shape, Spec, descent
from gsdd_jax.codecs.frequency import COEFFICIENTS, INDEX, MASK
from gsdd_jax.codecs.packed import BFLOAT16_ULP, BITS, FINEST_STEP, LOW, STEP
from gsdd_jax.errors import InputError
from gsdd_jax.later import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedFrequencySpec(Spec):
    """Settings of the packed frequency codec."""

    name: Annotated[Literal["packed_frequency"], Doc("the parameterization")] = "packed_frequency"
    coefficients: Annotated[int, Ge(1), Doc("DCT coefficients of each channel of an image")] = 64
    images_per_class: Annotated[int, Ge(0), Doc("images per class; 0 = as many as the budget holds")] = 0
    bits: Annotated[int, Ge(2), Le(16), Doc("bits of a coefficient")] = 6
    mask: Annotated[
        Literal["energy", "variance"],
        Doc(
            "a class has the coefficients of the largest mean square of its images, or, as FreD, of the largest "
            "variance over them"
        ),
    ] = "energy"
    optimizer: Annotated[Literal["sgd", "adam"], Doc("sgd has the momentum 0.5 of FreD's code")] = "adam"
    lr: Annotated[float, Gt(0), Doc("learning rate in distillation, as for frequency")] = 0.1

    def sizes(self, image_shape: Shape) -> dict[str, Sequence[int]]:
        h, w, _ = image_shape
        return {"images_per_class": range(1, MOST), "coefficients": range(1, h * w + 1)}

    def layout(self, image_shape: Shape, num_classes: int) -> Layout:
        h, w, c = image_shape
        codes = -(-num_classes * self.images_per_class * self.coefficients * c * self.bits // 8)
        ends = jax.ShapeDtypeStruct((num_classes, self.coefficients, c), jnp.bfloat16)
        places = frequency.places_layout(self.coefficients, (h, w), num_classes)
        return {BITS: jax.ShapeDtypeStruct((codes,), np.uint8), LOW: ends, STEP: ends} | places

    def numbers(self, image_shape: Shape, num_classes: int) -> tuple[int, str]:
        count = num_classes * self.images_per_class * self.coefficients * image_shape[-1]
        return count, f"codes of {self.bits} bits"


def make(spec: PackedFrequencySpec, image_shape: tuple[int, int, int], num_classes: int) -> Codec:
    """Builds the codec; see `gsdd_jax.codecs.make`.

    Parameters: ``coefficients [n, coefficients, c]`` and ``index [k, coefficients]`` as for ``frequency``; ``low`` and
    ``step [k, coefficients, c]``, the grids. Training moves the coefficients; `fit_ranges` lays the grids over
    them.
    """
    h, w, c = image_shape
    n = num_classes * spec.images_per_class
    written = spec.layout(image_shape, num_classes)
    plain = frequency.make(
        frequency.FrequencySpec(coefficients=spec.coefficients, images_per_class=spec.images_per_class, mask=spec.mask),
        image_shape,
        num_classes,
    )

    def init(key, images):
        params = plain.init(key, images)
        none = jnp.zeros((num_classes, spec.coefficients, c), jnp.float32)
        return fit_ranges(params | {LOW: none, STEP: none}, spec.bits)

    def decode(params, index=None, *, size=None, key=None):
        return plain.decode(quantized(params, spec.bits), index, size=size, key=key)

    def quantize(params):
        low, step = grids(params[LOW], params[STEP])
        codes = jnp.nan_to_num(storage.grid_codes(by_class(params[COEFFICIENTS], num_classes), low, step, spec.bits))
        codes = codes.astype(jnp.uint16).reshape(n, spec.coefficients, c)
        index = params[INDEX].astype(np.min_scalar_type(h * w - 1))
        shape = (num_classes, spec.coefficients, c)
        ends = {LOW: low.reshape(shape), STEP: step.reshape(shape)}
        return {COEFFICIENTS: codes, INDEX: index} | storage.cast(ends, "bfloat16")

    def dequantize(tree):
        params = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in tree.items()}
        low, step = grids(params[LOW], params[STEP])
        values = low + by_class(params[COEFFICIENTS], num_classes) * step
        return params | {COEFFICIENTS: values.reshape(n, spec.coefficients, c)}

    def optimizer():
        labels = {COEFFICIENTS: "trained", INDEX: "fixed", LOW: "fixed", STEP: "fixed"}
        return optax.partition({"trained": descent(spec), "fixed": optax.set_to_zero()}, labels)

    return Codec(
        name="packed_frequency",
        spec=spec,
        image_shape=image_shape,
        num_classes=num_classes,
        images_per_class=spec.images_per_class,
        init=init,
        decode=decode,
        quantize=quantize,
        dequantize=dequantize,
        nbytes=lambda params: storage.nbytes(written),
        project=lambda params: fit_ranges(params, spec.bits),
        optimizer=optimizer,
        # The start is the projection onto the coefficients, rounded to the nearest: nothing is nearer on these grids.
        fitter=lambda steps: optax.set_to_zero(),
        fitted_by_init=True,
        layout=lambda: written,
        pack=lambda tree: pack(tree, spec.bits, h * w, MASK in written),
        unpack=lambda arrays: unpack(arrays, spec, num_classes, n, c, h * w),
    )


def by_class(coefficients: jax.Array, num_classes: int) -> jax.Array:
    """Returns ``[k, images per class, coefficients * c]``: each class has its grids along the last axis."""
    return coefficients.reshape(num_classes, -1, coefficients.shape[1] * coefficients.shape[2])


def grids(low: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns low ends and steps ``[k, 1, coefficients * c]`` in the precision in which they are stored."""
    low, step = (x.reshape(x.shape[0], 1, -1) for x in (low, step))
    low = storage.as_bfloat16(low)
    return low, storage.as_bfloat16(jnp.maximum(step, FINEST_STEP * jnp.maximum(1, jnp.abs(low))))


def fit_ranges(params: dict[str, jax.Array], bits: int) -> dict[str, jax.Array]:
    """Lays each grid over the numbers of its coefficient and channel in the images of the class.

    What is not finite has no say.
    """
    classes, shape = params[LOW].shape[0], params[LOW].shape
    numbers = by_class(params[COEFFICIENTS], classes)
    finite = jnp.isfinite(numbers)
    low = jnp.nan_to_num(jnp.where(finite, numbers, jnp.inf).min(1), posinf=0.0)
    high = jnp.nan_to_num(jnp.where(finite, numbers, -jnp.inf).max(1), neginf=0.0)
    # bfloat16 rounds both, and the grid still covers the range.
    low = storage.as_bfloat16(low - BFLOAT16_ULP * jnp.abs(low))
    step = storage.as_bfloat16((high - low) * np.float32((1 + BFLOAT16_ULP) / (2**bits - 1)))
    return params | {LOW: low.reshape(shape), STEP: step.reshape(shape)}


def quantized(params: dict[str, jax.Array], bits: int) -> dict[str, jax.Array]:
    """Returns the parameters with the coefficients of the file; the gradient passes straight through the rounding."""
    classes = params[LOW].shape[0]
    low, step = jax.lax.stop_gradient(grids(params[LOW], params[STEP]))
    numbers = by_class(params[COEFFICIENTS], classes)
    rounded = jax.vmap(lambda x, low, step: storage.on_grid(x, low[0], step[0], bits))(numbers, low, step)
    return {COEFFICIENTS: rounded.reshape(params[COEFFICIENTS].shape), INDEX: params[INDEX]}


def pack(tree: dict[str, Any], bits: int, places: int, masked: bool) -> dict[str, np.ndarray]:
    """Writes the codes as bytes, image by image, padded with zeros to a byte at the very end; places as FreD's."""
    codes = np.packbits(packing.to_bits(np.asarray(tree[COEFFICIENTS]), bits))
    ends = {LOW: np.asarray(tree[LOW]), STEP: np.asarray(tree[STEP])}
    chosen = {INDEX: np.asarray(tree[INDEX])}
    if masked:
        chosen = {MASK: frequency.pack({COEFFICIENTS: (), INDEX: tree[INDEX]}, places)[MASK]}
    return {BITS: codes} | ends | chosen


def unpack(
    arrays: dict[str, Any], spec: PackedFrequencySpec, classes: int, n: int, channels: int, places: int
) -> dict[str, np.ndarray]:
    """Reads codes and places back; the inverse of `pack`.

    Raises:
        ValueError: The bytes are none that `pack` writes.
    """
    count = spec.coefficients
    bits, padding = np.split(np.unpackbits(np.asarray(arrays[BITS])), [n * count * channels * spec.bits])
    if padding.any():
        raise InputError(f"{BITS}: the {padding.size} bits after the last code must be 0")
    codes = packing.from_bits(bits, spec.bits).reshape(n, count, channels)
    chosen = {name: arrays[name] for name in (MASK, INDEX) if name in arrays}
    index = frequency.unpack({COEFFICIENTS: ()} | chosen, classes, count, places)[INDEX]
    return {COEFFICIENTS: codes, INDEX: index, LOW: arrays[LOW], STEP: arrays[STEP]}
