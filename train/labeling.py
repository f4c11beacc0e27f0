"""The soft labels of a run: its teachers, and what they say of the distilled images."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from gsdd_jax import evaluation, labels
from gsdd_jax.experts import Experts
from gsdd_jax.match.trajectory import flattener
from train.checkpoint import Checkpoints
from train.errors import UserError
from train.experiment import Experiment
from train.progress import Progress
from train.rundir import RunDir

PHASE = "teacher"


class Labeler(Protocol):
    """Labels decoded images ``[n, h, w, c]`` in [0,1] of classes ``[n]``, by default as many of each, in order.

    `learned` is what an objective has learned beside them, its labels among it. None where labels are hard.
    """

    def __call__(
        self, images: jax.Array, *, classes: Any = None, learned: Mapping[str, jax.Array] | None = None
    ) -> labels.SoftLabels | None:
        """Returns the labels as they are written."""


def label_stage(experiment: Experiment, *, experts: Experts | None, run: RunDir, progress: Progress) -> Labeler:
    """Trains the teachers that a run lacks, or takes them from the experts, and returns what labels images.

    A continued run finds finished teachers among its checkpoints.
    """
    spec = experiment.config.labels
    if spec.kind == "hard":
        return lambda images, **_: None
    if spec.teacher == "learned":
        return lambda images, *, learned=None, **_: labels.pack(learned["labels"], spec) if learned else None
    teachers = of_experts(experiment, experts) if spec.teacher == "experts" else _trained(experiment, run, progress)

    def label(images: jax.Array, *, classes: Any = None, **_: Any) -> labels.SoftLabels:
        probabilities = labels.label(
            teachers,
            images,
            network=experiment.network,
            temperature=spec.temperature,
            whitening=experiment.whitening,
        )
        classes = in_order(*probabilities.shape) if classes is None else jnp.asarray(classes)
        return labels.pack(labels.toward_class(probabilities, classes, spec.hard_weight), spec)

    return label


def in_order(num_images: int, num_classes: int) -> jax.Array:
    """Returns the classes ``[n]`` of as many images of each, in order."""
    return jnp.arange(num_images) * num_classes // num_images


def probabilities(soft: labels.SoftLabels | None) -> jax.Array | None:
    """Returns the labels ``[n, k]`` as they come back from disk; None for hard ones."""
    return None if soft is None else soft.probabilities()


def of_experts(experiment: Experiment, experts: Experts | None) -> Any:
    """Returns the stacked weights of the first experts after their last epoch."""
    window, count = experiment.expert_window, experiment.config.labels.teachers
    assert experts is not None and window is not None
    last = experiment.config.experts.last_epoch(window)
    rows = jnp.stack([jnp.asarray(experts.row(index, last)) for index in range(count)])
    return jax.vmap(flattener(experiment.network)[1])(rows)


def _trained(experiment: Experiment, run: RunDir, progress: Progress) -> Any:
    """Returns the stacked weights of networks trained on the training set; each is a checkpoint of its own."""
    config, dataset, network = experiment.config, experiment.dataset, experiment.network
    count, spec = config.labels.teachers, config.labels
    # As config.evaluate says, for as long as config.labels says.
    recipe = dataclasses.replace(config.evaluate.training(), epochs=spec.teacher_epochs, steps=spec.teacher_steps)
    like = jax.eval_shape(network.init, experiment.key("teacher"))
    checkpoints = Checkpoints(run.checkpoints_path / PHASE, keep=count)
    kept = [checkpoints.restore(step, like) for step in range(1, (checkpoints.latest() or 0) + 1)]
    teachers, seconds = [params for params, _ in kept], kept[-1][1]["seconds"] if kept else 0.0
    run.truncate(PHASE, len(teachers))
    with progress.phase("train teacher", total=count, done=len(teachers)) as bar:
        for index in range(len(teachers), count):
            began = time.perf_counter()
            params = evaluation.train_network(
                experiment.key("teacher", index),
                jnp.asarray(dataset.train_images),
                jnp.asarray(dataset.train_labels),
                network=network,
                spec=recipe,
                augment=config.augment,
                whitening=experiment.whitening,
            )
            if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params)):
                raise UserError(
                    f"labels: teacher {index} diverged at evaluate.lr={recipe.lr:g}; try a lower one, in another "
                    "run directory"
                )
            seconds += time.perf_counter() - began
            run.append(PHASE, index + 1, total_seconds=seconds)
            checkpoints.save(index + 1, params, {"seconds": seconds})
            teachers.append(params)
            bar.advance(1)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *teachers)
