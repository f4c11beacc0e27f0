"""Image folders: `root/{train, test | val | validation}/<class>/**/*.png`, or any other format that Pillow reads."""

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gsdd_jax.data.decode import Converter, Unreadable, extensions, is_gray
from gsdd_jax.data.source import Source, Split, hold_out, parallel
from gsdd_jax.errors import InputError

TEST_FOLDERS = ("test", "val", "validation")
# Left by file managers and archivers, as names that start with a dot are.
_HIDDEN = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir"})
_LISTS = frozenset({".txt", ".csv", ".tsv"})


class _Listing(NamedTuple):
    """What lies in a split folder: the images of each class, and all other files that are not hidden."""

    root: Path
    classes: dict[str, list[Path]]
    others: list[Path]


def open_folder(
    path: str | Path,
    *,
    train_split: str = "",
    test_split: str = "",
    test_labels: str = "",
    test_fraction: float = 0.0,
    test_seed: int = 0,
) -> Source:
    """Opens a folder of images; decodes nothing yet.

    Classes are the sorted names of the sub-folders of the training folder. Images lie in them at any depth and are
    visited in the order of their sorted paths, links followed; hidden files are left out in silence, all others that
    are read by nobody are told in `Source.notice`. Images count as one-channel only if all of them are.

    Args:
        path: The root.
        train_split: Name of the training folder; "" = "train", or with `test_fraction` the root if it has none.
        test_split: Name of the test folder; "" = the one that exists of "test", "val", "validation".
        test_labels: File in the root with a line "image label" for each image of a test folder without class folders.
        test_fraction: Share of each class to split off as test images, of a root without test folder; 0 = none.
        test_seed: Seed of that split.

    Raises:
        FileNotFoundError: The root, a split folder or the file of labels does not exist.
        ValueError: No class or a class without images, a test class that was not trained on, two candidate test
            folders, or one although images are to be split off; a file of labels that does not fit the images.
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"data.path: no such folder: {root}")
    there = [name for name in TEST_FOLDERS if (root / name).is_dir()]
    if test_fraction and there:
        raise InputError(
            f"data.test_fraction: {root} has a test folder ({there[0]}); expected 0, or a root without one"
        )
    default = "train" if not test_fraction or (root / "train").is_dir() else "."
    train = _listing(_split_folder(root, train_split or default, "data.train_split"), root)
    class_names = tuple(sorted(train.classes))
    if not class_names:
        raise InputError(f"{train.root} has no class folders; expected {train.root}/<class>/*.png")
    empty = [name for name in class_names if not train.classes[name]]
    if empty:
        below = [other for other in train.others if other.is_relative_to(train.root / empty[0])]
        found = f" but {len(below)} other files, such as {below[0].name}" if below else ""
        raise InputError(
            f"{train.root / empty[0]} has no images{found}; expected files that Pillow reads, such as *.png"
        )
    tested: dict[str, list[Path]] = {}
    others = train.others
    training = _folder_split(train.root, train.classes, class_names)
    if test_fraction:
        training, testing = hold_out(training, test_fraction, test_seed)
    else:
        test = _listing(_split_folder(root, test_split or _find_test(root, there), "data.test_split"), root)
        if test_labels:
            listed = root / test_labels
            test = _labeled(test, listed, class_names)
        _check_test_classes(root, test, train)
        tested, others = test.classes, others + test.others
        testing = _folder_split(test.root, test.classes, class_names)
    return Source(
        name=root.resolve().name,
        class_names=class_names,
        channels=_native_channels(train.classes, tested),
        train=training,
        test=testing,
        notice=_passed_over(root, others),
    )


def _find_test(root: Path, there: Sequence[str]) -> str:
    if not there:
        raise FileNotFoundError(
            f"{root} has no test folder ({', '.join(TEST_FOLDERS)}); set data.test_split, or data.test_fraction to "
            "split off training images"
        )
    if len(there) > 1:
        raise InputError(f"{root} has several test folders ({', '.join(there)}); choose one with data.test_split")
    return there[0]


def _split_folder(root: Path, name: str, key: str) -> Path:
    if not (root / name).is_dir():
        there = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        raise FileNotFoundError(f"{key}: no such folder: {root / name}; found {', '.join(there) or 'no folders'}")
    return root / name


def _listing(folder: Path, root: Path) -> _Listing:
    readable = extensions()
    above = {root.resolve(), folder.resolve()}
    classes: dict[str, list[Path]] = {}
    others: list[Path] = []
    for entry in _entries(folder):
        if not entry.is_dir():
            others.append(Path(entry.path))
            continue
        classes[entry.name] = []
        for file in _files(Path(entry.path), set(above)):
            (classes[entry.name] if file.suffix.lower() in readable else others).append(file)
    return _Listing(folder, classes, others)


def _files(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Yields the files in a folder and below, sorted; folders to which links lead back are visited once."""
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _files(Path(entry.path), seen)
        else:
            yield Path(entry.path)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        shown = (e for e in entries if not e.name.startswith(".") and e.name.casefold() not in _HIDDEN)
        return sorted(shown, key=lambda entry: entry.name)


