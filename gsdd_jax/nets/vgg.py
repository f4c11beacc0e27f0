"""The VGG11 of the dataset-distillation literature (GLaD, Cazenavette et al. 2023).

Eight 3x3 convolutions with bias, instance normalization and ReLU, five max-poolings, and one linear layer; no dropout.
Two forms: for images of 32 px the last map is a single pixel and feeds the linear layer as it is; for larger ones it is
max-pooled to 7x7 first, whatever its size (below 224 px that repeats pixels). Initialization is PyTorch's default for
these layers, as in the reference. Its deviations are those of `convnet`.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from gsdd_jax.errors import InputError
from gsdd_jax.nets import layers

# Channels, whether a pooling follows.
_CONVS = (
    (64, True),
    (128, True),
    (256, False),
    (256, True),
    (512, False),
    (512, True),
    (512, False),
    (512, True),
)
_REDUCTION = 32
_GRID = 7


class VGG11(nn.Module):
    """The network as a Flax module; `make` checks the arguments.

    Attributes:
        num_classes: k.
    """

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps float images [n, h, w, c] to logits [n, k] and the flattened last feature map [n, f]."""
        margin = layers.digit_margin(images.shape[1:])
        x = jnp.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
        for index, (width, pooled) in enumerate(_CONVS):
            x = nn.relu(layers.InstanceNorm(name=f"norm{index}")(layers.conv(x, width, name=f"conv{index}")))
            if pooled:
                x = layers.max_pool(x)
        if max(images.shape[1:3]) > layers.CIFAR_SIDE:
            x = layers.adaptive_max_pool(x, _GRID)
        features = x.reshape(x.shape[0], -1)
        return layers.dense(features, self.num_classes, name="linear"), features


def make(*, image_shape: tuple[int, ...], num_classes: int) -> VGG11:
    """Checks that a VGG11 fits the images and makes the module.

    Args:
        image_shape: (h, w, c).
        num_classes: k.

    Returns:
        The module.

    Raises:
        ValueError: images too small for five poolings.
    """
    h, w, _ = image_shape
    if min(h, w) + 2 * layers.digit_margin(image_shape) < _REDUCTION:
        raise InputError(
            f"network.name: vgg11 does not fit {h}x{w} px images, "
            f"its five poolings need at least {_REDUCTION}x{_REDUCTION} px"
        )
    return VGG11(num_classes=num_classes)
