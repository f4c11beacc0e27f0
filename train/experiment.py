"""From a config to what a run works with: data, codec, network, whitening, and one random key per purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gsdd_jax import codecs, data, distill, fit, labels, nets, pixels, storage, whiten
from gsdd_jax.match import TrajectorySpec
from train.config import RunConfig
from train.errors import ConfigError

# The order is part of every published result: a new purpose goes to the end.
PURPOSES = (
    "select",
    "start",
    "distill",
    "pixel_select",
    "pixel_distill",
    "evaluate",
    "random_real",
    "features",
    "teacher",
)
# Starts of codecs that look at no image.
NOISE = ("uniform", "xavier")


class Whole(NamedTuple):
    """What a subtask knows of the whole dataset, of which its own is a block of classes."""

    fingerprint: str
    # Of the block.
    classes: range
    channels: whiten.MeanStd


class Experiment(NamedTuple):
    """All that the stages of a run share; derived from the config and the data alone.

    A subtask has the dataset of its classes, but the whitening of the whole training set, so that the parts of a merged
    set live in one normalised space. `whole` is None where the run is no subtask.
    """

    config: RunConfig
    dataset: data.Dataset
    bytes_per_class: int
    codec: codecs.Codec
    network: nets.Network
    whitening: Any
    whole: Whole | None = None

    def key(self, purpose: str, index: int = 0) -> jax.Array:
        """Returns the random key of a purpose; those of other purposes, seeds, indices and subtasks are independent."""
        return run_key(self.config, purpose, index)

    @property
    def host_seed(self) -> int:
        """Seed of what the host draws; subtasks draw differently."""
        return self.config.seed + (self.config.subtask << 32)

    def data_identity(self) -> str:
        """Returns what experts are bound to: the data that they saw, and those that the whitening was fitted to."""
        if self.whole is None:
            return self.dataset.fingerprint()
        return f"{self.whole.fingerprint}[{self.whole.classes.start}:{self.whole.classes.stop}]"


def run_key(config: RunConfig, purpose: str, index: int = 0) -> jax.Array:
    """Returns the random key of a purpose in a run."""
    key = jax.random.fold_in(key_of(config.seed, purpose), index)
    return jax.random.fold_in(key, config.subtask) if config.subtasks > 1 else key


def key_of(seed: int, purpose: str) -> jax.Array:
    """Returns the random key of a purpose under a root seed."""
    return jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))


def run_path(config: RunConfig) -> Path:
    """Returns the default run directory, one for each subtask."""
    return _of_subtask(config, Path("runs") / config.name)


def expert_path(config: RunConfig, run: Path) -> Path:
    """Returns the folder of a run's experts: in its directory, or the shared one, where each subtask has its own."""
    return _of_subtask(config, Path(config.experts.path)) if config.experts.path else run / "experts"


def _of_subtask(config: RunConfig, path: Path) -> Path:
    return path / f"subtask{config.subtask}" if config.subtasks > 1 else path


def own_classes(config: RunConfig, dataset: data.Dataset) -> data.Dataset:
    """Returns the part of a dataset that a run is about: a subtask's block of classes, or all of it.

    Raises:
        ConfigError: More subtasks than classes.
    """
    if config.subtasks == 1:
        return dataset
    return data.take_classes(dataset, _block(config, dataset))


def _block(config: RunConfig, dataset: data.Dataset) -> range:
    try:
        return data.class_blocks(dataset.num_classes, config.subtasks)[config.subtask]
    except ValueError as error:
        raise ConfigError(f"{error} ({dataset.name})") from None


def prepare(config: RunConfig, dataset: data.Dataset | None = None) -> Experiment:
    """Reads the data, unless they are given, and builds the parts.

    Args:
        config: What to run.
        dataset: All classes, also for a subtask.

    Raises:
        ConfigError: Settings that contradict each other or the data; the message names the key.
    """
    _check_start(config)
    _check_teacher(config)
    every = data.load(config.data) if dataset is None else dataset
    dataset = own_classes(config, every)
    shape, classes = dataset.image_shape, dataset.num_classes
    available = storage.budget_bytes(config.ipc, shape)
    budget: dict[str, Any] = {"image_shape": shape, "num_classes": classes, "bytes_per_class": available}
    codec = labels.make_codec(config.codec, config.labels, **budget)
    if config.fit.to == "real":
        data.require_per_class(dataset, codec.images_per_class, f"codec.{_count_field(codec.spec)}")
    data.require_per_class(dataset, 1, "objective.batch_real")
    _check_mmd(config, codec)
    network = nets.build(config.network, shape, classes)
    if config.baselines.pixel:
        try:
            pixel = labels.make_codec(config.baselines.pixel_codec, config.labels, **budget)
            _check_mmd(config, pixel)
        except ValueError as error:
            raise ConfigError(
                f"baselines.pixel_codec: {str(error).removeprefix('codec.ipc: ')}; "
                f"raise ipc (found {config.ipc}) or set baselines.pixel=false"
            ) from error
    whole = None
    if config.subtasks > 1:
        whole = Whole(every.fingerprint(), _block(config, every), channel_statistics(every))
    whitening = whiten.fit(config.whiten, every.train_images)
    return Experiment(config, dataset, available, codec, network, whitening, whole)


