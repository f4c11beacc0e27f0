"""Writes the tables of README.md and docs from committed results: ``python -m benchmarks.tables [--check]``.

A block between ``<!-- table: NAME -->`` and ``<!-- end -->`` belongs to this script, and so do the cards of the
released sets. ``--check`` changes nothing and fails if something differs from its results; the test suite runs it.
``--release RUN NAME`` first copies a run to ``sets/NAME``, in place of a set that is there.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cards
from benchmarks.packed_psnr import ALONE, TRAINED
from benchmarks.record import RESULTS, ROOT, SETS
from gsdd_jax import files
from gsdd_jax.exchange import renamed
from train import merge, results, testset, uses, yaml12
from train.config import EvaluateConfig
from train.errors import exit_cleanly

DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _run(name: str, folder: Path = RESULTS) -> str:
    result = json.loads((folder / name / "result.json").read_text())
    return f"{results.table(result)}\n{cards.source(result)}"


def _images(name: str) -> str:
    """Draws runs that share out the same bytes among images, named by the start of their fit and what they vary."""
    lines = [
        "| start | images per class | Gaussians | bytes per class | PSNR of the fit, dB | fitted, % | distilled, % |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    sources = []
    for path in sorted(
        (RESULTS / name).glob("*.json"), key=lambda path: (path.stem.split("_")[0], len(path.stem), path)
    ):
        run, start = json.loads(path.read_text()), path.stem.split("_")[0]
        rows = [run["fit_only"], run["accuracy"]]
        found = [f"{100 * row['mean']:.1f} ± {100 * row['std']:.1f}, n={row['n']}" if row else "" for row in rows]
        sizes = f"{run['accuracy']['images_per_class']} | {run['num_points']} | {run['accuracy']['bytes_per_class']:,}"
        lines.append(f"| {start} | {sizes} | {run['fit_psnr']:.2f} | {' | '.join(found)} |")
        sources.append(f"`{run['command']}`, commit {run['commit'][:9]}.")
    return "\n".join([*lines, "", *sources]) + "\n"


def _codecs_of(name: str) -> str:
    """Draws runs of several codecs at the same bytes, named by their files, the best first."""
    lines = [
        "| codec | images per class | Gaussians | bytes per class | PSNR of the fit, dB | fitted, % | distilled, % |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    found = [(json.loads(path.read_text()), path.stem.replace("--", ", ")) for path in (RESULTS / name).glob("*.json")]
    found.sort(key=lambda row: -row[0]["accuracy"]["mean"])
    _refuse_unlike([run for run, _ in found])
    for run, which in found:
        own = run["accuracy"]
        points = run["num_points"] or ""
        psnr = f"{run['fit_psnr']:.2f}" if run["fit_psnr"] else ""
        size = f"{own['images_per_class']} | {points} | {own['bytes_per_class']:,}"
        lines.append(f"| {which} | {size} | {psnr} | {_percent(run['fit_only'])} | {_percent(own)} |")
    return "\n".join(lines) + f"\n\n{_folded([run for run, _ in found])}"


def _video(name: str) -> str:
    """Draws `benchmarks.video`: the PSNR of each codec for each number of bytes, and its speed."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    rows = record["results"]
    budgets = sorted({row["budget"] for row in rows})
    heads = [f"{budget} bytes" for budget in budgets]
    lines = [
        "| codec | " + " | ".join(heads) + " | thousand frames per second |",
        "|---" + "|---:" * (len(heads) + 1) + "|",
    ]
    best = {row["codec"]: row["psnr"] for row in sorted(rows, key=lambda row: row["budget"])}
    for codec in sorted(best, key=lambda codec: -best[codec]):
        own = {row["budget"]: row for row in rows if row["codec"] == codec}
        cells = [f"{own[budget]['psnr']:.1f}" if budget in own else "" for budget in budgets]
        speed = [row["frames_per_s"] for row in own.values() if "frames_per_s" in row]
        lines.append(f"| {codec} | {' | '.join(cells)} | {f'{min(speed) / 1000:.0f}' if speed else ''} |")
    steps, n = rows[0]["steps"], record["n"]
    return (
        "\n".join([*lines, "", f"{n} videos, {steps} steps. `{record['command']}`, commit {record['commit'][:9]}."])
        + "\n"
    )


