"""Bases and hallucinators, every base seen through every hallucinator of the set: HaBa (Liu et al. 2022).

A hallucinator is a 3x3 convolution, a scale and shift per place, and a transposed 3x3 convolution, all linear:
image = ``CENTER + SPREAD deconv(scale * conv(base) + shift)``.

Deviations: the adversarially trained feature extractor, with its cosine and contrastive losses that keep the
hallucinations of one base apart, is left out; bases and images are normalized by one mean and spread, whitening follows
the decode as for every codec; the identity is added to the convolutions as drawn, so that the real images that bases
start from are seen; hallucinators are counted, which HaBa's own budgets leave out; and a step uses all of them, not one
at random. HaBa does not fit images (``fit.steps=0``): five real images per base have little in common.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Gt
from typing_extensions import Doc

from gsdd_jax import storage
from gsdd_jax.codecs.base import (
    CENTER,
    MOST,
    SPREAD,
    Codec,
    Layout,
    Shape,
    Spec,
    arrays,
    cast_storage,
    descent,
    resized,
)
from gsdd_jax.errors import InputError
from gsdd_jax.later import optax

# Side of both convolutions.
SIDE = 3
# Adam's rates when fitting images; swept over 50 CIFAR-10 images and 300 steps.
FIT_BASE = 0.2
FIT_HALLUCINATOR = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactorSpec(Spec):
    """Settings of the codec of bases and hallucinators."""

    name: Annotated[Literal["factor"], Doc("the parameterization")] = "factor"
    images_per_class: Annotated[
        int, Ge(0), Doc("images per class: bases per class times hallucinators; 0 = as many as the budget holds")
    ] = 0
    hallucinators: Annotated[int, Ge(1), Doc("hallucinators of the whole set (HaBa: 5)")] = 5
    base_channels: Annotated[
        int, Ge(0), Doc("channels of a base: 1 (HaBa's single-channel variant), or 0 = those of the images")
    ] = 0
    dtype: Annotated[
        Literal["float32", "bfloat16"], Doc("precision on disk and in the forward pass; HaBa counts float32")
    ] = "float32"
    optimizer: Annotated[Literal["sgd", "adam"], Doc("sgd has HaBa's momentum of 0.95")] = "adam"
    lr: Annotated[float, Gt(0), Doc("learning rate in distillation, for every leaf (HaBa with TM: sgd, 100)")] = 0.01

    def resolved(self, image_shape: Shape) -> FactorSpec:
        h, w, c = image_shape
        if min(h, w) < SIDE:
            raise InputError(f"codec.name: factor needs images of at least {SIDE} x {SIDE} pixels, found {h} x {w}")
        return dataclasses.replace(self, base_channels=self.base_channels or c)

    def sizes(self, image_shape: Shape) -> dict[str, Sequence[int]]:
        return {
            "images_per_class": range(self.hallucinators, MOST, self.hallucinators),
            "hallucinators": range(1, MOST),
            "base_channels": sorted({1, image_shape[-1]}),
        }

    def layout(self, image_shape: Shape, num_classes: int) -> Layout:
        (h, w, c), styles, channels = image_shape, self.hallucinators, self.base_channels
        inner = (styles, h - SIDE + 1, w - SIDE + 1, c)
        shapes = {
            "base": (num_classes * self.images_per_class // styles, h, w, channels),
            "scale": inner,
            "shift": inner,
            "conv": (styles, SIDE, SIDE, channels, c),
            "conv_bias": (styles, c),
            "deconv": (styles, SIDE, SIDE, c, c),
            "deconv_bias": (styles, c),
        }
        return arrays(self.dtype, shapes)


def make(spec: FactorSpec, image_shape: tuple[int, int, int], num_classes: int) -> Codec:
    """Builds the codec; see `gsdd_jax.codecs.make`."""
    h, w, c = image_shape
    styles = spec.hallucinators
    n = num_classes * spec.images_per_class

    def init(key, images):
        images = (jnp.asarray(images, jnp.float32) - CENTER) / SPREAD
        groups = images.reshape(n // styles, styles, h, w, c)
        params = hallucinators(key, styles, image_shape, spec.base_channels)
        base = groups[:, 0]
        return params | {"base": base if spec.base_channels == c else base.mean(-1, keepdims=True)}

    def decode(params, index=None, *, size=None, key=None):
        del key
        index = jnp.arange(n) if index is None else jnp.asarray(index)
        images = hallucinate(jax.tree.map(lambda x: storage.quantize(x, spec.dtype), params), index)
        return resized(images, size)

    def fitter(steps):
        rates = {"base": FIT_BASE, "hallucinator": FIT_HALLUCINATOR}
        return optax.multi_transform(
            {name: optax.adam(optax.cosine_decay_schedule(rate, steps, alpha=0.02)) for name, rate in rates.items()},
            lambda params: {name: "base" if name == "base" else "hallucinator" for name in params},
        )

    return Codec(
        name="factor",
        spec=spec,
        image_shape=image_shape,
        num_classes=num_classes,
        images_per_class=spec.images_per_class,
        init=init,
        decode=decode,
        optimizer=lambda: descent(spec, momentum=0.95),
        fitter=fitter,
        **cast_storage(spec, image_shape, num_classes),
    )


def hallucinate(params: dict[str, jax.Array], index: jax.Array) -> jax.Array:
    """Draws images ``[len(index), h, w, c]``: image ``i`` is base ``i // j`` through hallucinator ``i % j`` of ``j``.

    Args:
        params: ``base [k * bases per class, h, w, cb]``; for each hallucinator ``conv [3, 3, cb, c]``, ``scale`` and
            ``shift`` ``[h - 2, w - 2, c]``, ``deconv [3, 3, c, c]``, and biases ``[c]``.
        index: Which images.
    """
    styles = params["scale"].shape[0]
    own = {name: leaf[index // styles if name == "base" else index % styles] for name, leaf in params.items()}
    inner = own["scale"] * (_conv(own["base"], own["conv"]) + own["conv_bias"][:, None, None]) + own["shift"]
    outer = _conv(_pad(inner), own["deconv"][:, ::-1, ::-1]) + own["deconv_bias"][:, None, None]
    return CENTER + SPREAD * outer


def _pad(x: jax.Array) -> jax.Array:
    """Surrounds images with zeros, such that convolving with the mirrored kernel is the transposed convolution."""
    edge = (SIDE - 1, SIDE - 1)
    return jnp.pad(x, ((0, 0), edge, edge, (0, 0)))


def _shifted(x: jax.Array) -> jax.Array:
    """Returns what each place of a kernel sees, ``[3, 3, n, h - 2, w - 2, c]``."""
    h, w = x.shape[1] - SIDE + 1, x.shape[2] - SIDE + 1
    return jnp.stack([jnp.stack([x[:, y : y + h, z : z + w] for z in range(SIDE)]) for y in range(SIDE)])


def _conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Correlates each image of ``[n, h, w, c]`` with its own kernel of ``[n, 3, 3, c, d]``."""
    return jnp.einsum("yznhwc,nyzcd->nhwd", _shifted(x), kernel)


