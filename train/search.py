"""Architecture search on a few bytes: ``python -m train.search --config FILE [key=value ...]``.

Every architecture of the grid is trained on all data, twice, and on every proxy of the config: see
`gsdd_jax.uses.search`. The same command continues what was killed. Into the folder of the experiment go
``result.json``, ``table.md`` and a plot of each ranking against that of all data.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from annotated_types import Ge, Gt, MinLen
from typing_extensions import Doc

from gsdd_jax import data, files, pixels
from gsdd_jax.nets import NetSpec
from gsdd_jax.uses import archive, learning, search
from gsdd_jax.uses.search import GridSpec
from gsdd_jax.uses.summary import SummarySpec, summarize
from train import uses
from train.errors import exit_cleanly
from train.pictures import drawable
from train.rundir import write_json

TRAINED = "trained.json"
ALL, AGAIN, EARLY = "all data", "all data, once more", "all data, stopped early"
Rows = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig(uses.UseConfig):
    """Architectures, and what they are ranked by; each seed is a repetition of all but the architectures."""

    grid: GridSpec = GridSpec()
    network: Annotated[NetSpec, Doc("what proxies are distilled with")] = NetSpec()
    budget: Annotated[int, Gt(0), Doc("bytes of a proxy's file")]
    proxies: Annotated[tuple[SummarySpec, ...], MinLen(1)]
    proxy_steps: Annotated[int, Ge(1), Doc("of training on a proxy, and of all data where they are stopped early")]
    top: Annotated[int, Ge(3), Doc("architectures, the best by all data, that are ranked on their own as well")] = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    with exit_cleanly():
        config, out, say = uses.start("search", __doc__, SearchConfig, argv)
        dataset = data.load(config.data)
        networks = config.grid.networks()
        search.agreement(range(len(networks)), range(len(networks)), config.top)  # refuses what cannot be ranked
        rows = [row for seed in config.seeds for row in _seed(config, dataset, networks, out, seed, say)]
        title = (
            f"{dataset.name}, {len(networks)} ConvNets, {config.budget:,} bytes in all, {len(config.seeds)} repetitions"
        )
        _plot(out / uses.PLOT, rows)
        uses.finish(out, config, table(title, rows), title=title, rows=rows)
    return 0


def _seed(
    config: SearchConfig,
    dataset: data.Dataset,
    networks: Sequence[NetSpec],
    out: Path,
    seed: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Trains all architectures on everything, on from where the file of results ends."""
    path = out / str(seed) / TRAINED
    path.parent.mkdir(exist_ok=True)
    done: dict[str, list[search.Trained]] = {}
    if path.exists():
        done = {name: [search.Trained(*one) for one in own] for name, own in json.loads(path.read_text()).items()}
    learner, key = config.learner(config.network, dataset.image_shape[-1]), jax.random.key(seed)
    whole = dataset.train_images, dataset.train_labels
    sources: dict[str, tuple[Any, int]] = {
        ALL: (whole, config.training.steps),
        AGAIN: (whole, config.training.steps),
        EARLY: (whole, config.proxy_steps),
    }
    for number, proxy in enumerate(config.proxies):
        file = out / str(seed) / f"{number}.zip"
        if not file.exists():
            part = summarize(
                jax.random.fold_in(key, number),
                *whole,
                spec=proxy,
                class_names=dataset.class_names,
                budget=proxy.budget or config.budget,
                learner=learner,
            )
            archive.append(file, part)
        sources[proxy.title] = archive.labeled(archive.read(file)[0], dataset.class_names), config.proxy_steps
    sizes = {proxy.title: (out / str(seed) / f"{i}.zip").stat().st_size for i, proxy in enumerate(config.proxies)}
    for number, (title, (source, steps)) in enumerate(sources.items()):
        # Floats and as many as all data: a program for each architecture, whatever it learns from.
        images = np.asarray(pixels.as_float(source[0]))
        pool = learning.pool(images, source[1], len(whole[0]))
        key_source = jax.random.fold_in(key, 1000 + number)
        own = done.setdefault(title, [])
        for index in range(len(own), len(networks)):
            one = search.train(
                jax.random.fold_in(key_source, index),
                networks[index],
                pool,
                dataset.test_images,
                dataset.test_labels,
                learner=learner,
                steps=steps,
                clock=time.process_time,
            )
            own.append(one)
            write_json(path, done)
            say(f"seed {seed}, {title}, {index + 1} of {len(networks)}: {100 * one.accuracy:.1f} %")
    truth = [one.accuracy for one in done[ALL]]
    return [
        {
            "title": title,
            "seed": seed,
            "bytes": sizes.get(title),
            "steps": steps,
            "seconds": sum(one.seconds for one in done[title]),
            "accuracies": [one.accuracy for one in done[title]],
            "best": max(truth),
            "best_count": config.top,
            **search.agreement([one.accuracy for one in done[title]], truth, config.top)._asdict(),
        }
        for title, (_, steps) in sources.items()
    ]


def table(title: str, rows: Rows) -> str:
    """Writes the rows of results as a Markdown table: means over the seeds and their standard deviations."""
    lines = [
        f"{title}. Rank correlation (Spearman) with the accuracies of training on all data; accuracy in %, by all "
        f"data, of the architecture that is ranked first, where the best one has "
        f"{uses.spread([row['best'] for row in rows if row['title'] == ALL])}; CPU seconds of all trainings.",
        "",
        f"| ranked by | bytes | steps | Spearman | of the best {rows[0]['best_count']} | first one | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(row["title"] for row in rows):
        own = [row for row in rows if row["title"] == name]
        size = "" if own[0]["bytes"] is None else f"{max(row['bytes'] for row in own):,}"
        cells = [size, f"{own[0]['steps']:,}"]
        cells += ["", ""] if name == ALL else [_spread([row[key] for row in own]) for key in ("spearman", "top")]
        cells += [uses.spread([row["found"] for row in own]), f"{np.mean([row['seconds'] for row in own]):,.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def _plot(path: Path, rows: Rows) -> None:
    if not drawable(path.name):
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seed = rows[0]["seed"]
    shown = {row["title"]: row for row in rows if row["seed"] == seed}
    truth = 100 * np.array(shown.pop(ALL)["accuracies"])
    figure = Figure(figsize=(3.2 * len(shown), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, row) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        axis.scatter(100 * np.array(row["accuracies"]), truth, s=12)
        axis.set_title(f"{name}\nSpearman {row['spearman']:.2f}, of the best {row['top']:.2f}", fontsize="small")
        axis.set_xlabel("accuracy, %")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy by all data, %")
    with files.replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    sys.exit(main())
