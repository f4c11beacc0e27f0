"""Data sets: one reader per source, one `Dataset` as the result, class-balanced sampling."""

import difflib
import hashlib
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Lt
from PIL import ImageColor
from typing_extensions import Doc

from gsdd_jax import pixels
from gsdd_jax.data import arrays, clips, digits, folder, subsets, tfds, volumes
from gsdd_jax.data.decode import MAX_PIXELS, Converter, Resize
from gsdd_jax.data.host import HostSampler, prefetch
from gsdd_jax.data.sampling import ClassTable, class_table, sample_classes
from gsdd_jax.data.source import Records, Source, Split, assemble, choose
from gsdd_jax.data.subsets import Subset
from gsdd_jax.errors import InputError

__all__ = [
    "SOURCES",
    "ClassTable",
    "DataNotice",
    "DataSpec",
    "Dataset",
    "HostSampler",
    "check",
    "class_blocks",
    "class_table",
    "load",
    "prefetch",
    "records",
    "require_content",
    "require_per_class",
    "sample_classes",
    "take_classes",
]


# Unreadable images that a message names; further ones are counted.
_NAMED = 20
# Settings that a source cannot use.
_NO_SPLITS = ("train_split", "test_split", "subset")
_BUILT_IN = (*_NO_SPLITS, "name", "path", "test_fraction")
_WITHOUT = {"digits": _BUILT_IN, "moving_digits": _BUILT_IN, "solid_digits": _BUILT_IN, "arrays": _NO_SPLITS}


