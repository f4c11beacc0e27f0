"""From a config to what a run works with: data, codec, network, whitening, and one random key per purpose."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gsdd_jax import codecs, data, fitting, labels, match, nets, orbax_set, pixels, storage, synset, whiten
from gsdd_jax.codecs import stored
from gsdd_jax.merged import load
from train import testset
from train.config import RunConfig
from train.errors import ConfigError

# The order is part of every published result: a new purpose goes to the end.
PURPOSES = (
    *("select", "start", "distill", "pixel_select", "pixel_distill", "evaluate"),
    *("random_real", "features", "teacher", "compressed", "same_number"),
)
# Of the training images of a class, the share on which settings are compared.
HELD_OUT = 0.1
# Settings that say where data are, not which.
WHEREABOUTS = ("data.source", "data.name", "data.path")


class AllClasses(NamedTuple):
    """What a subtask knows of the whole dataset, of which its own is a block of classes."""

    fingerprint: str
    classes: range


class Arm(NamedTuple):
    """What is distilled: the set itself, and the pixels beside it."""

    # Of its row in the table.
    name: str
    # What the names of its phases begin with.
    phase: str
    # Of its random key.
    purpose: str
    codec: codecs.Codec
    iterations: int
    # The settings of its codec, and that of its outer steps.
    section: str
    key: str


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """All that the stages of a run share; derived from the config and the data alone.

    In `config` everything is filled in that `asked` left to the data and the budget: with other data, or by another
    rule of a later version, a run directory holds another config.

    A subtask has the dataset of its classes, but the whitening of the whole training set, so that the parts of a merged
    set live in one normalized space. `all_classes` is None where the run is no subtask.
    """

    config: RunConfig
    dataset: data.Dataset
    bytes_per_class: int
    codec: codecs.Codec
    network: nets.Network
    # Training images of all classes, which the whitening is fitted to.
    all_images: np.ndarray
    asked: RunConfig
    # What `train.testset.check` found.
    test_set: Mapping[str, Any]
    all_classes: AllClasses | None = None
    # Parameters that stand in for a fit, of `fit.initial_set`.
    start: Any = None

    @functools.cached_property
    def whitening(self) -> whiten.Whitening:
        """What networks see images through; fitted when first asked for, since a finished run asks for none."""
        return whiten.fit(self.config.whiten, self.all_images)

    @functools.cached_property
    def channels(self) -> whiten.MeanStd:
        """Mean and std of every channel of all training images; that of a constant one is 1, see `whiten.fit`."""
        known = self.whitening if self.config.whiten == "meanstd" else whiten.fit("meanstd", self.all_images)
        assert isinstance(known, whiten.MeanStd)
        return known

    def objective(self, codec: codecs.Codec) -> match.Objective:
        """Returns what a codec's images are matched by."""
        return _objective(self.config, codec, self.network)

    @property
    def expert_window(self) -> match.TrajectorySpec | match.DistributionSpec | None:
        """The settings that say which experts the objective needs; None for none."""
        return match.expert_window(self.objective(self.codec).needs)

    def key(self, purpose: str, index: int = 0) -> jax.Array:
        """Returns the random key of a purpose; those of other purposes, seeds, indices and subtasks are independent."""
        return run_key(self.config, purpose, index)

    @property
    def host_seed(self) -> int:
        """Seed of what the host draws; subtasks draw differently."""
        return self.config.seed + (self.config.subtask << 32)

    def data_identity(self) -> str:
        """Returns what experts are bound to: the data that they saw, and those that the whitening was fitted to."""
        if self.all_classes is None:
            return self.dataset.fingerprint()
        return f"{self.all_classes.fingerprint}[{self.all_classes.classes.start}:{self.all_classes.classes.stop}]"

    def distilled(self) -> list[Arm]:
        """Returns what is distilled, in this order."""
        config, key = self.config, "distill.iterations"
        found = [Arm("distilled", "main", "distill", self.codec, config.distill.iterations, "codec", key)]
        if "pixel" in arms(config):
            codec = codecs.make(config.baselines.pixel_codec, **_budget(config, self.dataset))
            own = config.baselines.pixel_iterations
            key, count = ("baselines.pixel_iterations", own) if own else (key, config.distill.iterations)
            found.append(Arm("pixel", "pixel", "pixel_distill", codec, count, "baselines.pixel_codec", key))
        return found


