"""DDiF's decoder: one small SIREN per image, all images of a batch at once.

A network maps a pixel's position to its color: ``h_1 = sin(w0 (W u + b))``, ``h_l = sin(w (W h + b))``, ``W h + b``.
The authors run the networks of a batch one after the other in Python; here the images are an axis of every product, so
that a comparison measures the parameterization and not the loop.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Frequencies of the first and of the other sines at ImageNet's sizes; DDiF takes 10 for the others on CIFAR.
FIRST = 30.0
HIDDEN = 40.0
# Pixels that `decode_checkpointed` draws at once: enough to fill a GPU, 16 images of 128 pixels.
CHUNK_PIXELS = 1 << 18


class Layer(NamedTuple):
    """An affine map per image."""

    weight: jax.Array  # [n, in, out]
    bias: jax.Array  # [n, out]


Siren = tuple[Layer, ...]


def floats(width: int, *, layers: int = 3, channels: int = 3) -> int:
    """Returns the numbers per image of a network with ``layers`` sine layers of ``width``."""
    return 3 * width + (layers - 1) * (width * width + width) + channels * (width + 1)


@functools.partial(jax.jit, static_argnames=("n", "width", "layers", "channels", "hidden"))
def init(key: jax.Array, n: int, width: int, *, layers: int = 3, channels: int = 3, hidden: float = HIDDEN) -> Siren:
    """Draws ``n`` networks: the first layer U(+-1/2), the others U(+-sqrt(6 / in) / w), biases alike."""
    sizes = [2, *[width] * layers, channels]
    # One draw for all layers, because each draw takes a second to compile.
    flat = jax.random.uniform(key, (n, floats(width, layers=layers, channels=channels)), minval=-1.0)
    params, done = [], 0
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        bound = 0.5 if i == 0 else np.sqrt(6 / inputs) / hidden
        own = bound * flat[:, done : done + (inputs + 1) * outputs]
        params.append(Layer(own[:, outputs:].reshape(n, inputs, outputs), own[:, :outputs]))
        done += (inputs + 1) * outputs
    return tuple(params)


def decode(params: Siren, size: int, *, first: float = FIRST, hidden: float = HIDDEN) -> jax.Array:
    """Draws the images ``[n, size, size, c]``.

    Differentiable; the backward pass keeps about ``2 * layers * width * size**2`` floats per image. Positions run from
    -1 to 1, the row first, as in the authors' code.
    """
    axis = jnp.linspace(-1.0, 1.0, size)
    row, column = jnp.meshgrid(axis, axis, indexing="ij")
    h = jnp.stack([row, column], axis=-1).reshape(size * size, 2)
    for i, (weight, bias) in enumerate(params):
        # The positions are shared by all images, whatever follows is not.
        h = jnp.einsum("pi,nio->npo" if i == 0 else "npi,nio->npo", h, weight) + bias[:, None]
        if i + 1 < len(params):
            h = jnp.sin((first if i == 0 else hidden) * h)
    return h.reshape(h.shape[0], size, size, -1)


def decode_checkpointed(params: Siren, size: int, *, first: float = FIRST, hidden: float = HIDDEN) -> jax.Array:
    """Draws the same images in chunks that the backward pass draws again, one at a time.

    One checkpoint around all images would save nothing, because the backward pass would then hold all of them at once.
    """
    one = jax.checkpoint(
        lambda params: decode(jax.tree.map(lambda x: x[None], params), size, first=first, hidden=hidden)
    )
    return jax.lax.map(lambda params: one(params)[0], params, batch_size=max(1, CHUNK_PIXELS // size**2))
