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
from gsdd_jax import labels as soft_labels

FORMAT = "gsdd_jax/1"
ARRAYS = "synset.safetensors"
MANIFEST = "manifest.json"
# Where a run directory keeps its exported set.
EXPORT = "export"


@dataclasses.dataclass(frozen=True)
class SynSet:
    """A distilled set, ready to render and to train on.

    Attributes:
        codec: How ``params`` become images.
        params: Parameters at stored precision, as float32.
        bytes_per_class: The budget that the set was made for.
        class_names: One per class.
        meta: Anything else that was recorded: dataset, objective, normalisation, versions.
        soft: Soft labels as they are written, or None where the order of the images says all.

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
    soft: soft_labels.SoftLabels | None = None

    @property
    def labels(self) -> np.ndarray:
        """Labels ``[n]`` int32; image ``i`` has label ``i // images_per_class``."""
        return np.repeat(np.arange(self.codec.num_classes, dtype=np.int32), self.codec.images_per_class)

    @property
    def soft_labels(self) -> jax.Array | None:
        """Soft labels ``[n, k]`` float32 as stored, or None."""
        return None if self.soft is None else self.soft.probabilities()

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays, soft labels included."""
        return self.codec.nbytes(self.params) + (0 if self.soft is None else self.soft.nbytes)

    def images(self, size: tuple[int, int] | None = None) -> jax.Array:
        """Decodes all images, ``[n, h, w, c]`` around [0,1], at the native or any other (height, width)."""
        return jax.jit(lambda params: self.codec.decode(params, size=size))(self.params)

    def save(self, path: str | Path) -> dict[str, int]:
        """Writes the set into the directory ``path``.

        Returns:
            Sizes in bytes: ``payload`` (what the budget counts), ``header`` (names and shapes of the safetensors
            format), ``file`` (their sum, the size of the file) and ``manifest``; with soft labels also ``labels``,
            their part of the payload.

        Raises:
            ValueError: Soft labels that are not one per image.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = folder / ARRAYS
        # Written beside and renamed, so that a crash never leaves half a set under the final name.
        fresh = folder / (ARRAYS + ".new")
        written = self.codec.pack(self.codec.stored(self.params))
        if self.soft is not None:
            expected = soft_labels.layout(self.soft.spec, self.codec.num_images, self.codec.num_classes)
            _check_arrays(arrays, self.soft.arrays, expected)
            written = {**written, **self.soft.arrays}
        save_file(jax.tree.map(jnp.asarray, written), fresh)
        with fresh.open("rb") as file:
            header = 8 + struct.unpack("<Q", file.read(8))[0]
        sizes = {"payload": storage.nbytes(written), "header": header, "file": fresh.stat().st_size}
        sizes |= {} if self.soft is None else {"labels": self.soft.nbytes}
        manifest = {
            "format": FORMAT,
            "codec": dataclasses.asdict(self.codec.spec),
            "image_shape": list(self.codec.image_shape),
            "num_classes": self.codec.num_classes,
            "images_per_class": self.codec.images_per_class,
            "bytes_per_class": self.bytes_per_class,
            "class_names": list(self.class_names),
            **({} if self.soft is None else {"labels": self.soft.entry}),
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
    folder = Path(path)
    if not (folder / MANIFEST).exists() and (folder / EXPORT / MANIFEST).exists():
        folder = folder / EXPORT
    if not (folder / MANIFEST).exists():
        raise FileNotFoundError(
            f"{folder}: no distilled set here (expected {MANIFEST}, or {EXPORT}/{MANIFEST} of a run)"
        )
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
        entry = manifest.get("labels")
        label_spec = soft_labels.LabelSpec() if entry is None else soft_labels.described(entry, classes)
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / MANIFEST}: damaged manifest ({type(error).__name__}: {error})") from error
    try:
        written = load_file(folder / ARRAYS)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder / ARRAYS}: missing, although {MANIFEST} is there") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / ARRAYS}: damaged file ({error})") from error
    of_labels = soft_labels.layout(label_spec, codec.num_images, classes)
    _check_arrays(folder / ARRAYS, written, codec.layout() | of_labels)
    soft = None
    try:
        if of_labels:
            rows = {name: np.asarray(written.pop(name)) for name in of_labels}
            soft_labels.unpack(rows, label_spec, classes)
            soft = soft_labels.SoftLabels(label_spec, classes, rows)
        stored = codec.unpack(written)
    except ValueError as error:
        raise ValueError(f"{folder / ARRAYS}: {error}") from error
    return SynSet(codec, codec.loaded(jax.tree.map(jnp.asarray, stored)), available, names, meta, soft)


def _check_arrays(path: Path, written: dict[str, Any], layout: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Compares names, shapes and dtypes with what is written for a set of this size."""
    want = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in layout.items()}
    have = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in written.items()}
    for name in sorted(want.keys() | have.keys()):
        if want.get(name) != have.get(name):
            raise ValueError(f"{path}: {name}: expected {want.get(name, 'nothing')}, found {have.get(name, 'nothing')}")
