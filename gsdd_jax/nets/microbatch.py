"""Batches in parts of a few images each: on a CPU the maps between layers then stay in its cache.

Whole, a training step on 256 images waits for memory, most of all for pages that are new to the process: ConvNetD3 at
32 px and width 128 then takes twice the time. On other platforms a batch stays whole.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# What the largest map of a part may take: the maps around a layer then fit into the caches of a core or two.
BYTES = 4 << 20
# Divides the leading size of no array of weights, so that it tells what belongs to images.
_TRACED = 97


def size_of(init: Callable[[jax.Array], Any], apply: Callable[..., Any], shape: tuple[int, ...]) -> int:
    """Returns how many images of a batch a network should see at a time: all where it does not matter.

    Args:
        init: of the network, as `apply`.
        apply: (params, images) -> outputs.
        shape: of the batch, (n, h, w, c) or (n, t, h, w, c).
    """
    n, *image_shape = shape
    if jax.default_backend() != "cpu" or n <= (most := _most(init, apply, tuple(image_shape))):
        return n
    # A divisor leaves no shorter part; else parts as equal as can be.
    divisor = next(size for size in range(most, 0, -1) if n % size == 0)
    return divisor if 2 * divisor > most else -(-n // -(-n // most))


@lru_cache(maxsize=64)
def _most(init: Callable[[jax.Array], Any], apply: Callable[..., Any], image_shape: tuple[int, ...]) -> int:
    params = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    images = jax.ShapeDtypeStruct((_TRACED, *image_shape), jnp.float32)
    values = [v.aval for equation in jax.make_jaxpr(apply)(params, images).eqns for v in equation.outvars]
    # Frames of videos may lie side by side.
    maps = [x.size * x.dtype.itemsize for x in values if x.shape and x.shape[0] % _TRACED == 0]
    return max(1, BYTES * _TRACED // max(maps, default=1))


def concatenated(fun: Callable[[jax.Array], Any], size: int, images: jax.Array) -> Any:
    """Returns `fun(images)`, for a function of each image alone, from parts of `size` images.

    The first images fill up the last part: a shorter one, compiled on its own, took a third of the time to compile the
    gradient to 86 images.
    """
    n = len(images)
    images = jnp.concatenate([images, images[: -n % size]])
    parts = lax.map(fun, images.reshape(-1, size, *images.shape[1:]))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], parts)


def summed(fun: Callable[..., Any], size: int, *batch: jax.Array) -> Any:
    """Returns `fun(*batch)`, for a function that sums over images, from parts of `size` images."""
    n, whole = len(batch[0]), len(batch[0]) // size * size
    parts = tuple(x[:whole].reshape(-1, size, *x.shape[1:]) for x in batch)
    if whole == n:
        shapes = jax.eval_shape(fun, *(x[0] for x in parts))
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    else:
        start = fun(*(x[whole:] for x in batch))
    return lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, fun(*part)), None), start, parts)[0]
