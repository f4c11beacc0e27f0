"""The stages of a run that make its distilled sets: fit, train experts, distill.

Each continues where its last checkpoint stands and returns when it is done. Outer steps are taken by all devices of a
run, and by all its processes, which do nothing else but for process 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gsdd_jax import distillation, files, fitting, match, parallel
from gsdd_jax.experts import Experts, IncompleteError, Origin, train_experts
from train import hosts, stopping
from train.checkpoint import Checkpoints
from train.config import RunConfig
from train.errors import DivergedError, UserError
from train.evaluation import PeriodicTests
from train.experiment import Arm, Experiment
from train.labeling import Labeler
from train.progress import Progress
from train.rundir import RunDir, write_json

# What says, in a run directory, what its fit is made from.
FIT = "fit.json"


def fit_stage(
    experiment: Experiment, targets: jax.Array, *, run: RunDir, progress: Progress, fitted: Sequence[Path] = ()
) -> Any:
    """Fits the codec to target images ``[n, h, w, c]``, or takes the initial set, and returns the parameters.

    Of the run directories ``fitted``, the first whose fit is made from the same, as its fit.json says, is taken over.
    """
    config, codec, given, phase = experiment.config, experiment.codec, experiment.start, "main-fit"
    unfitted = config.fit.to == "random" or codec.fitted_by_init or given is not None
    steps, key = 0 if unfitted else config.fit.steps, experiment.key("start")
    begin = jax.jit(fitting.init_fit, static_argnames=("codec", "steps"))
    programs: list[Any] = [begin.lower(key, targets, codec=codec, steps=max(steps, 1))]
    state = programs[0].out_info
    if steps:
        advance = jax.jit(fitting.fit_steps, static_argnames=("codec", "steps", "count"), donate_argnums=0)
        programs.append(advance.lower(state, targets, codec=codec, steps=steps, count=1))
    if given is None:
        _take_over(_made_from(programs, key, targets, steps), fitted, phase, run)
    checkpoints = Checkpoints(run.checkpoints_path / phase)
    newest = checkpoints.newest(state)
    if newest is None:
        state, done, seconds = programs[0].compile()(key, targets), 0, 0.0
        if given is not None:
            state = state._replace(params=jax.tree.map(jnp.copy, given))
        if not steps:
            checkpoints.save(0, state, {"seconds": seconds})
    else:
        done, state, meta = newest
        seconds = meta["seconds"]
    run.truncate(phase, done)
    step: Any = programs[-1].compile() if done < steps else None
    saved = done
    with progress.phase("fit", total=steps, done=done) as bar:
        while done < steps:
            began = time.perf_counter()
            count = min(config.distill.log_every, steps - done)
            for _ in range(count):
                state, psnr = step(state, targets)
            psnr = float(psnr)
            done += count
            seconds += time.perf_counter() - began
            if not np.isfinite(psnr):
                remedy = "another starting point or fit.steps, in another run directory"
                raise _not_finite(phase, f"PSNR not a finite number by step {done}", saved, checkpoints, remedy)
            run.append(phase, done, psnr=psnr, total_seconds=seconds)
            bar.advance(count, f"PSNR {psnr:.2f} dB")
            due = done == steps or done - saved >= config.distill.checkpoint_every
            if due or stopping.requested():
                checkpoints.save(done, state, {"seconds": seconds})
                saved = done
            stopping.raise_if_requested()
    return state.params


def _made_from(programs: Sequence[Any], key: jax.Array, targets: jax.Array, steps: int) -> str:
    """Returns a hash of all that decides a fit: its lowered programs and what they are given.

    The programs hold every setting of a codec that a fit depends on, whatever its name, and none that it does not.
    """
    digest = hashlib.sha256(f"{steps} {targets.shape}".encode())
    for program in programs:
        digest.update(program.as_text().encode())
    for array in (jax.random.key_data(key), targets):
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()


def _take_over(made_from: str, fitted: Sequence[Path], phase: str, run: RunDir) -> None:
    """Copies the checkpoints of a fit that is made from the same, unless there is a fit already, and says what from."""
    own, entry = run.checkpoints_path / phase, {"sha256": made_from}
    if own.exists():
        return
    for other in fitted:
        found = other / own.relative_to(run.path)
        with contextlib.suppress(FileNotFoundError, ValueError):
            if json.loads((other / FIT).read_text()) == entry and found.exists():
                own.parent.mkdir(exist_ok=True)
                # A run that is killed before it is whole fits for itself.
                files.write_folder(own, functools.partial(shutil.copytree, found, dirs_exist_ok=True))
                break
    write_json(run.path / FIT, entry)


def expert_stage(experiment: Experiment, folder: Path, *, progress: Progress) -> Experts:
    """Trains the experts that a folder lacks, or says how to, and opens it.

    Raises:
        UserError: Experts are missing and ``experts.train`` is off.
        ValueError: The folder holds experts of another network, dataset, whitening or training.
    """
    spec, dataset, wanted = experiment.config.experts, experiment.dataset, wanted_experts(experiment)
    try:
        return Experts.open(folder, **wanted)
    except (FileNotFoundError, IncompleteError) as error:
        missing = str(error)
    if not spec.train:
        raise UserError(
            f"{missing}; experts.train is off: set experts.train=true, or run python -m train.experts with the same "
            f"config and settings and --out {folder}"
        )
    images, labels, whitening = dataset.train_images, dataset.train_labels, experiment.whitening
    with progress.phase("train experts", total=spec.count * spec.last_epoch(wanted["objective"])) as bar:

        def trained(group: range, epoch: int, losses: np.ndarray) -> None:
            bar.advance(len(group), f"expert {group.stop} of {spec.count}, loss {losses.mean():.3f}")
            # A group is written when it is whole; the epochs of an unfinished one are lost.
            stopping.raise_if_requested()

        return train_experts(folder, images, labels, whitening=whitening, on_epoch=trained, **wanted)


def wanted_experts(experiment: Experiment) -> dict[str, Any]:
    """Returns what says which experts an experiment is about: the arguments of `Experts.open`."""
    config, dataset = experiment.config, experiment.dataset
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
    return {"origin": origin, "spec": spec, "objective": experiment.expert_window}


def schedule(config: RunConfig, iterations: int) -> optax.Schedule | None:
    """Returns the factor of the codec's updates over so many outer steps."""
    return distillation.cosine(iterations) if config.distill.schedule == "cosine" else None


