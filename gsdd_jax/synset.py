"""The distilled set as an artefact: stored parameters, labels and metadata.

One safetensors file and one JSON manifest. Data only, never code: reading a set decodes arrays and JSON, nothing is
unpickled. The manifest says how to decode; the safetensors file holds exactly the bytes that the budget counts, plus
its own header of names and shapes, which is counted apart.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from gsdd_jax import codecs, storage

FORMAT = "gsdd_jax/1"
ARRAYS = "synset.safetensors"
MANIFEST = "manifest.json"
# Where a run directory keeps its exported set.
EXPORT = "export"

Place = str | Path


@dataclasses.dataclass(frozen=True)
class SynSet:
    """A distilled set, ready to render and to train on.

    Attributes:
        codec: How ``params`` become images.
        params: Parameters at stored precision, as float32.
        bytes_per_class: The budget that the set was made for.
        class_names: One per class.
        meta: Anything else that was recorded: dataset, objective, normalisation, versions.

    Example:
        A set of two classes with one 4x4 grey image each:

        >>> import jax.numpy as jnp
        >>> codec = codecs.make(codecs.PixelSpec(), image_shape=(4, 4, 1), num_classes=2, bytes_per_class=64)
        >>> synset = SynSet(codec, codec.init(None, jnp.zeros((2, 4, 4, 1))), 64, ("a", "b"))
        >>> synset.images().shape, synset.labels.tolist(), synset.nbytes
        ((2, 4, 4, 1), [0, 1], 128)
    """

    codec: codecs.Codec
    params: Any
    bytes_per_class: int
    class_names: tuple[str, ...]
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def labels(self) -> np.ndarray:
        """Labels ``[n]`` int32; image ``i`` has label ``i // images_per_class``."""
        return np.repeat(np.arange(self.codec.num_classes, dtype=np.int32), self.codec.images_per_class)

    @property
    def parts(self) -> tuple[SynSet, ...]:
        """The sets that it consists of: itself; see `gsdd_jax.merged.MergedSet`."""
        return (self,)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays."""
        return self.codec.nbytes(self.params)

    def images(self, size: tuple[int, int] | None = None) -> jax.Array:
        """Decodes all images, ``[n, h, w, c]`` around [0,1], at the native or any other (height, width)."""
        return jax.jit(lambda params: self.codec.decode(params, size=size))(self.params)

    def save(self, path: str | Path) -> dict[str, int]:
        """Writes the set into the directory ``path``.

        Returns:
            Sizes in bytes: ``payload`` (what the budget counts), ``header`` (names and shapes of the safetensors
            format), ``file`` (their sum, the size of the file) and ``manifest``.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = folder / ARRAYS
        # Written beside and renamed, so that a crash never leaves half a set under the final name.
        fresh = folder / (ARRAYS + ".new")
        written = self.codec.pack(self.codec.stored(self.params))
        save_file(jax.tree.map(jnp.asarray, written), fresh)
        with fresh.open("rb") as file:
            header = 8 + struct.unpack("<Q", file.read(8))[0]
        sizes = {"payload": storage.nbytes(written), "header": header, "file": fresh.stat().st_size}
        manifest = {
            "format": FORMAT,
            "codec": dataclasses.asdict(self.codec.spec),
            "image_shape": list(self.codec.image_shape),
            "num_classes": self.codec.num_classes,
            "images_per_class": self.codec.images_per_class,
            "bytes_per_class": self.bytes_per_class,
            "class_names": list(self.class_names),
            "sizes": sizes,
            "meta": self.meta,
        }
        text = json.dumps(manifest, indent=1)
        fresh_manifest = folder / (MANIFEST + ".new")
        fresh_manifest.write_text(text)
        fresh.replace(arrays)
        fresh_manifest.replace(folder / MANIFEST)
        return {**sizes, "manifest": len(text.encode())}


def load(path: str | Path) -> SynSet:
    """Reads a distilled set back; the training data need not be there.

    Args:
        path: A directory that :meth:`SynSet.save` wrote, or the directory of a run that exported one.

    Raises:
        FileNotFoundError: There is no manifest.
        ValueError: The files are damaged, do not belong together, or come from a newer format.
    """
    folder = folder_of(path)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        found = manifest["format"]
        if found != FORMAT:
            raise ValueError(f"{folder / MANIFEST}: format: expected {FORMAT!r}, found {found!r}")
        fields = dict(manifest["codec"])
        if fields.get("name") not in codecs.SPECS:
            raise ValueError(
                f"{folder / MANIFEST}: codec.name: expected one of {', '.join(codecs.SPECS)}; "
                f"found {fields.get('name')!r}"
            )
        spec = codecs.SPECS[fields["name"]](**fields)
        shape, classes, available = (manifest[key] for key in ("image_shape", "num_classes", "bytes_per_class"))
        meta, names = manifest["meta"], tuple(manifest["class_names"])
        if len(shape) != 3 or len(names) != classes or any(type(x) is not int or x < 1 for x in (*shape, available)):
            raise TypeError(
                f"image_shape {shape}, num_classes {classes}, bytes_per_class {available}, {len(names)} class_names"
            )
        codec = codecs.make(spec, image_shape=shape, num_classes=classes, bytes_per_class=available)
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / MANIFEST}: damaged manifest ({type(error).__name__}: {error})") from error
    try:
        written = load_file(folder / ARRAYS)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder / ARRAYS}: missing, although {MANIFEST} is there") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / ARRAYS}: damaged file ({error})") from error
    _check_arrays(folder / ARRAYS, written, codec)
    try:
        stored = codec.unpack(written)
    except ValueError as error:
        raise ValueError(f"{folder / ARRAYS}: {error}") from error
    return SynSet(codec, codec.loaded(jax.tree.map(jnp.asarray, stored)), available, names, meta)


def _check_arrays(path: Path, written: dict[str, jax.Array], codec: codecs.Codec) -> None:
    """Compares names, shapes and dtypes with what the codec writes for a set of this size."""
    want = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in codec.layout().items()}
    have = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in written.items()}
    for name in sorted(want.keys() | have.keys()):
        if want.get(name) != have.get(name):
            raise ValueError(f"{path}: {name}: expected {want.get(name, 'nothing')}, found {have.get(name, 'nothing')}")


def folder_of(path: Place) -> Path:
    """Returns the folder with the manifest of a set: the path itself, or the export of a run directory.

    Raises:
        FileNotFoundError: There is no manifest.
    """
    folder = Path(path)
    if not (folder / MANIFEST).exists() and (folder / EXPORT / MANIFEST).exists():
        folder = folder / EXPORT
    if not (folder / MANIFEST).exists():
        raise FileNotFoundError(
            f"{folder}: no distilled set here (expected {MANIFEST}, or {EXPORT}/{MANIFEST} of a run)"
        )
    return folder


def replace_manifest(path: Place, manifest: dict[str, Any]) -> int:
    """Replaces the manifest of a folder at once, so that it is the old one or the new one; returns its bytes."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(manifest, indent=1)
    fresh = folder / (MANIFEST + ".new")
    fresh.write_text(text)
    fresh.replace(folder / MANIFEST)
    return len(text.encode())
