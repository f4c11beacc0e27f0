"""What exported sets are tested with: the set, the networks, the data, and the file of results.

The parts that `train.evaluate` and `train.ranking` share.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from gsdd_jax import MergedSet, SynSet, data, nets, recipes, synset
from gsdd_jax.augment import DsaSpec
from gsdd_jax.evaluation import EvalSpec
from train import config as configs
from train import experiment as experiments
from train import testset
from train.errors import UserError
from train.evaluation import test_networks
from train.experiment import WHEREABOUTS, Experiment
from train.progress import Progress
from train.results import exported
from train.rundir import differences, environment, plain, write_json

# What a file of results is about; it is continued only where these agree.
_IDENTITY = {"set_sha256": "set", "data_sha256": "data", "size": "size"}


class Bench:
    """What the command line of `train.evaluate` asks for: an exported set, networks, data, and the file of results.

    The file is written after every entry; without one they are kept in memory only.

    Attributes:
        experiment: The data, and the settings of the run.
        images: Of the set, ``[n, h, w, c]``.
        maker: Name of the network that the set was made with.
        networks: By name.
        specs: How each network is trained.
        content: Of the file.
    """

    def __init__(self, args: argparse.Namespace, names: Sequence[str], overrides: Sequence[str]):
        run = self.run = Path(args.run)
        out = self._out = Path(args.out) if args.out else None
        resolution = args.resolution
        self.recipe, self.first_seed, self.progress = args.recipe, args.first_seed, Progress(quiet=args.quiet)
        self.synset: SynSet | MergedSet = exported(run)
        file = run / "config.yaml"
        if not file.exists():
            raise UserError(f"{run} holds an exported set but no config.yaml, which says how to train on it")
        config: configs.RunConfig = configs.load(file, overrides)
        maker: configs.RunConfig = configs.load(file)
        self.maker, own = maker.network.name, config.network
        self._network_specs = {
            name: own if name == own.name else nets.NetSpec(name=name)  # type: ignore[arg-type]
            for name in names or [own.name]
        }
        self.specs = {name: self._recipe(name, config, overrides) for name in self._network_specs}
        codec, class_names = self.synset.parts[0].codec, self.synset.class_names
        size = (resolution, resolution) if resolution else codec.image_shape[:2]
        # Whatever does not fit is found before data are read.
        shape = (*size, codec.image_shape[2])
        self.networks = {name: nets.build(spec, shape, len(class_names)) for name, spec in self._network_specs.items()}
        keys, spec = [text.partition("=")[0].strip() for text in overrides], config.data
        if resolution or any(
            configs.covered(key, ["data"]) and not configs.covered(key, [*WHEREABOUTS, "data.sha256"]) for key in keys
        ):
            # Other images are asked for.
            spec = dataclasses.replace(spec, resolution=resolution or spec.resolution, sha256="")
        every = data.load(spec)
        dataset = experiments.own_classes(config, every)
        self.images = self.synset.images(size)
        if self.images.shape[1:] != dataset.image_shape:
            raise UserError(
                f"the set renders to {list(self.images.shape[1:])}, test images are {list(dataset.image_shape)}; "
                "set both with --resolution, or make data.resolution that of the set"
            )
        if dataset.class_names != class_names:
            raise UserError(
                f"data: the set has the classes {_shown(class_names)}, {dataset.name} has "
                f"{_shown(dataset.class_names)}; expected the same ones in the same order"
            )
        tested, network = testset.check(config.evaluate, dataset), next(iter(self.networks.values()))
        budget, images = self.synset.bytes_per_class, every.train_images
        self.experiment = Experiment(config, dataset, budget, codec, network, images, config, tested)
        self.content: dict[str, Any] = {
            "run": str(run),
            "codec": codec.name,
            "dataset": dataset.name,
            "made_with": self.maker,
            "images": len(self.images),
            "native_size": list(codec.image_shape[:2]),
            "size": list(size),
            "bytes_per_class": self.synset.nbytes / len(class_names),
            "set_sha256": synset.fingerprint(self.synset.parts),
            "data_sha256": dataset.fingerprint(),
            **tested,
            "environment": environment(),
            "networks": {},
            "ddranking": {},
        }
        if out is not None and out.exists():
            self._continue(out)

    def _recipe(self, name: str, config: configs.RunConfig, overrides: Sequence[str]) -> EvalSpec:
        """Returns how a network is trained: by the recipe on the run's own section, and the command line on top."""
        file = self.run / "config.yaml"
        own: configs.RunConfig = configs.load(file)
        recipe = dataclasses.asdict(recipes.recipe_for(self.recipe, name, own.evaluate.training()))
        if self.recipe == "config" and config.evaluate.lr_from == "syn_lr" and "syn_lr" in self.synset.meta:
            recipe["lr"] = self.synset.meta["syn_lr"]
        below = [f"evaluate.{key}={json.dumps(value)}" for key, value in recipe.items()]
        made: configs.RunConfig = configs.load(file, [*below, *overrides])
        return made.evaluate.training()

    def _continue(self, out: Path) -> None:
        """Takes over what a file holds."""
        try:
            old = json.loads(out.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{out} is damaged ({error}): delete it and run the same command again") from error
        old = old if isinstance(old, dict) else {}
        differing = [name for key, name in _IDENTITY.items() if old.get(key) != self.content[key]]
        if differing:
            raise UserError(
                f"{out} holds results with another {', another '.join(differing)}: choose another file or delete it"
            )
        self.content |= {section: old.get(section, {}) for section in ("networks", "ddranking")}

    def settings(self, name: str, spec: EvalSpec, augment: DsaSpec) -> dict[str, Any]:
        """Returns all that the numbers of a network depend on, beside the set and the data, as flat plain values."""
        config = self.experiment.config
        flat: dict[str, Any] = {"recipe": self.recipe, "seed": config.seed, "whiten": config.whiten}
        flat["first_seed"] = self.first_seed
        for section, part in (("network", self._network_specs[name]), ("evaluate", spec), ("augment", augment)):
            flat |= {f"{section}.{key}": value for key, value in dataclasses.asdict(part).items()}
        # Results do not depend on it but for rounding.
        del flat["evaluate.parallel"]
        return plain(flat)

    def known(self, section: str, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Returns a finished entry, None if there is none; refuses one that was made with other settings."""
        entry = self.content[section].get(name)
        # Files of before hold those that diverged.
        if entry is None or entry["mean"] is None:
            return None
        # Settings that came later have the default that was the rule before.
        defaults = {"evaluate": EvalSpec(), "network": nets.NetSpec()}
        before = {f"{section}.{key}": value for section, spec in defaults.items() for key, value in vars(spec).items()}
        there = before | entry["settings"]
        apart = differences({key: there.get(key) for key in settings}, settings)
        if apart:
            values = "; ".join("{} is {} there and {} now".format(key, *both) for key, both in apart.items())
            raise UserError(f"{self._out} holds {name} with other settings: {values}; choose another file or delete it")
        self.progress.say(f"{name}: kept from the file of results")
        return entry

    def test(
        self, name: str, training: Callable[[int], tuple[jax.Array, jax.Array]], spec: EvalSpec, **how: Any
    ) -> dict[str, Any]:
        """Trains and tests networks, as `test_networks`."""
        seeds = range(self.first_seed, self.first_seed + spec.seeds)
        remedy = "lower evaluate.lr or choose another --recipe"
        return test_networks(
            self.experiment, name, seeds, training, spec=spec, progress=self.progress, remedy=remedy, **how
        )

    def keep(self, section: str, name: str, entry: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        """Adds an entry to the file, and returns it."""
        entry = self.content[section][name] = plain(entry | {"recipe": self.recipe, "settings": settings})
        self.save()
        return entry

    def save(self) -> None:
        """Writes the file."""
        if self._out is not None:
            write_json(self._out, self.content)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")
