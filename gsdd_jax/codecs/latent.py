"""One normal distribution of latents per image behind a decoder that all images share: D3 (Qin et al. 2024).

An image is ``decoder(mean)``, or with a key ``decoder(mean + exp(log_variance / 2) noise)``. The decoders are those of
D3's code: a linear map of the latents to 2 x 2 places (large: none, the latents are these places), transposed
convolutions of stride 2 to the images' size, each normalized and through a leaky ReLU, and a 3 x 3 convolution;
image = ``CENTER + REACH tanh(output)``.

Deviations: one decoder for the whole set, where D3 has one per block of classes; each image is normalized by itself by
default, because D3's batch normalization, always in training mode, lets images change with their batch (``norm=batch``
keeps it, over all images of the set whichever are asked for); D3's tanh ends one spread around the mean of normalized
images, here it reaches black and white. D3 does not fit images (``fit.to=random``, ``fit.steps=0``), and adds a
teacher's soft label per latent (``labels.kind=soft``). Every outer step draws a sample of each image, the same for all
steps of a student, where D3 draws anew; networks are tested on the means, where D3 trains them on samples as well.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
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

# What tanh is multiplied by: CENTER + REACH tanh is [0, 1].
REACH = 2 * SPREAD
# Side of the map that the decoder starts from, and of the smallest image.
START_SIDE, LEAST_SIDE = 2, 8
# Side of the transposed convolutions, and the least share of the first map's channels (as a divisor).
KERNEL = {"small": 4, "medium": 3, "large": 3}
LEAST_SHARE = {"small": 8, "medium": 16, "large": 16}
OUT_KERNEL = 3
# PyTorch's constants.
LEAK = 0.01
NORM_FLOOR = 1e-5
# Channels of a group, at most: 50 CIFAR-10 images, width 16, 300 steps: 18.2, 18.9, 18.8 dB with 1, 4, 8 or more.
GROUP = 8
# D3's weight decay, added to the gradient as in PyTorch's Adam.
DECAY = 1e-5
# Adam's rates when fitting images, the decoder's times its width: wider maps take smaller steps. Swept over 50 and 80
# CIFAR-10 images and 300 steps, rates of the decoder best near 0.02 at width 16, 0.007 at 32 and 0.005 at 64.
FIT_LATENTS = 0.1
FIT_DECODER = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSpec(Spec):
    """Settings of the latent codec; D3's are those for ImageNet at 64 px, its decoder here is ours for CIFAR-10."""

    name: Annotated[Literal["latent"], Doc("the parameterization")] = "latent"
    images_per_class: Annotated[
        int, Ge(0), Doc("latents per class, one image each; 0 = as many as the budget holds")
    ] = 0
    decoder: Annotated[
        Literal["small", "medium", "large"],
        Doc("small: 4x4 kernels, channels fall to 1/8; medium: 3x3, to 1/16; large: as medium, without a linear map"),
    ] = "small"
    width: Annotated[int, Ge(1), Doc("channels of the decoder's first map (D3: 256 small, 512 medium, 1024 large)")] = (
        32
    )
    latent_dim: Annotated[
        int, Ge(1), Doc("numbers of a latent (D3: 64 small, 2048 medium, 4096 large; there it must be 4 width)")
    ] = 16
    norm: Annotated[
        Literal["group", "batch"],
        Doc("statistics of each image and group of up to 8 channels, or of all images of the set (D3: of the batch)"),
    ] = "group"
    sample: Annotated[
        bool, Doc("store log-variances and decode a sample where there is a key (D3: true), or only means")
    ] = True
    dtype: Annotated[
        Literal["float32", "bfloat16"], Doc("precision on disk and in the forward pass; D3 counts float32")
    ] = "float32"
    start: Annotated[
        Literal["uniform"], Doc("D3's start: normal latents, a decoder as PyTorch draws it; images are not looked at")
    ] = "uniform"
    optimizer: Annotated[Literal["sgd", "adam"], Doc("of the latents; sgd has D3's momentum of 0.5")] = "sgd"
    lr: Annotated[
        float, Gt(0), Doc("learning rate of the latents in distillation (D3: sgd, 3e-4 small, 5e-3 medium and large)")
    ] = 3e-4
    lr_decoder: Annotated[
        float, Gt(0), Doc("Adam's learning rate of the decoder in distillation (D3: 3e-4 small, 8e-5 medium and large)")
    ] = 3e-4
    NOISE = ("uniform",)
    FORMER = Spec.FORMER | {"images_per_class": "lpc"}

    def resolved(self, image_shape: Shape) -> LatentSpec:
        h, w, _ = image_shape
        if h != w or h < LEAST_SIDE or h.bit_count() != 1:
            raise InputError(
                f"codec.name: latent doubles maps of {START_SIDE} x {START_SIDE} and needs square images whose side is "
                f"a power of two from {LEAST_SIDE}, found {h} x {w}"
            )
        if self.decoder == "large" and self.latent_dim != START_SIDE**2 * self.width:
            raise InputError(
                f"codec.latent_dim: the large decoder has no linear map; expected 4 * codec.width = "
                f"{START_SIDE**2 * self.width}, found {self.latent_dim}"
            )
        return self

    def sizes(self, image_shape: Shape) -> dict[str, Sequence[int]]:
        # Every map has a whole number of channels.
        least = LEAST_SHARE[self.decoder]
        multiple = least // min(channels(dataclasses.replace(self, width=least), image_shape[0]))
        return {"images_per_class": range(1, MOST), "width": range(multiple, MOST, multiple)}

    def layout(self, image_shape: Shape, num_classes: int) -> Layout:
        # The large decoder's latents are its first map.
        numbers = START_SIDE**2 * self.width if self.decoder == "large" else self.latent_dim
        latents = dict.fromkeys(self.latents, (num_classes * self.images_per_class, numbers))
        return arrays(self.dtype, latents | shapes(self, image_shape[0], image_shape[-1]))

    @property
    def latents(self) -> tuple[str, ...]:
        """The arrays of latents."""
        return ("mean", "log_variance") if self.sample else ("mean",)


