"""What exported sets are tested with: the request, the data, trained networks, and the file of results.

The parts that `train.evaluate` and `train.ranking` share.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax import data, evaluation, nets, recipes, whiten
from gsdd_jax.augment import DsaSpec
from gsdd_jax.evaluation import EvalSpec
from gsdd_jax.merged import MergedSet
from gsdd_jax.synset import SynSet, fingerprint
from train import config as configs
from train import experiment as experiments
from train import testset
from train.errors import UserError
from train.progress import Bar
from train.rundir import environment, plain, write_json

# What a file of results is about; it is continued only where these agree.
_IDENTITY = {"set_sha256": "set", "data_sha256": "data", "size": "size"}
# A fixed training set, or a function that draws one for a seed.
Draw = Callable[[int], tuple[jax.Array, jax.Array]]
Training = tuple[jax.Array, jax.Array] | Draw


class Request(NamedTuple):
    """What is asked for, checked against the run as far as that goes without data."""

    run: Path
    synset: SynSet | MergedSet
    config: configs.RunConfig
    # Name of the network that the set was made with.
    maker: str
    recipe: recipes.Recipe
    networks: dict[str, nets.NetSpec]
    specs: dict[str, EvalSpec]
    size: tuple[int, int]
    resolution: int
    first_seed: int

    def key(self, purpose: str, index: int) -> jax.Array:
        """Returns the random key of a purpose: the run's own for its seeds."""
        return experiments.run_key(self.config, purpose, index)

    def settings(self, name: str, spec: EvalSpec, augment: DsaSpec) -> dict[str, Any]:
        """Returns all that an entry's numbers depend on, beside the set and the data, as flat plain values."""
        config = self.config
        flat: dict[str, Any] = {"recipe": self.recipe, "seed": config.seed, "whiten": config.whiten}
        flat["first_seed"] = self.first_seed
        for section, part in (("network", self.networks[name]), ("evaluate", spec), ("augment", augment)):
            flat |= {f"{section}.{key}": value for key, value in dataclasses.asdict(part).items()}
        # Results do not depend on it but for rounding.
        del flat["evaluate.parallel"]
        return plain(flat)

    def entry(
        self,
        tested: evaluation.Tested,
        spec: EvalSpec,
        settings: dict[str, Any],
        *,
        bench: Bench,
        images: int,
        seconds: float,
    ) -> dict[str, Any]:
        """Sums up tested networks; where one diverged there is no mean."""
        values = tested.accuracies.tolist()
        seeds = range(self.first_seed, self.first_seed + len(values))
        diverged = [seed for seed, value in zip(seeds, values, strict=True) if not math.isfinite(value)]
        entry = evaluation.summarize(values, seeds)
        if diverged:
            entry |= {"mean": None, "std": None, "diverged": diverged}
        else:
            entry |= evaluation.summarize_classes(tested.hits, bench.test_set["test_images_per_class"])
        return entry | {
            "accuracies": [value if math.isfinite(value) else None for value in values],
            "lr": spec.lr,
            "steps": spec.num_steps(images),
            "images": images,
            "recipe": self.recipe,
            "seconds": seconds,
            "settings": settings,
        }


class Bench(NamedTuple):
    """What networks are trained and tested with."""

    dataset: data.Dataset
    whitening: Any
    images: jax.Array
    labels: jax.Array
    test: tuple[jax.Array, jax.Array]
    # What `train.testset.check` found.
    test_set: dict[str, Any]


def set_up(request: Request) -> Bench:
    """Reads the data, renders the set and checks that they belong together."""
    synset, spec = request.synset, request.config.data
    if request.resolution:
        spec = dataclasses.replace(spec, resolution=request.resolution, sha256="")
    every = data.load(spec)
    dataset = experiments.own_classes(request.config, every)
    images = synset.images(request.size)
    if images.shape[1:] != dataset.image_shape:
        raise UserError(
            f"the set renders to {list(images.shape[1:])}, test images are {list(dataset.image_shape)}; "
            "set both with --resolution, or make --size and data.resolution agree"
        )
    if dataset.class_names != synset.class_names:
        raise UserError(
            f"data: the set has the classes {_shown(synset.class_names)}, {dataset.name} has "
            f"{_shown(dataset.class_names)}; expected the same ones in the same order"
        )
    test = jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)
    whitening = whiten.fit(request.config.whiten, every.train_images)
    soft = synset.soft_labels
    labels = jnp.asarray(synset.labels) if soft is None else soft
    return Bench(dataset, whitening, images, labels, test, testset.check(request.config.evaluate, dataset))


