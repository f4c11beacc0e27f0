"""Sparse sums of shared tokens, made into patches by a small network: SPEED (Wei et al. 2023).

Each patch of an image is a sparse sum of the rows of an epitome that all images share, one sum per head, with few
non-zeros per image and head. With ``s`` these sums, each block of the network is ``x = norm(x + mix(s))``, ``x = norm(x
+ mlp(x))``, from ``x = 0``; image = ``CENTER + SPREAD out(x)``, patch by patch.

Deviations: only the largest coefficients take part in every forward pass, so that the images that are trained are those
of the file; SPEED trains all of them under an L1 penalty, cuts at the end and does not train on. The gradient is that
of what takes part: passing it to all coefficients makes them trade places at every step (50 CIFAR-10 images, 300 steps:
15.8 against 17.5 dB). The start can look at real images, which SPEED's does not (19.7 dB). Images are normalized by one
mean and spread, whitening follows the decode as for every codec.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Gt, Le
from typing_extensions import Doc

from gsdd_jax import storage
from gsdd_jax.codecs.base import CENTER, MOST, SPREAD, Codec, Layout, Shape, Spec, arrays, resized
from gsdd_jax.errors import InputError
from gsdd_jax.later import optax

# Standard deviation of epitome and coefficients as SPEED draws them.
DRAWN = 0.2
# Share that all but the best token of a patch keep of their matched coefficients, so that one patch does not crowd out
# others. 50 CIFAR-10 images, 300 steps: 18.6, 19.4 and 19.7 dB with 1, 0.5 and 0.1.
RUNNER_UP = 0.1
# PyTorch's constant of layer normalization.
NORM_FLOOR = 1e-5
# Ridge of the solved output layer, relative to the mean square of its inputs.
RIDGE = 1e-3
# Places that a stored index can tell apart.
PLACES = 1 << 16
# What a file may take in memory, its zeros included, in bytes: the larger of the two. SPEED's own take ten times it.
UNPACKED, UNPACKED_PER_BYTE = 1 << 28, 64
# Leaves with one entry per block.
BLOCK = ("mix", "mix_bias", "mlp", "mlp_bias", "norm_scale", "norm_shift")
# Adam's rates when fitting images; swept over 50 CIFAR-10 images and 300 steps.
FIT_COEFFICIENTS = 0.02
FIT_SHARED = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseEpitomeSpec(Spec):
    """Settings of the sparse-epitome codec; SPEED's for CIFAR-10 at 1 image per class are named."""

    name: Annotated[Literal["sparse_epitome"], Doc("the parameterization")] = "sparse_epitome"
    images_per_class: Annotated[int, Ge(0), Doc("images per class; 0 = as many as the budget holds")] = 0
    patch: Annotated[int, Ge(1), Doc("side of a patch in pixels (SPEED: 4, and 8 at 128 px)")] = 4
    width: Annotated[int, Ge(1), Doc("numbers per token (SPEED: 32)")] = 32
    blocks: Annotated[int, Ge(1), Le(64), Doc("blocks of the network (SPEED: 1)")] = 1
    heads: Annotated[int, Ge(1), Doc("sums per patch, each of its own part of the tokens (SPEED: 2)")] = 2
    tokens: Annotated[int, Ge(1), Doc("rows of the epitome (SPEED: 16)")] = 16
    nonzeros: Annotated[int, Ge(1), Doc("non-zero coefficients per image and head (SPEED: 48)")] = 48
    dtype: Annotated[
        Literal["float32", "bfloat16"], Doc("precision on disk and in the forward pass; SPEED counts float32")
    ] = "float32"
    start: Annotated[
        Literal["solved", "uniform"],
        Doc(
            "starting point of the fit: coefficients matched to the images' patches and output layer solved for them, "
            "or all as SPEED draws it"
        ),
    ] = "solved"
    optimizer: Annotated[Literal["sgd", "adam"], Doc("sgd has SPEED's momentum of 0.95")] = "adam"
    lr: Annotated[float, Gt(0), Doc("learning rate of the coefficients in distillation (SPEED with TM: sgd, 100)")] = (
        0.01
    )
    lr_epitome: Annotated[float, Ge(0), Doc("factor of lr for the epitome (SPEED: 0.1)")] = 0.1
    lr_network: Annotated[float, Ge(0), Doc("factor of lr for the network (SPEED: 1e-4)")] = 0.1
    NOISE = ("uniform",)

    def resolved(self, image_shape: Shape) -> SparseEpitomeSpec:
        h, w, _ = image_shape
        if h % self.patch or w % self.patch:
            raise InputError(f"codec.patch: expected a divisor of {h} and {w}, found {self.patch}")
        if (patches := self.patches(image_shape)) * self.tokens > PLACES:
            raise InputError(
                f"codec.tokens: {patches} patches of {self.tokens} coefficients are more than the {PLACES} places of a "
                f"16-bit index; expected at most {PLACES // patches}"
            )
        return self

    def patches(self, image_shape: Shape) -> int:
        """Returns the patches of an image."""
        return image_shape[0] // self.patch * (image_shape[1] // self.patch)

    def sizes(self, image_shape: Shape) -> dict[str, Sequence[int]]:
        return {
            "images_per_class": range(1, MOST),
            "width": range(self.heads, MOST, self.heads),
            "nonzeros": range(1, self.patches(image_shape) * self.tokens + 1),
        }

    def layout(self, image_shape: Shape, num_classes: int) -> Layout:
        chosen = (num_classes * self.images_per_class, self.heads, self.nonzeros)
        written = arrays(self.dtype, {"values": chosen} | shared_shapes(self, image_shape[-1]))
        return written | {"indices": jax.ShapeDtypeStruct(chosen, jnp.uint16)}


