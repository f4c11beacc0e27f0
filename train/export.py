"""Write the images of a distilled set for other programs: ``python -m train.export --run DIR --to png --out DIR``.

``--to`` says how:

    png          ``<number>_<class>/<number>.png``, as torchvision's ImageFolder and other readers of folders expect it.
                 The number puts classes in the order of their labels; what a file system may not take becomes ``_``.
                 Soft labels are ``soft_labels.npy [n, k]``, whose row i belongs to the image with the number i.
    npz          ``images.npz``: ``images [n, h, w, c]`` float32, ``labels``, ``class_names``, ``whiten``, and, where
                 there are some, ``soft_labels [n, k]`` float32, ``channel_mean``, ``channel_std``, ``syn_lr``; of a run
                 with ``whiten: zca`` also ``zca_mean [h, w, c]`` and ``zca_matrix [d, d]``, d = h*w*c, fitted again to
                 the run's data, of which it needs to read them. No pickles, ``allow_pickle=False``.
    tfds         a version directory of TensorFlow Datasets in array_record files, for ``tfds.builder_from_directory``
                 and ``data.source=tfds``; one split, ``train``; features ``image``, ``label``, ``soft_label``.
    huggingface  ``data/train-*.parquet`` for ``load_dataset`` of Hugging Face ``datasets``, and a card; columns
                 ``image``, ``label`` (a ClassLabel with the names of the classes), ``soft_label``.
    set          the set itself, which `gsdd_jax.load` reads, such as that of a checkpoint (``--checkpoint``).
    orbax        the set as an orbax checkpoint, which `gsdd_jax.load` and `orbax.checkpoint` alone read; of a merged
                 set, one for each part. ``--masters`` adds the state of the run's newest checkpoint.

All have a ``metadata.json``: the names of the classes as they are, what the set recorded (whitening, statistics of the
channels, learned rate), and how the run trained its test networks.

Images are those of the codec before any whitening, around [0,1]. PNGs, hence ``png``, ``tfds`` and ``huggingface``,
have 8 bits: values are clipped to [0,1] and rounded. What a form lacks that the accuracies of the run needed is said in
one line.

The target must not exist or be empty. It appears under its name when all of it is written.
"""

from __future__ import annotations

import argparse
import dataclasses
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

from gsdd_jax import MergedSet, SynSet, data, exchange, files, synset, whiten
from train import compilation_cache, results
from train import config as configs
from train.errors import UserError, exit_cleanly, explain

# In letters; file systems take 255 bytes, and a letter has at most four.
NAME_LENGTH = 50
# Forms of the set itself, and those that hold any value.
SETS = ("set", "orbax")
UNCLIPPED = (*SETS, "npz")
TFDS_NAME, TFDS_VERSION = "distilled", "1.0.0"
# TFDS shows a file of this name as ``builder.info.metadata``.
METADATA = "metadata.json"


class Export(NamedTuple):
    """What is written.

    Attributes:
        synset: The set.
        images: ``[n, h, w, c]`` float32.
        pngs: The same with 8 bits, where they are needed.
        soft_labels: ``[n, k]`` float32, or None.
        zca: The whitening of the run, where it is known and needed.
        metadata: What is written beside the images.
        left_out: What is not written although the accuracies of the run needed it, and why.
        state: What the distillation goes on from, where it is asked for.
    """

    synset: SynSet | MergedSet
    images: np.ndarray
    pngs: list[bytes]
    soft_labels: np.ndarray | None
    zca: whiten.Zca | None
    metadata: dict[str, Any]
    left_out: dict[str, str]
    state: Any = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    with exit_cleanly(debug=args.debug):
        compilation_cache.enable()
        if args.to not in FORMS:
            raise UserError(f"--to: unknown form {args.to!r}; allowed: {', '.join(FORMS)}")
        size = _size(args.size) if args.size else None
        if args.masters and args.to != "orbax":
            raise UserError(f"--masters: only --to orbax holds them, found --to {args.to}")
        if size and args.to in SETS:
            raise UserError(f"--size: a set is drawn at any size later; leave it out, found {args.size!r}")
        out = Path(args.out)
        check_target(out)
        export = export_of(Path(args.run), args.to, size, checkpoint=args.checkpoint, masters=args.masters)
        files.write_folder(out, lambda folder: _write(export, FORMS[args.to], folder))
        n, h, w, c = export.images.shape
        clipped = f"{100 * np.mean((export.images < 0) | (export.images > 1)):.2f} % of all values were outside [0,1]"
        told = f"{clipped} and stay so" if args.to in UNCLIPPED else f"{clipped} and were clipped"
        print(f"{out}: {n} images of {h}x{w}x{c} in {len(export.synset.class_names)} classes; {told}")
        if export.left_out:
            parts = ", ".join(f"{what} ({why})" for what, why in export.left_out.items())
            print(f"left out, although the accuracies of the run needed it: {parts}")
    return 0


