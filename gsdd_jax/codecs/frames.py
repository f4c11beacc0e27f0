"""Videos and volumes by codecs of images: every frame or slice is an image of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gsdd_jax.codecs.base import Codec, Draft, Layout, Shape


def image_of(spec: Any, shape: Shape) -> Shape:
    """Returns the shape that a codec's settings are about: (h, w, c) of a frame, unless the codec knows videos."""
    return shape if spec.VIDEO else shape[-3:]


def layout(spec: Any, shape: Shape, num_classes: int) -> Layout:
    """Returns the shapes and dtypes of all arrays as they are written, of images or videos; of a resolved spec."""
    return _of_frames(spec, shape).layout(image_of(spec, shape), num_classes)


def numbers(spec: Any, shape: Shape, num_classes: int) -> tuple[int, str]:
    """Returns how many numbers a set holds, and their precision; of a resolved spec."""
    found: tuple[int, str] = _of_frames(spec, shape).numbers(image_of(spec, shape), num_classes)
    return found


def make(build: Any, spec: Any, shape: Shape, num_classes: int) -> Codec:
    """Builds the codec of a resolved spec.

    Args:
        build: `make` of the spec's module.
        spec: Whose ``images_per_class`` are videos, where the shape is that of a video.
        shape: (h, w, c) or (t, h, w, c).
        num_classes: ``k``.
    """
    one: Codec = build(_of_frames(spec, shape), image_of(spec, shape), num_classes)
    if one.image_shape == shape:
        return one
    frames, n = shape[0], num_classes * spec.images_per_class

    def apart(videos: jax.Array) -> jax.Array:
        return videos.reshape(-1, *videos.shape[2:])

    def together(images: jax.Array) -> jax.Array:
        return images.reshape(-1, frames, *images.shape[1:])

    def decode(params: Any, index: Any = None, *, size: Any = None, key: Any = None) -> jax.Array:
        if index is not None:
            index = (jnp.arange(n)[index][:, None] * frames + jnp.arange(frames)).reshape(-1)
        videos = together(one.decode(params, index, size=size and size[-2:], key=key))
        if size is None or size[0] == frames:
            return videos
        return jax.image.resize(videos, (len(videos), size[0], *videos.shape[2:]), "linear")

    def drafted(draft: Draft) -> Draft:
        return Draft(
            lambda params, done: together(draft.decode(params, done)),
            draft.project,
            lambda params, videos, done, before: draft.grow(params, apart(videos), done, before),
        )

    return one._replace(
        spec=spec,
        image_shape=shape,
        images_per_class=spec.images_per_class,
        init=lambda key, videos: one.init(key, apart(videos)),
        decode=decode,
        draft=one.draft and drafted(one.draft),
        # Those of an image are not those of a video.
        gaussians=lambda params: None,
    )


def _of_frames(spec: Any, shape: Shape) -> Any:
    if spec.VIDEO or len(shape) == 3:
        return spec
    return dataclasses.replace(spec, images_per_class=spec.images_per_class * shape[0])