class DataNotice(UserWarning):
    """What a user should know of data that were read, in one line: what was passed over, left out or composited."""


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Which images, videos or volumes to read, and how to bring them to one size."""

    source: Annotated[
        Literal["digits", "moving_digits", "solid_digits", "tfds", "folder", "clips", "volumes", "arrays"],
        Doc(
            "digits = scikit-learn's 8x8 digits; moving_digits, solid_digits = videos and volumes made of them; "
            "tfds = a prepared TFDS set; folder = root/{train,test}/<class>/*.png, at any depth and in any format that "
            "Pillow reads; clips = such folders of videos, or of folders of frames; volumes = of *.binvox files; "
            "arrays = one .npz file with train_images, train_labels, test_images, test_labels."
        ),
    ] = "digits"
    name: Annotated[
        str, Doc("TFDS name (cifar10, mnist, imagenet2012, ...); with `path` only a label for reports.")
    ] = ""
    path: Annotated[
        str, Doc("TFDS version directory (.../1.0.0, with dataset_info.json), root of a folder, or .npz file.")
    ] = ""
    train_split: Annotated[
        str,
        Doc(
            'Training split, TFDS slices too ("train[:90%]"); folder, or file in the root that lists images or clips; '
            "empty = train."
        ),
    ] = ""
    test_split: Annotated[
        str, Doc("Test split, folder or list; empty = test or validation, whichever is there with labels.")
    ] = ""
    test_labels: Annotated[
        str, Doc('File in the root of an image folder, a line "image label" for each image of a flat test folder.')
    ] = ""
    test_fraction: Annotated[
        float, Ge(0), Lt(1), Doc("Share of each class's training images to test on instead, without a test split.")
    ] = 0.0
    test_seed: Annotated[int, Ge(0), Lt(2**32), Doc("Which images data.test_fraction draws, apart from `seed`.")] = 0
    resolution: Annotated[
        int, Ge(0), Doc("Side in pixels; images are resized with antialiasing (Lanczos); 0 = native size.")
    ] = 0
    resize: Annotated[
        Resize,
        Doc(
            "crop = short side to `resolution`, then center crop (GLaD's choice); squash = both sides (the MTT and "
            "DDiF codes squash the aspect ratio too, but bilinearly and without antialiasing: other pixels)."
        ),
    ] = "crop"
    frames: Annotated[int, Ge(0), Doc("Frames to take of each clip; 0 = all, of clips that have equally many.")] = 0
    frame_step: Annotated[int, Ge(1), Doc("Distance between frames that are taken, from the first one on.")] = 1
    channels: Annotated[Literal[0, 1, 3], Doc("1 = gray, 3 = RGB, 0 = as stored.")] = 0
    background: Annotated[str, Doc('Color under transparent pixels: a name of CSS such as black, or "#rrggbb".')] = (
        "white"
    )
    unreadable: Annotated[
        Literal["error", "skip"],
        Doc(
            "What to do about images that are damaged, too large, animated or of more than 8 bits per channel: name "
            "them all and stop, or name them and go on without."
        ),
    ] = "error"
    max_pixels: Annotated[int, Ge(1), Doc("Most pixels of an image as it is stored (Pillow's limit).")] = MAX_PIXELS
    subset: Annotated[Subset, Doc("Ten classes of ImageNet-1k in the order of the MTT code; empty = all.")] = ""
    classes: Annotated[tuple[str, ...], Doc("Names of the classes to take, in this order; empty = all.")] = ()
    per_class: Annotated[int, Ge(0), Doc("Only the first n training images of each class (smoke runs); 0 = all.")] = 0
    test_limit: Annotated[int, Ge(0), Doc("At most so many test images, spread evenly over the classes; 0 = all.")] = 0
    sha256: Annotated[
        str,
        Doc(
            "What all of the above must lead to: the SHA-256 of pixels, labels and class names of both splits. A run "
            "fills it in and is continued with such data only; empty = not known yet."
        ),
    ] = ""

    def __post_init__(self) -> None:
        """Checks what no single field can say.

        Raises:
            ValueError: A source lacks the field it needs, or has one that it cannot use, or a sum is none.
        """
        if self.sha256 and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise InputError(f"data.sha256: expected 64 hexadecimal digits or nothing, found {self.sha256!r}")
        if self.source == "tfds" and not (self.name or self.path):
            raise InputError("data.source 'tfds' needs data.name (such as cifar10) or data.path (.../1.0.0)")
        if self.source in ("folder", "clips", "volumes") and not self.path:
            raise InputError(f"data.source {self.source!r} needs data.path, the folder that holds train/ and test/")
        if self.source == "arrays" and not self.path:
            raise InputError("data.source 'arrays' needs data.path, an .npz file")
        if self.subset and self.classes:
            raise InputError(
                f"data.classes: expected none beside data.subset {self.subset!r}, found {len(self.classes)}"
            )
        if len(set(self.classes)) != len(self.classes):
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            raise InputError(f"data.classes: expected distinct names, found {twice!r} twice")
        for field in ("test_split", "test_labels"):
            if self.test_fraction and getattr(self, field):
                raise InputError(
                    f"data.{field}: expected none beside data.test_fraction {self.test_fraction:g}, found "
                    f"{getattr(self, field)!r}"
                )
        for field, only, none in (("test_labels", "folder", ""), ("frames", "clips", 0), ("frame_step", "clips", 1)):
            if getattr(self, field) != none and self.source != only:
                raise InputError(f"data.{field} needs data.source {only!r}, found {self.source!r}")
        try:
            opaque = len(ImageColor.getrgb(self.background)) == 3
        except ValueError:
            opaque = False
        if not opaque:
            raise InputError(f'data.background: expected a color such as white or "#rrggbb", found {self.background!r}')
        for field in _WITHOUT.get(self.source, ()):
            if getattr(self, field):
                found = getattr(self, field)
                raise InputError(f"data.{field} must be empty with data.source {self.source!r}, found {found!r}")


class Dataset(NamedTuple):
    """A classification data set in host memory.

    Attributes:
        name: For reports.
        train_images: [N, h, w, c], of videos and volumes [N, t, h, w, c]; uint8 as `load` gives them, or float32 in
            [0,1].
        train_labels: int32 [N] in [0, k).
        test_images: [M, h, w, c], in the same form.
        test_labels: int32 [M].
        class_names: k names in label order.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """`(h, w, c)`, or `(t, h, w, c)` of videos and volumes."""
        return self.train_images.shape[1:]

    @property
    def num_classes(self) -> int:
        """Number of classes k."""
        return len(self.class_names)

    def fingerprint(self) -> str:
        """Hex SHA-256 over pixels, labels and class names of both splits.

        Two data sets agree on it only if they are equal. The name is left out: it is a label for reports.
        """
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for array in self[1:5]:
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def _open_tfds(spec: DataSpec) -> Source:
    return tfds.open_tfds(
        name=spec.name,
        path=spec.path,
        train_split=spec.train_split,
        test_split=spec.test_split,
        test_fraction=spec.test_fraction,
        test_seed=spec.test_seed,
    )


