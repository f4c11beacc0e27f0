"""Studies of the paper's figures 3 and 4, on distilled sets: what is in a Gaussian, how training and losses behave.

    python -m benchmarks.study prune|convergence|difficulty|landscape --run DIR [DIR ...] [KEY=VALUE ...]

Every study takes run directories with their config, and overrides of it such as ``evaluate.steps=1350``. Networks are
tested as the run says; of a set with soft labels, with these.

- *prune* (Figure 3a): Gaussians are left out by size times opacity, smallest first, largest first, or at random.
- *convergence* (3b): accuracy after several numbers of training steps, each a training of its own with its schedule.
- *difficulty* (3c, 3d): accuracy on test images that few or many networks trained on real images get wrong.
- *landscape* (4a, 4b): the loss of distribution matching around a set, along two random directions whose norms are, in
  every leaf of every image, those of the set (filter normalization, Li et al. 2018); the same images once as Gaussians
  and once as pixels.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import gsdd_jax
from benchmarks import record
from gsdd_jax import batches, codecs, evaluation, match, training
from gsdd_jax.gaussians import to_pixels
from gsdd_jax.match.base import Batch, Synthetic
from gsdd_jax.parallel import Axis
from gsdd_jax.render import render
from gsdd_jax.synset import SynSet
from train import config as configs
from train import experiment as experiments
from train.errors import exit_cleanly

KEPT = (0.875, 0.75, 0.5, 0.25)
ORDERS = {"small": "smallest first", "large": "largest first", "random": "at random"}
STEPS = (50, 150, 450, 1350)
# Networks that say how hard a test image is; the paper trains 100.
JUDGES, JUDGE_STEPS = 20, 400
# Upper ends of the shares of them that are wrong.
HARD = (0.0, 0.1, 0.3, 0.6, 0.9, 1.0)
# Points along each direction of a landscape, the farthest at this many norms, and networks that it is the mean of.
GRID, REACH, NETWORKS = 13, 1.0, 2
TEST_BATCH = 500


class Subject(NamedTuple):
    """A set and how it is tested."""

    name: str
    experiment: experiments.Experiment
    synset: SynSet

    @property
    def labels(self) -> jax.Array:
        """What networks are trained on."""
        soft = self.synset.soft_labels
        return jnp.asarray(self.synset.labels) if soft is None else soft

    def train(self, images: jax.Array, index: int, *, steps: int = 0) -> Any:
        """Returns the weights of one network trained on images with the set's labels."""
        config = self.experiment.config
        spec = config.evaluate.training()
        return training.train_network(
            self.experiment.key("evaluate", index),
            images,
            self.labels,
            network=self.experiment.network,
            spec=dataclasses.replace(spec, steps=steps) if steps else spec,
            augment=config.augment,
            whitening=self.experiment.whitening,
        )

    def right(self, params: Any) -> np.ndarray:
        """Returns which test images a network classifies correctly, bool ``[n]``."""
        dataset, network = self.experiment.dataset, self.experiment.network

        @jax.jit
        def classes(params: Any, images: jax.Array) -> jax.Array:
            return network.outputs(params, training.inputs(images, self.experiment.whitening))[0].argmax(1)

        images, parts = dataset.test_images, range(0, len(dataset.test_images), TEST_BATCH)
        found = [np.asarray(classes(params, jnp.asarray(images[i : i + TEST_BATCH]))) for i in parts]
        return np.concatenate(found) == dataset.test_labels

    def accuracy(self, images: jax.Array, *, steps: int = 0) -> dict[str, Any]:
        """Trains and tests as many networks as the config says."""
        seeds = range(self.experiment.config.evaluate.seeds)
        return evaluation.summarize(
            [float(self.right(self.train(images, i, steps=steps)).mean()) for i in seeds], list(seeds)
        )