def _shown(names: tuple[str, ...]) -> str:
    more = f", ... ({len(names)})" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


class Results:
    """The file of results, written after every entry; without a path the same, kept in memory only."""

    def __init__(self, path: Path | None, head: dict[str, Any]):
        self._path, self.content = path, head | {"networks": {}, "ddranking": {}}
        if path is None or not path.exists():
            return
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): delete it and run the same command again") from error
        old = old if isinstance(old, dict) else {}
        differing = [name for key, name in _IDENTITY.items() if old.get(key) != head[key]]
        if differing:
            raise UserError(
                f"{path} holds results with another {', another '.join(differing)}: choose another file or delete it"
            )
        for section in ("networks", "ddranking"):
            self.content[section] = old.get(section, {})

    def known(self, section: str, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Returns a finished entry, None if there is none; refuses one that was made with other settings."""
        entry = self.content[section].get(name)
        if entry is None:
            return None
        # Settings that came later have the default that was the rule before.
        there = {f"evaluate.{name}": value for name, value in vars(EvalSpec()).items()} | entry["settings"]
        differing = [
            f"{key} is {json.dumps(there.get(key))} there and {json.dumps(value)} now"
            for key, value in settings.items()
            if there.get(key) != value
        ]
        if differing:
            raise UserError(
                f"{self._path} holds {name} with other settings: {'; '.join(differing)}; "
                "choose another file or delete it"
            )
        return entry

    def keep(self, section: str, name: str, entry: dict[str, Any]) -> None:
        """Adds an entry."""
        self.content[section][name] = entry
        self.save()

    def save(self) -> None:
        """Writes the file."""
        if self._path is not None:
            write_json(self._path, self.content)


def head(request: Request, bench: Bench) -> dict[str, Any]:
    """Returns the head of a file of results."""
    synset = request.synset
    return {
        "run": str(request.run),
        "codec": synset.parts[0].codec.name,
        "dataset": bench.dataset.name,
        "made_with": request.maker,
        "images": len(bench.images),
        "native_size": list(synset.parts[0].codec.image_shape[:2]),
        "size": list(bench.images.shape[1:3]),
        "bytes_per_class": synset.nbytes / len(synset.class_names),
        "set_sha256": fingerprint(synset.parts),
        "data_sha256": bench.dataset.fingerprint(),
        **bench.test_set,
        "environment": environment(),
    }


def train_and_test(
    request: Request,
    bench: Bench,
    network: nets.Network,
    spec: EvalSpec,
    augment: DsaSpec,
    training: Training,
    bar: Bar,
) -> evaluation.Tested:
    """Trains and tests a network for every seed; a function as training set draws one for each seed."""
    seeds = range(request.first_seed, request.first_seed + spec.seeds)
    together = 1 if callable(training) else spec.parallel
    tested: list[evaluation.Tested] = []
    for first in range(0, len(seeds), together):
        group = seeds[first : first + together]
        images, labels = training(group[0]) if callable(training) else training
        found = evaluation.evaluate_networks(
            jnp.stack([request.key("evaluate", seed) for seed in group]),
            images,
            labels,
            *bench.test,
            network=network,
            spec=spec,
            augment=augment,
            whitening=bench.whitening,
        )
        tested.append(found)
        bar.advance(len(group), f"accuracy {100 * float(found.accuracies[-1]):.1f} %")
    return jax.tree.map(lambda *parts: np.concatenate(parts), *tested)


def diverged(entries: dict[str, dict[str, Any]]) -> str:
    """Says which of these entries hold networks without an accuracy, and what helps."""
    parts = [
        f"{name} with learning rate {entry['lr']:g}, seeds {', '.join(map(str, entry['diverged']))}"
        for name, entry in entries.items()
    ]
    return f"diverged, so that there is no accuracy: {'; '.join(parts)}; lower evaluate.lr or choose another --recipe"
