"""The stages of a run that make its distilled sets: fit, train experts, distil.

Each continues where its last checkpoint stands and returns when it is done.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gsdd_jax import codecs, distill, fit, whiten
from gsdd_jax.data import ClassTable, HostSampler, class_table, prefetch
from gsdd_jax.experts import Experts, IncompleteError, Origin, Segments, train_experts
from gsdd_jax.match import GradientSpec, ObjectiveSpec, TrajectorySpec
from train.checkpoint import Checkpoints
from train.config import RunConfig
from train.errors import UserError
from train.evaluation import PeriodicTests
from train.experiment import Experiment
from train.progress import Progress
from train.rundir import RunDir


def fit_stage(
    experiment: Experiment, codec: codecs.Codec, targets: jax.Array, *, run: RunDir, progress: Progress, arm: str
) -> Any:
    """Fits a codec to its target images and returns the parameters."""
    config = experiment.config
    steps = 0 if config.fit.to == "random" or codec.fitted_by_init else config.fit.steps
    phase = f"{arm}-fit"
    with Checkpoints(run.checkpoints_path / phase) as checkpoints:
        start = jax.jit(lambda key, x: fit.init_fit(key, x, codec=codec, steps=max(steps, 1)))
        state = jax.eval_shape(start, experiment.key("start"), targets)
        latest = checkpoints.latest()
        if latest is None:
            state, done, seconds = start(experiment.key("start"), targets), 0, 0.0
        else:
            state, meta = checkpoints.restore(latest, state)
            done, seconds = latest, meta["seconds"]
        run.truncate(phase, done)
        advance = jax.jit(
            lambda state, x, count: fit.fit_steps(state, x, codec=codec, steps=max(steps, 1), count=count),
            donate_argnums=0,
        )
        saved = done
        with progress.phase(f"fit {arm}", total=steps, done=done) as bar:
            while done < steps:
                began = time.perf_counter()
                count = min(config.distill.log_every, steps - done)
                state, psnr = advance(state, targets, count)
                psnr = float(psnr)
                done += count
                seconds += time.perf_counter() - began
                _stop_if_not_finite(psnr, phase, done, saved, checkpoints, "the starting point or fit.steps")
                run.append(phase, done, psnr=psnr, total_seconds=seconds)
                bar.advance(count, f"PSNR {psnr:.2f} dB")
                if done == steps or done - saved >= config.distill.checkpoint_every:
                    checkpoints.save(done, state, {"seconds": seconds})
                    saved = done
        if steps == 0 and latest is None:
            checkpoints.save(0, state, {"seconds": seconds})
    return state.params


def expert_stage(experiment: Experiment, folder: Path, *, progress: Progress) -> Experts:
    """Trains the experts that a folder lacks, or says how to, and opens it.

    Raises:
        UserError: Experts are missing and ``experts.train`` is off.
        ValueError: The folder holds experts of another network, dataset, whitening or training.
    """
    config, dataset = experiment.config, experiment.dataset
    assert isinstance(config.objective, TrajectorySpec)
    origin = Origin(
        network=config.network,
        image_shape=dataset.image_shape,
        num_classes=dataset.num_classes,
        dataset=experiment.data_identity(),
        whiten=config.whiten,
        augment=config.augment,
    )
    # Subtasks start their experts from different weights.
    spec = dataclasses.replace(config.experts, seed=(config.experts.seed + (config.subtask << 16)) % 2**32)
    wanted: dict[str, Any] = {"origin": origin, "spec": spec, "objective": config.objective}
    try:
        return Experts.open(folder, **wanted)
    except (FileNotFoundError, IncompleteError) as error:
        missing = str(error)
    if not config.experts.train:
        raise UserError(
            f"{missing}; experts.train is off: set experts.train=true, or run python -m train.experts with the same "
            f"config and settings and --out {folder}"
        )
    total = config.experts.count * config.objective.last_epoch
    with progress.phase("train experts", total=total) as bar:
        return train_experts(
            folder,
            dataset.train_images,
            dataset.train_labels,
            transform=whiten.apply,
            transform_params=experiment.whitening,
            on_epoch=lambda group, epoch, losses: bar.advance(
                len(group), f"expert {group.stop} of {config.experts.count}, loss {losses.mean():.3f}"
            ),
            **wanted,
        )


def distill_stage(
    experiment: Experiment,
    codec: codecs.Codec,
    params: Any,
    *,
    run: RunDir,
    progress: Progress,
    arm: str,
    iterations: int,
    purpose: str,
    experts: Experts | None = None,
    tests: PeriodicTests | None = None,
) -> distill.State:
    """Runs the outer loop on a codec's parameters, with tests in between if asked for; returns the final state."""
    config = experiment.config
    phase = f"{arm}-distill"
    with Checkpoints(run.checkpoints_path / phase) as checkpoints:
        state = distill.init_state(codec, params, objective(config), experiment.network)
        latest, done, seconds = checkpoints.latest(), 0, 0.0
        if latest is not None:
            state, meta = checkpoints.restore(latest, state)
            done, seconds = latest, meta["seconds"]
        run.truncate(phase, done)
        step = jax.jit(build_step(experiment, codec, iterations), donate_argnums=0)
        key, saved = experiment.key(purpose), done
        with progress.phase(f"distil {arm}", total=iterations, done=done) as bar:
            batches = _batches(experiment, done, iterations, experts)
            # Killed in the middle of it, perhaps.
            if tests is not None and tests.due(done):
                tests.test(done, state)
            while done < iterations:
                began = time.perf_counter()
                count = min(config.distill.log_every - done % config.distill.log_every, iterations - done)
                if tests is not None:
                    count = min(count, tests.until_due(done))
                for _ in range(count):
                    state, metrics = step(state, next(batches), key)
                # The only wait for the device: once per logged line, not per step.
                values = {name: float(value) for name, value in metrics.items()}
                done += count
                seconds += time.perf_counter() - began
                worst = sum(values.values())
                _stop_if_not_finite(worst, phase, done, saved, checkpoints, _remedy(values))
                run.append(phase, done, **values, total_seconds=seconds)
                bar.advance(count, f"loss {values['loss']:.4g}")
                due = tests is not None and tests.due(done)
                if due or done == iterations or done - saved >= config.distill.checkpoint_every:
                    checkpoints.save(done, state, {"seconds": seconds})
                    saved = done
                if tests is not None and due:
                    tests.test(done, state)
            batches.close()
    return state


