"""CIFAR-10 distilled into packed Gaussians for ever longer, through the library's own verbs; for `benchmarks.gpu`.

Each row is a distillation of its own from the same fit, its learning rate lowered to 0 along a cosine, so that it says
what so many seconds are worth; networks of the same kind are then trained on it and tested once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

import gsdd_jax as gsdd
from benchmarks import timing

SEED = 0


class Sizes(NamedTuple):
    """What is distilled, and how it is tested.

    Attributes:
        codec: Its images per class and Gaussians per image are the budget.
        network: Of matching and tests.
        objective: What is matched.
        training: Of the tests.
        augment: Of matching and tests.
        fit_steps: Of the start.
        iterations: Of each row; beyond the first, one is begun if it will end in time.
    """

    codec: gsdd.PackedGaussians | gsdd.Pixels
    network: gsdd.ConvNet
    objective: gsdd.DistributionMatching
    training: gsdd.Training
    augment: gsdd.Dsa
    fit_steps: int
    iterations: tuple[int, ...]


FULL = Sizes(
    # 12,268 bytes per class: the budget of one float32 image.
    gsdd.PackedGaussians(images_per_class=86, num_points=22, bits_cholesky=7),
    gsdd.ConvNet(depth=3, width=128),
    gsdd.DistributionMatching(batch_real=256, class_chunk=10),
    gsdd.Training(steps=1000, batch=256, lr=0.01, seeds=3, parallel=3),
    gsdd.Dsa(),
    fit_steps=1000,
    iterations=(100, 400, 1600, 6400, 25600),
)
TINY = Sizes(
    gsdd.Pixels(images_per_class=1),
    gsdd.ConvNet(depth=1, width=4),
    gsdd.DistributionMatching(batch_real=2),
    gsdd.Training(steps=2, batch=2, seeds=1),
    gsdd.Dsa(strategy="none"),
    fit_steps=2,
    iterations=(2,),
)


def run(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], deadline: timing.Deadline, sizes: Sizes
) -> Iterator[dict[str, Any]]:
    """Distills and tests, with more iterations each time, while there is time.

    Args:
        train: Training images, uint8 ``[n, h, w, 3]``, and their labels.
        test: Test images and labels.
        deadline: When the last row should have ended.
        sizes: Of everything.

    Yields:
        A row: ``iterations``, 0 for the fit alone; ``seconds`` from images on the host to the set, fit and compilation
        included; ``ms_per_iteration`` without them; ``bytes`` of the set; ``accuracy``, and ``test_seconds`` it took.
    """
    key_fit, key_distill, key_test = jax.random.split(jax.random.key(SEED), 3)
    began = time.perf_counter()
    fitted = synset = gsdd.fit(key_fit, *train, codec=sizes.codec, steps=sizes.fit_steps, progress=False)
    jax.block_until_ready(fitted.params)
    fit_seconds = time.perf_counter() - began
    seconds = ready = rate = test_seconds = 0.0

    def on_step(step: int, metrics: dict[str, jax.Array]) -> None:
        nonlocal ready
        if step == 1:
            jax.block_until_ready(metrics)
            ready = time.perf_counter() - began

    for iterations in (0, *sizes.iterations):
        if rate and ready + rate * iterations + test_seconds > deadline.left():
            return
        if iterations:
            began = time.perf_counter()
            synset = gsdd.distill(
                key_distill,
                *train,
                codec=sizes.codec,
                objective=sizes.objective,
                network=sizes.network,
                augment=sizes.augment,
                steps=iterations,
                start=fitted,
                progress=False,
                on_step=on_step,
            )
            seconds = time.perf_counter() - began
            rate = (seconds - ready) / (iterations - 1)
        began = time.perf_counter()
        found = gsdd.evaluate(
            key_test,
            synset,
            *test,
            network=sizes.network,
            training=sizes.training,
            augment=sizes.augment,
            progress=False,
        )
        test_seconds = time.perf_counter() - began
        yield {
            "iterations": iterations,
            "seconds": fit_seconds + seconds,
            "ms_per_iteration": 1e3 * rate,
            "bytes": synset.nbytes,
            "accuracy": {"mean": found.mean, "std": found.std, "accuracies": list(found.networks)},
            "test_seconds": test_seconds,
        }


def line(row: dict[str, Any]) -> str:
    """Formats a row for a terminal."""
    accuracy = row["accuracy"]
    return (
        f"{row['iterations']:6} iterations, {row['seconds']:.1f} s ({row['ms_per_iteration']:.2f} ms each): "
        f"{100 * accuracy['mean']:.2f} +- {100 * accuracy['std']:.2f} %, tested in {row['test_seconds']:.1f} s"
    )
