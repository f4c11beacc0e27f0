"""A few DCT coefficients per image, the same places for all images of a class: FreD."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Gt
from typing_extensions import Doc

from gsdd_jax import storage
from gsdd_jax.codecs.base import CENTER, MOST, SPREAD, Codec, Layout, Shape, Spec, arrays, descent
from gsdd_jax.errors import InputError
from gsdd_jax.later import optax

# Arrays of the file.
COEFFICIENTS, INDEX, MASK = "coefficients", "index", "mask"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequencySpec(Spec):
    """Settings of the frequency codec."""

    name: Annotated[Literal["frequency"], Doc("the parameterization")] = "frequency"
    coefficients: Annotated[
        int,
        Ge(1),
        Doc("DCT coefficients of each channel of an image (FreD: 64 at 32 px, 2048 at 128 px, 1 image/class)"),
    ] = 64
    images_per_class: Annotated[int, Ge(0), Doc("images per class; 0 = as many as the budget holds")] = 0
    mask: Annotated[
        Literal["energy", "variance"],
        Doc(
            "a class has the coefficients of the largest mean square of its images, or, as FreD, of the largest "
            "variance over them"
        ),
    ] = "energy"
    dtype: Annotated[
        Literal["float32", "bfloat16"], Doc("precision of coefficients on disk; the field counts float32")
    ] = "float32"
    optimizer: Annotated[Literal["sgd", "adam"], Doc("sgd has the momentum 0.5 of the reference")] = "adam"
    lr: Annotated[
        float,
        Gt(0),
        Doc(
            "learning rate in distillation. FreD's of sgd, in the orthonormal basis at 32 px: 244 for distribution "
            "matching, 0.24 for gradient matching, 2.4e4 for trajectories"
        ),
    ] = 0.1

    def sizes(self, image_shape: Shape) -> dict[str, Sequence[int]]:
        h, w, _ = image_shape
        return {"images_per_class": range(1, MOST), "coefficients": range(1, h * w + 1)}

    def layout(self, image_shape: Shape, num_classes: int) -> Layout:
        shape = (num_classes * self.images_per_class, self.coefficients, image_shape[-1])
        places = places_layout(self.coefficients, image_shape[:2], num_classes)
        return arrays(self.dtype, {COEFFICIENTS: shape}) | places


def make(spec: FrequencySpec, image_shape: tuple[int, int, int], num_classes: int) -> Codec:
    """Builds the codec; see `gsdd_jax.codecs.make`.

    An image is ``CENTER + SPREAD`` times the inverse DCT of its coefficients. Which coefficients a class has, for all
    its images and channels alike, is settled by the start. Parameters: ``coefficients [n, coefficients, c]``, and
    ``index [k, coefficients]``, the places of a class's coefficients in ``h * w``: whole numbers in float32. Since
    decode reads them as integers, they have no gradient, and neither SGD nor Adam moves them.

    Deviations: the basis is orthonormal, and images are normalized by one mean and spread, not by those of a dataset.
    Places are chosen over the images that are fitted, not over all real ones of a
    class, and unless ``mask`` says otherwise by their mean square: the variance of a few images leaves out what they
    have in common. The file holds the places, which the authors do not count, as bits or as numbers, whichever is
    smaller.
    """
    h, w, c = image_shape
    per_class, n = spec.images_per_class, num_classes * spec.images_per_class
    written = spec.layout(image_shape, num_classes)

    def init(key, images):
        spectra = forward((jnp.asarray(images, jnp.float32) - CENTER) / SPREAD).reshape(n, h * w, c)
        of_classes = spectra.reshape(num_classes, per_class, h * w, c)
        index = largest(of_classes, (h, w), spec.coefficients, spec.mask)
        places = jnp.repeat(index, per_class, axis=0)
        return {
            COEFFICIENTS: jnp.take_along_axis(spectra, places[..., None], axis=1),
            INDEX: index.astype(jnp.float32),
        }

    def decode(params, index=None, *, size=None, key=None):
        del key
        index = jnp.arange(n) if index is None else jnp.asarray(index)
        coefficients = storage.quantize(params[COEFFICIENTS], spec.dtype)[index]
        places = params[INDEX].astype(jnp.int32)[index // per_class]
        spectra = (
            jnp.zeros((len(index), h * w, c), jnp.float32).at[jnp.arange(len(index))[:, None], places].set(coefficients)
        )
        return CENTER + SPREAD * inverse(spectra.reshape(-1, h, w, c), size or (h, w))

    def quantize(params):
        index = params[INDEX].astype(_index_dtype(h * w))
        return {COEFFICIENTS: storage.cast(params[COEFFICIENTS], spec.dtype), INDEX: index}

    return Codec(
        name="frequency",
        spec=spec,
        image_shape=image_shape,
        num_classes=num_classes,
        images_per_class=per_class,
        init=init,
        decode=decode,
        quantize=quantize,
        dequantize=lambda tree: {name: jnp.asarray(leaf, jnp.float32) for name, leaf in tree.items()},
        nbytes=lambda params: storage.nbytes(written),
        optimizer=lambda: descent(spec),
        # The start is the projection onto the coefficients: no other values are nearer to the images.
        fitter=lambda steps: optax.set_to_zero(),
        fitted_by_init=True,
        layout=lambda: written,
        pack=lambda tree: pack(tree, h * w) if MASK in written else tree,
        unpack=lambda arrays: unpack(arrays, num_classes, spec.coefficients, h * w),
    )


def cosines(frequencies: int, positions: int) -> np.ndarray:
    """Returns the orthonormal DCT-II basis ``[frequencies, positions]``, drawn at so many positions of the same span.

    With as many positions as frequencies its rows are orthonormal. With fewer, what they cannot show is left out.
    """
    k, x = np.arange(frequencies)[:, None], (np.arange(positions) + 0.5) / positions
    scale = np.where(k == 0, 1.0, 2.0) / frequencies
    return np.where(k < positions, np.sqrt(scale) * np.cos(np.pi * k * x), 0.0).astype(np.float32)


def forward(images: jax.Array) -> jax.Array:
    """Returns the DCT of ``[n, h, w, c]`` along both axes of the image."""
    h, w = images.shape[1:3]
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("yh,nhwc,xw->nyxc", cosines(h, h), images, cosines(w, w), precision=highest)


def inverse(spectra: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Returns the images ``[n, *size, c]`` of spectra ``[n, h, w, c]``; `forward` undone at the native size."""
    h, w = spectra.shape[1:3]
    rows, columns = cosines(h, size[0]), cosines(w, size[1])
    return jnp.einsum("yh,nyxc,xw->nhwc", rows, spectra, columns, precision=jax.lax.Precision.HIGHEST)


