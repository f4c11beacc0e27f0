"""Evaluation: train fresh networks on a set of images, test each once, at its end.

What a distilled set is worth is the test accuracy of networks that saw nothing else. No function here looks at test
images before training is over, none keeps the best of several tests, and a learning rate is chosen on held-out
training images or not at all.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from annotated_types import Ge, Gt, Lt
from jax import lax
from typing_extensions import Doc

from gsdd_jax.augment import DsaSpec, dsa
from gsdd_jax.nets import Network

Transform = Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """How networks are trained for a test: SGD as in PyTorch, momentum, coupled weight decay."""

    epochs: Annotated[int, Ge(1), Doc("Passes over the images (DSA: 1000); steps = ceil(epochs * n / batch).")] = 1000
    steps: Annotated[int, Ge(0), Doc("Training steps, in place of epochs; 0 = by epochs.")] = 0
    batch: Annotated[int, Ge(1), Doc("Images per step (DC: 256); all of them if there are fewer.")] = 256
    lr: Annotated[float, Gt(0), Doc("Learning rate of SGD (DC: 0.01).")] = 0.01
    momentum: Annotated[float, Ge(0), Lt(1), Doc("Momentum of SGD (DC: 0.9).")] = 0.9
    weight_decay: Annotated[float, Ge(0), Doc("Times the weight, added to the gradient; all weights (DC: 5e-4).")] = (
        5e-4
    )
    schedule: Annotated[
        Literal["step", "cosine"], Doc("step: a tenth from half time on, momentum restarted (DC); cosine: to 0.")
    ] = "step"
    warmup_steps: Annotated[int, Ge(0), Doc("First steps over which the rate rises linearly.")] = 0
    seeds: Annotated[int, Ge(1), Doc("Number of networks trained and tested.")] = 5

    def num_steps(self, num_images: int) -> int:
        """Returns how many steps training takes on so many images."""
        return self.steps or -(-self.epochs * num_images // min(self.batch, num_images))


class _Static(NamedTuple):
    """What the compiled functions depend on, and hash by: `spec` without the fields that do not shape them."""

    network: Network
    spec: EvalSpec
    augment: DsaSpec
    transform: Transform | None


def train_network(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    network: Network,
    spec: EvalSpec,
    augment: DsaSpec,
    transform: Transform | None = None,
    transform_params: Any = None,
    lr: jax.Array | float | None = None,
) -> Any:
    """Trains a fresh network by SGD on cross entropy and returns its final weights.

    Protocol of DC, DSA, DM and MTT (their `evaluate_synset`). Deviations: batches are windows of fixed size in a
    stream of shuffled epochs, so that no last batch is short; and there are `epochs` epochs with the drop at half of
    all steps, where the reference runs one more and drops after epochs // 2 + 2 of them.

    All steps are one compiled loop. It is compiled anew for other shapes, settings or functions, but not for
    another learning rate or other `transform_params`. Works under `vmap` over `key`.

    Args:
        key: decides the weights, the batches and the augmentations; consumed.
        images: [n, h, w, c], uint8 (divided by 255 batch by batch) or float.
        labels: int [n], in 0..k-1.
        network: what to train.
        spec: how.
        augment: DSA, with parameters per image; strategy "none" for none.
        transform: (transform_params, images) -> images, applied to each batch before augmentation: whitening. A set
            that fits into memory as floats is cheaper to transform beforehand.
        transform_params: arrays that `transform` needs, of any structure.
        lr: learning rate in place of `spec.lr`.

    Returns:
        The weights, as `network.init` shapes them.

    Raises:
        ValueError: no images, images that are not [n, h, w, c], or labels of another shape than [n].
        TypeError: images that are neither uint8 nor floating point, or labels that are not integers.
    """
    _check(images, labels, "")
    static = _static(network, spec, augment, transform)
    return _train(key, images, labels, transform_params, _rate(lr, spec), static=static)


def accuracy(
    params: Any,
    images: jax.Array,
    labels: jax.Array,
    *,
    network: Network,
    transform: Transform | None = None,
    transform_params: Any = None,
    batch: int = 500,
) -> jax.Array:
    """Returns the share of images that a network classifies correctly.

    Args:
        params: weights of the network.
        images: [n, h, w, c], uint8 (divided by 255) or float.
        labels: int [n].
        network: the network.
        transform: as in `train_network`.
        transform_params: as in `train_network`.
        batch: images per pass, bounds the memory.

    Returns:
        float32 scalar in [0, 1], on the device.

    Raises:
        ValueError: as `train_network`, or a batch below 1.
        TypeError: as `train_network`.
    """
    _check(images, labels, "")
    if batch < 1:
        raise ValueError(f"batch: {batch}, must be at least 1")
    return _accuracy(params, images, labels, transform_params, network=network, transform=transform, batch=batch)


def evaluate(
    keys: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    test_images: jax.Array,
    test_labels: jax.Array,
    *,
    network: Network,
    spec: EvalSpec,
    augment: DsaSpec,
    transform: Transform | None = None,
    transform_params: Any = None,
    lr: jax.Array | float | None = None,
    parallel: int = 1,
) -> jax.Array:
    """Trains one network per key and tests each once, after its last step.

    Networks are trained one after the other or, `parallel` at a time, under one `vmap`. The results agree up to
    rounding. On CPU nothing is gained by more than one (ConvNetD3, 32 px: 140 against 129 images per CPU second).

    Args:
        keys: [s] PRNG keys, one per network; for instance `jax.random.split(key, spec.seeds)`.
        images: training images, as in `train_network`.
        labels: int [n].
        test_images: [n', h, w, c], uint8 or float.
        test_labels: int [n'].
        network: as in `train_network`, like all up to `lr`.
        spec: as there; its `seeds` has no effect, the number of keys counts.
        augment: as there.
        transform: as there; applied to the test images, too.
        transform_params: as there.
        lr: as there.
        parallel: networks per `vmap`; must divide s.

    Returns:
        float32 [s], test accuracies in [0, 1].

    Raises:
        ValueError: as `train_network`, for the test set too, or `parallel` does not divide the number of keys.
        TypeError: as `train_network`.
    """
    _check(images, labels, "")
    _check(test_images, test_labels, "test_")
    if keys.ndim != 1 or keys.shape[0] < 1:
        raise ValueError(f"keys: shape {keys.shape}, must be [s] with s at least 1")
    if parallel < 1 or keys.shape[0] % parallel:
        raise ValueError(f"parallel: {parallel}, must divide the number of keys, {keys.shape[0]}")
    # A call per group, not one loop in one program: any number of keys runs the same executable.
    run = partial(_train_and_test, static=_static(network, spec, augment, transform))
    data = jax.tree.map(jnp.asarray, (images, labels, test_images, test_labels, transform_params, _rate(lr, spec)))
    return jnp.concatenate([run(keys[i : i + parallel], *data) for i in range(0, keys.shape[0], parallel)])


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
        lrs: candidates; of equals, the first wins.
        networks: how many networks vote on each.
        **settings: as in `evaluate`, without `lr`.

    Returns:
        The rate, and the mean accuracy of each candidate.

    Raises:
        ValueError: no candidates or one that is not positive, `networks` below 1, or as `evaluate`.
        TypeError: as `evaluate`.
    """
    if not lrs or min(lrs) <= 0:
        raise ValueError(f"lrs: {list(lrs)}, must be one or more positive numbers")
    if networks < 1:
        raise ValueError(f"networks: {networks}, must be at least 1")
    keys = jax.random.split(key, networks)
    table = {
        float(lr): float(evaluate(keys, images, labels, valid_images, valid_labels, lr=lr, **settings).mean())
        for lr in lrs
    }
    return max(table, key=lambda lr: table[lr]), table


def summarise(accuracies: Sequence[float] | jax.Array, seeds: Sequence[int]) -> dict[str, Any]:
    """Sums up accuracies as plain Python values, ready for JSON.

    Args:
        accuracies: one per network.
        seeds: the seeds they came from, as many.

    Returns:
        "mean"; "std", of the sample (n - 1), 0 if n = 1; "n"; "seeds".

    Raises:
        ValueError: no accuracies, or not one per seed.
    """
    values = [float(value) for value in accuracies]
    if not values or len(values) != len(seeds):
        raise ValueError(
            f"accuracies: {len(values)} of them, must be at least 1 and one per seed; seeds: {list(seeds)}"
        )
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "n": len(values), "seeds": [int(seed) for seed in seeds]}


def lr_factor(step: jax.Array | int, *, spec: EvalSpec, steps: int) -> jax.Array:
    """Returns the factor on the learning rate at a step: warm-up times schedule.

    Args:
        step: 0 to steps - 1.
        spec: `schedule` and `warmup_steps` count. The cosine starts after the warm-up; the drop of "step" is at
            half of all steps.
        steps: length of the training.

    Returns:
        float32 scalar in [0, 1].
    """
    step = jnp.asarray(step)
    warmup = jnp.minimum(1.0, (step + 1) / max(spec.warmup_steps, 1))
    if spec.schedule == "cosine":
        progress = (step - spec.warmup_steps) / max(steps - spec.warmup_steps, 1)
        return warmup * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
    return warmup * jnp.where(step < _drop(steps), 1.0, 0.1)


def sgd_step(
    params: Any,
    velocity: Any,
    grads: Any,
    *,
    lr: jax.Array | float,
    momentum: jax.Array | float,
    weight_decay: float,
) -> tuple[Any, Any]:
    """Updates weights as PyTorch's SGD does: v <- momentum * v + (g + weight_decay * p); p <- p - lr * v.

    Args:
        params: weights, a pytree.
        velocity: the same structure; zeros at first.
        grads: the same structure.
        lr: learning rate.
        momentum: factor on the old velocity, without dampening.
        weight_decay: coupled: it goes through the momentum.

    Returns:
        New params and velocity.
    """
    velocity = jax.tree.map(lambda v, g, p: momentum * v + (g + weight_decay * p), velocity, grads, params)
    return jax.tree.map(lambda p, v: p - lr * v, params, velocity), velocity


def stream_start(key: jax.Array, num_images: int) -> jax.Array:
    """Returns the first two epochs of the stream of batches: int32 [2n], two permutations of the n images."""
    return jnp.concatenate([_epoch(key, 0, num_images), _epoch(key, 1, num_images)])


def stream_batch(key: jax.Array, order: jax.Array, step: jax.Array, *, batch: int) -> tuple[jax.Array, jax.Array]:
    """Cuts batch number `step` from the stream of shuffled epochs, laid end to end.

    Must be called for step 0, 1, 2, ... in turn.

    Args:
        key: the one given to `stream_start`.
        order: what that, or the call for the step before, returned.
        step: number of the batch.
        batch: its size, at most n.

    Returns:
        The order for the next call, and the image indices, int32 [batch].
    """
    n = order.shape[0] // 2
    epoch, before = step * batch // n, jnp.maximum(step - 1, 0) * batch // n
    # A batch is no longer than an epoch, so at most one epoch ends per step. The predicate does not depend on the
    # key: under vmap over keys this stays a branch.
    order = lax.cond(epoch > before, lambda: jnp.concatenate([order[n:], _epoch(key, epoch + 1, n)]), lambda: order)
    return order, lax.dynamic_slice_in_dim(order, step * batch - epoch * n, batch)


def _epoch(key: jax.Array, epoch: jax.Array | int, n: int) -> jax.Array:
    return jax.random.permutation(jax.random.fold_in(key, epoch), n).astype(jnp.int32)


def _drop(steps: int) -> int:
    return (steps + 1) // 2


def _static(network: Network, spec: EvalSpec, augment: DsaSpec, transform: Transform | None) -> _Static:
    return _Static(network, dataclasses.replace(spec, lr=1.0, seeds=1), augment, transform)


def _rate(lr: jax.Array | float | None, spec: EvalSpec) -> jax.Array:
    return jnp.asarray(spec.lr if lr is None else lr, jnp.float32)


def _inputs(images: jax.Array, transform: Transform | None, transform_params: Any) -> jax.Array:
    x = images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images
    return x if transform is None else transform(transform_params, x)


@partial(jax.jit, static_argnames="static")
def _train(
    key: jax.Array, images: jax.Array, labels: jax.Array, transform_params: Any, lr: jax.Array, *, static: _Static
) -> Any:
    network, spec, augment, transform = static
    n = images.shape[0]
    batch, steps = min(spec.batch, n), spec.num_steps(n)
    key_init, key_stream, key_augment = jax.random.split(key, 3)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits, _ = network.apply(params, x)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1))

    def step(carry: tuple[Any, Any, jax.Array], t: jax.Array) -> tuple[tuple[Any, Any, jax.Array], None]:
        params, velocity, order = carry
        order, index = stream_batch(key_stream, order, t, batch=batch)
        x = _inputs(images[index], transform, transform_params)
        x = dsa(jax.random.fold_in(key_augment, t), x, augment)
        grads = jax.grad(loss)(params, x, labels[index])
        rate = lr * lr_factor(t, spec=spec, steps=steps)
        restart = (t == _drop(steps)) & (spec.schedule == "step")
        momentum = jnp.where(restart, 0.0, spec.momentum)
        params, velocity = sgd_step(params, velocity, grads, lr=rate, momentum=momentum, weight_decay=spec.weight_decay)
        return (params, velocity, order), None

    params = network.init(key_init)
    start = (params, jax.tree.map(jnp.zeros_like, params), stream_start(key_stream, n))
    (params, _, _), _ = lax.scan(step, start, jnp.arange(steps))
    return params


