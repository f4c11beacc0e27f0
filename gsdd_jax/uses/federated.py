"""Federated learning in which sets travel: clients send what they distill, and the server trains on all of it.

In one round, a client needs nothing of the server, and neither knows the other's network. In several (FedDM, Xiong et
al. 2023), clients match around the network that the server sends. Beside them FedAvg (McMahan et al. 2017), where
weights travel. Messages are files, see `gsdd_jax.uses.archive`. One that is damaged, or none of this federation, is
refused, and the round goes on without it; wrong images in good form are not noticed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge
from typing_extensions import Doc

from gsdd_jax import files, nets
from gsdd_jax.data import Dataset
from gsdd_jax.errors import InputError
from gsdd_jax.match import DistributionSpec
from gsdd_jax.match.trajectory import flattener
from gsdd_jax.nets import NetSpec, Network
from gsdd_jax.synset import SynSet
from gsdd_jax.uses import archive, learning
from gsdd_jax.uses.summary import Learner, SummarySpec, summarize

# Floating-point operations of a training step over those of a forward pass.
_STEP = 3
# Decoded images stay around [0, 1]; what is far from it would only lead the server's network astray.
_LARGEST = 10.0


def dirichlet_split(seed: int, labels: np.ndarray, clients: int, alpha: float) -> list[np.ndarray]:
    """Deals the images of every class to clients, in shares from a Dirichlet distribution.

    Source: Hsu et al. 2019, in the form in which DENSE and FedDM draw it, class by class.

    Args:
        seed: Of the draw.
        labels: Integers ``[n]``.
        clients: How many.
        alpha: Concentration: 0.1 leaves a client few classes, 100 a fair share of each.

    Returns:
        The indices of each client, rising; every image has one client, and a client may have none.
    """
    if clients < 1 or not alpha > 0:
        raise InputError(f"clients and alpha: expected at least 1 and more than 0, found {clients} and {alpha}")
    rng = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(clients, alpha))
        ends = np.floor(np.cumsum(shares)[:-1] * len(own)).astype(int)
        for part, indices in zip(parts, np.split(own, ends), strict=True):
            part.append(indices)
    return [np.sort(np.concatenate(part)) for part in parts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetSpec(SummarySpec):
    """Sets or real images that travel."""

    rounds: Annotated[
        int, Ge(1), Doc("that share the budget; beyond one, sets are matched around the server's network (FedDM)")
    ] = 1
    radius: Annotated[float, Ge(0), Doc("of the ball around it that networks are drawn from (FedDM: 5)")] = 5.0

    def __post_init__(self) -> None:
        """Refuses several rounds of private sets, each of which would spend epsilon again."""
        super().__post_init__()
        if self.epsilon and self.rounds > 1:
            raise InputError(f"epsilon: {self.title} is sent in {self.rounds} rounds; expected rounds 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AverageSpec:
    """Weights that travel, float32, and are averaged: FedAvg."""

    title: Annotated[str, Doc("what tables call it")]
    network: Annotated[NetSpec | None, Doc("in place of the first of the federation")] = None
    rounds: Annotated[int, Ge(1), Doc("in each of which all clients train")] = 20
    epochs: Annotated[int, Ge(1), Doc("over a client's images in each round")] = 5


@dataclasses.dataclass(frozen=True)
class Neighbors:
    """The networks around one, in the place of experts.

    Source: FedDM, section 3.3: they lie in a ball around the weights. Deviation: directions are uniform and distances
    too, where the reference cuts off normal ones.

    Attributes:
        weights: Flat weights ``[p]`` in the middle.
        radius: Of the ball.
        seed: Of the directions.
        count: How many there are; a step draws one of them.
    """

    weights: np.ndarray
    radius: float
    seed: int
    count: int = 1 << 20

    def row(self, expert: int, epoch: int) -> np.ndarray:
        """Returns the weights of one of them."""
        rng = np.random.default_rng((self.seed, expert, epoch))
        away = rng.standard_normal(len(self.weights), np.float32)
        return self.weights + np.float32(self.radius * rng.uniform() / np.linalg.norm(away)) * away


@lru_cache(maxsize=64)
def _of_client(network: Network, own: tuple[int, ...]) -> Network:
    """Returns the server's network as one of a client's classes; its features hold all logits, which FedDM matches."""

    def apply(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, features = network.apply(params, images)
        return logits[:, jnp.array(own)], jnp.concatenate([features.reshape(len(images), -1), logits], 1)

    return Network(network.init, apply, network.num_params)


class Served(NamedTuple):
    """What a round gives.

    Attributes:
        weights: Flat weights ``[p]`` of the server's first network.
        accuracies: Of each of its networks on the test images, in [0, 1].
        refused: Why a client's message counts for nothing, by client.
    """

    weights: np.ndarray
    accuracies: tuple[float, ...]
    refused: dict[int, str]


class Round(NamedTuple):
    """What a round gives, and what it takes of a client.

    Attributes:
        served: By the server.
        up: Bytes of the largest message to the server.
        down: Bytes of the message from it.
        passes: Images that a client's network sees, those thrice that it or they are trained on: the mean of clients.
    """

    served: Served
    up: int
    down: int
    passes: float


@dataclasses.dataclass(frozen=True)
class Federation:
    """What clients and server have agreed on.

    Attributes:
        spec: What travels.
        learners: A client's network is one of these, in turn. The server trains all of them, but the first alone where
            networks travel too.
        class_names: Of all classes.
        image_shape: (h, w, c).
        budget: Bytes of a client's messages of all rounds, but for weights.
    """

    spec: SetSpec | AverageSpec
    learners: tuple[Learner, ...]
    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]
    budget: int

    def network(self, learner: Learner) -> Network:
        """Returns a learner's network for all classes."""
        return nets.build(learner.network, self.image_shape, len(self.class_names))

    @property
    def server_sends(self) -> bool:
        """Whether clients begin each round with the server's network."""
        return isinstance(self.spec, AverageSpec) or self.spec.rounds > 1

    def learner(self, client: int) -> Learner:
        """Returns what a client's network is."""
        return self.learners[0 if self.server_sends else client % len(self.learners)]

    @property
    def share(self) -> int:
        """Bytes of a message."""
        return 0 if isinstance(self.spec, AverageSpec) else (self.spec.budget or self.budget) // self.spec.rounds

    def send(
        self, key: jax.Array, client: int, path: Path, images: np.ndarray, labels: np.ndarray, weights: np.ndarray
    ) -> int:
        """Writes the message of a client about its own data: the classes that it has, or a network trained on them.

        Args:
            key: Decides all that is drawn; consumed.
            client: Its number.
            path: The file; it is made anew.
            images: ``[n, h, w, c]`` uint8.
            labels: Integers ``[n]`` among all classes.
            weights: Of the server's network, flat; unused where none is sent.

        Returns:
            Images that its network sees, see `Round.passes`.

        Raises:
            ValueError: A client without images, or a budget that is too small.
        """
        if not len(images):
            raise InputError(f"client {client}: expected at least one image of its own, found none")
        learner = self.learner(client)
        if isinstance(self.spec, AverageSpec):
            network = self.network(learner)
            flatten, unflatten = flattener(network)
            # One program for clients of any size.
            constant = dataclasses.replace(learner.training, schedule="constant", warmup_steps=0, steps=1 << 20)
            steps = -(-self.spec.epochs * len(images) // constant.batch)
            local, pools = dataclasses.replace(learner, training=constant), (learning.pool(images, labels),)
            params = local.train(key, unflatten(jnp.asarray(weights)), pools, network, steps)
            archive.write_weights(path, flatten(params))
            return _STEP * self.spec.epochs * len(images)
        own = tuple(np.unique(labels).tolist())
        matching: dict[str, Any] = {}
        if self.server_sends:
            seed = int(jax.random.bits(jax.random.fold_in(key, 1), (), jnp.uint32))
            around = Neighbors(weights, self.spec.radius, seed)
            objective = DistributionSpec(
                batch_real=self.spec.batch_real, class_chunk=len(own), networks="experts", expert_epochs=1
            )
            matching = {"network": _of_client(self.network(learner), own), "objective": objective, "experts": around}
        part = summarize(
            key,
            images,
            np.searchsorted(own, labels),
            spec=self.spec,
            class_names=[self.class_names[label] for label in own],
            budget=self.share,
            learner=learner,
            **matching,
        )
        path.unlink(missing_ok=True)
        if (size := archive.append(path, part)) > self.share:
            raise InputError(
                f"budget: the message of {self.spec.title} has {size} bytes, expected at most {self.share}"
            )
        if self.spec.codec is not None:
            return self.spec.steps * (self.spec.batch_real * len(own) + _STEP * len(part.labels))
        return _STEP * learner.training.steps * learner.training.batch * (self.spec.select == "herding")

    def read(self, path: Path) -> Any:
        """Reads a message, which anyone may have written: weights, or images and their labels among all classes.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged, or larger or something else than was agreed; the message names the file.
        """
        if isinstance(self.spec, AverageSpec):
            return archive.read_weights(path, self.network(self.learners[0]).num_params)
        parts = archive.read(path, most_bytes=self.share)
        try:
            # Before anything is decoded: other codecs may take any time.
            found = [_described(part) for part in parts]
            expected = [(self.spec.codec.name if self.spec.codec else self.spec.format, self.image_shape)]
            if found != expected:
                raise InputError(f"expected one part, {expected[0]}; found {found}")
            images, labels = archive.labeled(parts[0], self.class_names)
            # Written so that NaN is refused.
            if images.dtype != np.uint8 and not (np.abs(images) <= _LARGEST).all():
                raise InputError(f"images: expected numbers around 0 to 1, found some beyond {_LARGEST:g}")
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error
        return images, labels

    def receive(self, messages: Mapping[int, Path]) -> tuple[dict[int, Any], dict[int, str]]:
        """Reads the messages of a round, each on its own; returns those that are good, and why others are not.

        Raises:
            ValueError: None of them is any good; all reasons are named.
        """
        good, refused = {}, {}
        for client, path in messages.items():
            try:
                good[client] = self.read(path)
            except FileNotFoundError:
                refused[client] = "no message"
            except ValueError as error:
                refused[client] = str(error)
        if not good:
            why = "; ".join(f"client {client}: {reason}" for client, reason in refused.items())
            raise InputError(f"round: expected a message of at least one client, found none: {why}")
        return good, refused

    def serve(
        self,
        key_data: np.ndarray,
        messages: Mapping[int, Path],
        counts: Mapping[int, int],
        weights: np.ndarray,
        test_images: np.ndarray,
        test_labels: np.ndarray,
    ) -> Served:
        """Does the server's part of a round, in any process: reads, learns or averages, and is tested.

        Args:
            key_data: Of the key that decides all that is drawn.
            messages: Files by client; one that is not there is missing.
            counts: Images of each client, by which FedAvg weighs it.
            weights: Of the server's network before the round, flat.
            test_images: ``[n, h, w, c]`` uint8.
            test_labels: Integers ``[n]``.

        Raises:
            ValueError: As `receive`.
        """
        good, refused = self.receive(messages)
        learners = self.learners[:1] if self.server_sends else self.learners
        key_init, key_train = jax.random.split(jax.random.wrap_key_data(jnp.asarray(key_data)))
        found, accuracies = [], []
        for learner in learners:
            network = self.network(learner)
            flatten, unflatten = flattener(network)
            if isinstance(self.spec, AverageSpec):
                params = unflatten(jnp.asarray(average(good, counts)))
            else:
                begin = unflatten(jnp.asarray(weights)) if self.server_sends else network.init(key_init)
                params = learner.train(key_train, begin, (learning.joined(list(good.values())),), network)
            classes = np.arange(len(self.class_names))
            guesses = learning.predictions(params, test_images, classes, network=network, whitening=learner.whitening)
            accuracies.append(float((guesses == test_labels).mean()))
            found.append(np.asarray(flatten(params)))
        return Served(found[0], tuple(accuracies), refused)


def rounds(
    key: jax.Array,
    federation: Federation,
    dataset: Dataset,
    split: Sequence[np.ndarray],
    folder: Path,
    *,
    missing: Collection[int] = (),
    damaged: Collection[int] = (),
    serve: Callable[..., Served] | None = None,
) -> Iterator[Round]:
    """Lets clients and a server work, and yields how each round went.

    Args:
        key: Decides all that is drawn; consumed.
        federation: What they have agreed on.
        dataset: All images.
        split: Of each client, the indices of its training images; a client without any sends nothing.
        folder: Of the messages, in a folder for each round.
        missing: Clients that send nothing.
        damaged: Clients half of whose message arrives.
        serve: `Federation.serve` of the federation, maybe in another process; it itself if None.

    Raises:
        ValueError: As `Federation.send` and `Federation.receive`.
    """
    serve = serve or federation.serve
    first = federation.network(federation.learners[0])
    weights = np.asarray(flattener(first)[0](first.init(key)))
    for number in range(federation.spec.rounds):
        key_round, place = jax.random.fold_in(key, number + 1), folder / f"round{number}"
        place.mkdir(parents=True, exist_ok=True)
        down = 0
        if federation.server_sends:
            down = archive.write_weights(place / "server", weights)
            weights = archive.read_weights(place / "server", first.num_params)
        messages = {client: place / f"client{client}" for client in range(len(split))}
        passes = []
        for client, own in enumerate(split):
            messages[client].unlink(missing_ok=True)
            if client in missing or not len(own):
                continue
            data = dataset.train_images[own], dataset.train_labels[own]
            passes.append(
                federation.send(jax.random.fold_in(key_round, client), client, messages[client], *data, weights)
            )
        up = max((path.stat().st_size for path in messages.values() if path.exists()), default=0)
        for path in [messages[client] for client in damaged if messages[client].exists()]:
            files.write_bytes(path, path.read_bytes()[: path.stat().st_size // 2])
        served = serve(
            np.asarray(jax.random.key_data(key_round)),
            messages,
            {client: len(own) for client, own in enumerate(split)},
            weights,
            dataset.test_images,
            dataset.test_labels,
        )
        weights = served.weights
        yield Round(served, up, down, float(np.mean(passes)))


def _described(part: archive.Part) -> tuple[str, tuple[int, ...]]:
    if isinstance(part, SynSet):
        return part.codec.name, tuple(part.codec.image_shape)
    return part.format, tuple(part.image_shape)


def average(weights: Mapping[int, np.ndarray], counts: Mapping[int, int]) -> np.ndarray:
    """Returns the mean of clients' weights ``[p]``, each as often as the client has images (FedAvg)."""
    shares = np.array([counts[client] for client in weights], np.float64)
    return np.asarray(shares / shares.sum() @ np.stack(list(weights.values())), np.float32)
