"""What a run found: ``result.json`` and the table made from it."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax import labels, nets, storage, synset
from gsdd_jax.codecs import Codec, frames
from gsdd_jax.evaluation import EvalSpec
from gsdd_jax.merged import MergedSet, load
from train import compressed, testset
from train.errors import UserError
from train.experiment import Experiment, random_codec
from train.rundir import (
    RunDir,
    read_command,
    read_environment,
    read_history,
    read_metrics,
    read_steps,
)

# How the networks of a protocol were tested.
NETWORKS = {
    "trusted": "fresh ones, final weights, each tested once on the test set",
    "paper": "fresh ones, final weights; of the distilled sets of all tested iterations the one best on the test set",
}
# Keys of the baselines in result.json, in the order of the table.
BASELINES = ("fit_only", "pixel", "random_real", "full_data")
# FLOP of a training step over those of its forward pass: the backward pass costs twice as much.
STEP_FLOPS = 3


def exported(path: Path) -> synset.SynSet | MergedSet:
    """Reads the set of a run directory, or of a folder that holds one.

    Raises:
        UserError: The run has not exported one yet; the message says how far it is, and both ways on.
        FileNotFoundError, ValueError: As `gsdd_jax.load`.
    """
    try:
        found = load(path)
        if read_history(path) and not (path / "result.json").exists():
            print(f"notice: {path} is being extended: its set may still be the one of before", file=sys.stderr)
        return found
    except FileNotFoundError:
        if not (path / "config.yaml").exists() or (path / synset.EXPORT / synset.MANIFEST).exists():
            raise
    steps = ", ".join(f"{phase} {step}" for phase, step in read_steps(path).items()) or "nothing"
    raise UserError(
        f"{path}: the run is not finished, so that there is no set (checkpointed: {steps}); go on with: "
        f"{read_command(path) or 'the command that started it'}; or write its newest checkpoint as a set: "
        f"python -m train.export --checkpoint --to set --run {path} --out DIR"
    )


def read(path: Path) -> dict[str, Any] | None:
    """Reads the result of a run; None where there is none, or a damaged one, to be made anew from the stages."""
    try:
        result = json.loads((path / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return result if isinstance(result, dict) else None


def collect(
    experiment: Experiment,
    rows: dict[str, dict[str, Any]],
    *,
    made: synset.SynSet | MergedSet,
    sizes: dict[str, int],
    environment: dict[str, Any],
    run: RunDir,
    fit_psnr: float | None = None,
) -> dict[str, Any]:
    """Returns the content of result.json; a baseline that was not run is null, never zero.

    Each arm has D3's three dimensions: accuracy; ``bytes_per_class``, of which ``label_bytes_per_class``; and what it
    costs to train one network on the set, ``images_seen`` and ``training_flops``.

    Args:
        experiment: What was run.
        rows: Per arm, as ``train.evaluation.evaluate_stage`` returns them; at least ``distilled``.
        made: The exported set.
        sizes: Its bytes, as ``SynSet.save`` returns them.
        environment: Entry of environment.json of this start.
        run: The run directory, for the seconds of every stage.
        fit_psnr: Mean PSNR in dB of the fitted images, as stored.
    """
    config, dataset, soft = experiment.config, experiment.dataset, made.soft_labels
    classes, label = dataset.num_classes, labels.nbytes(config.labels, 1, dataset.num_classes)
    flops = forward_flops(experiment.network, dataset.image_shape)
    found: dict[str, Any] = dict.fromkeys(BASELINES)
    for name, entry in rows.items():
        images = entry["images"] // classes
        if name == "distilled" and entry["images"] % classes:
            # Parts of a merged set hold more and fewer.
            images = round(entry["images"] / classes, 1)
        of_labels = label * images * (entry.get("labels") == "soft")
        if name == "distilled":
            # Parts of a merged set may have labels of their own classes alone.
            of_labels = round(sizes.get("labels", 0) / classes)
        size, named = _stored(experiment, name, entry, sizes), _label(experiment, name, entry)
        found[name] = entry | {
            "images_per_class": images,
            "bytes_per_class": round(size + of_labels),
            "label_bytes_per_class": of_labels,
            "training_flops": None if flops is None else STEP_FLOPS * flops * entry["images_seen"],
            **({"label": named} if named else {}),
        }
    kind: dict[str, Any] = {"kind": "hard"}
    if soft is not None:
        agreement = float(np.mean(np.asarray(soft).argmax(1) == made.labels))
        kind = dataclasses.asdict(config.labels) | {"agreement": agreement}
    codec, alone = experiment.codec, isinstance(made, synset.SynSet)
    starts, history = read_environment(run.path), read_history(run.path)
    last = {entry["phase"]: entry["total_seconds"] for entry in read_metrics(run.path) if "total_seconds" in entry}
    tests = [*rows.values(), *(entry["hard_labels"] for entry in rows.values() if "hard_labels" in entry)]
    return {
        "name": config.name,
        "codec": codec.name,
        "objective": config.objective.name,
        "dataset": dataset.name,
        "num_classes": classes,
        **experiment.test_set,
        "bytes_per_class": experiment.bytes_per_class,
        "paper_ipc": config.ipc,
        "gpc": found["distilled"]["images_per_class"],
        "accuracy": found.pop("distilled"),
        **found,
        **{key: environment[key] for key in ("device", "versions")},
        **{key: starts[0][key] for key in ("commit", "dirty", "command")},
        # More than one where a run was continued with other code.
        "commits": list(dict.fromkeys(start["commit"] for start in starts)),
        "protocol": {
            "networks": NETWORKS[config.evaluate.protocol],
            "network": dataclasses.asdict(config.network),
            "evaluate": dataclasses.asdict(config.evaluate),
            "augment": config.augment.strategy,
            "whiten": config.whiten,
            "labels": kind,
            "seed": config.seed,
        },
        "data_sha256": dataset.fingerprint(),
        "budget": {
            "bytes available per class": experiment.bytes_per_class,
            "bytes written per class": sizes["payload"] / classes,
            "exported file, parameters (bytes)": sizes["payload"],
            **({"of these, labels (bytes)": sizes["labels"]} if "labels" in sizes else {}),
            "exported file, header (bytes)": sizes["header"],
            "exported file (bytes)": sizes["file"],
            "manifest beside it (bytes)": sizes["manifest"],
            **(budget_rows(config.ipc, codec, sizes["payload"] - sizes.get("labels", 0)) if alone else {}),
        },
        "num_points": getattr(codec.spec, "num_points", None) if alone else None,
        "fit_psnr": fit_psnr,
        # Over all starts of the run.
        "seconds": sum(last.values()) + sum(entry["seconds"] for entry in tests),
        **({"history": history} if history else {}),
        **({"initial_set": config.fit.initial_sha256} if config.fit.initial_set else {}),
    }


def _stored(experiment: Experiment, name: str, entry: Mapping[str, Any], sizes: Mapping[str, int]) -> float:
    """Returns the bytes per class of the images of an arm, without labels."""
    dataset = experiment.dataset
    if name in ("distilled", "fit_only"):
        return (sizes["payload"] - sizes.get("labels", 0)) / dataset.num_classes
    if name in ("pixel", "random_real"):
        codec = experiment.distilled()[1].codec if name == "pixel" else random_codec(experiment)
        return storage.nbytes(codec.layout()) / dataset.num_classes
    # What is real is uint8.
    return entry.get("bytes_per_class", entry["images"] // dataset.num_classes * math.prod(dataset.image_shape))


def _label(experiment: Experiment, name: str, entry: Mapping[str, Any]) -> str:
    """Names a row that not every run has, or that is stored in another way; '' for the others."""
    if name in compressed.ARMS:
        return compressed.ARMS[name].label(entry["quality"])
    if name == "same_number":
        return "random real images in the same number, not at equal bytes"
    spec = experiment.config.baselines.pixel_codec
    how = f"{2**spec.bits} colors per {spec.shared}" if spec.name == "palette" else spec.dtype
    named = {"pixel": f"pixels, {how}, distilled", "random_real": f"random real images, {how}"}
    # In float32, as the field counts.
    return "" if how == "float32" else named.get(name, "")


def forward_flops(network: nets.Network, image_shape: tuple[int, ...]) -> float | None:
    """Returns the floating-point operations of a network on one image, see `count_flops`."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    params = jax.eval_shape(network.init, jax.eval_shape(lambda: jax.random.key(0)))
    return count_flops(network.apply, params, image)