def export_of(
    run: Path, to: str, size: tuple[int, int] | None, *, checkpoint: bool = False, masters: bool = False
) -> Export:
    """Reads and draws a set, and gathers what else its accuracies needed, as far as it is known."""
    made, state = _source(run, checkpoint=checkpoint or masters)
    images = np.asarray(made.images(size), np.float32)
    soft = None if made.soft_labels is None else np.asarray(made.soft_labels)
    kind, zca, training = made.meta.get("whiten"), None, None
    # What, and why; reasons may name the user's own folders, which need not go into what is published.
    left_out = (
        {} if to in UNCLIPPED else {"the values as decoded": "clipped to [0,1] and rounded to 8 bits; npz has them"}
    )
    try:
        config = config_of(run)
        training = {name: dataclasses.asdict(getattr(config, name)) for name in ("network", "augment", "evaluate")}
    except Exception as error:
        left_out["how test networks were trained"] = _reason(error)
    if kind == "zca" and to != "npz":
        left_out["the ZCA matrix"] = "npz has it"
    elif kind == "zca":
        try:
            zca = _zca(run, made, images.shape[1:])
        except Exception as error:
            left_out["the ZCA matrix"] = _reason(error)
    elif kind == "meanstd" and not all(exchange.constants(made.meta, key) for key in ("channel_mean", "channel_std")):
        left_out["the statistics of the channels"] = "the set does not hold them"
    metadata = {
        "class_names": made.class_names,
        "set": made.meta,
        "training": training,
        "soft_labels": soft is not None,
        "left_out": list(left_out),
    }
    pngs = [] if to in UNCLIPPED else pngs_of(images)
    return Export(made, images, pngs, soft, zca, metadata, left_out, state if masters else None)


def config_of(run: Path) -> configs.RunConfig:
    """Returns the config of a run, given its directory or the export in it.

    Raises:
        UserError: It is of no run, or that of another version.
    """
    file = _run_folder(run) / "config.yaml"
    if not file.exists():
        raise UserError("no config.yaml of a run beside the set")
    return configs.load(file)


def _run_folder(run: Path) -> Path:
    folder = run.resolve()
    return folder.parent if folder.name == synset.EXPORT else folder


