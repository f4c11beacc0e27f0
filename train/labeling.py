"""The soft labels of a run: its teachers, and what they say of the distilled images."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

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
# From decoded images [n, h, w, c] in [0, 1] to their labels; None where these are hard.
Labeler = Callable[[jax.Array], labels.SoftLabels | None]


def label_stage(experiment: Experiment, *, experts: Experts | None, run: RunDir, progress: Progress) -> Labeler:
    """Trains the teachers that a run lacks, or takes them from the experts, and returns what labels images.

    A continued run finds finished teachers among its checkpoints.

    Args:
        experiment: The experiment.
        experts: Those of trajectory matching.
        run: Run directory.
        progress: Progress bars.

    Raises:
        UserError: A teacher diverged.
    """
    spec = experiment.config.labels
    if spec.kind == "hard":
        return lambda images: None
    teachers = _of_experts(experiment, experts) if spec.teacher == "experts" else _trained(experiment, run, progress)

    def label(images: jax.Array) -> labels.SoftLabels:
        probabilities = labels.label(
            teachers,
            images,
            network=experiment.network,
            temperature=spec.temperature,
            whitening=experiment.whitening,
        )
        return labels.pack(probabilities, spec)

    return label


def probabilities(soft: labels.SoftLabels | None) -> jax.Array | None:
    """Returns the labels ``[n, k]`` as they come back from disk; None for hard ones."""
    return None if soft is None else soft.probabilities()


def agreement(soft: labels.SoftLabels) -> float:
    """Returns the share of images, in class-major order, whose most probable class is their own."""
    best = soft.probabilities().argmax(1)
    return float(jnp.mean(best == jnp.arange(len(best)) * soft.num_classes // len(best)))


def teacher_recipe(experiment: Experiment) -> evaluation.EvalSpec:
    """Returns how teachers are trained: as config.evaluate says, for as long as config.labels says."""
    spec = experiment.config.labels
    recipe = experiment.config.evaluate.training()
    return dataclasses.replace(recipe, epochs=spec.teacher_epochs, steps=spec.teacher_steps)


def _of_experts(experiment: Experiment, experts: Experts | None) -> Any:
    """Returns the stacked weights of the first experts after the last epoch that the objective uses."""
    window, count = experiment.expert_window, experiment.config.labels.teachers
    assert experts is not None and window is not None
    rows = jnp.stack([jnp.asarray(experts.row(index, window.last_epoch)) for index in range(count)])
    return jax.vmap(flattener(experiment.network)[1])(rows)


def _trained(experiment: Experiment, run: RunDir, progress: Progress) -> Any:
    """Returns the stacked weights of networks trained on the training set; each is a checkpoint of its own."""
    config, dataset, network = experiment.config, experiment.dataset, experiment.network
    count, recipe = config.labels.teachers, teacher_recipe(experiment)
    like = jax.eval_shape(network.init, experiment.key("teacher"))
    with Checkpoints(run.checkpoints_path / PHASE, keep=count) as checkpoints:
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
