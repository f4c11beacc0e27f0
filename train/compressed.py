"""Baselines of real images in files of few bytes; see `gsdd_jax.compressed` for what is counted.

A row is one format and one way to choose images. Its quality is the best of those of the config on held-out training
images: networks train on images of the other nine tenths, as many as the budget holds, one for each quality.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax import compressed, data, evaluation, fitting
from gsdd_jax import labels as soft
from train.errors import ConfigError
from train.experiment import Experiment, embed, hold_out

TITLES = {"webp": "WebP", "avif": "AVIF", "jpeg": "JPEG"}
CHOICES = {"random": "random real images", "kmeans": "real images chosen by k-means"}


class Arm(NamedTuple):
    """A row of the table."""

    select: str
    format: str

    @property
    def name(self) -> str:
        """Key in result.json, such as ``random_webp``."""
        return "_".join(self)

    def label(self, quality: int) -> str:
        """Names the row in tables."""
        return f"{CHOICES[self.select]}, {TITLES[self.format]} of quality {quality}"


ARMS = {arm.name: arm for select in CHOICES for format in TITLES for arm in [Arm(select, format)]}


def training_set(
    experiment: Experiment, dataset: data.Dataset, arm: Arm, quality: int, index: int
) -> tuple[tuple[jax.Array, jax.Array], float]:
    """Returns as many real images as the budget holds with their labels, and the bytes per class of the images alone.

    Args:
        experiment: The experiment.
        dataset: Its own, or a part of it.
        arm: The row.
        quality: Of all images.
        index: Random images are others for each.
    """
    classes, images = dataset.num_classes, dataset.train_images
    if images.dtype != np.uint8:
        images = np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(experiment.key("compressed", index))))
    # Labels are part of the budget.
    label = soft.nbytes(experiment.config.labels, 1, classes)
    budget = classes * experiment.bytes_per_class

    def filled(candidates: np.ndarray) -> tuple[np.ndarray, int]:
        found, spent = compressed.fill(
            images, [rng.permutation(candidates[dataset.train_labels[candidates] == i]) for i in range(classes)],
            arm.format, quality, budget, beside=label,
        )  # fmt: skip
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
    labels = jnp.repeat(jnp.arange(classes, dtype=jnp.int32), len(found) // classes)
    return (jnp.asarray(found), labels), (spent - label * len(found)) / classes


def choose_quality(
    experiment: Experiment, arm: Arm, spec: evaluation.EvalSpec, known: dict[str, float], keep: Callable[[], Any]
) -> int:
    """Returns the quality of an arm that is best on held-out training images.

    Args:
        experiment: The experiment.
        arm: The row.
        spec: How networks are trained.
        known: Accuracy on the held-out images by quality, as text; those that are missing are added.
        keep: Called after each.
    """
    config = experiment.config
    qualities = config.baselines.compressed_qualities
    if len(qualities) == 1:
        return qualities[0]
    held = hold_out(experiment.dataset)
    for quality in qualities:
        if str(quality) in known:
            continue
        training, _ = training_set(experiment, held, arm, quality, 0)
        accuracy, _ = evaluation.evaluate_networks(
            experiment.key("evaluate")[None],
            *training,
            jnp.asarray(held.test_images),
            jnp.asarray(held.test_labels),
            network=experiment.network,
            spec=spec,
            augment=config.augment,
            whitening=experiment.whitening,
        )
        known[str(quality)] = float(np.nan_to_num(accuracy[0]))
        keep()
    return max(qualities, key=lambda quality: known[str(quality)])
