"""Distil a dataset: ``python -m train.distill --config configs/digits.yaml [key=value ...]``.

Fits the codec, distils it, does the same for the pixel baseline, trains fresh networks on every arm and writes the
run directory. The same command continues an interrupted run to the same bits.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gsdd_jax
from gsdd_jax import codecs, distill, fit, labels, storage, synset
from gsdd_jax.experts import Experts
from gsdd_jax.gaussians import CHOLESKY_SHIFT, Gaussians
from gsdd_jax.match import TrajectorySpec
from train import config as configs
from train import experiment as experiments
from train import hosts, labelling, pictures, report, results, stages
from train.errors import exit_cleanly
from train.evaluation import PeriodicTests, as_stored, evaluate_stage, evaluation_lr
from train.experiment import Experiment
from train.progress import Progress
from train.rundir import RunDir, plain, versions, write_bytes, write_json
from train.stopping import on_sigterm

# What may differ when a run is continued: nothing that touches numbers already computed, or by more than rounding.
MAY_CHANGE = (
    "name",
    "distill.log_every",
    "distill.checkpoint_every",
    # Changes the rounding of sums: a run goes on with the machines there are.
    "distill.devices",
    "experts.path",
    "experts.train",
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
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors too")
    hosts.add_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as distill.iterations=100")
    args = parser.parse_intermixed_args(argv)
    with exit_cleanly(debug=args.debug or None), on_sigterm(), hosts.joined(args) as crew:
        config: configs.RunConfig = configs.load(args.config, args.overrides, smoke=args.smoke)
        experiment = experiments.prepare(config)
        if args.dry_run:
            print(plan(experiment))
            return 0
        out = Path(args.out) if args.out else experiments.run_path(config)
        crew.agree(_identity(experiment))
        if not crew.leader:
            stages.follow(
                experiment,
                crew,
                folder=experiments.expert_path(config, out),
                pixel=lambda: _pixel_codec(experiment),
            )
            return 0
        result = run(experiment, out, Progress(quiet=args.quiet), crew=crew)
        print((out / "table.md").read_text())
        print(f"{out / 'report.html'}  ({result['seconds']:.0f} s)")
    return 0


def _identity(experiment: Experiment) -> dict[str, Any]:
    """Returns what the processes of a run have to have in common."""
    settings = plain(dataclasses.asdict(experiments.resolved(experiment.config, experiment.codec)))
    return {**settings, "data_sha256": experiment.data_identity(), "versions": versions()}


def run(
    experiment: Experiment,
    out: Path,
    progress: Progress,
    *,
    fitted: Sequence[Path] = (),
    crew: hosts.Crew | None = None,
) -> dict[str, Any]:
    """Carries out or continues an experiment in the run directory ``out`` and returns the result.

    Args:
        experiment: What to run.
        out: The run directory.
        progress: Progress bars.
        fitted: Other run directories, of which the first whose fit is made from the same is taken over.
        crew: The processes of the run, whose leader this one is.
    """
    config, dataset = experiment.config, experiment.dataset
    with RunDir(out) as rundir:
        continued = rundir.configure(
            dataclasses.asdict(experiments.resolved(config, experiment.codec)),
            may_change=MAY_CHANGE,
            defaults=configs.defaults(config),
        )
        done = rundir.path / "result.json"
        if continued and done.exists():
            # A damaged one is made anew from the stages, which are all kept.
            with contextlib.suppress(ValueError):
                result = json.loads(done.read_text())
                progress.say(f"{out} holds the finished run; nothing to compute")
                return result
        environment = rundir.record_environment()
        progress.say(
            f"{config.name}: {dataset.name}, {dataset.num_classes} classes, {'x'.join(map(str, dataset.image_shape))}, "
            f"{experiment.codec.images_per_class} images per class in {experiment.bytes_per_class} bytes"
            + (f"; continuing {out}" if continued else "")
        )
        wanted = experiments.arms(config)
        images: dict[str, jax.Array | None] = {name: None for name in wanted}

        codec = experiment.codec
        targets = _targets(experiment)
        start = stages.fit_stage(experiment, codec, targets, run=rundir, progress=progress, arm="main", fitted=fitted)
        # Before its arrays are donated to the first outer step.
        fitted_images = as_stored(codec, start)
        if "fit_only" in wanted:
            images["fit_only"] = fitted_images
        experts = None
        if isinstance(config.objective, TrajectorySpec):
            folder = experiments.expert_path(config, rundir.path)
            experts = stages.expert_stage(experiment, folder, progress=progress)
        label = labelling.label_stage(experiment, experts=experts, run=rundir, progress=progress)
        arm = functools.partial(
            _distilled, experiment, experts=experts, label=label, run=rundir, progress=progress, crew=crew
        )
        state, tested = arm(codec, start, name="distilled", iterations=config.distill.iterations)
        accuracies, lrs = {"distilled": tested}, {"distilled": evaluation_lr(experiment, state)}
        params, meta = state.params, _meta(experiment, environment)
        if isinstance(state.matcher, distill.SynLr):
            meta["syn_lr"] = float(state.matcher.value)
        distilled = synset.SynSet(
            codec,
            codec.loaded(codec.stored(params)),
            experiment.bytes_per_class,
            dataset.class_names,
            meta,
        )
        distilled = dataclasses.replace(distilled, soft=label(distilled.images()))
        sizes = distilled.save(rundir.path / synset.EXPORT)
        # What is evaluated is what was written, not what is in memory.
        written = gsdd_jax.load(rundir.path / synset.EXPORT)
        final = written.images()
        images["distilled"] = final
        soft = {"distilled": written.soft_labels}
        if "fit_only" in wanted:
            soft["fit_only"] = labelling.probabilities(label(fitted_images))

        pixel = None
        if "pixel" in wanted:
            pixel, start = _pixel_start(experiment)
            iterations = config.baselines.pixel_iterations or config.distill.iterations
            state, accuracies["pixel"] = arm(pixel, start, name="pixel", iterations=iterations)
            drawn = as_stored(pixel, state.params)
            images["pixel"], lrs["pixel"] = drawn, evaluation_lr(experiment, state)
            soft["pixel"] = labelling.probabilities(label(drawn))
        rows = {
            name: accuracies.get(name)
            or evaluate_stage(
                experiment,
                name,
                images[name],
                labels=soft.get(name),
                run=rundir,
                progress=progress,
                lr=lrs.get(name),
            )
            for name in wanted
        }
        result = results.collect(
            experiment,
            rows,
            sizes=sizes,
            environment=environment,
            run=rundir,
            pixel=pixel,
            fit_psnr=_fit_psnr(experiment, fitted_images, targets),
            agreement=None if distilled.soft is None else labelling.agreement(distilled.soft),
        )
        write_bytes(rundir.path / "table.md", results.table(result).encode())
        shown = {"images": pictures.grid(experiments.class_rows(codec, final), dataset.class_names)}
        gaussians = codec.gaussians(distilled.params)
        if gaussians is not None:
            shown["ellipses"] = ellipse_picture(codec, gaussians, dataset.class_names)
        for name, png in shown.items():
            write_bytes(rundir.path / f"{name}.png", png)
        report.write(rundir.path, result, shown)
        # Written last: its presence says that the run is finished.
        write_json(done, result)
        return result


def _targets(experiment: Experiment) -> jax.Array:
    config, codec, dataset = experiment.config, experiment.codec, experiment.dataset
    if config.fit.to == "real":
        return experiments.real_images(experiment, codec, purpose="select", how=config.fit.select)
    return fit.solid_targets(dataset.train_images, codec.num_images)


def _distilled(
    experiment: Experiment,
    codec: codecs.Codec,
    start: Any,
    *,
    experts: Experts | None,
    label: labelling.Labeller,
    name: str,
    iterations: int,
    run: RunDir,
    progress: Progress,
    crew: hosts.Crew | None,
) -> tuple[distill.State, dict[str, Any] | None]:
    """Distils an arm; returns its final state, or with protocol=paper its best one and that one's row."""
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
        crew=crew,
    )
    return (state, None) if tests is None else tests.best(state)


