"""From a config to what a run works with: data, codec, network, whitening, and one random key per purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gsdd_jax import codecs, data, distill, fit, labels, nets, storage, whiten
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


class Experiment(NamedTuple):
    """All that the stages of a run share; derived from the config and the data alone."""

    config: RunConfig
    dataset: data.Dataset
    bytes_per_class: int
    codec: codecs.Codec
    network: nets.Network
    whitening: Any

    def key(self, purpose: str, index: int = 0) -> jax.Array:
        """Returns the random key of a purpose; keys of different purposes, seeds and indices are independent."""
        return jax.random.fold_in(key_of(self.config.seed, purpose), index)


def key_of(seed: int, purpose: str) -> jax.Array:
    """Returns the random key of a purpose under a root seed."""
    return jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))


def prepare(config: RunConfig, dataset: data.Dataset | None = None) -> Experiment:
    """Reads the data, unless they are given, and builds the parts.

    Raises:
        ConfigError: Settings that contradict each other or the data; the message names the key.
    """
    _check_start(config)
    _check_teacher(config)
    dataset = data.load(config.data) if dataset is None else dataset
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
    whitening = whiten.fit(config.whiten, dataset.train_images)
    return Experiment(config, dataset, available, codec, network, whitening)


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
    return to_float(dataset.train_images[chosen])


def to_float(images: np.ndarray) -> jax.Array:
    """Maps uint8 images to float32 in [0,1]."""
    return jax.numpy.asarray(images, jax.numpy.float32) / 255


def embed(experiment: Experiment, batch: int = 500) -> np.ndarray:
    """Embeds the training set with a randomly initialised network, for k-means."""
    network, dataset = experiment.network, experiment.dataset
    params = network.init(experiment.key("features"))

    @jax.jit
    def features(images: jax.Array, whitening: Any) -> jax.Array:
        return network.apply(params, whiten.apply(whitening, images))[1]

    images = dataset.train_images
    parts = [features(to_float(images[i : i + batch]), experiment.whitening) for i in range(0, len(images), batch)]
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