def _study(name: str) -> str:
    """Draws a study of `benchmarks.study`, a row for each set and what it varies."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    keys = ("order", "kept", "steps", "most_wrong", "test_images", "codec", "roughness")
    rows = [(run, row) for run, found in record["results"].items() for row in found]
    shown = [key for key in keys if key in rows[0][1]]
    tested = ["test accuracy, %", "networks"] if "mean" in rows[0][1] else []
    lines = ["| " + " | ".join(["run", *(key.replace("_", " ") for key in shown), *tested]) + " |"]
    lines.append("|---" * (1 + len(shown) + len(tested)) + "|")
    for run, row in rows:
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in (row[key] for key in shown)]
        accuracy = [f"{100 * row['mean']:.1f} ± {100 * row['std']:.1f}", str(row["n"])] if tested else []
        lines.append("| " + " | ".join([run, *cells, *accuracy]) + " |")
    return "\n".join([*lines, "", f"`{record['command']}`, commit {record['commit'][:9]}."]) + "\n"


def _use(name: str) -> str:
    """Draws what a command of `gsdd_jax.uses`, the first word of the name, has found."""
    result = json.loads((RESULTS / name / "result.json").read_text())
    made = importlib.import_module(f"train.{name.split('_')[0]}").table(result["title"], result["rows"])
    return f"{made}\n`{result['command']}`, commit {str(result['commit'])[:9]}, {result['device']}.\n"


def _federated(name: str) -> str:
    result = json.loads((RESULTS / name / "result.json").read_text())
    source = f"`{result['command']}`, commit {str(result['commit'])[:9]}.\n"
    return f"{results.table(result)}\n{merge.table(result)}\n{source}"


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


def _peers(name: str) -> str:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    rows = {(row["task"], row["width"], row["cores"]): row for row in record["results"]["rows"]}
    cores = sorted({row["cores"] for row in rows.values()})
    headings = [f"{who}, {n} core{'s' * (n > 1)}, ms" for n in cores for who in ("ours", "PyTorch", "ratio")]
    headings = ["ratio" if heading.startswith("ratio") else heading for heading in headings]
    lines = [
        f"| step | width | {' | '.join(headings)} | memory, ours, MiB | PyTorch |",
        "|---|---:|" + "---:|" * (len(headings) + 2),
    ]
    accounts = []
    for task, width in dict.fromkeys((task, width) for task, width, _ in rows):
        cells, memory = [], []
        for n in cores:
            row = rows[task, width, n]
            sides = row["competitors"]["ours"], row["competitors"][row["best"]]
            for side in sides:
                low, high = side["quartiles_ms"]
                cells.append(f"{side['median_ms']:,.0f} ({low:,.0f} to {high:,.0f})")
            cells.append(f"{row['ratio']:.2f}")
            memory = [f"{side['peak_bytes'] / 2**20:,.0f}" for side in sides]
        lines.append(f"| {task} | {width} | {' | '.join(cells + memory)} |")
        if task == "unrolled student":
            accounts.append(f"{sides[0]['account']['total'] / 2**20:,.0f} MiB at width {width}")
    turns = sorted({row["rounds"] for row in rows.values()})
    lines += [
        "",
        f"{record['device']}; medians and quartiles of {' to '.join(map(str, dict.fromkeys((turns[0], turns[-1]))))} "
        f"rounds of 1 or more calls, PyTorch {sides[1]['torch']} in the better of two layouts. Memory is what a "
        "process grew by at its peak, compilation included"
        + (f"; the compiler's account of our student is {', '.join(accounts)}" if accounts else "")
        + ".",
    ]
    return "\n".join(lines) + f"\n\n{_commands([record])}"


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


# Runs on the same data, networks, budget and evaluation: Gaussians with pixels beside them, and packed Gaussians.
OBJECTIVES = {
    "cifar10_dm_ipc1_w64": None,
    "cifar10_dc_ipc1_cpu": "cifar10_packed_dc_ipc1",
    "cifar10_tm_ipc1_cpu": "cifar10_packed_tm_ipc1",
}
# Where the fits of both stand, and random images.
FITTED = ("cifar10_dm_ipc1_w64", "cifar10_packed_dm_ipc1_tuned")


def _objectives(_: str) -> str:
    names = dict.fromkeys(name for name in (*OBJECTIVES, *OBJECTIVES.values(), *FITTED) if name)
    runs = {name: json.loads((RESULTS / name / "result.json").read_text()) for name in names}
    _refuse_unlike(list(runs.values()))
    first, packed = (runs[name] for name in FITTED)
    lines = [
        f"{first['dataset']}, {first['bytes_per_class']:,} bytes per class, test accuracy in % of "
        f"{first['accuracy']['n']} networks:",
        "",
        f"| objective | {first['gpc']} images of Gaussians | {packed['gpc']} of packed Gaussians | pixels |",
        "|---|---:|---:|---:|",
    ]
    for name, other in sorted(OBJECTIVES.items(), key=lambda pair: runs[pair[0]]["accuracy"]["mean"]):
        run = runs[name]
        cells = (run["accuracy"], runs[other]["accuracy"] if other else None, run["pixel"])
        lines.append(f"| {run['objective']} | {' | '.join(map(_percent, cells))} |")
    cells = (first["fit_only"], packed["fit_only"], first["random_real"])
    lines.append(f"| none: real images, fitted or as they are | {' | '.join(map(_percent, cells))} |")
    return "\n".join(lines) + f"\n\n{_folded(list(runs.values()))}"


def _refuse_unlike(runs: list[dict[str, Any]]) -> None:
    """Raises if runs that stand in one table were not evaluated alike."""
    # Settings that came later have the default that was the rule before.
    if len({EvaluateConfig(**renamed(run["protocol"]["evaluate"], "evaluate")) for run in runs}) > 1:
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


def _percent(entry: dict[str, Any] | None) -> str:
    return "" if entry is None else f"{100 * entry['mean']:.1f} ± {100 * entry['std']:.1f}"


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


# Packed against bfloat16 Gaussians: runs of a group have the same objective, iterations, data and evaluation.
GROUPS = (
    (
        "cifar10_dm_ipc1_tuned",
        "cifar10_dm_ipc1_lr01",
        "cifar10_packed_dm_ipc1_tuned",
        "cifar10_packed_dm_ipc1_192x14",
        "cifar10_packed_dm_ipc1_192x14_all",
    ),
    ("cifar10_dm_ipc1_2700", "cifar10_packed_dm_ipc1_w64"),
    ("cifar10_dm_ipc10_w64", "cifar10_packed_dm_ipc10_w64"),
    ("imagenette128_dm_ipc1_w32", "imagenette128_packed_dm_ipc1_w32"),
)


def _codecs(_: str) -> str:
    groups = [[json.loads((RESULTS / name / "result.json").read_text()) for name in group] for group in GROUPS]
    runs = [run for group in groups for run in group]
    for group in groups:
        _refuse_unlike(group)
    lines = [
        f"{runs[0]['objective']} matching, test accuracy in % of {runs[0]['accuracy']['n']} networks:",
        "",
        "| data | real images per class | bytes per class | codec | bits | lr | images per class | drawn per iteration "
        "| Gaussians per image | written | steps of a network | fitted only | distilled |",
        "|---|---:|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, run in zip([name for group in GROUPS for name in group], runs, strict=True):
        config = yaml12.parse((RESULTS / name / "config.yaml").read_text(), source=name)
        codec, drawn = config["codec"], config["objective"]["batch_syn"]
        bits = "16"
        if run["codec"] == "packed_gaussian":
            bits = "+".join(str(codec[f"bits_{leaf}"]) for leaf in ("mean", "cholesky", "color"))
        lines.append(
            f"| {run['dataset']} | {config['data']['per_class'] or 'all'} | {run['bytes_per_class']:,} "
            f"| {run['codec']} | {bits} | {codec['lr']:g} "
            f"| {run['gpc']} | {drawn or 'all'} | {run['num_points']} | {run['accuracy']['bytes_per_class']:,} "
            f"| {run['accuracy']['steps']:,} | {_percent(run['fit_only'])} | {_percent(run['accuracy'])} |"
        )
    return "\n".join(lines) + f"\n\n{_folded(runs)}"


# The groups in short: bfloat16 and packed, side by side.
PAIRS = (
    ("cifar10_dm_ipc1_tuned", "cifar10_packed_dm_ipc1_tuned"),
    ("cifar10_dm_ipc1_2700", "cifar10_packed_dm_ipc1_w64"),
    ("cifar10_dm_ipc10_w64", "cifar10_packed_dm_ipc10_w64"),
    ("imagenette128_dm_ipc1_w32", "imagenette128_packed_dm_ipc1_w32"),
)


def _pairs(_: str) -> str:
    lines = [
        "| data | real images per class | bytes per class | steps of a network | codec | images per class "
        "| fitted only | distilled |",
        "|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    for pair in PAIRS:
        runs = [json.loads((RESULTS / name / "result.json").read_text()) for name in pair]
        _refuse_unlike(runs)
        for name, run in zip(pair, runs, strict=True):
            real = yaml12.parse((RESULTS / name / "config.yaml").read_text(), source=name)["data"]["per_class"]
            lines.append(
                f"| {run['dataset']} | {real or 'all'} | {run['bytes_per_class']:,} | {run['accuracy']['steps']:,} "
                f"| {run['codec']} | {run['gpc']} | {_percent(run['fit_only'])} | {_percent(run['accuracy'])} |"
            )
    return f"Test accuracy in % of {runs[0]['accuracy']['n']} networks:\n\n" + "\n".join(lines) + "\n"


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
    return _points(result) + f"\n{source}"


def _points(result: dict[str, Any]) -> str:
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


def _packed(name: str) -> str:
    rows = json.loads((RESULTS / f"{name}.json").read_text())["results"]
    layouts = list(dict.fromkeys(tuple(row["layout"]) for row in rows if row["method"] == "rounded at the end"))
    found = {(row["method"], tuple(row["layout"] or ()), row["steps"]): row for row in rows}
    methods = ("rounded at the end", *TRAINED)
    steps = sorted({row["steps"] for row in rows})
    heads = [f"{method}, {count} steps" for count in steps for method in methods]
    lines = [
        "| bits of position, shape, color | bits per Gaussian | " + " | ".join(heads) + " |",
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


def _later(name: str) -> str:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    rows = record["results"]
    cells = [
        ("in every step", rows["every step"]["rounded"]),
        ("once, at the end", rows["at the end"]["rounded"]),
        ("never: as trained, in float32", rows["at the end"]["as trained"]),
    ]
    lines = [
        f"{record['settings']['iterations']} iterations, accuracy in % of {record['n']} networks on "
        f"{record['settings']['held_out']:,} held-out training images:",
        "",
        "| rounded | accuracy |",
        "|---|---:|",
        *(f"| {when} | {_percent(entry)} |" for when, entry in cells),
    ]
    return "\n".join(lines) + f"\n\n{_commands([record])}"


def _coded(name: str) -> str:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    lines = [
        f"PSNR of {record['n']} images after {record['results'][0]['steps']} steps:",
        "",
        "| Gaussians per image | bits of a coordinate | bits per Gaussian | bytes per image | dB |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in record["results"]:
        bits, kind = 8 * row["bytes"] / row["points"], "" if row["bits_gaussian"] else ", fixed width"
        lines.append(
            f"| {row['points']} | {row['bits_mean']} | {bits:.1f}{kind} | {row['bytes']:.1f} | {row['psnr']:.2f} |"
        )
    return "\n".join([*lines, "", f"`{record['command']}`, commit {record['commit'][:9]}."]) + "\n"


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
    for name in ("position", "shape", "color"):
        # The record spells it as its time did.
        psnr = [row["psnr"] for row in rows if row["method"].replace("colour", "color") == f"only {name} rounded"]
        lines.append(f"| {name} | " + " | ".join(f"{exact - one:.2f}" for one in psnr) + " |")
    return "\n".join(lines) + "\n"


# GSDD, Table 5: dB, MB and seconds for 100 images of each class of ImageNette at 128 px, 963 floats each, 1,000 steps
# on a GPU.
PUBLISHED_FIT = {
    "frequency": (15.69, 280, 15.5),
    "sparse_epitome": (17.77, 299, 69.4),
    "neural_field": (23.23, 1079, 1088.4),
    "gaussian": (23.22, 150, 24.5),
}
# Codecs that store integer codes alone, whatever the precision of the others is.
CODED = ("packed_gaussian", "packed_frequency")


def _compare_fit(name: str) -> str:
    record = json.loads((RESULTS / "compare" / f"{name}.json").read_text())
    size = record["settings"]["size"]

    def order(row: dict[str, Any]) -> tuple[bool, float]:
        last = [list(run["psnr"].values())[-1] for run in row.get("runs", [])]
        return row["precision"] != "float32", -float(np.mean(last)) if last else np.inf

    rows = sorted(record["results"], key=order)
    counts = [row["images"] for row in rows]
    most = max(set(counts), key=counts.count)
    lines = [
        f"Mean PSNR in dB of {most} training images of {record['settings']['data']} "
        f"({'x'.join(map(str, size))}) as stored, after so many steps; mean and standard deviation of {record['n']} "
        "seeds, without the latter where no seed matters. Shared parts are counted with these images. The paper's: "
        "dB, MB and seconds, for 1,000 images of Imagenette on a GPU.",
        "",
        "| codec | precision | bytes per image | start | 100 | 300 | 1000 | seconds | temporary, MiB | paper |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        name = row["codec"] + (f", {row['images']} images" if row["images"] != most else "")
        name += f", {row['start']} start" if "start" in row else ""
        # The budget of bfloat16 may also be spent on bytes.
        precision = "codes" if row["codec"] in CODED else row.get("spec", {}).get("dtype", row["precision"])
        what = f"| {name} | {precision} "
        if "refused" in row:
            lines.append(f"{what}| does not fit | | | | | | | |")
            continue
        cells = []
        for step in ("0", "100", "300", "1000"):
            values = [run["psnr"][step] for run in row["runs"] if step in run["psnr"]]
            spread = f" ± {np.std(values, ddof=1):.2f}" if len(set(values)) > 1 else ""
            cells.append(f"{np.mean(values):.2f}{spread}" if values else "")
        seconds = np.median([run["start_seconds"] + run.get("seconds", 0.0) for run in row["runs"]])
        held = row["runs"][0].get("temporary_bytes")
        published = row["precision"] == "float32" and "start" not in row and row["images"] == most and size[0] == 128
        paper = "; ".join(map(str, PUBLISHED_FIT.get(row["codec"], ()))) if published else ""
        lines.append(
            f"{what}| {row['bytes_per_image']:,.0f} | {' | '.join(cells)} | {seconds:.1f} "
            f"| {'' if held is None else f'{held / 2**20:.0f}'} | {paper} |"
        )
    return "\n".join(lines) + f"\n\n{_commands(rows)}"


def _frequency_gradient(name: str) -> str:
    record = json.loads((RESULTS / "compare" / f"{name}.json").read_text())
    settings = record["settings"]
    ends = (1, 10, 100, 1000)
    lines = [
        f"PSNR in dB of {record['n']:,} training images of {settings['data']} "
        f"({'x'.join(map(str, settings['size']))}), {settings['coefficients']} coefficients of each channel after "
        f"{settings['steps']:,} steps at the best rate of a grid of factors of ten that ends at so much:",
        "",
        f"| images | basis | optimizer | {' | '.join(f'{end:,}' for end in ends)} | of all | closed form |",
        "|---|---|---|" + "---:|" * (len(ends) + 2),
    ]
    for row in record["results"]:
        found = {float(rate): psnr for rate, psnr in row["psnr"].items() if psnr is not None}
        best = max(found, key=lambda rate: found[rate])
        cells = [f"{max(psnr for rate, psnr in found.items() if rate <= end):.2f}" for end in ends]
        lines.append(
            f"| {'normalized' if row['normalized'] else 'in [0, 1]'} | {row['basis']} | {row['optimizer']} "
            f"| {' | '.join(cells)} | {found[best]:.2f} at {best:g} | {row['closed_form']:.2f} |"
        )
    return "\n".join(lines) + f"\n\n{_commands([record])}"


# GSDD, Table 13: CIFAR-10 at 12,288 bytes per class, trajectory matching (IDC and RTP: their own objectives, NSD: with
# a term of its own). GSDD's own stands for bfloat16, all others for float32.
PUBLISHED_ACCURACY = {
    "downscale, float32": "50.0 ± 0.4",
    "frequency, float32": "60.6 ± 0.8",
    "factor, float32": "48.3 ± 0.8",
    "memory, float32": "66.4 ± 0.4",
    "sparse_epitome, float32": "63.2 ± 0.1",
    "spectral, float32": "68.5 ± 0.8",
    "neural_field, float32": "66.5 ± 0.4",
    "pixel, float32": "46.3 ± 0.8",
    "gaussian, bfloat16": "67.6 ± 0.4",
}


def _compare_accuracy(name: str) -> str:
    rows = json.loads((RESULTS / "compare" / f"{name}.json").read_text())["results"]
    _refuse_unlike([row["result"] for row in rows])
    first = rows[0]["result"]
    lines = [
        f"{first['dataset']}, {first['bytes_per_class']:,} bytes per class, {first['objective']} matching, test "
        f"accuracy in % of {first['accuracy']['n']} networks. Published: GSDD's Table 13, trajectory matching at the "
        "same bytes, or the codec's own objective.",
        "",
        "| codec | images per class | written | PSNR of the fit | rate chosen | distilled | published |",
        "|---|---:|---:|---:|---|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: row["result"]["accuracy"]["mean"]):
        result, entry = row["result"], row["result"]["accuracy"]
        psnr = "" if result["fit_psnr"] is None else f"{result['fit_psnr']:.1f}"
        rates = " ".join(rate.removeprefix("codec.") for rate in row["chosen"])
        lines.append(
            f"| {row['name']} | {entry['images_per_class']} | {entry['bytes_per_class']:,} | {psnr} | {rates} "
            f"| {_percent(entry)} | {PUBLISHED_ACCURACY.get(row['name'], '')} |"
        )
    return "\n".join(lines) + f"\n\n{_commands(rows)}"


def _rivals(_: str) -> str:
    """The best precision of each codec in the comparison of accuracies."""
    rows = json.loads((RESULTS / "compare" / "accuracy_cifar10.json").read_text())["results"]
    _refuse_unlike([row["result"] for row in rows])
    best: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: -row["result"]["accuracy"]["mean"]):
        best.setdefault(row["result"]["codec"], row)
    lines = ["| codec | images per class | accuracy, % |", "|---|---:|---:|"]
    for row in best.values():
        entry = row["result"]["accuracy"]
        lines.append(f"| {row['name']} | {entry['images_per_class']} | {_percent(entry)} |")
    return "\n".join(lines) + "\n"


def _ddif_decode(name: str) -> str:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    words = {
        "op_by_op": "loop over images, operation by operation",
        "jitted_loop": "loop over images, one compiled program",
        "batched": "all images at once",
        "remat": "all at once, layers not kept",
    }
    lines = ["| decode | ms | all at once is faster by |", "|---|---:|---:|"]
    for way, what in words.items():
        found = record["results"][way]
        lines.append(f"| {what} | {found['min_ms']:.0f} | {found['batched_is_faster_by']:.2f} |")
    return "\n".join(lines) + f"\n\n{_commands([record])}"


def _commands(rows: list[dict[str, Any]]) -> str:
    """Names the commands that made the rows of a file, and their commits."""
    commands = "; ".join(dict.fromkeys(f"`{row['command']}`" for row in rows))
    commits = ", ".join(dict.fromkeys(str(row["commit"])[:9] for row in rows))
    return f"{commands}; commit {commits}.\n"


# D3 beside Gaussians and pixels, with hard and with soft labels; the pixels stand in the runs of the Gaussians.
WHOLE = ("cifar10_d3_hard", "cifar10_d3_soft", "cifar10_gaussian_hard", "cifar10_gaussian_soft")
DIVIDED = {
    "cifar10_d3_hard": {2: "cifar10_d3_of2"},
    "cifar10_gaussian_hard": {2: "cifar10_gaussian_of2"},
}


def _d3(_: str) -> str:
    runs = [json.loads((RESULTS / name / "result.json").read_text()) for name in WHOLE]
    _refuse_unlike(runs)
    lines = [
        f"{runs[0]['dataset']}, {runs[0]['bytes_per_class']:,} bytes per class with the labels, {runs[0]['objective']} "
        f"matching and MMD, test accuracy in % of {runs[0]['accuracy']['n']} networks of "
        f"{runs[0]['accuracy']['steps']:,} steps:",
        "",
        "| codec | labels | images per class | bytes per class | of these, labels | fitted only | distilled "
        "| TFLOP each |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        for codec, entry, fitted in (
            (run["codec"], run["accuracy"], run["fit_only"]),
            ("pixel", run["pixel"], None),
        ):
            if entry is not None:
                lines.append(
                    f"| {codec} | {_kind(run['protocol']['labels'])} | {entry['images_per_class']} "
                    f"| {entry['bytes_per_class']:,} | {entry['label_bytes_per_class']:,} | {_percent(fitted)} "
                    f"| {_percent(entry)} | {entry['training_flops'] / 1e12:.3g} |"
                )
    return "\n".join(lines) + f"\n\n{_folded(runs)}"


def _labels(name: str) -> str:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    settings = record["settings"]
    lines = [
        f"{record['n']} images of {settings['set']}, labels of {settings['teachers']} experts at temperature "
        f"{settings['temperature']:g}; their most probable class has {settings['largest']:.2f} on average, and is the "
        f"image's own in {100 * settings['agreement']:.0f} % of cases:",
        "",
        "| stored | bytes of a label | total variation | divergence of what is read |",
        "|---|---:|---:|---:|",
    ]
    for row in record["results"]:
        lines.append(f"| {row['stored']} | {row['bytes']} | {row['total_variation']:.4f} | {row['divergence']:.4f} |")
    return "\n".join(lines) + f"\n\n{_commands([record])}"


def _label_accuracy(name: str) -> str:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    rows = record["results"]
    images = {row["source"]: row["images"] for row in rows}
    lines = [
        f"Test accuracy in %, networks of {record['settings']['steps']:,} steps, n = {record['n']}:",
        "",
        f"| labels | bytes of one | {' | '.join(f'{source}, {n} per class' for source, n in images.items())} |",
        f"|---|---:{'|---:' * len(images)}|",
    ]
    for told in dict.fromkeys((row["bytes"], _told(row)) for row in rows):
        own = [row for row in rows if (row["bytes"], _told(row)) == told]
        lines.append(f"| {told[1]} | {told[0]} | {' | '.join(uses.spread(row['accuracies']) for row in own)} |")
    return "\n".join(lines) + f"\n\n{_commands([record])}"


def _told(row: dict[str, Any]) -> str:
    if row["kind"] == "hard":
        return "hard"
    text = f"{row['dtype']}, temperature {row['temperature']:g}"
    text += f", {row['top_k']} largest" * (row["top_k"] > 0)
    return text + ", one-hot where the teachers are wrong" * (row["hard_weight"] > 0)


def _cross(name: str) -> str:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    lines = ["| network | accuracy, % | networks | steps of each |", "|---|---:|---:|---:|"]
    for network, row in record["networks"].items():
        made = " (made the set)" * (network == record["made_with"])
        lines.append(f"| {network}{made} | {uses.spread(row['accuracies'])} | {row['n']} | {row['steps']:,} |")
    environment = record["environment"]
    return "\n".join(lines) + f"\n\n`{environment['command']}`, commit {environment['commit'][:9]}.\n"


def _kind(spec: dict[str, Any]) -> str:
    return "hard" if spec["kind"] == "hard" else f"{spec['dtype']}, {spec['top_k'] or 'all'} largest"


def _divided(_: str) -> str:
    lines = [
        "| codec | subtasks | images per class | bytes per class | distilled | seconds, one after the other "
        "| seconds, side by side |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    every = []
    for name, parts in DIVIDED.items():
        whole = json.loads((RESULTS / name / "result.json").read_text())
        metrics = map(json.loads, (RESULTS / name / "metrics.jsonl").read_text().splitlines())
        last = {entry["phase"]: entry["total_seconds"] for entry in metrics}
        seconds = last["main-fit"] + last["main-distill"]
        runs = [(1, whole, seconds, seconds)]
        for count, divided in parts.items():
            run = json.loads((RESULTS / divided / "result.json").read_text())
            runs.append((count, run, run["subtask_seconds"]["sum"], run["subtask_seconds"]["longest"]))
        for count, run, total, longest in runs:
            entry = run["accuracy"]
            lines.append(
                f"| {run['codec']} | {count if count > 1 else 'undivided'} | {entry['images_per_class']} "
                f"| {entry['bytes_per_class']:,} | {_percent(entry)} | {total:.0f} | {longest:.0f} |"
            )
        every += [run for _, run, _, _ in runs]
    return "\n".join(lines) + f"\n\n{_folded(every)}"


def _folded(runs: list[dict[str, Any]]) -> str:
    return f"<details markdown><summary>Commands</summary>\n\n{_sources(runs)}\n</details>\n"


def _scale(name: str) -> str:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    results = record["results"]
    lines = [
        "| objective | devices | gradient differs by | metrics by | summed, bytes | formula | arguments, bytes "
        "| formula | temporaries, bytes |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results["steps"]:
        differences = [row[f"{what}_difference"] for what in ("gradient", "metrics")]
        # 0 for one device, which is compared with itself.
        differ = " | ".join(f"{x:.0e}" if x else "0" for x in differences)
        counts = (sum(row["collectives"].values()), row["summed_formula"], row["arguments"], row["arguments_formula"])
        shown = " | ".join(f"{count:,}" for count in (*counts, row["temporaries"]))
        lines.append(f"| {row['objective']} | {row['devices']} | {differ} | {shown} |")
    constants = results["memory"]["constants"]
    lines += [
        "",
        f"Temporaries of distribution matching, σ = {constants['images']:.2f} and α = {constants['maps']:.2f} from the "
        "first two rows:",
        "",
        "| devices | classes | pixels | network | real, synthetic images per class | class_chunk | compiler, MB "
        "| formula, MB | ratio |",
        "|---:|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in results["memory"]["rows"]:
        megabytes = [row[kind] / 1e6 for kind in ("temporaries", "formula")]
        lines.append(
            f"| {row['devices']} | {row['classes']:,} | {row['pixels']} | {row['depth']} x {row['width']} "
            f"| {row['real']}, {row['gpc']} | {row['class_chunk']} | {megabytes[0]:,.1f} | {megabytes[1]:,.1f} "
            f"| {megabytes[1] / megabytes[0]:.2f} |"
        )
    return "\n".join(lines) + f"\n\n{_commands([record])}"


def _scale_plan(name: str) -> str:
    results = json.loads((RESULTS / f"{name.removesuffix('_plan')}.json").read_text())["results"]
    lines = [
        "| pixels, ipc | images x Gaussians per class | devices | classes each | data, GB | state, GB | gradient, GB "
        "| temporary, GB | total, GB | summed, GB | sum, ms | networks, PFLOP | networks, ms | 20,000 steps, h "
        "| state of a subtask, GB |",
        "|---|---:" + "|---:" * 13 + "|",
    ]
    for row in results["plan"]:
        kinds = ("data", "state", "gradient", "temporary", "total", "summed")
        gigabytes = " | ".join(f"{row[f'{kind}_bytes'] / 1e9:.2f}" for kind in kinds)
        lines.append(
            f"| {row['pixels']}, {row['ipc']} | {row['gpc']} x {row['points']} | {row['devices']} | {row['classes']} "
            f"| {gigabytes} | {1e3 * row['sum_seconds']:.1f} | {row['flops'] / 1e15:.3f} "
            f"| {1e3 * row['network_seconds']:.0f} | {row['hours']:.1f} | {row['subtask_state_bytes'] / 1e9:.3f} |"
        )
    counted = "; ".join(
        f"{pixels} px {found['forward'] / 1e9:.3f} forward, {found['gradient'] / 1e9:.3f} with the gradient"
        for pixels, found in results["flops"].items()
    )
    return "\n".join(lines) + f"\n\nGFLOP of an image by XLA's count: {counted}.\n"


def _gpu(device: str) -> str:
    """What `benchmarks.gpu` measured on a device: the stages that have ended there."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / device).glob("*.json"))}
    found = {name: record["results"] for name, record in records.items()}
    lines = []
    if checks := found.get("correctness"):
        passed = [row.get("passed", False) for row in checks["cases"]]
        bits = [value for group in checks["bits"].values() for value in group.values()]
        lines += [
            f"Values and gradients: {sum(passed)} of {len(passed)} scenes within tolerance of float64; bits: "
            f"{sum(bits)} of {len(bits)} checks passed.",
        ]
    if fits := found.get("table16"):
        lines += [
            "",
            "| Gaussians | 1,000 images fitted, s | PSNR, dB | memory, GiB | the authors': RTX 5090, A100, s |",
            "|---:|---:|---:|---:|---:|",
            *(
                f"| {row['points']} | {min(row['seconds']):.2f} | {row['psnr']:.2f} "
                f"| {row['memory']['total'] / 2**30:.2f} "
                f"| {', '.join(map(str, row['paper_seconds_rtx5090_a100'] or ()))} |"
                for row in fits["rows"]
                if "psnr" in row
            ),
            "",
            "| images, Gaussians, pixels | through | type | forward, ms | with backward, ms | floor, ms |",
            "|---|---|---|---:|---:|---:|",
            *(
                f"| {', '.join(map(str, row['shape']))} | {row['backend']} | {row['dtype']} "
                f"| {row['forward']['median_ms']:.3f} | {row['forward+backward']['median_ms']:.3f} "
                f"| {max(row['floors_ms'].values()):.3f} |"
                for row in fits.get("headline", {}).get("rows", [])
                if "forward" in row
            ),
        ]
    if figure := found.get("figure5"):
        lines += [
            "",
            "| floats per image | images | pixels | faster than SIREN: forward | with backward |",
            "|---:|---:|---:|---:|---:|",
            *(
                f"| {row['floats']} | {row['batch']} | {row['pixels']} | {row['forward']:.1f} "
                f"| {row['forward+backward']:.1f} |"
                for row in figure["speedups"]
                if row["floats"] == figure["speedups"][0]["floats"] and {"forward", "forward+backward"} <= row.keys()
            ),
        ]
    if distilled := found.get("distill"):
        lines += [
            "",
            "| iterations | s, fit and compilation included | ms per iteration | accuracy, % |",
            "|---:|---:|---:|---:|",
            *(
                f"| {row['iterations']:,} | {row['seconds']:.1f} | {row['ms_per_iteration']:.1f} "
                f"| {_percent(row['accuracy'])} |"
                for row in distilled["rows"]
            ),
        ]
    # The commands of the stages name folders of that machine.
    commits = ", ".join(dict.fromkeys(str(record["commit"])[:9] for record in records.values()))
    return "\n".join(lines) + f"\n\n`python -m benchmarks.gpu`, commit {commits}.\n"


