"""The VGG11 of the dataset-distillation literature (GLaD, Cazenavette et al. 2023).

Eight 3x3 convolutions with bias, instance normalization and ReLU, five max-poolings, and one linear layer; no dropout.
Two forms: for images of 32 px the last map is a single pixel and feeds the linear layer as it is; for larger ones it is
max-pooled to 7x7 first, whatever its size (below 224 px that repeats pixels). Initialization is PyTorch's default for
these layers, as in the reference. Its deviations are those of `convnet`.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from gsdd_jax.nets import layers
from gsdd_jax.nets.conv import conv_same

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
        params = self.param("layers", self._initial, images.shape[1:])
        margin = layers.digit_margin(images.shape[1:])
        x = jnp.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
        for index, (_, pooled) in enumerate(_CONVS):
            conv = params[f"conv{index}"]
            x = conv_same(x, conv["kernel"]) + conv["bias"]
            x = nn.relu(layers.instance_norm(x, **params[f"norm{index}"]))
            if pooled:
                x = layers.max_pool(x)
        if _gridded(images.shape[1:]):
            x = layers.adaptive_max_pool(x, _GRID)
        features = x.reshape(x.shape[0], -1)
        return features @ params["linear"]["kernel"] + params["linear"]["bias"], features

    def _initial(self, key: jax.Array, image_shape: tuple[int, ...]) -> dict[str, dict[str, jax.Array]]:
        channels = image_shape[2]
        kernels: dict[str, tuple[int, ...]] = {}
        for index, (width, _) in enumerate(_CONVS):
            kernels[f"conv{index}"] = (3, 3, channels, width)
            channels = width
        pixels = _GRID**2 if _gridded(image_shape) else 1
        kernels["linear"] = (pixels * channels, self.num_classes)
        params = layers.uniform(key, kernels)
        params.update({f"norm{index}": layers.unit_norm(width) for index, (width, _) in enumerate(_CONVS)})
        return params


def make(*, image_shape: tuple[int, int, int], num_classes: int) -> VGG11:
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
        raise ValueError(
            f"network.name: vgg11 does not fit {h}x{w} px images, "
            f"its five poolings need at least {_REDUCTION}x{_REDUCTION} px"
        )
    return VGG11(num_classes=num_classes)


def _gridded(image_shape: tuple[int, ...]) -> bool:
    return max(image_shape[:2]) > layers.CIFAR_SIDE
