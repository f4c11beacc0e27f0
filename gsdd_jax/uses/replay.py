"""Continual learning: classes come task after task, and of those before only a memory of a few bytes is left.

Each task's images are seen once: they become a part of the memory, within its share of the budget. After each task the
test images of all classes so far are classified by a fresh network that learns from the memory alone (GDumb, Prabhu
et al. 2020), and by one that goes on from task to task, half of whose batches are of the new task and half from the
memory of those before (experience replay, Chaudhry et al. 2019).

Protocol after DM (Zhao & Bilen 2023, section 4.4). Deviations: the budget is of all bytes of the memory's file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax import nets
from gsdd_jax.data import Dataset
from gsdd_jax.errors import InputError
from gsdd_jax.match.trajectory import flattener
from gsdd_jax.uses import archive, learning
from gsdd_jax.uses.summary import Learner, SummarySpec, summarize

# The networks of a stream.
LEARNERS = ("fresh", "continued")


class Progress(NamedTuple):
    """A stream after some of its tasks.

    Attributes:
        fresh: Accuracies in [0, 1], ``[t, tasks]``: after each of ``t`` tasks, on the test images of each; NaN for
            tasks that are still to come.
        continued: The same of the continued network.
        weights: Flat weights ``[p]`` of the continued network.
        sizes: Bytes of the memory's file after each task.
    """

    fresh: np.ndarray
    continued: np.ndarray
    weights: np.ndarray
    sizes: tuple[int, ...]


def class_order(seed: int, num_classes: int) -> np.ndarray:
    """Returns the order of the classes, as the field draws it: ``np.random.seed(seed)``, then a permutation."""
    return np.random.RandomState(seed).permutation(num_classes)


def split(order: Sequence[int] | np.ndarray, tasks: int) -> list[tuple[int, ...]]:
    """Cuts an order of classes into tasks of equally many.

    Raises:
        ValueError: Tasks that do not divide the classes, or a class that comes again.
    """
    classes = [int(label) for label in order]
    if tasks < 1 or len(classes) % tasks:
        raise InputError(f"tasks: expected a divisor of {len(classes)}, the number of classes; found {tasks}")
    if twice := [label for i, label in enumerate(classes) if label in classes[:i]]:
        raise InputError(f"order: expected every class once, found class {twice[0]} again")
    return [tuple(group) for group in np.reshape(classes, (tasks, -1)).tolist()]


def remember(
    key: jax.Array,
    memory: str | os.PathLike[str],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    class_names: Sequence[str],
    spec: SummarySpec,
    share: int,
    learner: Learner,
) -> int:
    """Adds classes to a memory and returns the bytes of its file.

    Args:
        key: Decides all that is drawn; consumed.
        memory: Its file; made if it is not there.
        images: ``[n, h, w, c]`` uint8, of these classes.
        labels: Integers ``[n]`` from 0 among ``class_names``.
        class_names: Of these classes.
        spec: What they are kept as.
        share: Bytes that these classes may add to the file.
        learner: What the networks have in common.

    Raises:
        ValueError: A class that the memory holds already, a share that is too small, or a damaged memory.
    """
    held = archive.read(memory) if os.path.exists(memory) else []
    for number, part in enumerate(held):
        if again := [name for name in class_names if name in part.class_names]:
            raise InputError(f"class {again[0]!r} is in the memory already, since task {number}; each class comes once")
    before = os.path.getsize(memory) if held else 0
    part = summarize(key, images, labels, spec=spec, class_names=class_names, budget=share, learner=learner)
    size = archive.append(memory, part)
    if size > before + share:
        raise InputError(f"budget: {spec.title} takes {size - before} bytes of its share of {share}")
    return size


def stream(
    key: jax.Array,
    dataset: Dataset,
    tasks: Sequence[Sequence[int]],
    memory: str | os.PathLike[str],
    *,
    spec: SummarySpec,
    budget: int,
    learner: Learner,
    start: Progress | None = None,
) -> Iterator[Progress]:
    """Learns tasks one after the other, and yields how things stand after each.

    Everything of a task follows from the key and its number, so that a stream that was killed goes on to the same bits:
    from ``start``, and without distilling a task anew that is in the memory already.

    Args:
        key: Decides everything; the same for all tasks.
        dataset: All images; those of a task are looked at in its turn.
        tasks: Classes of each, from `split`.
        memory: The file.
        spec: What tasks are kept as.
        budget: Bytes of the memory's file in the end; each task has an equal share.
        learner: What the networks have in common.
        start: What was yielded last.

    Raises:
        ValueError: As `remember`, or a memory of other tasks than ``start``.
    """
    network = nets.build(learner.network, dataset.image_shape, dataset.num_classes)
    flatten, unflatten = flattener(network)
    key_init, key_stream = jax.random.split(key)
    none = np.zeros((0, len(tasks)))
    done = start or Progress(none, none, np.asarray(flatten(network.init(key_init))), ())
    shared: dict[str, Any] = {"network": network, "whitening": learner.whitening}
    for task in range(len(done.sizes), len(tasks)):
        keys = jax.random.split(jax.random.fold_in(key_stream, task), 4)
        own = np.flatnonzero(np.isin(dataset.train_labels, tasks[task]))
        images, labels = dataset.train_images[own], dataset.train_labels[own]
        parts = archive.read(memory) if os.path.exists(memory) else []
        if len(parts) not in (task, task + 1):
            raise InputError(f"{memory}: expected {task} tasks, after which the stream goes on; found {len(parts)}")
        if len(parts) == task:
            remember(
                keys[0],
                memory,
                images,
                (labels[:, None] == np.array(tasks[task])).argmax(1),
                class_names=[dataset.class_names[label] for label in tasks[task]],
                spec=spec,
                share=budget // len(tasks),
                learner=learner,
            )
            parts = archive.read(memory)
        size = os.path.getsize(memory)
        held = [archive.labeled(part, dataset.class_names) for part in parts]
        # About as many as there will be in the end: one program for all tasks.
        room = len(tasks) * len(held[0][1])
        real = learning.pool(images, labels)
        fresh = learner.train(keys[1], network.init(keys[2]), (learning.joined(held, room),), network)
        # Of its own task the memory has nothing that the real images do not.
        pools = (real, learning.joined(held[:-1], room)) if task else (real,)
        continued = learner.train(keys[3], unflatten(jnp.asarray(done.weights)), pools, network)
        done = Progress(
            np.vstack([done.fresh, accuracies(fresh, dataset, tasks, task, **shared)]),
            np.vstack([done.continued, accuracies(continued, dataset, tasks, task, **shared)]),
            np.asarray(flatten(continued)),
            (*done.sizes, size),
        )
        yield done


def accuracies(
    params: Any, dataset: Dataset, tasks: Sequence[Sequence[int]], last: int, *, network: nets.Network, whitening: Any
) -> np.ndarray:
    """Returns a row of `Progress`: of all classes up to those of task ``last``, tested on the images of each task."""
    seen = np.concatenate([np.asarray(classes) for classes in tasks[: last + 1]])
    found = learning.predictions(params, dataset.test_images, np.sort(seen), network=network, whitening=whitening)
    hits = found == dataset.test_labels
    row = np.full(len(tasks), np.nan)
    for task, classes in enumerate(tasks[: last + 1]):
        row[task] = hits[np.isin(dataset.test_labels, classes)].mean()
    return row


def average(matrix: np.ndarray) -> np.ndarray:
    """Returns the mean accuracy over the tasks so far, after each task, ``[t]``, from accuracies ``[t, tasks]``."""
    return np.array([row[: task + 1].mean() for task, row in enumerate(matrix)])


def forgetting(matrix: np.ndarray) -> float:
    """Returns how far the tasks before the last have fallen from their best, on average; 0 for one task.

    Source: Chaudhry et al. 2018, equation 3: the best is taken over all times before the last.

    Args:
        matrix: Accuracies ``[t, tasks]``, as in `Progress`.
    """
    last = len(matrix) - 1
    falls = [matrix[task:last, task].max() - matrix[last, task] for task in range(last)]
    return float(np.mean(falls)) if falls else 0.0
