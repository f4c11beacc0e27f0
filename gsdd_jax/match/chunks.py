"""Sums of losses over chunks of classes, at the memory of one chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gsdd_jax.parallel import Shard


def split_classes(shard: Shard, class_chunk: int) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """Returns how to cut a leading axis of a share's classes into chunks, and which of the pieces count.

    Args:
        shard: What the axis holds.
        class_chunk: Classes per chunk; need not divide their number.

    Returns:
        A function from ``[own, ...]`` to ``[chunks, chunk, ...]``, the last chunk filled up with the first classes; and
        weights ``[chunks, chunk]``, 0 for what fills up and 1 for the rest.
    """
    chunk = min(class_chunk, shard.own)
    chunks = -(-shard.own // chunk)
    fill = jnp.arange(chunks * chunk)

    def split(x: jax.Array) -> jax.Array:
        return x[fill % shard.own].reshape(chunks, chunk, *x.shape[1:])

    counts = (fill < shard.own) & (shard.first + fill < shard.total)
    return split, counts.astype(jnp.float32).reshape(chunks, chunk)


def sum_of_chunks(loss: Callable[..., jax.Array], syn: jax.Array, others: tuple, shared: Any) -> jax.Array:
    """Sums ``loss(shared, syn, *others)`` over the leading axis, one chunk after the other.

    The gradient of each chunk is taken on the spot. The chunks share no term, so what the backward pass needs of a
    chunk is its gradient and none of its activations. Compared with ``jax.checkpoint`` this has the same peak memory
    and no second forward pass.

    Args:
        loss: Maps ``shared`` and one chunk of ``syn`` and of each of ``others`` to a scalar. It may close over no
            array, or ``jax.grad`` of a jitted caller fails.
        syn: ``[chunks, ...]``.
        others: Arrays ``[chunks, ...]``.
        shared: A pytree that all chunks share.

    Returns:
        The sum; differentiable once, with respect to ``syn`` and nothing else.
    """

    @jax.custom_vjp
    def total(syn: jax.Array, others: tuple, shared: Any) -> jax.Array:
        return jax.lax.map(lambda x: loss(shared, *x), (syn, *others)).sum()

    def forward(syn: jax.Array, others: tuple, shared: Any) -> tuple[jax.Array, jax.Array]:
        losses, grads = jax.lax.map(lambda x: jax.value_and_grad(loss, argnums=1)(shared, *x), (syn, *others))
        return losses.sum(), grads

    total.defvjp(forward, lambda grads, cotangent: (cotangent * grads, None, None))
    return total(syn, others, shared)
