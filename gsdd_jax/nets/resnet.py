"""The ResNet18 of the dataset-distillation literature (GLaD, Cazenavette et al. 2023).

A 3x3 convolution, then eight blocks of two 3x3 convolutions each beside a shortcut, all without bias and with instance
normalization; the mean over all pixels feeds one linear layer. The third, fifth and seventh block halve the resolution;
there the shortcut is a normalized 1x1 convolution. One form for all resolutions: the first layer has stride 1 and no
pooling follows it, as is usual for 32 px. Initialization is PyTorch's default for these layers, as in the reference.
"""

import jax
from flax import linen as nn

from gsdd_jax.errors import InputError
from gsdd_jax.nets import layers

# Channels and stride of each block.
_BLOCKS = ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1))
_STEM = 64
_REDUCTION = 8


class ResNet18(nn.Module):
    """The network as a Flax module; `make` checks the arguments.

    Attributes:
        num_classes: k.
    """

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps float images [n, h, w, c] to logits [n, k] and the mean of the last feature map [n, f]."""
        x = nn.relu(_conv_norm(images, _STEM, "stem"))
        for index, (width, stride) in enumerate(_BLOCKS):
            x = Block(width, stride, name=f"block{index}")(x)
        features = x.mean((1, 2))
        return layers.dense(features, self.num_classes, name="linear"), features


class Block(nn.Module):
    """Two convolutions beside a shortcut.

    Attributes:
        width: output channels.
        stride: of the first convolution and of the shortcut.
    """

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float [n, h, w, c] to [n, ceil(h / stride), ceil(w / stride), width]."""
        y = nn.relu(_conv_norm(x, self.width, "conv0", stride=self.stride))
        y = _conv_norm(y, self.width, "conv1")
        if self.stride > 1:
            x = _conv_norm(x, self.width, "shortcut", side=1, stride=self.stride)
        return nn.relu(y + x)


def _conv_norm(x: jax.Array, width: int, name: str, *, side: int = 3, stride: int = 1) -> jax.Array:
    x = layers.conv(x, width, side=side, stride=stride, use_bias=False, name=name)
    return layers.InstanceNorm(name=f"{name}_norm")(x)


def make(*, image_shape: tuple[int, ...], num_classes: int) -> ResNet18:
    """Checks that a ResNet18 fits the images and makes the module.

    Args:
        image_shape: (h, w, c).
        num_classes: k.

    Returns:
        The module.

    Raises:
        ValueError: images so small that the last map would be a single pixel, which instance normalization erases.
    """
    h, w, _ = image_shape
    if min(h, w) <= _REDUCTION:
        raise InputError(
            f"network.name: resnet18 does not fit {h}x{w} px images, it needs at least "
            f"{_REDUCTION + 1}x{_REDUCTION + 1} px: instance normalization erases a last map of one pixel"
        )
    return ResNet18(num_classes=num_classes)
