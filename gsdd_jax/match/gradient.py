"""Gradient matching: gradients of the training loss on real and on synthetic images (DC, Zhao et al. 2021)."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from annotated_types import Ge, Gt
from typing_extensions import Doc

from gsdd_jax import pixels
from gsdd_jax.augment import DsaSpec, dsa
from gsdd_jax.codecs import Codec
from gsdd_jax.errors import InputError
from gsdd_jax.match.base import Batch, Objective, Synthetic
from gsdd_jax.match.chunks import split_classes, sum_of_chunks
from gsdd_jax.match.needs import RealImages
from gsdd_jax.nets import Network
from gsdd_jax.parallel import Shard, unsharded
from gsdd_jax.whiten import Whitening

# Beside the product of two norms, as in the reference.
EPSILON = 1e-6
# Steps of a network's life and epochs of its training between them, by images per class (DC, get_loops; the steps of
# in-between budgets are those of the next smaller row).
LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientSpec:
    """Settings of gradient matching."""

    name: Annotated[Literal["gradient"], Doc("the objective")] = "gradient"
    batch_real: Annotated[int, Ge(1), Doc("real images per class and iteration (DC: 256)")] = 256
    batch_syn: Annotated[int, Ge(0), Doc("synthetic images per class and iteration, drawn anew each time; 0 = all")] = 0
    class_chunk: Annotated[
        int, Ge(1), Doc("classes whose gradients are held at once; bounds memory, changes no result")
    ] = 1
    outer_loop: Annotated[
        int,
        Ge(0),
        Doc(
            "iterations that a network lives, trained on the synthetic set in between; 0 = as in DC for this ipc: at "
            "ipc 1 a single one, so that gradients are matched at random weights only"
        ),
    ] = 0
    inner_loop: Annotated[int, Ge(0), Doc("epochs of that training; 0 = as in DC for this ipc")] = 0
    net_lr: Annotated[float, Gt(0), Doc("its learning rate; SGD without momentum (DC: 0.01)")] = 0.01
    net_batch: Annotated[int, Ge(1), Doc("its batch size (DC: 256)")] = 256

    def for_ipc(self, ipc: float) -> GradientSpec:
        """Returns the settings with both loops filled in, for a budget of ``ipc`` fp32 images per class."""
        outer, inner = LOOPS[max((known for known in LOOPS if known <= ipc), default=min(LOOPS))]
        return dataclasses.replace(self, outer_loop=self.outer_loop or outer, inner_loop=self.inner_loop or inner)


class Living(NamedTuple):
    """The network of gradient matching, which lives for several steps."""

    age: jax.Array  # int32 scalar, steps so far
    params: Any


def make(spec: GradientSpec, codec: Codec, network: Network, augment: DsaSpec) -> Objective:
    """Builds the objective; see `gsdd_jax.match.make`."""
    if 0 in (spec.outer_loop, spec.inner_loop):
        raise InputError("objective: outer_loop and inner_loop are 0; GradientSpec.for_ipc fills them in")

    def init() -> tuple[dict[str, jax.Array], Any]:
        # Overwritten by the first step, which draws them.
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(network.init, jax.random.key(0)))
        return {}, Living(jnp.zeros((), jnp.int32), params)

    def loss(
        key: jax.Array, learned: Any, carry: Any, synthetic: Synthetic, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        del learned
        key_syn, key_network, key_loss = jax.random.split(key, 3)
        params = network.init(key_network)
        if carry:
            params = jax.tree.map(lambda new, old: jnp.where(carry.age == 0, new, old), params, carry.params)
            carry = Living(carry.age, params)
        value = gradient_loss(
            key_loss,
            batch.drawn["real"],
            synthetic.by_class(key_syn, spec.batch_syn),
            params=params,
            network=network,
            augment=augment,
            whitening=batch.whitening,
            class_chunk=spec.class_chunk,
            shard=synthetic.shard,
        )
        return value, {}, carry

    def after(key: jax.Array, carry: Living, synthetic: Synthetic, batch: Batch) -> Living:
        def train() -> Any:
            # Not at random, where a codec could.
            images = codec.decode(synthetic.params)
            return train_between(
                key,
                carry.params,
                images,
                synthetic.labels,
                spec=spec,
                network=network,
                augment=augment,
                whitening=batch.whitening,
            )

        # Its last step leaves a network untrained, for nothing follows.
        age = (carry.age + 1) % spec.outer_loop
        return Living(age, jax.lax.cond(age == 0, lambda: carry.params, train))

    objective = Objective(spec, codec, network, {"real": RealImages(spec.batch_real)}, loss)
    return objective._replace(init=init, after=after) if spec.outer_loop > 1 else objective


def gradient_loss(
    key: jax.Array,
    real: jax.Array,
    syn: jax.Array,
    *,
    params: Any,
    network: Network,
    augment: DsaSpec,
    whitening: Whitening,
    class_chunk: int,
    shard: Shard | None = None,
) -> jax.Array:
    """Returns ``sum_k D(grad loss(real_k), grad loss(syn_k))`` at the weights ``params`` (DC, Eq. 9; DSA, Eq. 2).

    ``loss`` is the mean cross-entropy of a class's images. ``D`` is `layerwise_distance`. Each class has its own
    DSA draw, the same for its real and synthetic images.

    Args:
        key: Decides the augmentations; consumed.
        real: ``[k, b, h, w, c]`` images, uint8 or in [0,1].
        syn: ``[k, g, h, w, c]`` float images in [0,1].
        params: Weights of the network; constants here.
        network: Its architecture.
        augment: DSA settings.
        whitening: What networks see images through.
        class_chunk: Classes whose gradients are held at once; need not divide ``k``.
        shard: Which classes these are, where other devices have the others, and the sum is over these.

    Returns:
        The loss, a scalar. Differentiable once, with respect to ``syn`` and nothing else; the backward pass keeps
        nothing of a chunk but its gradient.
    """
    shard = shard or unsharded(real.shape[0])
    split, weight = split_classes(shard, class_chunk)

    def gradients(shared: Any, images: jax.Array, keys: jax.Array, labels: jax.Array) -> Any:
        """Gradients of each class of a chunk, as params with a leading axis of classes."""
        params, whitening = shared
        normal = whitening(images)
        # A loop, not vmap: under vmap every class would pay for all six operations.
        augmented = jax.lax.map(lambda x: dsa(x[0], x[1], augment, siamese=True), (keys, normal))

        def gradient(images: jax.Array, label: jax.Array) -> Any:
            return network.loss_and_gradient(params, images, jnp.full(len(images), label))[1]

        return jax.vmap(gradient)(augmented, labels)

    def of_chunk(
        shared: Any, syn: jax.Array, keys: jax.Array, labels: jax.Array, weight: jax.Array, real: jax.Array
    ) -> jax.Array:
        wanted = jax.lax.stop_gradient(gradients(shared, pixels.as_float(real, "real").astype(syn.dtype), keys, labels))
        return jnp.sum(weight * jax.vmap(layerwise_distance)(wanted, gradients(shared, syn, keys, labels)))

    keys = split(shard.take(jax.random.split(key, shard.total)))
    labels = split(shard.take(jnp.arange(shard.total)))
    return sum_of_chunks(of_chunk, split(syn), (keys, labels, weight, split(real)), (params, whitening))


def layerwise_distance(real: Any, syn: Any) -> jax.Array:
    """Sums ``1 - cos`` over the output units of all layers ("ours" in DC's code).

    A layer is an array of two or more axes, whatever its name. Its last axis counts the units, as in Flax and in all
    networks here, and a unit's vector holds all weights that lead to it; arrays of weights that have their outputs on
    another axis are compared along it all the same. Arrays of fewer axes do not count: biases and norm parameters, as
    in DC's code. Learned positions have two axes and count, as there.

    Args:
        real: Gradients in the structure of a network's params.
        syn: The same for the other set of images.

    Returns:
        A scalar between 0 and twice the number of units; differentiable, also where a gradient vanishes.

    Raises:
        ValueError: No array has two axes, so that there is nothing to match.
    """
    pairs = zip(jax.tree.leaves(real), jax.tree.leaves(syn), strict=True)
    layers = [(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])) for a, b in pairs if a.ndim > 1]
    if not layers:
        shapes = [list(leaf.shape) for leaf in jax.tree.leaves(real)]
        raise InputError(
            f"gradient matching compares weights of two or more axes, the last one counting outputs; expected at least "
            f"one such array, found shapes {shapes}"
        )
    total = jnp.float32(0)
    for a, b in layers:
        total += jnp.sum(1 - jnp.sum(a * b, 0) / (_norm(a) * _norm(b) + EPSILON))
    return total


def _norm(x: jax.Array) -> jax.Array:
    """Returns the norms of columns, with derivative 0 instead of NaN at 0."""
    square = jnp.sum(x * x, 0)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def train_between(
    key: jax.Array,
    params: Any,
    images: jax.Array,
    labels: jax.Array,
    *,
    spec: GradientSpec,
    network: Network,
    augment: DsaSpec,
    whitening: Whitening,
) -> Any:
    """Trains the network of gradient matching on the synthetic set, between two iterations of its life.

    SGD without momentum, each image with its own DSA draw. Deviation: an epoch's last batch is filled up with the
    first images of its order where the reference takes a smaller one.

    Args:
        key: Decides order and augmentations; consumed.
        params: Weights.
        images: ``[n, h, w, c]`` float in [0,1].
        labels: ``[n]`` integers.
        spec: ``inner_loop``, the passes over the images, ``net_lr`` and ``net_batch``.
        network: The architecture.
        augment: DSA settings.
        whitening: What networks see images through.

    Returns:
        The trained weights.
    """
    n = len(images)
    batch = min(spec.net_batch, n)
    per_epoch = -(-n // batch)
    normal = whitening(images)

    def step(params: Any, i: jax.Array) -> tuple[Any, None]:
        key_order = jax.random.fold_in(key, 2 * (i // per_epoch))
        key_augment = jax.random.fold_in(key, 2 * i + 1)
        position = (i % per_epoch) * batch + jnp.arange(batch)
        index = jax.random.permutation(key_order, n)[position % n]

        x = dsa(key_augment, normal[index], augment)
        _, grads = network.loss_and_gradient(params, x, labels[index])
        return jax.tree.map(lambda p, g: p - spec.net_lr * g, params, grads), None

    return jax.lax.scan(step, params, jnp.arange(spec.inner_loop * per_epoch))[0]
