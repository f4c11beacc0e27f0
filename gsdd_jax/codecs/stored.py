"""Codecs of stored sets: from settings that anyone may have written, and whether those of a codec come back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp

from gsdd_jax import codecs, exchange, schema, storage
from gsdd_jax.codecs.base import Codec
from gsdd_jax.errors import InputError

# No known setting that is an integer is larger, and with none of this size a check of a codec takes long.
SETTING = 1 << 16


def spec_of(settings: dict[str, Any], kind: type | None = None) -> codecs.CodecSpec:
    """Makes a codec's spec from a manifest's settings, each checked against its annotation.

    Args:
        settings: By name; what is missing has its default.
        kind: Of the spec; that of the registered codec of this name if None.

    Raises:
        ValueError: A setting is unknown, missing, of another type or out of range.
    """
    name = settings.get("name")
    if kind is None and (not isinstance(name, str) or name not in codecs.SPECS):
        raise InputError(f"codec.name: expected one of {', '.join(codecs.SPECS)}; found {schema.show(name)}")
    spec: Any = schema.build(kind or codecs.SPECS[str(name)], settings, section="codec")
    for key, value in vars(spec).items():
        if type(value) is int and value > SETTING:
            raise InputError(f"codec.{key}: expected at most {SETTING}, found {schema.show(value)}")
    # A rate of 2 stays an integer, so that the set is written as it was.
    return dataclasses.replace(spec, **{key: value for key, value in settings.items() if type(value) is int})


def codec_of(
    settings: dict[str, Any], *, image_shape: tuple[int, ...], num_classes: int, images_per_class: int, nbytes: int
) -> Codec:
    """Builds the codec of a stored set.

    Its budget is what the file could hold, so that it refuses larger sets before it makes anything of their size.

    Args:
        settings: What the manifest says of it.
        image_shape: (h, w, c), or (t, h, w, c).
        num_classes: ``k``.
        images_per_class: What it has to come to.
        nbytes: Of all arrays in the file.

    Raises:
        ValueError: The settings are wrong, or no file with so many bytes of arrays holds such a set.
    """
    spec = spec_of(settings)
    room = -(-(2 * nbytes + exchange.SLACK) // num_classes)
    try:
        codec = codecs.make(spec, image_shape=image_shape, num_classes=num_classes, bytes_per_class=room)
    except ValueError as error:
        raise InputError(f"codec: {nbytes} bytes of arrays are no such set ({error})") from error
    for key, value in vars(spec).items():
        if value != getattr(codec.spec, key):
            raise InputError(f"codec.{key}: expected what the set was made with, found {schema.show(value)}")
    if codec.images_per_class != images_per_class:
        raise InputError(f"images_per_class: expected {codec.images_per_class}, found {images_per_class}")
    return codec


def check(codec: Codec) -> None:
    """Tells whether sets of a codec can be written and read back; computes nothing.

    A codec from outside is thus refused before there is a set to lose.

    Raises:
        ValueError: A file cannot hold its arrays or a manifest its settings, or these make another codec.
    """

    def refused(what: object) -> InputError:
        return InputError(f"codec.name: sets of {codec.name!r} could not be read back: {what}")

    if not dataclasses.is_dataclass(type(codec.spec)) or getattr(codec.spec, "name", None) != codec.name:
        raise refused(f"expected a dataclass with the name {codec.name!r} as its spec, found {codec.spec!r}")
    layout, dtypes = codec.layout(), exchange.CODES.values()
    for name, leaf in layout.items():
        if str(getattr(leaf, "dtype", None)) not in dtypes:
            raise refused(f"array {name!r}: expected one of {', '.join(dtypes)}, found {leaf}")
    images = jax.ShapeDtypeStruct((codec.num_images, *codec.image_shape), jnp.float32)
    size = codec.nbytes(jax.eval_shape(codec.init, jax.eval_shape(lambda: jax.random.key(0)), images))
    if size != storage.nbytes(layout):
        raise refused(f"expected {storage.nbytes(layout)} bytes, as in its layout, found {size} by its nbytes")
    try:
        read = codec_of(
            json.loads(json.dumps(dataclasses.asdict(codec.spec))),
            image_shape=codec.image_shape,
            num_classes=codec.num_classes,
            images_per_class=codec.images_per_class,
            nbytes=size,
        )
    except (TypeError, ValueError) as error:
        raise refused(error) from error
    if read.layout() != layout:
        raise refused(f"expected arrays {layout}, found {read.layout()} from the settings in its spec")
