"""Networks to distil with and to test with: one file each, all behind one interface.

A network is a pair of pure functions. The features next to the logits are what distribution matching compares.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le
from flax import linen
from typing_extensions import Doc

from gsdd_jax.nets import alexnet, convnet, resnet, vgg, vit

__all__ = ["NetSpec", "Network", "build"]


@dataclass(frozen=True, kw_only=True)
class NetSpec:
    """Which network: the defaults are the field's ConvNetD3, meant for 32 px.

    Raises:
        ValueError: `depth`, `width` or `norm` is set for a family other than convnet, whose architectures are fixed.
    """

    name: Annotated[
        Literal["convnet", "alexnet", "vgg11", "resnet18", "vit"],
        Doc("Family of the network; the form of vgg11 and vit depends on the image size (GLaD), up to 32 px or above."),
    ] = "convnet"
    depth: Annotated[
        int,
        Ge(1),
        Le(7),
        Doc("Number of blocks of convnet, each halves the resolution; 3 for 32 px, 5 for 128 px (GSDD, A.2)."),
    ] = 3
    width: Annotated[int, Ge(1), Doc("Channels of every block of convnet (DC, Zhao et al. 2021: 128).")] = 128
    norm: Annotated[
        Literal["instance", "none"], Doc("Normalisation after each convolution of convnet; the field uses instance.")
    ] = "instance"

    def __post_init__(self) -> None:
        if self.name == "convnet":
            return
        for field in fields(self):
            if field.name != "name" and (value := getattr(self, field.name)) != field.default:
                raise ValueError(
                    f"network.{field.name}: {value!r} is a setting of convnet, {self.name} has none; "
                    f"write network: {{name: {self.name}}}"
                )


class Network(NamedTuple):
    """A network as pure functions of its weights.

    Attributes:
        init: key -> params, a nested dict of float32 arrays.
        apply: (params, images float [n, h, w, c]) -> (logits [n, k], features [n, f]).
        num_params: how many numbers `params` holds.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]
    num_params: int


_NETWORKS: dict[str, Callable[[NetSpec, tuple[int, int, int], int], linen.Module]] = {
    "convnet": lambda spec, image_shape, num_classes: convnet.make(
        depth=spec.depth, width=spec.width, norm=spec.norm, image_shape=image_shape, num_classes=num_classes
    ),
    "alexnet": lambda _, image_shape, num_classes: alexnet.make(image_shape=image_shape, num_classes=num_classes),
    "vgg11": lambda _, image_shape, num_classes: vgg.make(image_shape=image_shape, num_classes=num_classes),
    "resnet18": lambda _, image_shape, num_classes: resnet.make(image_shape=image_shape, num_classes=num_classes),
    "vit": lambda _, image_shape, num_classes: vit.make(image_shape=image_shape, num_classes=num_classes),
}


def build(spec: NetSpec, image_shape: tuple[int, int, int], num_classes: int) -> Network:
    """Builds a network for images of one shape.

    Equal arguments give the same object, so that a function jitted with the network as a static argument
    compiles once.

    Args:
        spec: which network.
        image_shape: (h, w, c).
        num_classes: k, at least 2.

    Returns:
        The network. Its functions work under `jit`, `grad` (reverse mode, any order) and `vmap` over params.

    Raises:
        ValueError: unknown name, or a network that does not fit the images.
    """
    if spec.name not in _NETWORKS:
        raise ValueError(f"network.name: {spec.name!r}, must be one of {sorted(_NETWORKS)}")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape: {image_shape}, must be (h, w, c), each at least 1")
    if num_classes < 2:
        raise ValueError(f"num_classes: {num_classes}, must be at least 2")
    h, w, c = image_shape
    return _build(spec, (int(h), int(w), int(c)), int(num_classes))


@lru_cache(maxsize=64)
def _build(spec: NetSpec, shape: tuple[int, int, int], num_classes: int) -> Network:
    module = _NETWORKS[spec.name](spec, shape, num_classes)
    h, w, c = shape

    def init(key: jax.Array) -> Any:
        return module.init(key, jnp.zeros((1, h, w, c), jnp.float32))["params"]

    def apply(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        if images.shape[1:] != shape:
            raise ValueError(f"images: shape {images.shape}, this network was built for [n, {h}, {w}, {c}]")
        outputs: Any = module.apply({"params": params}, images)
        return outputs

    params = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    return Network(init, apply, sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)))
