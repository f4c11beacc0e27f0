"""Draws Figure 5 from the JSON of `benchmarks.figure5`: ``python -m benchmarks.plots FILE.json ... --out FILE.png``.

Several files, such as the parts of an interrupted sweep, are merged; of a point measured twice the later file counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks import figure5
from train.errors import exit_cleanly

# Okabe and Ito's colors, which all kinds of color vision tell apart.
SERIES = {
    "gsdd": ("Gaussians, kernels", "#0072B2"),
    "gsdd_xla": ("Gaussians, XLA", "#56B4E9"),
    "siren": ("SIREN, batched", "#D55E00"),
    "siren_checkpoint": ("SIREN, batched + checkpoint", "#E69F00"),
}
STYLES: dict[str, Literal["-", "--"]] = {"gsdd": "-", "gsdd_xla": "--", "siren": "-", "siren_checkpoint": "--"}
MARKERS = {283: "v", 963: "o", 2043: "s", 3523: "^"}
COLUMNS = ("forward, ms", "forward + backward, ms", "memory of forward + backward, MiB")


def read(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the rows of all files, and the first file's record without its results.

    Raises:
        ValueError: A file is not one of `benchmarks.figure5`.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    head: dict[str, Any] = {}
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        results = record.pop("results", None)
        if not isinstance(results, dict) or not all("series" in row for row in results.get("rows", [{}])):
            raise ValueError(f"FILE: {path} holds no results of benchmarks.figure5")
        head = head or record
        rows |= {tuple(row[key] for key in (*figure5.Point._fields, "series")): row for row in results["rows"]}
    return list(rows.values()), head


def value(row: dict[str, Any], column: int) -> float | None:
    """Returns what a row has for a column, if it was measured."""
    found = row["forward" if column == 0 else "forward+backward"]
    if column < 2:
        return found.get("median_ms")
    # What did not run for want of time has been compiled all the same.
    return found["memory"]["total"] / 2**20 if "memory" in found else None


def draw(rows: Sequence[dict[str, Any]], head: dict[str, Any]) -> Figure:
    """Draws both sweeps: one row of panels over the resolution, one over the batch."""
    settings = head["settings"]
    batch, pixels = settings.get("batch", figure5.BATCH), settings.get("pixels", figure5.PIXELS)
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3, squeeze=False)
    budgets = sorted({row["floats"] for row in rows})
    # The others only frame it.
    main_budget = next((floats for floats in figure5.WIDTHS if floats in budgets), None)
    sweeps = (
        ("pixels", f"pixels per edge, batch {batch}", [row for row in rows if row["batch"] == batch]),
        ("batch", f"images, {pixels} pixels per edge", [row for row in rows if row["pixels"] == pixels]),
    )
    for across, (key, label, chosen) in zip(panels, sweeps, strict=True):
        for column, panel in enumerate(across):
            for series, (_, color) in SERIES.items():
                for floats in budgets:
                    own = [row for row in chosen if row["series"] == series and row["floats"] == floats]
                    points = sorted((row[key], y) for row in own if (y := value(row, column)) is not None)
                    panel.plot(
                        [x for x, _ in points],
                        [y for _, y in points],
                        color=color,
                        marker=MARKERS.get(floats, "o"),
                        markersize=5 if floats == main_budget else 3.5,
                        linewidth=2.0 if floats == main_budget else 0.9,
                        alpha=1.0 if floats == main_budget else 0.65,
                        linestyle=STYLES[series],
                    )
            abscissae = sorted({row[key] for row in chosen})
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(abscissae, [str(x) for x in abscissae], fontsize=8)
            panel.xaxis.set_minor_locator(NullLocator())
            low, high = panel.get_ylim()
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.grid(alpha=0.3, linewidth=0.6)
            panel.set_xlabel(label)
            if key == "pixels":
                panel.set_title(COLUMNS[column], fontsize=11)
    present = {row["series"] for row in rows}
    names = {series: name for series, (name, _) in SERIES.items() if series in present}
    if "gsdd" in names and settings.get("stand_in"):
        names["gsdd"] = "Gaussians, XLA for want of a GPU"
    lines = [
        Line2D([], [], color=SERIES[series][1], linestyle=STYLES[series], label=name) for series, name in names.items()
    ]
    marks = [
        Line2D([], [], color="black", linestyle="", marker=MARKERS.get(floats, "o"), label=f"{floats} floats per image")
        for floats in budgets
    ]
    # A legend fills its columns first: the pairs put the series into the first line and the budgets into the second.
    blank = Line2D([], [], linestyle="", label=" ")
    handles = [handle for pair in itertools.zip_longest(lines, marks, fillvalue=blank) for handle in pair]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) // 2, fontsize=9, frameon=False)
    figure.suptitle(f"{head.get('device', '')}, JAX {head.get('versions', {}).get('jax')}", fontsize=11)
    return figure


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="JSON of benchmarks.figure5")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="picture to write, PNG, SVG or PDF")
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(*read(args.files)).savefig(args.out, dpi=120)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_cleanly()(main)())
