"""How far stored soft labels are from the teachers' own, for the bytes that they take.

    python -m benchmarks.labels --config configs/cifar10_packed_dm_experts_ipc1_w32.yaml [experts.path=DIR ...]

The images are those of a set; the teachers are the experts of the config, after their last epoch. Distances
are means over the images: the total variation, of which the gradient of the cross entropy with respect to the logits is
off by twice at most, and the KL divergence of the stored from the teachers' labels, which is what the loss is off by
where the network agrees with the teachers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

import gsdd_jax
from benchmarks import record
from gsdd_jax import labels, soft_labels
from gsdd_jax.labels import LabelSpec
from train import config as configs
from train import experiment as experiments
from train import labeling, stages
from train.errors import exit_cleanly
from train.progress import Progress

SET = record.RESULTS / "cifar10_packed_dm_ipc1_w64"
STORED = (("float32", 0), ("bfloat16", 0), ("uint8", 0), ("uint4", 0), ("uint8", 3), ("uint8", 2), ("uint8", 1))
STEPS = 15


def rejected() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Returns other ways to spend 4 bits: from labels ``[n, k]`` to what would be read."""

    def normalized(parts: np.ndarray) -> np.ndarray:
        return parts / parts.sum(1, keepdims=True)

    def powers(p: np.ndarray, power: float) -> np.ndarray:
        codes = np.round(STEPS * (p / p.max(1, keepdims=True)) ** (1 / power))
        return normalized(codes**power)

    def logarithms(p: np.ndarray, step: float) -> np.ndarray:
        codes = np.round(np.log(p.max(1, keepdims=True) / np.maximum(p, 1e-30)) / step)
        return normalized(np.where(codes < STEPS, np.exp(-step * codes), 0))

    return {
        "steps of 1/15": lambda p: soft_labels.shared_out(p, STEPS) / STEPS,
        "steps of 1/15 of the largest": lambda p: powers(p, 1),
        "cubes": lambda p: powers(p, 3),
        "logarithms, steps of 0.25": lambda p: logarithms(p, 0.25),
        "logarithms, steps of 0.5": lambda p: logarithms(p, 0.5),
    }


def distances(p: np.ndarray, read: np.ndarray) -> dict[str, float]:
    """Returns the mean total variation and KL divergence of what is read from ``p``, both ``[n, k]``."""
    p, read = p.astype(np.float64), read.astype(np.float64)
    logs = np.log(np.maximum(read, 1e-300)) - np.log(np.maximum(p, 1e-300))
    return {
        "total_variation": float(np.abs(read - p).sum(1).mean() / 2),
        "divergence": float(np.where(read > 0, read * logs, 0).sum(1).mean()),
    }


def measure(p: np.ndarray) -> list[dict]:
    """Returns a row for each way to store labels ``[n, k]``: its name, the bytes of a label, and its distances."""
    rows = []
    for dtype, top_k in STORED:
        spec = LabelSpec(kind="soft", dtype=dtype, top_k=top_k)  # type: ignore[arg-type]
        name = f"{dtype}, {top_k} largest" if top_k else dtype
        read = np.asarray(labels.pack(p, spec).probabilities())
        rows.append({"stored": name, "bytes": labels.nbytes(spec, 1, p.shape[1]), **distances(p, read)})
    nibbles = labels.nbytes(LabelSpec(kind="soft", dtype="uint4"), 1, p.shape[1])
    return rows + [{"stored": name, "bytes": nibbles, **distances(p, read(p))} for name, read in rejected().items()]


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark and writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.labels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE", help="experiment with experts, which are trained")
    parser.add_argument("--set", type=Path, default=SET, metavar="DIR", help="whose images are labeled")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "labels.json", metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as labels.teachers=3")
    args = parser.parse_intermixed_args(argv)
    experiment = experiments.prepare(configs.load(args.config, args.overrides))
    spec, images = experiment.config.labels, gsdd_jax.load(args.set).images()
    folder = experiments.expert_path(experiment.config, Path("runs"))
    experts = stages.expert_stage(experiment, folder, progress=Progress(quiet=False))
    teachers = labeling.of_experts(experiment, experts)
    settings = {"network": experiment.network, "whitening": experiment.whitening, "temperature": spec.temperature}
    p = np.asarray(labels.label(teachers, images, **settings))
    rows = measure(p)
    for row in rows:
        print(f"{row['stored']:30} {row['bytes']:4} {row['total_variation']:.4f} {row['divergence']:.5f}")
    agreement = float((p.argmax(1) == np.asarray(labeling.in_order(*p.shape))).mean())
    largest, count = float(p.max(1).mean()), spec.teachers
    record.write(
        args.out,
        rows,
        seed=experiment.config.experts.seed,
        n=len(p),
        teachers=count,
        temperature=spec.temperature,
        largest=largest,
        agreement=agreement,
        set=args.set.name,
    )


if __name__ == "__main__":
    exit_cleanly()(main)()
