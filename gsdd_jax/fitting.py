"""Initialization: fit a codec to real images, to a solid color, or not at all (GSDD, Eq. 8 and appendix B.3)."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge
from typing_extensions import Doc

from gsdd_jax import pixels
from gsdd_jax.codecs import Codec
from gsdd_jax.codecs.base import Draft
from gsdd_jax.data.sampling import class_table, sample_classes
from gsdd_jax.errors import InputError, needing


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitSpec:
    """Settings of the initialization."""

    to: Annotated[
        Literal["real", "solid", "random"],
        Doc(
            "real: real images; solid: warm-up on the mean color of the set; random: the start as drawn, not fitted. "
            "The last two need a codec.start that looks at no image, such as uniform."
        ),
    ] = "real"
    select: Annotated[
        Literal["random", "first", "kmeans"],
        Doc("Real images of a class: drawn at random, its first, or the nearest to k-means centers of features."),
    ] = "random"
    steps: Annotated[int, Ge(0), Doc("Adam steps on the mean squared error")] = 1000
    initial_set: Annotated[
        str,
        Doc(
            "Folder of an exported set, or of a run, whose parameters are the start in place of a fit: the same codec "
            "but for its rates, image size and classes; empty = fit."
        ),
    ] = ""
    initial_sha256: Annotated[
        str, Doc("What `initial_set` must hold: the SHA-256 of its codec and arrays. A run fills it in.")
    ] = ""

    def __post_init__(self) -> None:
        """Checks what no single field can say.

        Raises:
            ValueError: A sum of no set.
        """
        if self.initial_sha256 and not self.initial_set:
            raise InputError("fit.initial_set: expected the folder of the set that fit.initial_sha256 names, found ''")


class FitState(NamedTuple):
    """What fitting changes; checkpoints hold exactly this."""

    params: Any
    opt_state: Any
    step: jax.Array  # int32 scalar


def select_images(
    key: jax.Array,
    labels: np.ndarray,
    per_class: int,
    *,
    how: str,
    num_classes: int,
    features: np.ndarray | None = None,
) -> np.ndarray:
    """Chooses the real images that are fitted.

    Args:
        key: For ``random`` and ``kmeans``; consumed.
        labels: ``[N]`` labels of the training images.
        per_class: Images to choose per class.
        how: ``random`` (without replacement), ``first``, or ``kmeans``: the distinct images nearest to the class's
            k-means centers.
        num_classes: ``k``.
        features: ``[N, f]`` embeddings, for ``kmeans``.

    Returns:
        Indices ``[num_classes * per_class]``, class-major.

    Raises:
        ValueError: A class has too few images, or ``kmeans`` has no features.
    """
    members = [np.flatnonzero(labels == label) for label in range(num_classes)]
    for label, own in enumerate(members):
        if len(own) < per_class:
            raise InputError(
                f"per_class: {per_class} images per class are to be fitted, class {label} has {len(own)} training ones"
            )
    if how == "random":
        table = class_table(labels, num_classes)
        return np.asarray(jax.jit(sample_classes, static_argnums=2)(key, table, per_class)).reshape(-1)
    if how == "first":
        return np.concatenate([own[:per_class] for own in members])
    if how != "kmeans":
        raise InputError(f"fit.select: expected one of random, first, kmeans; found {how!r}")
    if features is None:
        raise InputError("fit.select: kmeans needs features, found none")
    keys = jax.random.split(key, num_classes)
    nearest = [_nearest_to_centers(each, features[own], per_class) for each, own in zip(keys, members, strict=True)]
    return np.concatenate([own[chosen] for own, chosen in zip(members, nearest, strict=True)])


def _nearest_to_centers(key: jax.Array, features: np.ndarray, count: int) -> np.ndarray:
    with needing("fit.select 'kmeans' needs scikit-learn", extra="full"):
        from sklearn.cluster import KMeans  # slow to import, and only this option needs it

    seed = int(jax.random.randint(key, (), 0, 2**31 - 1, jnp.int32))
    centers = KMeans(count, n_init=1, random_state=seed).fit(features).cluster_centers_
    taken: list[int] = []
    for center in centers:
        order = np.argsort(((features - center) ** 2).sum(1))
        taken.append(next(int(i) for i in order if int(i) not in taken))
    return np.array(taken)


def init_fit(key: jax.Array, targets: jax.Array, *, codec: Codec, steps: int) -> FitState:
    """Returns the state before the first step, at the codec's start for images ``targets [n, h, w, c]``."""
    params = codec.init(key, targets)
    return FitState(params, codec.fitter(steps).init(params), jnp.zeros((), jnp.int32))


def fit_steps(
    state: FitState, targets: jax.Array, *, codec: Codec, steps: int, count: int
) -> tuple[FitState, jax.Array]:
    """Takes ``count`` of ``steps`` steps on the squared error; jittable.

    The loss is the sum over images of each image's mean squared error (Eq. 8): with Adam, every image is fitted as if
    it were alone.

    Returns:
        The new state, and the mean over images of the PSNR in dB before the last of the steps, unclamped.
    """
    targets = pixels.as_float(targets, "targets")
    optimizer = codec.fitter(steps)
    draft = codec.draft or Draft(lambda params, done: codec.decode(params), lambda params, done: codec.project(params))

    def loss_fn(params: Any, done: jax.Array) -> tuple[jax.Array, jax.Array]:
        error = _per_image((draft.decode(params, done) - targets) ** 2)
        return error.sum(), error

    def step(_, carry: tuple[FitState, jax.Array]) -> tuple[FitState, jax.Array]:
        state, _ = carry
        done, before = (taken.astype(jnp.float32) / steps for taken in (state.step, state.step - 1))
        params = draft.grow(state.params, targets, done, before)
        grads, error = jax.grad(loss_fn, has_aux=True)(params, done)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        params = draft.project(optax.apply_updates(params, updates), done)
        return FitState(params, opt_state, state.step + 1), error

    carry = state, jnp.ones(targets.shape[0], jnp.float32)
    # XLA on CPU is up to ten times slower with the convolutions of a decoder in a loop.
    state, error = step(0, carry) if isinstance(count, int) and count == 1 else jax.lax.fori_loop(0, count, step, carry)
    return state, psnr_of(error).mean()


def psnr_of(error: jax.Array) -> jax.Array:
    """Returns the PSNR in dB of mean squared errors of images in [0,1]."""
    return -10 * jnp.log10(jnp.maximum(error, 1e-12))


def psnr(images: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the PSNR in dB, ``[n]``, of images ``[n, h, w, c]`` or videos ``[n, t, h, w, c]``; nothing is clamped."""
    difference = pixels.as_float(images) - pixels.as_float(targets, "targets")
    return psnr_of(_per_image(difference**2))


def _per_image(values: jax.Array) -> jax.Array:
    return values.mean(tuple(range(1, values.ndim)))


def solid_targets(images: np.ndarray, count: int) -> jax.Array:
    """Returns ``count`` copies of the training set's mean color as images: the target of the solid-color warm-up."""
    images = pixels.check(images)
    mean = images.reshape(-1, images.shape[-1]).mean(0, dtype=np.float64) / pixels.white(images)
    return jnp.broadcast_to(jnp.asarray(mean, jnp.float32), (count, *images.shape[1:]))
