"""Distill a dataset: ``python -m train.distill --config configs/digits.yaml [key=value ...]``.

Fits the codec, distills it, does the same for the pixel baseline, trains fresh networks on every arm and writes the
run directory. The same command continues an interrupted run to the same bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gsdd_jax
from gsdd_jax import batches, codecs, data, distillation, files, fitting, labels, match, storage, synset, whiten
from gsdd_jax.experts import Experts
from gsdd_jax.gaussians import CHOLESKY_SHIFT, Gaussians
from train import compilation_cache, hosts, labeling, pictures, report, results, stages
from train import config as configs
from train import experiment as experiments
from train.checkpoint import Checkpoints
from train.errors import ConfigError, UserError, exit_cleanly
from train.evaluation import PeriodicTests, as_stored, evaluate_stage, evaluation_lr
from train.experiment import Experiment
from train.progress import Progress
from train.rundir import RunDir, compare, covered, environment, plain, read_config, read_steps, versions, write_json
from train.stopping import on_sigterm

# What may differ when a run is continued: nothing that touches numbers already computed, or by more than rounding.
MAY_CHANGE = (
    "name",
    "distill.log_every",
    "distill.checkpoint_every",
    # Changes the rounding of sums: a run goes on with the machines there are.
    "distill.devices",
    "baselines.hard_labels",
    "experts.path",
    "experts.train",
    # Which set it is says fit.initial_sha256.
    "fit.initial_set",
    # data.sha256 says which data; these, where they are.
    *experiments.WHEREABOUTS,
    "data.train_split",
    "data.test_split",
)

# What --extend may change: how far, and how fast.
EXTENDABLE = (
    "distill.iterations",
    "distill.schedule",
    "codec.lr*",
    "objective.lr_lr",
    "baselines.pixel_iterations",
    "baselines.pixel_codec.lr*",
)

# Distilled arms: the name of their phase, and the purpose of their random key.
ARMS = {"distilled": ("main", "distill"), "pixel": ("pixel", "pixel_distill")}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m train.distill",
        description=__doc__.split("\n")[0] if __doc__ else None,
        epilog="Settings (KEY=VALUE overrides the file):\n\n" + configs.describe(configs.RunConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="experiment, such as configs/digits.yaml")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="run directory (default: runs/NAME, runs/NAME/subtaskI); an interrupted run is continued",
    )
    parser.add_argument("--smoke", action="store_true", help="shrink the run by the config's smoke block")
    parser.add_argument(
        "--dry-run", action="store_true", help="print budget, shapes and estimated memory; compute nothing"
    )
    parser.add_argument(
        "--extend",
        action="store_true",
        help="go on with a finished, diverged or interrupted run under other settings, such as "
        f"--extend distill.iterations=2000 codec.lr=0.003; may differ: {', '.join(EXTENDABLE)}",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors too")
    hosts.add_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as distill.iterations=100")
    args = parser.parse_intermixed_args(argv)
    with exit_cleanly(debug=args.debug), on_sigterm(), hosts.joined(args):
        if not jax.distributed.is_initialized():
            compilation_cache.enable()
        config: configs.RunConfig = configs.load(args.config, args.overrides, smoke=args.smoke)
        out = Path(args.out) if args.out else experiments.run_path(config)
        if args.extend and not (out / "config.yaml").exists():
            raise UserError(f"--extend: {out} holds no run; expected one, or leave --extend out to start it")
        experiment = experiments.prepare(config)
        if args.dry_run:
            if (out / "config.yaml").exists():
                _check_extension(experiment, out, _refuse_other_run(experiment, out, extend=args.extend))
            print(plan(experiment))
            return 0
        hosts.agree(_identity(experiment))
        if jax.process_index() > 0:
            take_steps(experiment, out)
            return 0
        result = run(experiment, out, Progress(quiet=args.quiet), extend=args.extend)
        print((out / "table.md").read_text())
        print(f"{out / 'report.html'}  ({result['seconds']:.0f} s)")
    return 0


def _identity(experiment: Experiment) -> dict[str, Any]:
    """Returns what the processes of a run have to have in common."""
    settings = plain(dataclasses.asdict(experiment.config))
    for key in experiments.WHEREABOUTS:
        del settings["data"][key.removeprefix("data.")]
    return {**settings, "data_sha256": experiment.data_identity(), "versions": versions()}


def _settings(experiment: Experiment) -> dict[str, Any]:
    """Returns what a run directory compares: the settings of a run, and which of them may be others there."""
    return {
        "config": dataclasses.asdict(experiment.config),
        "asked": dataclasses.asdict(experiment.asked),
        "may_change": MAY_CHANGE,
        "defaults": configs.defaults(experiment.config),
        "extendable": EXTENDABLE,
    }


def _refuse_other_run(experiment: Experiment, path: Path, *, extend: bool) -> dict[str, tuple[Any, Any]]:
    """Refuses to go on with a run of other settings or data, or to hand out its result; returns what extends it."""
    settings, held = _settings(experiment), read_config(path).get("data")
    there = held.get("sha256") if isinstance(held, dict) else None
    # Settings first: another choice of images is better named than its hash.
    settings["config"]["data"]["sha256"] = there or experiment.config.data.sha256
    _, changes = compare(path, extend=extend, **settings)
    where = f"the run in {path} was made from", "choose another run directory"
    if there:
        data.require_content(experiment.config.data.sha256, there, *where)
    # Configs of before do not name their data, but results do.
    if tested := (_result(path) or {}).get("data_sha256"):
        data.require_content(experiment.dataset.fingerprint(), tested, *where)
    return changes


def _result(path: Path) -> dict[str, Any] | None:
    """Reads the result of a run; None where there is none, or a damaged one, to be made anew from the stages."""
    try:
        result = json.loads((path / "result.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return result if isinstance(result, dict) else None


def _extension(experiment: Experiment, path: Path, changes: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Checks that a run can go on under other settings, and returns the entry of its history.

    Its result is set aside, so that it stands for the run of before alone.
    """
    steps = _check_extension(experiment, path, changes)
    result = path / "result.json"
    if result.exists():
        result.replace(path / f"result-{steps.get('main-distill', 0)}.json")
    return {"from": steps, "changes": changes}


