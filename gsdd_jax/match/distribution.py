"""Distribution matching: features under random networks (DM, Zhao & Bilen 2023) or trained ones (TGDD, DANCE, NCFM).

Trained networks are checkpoints of experts, see `gsdd_jax.experts`; they are read and never updated.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from annotated_types import Ge
from typing_extensions import Doc

from gsdd_jax import pixels
from gsdd_jax.augment import DsaSpec, dsa
from gsdd_jax.codecs import Codec
from gsdd_jax.errors import InputError
from gsdd_jax.match.base import Batch, Objective, Synthetic
from gsdd_jax.match.chunks import split_classes, sum_of_chunks
from gsdd_jax.match.needs import ExpertNetworks, Need, RealImages
from gsdd_jax.match.trajectory import flattener
from gsdd_jax.nets import Network, cross_entropy
from gsdd_jax.parallel import Shard, unsharded
from gsdd_jax.whiten import Whitening

# NCFM's factor of its loss, with which the cross entropy has weight 1.
NCFM_WEIGHT = 300.0
# Under square roots, whose slope at 0 is infinite.
_SMALL = 1e-12
# What the key of the augmentation is folded with.
_FREQUENCIES = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributionSpec:
    """Settings of distribution matching; the defaults are DM's."""

    name: Annotated[Literal["distribution"], Doc("the objective")] = "distribution"
    batch_real: Annotated[int, Ge(1), Doc("real images per class and iteration (DM: 256)")] = 256
    batch_syn: Annotated[int, Ge(0), Doc("synthetic images per class and iteration, drawn anew each time; 0 = all")] = 0
    class_chunk: Annotated[
        int, Ge(1), Doc("classes per pass through the network; bounds memory, changes no result")
    ] = 1
    networks: Annotated[
        Literal["random", "experts", "interpolated"],
        Doc(
            "a fresh random network per iteration (DM), one drawn from all epochs of the experts (TGDD), or a mix of "
            "an expert's first and last weights (DANCE)"
        ),
    ] = "random"
    expert_epochs: Annotated[int, Ge(1), Doc("last epoch of the experts (TGDD, DANCE: 60)")] = 12
    cross_entropy: Annotated[
        float, Ge(0), Doc("weight of the cross entropy of a class's synthetic images under an expert (TGDD, DANCE: 1)")
    ] = 0.0
    later_epochs: Annotated[
        int,
        Ge(0),
        Doc(
            "the cross entropy is under an expert of up to so many epochs later (TGDD: 6); 0 = the network that matches"
        ),
    ] = 0
    draws: Annotated[
        int,
        Ge(0),
        Doc(
            "match statistics of the whole training set, computed once per expert, epoch and one of so many draws of "
            "the augmentation, and kept beside the experts; 0 = those of a batch, anew each time"
        ),
    ] = 0
    augment: Annotated[
        bool, Doc("matched images are augmented, by one draw for real and synthetic ones of a class")
    ] = True
    distance: Annotated[
        Literal["mean", "characteristic"],
        Doc("between mean features (DM), or between characteristic functions of normalized features (NCFM)"),
    ] = "mean"
    normalize: Annotated[bool, Doc("with distance mean: features have length 1")] = False
    variance: Annotated[
        float, Ge(0), Doc("with distance mean: weight of the squared difference of the features' variances")
    ] = 0.0
    frequencies: Annotated[int, Ge(1), Doc("at which characteristic functions are compared (NCFM: 1,024)")] = 1024

    def __post_init__(self) -> None:
        """Refuses what only experts have, where networks are random."""
        for key in ("cross_entropy", "later_epochs", "draws"):
            if self.networks == "random" and (value := getattr(self, key)):
                raise InputError(f"objective.{key}: expected 0 with networks=random, found {value}")

    @property
    def last_epoch(self) -> int:
        """Last epoch of an expert that is used: what has to be trained."""
        return self.expert_epochs


