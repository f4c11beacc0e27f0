"""Folders by class, of images in any format that Pillow reads, and of what else a `Kind` says.

Either `root/{train, test | val | validation}/<class>/` or `root/<class>/{train, test | val | validation}/`.
"""

import csv
import difflib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
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


class Kind(NamedTuple):
    """What the records of a folder are.

    Attributes:
        things: What they are called.
        expected: What a class folder should hold, for messages.
        extensions: Of their files, in lower case.
        record: `record(file, folder)` is the record to which a file belongs that lies in a class folder or below; none
            for a file that nobody reads.
        is_gray: Whether a record has one channel.
        read: From a record to uint8 pixels.
        block: How many of them a thread reads at a time.
    """

    things: str
    expected: str
    extensions: frozenset[str]
    record: Callable[[Path, Path], Path | None]
    is_gray: Callable[[Path], bool]
    read: Callable[[Path, Converter], np.ndarray | Unreadable]
    block: int = 16


def files(
    things: str,
    expected: str,
    extensions: frozenset[str],
    is_gray: Callable[[Path], bool],
    read: Callable[[Path, Converter], np.ndarray | Unreadable],
) -> Kind:
    """Describes records of which each is a file, told by its extension."""

    def record(file: Path, folder: Path) -> Path | None:
        return file if file.suffix.lower() in extensions else None

    return Kind(things, expected, extensions, record, is_gray, read)


def _images() -> Kind:
    expected = "files that Pillow reads, such as *.png"
    return files("images", expected, extensions(), is_gray, lambda path, convert: convert.read(path))


class _Listing(NamedTuple):
    """What lies in a split: where it is, the records of each class, and all other files that are not hidden."""

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
    kind: Kind | None = None,
) -> Source:
    """Opens a folder of images; decodes nothing yet.

    Classes are the sorted names of the sub-folders of the training folder. Images lie in them at any depth and are
    visited in the order of their sorted paths, links followed; hidden files are left out in silence, all others that
    are read by nobody are told in `Source.notice`. Images count as one-channel only if all of them are. Where the root
    has no training folder but folders of classes have one each, those are the split.

    Args:
        path: The root.
        train_split: Name of the training folder; "" = "train", or with `test_fraction` the root if it has none. Or of a
            file in the root that lists the images, see `_listed`.
        test_split: Name of the test folder; "" = the one that exists of "test", "val", "validation". Or of such a file.
        test_labels: File in the root with a line "image label" for each image of a test folder without class folders.
        test_fraction: Share of each class to split off as test images, of a root without test folder; 0 = none.
        test_seed: Seed of that split.
        kind: What is read; images, if None.

    Raises:
        FileNotFoundError: The root, a split folder or the file of labels does not exist.
        ValueError: No class or a class without images, a test class that was not trained on, two candidate test
            folders, or one although images are to be split off; a file of labels that does not fit the images.
    """
    kind = kind or _images()
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"data.path: no such folder: {root}")
    there = [name for name in TEST_FOLDERS if (root / name).is_dir()]
    if test_fraction and there:
        raise InputError(
            f"data.test_fraction: {root} has a test folder ({there[0]}); expected 0, or a root without one"
        )
    default = "train" if not test_fraction or (root / "train").is_dir() else "."
    train = _listing(root, train_split or default, "data.train_split", kind)
    class_names = tuple(sorted(train.classes))
    if not class_names:
        raise InputError(f"{train.root} has no class folders; expected {train.root}/<class>/ with {kind.expected}")
    empty = [name for name in class_names if not train.classes[name]]
    if empty:
        folder = _class_folders(root, train_split or default)[empty[0]]
        below = [other for other in train.others if other.is_relative_to(folder)]
        found = f" but {len(below)} other files, such as {below[0].name}" if below else ""
        raise InputError(f"{folder} has no {kind.things}{found}; expected {kind.expected}")
    tested: dict[str, list[Path]] = {}
    others = train.others
    training = _folder_split(train, class_names, kind)
    if test_fraction:
        training, testing = hold_out(training, test_fraction, test_seed)
    else:
        test = _listing(root, test_split or _find_test(root), "data.test_split", kind)
        if test_labels:
            listed = root / test_labels
            test = _labeled(test, listed, class_names)
        _check_test_classes(root, test, train, kind)
        tested, others = test.classes, others + test.others
        testing = _folder_split(test, class_names, kind)
    return Source(
        name=root.resolve().name,
        class_names=class_names,
        channels=_native_channels(kind, train.classes, tested),
        train=training,
        test=testing,
        notice=_passed_over(root, others, kind),
        things=kind.things,
    )


def _find_test(root: Path) -> str:
    there = [name for name in TEST_FOLDERS if (root / name).is_dir() or _class_folders(root, name)]
    if not there:
        raise FileNotFoundError(
            f"{root} has no test folder ({', '.join(TEST_FOLDERS)}); set data.test_split, or data.test_fraction to "
            "split off training images"
        )
    if len(there) > 1:
        raise InputError(f"{root} has several test folders ({', '.join(there)}); choose one with data.test_split")
    return there[0]


def _class_folders(root: Path, split: str) -> dict[str, Path]:
    """Returns the folders `root/split/<class>`, or if there is no `root/split`, `root/<class>/split`."""
    if (root / split).is_dir():
        return {entry.name: Path(entry.path) for entry in _entries(root / split) if entry.is_dir()}
    within = {entry.name: Path(entry.path) / split for entry in _entries(root) if entry.is_dir()}
    return {name: folder for name, folder in within.items() if folder.is_dir()}