def largest(spectra: jax.Array, size: tuple[int, int], count: int, mask: str) -> jax.Array:
    """Chooses the places of each class's coefficients; among equals, the lower frequency.

    By the mean square over images and channels, which leaves the smallest error on the images; or by the variance over
    images of the mean over channels, of which a class of one image has none. Ten classes of digits, three images each
    of 16 coefficients: networks trained on the fitted images reach 91 % by the square and 42 % by the variance. Five
    CIFAR-10 images per class, 33 to 141 coefficients: 0.2 dB nearer by the square.

    Args:
        spectra: ``[k, images per class, h * w, c]``.
        size: (h, w).
        count: Places to choose.
        mask: ``energy`` or ``variance``.

    Returns:
        ``[k, count]`` int32 places in ``h * w``, sorted.
    """
    score = jnp.mean(spectra**2, axis=(1, 3)) if mask == "energy" else jnp.var(spectra.mean(-1), axis=1)
    y, x = (np.arange(length) / length for length in size)
    frequency = np.hypot(y[:, None], x).reshape(-1).astype(np.float32)
    order = jnp.lexsort((jnp.broadcast_to(frequency, score.shape), -score))
    return jnp.sort(order[:, :count], axis=-1)


def pack(tree: dict[str, Any], places: int) -> dict[str, np.ndarray]:
    """Writes the index of each class as one bit per place; the classes one after the other, zeros at the very end."""
    index = np.asarray(tree[INDEX]).astype(np.int64)
    chosen = np.zeros((len(index), places), np.uint8)
    np.put_along_axis(chosen, index, 1, axis=1)
    return {COEFFICIENTS: np.asarray(tree[COEFFICIENTS]), MASK: np.packbits(chosen)}


def unpack(arrays: dict[str, Any], classes: int, count: int, places: int) -> dict[str, np.ndarray]:
    """Reads the index back, from bits or as it is; the inverse of `pack`.

    Raises:
        ValueError: There are not ``count`` places of each class, or one is beyond the image.
    """
    if MASK in arrays:
        bits, padding = np.split(np.unpackbits(np.asarray(arrays[MASK])), [classes * places])
        chosen = bits.reshape(classes, places)
        if padding.any() or (chosen.sum(1) != count).any():
            raise InputError(f"{MASK}: expected {count} bits of each of {classes} classes and zeros after them")
        index = np.nonzero(chosen)[1].reshape(classes, count)
    else:
        index = np.asarray(arrays[INDEX]).astype(np.int64)
        if (np.diff(index) <= 0).any() or index.max() >= places:
            raise InputError(f"{INDEX}: expected {count} places below {places} for each class, in rising order")
    return {COEFFICIENTS: np.asarray(arrays[COEFFICIENTS]), INDEX: index.astype(_index_dtype(places))}


def _index_dtype(places: int) -> np.dtype:
    return np.min_scalar_type(places - 1)


def places_layout(count: int, size: tuple[int, ...], num_classes: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape of the array that says which ``count`` places each class has: bits or numbers."""
    h, w = size
    index = jax.ShapeDtypeStruct((num_classes, count), _index_dtype(h * w))
    mask = jax.ShapeDtypeStruct((-(-num_classes * h * w // 8),), np.uint8)
    return {MASK: mask} if storage.nbytes(mask) < storage.nbytes(index) else {INDEX: index}