def run_key(config: RunConfig, purpose: str, index: int = 0) -> jax.Array:
    """Returns the random key of a purpose in a run."""
    root = jax.random.fold_in(jax.random.key(config.seed), PURPOSES.index(purpose))
    key = jax.random.fold_in(root, index)
    return jax.random.fold_in(key, config.subtask) if config.subtasks > 1 else key


def run_path(config: RunConfig) -> Path:
    """Returns the default run directory, one for each subtask."""
    return _of_subtask(config, Path("runs") / config.name)


def expert_path(config: RunConfig, run: Path) -> Path:
    """Returns the folder of a run's experts: in its directory, or the shared one, where each subtask has its own."""
    return _of_subtask(config, Path(config.experts.path)) if config.experts.path else run / "experts"


def _of_subtask(config: RunConfig, path: Path) -> Path:
    return path / f"subtask{config.subtask}" if config.subtasks > 1 else path


def own_classes(config: RunConfig, dataset: data.Dataset) -> data.Dataset:
    """Returns the part of a dataset that a run is about, of at least two classes: a subtask's block, or all of it."""
    if dataset.num_classes < 2:
        raise ConfigError(
            f"data: {dataset.name} has one class, {dataset.class_names[0]!r}; expected at least 2 to tell apart"
        )
    return dataset if config.subtasks == 1 else data.take_classes(dataset, _block(config, dataset))


def _block(config: RunConfig, dataset: data.Dataset) -> range:
    try:
        blocks = data.class_blocks(dataset.num_classes, config.subtasks)
    except ValueError as error:
        raise ConfigError(f"{error} ({dataset.name})") from None
    alone = [subtask for subtask, block in enumerate(blocks) if len(block) < 2]
    if alone:
        name, most = dataset.class_names[blocks[alone[0]].start], dataset.num_classes // 2
        raise ConfigError(
            f"subtasks: expected at most {most} for the {dataset.num_classes} classes of {dataset.name}, found "
            f"{config.subtasks}: subtask {alone[0]} would have one class, {name!r}, each needs at least 2"
        )
    return blocks[config.subtask]


def prepare(config: RunConfig, dataset: data.Dataset | None = None) -> Experiment:
    """Reads the data, unless they are given, and builds the parts.

    A given dataset is of all classes, also for a subtask. Where it is made from that of ``config.data``, the
    ``sha256`` there is set already.

    Raises:
        ConfigError: Settings that contradict each other or the data; the message names the key.
    """
    _check_start(config)
    every = data.load(config.data) if dataset is None else dataset
    asked, config = config, known_data(config, every)
    dataset, baselines = own_classes(config, every), config.baselines
    shape, budget = dataset.image_shape, _budget(config, dataset)
    codec = codecs.make(config.codec, **budget)
    stored.check(codec)
    if config.fit.to == "real" and not config.fit.initial_set:
        data.require_per_class(dataset, codec.images_per_class, "codec.images_per_class")
    if baselines.same_number:
        data.require_per_class(dataset, codec.images_per_class, "baselines.same_number")
    if baselines.compressed and shape[-1] not in (1, 3):
        raise ConfigError(f"baselines.compressed: expected images of 1 or 3 channels, found {shape[-1]}; say []")
    data.require_per_class(dataset, 1, "objective.batch_real")
    network = nets.build(config.network, shape, dataset.num_classes)
    config = dataclasses.replace(config, objective=match.resolved(config.objective, config.ipc))
    _objective(config, codec, network)
    if baselines.pixel:
        try:
            pixel = _filled(baselines.pixel_codec, dataset, budget)
            _objective(config, pixel, network)
            baselines = dataclasses.replace(baselines, pixel_codec=pixel.spec)
        except ValueError as error:
            raise ConfigError(
                f"baselines.pixel_codec: {str(error).removeprefix('codec.images_per_class: ')}; "
                f"raise ipc (found {config.ipc}) or set baselines.pixel=false"
            ) from error
    whole = AllClasses(every.fingerprint(), _block(config, every)) if config.subtasks > 1 else None
    # What cannot be fitted is refused at once.
    whiten.eval_shape(config.whiten, shape)
    fit, start = config.fit, None
    if fit.initial_set:
        start, digest = _initial(fit.initial_set, codec, dataset.class_names)
        if fit.initial_sha256 not in ("", digest):
            raise ConfigError(
                f"fit.initial_set: {fit.initial_set} holds another set (SHA-256 {digest}) than "
                f"fit.initial_sha256 names ({fit.initial_sha256})"
            )
        fit = dataclasses.replace(fit, initial_sha256=digest)
    config = dataclasses.replace(config, codec=codec.spec, baselines=baselines, fit=fit)
    tested, available = testset.check(config.evaluate, dataset), budget["bytes_per_class"]
    made = Experiment(config, dataset, available, codec, network, every.train_images, asked, tested, whole, start)
    _check_teacher(made)
    return made


