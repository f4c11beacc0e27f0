"""Write the images of a distilled set for other programs: ``python -m train.export --run DIR --to png --out DIR``.

``--to`` is ``png``, ``webp``, ``gif``, ``mp4``, ``npz``, ``tfds``, ``huggingface``, or for the set itself ``set`` and
``orbax``; docs/exchange.md says what each holds. All have a ``metadata.json``: the names of the classes as they are,
what the set recorded (whitening, statistics of the channels, learned rate), and how the run trained its test networks.

Images are those of the codec before any whitening, around [0,1]. Files of pictures, also within ``tfds`` and
``huggingface``, have 8 bits: values are clipped to [0,1] and rounded. Those of videos are animated. What a form lacks
that the accuracies of the run needed is said in one line.

The target must not exist or be empty. It appears under its name when all of it is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gsdd_jax import MergedSet, SynSet, data, exchange, files, synset, whiten
from gsdd_jax.errors import needing
from train import commands, compilation_cache, results
from train import config as configs
from train.errors import UserError, exit_cleanly, explain
from train.pictures import FRAME_MS, animated

# In letters; file systems take 255 bytes, and a letter has at most four.
NAME_LENGTH = 50
# Forms of the set itself, and those that hold any value.
SETS = ("set", "orbax")
UNCLIPPED = (*SETS, "npz")
# A file for each image or video.
FILES = ("png", "webp", "gif", "mp4")
# TFDS shows a file of this name as ``builder.info.metadata``.
METADATA = "metadata.json"


class Export(NamedTuple):
    """What is written.

    Attributes:
        synset: The set.
        images: ``[n, h, w, c]``, or ``[n, t, h, w, c]``, float32.
        zca: The whitening of the run, where it is known and needed.
        state: What the distillation goes on from, where it is asked for.
    """

    synset: SynSet | MergedSet
    images: np.ndarray
    zca: Any = None
    state: Any = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = commands.parser("export", __doc__)
    parser.add_argument("--run", required=True, metavar="DIR", help="run, exported set, or name of a released set")
    parser.add_argument("--to", required=True, choices=FORMS, help="what to write, see docs/exchange.md")
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
    args = parser.parse_args(argv)
    with exit_cleanly(debug=args.debug):
        compilation_cache.enable()
        if args.masters and args.to != "orbax":
            raise UserError(f"--masters: only --to orbax holds them, found --to {args.to}")
        if args.size and args.to in SETS:
            raise UserError(f"--size: a set is drawn at any size later; leave it out, found {args.size!r}")
        run, out, size = synset.located(args.run), Path(args.out), _size(args.size) if args.size else ()
        check_target(out)
        made: SynSet | MergedSet
        if args.checkpoint or args.masters:
            # Needs the data and all of training, which exported sets do not.
            from train import distill

            made, state = distill.from_checkpoint(run)
        else:
            made, state = results.exported(run), None
        native = made.parts[0].codec.image_shape[:-1]
        images = np.asarray(made.images((*native[: len(native) - len(size)], *size)), np.float32)
        training, zca, left_out = _needed(run, made, images, args.to)
        metadata = {
            "class_names": made.class_names,
            "set": made.meta,
            "training": training,
            "soft_labels": made.soft_labels is not None,
            # Not why: reasons may name the user's own folders.
            "left_out": list(left_out),
        }
        export = Export(made, images, zca, state if args.masters else None)

        def write(folder: Path) -> None:
            FORMS[args.to](export, folder)
            (folder / METADATA).write_text(json.dumps(metadata, indent=2))

        files.write_folder(out, write)
        sides = "x".join(map(str, images.shape[1:]))
        outside = f"{100 * np.mean((images < 0) | (images > 1)):.2f} % of all values were outside [0,1] and"
        told = f"{outside} stay so" if args.to in UNCLIPPED else f"{outside} were clipped"
        print(f"{out}: {len(images)} images of {sides} in {len(made.class_names)} classes; {told}")
        if left_out:
            parts = ", ".join(f"{what} ({why})" for what, why in left_out.items())
            print(f"left out, although the accuracies of the run needed it: {parts}")
    return 0


def _needed(run: Path, made: SynSet | MergedSet, images: np.ndarray, to: str) -> tuple[Any, Any, dict[str, str]]:
    """Returns how test networks were trained, the ZCA whitening of the run, and what is left out with the reason."""
    kind, training, zca, folder, left_out = made.meta.get("whiten"), None, None, run.resolve(), {}
    file, native = (folder.parent if folder.name == synset.EXPORT else folder) / "config.yaml", made.parts[0].codec
    if to not in UNCLIPPED:
        left_out["the values as decoded"] = "clipped to [0,1] and rounded to 8 bits; npz has them"
    if kind == "meanstd" and not all(exchange.constants(made.meta, key) for key in ("channel_mean", "channel_std")):
        left_out["the statistics of the channels"] = "the set does not hold them"
    try:
        if not file.exists():
            raise UserError("no config.yaml of a run beside the set")
        config: configs.RunConfig = configs.load(file)
        training = {name: dataclasses.asdict(getattr(config, name)) for name in ("network", "augment", "evaluate")}
        if kind == "zca" and to == "npz":
            if images.shape[1:] != native.image_shape:
                raise UserError(f"it is of images of {'x'.join(map(str, native.image_shape))}")
            if not config.data.sha256:
                raise UserError("the config of the run does not say which data it had")
            zca = whiten.fit("zca", data.load(config.data).train_images)
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        left_out["the ZCA matrix" if training else "how test networks were trained"] = message.removeprefix("error: ")
    if kind == "zca" and zca is None:
        left_out.setdefault("the ZCA matrix", "there is no config of a run" if to == "npz" else "npz has it")
    return training, zca, left_out


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text, re.ASCII)
    sides = [int(side) for side in found.groups() if side] if found else []
    if not sides or not all(1 <= side <= exchange.SIDE for side in sides):
        raise UserError(f"--size: expected a side from 1 to {exchange.SIDE} or HEIGHTxWIDTH, found {text!r}")
    return sides[0], sides[-1]


def check_target(out: Path) -> None:
    """Refuses a directory that could not be made without touching what is there."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        what = "not empty" if out.is_dir() else "a file"
        raise UserError(f"--out: {out} is {what}; expected an absent or empty directory")
    if not out.resolve().parent.is_dir():
        raise UserError(f"--out: no such directory: {out.parent}")


