"""Whitening of images: ZCA, mean/std, or none. Maps [0,1] images to the space that networks see.

A whitening is a callable pytree, ``whitening(images)``, here a NamedTuple of arrays, so that it passes jit as an
argument: a 3072x3072 matrix closed over would be baked into every executable as a 38 MB constant. Any other function
of images with its arrays is one as a ``jax.tree_util.Partial``.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax import pixels
from gsdd_jax.errors import InputError

Kind = Literal["zca", "meanstd", "none"]
KINDS: tuple[Kind, ...] = ("zca", "meanstd", "none")
MAX_ZCA_DIMS = 12_288
# (u - 128)^2 <= 2^14, so sums over 2^10 images stay within the 2^24 integers that float32 holds exactly: the products
# run at float32 speed and the covariance is exact.
_EXACT_ROWS = 1024
# What rounding to gray levels adds: the std of a uniform variable as wide as one of them.
_ROUNDING = 1 / (255 * 12**0.5)


class Identity(NamedTuple):
    """No whitening."""

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns images as they are, as floats."""
        return _floating(images)


class MeanStd(NamedTuple):
    """Per-channel normalization: `mean` and `std`, float32 [c], in units of the [0,1] image."""

    mean: jax.Array
    std: jax.Array

    def __call__(self, images: jax.Array) -> jax.Array:
        """Normalizes [..., c]; differentiable."""
        if images.shape[-1:] != self.mean.shape:
            raise InputError(f"images must have {self.mean.shape[0]} channels last, found shape {list(images.shape)}")
        return (_floating(images) - self.mean) / self.std


class Zca(NamedTuple):
    """ZCA: `mean` float32 [h, w, c], or [t, h, w, c]; `matrix` float32 [d, d], symmetric, d = h*w*c in that order."""

    mean: jax.Array
    matrix: jax.Array

    def __call__(self, images: jax.Array) -> jax.Array:
        """Whitens [..., h, w, c]; differentiable."""
        lead = images.shape[: images.ndim - self.mean.ndim]
        if images.shape != (*lead, *self.mean.shape):
            expected = ", ".join(map(str, self.mean.shape))
            raise InputError(f"images must have shape [..., {expected}], found {list(images.shape)}")
        flat = (_floating(images) - self.mean).reshape(*lead, -1)
        # The default precision of accelerators (TF32, bfloat16) would leave errors of 1e-3, above half a gray level.
        return jnp.matmul(flat, self.matrix, precision=jax.lax.Precision.HIGHEST).reshape(images.shape)


# Any function that is a pytree, too.
Whitening = Identity | MeanStd | Zca | Callable[[jax.Array], jax.Array]


def inputs(images: jax.Array, whitening: Whitening | None) -> jax.Array:
    """Returns what a network sees of images: floats, whitened."""
    x = pixels.as_float(images)
    return x if whitening is None else whitening(x)