def _check_extension(experiment: Experiment, path: Path, changes: Mapping[str, tuple[Any, Any]]) -> dict[str, int]:
    """Refuses an extension that would not change what it says; returns the steps that the phases have reached."""
    config, steps = experiment.config, read_steps(path)
    rates: tuple[str, ...] = ("codec.*", "objective.*", "distill.schedule")
    arms = {"main-distill": ("distill.iterations", config.distill.iterations, rates)}
    if "pixel" in experiments.arms(config):
        key = "baselines.pixel_iterations" if config.baselines.pixel_iterations else "distill.iterations"
        arms["pixel-distill"] = key, pixel_iterations(config), ("baselines.pixel_codec.*",)
    for phase, (key, iterations, rates) in arms.items():
        done = steps.get(phase, 0)
        if changes and iterations < done:
            raise ConfigError(
                f"{key}: expected at least the {done} that {phase} has done in {path}, found {iterations}"
            )
        idle = [name for name in changes if covered(name, rates)]
        if idle and iterations == done:
            raise ConfigError(
                f"{key}: {phase} has done all {done} in {path}, so that another {', '.join(idle)} changes nothing; "
                f"expected more than {done}"
            )
    return steps


def pixel_iterations(config: configs.RunConfig) -> int:
    """Returns the outer steps of the pixel baseline."""
    return config.baselines.pixel_iterations or config.distill.iterations


