"""Choose settings without the test set: ``python -m train.tune --config FILE --vary KEY=V1,V2 ... [key=value ...]``.

Every combination of the varied settings is distilled and tested on held-out training images: the last tenth of each
class, which neither the fit nor the objective sees. Combinations with the same fit share
it: the same program on the same images.

Every combination is a run directory under ``--out``; the same command continues an interrupted search.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gsdd_jax import data, files, storage
from train import compilation_cache, distill, testset
from train import config as configs
from train import experiment as experiments
from train.errors import ConfigError, DivergedError, exit_cleanly
from train.experiment import hold_out
from train.progress import Progress
from train.rundir import environment, read_metrics, write_json
from train.stopping import on_sigterm

# The loss of a combination is the mean of so much of its end, since single batches are noisy.
END = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", required=True, metavar="FILE", help="experiment")
    parser.add_argument(
        "--vary", nargs="+", required=True, metavar="KEY=V1,V2", help="such as codec.lr=0.003,0.01 fit.steps=300,1000"
    )
    parser.add_argument("--out", metavar="DIR", help="default: runs/NAME-tune")
    parser.add_argument("--smoke", action="store_true", help="shrink the experiment by the config's smoke block")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors too")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as evaluate.seeds=2")
    args = parser.parse_intermixed_args(argv)
    with exit_cleanly(debug=args.debug), on_sigterm():
        compilation_cache.enable()
        varied = [configs.choices(text) for text in args.vary]
        chosen = [list(one) for one in itertools.product(*varied)]
        found: list[configs.RunConfig] = [
            configs.load(args.config, [*args.overrides, *one], smoke=args.smoke) for one in chosen
        ]
        whole = data.load(found[0].data)
        if len({(one.data, one.subtasks, one.subtask) for one in found}) > 1:
            raise ConfigError(
                "--vary: expected settings other than those of data and subtasks, which all combinations share"
            )
        found = [experiments.known_data(one, whole) for one in found]
        out = Path(args.out) if args.out else Path("runs") / f"{found[0].name}-tune"
        result = search(
            list(zip(chosen, found, strict=True)), hold_out(whole), out=out, progress=Progress(quiet=args.quiet)
        )
        print((out / "tune.md").read_text())
        print("best: " + " ".join(result["best"]))
    return 0


def search(
    found: Sequence[tuple[list[str], configs.RunConfig]], dataset: data.Dataset, *, out: Path, progress: Progress
) -> dict[str, Any]:
    """Distills and tests every combination, and writes tune.json and tune.md into ``out``.

    A combination that diverges is a row without accuracy, and with the reason.

    Raises:
        DivergedError: All of them do.
    """
    rows: list[dict[str, Any]] = []
    # Before the first of them runs, so that what cannot run is refused at once.
    prepared = [experiments.prepare(_alone(config), dataset) for _, config in found]
    paths = [out / ",".join(overrides).replace("/", "_") for overrides, _ in found]
    for i, ((overrides, _), experiment, path) in enumerate(zip(found, prepared, paths, strict=True)):
        try:
            result = distill.run(experiment, path, progress, fitted=paths[:i])
        except DivergedError as error:
            progress.say(f"{' '.join(overrides)}: {error}")
            failed = {"accuracy": None, "psnr": None, "loss": None, "seconds": None, "diverged": str(error)}
            rows.append({"overrides": overrides, **failed})
            continue
        losses = [entry["loss"] for entry in read_metrics(path) if entry["phase"] == "main-distill"]
        last = losses[-max(1, round(END * len(losses))) :]
        rows.append(
            {
                "overrides": overrides,
                "accuracy": result["accuracy"],
                "psnr": result["fit_psnr"],
                "loss": float(np.mean(last)) if last else None,
                "seconds": result["seconds"],
            }
        )
    tested = [row for row in rows if row["accuracy"] is not None]
    if not tested:
        raise DivergedError(f"every combination diverged, the first by this: {rows[0]['diverged']}")
    config = found[0][1]
    result = {
        "name": config.name,
        "codec": config.codec.name,
        "dataset": dataset.name,
        "objective": config.objective.name,
        "bytes_per_class": storage.budget_bytes(config.ipc, dataset.image_shape),
        **prepared[0].test_set,
        "held_out": len(experiments.own_classes(config, dataset).test_labels),
        "rows": rows,
        "best": max(tested, key=lambda row: row["accuracy"]["mean"])["overrides"],
        "environment": environment(),
    }
    write_json(out / "tune.json", result)
    files.write_bytes(out / "tune.md", table(result).encode())
    return result


def _alone(config: configs.RunConfig) -> configs.RunConfig:
    """Returns a config without the baselines."""
    return dataclasses.replace(config, baselines=config.baselines.off())


def table(result: dict[str, Any]) -> str:
    """Writes a search as a Markdown table."""
    lines = [
        f"{result['dataset']}, {result['bytes_per_class']:,} bytes per class, {result['objective']} matching, accuracy "
        f"in % on {result['held_out']:,} held-out training images",
        "",
        "| settings | images per class | loss at the end | distilled |",
        "|---|---:|---:|---:|",
    ]
    for row in result["rows"]:
        entry = row["accuracy"]
        if entry is None:
            lines.append(f"| `{' '.join(row['overrides'])}` | | | diverged |")
            continue
        loss = "" if row["loss"] is None else f"{row['loss']:.4g}"
        lines.append(
            f"| `{' '.join(row['overrides'])}` | {entry['images_per_class']} | {loss} | {testset.percent(entry)} |"
        )
    return "\n".join(lines) + "\n" + testset.below(result)


if __name__ == "__main__":
    sys.exit(main())
