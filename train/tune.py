"""Choose settings without the test set: ``python -m train.tune --config FILE --vary KEY=V1,V2 ... [key=value ...]``.

Every combination of the varied settings is distilled and tested on held-out training images: the last tenth of each
class, which neither the fit nor the objective sees. Combinations with the same fit share it: the same program on the
same images. With ``--keep N`` all are fitted and tested without distillation first, and the best N distilled. So a
budget of bytes is spent well, since fewer bits or fewer Gaussians leave room for more images::

    python -m train.tune --config FILE --keep 2 --vary codec.num_points=12,22,42 codec.bits_color=6,8

with ``codec.images_per_class=0``, as many images as the budget holds.

Every combination is a run directory under ``--out``; the same command continues an interrupted search.
"""

from __future__ import annotations

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
from train.progress import Progress
from train.rundir import environment, read_metrics, write_json
from train.stopping import on_sigterm

# The loss of a combination is the mean of so much of its end, since single batches are noisy.
END = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = configs.parser("tune", __doc__, out="runs/NAME-tune")
    example = "such as codec.lr=0.003,0.01 fit.steps=300,1000"
    parser.add_argument("--vary", nargs="+", required=True, metavar="KEY=V1,V2", help=example)
    parser.add_argument("--keep", type=int, metavar="N", help="distill the best N by their fit alone (default: all)")
    args = parser.parse_intermixed_args(argv)
    with exit_cleanly(debug=args.debug), on_sigterm():
        compilation_cache.enable()
        if args.keep is not None and args.keep < 0:
            raise ConfigError(f"--keep: expected 0 or more, found {args.keep}")
        chosen = [list(one) for one in itertools.product(*map(configs.choices, args.vary))]
        found: list[configs.RunConfig] = [
            configs.load(args.config, [*args.overrides, *one], smoke=args.smoke) for one in chosen
        ]
        whole = data.load(found[0].data)
        if len({(one.data, one.subtasks, one.subtask) for one in found}) > 1:
            raise ConfigError(
                "--vary: expected settings other than those of data and subtasks, which all combinations share"
            )
        tried = [(one, experiments.known_data(config, whole)) for one, config in zip(chosen, found, strict=True)]
        out = Path(args.out) if args.out else Path("runs") / f"{found[0].name}-tune"
        held, progress = experiments.hold_out(whole), Progress(quiet=args.quiet)
        result = search(tried, held, out=out, progress=progress, keep=args.keep)
        print((out / "tune.md").read_text())
        print("best: " + " ".join(result["best"]))
    return 0


def search(
    found: Sequence[tuple[list[str], configs.RunConfig]],
    dataset: data.Dataset,
    *,
    out: Path,
    progress: Progress,
    keep: int | None = None,
) -> dict[str, Any]:
    """Distills and tests every combination, or the best fits of them, and writes tune.json and tune.md into ``out``.

    A combination that diverges is a row without accuracy, and with the reason.

    Raises:
        DivergedError: All of them do.
    """
    names = [",".join(overrides).replace("/", "_") for overrides, _ in found]
    absent = dict.fromkeys(("accuracy", "psnr", "loss", "seconds"))
    rows: list[dict[str, Any]] = [{"overrides": overrides, **absent} for overrides, _ in found]
    made: list[Path] = []
    # Without the baselines, and before the first of them runs, so that what cannot run is refused at once.
    alone = [dataclasses.replace(config, baselines=config.baselines.off()) for _, config in found]
    prepared = [experiments.prepare(config, dataset) for config in alone]

    def trial(i: int, experiment: experiments.Experiment, path: Path, kind: str) -> None:
        try:
            result = distill.run(experiment, path, progress, fitted=made)
            rows[i] |= {kind: result["accuracy"], "psnr": result["fit_psnr"], "seconds": result["seconds"]}
            made.append(path)
        except DivergedError as error:
            progress.say(f"{' '.join(rows[i]['overrides'])}: {error}")
            rows[i]["diverged"] = str(error)

    order, kind = list(range(len(found))), "accuracy"
    if keep is not None:
        for i, config in enumerate(alone):
            fit_only = dataclasses.replace(config, distill=dataclasses.replace(config.distill, iterations=0))
            trial(i, experiments.prepare(fit_only, dataset), out / "fit" / names[i], "fit_only")
        order = sorted((i for i in order if "fit_only" in rows[i]), key=lambda i: -rows[i]["fit_only"]["mean"])[:keep]
        kind = kind if order else "fit_only"
    for i in order:
        trial(i, prepared[i], out / names[i], "accuracy")
        if rows[i]["accuracy"]:
            losses = [entry["loss"] for entry in read_metrics(out / names[i]) if entry["phase"] == "main-distill"]
            last = losses[-max(1, round(END * len(losses))) :]
            rows[i]["loss"] = float(np.mean(last)) if last else None
    tested = [row for row in rows if row.get(kind)]
    if not tested:
        raise DivergedError(f"every combination diverged, the first by this: {rows[0]['diverged']}")
    config, own = found[0][1], experiments.own_classes(found[0][1], dataset)
    result = {
        "name": config.name,
        "codec": config.codec.name,
        "dataset": dataset.name,
        "objective": config.objective.name,
        "bytes_per_class": storage.budget_bytes(config.ipc, dataset.image_shape),
        **prepared[0].test_set,
        "held_out": len(own.test_labels),
        "rows": rows,
        "best": max(tested, key=lambda row: row[kind]["mean"])["overrides"],
        "environment": environment(),
    }
    write_json(out / "tune.json", result)
    files.write_bytes(out / "tune.md", table(result).encode())
    return result


def table(result: dict[str, Any]) -> str:
    """Writes a search as a Markdown table, with a column of fits where they were tested."""
    fits = any("fit_only" in row for row in result["rows"])
    lines = [
        f"{result['dataset']}, {result['bytes_per_class']:,} bytes per class, {result['objective']} matching, accuracy "
        f"in % on {result['held_out']:,} held-out training images",
        "",
        f"| settings | images per class |{' PSNR, dB | fitted only |' if fits else ''} loss at the end | distilled |",
        f"|---|---:|{'---:|---:|' if fits else ''}---:|---:|",
    ]
    for row in result["rows"]:
        fit, entry = row.get("fit_only"), row["accuracy"]
        cells = [str((entry or fit or {}).get("images_per_class", ""))]
        if fits:
            cells += ["" if row["psnr"] is None else f"{row['psnr']:.2f}", testset.percent(fit) if fit else ""]
        cells += ["" if row["loss"] is None else f"{row['loss']:.4g}"]
        cells += [testset.percent(entry) if entry else "diverged" if "diverged" in row else ""]
        lines.append(f"| `{' '.join(row['overrides'])}` |" + "".join(f" {cell} |" if cell else " |" for cell in cells))
    return "\n".join(lines) + "\n" + testset.below(result)


if __name__ == "__main__":
    sys.exit(main())
