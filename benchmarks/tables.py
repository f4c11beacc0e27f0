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
from typing import Any

from benchmarks.packed_psnr import ALONE, TRAINED
from benchmarks.record import RESULTS, ROOT
from train import budget, results
from train.config import EvaluateConfig

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


# Runs on the same data, networks, budget and evaluation; fitted and random images stand in the first.
OBJECTIVES = ("cifar10_dm_ipc1_w64", "cifar10_dc_ipc1_cpu", "cifar10_tm_ipc1_cpu")


def _objectives(_: str) -> str:
    runs = [json.loads((RESULTS / name / "result.json").read_text()) for name in OBJECTIVES]
    _refuse_unlike(runs)
    first = runs[0]
    lines = [
        f"{first['dataset']}, {first['bytes_per_class']:,} bytes per class, test accuracy in % of "
        f"{first['accuracy']['n']} networks:",
        "",
        "| objective | Gaussians | pixels |",
        "|---|---:|---:|",
        *(
            f"| {run['objective']} | {_percent(run['accuracy'])} | {_percent(run['pixel'])} |"
            for run in sorted(runs, key=lambda run: run["accuracy"]["mean"])
        ),
        f"| none: real images, fitted or as they are | {_percent(first['fit_only'])} | "
        f"{_percent(first['random_real'])} |",
        "",
    ]
    return "\n".join(lines) + "\n" + _sources(runs)


def _refuse_unlike(runs: list[dict[str, Any]]) -> None:
    """Raises if runs that stand in one table were not evaluated alike."""
    # Settings that came later have the default that was the rule before.
    if len({EvaluateConfig(**run["protocol"]["evaluate"]) for run in runs}) > 1:
        raise ValueError("runs of one table differ in evaluate")
    for key in ("network", "augment", "whiten", "seed"):
        if any(run["protocol"][key] != runs[0]["protocol"][key] for run in runs):
            raise ValueError(f"runs of one table differ in {key}")
    if len({(run["data_sha256"], run["bytes_per_class"], run["accuracy"]["n"]) for run in runs}) > 1:
        raise ValueError("runs of one table differ in data, budget or number of networks")


def _sources(runs: list[dict[str, Any]]) -> str:
    commands = "; ".join(f"`{run['command']}`" for run in runs)
    commits = ", ".join(dict.fromkeys(str(run["commit"])[:9] for run in runs))
    return f"{commands}; commit {commits}.\n"


def _percent(entry: dict[str, Any]) -> str:
    return f"{100 * entry['mean']:.1f} ± {100 * entry['std']:.1f}"


def _steps(name: str) -> str:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    lines = [
        "| sizes | objective | codec | seconds | arguments, MiB | temporary, MiB |",
        "|---|---|---|---:|---:|---:|",
    ]
    for size, found in record["results"].items():
        for row in found["steps"]:
            seconds = f"{row['min_ms'] / 1e3:.2f}" if "min_ms" in row else ""
            memory = [row["memory"][kind] / 2**20 for kind in ("argument", "temp")]
            lines.append(
                f"| {size} | {row['objective']} | {row['codec']} | {seconds} | {memory[0]:.0f} | {memory[1]:.0f} |"
            )
    for size, found in record["results"].items():
        if "experts" in found:
            experts, tests = found["experts"], found["evaluation"]
            lines += [
                "",
                f"`{size}`: {experts['experts_per_minute']:.2f} experts of {experts['epochs']} epochs of "
                f"{found['images']:,} images, or {tests['networks_per_minute']:.2f} evaluation networks of "
                f"{tests['steps']} steps per minute.",
            ]
    return "\n".join(lines) + "\n"


def _trajectory(name: str) -> str:
    results = json.loads((RESULTS / f"{name}.json").read_text())["results"]
    measured, planned = results["gradient"], results["planned"]
    lines = [
        "| steps of the student | 1,600 images, width 128: exact, MiB | held, MiB | 100 images, width 32: exact, s "
        "| held, s | TESLA, s | cosine of TESLA's gradient, syn_lr "
        + " / ".join(str(one["syn_lr"]) for one in measured["by_steps"][0]["tesla"])
        + " |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in measured["by_steps"]:
        memory = [planned["temp_bytes"][kind][str(row["steps"])] / 2**20 for kind in ("exact", "held")]
        seconds = " | ".join(f"{row['min_s'][kind]:.2f}" for kind in ("exact", "held", "tesla"))
        cosines = " / ".join(f"{one['cosine']:.3f}" for one in row["tesla"])
        lines.append(f"| {row['steps']} | {memory[0]:,.0f} | {memory[1]:,.0f} | {seconds} | {cosines} |")
    return "\n".join(lines) + "\n"


# Packed against bfloat16 Gaussians: pairs with the same objective, iterations, data and evaluation.
PAIRS = (
    ("cifar10_dm_ipc1_tuned", "cifar10_packed_dm_ipc1_tuned"),
    ("cifar10_dm_ipc10_w64", "cifar10_packed_dm_ipc10_w64"),
)


def _codecs(_: str) -> str:
    runs = []
    for pair in PAIRS:
        both = [json.loads((RESULTS / name / "result.json").read_text()) for name in pair]
        _refuse_unlike(both)
        runs += both
    first = runs[0]
    lines = [
        f"{first['dataset']}, {first['objective']} matching, test accuracy in % of {first['accuracy']['n']} networks:",
        "",
        "| bytes per class | codec | images per class | Gaussians per image | written | steps of a network "
        "| fitted only | distilled |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {run['bytes_per_class']:,} | {run['codec']} | {run['gpc']} | {run['num_points']} "
            f"| {run['accuracy']['bytes_per_class']:,} | {run['accuracy']['steps']:,} "
            f"| {_percent(run['fit_only'])} | {_percent(run['accuracy'])} |"
            for run in runs
        ),
        "",
    ]
    return "\n".join(lines) + "\n" + _sources(runs)


