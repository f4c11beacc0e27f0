"""How to spend a budget of bytes: ``python -m train.budget --config FILE [bytes_per_class=N] [key=value ...]``.

Given the bytes of a class, fewer bits per Gaussian or fewer Gaussians per image leave room for more images. Each
combination of ``--bits`` and ``--points`` takes as many images as fit. All are fitted to real images and tested without
distillation (the cheap proxy: accuracy, and PSNR beside it); the best ``--keep`` are then distilled as the config says.
Accuracies are on held-out training images, so that the test set stays out of the choice.

Every point is a run directory under ``--out``; the same command continues an interrupted search.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gsdd_jax import codecs, data, files, labels, storage
from gsdd_jax.codecs import GaussianSpec, PackedGaussianSpec
from train import compilation_cache, distill, testset
from train import config as configs
from train import experiment as experiments
from train.errors import ConfigError, exit_cleanly
from train.experiment import hold_out
from train.progress import Progress
from train.rundir import environment, write_json
from train.stopping import on_sigterm

# The paper's precision, and layouts whose sensitivity was measured on fits: bits of each number of position, Cholesky
# factor and color.
BITS = ("bf16", "8+6+6", "7+6+5", "6+5+4")
POINTS = (12, 22, 42)


class Candidate(NamedTuple):
    """A way to spend the budget."""

    bits: str
    codec: GaussianSpec | PackedGaussianSpec

    @property
    def name(self) -> str:
        """Its name in tables and as a folder, such as ``8+6+6x22``."""
        return f"{self.bits}x{self.codec.num_points}"

    @property
    def overrides(self) -> list[str]:
        """The settings of a config that stand for it; the section is replaced whole, so all that was set is named."""
        named = {f.name: getattr(self.codec, f.name) for f in dataclasses.fields(self.codec)}
        defaults = {f.name: f.default for f in dataclasses.fields(self.codec) if f.name not in ("name", "num_points")}
        kept = {name: value for name, value in named.items() if name not in defaults or value != defaults[name]}
        return ["codec={" + ", ".join(f"{name}: {value}" for name, value in kept.items()) + "}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.budget", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", required=True, metavar="FILE", help="experiment with a Gaussian codec")
    parser.add_argument("--bits", nargs="+", default=list(BITS), metavar="P+L+C", help=f"default: {' '.join(BITS)}")
    parser.add_argument("--points", nargs="+", type=int, default=list(POINTS), metavar="M", help="Gaussians per image")
    parser.add_argument("--keep", type=int, default=2, metavar="N", help="candidates that are distilled (default: 2)")
    parser.add_argument("--out", metavar="DIR", help="default: runs/NAME-budget")
    parser.add_argument("--smoke", action="store_true", help="shrink the experiment by the config's smoke block")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors too")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="such as bytes_per_class=12288 evaluate.seeds=3"
    )
    args = parser.parse_intermixed_args(argv)
    with exit_cleanly(debug=args.debug), on_sigterm():
        compilation_cache.enable()
        budget, overrides = _split(args.overrides)
        config: configs.RunConfig = configs.load(args.config, overrides, smoke=args.smoke)
        if args.keep < 0:
            raise ConfigError(f"--keep: expected 0 or more, found {args.keep}")
        dataset = data.load(config.data)
        config = experiments.known_data(config, dataset)
        if budget is not None:
            one = storage.budget_bytes(1, dataset.image_shape)
            ipc = budget / one
            # Rounded down, the quotient would lose a byte.
            ipc = ipc if storage.budget_bytes(ipc, dataset.image_shape) == budget else math.nextafter(ipc, math.inf)
            config = dataclasses.replace(config, ipc=ipc)
        compared = hold_out(dataset)
        found = candidates(config, experiments.own_classes(config, compared), args.bits, args.points)
        out = Path(args.out) if args.out else Path("runs") / f"{config.name}-budget"
        result = search(config, compared, found, keep=args.keep, out=out, progress=Progress(quiet=args.quiet))
        print((out / "frontier.md").read_text())
        print("proposal: " + " ".join(result["proposal"]))
        print(out / "frontier.png")
    return 0


def _split(overrides: Sequence[str]) -> tuple[int | None, list[str]]:
    """Takes ``bytes_per_class=N`` out of the overrides."""
    budget, rest = None, []
    for override in overrides:
        key, _, value = override.partition("=")
        if key.strip() != "bytes_per_class":
            rest.append(override)
            continue
        if not value.strip().isdecimal() or int(value) < 1:
            raise ConfigError(f"bytes_per_class: expected a whole number of at least 1, found {value!r}")
        budget = int(value)
    return budget, rest


def candidates(
    config: configs.RunConfig, dataset: data.Dataset, bits: Sequence[str], points: Sequence[int]
) -> list[Candidate]:
    """Returns every combination that fits, with as many images per class as the budget and the data hold.

    Raises:
        ConfigError: A layout or number of Gaussians that makes no sense, no Gaussian codec, or nothing fits.
    """
    if "num_points" not in config.codec.sizes(dataset.image_shape):
        raise ConfigError(f"codec.name: a budget is searched for Gaussians, found {config.codec.name!r}")
    if min(points) < 1:
        raise ConfigError(f"--points: expected numbers of at least 1, found {min(points)}")
    found, refusals = [], []
    smallest = int(np.bincount(dataset.train_labels, minlength=dataset.num_classes).min())
    for layout in bits:
        for count in points:
            spec = _spec(config.codec, layout, count)
            try:
                most = codecs.make(
                    spec,
                    image_shape=dataset.image_shape,
                    num_classes=dataset.num_classes,
                    bytes_per_class=storage.budget_bytes(config.ipc, dataset.image_shape),
                    label_bytes=labels.nbytes(config.labels, 1, dataset.num_classes),
                ).images_per_class
            except ValueError as error:
                refusals.append(error)
                continue
            found.append(Candidate(layout, dataclasses.replace(spec, images_per_class=min(most, smallest))))
    if not found:
        raise ConfigError(f"bytes_per_class: no combination of --bits and --points fits; {refusals[0]}")
    return found


def _spec(base: codecs.CodecSpec, layout: str, points: int) -> GaussianSpec | PackedGaussianSpec:
    cls: type[GaussianSpec | PackedGaussianSpec] = GaussianSpec if layout == "bf16" else PackedGaussianSpec
    # What both have in common is kept: the rates of the optimizer, the start, the renderer.
    known = {field.name for field in dataclasses.fields(cls)} - {"name", "images_per_class", "num_points", "dtype"}
    shared = {name: value for name, value in vars(base).items() if name in known}
    if layout != "bf16":
        parts = layout.split("+")
        if len(parts) != 3 or not all(part.isdecimal() and 2 <= int(part) <= 16 for part in parts):
            raise ConfigError(f"--bits: expected bf16 or three numbers from 2 to 16 such as 8+6+6, found {layout!r}")
        shared |= dict(zip(("bits_mean", "bits_cholesky", "bits_color"), map(int, parts), strict=True))
    return cls(num_points=points, **shared)


def search(
    config: configs.RunConfig,
    dataset: data.Dataset,
    found: Sequence[Candidate],
    *,
    keep: int,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Fits and tests every candidate, distills the best, and writes frontier.json, .md and .png into ``out``."""
    alone = config.baselines.off()
    proxy = dataclasses.replace(config, baselines=alone, distill=dataclasses.replace(config.distill, iterations=0))
    rows = [_row(one, proxy, dataset, out / "fit" / one.name, progress) for one in found]
    best = sorted(range(len(found)), key=lambda i: -rows[i]["accuracy"]["mean"])[:keep]
    for i in best:
        whole = dataclasses.replace(config, baselines=alone)
        name = found[i].name
        distilled = _row(found[i], whole, dataset, out / "distilled" / name, progress, fitted=[out / "fit" / name])
        rows[i]["distilled"] = distilled["accuracy"]
    chosen, kind = (best, "distilled") if best else (list(range(len(found))), "accuracy")
    winner = max(chosen, key=lambda i: rows[i][kind]["mean"])
    own = experiments.own_classes(config, dataset)
    result = {
        "name": config.name,
        "dataset": dataset.name,
        "objective": config.objective.name,
        "iterations": config.distill.iterations,
        "bytes_per_class": storage.budget_bytes(config.ipc, dataset.image_shape),
        **testset.check(config.evaluate, own),
        "held_out": len(own.test_labels),
        "evaluate": dataclasses.asdict(config.evaluate),
        "rows": rows,
        "proposal": [f"ipc={config.ipc!r}", *found[winner].overrides],
        "environment": environment(),
    }
    write_json(out / "frontier.json", result)
    files.write_bytes(out / "frontier.md", table(result).encode())
    files.write_bytes(out / "frontier.png", picture(result))
    return result


