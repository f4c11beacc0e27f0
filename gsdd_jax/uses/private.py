"""Distillation under differential privacy: of the images, nothing is used but noisy means of features.

Networks are random, so that they say nothing of the data. Under each, every class has the mean of its images' features,
all of length 1, and Gaussian noise is added to it. The set is then matched to these means, as often as one likes, and
whatever is made of them is as private as they are (Dwork & Roth 2014, proposition 2.1).

The promise is of one image more or less: ``(epsilon, delta)`` bounds how much likelier any set becomes by it. How many
images each class has is taken to be known. Noise is pseudo-random, from the entropy of the operating system and not
from the seed of an experiment, with which anyone could subtract it; attacks on the last bits of floating-point numbers
(Mironov 2012) are not considered.

After DP-MERF (Harder et al. 2021), whose features are random Fourier ones, and DM (Zhao & Bilen 2023).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax.errors import InputError, needing
from gsdd_jax.match import DistributionSpec
from gsdd_jax.match.trajectory import flattener
from gsdd_jax.nets import Network
from gsdd_jax.uses import learning
from gsdd_jax.whiten import Whitening

# Matching the means: whole features of length 1, as they were averaged.
OBJECTIVE = DistributionSpec(networks="experts", expert_epochs=1, draws=1, augment=False, normalize=True)


@dataclasses.dataclass(frozen=True)
class NoisyMeans:
    """Random networks and the noisy means of all images under each, in the place of experts.

    Attributes:
        weights: Flat weights ``[m, p]`` of the networks.
        means: ``[m, k, f]``: of the features of every class.
    """

    weights: np.ndarray
    means: np.ndarray

    @property
    def count(self) -> int:
        """How many networks there are."""
        return len(self.weights)

    def row(self, expert: int, epoch: int) -> np.ndarray:
        """Returns the weights ``[p]`` of a network, which has one epoch."""
        del epoch
        return self.weights[expert]


def noise_multiplier(epsilon: float, delta: float, queries: int) -> float:
    """Returns the standard deviation of the noise, in units of what one image can change, for so many queries.

    Args:
        epsilon: > 0.
        delta: In (0, 1).
        queries: Of the Gaussian mechanism, one after the other.

    Raises:
        ValueError: Numbers out of these ranges.
        ImportError: The library that accounts for them is missing.
    """
    if not (epsilon > 0 and 0 < delta < 1 and queries >= 1):
        raise InputError(
            f"epsilon, delta, queries: expected more than 0, between 0 and 1, and at least 1; found {epsilon:g}, "
            f"{delta:g} and {queries}"
        )
    with needing("epsilon needs dp-accounting", extra="private"):
        from dp_accounting.pld import accountant, common
    return float(accountant.get_smallest_gaussian_noise(common.DifferentialPrivacyParameters(epsilon, delta), queries))


def noisy_means(
    key: jax.Array,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    network: Network,
    whitening: Whitening,
    count: int,
    multiplier: float,
    rng: np.random.Generator | None = None,
) -> NoisyMeans:
    """Averages the features of all images of each class under random networks, and adds noise.

    An image is in the mean of one class under each network, which it changes by a vector no longer than 1 / n.

    Args:
        key: Decides the networks; consumed.
        images: ``[n, h, w, c]`` uint8.
        labels: Integers ``[n]``, each of the classes 0 to k - 1.
        num_classes: ``k``.
        network: Whose features.
        whitening: What it sees images through; constants, not statistics of these images.
        count: Networks.
        multiplier: Of the noise, from `noise_multiplier` for as many queries.
        rng: Of the noise, for tests; one that nobody knows if None.

    Returns:
        The networks and their means.
    """
    rng = rng or np.random.default_rng()
    flatten = flattener(network)[0]
    sizes = np.bincount(labels, minlength=num_classes)
    weights, means = [], []
    for number in range(count):
        params = network.init(jax.random.fold_in(key, number))
        features = np.asarray(learning.outputs(params, jnp.asarray(images), whitening, network=network)[1], np.float64)
        features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        sums: Any = np.zeros((num_classes, features.shape[1]))
        np.add.at(sums, labels, features)
        sums += multiplier * rng.standard_normal(sums.shape)
        means.append((sums / sizes[:, None]).astype(np.float32))
        weights.append(np.asarray(flatten(params)))
    return NoisyMeans(np.stack(weights), np.stack(means))