def run(
    experiment: Experiment,
    out: Path,
    progress: Progress,
    *,
    fitted: Sequence[Path] = (),
    extend: bool = False,
) -> dict[str, Any]:
    """Carries out or continues an experiment in the run directory ``out`` and returns the result.

    Args:
        experiment: What to run.
        out: The run directory.
        progress: Progress bars.
        fitted: Other run directories, of which the first whose fit is made from the same is taken over.
        extend: Whether a run in ``out`` may go on under other settings, see EXTENDABLE.
    """
    config, dataset = experiment.config, experiment.dataset
    with RunDir(out) as rundir:
        if rundir.config_path.exists():
            _refuse_other_run(experiment, rundir.path, extend=extend)
        continued = rundir.configure(
            extend=functools.partial(_extension, experiment, rundir.path) if extend else None, **_settings(experiment)
        )
        if continued and (known := _result(rundir.path)) is not None:
            progress.say(f"{out} holds the finished run; nothing to compute")
            return known
        now = rundir.record_environment()
        progress.say(
            f"{config.name}: {dataset.name}, {dataset.num_classes} classes, {'x'.join(map(str, dataset.image_shape))}, "
            f"{experiment.codec.images_per_class} images per class in {experiment.bytes_per_class} bytes"
            + (f"; continuing {out}" if continued else "")
        )
        wanted = experiments.arms(config)
        images: dict[str, jax.Array | None] = {name: None for name in wanted}

        experts = None
        if experiment.expert_window is not None:
            folder = experiments.expert_path(config, rundir.path)
            experts = stages.expert_stage(experiment, folder, progress=progress)
            hosts.gather()
        codec = experiment.codec
        targets = _targets(experiment)
        start = stages.fit_stage(experiment, codec, targets, run=rundir, progress=progress, arm="main", fitted=fitted)
        # Before its arrays are donated to the first outer step.
        fitted_images = as_stored(codec, start)
        if "fit_only" in wanted:
            images["fit_only"] = fitted_images
        label = labeling.label_stage(experiment, experts=experts, run=rundir, progress=progress)
        arm = functools.partial(_distilled, experiment, experts=experts, label=label, run=rundir, progress=progress)
        state, tested = arm(codec, start, name="distilled", iterations=config.distill.iterations)
        accuracies, lrs = {"distilled": tested}, {"distilled": evaluation_lr(experiment, state)}
        distilled = _set_of(experiment, state.params, state.learned, now)
        distilled = dataclasses.replace(distilled, soft=label(distilled.images(), learned=state.learned))
        sizes = distilled.save(rundir.path / synset.EXPORT)
        # What is evaluated is what was written, not what is in memory.
        written = gsdd_jax.load(rundir.path / synset.EXPORT)
        final = written.images()
        images["distilled"] = final
        # The other rows have labels of the same teachers, at the same precision.
        soft = {"distilled": written.soft_labels, "full_data": None}

        pixel = None
        if "pixel" in wanted:
            pixel, start = _pixel_start(experiment)
            state, accuracies["pixel"] = arm(pixel, start, name="pixel", iterations=pixel_iterations(config))
            drawn = as_stored(pixel, state.params)
            images["pixel"], lrs["pixel"] = drawn, evaluation_lr(experiment, state)
            soft["pixel"] = labeling.probabilities(label(drawn, learned=state.learned))

        def row(name: str, **others: Any) -> dict[str, Any]:
            iteration = {"distilled": config.distill.iterations, "pixel": pixel_iterations(config)}.get(name)
            return evaluate_stage(
                experiment,
                name,
                images[name],
                run=rundir,
                progress=progress,
                lr=lrs.get(name),
                iteration=iteration,
                **others,
            )

        rows = {
            name: accuracies.get(name) or row(name, labels=soft.get(name, labeling.giving(label))) for name in wanted
        }
        if config.baselines.hard_labels:
            for name, found in rows.items():
                if found.get("labels") == "soft":
                    found["hard_labels"] = row(name, test=f"{name}, hard labels")
        result = results.collect(
            experiment,
            rows,
            sizes=sizes,
            environment=now,
            run=rundir,
            pixel=pixel,
            fit_psnr=_fit_psnr(experiment, fitted_images, targets),
            agreement=None if distilled.soft is None else labeling.agreement(distilled.soft),
        )
        files.write_bytes(rundir.path / "table.md", results.table(result).encode())
        shown = {"images": pictures.grid(experiments.class_rows(codec, final), dataset.class_names)}
        if config.fit.to == "real" and experiment.start is None:
            shown["real"] = pictures.grid(experiments.class_rows(codec, targets), dataset.class_names)
        gaussians = codec.gaussians(distilled.params)
        if gaussians is not None:
            shown["ellipses"] = ellipse_picture(codec, gaussians, dataset.class_names)
        for name, png in shown.items():
            files.write_bytes(rundir.path / f"{name}.png", png)
        report.write(rundir.path, result, shown)
        # Written last: its presence says that the run is finished.
        write_json(rundir.path / "result.json", result)
        return result


