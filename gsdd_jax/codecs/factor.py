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
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, Gt
from typing_extensions import Doc

from gsdd_jax import storage
from gsdd_jax.codecs.base import CENTER, SPREAD, Codec, cast_storage, resized

# Side of both convolutions.
SIDE = 3
# Adam's rates when fitting images; swept over 50 CIFAR-10 images and 300 steps.
FIT_BASE = 0.2
FIT_HALLUCINATOR = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactorSpec:
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


def make(spec: FactorSpec, image_shape: tuple[int, int, int], num_classes: int, bytes_per_class: int) -> Codec:
    """Builds the codec; see :func:`gsdd_jax.codecs.make`."""
    h, w, c = image_shape
    spec = _resolved(spec, image_shape, num_classes, bytes_per_class)
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
        optimizer=lambda: optax.adam(spec.lr) if spec.optimizer == "adam" else optax.sgd(spec.lr, momentum=0.95),
        fitter=fitter,
        **cast_storage(init, spec.dtype, image_shape, n),
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
    for place, (name, inputs) in enumerate((("conv", base_channels), ("deconv", c))):
        # PyTorch takes the outputs of a transposed convolution for its inputs; here both are c.
        bound = float(1 / np.sqrt(SIDE**2 * inputs))
        own = bound * jax.random.uniform(
            jax.random.fold_in(key, place), (count, SIDE**2 * inputs + 1, c), jnp.float32, minval=-1.0
        )
        kernel = own[:, :-1].reshape(count, SIDE, SIDE, inputs, c)
        kernel = kernel.at[:, SIDE // 2, SIDE // 2].add(
            jnp.ones((inputs, c), jnp.float32) if inputs < c else jnp.eye(c, dtype=jnp.float32)
        )
        params |= {name: kernel, f"{name}_bias": own[:, -1]}
    return params


def _resolved(
    spec: FactorSpec, image_shape: tuple[int, int, int], num_classes: int, bytes_per_class: int
) -> FactorSpec:
    """Fills in the images per class and the channels of a base.

    Raises:
        ValueError: A setting makes no sense or does not fit; the message says what would.
    """
    h, w, c = image_shape
    if spec.base_channels not in (0, 1, c):
        raise ValueError(f"codec.base_channels: expected 0, 1 or the {c} of the images; found {spec.base_channels}")
    if min(h, w) < SIDE:
        raise ValueError(f"codec.name: factor needs images of at least {SIDE} x {SIDE} pixels, found {h} x {w}")
    if spec.images_per_class % spec.hallucinators:
        raise ValueError(
            f"codec.images_per_class: expected a multiple of codec.hallucinators={spec.hallucinators}, "
            f"found {spec.images_per_class}"
        )
    available, itemsize = num_classes * bytes_per_class, storage.ITEMSIZE[spec.dtype]

    def base(channels: int) -> int:
        return num_classes * h * w * channels * itemsize

    def style(channels: int) -> int:
        return (SIDE**2 * (channels + c) * c + 2 * c + 2 * (h - SIDE + 1) * (w - SIDE + 1) * c) * itemsize

    channels = spec.base_channels or c
    taken = spec.hallucinators * style(channels)
    fits = max(available - taken, 0) // base(channels)
    wanted = max(spec.images_per_class // spec.hallucinators, 1)
    if wanted <= fits:
        count = (wanted if spec.images_per_class else fits) * spec.hallucinators
        return dataclasses.replace(spec, images_per_class=count, base_channels=channels)
    needs = f"{spec.hallucinators} hallucinators of {style(channels)} bytes and {wanted} bases per class need "
    needs += f"{taken + wanted * base(channels)} bytes, the budget of all classes has {available}; "
    if fits:
        raise ValueError(f"codec.images_per_class: {needs}expected at most {fits * spec.hallucinators}")
    remedies = []
    if available >= base(channels) + style(channels):
        remedies.append(f"codec.hallucinators of at most {(available - base(channels)) // style(channels)}")
    if channels > 1 and available >= base(1) + style(1):
        most = min((available - base(1)) // style(1), spec.hallucinators)
        remedies.append(f"codec.base_channels=1 with codec.hallucinators of at most {most}")
    remedies.append(f"at least {-(-(taken + base(channels)) // num_classes)} bytes per class")
    raise ValueError(f"codec.hallucinators: {needs}expected {', or '.join(remedies)}")
