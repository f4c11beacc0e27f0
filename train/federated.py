"""Federated learning by sets in place of weights: ``python -m train.federated --config FILE [key=value ...]``.

The images of the training set are dealt to clients, whose messages are files; a server in another process reads them,
trains, and is tested: see `gsdd_jax.uses.federated`. What is finished is kept, and the same command goes on. Into the
folder of the experiment go the messages, ``result.json`` and ``table.md``.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from annotated_types import Ge, Gt, MinLen
from typing_extensions import Doc

from gsdd_jax import data
from gsdd_jax.nets import NetSpec
from gsdd_jax.uses.federated import AverageSpec, Federation, SetSpec, dirichlet_split, rounds
from train import compilation_cache, uses
from train.errors import exit_cleanly
from train.results import forward_flops
from train.rundir import write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class FederatedConfig(uses.UseConfig):
    """A federation, and what is tried as its messages; each seed is a split of the training images."""

    clients: Annotated[int, Ge(1), Doc("among whom the training images are dealt")]
    alphas: Annotated[tuple[Annotated[float, Gt(0)], ...], MinLen(1), Doc("of the Dirichlet distribution")]
    budget: Annotated[int, Gt(0), Doc("bytes that a client sends in all rounds, but for weights")]
    networks: Annotated[
        tuple[NetSpec, ...], MinLen(1), Doc("clients have one each, in turn; the server trains all where sets travel")
    ]
    sets: Annotated[tuple[SetSpec, ...], Doc("tried as messages")] = ()
    averages: Annotated[tuple[AverageSpec, ...], Doc("forms of FedAvg")] = ()
    missing: Annotated[tuple[int, ...], Doc("clients that send nothing")] = ()
    damaged: Annotated[tuple[int, ...], Doc("clients half of whose message arrives")] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    with exit_cleanly():
        config, out, say = uses.start("federated", __doc__, FederatedConfig, argv)
        dataset, rows = data.load(config.data), []
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn, compilation_cache.enable) as server:
            for alpha in config.alphas:
                for number, spec in enumerate((*config.sets, *config.averages)):
                    for seed in config.seeds:
                        path = out / f"{alpha:g}-{number}-{seed}"
                        if not (path / uses.RESULT).exists():
                            write_json(path / uses.RESULT, _federate(config, dataset, spec, alpha, seed, path, server))
                        rows.append(json.loads((path / uses.RESULT).read_text()))
                        say(_line(rows[-1]))
                    # All that is compiled for clients of any number of classes is more than a process can map.
                    jax.clear_caches()
                    server.submit(jax.clear_caches).result()
        title = f"{dataset.name}, {config.clients} clients, {len(config.seeds)} splits of the training images"
        uses.finish(out, config, table(title, rows), title=title, rows=rows)
    return 0


def _federate(
    config: FederatedConfig, dataset: data.Dataset, spec: Any, alpha: float, seed: int, path: Path, server: Any
) -> dict[str, Any]:
    """Lets all rounds of a federation pass, and sums up."""
    networks = (spec.network or config.networks[0],) if isinstance(spec, AverageSpec) else config.networks
    learners = tuple(config.learner(network, dataset.image_shape[-1]) for network in networks)
    federation = Federation(spec, learners, dataset.class_names, dataset.image_shape, config.budget)
    passed = list(
        rounds(
            jax.random.key(seed),
            federation,
            dataset,
            dirichlet_split(seed, dataset.train_labels, config.clients, alpha),
            path,
            missing=config.missing,
            damaged=config.damaged,
            serve=lambda *args: server.submit(federation.serve, *args).result(),
        )
    )
    flops = [forward_flops(federation.network(learner), dataset.image_shape) or np.nan for learner in learners]
    return {
        "alpha": alpha,
        "title": spec.title,
        "seed": seed,
        "accuracies": [one.served.accuracies for one in passed],
        "up": sum(one.up for one in passed),
        "down": sum(one.down for one in passed),
        # Of clients with the first network.
        "flops": flops[0] * sum(one.passes for one in passed),
        "refused": {number: one.served.refused for number, one in enumerate(passed) if one.served.refused},
    }


def _line(row: Mapping[str, Any]) -> str:
    refused = {client: why for lost in row["refused"].values() for client, why in lost.items()}
    said = "".join(f"; client {client}: {why}" for client, why in refused.items())
    return f"alpha {row['alpha']:g}, {row['title']}, split {row['seed']}: {100 * row['accuracies'][-1][0]:.1f} %{said}"


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Writes the rows of results as a Markdown table: means over the splits and their standard deviations."""
    count = max(len(row["accuracies"][-1]) for row in rows)
    lines = [
        f"{title}. Accuracy of the server's networks in %, the first of which FedAvg and FedDM alone train; bytes that "
        "a client sends and receives, in all rounds, the most of any; floating-point operations of a client's network, "
        "without those of fitting and rendering.",
        "",
        "| Dirichlet | messages | rounds | bytes up | bytes down | GFLOP of a client | "
        + " | ".join(f"network {i + 1}" for i in range(count))
        + " |",
        "|---:|---|---:|---:|---:|---:|" + "---:|" * count,
    ]
    for alpha, name in dict.fromkeys((row["alpha"], row["title"]) for row in rows):
        own = [row for row in rows if (row["alpha"], row["title"]) == (alpha, name)]
        costs = [f"{max(row[key] for row in own):,}" for key in ("up", "down")]
        costs.append(f"{np.mean([row['flops'] for row in own]) / 1e9:.3g}")
        cells = [uses.spread(values) for values in zip(*[row["accuracies"][-1] for row in own], strict=True)]
        cells += [""] * (count - len(cells))
        lines.append(f"| {alpha:g} | {name} | {len(own[0]['accuracies'])} | {' | '.join([*costs, *cells])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
