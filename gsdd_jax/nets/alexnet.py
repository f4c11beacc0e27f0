"""The AlexNet of the dataset-distillation literature (GLaD, Cazenavette et al. 2023).

Five convolutions with bias and ReLU, max-pooling after the first, second and fifth, and one linear layer; neither
normalization nor dropout. One form for all resolutions: the linear layer reads every pixel of the last map.
Initialization is PyTorch's default for these layers, as in the reference. Its deviations are those of `convnet`.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from gsdd_jax.errors import InputError
from gsdd_jax.nets import layers

# Side of the kernel, channels, whether a pooling follows.
_CONVS = ((5, 128, True), (5, 192, True), (3, 256, False), (3, 192, False), (3, 192, True))
_REDUCTION = 8


class AlexNet(nn.Module):
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
        for index, (side, width, pooled) in enumerate(_CONVS):
            x = nn.relu(layers.conv(x, width, side=side, name=f"conv{index}"))
            if pooled:
                x = layers.max_pool(x)
        features = x.reshape(x.shape[0], -1)
        return layers.dense(features, self.num_classes, name="linear"), features


def make(*, image_shape: tuple[int, ...], num_classes: int) -> AlexNet:
    """Checks that an AlexNet fits the images and makes the module.

    Args:
        image_shape: (h, w, c).
        num_classes: k.

    Returns:
        The module.

    Raises:
        ValueError: images too small for three poolings.
    """
    h, w, _ = image_shape
    if min(h, w) < _REDUCTION:
        raise InputError(
            f"network.name: alexnet does not fit {h}x{w} px images, "
            f"its three poolings need at least {_REDUCTION}x{_REDUCTION} px"
        )
    return AlexNet(num_classes=num_classes)
