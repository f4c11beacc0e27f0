"""Evaluation: train fresh networks on a set of images, test each once, at its end.

What a distilled set is worth is the test accuracy of networks that saw nothing else. No function here looks at test
images before training is over, none keeps the best of several tests, and a learning rate is chosen on held-out
training images or not at all. Training itself is in `gsdd_jax.training`.
"""

import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gsdd_jax.augment import DsaSpec
from gsdd_jax.errors import InputError
from gsdd_jax.nets import Network
from gsdd_jax.training import (
    EvalSpec,
    check_images,
    inputs,
    lr_factor,
    optimizer,
    rate_of,
    stream_batch,
    stream_start,
    train_network,
)
from gsdd_jax.whiten import Whitening

__all__ = [
    "EvalSpec",
    "Tested",
    "accuracy",
    "choose_lr",
    "evaluate_networks",
    "lr_factor",
    "optimizer",
    "stream_batch",
    "stream_start",
    "summarize",
    "summarize_classes",
    "train_network",
]

# Images per pass of a test, and the side above which there are fewer: at 128 px one activation of ResNet18 has 2 GB.
_TEST_BATCH = 500
_TEST_SIDE = 128


class Tested(NamedTuple):
    """What a test found of each of ``s`` networks."""

    accuracies: jax.Array  # float32 [s], over all test images; NaN where a network diverged
    hits: jax.Array  # int32 [s, k], test images of each class that were classified correctly


def accuracy(
    params: Any,
    images: jax.Array,
    labels: jax.Array,
    *,
    network: Network,
    whitening: Whitening | None = None,
    batch: int = _TEST_BATCH,
) -> jax.Array:
    """Returns the share of images that a network classifies correctly.

    Args:
        params: weights of the network.
        images: [n, h, w, c], uint8 or floating point; with a `whitening` real ones in [0,1], without one whatever the
            network sees.
        labels: int [n].
        network: the network.
        whitening: as in `train_network`.
        batch: images per pass, bounds the memory.

    Returns:
        float32 scalar in [0, 1], on the device; NaN if a logit is not finite, because then the weights have diverged
        and argmax would turn that into the accuracy of a guess.

    Raises:
        ValueError: as `train_network`, or a batch below 1.
        TypeError: as `train_network`.
    """
    check_images(images, labels, "", real=whitening is not None)
    if batch < 1:
        raise InputError(f"batch: {batch}, must be at least 1")
    return _test(params, images, labels, whitening, network=network, batch=batch).accuracies