def _remedy(values: dict[str, float]) -> str:
    if values.get("bad_step", -1) < 0:
        return "a smaller learning rate (codec.lr)"
    return (
        f"a smaller objective.syn_lr (now {values['syn_lr']:g}) or objective.lr_lr: in the last iteration the numbers "
        f"of the student were not finite from its step {values['bad_step']:.0f} on"
    )


def build_step(experiment: Experiment, codec: codecs.Codec, iterations: int) -> distill.Step:
    """Builds the outer step of an experiment for one of its codecs, out of so many."""
    cosine = experiment.config.distill.schedule == "cosine"
    return distill.make_step(
        codec,
        objective(experiment.config),
        network=experiment.network,
        augment=experiment.config.augment,
        transform=whiten.apply,
        schedule=optax.cosine_decay_schedule(1.0, max(iterations, 1)) if cosine else None,
    )


def objective(config: RunConfig) -> ObjectiveSpec:
    """Returns the objective of an experiment, with what depends on its budget filled in."""
    spec = config.objective
    return spec.for_ipc(config.ipc) if isinstance(spec, GradientSpec) else spec


def device_data(experiment: Experiment) -> distill.DeviceData:
    """Puts the training set on the device as uint8."""
    dataset = experiment.dataset
    table: ClassTable = class_table(dataset.train_labels, dataset.num_classes)
    return distill.DeviceData(jnp.asarray(dataset.train_images), table, experiment.whitening)


def _batches(
    experiment: Experiment, first: int, last: int, experts: Experts | None
) -> Generator[distill.Data, None, None]:
    """Yields the data argument of every step from ``first`` on."""
    config, dataset = experiment.config, experiment.dataset
    if isinstance(config.objective, TrajectorySpec):
        assert experts is not None
        segments = prefetch(Segments(experts, config.objective, seed=experiment.host_seed), first)
        try:
            for _, (start, target) in segments:
                yield distill.ExpertBatch(jnp.asarray(start), jnp.asarray(target), experiment.whitening)
        finally:
            segments.close()
        return
    if config.distill.data == "device":
        data = device_data(experiment)
        for _ in range(first, last):
            yield data
        return
    sampler = HostSampler(
        dataset.train_images,
        dataset.train_labels,
        num_classes=dataset.num_classes,
        batch=config.objective.batch_real,
        seed=experiment.host_seed,
    )
    stream = prefetch(sampler, first)
    try:
        for _, images in stream:
            yield distill.HostBatch(jnp.asarray(images), experiment.whitening)
    finally:
        stream.close()


def _stop_if_not_finite(value: float, phase: str, done: int, saved: int, checkpoints: Checkpoints, remedy: str) -> None:
    if not np.isfinite(value):
        kept = f"the state of step {saved} is kept in {checkpoints.path}" if saved else "nothing was checkpointed yet"
        raise UserError(f"{phase}: not a finite number by step {done}; {kept}; try {remedy}")
