"""The form of a stored set, and what is checked of it before any of it is believed: bytes in, values out.

A set comes from anyone. Every number is bounded before it is used, nothing is allocated that the file does not hold,
and whatever does not fit is one ValueError that names the key, what was expected and what was found. Neither JAX nor
the safetensors package is needed to read; paths belong to `synset`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import operator
import re
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np

# Each is read; the last one is written. 2 added ``sha256``.
FORMATS = ("gsdd_jax/1", "gsdd_jax/2")
MANIFEST_BYTES = 1 << 20
# About a thousand arrays.
HEADER_BYTES = 1 << 16
DEPTH = 32
# Largest values. Far above any set that is known, and small enough that no check of a codec takes long.
CLASSES, IMAGES_PER_CLASS, SIDE, VALUES, NAME_LENGTH = 1 << 16, 1 << 20, 1 << 13, 1 << 24, 1 << 10
BUDGET = 1 << 40
SETTING, LARGEST = 1 << 16, 1e300
# Of the annotations of settings.
BOUNDS = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "more than"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "less than"),
}
# The arrays of soft labels, and the precisions of their probabilities.
LABELS, LABEL_INDICES = "labels", "label_indices"
LABEL_DTYPES = ("float32", "bfloat16", "uint8", "uint4")
LABEL_STEPS = 255
# The code of the largest probability of a row of uint4; a code c stands for c^2 parts.
LARGEST_CODE = 15
# How far a sum of rounded probabilities may be from 1: bfloat16 is off by at most 2^-9 of it.
SUM_TOLERANCE = 0.01
# What a set may seem to need beyond what its file holds: its shapes are still compared, which says more.
SLACK = 1 << 16

# The names of the safetensors format, in the order in which arrays lie in a file: wider ones first. bfloat16 is read as
# uint16, since NumPy has none.
CODES = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


# Settings by the names that they had before, in manifests, configurations and results of then.
FORMER_NAMES = {
    "gpc": "images_per_class",
    "ipc": "images_per_class",
    "lpc": "images_per_class",
    "optimiser": "optimizer",
}


class Array(NamedTuple):
    """An array that a file should hold, or says it holds."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes; a Python integer, so that no shape overflows it."""
        return math.prod(self.shape) * (2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class Labels(NamedTuple):
    """How soft labels are written; see `gsdd_jax.labels`."""

    dtype: str
    top_k: int

    def arrays(self, num_images: int, num_classes: int) -> dict[str, Array]:
        """Returns the arrays that hold them: ``labels [n, k or top_k]`` and ``label_indices [n, top_k]``.

        Of uint4, ``labels [n, ceil(k / 2)]``, two in a byte.
        """
        if self.dtype == "uint4":
            return {LABELS: Array("uint8", (num_images, -(-num_classes // 2)))}
        shape = (num_images, self.top_k or num_classes)
        index = Array("uint8" if num_classes <= 1 << 8 else "uint16", shape)
        return {LABELS: Array(self.dtype, shape)} | ({LABEL_INDICES: index} if self.top_k else {})


class Header(NamedTuple):
    """The header of a safetensors file: its arrays in the order of their bytes, and the sizes of its two parts."""

    arrays: dict[str, Array]
    nbytes: int
    payload: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A checked manifest.

    Attributes:
        codec: Settings of the codec as they were written, by present names; all for the codec to check.
        image_shape: (h, w, c).
        num_classes: ``k``.
        images_per_class: Images that the codec draws of each class.
        bytes_per_class: The budget that the set was made for.
        class_names: One per class.
        meta: Whatever else was recorded; unchecked but for its depth.
        sizes: ``payload``, ``header`` and ``file`` in bytes.
        sha256: Of the file of arrays; empty in the first format.
        labels: How soft labels are written, or None where the order of the images says all.
    """

    codec: dict[str, Any]
    image_shape: tuple[int, int, int]
    num_classes: int
    images_per_class: int
    bytes_per_class: int
    class_names: tuple[str, ...]
    meta: dict[str, Any]
    sizes: dict[str, int]
    sha256: str
    labels: Labels | None

    @property
    def num_images(self) -> int:
        """``n``."""
        return self.num_classes * self.images_per_class


KEYS = ("format", *(field.name for field in dataclasses.fields(Manifest)))


def short(value: Any) -> str:
    """Shows what was found, in one line that fits a message."""
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:50]}... of {len(text)} characters"


def parse_json(raw: bytes, limit: int) -> Any:
    """Parses JSON, stricter than Python: no key twice, no deep nesting, at most ``limit`` bytes.

    NaN and infinities are read: a run that diverged records them.

    Raises:
        ValueError: The bytes are not such a document.
    """
    if len(raw) > limit:
        raise ValueError(f"expected at most {limit} bytes of JSON, found more")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"{short(next(key for key in keys if keys.count(key) > 1))}: found twice in one object")
        return found

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError(f"expected at most {DEPTH} levels of JSON, found more") from error
    level = [value]
    for _ in range(DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError(f"expected at most {DEPTH} levels of JSON, found more")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def constants(meta: Mapping[str, Any], key: str) -> tuple[float, ...] | None:
    """Returns the numbers that a set recorded, such as ``channel_mean``; None if it recorded anything else."""
    value = meta.get(key)
    if not isinstance(value, list) or not all(isinstance(x, int | float) and abs(x) < 1e30 for x in value):
        return None
    return tuple(map(float, value))


def check_integer(value: Any, key: str, low: int, high: int) -> int:
    """Returns an integer of a document.

    Raises:
        ValueError: It is none, or out of range.
    """
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{key}: expected an integer from {low} to {high}, found {short(value)}")
    return value


def manifest_of(document: Any) -> Manifest:
    """Checks the types and the ranges of a manifest.

    Raises:
        ValueError: A key is missing, unknown or has no value that a set could have.
    """
    if type(document) is not dict:
        raise ValueError(f"expected an object of keys, found {short(document)}")
    if "format" not in document:
        raise ValueError("format: missing")
    _check_format(document["format"])
    for key in KEYS:
        # The first format had no sum, and most sets have no soft labels.
        optional = key == "labels" or (key == "sha256" and document["format"] == FORMATS[0])
        if key not in document and not optional:
            raise ValueError(f"{key}: missing")
    for key in document:
        if key not in KEYS:
            raise ValueError(f"{short(key)}: unknown; expected {', '.join(KEYS)}")
    for key, kind in (("codec", dict), ("meta", dict), ("sizes", dict), ("class_names", list), ("image_shape", list)):
        if type(document[key]) is not kind:
            raise ValueError(f"{key}: expected a {kind.__name__}, found {short(document[key])}")
    classes, sizes = check_integer(document["num_classes"], "num_classes", 1, CLASSES), document["sizes"]
    labels = labels_of(document["labels"], classes) if "labels" in document else None
    named = ("payload", "header", "file", *(() if labels is None else (LABELS,)))
    if set(sizes) != set(named):
        raise ValueError(f"sizes: expected {', '.join(named)}, found {short(', '.join(sizes))}")
    digest = document.get("sha256", "")
    if "sha256" in document and (type(digest) is not str or not re.fullmatch("[0-9a-f]{64}", digest)):
        raise ValueError(f"sha256: expected 64 hexadecimal digits, found {short(digest)}")
    return Manifest(
        codec=renamed(document["codec"], "codec"),
        image_shape=_image_shape(document["image_shape"]),
        num_classes=classes,
        images_per_class=check_integer(document["images_per_class"], "images_per_class", 1, IMAGES_PER_CLASS),
        bytes_per_class=check_integer(document["bytes_per_class"], "bytes_per_class", 1, BUDGET),
        class_names=_class_names(document["class_names"], classes),
        meta=document["meta"],
        sizes={key: check_integer(value, f"sizes.{key}", 0, BUDGET) for key, value in sizes.items()},
        sha256=digest,
        labels=labels,
    )


def labels_of(entry: Any, classes: int) -> Labels:
    """Reads what a manifest says of soft labels.

    Raises:
        ValueError: It is nothing that soft labels are written as.
    """
    if type(entry) is dict and set(entry) == {"kind", "dtype", "top_k"} and entry["kind"] == "soft":
        dtype, top_k = entry["dtype"], entry["top_k"]
        known = type(dtype) is str and dtype in LABEL_DTYPES
        most = 0 if dtype == "uint4" else classes - 1
        if known and type(top_k) is int and 0 <= top_k <= most:
            return Labels(dtype, top_k)
    raise ValueError(
        f"labels: expected kind soft, dtype one of {', '.join(LABEL_DTYPES)} and top_k from 0 to {classes - 1}, "
        f"0 with uint4, found {short(str(entry))}"
    )


def _check_format(found: Any) -> None:
    """Refuses what other programs and later versions write, and says what to do.

    Raises:
        ValueError: The format is none of ``FORMATS``.
    """
    if found in FORMATS:
        return
    family, _, number = str(found).partition("/")
    later = type(found) is str and family == "gsdd_jax" and number.isascii() and number.isdigit()
    advice = "it is of a newer version: update gsdd_jax" if later else "it is no distilled set of this library"
    raise ValueError(f"format: expected {' or '.join(map(repr, FORMATS))}, found {short(found)}; {advice}")


def _image_shape(value: list[Any]) -> tuple[int, int, int]:
    if len(value) != 3:
        raise ValueError(f"image_shape: expected [height, width, channels], found {len(value)} numbers")
    h, w, c = (check_integer(side, f"image_shape.{i}", 1, SIDE) for i, side in enumerate(value))
    if h * w * c > VALUES:
        raise ValueError(f"image_shape: expected at most {VALUES} values per image, found {h} x {w} x {c}")
    return h, w, c


def _class_names(value: list[Any], classes: int) -> tuple[str, ...]:
    if len(value) != classes:
        raise ValueError(f"class_names: expected {classes}, one per class, found {len(value)}")
    for i, name in enumerate(value):
        if type(name) is not str or len(name) > NAME_LENGTH or any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(f"class_names.{i}: expected a text of at most {NAME_LENGTH} letters, found {short(name)}")
    return tuple(value)


def renamed(settings: Any, section: str = "") -> Any:
    """Returns settings by their present names, see ``FORMER_NAMES``, those of sections within them too.

    Args:
        settings: A section, or a list or a value in one.
        section: Its dotted name; "" for a whole configuration, whose own keys keep their names: ``ipc`` is the budget.

    Raises:
        ValueError: A setting is there by both names.
    """
    if isinstance(settings, list):
        return [renamed(value, f"{section}.{i}") for i, value in enumerate(settings)]
    if not isinstance(settings, dict):
        return settings
    found: dict[Any, Any] = {}
    for key, value in settings.items():
        name = FORMER_NAMES.get(key, key) if section else key
        if name in found:
            names = [key for key in settings if FORMER_NAMES.get(key, key) == name]
            raise ValueError(f"{section}.{name}: expected once, found as {' and '.join(names)}")
        found[name] = renamed(value, f"{section}.{name}" if section else str(name))
    return found


def settings_of(spec: type, fields: Mapping[str, Any]) -> Any:
    """Makes a codec's spec from a manifest's settings, each checked against its annotation.

    Args:
        spec: A dataclass whose fields are literals, booleans, integers and floats, annotated with their ranges.
        fields: By name; what is missing has its default.

    Raises:
        ValueError: A setting is unknown, missing, of another type or out of range.
    """
    hints = _hints(spec)
    named = {field.name: field for field in dataclasses.fields(spec)}
    for name in fields:
        if name not in named:
            raise ValueError(f"codec.{short(name)[1:-1]}: unknown; expected {', '.join(named)}")
    for name, field in named.items():
        if name in fields:
            _check_setting(name, fields[name], hints[name])
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"codec.{name}: missing")
    return spec(**fields)


@functools.cache
def _hints(spec: type) -> dict[str, Any]:
    return get_type_hints(spec, include_extras=True)


def _check_setting(name: str, value: Any, annotation: Any) -> None:
    kind, *metadata = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    if get_origin(kind) is Literal:
        if type(value) is not str or value not in get_args(kind):
            raise ValueError(f"codec.{name}: expected one of {', '.join(get_args(kind))}; found {short(value)}")
        return
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    allowed = (*kinds, int) if float in kinds else kinds
    if type(value) not in allowed:
        names = " or ".join(each.__name__ for each in kinds)
        raise ValueError(f"codec.{name}: expected a value of type {names}, found {short(value)}")
    if not isinstance(value, int | float):
        return
    # False for NaN as well, and for integers that no float holds.
    if float in kinds and not -LARGEST < value < LARGEST:
        raise ValueError(f"codec.{name}: expected a finite number, found {short(value)}")
    if float not in kinds and value > SETTING:
        raise ValueError(f"codec.{name}: expected at most {SETTING}, found {short(value)}")
    for bound in metadata:
        for key, (holds, words) in BOUNDS.items():
            limit = getattr(bound, key, None)
            if limit is not None and not holds(value, limit):
                raise ValueError(f"codec.{name}: expected {words} {limit}, found {short(value)}")


def serialize(arrays: Mapping[str, Any]) -> bytes:
    """Returns the safetensors file of arrays: byte for byte that of the safetensors package.

    Written out here, because a set is known by the sum of this file in whatever form it is kept.

    Args:
        arrays: Of NumPy or JAX, each of a dtype of ``CODES``.
    """
    codes = {dtype: code for code, dtype in CODES.items()}
    order = list(codes)
    ordered = sorted(arrays.items(), key=lambda item: (order.index(str(item[1].dtype)), item[0]))
    header, parts, end = {}, [], 0
    for name, array in ordered:
        parts.append(np.asarray(array).tobytes())
        start, end = end, end + len(parts[-1])
        header[name] = {"dtype": codes[str(array.dtype)], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def read_header(file: BinaryIO, size: int) -> Header:
    """Reads and checks the header of a safetensors file.

    Args:
        file: At its first byte.
        size: Bytes of the whole file.

    Raises:
        ValueError: It is damaged: the arrays that it names do not fill the file exactly, one behind the other.
    """
    start = file.read(8)
    if len(start) < 8:
        raise ValueError(f"damaged file (expected a header of 8 bytes at least, found {len(start)})")
    length = int.from_bytes(start, "little")
    if not 2 <= length <= min(HEADER_BYTES, size - 8):
        raise ValueError(
            f"damaged file (length of the header: expected 2 to {min(HEADER_BYTES, size - 8)} bytes, found {length})"
        )
    try:
        document = parse_json(file.read(length), HEADER_BYTES)
        if type(document) is not dict:
            raise ValueError(f"expected an object of arrays, found {short(document)}")
        return _header(document, 8 + length, size - 8 - length)
    except ValueError as error:
        raise ValueError(f"damaged file (header: {error})") from error


def _header(document: dict[str, Any], nbytes: int, payload: int) -> Header:
    # Other programs put text there; nothing here depends on it.
    document.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    arrays = {}
    for name, entry in document.items():
        if type(entry) is not dict or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{short(name)}: expected dtype, shape and data_offsets, found {short(entry)}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if type(dtype) is not str or dtype not in CODES:
            raise ValueError(f"{short(name)}: dtype: expected one of {', '.join(CODES)}; found {short(dtype)}")
        for key, numbers in (("shape", shape), ("data_offsets", offsets)):
            if type(numbers) is not list or len(numbers) > DEPTH:
                raise ValueError(f"{short(name)}: {key}: expected a list of numbers, found {short(numbers)}")
            for number in numbers:
                check_integer(number, f"{short(name)}: {key}", 0, BUDGET)
        if len(offsets) != 2:
            raise ValueError(f"{short(name)}: data_offsets: expected 2 numbers, found {len(offsets)}")
        arrays[name] = Array(CODES[dtype], tuple(shape))
        spans.append((offsets[0], offsets[1], name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end or stop - start != arrays[name].nbytes:
            raise ValueError(
                f"{short(name)}: data_offsets: expected {[end, end + arrays[name].nbytes]}, found {[start, stop]}"
            )
        end = stop
    if end != payload:
        raise ValueError(f"expected a file of {nbytes + end} bytes, found {nbytes + payload}")
    return Header({name: arrays[name] for _, _, name in sorted(spans)}, nbytes, payload)


def compare(found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    """Compares names, shapes and dtypes of the arrays of a file with those of the set that its manifest describes.

    Raises:
        ValueError: They differ.
    """
    for name in sorted(expected.keys() | found.keys()):
        want, have = expected.get(name), found.get(name)
        if want != have:
            raise ValueError(f"{short(name)[1:-1]}: expected {want or 'nothing'}, found {have or 'nothing'}")


def read_arrays(file: BinaryIO, header: Header, sizes: Mapping[str, int], sha256: str) -> dict[str, np.ndarray]:
    """Reads the arrays behind the header, and compares the file with what the manifest says of it.

    Args:
        file: Just behind the header.
        header: That was compared with what the set needs, since all of it is allocated here.
        sizes: What the manifest says of ``payload``, ``header``, ``file`` and ``labels``, as far as it does.
        sha256: Of the file, by the manifest; '' = not known.

    Returns:
        The arrays; bfloat16 ones as uint16.

    Raises:
        ValueError: The file is another one than the manifest was written for.
    """
    found = {"payload": header.payload, "header": header.nbytes, "file": header.nbytes + header.payload}
    found[LABELS] = sum(array.nbytes for name, array in header.arrays.items() if name in (LABELS, LABEL_INDICES))
    for key, value in sizes.items():
        if value != found[key]:
            raise ValueError(f"sizes.{key}: the manifest expects {value} bytes, found {found[key]}")
    file.seek(0)
    digest = hashlib.sha256(file.read(header.nbytes))
    arrays = {}
    for name, array in header.arrays.items():
        raw = np.empty(array.nbytes, np.uint8)
        if file.readinto(raw.data) != array.nbytes:  # type: ignore[attr-defined]
            raise ValueError(f"{name}: the file ends before its {array.nbytes} bytes do")
        digest.update(raw.data)
        arrays[name] = raw.view("uint16" if array.dtype == "bfloat16" else array.dtype).reshape(array.shape)
    if sha256 and digest.hexdigest() != sha256:
        raise ValueError(f"sha256: the manifest expects {sha256}, found {digest.hexdigest()}: not its file")
    return arrays


def widened(array: np.ndarray) -> np.ndarray:
    """Returns the float32 of bfloat16 numbers given as uint16."""
    return (array.astype(np.uint32) << 16).view(np.float32)


def soft_labels(arrays: Mapping[str, np.ndarray], labels: Labels, num_classes: int) -> np.ndarray:
    """Reads written soft labels: float32 ``[n, k]``, each row with sum 1.

    Args:
        arrays: As `Labels.arrays` describes them; bfloat16 ones in any type that NumPy turns into floats.
        labels: How they are written.
        num_classes: ``k``.

    Raises:
        ValueError: Numbers that are no probabilities, or indices that name no class or one twice.
    """
    written = np.asarray(arrays[LABELS])
    if labels.dtype == "uint4":
        return _of_codes(written, num_classes)
    values = written.astype(np.float64)
    if labels.dtype == "uint8":
        values /= LABEL_STEPS
    # Steps of 1/255 add up to 1 but for the rounding of float64.
    slack = 1e-9 if labels.dtype == "uint8" else SUM_TOLERANCE
    check_probabilities(values, low=0 if labels.top_k else 1 - slack, high=1 + slack)
    if labels.top_k:
        indices = np.asarray(arrays[LABEL_INDICES]).astype(np.int64)
        ordered = np.sort(indices, axis=1)
        wrong = (ordered[:, -1] >= num_classes) | (ordered[:, 1:] == ordered[:, :-1]).any(1)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(
                f"{LABEL_INDICES}: row {row}: expected different classes of 0 to {num_classes - 1}, "
                f"found {indices[row].tolist()}"
            )
        rest = np.maximum(1 - values.sum(1), 0) / (num_classes - labels.top_k)
        whole_rows = np.repeat(rest[:, None], num_classes, 1)
        np.put_along_axis(whole_rows, indices, values, 1)
        values = whole_rows
    elif labels.dtype == "float32":
        return np.array(written)
    return (values / values.sum(1, keepdims=True)).astype(np.float32)


def _of_codes(written: np.ndarray, num_classes: int) -> np.ndarray:
    """Reads uint4: of each byte the upper half first; the last lower half of an odd number of classes is 0."""
    codes = np.stack([written >> 4, written & LARGEST_CODE], -1).reshape(len(written), -1)
    sound = (codes.max(1) == LARGEST_CODE) & (codes[:, num_classes:] == 0).all(1)
    if not sound.all():
        row = int(np.argmin(sound))
        raise ValueError(
            f"{LABELS}: row {row}: expected {num_classes} codes of 4 bits, the largest {LARGEST_CODE}, "
            f"found {codes[row].tolist()}"
        )
    parts = codes[:, :num_classes].astype(np.float64) ** 2
    return (parts / parts.sum(1, keepdims=True)).astype(np.float32)


def check_probabilities(values: np.ndarray, *, low: float, high: float) -> None:
    """Raises where a row holds no probabilities, or their sum is out of range."""
    sums = values.sum(1)
    sound = (values >= 0).all(1) & (sums >= low) & (sums <= high)
    if not sound.all():
        row = int(np.argmin(sound))
        found = f"the sum {sums[row]:g}" if (values[row] >= 0).all() else "a negative number or NaN"
        raise ValueError(f"{LABELS}: row {row}: expected probabilities with sum 1, found {found}")