def make(spec: LatentSpec, image_shape: tuple[int, int, int], num_classes: int) -> Codec:
    """Builds the codec; see `gsdd_jax.codecs.make`."""
    h, w, c = image_shape
    n = num_classes * spec.images_per_class
    latents = spec.latents

    def init(key, images):
        del images
        key_latents, key_decoder = jax.random.split(key)
        drawn = jax.random.normal(key_latents, (len(latents), n, spec.latent_dim), jnp.float32)
        return dict(zip(latents, drawn, strict=True)) | draw_decoder(key_decoder, shapes(spec, h, c))

    def decode(params, index=None, *, size=None, key=None):
        params = jax.tree.map(lambda x: storage.quantize(x, spec.dtype), params)
        codes = params["mean"]
        if key is not None and spec.sample:
            # Noise for all, so that a sample of an image does not depend on which others are asked for.
            codes += jnp.exp(params["log_variance"] / 2) * jax.random.normal(key, codes.shape, codes.dtype)
        if index is not None and spec.norm == "group":
            codes = codes[index]
        images = decoded(params, codes, spec.norm)
        if index is not None and spec.norm == "batch":
            images = images[index]
        return resized(images, size)

    def parts(of_latents, of_decoder):
        return optax.multi_transform(
            {"latents": of_latents, "decoder": of_decoder},
            lambda params: {name: "latents" if name in latents else "decoder" for name in params},
        )

    def optimizer():
        return parts(descent(spec), optax.chain(optax.add_decayed_weights(DECAY), optax.adam(spec.lr_decoder)))

    def fitter(steps):
        cosine = functools.partial(optax.cosine_decay_schedule, decay_steps=steps, alpha=0.02)
        return parts(optax.adam(cosine(FIT_LATENTS)), optax.adam(cosine(FIT_DECODER / spec.width)))

    return Codec(
        name="latent",
        spec=spec,
        image_shape=image_shape,
        num_classes=num_classes,
        images_per_class=spec.images_per_class,
        init=init,
        decode=decode,
        optimizer=optimizer,
        fitter=fitter,
        draws=spec.sample,
        **cast_storage(spec, image_shape, num_classes),
    )


def decoded(params: dict[str, jax.Array], codes: jax.Array, norm: str) -> jax.Array:
    """Draws images ``[n, h, w, c]`` in [0,1].

    Args:
        params: Of the decoder: ``linear [z, 4 width]`` unless the latents are the first map; for each doubling,
            numbered from 0, ``up [side, side, in, out]``, mirrored against PyTorch's, ``scale`` and ``shift [out]``;
            ``out [3, 3, in, c]``; and biases.
        codes: ``[n, z]``.
        norm: ``"group"`` or ``"batch"``.
    """
    x = codes @ params["linear"] + params["linear_bias"] if "linear" in params else codes
    x = x.reshape(len(codes), START_SIDE, START_SIDE, -1)
    for layer in range(sum(name.startswith("scale") for name in params)):
        x = _doubled(x, params[f"up{layer}"]) + params[f"up{layer}_bias"]
        x = _normalized(x, norm) * params[f"scale{layer}"] + params[f"shift{layer}"]
        x = jax.nn.leaky_relu(x, LEAK)
    return CENTER + REACH * jnp.tanh(_conv(x, params["out"]) + params["out_bias"])


