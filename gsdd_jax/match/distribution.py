"""Distribution matching: mean embeddings under random networks (DM, Zhao & Bilen 2023)."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge
from typing_extensions import Doc

from gsdd_jax import pixels
from gsdd_jax.augment import DsaSpec, dsa
from gsdd_jax.codecs import Codec
from gsdd_jax.match.base import Batch, Objective, Synthetic
from gsdd_jax.match.chunks import split_classes, sum_of_chunks
from gsdd_jax.match.needs import RealImages
from gsdd_jax.nets import Network
from gsdd_jax.parallel import Shard, unsharded
from gsdd_jax.whiten import Whitening


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributionSpec:
    """Settings of distribution matching."""

    name: Annotated[Literal["distribution"], Doc("the objective")] = "distribution"
    batch_real: Annotated[int, Ge(1), Doc("real images per class and iteration (DM: 256)")] = 256
    batch_syn: Annotated[int, Ge(0), Doc("synthetic images per class and iteration, drawn anew each time; 0 = all")] = 0
    class_chunk: Annotated[
        int, Ge(1), Doc("classes per pass through the network; bounds memory, changes no result")
    ] = 1


def make(spec: DistributionSpec, codec: Codec, network: Network, augment: DsaSpec) -> Objective:
    """Builds the objective; see :func:`gsdd_jax.match.make`."""

    def loss(
        key: jax.Array, learned: Any, carry: Any, synthetic: Synthetic, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        del learned
        key_syn, key_loss = jax.random.split(key)
        value = distribution_loss(
            key_loss,
            batch.drawn["real"],
            synthetic.by_class(key_syn, spec.batch_syn),
            network=network,
            augment=augment,
            whitening=batch.whitening,
            class_chunk=spec.class_chunk,
            shard=synthetic.shard,
        )
        return value, {}, carry

    return Objective(spec, codec, network, {"real": RealImages(spec.batch_real)}, loss)


def distribution_loss(
    key: jax.Array,
    real: jax.Array,
    syn: jax.Array,
    *,
    network: Network,
    augment: DsaSpec,
    whitening: Whitening,
    class_chunk: int,
    shard: Shard | None = None,
) -> jax.Array:
    """Returns ``sum_k || mean phi(real_k) - mean phi(syn_k) ||^2`` for a fresh random network ``phi``.

    ``phi`` is the flattened last feature map. Each class has its own DSA draw, the same for its real and synthetic
    images. The sum runs over classes and features without division, as in the reference. Deviation: the reference of
    DDiF and GSDD takes one optimizer step per class; this loss is of all classes at once, as in DM's own code.

    Args:
        key: Decides the network and the augmentations; consumed.
        real: ``[k, b, h, w, c]`` images, uint8 or in [0,1].
        syn: ``[k, g, h, w, c]`` float images in [0,1].
        network: The architecture of ``phi``.
        augment: DSA settings.
        whitening: What networks see images through.
        class_chunk: Classes per pass through the network; need not divide ``k``.
        shard: Which classes these are, where other devices have the others, and the sum is over these.

    Returns:
        The loss, a scalar. Differentiable once, with respect to ``syn`` and nothing else; the backward pass keeps no
        activations.
    """
    key_network, key_augment = jax.random.split(key)
    phi_params = network.init(key_network)
    shard = shard or unsharded(real.shape[0])
    split, weight = split_classes(shard, class_chunk)

    shared = (phi_params, whitening)

    def embed(shared: Any, keys: jax.Array, images: jax.Array) -> jax.Array:
        """Mean embeddings ``[chunk, f]`` of ``images [chunk, b, h, w, c]``."""
        phi_params, whitening = shared
        chunk, batch = images.shape[:2]
        normal = whitening(images)
        # A loop, not vmap: under vmap every class would pay for all six operations.
        augmented = jax.lax.map(lambda x: dsa(x[0], x[1], augment, siamese=True), (keys, normal))
        _, features = network.outputs(phi_params, augmented.reshape(chunk * batch, *images.shape[2:]))
        return features.reshape(chunk, batch, -1).mean(1)

    def chunk_loss(shared: Any, syn: jax.Array, keys: jax.Array, target: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sum(weight[:, None] * (target - embed(shared, keys, syn)) ** 2)

    keys = split(shard.take(jax.random.split(key_augment, shard.total)))
    real_chunks = split(real)
    targets = jax.lax.map(lambda x: embed(shared, x[0], pixels.as_float(x[1], "real")), (keys, real_chunks))
    return sum_of_chunks(chunk_loss, split(syn), (keys, jax.lax.stop_gradient(targets), weight), shared)
