"""A distilled set that was made in parts, one for each block of classes: federated distillation (D3).

Every part keeps what its images share, such as a decoder, grids or base images, and what all parts share is the space
of images alone. Arrays are therefore never joined: the parts stay sets of their own behind the interface of one, which
is the same for every codec. A single `SynSet` would do for codecs that share nothing, with a second way to keep.

JAX is imported where it is needed, so that `read_manifest` and the joining of labels work without it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import MinLen
from pydantic import StringConstraints

from gsdd_jax import exchange, files, schema, synset
from gsdd_jax.errors import InputError
from gsdd_jax.manifest import Sha256
from gsdd_jax.soft_labels import Labels
from gsdd_jax.synset import SynSet

if TYPE_CHECKING:
    import jax

    from gsdd_jax.labels import SoftLabels

# The first format had no labels of the whole.
FORMATS = ("gsdd_jax merged/1", "gsdd_jax merged/2")
# Of something in the set's own directory.
Name = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a merged set says of itself: its parts, and in the second format the file of its labels."""

    format: str
    parts: Annotated[tuple[Name, ...], MinLen(1)]
    labels: Labels | None = None
    labels_file: Name = ""
    labels_sha256: Sha256 = ""
    class_names: tuple[str, ...]
    payload: int
    meta: dict[str, Any]

    def __post_init__(self) -> None:
        """Checks what no single key can say."""
        given = {self.labels is not None, bool(self.labels_file), bool(self.labels_sha256)}
        if given != {self.format == FORMATS[1]}:
            raise InputError(
                f"labels: expected labels, labels_file and labels_sha256 in {FORMATS[1]!r}, and only there"
            )


