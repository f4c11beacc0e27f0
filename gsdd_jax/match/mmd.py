"""The kernel distance of two sets of features, class by class: the second term of D3 (Qin et al. 2024)."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge
from typing_extensions import Doc

from gsdd_jax import pixels
from gsdd_jax.codecs import Codec
from gsdd_jax.errors import InputError
from gsdd_jax.match.base import Batch, Objective, Synthetic
from gsdd_jax.match.chunks import split_classes, sum_of_chunks
from gsdd_jax.match.needs import ExpertWeights, Need, RealImages, expert_window
from gsdd_jax.match.trajectory import TrajectorySpec, flattener
from gsdd_jax.nets import Network
from gsdd_jax.parallel import Shard, unsharded
from gsdd_jax.whiten import Whitening

# Widths of D3's Gaussian kernels, which are added up.
WIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0)
# An unbiased mean over pairs needs a pair.
LEAST_SAMPLES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmdSpec:
    """Settings of the term, which any objective can take on top of its own loss."""

    weight: Annotated[float, Ge(0), Doc("factor of the term (D3: 1); 0 = none")] = 0.0
    samples: Annotated[
        int,
        Ge(LEAST_SAMPLES),
        Doc(
            "images per class and iteration on either side (D3: 30 small, 12 medium, 20 large); fewer synthetic ones "
            "where a class has fewer and its codec draws none at random"
        ),
    ] = 30
    features: Annotated[
        Literal["random", "expert"],
        Doc(
            "whose last feature map is compared: a fresh random network's, or an expert's after its last epoch (D3), "
            "which trajectory matching has"
        ),
    ] = "random"
    steps: Annotated[
        Literal["joint", "separate"],
        Doc("one optimizer step on the sum, or one on the objective and then one on this term (D3)"),
    ] = "joint"


# What the key of a loss is folded with for the term.
_OF_MMD = 2


def with_mmd(objective: Objective, spec: MmdSpec) -> Objective:
    """Adds the term to an objective.

    Args:
        objective: Any; an ``ExpertSegments`` among its needs where ``spec.features`` is ``expert``.
        spec: The term; of weight 0, the objective stays as it is.

    Returns:
        The objective with the metric ``mmd``, not weighted.

    Raises:
        ValueError: A class has no two synthetic images, or there are no experts.
    """
    if spec.weight == 0:
        return objective
    codec, network = objective.codec, objective.network
    copies, each = samples_of(codec, spec)
    needs: dict[str, Need] = {"mmd_real": RealImages(spec.samples)}
    if spec.features == "expert":
        window = expert_window(objective.needs)
        if not isinstance(window, TrajectorySpec):
            raise InputError(
                f"mmd.features: experts are trained for objective.name=trajectory; expected random with "
                f"{objective.spec.name}, found 'expert'"
            )
        needs["mmd_weights"] = ExpertWeights(window)

    def term(key: jax.Array, synthetic: Synthetic, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_syn, key_draw, key_network = jax.random.split(jax.random.fold_in(key, _OF_MMD), 3)
        # The same images each time, where decoding at random gives several samples of them.
        draws = jax.random.split(key_draw, copies)
        syn = jnp.concatenate([synthetic.by_class(key_syn, each, draw=draw) for draw in draws], axis=1)
        weights = batch.drawn.get("mmd_weights")
        value = feature_mmd(
            batch.drawn["mmd_real"],
            syn,
            network.init(key_network) if weights is None else flattener(network)[1](weights),
            network=network,
            whitening=batch.whitening,
            shard=synthetic.shard,
        )
        return spec.weight * value, {"mmd": synthetic.axis.sum(value)}

    def joint(
        key: jax.Array, learned: Any, carry: Any, synthetic: Synthetic, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        loss, metrics, carry = objective.loss(key, learned, carry, synthetic, batch)
        extra, found = term(key, synthetic, batch)
        return loss + extra, {"loss": synthetic.axis.sum(loss), **metrics, **found}, carry

    def separate(
        key: jax.Array, learned: Any, carry: Any, synthetic: Synthetic, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        return *term(key, synthetic, batch), carry

    losses: dict[str, Any] = {"loss": joint} if spec.steps == "joint" else {"then": (*objective.then, separate)}
    return objective._replace(needs={**objective.needs, **needs}, **losses)


def samples_of(codec: Codec, spec: MmdSpec) -> tuple[int, int]:
    """Returns how often the term decodes how many images of each class.

    D3 draws each latent as often as it takes. Where decoding is not random, a copy would be a sample at distance 0.

    Raises:
        ValueError: A class has no two synthetic images.
    """
    g = codec.images_per_class
    copies, each = (max(spec.samples // g, 1) if codec.draws else 1), min(spec.samples, g)
    if copies * each < LEAST_SAMPLES:
        raise InputError(
            f"mmd.weight: the term needs {LEAST_SAMPLES} synthetic images per class, the {codec.name} codec has "
            f"{g}; expected 0, or more images"
        )
    return copies, each


def mmd(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, Eq. 3).

    The kernel is the sum over ``WIDTHS`` of ``exp(-||a - b||^2 / (2 width^2))``; no sample is paired with itself, so
    the estimate may be negative, and is zero in expectation where both sets come from one distribution.

    Args:
        x: ``[a, f]`` features, a >= 2.
        y: ``[b, f]`` features, b >= 2.

    Returns:
        A scalar. Differentiable with respect to both.

    Raises:
        ValueError: The shapes do not belong together, or a set has no pair.
    """
    _check(x, y, ("samples", "features"))
    # Distances are those between centered features, whose squares lose fewer digits when they are taken apart.
    center = jax.lax.stop_gradient(y.mean(0))
    x, y = x - center, y - center
    return _mean_of_pairs(x) + _mean_of_pairs(y) - 2 * _kernel(x, y).mean()


