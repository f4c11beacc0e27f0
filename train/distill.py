"""Distill a dataset: ``python -m train.distill --config configs/digits.yaml [key=value ...]``.

Fits the codec, distills it, does the same for the pixel baseline, trains fresh networks on every arm and writes the
run directory. The same command continues an interrupted run to the same bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gsdd_jax
from gsdd_jax import batches, codecs, data, distillation, fitting, labels, match, storage, synset, whiten
from gsdd_jax.experts import Experts
from gsdd_jax.gaussians import CHOLESKY_SHIFT
from train import compilation_cache, hosts, labeling, pictures, report, results, stages
from train import config as configs
from train import experiment as experiments
from train.checkpoint import Checkpoints
from train.errors import ConfigError, UserError, exit_cleanly
from train.evaluation import as_stored, evaluate_stage, evaluation_lr
from train.experiment import Experiment
from train.progress import Progress
from train.rundir import RunDir, environment, plain, read_steps, versions
from train.stopping import on_sigterm

# What may differ when a run is continued: nothing that touches numbers already computed, or by more than rounding.
MAY_CHANGE = (
    *(
        "name",
        "distill.log_every",
        "distill.checkpoint_every",
        "baselines.hard_labels",
        "experts.path",
        "experts.train",
    ),
    # Changes the rounding of sums: a run goes on with the machines there are.
    "distill.devices",
    # Which set and which data they are say fit.initial_sha256 and data.sha256.
    *("fit.initial_set", "data.train_split", "data.test_split", *experiments.WHEREABOUTS),
)
# What --extend may change: how far, and how fast.
EXTENDABLE = (
    *("distill.iterations", "distill.schedule", "codec.lr*", "objective.lr_lr"),
    *("baselines.pixel_iterations", "baselines.pixel_codec.lr*"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = configs.parser(
        "distill",
        __doc__,
        out="runs/NAME, runs/NAME/subtaskI; an interrupted run is continued",
        epilog="Settings (KEY=VALUE overrides the file):\n\n" + configs.describe(configs.RunConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = "print budget, shapes and estimated memory; compute nothing"
    parser.add_argument("--dry-run", action="store_true", help=what)
    what = "go on with a finished, diverged or interrupted run under other settings, such as --extend codec.lr=0.003"
    parser.add_argument("--extend", action="store_true", help=f"{what}; may differ: {', '.join(EXTENDABLE)}")
    hosts.add_arguments(parser)
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
                _extension(experiment, out, extend=args.extend)
            print(plan(experiment))
            return 0
        hosts.agree(_identity(experiment))
        if jax.process_index() > 0:
            take_steps(experiment, out)
            return 0
        result = run(experiment, out, Progress(quiet=args.quiet), extend=args.extend)
        print((out / "table.md").read_text())
        print(f"{report.place(out)}  ({result['seconds']:.0f} s)")
    return 0


def _identity(experiment: Experiment) -> dict[str, Any]:
    """Returns what the processes of a run have to have in common."""
    settings = plain(dataclasses.asdict(experiment.config))
    for key in experiments.WHEREABOUTS:
        del settings["data"][key.removeprefix("data.")]
    return {**settings, "data_sha256": experiment.data_identity(), "versions": versions()}


def _extension(experiment: Experiment, path: Path, *, extend: bool) -> dict[str, Any] | None:
    """Refuses to go on with a run of other settings or data; returns what the history is to say of an extension."""
    config = experiment.config
    held: configs.RunConfig = configs.load(path / "config.yaml")
    # Settings first: another choice of images is better named than its hash.
    known = dataclasses.replace(config, data=dataclasses.replace(config.data, sha256=held.data.sha256))
    rules: dict[str, Any] = {"may_change": MAY_CHANGE, "extendable": EXTENDABLE, "extend": extend}
    changes = configs.compare(path, held, known, asked=experiment.asked, **rules)
    where = f"the run in {path} was made from", "choose another run directory"
    if held.data.sha256:
        data.require_content(config.data.sha256, held.data.sha256, *where)
    # Configs of before do not name their data, but results do.
    if tested := (results.read(path) or {}).get("data_sha256"):
        data.require_content(experiment.dataset.fingerprint(), tested, *where)
    if not changes:
        return None
    steps = read_steps(path)
    for arm in experiment.distilled():
        phase = f"{arm.phase}-distill"
        done = steps.get(phase, 0)
        if arm.iterations < done:
            raise ConfigError(
                f"{arm.key}: expected at least the {done} that {phase} has done in {path}, found {arm.iterations}"
            )
        ways = [f"{arm.section}.*", *(["objective.*", "distill.schedule"] if arm.name == "distilled" else [])]
        idle = [name for name in changes if configs.covered(name, ways)]
        if idle and arm.iterations == done:
            raise ConfigError(
                f"{arm.key}: {phase} has done all {done} in {path}, so that another {', '.join(idle)} changes nothing; "
                f"expected more than {done}"
            )
    return {"from": steps, "changes": changes}


def run(
    experiment: Experiment, out: Path, progress: Progress, *, fitted: Sequence[Path] = (), extend: bool = False
) -> dict[str, Any]:
    """Carries out or continues an experiment in the run directory ``out`` and returns the result.

    Of other run directories, ``fitted``, the first whose fit is made from the same is taken over. With ``extend`` a run
    in ``out`` may go on under other settings, see EXTENDABLE.
    """
    config, dataset, codec = experiment.config, experiment.dataset, experiment.codec
    with RunDir(out) as rundir:
        path, extension = rundir.path, None
        if rundir.config_path.exists():
            extension = _extension(experiment, path, extend=extend)
        if extension and (path / "result.json").exists():
            # It stands for the run of before alone.
            (path / "result.json").replace(path / f"result-{extension['from'].get('main-distill', 0)}.json")
        continued = rundir.configure(dataclasses.asdict(config), extension=extension)
        if continued and (known := results.read(path)) is not None:
            progress.say(f"{out} holds the finished run; nothing to compute")
            return known
        now = rundir.record_environment()
        progress.say(
            f"{config.name}: {dataset.name}, {dataset.num_classes} classes, {'x'.join(map(str, dataset.image_shape))}, "
            f"{codec.images_per_class} images per class in {experiment.bytes_per_class} bytes"
            + (f"; continuing {out}" if continued else "")
        )
        experts = None
        if experiment.expert_window is not None:
            experts = stages.expert_stage(experiment, experiments.expert_path(config, path), progress=progress)
            hosts.gather()
        # Where real images are fitted.
        real = config.fit.to == "real" and experiment.start is None
        if real:
            targets = experiments.real_images(experiment, codec, purpose="select", how=config.fit.select)
        else:
            targets = fitting.solid_targets(dataset.train_images, codec.num_images)
        start = stages.fit_stage(experiment, targets, run=rundir, progress=progress, fitted=fitted)
        # Before its arrays are donated to the first outer step.
        images = {"fit_only": as_stored(codec, start)}
        label = labeling.label_stage(experiment, experts=experts, run=rundir, progress=progress)
        arms, tested, lrs = experiment.distilled(), dict[str, Any](), {}
        # The other rows have labels of the same teachers, at the same precision.
        soft: dict[str, Any] = {"full_data": None}
        for arm in arms:
            if arm.name == "pixel":
                chosen = experiments.real_images(experiment, arm.codec, purpose="pixel_select", how="random")
                start = arm.codec.init(experiment.key("start"), chosen)
            state, tested[arm.name] = stages.distill_stage(
                experiment, arm, start, run=rundir, progress=progress, label=label, experts=experts
            )
            lrs[arm.name] = evaluation_lr(experiment, state)
            if arm.name == "distilled":
                made = _set_of(experiment, state.params, state.learned, now)
                made = dataclasses.replace(made, soft=label(made.images(), learned=state.learned))
                sizes = made.save(path / synset.EXPORT)
                # What is evaluated is what was written, not what is in memory.
                written = gsdd_jax.load(path / synset.EXPORT)
                images["distilled"], soft["distilled"] = written.images(), written.soft_labels
            else:
                images[arm.name] = drawn = as_stored(arm.codec, state.params)
                soft[arm.name] = labeling.probabilities(label(drawn, learned=state.learned))
        steps = {arm.name: arm.iterations for arm in arms}

        def row(name: str, **others: Any) -> dict[str, Any]:
            where: Any = {"run": rundir, "progress": progress, "lr": lrs.get(name), "iteration": steps.get(name)}
            return evaluate_stage(experiment, name, images.get(name), **where, **others)

        rows = {name: tested.get(name) or row(name, labels=soft.get(name, label)) for name in experiments.arms(config)}
        if config.baselines.hard_labels:
            for name, found in rows.items():
                if found.get("labels") == "soft":
                    found["hard_labels"] = row(name, test=f"{name}, hard labels")
        result = results.collect(
            experiment,
            rows,
            made=written,
            sizes=sizes,
            environment=now,
            run=rundir,
            fit_psnr=float(fitting.psnr(images["fit_only"], targets).mean())
            if real and codec.name != "pixel"
            else None,
        )
        own, names = written.labels, dataset.class_names

        def drawings() -> dict[str, bytes]:
            shown = {"images": pictures.grid(images["distilled"], own, names)}
            if real:
                shown["real"] = pictures.grid(targets, own, names)
            if (g := codec.gaussians(made.params)) is not None:
                factor = g.cholesky + np.array(CHOLESKY_SHIFT)
                shown["ellipses"] = pictures.ellipse_grid((g.mean, factor, g.color, g.opacity), own, names, g.size)
            return shown

        report.finish(rundir, result, drawings)
        return result


def take_steps(experiment: Experiment, out: Path) -> None:
    """Takes the outer steps of a run in a process other than process 0, whose run directory is ``out``.

    With experts, their folder has to be readable here too.
    """
    experts = None
    if experiment.expert_window is not None:
        # Process 0 trains what is missing.
        hosts.gather()
        folder = experiments.expert_path(experiment.config, out)
        experts = Experts.open(folder, **stages.wanted_experts(experiment))
    for arm in experiment.distilled():
        params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), _shapes(arm.codec)[1])
        stages.distill_stage(experiment, arm, params, run=None, progress=Progress(quiet=True), experts=experts)


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
        steps, likes = read_steps(path), {"main-distill": state, "main-fit": fit}
        phase = next((phase for phase in likes if phase in steps), None)
        if phase is None:
            raise UserError(f"--checkpoint: {path} has no checkpoint yet; expected one of main-fit or main-distill")
        newest = Checkpoints(rundir.checkpoints_path / phase).newest(likes[phase])
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


def _shapes(codec: codecs.Codec) -> tuple[jax.ShapeDtypeStruct, Any]:
    """Returns the shapes of a codec's images, and of its parameters."""
    images = jax.ShapeDtypeStruct((codec.num_images, *codec.image_shape), np.float32)
    return images, jax.eval_shape(codec.init, jax.random.key(0), images)


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
    _, params = _shapes(codec)
    size, num_params = codec.nbytes(params), experiment.network.num_params
    lines = [
        f"{config.name}: {dataset.name}, {dataset.num_classes} classes, {len(dataset.train_labels)} training and "
        f"{len(dataset.test_labels)} test images of {'x'.join(map(str, dataset.image_shape))}",
        f"budget: ipc {config.ipc:g} = {experiment.bytes_per_class} bytes per class",
        "",
    ]
    lines += [f"  {what:<48} {spent}" for what, spent in results.budget_rows(config.ipc, codec, size).items()]
    lines += ["", f"parameters (float32 masters of {codec.num_images} images):"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        lines.append(f"  {jax.tree_util.keystr(path, simple=True, separator='.'):<12} {list(leaf.shape)}")
    lines.append(f"  written: {size} bytes, {size / codec.num_classes:g} per class")
    if extra := labels.nbytes(config.labels, codec.num_images, codec.num_classes):
        lines.append(f"soft labels: {extra} bytes, {extra // codec.num_classes} per class, within the budget")
    objective = experiment.objective(codec)
    state = jax.eval_shape(lambda p: distillation.init_state(objective, p), params)
    whitening = whiten.eval_shape(config.whiten, dataset.image_shape)
    source = match.Source(dataset.train_images, dataset.train_labels, dataset.num_classes, whitening)
    on_host = config.distill.data == "host"
    example = batches.example(objective.needs, source, num_params=num_params, on_host=on_host)
    schedule = stages.schedule(config, config.distill.iterations)
    step = jax.jit(distillation.make_step(objective, schedule=schedule), donate_argnums=0)
    memory = step.lower(state, example, jax.random.key(0)).compile().memory_analysis()
    if memory is not None:
        lines += [
            "",
            f"outer step on {jax.devices()[0].device_kind}, by the compiler's own count: "
            f"{memory.argument_size_in_bytes / 2**20:.0f} MiB arguments (training set, state, whitening), "
            f"{memory.temp_size_in_bytes / 2**20:.0f} MiB temporary",
        ]
    if (window := experiment.expert_window) is not None:
        count, epochs = config.experts.count, config.experts.last_epoch(window)
        size = count * (epochs + 1) * num_params * storage.ITEMSIZE["float32"]
        lines.append(f"experts: {count} networks, {epochs} epochs each, {size / 2**20:.0f} MiB on disk")
    spec = config.evaluate
    lines.append(
        f"network: {num_params} parameters; evaluation: {spec.seeds} networks of "
        f"{spec.num_steps(codec.num_images)} steps for each of {', '.join(experiments.arms(config))}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
