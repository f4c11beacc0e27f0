"""What a run found: ``result.json`` and the table made from it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax import labels, nets, storage, synset
from gsdd_jax.codecs import Codec
from gsdd_jax.evaluation import EvalSpec
from gsdd_jax.merged import MergedSet, load
from train import compressed, testset
from train.errors import UserError
from train.experiment import Experiment, random_codec
from train.rundir import RunDir, read_command, read_environment, read_history, read_metrics, read_steps

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


def collect(
    experiment: Experiment,
    accuracies: dict[str, dict[str, Any]],
    *,
    sizes: dict[str, int],
    environment: dict[str, Any],
    run: RunDir,
    pixel: Codec | None,
    fit_psnr: float | None,
    agreement: float | None = None,
) -> dict[str, Any]:
    """Returns the content of result.json; a baseline that was not run is null, never zero.

    Each arm has D3's three dimensions: accuracy; ``bytes_per_class``, of which ``label_bytes_per_class``; and what it
    costs to train one network on the set, ``images_seen`` and ``training_flops``.

    Args:
        experiment: What was run.
        accuracies: Per arm, as ``train.evaluation.evaluate_stage`` returns them; at least ``distilled``.
        sizes: Bytes of the exported set, as ``SynSet.save`` returns them.
        environment: Entry of environment.json of this start.
        run: The run directory, for the seconds of every stage.
        pixel: Codec of the pixel baseline.
        fit_psnr: Mean PSNR in dB of the fitted images, as stored.
        agreement: Share of the images whose most probable class, by their soft labels, is their own.
    """
    config, codec, dataset = experiment.config, experiment.codec, experiment.dataset
    starts, history = read_environment(run.path), read_history(run.path)
    label = labels.nbytes(config.labels, 1, dataset.num_classes)
    # Images per class, and bytes of each without its label.
    own = codec.images_per_class, (sizes["payload"] - sizes.get("labels", 0)) / codec.num_images
    sets: dict[str, tuple[int, float]] = {"distilled": own, "fit_only": own}
    if pixel is not None:
        sets["pixel"] = pixel.images_per_class, storage.nbytes(pixel.layout()) / pixel.num_images
    spent = {}
    for name, (images, size) in sets.items():
        # Rows of before have the labels of the run.
        of_labels = images * label * (accuracies.get(name, {}).get("labels", config.labels.kind) == "soft")
        spent[name] = images, images * size + of_labels, of_labels
    return {
        **described(experiment, accuracies, spent, environment=environment, agreement=agreement),
        "num_points": getattr(codec.spec, "num_points", None),
        "fit_psnr": fit_psnr,
        "seconds": _seconds(run, accuracies),
        **{key: starts[0][key] for key in ("commit", "dirty", "command")},
        # More than one where a run was continued with other code.
        "commits": list(dict.fromkeys(start["commit"] for start in starts)),
        **({"history": history} if history else {}),
        **({"initial_set": config.fit.initial_sha256} if config.fit.initial_set else {}),
        "budget": _budget(experiment, sizes),
    }


def described(
    experiment: Experiment,
    accuracies: dict[str, dict[str, Any]],
    spent: Mapping[str, tuple[float, float, int]],
    *,
    environment: dict[str, Any],
    agreement: float | None,
) -> dict[str, Any]:
    """Returns what result.json says of any run, of arguments as in `collect`.

    `spent` are images per class, bytes per class and those of labels of the arms that distilled something.
    """
    config, dataset = experiment.config, experiment.dataset
    values, full = int(np.prod(dataset.image_shape)), len(dataset.train_labels) // dataset.num_classes
    # Images per class, and bytes per class without labels; what is real is uint8.
    real: dict[str, tuple[int, float]] = {
        "same_number": (experiment.codec.images_per_class, experiment.codec.images_per_class * values),
        "full_data": (full, full * values),
    }
    named = {"same_number": "random real images in the same number, not at equal bytes"}
    if how := precision(config.baselines.pixel_codec):
        named |= {"pixel": f"pixels, {how}, distilled", "random_real": f"random real images, {how}"}
    if "random_real" in accuracies:
        stored = random_codec(experiment)
        real["random_real"] = stored.images_per_class, storage.nbytes(stored.layout()) / dataset.num_classes
    for name in accuracies.keys() & compressed.ARMS.keys():
        entry = accuracies[name]
        real[name] = entry["images"] // dataset.num_classes, entry["bytes_per_class"]
        named[name] = compressed.ARMS[name].label(entry["quality"])
    label, spent = labels.nbytes(config.labels, 1, dataset.num_classes), dict(spent)
    for name, (count, alone) in real.items():
        own = count * label if accuracies.get(name, {}).get("labels") == "soft" else 0
        spent[name] = count, alone + own, own
    soft = dataclasses.asdict(config.labels) | {"agreement": agreement}
    flops = forward_flops(experiment.network, dataset.image_shape)
    rows: dict[str, Any] = dict.fromkeys(BASELINES)
    for name, entry in accuracies.items():
        images, size, of_labels = spent[name]
        rows[name] = entry | {
            "images_per_class": images,
            "bytes_per_class": round(size),
            "label_bytes_per_class": of_labels,
            "training_flops": None if flops is None else STEP_FLOPS * flops * entry["images_seen"],
            **({"label": named[name]} if name in named else {}),
        }
    return {
        "name": config.name,
        "codec": experiment.codec.name,
        "objective": config.objective.name,
        "dataset": dataset.name,
        "num_classes": dataset.num_classes,
        **experiment.test_set,
        "bytes_per_class": experiment.bytes_per_class,
        "paper_ipc": config.ipc,
        "gpc": spent["distilled"][0],
        "accuracy": rows.pop("distilled"),
        **rows,
        **{key: environment[key] for key in ("device", "versions", "commit", "dirty", "command")},
        "protocol": {
            "networks": NETWORKS[config.evaluate.protocol],
            "network": dataclasses.asdict(config.network),
            "evaluate": dataclasses.asdict(config.evaluate),
            "augment": config.augment.strategy,
            "whiten": config.whiten,
            "labels": {"kind": "hard"} if agreement is None else soft,
            "seed": config.seed,
        },
        "data_sha256": dataset.fingerprint(),
    }


def precision(spec: Any) -> str:
    """Says how the pixel baseline is stored; '' = in float32, as the field counts."""
    if spec.name == "palette":
        return f"{2**spec.bits} colors per {spec.shared}"
    return "" if spec.dtype == "float32" else spec.dtype


def forward_flops(network: nets.Network, image_shape: tuple[int, int, int]) -> float | None:
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


def _budget(experiment: Experiment, sizes: dict[str, int]) -> dict[str, Any]:
    config, codec = experiment.config, experiment.codec
    budget: dict[str, Any] = {
        "bytes available per class": experiment.bytes_per_class,
        "bytes written per class": sizes["payload"] / codec.num_classes,
        "exported file, parameters (bytes)": sizes["payload"],
        **({"of these, labels (bytes)": sizes["labels"]} if "labels" in sizes else {}),
        "exported file, header (bytes)": sizes["header"],
        "exported file (bytes)": sizes["file"],
        "manifest beside it (bytes)": sizes["manifest"],
    }
    for row in budget_rows(config.ipc, codec, sizes["payload"] - sizes.get("labels", 0)):
        points = f" of {row.points_per_image} Gaussians" if row.points_per_image else ""
        budget[row.what] = f"{row.images} images{points}: {row.floats} floats, {row.bytes} bytes"
    return budget


class BudgetRow(NamedTuple):
    """One way to spend a budget; counts are per class."""

    what: str
    images: int
    points_per_image: int
    floats: int
    bytes: int
    bytes_available: int


def budget_rows(ipc: float, codec: Codec, payload: int) -> list[BudgetRow]:
    """Returns ways to spend the budget, the one of this codec last; nothing for pixels.

    For Gaussians the paper's accounting stands beside ours: it counts floats and grants its own floats half a count
    each, because they are bfloat16; we count bytes for all.

    Args:
        ipc: The budget per class in float32 pixel images.
        codec: The codec of the run.
        payload: Bytes of its whole set without labels.
    """
    if codec.name == "pixel":
        return []
    images, points = codec.images_per_class, getattr(codec.spec, "num_points", 0)
    available, pixels = storage.budget_bytes(ipc, codec.image_shape), int(ipc * int(np.prod(codec.image_shape)))
    rows = [BudgetRow("pixels, float32", int(ipc), 0, pixels, pixels * storage.ITEMSIZE["float32"], available)]
    # Mean 2, Cholesky factor 3, opacity 1, and a color: GSDD, section 3.1.
    each = 6 + codec.image_shape[-1]
    for name, size in storage.ITEMSIZE.items() if points else ():
        if most := available // (images * each * size):
            whose = "the paper's" if name == "bfloat16" else "the rivals'"
            floats = images * most * each
            what = f"{images} Gaussian images, {name} ({whose} count)"
            rows.append(BudgetRow(what, images, most, floats, floats * size, available))
    numbers, precision = codec.spec.numbers(codec.image_shape, codec.num_classes)
    name = f"this run: {images} images of {codec.name}, {precision}"
    # What all classes share is split evenly.
    floats, size = -(-numbers // codec.num_classes), -(-payload // codec.num_classes)
    return [*rows, BudgetRow(name, images, points, floats, size, available)]


def _seconds(run: RunDir, accuracies: dict[str, dict[str, Any]]) -> float:
    """Adds up the stages, over all starts of the run."""
    last = {entry["phase"]: entry["total_seconds"] for entry in read_metrics(run.path) if "total_seconds" in entry}
    tests = [*accuracies.values(), *(entry["hard_labels"] for entry in accuracies.values() if "hard_labels" in entry)]
    return sum(last.values()) + sum(entry["seconds"] for entry in tests)


def table(result: dict[str, Any]) -> str:
    """Writes a result as a Markdown table."""
    arms = {
        "accuracy": f"**{result['codec']}, distilled**",
        "fit_only": f"{result['codec']}, {'initial set' if result.get('initial_set') else 'fitted only'}",
        "pixel": "pixels, distilled",
        "random_real": "random real images",
        # Rows that not every run has name themselves.
        **{key: entry["label"] for key, entry in result.items() if isinstance(entry, dict) and "label" in entry},
        "full_data": "whole training set",
    }
    lines = [
        f"{result['dataset']}, {result['bytes_per_class']} bytes per class (ipc {result['paper_ipc']:g}), "
        f"{result['objective']} matching, {result['device']}",
        "",
        *_warning(result),
        *_recipe(result),
        "| training set | images per class | bytes per class | test accuracy, % | networks | steps each |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    # Results of before do not know their cost.
    counted = any((result.get(key) or {}).get("training_flops") for key in arms)
    if counted:
        lines[-2:] = [lines[-2] + " TFLOP each |", lines[-1] + "---:|"]
    hard = any("hard_labels" in (result.get(key) or {}) for key in arms)
    if hard:
        lines[-2:] = [lines[-2] + " with hard labels, % |", lines[-1] + "---:|"]
    uneven = testset.uneven(result) and any("balanced" in (result.get(key) or {}) for key in arms)
    if uneven:
        lines[-2:] = [lines[-2] + " mean over classes, % |", lines[-1] + "---:|"]
    for key, label in arms.items():
        entry = result.get(key)
        if entry is None:
            lines.append(f"| {label} | | | not run | | |{' |' * (counted + hard + uneven)}")
            continue
        images, size = entry["images_per_class"], f"{entry['bytes_per_class']:,}"
        if entry.get("label_bytes_per_class"):
            size += f", labels {entry['label_bytes_per_class']:,}"
        cost = f" {entry['training_flops'] / 1e12:.3g} |" if entry.get("training_flops") else " |" if counted else ""
        if hard:
            cost += f" {testset.percent(entry.get('hard_labels', entry))} |"
        if uneven:
            cost += f" {100 * entry['balanced']:.1f} |" if "balanced" in entry else " |"
        lines.append(
            f"| {label} | {images} | {size} | {testset.percent(entry)} | {entry['n']} | {entry['steps']:,} |{cost}"
        )
    return "\n".join(lines) + "\n" + testset.below(result)


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


def _recipe(result: dict[str, Any]) -> list[str]:
    protocol = result.get("protocol") or {}
    return [trained(protocol["evaluate"], protocol["augment"]), ""] if "evaluate" in protocol else []


def _warning(result: dict[str, Any]) -> list[str]:
    """Says what settings held from which iteration on, and which rows were chosen on test data."""
    lines = []
    for entry in result.get("history", []):
        changes = ", ".join(f"{key} {now} (before: {before})" for key, (before, now) in entry["changes"].items())
        lines += [f"Extended, from iteration {entry['from'].get('main-distill', 0)} on: {changes}.", ""]
    chosen = result["accuracy"]
    if "tests" not in chosen:
        return lines
    return lines + [
        f"Protocol `paper`: distilled rows are the best of {chosen['tests']} tests on the test set (the first after "
        f"iteration {chosen['iteration']}), biased upwards and not comparable with the trusted protocol.",
        "",
    ]
