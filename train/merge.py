"""Merge the subtasks of a federated distillation: ``python -m train.merge RUN... [--out DIR] [key=value ...]``.

``subtasks=k`` splits the classes of an experiment into k runs that know nothing of each other. `train.launch` starts
them and this command; where something else does, it takes their directories::

    python -m train.merge runs/digits/subtask*

The merged set is written as a run directory, so that ``python -m train.evaluate --run DIR`` and `gsdd_jax.load` take it
like any other. Fresh networks are trained on it and tested on all classes, as the config says; overrides such as
evaluate.seeds=5 apply to these tests. The same command continues an interrupted merge.

After D3, which trains its subtasks by one script, labels their images by a teacher of all classes and reports the best
of repeated tests. Here soft labels are those of the subtasks' own teachers, which know their classes alone, or with
settings of ``labels`` those of a teacher of all classes, and networks are tested once.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import gsdd_jax
from gsdd_jax import data, labels, match, nets, synset
from gsdd_jax.exchange import renamed
from gsdd_jax.merged import MergedSet
from train import commands, compilation_cache, labeling, pictures, report, results, testset
from train import config as configs
from train import experiment as experiments
from train.distill import MAY_CHANGE
from train.errors import ConfigError, UserError, exit_cleanly
from train.evaluation import evaluate_stage
from train.experiment import Experiment
from train.progress import Progress
from train.rundir import RunDir, differences, plain, read_command

# In which subtasks of one experiment may differ; whether their data are the same is seen by the data themselves.
MAY_DIFFER = (*MAY_CHANGE, "subtask", "data.sha256", "fit.initial_sha256", "baselines.pixel_codec.images_per_class")
# Sections and settings that a merge may override: what follows the set, not what made it.
OVERRIDES = ("name", "data", "network", "augment", "evaluate", "baselines", "labels")
# How the whole was tested, where its parts were chosen by tests.
PAPER = "; the set of each subtask is the one of all tested iterations that was best on the test images of its classes"
# Rows that a merged set has no images for: fits and pixels are those of the subtasks.
OF_SUBTASKS = ("fit_only", "pixel")


class Subtask(NamedTuple):
    """A finished run, as far as it matters here."""

    path: Path
    config: configs.RunConfig
    synset: synset.SynSet
    result: dict[str, Any]

    @property
    def origin(self) -> dict[str, Any]:
        """What the exported set says about the split."""
        return renamed(self.synset.meta["subtask"], "subtask")

    @property
    def identity(self) -> dict[str, Any]:
        """What all subtasks of an experiment have in common, and a little more; see MAY_DIFFER."""
        shared = {"dataset_sha256": self.origin["dataset_sha256"], "image_shape": self.synset.codec.image_shape}
        # The codec as it was asked for: what follows from the number of classes may differ.
        shared["codec"] = self.origin["codec"]
        # Configs of before leave loops open.
        shared["objective"] = dataclasses.asdict(match.resolved(self.config.objective, self.config.ipc))
        return plain(dataclasses.asdict(self.config) | shared)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = commands.parser(
        "merge",
        __doc__,
        epilog="Settings of the tests can be overridden, such as evaluate.seeds=5 baselines.full_data=false. With "
        "settings of labels, such as labels.kind=soft labels.dtype=uint8 labels.top_k=3, one teacher of all classes "
        "labels the merged set.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished run directories, one of every subtask")
    parser.add_argument("--out", metavar="DIR", help="run directory of the merged set (default: runs/NAME/merged)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_intermixed_args(argv)
    # Searches name run directories after settings.
    paths = [Path(text) for text in args.runs if "=" not in text or Path(text).is_dir()]
    overrides = [text for text in args.runs if "=" in text and not Path(text).is_dir()]
    with exit_cleanly(debug=args.debug):
        compilation_cache.enable()
        subtasks = collect(paths)
        out = Path(args.out) if args.out else Path("runs") / subtasks[0].config.name / "merged"
        merge(subtasks, out, Progress(quiet=args.quiet), overrides)
        print((out / "table.md").read_text())
        print(report.place(out))
    return 0


def collect(paths: Sequence[Path]) -> list[Subtask]:
    """Reads finished subtasks and checks that they are all of one experiment, each once; returns them in order."""
    if not paths:
        raise UserError("RUN: expected run directories of subtasks, found none")
    found = sorted(map(_read, paths), key=lambda one: one.config.subtask)
    for one, other in itertools.pairwise(found):
        apart = differences(one.identity, other.identity)
        if apart := {key: values for key, values in apart.items() if key not in MAY_DIFFER}:
            values = "; ".join("{} is {} there and {} here".format(key, *both) for key, both in apart.items())
            raise UserError(f"{other.path} does not belong to {one.path}: {values}; expected runs of one experiment")
        if one.config.subtask == other.config.subtask:
            raise UserError(
                f"subtask {one.config.subtask} is there twice: {one.path} and {other.path}; leave one of them out"
            )
    first, total = found[0], found[0].config.subtasks
    if missing := sorted({*range(total)} - {one.config.subtask for one in found}):
        raise UserError(
            f"missing of {total} subtasks: {', '.join(map(str, missing))}; start each by the command of {first.path}, "
            f"with its own subtask and --out: {read_command(first.path) or 'python -m train.distill --config FILE'}"
        )
    return found


def _read(path: Path) -> Subtask:
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: expected a run directory that train.distill wrote; there is no config.yaml")
    config: configs.RunConfig = configs.load(path / "config.yaml")
    if config.subtasks == 1:
        raise UserError(f"{path}: subtasks: expected a run of one of several subtasks, found 1: a whole experiment")
    if (result := results.read(path)) is None:
        raise UserError(f"{path}: not finished; continue with: {read_command(path) or 'the command that wrote it'}")
    loaded = gsdd_jax.load(path)
    if not isinstance(loaded, synset.SynSet) or "subtask" not in loaded.meta:
        raise UserError(f"{path}: the exported set is not the one of a subtask, as its config.yaml says it should be")
    return Subtask(path, config, loaded, result)


def merge(subtasks: Sequence[Subtask], out: Path, progress: Progress, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Writes the merged set of all subtasks into the run directory ``out``, tests it, and returns the result."""
    config = _whole_config(subtasks[0], overrides)
    anew = any(_section(text) == "labels" for text in overrides)
    parts = tuple(dataclasses.replace(one.synset, soft=None) if anew else one.synset for one in subtasks)
    merged = MergedSet(parts, _meta(subtasks))
    # Before anything is written.
    experiment = _whole(config, merged, subtasks[0].origin["dataset_sha256"])
    if anew:
        _check_labels(config, merged)
    with RunDir(out) as rundir:
        if rundir.config_path.exists():
            held: configs.RunConfig = configs.load(rundir.config_path)
            configs.compare(out, held, experiment.config, asked=experiment.asked, may_change=MAY_CHANGE)
        continued = rundir.configure(dataclasses.asdict(experiment.config))
        if continued and (rundir.path / synset.EXPORT / synset.MANIFEST).exists():
            there = gsdd_jax.load(rundir.path)
            # The tests of one set must not stand for another.
            if synset.fingerprint(there.parts) != synset.fingerprint(merged.parts):
                raise UserError(f"{out} holds another set than these subtasks make: delete it or choose another --out")
            if (known := results.read(out)) is not None:
                progress.say(f"{out} holds the finished merge; nothing to compute")
                return known
        environment = rundir.record_environment()
        if anew:
            label = labeling.label_stage(experiment, experts=None, run=rundir, progress=progress)
            merged = dataclasses.replace(merged, soft=label(merged.images(), classes=merged.labels))
        sizes = merged.save(rundir.path / synset.EXPORT)
        # What is evaluated is what was written, not what is in memory.
        written = gsdd_jax.load(rundir.path / synset.EXPORT)
        images, own, soft = written.images(), written.labels, written.soft_labels
        progress.say(
            f"{config.name}: {len(subtasks)} subtasks, {len(written.class_names)} classes, {len(own)} images in "
            f"{sizes['payload']} bytes"
        )
        lr = merged.meta.get("syn_lr") if config.evaluate.lr_from == "syn_lr" else None
        of_set: dict[str, Any] = {"labels": own if soft is None else soft, "lr": lr}
        rows = {
            name: evaluate_stage(
                experiment,
                name,
                images if name == "distilled" else None,
                run=rundir,
                progress=progress,
                **(of_set if name == "distilled" else {}),
            )
            for name in experiments.arms(config)
            if name not in OF_SUBTASKS
        }
        result = results.collect(experiment, rows, made=written, sizes=sizes, environment=environment, run=rundir)
        result |= _of_subtasks(subtasks, result)
        report.finish(
            rundir,
            result,
            lambda: {"images": pictures.grid(images, own, written.class_names)},
            "\n" + table(result),
        )
        return result


