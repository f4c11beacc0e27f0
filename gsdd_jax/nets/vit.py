"""The vision transformer of the dataset-distillation literature (GLaD, Cazenavette et al. 2023).

Patches are embedded linearly, a class token is put before them and positions are added; blocks of attention and of a
two-layer perceptron, each beside a shortcut, follow, and one linear layer reads the class token. Two forms: for images
up to 32 px patches of 4 px, six blocks and layer normalization before each half of a block and before the last layer;
for larger ones patches of 16 px, ten blocks and no normalization at all. Positions and class token start from N(0, 1),
the layers from PyTorch's default, as in the reference.

Deviation: the reference drops out a tenth of the embedded tokens, of each attention's output and of each perceptron's
two. `Network.apply` takes no key and is the same in training and test, so nothing is dropped here.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gsdd_jax.errors import InputError
from gsdd_jax.nets import layers

_WIDTH = 512
_HEADS = 8
_HEAD_WIDTH = 64
_HIDDEN = 512


class _Form(NamedTuple):
    patch: int
    depth: int
    norm: bool


_CIFAR = _Form(patch=4, depth=6, norm=True)
_LARGE = _Form(patch=16, depth=10, norm=False)


class ViT(nn.Module):
    """The network as a Flax module; `make` checks the arguments.

    Attributes:
        num_classes: k.
    """

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps float images [n, h, w, c] to logits [n, k] and what the last layer sees of the class token [n, f]."""
        form = _form(images.shape[1:])
        x = layers.dense(_patches(images, form.patch), _WIDTH, name="embed")
        cls = self.param("cls", nn.initializers.normal(1.0), (_WIDTH,), jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, _WIDTH)), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(1.0), x.shape[1:], jnp.float32)
        for index in range(form.depth):
            x = Block(form.norm, name=f"block{index}")(x)
        features = layers.LayerNorm(name="norm")(x[:, 0]) if form.norm else x[:, 0]
        return layers.dense(features, self.num_classes, name="linear"), features


class Block(nn.Module):
    """Attention and a two-layer perceptron, each beside a shortcut.

    Attributes:
        norm: whether layer normalization precedes each.
    """

    norm: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [n, t, f] to tokens of the same shape."""
        y = layers.LayerNorm(name="norm0")(x) if self.norm else x
        y = layers.dense(y, 3 * _HEADS * _HEAD_WIDTH, use_bias=False, name="qkv")
        x = x + layers.dense(_attention(y), _WIDTH, name="out")
        y = layers.LayerNorm(name="norm1")(x) if self.norm else x
        y = nn.gelu(layers.dense(y, _HIDDEN, name="mlp0"), approximate=False)
        return x + layers.dense(y, _WIDTH, name="mlp1")


def make(*, image_shape: tuple[int, ...], num_classes: int) -> ViT:
    """Checks that a ViT fits the images and makes the module.

    Args:
        image_shape: (h, w, c).
        num_classes: k.

    Returns:
        The module.

    Raises:
        ValueError: images that the patches do not cover exactly.
    """
    h, w, _ = image_shape
    patch = _form(image_shape).patch
    if h % patch or w % patch:
        raise InputError(
            f"network.name: vit does not fit {h}x{w} px images, both sides must be divisible by {_CIFAR.patch} "
            f"up to {layers.CIFAR_SIDE} px and by {_LARGE.patch} beyond"
        )
    return ViT(num_classes=num_classes)


def _form(image_shape: tuple[int, ...]) -> _Form:
    return _LARGE if max(image_shape[:2]) > layers.CIFAR_SIDE else _CIFAR


def _patches(images: jax.Array, side: int) -> jax.Array:
    """Cuts images [n, h, w, c] into flattened patches [n, h w / side², side² c], both in reading order."""
    n, h, w, c = images.shape
    grid = images.reshape(n, h // side, side, w // side, side, c)
    return grid.swapaxes(2, 3).reshape(n, -1, side * side * c)


def _attention(qkv: jax.Array) -> jax.Array:
    """Attends in each head; qkv [n, t, 3 inner] holds queries, keys and values, the result is [n, t, inner]."""
    n, t, _ = qkv.shape
    q, k, v = jnp.moveaxis(qkv.reshape(n, t, 3, _HEADS, _HEAD_WIDTH), (2, 3), (0, 2))  # each [n, heads, t, d]
    weights = jax.nn.softmax(q @ k.swapaxes(2, 3) / math.sqrt(_HEAD_WIDTH), axis=-1)
    return (weights @ v).swapaxes(1, 2).reshape(n, t, -1)