def random_codec(experiment: Experiment) -> codecs.Codec:
    """Returns what random real images are stored in: the codec of the pixel baseline, of as many as fit unlabeled."""
    spec = dataclasses.replace(experiment.config.baselines.pixel_codec, images_per_class=0)
    return _filled(spec, experiment.dataset, _budget(experiment.config, experiment.dataset) | {"label_bytes": 0})


def _budget(config: RunConfig, dataset: data.Dataset) -> dict[str, Any]:
    return {
        "image_shape": dataset.image_shape,
        "num_classes": dataset.num_classes,
        "bytes_per_class": storage.budget_bytes(config.ipc, dataset.image_shape),
        "label_bytes": labels.nbytes(config.labels, 1, dataset.num_classes),
    }


def _filled(spec: codecs.CodecSpec, dataset: data.Dataset, budget: Mapping[str, Any]) -> codecs.Codec:
    """Builds a codec that starts from real images: of no more than each class has, where their number is open."""
    codec, most = codecs.make(spec, **budget), int(np.bincount(dataset.train_labels).min())
    if spec.images_per_class or codec.images_per_class <= most:
        return codec
    return codecs.make(dataclasses.replace(spec, images_per_class=most), **budget)


def _objective(config: RunConfig, codec: codecs.Codec, network: nets.Network) -> match.Objective:
    return match.make(config.objective, codec=codec, network=network, augment=config.augment, mmd=config.mmd)


def _initial(path: str, codec: codecs.Codec, class_names: tuple[str, ...]) -> tuple[Any, str]:
    """Reads the parameters of a set for a codec, float32 masters where it has some, and the set's fingerprint."""
    try:
        found = load(path)
        start = orbax_set.with_masters(path, found) if isinstance(found, synset.SynSet) else None
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"fit.initial_set: {error}") from error
    if start is None:
        raise ConfigError(
            f"fit.initial_set: {path} is a merged set; expected that of one run, such as one of its parts"
        )

    def described(one: codecs.Codec, names: tuple[str, ...]) -> dict[str, Any]:
        settings = {f"codec.{k}": value for k, value in vars(one.spec).items() if not k.startswith(one.spec.TRAINING)}
        return settings | {"image_shape": tuple(one.image_shape), "class_names": names}

    wanted, there = described(codec, class_names), described(start.codec, start.class_names)
    apart = [key for key in wanted | there if wanted.get(key) != there.get(key)]
    if apart:
        key = "codec.name" if "codec.name" in apart else apart[0]
        raise ConfigError(
            f"fit.initial_set: {path} has another {key} than this run: {there.get(key)}, expected {wanted.get(key)}"
        )
    return start.params, synset.fingerprint(found.parts)


def known_data(config: RunConfig, dataset: data.Dataset) -> RunConfig:
    """Returns the config with what its data turned out to be: all classes of both splits, by their content."""
    (*_, h, w, c), spec = dataset.image_shape, config.data
    known = dataclasses.replace(
        spec,
        # Images that are not square have no such side.
        resolution=spec.resolution or (h if h == w else 0),
        channels=spec.channels or c,  # type: ignore[arg-type]
        sha256=spec.sha256 or dataset.fingerprint(),
    )
    return dataclasses.replace(config, data=known)


