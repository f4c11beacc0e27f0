"""Membership inference: what a distilled set, and a network trained on it, tell about the images it was made from.

Two attacks, both with everything known but who the members are:

- on networks, LiRA (Carlini et al. 2022, "Membership Inference Attacks From First Principles", Algorithm 1): many
  shadow sets are made, each of a random half of the images; an image's confidence under a network is compared with its
  confidences under networks whose half it was in, and was not in;
- on the set itself: a member lies nearer to some image of the set than an image that was not used. With the other sets
  as shadows (Carlini et al. 2022, as above, with the distance in place of the confidence), images that lie near to any
  set, such as plain ones, do not count as found.

What counts is the worst case, not the average: how many members are found at 0.1 % and 1 % of false accusations.

A set that withstands these attacks is not private: another attack may find more, and neither distillation nor few
bytes bound what a set can tell. That takes differential privacy, see `gsdd_jax.uses.private`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax import nets, pixels
from gsdd_jax.errors import InputError, needing
from gsdd_jax.training import train_network
from gsdd_jax.uses import learning
from gsdd_jax.uses.summary import Learner

# Rates of false positives of which the true positives are reported.
RATES = (0.001, 0.01)
_LEAST_VARIANCE = 1e-12
# ``(key, images, labels) -> (images, labels)``: a training set made from members, a distilled one for instance.
Make = Callable[[jax.Array, np.ndarray, np.ndarray], tuple[Any, Any]]


class Attack(NamedTuple):
    """How well scores tell members from the rest.

    Attributes:
        auc: Area under the curve of true against false positives; 0.5 is guessing.
        tpr: True positives, in [0, 1], at each of ``RATES``; guessing finds as many as the rate.
    """

    auc: float
    tpr: tuple[float, ...]


class Neighbors(NamedTuple):
    """For each image of a set, the nearest ones of its class by Euclidean distance of pixels in [0,1]; each ``[n]``."""

    member: np.ndarray  # number of the nearest member
    member_distance: np.ndarray
    unused: np.ndarray  # number of the nearest image that was not used
    unused_distance: np.ndarray


class Audit(NamedTuple):
    """What the attacks found for one way of making sets.

    Attributes:
        networks: The attack on networks trained on the sets.
        sets: That on the sets' own images.
        accuracy: Of these networks on the images that were not used, one per set, in [0, 1].
        neighbors: Of the first set's images.
        images: The first set's images ``[n, h, w, c]``.
    """

    networks: Attack
    sets: Attack
    accuracy: tuple[float, ...]
    neighbors: Neighbors
    images: np.ndarray


def halves(seed: int, labels: np.ndarray, shadows: int) -> np.ndarray:
    """Draws the members of each shadow set: half of every class, so that all sets are of one size.

    Independently of the other sets: with every image in exactly half of them, those of the others would tell which
    images the one under attack has.

    Args:
        seed: Of the draw.
        labels: ``[n]``.
        shadows: Number of sets, at least 4.

    Returns:
        ``[shadows, n]`` bool.

    Raises:
        ValueError: Fewer sets, or a class of a single image.
    """
    if shadows < 4:
        raise InputError(f"shadows: expected a number >= 4, found {shadows}")
    rng = np.random.default_rng(seed)
    members = np.zeros((shadows, len(labels)), bool)
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        if count < 2:
            raise InputError(f"labels: class {label} has one image, expected at least two")
        for own in members:
            own[rng.permutation(np.flatnonzero(labels == label))[: count // 2]] = True
    return members


def confidence(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns ``log(p / (1 - p))`` of the probability ``p`` of the right class, ``[n]``, from logits ``[n, k]``.

    Nearly Gaussian over networks (Carlini et al. 2022, section IV-D), and computed without the loss of digits of ``1 -
    p``.
    """
    right = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    rest = jnp.where(jax.nn.one_hot(labels, logits.shape[1], dtype=bool), -jnp.inf, logits)
    return right - jax.nn.logsumexp(rest, axis=1)