_released = functools.partial(_run, folder=SETS)
TABLES: dict[str, Callable[[str], str]] = {
    "digits": _released,
    "cifar10_coded_12k": _released,
    "cifar10_coded_experts_ipc10_w64": _run,
    "sets": cards.table,
    "accuracy_cifar10": _compare_accuracy,
    "fit_cifar10_jpeg": _compare_fit,
    "fit_imagenette128": _compare_fit,
    "digits_federated": _federated,
    "d3": _d3,
    "ddif_decode": _ddif_decode,
    "divided": _divided,
    "cifar10_packed_dm_ipc1_w64": _run,
    "cifar10_packed_dm_experts_ipc1_w64_1400": _run,
    "cifar10_packed_dm_experts_ipc1_w32": _run,
    "cifar10_dm_experts_ipc1_w32": _run,
    "cifar10_frepo_1024": _run,
    "fit_psnr": _fit,
    "peers": _peers,
    "splat": _splat,
    "kernel_model": _kernel_model,
    "labels": _labels,
    "matching": _objectives,
    "codecs": _codecs,
    "decode": _decode,
    "budget_12288": _frontier,
    "frequency_gradient": _frequency_gradient,
    "images_12288": _frontier,
    "images_12288_experts": _images,
    "moving_digits": _run,
    "moving_digits_codecs": _codecs_of,
    "solid_digits": _run,
    "video": _video,
    "objectives": _steps,
    "packed": _pairs,
    "packed_coded": _coded,
    "packed_later": _later,
    "packed_psnr": _packed,
    "rivals": _rivals,
    **{f"study_{name}": _study for name in ("prune", "convergence", "difficulty", "landscape")},
    "scale": _scale,
    "scale_plan": _scale_plan,
    "sensitivity": _sensitivity,
    "trajectory": _trajectory,
    "cross_cifar10_coded_12k": _cross,
    "label_accuracy": _label_accuracy,
    "audit_digits": _use,
    "audit_private": _use,
    "federated_digits": _use,
    "replay_cifar10": _use,
    "replay_digits": _use,
    "search_cifar10": _use,
    "search_digits": _use,
    **{device: _gpu for device in ("h100", "h200") if (RESULTS / device).is_dir()},
}


def render(text: str) -> str:
    """Returns the text with every block made anew."""

    def block(match: re.Match[str]) -> str:
        return match[1] + TABLES[match[2]](match[2]) + match[3]

    return BLOCK.sub(block, text)


def stale() -> dict[Path, str]:
    """Returns what documents should say that say something else."""
    made = {document: render(document.read_text(encoding="utf-8")) for document in DOCUMENTS}
    made |= {folder / cards.CARD: cards.card(folder) for folder in cards.folders()}
    return {path: text for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text}


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="fail if a document is out of date")
    parser.add_argument("--release", nargs=2, metavar=("RUN", "NAME"), help="make a released set of a run directory")
    args = parser.parse_args()
    if args.release:
        cards.release(Path(args.release[0]), args.release[1])
    found = stale()
    if args.check and found:
        what = " and ".join(str(path.relative_to(ROOT)) for path in found)
        print(f"{what}: not what its results say: run python -m benchmarks.tables", file=sys.stderr)
        return 1
    for path, text in found.items():
        files.write_bytes(path, text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(exit_cleanly()(main)())