@dataclasses.dataclass(frozen=True)
class MergedSet:
    """Sets of consecutive blocks of classes as one set, ready to render and to train on.

    Images are class-major; the number of images per class may differ between parts.

    Attributes:
        parts: In the order of the classes: the first part has classes 0 to k0 - 1 of the whole, and so on.
        meta: Anything else that was recorded.
        soft: Soft labels among the classes of the whole, as D3's single teacher gives them; they take the place of
            those of the parts, which then have none. Parts with labels of their own know of their own classes only.

    Raises:
        ValueError: No parts, a class that is in two parts, parts with images or budgets of different sizes, or soft
            labels that are not one per image among all classes, or are there twice.
    """

    parts: tuple[SynSet, ...]
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    soft: SoftLabels | None = None

    def __post_init__(self) -> None:
        """Checks that the parts belong together."""
        names = check_parts([(part.codec.image_shape, part.bytes_per_class, part.class_names) for part in self.parts])
        if self.soft is not None:
            check_own_labels([part.soft for part in self.parts])
            written = exchange.described(self.soft.arrays)
            exchange.compare(written, self.soft.spec.arrays(len(self.labels), len(names)))

    @property
    def class_names(self) -> tuple[str, ...]:
        """One per class of the whole."""
        return tuple(name for part in self.parts for name in part.class_names)

    @property
    def bytes_per_class(self) -> int:
        """The budget that every part was made for."""
        return self.parts[0].bytes_per_class

    @property
    def labels(self) -> np.ndarray:
        """Labels ``[n]`` int32 among the classes of the whole, in ascending order."""
        return joined([part.labels for part in self.parts], self._sizes)

    @property
    def soft_labels(self) -> jax.Array | None:
        """Soft labels ``[n, k]`` float32 among the classes of the whole, or None where no part has them.

        A part knows of its own classes only: the others have probability 0. A part without soft labels has ones and
        zeros.
        """
        if self.soft is not None:
            return self.soft.probabilities()
        import jax.numpy as jnp

        own = [None if part.soft is None else np.asarray(part.soft_labels) for part in self.parts]
        rows = joined_soft([part.labels for part in self.parts], own, self._sizes)
        return None if rows is None else jnp.asarray(rows)

    @property
    def _sizes(self) -> list[int]:
        return [len(part.class_names) for part in self.parts]

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays of all parts, and of the labels of the whole."""
        return sum(part.nbytes for part in self.parts) + (0 if self.soft is None else self.soft.nbytes)

    def images(self, size: tuple[int, ...] | None = None) -> jax.Array:
        """Decodes all images, ``[n, h, w, c]`` around [0,1], at the native or any other (height, width)."""
        import jax.numpy as jnp

        return jnp.concatenate([part.images(size) for part in self.parts])

    def save(self, path: synset.Location, *, format: Literal["safetensors", "orbax"] = "safetensors") -> dict[str, int]:
        """Writes the set into the directory ``path``: a directory for each part, and a manifest that names them.

        Labels of the whole are a file beside them. With ``format="orbax"`` every part is an orbax checkpoint.

        The directory of a part is named after its content, and the manifest is replaced last: a crash leaves the old
        set or the new one. Then the parts of the set that was replaced are removed.

        Returns:
            Sizes in bytes, summed over the parts, as `SynSet.save` returns them; the manifest of the whole included.
        """
        names = [f"part{i}-{_digest(part)}" for i, part in enumerate(self.parts)]
        written = [part.save(f"{path}/{name}", format=format) for name, part in zip(names, self.parts, strict=True)]
        keys = dict.fromkeys(key for each in written for key in each)
        sizes = {key: sum(each.get(key, 0) for each in written) for key in keys}
        entry: dict[str, Any] = {}
        if self.soft is not None:
            data = exchange.serialize(self.soft.arrays)
            digest = hashlib.sha256(data).hexdigest()
            name = f"labels-{digest[:12]}.safetensors"
            files.write_bytes(f"{path}/{name}", data)
            entry = {"labels": dataclasses.asdict(self.soft.spec), "labels_file": name, "labels_sha256": digest}
            sizes |= {"labels": self.soft.nbytes, "payload": sizes["payload"] + self.soft.nbytes}
            sizes |= {"header": sizes["header"] + len(data) - self.soft.nbytes, "file": sizes["file"] + len(data)}
        manifest = {
            "format": FORMATS[bool(entry)],
            "parts": names,
            **entry,
            "class_names": list(self.class_names),
            "payload": sizes["payload"],
            "meta": self.meta,
        }
        own = synset.replace_manifest(path, manifest, [*names, entry.get("labels_file", "")])
        return sizes | {"manifest": sizes["manifest"] + own}


def load(path: synset.Location) -> SynSet | MergedSet:
    """Reads a distilled set back, whole or merged; the training data need not be there.

    Args:
        path: A directory that `SynSet.save` or `MergedSet.save` wrote, or that of a run that exported a set; or where
            there is no such path, the name of a released set, such as ``cifar10_packed_12k``.

    Raises:
        FileNotFoundError: There is no manifest, or a part is missing.
        ValueError: The files are damaged, do not belong together, or come from a newer format.
    """
    folder, whole = read_manifest(path)
    if whole is None:
        return synset.load(folder)
    from gsdd_jax.labels import SoftLabels

    parts, soft = tuple(synset.load(folder / name) for name in whole.parts), None
    if whole.labels is not None:
        images, classes = sum(part.codec.num_images for part in parts), len(whole.class_names)
        rows = exchange.narrowed(read_labels(folder, whole, images), whole.labels.arrays(images, classes))
        soft = SoftLabels(whole.labels, len(whole.class_names), rows)
    with synset.naming(folder / synset.MANIFEST):
        merged = MergedSet(parts, whole.meta, soft)
        check_names(merged.class_names, whole)
    return merged


def read_manifest(path: synset.Location) -> tuple[synset.Path, Manifest | None]:
    """Reads the manifest of a merged set; needs no JAX.

    Returns:
        The directory of the set, and the manifest, whose parts are there; None where the set is no merged one.

    Raises:
        FileNotFoundError: There is no manifest, or a part is missing.
        ValueError: The manifest is damaged.
    """
    folder = synset.folder_of(path)
    if not (folder / synset.MANIFEST).exists():
        return folder, None
    manifest = synset.stated(folder / synset.MANIFEST, _manifest)
    for name in () if manifest is None else manifest.parts:
        if not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder / name}: missing, although {synset.MANIFEST} names it")
    return folder, manifest


def _manifest(document: Any) -> Manifest | None:
    merged = isinstance(document, dict) and document.get("format") in FORMATS
    return schema.build(Manifest, document) if merged else None


def read_labels(folder: synset.Path, manifest: Manifest, num_images: int) -> dict[str, np.ndarray]:
    """Reads and checks the labels of a merged set of so many images; needs no JAX.

    Raises:
        FileNotFoundError: Their file is missing.
        ValueError: The file is damaged, or does not belong to the manifest.
    """
    assert manifest.labels is not None
    path, classes = folder / manifest.labels_file, len(manifest.class_names)
    file = synset.arrays_file(path)
    with synset.naming(path):
        expected = manifest.labels.arrays(num_images, classes)
        exchange.compare(file.arrays, expected)
        rows = file.values({}, manifest.labels_sha256)
        manifest.labels.unpack(rows, classes)
    return rows


def check_parts(parts: Sequence[tuple[tuple[int, ...], int, Sequence[str]]]) -> tuple[str, ...]:
    """Checks that parts, given as (image shape, bytes per class, class names), belong together.

    Returns:
        The names of all classes.

    Raises:
        ValueError: They do not.
    """
    if not parts:
        raise InputError("parts: expected at least one set, found none")
    for i, part in enumerate(parts):
        for what, found, expected in zip(("images", "bytes_per_class"), part, parts[0], strict=False):
            if found != expected:
                raise InputError(f"parts: part {i} has {what} {found}, part 0 has {expected}; expected the same")
    names = tuple(name for *_, own in parts for name in own)
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise InputError(f"parts: class {twice!r} is there twice; expected every class in one part")
    return names


def check_own_labels(own: Sequence[Any]) -> None:
    """Raises where there are soft labels of the whole and of parts, None for parts without."""
    if any(one is not None for one in own):
        raise InputError("soft: parts have soft labels of their own; expected either, found both")


def check_names(found: Sequence[str], manifest: Manifest) -> None:
    """Raises where the manifest of the whole names other classes than its parts."""
    if found != manifest.class_names:
        raise InputError(f"class_names: expected those of the parts, {list(found)}; found {list(manifest.class_names)}")


def joined(labels: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    """Returns labels ``[n]`` among the classes of the whole, given those of the parts and their numbers of classes."""
    first = np.cumsum([0, *sizes[:-1]], dtype=np.int32)
    return np.concatenate([start + own for start, own in zip(first, labels, strict=True)])


def joined_soft(
    labels: Sequence[np.ndarray], soft: Sequence[np.ndarray | None], sizes: Sequence[int]
) -> np.ndarray | None:
    """Returns soft labels ``[n, k]`` float32 among the classes of the whole, or None where no part has any.

    See `MergedSet.soft_labels`.
    """
    if all(own is None for own in soft):
        return None
    rows, first = [], 0
    for hard, own, size in zip(labels, soft, sizes, strict=True):
        whole = np.zeros((len(hard), sum(sizes)), np.float32)
        whole[:, first : first + size] = np.eye(size, dtype=np.float32)[hard] if own is None else own
        rows.append(whole)
        first += size
    return np.concatenate(rows)


def _digest(part: SynSet) -> str:
    described = part.class_names, part.bytes_per_class, part.meta, synset.fingerprint([part])
    return hashlib.sha256(repr(described).encode()).hexdigest()[:12]
