"""Baselines of real images in files of few bytes; see `gsdd_jax.compressed` for what is counted.

A row is one format and one way to choose images. Its quality is the best of those of the config on held-out training
images: networks train on images of the other nine tenths, as many as the budget holds, one for each quality.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax import compressed, evaluation, fitting, labels
from train.errors import ConfigError
from train.experiment import Experiment, embed, hold_out
from train.labeling import in_order
from train.progress import Progress

TITLES = {"webp": "WebP", "avif": "AVIF", "jpeg": "JPEG"}
CHOICES = {"random": "random real images", "kmeans": "real images chosen by k-means"}


class Arm(NamedTuple):
    """A row of the table."""

    select: str
    format: str

    def label(self, quality: int) -> str:
        """Names the row in tables."""
        return f"{CHOICES[self.select]}, {TITLES[self.format]} of quality {quality}"


# By their keys in result.json, such as ``random_webp``.
ARMS = {f"{select}_{format}": Arm(select, format) for select in CHOICES for format in TITLES}


def training_set(experiment: Experiment, arm: Arm, quality: int, index: int) -> tuple[jax.Array, float]:
    """Returns as many real images as the budget holds with their labels, and the bytes per class of the images alone.

    Random images are others for each index.
    """
    dataset, images = experiment.dataset, experiment.dataset.train_images
    classes = dataset.num_classes
    if images.dtype != np.uint8:
        images = np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(experiment.key("compressed", index))))
    # Labels are part of the budget.
    label = labels.nbytes(experiment.config.labels, 1, classes)
    budget = classes * experiment.bytes_per_class

    def filled(candidates: np.ndarray) -> tuple[np.ndarray, int]:
        orders = [rng.permutation(candidates[dataset.train_labels[candidates] == i]) for i in range(classes)]
        found, spent = compressed.fill(images, orders, arm.format, quality, budget, beside=label)
        if not len(found):
            raise ConfigError(
                f"baselines.compressed: {experiment.bytes_per_class} bytes per class hold no {TITLES[arm.format]} "
                f"image of quality {quality}; expected a larger ipc, a smaller baselines.compressed_qualities or []"
            )
        return found, spent

    found, spent = filled(np.arange(len(images)))
    if arm.select == "kmeans":
        features, key = embed(experiment, images), experiment.key("compressed")
        # The number of images decides which they are, and these how many fit: taken from random ones, then corrected.
        for _ in range(2):
            count = min(len(found) * budget // spent // classes, int(np.bincount(dataset.train_labels).min()))
            chosen = fitting.select_images(
                key, dataset.train_labels, count, how="kmeans", num_classes=classes, features=features
            )
            found, spent = filled(chosen)
    return jnp.asarray(found), (spent - label * len(found)) / classes


def choose_quality(
    experiment: Experiment,
    arm: Arm,
    spec: evaluation.EvalSpec,
    entry: dict[str, Any],
    keep: Callable[[], Any],
    progress: Progress,
) -> int:
    """Returns the quality of an arm that is best on held-out training images.

    It and the accuracy of each, those that are missing, are added to `entry`, and `keep` is called after each.
    """
    if "quality" in entry:
        return entry["quality"]
    qualities, known = experiment.config.baselines.compressed_qualities, entry.setdefault("qualities", {})
    held = dataclasses.replace(experiment, dataset=hold_out(experiment.dataset))
    left = [quality for quality in qualities if str(quality) not in known and len(qualities) > 1]
    with progress.phase(f"quality of {TITLES[arm.format]}", total=len(left)) as bar:
        for quality in left:
            images, _ = training_set(held, arm, quality, 0)
            accuracy, _ = evaluation.evaluate_networks(
                experiment.key("evaluate")[None],
                images,
                in_order(len(images), held.dataset.num_classes),
                jnp.asarray(held.dataset.test_images),
                jnp.asarray(held.dataset.test_labels),
                network=experiment.network,
                spec=spec,
                augment=experiment.config.augment,
                whitening=experiment.whitening,
            )
            known[str(quality)] = float(np.nan_to_num(accuracy[0]))
            keep()
            bar.advance(1)
    entry["quality"] = max(qualities, key=lambda quality: known.get(str(quality), 0))
    return entry["quality"]