def _open_folder(spec: DataSpec, open_folder: Callable[..., Source] = folder.open_folder, **options: Any) -> Source:
    return open_folder(
        spec.path,
        train_split=spec.train_split,
        test_split=spec.test_split,
        test_fraction=spec.test_fraction,
        test_seed=spec.test_seed,
        **options,
    )


def _open_clips(spec: DataSpec) -> Source:
    return _open_folder(spec, clips.open_clips, frames=spec.frames, frame_step=spec.frame_step)


def _open_arrays(spec: DataSpec) -> Source:
    return arrays.open_arrays(spec.path, test_fraction=spec.test_fraction, test_seed=spec.test_seed)


SOURCES: dict[str, Callable[[DataSpec], Source]] = {
    "digits": lambda _: digits.open_digits(),
    "moving_digits": lambda _: digits.open_moving_digits(),
    "solid_digits": lambda _: digits.open_solid_digits(),
    "tfds": _open_tfds,
    "folder": lambda spec: _open_folder(spec, test_labels=spec.test_labels),
    "clips": _open_clips,
    "volumes": lambda spec: _open_folder(spec, volumes.open_volumes),
    "arrays": _open_arrays,
}
"""The registry: what opens a source, by its name in ``data.source``."""


class _Opened(NamedTuple):
    """A source with what a spec makes of it: the source labels kept, in their new order, and the pixel conversion."""

    source: Source
    name: str
    kept: tuple[int, ...]
    class_names: tuple[str, ...]
    convert: Converter


def _open(spec: DataSpec) -> _Opened:
    if spec.source not in SOURCES:
        raise InputError(f"data.source: unknown source {spec.source!r}; allowed: {', '.join(SOURCES)}")
    source = SOURCES[spec.source](spec)
    kept, names, name = tuple(range(len(source.class_names))), source.class_names, spec.name or source.name
    if spec.subset:
        kept, names = subsets.resolve(spec.subset, source.class_names)
        name = f"{name}/{spec.subset}"
    if spec.classes:
        kept, names = _positions(spec.classes, source), spec.classes
        name = f"{name}/{len(names)} classes"
    if source.notice:
        warnings.warn(f"{name}: {source.notice}", DataNotice, stacklevel=3)
    convert = Converter(
        resolution=spec.resolution,
        resize=spec.resize,
        channels=spec.channels or source.channels,
        background=spec.background,
        max_pixels=spec.max_pixels,
    )
    return _Opened(source=source, name=name, kept=kept, class_names=names, convert=convert)


def _positions(classes: tuple[str, ...], source: Source) -> tuple[int, ...]:
    unknown = [name for name in classes if name not in source.class_names]
    if unknown:
        near = difflib.get_close_matches(unknown[0], source.class_names, n=3) or source.class_names[:3]
        raise InputError(
            f"data.classes: {source.name} has no class {unknown[0]!r}; expected names of its {len(source.class_names)} "
            f"classes, such as {', '.join(map(repr, near))}"
        )
    return tuple(source.class_names.index(name) for name in classes)