def make(spec: SparseEpitomeSpec, image_shape: tuple[int, int, int], num_classes: int) -> Codec:
    """Builds the codec; see `gsdd_jax.codecs.make`."""
    h, w, c = image_shape
    n = num_classes * spec.images_per_class
    count = spec.patches(image_shape)
    places = count * spec.tokens

    def init(key, images):
        params = speed(key, n, count, spec, c)
        if spec.start == "uniform":
            return params
        normalized = (jnp.asarray(images, jnp.float32) - CENTER) / SPREAD
        patches = to_patches(normalized, spec.patch)
        return solve_output(match(params, patches, spec), patches, spec)

    def decode(params, index=None, *, size=None, key=None):
        del key
        if index is not None:
            params = params | {"coefficients": params["coefficients"][index]}
        params = params | {"coefficients": largest(params["coefficients"], spec.nonzeros)}
        params = jax.tree.map(lambda x: storage.quantize(x, spec.dtype), params)
        output = features(params) @ params["out"] + params["out_bias"]
        images = CENTER + SPREAD * from_patches(output, (h, w), spec.patch)
        return resized(images, size)

    def quantize(params):
        shared = {name: leaf for name, leaf in params.items() if name != "coefficients"}
        flat = params["coefficients"].reshape(-1, spec.heads, places)
        index = _largest(flat, spec.nonzeros)
        values = jnp.take_along_axis(flat, index, axis=-1)
        return storage.cast(shared | {"values": values}, spec.dtype) | {"indices": index.astype(jnp.uint16)}

    def dequantize(tree):
        params = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in tree.items() if name != "indices"}
        flat = _scatter(params.pop("values"), jnp.asarray(tree["indices"], jnp.int32), places)
        return params | {"coefficients": flat.reshape(-1, spec.heads, count, spec.tokens)}

    def rates(coefficients, epitome, network, transformation):
        def group(path, leaf):
            return path[0].key if path[0].key in ("coefficients", "epitome") else "network"

        each = {"coefficients": coefficients, "epitome": epitome, "network": network}
        return optax.multi_transform(
            {name: transformation(rate) for name, rate in each.items()},
            lambda params: jax.tree_util.tree_map_with_path(group, params),
        )

    def fitter(steps):
        return rates(
            FIT_COEFFICIENTS,
            FIT_SHARED,
            FIT_SHARED,
            lambda rate: optax.adam(optax.cosine_decay_schedule(rate, steps, alpha=0.02)),
        )

    return Codec(
        name="sparse_epitome",
        spec=spec,
        image_shape=image_shape,
        num_classes=num_classes,
        images_per_class=spec.images_per_class,
        init=init,
        decode=decode,
        quantize=quantize,
        dequantize=dequantize,
        nbytes=lambda params: storage.nbytes(jax.eval_shape(quantize, params)),
        optimizer=lambda: rates(
            spec.lr,
            spec.lr * spec.lr_epitome,
            spec.lr * spec.lr_network,
            optax.adam if spec.optimizer == "adam" else functools.partial(optax.sgd, momentum=0.95),
        ),
        fitter=fitter,
        layout=lambda: spec.layout(image_shape, num_classes),
        unpack=lambda written: checked(written, places),
    )


