"""What every table of accuracies has to say of the test images: how many of each class, and which are training ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gsdd_jax import data
from gsdd_jax.data.overlap import found_in
from train.config import EvaluateConfig
from train.errors import ConfigError

# The share of training images among the test images from which on a test is refused: no data set has so many by itself.
REFUSED = 0.5
# The largest class of a test set over its smallest from which on classes are averaged too.
UNEVEN = 1.5
_NAMED = 5


def check(spec: EvaluateConfig, dataset: data.Dataset) -> dict[str, Any]:
    """Returns what result.json says of the test images: how many of each class, and how many equal a training image.

    Raises:
        ConfigError: Half of them or more do, pixel for pixel, and ``evaluate.overlap`` does not allow it.
    """
    total = len(dataset.test_labels)
    overlap = int(found_in(dataset.test_images, dataset.train_images).sum())
    if overlap >= REFUSED * total and spec.overlap == "refuse":
        raise ConfigError(
            f"data.test_split: {overlap} of the {total} test images of {dataset.name} are training images, pixel for "
            f"pixel; expected fewer than half: other images, or evaluate.overlap=allow to test on them all the same"
        )
    return {
        "class_names": list(dataset.class_names),
        "test_images_per_class": np.bincount(dataset.test_labels, minlength=dataset.num_classes).tolist(),
        "test_images_also_in_training": overlap,
    }


def notes(result: Mapping[str, Any]) -> list[str]:
    """Returns what has to stand below a table, a sentence each; nothing of results of before, which do not know."""
    counts, overlap = result.get("test_images_per_class") or [], result.get("test_images_also_in_training")
    found = []
    if overlap:
        found.append(f"{overlap:,} of the {sum(counts):,} test images are training images, pixel for pixel.")
    untested = [name for name, count in zip(result.get("class_names") or [], counts, strict=True) if not count]
    if untested:
        more = f" and {len(untested) - _NAMED} more" if len(untested) > _NAMED else ""
        found.append(f"No test images of {', '.join(untested[:_NAMED])}{more}: accuracies are of the other classes.")
    return found


def percent(entry: Mapping[str, Any]) -> str:
    """Writes the accuracy of an arm for a table, in %: mean and standard deviation over its networks."""
    # One network has no spread to show; results of before may not know how many there were.
    spread = f" ± {100 * entry['std']:.1f}" if entry.get("n") != 1 and entry.get("std") is not None else ""
    return f"{100 * entry['mean']:.1f}{spread}"


def below(result: Mapping[str, Any]) -> str:
    """Returns the notes as the end of a Markdown table."""
    return "".join(f"\n{note}\n" for note in notes(result))


def uneven(result: Mapping[str, Any]) -> bool:
    """Tells whether classes differ so much in their test images that their mean accuracy is another number."""
    counts = [count for count in result.get("test_images_per_class") or [] if count]
    return bool(counts) and max(counts) > UNEVEN * min(counts)
