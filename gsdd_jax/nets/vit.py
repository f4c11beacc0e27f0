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
        params = self.param("layers", self._initial, images.shape[1:])
        form = _form(images.shape[1:])

        def norm(x: jax.Array, name: str) -> jax.Array:
            return layers.layer_norm(x, **params[name]) if form.norm else x

        def linear(x: jax.Array, name: str) -> jax.Array:
            return x @ params[name]["kernel"] + params[name]["bias"]

        x = linear(_patches(images, form.patch), "embed")
        cls = jnp.broadcast_to(params["tokens"]["cls"], (x.shape[0], 1, _WIDTH))
        x = jnp.concatenate([cls, x], axis=1) + params["tokens"]["position"]
        for index in range(form.depth):
            name = f"block{index}"
            qkv = norm(x, f"{name}_norm0") @ params[f"{name}_qkv"]["kernel"]
            x = x + linear(_attention(qkv), f"{name}_out")
            hidden = linear(norm(x, f"{name}_norm1"), f"{name}_mlp0")
            x = x + linear(nn.gelu(hidden, approximate=False), f"{name}_mlp1")
        features = norm(x[:, 0], "norm")
        return linear(features, "linear"), features

    def _initial(self, key: jax.Array, image_shape: tuple[int, ...]) -> dict[str, dict[str, jax.Array]]:
        form = _form(image_shape)
        h, w, c = image_shape
        inner = _HEADS * _HEAD_WIDTH
        kernels: dict[str, tuple[int, ...]] = {"embed": (form.patch**2 * c, _WIDTH)}
        for index in range(form.depth):
            kernels[f"block{index}_qkv"] = (_WIDTH, 3 * inner)
            kernels[f"block{index}_out"] = (inner, _WIDTH)
            kernels[f"block{index}_mlp0"] = (_WIDTH, _HIDDEN)
            kernels[f"block{index}_mlp1"] = (_HIDDEN, _WIDTH)
        kernels["linear"] = (_WIDTH, self.num_classes)
        key_layers, key_tokens = jax.random.split(key)
        params = layers.uniform(key_layers, kernels, unbiased=[name for name in kernels if name.endswith("_qkv")])
        tokens = jax.random.normal(key_tokens, (2 + (h // form.patch) * (w // form.patch), _WIDTH), jnp.float32)
        params["tokens"] = {"cls": tokens[0], "position": tokens[1:]}
        if form.norm:
            names = [f"block{index}_norm{half}" for index in range(form.depth) for half in (0, 1)]
            params.update({name: layers.unit_norm(_WIDTH) for name in (*names, "norm")})
        return params


def make(*, image_shape: tuple[int, int, int], num_classes: int) -> ViT:
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
        raise ValueError(
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