def checked(written: Mapping[str, Any], places: int) -> Mapping[str, Any]:
    """Returns the arrays of a file as they are.

    Raises:
        ValueError: An index beyond the ``places`` of an image and head, or so few numbers for so many zeros that the
            memory that they take here would come as a surprise.
    """
    index = np.asarray(written["indices"]).astype(np.int64)
    if index.max() >= places or (np.diff(index, axis=-1) <= 0).any():
        raise InputError(f"indices: expected places below {places} in rising order for each image and head")
    unpacked = index[..., 0].size * places * np.dtype(np.float32).itemsize
    allowed = max(UNPACKED, UNPACKED_PER_BYTE * storage.nbytes(dict(written)))
    if unpacked > allowed:
        raise InputError(f"values: expected at most {allowed} bytes of coefficients, zeros included, found {unpacked}")
    return written


def features(params: dict[str, jax.Array]) -> jax.Array:
    """Returns what the output layer sees of each patch, ``[n, patches, width]``.

    Args:
        params: ``coefficients [n, heads, patches, tokens]``, ``epitome [tokens, width]``; for each block ``mix [width,
            width]``, ``mlp [2, width, width]``, ``norm_scale`` and ``norm_shift`` ``[2, width]``, and biases.
    """
    coefficients, epitome = params["coefficients"], params["epitome"]
    n, heads, patches, tokens = coefficients.shape
    sums = jnp.einsum("nhjk,khd->njhd", coefficients, epitome.reshape(tokens, heads, -1)).reshape(n, patches, -1)
    x = jnp.zeros_like(sums)
    for block in range(params["mix"].shape[0]):
        own = {name: params[name][block] for name in BLOCK}
        x = _norm(x + sums @ own["mix"] + own["mix_bias"], own["norm_scale"][0], own["norm_shift"][0])
        hidden = jax.nn.gelu(x @ own["mlp"][0] + own["mlp_bias"][0], approximate=False)
        x = _norm(x + hidden @ own["mlp"][1] + own["mlp_bias"][1], own["norm_scale"][1], own["norm_shift"][1])
    return x


