"""Whitening against NumPy float64 oracles."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsdd_jax import whiten
from gsdd_jax.data import DataSpec, load


def _images(n: int = 300, shape: tuple[int, ...] = (4, 5, 3), seed: int = 0) -> np.ndarray:
    """Correlated uint8 images whose sums are far from round numbers."""
    random = np.random.default_rng(seed)
    base = random.normal(size=(n, 1, 1, 1)) * 40 + random.normal(size=(n, *shape)) * 25 + 120
    return np.clip(np.round(base), 0, 255).astype(np.uint8)


def _oracle_zca(images: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """kornia's formula in float64, by SVD of the covariance, straight from the [0,1] pixels."""
    x = images.reshape(len(images), -1).astype(np.float64) / 255
    mean = x.mean(0)
    covariance = (x - mean).T @ (x - mean) / (len(x) - 1)
    u, s, _ = np.linalg.svd(covariance)
    return mean, u @ np.diag((s + eps) ** -0.5) @ u.T


def _unit(images: np.ndarray) -> jax.Array:
    return jnp.asarray(images, jnp.float32) / 255


# Sizes on both sides of the chunk of 1,024 rows in which the covariance is summed.
@pytest.mark.parametrize("n", [2, 2500])
def test_zca_matches_the_float64_formula(n: int) -> None:
    images = _images(n)
    mean, matrix = _oracle_zca(images, 0.1)
    zca = whiten.fit("zca", images)
    np.testing.assert_allclose(zca.mean.reshape(-1), mean, atol=1e-7)
    np.testing.assert_allclose(zca.matrix, matrix, atol=1e-6)
    expected = (images.reshape(n, -1) / 255 - mean) @ matrix
    np.testing.assert_allclose(zca(_unit(images)).reshape(n, -1), expected, atol=2e-6)


def test_zca_covariance_is_exact_for_extreme_pixels() -> None:
    # Sums of the largest products (128 squared), some odd: a chunk of more than 1,024 rows would round them to float32.
    images = np.zeros((5001, 1, 2, 1), np.uint8)
    images[::3, 0, 1] = 255
    x = images.reshape(5001, 2).astype(np.float64)
    _, covariance = whiten._moments(images.reshape(5001, 2))
    np.testing.assert_allclose(covariance, np.cov(x, rowvar=False) / 255**2, rtol=1e-13, atol=1e-15)