def _whole_config(subtask: Subtask, overrides: Sequence[str]) -> configs.RunConfig:
    """Returns the config of a subtask as that of the whole, with the codec as it was asked for."""
    for text in overrides:
        if _section(text) not in OVERRIDES:
            raise UserError(
                f"override '{text}': the set is made already; expected a setting of {', '.join(OVERRIDES)}, found "
                f"{_section(text)}"
            )
    codec = f"codec={json.dumps(subtask.origin['codec'])}"
    return configs.load(subtask.path / "config.yaml", [codec, "subtasks=1", "subtask=0", *overrides])


def _section(override: str) -> str:
    return override.partition("=")[0].partition(".")[0].strip()


def _check_labels(config: configs.RunConfig, merged: MergedSet) -> None:
    """Refuses labels of the whole that no teacher of all classes gives, or that leave the budget."""
    spec = config.labels
    if spec.kind == "hard" or spec.teacher == "experts":
        key, expected = ("kind", "soft") if spec.kind == "hard" else ("teacher", "train")
        raise ConfigError(
            f"labels.{key}: a merged set is labeled by a teacher of all classes; expected {expected}, found "
            f"{getattr(spec, key)} (or no setting of labels, to keep those of the subtasks)"
        )
    images, classes = len(merged.labels), len(merged.class_names)
    needed, available = labels.nbytes(spec, images, classes), classes * merged.bytes_per_class - merged.nbytes
    if needed > available:
        raise ConfigError(
            f"labels: {images} labels of {needed // images} bytes need {needed} bytes, the budget of the merged set "
            f"leaves {max(available, 0)}; expected smaller ones, or subtasks that leave room for them, such as with "
            "soft labels of their own"
        )