def _norm(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    centered = x - x.mean(-1, keepdims=True)
    return scale * centered * jax.lax.rsqrt(jnp.mean(centered**2, -1, keepdims=True) + NORM_FLOOR) + shift


def largest(coefficients: jax.Array, count: int) -> jax.Array:
    """Sets all but the ``count`` largest magnitudes of each image and head to zero, for the gradient as well."""
    flat = coefficients.reshape(*coefficients.shape[:2], -1)
    index = _largest(flat, count)
    kept = _scatter(jnp.take_along_axis(flat, index, axis=-1), index, flat.shape[-1])
    return kept.reshape(coefficients.shape)


def _largest(flat: jax.Array, count: int) -> jax.Array:
    """Returns the places of the largest magnitudes along the last axis, in rising order, so that one set has one."""
    return jnp.sort(jax.lax.top_k(jnp.abs(flat), count)[1], axis=-1)


def _scatter(values: jax.Array, index: jax.Array, places: int) -> jax.Array:
    return jnp.put_along_axis(
        jnp.zeros((*values.shape[:2], places), values.dtype),
        index,
        values,
        axis=-1,
        inplace=False,
        mode="promise_in_bounds",
    )


def to_patches(images: jax.Array, side: int) -> jax.Array:
    """Cuts images ``[n, h, w, c]`` into ``[n, patches, side * side * c]``, row by row."""
    n, h, w, c = images.shape
    rows = images.reshape(n, h // side, side, w // side, side, c)
    return rows.swapaxes(2, 3).reshape(n, -1, side * side * c)


def from_patches(patches: jax.Array, size: tuple[int, int], side: int) -> jax.Array:
    """The inverse of `to_patches`."""
    h, w = size
    rows = patches.reshape(len(patches), h // side, w // side, side, side, -1)
    return rows.swapaxes(2, 3).reshape(len(patches), h, w, -1)


def speed(key: jax.Array, n: int, patches: int, spec: SparseEpitomeSpec, channels: int) -> dict[str, jax.Array]:
    """Draws everything as SPEED does: normal epitome and coefficients, Xavier-uniform network without biases."""
    d, r, outputs = spec.width, spec.blocks, spec.patch**2 * channels
    keys = iter(jax.random.split(key, 5))

    def xavier(*shape: int) -> jax.Array:
        bound = float(np.sqrt(6 / sum(shape[-2:])))
        return bound * jax.random.uniform(next(keys), shape, jnp.float32, minval=-1.0)

    return {
        "coefficients": DRAWN * jax.random.normal(next(keys), (n, spec.heads, patches, spec.tokens), jnp.float32),
        "epitome": DRAWN * jax.random.normal(next(keys), (spec.tokens, d), jnp.float32),
        "mix": xavier(r, d, d),
        "mix_bias": jnp.zeros((r, d), jnp.float32),
        "mlp": xavier(r, 2, d, d),
        "mlp_bias": jnp.zeros((r, 2, d), jnp.float32),
        "norm_scale": jnp.ones((r, 2, d), jnp.float32),
        "norm_shift": jnp.zeros((r, 2, d), jnp.float32),
        "out": xavier(d, outputs),
        "out_bias": jnp.zeros(outputs, jnp.float32),
    }


def match(params: dict[str, jax.Array], patches: jax.Array, spec: SparseEpitomeSpec) -> dict[str, jax.Array]:
    """Sets the coefficients to how well each token of the epitome fits each patch, the best one of a patch above all.

    Fit is the projection on the token of the patch's principal components, which the heads share out in turns.

    Args:
        params: As drawn.
        patches: ``[n, patches, side * side * c]`` normalized.
        spec: Width, heads and tokens.
    """
    n, count, _ = patches.shape
    flat = patches.reshape(n * count, -1)
    axes = jnp.linalg.eigh(flat.T @ flat)[1][:, ::-1][:, : spec.width]
    components = jnp.pad(flat @ axes, ((0, 0), (0, spec.width - axes.shape[1])))
    components = components.reshape(n, count, -1, spec.heads)
    epitome = params["epitome"].reshape(spec.tokens, spec.heads, -1)
    epitome = epitome / jnp.linalg.norm(epitome, axis=-1, keepdims=True)
    fit = jnp.einsum("njdh,khd->nhjk", components, epitome)
    best = jnp.abs(fit) >= jnp.abs(fit).max(-1, keepdims=True)
    scale = DRAWN / jnp.sqrt(jnp.mean(fit**2, where=best))
    return params | {"coefficients": scale * jnp.where(best, fit, RUNNER_UP * fit)}


def solve_output(params: dict[str, jax.Array], patches: jax.Array, spec: SparseEpitomeSpec) -> dict[str, jax.Array]:
    """Replaces the output layer by the ridge regression of all patches on what it sees."""
    seen = features(params | {"coefficients": largest(params["coefficients"], spec.nonzeros)})
    seen = seen.reshape(-1, spec.width)
    seen = jnp.concatenate([seen, jnp.ones((len(seen), 1), jnp.float32)], axis=1)
    gram = seen.T @ seen + RIDGE * len(seen) * jnp.eye(spec.width + 1, dtype=jnp.float32)
    solution = jnp.linalg.solve(gram, seen.T @ patches.reshape(len(seen), -1))
    return params | {"out": solution[:-1], "out_bias": solution[-1]}


def shared_shapes(spec: SparseEpitomeSpec, channels: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of epitome and network."""
    d, r, outputs = spec.width, spec.blocks, spec.patch**2 * channels
    return {
        "epitome": (spec.tokens, d),
        "mix": (r, d, d),
        "mix_bias": (r, d),
        "mlp": (r, 2, d, d),
        "mlp_bias": (r, 2, d),
        "norm_scale": (r, 2, d),
        "norm_shift": (r, 2, d),
        "out": (d, outputs),
        "out_bias": (outputs,),
    }
