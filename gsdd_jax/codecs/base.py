"""The interface of all parameterizations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from gsdd_jax import storage
from gsdd_jax.errors import InputError
from gsdd_jax.gaussians import Gaussians
from gsdd_jax.later import optax

# Codecs whose references parameterize normalized images draw CENTER + SPREAD * output instead: the mean and the spread
# of natural images, so that published learning rates carry over and no statistics of a dataset are needed.
CENTER, SPREAD = 0.5, 0.25
# More images per class, or Gaussians per image, than any set has.
MOST = 1 << 40

# (h, w, c), or (t, h, w, c) of videos.
Shape = tuple[int, ...]
Layout = dict[str, jax.ShapeDtypeStruct]


class Spec:
    """What the settings of a codec know before it is built; the base of every spec.

    A spec is a frozen dataclass. Beside it, in the same file, is ``make(spec, image_shape, num_classes) -> Codec``,
    which builds the codec of a spec with every default resolved.

    Attributes:
        name: Key of the registry.
        images_per_class: Images per class; 0 = as many as the budget holds.
        NOISE: Values of the setting ``start`` that look at no image.
        VIDEO: Videos are more than their frames to it: shapes may be (t, h, w, c).
        TRAINING: How the settings begin on which the meaning of parameters does not depend.
        FORMER: Settings with another name before, and that name: it is part of the sums of sets.
    """

    name: Any
    images_per_class: int
    NOISE: ClassVar[tuple[str, ...]] = ()
    VIDEO: ClassVar[bool] = False
    TRAINING: ClassVar[tuple[str, ...]] = ("lr", "start")
    FORMER: ClassVar[dict[str, str]] = {"optimizer": "optimiser"}

    def resolved(self, image_shape: Shape) -> Any:
        """Returns the spec with the defaults that follow from the images' shape.

        Raises:
            ValueError: Settings contradict each other or the shape.
        """
        return self

    def sizes(self, image_shape: Shape) -> dict[str, Sequence[int]]:
        """Returns the settings that a refusal may ask to be smaller, and their possible values, rising.

        More of any of them is more bytes. One of them may be 0, and is then as large as the budget allows.
        """
        return {"images_per_class": range(1, MOST)}

    def layout(self, image_shape: Shape, num_classes: int) -> Layout:
        """Returns the shapes and dtypes of all arrays as they are written; of a resolved spec."""
        raise NotImplementedError

    def numbers(self, image_shape: Shape, num_classes: int) -> tuple[int, str]:
        """Returns how many numbers a set holds, and their precision; of a resolved spec.

        Neither indices nor masks count where the setting ``dtype`` says in what precision the numbers are.
        """
        arrays = list(self.layout(image_shape, num_classes).values())
        counted = [leaf for leaf in arrays if str(leaf.dtype) == getattr(self, "dtype", None)] or arrays
        return sum(leaf.size for leaf in counted), ", ".join(dict.fromkeys(str(leaf.dtype) for leaf in counted))


def _unchanged(arrays: Any) -> Any:
    return arrays


def descent(spec: Any, momentum: float = 0.5) -> optax.GradientTransformation:
    """Returns what a spec's settings ``optimizer`` and ``lr`` ask for: Adam, or ``sgd`` with momentum."""
    return optax.sgd(spec.lr, momentum=momentum) if spec.optimizer == "sgd" else optax.adam(spec.lr)


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
        grow: ``(params, images, done, before) -> params`` ahead of a step, where ``before`` is ``done`` of the step
            before: adds to what is drawn.
    """

    decode: Callable[[Any, jax.Array], jax.Array]
    project: Callable[[Any, jax.Array], Any]
    grow: Callable[[Any, jax.Array, jax.Array, jax.Array], Any] = lambda params, *_: params


class Codec(NamedTuple):
    """A parameterization of images as pure functions.

    There are ``n = num_classes * images_per_class`` images; image ``i`` has label ``i // images_per_class``. Where
    their shape is that of videos, (t, h, w, c), all arrays of images have one axis more, and sizes too.

    Attributes:
        name: Key of the registry.
        spec: The settings that it was made from, with every default resolved.
        image_shape: Native (h, w, c), or (t, h, w, c).
        num_classes: ``k``.
        images_per_class: Images that ``decode`` gives per class.
        init: ``(key, images [n,h,w,c]) -> params``: a starting point for fitting these images, which are float32 in
            [0,1] where they arrive; float32 masters.
        decode: ``(params, index=None, *, size=None, key=None) -> [len(index), h, w, c]``: images around [0,1]; all of
            them without ``index``; at another size, (height, width) or (frames, height, width), where the
            parameterization knows how. ``key`` is for codecs that decode at random.
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
    image_shape: Shape
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


def arrays(dtype: str, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Returns the layout of arrays of one dtype."""
    return {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for name, shape in shapes.items()}


def resized(images: jax.Array, size: tuple[int, int] | None) -> jax.Array:
    """Enlarges or shrinks decoded images ``[n, h, w, c]`` bilinearly, where a codec knows no better way."""
    if size is None or tuple(size) == images.shape[1:3]:
        return images
    return jax.image.resize(images, (images.shape[0], *size, images.shape[-1]), "bilinear")


def only_videos(spec: Any, image_shape: Shape) -> Any:
    """Returns a spec as it is.

    Raises:
        ValueError: The shape is that of images.
    """
    if len(image_shape) != 4:
        raise InputError(f"codec.name: {spec.name} is of videos [t, h, w, c], found images {list(image_shape)}")
    return spec


def cast_storage(spec: Any, image_shape: Shape, num_classes: int) -> dict[str, Any]:
    """Returns ``quantize``, ``dequantize``, ``nbytes`` and ``layout`` of a codec whose parameters are a dict of arrays.

    All of them are written in one precision, ``spec.dtype``, as they are.
    """

    def quantize(params: Any) -> Any:
        return storage.cast(params, spec.dtype)

    return {
        "quantize": quantize,
        "dequantize": storage.widen,
        "nbytes": lambda params: storage.nbytes(jax.eval_shape(quantize, params)),
        "layout": lambda: spec.layout(image_shape, num_classes),
    }
