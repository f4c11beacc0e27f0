"""The place where any decode function plugs in: latents behind a generator that was trained elsewhere, as in GLaD.

GLaD (Cazenavette et al. 2023) distills latents of a pretrained StyleGAN-XL. Nothing here knows that generator: whoever
brings one, or any other function from latents to images, gets a `gsdd_jax.codecs.Codec` of it. A function is no
setting, so this codec is in no config, and `gsdd_jax.load` cannot read its sets back; ``dequantize`` can.

Deviations from GLaD: latents obey a budget, which GLaD's exceed, and whether the generator counts is said aloud.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge, Gt
from typing_extensions import Doc

from gsdd_jax import storage
from gsdd_jax.codecs.base import Codec, Spec, resized
from gsdd_jax.errors import InputError
from gsdd_jax.later import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorSpec(Spec):
    """What a manifest can say about a codec of latents."""

    name: Annotated[Literal["generator"], Doc("the parameterization")] = "generator"
    images_per_class: Annotated[int, Gt(0), Doc("images per class, each with latents of its own")]
    generator_bytes: Annotated[int, Ge(0), Doc("bytes counted for the generator; 0 = not counted, as in GLaD")]
    dtype: Annotated[Literal["float32", "bfloat16"], Doc("precision of the latents on disk and in the forward pass")]


def generator_prior(
    decode_fn: Callable[[Any], jax.Array],
    init_fn: Callable[[jax.Array, jax.Array], Any],
    *,
    spec: GeneratorSpec,
    image_shape: tuple[int, int, int],
    num_classes: int,
    bytes_per_class: int,
    optimizer: Callable[[], optax.GradientTransformation],
    fitter: Callable[[int], optax.GradientTransformation],
) -> Codec:
    """Builds the codec of a generator.

    Args:
        decode_fn: ``latents -> [n, h, w, c]`` around [0,1], each image from its own latents; differentiable. The
            generator's weights are constants of it.
        init_fn: ``(key, images [n, h, w, c] in [0,1]) -> latents``: a dict of float32 arrays ``[n, ...]``, class-major;
            GLaD draws them without looking at the images.
        spec: Images per class, precision, and what the generator itself costs.
        image_shape: Native (h, w, c).
        num_classes: ``k``.
        bytes_per_class: The budget; latents and ``generator_bytes`` must fit it. GLaD's need one of many pixel images.
        optimizer: For distillation (GLaD: SGD, rates by latent and objective).
        fitter: For fitting images in so many steps.

    Returns:
        The codec. Its ``nbytes`` has the counted bytes of the generator, which its file does not hold.

    Raises:
        ValueError: ``init_fn`` or ``decode_fn`` give other shapes, or the budget is exceeded; the message says by what.
    """
    h, w, c = image_shape
    n = num_classes * spec.images_per_class

    def decode(params, index=None, *, size=None, key=None):
        del key
        chosen = params if index is None else jax.tree.map(lambda x: x[index], params)
        images = decode_fn(jax.tree.map(lambda x: storage.quantize(x, spec.dtype), chosen))
        return resized(images, size)

    def quantize(params):
        return storage.cast(params, spec.dtype)

    def nbytes(params):
        return spec.generator_bytes + storage.nbytes(jax.eval_shape(quantize, params))

    latents = jax.eval_shape(init_fn, jax.random.key(0), jax.ShapeDtypeStruct((n, *image_shape), jnp.float32))
    wrong = {name: leaf.shape for name, leaf in latents.items() if leaf.shape[:1] != (n,)}
    if wrong:
        raise InputError(f"init_fn: expected latents of {n} images along the first axis, found {wrong}")
    drawn = jax.eval_shape(decode_fn, latents).shape
    if drawn != (n, *image_shape):
        raise InputError(f"decode_fn: expected images {(n, *image_shape)}, found {drawn}")
    needed, available = nbytes(latents), num_classes * bytes_per_class
    if needed > available:
        each = num_classes * (needed - spec.generator_bytes) // n
        fits = max(available - spec.generator_bytes, 0) // each
        remedy = f"at most {fits}" if fits else f"at least {-(-(spec.generator_bytes + each) // num_classes)} per class"
        raise InputError(
            f"images_per_class: latents of {spec.images_per_class} images per class, {each // num_classes} bytes each, "
            f"and {spec.generator_bytes} bytes of the generator do not fit the {available} bytes of all classes; "
            f"expected {remedy}"
        )
    return Codec(
        name=spec.name,
        spec=spec,
        image_shape=image_shape,
        num_classes=num_classes,
        images_per_class=spec.images_per_class,
        init=init_fn,
        decode=decode,
        quantize=quantize,
        dequantize=lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree),
        nbytes=nbytes,
        optimizer=optimizer,
        fitter=fitter,
        layout=lambda: jax.eval_shape(quantize, latents),
    )