def prune(subject: Subject) -> Iterator[dict[str, Any]]:
    """Leaves out Gaussians of every image by size times opacity; what is left is not trained again."""
    codec = subject.synset.codec
    found = codec.gaussians(subject.synset.params)
    if found is None:
        raise ValueError(f"--run: {subject.name} has no Gaussians to leave out")
    drawn = found
    splats = to_pixels(drawn)
    # p s is 1 over the square root of the determinant of the covariance.
    size = 1 / (splats.conics[..., 0] * splats.conics[..., 2])
    strength = size * jnp.abs(splats.colors).max(-1)
    noise = jax.random.uniform(subject.experiment.key("select"), strength.shape)
    yield {"order": "none", "kept": 1.0, **subject.accuracy(subject.synset.images())}
    for order, by in (("small", -strength), ("large", strength), ("random", noise)):
        rank = jnp.argsort(jnp.argsort(by, axis=1), axis=1)
        for kept in KEPT:
            count = round(kept * drawn.num_points)
            left = dataclasses.replace(drawn, opacity=jnp.where(rank < count, drawn.opacity, 0))
            images = render(left, supersample=codec.spec.supersample, cutoff=codec.spec.cutoff)
            yield {"order": order, "kept": count / drawn.num_points, **subject.accuracy(images)}


def convergence(subject: Subject) -> Iterator[dict[str, Any]]:
    """Trains for several numbers of steps."""
    for steps in STEPS:
        yield {"steps": steps, **subject.accuracy(subject.synset.images(), steps=steps)}


def difficulty(subject: Subject) -> Iterator[dict[str, Any]]:
    """Sorts the test images by how many networks trained on real images are wrong about them."""
    seeds = range(subject.experiment.config.evaluate.seeds)
    own = [subject.right(subject.train(subject.synset.images(), i)) for i in seeds]
    share, low = _wrong(subject), -1.0
    for high in HARD:
        among = (share > low) & (share <= high)
        if among.any():
            found = evaluation.summarize([float(right[among].mean()) for right in own], list(seeds))
            yield {"most_wrong": high, "test_images": int(among.sum()), **found}
        low = high


_JUDGED: dict[Any, np.ndarray] = {}


def _wrong(subject: Subject) -> np.ndarray:
    """Returns the share of the networks that are wrong about each test image; sets of one dataset have the same."""
    experiment = subject.experiment
    config, dataset = experiment.config, experiment.dataset
    known = dataset.fingerprint(), config.network, config.augment
    if known not in _JUDGED:
        wrong = np.zeros(len(dataset.test_labels))
        for i in range(JUDGES):
            params = training.train_network(
                experiment.key("evaluate", 1000 + i),
                jnp.asarray(dataset.train_images),
                jnp.asarray(dataset.train_labels),
                network=experiment.network,
                spec=dataclasses.replace(config.evaluate.training(), steps=JUDGE_STEPS, batch=128),
                augment=config.augment,
                whitening=experiment.whitening,
            )
            wrong += ~subject.right(params)
        _JUDGED[known] = wrong / JUDGES
    return _JUDGED[known]


def landscape(subject: Subject) -> Iterator[dict[str, Any]]:
    """Computes the loss over a plane through the set, and how much it bends from point to point."""
    images, spec = subject.synset.images(), match.DistributionSpec(batch_real=64)
    n = subject.synset.codec.images_per_class
    pixel = codecs.make(
        codecs.PixelSpec(images_per_class=n),
        image_shape=images.shape[1:],
        num_classes=subject.synset.codec.num_classes,
        bytes_per_class=4 * images[:n].size,
    )
    at = np.linspace(-REACH, REACH, GRID)
    for codec, params in ((subject.synset.codec, subject.synset.params), (pixel, {"images": images})):
        loss = _plane(subject, codec, params, spec)
        plane = np.array([[float(loss(x, y)) for x in at] for y in at])
        bends = [np.abs(np.diff(plane, 2, axis=axis)).mean() for axis in (0, 1)]
        yield {"codec": codec.name, "roughness": float(np.mean(bends) / np.ptp(plane)), "loss": plane.tolist()}