def _check_start(config: RunConfig) -> None:
    """Refuses a start that would look at real images although the fit is asked not to, or cannot do without them."""
    if config.fit.to == "real" or config.fit.initial_set:
        return
    starts = config.codec.NOISE
    if not starts:
        raise ConfigError(
            f"fit.to: the {config.codec.name} codec starts from real images; expected real, found {config.fit.to!r}"
        )
    start = getattr(config.codec, "start", None)
    if start not in starts:
        raise ConfigError(
            f"codec.start: fit.to={config.fit.to} starts from noise; expected {' or '.join(starts)}, found {start!r}"
        )


def _check_teacher(experiment: Experiment) -> None:
    """Refuses teachers where there are none or too few."""
    config, spec = experiment.config, experiment.config.labels
    labels.check_learned(spec, experiment.objective(experiment.codec))
    if spec.kind == "hard" or spec.teacher != "experts":
        return
    if experiment.expert_window is None:
        raise ConfigError(
            f"labels.teacher: only objective.name=trajectory, or objective.networks=experts or interpolated, has "
            f"experts, found {config.objective.name!r}; expected train"
        )
    if spec.teachers > config.experts.count:
        raise ConfigError(
            f"labels.teachers: expected at most experts.count = {config.experts.count}, found {spec.teachers}"
        )


def hold_out(dataset: data.Dataset) -> data.Dataset:
    """Returns a dataset whose test set is the last tenth of each class's training images, taken out of them."""
    images, labels = dataset.train_images, dataset.train_labels
    held = np.zeros(len(labels), bool)
    for label in range(dataset.num_classes):
        own = np.flatnonzero(labels == label)
        held[own[len(own) - max(1, round(HELD_OUT * len(own))) :]] = True
    return dataset._replace(
        train_images=images[~held], train_labels=labels[~held], test_images=images[held], test_labels=labels[held]
    )


def real_images(experiment: Experiment, codec: codecs.Codec, *, purpose: str, how: str, index: int = 0) -> jax.Array:
    """Chooses real images for every image of a codec, class-major, as floats in [0,1]."""
    dataset = experiment.dataset
    chosen = fitting.select_images(
        experiment.key(purpose, index),
        dataset.train_labels,
        codec.images_per_class,
        how=how,
        num_classes=dataset.num_classes,
        features=embed(experiment, dataset.train_images) if how == "kmeans" else None,
    )
    return pixels.as_float(dataset.train_images[chosen])


def embed(experiment: Experiment, images: np.ndarray, batch: int = 500) -> np.ndarray:
    """Embeds real images with a randomly initialized network, for k-means."""
    network, whitening = experiment.network, experiment.whitening
    params = network.init(experiment.key("features"))
    features = jax.jit(lambda images, whitening: network.outputs(params, whitening(images))[1])
    batches = [pixels.as_float(images[i : i + batch]) for i in range(0, len(images), batch)]
    return np.concatenate([np.asarray(features(one, whitening)) for one in batches])


def arms(config: RunConfig) -> Sequence[str]:
    """Names the rows of the table of results, the distilled set first."""
    fitted = config.fit.to == "real" and config.codec.name != "pixel"
    wanted = {
        "distilled": True,
        "fit_only": config.baselines.fit_only and (bool(config.fit.initial_set) or fitted),
        "pixel": config.baselines.pixel and config.codec.name != "pixel",
        # Less than one of them in float32 is none.
        "random_real": config.baselines.random_real
        and (config.ipc >= 1 or config.baselines.pixel_codec != codecs.PixelSpec()),
        **{
            f"{select}_{format}": True
            for format in config.baselines.compressed
            for select in config.baselines.compressed_select
        },
        "same_number": config.baselines.same_number,
        "full_data": config.baselines.full_data,
    }
    return [name for name, on in wanted.items() if on]
