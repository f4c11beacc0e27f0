"""Re-evaluate an exported set: ``python -m train.evaluate --run runs/digits``.

Reads the run's config, its data and its exported set, trains fresh networks and tests each once, after its last step.
Nothing in the run directory changes; ``--out`` writes the numbers as JSON, after every network, and the same command
continues such a file.

Across architectures, as in Table 14 of GSDD (five lines of table and the average without the ConvNet)::

    python -m train.evaluate --run DIR --networks alexnet vgg11 resnet18 vit convnet --recipe gsdd --out cross.json

Of a set with soft labels, networks are trained with hard ones as well, unless ``baselines.hard_labels=false``.

``--recipe`` says how networks are trained, see `gsdd_jax.recipes`. Overrides such as ``evaluate.steps=100`` apply on
top of it, to all networks. ``evaluate.lr_from=syn_lr`` takes the rate that trajectory matching learned (MTT).

Across resolutions, as in Table 17 of GSDD: a set distilled at 128 px, networks trained and tested at 256 and 512 px::

    python -m train.evaluate --run DIR --resolution 256 network.depth=5
    python -m train.evaluate --run DIR --resolution 512 network.depth=6 evaluate.batch=64

The set is rendered at that size, and the data are read at that size from their source: photographs that are larger are
scaled down, smaller ones up (then the test holds no more detail than before, unlike in the paper). Where the run read
a small copy, a larger one of the same classes can be named, such as data.path=.../imagenette/full-size-v2/1.0.0.
The data are those that the run was made from, by their content, wherever they are (data.path, data.source, data.name);
with another size, or another choice of images (such as data.test_limit=500), or with data.sha256='' they are others.
Normalization is fitted to the training images at that size. ZCA of 64 px images did not end in nine minutes on two
cores, and that of larger ones is refused: whiten=meanstd.

``--ddranking`` computes the scores of `gsdd_jax.ddranking` for the run's own network, see `train.ranking`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import jax.numpy as jnp

from gsdd_jax import nets, recipes
from train import commands, compilation_cache, ranking, testset
from train.bench import Bench
from train.errors import DivergedError, UserError, exit_cleanly
from train.results import extra_columns, markdown, trained

_NAMES = get_args(get_type_hints(nets.NetSpec)["name"])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = commands.parser(
        "evaluate",
        __doc__,
        epilog="Settings of the run's config can be overridden, such as evaluate.steps=1000 evaluate.seeds=5.",
    )
    parser.add_argument(
        "--run", required=True, metavar="DIR", help="run that train.distill wrote, or name of a released set"
    )
    parser.add_argument(
        "--networks", nargs="+", metavar="NAME", help=f"networks to train: {', '.join(_NAMES)}; default: the run's"
    )
    parser.add_argument(
        "--recipe",
        default="config",
        choices=recipes.RECIPES,
        help="how they are trained (default: config, the run's evaluate section)",
    )
    parser.add_argument(
        "--resolution",
        type=int,
        default=0,
        metavar="SIDE",
        help="render the set and read the data at another size in pixels, such as 256",
    )
    parser.add_argument("--ddranking", action="store_true", help="compute DD-Ranking's LRS and ARS")
    parser.add_argument(
        "--first-seed", type=int, default=0, metavar="N", help="first seed; the run itself used 0, 1, ..."
    )
    parser.add_argument("--out", metavar="FILE", help="write the results as JSON; an interrupted file is continued")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as evaluate.seeds=10")
    args = parser.parse_intermixed_args(argv)
    # Overrides that follow the names of networks are handed over as further names.
    named = [text for text in args.networks or [] if "=" not in text]
    overrides = [*(text for text in args.networks or [] if "=" in text), *args.overrides]
    with exit_cleanly(debug=args.debug):
        compilation_cache.enable()
        _check_arguments(args, named)
        bench = Bench(args, named, overrides)
        if args.ddranking:
            print(ranking.rank(bench))
        else:
            text = across_networks(bench)
            print(text if named else json.dumps(bench.content["accuracy"]))
    return 0


def _check_arguments(args: argparse.Namespace, named: list[str]) -> None:
    for name in named:
        if name not in _NAMES:
            raise UserError(f"--networks: unknown network {name!r}; allowed: {', '.join(_NAMES)}")
    if args.networks and not named:
        raise UserError(f"--networks: expected one or more of {', '.join(_NAMES)}, found none")
    if args.ddranking and named:
        raise UserError("--networks: --ddranking is computed for the run's own network; leave one of them out")
    for key in ("resolution", "first_seed"):
        if getattr(args, key) < 0:
            raise UserError(f"--{key.replace('_', '-')}: expected an integer of at least 0, found {getattr(args, key)}")
    if args.out and not Path(args.out).resolve().parent.is_dir():
        raise UserError(f"--out: no such directory: {Path(args.out).parent}")


def across_networks(bench: Bench) -> str:
    """Trains and tests every network that is not in the file yet; returns the table."""
    config, hard, soft = bench.experiment.config, jnp.asarray(bench.synset.labels), bench.synset.soft_labels
    kinds = {"": hard if soft is None else soft}
    if soft is not None and config.baselines.hard_labels:
        kinds["hard_labels"] = hard

    def tested(name: str) -> dict[str, Any]:
        rows = {
            key: bench.test(
                f"{name}{key and ', hard labels'}",
                lambda _, labels=labels: (bench.images, labels),  # type: ignore[misc]
                bench.specs[name],
                network=bench.networks[name],
            )
            for key, labels in kinds.items()
        }
        return rows.pop("") | rows

    entries, failed = {}, {}
    for name in bench.specs:
        try:
            entries[name] = bench.entry("networks", name, partial(tested, name))
        except DivergedError as error:
            failed[name] = str(error)
    others = {name: entry["mean"] for name, entry in entries.items() if name != bench.maker}
    complete = others and not failed.keys() - {bench.maker}
    cross = {"mean": sum(others.values()) / len(others), "networks": list(others)} if complete else None
    own = entries.get(config.network.name)
    keys = ("mean", "std", "n", "seeds", "per_class", "balanced", "accuracies", "hard_labels")
    accuracy = own and {key: own[key] for key in keys if key in own}
    bench.content |= {"cross_architecture": cross, "accuracy": accuracy}
    bench.save()
    text = _table(bench, entries)
    if failed:
        if len(bench.specs) > 1:
            print(text)
        raise UserError("; ".join(failed.values()))
    return text


def _table(bench: Bench, entries: Mapping[str, Mapping[str, Any]]) -> str:
    extra, cross = extra_columns(entries.values(), bench.content), bench.content["cross_architecture"]
    rows = []
    for name, spec in bench.specs.items():
        entry, label = entries.get(name), f"{name} (made the set)" if name == bench.maker else name
        if entry is None:
            rows.append([label, "diverged", spec.seeds, f"{spec.lr:g}", "", *("" for _ in extra)])
            continue
        cells = [testset.percent(entry), entry["n"], f"{entry['lr']:g}", f"{entry['steps']:,}"]
        rows.append([label, *cells, *(cell(entry) for cell in extra.values())])
    if cross is not None and len(cross["networks"]) > 1:
        label = "average of those that did not make the set"
        rows.append([label, f"{100 * cross['mean']:.1f}", *[""] * (3 + len(extra))])
    height, width = bench.images.shape[1:3]
    evaluate = dataclasses.asdict(next(iter(bench.specs.values())))
    return (
        f"{bench.run}: networks trained and tested at {height}x{width} px, recipe {bench.recipe}\n\n"
        f"{trained(evaluate, bench.experiment.config.augment.strategy)}\n\n"
        + markdown(["network", "test accuracy, %", "networks", "learning rate", "steps each", *extra], rows)
        + testset.below(bench.content)
    )


if __name__ == "__main__":
    sys.exit(main())
