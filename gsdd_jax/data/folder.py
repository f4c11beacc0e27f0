"""Image folders: `root/{train, test | val | validation}/<class>/*.{png,jpg,jpeg,webp,bmp}`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from gsdd_jax.data.source import Convert, Source, Split, is_grey, parallel

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
TEST_FOLDERS = ("test", "val", "validation")


def open_folder(path: str | Path, *, train_split: str = "", test_split: str = "") -> Source:
    """Opens a folder of images; decodes nothing yet.

    Classes are the sorted names of the sub-folders of the training folder; images are visited in the order of their
    sorted names; names starting with a dot and other extensions are passed over. Images count as one-channel only if
    all of them are. EXIF orientation is not applied (neither TFDS nor torchvision's ImageFolder applies it).

    Args:
        path: The root.
        train_split: Name of the training folder; "" = "train".
        test_split: Name of the test folder; "" = the one that exists of "test", "val", "validation".

    Raises:
        FileNotFoundError: The root or a split folder does not exist.
        ValueError: No class or a class without images, a test class that was not trained on, two candidate test
            folders.
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"data.path: no such folder: {root}")
    train_root = _split_folder(root, train_split or "train", "data.train_split")
    test_root = _split_folder(root, test_split or _find_test(root), "data.test_split")
    train_files, test_files = _files(train_root), _files(test_root)
    class_names = tuple(sorted(train_files))
    if not class_names:
        raise ValueError(f"{train_root} has no class folders; expected {train_root}/<class>/*.png")
    unknown = sorted(set(test_files) - set(class_names))
    if unknown:
        raise ValueError(f"{test_root} has class {unknown[0]!r}, which {train_root} does not have")
    empty = [name for name in class_names if not train_files[name]]
    if empty:
        raise ValueError(f"{train_root / empty[0]} has no images; allowed extensions: {', '.join(sorted(EXTENSIONS))}")
    return Source(
        name=root.resolve().name,
        class_names=class_names,
        channels=_native_channels(train_files, test_files),
        train=_folder_split(train_root, train_files, class_names),
        test=_folder_split(test_root, test_files, class_names),
    )


def _find_test(root: Path) -> str:
    found = [name for name in TEST_FOLDERS if (root / name).is_dir()]
    if not found:
        raise FileNotFoundError(f"{root} has no test folder ({', '.join(TEST_FOLDERS)}); set data.test_split")
    if len(found) > 1:
        raise ValueError(f"{root} has several test folders ({', '.join(found)}); choose one with data.test_split")
    return found[0]


def _split_folder(root: Path, name: str, key: str) -> Path:
    if not (root / name).is_dir():
        there = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        raise FileNotFoundError(f"{key}: no such folder: {root / name}; found {', '.join(there) or 'no folders'}")
    return root / name


def _files(root: Path) -> dict[str, list[Path]]:
    return {
        folder.name: sorted(
            f for f in folder.iterdir() if f.suffix.lower() in EXTENSIONS and not f.name.startswith(".")
        )
        for folder in root.iterdir()
        if folder.is_dir() and not folder.name.startswith(".")
    }


def _native_channels(*groups: dict[str, list[Path]]) -> int:
    """1 if every file is grey, else 3; looks at headers only and stops at the first colour image."""
    for files in groups:
        for paths in files.values():
            for path in paths:
                with _opened(path) as image:
                    if not is_grey(image):
                        return 3
    return 1


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except OSError as error:
        raise OSError(f"cannot read image {path}: {error}") from error


def _folder_split(root: Path, files: dict[str, list[Path]], class_names: tuple[str, ...]) -> Split:
    entries = [(label, path) for label, name in enumerate(class_names) for path in files.get(name, [])]
    labels = np.array([label for label, _ in entries], np.int32)

    def read(indices: np.ndarray, convert: Convert) -> Iterator[tuple[int, np.ndarray]]:
        def decode(index: int) -> tuple[int, np.ndarray]:
            label, path = entries[index]
            with _opened(path) as image:
                try:
                    return label, convert(image)
                except (OSError, SyntaxError) as error:
                    # PIL reports a broken PNG chunk as SyntaxError.
                    raise OSError(f"cannot read image {path}: {error}") from error
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error

        return parallel(decode, indices.tolist())

    return Split(where=str(root), size=len(entries), labels=lambda: [labels], read=read)
