"""How many images fit a budget of bytes, for all codecs alike."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from gsdd_jax import storage
from gsdd_jax.codecs import frames
from gsdd_jax.codecs.base import Shape
from gsdd_jax.errors import InputError


def resolve(
    spec: Any, *, image_shape: Shape, num_classes: int, bytes_per_class: int | None, label_bytes: int = 0
) -> Any:
    """Returns a spec with every default filled in; a size that is 0, such as the images, is the most that fits.

    Args:
        spec: Of any codec.
        image_shape: (h, w, c), or (t, h, w, c) of videos.
        num_classes: ``k``.
        bytes_per_class: The budget of images and labels; None = what the spec takes, which then leaves nothing open.
        label_bytes: Of the label of an image.

    Raises:
        ValueError: A size has an impossible value, is left open where it cannot be, or nothing fits; the message names
            the setting and what would fit.
    """
    one_shape = frames.image_of(spec, image_shape)
    spec = spec.resolved(one_shape)
    sizes = spec.sizes(one_shape)
    unknown = [name for name in sizes if not getattr(spec, name)]
    if len(unknown) > (bytes_per_class is not None):
        budget = "" if bytes_per_class else ", or a budget (bytes_per_class) to fill"
        names = " and ".join(f"codec.{name}" for name in unknown)
        raise InputError(f"{names}: expected at least 1{' of one of them' * (not budget)}{budget}, found 0")
    for name in [name for name in sizes if name not in unknown]:
        _check(name, getattr(spec, name), sizes[name])
    if bytes_per_class is None:
        return spec
    available = num_classes * bytes_per_class

    def nbytes(one: Any) -> int:
        return storage.nbytes(frames.layout(one, image_shape, num_classes))

    def needed(one: Any) -> int:
        return nbytes(one) + num_classes * one.images_per_class * label_bytes

    def most(one: Any, name: str, values: Sequence[int]) -> int:
        return _largest(values, lambda value: needed(_changed(one, name, value, one_shape)) <= available)

    def remedies(one: Any, first: str = "") -> dict[str, str]:
        smaller = {name: values[: bisect.bisect_left(values, getattr(one, name))] for name, values in sizes.items()}
        found = {name: most(one, name, values) for name, values in smaller.items()}
        return {f"codec.{name}": f"{first}codec.{name} of at most {value}" for name, value in found.items() if value}

    for name in unknown:
        if found := most(spec, name, sizes[name]):
            return dataclasses.replace(spec, **{name: found})
        spec = dataclasses.replace(spec, **{name: sizes[name][0]})
    if needed(spec) <= available:
        return spec
    ways = remedies(spec)
    for name, values in reversed(sizes.items()):
        # Where no setting alone is enough, two of them may be.
        ways = ways or remedies(_changed(spec, name, values[0], one_shape), f"codec.{name}={values[0]} with ")
    images, taken, what = spec.images_per_class, nbytes(spec), ""
    if label_bytes:
        what = f" and {num_classes * images} labels of {label_bytes} bytes"
        # The smallest label is the number of a class and a byte.
        if (room := (available - taken) // (num_classes * images)) >= (2 if num_classes <= 256 else 3):
            ways["labels"] = f"labels of at most {room} bytes (labels.top_k, labels.dtype)"
    head = "labels" if label_bytes and taken <= available else next(iter(ways), "codec.images_per_class")
    settings, least = ", ".join(f"{name}={getattr(spec, name)}" for name in sizes), -(-needed(spec) // num_classes)
    raise InputError(
        f"{head}: {needed(spec)} bytes for {settings}{what}, the budget of all classes has {available}; expected "
        f"{', or '.join([*ways.values(), f'at least {least} bytes per class'])}"
    )


def _check(name: str, value: int, values: Sequence[int]) -> None:
    if value in values:
        return
    if isinstance(values, range):
        expected = f"at most {values[-1]}" if value > values[-1] else f"a multiple of {values.step}"
    else:
        expected = f"one of {', '.join(map(str, values))}"
    raise InputError(f"codec.{name}: expected {expected}, found {value}")


def _changed(spec: Any, name: str, value: int, image_shape: Shape) -> Any:
    """Returns a spec of another size; the fewest images that there can be stay the fewest."""
    fewest = spec.sizes(image_shape)["images_per_class"][0]
    changed = dataclasses.replace(spec, **{name: value})
    if name == "images_per_class" or spec.images_per_class != fewest:
        return changed
    return dataclasses.replace(changed, images_per_class=changed.sizes(image_shape)["images_per_class"][0])


def _largest(values: Sequence[int], fits: Callable[[int], bool]) -> int:
    """Returns the last of rising values that fits, 0 if none does."""
    count = bisect.bisect_left(values, True, key=lambda value: not fits(value))
    return values[count - 1] if count else 0
