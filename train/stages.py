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
from jax.sharding import Mesh

from gsdd_jax import codecs, distillation, files, fitting, parallel
from gsdd_jax.experts import Experts, IncompleteError, Origin, train_experts
from train import hosts, stopping
from train.checkpoint import Checkpoints
from train.config import RunConfig
from train.errors import DivergedError, UserError
from train.evaluation import PeriodicTests
from train.experiment import Experiment
from train.progress import Progress
from train.rundir import RunDir, write_json

# What says, in a run directory, what its fit is made from.
FIT = "fit.json"


def fit_stage(
    experiment: Experiment,
    codec: codecs.Codec,
    targets: jax.Array,
    *,
    run: RunDir,
    progress: Progress,
    arm: str,
    fitted: Sequence[Path] = (),
) -> Any:
    """Fits a codec to its target images, or takes the initial set, and returns the parameters.

    Args:
        experiment: The experiment.
        codec: What is fitted.
        targets: ``[n, h, w, c]`` in [0,1].
        run: The run directory; its fit.json says what the fit is made from.
        progress: Progress bars.
        arm: Prefix of the phase.
        fitted: Other run directories, of which the first whose fit is made from the same is taken over.
    """
    config, given = experiment.config, experiment.start
    unfitted = config.fit.to == "random" or codec.fitted_by_init or given is not None
    steps = 0 if unfitted else config.fit.steps
    phase, key = f"{arm}-fit", experiment.key("start")
    start: Any = jax.jit(fitting.init_fit, static_argnames=("codec", "steps")).lower(
        key, targets, codec=codec, steps=max(steps, 1)
    )
    state = start.out_info
    advance: Any = jax.jit(fitting.fit_steps, static_argnames=("codec", "steps", "count"), donate_argnums=0)
    programs = [start]
    if steps:
        programs.append(advance := advance.lower(state, targets, codec=codec, steps=steps, count=1))
    if given is None:
        _take_over(_made_from(programs, key, targets, steps), fitted, phase, run)
    with Checkpoints(run.checkpoints_path / phase) as checkpoints:
        newest = checkpoints.newest(state)
        if newest is None:
            state, done, seconds = start.compile()(key, targets), 0, 0.0
            if given is not None:
                state = state._replace(params=jax.tree.map(jnp.copy, given))
        else:
            done, state, meta = newest
            seconds = meta["seconds"]
        run.truncate(phase, done)
        if done < steps:
            advance = advance.compile()
        saved = done
        with progress.phase(f"fit {arm}", total=steps, done=done) as bar:
            while done < steps:
                began = time.perf_counter()
                count = min(config.distill.log_every, steps - done)
                for _ in range(count):
                    state, psnr = advance(state, targets)
                psnr = float(psnr)
                done += count
                seconds += time.perf_counter() - began
                if not np.isfinite(psnr):
                    where = f"PSNR not a finite number by step {done}"
                    raise _not_finite(
                        phase,
                        where,
                        saved,
                        checkpoints,
                        "another starting point or fit.steps, in another run directory",
                    )
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
    config, dataset, wanted = experiment.config, experiment.dataset, wanted_experts(experiment)
    try:
        return Experts.open(folder, **wanted)
    except (FileNotFoundError, IncompleteError) as error:
        missing = str(error)
    if not config.experts.train:
        raise UserError(
            f"{missing}; experts.train is off: set experts.train=true, or run python -m train.experts with the same "
            f"config and settings and --out {folder}"
        )
    total = config.experts.count * config.experts.last_epoch(wanted["objective"])
    with progress.phase("train experts", total=total) as bar:

        def trained(group: range, epoch: int, losses: np.ndarray) -> None:
            bar.advance(len(group), f"expert {group.stop} of {config.experts.count}, loss {losses.mean():.3f}")
            # A group is written when it is whole; the epochs of an unfinished one are lost.
            stopping.raise_if_requested()

        return train_experts(
            folder,
            dataset.train_images,
            dataset.train_labels,
            whitening=experiment.whitening,
            on_epoch=trained,
            **wanted,
        )


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


