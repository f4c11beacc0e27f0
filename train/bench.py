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
        run = self.run = synset.located(args.run)
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
        kinds = {name: own if name == own.name else nets.NetSpec(name=name) for name in names or [own.name]}  # type: ignore[arg-type]
        self.specs: dict[str, EvalSpec] = {}
        for name in kinds:
            # The recipe on the run's own section, and the command line on top.
            recipe = dataclasses.asdict(recipes.recipe_for(self.recipe, name, maker.evaluate.training()))
            if self.recipe == "config" and config.evaluate.lr_from == "syn_lr" and "syn_lr" in self.synset.meta:
                recipe["lr"] = self.synset.meta["syn_lr"]
            below = [f"evaluate.{key}={json.dumps(value)}" for key, value in recipe.items()]
            made: configs.RunConfig = configs.load(file, [*below, *overrides])
            self.specs[name] = made.evaluate.training()
        codec, class_names = self.synset.parts[0].codec, self.synset.class_names
        native = codec.image_shape[:-1]
        size = (*native[:-2], resolution, resolution) if resolution else native
        # Whatever does not fit is found before data are read.
        shape = (*size, codec.image_shape[-1])
        self.networks = {name: nets.build(spec, shape, len(class_names)) for name, spec in kinds.items()}
        named, spec = [text.partition("=")[0].strip() for text in overrides], config.data
        if resolution or any(
            configs.covered(key, ["data"]) and not configs.covered(key, [*WHEREABOUTS, "data.sha256"]) for key in named
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
        # All that the numbers depend on, but for what changes only their rounding.
        keys = "network", "evaluate", "augment", "baselines", "seed", "whiten", "ipc"
        settings: dict[str, Any] = {key: dataclasses.asdict(config)[key] for key in keys}
        del settings["evaluate"]["parallel"]
        settings |= {"recipe": args.recipe, "first_seed": args.first_seed, "size": size}
        settings |= {"set_sha256": synset.fingerprint(self.synset.parts), "data_sha256": dataset.fingerprint()}
        self.content: dict[str, Any] = {
            "run": str(args.run),
            "codec": codec.name,
            "dataset": dataset.name,
            "made_with": self.maker,
            "images": len(self.images),
            "native_size": list(native),
            "bytes_per_class": self.synset.nbytes / len(class_names),
            **tested,
            "settings": plain(settings),
            "environment": environment(),
            "networks": {},
            "ddranking": {},
        }
        if out is not None and out.exists():
            self._continue(out)

    def _continue(self, out: Path) -> None:
        """Takes over what a file holds."""
        try:
            old = json.loads(out.read_text(encoding="utf-8"))
            held = {section: old[section] for section in ("settings", "networks", "ddranking")}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{out} is damaged, or of another version ({error!r}): delete it or choose another file"
            ) from error
        if apart := differences(held["settings"], self.content["settings"]):
            values = "; ".join("{} is {} there and {} now".format(key, *both) for key, both in apart.items())
            raise UserError(f"{out} holds results with other settings: {values}; choose another file or delete it")
        self.content |= held

    def entry(self, section: str, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns an entry of the file, which is made where it is not there."""
        if name in self.content[section]:
            self.progress.say(f"{name}: kept from the file of results")
        else:
            self.content[section][name] = plain(make())
            self.save()
        return self.content[section][name]

    def test(
        self, name: str, training: Callable[[int], tuple[jax.Array, jax.Array]], spec: EvalSpec, **how: Any
    ) -> dict[str, Any]:
        """Trains and tests networks, as `test_networks`."""
        seeds = range(self.first_seed, self.first_seed + spec.seeds)
        remedy = "lower evaluate.lr or choose another --recipe"
        return test_networks(
            self.experiment, name, seeds, training, spec=spec, progress=self.progress, remedy=remedy, **how
        )

    def save(self) -> None:
        """Writes the file."""
        if self._out is not None:
            write_json(self._out, self.content)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")