def _zca(run: Path, made: SynSet | MergedSet, shape: tuple[int, ...]) -> whiten.Zca:
    """Fits the whitening of a run again to its data."""
    native = made.parts[0].codec.image_shape
    if shape != native:
        raise UserError(f"it is of images of {'x'.join(map(str, native))}")
    dataset = data.load(config_of(run).data)
    # Subtasks are whitened as the whole is.
    origin = made.meta.get("subtask")
    expected = origin.get("dataset_sha256") if isinstance(origin, dict) else None
    # Runs of before say it here alone.
    result = _run_folder(run) / "result.json"
    if expected is None and result.exists():
        try:
            expected = json.loads(result.read_text(encoding="utf-8"))["data_sha256"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{result} is damaged: which data the run had is not known") from error
    found = dataset.fingerprint()
    if expected not in (None, found):
        raise UserError(f"the data of the run have the SHA-256 {expected[:12]}, those that are there {found[:12]}")
    fitted = whiten.fit("zca", dataset.train_images)
    assert isinstance(fitted, whiten.Zca)
    return fitted


def _reason(error: Exception) -> str:
    """Returns why something could not be had; a defect of the program is raised again."""
    message = explain(error)
    if message is None:
        raise error
    return message.removeprefix("error: ")


def _write(export: Export, form: Callable[[Export, Path], None], folder: Path) -> None:
    form(export, folder)
    (folder / METADATA).write_bytes(_utf8(json.dumps(export.metadata, ensure_ascii=False, indent=2)))


def _utf8(text: str) -> bytes:
    """Encodes text that a set may have recorded; halves of letters, which UTF-8 has not, as JSON escapes them."""
    return text.encode("utf-8", "backslashreplace")


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
    parser.add_argument(
        "--masters",
        action="store_true",
        help="with --to orbax, of a run: the set of its newest checkpoint, with float32 masters and optimizer state",
    )
    parser.add_argument("--size", metavar="SIDE", help="such as 64 or 64x96; default: the size of the set")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors too")
    return parser


def _source(run: Path, *, checkpoint: bool) -> tuple[SynSet | MergedSet, Any]:
    """Returns the set that is written: the exported one of a run, or that of its newest checkpoint with the state."""
    if not checkpoint:
        return results.exported(run), None
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
        UserError: They are neither gray nor colored, or a value is not a number.
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
    if export.soft_labels is not None:
        np.save(folder / "soft_labels.npy", export.soft_labels, allow_pickle=False)


def write_npz(export: Export, folder: Path) -> None:
    """Writes arrays, the values as they are decoded."""
    meta, zca = export.synset.meta, export.zca
    optional = {
        "soft_labels": export.soft_labels,
        "channel_mean": exchange.constants(meta, "channel_mean"),
        "channel_std": exchange.constants(meta, "channel_std"),
        "syn_lr": meta.get("syn_lr") if isinstance(meta.get("syn_lr"), int | float) else None,
        "zca_mean": None if zca is None else zca.mean,
        "zca_matrix": None if zca is None else zca.matrix,
    }
    arrays: dict[str, Any] = {
        "images": export.images,
        "labels": export.synset.labels,
        "class_names": np.array(export.synset.class_names),
        "whiten": np.array(str(meta.get("whiten", ""))),
    }
    arrays |= {key: np.asarray(value, np.float32) for key, value in optional.items() if value is not None}
    np.savez(folder / "images.npz", **arrays)


def write_tfds(export: Export, folder: Path) -> None:
    """Writes what TFDS would have prepared: records, and three files that describe them."""
    try:
        import tensorflow_datasets as tfds
        from array_record.python.array_record_module import ArrayRecordWriter
    except ImportError as error:
        raise UserError("--to: tfds needs tensorflow_datasets and array_record: pip install gsdd_jax[data]") from error
    names = [" ".join(name.split()) for name in export.synset.class_names]
    _check_distinct(names, "tfds")
    columns: dict[str, Any] = {"image": map(io.BytesIO, export.pngs), "label": map(int, export.synset.labels)}
    kinds = {
        "image": tfds.features.Image(shape=export.images.shape[1:], encoding_format="png"),
        "label": tfds.features.ClassLabel(names=names),
    }
    if export.soft_labels is not None:
        columns["soft_label"] = export.soft_labels
        kinds["soft_label"] = tfds.features.Tensor(shape=(len(names),), dtype=np.float32)
    features = tfds.features.FeaturesDict(kinds)
    records = [
        features.serialize_example(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)
    ]
    # One record per chunk, for reading in any order; readers look the records up by number.
    writer = ArrayRecordWriter(str(folder / f"{TFDS_NAME}-train.array_record-00000-of-00001"), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    of_set = tfds.core.dataset_info.DatasetIdentity(
        name=TFDS_NAME, version=tfds.core.Version(TFDS_VERSION), data_dir=str(folder), module_name="gsdd_jax"
    )
    info = tfds.core.DatasetInfo(
        builder=of_set, description=_sentence(export.synset), features=features, supervised_keys=("image", "label")
    )
    info.set_file_format("array_record")
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=TFDS_NAME, split="train", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=[len(records)], num_bytes=sum(map(len, records)), filename_template=template
    )
    info.set_splits(tfds.core.splits.SplitDict([split]))
    info.write_to_directory(folder)


def _check_distinct(names: Sequence[str], form: str) -> None:
    if len({*names, ""}) <= len(names):
        raise UserError(
            f"--to: {form} needs classes of different names, and two of the set's are the same or one is empty"
        )


def write_huggingface(export: Export, folder: Path) -> None:
    """Writes a Parquet file whose schema says what `datasets` makes of its columns, and a card."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("--to: huggingface needs pyarrow: pip install gsdd_jax[data]") from error
    names, soft = export.synset.class_names, export.soft_labels
    _check_distinct(names, "huggingface")
    digits = len(str(len(export.pngs) - 1))
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {
        "image": pyarrow.array(
            [{"bytes": png, "path": f"{i:0{digits}d}.png"} for i, png in enumerate(export.pngs)], image
        ),
        "label": pyarrow.array(export.synset.labels, pyarrow.int64()),
    }
    features: dict[str, Any] = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    if soft is not None:
        columns["soft_label"] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(soft.reshape(-1)), len(names))
        value = {"dtype": "float32", "_type": "Value"}
        # Not a List, as it is called from `datasets` 4 on: these read the older name as well.
        features["soft_label"] = {"feature": value, "length": len(names), "_type": "Sequence"}
    table = pyarrow.table(columns).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    (folder / "data").mkdir()
    parquet.write_table(table, folder / "data" / "train-00000-of-00001.parquet")
    (folder / "README.md").write_bytes(_utf8(_card(export)))


def _card(export: Export) -> str:
    n, h, w, c = export.images.shape
    soft = "" if export.soft_labels is None else " `soft_label` holds the probabilities that they were made for."
    return "\n".join(
        [
            "---",
            "task_categories: [image-classification]",
            "tags: [dataset-distillation]",
            "configs:",
            "- config_name: default",
            "  data_files: [{split: train, path: data/train-*}]",
            "---",
            "",
            "# A distilled set",
            "",
            f"{n} images of {h}x{w}x{c}. {_sentence(export.synset)} They are synthetic: made for training networks."
            + soft,
            "",
            "Pixels were clipped to [0,1] and rounded to 8 bits, unlike in the tests of the set: its codec draws "
            f"values beyond black and white. `{METADATA}` says what else these tests needed.",
            "",
        ]
    )


def _sentence(made: SynSet | MergedSet) -> str:
    """Says where a set comes from; what the set itself says about that is put in quotes, in one line."""
    dataset = made.meta.get("dataset")
    source = f"from {json.dumps(dataset[:NAME_LENGTH], ensure_ascii=False)} " if isinstance(dataset, str) else ""
    each = math.ceil(made.nbytes / len(made.class_names))
    return f"Distilled {source}by gsdd_jax into {each} bytes per class (codec {made.parts[0].codec.name})."


def write_set(export: Export, folder: Path) -> None:
    """Writes the set itself, to be read by `gsdd_jax.load`, evaluated, or started from by ``fit.initial_set``."""
    export.synset.save(folder)


def write_orbax(export: Export, folder: Path) -> None:
    """Writes the set as an orbax checkpoint."""
    # Merged sets are of several runs, hence of no one state.
    state = {} if export.state is None else {"state": export.state}
    export.synset.save(folder, format="orbax", **state)


FORMS: dict[str, Callable[[Export, Path], None]] = {
    "png": write_png,
    "npz": write_npz,
    "tfds": write_tfds,
    "huggingface": write_huggingface,
    "set": write_set,
    "orbax": write_orbax,
}


if __name__ == "__main__":
    sys.exit(main())