def likelihood_ratio(statistics: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Scores how likely each image is a member of each set: LiRA, online, with the set under attack left out.

    Variances are pooled over images, which few shadow sets need (Carlini et al. 2022, section VI-C). Deviation: that of
    the estimated mean is added, so that an image with few values on one side is not taken for an exception.

    Args:
        statistics: ``[s, n]``, one number for each set and image, such as its confidence.
        members: ``[s, n]`` bool.

    Returns:
        ``[s, n]`` log ratios of the densities as a member and as none, NaN for an image that is not at least once each
        among the other sets.
    """
    score = np.zeros(statistics.shape)
    for target in range(len(statistics)):
        others = np.arange(len(statistics)) != target
        known, inside = np.asarray(statistics, np.float64)[others], members[others]
        for sign, mask in ((1, inside), (-1, ~inside)):
            values = np.where(mask, known, np.nan)
            with np.errstate(invalid="ignore", divide="ignore"):
                count = mask.sum(0)
                mean = np.nansum(values, 0) / count
                # A mean takes one degree of freedom.
                variance = np.nansum((values - mean) ** 2) / max(np.maximum(count - 1, 0).sum(), 1)
                # Members of a set of unaltered images are at distance 0 of it, all of them.
                variance = max(variance, _LEAST_VARIANCE) * (1 + 1 / count)
                score[target] -= sign * ((statistics[target] - mean) ** 2 / variance + np.log(variance)) / 2
    return score


def attack(scores: np.ndarray, members: np.ndarray) -> Attack:
    """Judges scores of any shape, higher for members; NaN ones are left out."""
    with needing("an audit needs scikit-learn", extra="full"):
        from sklearn import metrics  # slow to import

    known = ~np.isnan(scores)
    false, true, _ = metrics.roc_curve(members[known], scores[known], drop_intermediate=False)
    return Attack(float(metrics.auc(false, true)), tuple(float(true[false <= rate].max()) for rate in RATES))


def nearest(images: np.ndarray, labels: np.ndarray, pool: np.ndarray, pool_labels: np.ndarray) -> np.ndarray:
    """Returns Euclidean distances in [0,1] pixels between a set's images and those of a pool, within each class.

    Args:
        images: ``[n, h, w, c]`` in [0,1].
        labels: ``[n]`` int.
        pool: ``[m, h, w, c]`` in [0,1].
        pool_labels: ``[m]`` int.

    Returns:
        ``[n, m]`` float64, infinite between classes.
    """
    distance = np.full((len(images), len(pool)), np.inf)
    for label in np.unique(labels):
        own, there = np.flatnonzero(labels == label), np.flatnonzero(pool_labels == label)
        a, b = (np.float64(x).reshape(len(x), -1) for x in (images[own], pool[there]))
        for row, image in zip(own, a, strict=True):
            distance[row, there] = np.sqrt(((b - image) ** 2).sum(1))
    return distance


def audit(
    seed: int,
    images: np.ndarray,
    labels: np.ndarray,
    make: Make,
    *,
    learner: Learner,
    shadows: int = 16,
    on_set: Callable[[int], None] = lambda done: None,
) -> Audit:
    """Makes shadow sets of halves of the images, trains networks on each, and attacks both.

    Args:
        seed: Decides the halves and all else that is drawn.
        images: ``[n, h, w, c]`` uint8; no test images are needed, for half of them are unused each time.
        labels: ``[n]`` int.
        make: Makes a training set of members; equal shapes each time, so that training is compiled once.
        learner: What is trained on the sets, and how; the attack sees the mean confidence of as many networks for each
            set as its ``training.seeds`` says.
        shadows: Number of sets, at least 4.
        on_set: Called with the number of sets that are done.

    Returns:
        What the attacks found, each set being attacked with all others as shadows.
    """
    members, key, training = halves(seed, labels, shadows), jax.random.key(seed), learner.training
    network = nets.build(learner.network, images.shape[1:], int(labels.max()) + 1)
    shared: dict[str, Any] = {"network": network, "whitening": learner.whitening}
    pool, right = pixels.as_float(images), jnp.asarray(labels)
    confidences, distances, accuracies = [], [], []
    for index, own in enumerate(members):
        key_make, key_train = jax.random.split(jax.random.fold_in(key, index))
        made, targets = make(key_make, images[own], labels[own])
        each = []
        for key_network in jax.random.split(key_train, training.seeds):
            weights = train_network(key_network, made, targets, spec=training, augment=learner.augment, **shared)
            each.append(learning.outputs(weights, pool, **shared)[0])
        confidences.append(np.mean([confidence(logits, right) for logits in each], 0))
        accuracies.append(float(np.mean([(logits.argmax(1) == right)[~own].mean() for logits in each])))
        of_made = np.asarray(targets) if targets.ndim == 1 else np.asarray(targets).argmax(1)
        distance = nearest(np.asarray(pixels.as_float(made)), of_made, np.asarray(pool), labels)
        distances.append(distance.min(0))
        if index == 0:
            neighbors = Neighbors(*_neighbors(distance, own), *_neighbors(distance, ~own))
            shown = np.asarray(made)
        on_set(index + 1)
    networks, sets = (
        attack(likelihood_ratio(statistics, members), members)
        for statistics in (np.array(confidences), -np.array(distances))
    )
    return Audit(networks, sets, tuple(accuracies), neighbors, shown)


def _neighbors(distance: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    masked = np.where(among, distance, np.inf)
    return masked.argmin(1), masked.min(1)
