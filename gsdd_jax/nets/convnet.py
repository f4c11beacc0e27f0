"""The ConvNet of the dataset-distillation literature (DC, Zhao et al. 2021; "ConvNetD3" and so on).

Each of its `depth` blocks is a 3x3 convolution with bias, instance normalization, ReLU and 2x2 average pooling, all of
one width; one linear layer follows. Initialization is PyTorch's default for these layers, as in the reference. Other
normalizations, activations and poolings make the space that the field searches (DC, Zhao et al. 2021, section 4.4).

Deviations from the reference, of which only the second changes the family of functions:
- The last feature map is flattened as (h, w, c), not (c, h, w). That permutes the rows of the linear layer only.
- Layer normalization scales and shifts each channel; the reference each number of a map.
- The reference pads every one-channel image by 3 in the first block, here only one of 28 px is: it is meant
  to turn 28 into 32.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gsdd_jax.errors import InputError
from gsdd_jax.nets import layers

_NORMS: dict[str, Callable[..., Any]] = {
    "instance": layers.InstanceNorm,
    "layer": partial(layers.InstanceNorm, axes=(1, 2, 3)),
    "none": lambda name: lambda x: x,
}
_ACTIVATIONS = {"relu": layers.relu, "leaky_relu": nn.leaky_relu, "sigmoid": nn.sigmoid}
_POOLINGS = {"average": layers.avg_pool, "max": layers.max_pool, "none": lambda x: x}


class ConvNet(nn.Module):
    """The network as a Flax module; `make` checks the arguments.

    Attributes:
        depth: number of blocks.
        width: channels of every block.
        norm: a key of `_NORMS`.
        activation: of `_ACTIVATIONS`.
        pooling: of `_POOLINGS`.
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
        """Maps float images [n, h, w, c] to logits [n, k] and the flattened last feature map [n, f]."""
        margin = layers.digit_margin(images.shape[1:])
        x = jnp.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
        for block in range(self.depth):
            x = layers.conv(x, self.width, name=f"conv{block}")
            x = _NORMS[self.norm](name=f"norm{block}")(x)
            x = _POOLINGS[self.pooling](_ACTIVATIONS[self.activation](x))
        features = x.reshape(x.shape[0], -1)
        return layers.dense(features, self.num_classes, name="linear"), features


def make(spec: Any, image_shape: tuple[int, int, int], num_classes: int) -> ConvNet:
    """Checks that a ConvNet fits the images and makes the module.

    Args:
        spec: a `NetSpec`.
        image_shape: (h, w, c).
        num_classes: k.

    Returns:
        The module.

    Raises:
        ValueError: a value out of range, or more poolings than the resolution allows.
    """
    if not 1 <= spec.depth <= 7:
        raise InputError(f"network.depth: {spec.depth}, must be 1 to 7")
    if spec.width < 1:
        raise InputError(f"network.width: {spec.width}, must be at least 1")
    for key, known in (("norm", _NORMS), ("activation", _ACTIVATIONS), ("pooling", _POOLINGS)):
        if getattr(spec, key) not in known:
            raise InputError(f"network.{key}: {getattr(spec, key)!r}, must be one of {list(known)}")
    h, w, _ = image_shape
    largest = int(math.log2(min(h, w) + 2 * layers.digit_margin(image_shape)))
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
