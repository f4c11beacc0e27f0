"""One small sine network per image, from position to color: DDiF (Shin et al. 2025), decoded for all images at once.

``h_1 = sin(omega0 (W_1 u + b_1))``, ``h_l = sin(omega (W_l h + b_l))``, image = ``CENTER + SPREAD (W h + b)``. Of a
video it is one network, whose positions ``u`` begin with the frame.

Deviations: DDiF's networks give normalized or whitened colors, here whitening follows the decode as for every codec;
it knows square images only; it runs one network after the other; and it fits all layers from SIREN's draw, where the
last one can be solved for instead.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Gt, Le
from typing_extensions import Doc

from gsdd_jax import storage
from gsdd_jax.codecs.base import CENTER, MOST, SPREAD, Codec, Layout, Shape, Spec, arrays, cast_storage, descent
from gsdd_jax.later import optax

# Pixels that the checkpointed decode draws at once: enough to fill a GPU, 16 images of 128 px.
CHUNK_PIXELS = 1 << 18
# Ridge of the solved output layer, relative to the mean square of its inputs.
RIDGE = 1e-3
# Adam's rate when fitting images, times sqrt(omega): higher frequencies take smaller steps. Swept over 50 CIFAR-10
# images and 300 steps, rates best near 0.014 for 2 layers of 11 at omega 10, 0.004 for 3 of 9 at omega 40.
FIT_RATE = 0.03


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuralFieldSpec(Spec):
    """Settings of the neural-field codec."""

    name: Annotated[Literal["neural_field"], Doc("the parameterization")] = "neural_field"
    images_per_class: Annotated[int, Ge(0), Doc("networks per class; 0 = as many as the budget holds")] = 0
    layers: Annotated[int, Ge(1), Le(64), Doc("sine layers (DDiF: 2 for CIFAR, 3 for ImageNet)")] = 2
    width: Annotated[
        int, Ge(1), Doc("units of each (DDiF: 6 for CIFAR-10 at 1 or 10 images/class, 20 at 50, 20 or 40 for ImageNet)")
    ] = 6
    omega0: Annotated[float, Gt(0), Doc("frequency of the first layer (DDiF: 30)")] = 30.0
    omega: Annotated[float, Gt(0), Doc("frequency of the others (DDiF: 10 for CIFAR, 40 for ImageNet)")] = 10.0
    dtype: Annotated[
        Literal["float32", "bfloat16"], Doc("precision on disk and in the forward pass; DDiF counts float32")
    ] = "float32"
    start: Annotated[
        Literal["solved", "uniform"],
        Doc("starting point of the fit: output layers solved for the images, or all layers as SIREN draws them"),
    ] = "solved"
    remat: Annotated[bool, Doc("draw again in the backward pass, some images at a time, instead of keeping layers")] = (
        False
    )
    optimizer: Annotated[Literal["sgd", "adam"], Doc("adam is DDiF's; sgd has momentum 0.5")] = "adam"
    lr: Annotated[
        float, Gt(0), Doc("learning rate in distillation (DDiF: 1e-4 with TM at 128 px, 5e-5 with DM, DC)")
    ] = 1e-4
    NOISE = ("uniform",)
    VIDEO = True

    def sizes(self, image_shape: Shape) -> dict[str, Sequence[int]]:
        return {"images_per_class": range(1, MOST), "width": range(1, MOST)}

    def layout(self, image_shape: Shape, num_classes: int) -> Layout:
        n, units = num_classes * self.images_per_class, _units(self, len(image_shape) - 1, image_shape[-1])
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, (inputs, outputs) in enumerate(itertools.pairwise(units)):
            shapes |= {f"weight{layer}": (n, inputs, outputs), f"bias{layer}": (n, outputs)}
        return arrays(self.dtype, shapes)


def make(spec: NeuralFieldSpec, image_shape: Shape, num_classes: int) -> Codec:
    """Builds the codec of images or, with one more side, of videos; see `gsdd_jax.codecs.make`."""
    *native, c = image_shape
    n = num_classes * spec.images_per_class

    def init(key, images):
        params = siren(key, n, spec, c, len(native))
        return params if spec.start == "uniform" else solve_output(params, jnp.asarray(images, jnp.float32), spec)

    def decode(params, index=None, *, size=None, key=None):
        del key
        chosen = params if index is None else jax.tree.map(lambda x: x[index], params)
        rounded = jax.tree.map(lambda x: storage.quantize(x, spec.dtype), chosen)
        return (draw_again if spec.remat else draw)(rounded, tuple(size or native), spec)

    return Codec(
        name="neural_field",
        spec=spec,
        image_shape=image_shape,
        num_classes=num_classes,
        images_per_class=spec.images_per_class,
        init=init,
        decode=decode,
        optimizer=lambda: descent(spec),
        fitter=lambda steps: optax.adam(
            optax.cosine_decay_schedule(FIT_RATE / float(np.sqrt(spec.omega)), steps, alpha=0.02)
        ),
        **cast_storage(spec, image_shape, num_classes),
    )


def _units(spec: NeuralFieldSpec, inputs: int, channels: int) -> list[int]:
    return [inputs, *[spec.width] * spec.layers, channels]


def positions(size: Sequence[int]) -> jax.Array:
    """Returns the positions ``[pixels, sides]`` of the pixels of a size, (height, width) or (frames, height, width).

    Frame by frame and row by row, the corners at -1 and 1.
    """
    grid = jnp.meshgrid(*(jnp.linspace(-1.0, 1.0, side, dtype=jnp.float32) for side in size), indexing="ij")
    return jnp.stack(grid, axis=-1).reshape(-1, len(size))


def features(params: dict[str, jax.Array], size: tuple[int, ...], spec: NeuralFieldSpec) -> jax.Array:
    """Returns the last sine layer of each network at each pixel, ``[n, width, pixels]``.

    Pixels come last, because widths such as 6 and 20 fill no vector register.
    """
    phase = jnp.einsum("nio,pi->nop", params["weight0"], positions(size)) + params["bias0"][..., None]
    hidden = jnp.sin(spec.omega0 * phase)
    for layer in range(1, spec.layers):
        phase = jnp.einsum("nio,nip->nop", params[f"weight{layer}"], hidden) + params[f"bias{layer}"][..., None]
        hidden = jnp.sin(spec.omega * phase)
    return hidden


def draw(params: dict[str, jax.Array], size: tuple[int, ...], spec: NeuralFieldSpec) -> jax.Array:
    """Draws images ``[n, h, w, c]`` or videos ``[n, t, h, w, c]``.

    The backward pass keeps about ``2 * layers * width`` floats per pixel.

    Args:
        params: For each layer ``weight [n, in, out]`` and ``bias [n, out]``, numbered from 0; the last is the output.
        size: (height, width) or (frames, height, width).
        spec: Layers and frequencies.
    """
    hidden = features(params, size, spec)
    output = jnp.einsum("nio,nip->npo", params[f"weight{spec.layers}"], hidden) + params[f"bias{spec.layers}"][:, None]
    return CENTER + SPREAD * output.reshape(-1, *size, output.shape[-1])


def draw_again(params: dict[str, jax.Array], size: tuple[int, ...], spec: NeuralFieldSpec) -> jax.Array:
    """Draws the same images in chunks that the backward pass draws again, one at a time.

    One checkpoint around all images would save nothing, because the backward pass would then hold all of them at once.
    """
    one = jax.checkpoint(lambda own: draw(jax.tree.map(lambda x: x[None], own), size, spec)[0])
    return jax.lax.map(one, params, batch_size=max(1, CHUNK_PIXELS // int(np.prod(size))))


def siren(key: jax.Array, n: int, spec: NeuralFieldSpec, channels: int, coordinates: int = 2) -> dict[str, jax.Array]:
    """Draws ``n`` networks as DDiF does: first layer U(+-1/2), others U(+-sqrt(6 / in) / omega), biases alike."""
    params: dict[str, jax.Array] = {}
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(_units(spec, coordinates, channels))):
        bound = 0.5 if layer == 0 else float(np.sqrt(6 / inputs)) / spec.omega
        own = bound * jax.random.uniform(
            jax.random.fold_in(key, layer), (n, inputs + 1, outputs), jnp.float32, minval=-1.0
        )
        params |= {f"weight{layer}": own[:, :-1], f"bias{layer}": own[:, -1]}
    return params


def solve_output(params: dict[str, jax.Array], images: jax.Array, spec: NeuralFieldSpec) -> dict[str, jax.Array]:
    """Replaces the output layers by the ridge regression of the images on the last sine layer."""
    n, *size, c = images.shape
    count = int(np.prod(size))
    inputs = jnp.concatenate([features(params, tuple(size), spec), jnp.ones((n, 1, count), jnp.float32)], axis=1)
    target = ((images - CENTER) / SPREAD).reshape(n, count, c)
    gram = inputs @ inputs.mT + RIDGE * count * jnp.eye(spec.width + 1, dtype=jnp.float32)
    solution = jnp.linalg.solve(gram, inputs @ target)
    return params | {f"weight{spec.layers}": solution[:, :-1], f"bias{spec.layers}": solution[:, -1]}
