"""The ConvNet of the dataset-distillation literature (DC, Zhao et al. 2021; "ConvNetD3" and so on).

Each of its `depth` blocks is a 3x3 convolution with bias, instance normalization, ReLU and 2x2 average pooling, all of
one width; one linear layer follows. Initialization is PyTorch's default for these layers, as in the reference.

Deviations from the reference, none of which changes the family of functions:
- The last feature map is flattened as (h, w, c), not (c, h, w). That permutes the rows of the linear layer only.
- The reference pads every one-channel image by 3 in the first block, here only one of 28 px is: it is meant
  to turn 28 into 32.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from gsdd_jax.errors import InputError
from gsdd_jax.nets import layers


class ConvNet(nn.Module):
    """The network as a Flax module; `make` checks the arguments.

    Attributes:
        depth: number of blocks.
        width: channels of every block.
        norm: "instance" or "none".
        num_classes: k.
    """

    depth: int
    width: int
    norm: str
    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps float images [n, h, w, c] to logits [n, k] and the flattened last feature map [n, f]."""
        margin = layers.digit_margin(images.shape[1:])
        x = jnp.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
        for block in range(self.depth):
            x = layers.conv(x, self.width, name=f"conv{block}")
            if self.norm == "instance":
                x = layers.InstanceNorm(name=f"norm{block}")(x)
            x = layers.avg_pool(layers.relu(x))
        features = x.reshape(x.shape[0], -1)
        return layers.dense(features, self.num_classes, name="linear"), features


def make(*, depth: int, width: int, norm: str, image_shape: tuple[int, int, int], num_classes: int) -> ConvNet:
    """Checks that a ConvNet fits the images and makes the module.

    Args:
        depth: number of blocks, 1 to 7.
        width: channels of every block, at least 1.
        norm: "instance" or "none".
        image_shape: (h, w, c).
        num_classes: k.

    Returns:
        The module.

    Raises:
        ValueError: a value out of range, or more poolings than the resolution allows.
    """
    if not 1 <= depth <= 7:
        raise InputError(f"network.depth: {depth}, must be 1 to 7")
    if width < 1:
        raise InputError(f"network.width: {width}, must be at least 1")
    if norm not in ("instance", "none"):
        raise InputError(f"network.norm: {norm!r}, must be one of ['instance', 'none']")
    h, w, _ = image_shape
    margin = layers.digit_margin(image_shape)
    largest = int(math.log2(min(h, w) + 2 * margin))
    if depth > largest:
        raise InputError(
            f"network.depth: {depth} blocks halve {h}x{w} px images below one pixel, the largest that fits is {largest}"
        )
    return ConvNet(depth=depth, width=width, norm=norm, num_classes=num_classes)
