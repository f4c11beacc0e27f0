"""Write the images of a distilled set for other programs: ``python -m train.export --run DIR --to png --out DIR``.

``--to`` says how:

    png          ``<number>_<class>/<number>.png``, as torchvision's ImageFolder and other readers of folders expect it.
                 The number puts classes in the order of their labels; what a file system may not take becomes ``_``.
    npz          ``images.npz``: ``images [n, h, w, c]`` float32, ``labels``, ``class_names``, ``whiten``, and
                 ``channel_mean`` and ``channel_std`` where the run recorded them; no pickles, ``allow_pickle=False``.
    tfds         a version directory of TensorFlow Datasets in array_record files, for ``tfds.builder_from_directory``
                 and ``data.source=tfds``; one split, ``train``.
    huggingface  an ``imagefolder`` of Hugging Face ``datasets``: ``train/*.png``, ``train/metadata.jsonl`` and a card.
    set          the set itself, two files that `gsdd_jax.load` reads; ``--size`` changes nothing.

Images are those of the codec before any whitening, around [0,1]. PNGs, hence all forms but ``npz``, have 8 bits: values
are clipped to [0,1] and rounded, and what was clipped is reported.

The target must not exist or be empty. It appears under its name when all of it is written.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gsdd_jax import MergedSet, SynSet, exchange, files
from train import results
from train.errors import UserError, exit_cleanly

# In letters; file systems take 255 bytes, and a letter has at most four.
NAME_LENGTH = 50
# Forms that hold any value.
UNCLIPPED = ("set", "npz")
TFDS_NAME, TFDS_VERSION = "distilled", "1.0.0"


class Export(NamedTuple):
    """What is written: a set, its images ``[n, h, w, c]``, and the same as 8-bit PNGs where they are needed."""

    synset: SynSet | MergedSet
    images: np.ndarray
    pngs: list[bytes]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    with exit_cleanly(debug=args.debug or None):
        if args.to not in FORMS:
            raise UserError(f"--to: unknown form {args.to!r}; allowed: {', '.join(FORMS)}")
        size = _size(args.size) if args.size else None
        out = Path(args.out)
        check_target(out)
        synset = _source(Path(args.run), checkpoint=args.checkpoint)
        images = np.asarray(synset.images(size), np.float32)
        clipped = f"{100 * np.mean((images < 0) | (images > 1)):.2f} % of all values were outside [0,1]"
        export = Export(synset, images, [] if args.to in UNCLIPPED else pngs_of(images))
        files.write_folder(out, lambda folder: FORMS[args.to](export, folder))
        h, w, c = images.shape[1:]
        told = f"{clipped} and stay so" if args.to in UNCLIPPED else f"{clipped} and were clipped"
        print(f"{out}: {len(images)} images of {h}x{w}x{c} in {len(synset.class_names)} classes; {told}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.export", description="Write the images of a distilled set for other programs."
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="run directory, or directory of an exported set")
    parser.add_argument("--to", required=True, metavar="FORM", help=", ".join(FORMS))
    parser.add_argument("--out", required=True, metavar="DIR", help="what to make; absent or empty")
    parser.add_argument(
        "--checkpoint", action="store_true", help="the set of the newest checkpoint of the run, which is not finished"
    )
    parser.add_argument("--size", metavar="SIDE", help="such as 64 or 64x96; default: the size of the set")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors too")
    return parser


def _source(run: Path, *, checkpoint: bool) -> SynSet | MergedSet:
    """Returns the set that is written: the exported one of a run, or that of its newest checkpoint."""
    if not checkpoint:
        return results.exported(run)
    # Needs the data and all of training, which exported sets do not.
    from train import distill

    return distill.from_checkpoint(run)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text, re.ASCII)
    sides = [int(side) for side in found.groups() if side] if found else []
    if not sides or not all(1 <= side <= exchange.SIDE for side in sides):
        raise UserError(f"--size: expected a side from 1 to {exchange.SIDE} or HEIGHTxWIDTH, found {text!r}")
    return sides[0], sides[-1]


def check_target(out: Path) -> None:
    """Refuses a directory that could not be made without touching what is there."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; expected an absent or empty directory")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out: {out} is not empty; expected an absent or empty directory")
    if not out.resolve().parent.is_dir():
        raise UserError(f"--out: no such directory: {out.parent}")


