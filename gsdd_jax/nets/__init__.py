"""Networks to distill with and to test with: Flax modules, one file each, all behind one interface.

A network is a pair of pure functions, made from a spec or from any other Flax module. The features next to the logits
are what distribution matching compares.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from annotated_types import Ge, Le
from flax import linen
from typing_extensions import Doc

from gsdd_jax.errors import InputError
from gsdd_jax.nets import alexnet, convnet, microbatch, modules, resnet, vgg, vit
from gsdd_jax.nets.conv import conv_general_dilated

__all__ = ["NetSpec", "Network", "NetworkLike", "build", "conv_general_dilated", "cross_entropy", "squared_error"]


@dataclass(frozen=True, kw_only=True)
class NetSpec:
    """Which network: the defaults are the field's ConvNetD3, meant for 32 px.

    Raises:
        ValueError: Another setting than `name` for a family other than convnet, whose architectures are fixed.
    """

    name: Annotated[
        Literal["convnet", "convnet3d", "alexnet", "vgg11", "resnet18", "vit"],
        Doc(
            "Family of the network; convnet3d is for videos and volumes, of which the others average the frames; the "
            "form of vgg11 and vit depends on the image size (GLaD), up to 32 px or above."
        ),
    ] = "convnet"
    depth: Annotated[
        int,
        Ge(1),
        Le(7),
        Doc("Number of blocks of a convnet, each halves the resolution; 3 for 32 px, 5 for 128 px (GSDD, A.2)."),
    ] = 3
    width: Annotated[int, Ge(1), Doc("Channels of every block of convnet (DC, Zhao et al. 2021: 128).")] = 128
    norm: Annotated[
        Literal["instance", "layer", "none"],
        Doc("Normalization after each convolution of convnet; the field uses instance."),
    ] = "instance"
    activation: Annotated[Literal["relu", "leaky_relu", "sigmoid"], Doc("Of each block of convnet.")] = "relu"
    pooling: Annotated[
        Literal["average", "max", "none"], Doc("At the end of each block of convnet; none keeps the resolution.")
    ] = "average"

    def __post_init__(self) -> None:
        if self.name in ("convnet", "convnet3d"):
            return
        for field in fields(self):
            if field.name != "name" and (value := getattr(self, field.name)) != field.default:
                raise InputError(
                    f"network.{field.name}: {value!r} is a setting of convnet, {self.name} has none; "
                    f"write network: {{name: {self.name}}}"
                )


class Network(NamedTuple):
    """A network as pure functions of its weights.

    Attributes:
        init: key -> params, a pytree of floating-point arrays, all of them trained; names and nesting are free.
        apply: (params, images float [n, h, w, c]) -> (logits [n, k], features [n, ...]), of each image alone, or
            video [n, t, h, w, c].
        num_params: how many numbers `params` holds.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]
    num_params: int

    def outputs(self, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Calls `apply`, and refuses what is no pair of logits and features before it can be taken for one.

        On a CPU a few images at a time, see `nets.microbatch`.

        Raises:
            ValueError: `apply` returns anything else; known from the shapes, so also while it is traced.
        """
        size = microbatch.size_of(self.init, self.apply, images.shape)
        call = partial(self._pair, params)
        return call(images) if size == len(images) else microbatch.concatenated(call, size, images)

    def loss_and_gradient(
        self,
        params: Any,
        images: jax.Array,
        labels: jax.Array,
        weights: jax.Array | None = None,
        *,
        loss: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    ) -> tuple[jax.Array, Any]:
        """Returns the mean loss of a batch and its gradient to the weights.

        On a CPU a few images at a time, see `nets.microbatch`. Differentiable again, in reverse mode: what that needs
        of a part of the batch is computed anew.

        Args:
            params: the weights.
            images: float [n, h, w, c].
            labels: int [n], or float [n, k].
            weights: float [n], those of the images in the mean; None for equal ones.
            loss: (logits [n, k], labels) -> [n], such as `squared_error`; None for `cross_entropy`.
        """
        of_each = loss or cross_entropy
        size = microbatch.size_of(self.init, self.apply, images.shape)
        weights = jnp.ones(len(images), images.dtype) if weights is None else weights

        def part(images: jax.Array, labels: jax.Array, weights: jax.Array) -> tuple[jax.Array, Any]:
            def total(params: Any) -> jax.Array:
                return jnp.sum(weights * of_each(self._pair(params, images)[0], labels))

            return jax.value_and_grad(total)(params)

        batch = images, labels, weights / weights.sum()
        if size == len(images):
            return part(*batch)
        return microbatch.summed(jax.checkpoint(part, prevent_cse=False), size, *batch)

    def _pair(self, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        found, n = self.apply(params, images), images.shape[0]
        pair = isinstance(found, tuple | list) and len(found) == 2
        shapes = [jnp.shape(part) if isinstance(part, jax.Array) else () for part in found] if pair else [(), ()]
        if any(shape[:1] != (n,) for shape in shapes) or len(shapes[0]) != 2:
            shown = jax.tree.map(lambda leaf: list(jnp.shape(leaf)), found)
            raise InputError(
                f"network.apply: expected a pair (logits [n, k], features [n, ...]) for {n} images, found "
                f"a {type(found).__name__} of shapes {shown}"
            )
        logits, features = found
        return logits, features

    def check(self, image_shape: tuple[int, ...], num_classes: int) -> None:
        """Tells whether this is a network for such images and so many classes; computes nothing.

        Args:
            image_shape: (h, w, c).
            num_classes: k.

        Raises:
            ValueError: Another number of logits or of weights, or outputs that are none.
            TypeError: Weights that are not floating point, such as counters or random keys.
        """
        params = jax.eval_shape(self.init, jax.eval_shape(lambda: jax.random.key(0)))
        for path, leaf in jax.tree.leaves_with_path(params):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise InputError(
                    f"network.init: {jax.tree_util.keystr(path)} is {leaf.dtype}; expected floating-point weights "
                    "only, since all are trained: counters and random keys belong outside"
                )
        count = _size(params)
        if self.num_params != count:
            raise InputError(f"network.num_params: expected {count}, as many as init returns; found {self.num_params}")
        # Two images: a batch of logits is then told from a single row of them.
        images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
        logits, _ = jax.eval_shape(self.outputs, params, images)
        if logits.shape[1] != num_classes:
            raise InputError(f"network.apply: expected logits of {num_classes} classes, found {logits.shape[1]}")


_NETWORKS: dict[str, Callable[[NetSpec, tuple[int, ...], int], linen.Module]] = {
    "convnet": convnet.make,
    "convnet3d": convnet.make,
    "alexnet": lambda _, image_shape, num_classes: alexnet.make(image_shape=image_shape, num_classes=num_classes),
    "vgg11": lambda _, image_shape, num_classes: vgg.make(image_shape=image_shape, num_classes=num_classes),
    "resnet18": lambda _, image_shape, num_classes: resnet.make(image_shape=image_shape, num_classes=num_classes),
    "vit": lambda _, image_shape, num_classes: vit.make(image_shape=image_shape, num_classes=num_classes),
}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns -sum_k label log softmax(logits) of each image, [n].

    Args:
        logits: [n, k].
        labels: int [n], or float [n, k].

    Raises:
        ValueError: soft labels that are not shaped as the logits.
    """
    log_probabilities = jax.nn.log_softmax(logits)
    if labels.ndim == 1:
        return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]
    if labels.shape != logits.shape:
        raise InputError(f"labels: {labels.shape[1]} classes, the network has {logits.shape[1]}")
    return -jnp.sum(labels * log_probabilities, axis=1)


