"""The stages of a run that make its distilled sets: fit, train experts, distil.

Each continues where its last checkpoint stands and returns when it is done.
"""

from __future__ import annotations

import contextlib
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
from train import stopping
from train.checkpoint import Checkpoints
from train.config import RunConfig
from train.errors import UserError
from train.evaluation import PeriodicTests
from train.experiment import Experiment
from train.progress import Progress
from train.rundir import RunDir

# Added to the seed of a run for the real images of the MMD term, where the host draws them.
MMD_SEED = 2**63


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
        newest = checkpoints.newest(state)
        if newest is None:
            state, done, seconds = start(experiment.key("start"), targets), 0, 0.0
        else:
            done, state, meta = newest
            seconds = meta["seconds"]
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
                if not np.isfinite(psnr):
                    where = f"PSNR not a finite number by step {done}"
                    raise _not_finite(phase, where, saved, checkpoints, "another starting point or fit.steps")
                run.append(phase, done, psnr=psnr, total_seconds=seconds)
                bar.advance(count, f"PSNR {psnr:.2f} dB")
                due = done == steps or done - saved >= config.distill.checkpoint_every
                if due or stopping.requested():
                    checkpoints.save(done, state, {"seconds": seconds})
                    saved = done
                stopping.raise_if_requested()
        if steps == 0 and newest is None:
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

        def trained(group: range, epoch: int, losses: np.ndarray) -> None:
            bar.advance(len(group), f"expert {group.stop} of {config.experts.count}, loss {losses.mean():.3f}")
            # A group is written when it is whole; the epochs of an unfinished one are lost.
            stopping.raise_if_requested()

        return train_experts(
            folder,
            dataset.train_images,
            dataset.train_labels,
            transform=whiten.apply,
            transform_params=experiment.whitening,
            on_epoch=trained,
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
        newest, done, seconds = checkpoints.newest(state), 0, 0.0
        if newest is not None:
            done, state, meta = newest
            seconds = meta["seconds"]
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
                taken = []
                for _ in range(count):
                    state, metrics = step(state, next(batches), key)
                    taken.append(metrics)
                # The only wait for the device: once per logged line, not per step.
                values = {name: float(value) for name, value in metrics.items()}
                done += count
                seconds += time.perf_counter() - began
                if not np.isfinite(list(values.values())).all():
                    raise _not_finite(phase, _first_bad(taken, done), saved, checkpoints, _remedy(values))
                run.append(phase, done, **values, total_seconds=seconds)
                bar.advance(count, f"loss {values['loss']:.4g}")
                due = tests is not None and tests.due(done)
                late = done - saved >= config.distill.checkpoint_every
                if due or done == iterations or late or stopping.requested():
                    checkpoints.save(done, state, {"seconds": seconds})
                    saved = done
                stopping.raise_if_requested()
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
        mmd=experiment.config.mmd,
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
    config = experiment.config
    mmd, trajectory = config.mmd, isinstance(config.objective, TrajectorySpec)
    on_device = config.distill.data == "device" and (mmd.weight > 0 or not trajectory)
    held = device_data(experiment) if on_device else None
    if isinstance(config.objective, TrajectorySpec):
        assert experts is not None
        matched: Generator[Any, None, None] = _segments(experiment, experts, first)
    else:
        matched = _real(experiment, held, config.objective.batch_real, first, seed=experiment.host_seed)
    with contextlib.ExitStack() as open_streams:
        open_streams.callback(matched.close)
        if mmd.weight == 0:
            for _ in range(first, last):
                yield next(matched)
            return
        # Draws apart from those of the objective, of which there may be fewer.
        real = _real(experiment, held, mmd.samples, first, seed=experiment.host_seed + MMD_SEED)
        open_streams.callback(real.close)
        for step in range(first, last):
            weights = None
            if mmd.features == "expert":
                assert experts is not None and isinstance(config.objective, TrajectorySpec)
                expert, _ = Segments(experts, config.objective, seed=experiment.host_seed).choice(step)[0]
                weights = jnp.asarray(experts.row(expert, config.objective.last_epoch))
            yield distill.MmdBatch(next(matched), next(real), weights)


def _segments(experiment: Experiment, experts: Experts, first: int) -> Generator[distill.ExpertBatch, None, None]:
    config = experiment.config
    assert isinstance(config.objective, TrajectorySpec)
    stream = prefetch(Segments(experts, config.objective, seed=experiment.host_seed), first)
    try:
        for _, (start, target) in stream:
            yield distill.ExpertBatch(jnp.asarray(start), jnp.asarray(target), experiment.whitening)
    finally:
        stream.close()


def _real(
    experiment: Experiment, held: distill.DeviceData | None, count: int, first: int, *, seed: int
) -> Generator[distill.DeviceData | distill.HostBatch, None, None]:
    """Yields the training set that the device holds, or ``count`` images per class that the host draws."""
    dataset = experiment.dataset
    while held is not None:
        yield held
    sampler = HostSampler(
        dataset.train_images, dataset.train_labels, num_classes=dataset.num_classes, batch=count, seed=seed
    )
    stream = prefetch(sampler, first)
    try:
        for _, images in stream:
            yield distill.HostBatch(jnp.asarray(images), experiment.whitening)
    finally:
        stream.close()


def _first_bad(taken: list[dict[str, jax.Array]], done: int) -> str:
    """Names the first of the last steps that has a number which is not finite, and which numbers these are."""
    for behind, metrics in zip(range(len(taken) - 1, -1, -1), taken, strict=True):
        bad = [name for name, value in metrics.items() if not np.isfinite(float(value))]
        if bad:
            return f"{', '.join(bad)} not finite in iteration {done - behind}"
    raise AssertionError("the last step was found not to be finite")


def _not_finite(phase: str, what: str, saved: int, checkpoints: Checkpoints, remedy: str) -> UserError:
    kept = f"the state of step {saved} is kept in {checkpoints.path}" if saved else "nothing was checkpointed yet"
    return UserError(f"{phase}: {what}; {kept}; try {remedy}")
