"""Accuracy against the CPU minutes of a distillation: matching under random networks and under trained ones.

    python -m benchmarks.accuracy_minutes --config configs/cifar10_packed_dm_experts_ipc1_w32.yaml [KEY=VALUE ...]

Both objectives start from one fitted set of the config's codec and learn it for several numbers of iterations, each a
distillation of its own with a cosine to its end, tested with hard labels. Random networks match 64 real images of each
class, with DSA (DM). Trained networks are those of the config; their minutes include the training of the experts, and
statistics of the training set, which each distillation computes anew here; later ones would share both. Minutes are of
all cores together.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import jax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import gsdd_jax
from benchmarks import record
from gsdd_jax.match import DistributionSpec
from train import config as configs
from train import experiment as experiments
from train import stages
from train.errors import exit_cleanly
from train.progress import Progress

ITERATIONS = (50, 150, 450)
NAMES = {"random": "random networks (DM)", "trained": "trained networks"}
COLORS = {"random": "#D55E00", "trained": "#0072B2"}


def measure(config: configs.RunConfig, iterations: list[int], write: Any) -> None:
    """Distills and tests; ``write`` is called with all rows after each."""
    experiment = experiments.prepare(config)
    dataset, key, rows = experiment.dataset, jax.random.key(config.seed), []
    images, labels = dataset.train_images, dataset.train_labels
    folder = experiments.expert_path(config, Path("runs"))
    shared: dict[str, Any] = {"codec": experiment.codec, "progress": False}
    start = gsdd_jax.fit(key, images, labels, steps=config.fit.steps, **shared)

    def tested(name: str, steps: int, seconds: float, synset: gsdd_jax.SynSet) -> None:
        found = gsdd_jax.evaluate(
            key,
            synset,
            dataset.test_images,
            dataset.test_labels,
            network=experiment.network,
            training=config.evaluate.training(),
            augment=config.augment,
            progress=False,
        )
        rows.append({"networks": name, "iterations": steps, "minutes": seconds / 60, "accuracy": found._asdict()})
        print(f"{name:8} {steps:5} iterations {seconds / 60:6.1f} min  {found}", flush=True)
        write(rows)

    tested("none", 0, 0.0, start)
    begun = time.process_time()
    experts = stages.expert_stage(experiment, folder, progress=Progress(quiet=False))
    trained = time.process_time() - begun
    for name, objective, extra in (
        ("random", DistributionSpec(batch_real=64), 0.0),
        ("trained", config.objective, trained),
    ):
        for steps in iterations:
            shutil.rmtree(folder / "statistics", ignore_errors=True)
            begun = time.process_time()
            synset = gsdd_jax.distill(
                key,
                images,
                labels,
                objective=objective,
                network=experiment.network,
                steps=steps,
                start=start,
                augment=config.augment,
                experts=experts if name == "trained" else None,
                **shared,
            )
            seconds = time.process_time() - begun
            tested(name, steps, seconds + extra, synset)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws accuracy, with the spread over test networks, against minutes."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    fitted = 100 * rows[0]["accuracy"]["mean"]
    axes.axhline(fitted, color="0.5", linestyle=":", label="fitted only")
    for name, text in NAMES.items():
        own = [row for row in rows if row["networks"] == name]
        means, stds = ([100 * row["accuracy"][key] for row in own] for key in ("mean", "std"))
        axes.errorbar(
            [row["minutes"] for row in own], means, stds, marker="o", capsize=3, color=COLORS[name], label=text
        )
        for row in own:
            place = row["minutes"], 100 * row["accuracy"]["mean"]
            axes.annotate(str(row["iterations"]), place, xytext=(4, -12), textcoords="offset points", fontsize=8)
    axes.set(xlabel="CPU minutes of the distillation, experts included", ylabel="test accuracy, %", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark; writes the JSON and the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy_minutes", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="experiment with trained networks")
    parser.add_argument("--iterations", type=int, nargs="+", default=list(ITERATIONS), metavar="N")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "accuracy_minutes.json", metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as evaluate.steps=900")
    args = parser.parse_intermixed_args(argv)
    config: configs.RunConfig = configs.load(args.config, args.overrides)

    def write(rows: list[dict[str, Any]]) -> None:
        record.write(args.out, rows, seed=config.seed, n=config.evaluate.seeds, config=config.name)
        plot(rows, args.out.with_suffix(".png"))

    measure(config, args.iterations, write)


if __name__ == "__main__":
    exit_cleanly()(main)()