def _row(
    one: Candidate,
    config: configs.RunConfig,
    dataset: data.Dataset,
    out: Path,
    progress: Progress,
    *,
    fitted: Sequence[Path] = (),
) -> dict[str, Any]:
    config = dataclasses.replace(config, codec=one.codec, name=f"{config.name}-{one.name}")
    result = distill.run(experiments.prepare(config, dataset), out, progress, fitted=fitted)
    return {
        "name": one.name,
        "bits": one.bits,
        "points": one.codec.num_points,
        "images_per_class": one.codec.images_per_class,
        "bytes_per_class": result["accuracy"]["bytes_per_class"],
        "accuracy": result["accuracy"],
        "psnr": result["fit_psnr"],
        "overrides": one.overrides,
    }


def table(result: dict[str, Any]) -> str:
    """Writes a search as a Markdown table, with a column of what was distilled if anything was."""
    any_distilled = any("distilled" in row for row in result["rows"])
    how = f"; distilled by {result['objective']} matching, {result['iterations']} iterations" if any_distilled else ""
    last = (" distilled |", "---:|") if any_distilled else ("", "")
    lines = [
        f"{result['dataset']}, {result['bytes_per_class']:,} bytes per class, accuracy in % on {result['held_out']:,} "
        f"held-out training images{how}",
        "",
        f"| bits | Gaussians per image | images per class | bytes per class | PSNR, dB | fitted only |{last[0]}",
        f"|---|---:|---:|---:|---:|---:|{last[1]}",
    ]
    for row in result["rows"]:
        distilled = testset.percent(row["distilled"]) if "distilled" in row else ""
        psnr = "" if row["psnr"] is None else f"{row['psnr']:.2f}"
        lines.append(
            f"| {row['bits']} | {row['points']} | {row['images_per_class']} | {row['bytes_per_class']:,} | {psnr} | "
            f"{testset.percent(row['accuracy'])} |" + (f" {distilled} |" if any_distilled else "")
        )
    return "\n".join(lines) + "\n" + testset.below(result)


