"""DD-Ranking's scores of an exported set: the networks that they need, and the table.

`train.evaluate` is the command line and says what deviates from DD-Ranking's code; `gsdd_jax.ddranking` has the scores.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax import ddranking, evaluation, fitting, nets
from gsdd_jax.augment import DsaSpec
from train import testset
from train.bench import Bench, Draw, Request, Results, Training, diverged, train_and_test
from train.errors import UserError
from train.progress import Progress
from train.rundir import plain

# Learning rates among which DD-Ranking chooses.
RANDOM_LRS = (1e-3, 5e-3, 1e-2, 5e-2, 1e-1)
# Of the training images of a class, a fifth is held out to choose among them, but no more than this.
HELD_OUT = 100
# Where the keys of held-out images and of the choice lie, beyond those of any seed.
_HELD_OUT_KEY, _CHOICE_KEY = 2**31, 2**31 + 1


class Arm(NamedTuple):
    """A row of the comparison: a training set with or without augmentation."""

    name: str
    label: str
    augmented: bool


ARMS = (
    Arm("full_data", "whole training set", True),
    Arm("distilled", "distilled", True),
    Arm("random_real", "random real images", True),
    Arm("distilled_plain", "distilled", False),
    Arm("random_real_plain", "random real images", False),
)


def rank(
    request: Request, bench: Bench, networks: dict[str, nets.Network], results: Results, progress: Progress
) -> str:
    """Trains what the scores need and is not in the file yet; returns the table."""
    (name, network), config = next(iter(networks.items())), request.config
    held_out, draw = _random_images(request, bench)
    spec = request.specs[name]
    full = config.baselines.full_data_steps or spec.steps, config.baselines.full_data_seeds or spec.seeds
    plainly = dataclasses.replace(spec, cutmix=0.0)
    specs = {arm.name: spec if arm.augmented else plainly for arm in ARMS}
    specs |= {"full_data": dataclasses.replace(spec, steps=full[0], seeds=full[1])}
    augments = {arm.name: config.augment if arm.augmented else DsaSpec(strategy="none") for arm in ARMS}
    settings = {arm.name: request.settings(name, specs[arm.name], augments[arm.name]) for arm in ARMS}
    for arm in ARMS:
        if arm.name.startswith("random_real"):
            del settings[arm.name]["evaluate.lr"]
            settings[arm.name] |= {"lrs": list(RANDOM_LRS), "ipc": int(config.ipc)}
    entries = {arm.name: results.known("ddranking", arm.name, settings[arm.name]) for arm in ARMS}
    for arm in ARMS:
        if entries[arm.name] is not None:
            progress.say(f"{arm.name}: kept from the file of results")
            continue
        spec, augment, began = specs[arm.name], augments[arm.name], time.perf_counter()
        training: Training = bench.images, jnp.asarray(request.synset.labels)
        more: dict[str, Any] = {}
        if arm.name == "full_data":
            training = jnp.asarray(bench.dataset.train_images), jnp.asarray(bench.dataset.train_labels)
        with progress.phase(arm.name, total=spec.seeds) as bar:
            if arm.name.startswith("random_real"):
                training = draw
                lr, table = evaluation.choose_lr(
                    request.key("evaluate", _CHOICE_KEY),
                    *draw(request.first_seed),
                    *held_out,
                    RANDOM_LRS,
                    networks=spec.seeds,
                    network=network,
                    spec=spec,
                    augment=augment,
                    whitening=bench.whitening,
                )
                spec, more = dataclasses.replace(spec, lr=lr), {"held_out_accuracy": table}
            tested = train_and_test(request, bench, network, spec, augment, training, bar)
        count = len(draw(request.first_seed)[0]) if callable(training) else len(training[0])
        seconds = time.perf_counter() - began
        entry = request.entry(tested, spec, settings[arm.name], bench=bench, images=count, seconds=seconds) | more
        entries[arm.name] = entry
        results.keep("ddranking", arm.name, plain(entry))
    finished: dict[str, dict[str, Any]] = {key: entry for key, entry in entries.items() if entry is not None}
    failed = {key: entry for key, entry in finished.items() if "diverged" in entry}
    if failed:
        raise UserError(diverged(failed))
    mean = {key: entry["mean"] for key, entry in finished.items()}
    syn, random = mean["distilled"], mean["random_real"]
    # Only hard labels are ranked, so both accuracies of the set are the same.
    lrs = ddranking.label_robust_score(full=mean["full_data"], syn_hard=syn, syn=syn, random=random)
    ars = ddranking.augmentation_robust_score(
        syn=syn, random=random, syn_plain=mean["distilled_plain"], random_plain=mean["random_real_plain"]
    )
    results.content["scores"] = {
        "lrs": lrs,
        "ars": ars,
        "hlr": ddranking.hard_label_recovery(mean["full_data"], syn),
        "ior": ddranking.improvement_over_random(syn, random),
    }
    results.save()
    return _ranking(request, finished, results.content["scores"]) + testset.below(bench.test_set)


def _random_images(request: Request, bench: Bench) -> tuple[tuple[jax.Array, jax.Array], Draw]:
    """Returns held-out training images with labels, and a function that draws ipc per class from the other ones."""
    config, dataset = request.config, bench.dataset
    ipc, classes = int(config.ipc), dataset.num_classes
    if ipc < 1:
        raise UserError(f"ipc: --ddranking compares with random images, at least 1 per class; found {config.ipc:g}")
    fewest = int(np.bincount(dataset.train_labels, minlength=classes).min())
    kept = min(HELD_OUT, max(1, fewest // 5))
    if fewest - kept < ipc:
        raise UserError(
            f"ipc: --ddranking needs {ipc} random images per class and {kept} held-out ones; "
            f"the smallest class has {fewest} training images"
        )
    key = request.key("random_real", _HELD_OUT_KEY)
    held = fitting.select_images(key, dataset.train_labels, kept, how="random", num_classes=classes)
    rest = np.setdiff1d(np.arange(len(dataset.train_labels)), held)

    def draw(seed: int) -> tuple[jax.Array, jax.Array]:
        key = request.key("random_real", seed)
        own = fitting.select_images(key, dataset.train_labels[rest], ipc, how="random", num_classes=classes)
        return jnp.asarray(dataset.train_images[rest[own]]), jnp.asarray(dataset.train_labels[rest[own]])

    return (jnp.asarray(dataset.train_images[held]), jnp.asarray(dataset.train_labels[held])), draw


def _ranking(request: Request, entries: dict[str, dict[str, Any]], scores: dict[str, float]) -> str:
    hard = ", hard labels" if request.synset.soft_labels is not None else ""
    lines = [
        f"{request.run}: DD-Ranking, recipe {request.recipe}{hard}",
        "",
        "| training set | augmentation | images | test accuracy, % | networks | learning rate | steps each |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for arm in ARMS:
        entry, augmented = entries[arm.name], "yes" if arm.augmented else "no"
        lines.append(
            f"| {arm.label} | {augmented} | {entry['images']:,} | {testset.percent(entry)} | {entry['n']} | "
            f"{entry['lr']:g} | {entry['steps']:,} |"
        )
    lines += [
        "",
        f"LRS {100 * scores['lrs']:.1f} %, ARS {100 * scores['ars']:.1f} % (26.9 % where nothing is gained or lost)",
    ]
    return "\n".join(lines) + "\n"