def load(spec: DataSpec) -> Dataset:
    """Reads a data set into memory.

    Images of classes that were not asked for are never decoded: with `subset`, `classes`, `per_class` or `test_limit` a
    first pass reads labels only (TFDS records are still read from disk once, which is what bounds a subset of
    imagenet2012).

    Args:
        spec: What to read.

    Returns:
        A checked `Dataset`.

    Raises:
        ImportError: The source needs a package that is not installed.
        FileNotFoundError: A file or folder does not exist, or a TFDS data set is not prepared.
        InputError: Images cannot be read; all of them are counted, and the first named.
        ValueError: Unknown choice, missing classes, images of several sizes without a resolution, a class without
            images; or the data are not those of `spec.sha256`.

    Warns:
        DataNotice: Files were passed over, images left out or composited on the background.
    """
    opened = _open(spec)
    train, train_labels, damaged = _read(opened, opened.source.train, per_class=spec.per_class)
    test, test_labels, also = _read(opened, opened.source.test, limit=spec.test_limit)
    unreadable, total = damaged + also, len(train) + len(test) + len(damaged) + len(also)
    things = opened.source.things
    if unreadable:
        more = f" and {len(unreadable) - _NAMED} more" if len(unreadable) > _NAMED else ""
        which = f"{len(unreadable)} of {total} {things} cannot be read: {', '.join(unreadable[:_NAMED])}{more}"
        if spec.unreadable == "error" or not (len(train) and len(test)):
            way_out = "data.unreadable=skip goes on without" if len(train) and len(test) else "none is left of a split"
            raise InputError(f"{opened.name}: {which}; {way_out}")
        warnings.warn(f"{opened.name}: left out {which}", DataNotice, stacklevel=2)
    composited = opened.convert.composited
    if composited:
        plain = f"; {sum(composited)} of them are of one color then" if any(composited) else ""
        warnings.warn(
            f"{opened.name}: {len(composited)} of {total} {things} have transparent pixels, composited on "
            f"{spec.background} (data.background){plain}",
            DataNotice,
            stacklevel=2,
        )
    found = check(Dataset(opened.name, train, train_labels, test, test_labels, opened.class_names))
    if spec.sha256:
        require_content(found.fingerprint(), spec.sha256, "data.sha256 names", "data.sha256='' to take these")
    return found


def require_content(found: str, expected: str, who: str, otherwise: str) -> None:
    """Refuses a data set by its fingerprint.

    Args:
        found: The fingerprint of the data at hand.
        expected: The one that they should have.
        who: Who expects it, as the subject of the message.
        otherwise: What to do with other data.

    Raises:
        ValueError: They differ.
    """
    if found != expected:
        # Short as long as they can be told apart.
        digits = 12 if found[:12] != expected[:12] else 64
        raise InputError(
            f"data: other images, labels or class names than {who}: SHA-256 {found[:digits]}..., expected "
            f"{expected[:digits]}...; give the same content, wherever it is (data.path, data.source, data.name), or "
            f"{otherwise}"
        )


def records(spec: DataSpec) -> tuple[Records, np.ndarray, tuple[str, ...]]:
    """Opens the training images of a data set that is too large for memory, for `HostSampler`.

    Args:
        spec: What to read; `per_class`, `subset` and `classes` apply. Resolution 0 works only if all images have one
            size. What cannot be read is an error when it is asked for.

    Returns:
        `(records, labels, class_names)`: a random-access sequence of `{"image": uint8 [h, w, c], "label": int}`, or of
        videos [t, h, w, c], that decodes on access, int32 [n] labels, k names.

    Raises:
        ValueError: As for `load`, except that image sizes are only seen on access; or `unreadable` is "skip".
        InputError: As for `load`.
    """
    if spec.unreadable == "skip":
        raise InputError(
            "data.unreadable: images that are read on access cannot be left out; expected error, found 'skip'"
        )
    opened = _open(spec)
    split = opened.source.train
    indices, labels = choose(split, kept=opened.kept, per_class=spec.per_class)
    labels = _relabel(opened, labels, split)
    _require_every_class(labels, opened.class_names)
    return Records(split, indices, labels, opened.convert), labels, opened.class_names


