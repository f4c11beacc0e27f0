"""Re-evaluate an exported set: ``python -m train.evaluate --run runs/digits``.

Reads the run's config, its data and its exported set, trains fresh networks and tests each once. Nothing in the run
directory changes; ``--out`` writes the numbers as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

import gsdd_jax
from gsdd_jax import evaluate, whiten
from train import config as configs
from train import experiment as experiments
from train.errors import UserError, exit_cleanly
from train.progress import Progress
from train.rundir import environment, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description="Train fresh networks on the exported set of a run and test each once.",
        epilog="Settings of the run's config can be overridden, such as evaluate.steps=1000 evaluate.seeds=5.",
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="run directory that train.distill wrote")
    parser.add_argument("--size", metavar="HxW", help="render at another size, such as 64x64 (with data.resolution)")
    parser.add_argument(
        "--first-seed", type=int, default=0, metavar="N", help="first seed; the run itself used 0, 1, ..."
    )
    parser.add_argument("--out", metavar="FILE", help="write the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors too")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as evaluate.seeds=10")
    args = parser.parse_intermixed_args(argv)
    with exit_cleanly(debug=args.debug or None):
        run = Path(args.run)
        synset = gsdd_jax.load(run)
        file = run / "config.yaml"
        if not file.exists():
            raise UserError(f"{run} holds an exported set but no config.yaml, which says how to train on it")
        config: configs.RunConfig = configs.load(file, args.overrides)
        experiment = experiments.prepare(dataclasses.replace(config, codec=synset.codec.spec))
        images = synset.images(_size(args.size))
        if images.shape[1:] != experiment.dataset.image_shape:
            raise UserError(
                f"the set renders to {list(images.shape[1:])}, test images are {list(experiment.dataset.image_shape)}; "
                "choose --size and data.resolution to agree"
            )
        seeds = list(range(args.first_seed, args.first_seed + config.evaluate.seeds))
        accuracies = []
        with Progress(quiet=args.quiet).phase("test", total=len(seeds)) as bar:
            for seed in seeds:
                accuracy = evaluate.evaluate(
                    experiment.key("evaluate", seed)[None],
                    images,
                    jnp.asarray(synset.labels),
                    jnp.asarray(experiment.dataset.test_images),
                    jnp.asarray(experiment.dataset.test_labels),
                    network=experiment.network,
                    spec=config.evaluate,
                    augment=config.augment,
                    transform=whiten.apply,
                    transform_params=experiment.whitening,
                )
                accuracies.append(float(accuracy[0]))
                bar.advance(1, f"accuracy {100 * accuracies[-1]:.1f} %")
        result = {
            "run": str(run),
            "codec": synset.codec.name,
            "dataset": experiment.dataset.name,
            "images": len(images),
            "size": list(images.shape[1:3]),
            "bytes_per_class": synset.nbytes / synset.codec.num_classes,
            "accuracy": evaluate.summarise(accuracies, seeds) | {"accuracies": accuracies},
            "evaluate": dataclasses.asdict(config.evaluate),
            "environment": environment(),
        }
        if args.out:
            write_json(Path(args.out), result)
        print(json.dumps(result["accuracy"]))
    return 0


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise UserError(f"--size: expected HEIGHTxWIDTH such as 64x64, found {text!r}")
    return int(height), int(width)


if __name__ == "__main__":
    sys.exit(main())
