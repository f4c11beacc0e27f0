"""The interface of all parameterizations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gsdd_jax import storage
from gsdd_jax.gaussians import Gaussians

# Codecs whose references parameterize normalized images draw CENTER + SPREAD * output instead: the mean and the spread
# of natural images, so that published learning rates carry over and no statistics of a dataset are needed.
CENTER, SPREAD = 0.5, 0.25


def _unchanged(arrays: Any) -> Any:
    return arrays


def _no_term(params: Any) -> jax.Array:
    return jnp.zeros((), jnp.float32)


def _no_gaussians(params: Any) -> Gaussians | None:
    return None


class Draft(NamedTuple):
    """What a codec does while fitting, as long as what it stores would only get in the way.

    Attributes:
        decode: ``(params, done) -> images``, where ``done`` is the share of the fit's steps that were taken; in the end
            equal to the codec's ``decode``.
        project: ``(params, done) -> params``, likewise.
    """

    decode: Callable[[Any, jax.Array], jax.Array]
    project: Callable[[Any, jax.Array], Any]


class Codec(NamedTuple):
    """A parameterization of images as pure functions.

    There are ``n = num_classes * images_per_class`` images; image ``i`` has label ``i // images_per_class``.

    Attributes:
        name: Key of the registry.
        spec: The settings that it was made from, with every default resolved.
        image_shape: Native (h, w, c).
        num_classes: ``k``.
        images_per_class: Images that ``decode`` gives per class.
        init: ``(key, images [n,h,w,c]) -> params``: a starting point for fitting these images, which are float32 in
            [0,1] where they arrive; float32 masters.
        decode: ``(params, index=None, *, size=None, key=None) -> [len(index), h, w, c]``: images around [0,1]; all of
            them without ``index``; at another (height, width) where the parameterization knows how. ``key`` is for
            codecs that decode at random.
        quantize: ``params -> dict`` of arrays that hold exactly the information that is written to disk; jittable.
        dequantize: The inverse of ``quantize`` up to the stored precision: ``decode(dequantize(quantize(p)))`` has the
            bits of ``decode(p)``.
        nbytes: ``params -> int``: bytes of the arrays as they are written.
        optimizer: ``() -> optax`` transformation for distillation.
        fitter: ``(steps) -> optax`` transformation for fitting images in that many steps.
        layout: ``() -> dict`` of the shapes and dtypes of the arrays as they are written.
        regularize: ``params -> scalar``, already weighted, added to every objective.
        project: ``params -> params``, applied after each step.
        pack: ``dict -> dict``: the arrays of ``quantize`` as they are written; on the host.
        unpack: The inverse of ``pack``; raises ValueError where the arrays are none that ``pack`` writes.
        gaussians: ``params -> Gaussians`` that ``decode`` draws, or None where it draws no Gaussians.
        fitted_by_init: No parameters come nearer to the images than those of ``init``: fitting takes no step.
        draws: With a key, ``decode`` draws a sample.
        draft: How fitting begins where it does not draw with ``decode`` from its first step.
    """

    name: str
    spec: Any
    image_shape: tuple[int, int, int]
    num_classes: int
    images_per_class: int
    init: Callable[..., Any]
    decode: Callable[..., Any]
    quantize: Callable[[Any], Any]
    dequantize: Callable[[Any], Any]
    nbytes: Callable[[Any], int]
    optimizer: Callable[[], optax.GradientTransformation]
    fitter: Callable[[int], optax.GradientTransformation]
    layout: Callable[[], dict[str, jax.ShapeDtypeStruct]]
    regularize: Callable[[Any], Any] = _no_term
    project: Callable[[Any], Any] = _unchanged
    pack: Callable[[Any], Any] = _unchanged
    unpack: Callable[[Any], Any] = _unchanged
    gaussians: Callable[[Any], Gaussians | None] = _no_gaussians
    fitted_by_init: bool = False
    draws: bool = False
    draft: Draft | None = None

    @property
    def num_images(self) -> int:
        """``n``."""
        return self.num_classes * self.images_per_class


def unpacked_layout(
    init: Callable[..., Any], stored: Callable[[Any], Any], image_shape: tuple[int, int, int], n: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the layout of a codec whose arrays are written as ``stored`` gives them."""
    images = jax.ShapeDtypeStruct((n, *image_shape), jnp.float32)
    return jax.eval_shape(lambda images: stored(init(jax.random.key(0), images)), images)


def resized(images: jax.Array, size: tuple[int, int] | None) -> jax.Array:
    """Enlarges or shrinks decoded images ``[n, h, w, c]`` bilinearly, where a codec knows no better way."""
    if size is None or tuple(size) == images.shape[1:3]:
        return images
    return jax.image.resize(images, (images.shape[0], *size, images.shape[-1]), "bilinear")


def cast_storage(init: Callable[..., Any], dtype: str, image_shape: tuple[int, int, int], n: int) -> dict[str, Any]:
    """Returns ``stored``, ``loaded``, ``nbytes`` and ``layout`` of a codec whose ``n`` images are a dict of arrays.

    All of them are written in one precision, ``dtype``, as they are.
    """

    def quantize(params: Any) -> Any:
        return storage.cast(params, dtype)

    return {
        "quantize": quantize,
        "dequantize": storage.widen,
        "nbytes": lambda params: storage.nbytes(jax.eval_shape(quantize, params)),
        "layout": lambda: unpacked_layout(init, quantize, image_shape, n),
    }
