"""The distilled set as an artifact: stored parameters, labels and metadata.

One safetensors file and one JSON manifest, or both as an orbax checkpoint, see `orbax_set`. Data only, never code:
reading a set decodes arrays and JSON, nothing is unpickled. The manifest says how to decode; the safetensors file holds
exactly the bytes that the budget counts, plus its own header of names and shapes, which is counted apart.

JAX is imported where it is needed, so that `read` works without it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from gsdd_jax import exchange, files, manifest, orbax_set
from gsdd_jax.errors import InputError
from gsdd_jax.manifest import FORMATS, Manifest

if TYPE_CHECKING:
    import jax

    from gsdd_jax import codecs
    from gsdd_jax.labels import SoftLabels

ARRAYS = "synset.safetensors"
MANIFEST = "manifest.json"
# What sets consist of, whole and merged ones.
_PARTS = re.compile(r"synset(-[0-9a-f]{12})?\.safetensors|labels-[0-9a-f]{12}\.safetensors|part\d+-[0-9a-f]{12}")
# Where a run directory keeps its exported set.
EXPORT = "export"
# Run directories of the checkout, which a wheel has as well.
RELEASED = Path(__file__).with_name("sets")

Location = str | Path


D = TypeVar("D")


@dataclasses.dataclass(frozen=True)
class SynSet:
    """A distilled set, ready to render and to train on; a pytree of its parameters and soft labels.

    All else is the same before and after a transformation of JAX, ``meta`` included: what is compiled for one set
    serves others of equal codec, names and meta, and sets are stacked where these are equal.

    Attributes:
        codec: How ``params`` become images.
        params: Parameters at stored precision, as float32.
        bytes_per_class: The budget that the set was made for.
        class_names: One per class.
        meta: Anything else that was recorded: dataset, objective, normalization, versions.
        soft: Soft labels as they are written, or None where the order of the images says all.

    Examples:
        A set of two classes with one 4x4 gray image each:

        >>> import jax.numpy as jnp
        >>> from gsdd_jax import codecs
        >>> codec = codecs.make(codecs.PixelSpec(), image_shape=(4, 4, 1), num_classes=2, bytes_per_class=64)
        >>> synset = SynSet(codec, codec.init(None, jnp.zeros((2, 4, 4, 1))), 64, ("a", "b"))
        >>> synset.images().shape, synset.labels.tolist(), synset.nbytes
        ((2, 4, 4, 1), [0, 1], 128)
    """

    codec: codecs.Codec
    params: Any
    bytes_per_class: int
    class_names: tuple[str, ...]
    # No part of the hash, which dictionaries do not have.
    meta: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    soft: SoftLabels | None = None

    @property
    def labels(self) -> np.ndarray:
        """Labels ``[n]`` int32; image ``i`` has label ``i // images_per_class``."""
        return np.repeat(np.arange(self.codec.num_classes, dtype=np.int32), self.codec.images_per_class)

    @property
    def soft_labels(self) -> jax.Array | None:
        """Soft labels ``[n, k]`` float32 as stored, or None."""
        return None if self.soft is None else self.soft.probabilities()

    @property
    def parts(self) -> tuple[SynSet, ...]:
        """The sets that it consists of: itself; see `gsdd_jax.merged.MergedSet`."""
        return (self,)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays, soft labels included."""
        return self.codec.nbytes(self.params) + (0 if self.soft is None else self.soft.nbytes)

    def images(self, size: tuple[int, ...] | None = None) -> jax.Array:
        """Decodes all images, ``[n, h, w, c]`` around [0,1], at the native or any other (height, width).

        Videos ``[n, t, h, w, c]``, at any (frames, height, width).

        Raises:
            ValueError: A size of another number of sides.
        """
        import jax

        check_size(size, self.codec.image_shape)

        # Compiled once for each size: JAX knows the codec's function again, as it would not know a new lambda.
        return jax.jit(self.codec.decode, static_argnames="size")(self.params, size=size and tuple(size))

    def save(
        self, path: Location, *, format: Literal["safetensors", "orbax"] = "safetensors", state: Any = None
    ) -> dict[str, int]:
        """Writes the set into the directory ``path``.

        Args:
            path: The directory; with orbax, absent or empty.
            format: ``safetensors``: a file of arrays and a manifest, which take the place of a set that is there;
                ``orbax``: a checkpoint of the same arrays, with the manifest as its metadata.
            state: With orbax, what a distillation goes on from, a pytree with the float32 masters as ``params``, such
                as the state of a run; it is a checkpoint of its own in ``state``.

        Returns:
            Sizes in bytes, of ``payload`` (what the budget counts), ``header`` (names and shapes of the safetensors
            format), ``file`` (their sum, the size of the file) and ``manifest``; with soft labels also ``labels``,
            their part of the payload.

        Raises:
            ValueError: Soft labels that are not one per image, a set beyond what `load` accepts of anyone, an
                unknown format, or a directory with something in it where a checkpoint should be.
        """
        from gsdd_jax import storage
        from gsdd_jax.codecs import stored

        if format not in ("safetensors", "orbax"):
            raise InputError(f"format: expected safetensors or orbax, found {format!r}")
        if state is not None and format != "orbax":
            raise InputError("state: only format='orbax' keeps it")
        folder = Path(path)
        written = self.codec.pack(self.codec.quantize(self.params))
        if self.soft is not None:
            with naming(folder / ARRAYS):
                expected = self.soft.spec.arrays(self.codec.num_images, self.codec.num_classes)
                exchange.compare(exchange.described(self.soft.arrays), expected)
            written = {**written, **self.soft.arrays}
        data = exchange.serialize(written)
        payload, digest = storage.nbytes(written), hashlib.sha256(data).hexdigest()
        sizes = {"payload": payload, "header": len(data) - payload, "file": len(data)}
        sizes |= {} if self.soft is None else {"labels": self.soft.nbytes}
        document: dict[str, Any] = {
            "format": FORMATS[-1],
            "codec": dataclasses.asdict(self.codec.spec),
            "image_shape": list(self.codec.image_shape),
            "num_classes": self.codec.num_classes,
            "images_per_class": self.codec.images_per_class,
            "bytes_per_class": int(self.bytes_per_class),
            "class_names": list(self.class_names),
            **({} if self.soft is None else {"labels": dataclasses.asdict(self.soft.spec)}),
            "sizes": sizes,
            "sha256": digest,
            "meta": self.meta,
        }
        text = json.dumps(document, indent=1).encode()
        # What could not be read again does not replace what can.
        with naming(folder / MANIFEST):
            document = exchange.parse_json(text)
            stored.spec_of(manifest.manifest_of(document).codec, type(self.codec.spec))
        if format == "orbax":
            orbax_set.write(folder, written, document, state)
            return {**sizes, "manifest": len(text)}
        folder.mkdir(parents=True, exist_ok=True)
        # The new arrays stand beside the old ones, under their sum, until the new manifest, which says it, is there.
        fresh = files.write_bytes(_named(folder, digest), data)
        files.write_bytes(folder / MANIFEST, text)
        fresh.replace(folder / ARRAYS)
        tidy(folder, {ARRAYS})
        return {**sizes, "manifest": len(text)}


if find_spec("jax") is not None:
    from jax.tree_util import GetAttrKey, register_pytree_with_keys

    register_pytree_with_keys(
        SynSet,
        lambda whole: (
            ((GetAttrKey("params"), whole.params), (GetAttrKey("soft"), whole.soft)),
            dataclasses.replace(whole, params=None, soft=None),
        ),
        lambda rest, data: dataclasses.replace(rest, **dict(zip(("params", "soft"), data, strict=True))),
    )


def check_size(size: Sequence[int] | None, image_shape: Sequence[int]) -> None:
    """Refuses a size that is not one of images, or of videos, of this native shape."""
    names = ("frames", "height", "width")[-(len(image_shape) - 1) :]
    if size is not None and len(size) != len(names):
        raise InputError(f"size: expected ({', '.join(names)}), found {tuple(size)}")


def fingerprint(parts: Iterable[SynSet]) -> str:
    """Returns the hex SHA-256 over the codecs, parameters and labels of a set, as they are stored."""
    import jax

    digest = hashlib.sha256()
    for part in parts:
        spec = part.codec.spec
        # Names of settings as they were at first: sums that runs wrote down stay what they are.
        settings = ", ".join(f"{spec.FORMER.get(name, name)}={value!r}" for name, value in vars(spec).items())
        digest.update(f"({type(spec).__qualname__}({settings}), {part.codec.image_shape!r})".encode())
        arrays = part.codec.quantize(part.params), None if part.soft is None else part.soft.arrays
        for leaf in jax.tree.leaves(arrays):
            digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def load(path: Location) -> SynSet:
    """Reads a distilled set back; the training data need not be there.

    Args:
        path: A directory that `SynSet.save` wrote in either form, or that of a run that exported one; or where there
            is no such path, the name of a released set.

    Raises:
        FileNotFoundError: There is no manifest, or no file of arrays.
        ValueError: The files are damaged, do not belong together, or come from a newer format.
    """
    import jax
    import jax.numpy as jnp

    from gsdd_jax.labels import SoftLabels

    found, codec, arrays = read(path, _codec)
    folder, soft = folder_of(path), None
    with naming(folder / ARRAYS if (folder / MANIFEST).exists() else folder):
        if found.labels is not None:
            rows = exchange.narrowed({name: arrays.pop(name) for name in found.label_arrays}, found.label_arrays)
            found.labels.unpack(rows, found.num_classes)
            soft = SoftLabels(found.labels, found.num_classes, rows)
        written = codec.unpack(exchange.narrowed(arrays, codec.layout()))
        params = codec.dequantize(jax.tree.map(jnp.asarray, written))
    return SynSet(codec, params, found.bytes_per_class, found.class_names, found.meta, soft)


def read(
    path: Location, make: Callable[[Manifest, int], tuple[D, Mapping[str, Any]]]
) -> tuple[Manifest, D, dict[str, np.ndarray]]:
    """Reads the files of a set and checks them; needs no JAX.

    Args:
        path: As for `load`.
        make: ``(manifest, payload) -> (decoder, layout)``, something that is returned, and the arrays that such a set
            is written as, but for labels; raises ValueError where no file with so many bytes of arrays holds it.

    Returns:
        The manifest, the decoder, and the arrays as they are written, but for bfloat16 numbers, which are float32.

    Raises:
        FileNotFoundError: There is no manifest, or no file of arrays.
        ValueError: The files are damaged, do not belong together, or come from a newer format.
    """
    folder = folder_of(path)
    file, names = None, folder / MANIFEST
    if names.exists():
        found = stated(names, manifest.manifest_of)
        # Under its sum only where the writer was killed before its last step.
        arrays = _named(folder, found.sha256)
        if not found.sha256 or not arrays.exists():
            arrays = folder / ARRAYS
        file = arrays_file(arrays)
        held = file.arrays
    else:
        arrays, names = folder, folder / orbax_set.METADATA
        found = stated(names, lambda document: manifest.manifest_of(orbax_set.metadata(document)))
        with naming(folder):
            held, restore = orbax_set.contents(folder)
    with naming(names):
        decoder, layout = make(found, exchange.nbytes(held))
        expected = exchange.described(layout) | found.label_arrays
        needed = -(-exchange.nbytes(expected) // found.num_classes)
        if found.bytes_per_class < needed:
            raise InputError(f"bytes_per_class: expected at least {needed}, found {found.bytes_per_class}")
    with naming(arrays):
        exchange.compare(held, expected)
        file = file or exchange.read(exchange.serialize(restore()))
        return found, decoder, file.values(vars(found.sizes), found.sha256)


def released() -> dict[str, Path]:
    """Returns the run directories of the released sets by their names, which stand for them wherever a set is read."""
    return {folder.name: folder for folder in sorted(RELEASED.glob("*")) if (folder / EXPORT / MANIFEST).exists()}


def located(path: Location) -> Path:
    """Returns the path, or the run directory of the released set of this name where there is no such path."""
    return Path(path) if Path(path).exists() else released().get(str(path), Path(path))


def folder_of(path: Location) -> Path:
    """Returns the folder with the manifest of a set, in either form: the path itself, or the export of a run.

    Args:
        path: As for `load`.

    Raises:
        FileNotFoundError: There is no manifest.
    """
    folder = located(path)
    if not (folder / MANIFEST).exists() and (folder / EXPORT / MANIFEST).exists():
        folder = folder / EXPORT
    if not (folder / MANIFEST).exists() and not (folder / orbax_set.METADATA).exists():
        names = f", and no released set of this name: {', '.join(released())}"
        raise FileNotFoundError(
            f"{folder}: no distilled set here (expected {MANIFEST}, or {EXPORT}/{MANIFEST} of a run)"
            + (names if str(path) == folder.name and not folder.exists() else "")
        )
    return folder


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file in front of what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def stated(path: Path, make: Callable[[Any], D]) -> D:
    """Reads a JSON document, and returns what ``make`` makes of it."""
    raw = _content(path, exchange.MANIFEST_BYTES + 1)
    with naming(path):
        try:
            document = exchange.parse_json(raw)
        except ValueError as error:
            raise InputError(f"damaged manifest ({error})") from error
        return make(document)


def arrays_file(path: Path) -> exchange.File:
    """Reads a file of arrays."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing, although {MANIFEST} is there")
    raw = _content(path)
    with naming(path):
        return exchange.read(raw)


