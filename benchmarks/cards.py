"""Released sets: what is kept of a run for one, its card, and the table of all; `benchmarks.tables` writes them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import gsdd_jax
from benchmarks.record import SETS
from gsdd_jax.synset import ARRAYS, EXPORT, MANIFEST
from train import results, testset
from train.config import load
from train.errors import UserError

KEPT = ("config.yaml", "result.json", "images.png", f"{EXPORT}/{MANIFEST}", f"{EXPORT}/{ARRAYS}")
CARD = "README.md"
# What the images were distilled from, and on what terms: no more than is stated where they come from.
DATA = {
    "cifar10_jpeg": "CIFAR-10 (Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009), stored as "
    "JPEG. License: its page (cs.toronto.edu/~kriz/cifar.html) states none; it asks to cite that report.",
    "digits": "The handwritten digits of scikit-learn, a copy of the test set of UCI's Optical Recognition of "
    "Handwritten Digits (Alpaydin and Kaynak, 1998). License: CC BY 4.0, as UCI has it.",
    "imagenette128": "Imagenette v2 (github.com/fastai/imagenette) at 128 px. License: none of the images is stated; "
    "they are ImageNet's, whose terms of access are for non-commercial research and education.",
}


def release(run: Path, name: str) -> None:
    """Makes a released set of a run directory, in place of the one that has the name."""
    if (dataset := _result(run)["dataset"]) not in DATA:
        raise UserError(f"{run}: DATA of benchmarks/cards.py does not say what {dataset} is and on what terms; add it")
    if len(gsdd_jax.load(run).parts) > 1:
        raise UserError(f"{run}: a merged set; expected a whole one")
    shutil.rmtree(SETS / name, ignore_errors=True)
    (SETS / name / EXPORT).mkdir(parents=True)
    for file in KEPT:
        if (run / file).exists():
            shutil.copyfile(run / file, SETS / name / file)


def folders() -> list[Path]:
    """Returns the folders of the released sets."""
    return sorted(path.parent for path in SETS.glob("*/config.yaml"))


def card(folder: Path) -> str:
    """Writes what users of a released set have to know, from what its run left."""
    made, result, config = gsdd_jax.load(folder), _result(folder), load(folder / "config.yaml")
    arrays, entry, protocol = (folder / EXPORT / ARRAYS).read_bytes(), result["accuracy"], result["protocol"]
    codec, soft, (h, w, c) = made.parts[0].codec, made.parts[0].soft, made.parts[0].codec.image_shape
    normalization, network = made.meta["whiten"], ", ".join(f"{key} {at}" for key, at in protocol["network"].items())
    if normalization == "meanstd":
        mean, std = (", ".join(f"{x:.4f}" for x in made.meta[f"channel_{key}"]) for key in ("mean", "std"))
        normalization = f"`(images - mean) / std` of each channel, mean {mean}, std {std}; `synset.meta` has all digits"
    rows = {
        "images": f"{codec.num_images}, {codec.images_per_class} of each class, {h} x {w} x {c}",
        "classes": f"{len(made.class_names)}: {', '.join(made.class_names)}",
        "codec": f"`{codec.name}`, {_points(codec)} Gaussians per image",
        "bytes per class": f"{_size(entry)}; the budget is {made.bytes_per_class:,}",
        "labels": "hard: the order of the images" if soft is None else f"soft, {soft.spec.dtype}",
        "arrays": f"`{EXPORT}/{ARRAYS}`, {len(arrays):,} bytes, SHA-256 `{hashlib.sha256(arrays).hexdigest()}`",
        "networks expect": normalization,
        "data": DATA[result["dataset"]],
    }
    labels, shape = ("labels", "[n]") if soft is None else ("soft_labels", f"[n, {len(made.class_names)}]")
    path = config.data.path
    there = f" Real images are looked for in `{path}`; `data.path=DIR` names another place." if path else ""
    return f"""# {folder.name}

![Its images, one class per row](images.png)

{results.markdown(["", ""], list(rows.items()), left=2)}
```python
import gsdd_jax as gsdd

synset = gsdd.load("{folder.name}")
images, labels = synset.images(), synset.{labels}  # [n, {h}, {w}, {c}] around [0, 1]; {shape}
```

## Accuracy

{results.table(result)}
{source(result)}
Networks: {network}, rate {protocol["evaluate"]["lr"]}; {protocol["networks"]}.

## Repeat

    python -m train.evaluate --run {folder.name}

trains networks as those of the first row; the command below the table makes all of it.{there}
"""


def table(_: str) -> str:
    """Writes the table of all released sets."""
    columns = ("set", "data", "codec", "images per class", "Gaussians each", "bytes per class")
    rows = []
    for folder in folders():
        result, codec = _result(folder), gsdd_jax.load(folder).parts[0].codec
        entry, fitted = result["accuracy"], result["fit_only"]
        cells = [result["dataset"], codec.name, codec.images_per_class, _points(codec), _size(entry)]
        shown = [testset.percent(entry), "not run" if fitted is None else testset.percent(fitted), entry["n"]]
        rows.append([f"[{folder.name}](../sets/{folder.name}/{CARD})", *cells, *shown])
    return results.markdown([*columns, "test accuracy, %", "fitted only, %", "networks"], rows, left=3)


def source(result: dict[str, Any]) -> str:
    """Says how a run was made."""
    commits = ", ".join(str(commit)[:9] for commit in result.get("commits") or [result["commit"]])
    return f"`{result['command']}`, commit {commits}.\n"


def _result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def _size(entry: dict[str, Any]) -> str:
    labels = entry.get("label_bytes_per_class")
    return f"{entry['bytes_per_class']:,}" + (f", labels {labels:,}" if labels else "")


def _points(codec: Any) -> Any:
    return getattr(codec.spec, "num_points", "no")