def test_meanstd_pools_over_images_and_pixels_in_chunks() -> None:
    images = _images(2500)
    x = images / 255.0
    fitted = whiten.fit("meanstd", images)
    np.testing.assert_allclose(fitted.mean, x.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(fitted.std, x.std((0, 1, 2)), rtol=1e-6)
    z = np.float64(fitted(_unit(images)))
    np.testing.assert_allclose(z.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(z.std((0, 1, 2)), 1, rtol=1e-5)


@pytest.mark.parametrize("kind", ["zca", "meanstd"])
def test_any_leading_shape_is_taken(kind: whiten.Kind) -> None:
    fitted = whiten.fit(kind, _images())
    x = _unit(_images(6))
    flat = fitted(x)
    np.testing.assert_allclose(fitted(x.reshape(2, 3, 4, 5, 3)), flat.reshape(2, 3, 4, 5, 3), atol=1e-6)
    np.testing.assert_allclose(fitted(x[0]), flat[0], atol=1e-6)
    np.testing.assert_allclose(jax.vmap(fitted)(x), flat, atol=1e-6)


def test_none_is_the_identity() -> None:
    x = _unit(_images())
    np.testing.assert_array_equal(whiten.fit("none", _images())(x), x)
    assert not jax.tree.leaves(whiten.fit("none", _images()))


def test_whitening_is_an_argument_of_jit_and_not_a_constant() -> None:
    traces = []

    @jax.jit
    def run(whitening: whiten.Whitening, images: jax.Array) -> jax.Array:
        traces.append(1)
        return whitening(images)

    x = _unit(_images())
    first, second = whiten.fit("zca", _images(seed=1)), whiten.fit("zca", _images(seed=2))
    np.testing.assert_allclose(run(first, x), first(x), atol=1e-6)
    np.testing.assert_allclose(run(second, x), second(x), atol=1e-6)
    assert len(traces) == 1
    assert np.abs(run(first, x) - run(second, x)).max() > 1e-3


def test_published_constants_apply_by_hand() -> None:
    cifar = whiten.MEAN_STD["cifar10"]
    fitted = whiten.meanstd_of(cifar.mean, cifar.std)
    image = jnp.full((1, 2, 2, 3), 0.5)
    np.testing.assert_allclose(fitted(image)[0, 0, 0], [0.0086 / 0.2023, 0.0178 / 0.1994, 0.0535 / 0.2010], rtol=1e-4)
    for entry in whiten.MEAN_STD.values():
        assert len(entry.mean) == len(entry.std) in (1, 3)
        assert entry.source
        whiten.meanstd_of(entry.mean, entry.std)


@pytest.mark.parametrize("kind", ["zca", "none"])
def test_images_in_floating_point_give_the_whitening_of_the_same_in_bytes(kind: whiten.Kind) -> None:
    images = _images(1500)
    fitted, same = whiten.fit(kind, images / 255), whiten.fit(kind, images)
    for ours, theirs in zip(jax.tree.leaves(fitted), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
    np.testing.assert_array_equal(same(images), same(_unit(images)))
    assert jax.eval_shape(lambda: same) == whiten.eval_shape(kind, images.shape[1:])


@pytest.mark.parametrize("form", [np.uint8, np.float32])
def test_constant_channel_is_centered_and_divided_by_one(form: type) -> None:
    images = _images()
    images[..., 1] = 77
    # A single gray level in one pixel of a channel is no signal, either.
    images[..., 2] = 20
    images[0, 0, 0, 2] = 21
    fitted = whiten.fit("meanstd", images if form is np.uint8 else (images / 255).astype(form))
    np.testing.assert_allclose(fitted.std, [(images[..., 0] / 255).std(), 1, 1], rtol=1e-6)
    z = np.asarray(fitted(_unit(images)))
    np.testing.assert_allclose(z[..., 1], 0, atol=1e-6)
    np.testing.assert_allclose(z[..., 0].std(), 1, rtol=1e-5)


def test_faintest_signal_is_not_taken_for_a_constant() -> None:
    # Half of the pixels one gray level brighter: std 1/510, above that of rounding.
    images = (np.arange(4 * 8 * 8) % 2).astype(np.uint8).reshape(4, 8, 8, 1)
    np.testing.assert_allclose(whiten.fit("meanstd", images).std, [1 / 510], rtol=1e-6)


GRAY = np.zeros((4, 4, 4, 1), np.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: whiten.fit("pca", GRAY), ValueError, "whiten: unknown kind 'pca'; allowed: zca, meanstd, none"),
        (lambda: whiten.fit("meanstd", GRAY[:1]), ValueError, "images: a whitening needs at least 2 of them, found 1"),
        (
            lambda: whiten.fit("meanstd", GRAY[0]),
            ValueError,
            r"images: found uint8 of shape \[4, 4, 1\]; expected \[n, h, w, c\]",
        ),
        (
            lambda: whiten.fit("zca", np.zeros((2, 128, 128, 3), np.uint8)),
            ValueError,
            r"128x128x3 images needs two 49152 x 49152 matrices \(19 GB\).*use meanstd",
        ),
        (lambda: whiten.fit("zca", GRAY, eps=0), ValueError, "eps must be > 0, found 0"),
        (lambda: whiten.meanstd_of((0.1, 0.2), (0.1,)), ValueError, "one value per channel, found 2 and 1"),
        (lambda: whiten.meanstd_of((0.1,), (0.0,)), ValueError, "std must be positive"),
        (lambda: whiten.Identity()(jnp.zeros((1, 4, 5, 3), jnp.int32)), TypeError, "images: .*found int32"),
        (lambda: whiten.meanstd_of((0.1,), (0.1,))(jnp.zeros((1, 4, 5, 3))), ValueError, "1 channels? last, found"),
        (
            lambda: whiten.fit("zca", _images())(jnp.zeros((1, 5, 4, 3))),
            ValueError,
            r"\[..., 4, 5, 3\], found \[1, 5, 4, 3\]",
        ),
    ],
)
def test_what_cannot_be_whitened_is_refused(call: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.slow
def test_zca_of_cifar10_has_the_known_spectrum(data_root) -> None:
    if not (data_root / "cifar10_jpeg").is_dir():
        pytest.skip("no cifar10_jpeg in the real data")
    images = load(DataSpec(source="tfds", path=str(data_root / "cifar10_jpeg" / "1.0.0"))).train_images
    zca = whiten.fit("zca", images)
    s = np.linalg.eigvalsh(np.float64(zca.matrix)) ** -2.0 - 0.1
    # Measured once with an independent float32 SVD on the same images.
    np.testing.assert_allclose(s[:5], [55.1, 21.4, 12.7, 6.97, 6.83], rtol=5e-3)
    assert s.sum() == pytest.approx(188.7, rel=1e-3)
    x = _unit(images[:1000])
    z = zca(x)
    assert float(z.std()) == pytest.approx(0.255, abs=0.005)