def pngs_of(images: np.ndarray) -> list[bytes]:
    """Returns images ``[n, h, w, c]`` as PNGs, clipped to [0,1] and rounded to 8 bits.

    Raises:
        UserError: They are neither grey nor coloured, or a value is not a number.
    """
    channels = images.shape[-1]
    if channels not in (1, 3):
        raise UserError(f"--to: a PNG has 1 or 3 channels, the images have {channels}; expected npz")
    broken = np.isnan(images).any((1, 2, 3))
    if broken.any():
        raise UserError(f"--to: {broken.sum()} of {len(images)} images hold NaN, which a PNG cannot; expected npz")
    pixels = np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8)
    found = []
    for each in pixels[..., 0] if channels == 1 else pixels:
        stream = io.BytesIO()
        Image.fromarray(each).save(stream, "PNG")
        found.append(stream.getvalue())
    return found


def folder_names(class_names: Sequence[str]) -> list[str]:
    """Returns names for folders, one per class: distinct, in the order of the labels, and safe on any file system."""
    digits = len(str(len(class_names) - 1))
    safe = [re.sub(r"[^\w.-]+", "_", name)[:NAME_LENGTH].strip("._") for name in class_names]
    return [f"{i:0{digits}d}_{name}".rstrip("_") for i, name in enumerate(safe)]


def write_png(export: Export, folder: Path) -> None:
    """Writes a folder of PNGs per class."""
    folders = [folder / name for name in folder_names(export.synset.class_names)]
    for each in folders:
        each.mkdir()
    digits = len(str(len(export.pngs) - 1))
    for i, (png, label) in enumerate(zip(export.pngs, export.synset.labels, strict=True)):
        (folders[label] / f"{i:0{digits}d}.png").write_bytes(png)


def write_npz(export: Export, folder: Path) -> None:
    """Writes arrays, the values as they are decoded."""
    meta = export.synset.meta
    recorded = {key: _numbers(meta.get(key)) for key in ("channel_mean", "channel_std")}
    arrays: dict[str, Any] = {
        "images": export.images,
        "labels": export.synset.labels,
        "class_names": np.array(export.synset.class_names),
        "whiten": np.array(str(meta.get("whiten", ""))),
    }
    arrays |= {key: value for key, value in recorded.items() if value is not None}
    np.savez(folder / "images.npz", **arrays)


def _numbers(value: Any) -> np.ndarray | None:
    """Returns what a set recorded, which may be anything, as numbers if it is a list of them."""
    if not isinstance(value, list) or not all(isinstance(x, int | float) and abs(x) < 1e30 for x in value):
        return None
    return np.array(value, np.float32)