def count_flops(function: Callable[..., Any], *args: Any) -> float | None:
    """Returns the floating-point operations of a call, by XLA's count before it optimizes, if any.

    The same on every platform: counted for one on which `nets.conv` leaves convolutions as they are.
    """
    count = (jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).cost_analysis() or {}).get("flops")
    return None if count is None else float(count)


def budget_rows(ipc: float, codec: Codec, payload: int) -> dict[str, str]:
    """Returns ways to spend the budget of a class, the one of this codec last; nothing for pixels.

    For Gaussians the paper's accounting stands beside ours: it counts floats and grants its own floats half a count
    each, because they are bfloat16; we count bytes for all.

    Args:
        ipc: The budget per class in float32 pixel images.
        codec: The codec of the run.
        payload: Bytes of its whole set without labels.
    """
    if codec.name == "pixel":
        return {}
    images, points = codec.images_per_class, getattr(codec.spec, "num_points", 0)
    available, pixels = storage.budget_bytes(ipc, codec.image_shape), int(ipc * math.prod(codec.image_shape))

    def spent(images: int, points: int, floats: int, size: int) -> str:
        return f"{images} images{f' of {points} Gaussians' if points else ''}: {floats} floats, {size} bytes"

    rows = {"pixels, float32": spent(int(ipc), 0, pixels, pixels * storage.ITEMSIZE["float32"])}
    # Mean 2, Cholesky factor 3, opacity 1, and a color: GSDD, section 3.1.
    each = 6 + codec.image_shape[-1]
    for name, size in storage.ITEMSIZE.items() if points and not codec.spec.VIDEO else ():
        if most := available // (images * each * size):
            whose, floats = "the paper's" if name == "bfloat16" else "the rivals'", images * most * each
            rows[f"{images} Gaussian images, {name} ({whose} count)"] = spent(images, most, floats, floats * size)
    numbers, precision = frames.numbers(codec.spec, codec.image_shape, codec.num_classes)
    # What all classes share is split evenly.
    own = -(-numbers // codec.num_classes), -(-payload // codec.num_classes)
    return rows | {f"this run: {images} images of {codec.name}, {precision}": spent(images, points, *own)}


def arms(result: Mapping[str, Any]) -> dict[str, str]:
    """Names the rows of a table by their keys in a result."""
    codec = str(result.get("codec") or "")
    return {
        "accuracy": f"{codec}, distilled",
        "fit_only": f"{codec}, {'initial set' if result.get('initial_set') else 'fitted only'}",
        "pixel": "pixels, distilled",
        "random_real": "random real images",
        # Rows that not every run has name themselves.
        **{key: entry["label"] for key, entry in result.items() if isinstance(entry, dict) and "label" in entry},
        "full_data": "whole training set",
    }


def table(result: dict[str, Any]) -> str:
    """Writes a result as a Markdown table."""
    named = arms(result)
    named["accuracy"] = f"**{named['accuracy']}**"
    extra = extra_columns([result[key] for key in named if result.get(key)], result)
    columns = "training set", "images per class", "bytes per class", "test accuracy, %", "networks", "steps each"
    rows = []
    for key, label in named.items():
        entry = result.get(key)
        if entry is None:
            rows.append([label, "", "", "not run", "", "", *("" for _ in extra)])
            continue
        size = f"{entry['bytes_per_class']:,}"
        if entry.get("label_bytes_per_class"):
            size += f", labels {entry['label_bytes_per_class']:,}"
        cells = entry["images_per_class"], size, testset.percent(entry), entry["n"], f"{entry['steps']:,}"
        rows.append([label, *cells, *(cell(entry) for cell in extra.values())])
    head = (
        f"{result['dataset']}, {result['bytes_per_class']} bytes per class (ipc {result['paper_ipc']:g}), "
        f"{result['objective']} matching, {result['device']}"
    )
    said = "".join(f"{line}\n\n" for line in [head, *_notices(result)])
    return said + markdown([*columns, *extra], rows) + testset.below(result)


def markdown(columns: Sequence[str], rows: Collection[Sequence[Any]], left: int = 1) -> str:
    """Writes a Markdown table; all columns but the first `left` ones are aligned to the right."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * left + "---:|" * (len(columns) - left)]
    lines += ["|" + "".join(" |" if cell == "" else f" {cell} |" for cell in row) for row in rows]
    return "\n".join(lines) + "\n"


def extra_columns(entries: Collection[Mapping[str, Any]], result: Mapping[str, Any]) -> dict[str, Callable[..., str]]:
    """Returns the columns that not every table of such entries has, with what gives an entry its cell."""
    columns: dict[str, Callable[..., str]] = {}
    # Results of before do not know their cost.
    if any(entry.get("training_flops") for entry in entries):
        columns["TFLOP each"] = lambda one: f"{one['training_flops'] / 1e12:.3g}" if one.get("training_flops") else ""
    if any("hard_labels" in entry for entry in entries):
        columns["with hard labels, %"] = lambda one: testset.percent(one.get("hard_labels", one))
    if testset.uneven(result) and any("balanced" in entry for entry in entries):
        columns["mean over classes, %"] = lambda one: f"{100 * one['balanced']:.1f}" if "balanced" in one else ""
    return columns


def trained(evaluate: Mapping[str, Any], strategy: str) -> str:
    """Says how the networks of a table were trained, but for the rate and the steps.

    Args:
        evaluate: Settings as of `EvalSpec`; those of before lack what came later, which has the default.
        strategy: Operations of DSA.
    """
    spec = dataclasses.asdict(EvalSpec()) | dict(evaluate)
    mixed = f"CutMix of {100 * spec['cutmix']:g} %" if spec["cutmix"] else "no CutMix"
    return (
        f"Every network: {spec['optimizer']}, schedule {spec['schedule']}, batches of {spec['batch']}, "
        f"DSA {strategy}, {mixed}."
    )


def _notices(result: dict[str, Any]) -> list[str]:
    """Says what settings held from which iteration on, which rows were chosen on test data, how all were trained."""
    lines, chosen, protocol = [], result["accuracy"], result.get("protocol") or {}
    for entry in result.get("history", []):
        changes = ", ".join(f"{key} {now} (before: {before})" for key, (before, now) in entry["changes"].items())
        lines.append(f"Extended, from iteration {entry['from'].get('main-distill', 0)} on: {changes}.")
    if "tests" in chosen:
        lines.append(
            f"Protocol `paper`: distilled rows are the best of {chosen['tests']} tests on the test set (the first "
            f"after iteration {chosen['iteration']}), biased upwards and not comparable with the trusted protocol."
        )
    return [*lines, trained(protocol["evaluate"], protocol["augment"])] if "evaluate" in protocol else lines
