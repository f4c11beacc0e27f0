"""The interface of all parameterisations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import optax


class Codec(NamedTuple):
    """A parameterisation of images as pure functions.

    There are ``n = num_classes * images_per_class`` images; image ``i`` has label ``i // images_per_class``.

    Attributes:
        name: Key of the registry.
        spec: The settings that it was made from, with every default resolved.
        image_shape: Native (h, w, c).
        num_classes: ``k``.
        images_per_class: Images that ``decode`` gives per class.
        init: ``(key, images [n,h,w,c] in [0,1]) -> params``: a starting point for fitting these images; float32
            masters.
        decode: ``(params, index=None, *, size=None, key=None) -> [len(index), h, w, c]``: images around [0,1]; all of
            them without ``index``; at another (height, width) where the parameterisation knows how. ``key`` is for
            codecs that decode at random.
        stored: ``params -> pytree`` of arrays exactly as they are written to disk.
        loaded: The inverse of ``stored`` up to the stored precision: ``decode(loaded(stored(p)))`` has the bits of
            ``decode(p)``.
        nbytes: ``params -> int``: bytes of ``stored(params)``.
        regularise: ``params -> scalar``, already weighted, added to every objective.
        project: ``params -> params``, applied after each step.
        optimiser: ``() -> optax`` transformation for distillation.
        fitter: ``(steps) -> optax`` transformation for fitting images in that many steps.
    """

    name: str
    spec: Any
    image_shape: tuple[int, int, int]
    num_classes: int
    images_per_class: int
    init: Callable[..., Any]
    decode: Callable[..., Any]
    stored: Callable[[Any], Any]
    loaded: Callable[[Any], Any]
    nbytes: Callable[[Any], int]
    regularise: Callable[[Any], Any]
    project: Callable[[Any], Any]
    optimiser: Callable[[], optax.GradientTransformation]
    fitter: Callable[[int], optax.GradientTransformation]

    @property
    def num_images(self) -> int:
        """``n``."""
        return self.num_classes * self.images_per_class