def _listing(root: Path, split: str, key: str, kind: Kind) -> _Listing:
    if (root / split).is_file():
        return _listed(root, root / split, key, kind)
    folder, folders = root / split, _class_folders(root, split)
    others: list[Path] = []
    if folder.is_dir():
        others = [Path(entry.path) for entry in _entries(folder) if not entry.is_dir()]
    elif folders:
        folder = root / "*" / split
    else:
        there = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        raise FileNotFoundError(f"{key}: no such folder: {folder}; found {', '.join(there) or 'no folders'}")
    above = {root.resolve(), folder.resolve()}
    classes: dict[str, list[Path]] = {}
    for name, below in folders.items():
        records: dict[Path, None] = {}
        for file in _files(below, set(above)):
            record = kind.record(file, below)
            if record is None:
                others.append(file)
            else:
                records[record] = None
        classes[name] = list(records)
    return _Listing(folder, classes, sorted(others))


def _listed(root: Path, listed: Path, key: str, kind: Kind) -> _Listing:
    """Reads a split from a file that lists its records, which lie in the root or in a folder in it.

    Either a line is `<class>/<record>` and whatever may follow, as in the lists of UCF101; or the file is a table with
    the columns folder_name and label, as that of VDSD (Wang et al. 2024), and perhaps split, whose rows count as the
    training folder or as a test folder of that name would.
    """
    places = [root, *(Path(entry.path) for entry in _entries(root) if entry.is_dir())]
    wanted = ("train",) if key == "data.train_split" else TEST_FOLDERS
    classes: dict[str, list[Path]] = {}
    for line, name, label in _rows(listed, key, wanted):
        found = [place / name for place in places if _is_record(place / name, kind)]
        if len(found) != 1 or not label:
            what = f"{name!r} names {len(found)} {kind.things} in {root} or a folder in it" if label else repr(name)
            raise InputError(f"{key}: {listed}, line {line}: expected one of a class, {what}")
        classes.setdefault(label, []).append(found[0])
    if not classes:
        raise InputError(f"{key}: {listed} lists no {kind.things} of {' or '.join(wanted)}")
    return _Listing(listed, classes, [])


def _rows(listed: Path, key: str, wanted: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Yields line, record and class."""
    lines = listed.read_text(encoding="utf-8-sig").splitlines()
    if not lines or "," not in lines[0]:
        for number, text in enumerate(lines, 1):
            for name in text.split()[:1]:
                yield number, name, Path(name).parent.name
        return
    table = csv.DictReader(lines)
    if not {"folder_name", "label"} <= set(table.fieldnames or ()):
        raise InputError(f"{key}: {listed}: expected columns folder_name, label and perhaps split, found {lines[0]}")
    for row in table:
        if row.get("split", wanted[0]) in wanted:
            yield table.line_num, row["folder_name"], row["label"]


def _is_record(path: Path, kind: Kind) -> bool:
    files = islice(_files(path, set()), 1) if path.is_dir() else [path] if path.is_file() else []
    return any(kind.record(file, path.parent) == path for file in files)


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


def _passed_over(root: Path, others: Sequence[Path], kind: Kind) -> str:
    if not others:
        return ""
    kinds = Counter(other.suffix.lower() or "without extension" for other in others).most_common()
    listed = ", ".join(f"{number} {kind}" for kind, number in kinds[:5]) + (", ..." if len(kinds) > 5 else "")
    return (
        f"passed over {len(others)} files that belong to no {kind.things} to be read or lie in no class folder "
        f"({listed}), such as {others[0].relative_to(root)}"
    )


def _check_test_classes(root: Path, test: _Listing, train: _Listing, kind: Kind) -> None:
    unknown = sorted(test.classes.keys() - train.classes.keys())
    if test.classes and not unknown:
        return
    records = [record for records in test.classes.values() for record in records]
    records += [file for file in test.others if file.suffix.lower() in kind.extensions]
    if records and not test.classes.keys() & train.classes.keys():
        none = f"{test.root} has none of the class folders of {train.root} but {len(records)} {kind.things}"
        if kind.things != "images":
            raise InputError(f"{none}; expected {test.root}/<class>/ with {kind.expected}")
        lists = [file for file in [*test.others, *sorted(root.iterdir())] if file.suffix.lower() in _LISTS]
        hint = f", such as {lists[0].relative_to(root)}" if lists else ""
        raise InputError(
            f'{none}; data.test_labels names the file of their labels, with a line "image label" each{hint}'
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
    if not test.root.is_dir():
        raise InputError(f"data.test_labels: expected a test folder without class folders, found {test.root}")
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


def _native_channels(kind: Kind, *groups: dict[str, list[Path]]) -> int:
    """1 if every record is gray, else 3; looks at headers only and stops at the first one in color."""
    return 1 if all(kind.is_gray(path) for classes in groups for paths in classes.values() for path in paths) else 3


def _folder_split(listing: _Listing, class_names: Iterable[str], kind: Kind) -> Split:
    entries = [(label, path) for label, name in enumerate(class_names) for path in listing.classes.get(name, [])]
    labels = np.array([label for label, _ in entries], np.int32)

    def read(indices: np.ndarray, convert: Converter) -> Iterator[tuple[int, np.ndarray | Unreadable]]:
        def decode(index: int) -> tuple[int, np.ndarray | Unreadable]:
            label, path = entries[index]
            return label, kind.read(path, convert)

        return parallel(decode, indices.tolist(), block=kind.block)

    return Split(
        where=str(listing.root),
        size=len(entries),
        labels=lambda: [labels],
        read=read,
        name=lambda index: str(entries[index][1]),
    )
