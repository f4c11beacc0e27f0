"""What soft labels are worth in accuracy: of a distilled set, and of random real images as AVIF at the same bytes.

    python -m benchmarks.label_accuracy --config configs/cifar10_packed_dm_experts_ipc1_w32.yaml [KEY=VALUE ...]

The teachers are the experts of the config, after their last epoch. The images of either source stay the same, and the
networks of each row begin alike; only what they are told about the images differs. AVIF images are as many as the
budget holds with labels of 4 bits; with hard labels a few more would fit, and of 40 bytes fewer.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gsdd_jax
from benchmarks import record
from gsdd_jax import evaluation, labels
from gsdd_jax.labels import LabelSpec
from train import compressed, labeling, stages
from train import config as configs
from train import experiment as experiments
from train.errors import exit_cleanly
from train.progress import Progress

SET = "cifar10_packed_12k"
UINT4 = LabelSpec(kind="soft", dtype="uint4", teacher="experts")
TOLD = (
    LabelSpec(),
    UINT4,
    *(dataclasses.replace(UINT4, temperature=temperature) for temperature in (2.0, 4.0)),
    dataclasses.replace(UINT4, dtype="float32"),
    dataclasses.replace(UINT4, dtype="uint8", top_k=3),
    dataclasses.replace(UINT4, hard_weight=1.0),
)


def measure(config: configs.RunConfig, name: str, quality: int, told: Sequence[LabelSpec], write: Any) -> None:
    """Trains networks; ``write`` is called with all rows after each."""
    experiment = experiments.prepare(config)
    folder = experiments.expert_path(config, Path("runs"))
    experts = stages.expert_stage(experiment, folder, progress=Progress(quiet=False))
    teachers = labeling.of_experts(experiment, experts)
    avif = compressed.training_set(experiment, compressed.ARMS["random_avif"], quality, 0)[0]
    dataset, rows = experiment.dataset, []
    for source, images in ((name, gsdd_jax.load(name).images()), (f"AVIF of quality {quality}", avif)):
        classes = labeling.in_order(len(images), dataset.num_classes)
        for spec in told:
            seen: dict[str, Any] = {"network": experiment.network, "whitening": experiment.whitening}
            targets, soft = classes, None
            if spec.kind == "soft":
                soft = labels.label(teachers, jnp.asarray(images), temperature=spec.temperature, **seen)
                soft = labels.toward_class(soft, classes, spec.hard_weight)
                targets = labels.pack(soft, spec).probabilities()
            found = evaluation.evaluate_networks(
                jax.random.split(jax.random.key(config.seed), config.evaluate.seeds),
                jnp.asarray(images),
                targets,
                jnp.asarray(dataset.test_images),
                jnp.asarray(dataset.test_labels),
                spec=config.evaluate.training(),
                augment=config.augment,
                **seen,
            )
            row = {
                "source": source,
                "images": len(images) // dataset.num_classes,
                "kind": spec.kind,
                "dtype": spec.dtype,
                "top_k": spec.top_k,
                "temperature": spec.temperature,
                "hard_weight": spec.hard_weight,
                "bytes": labels.nbytes(spec, 1, dataset.num_classes),
                "largest": None if soft is None else float(np.asarray(soft).max(1).mean()),
                "accuracies": np.asarray(found.accuracies).tolist(),
            }
            rows.append(row)
            print(row, flush=True)
            write(rows)


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.label_accuracy", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="experiment with experts, which are trained")
    parser.add_argument("--set", default=SET, metavar="DIR", help="whose images are labeled")
    parser.add_argument("--quality", type=int, default=10, metavar="N", help="of AVIF")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "label_accuracy.json", metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as labels.teachers=3 evaluate.seeds=1")
    args = parser.parse_intermixed_args(argv)
    config = configs.load(args.config, args.overrides)
    if (config.labels.kind, config.labels.teacher) != ("soft", "experts") or not 0 <= args.quality <= 100:
        parser.error("expected labels.kind=soft and labels.teacher=experts, and --quality of 0 to 100")

    def write(rows: list[dict[str, Any]]) -> None:
        record.write(args.out, rows, seed=config.seed, n=config.evaluate.seeds, steps=config.evaluate.steps)

    measure(config, args.set, args.quality, TOLD, write)


if __name__ == "__main__":
    exit_cleanly()(main)()