def _conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Correlates ``[n, h, w, in]``, zeros around it, with ``[side, side, in, out]``; the size stays."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


# Which tap of a kernel meets the pixel before, at and behind an output pixel's own, for even and odd outputs.
TAPS = {3: ((None, 1, None), (None, 0, 2)), 4: ((0, 2, None), (None, 1, 3))}


def _doubled(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transposed convolution of stride 2 to twice the side; PyTorch's padding 1 and, for 3x3, output padding 1.

    Even and odd outputs are those of two plain convolutions with parts of the kernel, made as one: XLA on CPU walks the
    zeros that a transposed one puts between the pixels (3 times slower, with gradients).
    """
    side, _, inputs, outputs = kernel.shape
    chosen = np.zeros((2, 3, side), np.float32)
    for parity, taps in enumerate(TAPS[side]):
        for index, tap in enumerate(taps):
            if tap is not None:
                chosen[parity, index, tap] = 1
    parts = jnp.einsum("pis,qjt,stuo->ijupqo", chosen, chosen, kernel, precision=jax.lax.Precision.HIGHEST)
    n, h, w, _ = x.shape
    drawn = _conv(x, parts.reshape(3, 3, inputs, 4 * outputs)).reshape(n, h, w, 2, 2, outputs)
    return drawn.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, outputs)


def _normalized(x: jax.Array, norm: str) -> jax.Array:
    """Takes mean and spread out of each group of channels of an image, or of each channel of all images."""
    n, h, w, c = x.shape
    groups = x.reshape(n, h, w, -1, 1 if norm == "batch" else math.gcd(c, GROUP))
    axes = (0, 1, 2, 4) if norm == "batch" else (1, 2, 4)
    centered = groups - groups.mean(axes, keepdims=True)
    return (centered * jax.lax.rsqrt(jnp.mean(centered**2, axes, keepdims=True) + NORM_FLOOR)).reshape(x.shape)


def channels(spec: LatentSpec, side: int) -> list[int]:
    """Returns the channels of the decoder's maps, from 2 x 2 to ``side``.

    They halve with each doubling but the last, down to the least share. D3's lists are for 32 to 256 px (small), 32 and
    64 px (medium) and 64 px (large); the rule goes on from there.
    """
    doublings = int(math.log2(side // START_SIDE))
    shares = [min(2**step, LEAST_SHARE[spec.decoder]) for step in range(doublings)]
    # The small decoder halves at its last doubling too, where it has not reached its least share.
    last = min(2**doublings, LEAST_SHARE[spec.decoder]) if spec.decoder == "small" else shares[-1]
    return [spec.width // share for share in (*shares, last)]


def shapes(spec: LatentSpec, side: int, image_channels: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the decoder's arrays, each kernel before its bias."""
    kernel, places = KERNEL[spec.decoder], START_SIDE**2 * spec.width
    arrays: dict[str, tuple[int, ...]] = {}
    if spec.decoder != "large":
        arrays |= {"linear": (spec.latent_dim, places), "linear_bias": (places,)}
    widths = channels(spec, side)
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        arrays |= {f"up{layer}": (kernel, kernel, inputs, outputs)}
        arrays |= dict.fromkeys((f"up{layer}_bias", f"scale{layer}", f"shift{layer}"), (outputs,))
    return arrays | {"out": (OUT_KERNEL, OUT_KERNEL, widths[-1], image_channels), "out_bias": (image_channels,)}


def draw_decoder(key: jax.Array, arrays: dict[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """Draws a decoder as PyTorch does: kernel and bias from U(+-1 / sqrt(fan_in)); scale 1, shift 0.

    PyTorch takes the outputs of a transposed convolution for its inputs.
    """
    # One draw for all: XLA takes half a second to compile each.
    ends = list(itertools.accumulate(math.prod(shape) for shape in arrays.values()))
    parts = jnp.split(jax.random.uniform(key, (ends[-1],), jnp.float32, minval=-1.0), ends[:-1])
    params, bound = {}, 0.0
    for part, (name, shape) in zip(parts, arrays.items(), strict=True):
        if name.startswith(("scale", "shift")):
            params[name] = jnp.full(shape, float(name.startswith("scale")), jnp.float32)
            continue
        if not name.endswith("bias"):
            fan_in = math.prod(shape[:-2]) * (shape[-1] if name.startswith("up") else shape[-2])
            bound = 1 / math.sqrt(fan_in)
        params[name] = bound * part.reshape(shape)
    return params