def _whole(config: configs.RunConfig, merged: MergedSet, fingerprint: str) -> Experiment:
    """Reads all classes, and builds what networks are tested with; there is no codec of the whole."""
    dataset = data.load(dataclasses.replace(config.data, sha256=""))
    data.require_content(
        dataset.fingerprint(), fingerprint, "the subtasks were made from", "merge subtasks that were made from these"
    )
    known, shape = experiments.known_data(config, dataset), dataset.image_shape
    network, tested = nets.build(config.network, shape, dataset.num_classes), testset.check(config.evaluate, dataset)
    budget, codec = merged.bytes_per_class, merged.parts[0].codec
    return Experiment(known, dataset, budget, codec, network, dataset.train_images, config, tested)


def _meta(subtasks: Sequence[Subtask]) -> dict[str, Any]:
    """Returns what the parts agree on, and the number of them; the rest stays with the parts."""
    metas = [one.synset.meta for one in subtasks]
    meta = {key: value for key, value in metas[0].items() if all(other.get(key) == value for other in metas)}
    meta |= {"name": subtasks[0].config.name, "subtasks": len(subtasks)}
    if all("syn_lr" in one for one in metas):
        # A student of the whole takes one step for all classes.
        meta["syn_lr"] = float(np.mean([one["syn_lr"] for one in metas]))
    return meta


def _of_subtasks(subtasks: Sequence[Subtask], found: dict[str, Any]) -> dict[str, Any]:
    """Returns what the result of a merge says beyond that of any run."""
    parts = [
        {
            "subtask": one.config.subtask,
            "run": str(one.path),
            "classes": [one.origin["classes"][0], one.origin["classes"][-1]],
            "images_per_class": one.synset.codec.images_per_class,
            "bytes": one.synset.nbytes,
            "accuracy": {key: one.result["accuracy"][key] for key in ("mean", "std", "n")},
            "seconds": one.result["seconds"],
            "device": one.result["device"],
        }
        for one in subtasks
    ]
    seconds = [part["seconds"] for part in parts]
    how = results.NETWORKS["trusted"] + PAPER if subtasks[0].config.evaluate.protocol == "paper" else None
    return {
        "protocol": found["protocol"] | ({"networks": how} if how else {}),
        "subtasks": parts,
        "subtask_seconds": {"sum": sum(seconds), "longest": max(seconds)},
        "seconds": sum(seconds) + found["seconds"],
    }


def table(result: dict[str, Any]) -> str:
    """Writes what every subtask gave and took as a Markdown table."""
    rows: list[list[Any]] = []
    for part in result["subtasks"]:
        classes, size = "{} to {}".format(*part["classes"]), f"{part['bytes']:,}"
        accuracy, seconds = testset.percent(part["accuracy"]), f"{part['seconds']:.1f}"
        rows.append([part["subtask"], classes, part["images_per_class"], size, accuracy, seconds])
    size, seconds = sum(part["bytes"] for part in result["subtasks"]), result["subtask_seconds"]
    rows.append(["all, one after the other", "", "", f"{size:,}", "", f"{seconds['sum']:.1f}"])
    rows.append(["all, side by side", "", "", "", "", f"{seconds['longest']:.1f}"])
    columns = "subtask", "classes", "images per class", "bytes", "accuracy among its own classes, %", "seconds"
    return results.markdown(columns, rows, left=0)


if __name__ == "__main__":
    sys.exit(main())
