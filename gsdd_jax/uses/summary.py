"""How data become a part within a budget of bytes: distilled, fitted, or real images that are chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from typing_extensions import Doc

from gsdd_jax import api, codecs, nets
from gsdd_jax.augment import DsaSpec
from gsdd_jax.errors import InputError
from gsdd_jax.match import DistributionSpec
from gsdd_jax.schema import Registered
from gsdd_jax.training import EvalSpec
from gsdd_jax.uses import archive, learning, private
from gsdd_jax.uses.archive import Part, RealImages
from gsdd_jax.uses.learning import Pool
from gsdd_jax.whiten import Whitening

# What an archive holds of real images beside them: of pixels, and of files, which have sizes and share some bytes.
_RAW_OVERHEAD, _FILES_OVERHEAD = 512, 640
# What the key of a summary is folded with for private means.
_MEANS = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SummarySpec:
    """What data are kept or sent as."""

    title: Annotated[str, Doc("what tables call it")]
    codec: Annotated[
        Annotated[Any, Registered(codecs.SPECS)] | None,
        Doc("the parameterization; as many images as the budget holds if it leaves them open; null = real images"),
    ] = None
    budget: Annotated[int, Ge(0), Doc("bytes, in place of those that all others have; 0 = these")] = 0
    steps: Annotated[int, Ge(0), Doc("outer steps of distribution matching; 0 = fitted to real images only")] = 0
    fit_steps: Annotated[int, Ge(0), Doc("steps of the fit to random real images")] = 300
    batch_real: Annotated[int, Ge(1), Doc("real images per class and outer step")] = 64
    format: Annotated[archive.Format, Doc("of real images: their pixels, or lossy files")] = "webp"
    quality: Annotated[int, Ge(0), Le(100), Doc("of these files")] = 20
    select: Annotated[
        Literal["random", "herding"],
        Doc(
            "which real images: any, or those whose mean is nearest to that of all, as a network of these data sees it"
        ),
    ] = "random"
    epsilon: Annotated[
        float,
        Ge(0),
        Doc(
            "of differential privacy: nothing is used of the images but noisy means under random networks, see "
            "gsdd_jax.uses.private; 0 = no such promise"
        ),
    ] = 0.0
    delta: Annotated[float, Gt(0), Lt(1), Doc("of differential privacy")] = 1e-5
    private_networks: Annotated[int, Ge(1), Doc("random networks, under each of which means are taken once")] = 20

    def __post_init__(self) -> None:
        """Refuses what looks at images beside the noisy means."""
        if not self.epsilon:
            return
        if self.codec is None or not self.steps:
            raise InputError(f"epsilon: {self.title} needs a codec and steps >= 1; images themselves are not private")
        start, blind = getattr(self.codec, "start", "none"), self.codec.NOISE
        if self.fit_steps or start not in blind:
            raise InputError(
                f"epsilon: {self.title} begins at images; expected fit_steps 0 and codec.start of "
                f"{', '.join(blind) or 'another codec'}, found {self.fit_steps} and {start}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
    """What all networks of a use have in common.

    Attributes:
        network: The architecture.
        training: How it is trained.
        augment: DSA settings.
        whitening: What it sees images through, the same for all data, of which none is all there is.
    """

    network: nets.NetSpec
    training: EvalSpec
    augment: DsaSpec
    whitening: Whitening

    def train(
        self, key: jax.Array, params: Any, pools: tuple[Pool, ...], network: nets.Network, steps: int | None = None
    ) -> Any:
        """Trains a network of this architecture on, see `learning.train`."""
        return learning.train(
            key,
            params,
            pools,
            network=network,
            spec=self.training,
            augment=self.augment,
            whitening=self.whitening,
            steps=steps,
        )


def summarize(
    key: jax.Array,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    spec: SummarySpec,
    class_names: Sequence[str],
    budget: int,
    learner: Learner,
    objective: Any = None,
    network: Any = None,
    experts: Any = None,
) -> Part:
    """Makes a part of data within a budget.

    Args:
        key: Decides all that is drawn; consumed.
        images: ``[n, h, w, c]`` uint8.
        labels: Integers ``[n]``, each of the classes 0 to k - 1.
        spec: How.
        class_names: One per class.
        budget: Bytes that the part may add to a file.
        learner: Whose network matches, and herds.
        objective: In place of distribution matching.
        network: What matches, in place of the learner's.
        experts: What that objective is given, if it needs any.

    Raises:
        ValueError: The budget does not hold an image of each class; the message names it and what would do.
    """
    if spec.codec is None:
        return _real(key, images, labels, spec, class_names, budget, learner)
    names = sum(len(name.encode()) for name in class_names)
    room = budget - archive.OVERHEAD - names
    made = _codec(spec, images.shape[1:], len(class_names), room, budget)
    if spec.epsilon:
        objective, experts = private.OBJECTIVE, _private(key, images, labels, spec, len(class_names), learner)
        # What is distilled never sees them.
        images, labels = np.zeros_like(images[: len(class_names)]), np.arange(len(class_names))
    own = [np.flatnonzero(labels == label) for label in range(len(class_names))]
    # A class of fewer images than are distilled of it has them several times.
    index = np.concatenate([np.resize(one, max(len(one), made.images_per_class)) for one in own])
    images, labels = images[index], labels[index]
    shared: dict[str, Any] = {"codec": made, "class_names": class_names, "progress": False}
    if not spec.steps:
        return api.fit(key, images, labels, steps=spec.fit_steps, **shared)
    return api.distill(
        key,
        images,
        labels,
        objective=objective or DistributionSpec(batch_real=spec.batch_real, class_chunk=len(class_names)),
        network=network or learner.network,
        steps=spec.steps,
        fit_steps=spec.fit_steps,
        augment=learner.augment,
        whitening=learner.whitening,
        experts=experts,
        on_host=True,
        **shared,
    )


def _private(
    key: jax.Array, images: np.ndarray, labels: np.ndarray, spec: SummarySpec, classes: int, learner: Learner
) -> private.NoisyMeans:
    return private.noisy_means(
        jax.random.fold_in(key, _MEANS),
        images,
        labels,
        num_classes=classes,
        network=nets.build(learner.network, images.shape[1:], classes),
        whitening=learner.whitening,
        count=spec.private_networks,
        multiplier=private.noise_multiplier(spec.epsilon, spec.delta, spec.private_networks),
    )


def _codec(spec: Any, image_shape: tuple[int, ...], classes: int, room: int, budget: int) -> codecs.Codec:
    try:
        return codecs.make(
            spec.codec, image_shape=image_shape, num_classes=classes, bytes_per_class=max(room, 0) // classes
        )
    except ValueError as error:
        raise InputError(
            f"budget: {budget} bytes for {classes} classes, of which a set in a file has {max(room, 0)} left, are too "
            f"few for {spec.title}: {error}"
        ) from error


def _real(
    key: jax.Array,
    images: np.ndarray,
    labels: np.ndarray,
    spec: SummarySpec,
    class_names: Sequence[str],
    budget: int,
    learner: Learner,
) -> RealImages:
    classes = len(class_names)
    key_order, key_herd = jax.random.split(key)
    members = [np.flatnonzero(labels == label) for label in range(classes)]
    if spec.select == "herding":
        features = _features(key_herd, images, labels, classes, learner)
        orders = [map(own.__getitem__, herded(features[own])) for own in members]
    else:
        keys = jax.random.split(key_order, classes)
        orders = [
            iter(own[np.asarray(jax.random.permutation(k, len(own)))]) for k, own in zip(keys, members, strict=True)
        ]
    overhead = _RAW_OVERHEAD if spec.format == "raw" else _FILES_OVERHEAD
    room = budget - overhead - sum(len(name.encode()) for name in class_names)
    beside = 0 if spec.format == "raw" else 2  # its size
    taken: list[list[bytes]] = [[] for _ in orders]
    # The first of each class, then the second of each that has one, and so on, until one does not fit.
    turns = sorted((turn, label) for label, own in enumerate(members) for turn in range(len(own)))
    spent, shared = 0, set[bytes]()
    for _, label in turns:
        common, data = archive.encoded(images[next(orders[label])], spec.format, spec.quality)
        shared.add(common)
        if (spent := spent + len(data) + beside) > room - len(common):
            break
        taken[label].append(data)
    if empty := [name for name, own in zip(class_names, taken, strict=True) if not own]:
        raise InputError(
            f"budget: {budget} bytes are too few for {spec.title}: no image of class {empty[0]!r} fits "
            f"beside {overhead} bytes of names and sizes and the classes before"
        )
    if len(shared) > 1:
        raise InputError(f"{spec.title}: files of {spec.format} differ in what all should share")
    files = [data for own in taken for data in own]
    return RealImages(
        format=spec.format,
        image_shape=tuple(images.shape[1:]),
        class_names=tuple(class_names),
        counts=tuple(map(len, taken)),
        shared=np.frombuffer(shared.pop(), np.uint8),
        sizes=np.array([len(data) for data in files], np.uint16),
        data=np.frombuffer(b"".join(files), np.uint8),
    )


def _features(key: jax.Array, images: np.ndarray, labels: np.ndarray, classes: int, learner: Learner) -> np.ndarray:
    """Returns the features ``[n, f]`` of a network that was trained on these images."""
    key_init, key_train = jax.random.split(key)
    network = nets.build(learner.network, images.shape[1:], classes)
    params = learner.train(key_train, network.init(key_init), (learning.pool(images, labels),), network)
    return np.asarray(learning.outputs(params, jnp.asarray(images), learner.whitening, network=network)[1])


def herded(features: np.ndarray) -> Iterator[int]:
    """Yields all rows ``[n, f]`` in an order in which the mean of the first ``m`` is near that of all, for every ``m``.

    Source: iCaRL (Rebuffi et al. 2017, algorithm 4), on features of length 1.
    """
    rows = features.astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    mean, total = rows.mean(0), np.zeros(rows.shape[1])
    left = np.ones(len(rows), bool)
    for m in range(1, len(rows) + 1):
        # || mean - (total + row) / m ||^2, less what all rows share.
        away = (2 / m) * rows @ (total / m - mean) + (rows**2).sum(1) / m**2
        chosen = int(np.where(left, away, np.inf).argmin())
        left[chosen] = False
        total += rows[chosen]
        yield chosen