def _pictures(images: np.ndarray, form: str = "png") -> dict[str, bytes]:
    """Returns images or videos as files by their names, clipped to [0,1] and rounded to 8 bits."""
    channels, digits = images.shape[-1], len(str(len(images) - 1))
    if channels not in (1, 3):
        raise UserError(f"--to: a {form.upper()} has 1 or 3 channels, the images have {channels}; expected npz")
    if broken := np.isnan(images).reshape(len(images), -1).any(1).sum():
        raise UserError(f"--to: {broken} of {len(images)} images hold NaN, which a {form.upper()} cannot; expected npz")
    found = {}
    for i, each in enumerate(np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8)):
        frames = each if images.ndim == 5 else each[None]
        found[f"{i:0{digits}d}.{form}"] = (_movie if form == "mp4" else partial(_picture, form))(frames)
    return found


def _picture(form: str, frames: np.ndarray) -> bytes:
    first, *others = (Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame) for frame in frames)
    stream = io.BytesIO()
    first.save(stream, form, **animated(others), **({"lossless": True} if form == "webp" else {}))
    return stream.getvalue()


def _movie(frames: np.ndarray) -> bytes:
    """Returns an MP4 file of H.264; a last odd row or column, which that cannot have, is shown twice."""
    with needing("--to: mp4 needs PyAV", extra="video"):
        import av
    frames = np.pad(frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)], mode="edge")
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as file:
        track: Any = file.add_stream("libx264", rate=1000 // FRAME_MS, options={"crf": "10"})
        track.height, track.width, track.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            shown = av.VideoFrame.from_ndarray(np.broadcast_to(frame, (*frame.shape[:2], 3)).copy(), format="rgb24")
            file.mux(track.encode(shown))
        file.mux(track.encode())
    return stream.getvalue()


def folder_names(class_names: Sequence[str]) -> list[str]:
    """Returns names for folders, one per class: distinct, in the order of the labels, and safe on any file system."""
    digits = len(str(len(class_names) - 1))
    safe = [re.sub(r"[^\w.-]+", "_", name)[:NAME_LENGTH].strip("._") for name in class_names]
    return [f"{i:0{digits}d}_{name}".rstrip("_") for i, name in enumerate(safe)]


def write_pictures(form: str, export: Export, folder: Path) -> None:
    """Writes a folder of files per class."""
    folders = [folder / name for name in folder_names(export.synset.class_names)]
    for each in folders:
        each.mkdir()
    for (name, file), label in zip(_pictures(export.images, form).items(), export.synset.labels, strict=True):
        (folders[label] / name).write_bytes(file)
    if export.synset.soft_labels is not None:
        np.save(folder / "soft_labels.npy", np.asarray(export.synset.soft_labels), allow_pickle=False)


def write_npz(export: Export, folder: Path) -> None:
    """Writes arrays, the values as they are decoded."""
    meta, zca = export.synset.meta, export.zca
    optional: dict[str, Any] = {
        "soft_labels": export.synset.soft_labels,
        "channel_mean": exchange.constants(meta, "channel_mean"),
        "channel_std": exchange.constants(meta, "channel_std"),
        "syn_lr": meta.get("syn_lr") if isinstance(meta.get("syn_lr"), int | float) else None,
        "zca_mean": None if zca is None else zca.mean,
        "zca_matrix": None if zca is None else zca.matrix,
    }
    arrays: dict[str, Any] = {
        key: np.asarray(value, np.float32) for key, value in optional.items() if value is not None
    }
    arrays |= {"images": export.images, "labels": export.synset.labels}
    names, whitened = np.array(export.synset.class_names), np.array(str(meta.get("whiten", "")))
    np.savez(folder / "images.npz", class_names=names, whiten=whitened, **arrays)


def write_tfds(export: Export, folder: Path) -> None:
    """Writes a version directory, the one split of which keeps the order of the images."""
    with needing("--to: tfds needs tensorflow_datasets and array_record", extra="data"):
        import array_record.python.array_record_module  # noqa: F401
        import tensorflow_datasets as tfds
    names = _distinct([" ".join(name.split()) for name in export.synset.class_names], "tfds")
    pngs = map(io.BytesIO, _pictures(_still(export.images)).values())
    columns: dict[str, Any] = {"image": pngs, "label": map(int, export.synset.labels)}
    kinds = {
        "image": tfds.features.Image(shape=export.images.shape[1:], encoding_format="png"),
        "label": tfds.features.ClassLabel(names=names),
    }
    if export.synset.soft_labels is not None:
        columns["soft_label"] = np.asarray(export.synset.soft_labels)
        kinds["soft_label"] = tfds.features.Tensor(shape=(len(names),), dtype=np.float32)
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))

    class Distilled(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version("1.0.0")
        # There are no files of checksums beside these sources to be looked for.
        code_path = None

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=_sentence(export.synset),
                features=tfds.features.FeaturesDict(kinds),
                supervised_keys=("image", "label"),
                disable_shuffling=True,
            )

        def _split_generators(self, manager: Any) -> Any:
            return {"train": enumerate(rows)}

        def _generate_examples(self) -> Any:
            raise NotImplementedError

    builder = Distilled(data_dir=folder, file_format="array_record")
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(None):
        builder.download_and_prepare()
    for file in Path(builder.data_dir).iterdir():
        file.rename(folder / file.name)
    shutil.rmtree(folder / builder.name)


