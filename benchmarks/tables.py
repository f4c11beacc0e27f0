"""Writes the tables of README.md from committed results: ``python -m benchmarks.tables [--check]``.

A block of README between ``<!-- table: NAME -->`` and ``<!-- end -->`` belongs to this script. ``--check`` changes
nothing and fails if a block differs from its results; the test suite runs it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable

from benchmarks.record import RESULTS, ROOT
from train import results

README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _run(name: str) -> str:
    result = json.loads((RESULTS / name / "result.json").read_text())
    return results.table(result) + f"\n`{result['command']}`, commit {str(result['commit'])[:9]}.\n"


def _fit(name: str) -> str:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    shown = (1, 50, 100, 300, 500, 1000)
    lines = [
        f"Mean PSNR in dB of a fixed sample of training images of {record['settings']['data']} "
        f"({'x'.join(map(str, record['settings']['size']))}), as stored in bfloat16, after so many steps:",
        "",
        "| Gaussians | start | images | schedule | " + " | ".join(map(str, shown)) + " |",
        "|---:|---|---:|---:|" + "---:|" * len(shown),
    ]
    for row in record["results"]:
        psnr = {point["step"]: f"{point['psnr']:.2f}" for point in row["curve"]}
        cells = " | ".join(psnr.get(step, "") for step in shown)
        lines.append(f"| {row['points']} | {row['start']} | {row['images']} | {row['steps']} | {cells} |")
    return "\n".join(lines) + "\n"


def _splat(name: str) -> str:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    lines = [
        "| images, Gaussians, pixels | direction | render, ms | dense, ms | ratio | sum of squares, ms | ratio |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in record["results"]:
        for label, times in row["directions"].items():
            ours, dense, factored = (times[name]["min_ms"] for name in ("render", "dense", "factored"))
            what = f"{row['images']}, {row['gaussians']}, {row['pixels']}"
            lines.append(
                f"| {what} | {label} | {ours:.1f} | {dense:.1f} | {dense / ours:.1f} "
                f"| {factored:.1f} | {factored / ours:.1f} |"
            )
    return "\n".join(lines) + "\n"


def _kernel_model(name: str) -> str:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    lines = [
        "| Gaussians | pixels in reach of one | walked by its gather | in its upright box | forward | backward |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["results"]["per_1000_images"]:
        forward = min(one["bound_ms"] for one in row["forward"])
        backward = min(one["bound_ms"] for one in row["backward"])
        pixels = " | ".join(f"{row[f'pixels_{kind}']:,.0f}" for kind in ("ellipse", "walk", "box"))
        lines.append(f"| {row['gaussians']} | {pixels} | {forward:.2f} | {backward:.2f} |")
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[str], str]] = {
    "digits": _run,
    "cifar10_dm_ipc1_cpu": _run,
    "fit_psnr": _fit,
    "splat": _splat,
    "kernel_model": _kernel_model,
}


def render(text: str) -> str:
    """Returns the text with every block made anew."""

    def block(match: re.Match[str]) -> str:
        return match[1] + TABLES[match[2]](match[2]) + match[3]

    return BLOCK.sub(block, text)


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="fail if README.md is out of date")
    args = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = render(old)
    if args.check and new != old:
        print("README.md does not agree with benchmarks/results: run python -m benchmarks.tables", file=sys.stderr)
        return 1
    if not args.check:
        README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
