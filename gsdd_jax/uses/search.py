"""Architecture search: does a small set rank architectures as all data do, and at which part of the time?

Each architecture of a grid is trained on the set, and on all training images; what counts is how well the two rankings
agree, among the best most of all, and how good the architecture is that the set finds. Beside the set stand what a
sceptic would do instead: random real images of as many bytes, and all images for as many steps. And the ceiling: all
images once more, by other weights and batches, whose ranking is not the same either.

Protocol after DC (Zhao et al. 2021, section 4.4): 720 ConvNets, each trained on the proxy and on all data, Spearman's
correlation over the best by all data. Deviations: fewer architectures; no batch normalization, see `gsdd_jax.nets`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import jax
import numpy as np
from annotated_types import Ge, MinLen
from typing_extensions import Doc

from gsdd_jax import nets
from gsdd_jax.errors import InputError
from gsdd_jax.uses import learning
from gsdd_jax.uses.summary import Learner


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridSpec:
    """The architectures: every ConvNet of these settings."""

    depth: Annotated[tuple[Annotated[int, Ge(1)], ...], MinLen(1)] = (1, 2, 3)
    width: Annotated[tuple[Annotated[int, Ge(1)], ...], MinLen(1)] = (16, 32)
    norm: Annotated[tuple[Literal["instance", "layer", "none"], ...], MinLen(1)] = ("instance", "none")
    activation: Annotated[tuple[Literal["relu", "leaky_relu", "sigmoid"], ...], MinLen(1)] = ("relu", "sigmoid")
    pooling: Annotated[tuple[Literal["average", "max", "none"], ...], MinLen(1)] = ("average", "max")
    most: Annotated[int, Ge(0), Doc("Architectures to draw of these, the same for all seeds; 0 = all.")] = 0

    def networks(self) -> list[nets.NetSpec]:
        """Returns the architectures, in the order of the settings.

        Raises:
            ValueError: Fewer than three, of which no ranking can be told.
        """
        keys = ("depth", "width", "norm", "activation", "pooling")
        found = [
            nets.NetSpec(**dict(zip(keys, values, strict=True)))
            for values in itertools.product(*(getattr(self, key) for key in keys))
        ]
        if self.most:
            drawn = np.random.default_rng(0).permutation(len(found))[: self.most]
            found = [found[i] for i in sorted(drawn)]
        if len(found) < 3:
            raise InputError(f"grid: expected three architectures or more to rank, found {len(found)}")
        return found


class Trained(NamedTuple):
    """An architecture that was trained and tested."""

    accuracy: float  # on the test images, in [0, 1]
    seconds: float  # of the training, without compilation


def train(
    key: jax.Array,
    network: nets.NetSpec,
    pool: learning.Pool,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    *,
    learner: Learner,
    steps: int,
    clock: Callable[[], float],
) -> Trained:
    """Trains an architecture and tests it.

    Args:
        key: Decides weights, batches and augmentations; consumed.
        network: The architecture.
        pool: What it learns from, images of every class; pools of equal shapes are compiled once.
        test_images: ``[n, h, w, c]``.
        test_labels: ``[n]``.
        learner: How; its own network is not used.
        steps: As in `learning.train`: fewer than ``learner.training.steps`` stop early.
        clock: Tells the seconds, such as `time.process_time`.
    """
    classes = int(np.asarray(pool.labels).max()) + 1
    net = nets.build(network, test_images.shape[1:], classes)
    key_init, key_train = jax.random.split(key)
    params = net.init(key_init)
    jax.block_until_ready(learner.train(key_train, params, (pool,), net, 0))  # compiles
    begin = clock()
    params = jax.block_until_ready(learner.train(key_train, params, (pool,), net, steps))
    seconds = clock() - begin
    found = learning.predictions(params, test_images, np.arange(classes), network=net, whitening=learner.whitening)
    return Trained(float((found == test_labels).mean()), seconds)


class Agreement(NamedTuple):
    """How well a ranking agrees with that of all data.

    Attributes:
        spearman: Rank correlation over all architectures, in [-1, 1]; NaN where one side cannot tell any two apart.
        top: The same over the best ones by all data.
        found: Accuracy by all data of the architecture that the ranking puts first; of several, their mean.
    """

    spearman: float
    top: float
    found: float


def agreement(proxy: Sequence[float], truth: Sequence[float], top: int) -> Agreement:
    """Compares accuracies of architectures trained on a proxy with those trained on all data.

    Args:
        proxy: One per architecture.
        truth: As many.
        top: How many of the best by ``truth`` count for ``Agreement.top``, at least 3.

    Raises:
        ValueError: Lengths that differ, or a ``top`` outside 3 to the number of architectures.
    """
    by_proxy, by_truth = np.asarray(proxy, np.float64), np.asarray(truth, np.float64)
    if by_proxy.shape != by_truth.shape or by_truth.ndim != 1:
        raise InputError(f"proxy: expected {list(by_truth.shape)} accuracies, found {list(by_proxy.shape)}")
    if not 3 <= top <= len(by_truth):
        raise InputError(f"top: expected 3 to {len(by_truth)}, the number of architectures; found {top}")
    best = np.argsort(-by_truth, kind="stable")[:top]
    return Agreement(
        _spearman(by_proxy, by_truth),
        _spearman(by_proxy[best], by_truth[best]),
        float(by_truth[by_proxy == by_proxy.max()].mean()),
    )


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    from scipy import stats  # slow to import

    return float("nan") if np.ptp(a) == 0 or np.ptp(b) == 0 else float(stats.spearmanr(a, b).statistic)