def _passed_over(root: Path, others: Sequence[Path]) -> str:
    if not others:
        return ""
    kinds = Counter(other.suffix.lower() or "without extension" for other in others).most_common()
    listed = ", ".join(f"{number} {kind}" for kind, number in kinds[:5]) + (", ..." if len(kinds) > 5 else "")
    return (
        f"passed over {len(others)} files that are no images that Pillow reads or lie in no class folder ({listed}), "
        f"such as {others[0].relative_to(root)}"
    )


def _check_test_classes(root: Path, test: _Listing, train: _Listing) -> None:
    unknown = sorted(test.classes.keys() - train.classes.keys())
    if test.classes and not unknown:
        return
    readable = extensions()
    images = [file for files in test.classes.values() for file in files]
    images += [file for file in test.others if file.suffix.lower() in readable]
    if images and not test.classes.keys() & train.classes.keys():
        lists = [file for file in [*test.others, *sorted(root.iterdir())] if file.suffix.lower() in _LISTS]
        hint = f", such as {lists[0].relative_to(root)}" if lists else ""
        raise InputError(
            f"{test.root} has none of the class folders of {train.root} but {len(images)} images; data.test_labels "
            f'names the file of their labels, with a line "image label" each{hint}'
        )
    if unknown:
        near = difflib.get_close_matches(unknown[0], train.classes, n=1, cutoff=0.7)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{test.root} has class {unknown[0]!r}, which {train.root} does not have{hint}")


def _labeled(test: _Listing, listed: Path, class_names: Sequence[str]) -> _Listing:
    """Sorts the images of a flat folder into classes by a file of labels.

    A line holds an image and its label, separated by a tab, a comma or spaces, and whatever may follow. The image is
    named by its path in the folder or by its name, with or without extension, the label by the name of the class or its
    number from 0. A first line that fits neither is a heading.
    """
    if not listed.is_file():
        raise FileNotFoundError(f"data.test_labels: no such file: {listed}")
    readable = extensions()
    files = [file for file in _files(test.root, set()) if file.resolve() != listed.resolve()]
    images = [file for file in files if file.suffix.lower() in readable]
    known: dict[str, list[Path]] = {}
    for file in images:
        for name in {str(file.relative_to(test.root)), file.name, file.stem}:
            known.setdefault(name, []).append(file)
    number = {str(label): name for label, name in enumerate(class_names)} | {name: name for name in class_names}
    found: dict[Path, str] = {}
    for line, text in enumerate(listed.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not text.strip():
            continue
        separator = next((s for s in ("\t", ",") if s in text), None)
        image, _, rest = (part.strip() for part in re.sub(r"\s+", " ", text.strip()).partition(" "))
        if separator:
            image, _, rest = (part.strip() for part in text.partition(separator))
        # What follows the label, such as a box, is left out.
        label = next((r for r in (rest, rest.split(separator)[0].strip(), rest.split(" ")[0]) if r in number), None)
        matches = known.get(image) or known.get(Path(image).name, [])
        if line == 1 and label is None and not matches:
            continue
        where = f"data.test_labels: {listed}, line {line}"
        if len(matches) != 1:
            raise InputError(f"{where}: {image!r} names {len(matches)} images in {test.root}, expected one")
        if label is None:
            raise InputError(
                f"{where}: {rest!r} is no label; expected a class of the training folder, such as {class_names[0]!r}, "
                f"or a number from 0 to {len(class_names) - 1}"
            )
        if found.setdefault(matches[0], number[label]) != number[label]:
            raise InputError(f"{where}: a second label for {image!r}")
    missing = [file for file in images if file not in found]
    if missing:
        raise InputError(f"data.test_labels: {listed} has no label for {len(missing)} images, such as {missing[0]}")
    classes: dict[str, list[Path]] = {}
    for file in images:
        classes.setdefault(found[file], []).append(file)
    return _Listing(test.root, classes, [file for file in files if file not in found])


def _native_channels(*groups: dict[str, list[Path]]) -> int:
    """1 if every file is gray, else 3; looks at headers only and stops at the first color image."""
    return 1 if all(is_gray(file) for files in groups for paths in files.values() for file in paths) else 3


def _folder_split(root: Path, files: dict[str, list[Path]], class_names: Iterable[str]) -> Split:
    entries = [(label, path) for label, name in enumerate(class_names) for path in files.get(name, [])]
    labels = np.array([label for label, _ in entries], np.int32)

    def read(indices: np.ndarray, convert: Converter) -> Iterator[tuple[int, np.ndarray | Unreadable]]:
        return parallel(lambda index: (entries[index][0], convert.read(entries[index][1])), indices.tolist())

    return Split(
        where=str(root),
        size=len(entries),
        labels=lambda: [labels],
        read=read,
        name=lambda index: str(entries[index][1]),
    )
