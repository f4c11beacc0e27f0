"""Membership inference on distilled sets: ``python -m train.audit --config FILE [key=value ...]``.

Every kind of set of the config is made of random halves of the images and attacked: see `gsdd_jax.uses.audit`. The same
command continues what was killed, kind by kind. Into the folder of the experiment go ``result.json``, ``table.md`` and,
for each kind, a picture: images of a set, below each the member nearest to it, and the nearest image that was not used.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from annotated_types import Ge, Gt
from PIL import Image
from typing_extensions import Doc

from gsdd_jax import data, files, pixels
from gsdd_jax.nets import NetSpec
from gsdd_jax.uses import archive, audit
from gsdd_jax.uses.summary import SummarySpec, summarize
from train import uses
from train.errors import exit_cleanly
from train.rundir import write_json

MEMBERS = "all members"
Rows = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditConfig(uses.UseConfig):
    """Kinds of sets that are attacked; each seed is a repetition, with halves of its own."""

    network: Annotated[NetSpec, Doc("what matches, and what is trained on the sets")] = NetSpec()
    budget: Annotated[int, Gt(0), Doc("bytes of a set's file")]
    sets: tuple[SummarySpec, ...]
    shadows: Annotated[int, Ge(4), Doc("sets of each kind, of a random half of the images each")] = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    with exit_cleanly():
        config, out, say = uses.start("audit", __doc__, AuditConfig, argv)
        dataset = data.load(config.data)
        # Half of them are unused each time: no others are needed.
        images = np.concatenate([dataset.train_images, dataset.test_images])
        labels = np.concatenate([dataset.train_labels, dataset.test_labels])
        kinds = {MEMBERS: None} | {spec.title: spec for spec in config.sets}
        rows = []
        for number, (title, spec) in enumerate(kinds.items()):
            for seed in config.seeds:
                path = out / f"{number}-{seed}.json"
                if not path.exists():
                    write_json(path, _attacked(config, images, labels, dataset, spec, seed, path.with_suffix(".png")))
                rows.append({"set": title, "seed": seed, **json.loads(path.read_text())})
                say(table("", rows[-1:]).splitlines()[-1])
        title = (
            f"{dataset.name}, {len(images):,} images, {config.shadows} sets of a random half of them, "
            f"{config.budget:,} bytes each, {len(config.seeds)} repetitions"
        )
        uses.finish(out, config, table(title, rows), title=title, rows=rows)
    return 0


def _attacked(
    config: AuditConfig,
    images: np.ndarray,
    labels: np.ndarray,
    dataset: data.Dataset,
    spec: SummarySpec | None,
    seed: int,
    picture: Path,
) -> dict[str, Any]:
    learner, sizes = config.learner(config.network, dataset.image_shape[-1]), [0]
    file = picture.with_suffix(".zip")

    def make(key: jax.Array, images: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
        if spec is None:
            return images, labels
        budget = spec.budget or config.budget
        part = summarize(
            key, images, labels, spec=spec, class_names=dataset.class_names, budget=budget, learner=learner
        )
        file.unlink(missing_ok=True)
        sizes.append(archive.append(file, part))
        return archive.labeled(archive.read(file)[0], dataset.class_names)

    found = audit.audit(
        seed,
        images,
        labels,
        make,
        learner=learner,
        shadows=config.shadows,
    )
    file.unlink(missing_ok=True)
    shown = np.arange(0, len(found.images), max(1, len(found.images) // 30))[:30]
    near = found.neighbors
    _draw(picture, found.images[shown], images[near.member[shown]], images[near.unused[shown]])
    closer = float((near.member_distance < near.unused_distance).mean())
    return {
        "networks": found.networks._asdict(),
        "sets": found.sets._asdict(),
        "accuracy": float(np.mean(found.accuracy)),
        "bytes": max(sizes),
        "nearer_to_member": closer,
    }


def _draw(path: Path, *rows: np.ndarray) -> None:
    margin = ((0, 0), (0, 1), (0, 1), (0, 0))
    framed = [np.pad(np.clip(np.asarray(pixels.as_float(row)), 0, 1), margin, constant_values=0.5) for row in rows]
    strips = [np.concatenate(list(row), 1) for row in framed]
    gray = (255 * np.concatenate(strips) + 0.5).astype(np.uint8)
    picture = Image.fromarray(gray[..., 0] if gray.shape[-1] == 1 else gray)
    with files.replacing(path) as file:
        picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(file, "png")


def table(title: str, rows: Rows) -> str:
    """Writes the rows of results as a Markdown table: means over the seeds and their standard deviations."""
    lines = [
        f"{title}. Accuracy on images that were not used, in %; of members that are found, the part in % at 0.1 % and "
        "1 % of false accusations, and the area under the curve: guessing gives 0.1, 1 and 50.",
        "",
        "| set | bytes | accuracy | by a network: at 0.1 % | at 1 % | area | by the set: at 0.1 % | at 1 % | area |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(row["set"] for row in rows):
        own = [row for row in rows if row["set"] == name]
        size = max(row["bytes"] for row in own)
        cells = [f"{size:,}" if size else "", uses.spread([row["accuracy"] for row in own])]
        for attack in ("networks", "sets"):
            cells += [uses.spread([row[attack]["tpr"][i] for row in own]) for i in range(len(audit.RATES))]
            cells.append(uses.spread([row[attack]["auc"] for row in own]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