def _plane(subject: Subject, codec: Any, params: Any, spec: Any) -> Callable[[float, float], jax.Array]:
    experiment = subject.experiment
    config, dataset = experiment.config, experiment.dataset
    objective = match.make(spec, codec=codec, network=experiment.network, augment=config.augment)
    data = batches.device_data(dataset.train_images, dataset.train_labels, experiment.whitening)
    moved = {"mean", "cholesky", "color", "opacity", "images"}
    leaves = params if isinstance(params, dict) else vars(params)
    leaves = {name: leaf for name, leaf in leaves.items() if name in moved}

    def direction(key: jax.Array) -> dict[str, jax.Array]:
        found = {}
        for position, (name, leaf) in enumerate(leaves.items()):
            drawn, axes = jax.random.normal(jax.random.fold_in(key, position), leaf.shape), tuple(range(1, leaf.ndim))
            norms = [jnp.sqrt(jnp.sum(x**2, axis=axes, keepdims=True)) for x in (leaf, drawn)]
            found[name] = drawn * norms[0] / norms[1]
        return found

    first, second = (direction(key) for key in jax.random.split(experiment.key("start")))

    @jax.jit
    def loss(x: float, y: float) -> jax.Array:
        there = {name: leaf + x * first[name] + y * second[name] for name, leaf in leaves.items()}
        whole = there if isinstance(params, dict) else dataclasses.replace(params, **there)

        def one(key: jax.Array) -> jax.Array:
            axis, (key_batch, key_loss) = Axis(), jax.random.split(key)
            drawn = {
                name: need.draw(jax.random.fold_in(key_batch, i), data.held, axis.shard(codec.num_classes))
                for i, (name, need) in enumerate(objective.needs.items())
            }
            learned, carry = objective.init()
            batch = Batch(experiment.whitening, drawn)
            return objective.loss(key_loss, learned, carry, Synthetic(codec, whole, axis), batch)[0]

        return jax.lax.map(one, jax.random.split(experiment.key("distill"), NETWORKS)).mean()

    return loss


STUDIES: dict[str, Callable[[Subject], Iterator[dict[str, Any]]]] = {
    "prune": prune,
    "convergence": convergence,
    "difficulty": difficulty,
    "landscape": landscape,
}


def plot(study: str, results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draws the rows of a study, one line or panel for each set."""
    if study == "landscape":
        panels = [(name, row) for name, rows in results.items() for row in rows]
        figure = Figure(figsize=(4 * len(panels), 3.5), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (name, row) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            shown = axes.contourf(row["loss"], levels=24, extent=(-REACH, REACH, -REACH, REACH))
            axes.set_title(f"{name}\n{row['codec']}, roughness {row['roughness']:.3f}", fontsize=9)
            figure.colorbar(shown, ax=axes)
        figure.savefig(path, dpi=110)
        return
    x, label = {
        "prune": ("kept", "share of the Gaussians that is left"),
        "convergence": ("steps", "training steps"),
        "difficulty": ("most_wrong", f"wrong networks of {JUDGES} trained on real images, share up to"),
    }[study]
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, rows in results.items():
        for order in dict.fromkeys(row.get("order", "") for row in rows):
            if order == "none":
                continue
            own = [row for row in rows if row.get("order", "") in (order, "none")]
            text = f"{name}, {ORDERS[order]}" if order else name
            means, stds = ([100 * row[key] for row in own] for key in ("mean", "std"))
            axes.errorbar([row[x] for row in own], means, stds, marker="o", capsize=3, label=text)
    if study == "convergence":
        axes.set_xscale("log")
    axes.set(xlabel=label, ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; writes the JSON after every row, and the picture after every set."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--run", type=Path, nargs="+", required=True, metavar="DIR", help="run directories")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/study_NAME.json")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as evaluate.steps=1350")
    args = parser.parse_intermixed_args(argv)
    runs = [run for run in args.run if "=" not in str(run)]
    overrides = [*(str(run) for run in args.run if "=" in str(run)), *args.overrides]
    out, results = args.out or record.RESULTS / f"study_{args.study}.json", {}
    for run in runs:
        config: configs.RunConfig = configs.load(run / "config.yaml", overrides)
        synset = gsdd_jax.load(run / "export")
        if not isinstance(synset, SynSet):
            raise ValueError(f"--run: {run} holds a merged set; expected one of a single run")
        subject = Subject(run.name, experiments.prepare(config), synset)
        rows = results.setdefault(run.name, [])
        for row in STUDIES[args.study](subject):
            rows.append(row)
            print(run.name, {key: value for key, value in row.items() if key != "loss"}, flush=True)
            record.write(out, results, seed=config.seed, n=config.evaluate.seeds, overrides=overrides)
        plot(args.study, results, out.with_suffix(".png"))


if __name__ == "__main__":
    exit_cleanly()(main)()