def _content(path: Path, limit: int = -1) -> bytes:
    """Returns the first bytes of a file; a pipe or a device, which may have no end, is refused unopened."""
    if not path.is_file():
        raise InputError(f"{path}: expected a regular file")
    with path.open("rb") as file:
        return file.read(limit)


def _codec(found: Manifest, payload: int) -> tuple[codecs.Codec, Any]:
    from gsdd_jax.codecs import stored

    codec = stored.codec_of(
        found.codec,
        image_shape=found.image_shape,
        num_classes=found.num_classes,
        images_per_class=found.images_per_class,
        nbytes=payload,
    )
    return codec, codec.layout()


def replace_manifest(path: Location, manifest: dict[str, Any], kept: Collection[str]) -> int:
    """Replaces the manifest of a folder at once, so that it is the old one or the new one; returns its bytes.

    Args:
        path: The folder.
        manifest: The new manifest.
        kept: What it names in the folder; parts of what was there before are removed afterwards.
    """
    folder = Path(path)
    text = json.dumps(manifest, indent=1).encode()
    files.write_bytes(folder / MANIFEST, text)
    tidy(folder, kept)
    return len(text)


def tidy(folder: Path, kept: Collection[str]) -> None:
    """Removes the parts of sets from a folder but for those named, and flushes its names to disk."""
    for path in folder.iterdir():
        if path.name not in kept and _PARTS.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    files.sync_folder(folder)
    files.sync_folder(folder.resolve().parent)


def _named(folder: Path, digest: str) -> Path:
    return folder / f"synset-{digest[:12]}.safetensors"