def take_steps(experiment: Experiment, out: Path) -> None:
    """Takes the outer steps of a run in a process other than process 0, whose run directory is ``out``.

    With experts, their folder has to be readable here too.
    """
    config, experts = experiment.config, None
    if experiment.expert_window is not None:
        # Process 0 trains what is missing.
        hosts.gather()
        experts = Experts.open(experiments.expert_path(config, out), **stages.wanted_experts(experiment))
    arms = {"distilled": (experiment.codec, config.distill.iterations)}
    if "pixel" in experiments.arms(config):
        arms["pixel"] = experiments.pixel_codec(experiment), pixel_iterations(config)
    for name, (codec, iterations) in arms.items():
        _distilled(
            experiment,
            codec,
            jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), _shapes(codec)[1]),
            experts=experts,
            label=lambda images, **_: None,
            name=name,
            iterations=iterations,
            run=None,
            progress=Progress(quiet=True),
        )


def _set_of(experiment: Experiment, params: Any, learned: Mapping[str, Any], now: Mapping[str, Any]) -> synset.SynSet:
    """Returns the set of parameters at stored precision, without soft labels."""
    codec, meta = experiment.codec, _meta(experiment, now)
    meta |= {name: float(value) for name, value in learned.items() if np.ndim(value) == 0}
    stored = codec.dequantize(codec.quantize(params))
    return synset.SynSet(codec, stored, experiment.bytes_per_class, experiment.dataset.class_names, meta)


def from_checkpoint(path: Path) -> tuple[synset.SynSet, Any]:
    """Returns the set of the newest checkpoint of a run, distilled so far or fitted only, and the checkpointed state.

    Soft labels are made as at the end of the run. Its meta says the phase and the step.

    Raises:
        UserError: There is no run or no checkpoint, another process writes there, or the data are others.
    """
    if not (path / "config.yaml").exists():
        raise UserError(f"--checkpoint: {path} is no run directory: there is no config.yaml")
    experiment: Experiment = experiments.prepare(configs.load(path / "config.yaml"))
    config, codec, quiet = experiment.config, experiment.codec, Progress(quiet=True)
    shape, params = _shapes(codec)
    fit = jax.eval_shape(lambda x: fitting.init_fit(jax.random.key(0), x, codec=codec, steps=1), shape)
    state = jax.eval_shape(lambda p: distillation.init_state(experiment.objective(codec), p), params)
    with RunDir(path) as rundir:
        for phase, like in (("main-distill", state), ("main-fit", fit)):
            if phase not in read_steps(path):
                continue
            with Checkpoints(rundir.checkpoints_path / phase) as checkpoints:
                newest = checkpoints.newest(like)
            assert newest is not None
            step, found, _ = newest
            learned = getattr(found, "learned", {})
            made = _set_of(experiment, found.params, learned, environment())
            made.meta.update(phase=phase, step=step)
            experts = None
            if experiment.expert_window is not None and config.labels.teacher == "experts":
                experts = stages.expert_stage(experiment, experiments.expert_path(config, path), progress=quiet)
            label = labeling.label_stage(experiment, experts=experts, run=rundir, progress=quiet)
            return dataclasses.replace(made, soft=label(made.images(), learned=learned)), found
    raise UserError(f"--checkpoint: {path} has no checkpoint yet; expected one of main-fit or main-distill")


