"""Kernel ridge regression: predictions of real labels from the synthetic set (FRePo, Zhou et al. 2022).

The kernel is the inner product of a network's last features, so that its exact solution takes the place of training
the last layer. The networks are trained on the synthetic set alone: a pool of several ages, of which each step draws
one, for a single network would be fitted at its age only. Labels are learned with the images.

Deviations from the reference: real images are as many of each class; the network is trained on the images and labels
that it was matched with, which the same step then changes, so that they are decoded once; whatever the codec's
optimizer is takes the place of LAMB; networks are those of the config, not of twice the channels in each block.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from annotated_types import Ge, Gt
from jax import lax
from typing_extensions import Doc

from gsdd_jax import pixels
from gsdd_jax.augment import DsaSpec
from gsdd_jax.codecs import Codec
from gsdd_jax.labels import onto_simplex
from gsdd_jax.match.base import Batch, Objective, Synthetic
from gsdd_jax.match.chunks import split_classes
from gsdd_jax.match.needs import RealImages
from gsdd_jax.nets import Network, squared_error
from gsdd_jax.parallel import unsharded

_ADAM = optax.scale_by_adam()


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelRidgeSpec:
    """Settings of kernel ridge regression."""

    name: Annotated[Literal["kernel_ridge"], Doc("the objective")] = "kernel_ridge"
    batch_real: Annotated[int, Ge(1), Doc("real images per class and iteration (FRePo: 1,024 of all classes)")] = 100
    class_chunk: Annotated[
        int, Ge(1), Doc("classes per pass through the network; bounds memory, changes no result")
    ] = 1
    regularization: Annotated[float, Gt(0), Doc("of the regression, times the mean of the kernel's diagonal")] = 1e-6
    flip: Annotated[bool, Doc("regress from the mirrored synthetic images, too (FRePo: on CIFAR-10)")] = False
    learn_labels: Annotated[
        bool,
        Doc("learn a label per image with the images, as FRePo does; needs labels.teacher=learned, part of the budget"),
    ] = False
    label_lr: Annotated[float, Gt(0), Doc("learning rate of the labels, Adam (FRePo: 3e-4)")] = 3e-4
    label_margin: Annotated[
        float, Ge(0), Doc("weight of the term that keeps a label's largest value above the others; 0 = none")
    ] = 1.0
    pool: Annotated[int, Ge(1), Doc("networks that live side by side")] = 10
    net_updates: Annotated[int, Ge(1), Doc("training steps after which a network is drawn anew")] = 100
    net_lr: Annotated[float, Gt(0), Doc("learning rate of the networks, Adam")] = 3e-4
    net_batch: Annotated[int, Ge(1), Doc("synthetic images per training step of a network; all if there are fewer")] = (
        1000
    )


class Pool(NamedTuple):
    """Networks that live side by side, ``m`` of them.

    Attributes:
        age: int32 ``[m]``, training steps of this life; those of the first lives start apart.
        params: Weights, each array with a leading axis ``m``.
        moments: Those of Adam, likewise; a network whose count is 0 has yet to be drawn.
    """

    age: jax.Array
    params: Any
    moments: optax.ScaleByAdamState


def make(spec: KernelRidgeSpec, codec: Codec, network: Network, augment: DsaSpec) -> Objective:
    """Builds the objective; see `gsdd_jax.match.make`. Nothing is augmented, as in the reference."""
    del augment
    k, g = codec.num_classes, codec.images_per_class

    def init() -> tuple[dict[str, jax.Array], Pool]:
        params = jax.eval_shape(network.init, jax.eval_shape(lambda: jax.random.key(0)))
        like = jax.eval_shape(lambda params: (params, _ADAM.init(params)), params)
        age = jnp.arange(spec.pool, dtype=jnp.int32) * spec.net_updates // spec.pool
        pool = Pool(age, *jax.tree.map(lambda x: jnp.zeros((spec.pool, *x.shape), x.dtype), like))
        return {"labels": jnp.repeat(jnp.eye(k, dtype=jnp.float32), g, axis=0)} if spec.learn_labels else {}, pool

    def loss(
        key: jax.Array, learned: Any, carry: Pool, synthetic: Synthetic, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array], Pool]:
        key_which, key_syn, key_network, key_train = jax.random.split(key, 4)
        axis, shard = synthetic.axis, synthetic.shard
        which = jax.random.randint(key_which, (), 0, spec.pool)
        member = drawn(key_network, jax.tree.map(lambda x: x[which], carry), network)
        classes = centered(jnp.eye(k, dtype=jnp.float32))
        labels = centered(learned["labels"]) if spec.learn_labels else jnp.repeat(classes, g, axis=0)

        def embed(images: jax.Array) -> jax.Array:
            """Features ``[own * b, f]`` of images ``[own, b, h, w, c]``, at the memory of a few classes."""

            def chunk(images: jax.Array) -> jax.Array:
                normal = batch.whitening(images.reshape(-1, *images.shape[2:]))
                return network.outputs(member.params, normal)[1].reshape(*images.shape[:2], -1)

            split, _ = split_classes(unsharded(len(images)), spec.class_chunk)
            features = lax.map(jax.checkpoint(chunk, prevent_cse=False), split(images))
            return features.reshape(-1, *features.shape[2:])[: len(images)]

        syn, real = synthetic.by_class(key_syn), pixels.as_float(batch.drawn["real"], "real")
        seen = jnp.concatenate([syn, syn[..., ::-1, :]], axis=1) if spec.flip else syn
        # What fills up the classes of the last device comes last, and is cut off.
        features = axis.gather(embed(seen))[:k]
        targets = labels.reshape(k, g, k)
        targets = jnp.concatenate([targets, targets], axis=1) if spec.flip else targets
        found = ridge_predictions(
            features.reshape(-1, features.shape[-1]),
            targets.reshape(-1, k),
            lax.stop_gradient(embed(real)),
            regularization=spec.regularization,
        )
        wanted = classes[shard.classes % k][:, None]
        weight = (shard.classes < k)[:, None].astype(found.dtype) / (k * real.shape[1])
        value = jnp.sum(weight * squared_error(found, jnp.broadcast_to(wanted, found.shape)))
        right = jnp.sum(weight * (found.argmax(-1) == shard.classes[:, None]))
        if spec.learn_labels and spec.label_margin:
            value += axis.part(spec.label_margin * label_margin(labels))
        images, labels = lax.stop_gradient((axis.gather(syn)[:k].reshape(-1, *syn.shape[2:]), labels))
        member = trained(key_train, member, batch.whitening(images), labels, spec=spec, network=network)
        return (
            value,
            {"regression_accuracy": axis.sum(right)},
            jax.tree.map(lambda x, new: x.at[which].set(new), carry, member),
        )

    objective = Objective(spec, codec, network, {"real": RealImages(spec.batch_real)}, loss, init=init)
    if not spec.learn_labels:
        return objective
    return objective._replace(
        optimizer=lambda: optax.adam(spec.label_lr),
        project=lambda learned: {"labels": onto_simplex(learned["labels"])},
    )


def centered(probabilities: jax.Array) -> jax.Array:
    """Returns what networks regress on, ``(p - 1 / k) / sqrt(k / 10)`` of probabilities ``[..., k]``."""
    k = probabilities.shape[-1]
    return (probabilities - 1 / k) / math.sqrt(k / 10)


def label_margin(labels: jax.Array) -> jax.Array:
    """Returns minus the mean margin of labels ``[n, k]``: the largest value less the next, counted up to ``1 / k``."""
    top = lax.top_k(labels, 2)[0]
    return -jnp.mean(jnp.minimum(top[:, 0] - top[:, 1], 1 / labels.shape[1]))


def ridge_predictions(features: jax.Array, labels: jax.Array, others: jax.Array, *, regularization: float) -> jax.Array:
    """Returns ``K(others, features) (K(features, features) + r I)^-1 labels``, with inner products as the kernel.

    ``r`` is ``regularization`` times the mean of the diagonal of ``K(features, features)``. Of the two equal forms the
    one with the smaller system is solved: n x n, or f x f where there are fewer features than images, for which the
    former has no full rank and single precision not enough digits.

    Args:
        features: ``[n, f]``.
        labels: ``[n, k]``.
        others: ``[..., f]``.
        regularization: > 0.

    Returns:
        ``[..., k]``; differentiable in all three.
    """
    n, f = features.shape

    def solved(system: jax.Array, right: jax.Array) -> jax.Array:
        r = regularization * jnp.trace(system) / n
        return jax.scipy.linalg.solve(system + r * jnp.eye(len(system), dtype=system.dtype), right, assume_a="pos")

    with jax.default_matmul_precision("highest"):
        if n <= f:
            weights = features.T @ solved(features @ features.T, labels)
        else:
            weights = solved(features.T @ features, features.T @ labels)
        return others @ weights


def drawn(key: jax.Array, member: Pool, network: Network) -> Pool:
    """Draws the weights of a network that has yet to be; leaves any other as it is."""
    fresh = member.moments.count == 0
    return member._replace(
        params=jax.tree.map(lambda new, old: jnp.where(fresh, new, old), network.init(key), member.params)
    )


def trained(
    key: jax.Array, member: Pool, images: jax.Array, labels: jax.Array, *, spec: KernelRidgeSpec, network: Network
) -> Pool:
    """Takes one training step of a network of the pool, the last of its life where its age says so.

    Adam on the mean of ``1/2 ||logits - label||^2`` over some images, as in the reference.

    Args:
        key: Decides which images; consumed.
        member: One network.
        images: ``[n, h, w, c]``, whitened.
        labels: ``[n, k]``.
        spec: ``net_batch``, ``net_lr`` and ``net_updates`` count.
        network: The architecture.
    """
    if spec.net_batch < len(images):
        index = jax.random.choice(key, len(images), (spec.net_batch,), replace=False)
        images, labels = images[index], labels[index]
    _, grads = network.loss_and_gradient(member.params, images, labels, loss=squared_error)
    updates, moments = _ADAM.update(grads, member.moments)
    params = jax.tree.map(lambda p, u: p - spec.net_lr * u, member.params, updates)
    age = (member.age + 1) % spec.net_updates
    moments = jax.tree.map(lambda x: jnp.where(age == 0, jnp.zeros_like(x), x), moments)
    return Pool(age, params, moments)