def squared_error(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns 1/2 ||logits - label||^2 of each image, [...], for logits and labels [..., k]."""
    return 0.5 * jnp.sum((logits - labels) ** 2, axis=-1)


NetworkLike: TypeAlias = NetSpec | Network | linen.Module | Callable[..., Any]
"""What `build` takes for a network."""


def build(network: NetworkLike, image_shape: tuple[int, ...], num_classes: int) -> Network:
    """Builds a network for images of one shape.

    Equal arguments give the same object, so that a function jitted with the network as a static argument
    compiles once.

    Modules map images to logits, or to (logits, features). Beside logits alone, the features are what the module sows
    as "features", else what its last Dense (nnx: Linear) layer reads. Weights are drawn by the module's own
    initializers. Its plain convolutions are those of `nets.conv`, unless it asks for others by
    `nn.Conv(conv_general_dilated=...)`: those of JAX are slow on CPU in loops.

    Args:
        network: Which network: a spec; a `Network`; a flax.linen module; or a class of flax.nnx modules, or
            another function of `rngs` that returns one. nnx modules are put into evaluation mode, `module.eval()`.
        image_shape: (h, w, c), or (t, h, w, c) of videos: of a module of your own the images are [n, t, h, w, c]; those
            of a spec, but for convnet3d, see frames as images, and their outputs are means over the frames.
        num_classes: k, at least 1.

    Returns:
        The network, checked. The functions of a spec work under `jit`, `grad` (reverse mode, any order) and `vmap` over
        params.

    Raises:
        ValueError: Unknown name, a network that does not fit the images or the number of classes, or one with state
            beside its weights, such as batch statistics, or with random numbers in its calls, such as dropout.
        TypeError: No network, an nnx module in place of its class, or weights that are not floating point.
    """
    if len(image_shape) not in (3, 4) or min(image_shape) < 1:
        raise InputError(f"image_shape: {image_shape}, must be (h, w, c) or (t, h, w, c), each at least 1")
    if num_classes < 1:
        raise InputError(f"num_classes: {num_classes}, must be at least 1")
    return _build(network, tuple(int(side) for side in image_shape), int(num_classes))


@lru_cache(maxsize=64)
def _build(network: NetworkLike, shape: tuple[int, ...], num_classes: int) -> Network:
    if isinstance(network, NetSpec):
        if network.name not in _NETWORKS:
            raise InputError(f"network.name: {network.name!r}, must be one of {sorted(_NETWORKS)}")
        seen = shape if network.name == "convnet3d" else shape[-3:]
        network = _of_module(_NETWORKS[network.name](network, seen, num_classes), seen)
        network = network if seen == shape else _over_frames(network)
    if not isinstance(network, Network):
        network = _of_module(network, shape)
    network.check(shape, num_classes)
    return network


def _of_module(module: Any, shape: tuple[int, ...]) -> Network:
    init, apply = modules.functions(module, shape)
    init = jax.jit(init)  # traced once, however often its shapes are asked for

    def checked(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        if images.shape[1:] != shape:
            expected = ", ".join(map(str, ("n", *shape)))
            raise InputError(f"images: shape {images.shape}, this network was built for [{expected}]")
        outputs: tuple[jax.Array, jax.Array] = apply(params, images)
        return outputs

    params = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    return Network(init, checked, _size(params))


def _over_frames(network: Network) -> Network:
    """Lets a network of images see videos: its logits and features are means over the frames."""

    def apply(params: Any, videos: jax.Array) -> tuple[jax.Array, jax.Array]:
        n, t = videos.shape[:2]
        outputs = network.apply(params, videos.reshape(n * t, *videos.shape[2:]))
        logits, features = (x.reshape(n, t, *x.shape[1:]).mean(1) for x in outputs)
        return logits, features

    return network._replace(apply=apply)


def _size(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
