"""The distilled set as an artifact: stored parameters, labels and metadata.

One safetensors file and one JSON manifest, or both as an orbax checkpoint, see `orbax_set`. Data only, never code:
reading a set decodes arrays and JSON, nothing is unpickled. The manifest says how to decode; the safetensors file holds
exactly the bytes that the budget counts, plus its own header of names and shapes, which is counted apart. What
`exchange` checks happens before an array is read.

JAX is imported where it is needed, so that `read` works without it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol, TypeVar

import numpy as np

from gsdd_jax import exchange, files, orbax_set
from gsdd_jax.exchange import Array, Manifest

if TYPE_CHECKING:
    import jax

    from gsdd_jax import codecs
    from gsdd_jax.labels import SoftLabels

FORMAT = exchange.FORMATS[-1]
ARRAYS = "synset.safetensors"
MANIFEST = "manifest.json"
# What sets consist of, whole and merged ones.
_PARTS = re.compile(r"synset(-[0-9a-f]{12})?\.safetensors|labels-[0-9a-f]{12}\.safetensors|part\d+-[0-9a-f]{12}")
# Where a run directory keeps its exported set.
EXPORT = "export"

Location = str | Path


class _Decoder(Protocol):
    """What is made from a manifest: it knows the arrays that its set is written as."""

    @property
    def layout(self) -> Callable[[], Mapping[str, Any]]: ...


D = TypeVar("D", bound=_Decoder)


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

    Example:
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

    def images(self, size: tuple[int, int] | None = None) -> jax.Array:
        """Decodes all images, ``[n, h, w, c]`` around [0,1], at the native or any other (height, width)."""
        import jax

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
            Sizes in bytes: ``payload`` (what the budget counts), ``header`` (names and shapes of the safetensors
            format), ``file`` (their sum, the size of the file) and ``manifest``; with soft labels also ``labels``,
            their part of the payload.

        Raises:
            ValueError: Soft labels that are not one per image, a set beyond what :func:`load` accepts of anyone, an
                unknown format, or a directory with something in it where a checkpoint should be.
        """
        from gsdd_jax import storage

        if format not in ("safetensors", "orbax"):
            raise ValueError(f"format: expected safetensors or orbax, found {format!r}")
        if state is not None and format != "orbax":
            raise ValueError("state: only format='orbax' keeps it")
        folder = Path(path)
        written = self.codec.pack(self.codec.quantize(self.params))
        if self.soft is not None:
            found = {name: Array(str(x.dtype), x.shape) for name, x in self.soft.arrays.items()}
            entry = exchange.Labels(self.soft.spec.dtype, self.soft.spec.top_k)
            with naming(folder / ARRAYS):
                exchange.compare(found, entry.arrays(self.codec.num_images, self.codec.num_classes))
            written = {**written, **self.soft.arrays}
        data = exchange.serialize(written)
        header = 8 + int.from_bytes(data[:8], "little")
        digest = hashlib.sha256(data).hexdigest()
        sizes = {"payload": storage.nbytes(written), "header": header, "file": len(data)}
        sizes |= {} if self.soft is None else {"labels": self.soft.nbytes}
        manifest = {
            "format": FORMAT,
            "codec": dataclasses.asdict(self.codec.spec),
            "image_shape": list(self.codec.image_shape),
            "num_classes": self.codec.num_classes,
            "images_per_class": self.codec.images_per_class,
            "bytes_per_class": int(self.bytes_per_class),
            "class_names": list(self.class_names),
            **({} if self.soft is None else {"labels": self.soft.entry}),
            "sizes": sizes,
            "sha256": digest,
            "meta": self.meta,
        }
        text = json.dumps(manifest, indent=1).encode()
        # What could not be read again does not replace what can.
        document = exchange.parse_json(text, exchange.MANIFEST_BYTES)
        exchange.settings_of(type(self.codec.spec), exchange.manifest_of(document).codec)
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
        path: A directory that :meth:`SynSet.save` wrote in either form, or that of a run that exported one.

    Raises:
        FileNotFoundError: There is no manifest, or no file of arrays.
        ValueError: The files are damaged, do not belong together, or come from a newer format.
    """
    import jax
    import jax.numpy as jnp

    manifest, codec, written = read(path, _codec, bfloat16=lambda bits: bits.view(jnp.bfloat16))
    soft, entry = None, manifest.labels
    folder = folder_of(path)
    with naming(folder / ARRAYS if (folder / MANIFEST).exists() else folder):
        if entry is not None:
            rows = {name: written.pop(name) for name in entry.arrays(manifest.num_images, manifest.num_classes)}
            exchange.soft_labels(rows, entry, manifest.num_classes)
            soft = soft_of(entry, rows, manifest.num_classes)
        params = codec.dequantize(jax.tree.map(jnp.asarray, codec.unpack(written)))
    return SynSet(codec, params, manifest.bytes_per_class, manifest.class_names, manifest.meta, soft)


def read(
    path: Location,
    make: Callable[[Manifest, int], D],
    *,
    bfloat16: Callable[[np.ndarray], np.ndarray] = exchange.widened,
) -> tuple[Manifest, D, dict[str, np.ndarray]]:
    """Reads the files of a set and checks them; needs no JAX.

    Args:
        path: As for :func:`load`.
        make: ``(manifest, payload) -> decoder``, something that knows the arrays of the set; raises ValueError where
            no file with so many bytes of arrays holds such a set.
        bfloat16: Gives bfloat16 numbers, which NumPy does not have, from their bits as uint16; float32 by default.

    Returns:
        The manifest, the decoder, and the arrays as they are written.

    Raises:
        FileNotFoundError: There is no manifest, or no file of arrays.
        ValueError: The files are damaged, do not belong together, or come from a newer format.
    """
    folder = folder_of(path)
    in_file = (folder / MANIFEST).exists()
    names = folder / (MANIFEST if in_file else orbax_set.METADATA)
    with opened(names) as (file, _), naming(names):
        manifest = _manifest(file.read(exchange.MANIFEST_BYTES + 1), (lambda x: x) if in_file else orbax_set.metadata)
    with (_file if in_file else _checkpoint)(folder, manifest) as (arrays, found, get):
        with naming(names):
            decoder = make(manifest, sum(array.nbytes for array in found.values()))
            expected = expected_arrays(decoder, manifest)
            needed = -(-sum(array.nbytes for array in expected.values()) // manifest.num_classes)
            exchange.check_integer(manifest.bytes_per_class, "bytes_per_class", needed, exchange.BUDGET)
        with naming(arrays):
            exchange.compare(found, expected)
            written = get()
    return (
        manifest,
        decoder,
        {name: bfloat16(x) if expected[name].dtype == "bfloat16" else x for name, x in written.items()},
    )


# Where a set's arrays are, what they are, and how they are read once that was compared with what the set needs.
Arrays = tuple[Path, Mapping[str, Array], Callable[[], dict[str, np.ndarray]]]


@contextmanager
def _file(folder: Path, manifest: Manifest) -> Iterator[Arrays]:
    # Under this name only where the writer was killed before its last step.
    path = _named(folder, manifest.sha256)
    if not manifest.sha256 or not path.exists():
        path = folder / ARRAYS
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing, although {MANIFEST} is there")
    with opened(path) as (file, size):
        with naming(path):
            header = exchange.read_header(file, size)
        yield (
            path,
            header.arrays,
            lambda: exchange.read_arrays(file, header, manifest.sizes, manifest.sha256),
        )


@contextmanager
def _checkpoint(folder: Path, manifest: Manifest) -> Iterator[Arrays]:
    with naming(folder):
        found, restore = orbax_set.contents(folder)

    def get() -> dict[str, np.ndarray]:
        data = exchange.serialize(restore())
        header = exchange.read_header(file := io.BytesIO(data), len(data))
        return exchange.read_arrays(file, header, manifest.sizes, manifest.sha256)

    yield folder, found, get


def expected_arrays(decoder: _Decoder, manifest: Manifest) -> dict[str, Array]:
    """Returns names, dtypes and shapes of all arrays that the file of a set must hold, and no others."""
    labels = {} if manifest.labels is None else manifest.labels.arrays(manifest.num_images, manifest.num_classes)
    return {name: Array(str(leaf.dtype), tuple(leaf.shape)) for name, leaf in decoder.layout().items()} | labels


def folder_of(path: Location) -> Path:
    """Returns the folder with the manifest of a set, in either form: the path itself, or the export of a run.

    Raises:
        FileNotFoundError: There is no manifest.
    """
    folder = Path(path)
    if not (folder / MANIFEST).exists() and (folder / EXPORT / MANIFEST).exists():
        folder = folder / EXPORT
    if not (folder / MANIFEST).exists() and not (folder / orbax_set.METADATA).exists():
        raise FileNotFoundError(
            f"{folder}: no distilled set here (expected {MANIFEST}, or {EXPORT}/{MANIFEST} of a run)"
        )
    return folder


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a file and gives its size; a pipe or a device, which may have no end, is refused unopened."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a regular file")
    with path.open("rb") as file:
        yield file, os.fstat(file.fileno()).st_size


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file in front of what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _manifest(raw: bytes, inside: Callable[[Any], Any]) -> Manifest:
    try:
        document = exchange.parse_json(raw, exchange.MANIFEST_BYTES)
    except ValueError as error:
        raise ValueError(f"damaged manifest ({error})") from error
    return exchange.manifest_of(inside(document))


def _codec(manifest: Manifest, payload: int) -> codecs.Codec:
    """Builds the codec of a manifest.

    Its budget is what the file could hold, so that it refuses larger sets before it makes anything of their size.
    """
    from gsdd_jax import codecs

    name = manifest.codec.get("name")
    if type(name) is not str or name not in codecs.SPECS:
        raise ValueError(f"codec.name: expected one of {', '.join(codecs.SPECS)}; found {exchange.short(name)}")
    spec = exchange.settings_of(codecs.SPECS[name], manifest.codec)
    room = -(-(2 * payload + exchange.SLACK) // manifest.num_classes)
    try:
        codec = codecs.make(
            spec, image_shape=manifest.image_shape, num_classes=manifest.num_classes, bytes_per_class=room
        )
    except ValueError as error:
        raise ValueError(f"codec: {payload} bytes of arrays are no such set ({error})") from error
    for field in dataclasses.fields(spec):
        if getattr(spec, field.name) != getattr(codec.spec, field.name):
            found = exchange.short(getattr(spec, field.name))
            raise ValueError(f"codec.{field.name}: expected what the set was made with, found {found}")
    if codec.images_per_class != manifest.images_per_class:
        raise ValueError(f"images_per_class: expected {codec.images_per_class}, found {manifest.images_per_class}")
    return codec


def check_codec(codec: codecs.Codec) -> None:
    """Tells whether sets of a codec can be written and read back; computes nothing.

    A codec from outside is thus refused before there is a set to lose.

    Raises:
        ValueError: A file cannot hold its arrays or a manifest its settings, or these make another codec.
    """
    import jax
    import jax.numpy as jnp

    from gsdd_jax import storage

    def refused(what: object) -> ValueError:
        return ValueError(f"codec.name: sets of {codec.name!r} could not be read back: {what}")

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
        read = _codec(
            Manifest(
                codec=json.loads(json.dumps(dataclasses.asdict(codec.spec))),
                image_shape=codec.image_shape,
                num_classes=codec.num_classes,
                images_per_class=codec.images_per_class,
                bytes_per_class=1,
                class_names=(),
                meta={},
                sizes={},
                sha256="",
                labels=None,
            ),
            size,
        )
    except (TypeError, ValueError) as error:
        raise refused(error) from error
    if read.layout() != layout:
        raise refused(f"expected arrays {layout}, found {read.layout()} from the settings in its spec")


def write_labels(path: Location, soft: SoftLabels) -> tuple[dict[str, Any], int]:
    """Writes the labels of a merged set into a directory, under a name from their content.

    Returns:
        The entries of the manifest, and the size of the file.
    """
    folder = Path(path)
    data = exchange.serialize(soft.arrays)
    digest = hashlib.sha256(data).hexdigest()
    name = f"labels-{digest[:12]}.safetensors"
    files.write_bytes(folder / name, data)
    return {"labels": soft.entry, "labels_file": name, "labels_sha256": digest}, len(data)


def soft_of(entry: exchange.Labels, rows: dict[str, np.ndarray], num_classes: int) -> SoftLabels:
    """Makes soft labels of what was read; bfloat16 ones in that type."""
    from gsdd_jax.labels import LabelSpec, SoftLabels

    spec = LabelSpec(kind="soft", dtype=entry.dtype, top_k=entry.top_k)  # type: ignore[arg-type]
    return SoftLabels(spec, num_classes, rows)


def read_labels(
    folder: Path,
    manifest: dict[str, Any],
    num_images: int,
    *,
    bfloat16: Callable[[np.ndarray], np.ndarray] = exchange.widened,
) -> tuple[exchange.Labels, dict[str, np.ndarray], int]:
    """Reads and checks the labels of a merged set; needs no JAX.

    Args:
        folder: Its directory.
        manifest: Its manifest.
        num_images: Of all parts.
        bfloat16: As for :func:`read`.

    Returns:
        How they are written, the arrays, and the number of classes.

    Raises:
        FileNotFoundError: Their file is missing.
        ValueError: The manifest or the file is damaged, or they do not belong together.
    """
    with naming(folder / MANIFEST):
        try:
            classes = len(manifest["class_names"])
            entry = exchange.labels_of(manifest["labels"], classes)
            name, digest = manifest["labels_file"], manifest["labels_sha256"]
            check_names([name], "labels_file")
        except (KeyError, TypeError) as error:
            raise ValueError(f"damaged manifest ({type(error).__name__}: {error})") from error
        if type(digest) is not str or len(digest) != 2 * hashlib.sha256().digest_size:
            raise ValueError(f"labels_sha256: expected 64 hexadecimal digits, found {exchange.short(digest)}")
    file = folder / name
    if not file.exists():
        raise FileNotFoundError(f"{file}: missing, although {MANIFEST} names it")
    with opened(file) as (stream, size), naming(file):
        header = exchange.read_header(stream, size)
        exchange.compare(header.arrays, entry.arrays(num_images, classes))
        arrays = exchange.read_arrays(stream, header, {}, digest)
        rows = {key: bfloat16(x) if header.arrays[key].dtype == "bfloat16" else x for key, x in arrays.items()}
        exchange.soft_labels(rows, entry, classes)
    return entry, rows, classes


def check_names(names: Any, key: str) -> None:
    """Lets a manifest name nothing outside its own directory.

    Raises:
        TypeError: What stands under the key is no list of such names.
    """
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{key} {names!r}")
    for name in names:
        if not name or name.startswith(".") or "/" in name or "\\" in name:
            raise TypeError(f"{key}: {name!r} is no name of something in this directory")


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