@partial(jax.jit, static_argnames=("network", "transform", "batch"))
def _accuracy(
    params: Any,
    images: jax.Array,
    labels: jax.Array,
    transform_params: Any,
    *,
    network: Network,
    transform: Transform | None,
    batch: int,
) -> jax.Array:
    n = images.shape[0]
    batch = min(batch, n)

    def correct(first: jax.Array) -> jax.Array:
        # The last window moves back to stay inside; what it shares with the one before is not counted again.
        start = jnp.minimum(first, n - batch)
        x = _inputs(lax.dynamic_slice_in_dim(images, start, batch), transform, transform_params)
        y = lax.dynamic_slice_in_dim(labels, start, batch)
        hit = network.apply(params, x)[0].argmax(1) == y
        return jnp.sum(hit & (start + jnp.arange(batch) >= first))

    return lax.map(correct, jnp.arange(0, n, batch)).sum().astype(jnp.float32) / n


@partial(jax.jit, static_argnames="static")
def _train_and_test(
    keys: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    test_images: jax.Array,
    test_labels: jax.Array,
    transform_params: Any,
    lr: jax.Array,
    *,
    static: _Static,
) -> jax.Array:
    def one(key: jax.Array) -> jax.Array:
        params = _train(key, images, labels, transform_params, lr, static=static)
        return _accuracy(
            params,
            test_images,
            test_labels,
            transform_params,
            network=static.network,
            transform=static.transform,
            batch=500,
        )

    return jax.vmap(one)(keys) if keys.shape[0] > 1 else one(keys[0])[None]


def _check(images: jax.Array, labels: jax.Array, which: str) -> None:
    if images.ndim != 4 or images.shape[0] < 1:
        raise ValueError(f"{which}images: shape {images.shape}, must be [n, h, w, c] with n at least 1")
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"{which}images: {images.dtype}, must be uint8 or floating point")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{which}labels: shape {labels.shape}, must be {images.shape[:1]}, one per image")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{which}labels: {labels.dtype}, must be integers")