class ExpertNetwork(NamedTuple):
    """What a step is given of the experts.

    Attributes:
        weights: Flat weights ``[p]`` of the network that matches.
        later: Those of the network of the cross entropy; None where it is the same.
        draw: Number of the augmentation's draw, int32; see `draw_key`.
        statistics: Of all real images of each class, ``[k, s]``; None where they come in batches.
    """

    weights: Any
    later: Any
    draw: Any
    statistics: Any


def make(spec: DistributionSpec, codec: Codec, network: Network, augment: DsaSpec) -> Objective:
    """Builds the objective; see `gsdd_jax.match.make`."""
    augment = augment if spec.augment else dataclasses.replace(augment, strategy="none")
    needs: dict[str, Need] = {}
    if not spec.draws:
        needs["real"] = RealImages(spec.batch_real)
    if spec.networks != "random":
        needs["expert"] = ExpertNetworks(spec, network, augment)

    def loss(
        key: jax.Array, learned: Any, carry: Any, synthetic: Synthetic, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        del learned
        key_syn, key_loss = jax.random.split(key)
        value = distribution_loss(
            key_loss,
            batch.drawn.get("real"),
            synthetic.by_class(key_syn, spec.batch_syn),
            network=network,
            augment=augment,
            whitening=batch.whitening,
            class_chunk=spec.class_chunk,
            shard=synthetic.shard,
            spec=spec,
            expert=batch.drawn.get("expert"),
        )
        return value, {}, carry

    return Objective(spec, codec, network, needs, loss)


def distribution_loss(
    key: jax.Array,
    real: jax.Array | None,
    syn: jax.Array,
    *,
    network: Network,
    augment: DsaSpec,
    whitening: Whitening,
    class_chunk: int,
    shard: Shard | None = None,
    spec: DistributionSpec | None = None,
    expert: ExpertNetwork | None = None,
) -> jax.Array:
    """Returns ``sum_k || mean phi(real_k) - mean phi(syn_k) ||^2`` for a network ``phi``, or another distance.

    ``phi`` is the flattened last feature map, of a fresh random network (DM) or of an expert (TGDD, DANCE), to which
    the mean cross entropy of the synthetic images of each class may be added. Each class has its own DSA draw, the same
    for its real and synthetic images. The sum runs over classes and features without division, as in the references.
    Deviations: the references of DDiF, GSDD, TGDD and DANCE take one optimizer step per class, DANCE another one for
    the cross entropy; this loss is of all classes and both terms at once, as in DM's own code.

    Args:
        key: Decides the network and the augmentations; consumed.
        real: ``[k, b, h, w, c]`` images, uint8 or in [0,1]; None where ``expert`` brings their statistics.
        syn: ``[k, g, h, w, c]`` float images in [0,1].
        network: The architecture of ``phi``.
        augment: DSA settings.
        whitening: What networks see images through.
        class_chunk: Classes per pass through the network; need not divide ``k``.
        shard: Which classes these are, where other devices have the others, and the sum is over these.
        spec: Distance and cross entropy; those of DM if None.
        expert: The trained network, in place of a random one.

    Returns:
        The loss, a scalar. Differentiable once, with respect to ``syn`` and nothing else; the backward pass keeps no
        activations.
    """
    spec = spec or DistributionSpec()
    key_network, key_augment = jax.random.split(key)
    unflatten = flattener(network)[1]
    if expert is None:
        phi_params = later = network.init(key_network)
    else:
        phi_params = unflatten(expert.weights)
        later = phi_params if expert.later is None else unflatten(expert.later)
        key_augment = draw_key(expert.draw) if spec.draws else key_augment
    shard = shard or unsharded(syn.shape[0])
    split, weight = split_classes(shard, class_chunk)
    keys = split(shard.take(jax.random.split(key_augment, shard.total)))
    shared = (phi_params, later, whitening, key_augment)

    def outputs(params: Any, augmented: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits and features ``[chunk, b, ...]``."""
        chunk, batch = augmented.shape[:2]
        found = network.outputs(params, augmented.reshape(chunk * batch, *augmented.shape[2:]))
        logits, features = (x.reshape(chunk, batch, -1) for x in found)
        return logits, features

    def augmented(whitening: Whitening, keys: jax.Array, images: jax.Array) -> jax.Array:
        # A loop, not vmap: under vmap every class would pay for all six operations.
        return jax.lax.map(lambda x: dsa(x[0], x[1], augment, siamese=True), (keys, whitening(images)))

    def target(keys: jax.Array, images: jax.Array) -> jax.Array:
        images = augmented(whitening, keys, pixels.as_float(images, "real"))
        return statistics(spec, key_augment, outputs(phi_params, images)[1]).mean(1)

    def chunk_loss(
        shared: Any, syn: jax.Array, keys: jax.Array, target: jax.Array, classes: jax.Array, weight: jax.Array
    ) -> jax.Array:
        phi_params, later, whitening, key_augment = shared
        images = augmented(whitening, keys, syn)
        logits, features = outputs(phi_params, images)
        value = _distance(spec, target, statistics(spec, key_augment, features).mean(1))
        if spec.cross_entropy:
            if spec.later_epochs:
                logits = outputs(later, images)[0]
            per_image = jax.vmap(lambda x, k: cross_entropy(x, jnp.full(len(x), k)))(logits, classes)
            value += spec.cross_entropy * per_image.mean(1)
        return jnp.sum(weight * value)

    if real is None:
        assert expert is not None
        targets = split(shard.take(expert.statistics))
    else:
        targets = jax.lax.map(lambda x: target(*x), (keys, split(real)))
    others = keys, jax.lax.stop_gradient(targets), split(shard.take(jnp.arange(shard.total))), weight
    return sum_of_chunks(chunk_loss, split(syn), others, shared)


def draw_key(draw: jax.Array | int) -> jax.Array:
    """Returns the key of one of the draws that iterations share; that of class ``k`` is the ``k``-th of its split."""
    return jax.random.fold_in(jax.random.key(0), draw)


def statistics(spec: DistributionSpec, key: jax.Array, features: jax.Array) -> jax.Array:
    """Returns what is averaged over images, ``[..., s]``, of their features ``[..., f]``.

    These themselves, or scaled to length 1, with their squares where variances count; or of features of length 1 the
    real and imaginary parts of ``exp(i t f)`` at random frequencies ``t`` from N(0, 1), so that projections have unit
    variance (NCFM).

    Args:
        spec: Which; `distance`, `normalize`, `variance` and `frequencies` count.
        key: Of the frequencies.
        features: ``[..., f]``.
    """
    if spec.distance == "characteristic" or spec.normalize:
        features /= jnp.sqrt(jnp.sum(features**2, -1, keepdims=True) + _SMALL)
    if spec.distance == "mean":
        return jnp.concatenate([features, features**2], -1) if spec.variance else features
    frequencies = jax.random.normal(
        jax.random.fold_in(key, _FREQUENCIES), (features.shape[-1], spec.frequencies), features.dtype
    )
    angles = features @ frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def _distance(spec: DistributionSpec, real: jax.Array, syn: jax.Array) -> jax.Array:
    """Returns the distance of each class, ``[k]``, from mean statistics ``[k, s]``."""
    if spec.distance == "mean":
        if not spec.variance:
            return jnp.sum((real - syn) ** 2, -1)
        (mean_real, square_real), (mean_syn, square_syn) = (jnp.split(x, 2, -1) for x in (real, syn))
        variances = (square_real - mean_real**2) - (square_syn - mean_syn**2)
        return jnp.sum((mean_real - mean_syn) ** 2, -1) + spec.variance * jnp.sum(variances**2, -1)
    # NCFM's terms of amplitude and phase, weighed alike as there, add up to this.
    real, syn = (x.reshape(*x.shape[:-1], 2, -1) for x in (real, syn))
    squares = jnp.sum((real - syn) ** 2, -2) / 2
    return NCFM_WEIGHT * jnp.sqrt(jnp.maximum(squares, _SMALL)).mean(-1)