def mmd_loss(real: jax.Array, syn: jax.Array) -> jax.Array:
    """Returns the sum over classes of `mmd`, D3's loss of latents and decoder.

    Args:
        real: ``[k, a, f]`` features of real images, by class; a >= 2. D3: the last feature map of a trained expert.
        syn: ``[k, b, f]`` features of synthetic images; b >= 2.

    Returns:
        A scalar. Differentiable with respect to both.

    Raises:
        ValueError: The shapes do not belong together, or a class has no pair.
    """
    _check(real, syn, ("classes", "samples", "features"))
    return jax.vmap(mmd)(real, syn).sum()


def feature_mmd(
    real: jax.Array,
    syn: jax.Array,
    params: Any,
    *,
    network: Network,
    whitening: Whitening,
    shard: Shard | None = None,
) -> jax.Array:
    """Returns `mmd_loss` of the last feature maps of a network, one class at a time.

    Images are not augmented, as in D3.

    Args:
        real: ``[k, a, h, w, c]`` images, uint8 or in [0,1]; a >= 2.
        syn: ``[k, b, h, w, c]`` float images in [0,1]; b >= 2.
        params: Of the network; D3: of an expert after its last epoch.
        network: Its architecture.
        whitening: What networks see images through.
        shard: Which classes these are, where other devices have the others, and the sum is over these.

    Returns:
        A scalar. Differentiable once, with respect to ``syn`` and nothing else; the backward pass keeps no activations.

    Raises:
        ValueError: A class has no pair.
    """
    split, weight = split_classes(shard or unsharded(len(real)), 1)
    shared = (params, whitening)

    def embed(shared: Any, images: jax.Array) -> jax.Array:
        params, whitening = shared
        _, features = network.outputs(params, whitening(images))
        return features.reshape(len(images), -1)

    def chunk_loss(shared: Any, syn: jax.Array, target: jax.Array, weight: jax.Array) -> jax.Array:
        return weight[0] * mmd(target, embed(shared, syn[0]))

    targets = jax.lax.map(lambda x: embed(shared, pixels.as_float(x, "real")), real)
    return sum_of_chunks(chunk_loss, split(syn), (jax.lax.stop_gradient(targets), weight), shared)


def _mean_of_pairs(x: jax.Array) -> jax.Array:
    count = len(x)
    # Where, not minus the diagonal: the distance of a sample from itself is zero up to rounding only.
    return jnp.where(jnp.eye(count, dtype=bool), 0, _kernel(x, x)).sum() / (count * (count - 1))


def _kernel(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the kernel of all pairs, ``[a, b]``."""
    products = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    squared = jnp.sum(x**2, -1)[:, None] + jnp.sum(y**2, -1) - 2 * products
    return sum((jnp.exp(-squared / (2 * width**2)) for width in WIDTHS), jnp.zeros(squared.shape, squared.dtype))


def _check(x: jax.Array, y: jax.Array, axes: tuple[str, ...]) -> None:
    want = f"expected two arrays [{', '.join(axes)}] that differ in samples at most"
    if x.ndim != len(axes) or y.ndim != len(axes) or (*x.shape[:-2], x.shape[-1]) != (*y.shape[:-2], y.shape[-1]):
        raise InputError(f"mmd: {want}; found {x.shape} and {y.shape}")
    if min(x.shape[-2], y.shape[-2]) < LEAST_SAMPLES:
        raise InputError(
            f"mmd: expected at least {LEAST_SAMPLES} samples on each side, found {x.shape[-2]} and {y.shape[-2]}"
        )