def channel_statistics(dataset: data.Dataset) -> whiten.MeanStd:
    """Returns mean and std of every channel of the training images; that of a constant one is 1, see `whiten.fit`."""
    channels = whiten.fit("meanstd", dataset.train_images)
    assert isinstance(channels, whiten.MeanStd)
    return channels


def _count_field(spec: codecs.CodecSpec) -> str:
    """Returns the setting of a codec that says how many images per class there are."""
    return next(name for name in ("gpc", "ipc", "lpc", "images_per_class") if hasattr(spec, name))


def _check_start(config: RunConfig) -> None:
    """Refuses a start that would look at real images although the fit is asked not to, or cannot do without them."""
    if config.fit.to == "real":
        return
    start = getattr(config.codec, "start", None)
    if start is None:
        raise ConfigError(
            f"fit.to: the {config.codec.name} codec starts from real images; expected real, found {config.fit.to!r}"
        )
    if start not in NOISE:
        raise ConfigError(
            f"codec.start: fit.to={config.fit.to} starts from noise; expected {' or '.join(NOISE)} (whichever the "
            f"codec has), found {start!r}"
        )


def _check_mmd(config: RunConfig, codec: codecs.Codec) -> None:
    """Refuses an MMD term that a codec or an objective cannot have."""
    if config.mmd.weight == 0:
        return
    distill.mmd_samples(codec, config.mmd)
    if config.mmd.features == "expert" and not isinstance(config.objective, TrajectorySpec):
        raise ConfigError(
            f"mmd.features: experts are trained for objective.name=trajectory; expected random with "
            f"{config.objective.name}, found 'expert'"
        )


def _check_teacher(config: RunConfig) -> None:
    """Refuses experts as teachers where there are none or too few."""
    spec = config.labels
    if spec.kind == "hard" or spec.teacher == "train":
        return
    if not isinstance(config.objective, TrajectorySpec):
        raise ConfigError(
            f"labels.teacher: only objective.name=trajectory has experts, found {config.objective.name!r}; expected "
            "train"
        )
    if spec.teachers > config.experts.count:
        raise ConfigError(
            f"labels.teachers: expected at most experts.count = {config.experts.count}, found {spec.teachers}"
        )


def resolved(config: RunConfig, codec: codecs.Codec) -> RunConfig:
    """Returns the config with the codec's settings as they were resolved (num_points and the like)."""
    return dataclasses.replace(config, codec=codec.spec)


def real_images(experiment: Experiment, codec: codecs.Codec, *, purpose: str, how: str, index: int = 0) -> jax.Array:
    """Chooses real images for every image of a codec, class-major, as floats in [0,1]."""
    dataset = experiment.dataset
    features = embed(experiment) if how == "kmeans" else None
    chosen = fit.select_images(
        experiment.key(purpose, index),
        dataset.train_labels,
        codec.images_per_class,
        how=how,
        num_classes=dataset.num_classes,
        features=features,
    )
    return pixels.as_float(dataset.train_images[chosen])


def embed(experiment: Experiment, batch: int = 500) -> np.ndarray:
    """Embeds the training set with a randomly initialised network, for k-means."""
    network, dataset = experiment.network, experiment.dataset
    params = network.init(experiment.key("features"))

    @jax.jit
    def features(images: jax.Array, whitening: Any) -> jax.Array:
        return network.apply(params, whiten.apply(whitening, images))[1]

    images = dataset.train_images
    parts = [
        features(pixels.as_float(images[i : i + batch]), experiment.whitening) for i in range(0, len(images), batch)
    ]
    return np.concatenate([np.asarray(part) for part in parts])


def class_rows(codec: codecs.Codec, images: jax.Array) -> np.ndarray:
    """Reshapes class-major images ``[n, ...]`` to ``[k, per class, ...]``."""
    return np.asarray(images).reshape(codec.num_classes, codec.images_per_class, *images.shape[1:])


def arms(config: RunConfig) -> Sequence[str]:
    """Names the rows of the table of results, the distilled set first."""
    wanted = {
        "distilled": True,
        "fit_only": config.baselines.fit_only and config.fit.to == "real" and config.codec.name != "pixel",
        "pixel": config.baselines.pixel and config.codec.name != "pixel",
        "random_real": config.baselines.random_real and config.ipc >= 1,
        "full_data": config.baselines.full_data,
    }
    return [name for name, on in wanted.items() if on]
