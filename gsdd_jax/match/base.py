"""The interface of all objectives: what they are given, what they learn, and what they compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gsdd_jax.codecs import Codec
from gsdd_jax.match.needs import Need
from gsdd_jax.nets import Network
from gsdd_jax.parallel import Axis, Shard
from gsdd_jax.whiten import Whitening

# What the key of a decoding is folded with, for codecs that decode at random.
_DRAWN = 1


class Synthetic(NamedTuple):
    """The distilled set as a loss sees it: differentiable in its parameters, decoded as far as it is asked for.

    Attributes:
        codec: How parameters become images.
        params: The parameters.
        axis: The devices that take the step together.
    """

    codec: Codec
    params: Any
    axis: Axis = Axis()

    @property
    def shard(self) -> Shard:
        """The classes of this device."""
        return self.axis.shard(self.codec.num_classes)

    @property
    def labels(self) -> jax.Array:
        """Labels ``[n]`` of all images."""
        return jnp.repeat(jnp.arange(self.codec.num_classes), self.codec.images_per_class)

    def images(self, key: jax.Array) -> jax.Array:
        """Decodes all images, ``[n, h, w, c]`` around [0,1]; the key is for codecs that decode at random."""
        return self.codec.decode(self.params, key=jax.random.fold_in(key, _DRAWN))

    def by_class(self, key: jax.Array, count: int = 0, *, draw: jax.Array | None = None) -> jax.Array:
        """Decodes images of each class of this device, ``[own, count, h, w, c]``.

        Args:
            key: Decides which; consumed.
            count: Images per class, drawn without replacement; 0, or as many as there are: all in order.
            draw: For codecs that decode at random; from ``key`` if None.
        """
        g, shard = self.codec.images_per_class, self.shard
        count = min(count or g, g)
        if count < g:
            keys = shard.take(jax.random.split(key, shard.total))
            within = jax.vmap(lambda key: jax.random.choice(key, g, (count,), replace=False))(keys)
        else:
            within = jnp.arange(g)
        index = None
        if count < g or shard.own < shard.total:
            index = (within + g * shard.take(jnp.arange(shard.total))[:, None]).reshape(-1)
        draw = jax.random.fold_in(key, _DRAWN) if draw is None else draw
        images = self.codec.decode(self.params, index, key=draw)
        return images.reshape(shard.own, count, *images.shape[1:])


class Batch(NamedTuple):
    """What a step is given.

    Attributes:
        whitening: What networks see images through.
        drawn: What the objective needs, by the names it gave.
    """

    whitening: Whitening
    drawn: Mapping[str, Any]


# ``(key, learned, carry, synthetic, batch) -> (loss, metrics, carry)``.
Loss = Callable[[jax.Array, Any, Any, Synthetic, Batch], tuple[jax.Array, dict[str, jax.Array], Any]]


def _nothing() -> tuple[dict[str, jax.Array], Any]:
    return {}, ()


class Objective(NamedTuple):
    """What is matched between real and synthetic images, as pure functions.

    Attributes:
        spec: The settings that it was made from, with every default resolved.
        codec: How the synthetic images are stored.
        network: The architecture that matches.
        needs: What each step has to be given, by name; see `gsdd_jax.match.needs`.
        loss: ``(key, learned, carry, synthetic, batch) -> (loss, metrics, carry)``. The loss is a scalar, or where
            several devices take the step, this one's part of a sum; it is differentiated with respect to ``learned``
            and the parameters of ``synthetic``. Metrics are device scalars, replicated. The carry goes to
            ``after``.
        init: ``() -> (learned, carry)`` before the first step: a dict of arrays that are trained beside the codec's
            parameters, and a pytree that lives on from step to step, such as a network. Scalars of ``learned`` are
            metrics by their names.
        after: ``(key, carry, synthetic, batch) -> carry``, with the parameters after the step.
        optimizer: ``() -> optax`` transformation for ``learned``.
        project: ``learned -> learned``, applied after each step.
        then: Further losses, on each of which the codec's optimizer takes a step of its own after the one on ``loss``.
    """

    spec: Any
    codec: Codec
    network: Network
    needs: Mapping[str, Need]
    loss: Loss
    init: Callable[[], tuple[dict[str, jax.Array], Any]] = _nothing
    after: Callable[[jax.Array, Any, Synthetic, Batch], Any] = lambda key, carry, synthetic, batch: carry
    optimizer: Callable[[], optax.GradientTransformation] = optax.identity
    project: Callable[[Any], Any] = lambda learned: learned
    then: tuple[Loss, ...] = ()