def _read(
    opened: _Opened, split: Split, *, per_class: int = 0, limit: int = 0
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    if len(opened.kept) < len(opened.source.class_names) or per_class or limit:
        indices, _ = choose(split, kept=opened.kept, per_class=per_class, limit=limit)
    else:
        # Everything is wanted: one pass that decodes is cheaper than a pass over the labels and another one.
        indices = np.arange(split.size)
    images, labels, unreadable = assemble(split, indices, opened.convert)
    return images, _relabel(opened, labels, split), unreadable


def _relabel(opened: _Opened, labels: np.ndarray, split: Split) -> np.ndarray:
    known = len(opened.source.class_names)
    _check_range(labels, known, split.where)
    new = np.full(known, -1, np.int32)
    new[list(opened.kept)] = np.arange(len(opened.kept))
    return new[labels]


def check(dataset: Dataset) -> Dataset:
    """Returns the data set if it is well-formed; for data sets made by hand as well as by `load`.

    Nothing is changed but the precision of images in floating point, to float32.

    Raises:
        TypeError: Images are neither uint8 nor floating point, labels are not integers.
        ValueError: Wrong shapes or lengths, label out of range, a class without training images, an empty split,
            duplicate names.
    """
    if len(set(dataset.class_names)) != len(dataset.class_names) or not dataset.class_names:
        raise InputError(f"class_names must be distinct and not empty, found {list(dataset.class_names)}")
    for part, images, labels in (
        ("train", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),
    ):
        images = pixels.check(images, f"{part}_images")
        if images.shape[-1] not in (1, 3):
            raise InputError(f"{part}_images must have 1 or 3 channels, found shape {list(images.shape)}")
        if images is not getattr(dataset, f"{part}_images"):
            dataset = dataset._replace(**{f"{part}_images": images})
        if not np.issubdtype(labels.dtype, np.integer):
            raise InputError(f"{part}_labels must be integers, found {labels.dtype}")
        if labels.shape != images.shape[:1]:
            raise InputError(f"{part}_labels must have shape [{len(images)}], found {list(labels.shape)}")
        _check_range(labels, len(dataset.class_names), part)
    if dataset.train_images.shape[1:] != dataset.test_images.shape[1:]:
        train, test = (list(images.shape[1:]) for images in (dataset.train_images, dataset.test_images))
        raise InputError(
            f"training images are {train}, test images {test}; set data.resolution to bring them to one size"
        )
    _require_every_class(dataset.train_labels, dataset.class_names)
    return dataset


def _check_range(labels: np.ndarray, num_classes: int, where: str) -> None:
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        bad = labels.min() if labels.min() < 0 else labels.max()
        raise InputError(f"{where}: label {bad} is out of range; allowed: 0 to {num_classes - 1}")


def _require_every_class(labels: np.ndarray, class_names: tuple[str, ...]) -> None:
    count = np.bincount(labels, minlength=len(class_names))
    if count.min() == 0:
        empty = [name for name, number in zip(class_names, count, strict=True) if number == 0]
        raise InputError(f"class {empty[0]!r} has no training images ({len(empty)} of {len(class_names)} classes)")


def class_blocks(num_classes: int, count: int) -> tuple[range, ...]:
    """Splits the classes into `count` blocks of consecutive ones, whose sizes differ by at most one.

    Ten classes in three blocks are 0 to 2, 3 to 5 and 6 to 9.

    Raises:
        ValueError: Fewer than one block, or more blocks than classes.
    """
    if not 1 <= count <= num_classes:
        raise InputError(f"subtasks: expected 1 to {num_classes}, the number of classes; found {count}")
    edges = [i * num_classes // count for i in range(count + 1)]
    return tuple(range(first, last) for first, last in zip(edges, edges[1:], strict=False))


def take_classes(dataset: Dataset, classes: range) -> Dataset:
    """Returns the images of a block of consecutive classes as a data set of its own, in the order they had.

    Class `classes[i]` gets the label `i` in both splits.

    Raises:
        ValueError: No test image belongs to the block.
    """

    def taken(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        own = (labels >= classes.start) & (labels < classes.stop)
        return images[own], labels[own] - labels.dtype.type(classes.start)

    name = f"{dataset.name}[{classes.start}:{classes.stop}]"
    train, test = taken(dataset.train_images, dataset.train_labels), taken(dataset.test_images, dataset.test_labels)
    if not len(test[1]):
        raise InputError(f"{name}: no test image belongs to these classes; raise data.test_limit or lower subtasks")
    return check(Dataset(name, *train, *test, dataset.class_names[classes.start : classes.stop]))


def require_per_class(dataset: Dataset, n: int, what: str) -> None:
    """Raises if some class has fewer than `n` training images.

    Args:
        dataset: The data set.
        n: Images needed per class.
        what: Who needs them, for the message ("ipc", "objective.batch_real").

    Raises:
        ValueError: Names the first class that is too small.
    """
    count = np.bincount(dataset.train_labels, minlength=dataset.num_classes)
    small = np.flatnonzero(count < n)
    if len(small):
        more = f" ({len(small)} classes have too few)" if len(small) > 1 else ""
        name, have = dataset.class_names[small[0]], count[small[0]]
        raise InputError(f"class {name!r} has {have} training images, {what} needs {n}{more}")