class Published(NamedTuple):
    """Constants from a published code: `mean`, `std` per channel of the [0,1] image, and where they are used."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


MEAN_STD: dict[str, Published] = {
    "cifar10": Published(
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),
        "DC/DSA/DM, MTT, TESLA, DDiF and others; means of per-image stds, not pooled: normalized std is about 1.2",
    ),
    "cifar10_pooled": Published((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "FRePo; pooled stds"),
    "cifar100": Published((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762), "DC/DSA/DM; pooled stds"),
    "cifar100_as_cifar10": Published(
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),
        "MTT, TESLA, GLaD, DDiF, DATM, DD-Ranking: CIFAR-10's on CIFAR-100",
    ),
    "imagenet": Published((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "MTT and most others, for ImageNet subsets"),
    "tiny_imagenet": Published((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "MTT; ImageNet's constants"),
    "mnist": Published((0.1307,), (0.3081,), "DC/DSA/DM"),
    "fashion_mnist": Published((0.2861,), (0.3530,), "DC/DSA/DM"),
    "svhn": Published((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), "DC/DSA/DM"),
}


def fit(kind: Kind, images: np.ndarray, *, eps: float = 0.1) -> Whitening:
    """Computes a whitening from training images; on the host, in float64.

    "zca" follows kornia's ZCAWhitening as MTT and its successors use it: unbiased covariance of the [0,1] pixels
    without prior normalization, `W = U diag((S + eps)^-1/2) U^T`. `eps` is added to the eigenvalues, not scaled by
    their mean (FRePo scales it: a different whitening). Deviations: the covariance sums are exact and the
    eigendecomposition is float64 (the reference takes an SVD in float32); the pixels are flattened as h, w, c instead
    of c, h, w, which permutes rows and columns only. "meanstd" takes per-channel mean and std (biased, as for a
    population) pooled over all pixels of all images. The std of a channel that is constant but for the rounding to gray
    levels is 1, as in scikit-learn's StandardScaler: such a channel is centered, and nothing divides by 0.

    Args:
        kind: "zca", "meanstd" or "none".
        images: [n, h, w, c], uint8 or floating point in [0,1], the whole training set; n >= 2.
        eps: Added to the eigenvalues, in units of squared [0,1] pixels; > 0; only "zca" uses it.

    Raises:
        TypeError: Images are neither uint8 nor floating point.
        ValueError: Unknown kind, images that are none, see `pixels.check`, too few of them, too many dimensions for
            "zca".
    """
    images = np.asarray(pixels.check(images))
    eval_shape(kind, images.shape[1:])
    if len(images) < 2:
        raise InputError(f"images: a whitening needs at least 2 of them, found {len(images)}")
    if kind == "none":
        return Identity()
    return _fit_meanstd(images) if kind == "meanstd" else _fit_zca(images, eps)


def eval_shape(kind: Kind, image_shape: Sequence[int]) -> Whitening:
    """Returns the shapes and dtypes of what `fit` returns for images ``(h, w, c)``, in place of its arrays.

    Raises:
        ValueError: Unknown kind, or too many dimensions for "zca".
    """
    if kind not in KINDS:
        raise InputError(f"whiten: unknown kind {kind!r}; allowed: {', '.join(KINDS)}")
    of: Callable[..., Any] = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    if kind == "none":
        return Identity()
    if kind == "meanstd":
        return MeanStd(of(image_shape[-1:]), of(image_shape[-1:]))
    dims = math.prod(image_shape)
    if dims > MAX_ZCA_DIMS:
        raise InputError(
            f"whiten: zca of {'x'.join(map(str, image_shape))} images needs two {dims} x {dims} matrices "
            f"({8 * dims**2 / 1e9:.0f} GB) and an eigendecomposition of that size; "
            f"the limit is {MAX_ZCA_DIMS} dimensions (64x64x3); use meanstd"
        )
    return Zca(of(image_shape), of((dims, dims)))


def meanstd_of(mean: Sequence[float], std: Sequence[float]) -> MeanStd:
    """Makes a normalization from given constants, such as `MEAN_STD["cifar10"].mean` and `.std`.

    Raises:
        ValueError: Different lengths, or a std that is not positive.
    """
    if len(mean) != len(std) or not len(mean):
        raise InputError(f"mean and std must have one value per channel, found {len(mean)} and {len(std)}")
    if min(std) <= 0:
        raise InputError(f"std must be positive, found {list(std)}")
    return MeanStd(mean=jnp.asarray(mean, jnp.float32), std=jnp.asarray(std, jnp.float32))


def _fit_meanstd(images: np.ndarray) -> MeanStd:
    if images.dtype != np.uint8:
        mean, std = images.mean((0, 1, 2), dtype=np.float64), images.std((0, 1, 2), dtype=np.float64)
    else:
        # Gray levels are counted, so the sums are exact; in chunks, because bincount widens its input eightfold.
        histogram = np.zeros((images.shape[-1], 256))
        for start in range(0, len(images), _EXACT_ROWS):
            for channel, row in enumerate(histogram):
                row += np.bincount(images[start : start + _EXACT_ROWS, ..., channel].reshape(-1), minlength=256)
        value = np.arange(256) / 255
        weight = histogram / histogram.sum(1, keepdims=True)
        mean = weight @ value
        std = np.sqrt((weight * (value - mean[:, None]) ** 2).sum(1))
    return meanstd_of(mean.tolist(), np.where(std < _ROUNDING, 1.0, std).tolist())


def _fit_zca(images: np.ndarray, eps: float) -> Zca:
    if not eps > 0:
        raise InputError(f"eps must be > 0, found {eps}")
    mean, covariance = _moments(images.reshape(len(images), -1))
    values, vectors = np.linalg.eigh(covariance)
    # Rounding can leave eigenvalues of about -1e-14 where the covariance is singular.
    root = np.sqrt(np.maximum(values, 0) + eps)
    return Zca(
        mean=jnp.asarray(mean.reshape(images.shape[1:]), jnp.float32),
        matrix=_symmetric(vectors, 1 / root),
    )


def _moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and unbiased covariance [d, d] of rows in [0,1] or of uint8 rows / 255, in float64."""
    n, dims = rows.shape
    total = np.zeros(dims)
    square = np.zeros((dims, dims))
    for start in range(0, n, _EXACT_ROWS):
        chunk = rows[start : start + _EXACT_ROWS]
        chunk = chunk.astype(np.float32) - 128 if rows.dtype == np.uint8 else chunk.astype(np.float64) * 255 - 128
        total += chunk.sum(0, dtype=np.float64)
        square += chunk.T @ chunk
    square -= np.outer(total, total / n)
    square /= (n - 1) * 255.0**2
    return (total / n + 128) / 255, square


def _symmetric(vectors: np.ndarray, scale: np.ndarray) -> jax.Array:
    half = vectors * np.sqrt(scale)
    # NumPy multiplies a matrix by its own transpose as a symmetric product: half the work, and exactly symmetric.
    return jnp.asarray(half @ half.T, jnp.float32)


def _floating(images: jax.Array) -> jax.Array:
    # Floating point keeps its precision: gradients are checked in float64.
    return images if jnp.issubdtype(images.dtype, jnp.floating) else pixels.as_float(images)
