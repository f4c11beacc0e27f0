"""Differentiable Siamese augmentation (DSA, Zhao & Bilen 2021): six operations on batches of images.

Constants and integer conventions are those of the authors' code. One operation is drawn per call. Its parameters
are drawn per image, which is the rule for training networks, or once for the batch ("Siamese"), which is the rule for
matching real and synthetic images of one class.

All frames of a video are changed alike. Images may be in any space (whitened ones, usually); what leaves the frame is
filled with 0. All operations are differentiable in the images; in the parameters that are drawn, they are not meant to
be. No backward pass of crop, scale or rotate scatters: a GPU adds scattered values in any order, and runs could not be
repeated to the bit.

CutMix, which mixes images and labels of a batch, is for training networks only; matching does not know it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le, Lt
from jax import lax
from typing_extensions import Doc

from gsdd_jax.errors import InputError

FULL_STRATEGY = "color_crop_cutout_flip_scale_rotate"


@dataclass(frozen=True, kw_only=True)
class DsaSpec:
    """Which operations are drawn from, and how strong they are."""

    strategy: Annotated[
        str, Doc("Operations joined by '_', each equally likely, or 'none'; DSA leaves out flip for digits.")
    ] = FULL_STRATEGY
    align_corners: Annotated[
        bool, Doc("Where rotation puts -1 and 1: pixel centers (MTT, GLaD) or edges (DC, DM); equal on square images.")
    ] = True
    brightness: Annotated[float, Ge(0), Doc("Shift is uniform in +- half of it (DSA: 1).")] = 1.0
    saturation: Annotated[float, Ge(0), Doc("Factor is uniform in [0, it] (DSA: 2).")] = 2.0
    contrast: Annotated[float, Ge(0), Doc("Factor is uniform in [it, it + 1] (DSA: 0.5).")] = 0.5
    crop_pad: Annotated[float, Ge(0), Le(1), Doc("Largest shift, as a fraction of the side (DSA: 0.125).")] = 0.125
    cutout: Annotated[float, Ge(0), Le(1), Doc("Side of the erased square, as a fraction of it (DSA: 0.5).")] = 0.5
    flip: Annotated[float, Ge(0), Le(1), Doc("Probability that a drawn flip really flips (DSA: 0.5).")] = 0.5
    scale: Annotated[float, Ge(1), Doc("Grid scale is uniform in [1/it, it], per axis (DSA: 1.2).")] = 1.2
    rotate: Annotated[float, Ge(0), Lt(180), Doc("Angle is uniform in +- it, degrees (DSA: 15).")] = 15.0

    def __post_init__(self) -> None:
        """Rejects unknown and repeated operations."""
        names = self.operations
        if set(names) - set(_OPERATIONS) or len(set(names)) != len(names):
            raise InputError(
                f"strategy: {self.strategy!r}, must be 'none' or some of {list(_OPERATIONS)}, each once, joined by '_'"
            )

    @property
    def operations(self) -> tuple[str, ...]:
        """Names of the operations, in order; empty for "none"."""
        return () if self.strategy == "none" else tuple(self.strategy.split("_"))


def dsa(key: jax.Array, images: jax.Array, spec: DsaSpec, *, siamese: bool = False) -> jax.Array:
    """Augments a batch by one operation, drawn uniformly from the strategy.

    Source: DSA, Zhao & Bilen 2021, and the authors' code (mode "S"). Works under `jit`, `grad` (with respect to
    `images`) and `vmap`. Only the drawn operation is computed, except under a `vmap` over keys, which computes all.

    Args:
        key: consumed. It alone decides the operation, and in Siamese mode the parameters too, whatever n is.
        images: float [n, h, w, c], or [n, t, h, w, c], in any range.
        spec: operations and strengths.
        siamese: one parameter value for the whole batch, in place of one per image.

    Returns:
        float, of the same shape.

    Raises:
        ValueError: images that are neither rank 4 nor 5.
        TypeError: images that are not floating point.
    """
    _check_images(images)
    if not spec.operations:
        return images
    key_operation, key_parameters = jax.random.split(key)
    shape = () if siamese else images.shape[:1]
    branches = [partial(_alike(_OPERATIONS[name], images.shape), spec=spec, shape=shape) for name in spec.operations]
    operation = jax.random.randint(key_operation, (), 0, len(branches), jnp.int32)
    return lax.switch(operation, branches, key_parameters, images)


def cutmix(key: jax.Array, images: jax.Array, labels: jax.Array, probability: float) -> tuple[jax.Array, jax.Array]:
    """Replaces one box of all images of a batch by that of other images of the batch, and as much of their labels.

    Source: CutMix, Yun et al. 2019, with beta = 1, and the authors' code: the area of the box is uniform before it is
    clipped at the frame, its sides are even, and labels are mixed by the area that is left. Works under `jit` and
    `vmap`.

    Args:
        key: consumed.
        images: float [n, h, w, c], or [n, t, h, w, c]: the same box of all frames.
        labels: float [n, k].
        probability: of mixing at all; else the batch stays as it is.

    Returns:
        Images and labels of the same shapes; the sum of a row of labels stays 1.
    """
    n, *_, height, width, _ = images.shape
    key_mixed, key_side, key_y, key_x, key_order = jax.random.split(key, 5)
    side = jnp.sqrt(jax.random.uniform(key_side, dtype=jnp.float32)) * jax.random.bernoulli(key_mixed, probability)

    def inside(key: jax.Array, length: int) -> jax.Array:
        half = (length * side).astype(jnp.int32) // 2
        distance = jnp.arange(length) - jax.random.randint(key, (), 0, length, jnp.int32)
        return (-half <= distance) & (distance < half)

    box = inside(key_y, height)[:, None] & inside(key_x, width)
    order = jax.random.permutation(key_order, n)
    share = box.mean(dtype=labels.dtype)
    return jnp.where(box[:, :, None], images[order], images), (1 - share) * labels + share * labels[order]


def color(images: jax.Array, brightness: jax.Array, saturation: jax.Array, contrast: jax.Array) -> jax.Array:
    """Shifts brightness, then scales saturation about the pixel's gray, then contrast about the image's mean.

    Args:
        images: float [n, h, w, c].
        brightness: added to all values; [n] or a scalar, as are the next two.
        saturation: factor of the difference from the mean over channels.
        contrast: factor of the difference from the mean over h, w, c.

    Returns:
        float [n, h, w, c], not clipped.
    """
    x = images + _per_image(brightness)
    gray = x.mean(3, keepdims=True)
    x = gray + (x - gray) * _per_image(saturation)
    mean = x.mean((1, 2, 3), keepdims=True)
    return mean + (x - mean) * _per_image(contrast)


def crop(images: jax.Array, shift: jax.Array, *, max_shift: tuple[int, int]) -> jax.Array:
    """Moves the frame: pixel (y, x) of the result is pixel (y + shift_y, x + shift_x), 0 outside.

    Args:
        images: float [n, h, w, c].
        shift: int32 [n, 2] or [2], (y, x), each within +- max_shift.
        max_shift: bounds of the shift, pixels.

    Returns:
        float [n, h, w, c].
    """
    shift = jnp.asarray(shift, jnp.int32)
    return jax.vmap(partial(_crop_one, max_shift), in_axes=(0, 0 if shift.ndim == 2 else None))(images, shift)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _crop_one(max_shift: tuple[int, int], image: jax.Array, shift: jax.Array) -> jax.Array:
    sy, sx = max_shift
    padded = jnp.pad(image, ((sy, sy), (sx, sx), (0, 0)))
    return lax.dynamic_slice(padded, (shift[0] + sy, shift[1] + sx, jnp.int32(0)), image.shape)


def _crop_one_bwd(max_shift: tuple[int, int], shift: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    # The transpose of a shift is the opposite shift; JAX's own would be a scatter.
    return _crop_one(max_shift, g, -shift), None


_crop_one.defvjp(lambda max_shift, image, shift: (_crop_one(max_shift, image, shift), shift), _crop_one_bwd)


def cutout(images: jax.Array, center: jax.Array, *, size: tuple[int, int]) -> jax.Array:
    """Erases (sets to 0) a rectangle; what of it lies outside of the image is lost, as in the authors' code.

    Args:
        images: float [n, h, w, c].
        center: int32 [n, 2] or [2], (y, x); the rectangle starts at `center - size // 2`.
        size: its (height, width), pixels.

    Returns:
        float [n, h, w, c].
    """
    start = jnp.asarray(center)[..., None] - np.array(size)[:, None] // 2  # [n, 2, 1] or [2, 1]
    inside = []
    for axis, length in enumerate(images.shape[1:3]):
        offset = jnp.arange(length) - start[..., axis, :]
        inside.append((offset >= 0) & (offset < size[axis]))
    erased = inside[0][..., :, None, None] & inside[1][..., None, :, None]
    return jnp.where(erased, 0, images)


def flip(images: jax.Array, mirrored: jax.Array) -> jax.Array:
    """Mirrors left and right.

    Args:
        images: float [n, h, w, c].
        mirrored: bool [n] or a scalar.

    Returns:
        float [n, h, w, c].
    """
    return jnp.where(_per_image(mirrored), images[:, :, ::-1], images)


def scale(images: jax.Array, factor: jax.Array) -> jax.Array:
    """Scales the sampling grid about the image's center, bilinear, 0 outside: a factor under 1 zooms in.

    `align_corners` has no say here: with either value, pixel i reads at `center + factor * (i - center)`.

    Args:
        images: float [n, h, w, c].
        factor: positive, [n, 2] or [2], (y, x).

    Returns:
        float [n, h, w, c].
    """
    weights = []
    for axis, length in enumerate(images.shape[1:3]):
        center = (length - 1) / 2
        pixel = jnp.arange(length, dtype=images.dtype)
        position = center + jnp.asarray(factor)[..., axis, None] * (pixel - center)
        weights.append(jnp.maximum(0, 1 - jnp.abs(position[..., :, None] - pixel)))
    return _separable(images, weights[0], weights[1])


def rotate(images: jax.Array, theta: jax.Array, *, align_corners: bool = True) -> jax.Array:
    """Rotates about the image's center, bilinear, 0 outside.

    The rotation acts on coordinates that span -1 to 1 on both axes, as in the authors' code, so that images which are
    not square are sheared too. On square images `align_corners` changes nothing: its unit cancels.

    Args:
        images: float [n, h, w, c].
        theta: radians, [n] or a scalar. Not differentiable: its cotangent is zero.
        align_corners: -1 and 1 are the centers of the outermost pixels, rather than their outer edges.

    Returns:
        float [n, h, w, c].
    """
    h, w = images.shape[1:3]
    less = 1 if align_corners else 0
    aspect = max(w - less, 1) / max(h - less, 1)
    theta = jnp.asarray(theta, images.dtype)
    return jax.vmap(partial(_rotate_one, aspect), in_axes=(0, 0 if theta.ndim else None))(images, theta)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotate_one(aspect: float, image: jax.Array, theta: jax.Array) -> jax.Array:
    h, w, _ = image.shape
    turn = partial(_turn, theta, aspect, (h, w))
    source_y, source_x = turn(*_grid(h, w))
    low_y, low_x = jnp.floor(source_y), jnp.floor(source_x)
    out = jnp.zeros_like(image)
    for dy in (0, 1):
        for dx in (0, 1):
            at_y, at_x = low_y + dy, low_x + dx
            out += _read(image, at_y, at_x) * _tent(source_y - at_y, source_x - at_x)
    return out


def _rotate_one_bwd(aspect: float, theta: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Pixel j receives from every result pixel i that read it: |turn(i) - j| < 1 on both axes. Those lie around the
    # inverse image of j, at most hypot(1, aspect) away per axis, so a fixed window of them (4x4 if square) is enough.
    h, w, _ = g.shape
    turn = partial(_turn, theta, aspect, (h, w))
    y, x = _grid(h, w)
    center_y, center_x = _turn(-theta, aspect, (h, w), y, x)
    low_y, low_x = jnp.floor(center_y), jnp.floor(center_x)
    reach = math.ceil(math.hypot(1, max(aspect, 1 / aspect)))
    total = jnp.zeros_like(g)
    for dy in range(1 - reach, reach + 1):
        for dx in range(1 - reach, reach + 1):
            at_y, at_x = low_y + dy, low_x + dx
            source_y, source_x = turn(at_y, at_x)
            total += _read(g, at_y, at_x) * _tent(source_y - y, source_x - x)
    return total, jnp.zeros_like(theta)


_rotate_one.defvjp(lambda aspect, image, theta: (_rotate_one(aspect, image, theta), theta), _rotate_one_bwd)


def _grid(h: int, w: int) -> tuple[jax.Array, jax.Array]:
    return jnp.arange(h, dtype=jnp.float32)[:, None], jnp.arange(w, dtype=jnp.float32)


def _turn(
    theta: jax.Array, aspect: float, size: tuple[int, int], y: jax.Array, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    middle_y, middle_x = (size[0] - 1) / 2, (size[1] - 1) / 2
    y, x = y - middle_y, x - middle_x
    cos, sin = jnp.cos(theta), jnp.sin(theta)
    return (sin / aspect) * x + cos * y + middle_y, cos * x - (sin * aspect) * y + middle_x


def _read(image: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    h, w, c = image.shape
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    index = jnp.where(inside, y * w + x, 0).astype(jnp.int32)
    return jnp.where(inside[..., None], jnp.take(image.reshape(h * w, c), index, axis=0, mode="clip"), 0)


def _tent(dy: jax.Array, dx: jax.Array) -> jax.Array:
    return (jnp.maximum(0, 1 - jnp.abs(dy)) * jnp.maximum(0, 1 - jnp.abs(dx)))[..., None]


def _separable(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    # Full precision: TF32 would round every pixel to 10 bits.
    precision = lax.Precision.HIGHEST
    b = "n" if rows.ndim == 3 else ""
    x = jnp.einsum(f"{b}ih,nhwc->niwc", rows, images, precision=precision)
    return jnp.einsum(f"{b}jw,niwc->nijc", columns, x, precision=precision)


def _per_image(value: jax.Array) -> jax.Array:
    return jnp.reshape(value, (-1, 1, 1, 1))


def _check_images(images: jax.Array) -> None:
    if images.ndim not in (4, 5):
        raise InputError(f"images: shape {images.shape}, must be [n, h, w, c], or [n, t, h, w, c] of videos")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"images: {images.dtype}, must be floating point; divide uint8 by 255 first")


def _alike(draw: Callable[..., jax.Array], shape: tuple[int, ...]) -> Callable[..., jax.Array]:
    """Lets an operation on images work on videos, if that is their shape: on the frames of each as on one image."""
    if len(shape) == 4:
        return draw
    n, t, h, w, c = shape

    def on_frames(key: jax.Array, videos: jax.Array, **settings: Any) -> jax.Array:
        if draw is _draw_color:
            return draw(key, videos.reshape(n, t * h, w, c), **settings).reshape(shape)
        side_by_side = jnp.moveaxis(videos, 1, 3).reshape(n, h, w, t * c)
        return jnp.moveaxis(draw(key, side_by_side, **settings).reshape(n, h, w, t, c), 3, 1)

    return on_frames


def _fraction(images: jax.Array, ratio: float) -> tuple[int, int]:
    # The authors round halves up.
    return int(images.shape[1] * ratio + 0.5), int(images.shape[2] * ratio + 0.5)


def _draw_color(key: jax.Array, images: jax.Array, *, spec: DsaSpec, shape: tuple[int, ...]) -> jax.Array:
    u = jax.random.uniform(key, (3, *shape), images.dtype)
    return color(images, (u[0] - 0.5) * spec.brightness, u[1] * spec.saturation, u[2] + spec.contrast)


def _draw_crop(key: jax.Array, images: jax.Array, *, spec: DsaSpec, shape: tuple[int, ...]) -> jax.Array:
    bound = np.array(_fraction(images, spec.crop_pad), np.int32)
    shift = jax.random.randint(key, (*shape, 2), -bound, bound + 1, jnp.int32)
    return crop(images, shift, max_shift=(int(bound[0]), int(bound[1])))


def _draw_cutout(key: jax.Array, images: jax.Array, *, spec: DsaSpec, shape: tuple[int, ...]) -> jax.Array:
    size = _fraction(images, spec.cutout)
    # A rectangle of even size has one more center than there are pixels.
    bound = np.array([length + 1 - side % 2 for length, side in zip(images.shape[1:3], size, strict=True)], np.int32)
    return cutout(images, jax.random.randint(key, (*shape, 2), 0, bound, jnp.int32), size=size)


def _draw_flip(key: jax.Array, images: jax.Array, *, spec: DsaSpec, shape: tuple[int, ...]) -> jax.Array:
    return flip(images, jax.random.uniform(key, shape, jnp.float32) < spec.flip)


def _draw_scale(key: jax.Array, images: jax.Array, *, spec: DsaSpec, shape: tuple[int, ...]) -> jax.Array:
    factor = jax.random.uniform(key, (*shape, 2), images.dtype, 1 / spec.scale, spec.scale)
    return scale(images, factor)


def _draw_rotate(key: jax.Array, images: jax.Array, *, spec: DsaSpec, shape: tuple[int, ...]) -> jax.Array:
    bound = math.radians(spec.rotate)
    theta = jax.random.uniform(key, shape, images.dtype, -bound, bound)
    return rotate(images, theta, align_corners=spec.align_corners)


_OPERATIONS = {
    "color": _draw_color,
    "crop": _draw_crop,
    "cutout": _draw_cutout,
    "flip": _draw_flip,
    "scale": _draw_scale,
    "rotate": _draw_rotate,
}