def _still(images: np.ndarray) -> np.ndarray:
    if images.ndim != 4:
        raise UserError(f"--to: expected {', '.join(FILES)} or npz for videos, whose form has images only")
    return images


def _distinct(names: Sequence[str], form: str) -> Sequence[str]:
    if len({*names, ""}) <= len(names):
        raise UserError(
            f"--to: {form} needs classes of different names, and two of the set's are the same or one is empty"
        )
    return names


def write_huggingface(export: Export, folder: Path) -> None:
    """Writes a Parquet file whose schema says what `datasets` makes of its columns, and a card."""
    with needing("--to: huggingface needs pyarrow", extra="data"):
        import pyarrow
        from pyarrow import parquet
    names, soft = _distinct(export.synset.class_names, "huggingface"), export.synset.soft_labels
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    pngs = [{"bytes": png, "path": name} for name, png in _pictures(_still(export.images)).items()]
    columns = {
        "image": pyarrow.array(pngs, image),
        "label": pyarrow.array(export.synset.labels, pyarrow.int64()),
    }
    features: dict[str, Any] = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    if soft is not None:
        rows = pyarrow.array(np.asarray(soft).reshape(-1))
        columns["soft_label"] = pyarrow.FixedSizeListArray.from_arrays(rows, len(names))
        value = {"dtype": "float32", "_type": "Value"}
        # Not a List, as it is called from `datasets` 4 on: these read the older name as well.
        features["soft_label"] = {"feature": value, "length": len(names), "_type": "Sequence"}
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    (folder / "data").mkdir()
    table = pyarrow.table(columns).replace_schema_metadata(described)
    parquet.write_table(table, folder / "data" / "train-00000-of-00001.parquet")
    head = "---\ntask_categories: [image-classification]\ntags: [dataset-distillation]\n---\n\n# A distilled set\n\n"
    said = (
        f"{_sentence(export.synset)} Images are synthetic: made for training networks, `soft_label` holds the "
        "probabilities that they were made for. Pixels were clipped to [0,1] and rounded to 8 bits, unlike in the "
        f"tests of the set; `{METADATA}` says what else these tests needed.\n"
    )
    (folder / "README.md").write_text(head + said)


def _sentence(made: SynSet | MergedSet) -> str:
    """Says where a set comes from; what the set itself says about that is put in quotes, in one line of ASCII."""
    dataset = made.meta.get("dataset")
    source = f"from {json.dumps(dataset[:NAME_LENGTH])} " if isinstance(dataset, str) else ""
    each = math.ceil(made.nbytes / len(made.class_names))
    return f"Distilled {source}by gsdd_jax into {each} bytes per class (codec {made.parts[0].codec.name})."


FORMS: dict[str, Callable[[Export, Path], Any]] = {
    **{form: partial(write_pictures, form) for form in FILES},
    "npz": write_npz,
    "tfds": write_tfds,
    "huggingface": write_huggingface,
    # To be read by `gsdd_jax.load`, evaluated, or started from by ``fit.initial_set``.
    "set": lambda export, folder: export.synset.save(folder),
    # Merged sets are of several runs, hence of no one state.
    "orbax": lambda export, folder: export.synset.save(
        folder, format="orbax", **({} if export.state is None else {"state": export.state})
    ),
}


if __name__ == "__main__":
    sys.exit(main())
