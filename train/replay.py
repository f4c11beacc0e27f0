"""Continual learning from a memory of a few bytes: ``python -m train.replay --config FILE [key=value ...]``.

Every memory of the config is tried in every order of the classes, at every budget: see `gsdd_jax.uses.replay`. The same
command continues what was killed. Into the folder of the experiment go the memories, ``result.json``, ``table.md`` and
a plot over the tasks.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from annotated_types import Ge, Gt, MinLen
from typing_extensions import Doc

from gsdd_jax import data, exchange, files
from gsdd_jax.nets import NetSpec
from gsdd_jax.uses import replay
from gsdd_jax.uses.summary import SummarySpec
from train import uses
from train.errors import exit_cleanly

Rows = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayConfig(uses.UseConfig):
    """A stream of classes, and what is tried as its memory; each seed is an order of the classes."""

    network: NetSpec = NetSpec()
    tasks: Annotated[int, Ge(1), Doc("that the classes are cut into, equally many in each")]
    budgets: Annotated[tuple[Annotated[int, Gt(0)], ...], MinLen(1), Doc("bytes of the memory's file in the end")]
    memories: Annotated[tuple[SummarySpec, ...], MinLen(1)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    with exit_cleanly():
        config, out, say = uses.start("replay", __doc__, ReplayConfig, argv)
        dataset = data.load(config.data)
        rows = []
        for budget in config.budgets:
            for number, memory in enumerate(config.memories):
                for seed in config.seeds:
                    done = _stream(config, dataset, out / f"{budget}-{number}-{seed}", budget, memory, seed)
                    rows.append({"budget": budget, "memory": memory.title, "seed": seed, **done})
                    say(
                        f"{budget} bytes, {memory.title}, order {seed}: "
                        f"{100 * float(replay.average(np.array(done['fresh']))[-1]):.1f} %"
                    )
        title = f"{dataset.name}, {config.tasks} tasks, {len(config.seeds)} orders of the classes"
        panels = {
            f"{budget:,} bytes, {learner} network": {
                memory.title: 100 * np.mean([replay.average(_matrix(row, learner)) for row in own], 0)
                for memory in config.memories
                if (own := [row for row in rows if (row["memory"], row["budget"]) == (memory.title, budget)])
            }
            for budget in config.budgets
            for learner in replay.LEARNERS
        }
        uses.plot(out / uses.PLOT, panels, "tasks seen", "accuracy on the classes so far, %")
        uses.finish(out, config, table(title, rows), title=title, rows=rows)
    return 0


def _stream(
    config: ReplayConfig, dataset: data.Dataset, path: Path, budget: int, memory: SummarySpec, seed: int
) -> dict[str, Any]:
    """Learns a stream, on from where its files end."""
    state, start = path.with_suffix(".safetensors"), None
    if state.exists():
        held = exchange.read(state.read_bytes()).values({}, "")
        start = replay.Progress(**held | {"sizes": tuple(held["sizes"].tolist())})  # type: ignore[arg-type]
    steps = replay.stream(
        jax.random.key(seed),
        dataset,
        replay.split(replay.class_order(seed, dataset.num_classes), config.tasks),
        path.with_suffix(".zip"),
        spec=memory,
        budget=memory.budget or budget,
        learner=config.learner(config.network, dataset.image_shape[-1]),
        start=start,
    )
    for start in steps:
        files.write_bytes(state, exchange.serialize(start._asdict() | {"sizes": np.array(start.sizes, np.int64)}))
    assert start is not None
    return {**{name: getattr(start, name).tolist() for name in replay.LEARNERS}, "sizes": list(start.sizes)}


def _matrix(row: Mapping[str, Any], learner: str) -> np.ndarray:
    return np.array(row[learner], np.float64)


def table(title: str, rows: Rows) -> str:
    """Writes the rows of results as a Markdown table: means over the orders and their standard deviations."""
    lines = [
        f"{title}. Accuracy in %: after the last task, of a fresh network and of one that goes on; its mean over all "
        "tasks; and how far earlier tasks have fallen from their best.",
        "",
        "| memory | bytes of its file | fresh, at the end | mean over tasks | forgetting | continued, at the end "
        "| forgetting |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for budget, memory in dict.fromkeys((row["budget"], row["memory"]) for row in rows):
        own = [row for row in rows if (row["budget"], row["memory"]) == (budget, memory)]
        cells = [f"{max(row['sizes'][-1] for row in own):,}"]
        for learner in replay.LEARNERS:
            found = [_matrix(row, learner) for row in own]
            means = [replay.average(matrix) for matrix in found]
            cells.append(uses.spread([mean[-1] for mean in means]))
            cells += [uses.spread([mean.mean() for mean in means])] if learner == "fresh" else []
            cells.append(uses.spread([replay.forgetting(matrix) for matrix in found]))
        lines.append(f"| {memory} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
