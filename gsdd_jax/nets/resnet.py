"""The ResNet18 of the dataset-distillation literature (GLaD, Cazenavette et al. 2023).

A 3x3 convolution, then eight blocks of two 3x3 convolutions each beside a shortcut, all without bias and with instance
normalization; the mean over all pixels feeds one linear layer. The third, fifth and seventh block halve the resolution;
there the shortcut is a normalized 1x1 convolution. One form for all resolutions: the first layer has stride 1 and no
pooling follows it, as is usual for 32 px. Initialization is PyTorch's default for these layers, as in the reference.
"""

import jax
from flax import linen as nn

from gsdd_jax.nets import layers
from gsdd_jax.nets.conv import conv_same

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
        params = self.param("layers", self._initial, images.shape[1:])

        def norm(x: jax.Array, name: str) -> jax.Array:
            return layers.instance_norm(x, **params[f"{name}_norm"])

        def conv(x: jax.Array, name: str, stride: int = 1) -> jax.Array:
            return norm(conv_same(x, params[name]["kernel"], stride=stride), name)

        x = nn.relu(conv(images, "stem"))
        for index, (_, stride) in enumerate(_BLOCKS):
            name = f"block{index}"
            y = conv(nn.relu(conv(x, f"{name}_conv0", stride)), f"{name}_conv1")
            if f"{name}_shortcut" in params:
                # A 1x1 convolution with a stride is a product with the pixels that it meets.
                x = norm(x[:, ::stride, ::stride] @ params[f"{name}_shortcut"]["kernel"][0, 0], f"{name}_shortcut")
            x = nn.relu(y + x)
        features = x.mean((1, 2))
        return features @ params["linear"]["kernel"] + params["linear"]["bias"], features

    def _initial(self, key: jax.Array, image_shape: tuple[int, ...]) -> dict[str, dict[str, jax.Array]]:
        kernels: dict[str, tuple[int, ...]] = {"stem": (3, 3, image_shape[2], _STEM)}
        channels = _STEM
        for index, (width, stride) in enumerate(_BLOCKS):
            kernels[f"block{index}_conv0"] = (3, 3, channels, width)
            kernels[f"block{index}_conv1"] = (3, 3, width, width)
            if stride > 1:
                kernels[f"block{index}_shortcut"] = (1, 1, channels, width)
            channels = width
        norms = {f"{name}_norm": layers.unit_norm(shape[-1]) for name, shape in kernels.items()}
        convs = tuple(kernels)
        kernels["linear"] = (channels, self.num_classes)
        return {**layers.uniform(key, kernels, unbiased=convs), **norms}


def make(*, image_shape: tuple[int, int, int], num_classes: int) -> ResNet18:
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
        raise ValueError(
            f"network.name: resnet18 does not fit {h}x{w} px images, it needs at least "
            f"{_REDUCTION + 1}x{_REDUCTION + 1} px: instance normalization erases a last map of one pixel"
        )
    return ResNet18(num_classes=num_classes)