def _shapes(codec: codecs.Codec) -> tuple[jax.ShapeDtypeStruct, Any]:
    """Returns the shapes of a codec's images, and of its parameters."""
    images = jax.ShapeDtypeStruct((codec.num_images, *codec.image_shape), np.float32)
    return images, jax.eval_shape(codec.init, jax.random.key(0), images)


def _targets(experiment: Experiment) -> jax.Array:
    config, codec, dataset = experiment.config, experiment.codec, experiment.dataset
    if config.fit.to == "real" and experiment.start is None:
        return experiments.real_images(experiment, codec, purpose="select", how=config.fit.select)
    return fitting.solid_targets(dataset.train_images, codec.num_images)


def _distilled(
    experiment: Experiment,
    codec: codecs.Codec,
    start: Any,
    *,
    experts: Experts | None,
    label: labeling.Labeler,
    name: str,
    iterations: int,
    run: RunDir | None,
    progress: Progress,
) -> tuple[distillation.State, dict[str, Any] | None]:
    """Distills an arm; returns its final state, or with protocol=paper its best one and that one's row."""
    tests = None
    if experiment.config.evaluate.protocol == "paper":
        tests = PeriodicTests(experiment, codec, name, iterations, label=label, run=run, progress=progress)
    phase, purpose = ARMS[name]
    state = stages.distill_stage(
        experiment,
        codec,
        start,
        run=run,
        progress=progress,
        arm=phase,
        iterations=iterations,
        purpose=purpose,
        experts=experts,
        tests=tests,
    )
    return (state, None) if tests is None or run is None else tests.best(state)


def _pixel_start(experiment: Experiment) -> tuple[codecs.Codec, Any]:
    """Returns the codec of the pixel baseline and its start, real images."""
    codec = experiments.pixel_codec(experiment)
    real = experiments.real_images(experiment, codec, purpose="pixel_select", how="random")
    return codec, codec.init(experiment.key("start"), real)


def _fit_psnr(experiment: Experiment, fitted: jax.Array, targets: jax.Array) -> float | None:
    """Returns the mean PSNR of the fitted images as stored, in dB, where real images were fitted."""
    if experiment.config.fit.to != "real" or experiment.start is not None or experiment.codec.name == "pixel":
        return None
    return float(fitting.psnr(fitted, targets).mean())


def ellipse_picture(codec: codecs.Codec, g: Gaussians, class_names: Sequence[str]) -> bytes:
    """Draws the Gaussians of a set as in Figure 9 of the paper."""
    return pictures.ellipse_grid(
        experiments.class_rows(codec, g.mean),
        experiments.class_rows(codec, g.cholesky) + np.array(CHOLESKY_SHIFT),
        experiments.class_rows(codec, g.color),
        experiments.class_rows(codec, g.opacity),
        class_names,
        size=g.size,
    )


