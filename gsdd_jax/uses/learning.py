"""Training from any weights on several sources at once, and predictions: what `evaluate` does for one set at its end.

What is compiled serves all tasks, clients and rounds: a source is filled up to a size, and how many of its images
count, like how many steps are taken, is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gsdd_jax import pixels
from gsdd_jax.augment import DsaSpec
from gsdd_jax.errors import InputError
from gsdd_jax.nets import Network
from gsdd_jax.training import EvalSpec, lr_factor, optimizer, training_batch
from gsdd_jax.whiten import Whitening, inputs

# Images per pass of a test.
_TEST_BATCH = 500


class Pool(NamedTuple):
    """A source of training images.

    Attributes:
        images: ``[m, h, w, c]``, uint8 or floating point in [0,1].
        labels: int32 ``[m]``.
        count: int32 scalar: the first so many are images, the others fill up.
    """

    images: np.ndarray | jax.Array
    labels: np.ndarray | jax.Array
    count: Any


def pool(images: np.ndarray, labels: np.ndarray, at_least: int = 0) -> Pool:
    """Makes a source of images ``[n, h, w, c]`` and labels ``[n]``, n >= 1.

    It is filled up to the next power of two, so that few sizes occur, or to that of ``at_least`` images.
    """
    if len(images) == 0:
        raise InputError("images: expected at least one to learn from, found none")
    size = 1 << (max(len(images), at_least) - 1).bit_length()
    filled = np.zeros((size, *images.shape[1:]), images.dtype)
    filled[: len(images)] = images
    of = np.zeros(size, np.int32)
    of[: len(labels)] = labels
    return Pool(jnp.asarray(filled), jnp.asarray(of), jnp.int32(len(images)))


def joined(parts: Sequence[tuple[np.ndarray, np.ndarray]], at_least: int = 0) -> Pool:
    """Makes one source of several (images, labels); uint8 ones become floats where others are."""
    if len({images.dtype for images, _ in parts}) > 1:
        parts = [(np.asarray(pixels.as_float(images)), labels) for images, labels in parts]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return pool(images, labels, at_least)


@partial(jax.jit, static_argnames=("network", "spec", "augment"))
def _train(
    key: jax.Array,
    params: Any,
    pools: tuple[Pool, ...],
    whitening: Whitening,
    steps: jax.Array,
    *,
    network: Network,
    spec: EvalSpec,
    augment: DsaSpec,
) -> Any:
    key_draw, key_batch = jax.random.split(key)
    descent = optimizer(spec.optimizer, momentum=spec.momentum, weight_decay=spec.weight_decay)
    share = -(-spec.batch // len(pools))

    def batch(step: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(jax.random.fold_in(key_draw, step), len(pools))
        drawn = [jax.random.randint(k, (share,), 0, one.count) for k, one in zip(keys, pools, strict=True)]
        images = [inputs(one.images[index], None) for one, index in zip(pools, drawn, strict=True)]
        labels = [one.labels[index] for one, index in zip(pools, drawn, strict=True)]
        return training_batch(
            key_batch,
            step,
            jnp.concatenate(images),
            jnp.concatenate(labels),
            steps=spec.steps,
            network=network,
            augment=augment,
            mix=spec.cutmix,
            whitening=whitening,
        )

    def take(step: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        params, state = carry
        _, grads = network.loss_and_gradient(params, *batch(step))
        direction, state = descent.update(grads, state, params)
        rate = spec.lr * lr_factor(step, spec.schedule, steps=spec.steps, warmup_steps=spec.warmup_steps)
        return jax.tree.map(lambda p, d: p - rate * d, params, direction), state

    return lax.fori_loop(0, steps, take, (params, descent.init(params)))[0]


def train(
    key: jax.Array,
    params: Any,
    pools: tuple[Pool, ...],
    *,
    network: Network,
    spec: EvalSpec,
    augment: DsaSpec,
    whitening: Whitening,
    steps: int | None = None,
) -> Any:
    """Trains a network on, by cross entropy, and returns its weights.

    Every batch has equally many images of each source, drawn with replacement; deviations from
    `training.train_network`, which has epochs, and restarts the optimizer where schedule=step drops.

    Args:
        key: Decides batches and augmentations; consumed.
        params: The weights that it begins with, such as fresh ones.
        pools: The sources.
        network: The network.
        spec: How; its ``steps`` are set, and say over how many the schedule runs.
        augment: DSA settings.
        whitening: What the network sees images through.
        steps: To take, at most those of ``spec``; all if None.

    Raises:
        ValueError: ``spec`` counts in epochs, or has a mean of weights.
    """
    if not spec.steps or spec.ema:
        raise InputError(f"training: expected steps >= 1 and ema 0, found steps {spec.steps} and ema {spec.ema}")
    steps = spec.steps if steps is None else min(steps, spec.steps)
    return _train(key, params, pools, whitening, jnp.int32(steps), network=network, spec=spec, augment=augment)


@partial(jax.jit, static_argnames="network")
def outputs(params: Any, images: jax.Array, whitening: Whitening, *, network: Network) -> tuple[jax.Array, jax.Array]:
    """Returns logits ``[n, k]`` and flat features ``[n, f]`` of images, a part of them at a time."""
    n = len(images)
    batch = min(_TEST_BATCH, n)
    # The last part moves back to stay inside.
    starts = jnp.minimum(jnp.arange(0, n, batch), n - batch)

    def one(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        part = lax.dynamic_slice_in_dim(images, start, batch)
        logits, features = network.outputs(params, inputs(part, whitening))
        return logits, features.reshape(batch, -1)

    part = jnp.arange(n) // batch
    logits, features = lax.map(one, starts)
    place = part, jnp.arange(n) - starts[part]
    return logits[place], features[place]


def predictions(
    params: Any, images: np.ndarray, classes: np.ndarray, *, network: Network, whitening: Whitening
) -> np.ndarray:
    """Returns the class of each image, int ``[n]``, among some; a network that diverged finds the first of them."""
    logits = np.asarray(outputs(params, jnp.asarray(images), whitening, network=network)[0])
    return np.asarray(classes)[np.nan_to_num(logits[:, classes], nan=-np.inf).argmax(1)]
