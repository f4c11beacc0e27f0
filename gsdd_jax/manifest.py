"""What a stored set says of itself, for anyone to check: the manifest, with the bounds of every number in it."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any

from annotated_types import Ge, Le, MaxLen, MinLen
from pydantic import StringConstraints

from gsdd_jax import schema
from gsdd_jax.errors import InputError
from gsdd_jax.exchange import BUDGET, SIDE, Array, renamed
from gsdd_jax.soft_labels import Labels

# Each is read; the last one is written. 2 added ``sha256``.
FORMATS = ("gsdd_jax/1", "gsdd_jax/2")
# Values of an image. Far above any set that is known, and small enough that no check of a codec takes long.
VALUES = 1 << 24

Side = Annotated[int, Ge(1), Le(SIDE)]
Size = Annotated[int, Ge(0), Le(BUDGET)]
ClassName = Annotated[str, MaxLen(1 << 10)]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of the file of arrays, of its two parts, and of the soft labels in it."""

    payload: Size
    header: Size
    file: Size
    labels: Size = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """A checked manifest.

    Attributes:
        format: One of ``FORMATS``.
        codec: Settings of the codec as they were written, by present names; all for the codec to check.
        image_shape: (h, w, c), or (t, h, w, c) of videos.
        num_classes: ``k``.
        images_per_class: Images that the codec draws of each class.
        bytes_per_class: The budget that the set was made for.
        class_names: One per class.
        labels: How soft labels are written, or None where the order of the images says all.
        sizes: In bytes.
        sha256: Of the file of arrays; empty in the first format.
        meta: Whatever else was recorded; unchecked.
    """

    format: str
    codec: dict[str, Any]
    image_shape: Annotated[tuple[Side, ...], MinLen(3), MaxLen(4)]
    num_classes: Annotated[int, Ge(1), Le(1 << 16)]
    images_per_class: Annotated[int, Ge(1), Le(1 << 20)]
    bytes_per_class: Annotated[int, Ge(1), Le(BUDGET)]
    class_names: tuple[ClassName, ...]
    labels: Labels | None = None
    sizes: Sizes
    sha256: Sha256 = ""
    meta: dict[str, Any]

    def __post_init__(self) -> None:
        """Checks what no single key can say."""
        if math.prod(self.image_shape) > VALUES:
            found = " x ".join(map(str, self.image_shape))
            raise InputError(f"image_shape: expected at most {VALUES} values per image, found {found}")
        if len(self.class_names) != self.num_classes:
            raise InputError(f"class_names: expected {self.num_classes}, one per class, found {len(self.class_names)}")
        if self.format != FORMATS[0] and not self.sha256:
            raise InputError("sha256: missing; expected 64 hexadecimal digits")
        self.label_arrays  # noqa: B018

    @property
    def num_images(self) -> int:
        """``n``."""
        return self.num_classes * self.images_per_class

    @property
    def label_arrays(self) -> dict[str, Array]:
        """The arrays of its soft labels."""
        return {} if self.labels is None else self.labels.arrays(self.num_images, self.num_classes)


def manifest_of(document: Any) -> Manifest:
    """Checks the types and the ranges of a manifest.

    Raises:
        ValueError: A key is missing, unknown or has no value that a set could have.
    """
    if isinstance(document, dict):
        _check_format(document.get("format"))
        document = {key: renamed(value, key) if key == "codec" else value for key, value in document.items()}
    return schema.build(Manifest, document)


def _check_format(found: Any) -> None:
    """Refuses what other programs and later versions write, and says what to do."""
    if found in FORMATS:
        return
    family, _, number = str(found).partition("/")
    later = type(found) is str and family == "gsdd_jax" and number.isascii() and number.isdigit()
    advice = "it is of a newer version: update gsdd_jax" if later else "it is no distilled set of this library"
    raise InputError(f"format: expected {' or '.join(map(repr, FORMATS))}, found {schema.show(found)}; {advice}")