def _decode(name: str) -> str:
    rows = json.loads((RESULTS / f"{name}.json").read_text())["results"]
    lines = [
        "| images, Gaussians, pixels | bfloat16, ms | packed, ms | ratio | loading, bfloat16, s | packed, s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        plain, packed = (row["decode"][codec]["min_ms"] for codec in ("gaussian", "packed_gaussian"))
        seconds = " | ".join(f"{row['load_s'][codec]:.2f}" for codec in ("gaussian", "packed_gaussian"))
        what = f"{row['images']}, {row['gaussians']}, {row['pixels']}"
        lines.append(f"| {what} | {plain:.1f} | {packed:.1f} | {packed / plain:.2f} | {seconds} |")
    return "\n".join(lines) + "\n"


def _frontier(name: str) -> str:
    result = json.loads((RESULTS / name / "frontier.json").read_text())
    environment = result["environment"]
    source = f"`{environment['command']}`, commit {str(environment['commit'])[:9]}.\n"
    return budget.table(result) + f"\n{source}"


def _packed(name: str) -> str:
    rows = json.loads((RESULTS / f"{name}.json").read_text())["results"]
    layouts = list(dict.fromkeys(tuple(row["layout"]) for row in rows if row["method"] == "rounded at the end"))
    found = {(row["method"], tuple(row["layout"] or ()), row["steps"]): row for row in rows}
    methods = ("rounded at the end", *TRAINED)
    steps = sorted({row["steps"] for row in rows})
    heads = [f"{method}, {count} steps" for count in steps for method in methods]
    lines = [
        "| bits of position, shape, colour | bits per Gaussian | " + " | ".join(heads) + " |",
        "|---|---:|" + "---:|" * len(heads),
    ]
    blank = " |" * (len(methods) - 1)
    plain = "".join(f" {found['bfloat16', (), count]['psnr']:.2f} |{blank}" for count in steps)
    lines.append(f"| bfloat16 | 144.0 |{plain}")
    for layout in layouts:
        cells = [found[method, layout, count] for count in steps for method in methods]
        psnr = " | ".join(f"{cell['psnr']:.2f}" for cell in cells)
        lines.append(f"| {', '.join(map(str, layout))} | {cells[0]['bits']['written']:.1f} | {psnr} |")
    return "Mean PSNR in dB:\n\n" + "\n".join(lines) + "\n"


def _sensitivity(_: str) -> str:
    rows = json.loads((RESULTS / "packed_psnr.json").read_text())["results"]
    steps = max(row["steps"] for row in rows)
    rows = [row for row in rows if row["steps"] == steps]
    exact = next(row["psnr"] for row in rows if row["method"] == "float32")
    lines = [
        f"PSNR in dB that is lost by rounding one kind of number after {steps:,} steps in float32 ({exact:.2f} dB):",
        "",
        "| rounded | " + " | ".join(f"{bits} bits" for bits in ALONE) + " |",
        "|---|" + "---:|" * len(ALONE),
    ]
    for name in ("position", "shape", "colour"):
        psnr = [row["psnr"] for row in rows if row["method"] == f"only {name} rounded"]
        lines.append(f"| {name} | " + " | ".join(f"{exact - one:.2f}" for one in psnr) + " |")
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[str], str]] = {
    "digits": _run,
    "cifar10_dm_ipc1_cpu": _run,
    "fit_psnr": _fit,
    "splat": _splat,
    "kernel_model": _kernel_model,
    "matching": _objectives,
    "codecs": _codecs,
    "decode": _decode,
    "budget_12288": _frontier,
    "objectives": _steps,
    "packed_psnr": _packed,
    "sensitivity": _sensitivity,
    "trajectory": _trajectory,
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
