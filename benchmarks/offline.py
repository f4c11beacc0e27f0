"""Puts what `benchmarks.gpu` needs on a machine without network into one folder, to be carried along with this tree.

    python -m benchmarks.offline DIR [--data TFDS] [--python 3.12]

Packages, as wheels for that machine's Python on the system of this one, are those that machines with JAX, Flax, Optax,
Orbax and Triton are known to lack. Images are JPEG files as TFDS has them, packed: all of CIFAR-10 takes 18 MiB, since
their headers, most of such a file, compress to nothing. It ends with the command to run over there.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks import record
from train import rundir
from train.errors import exit_cleanly

DATA = record.ROOT.parent / "shared" / "data"
# (dataset, split, images of each class or None for all of them).
IMAGES = (("imagenette128", "train", 100), ("cifar10_jpeg", "train", None), ("cifar10_jpeg", "test", None))
# This jax-triton works with every Triton since 3.6; what it requires is there, and not to be replaced.
WHEELS = ("jax-triton==0.3.1", "annotated-types", "filelock", "pillow", "rich", "markdown-it-py", "mdurl", "pygments")
WHEELS += ("ruamel.yaml", "typing-extensions")
# What may be carried, this tree included.
LIMIT_MIB = 64
MIB = 2**20


class Encoded(NamedTuple):
    """Images as they are stored: a JPEG or PNG file each."""

    files: list[bytes]
    labels: np.ndarray  # [n] int64

    def decode(self) -> np.ndarray:
        """Returns the images as uint8 ``[n, h, w, 3]``; threads do not pay for small ones."""
        return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in self.files])

    def fingerprint(self) -> str:
        """Returns the hex SHA-256 of all files one after the other: which images these are."""
        return hashlib.sha256(b"".join(self.files)).hexdigest()


def read(path: Path, split: str, per_class: int | None = None) -> Encoded:
    """Reads images of each class, by file name, class after class.

    Args:
        path: A prepared TFDS version directory; its records have ``id``, ``image`` and ``label``.
        split: Of it.
        per_class: The first so many of each class; None for all.

    Raises:
        FileNotFoundError: There is no such directory.
        ValueError: A class has too few images.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"--data: no such directory: {path}")
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(path))
    records = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    rows = sorted((int(row["label"]), row["id"], row["image"]) for row in records.__getitems__(range(len(records))))
    chosen = []
    for label in range(builder.info.features["label"].num_classes):
        own = [row for row in rows if row[0] == label]
        if len(own) < (per_class or 1):
            raise ValueError(f"--data: class {label} has {len(own)} images in {split}, {per_class or 1} are needed")
        chosen += own[:per_class]
    return Encoded([row[2] for row in chosen], np.array([row[0] for row in chosen]))


def pack(images: Encoded, path: Path) -> None:
    """Writes the files behind one another into one npz without pickles: ``data``, ``offsets [n + 1]``, ``labels``."""
    offsets = np.cumsum([0, *map(len, images.files)])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        data = np.frombuffer(b"".join(images.files), np.uint8)
        np.savez_compressed(file, data=data, offsets=offsets, labels=images.labels)


def unpack(path: Path) -> Encoded:
    """Reads what `pack` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    with np.load(path, allow_pickle=False) as arrays:
        missing = [name for name in ("data", "offsets", "labels") if name not in arrays]
        if missing:
            raise ValueError(
                f"--data: {path} has no array {missing[0]!r}; python -m benchmarks.offline writes such files"
            )
        data, offsets, labels = (arrays[name] for name in ("data", "offsets", "labels"))
    return Encoded([data[a:b].tobytes() for a, b in zip(offsets[:-1], offsets[1:], strict=True)], labels)


def packed(folder: Path) -> Iterator[Path]:
    """Lists the files of packed images in a folder."""
    return (folder / f"{dataset}-{split}.npz" for dataset, split, _ in IMAGES)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="to write; in this tree, but ignored by git")
    parser.add_argument("--data", type=Path, default=DATA, metavar="TFDS", help="datasets in TFDS format")
    parser.add_argument("--python", default="3.12", help="of the other machine (default: %(default)s)")
    args = parser.parse_args(argv)
    for path, (dataset, split, per_class) in zip(packed(args.folder), IMAGES, strict=True):
        pack(read(args.data / dataset / "1.0.0", split, per_class), path)
    # pip would refuse to install two versions of one package.
    for old in args.folder.glob("*.whl"):
        old.unlink()
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "--python-version", args.python, "--dest", str(args.folder), *WHEELS], check=True)
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=record.ROOT, capture_output=True, check=True).stdout
    tree = sum((record.ROOT / name.decode()).stat().st_size for name in tracked.split(b"\0") if name) / MIB
    carried = sum(path.stat().st_size for path in args.folder.iterdir()) / MIB
    print(f"{args.folder}: {carried:.1f} MiB; with this tree's {tree:.1f} MiB {carried + tree:.1f} of {LIMIT_MIB} MiB")
    commit, changed = rundir.commit()
    known = f"{commit}-dirty" if changed else commit
    print("In this tree over there, OUT being where results go:")
    print(
        f"D={args.folder}; "
        "python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target $D/site $D/*.whl && "
        f"PYTHONPATH=$D/site python3 -um benchmarks.gpu --data $D --commit {known} --out $OUT"
    )
    return int(carried + tree > LIMIT_MIB)


if __name__ == "__main__":
    raise SystemExit(exit_cleanly()(main)())