def distill_stage(
    experiment: Experiment,
    arm: Arm,
    params: Any,
    *,
    run: RunDir | None,
    progress: Progress,
    label: Labeler = lambda *_, **__: None,
    experts: Experts | None = None,
) -> tuple[distillation.State, dict[str, Any] | None]:
    """Runs the outer loop of an arm; returns its final state, or with protocol=paper its best one and that one's row.

    All processes of a run take the same steps, from the state that process 0 has. The others have no run directory, and
    of their parameters only the shapes count.
    """
    config, codec, objective = experiment.config, arm.codec, experiment.objective(arm.codec)
    every, phase, iterations = config.distill.log_every, f"{arm.phase}-distill", arm.iterations
    data, whitening, seed = experiment.dataset, experiment.whitening, experiment.host_seed
    mesh = parallel.mesh_of(config.distill.devices)
    tests = None
    if config.evaluate.protocol == "paper":
        tests = PeriodicTests(experiment, codec, arm.name, iterations, label=label, run=run, progress=progress)
    state, done, seconds = distillation.init_state(objective, params), 0, 0.0
    if run is not None:
        checkpoints = Checkpoints(run.checkpoints_path / phase)
        if (newest := checkpoints.newest(state)) is not None:
            done, state, meta = newest
            seconds = meta["seconds"]
        run.truncate(phase, done)
    done = saved = hosts.gather(done)[0]
    with (
        progress.phase(f"distill {arm.name}", total=iterations, done=done) as bar,
        distillation.Loop(
            objective,
            state if mesh.size == 1 else hosts.share(state),
            experiment.key(arm.purpose),
            match.Source(data.train_images, data.train_labels, data.num_classes, whitening, seed, experts),
            first=done,
            last=iterations,
            schedule=schedule(config, iterations),
            mesh=mesh if mesh.size > 1 else None,
            on_host=config.distill.data == "host",
        ) as loop,
    ):
        if jax.process_count() > 1 and done < iterations:
            # Before they meet, or the first to finish would wait within a step.
            loop.compile()
        # Killed in the middle of it, perhaps.
        if tests is not None and tests.due(done):
            tests.test(done, loop.state)
        hosts.gather()
        while done < iterations:
            began = time.perf_counter()
            count = min(every - done % every, iterations - done)
            if tests is not None:
                count = min(count, tests.until_due(done))
            # The only wait for the device: once per logged line, not per step.
            values = {name: float(value) for name, value in loop.take(count).items()}
            done += count
            due = tests is not None and tests.due(done)
            if run is not None:
                seconds += time.perf_counter() - began
                if bad := [name for name, value in values.items() if not np.isfinite(value)]:
                    what, remedy = f"{', '.join(bad)} not finite by iteration {done}", _remedy(config, arm, values)
                    raise _not_finite(phase, what, saved, checkpoints, remedy)
                run.append(phase, done, **values, total_seconds=seconds)
                bar.advance(count, f"loss {values['loss']:.4g}")
            stop = hosts.stop_requested()
            if run is not None and (
                due or stop or done == iterations or done - saved >= config.distill.checkpoint_every
            ):
                checkpoints.save(done, loop.state, {"seconds": seconds})
                saved = done
            if stop:
                raise stopping.Stopped
            if tests is not None and due:
                tests.test(done, loop.state)
                hosts.gather()
    return (loop.state, None) if tests is None or run is None else tests.best(loop.state)


def _remedy(config: RunConfig, arm: Arm, values: dict[str, float]) -> str:
    here = f"a smaller learning rate ({arm.section}.lr, now {arm.codec.spec.lr:g}"
    if values.get("bad_step", -1) < 0:
        return f"{here}), with --extend {arm.section}.lr=... in this run directory or from the start in another"
    return (
        f"{here}, or objective.lr_lr) with --extend in this run directory, or a smaller objective.syn_lr (now "
        f"{values['syn_lr']:g}) in another: in the last iteration the numbers of the student were not finite from its "
        f"step {values['bad_step']:.0f} on"
    )


def _not_finite(phase: str, what: str, saved: int, checkpoints: Checkpoints, remedy: str) -> DivergedError:
    kept = f"the state of step {saved} is kept in {checkpoints.path}" if saved else "nothing was checkpointed yet"
    return DivergedError(f"{phase}: {what}; {kept}; try {remedy}")
