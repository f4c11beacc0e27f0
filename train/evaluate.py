"""Re-evaluate an exported set: ``python -m train.evaluate --run runs/digits``.

Reads the run's config, its data and its exported set, trains fresh networks and tests each once, after its last step.
Nothing in the run directory changes; ``--out`` writes the numbers as JSON, after every network, and the same command
continues such a file.

Across architectures, as in Table 14 of GSDD (five lines of table and the average without the ConvNet)::

    python -m train.evaluate --run DIR --networks alexnet vgg11 resnet18 vit convnet --recipe gsdd --out cross.json

Of a set with soft labels, networks are trained with hard ones as well, unless ``baselines.hard_labels=false``.

``--recipe`` says how networks are trained: ``config``, ``gsdd``, ``glad`` or ``dance``, see `gsdd_jax.recipes`.
Overrides such as ``evaluate.steps=100`` apply on top of it, to all networks. ``evaluate.lr_from=syn_lr`` takes the rate
that trajectory matching learned (MTT).

Across resolutions, as in Table 17 of GSDD: a set distilled at 128 px, networks trained and tested at 256 and 512 px,
with five and with six blocks::

    python -m train.evaluate --run DIR --resolution 256 network.depth=5
    python -m train.evaluate --run DIR --resolution 256 network.depth=6
    python -m train.evaluate --run DIR --resolution 512 network.depth=6 evaluate.batch=64

The set is rendered at that size, and the data are read at that size from their source: photographs that are larger are
scaled down, smaller ones up (then the test holds no more detail than before, unlike in the paper). Where the run read
a small copy, a larger one of the same classes can be named, such as data.path=.../imagenette/full-size-v2/1.0.0.
The data are those that the run was made from, by their content, wherever they are (data.path, data.source, data.name);
with another size, or another choice of images (such as data.test_limit=500), or with data.sha256='' they are others.
Normalization is fitted to the training images at that size. ZCA of 64 px images did not end in nine minutes on two
cores, and that of larger ones is refused: whiten=meanstd.

``--ddranking`` computes the scores of `gsdd_jax.ddranking` for the run's own network. The full data, the set and random
real images (drawn anew for each network) are trained by the same recipe, the last two without augmentation as well.
Deviations from DD-Ranking's code: accuracies are of the last weights, tested once, not the best of many tests; the
learning rate of random images is chosen on training images that are held out, not on test images; the set has the
recipe's rate; the full data has the recipe too (and baselines.full_data_steps and full_data_seeds of the config); soft
labels of the set are left out, since random images have none.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import jax.numpy as jnp

from gsdd_jax import nets, recipes
from gsdd_jax.evaluation import EvalSpec
from train import compilation_cache, testset
from train import config as configs
from train.bench import Bench, Request, Results, diverged, head, set_up, train_and_test
from train.errors import UserError, exit_cleanly
from train.experiment import WHEREABOUTS
from train.progress import Progress
from train.ranking import rank
from train.results import exported, trained


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = _parser().parse_intermixed_args(argv)
    # Overrides that follow the names of networks are handed over as further names.
    named = [text for text in args.networks or [] if "=" not in text]
    overrides = [*(text for text in args.networks or [] if "=" in text), *args.overrides]
    with exit_cleanly(debug=args.debug):
        compilation_cache.enable()
        _check_arguments(args, named)
        request = _request(args, named, overrides)
        # Whatever does not fit is found before data are read.
        channels, classes = request.synset.parts[0].codec.image_shape[2], len(request.synset.class_names)
        networks = {
            name: nets.build(spec, (*request.size, channels), classes) for name, spec in request.networks.items()
        }
        bench = set_up(request)
        results = Results(Path(args.out) if args.out else None, head(request, bench))
        progress = Progress(quiet=args.quiet)
        if args.ddranking:
            print(rank(request, bench, networks, results, progress))
        else:
            text = test_networks(request, bench, networks, results, progress)
            own = results.content["accuracy"]
            print(text if named else json.dumps(own))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description="Train fresh networks on the exported set of a run and test each once.",
        epilog="Settings of the run's config can be overridden, such as evaluate.steps=1000 evaluate.seeds=5.",
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="run directory that train.distill wrote")
    parser.add_argument(
        "--networks", nargs="+", metavar="NAME", help=f"networks to train: {', '.join(_names())}; default: the run's"
    )
    parser.add_argument(
        "--recipe",
        default="config",
        metavar="NAME",
        help=f"how they are trained: {', '.join(recipes.RECIPES)} (default: config, the run's evaluate section)",
    )
    parser.add_argument(
        "--resolution", metavar="SIDE", help="render the set and read the data at another size, such as 256"
    )
    parser.add_argument("--size", metavar="HxW", help="render only, to meet data that are not square")
    parser.add_argument("--ddranking", action="store_true", help="compute DD-Ranking's LRS and ARS")
    parser.add_argument(
        "--first-seed", type=int, default=0, metavar="N", help="first seed; the run itself used 0, 1, ..."
    )
    parser.add_argument("--out", metavar="FILE", help="write the results as JSON; an interrupted file is continued")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors too")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as evaluate.seeds=10")
    return parser


def _names() -> tuple[str, ...]:
    return get_args(get_type_hints(nets.NetSpec)["name"])


def _check_arguments(args: argparse.Namespace, named: list[str]) -> None:
    for name in named:
        if name not in _names():
            raise UserError(f"--networks: unknown network {name!r}; allowed: {', '.join(_names())}")
    if args.networks and not named:
        raise UserError(f"--networks: expected one or more of {', '.join(_names())}, found none")
    if args.recipe not in recipes.RECIPES:
        raise UserError(f"--recipe: unknown recipe {args.recipe!r}; allowed: {', '.join(recipes.RECIPES)}")
    if args.ddranking and named:
        raise UserError("--networks: --ddranking is computed for the run's own network; leave one of them out")
    if args.size and args.resolution:
        raise UserError("--size: --resolution sets the size of the set and of the data; leave one of them out")
    if args.first_seed < 0:
        raise UserError(f"--first-seed: expected an integer of at least 0, found {args.first_seed}")
    if args.out and not Path(args.out).resolve().parent.is_dir():
        raise UserError(f"--out: no such directory: {Path(args.out).parent}")


def _request(args: argparse.Namespace, named: list[str], overrides: list[str]) -> Request:
    run = Path(args.run)
    synset = exported(run)
    file = run / "config.yaml"
    if not file.exists():
        raise UserError(f"{run} holds an exported set but no config.yaml, which says how to train on it")
    size, resolution = synset.parts[0].codec.image_shape[:2], 0
    if args.resolution:
        resolution = _side(args.resolution)
        size = (resolution, resolution)
    elif args.size:
        size = _size(args.size)
    config: configs.RunConfig = configs.load(file, overrides)
    keys = [text.partition("=")[0].strip() for text in overrides]
    if any(configs.covered(key, ["data"]) and not configs.covered(key, [*WHEREABOUTS, "data.sha256"]) for key in keys):
        # Other images are asked for.
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, sha256=""))
    places = {text: [part.strip() for part in text.partition("=")[0].split(".")] for text in overrides}
    section = [place for place in places.values() if place[0] == "evaluate"]
    # A recipe works on the run's own section; what the command line says about it goes on top.
    base: configs.RunConfig = configs.load(file, [text for text in overrides if places[text] not in section])
    every = {field.name for field in dataclasses.fields(EvalSpec)}
    on_top = {name for place in section for name in place[1:2] or every} & every
    own = config.network
    names = named or [own.name]
    specs = {}
    for name in names:
        spec = recipes.recipe_for(args.recipe, name, base.evaluate.training())
        if args.recipe == "config" and config.evaluate.lr_from == "syn_lr" and "syn_lr" in synset.meta:
            spec = dataclasses.replace(spec, lr=synset.meta["syn_lr"])
        specs[name] = dataclasses.replace(spec, **{field: getattr(config.evaluate, field) for field in on_top})
    maker: configs.RunConfig = configs.load(file)
    networks = {name: own if name == own.name else nets.NetSpec(name=name) for name in names}  # type: ignore[arg-type]
    return Request(
        run, synset, config, maker.network.name, args.recipe, networks, specs, size, resolution, args.first_seed
    )


def _side(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise UserError(f"--resolution: expected a side in pixels such as 256, found {text!r}")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise UserError(f"--size: expected HEIGHTxWIDTH such as 64x64, found {text!r}")
    return int(height), int(width)


def test_networks(
    request: Request, bench: Bench, networks: dict[str, nets.Network], results: Results, progress: Progress
) -> str:
    """Trains and tests every network that is not in the file yet; returns the table."""
    augment = request.config.augment
    settings = {name: request.settings(name, spec, augment) for name, spec in request.specs.items()}
    kinds = {"": bench.labels}
    if request.synset.soft_labels is not None and request.config.baselines.hard_labels:
        kinds["hard_labels"] = jnp.asarray(request.synset.labels)
        settings = {name: {**known, "hard_labels": True} for name, known in settings.items()}
    entries = {name: results.known("networks", name, settings[name]) for name in networks}
    for name, network in networks.items():
        if entries[name] is not None:
            progress.say(f"{name}: kept from the file of results")
            continue
        spec, made = request.specs[name], dict[str, Any]()
        for key, labels in kinds.items():
            began = time.perf_counter()
            with progress.phase(f"test {name}{key and ', hard labels'}", total=spec.seeds) as bar:
                tested = train_and_test(request, bench, network, spec, augment, (bench.images, labels), bar)
            seconds = time.perf_counter() - began
            entry = request.entry(tested, spec, settings[name], bench=bench, images=len(bench.images), seconds=seconds)
            made |= {key: entry} if key else entry
        entries[name] = made
        results.keep("networks", name, made)
    finished: dict[str, dict[str, Any]] = {name: entry for name, entry in entries.items() if entry is not None}
    others = {name: entry["mean"] for name, entry in finished.items() if name != request.maker}
    known = [mean for mean in others.values() if mean is not None]
    complete = known and len(known) == len(others)
    results.content["cross_architecture"] = (
        {"mean": sum(known) / len(known), "networks": list(others)} if complete else None
    )
    own = finished.get(request.config.network.name)
    keys = ("mean", "std", "n", "seeds", "per_class", "balanced", "accuracies", "hard_labels")
    results.content["accuracy"] = None if own is None else {key: own[key] for key in keys if key in own}
    results.save()
    uneven = testset.uneven(bench.test_set)
    text = _table(request, finished, results.content["cross_architecture"], uneven) + testset.below(bench.test_set)
    failed = {name: entry for name, entry in finished.items() if "diverged" in entry}
    if failed:
        if len(networks) > 1:
            print(text)
        raise UserError(diverged(failed))
    return text


def _table(request: Request, entries: dict[str, dict[str, Any]], cross: dict[str, Any] | None, uneven: bool) -> str:
    height, width = request.size
    hard = any("hard_labels" in entry for entry in entries.values())
    lines = [
        f"{request.run}: networks trained and tested at {height}x{width} px, recipe {request.recipe}",
        "",
        trained(dataclasses.asdict(next(iter(request.specs.values()))), request.config.augment.strategy),
        "",
        "| network | test accuracy, % | networks | learning rate | steps each |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, entry in entries.items():
        made = " (made the set)" if name == request.maker else ""
        more = f" {testset.percent(entry['hard_labels'])} |" if hard else ""
        more += "" if not uneven else f" {100 * entry['balanced']:.1f} |" if "balanced" in entry else " |"
        cells = f"{testset.percent(entry)} | {entry['n']} | {entry['lr']:g} | {entry['steps']:,} |{more}"
        lines.append(f"| {name}{made} | {cells}")
    if hard:
        lines[4:6] = [lines[4] + " with hard labels, % |", lines[5] + "---:|"]
    if uneven:
        lines[4:6] = [lines[4] + " mean over classes, % |", lines[5] + "---:|"]
    if cross is not None and len(cross["networks"]) > 1:
        last = " | | | |" + " |" * (hard + uneven)
        lines.append(f"| average of those that did not make the set | {100 * cross['mean']:.1f}{last}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
