"""The ConvNet of the dataset-distillation literature (DC, Zhao et al. 2021; "ConvNetD3" and so on).

Each of its `depth` blocks is a 3x3 convolution with bias, instance normalization, ReLU and 2x2 average pooling, all of
one width; one linear layer follows. Initialization is PyTorch's default for these layers, as in the reference. Other
normalizations, activations and poolings make the space that the field searches (DC, Zhao et al. 2021, section 4.4).

Its form for videos and volumes, convnet3d, has 3x3x3 convolutions and 2x2x2 poolings and normalizes over frames too,
like that of DDiF's voxels (Shin et al. 2025); once a single frame is left, blocks pool in space only. The ConvNet3D of
VDSD (Wang et al. 2024) is another: 3x7x7 kernels of stride 2 in space, and a head with dropout that takes the largest
logit over time.

Deviations from the reference, of which only the second changes the family of functions:
- The last feature map is flattened as (h, w, c), not (c, h, w). That permutes the rows of the linear layer only.
- Layer normalization scales and shifts each channel; the reference each number of a map.
- The reference pads every one-channel image by 3 in the first block, here only one of 28 px is: it is meant
  to turn 28 into 32.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gsdd_jax.errors import InputError
from gsdd_jax.nets import layers

_NORMS = ("instance", "layer", "none")
_ACTIVATIONS = {"relu": layers.relu, "leaky_relu": nn.leaky_relu, "sigmoid": nn.sigmoid}
# Of pixels, and of two frames.
_POOLINGS: dict[str, tuple[Callable[..., jax.Array], Callable[..., jax.Array]] | None] = {
    "average": (layers.avg_pool, lambda a, b: (a + b) / 2),
    "max": (layers.max_pool, layers.larger),
    "none": None,
}


class ConvNet(nn.Module):
    """The network as a Flax module; `make` checks the arguments.

    Attributes:
        depth: number of blocks.
        width: channels of every block.
        norm: one of `_NORMS`.
        activation: a key of `_ACTIVATIONS`.
        pooling: a key of `_POOLINGS`.
        num_classes: k.
    """

    depth: int
    width: int
    norm: str
    activation: str
    pooling: str
    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps float [n, h, w, c], or [n, t, h, w, c], to logits [n, k] and the last feature map, flat, [n, f]."""
        margin = layers.digit_margin(images.shape[-3:])
        around = [(0, 0)] * (images.ndim - 3) + [(margin, margin)] * 2 + [(0, 0)]
        x, conv = jnp.pad(images, around), layers.conv if images.ndim == 4 else layers.conv3d
        for block in range(self.depth):
            x = conv(x, self.width, name=f"conv{block}")
            if self.norm != "none":
                together = tuple(range(1, x.ndim - (self.norm == "instance")))
                x = layers.InstanceNorm(together, name=f"norm{block}")(x)
            x = _pooled(_ACTIVATIONS[self.activation](x), self.pooling)
        features = x.reshape(x.shape[0], -1)
        return layers.dense(features, self.num_classes, name="linear"), features


def _pooled(x: jax.Array, pooling: str) -> jax.Array:
    if (pool := _POOLINGS[pooling]) is None:
        return x
    of_pixels, of_frames = pool
    if x.ndim == 4:
        return of_pixels(x)
    n, t, h, w, c = x.shape
    x = of_pixels(x.reshape(n * t, h, w, c)).reshape(n, t, h // 2, w // 2, c)
    return x if t == 1 else of_frames(x[:, : t // 2 * 2 : 2], x[:, 1::2])


def make(spec: Any, image_shape: tuple[int, ...], num_classes: int) -> ConvNet:
    """Checks that a ConvNet fits the images and makes the module.

    Args:
        spec: a `NetSpec`.
        image_shape: (h, w, c), or of convnet3d (t, h, w, c).
        num_classes: k.

    Returns:
        The module.

    Raises:
        ValueError: a value out of range, or more poolings than the resolution allows.
    """
    if (spec.name == "convnet3d") != (len(image_shape) == 4):
        raise InputError(
            f"network.name: convnet3d is for videos [t, h, w, c], expected another one for images {list(image_shape)}"
        )
    if not 1 <= spec.depth <= 7:
        raise InputError(f"network.depth: {spec.depth}, must be 1 to 7")
    if spec.width < 1:
        raise InputError(f"network.width: {spec.width}, must be at least 1")
    for key, known in (("norm", _NORMS), ("activation", _ACTIVATIONS), ("pooling", _POOLINGS)):
        if getattr(spec, key) not in known:
            raise InputError(f"network.{key}: {getattr(spec, key)!r}, must be one of {list(known)}")
    *_, h, w, _ = image_shape
    largest = int(math.log2(min(h, w) + 2 * layers.digit_margin(image_shape[-3:])))
    if spec.depth > largest and spec.pooling != "none":
        raise InputError(
            f"network.depth: {spec.depth} blocks halve {h}x{w} px images below one pixel, the largest that fits is "
            f"{largest}"
        )
    return ConvNet(
        depth=spec.depth,
        width=spec.width,
        norm=spec.norm,
        activation=spec.activation,
        pooling=spec.pooling,
        num_classes=num_classes,
    )