def hallucinators(
    key: jax.Array, count: int, image_shape: tuple[int, int, int], base_channels: int
) -> dict[str, jax.Array]:
    """Draws hallucinators: PyTorch's default convolutions, as in HaBa, plus the identity; scale 1, shift 0."""
    h, w, c = image_shape
    inner = (count, h - SIDE + 1, w - SIDE + 1, c)
    params = {"scale": jnp.ones(inner, jnp.float32), "shift": jnp.zeros(inner, jnp.float32)}
    for index, (name, inputs) in enumerate((("conv", base_channels), ("deconv", c))):
        # PyTorch takes the outputs of a transposed convolution for its inputs; here both are c.
        bound = float(1 / np.sqrt(SIDE**2 * inputs))
        own = bound * jax.random.uniform(
            jax.random.fold_in(key, index), (count, SIDE**2 * inputs + 1, c), jnp.float32, minval=-1.0
        )
        kernel = own[:, :-1].reshape(count, SIDE, SIDE, inputs, c)
        kernel = kernel.at[:, SIDE // 2, SIDE // 2].add(
            jnp.ones((inputs, c), jnp.float32) if inputs < c else jnp.eye(c, dtype=jnp.float32)
        )
        params |= {name: kernel, f"{name}_bias": own[:, -1]}
    return params