def write_tfds(export: Export, folder: Path) -> None:
    """Writes what TFDS would have prepared: records, and three files that describe them."""
    try:
        from array_record.python.array_record_module import ArrayRecordWriter
    except ImportError as error:
        raise UserError("--to: tfds needs array_record: pip install gsdd_jax[data]") from error
    names = [" ".join(name.split()) for name in export.synset.class_names]
    if len(set(names)) < len(names):
        raise UserError("--to: tfds needs classes of different names, and two of the set's are the same")
    records = [_example(png, int(i)) for png, i in zip(export.pngs, export.synset.labels, strict=True)]
    # One record per chunk, for reading in any order; readers look the records up by number.
    writer = ArrayRecordWriter(str(folder / f"{TFDS_NAME}-train.array_record-00000-of-00001"), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    prefix = "tensorflow_datasets.core.features."
    features = {
        "image": {
            "pythonClassName": f"{prefix}image_feature.Image",
            "image": {
                "dtype": "uint8",
                "encodingFormat": "png",
                "shape": {"dimensions": [str(side) for side in export.images.shape[1:]]},
            },
        },
        "label": {
            "pythonClassName": f"{prefix}class_label_feature.ClassLabel",
            "classLabel": {"numClasses": str(len(names))},
        },
    }
    split = {
        "name": "train",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "numBytes": str(sum(map(len, records))),
        "shardLengths": [str(len(records))],
    }
    info = {
        "name": TFDS_NAME,
        "version": TFDS_VERSION,
        "description": _sentence(export.synset),
        "fileFormat": "array_record",
        "moduleName": "gsdd_jax",
        "splits": [split],
        "supervisedKeys": {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}},
    }
    tree = {"pythonClassName": f"{prefix}features_dict.FeaturesDict", "featuresDict": {"features": features}}
    (folder / "features.json").write_text(json.dumps(tree, indent=2))
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
    (folder / "label.labels.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


def _example(image: bytes, label: int) -> bytes:
    """Returns a ``tf.train.Example`` of an image and its label, in the wire format of protocol buffers."""

    def varint(value: int) -> bytes:
        return bytes([value & 127 | 128]) + varint(value >> 7) if value >= 128 else bytes([value])

    def field(number: int, content: bytes) -> bytes:
        # 2: content of a given length.
        return varint(number << 3 | 2) + varint(len(content)) + content

    # Feature: 1 is a list of bytes, 3 one of integers; a map is a list of pairs of key (1) and value (2).
    entries = {"image": field(1, field(1, image)), "label": field(3, field(1, varint(label)))}
    pairs = [field(1, field(1, key.encode()) + field(2, value)) for key, value in entries.items()]
    return field(1, b"".join(pairs))


def write_huggingface(export: Export, folder: Path) -> None:
    """Writes PNGs, a line about each, and a card with the names of the classes."""
    train = folder / "train"
    train.mkdir()
    digits = len(str(len(export.pngs) - 1))
    lines = []
    for i, (png, label) in enumerate(zip(export.pngs, export.synset.labels, strict=True)):
        name = f"{i:0{digits}d}.png"
        (train / name).write_bytes(png)
        lines.append(json.dumps({"file_name": name, "label": int(label)}))
    (train / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "README.md").write_text(_card(export), encoding="utf-8")


def _card(export: Export) -> str:
    """Returns the card: its head is YAML, of which quoted JSON is a part."""
    n, h, w, c = export.images.shape
    names = [f"          '{i}': {json.dumps(name)}" for i, name in enumerate(export.synset.class_names)]
    return "\n".join(
        [
            "---",
            "task_categories: [image-classification]",
            "tags: [dataset-distillation]",
            "configs:",
            "- config_name: default",
            "  data_files: [{split: train, path: train/*}]",
            "dataset_info:",
            "  features:",
            "  - name: image",
            "    dtype: image",
            "  - name: label",
            "    dtype:",
            "      class_label:",
            "        names:",
            *names,
            "---",
            "",
            "# A distilled set",
            "",
            f"{n} images of {h}x{w}x{c}. {_sentence(export.synset)} They are synthetic: made for training networks.",
            "",
            "Pixels were clipped to 8 bits; the codec of the set itself draws values beyond black and white.",
            "",
        ]
    )


def _sentence(synset: SynSet | MergedSet) -> str:
    """Says where a set comes from; what the set itself says about that is put in quotes, in one line."""
    dataset = synset.meta.get("dataset")
    source = f"from {json.dumps(dataset[:NAME_LENGTH])} " if isinstance(dataset, str) else ""
    each = math.ceil(synset.nbytes / len(synset.class_names))
    return f"Distilled {source}by gsdd_jax into {each} bytes per class (codec {synset.parts[0].codec.name})."


def write_set(export: Export, folder: Path) -> None:
    """Writes the set itself, to be read by `gsdd_jax.load`, evaluated, or started from by ``fit.initial_set``."""
    export.synset.save(folder)


FORMS: dict[str, Callable[[Export, Path], None]] = {
    "png": write_png,
    "npz": write_npz,
    "tfds": write_tfds,
    "huggingface": write_huggingface,
    "set": write_set,
}


if __name__ == "__main__":
    sys.exit(main())