def _meta(experiment: Experiment, now: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of the exported set: where it comes from, and the normalization that networks expect."""
    config, dataset, whole = experiment.config, experiment.dataset, experiment.all_classes
    channels = experiment.channels
    meta = {
        "name": config.name,
        "dataset": dataset.name,
        "objective": config.objective.name,
        "whiten": config.whiten,
        "channel_mean": np.asarray(channels.mean).tolist(),
        "channel_std": np.asarray(channels.std).tolist(),
        "versions": now["versions"],
        "commit": now["commit"],
        **({"labels": dataclasses.asdict(config.labels)} if config.labels.kind == "soft" else {}),
    }
    if whole is not None:
        # What train.merge has to know beyond the config, whose codec section is a resolved one.
        meta["subtask"] = {
            "subtasks": config.subtasks,
            "subtask": config.subtask,
            "classes": list(whole.classes),
            "dataset_sha256": whole.fingerprint,
            "codec": dataclasses.asdict(experiment.asked.codec),
        }
    return meta


def plan(experiment: Experiment) -> str:
    """Describes a run without computing it: budget, shapes and the compiler's own count of memory."""
    config, codec, dataset = experiment.config, experiment.codec, experiment.dataset
    lines = [
        f"{config.name}: {dataset.name}, {dataset.num_classes} classes, {len(dataset.train_labels)} training and "
        f"{len(dataset.test_labels)} test images of {'x'.join(map(str, dataset.image_shape))}",
        f"budget: ipc {config.ipc:g} = {experiment.bytes_per_class} bytes per class",
    ]
    _, params = _shapes(codec)
    rows = results.budget_rows(config.ipc, codec, codec.nbytes(params))
    lines += [""] if rows else []
    for row in rows:
        points = f" x {row.points_per_image} Gaussians" if row.points_per_image else ""
        lines.append(f"  {row.what:<48} {row.images} images{points}: {row.floats} floats, {row.bytes} bytes")
    lines += ["", f"parameters (float32 masters of {codec.num_images} images):"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        lines.append(f"  {jax.tree_util.keystr(path, simple=True, separator='.'):<12} {list(leaf.shape)}")
    lines.append(f"  written: {codec.nbytes(params)} bytes, {codec.nbytes(params) / codec.num_classes:g} per class")
    size = labels.nbytes(config.labels, codec.num_images, codec.num_classes)
    if size:
        steps = labeling.teacher_recipe(experiment).num_steps(len(dataset.train_labels))
        teachers = f"teachers: {config.labels.teachers}"
        taught = {
            "train": f"{teachers} trained for {steps} steps",
            "experts": f"{teachers} experts",
            "learned": "learned with the images",
        }
        lines.append(
            f"soft labels: {size} bytes, {size // codec.num_classes} per class, within the budget; "
            f"{taught[config.labels.teacher]}"
        )
    state = jax.eval_shape(lambda p: distillation.init_state(experiment.objective(codec), p), params)
    objective, on_host = experiment.objective(codec), config.distill.data == "host"
    num_params = experiment.network.num_params
    whitening = whiten.eval_shape(config.whiten, dataset.image_shape)
    source = match.Source(dataset.train_images, dataset.train_labels, dataset.num_classes, whitening)
    data = batches.example(objective.needs, source, num_params=num_params, on_host=on_host)
    schedule = stages.schedule(config, config.distill.iterations)
    step = jax.jit(distillation.make_step(objective, schedule=schedule), donate_argnums=0)
    memory = step.lower(state, data, jax.random.key(0)).compile().memory_analysis()
    if memory is not None:
        mib = 2.0**20
        lines += [
            "",
            f"outer step on {jax.devices()[0].device_kind}, by the compiler's own count: "
            f"{memory.argument_size_in_bytes / mib:.0f} MiB arguments (training set, state, whitening), "
            f"{memory.temp_size_in_bytes / mib:.0f} MiB temporary",
        ]
    if (window := experiment.expert_window) is not None:
        count, epochs = config.experts.count, config.experts.last_epoch(window)
        size = count * (epochs + 1) * num_params * storage.ITEMSIZE["float32"]
        lines.append(f"experts: {count} networks, {epochs} epochs each, {size / 2**20:.0f} MiB on disk")
    spec = config.evaluate
    lines.append(
        f"network: {experiment.network.num_params} parameters; evaluation: {spec.seeds} networks of "
        f"{spec.num_steps(codec.num_images)} steps for each of {', '.join(experiments.arms(config))}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