def picture(result: dict[str, Any]) -> bytes:
    """Draws accuracy against images per class, a line for each layout: open without distillation, filled with it."""
    # Here, or --help would wait for it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for bits in dict.fromkeys(row["bits"] for row in result["rows"]):
        rows = sorted((row for row in result["rows"] if row["bits"] == bits), key=lambda row: row["images_per_class"])
        x, y = [row["images_per_class"] for row in rows], [100 * row["accuracy"]["mean"] for row in rows]
        (line,) = axes.plot(x, y, "o-", mfc="white", label=f"{bits}, fitted only")
        for row in rows:
            place = (row["images_per_class"], 100 * row["accuracy"]["mean"])
            axes.annotate(f"{row['points']}", place, (0, -11), textcoords="offset points", ha="center", fontsize=7)
        done = [row for row in rows if "distilled" in row]
        if done:
            accuracies = [100 * row["distilled"]["mean"] for row in done]
            # Between points that were left out, a line would claim too much.
            marks = "o-" if len(done) == len(rows) else "o"
            x = [row["images_per_class"] for row in done]
            axes.plot(x, accuracies, marks, color=line.get_color(), label=f"{bits}, distilled")
    axes.set_xscale("log")
    axes.margins(0.06, 0.1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("images per class (small numbers: Gaussians per image)")
    axes.set_ylabel("accuracy on held-out training images, %")
    axes.set_title(f"{result['dataset']}, {result['bytes_per_class']:,} bytes per class", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(file, format="png", dpi=160, metadata={"Software": None})
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