def evaluate_networks(
    keys: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    test_images: jax.Array,
    test_labels: jax.Array,
    *,
    network: Network,
    spec: EvalSpec,
    augment: DsaSpec,
    whitening: Whitening | None = None,
    lr: jax.Array | float | None = None,
) -> Tested:
    """Trains one network per key and tests each once, after its last step, class by class.

    Networks are trained one after the other or, `spec.parallel` at a time, under one `vmap`. The results agree up to
    rounding. On CPU nothing is gained by more than one (ConvNetD3, 32 px: 140 against 129 images per CPU second).
    A last group that is smaller is compiled anew.

    Args:
        keys: [s] PRNG keys, one per network; for instance `jax.random.split(key, spec.seeds)`.
        images: training images, as in `train_network`.
        labels: int [n], or soft ones, float [n, k].
        test_images: [n', h, w, c], as the images of `accuracy`.
        test_labels: int [n'].
        network: as in `train_network`, like all up to `lr`.
        spec: as there; its `seeds` has no effect, the number of keys counts.
        augment: as there.
        whitening: as there; applied to the test images, too.
        lr: as there.

    Returns:
        Accuracies in [0, 1], and how many test images of each class were classified correctly.

    Raises:
        ValueError: as `train_network`, for the test set too, or keys that are not [s].
        TypeError: as `train_network`.
    """
    check_images(images, labels, "", soft=True)
    check_images(test_images, test_labels, "test_", real=whitening is not None)
    if keys.ndim != 1 or keys.shape[0] < 1:
        raise InputError(f"keys: shape {keys.shape}, must be [s] with s at least 1")
    pixels = math.prod(test_images.shape[1:-1])
    batch = max(1, min(_TEST_BATCH, _TEST_BATCH * _TEST_SIDE**2 // pixels))
    data = jax.tree.map(jnp.asarray, (images, labels, whitening, rate_of(lr, spec)))
    held_out = jax.tree.map(jnp.asarray, (test_images, test_labels, whitening))
    train = partial(_train_group, network=network, spec=spec.static(), augment=augment)
    test = partial(_test_group, network=network, batch=batch)
    # A call per group, not one loop in one program: any number of keys runs the same executables. Two of them, so that
    # training sets of all sizes share the test, and validation and test images share the training.
    groups = [keys[first : first + spec.parallel] for first in range(0, keys.shape[0], spec.parallel)]
    found = [test(train(group, *data), *held_out) for group in groups]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)


def choose_lr(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    valid_images: jax.Array,
    valid_labels: jax.Array,
    lrs: Sequence[float],
    *,
    networks: int = 1,
    **settings: Any,
) -> tuple[float, dict[float, float]]:
    """Picks the learning rate that does best on held-out images, which must not be test images.

    Every rate gets the same keys, and all rates run the same executable.

    Args:
        key: consumed.
        images: training images, as in `train_network`.
        labels: int [n].
        valid_images: [n', h, w, c], real training images that took no part in making `images`.
        valid_labels: int [n'].
        lrs: candidates; of equals, the first wins. One with which a network diverges is out.
        networks: how many networks vote on each.
        **settings: as in `evaluate_networks`, without `lr`.

    Returns:
        The rate, and the mean accuracy of each candidate, NaN where a network diverged.

    Raises:
        ValueError: no candidates or one that is not positive, `networks` below 1, networks that diverge with every
            candidate, or as `evaluate_networks`.
        TypeError: as `evaluate`.
    """
    if not lrs or min(lrs) <= 0:
        raise InputError(f"lrs: {list(lrs)}, must be one or more positive numbers")
    if networks < 1:
        raise InputError(f"networks: {networks}, must be at least 1")
    keys = jax.random.split(key, networks)
    table = {
        float(lr): float(
            evaluate_networks(keys, images, labels, valid_images, valid_labels, lr=lr, **settings).accuracies.mean()
        )
        for lr in lrs
    }
    sound = [lr for lr in table if math.isfinite(table[lr])]
    if not sound:
        raise InputError(f"lrs: {list(lrs)}, networks diverge with each of them; lower rates are needed")
    return max(sound, key=lambda lr: table[lr]), table


def summarize(accuracies: Sequence[float] | jax.Array, seeds: Sequence[int]) -> dict[str, Any]:
    """Sums up accuracies as plain Python values, ready for JSON.

    Args:
        accuracies: one per network.
        seeds: the seeds they came from, as many.

    Returns:
        "mean"; "std", of the sample (n - 1), 0 if n = 1; "n"; "seeds". Mean and std are NaN if a network diverged.

    Raises:
        ValueError: no accuracies, or not one per seed.
    """
    values = [float(value) for value in accuracies]
    if not values or len(values) != len(seeds):
        raise InputError(
            f"accuracies: {len(values)} of them, must be at least 1 and one per seed; seeds: {list(seeds)}"
        )
    mean, std = statistics.fmean(values), 0.0
    if not math.isfinite(mean):
        std = math.nan  # stdev() fails on NaN
    elif len(values) > 1:
        std = statistics.stdev(values)
    return {"mean": mean, "std": std, "n": len(values), "seeds": [int(seed) for seed in seeds]}


def summarize_classes(hits: Sequence[Sequence[int]] | jax.Array, counts: Sequence[int] | np.ndarray) -> dict[str, Any]:
    """Sums up a test class by class, as plain Python values, ready for JSON.

    Args:
        hits: ``[s][k]``, as in `Tested`.
        counts: ``[k]``, test images of each class.

    Returns:
        "per_class", the accuracy of each class, mean over the networks, None for a class without test images;
        "balanced", the mean of those accuracies over the tested classes: of the classes, not of the images.
    """
    images = np.asarray(counts)
    tested = images > 0
    shares = np.asarray(hits, np.float64).mean(0) / np.maximum(images, 1)
    return {
        "per_class": [float(share) if known else None for share, known in zip(shares, tested, strict=True)],
        "balanced": float(shares[tested].mean()),
    }


@partial(jax.jit, static_argnames=("network", "batch"))
def _test(
    params: Any,
    images: jax.Array,
    labels: jax.Array,
    whitening: Whitening | None,
    *,
    network: Network,
    batch: int,
) -> Tested:
    n = images.shape[0]
    batch = min(batch, n)

    def correct(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The last window moves back to stay inside; what it shares with the one before is not counted again.
        start = jnp.minimum(first, n - batch)
        x = inputs(lax.dynamic_slice_in_dim(images, start, batch), whitening)
        y = lax.dynamic_slice_in_dim(labels, start, batch)
        logits = network.outputs(params, x)[0]
        hit = logits.argmax(1) == y
        hit &= start + jnp.arange(batch) >= first
        of_class = jnp.zeros(logits.shape[1], jnp.int32).at[y].add(hit.astype(jnp.int32))
        return of_class, jnp.isfinite(logits).all()

    hits, finite = lax.map(correct, jnp.arange(0, n, batch))
    return Tested(jnp.where(finite.all(), hits.sum().astype(jnp.float32) / n, jnp.nan), hits.sum(0))


@partial(jax.jit, static_argnames=("network", "spec", "augment"))
def _train_group(
    keys: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    whitening: Whitening | None,
    lr: jax.Array,
    *,
    network: Network,
    spec: EvalSpec,
    augment: DsaSpec,
) -> Any:
    def one(key: jax.Array) -> Any:
        return train_network(
            key,
            images,
            labels,
            network=network,
            spec=spec,
            augment=augment,
            whitening=whitening,
            lr=lr,
        )

    # DSA computes only the operation that it drew, but all of them under vmap.
    return jax.vmap(one)(keys) if keys.shape[0] > 1 else jax.tree.map(lambda leaf: leaf[None], one(keys[0]))


@partial(jax.jit, static_argnames=("network", "batch"))
def _test_group(
    params: Any,
    images: jax.Array,
    labels: jax.Array,
    whitening: Whitening | None,
    *,
    network: Network,
    batch: int,
) -> Tested:
    def one(params: Any) -> Tested:
        return _test(params, images, labels, whitening, network=network, batch=batch)

    if jax.tree.leaves(params)[0].shape[0] > 1:
        return jax.vmap(one)(params)
    return jax.tree.map(lambda leaf: leaf[None], one(jax.tree.map(lambda leaf: leaf[0], params)))