def _pixel_start(experiment: Experiment) -> tuple[codecs.Codec, Any]:
    """Returns the codec of the pixel baseline and its start, real images."""
    codec = _pixel_codec(experiment)
    real = experiments.real_images(experiment, codec, purpose="pixel_select", how="random")
    return codec, codec.init(experiment.key("start"), real)


def _pixel_codec(experiment: Experiment) -> codecs.Codec:
    return labels.make_codec(
        experiment.config.baselines.pixel_codec,
        experiment.config.labels,
        image_shape=experiment.dataset.image_shape,
        num_classes=experiment.dataset.num_classes,
        bytes_per_class=experiment.bytes_per_class,
    )


def _fit_psnr(experiment: Experiment, fitted: jax.Array, targets: jax.Array) -> float | None:
    """Returns the mean PSNR of the fitted images as stored, in dB, where real images were fitted."""
    if experiment.config.fit.to != "real" or experiment.codec.name == "pixel":
        return None
    return float(fit.psnr(fitted, targets).mean())


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


def _meta(experiment: Experiment, environment: dict[str, Any]) -> dict[str, Any]:
    """Metadata of the exported set: where it comes from, and the normalisation that networks expect."""
    config, dataset, whole = experiment.config, experiment.dataset, experiment.whole
    channels = experiments.channel_statistics(dataset) if whole is None else whole.channels
    meta = {
        "name": config.name,
        "dataset": dataset.name,
        "objective": config.objective.name,
        "whiten": config.whiten,
        "channel_mean": np.asarray(channels.mean).tolist(),
        "channel_std": np.asarray(channels.std).tolist(),
        "versions": environment["versions"],
        "commit": environment["commit"],
        **({"labels": dataclasses.asdict(config.labels)} if config.labels.kind == "soft" else {}),
    }
    if whole is not None:
        # What train.merge has to know beyond the config, whose codec section is a resolved one.
        meta["subtask"] = {
            "subtasks": config.subtasks,
            "subtask": config.subtask,
            "classes": list(whole.classes),
            "dataset_sha256": whole.fingerprint,
            "codec": dataclasses.asdict(config.codec),
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
    shape = (codec.num_images, *codec.image_shape)
    key = jax.random.key(0)
    params = jax.eval_shape(codec.init, key, jax.ShapeDtypeStruct(shape, np.float32))
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
        steps = labelling.teacher_recipe(experiment).num_steps(len(dataset.train_labels))
        kind = f"trained for {steps} steps" if config.labels.teacher == "train" else "experts"
        lines.append(
            f"soft labels: {size} bytes, {size // codec.num_classes} per class, within the budget; "
            f"teachers: {config.labels.teachers} {kind}"
        )
    state = jax.eval_shape(lambda p: distill.init_state(codec, p, stages.objective(config), experiment.network), params)
    data = jax.eval_shape(lambda: _example_data(experiment))
    step = jax.jit(stages.build_step(experiment, codec, config.distill.iterations), donate_argnums=0)
    memory = step.lower(state, data, key).compile().memory_analysis()
    if memory is not None:
        mib = 2.0**20
        lines += [
            "",
            f"outer step on {jax.devices()[0].device_kind}, by the compiler's own count: "
            f"{memory.argument_size_in_bytes / mib:.0f} MiB arguments (training set, state, whitening), "
            f"{memory.temp_size_in_bytes / mib:.0f} MiB temporary",
        ]
    if isinstance(config.objective, TrajectorySpec):
        count, epochs = config.experts.count, config.objective.last_epoch
        size = count * (epochs + 1) * experiment.network.num_params * storage.ITEMSIZE["float32"]
        lines.append(f"experts: {count} networks, {epochs} epochs each, {size / 2**20:.0f} MiB on disk")
    spec = config.evaluate
    lines.append(
        f"network: {experiment.network.num_params} parameters; evaluation: {spec.seeds} networks of "
        f"{spec.num_steps(codec.num_images)} steps for each of {', '.join(experiments.arms(config))}"
    )
    return "\n".join(lines)


def _example_data(experiment: Experiment) -> distill.Data:
    """Returns data of the shapes that a step gets."""
    objective, mmd = experiment.config.objective, experiment.config.mmd
    real = stages.device_data(experiment)
    matched: distill.DeviceData | distill.ExpertBatch = real
    if isinstance(objective, TrajectorySpec):
        weights = jnp.zeros((objective.segments, experiment.network.num_params))
        matched = distill.ExpertBatch(weights, weights, experiment.whitening)
    if mmd.weight == 0:
        return matched
    return distill.MmdBatch(
        matched, real, jnp.zeros(experiment.network.num_params) if mmd.features == "expert" else None
    )


if __name__ == "__main__":
    sys.exit(main())
