"""What the numbers of an image array mean: uint8 from 0 to 255, or floating point in [0,1]; nothing else is an image.

Every function that takes images asks here, so that the two forms of the same images give the same result everywhere.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax.errors import InputError

# Real images may leave [0,1] by so much: filters that resize overshoot. Images in [-0.5, 0.5] or [-1, 1] do not pass.
SLACK = 0.1


def white(images: Any) -> int:
    """Returns the value of white: 255 for uint8, 1 for floating point."""
    return 255 if images.dtype == jnp.uint8 else 1


def as_float(images: Any, name: str = "images") -> jax.Array:
    """Maps images to float32 in [0,1]; works under jit, where values are not looked at.

    Args:
        images: Any shape, uint8 or floating point.
        name: Of the argument, for the message.

    Raises:
        TypeError: Another dtype.
    """
    images = images if isinstance(images, jax.Array) else np.asarray(images)
    _check_dtype(images, name)
    x = jnp.asarray(images, jnp.float32)
    return x / 255 if images.dtype == jnp.uint8 else x


def check(images: Any, name: str = "images", *, real: bool = True, single: bool = False) -> Any:
    """Returns images as they are held: uint8 as given, floating point as float32.

    Args:
        images: ``[n, h, w, c]``, or videos ``[n, t, h, w, c]``; n >= 1; of NumPy or JAX.
        name: Of the argument, for the message.
        real: They are photographs or the like, in [0,1] up to `SLACK`. Otherwise they may be decoded ones, which leave
            [0,1], or normalized ones: then only whole numbers are refused, the values of uint8 in floating point.
        single: One image ``[h, w, c]``, or video.

    Raises:
        TypeError: Neither uint8 nor floating point.
        ValueError: Another shape, or values out of range or not finite. Values of traced arrays are not looked at.
    """
    images = images if isinstance(images, jax.Array) else np.asarray(images)
    _check_dtype(images, name)
    if images.ndim + single not in (4, 5) or 0 in images.shape:
        raise InputError(_message(images, name))
    if images.dtype == jnp.uint8:
        return images
    traced = isinstance(images, jax.core.Tracer)
    if not traced and not (isinstance(images, jax.Array) and not images.is_fully_addressable):
        _check_values(np.asarray(images), name, real)
    return images.astype(np.float32) if images.dtype != np.float32 else images


def _check_dtype(images: Any, name: str) -> None:
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(_message(images, name))


def _check_values(values: np.ndarray, name: str, real: bool) -> None:
    low, high = float(values.min()), float(values.max())
    # Written so that NaN is refused.
    outside = real and not (low >= -SLACK and high <= 1 + SLACK)
    if outside or (low >= 0 and high > 1 and bool((values == np.round(values)).all())):
        raise InputError(_message(values, name, f" from {low:g} to {high:g}"))


def _message(images: Any, name: str, values: str = "") -> str:
    return (
        f"{name}: found {images.dtype}{values} of shape {list(images.shape)}; expected [n, h, w, c], or "
        "[n, t, h, w, c] of videos, none of them 0, in uint8 (0 to 255) or floating point (0 to 1)"
    )