def device_mesh(config: RunConfig) -> Mesh | None:
    """Returns the devices that take the outer steps, or None where there is one.

    Raises:
        ValueError: There are not so many.
    """
    mesh = parallel.mesh_of(config.distill.devices)
    return mesh if mesh.size > 1 else None


def distill_stage(
    experiment: Experiment,
    codec: codecs.Codec,
    params: Any,
    *,
    run: RunDir | None,
    progress: Progress,
    arm: str,
    iterations: int,
    purpose: str,
    experts: Experts | None = None,
    tests: PeriodicTests | None = None,
) -> distillation.State:
    """Runs the outer loop on a codec's parameters, with tests in between if asked for; returns the final state.

    All processes of a run take the same steps, from the state that process 0 has. The others have no run directory, and
    of their parameters only the shapes count.
    """
    config, objective = experiment.config, experiment.objective(codec)
    phase, mesh = f"{arm}-distill", device_mesh(config)
    with contextlib.ExitStack() as opened:
        state, done, seconds = distillation.init_state(objective, params), 0, 0.0
        if run is not None:
            checkpoints = opened.enter_context(Checkpoints(run.checkpoints_path / phase))
            if (newest := checkpoints.newest(state)) is not None:
                done, state, meta = newest
                seconds = meta["seconds"]
            run.truncate(phase, done)
        done = saved = hosts.gather(done)[0]
        bar = opened.enter_context(progress.phase(f"distill {arm}", total=iterations, done=done))
        loop = opened.enter_context(
            distillation.Loop(
                objective,
                state if mesh is None else hosts.share(state),
                experiment.key(purpose),
                experiment.source(experts),
                first=done,
                last=iterations,
                schedule=schedule(config, iterations),
                mesh=mesh,
                on_host=config.distill.data == "host",
            )
        )
        if jax.process_count() > 1 and done < iterations:
            # Before they meet, or the first to finish would wait within a step.
            loop.compile()
        # Killed in the middle of it, perhaps.
        if tests is not None and tests.due(done):
            tests.test(done, loop.state)
        hosts.gather()
        while done < iterations:
            began = time.perf_counter()
            count = min(config.distill.log_every - done % config.distill.log_every, iterations - done)
            if tests is not None:
                count = min(count, tests.until_due(done))
            taken = loop.take(count)
            # The only wait for the device: once per logged line, not per step.
            values = {name: float(value) for name, value in taken[-1].items()}
            done += count
            due = tests is not None and tests.due(done)
            if run is not None:
                seconds += time.perf_counter() - began
                if not np.isfinite(list(values.values())).all():
                    raise _not_finite(phase, _first_bad(taken, done), saved, checkpoints, _remedy(config, arm, values))
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
    return loop.state


def _remedy(config: RunConfig, arm: str, values: dict[str, float]) -> str:
    key, codec = ("codec", config.codec) if arm == "main" else ("baselines.pixel_codec", config.baselines.pixel_codec)
    here = f"a smaller learning rate ({key}.lr, now {codec.lr:g}"
    if values.get("bad_step", -1) < 0:
        return f"{here}), with --extend {key}.lr=... in this run directory or from the start in another"
    return (
        f"{here}, or objective.lr_lr) with --extend in this run directory, or a smaller objective.syn_lr (now "
        f"{values['syn_lr']:g}) in another: in the last iteration the numbers of the student were not finite from its "
        f"step {values['bad_step']:.0f} on"
    )


def _first_bad(taken: list[dict[str, jax.Array]], done: int) -> str:
    """Names the first of the last steps that has a number which is not finite, and which numbers these are."""
    for behind, metrics in zip(range(len(taken) - 1, -1, -1), taken, strict=True):
        bad = [name for name, value in metrics.items() if not np.isfinite(float(value))]
        if bad:
            return f"{', '.join(bad)} not finite in iteration {done - behind}"
    raise AssertionError("the last step was found not to be finite")


def _not_finite(phase: str, what: str, saved: int, checkpoints: Checkpoints, remedy: str) -> DivergedError:
    kept = f"the state of step {saved} is kept in {checkpoints.path}" if saved else "nothing was checkpointed yet"
    return DivergedError(f"{phase}: {what}; {kept}; try {remedy}")
