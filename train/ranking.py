"""DD-Ranking's scores of an exported set: the networks that they need, and the table.

The full data, the set and random real images (drawn anew for each network) are trained by the same recipe, the last two
without augmentation as well. Deviations from DD-Ranking's code: accuracies are of the last weights, tested once, not
the best of many tests; the learning rate of random images is chosen on training images that are held out, not on test
images; the set has the recipe's rate; the full data has the recipe too (and baselines.full_data_steps and
full_data_seeds of the config); soft labels of the set are left out, since random images have none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gsdd_jax import data, ddranking, evaluation, fitting
from gsdd_jax.augment import DsaSpec
from train import testset
from train.bench import Bench
from train.errors import UserError
from train.evaluation import evaluation_spec
from train.experiment import hold_out
from train.results import markdown

# Learning rates among which DD-Ranking chooses.
RANDOM_LRS = (1e-3, 5e-3, 1e-2, 5e-2, 1e-1)
# Where the key of the choice lies, beyond those of any seed.
_CHOICE_KEY = 2**31 + 1

Training = tuple[jax.Array, jax.Array]


# Rows of the comparison: a training set, with augmentation unless its name ends in "plain".
ARMS = {
    "full_data": "whole training set",
    "distilled": "distilled",
    "random_real": "random real images",
    "distilled_plain": "distilled",
    "random_real_plain": "random real images",
}


def rank(bench: Bench) -> str:
    """Trains what the scores need and is not in the file yet; returns the table."""
    experiment, (name, network) = bench.experiment, next(iter(bench.networks.items()))
    config, dataset, held_out, draw = experiment.config, experiment.dataset, *_random_images(bench)

    def tested(arm: str) -> dict[str, Any]:
        spec, augment, more = evaluation_spec(experiment, arm, bench.specs[name]), config.augment, dict[str, Any]()
        if arm.endswith("plain"):
            spec, augment = dataclasses.replace(spec, cutmix=0.0), DsaSpec(strategy="none")
        if random := arm.startswith("random_real"):
            lr, more["held_out_accuracy"] = evaluation.choose_lr(
                experiment.key("evaluate", _CHOICE_KEY),
                *draw(bench.first_seed),
                *held_out,
                RANDOM_LRS,
                networks=spec.seeds,
                network=network,
                spec=spec,
                augment=augment,
                whitening=experiment.whitening,
            )
            spec = dataclasses.replace(spec, lr=lr)
        training: Callable[[int], Training] = {
            "full_data": lambda _: (jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)),
            "distilled": lambda _: (bench.images, jnp.asarray(bench.synset.labels)),
            "random_real": draw,
        }[arm.removesuffix("_plain")]
        return bench.test(arm, training, spec, augment=augment, alone=random) | more

    entries = {arm: bench.entry("ddranking", arm, partial(tested, arm)) for arm in ARMS}
    mean = {key: entry["mean"] for key, entry in entries.items()}
    syn, random_mean, full_mean = mean["distilled"], mean["random_real"], mean["full_data"]
    scores = {
        # Only hard labels are ranked, so both accuracies of the set are the same.
        "lrs": ddranking.label_robust_score(full=full_mean, syn_hard=syn, syn=syn, random=random_mean),
        "ars": ddranking.augmentation_robust_score(
            syn=syn, random=random_mean, syn_plain=mean["distilled_plain"], random_plain=mean["random_real_plain"]
        ),
        "hlr": ddranking.hard_label_recovery(full_mean, syn),
        "ior": ddranking.improvement_over_random(syn, random_mean),
    }
    bench.content["scores"] = scores
    bench.save()
    columns = "training set", "augmentation", "images", "test accuracy, %", "networks", "learning rate", "steps each"
    rows = []
    for arm, entry in entries.items():
        numbers = f"{entry['images']:,}", testset.percent(entry), entry["n"], f"{entry['lr']:g}", f"{entry['steps']:,}"
        rows.append([ARMS[arm], "no" if arm.endswith("plain") else "yes", *numbers])
    return (
        f"{bench.run}: DD-Ranking, recipe {bench.recipe}"
        + (", hard labels\n\n" if bench.synset.soft_labels is not None else "\n\n")
        + markdown(columns, rows, left=2)
        + f"\nLRS {100 * scores['lrs']:.1f} %, ARS {100 * scores['ars']:.1f} % (26.9 % where nothing is gained or "
        f"lost)\n{testset.below(bench.content)}"
    )


def _random_images(bench: Bench) -> tuple[Training, Callable[[int], Training]]:
    """Returns held-out training images with labels, and a function that draws ipc per class from the other ones."""
    experiment, held = bench.experiment, hold_out(bench.experiment.dataset)
    ipc = int(experiment.config.ipc)
    if ipc < 1:
        raise UserError(
            f"ipc: --ddranking compares with random images, at least 1 per class; found {experiment.config.ipc:g}"
        )
    data.require_per_class(held, ipc, "ipc")

    def draw(seed: int) -> Training:
        key = experiment.key("random_real", seed)
        chosen = fitting.select_images(key, held.train_labels, ipc, how="random", num_classes=held.num_classes)
        return jnp.asarray(held.train_images[chosen]), jnp.asarray(held.train_labels[chosen])

    return (jnp.asarray(held.test_images), jnp.asarray(held.test_labels)), draw
