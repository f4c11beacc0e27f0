import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsdd_jax import whiten
from gsdd_jax.augment import DsaSpec, dsa
from gsdd_jax.match import distribution_loss
from gsdd_jax.nets import NetSpec, build

CLASSES, SHAPE = 3, (8, 8, 2)
NETWORK = build(NetSpec(depth=2, width=6), SHAPE, CLASSES)
NONE = DsaSpec(strategy="none")
# All operations but flip, whose draw may do nothing.
ACTIVE = DsaSpec(strategy="color_crop_cutout_scale_rotate")
MEAN, STD = np.array([0.4, 0.6], np.float32), np.array([0.2, 0.3], np.float32)


def pictures(seed, *shape) -> np.ndarray:
    """uint8 images with structure, so that shifts and rotations matter."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (*shape, 4, 4, 2))
    return np.round(coarse.repeat(2, -3).repeat(2, -2)).astype(np.uint8)


REAL = pictures(0, CLASSES, 7)
SYN = pictures(1, CLASSES, 4).astype(np.float32) / 255


def jitted(augment=NONE, class_chunk=1):
    def loss(key, real, syn, constants=(MEAN, STD)):
        return distribution_loss(
            key,
            real,
            syn,
            network=NETWORK,
            augment=augment,
            whitening=whiten.MeanStd(*constants),
            class_chunk=class_chunk,
        )

    return jax.jit(jax.value_and_grad(loss, argnums=2))


@pytest.fixture(scope="module")
def plain():
    return jitted()


@pytest.fixture(scope="module")
def augmented():
    return jitted(ACTIVE)


@pytest.fixture(scope="module")
def weights():
    """Weights of the random network of a key."""
    init = jax.jit(NETWORK.init)
    return lambda key: init(jax.random.split(key)[0])


@pytest.fixture(scope="module")
def features():
    """``(weights, images) -> [n, f]`` float64."""
    apply = jax.jit(lambda params, x: NETWORK.apply(params, x)[1])
    return lambda params, x: np.asarray(apply(params, jnp.asarray(x, jnp.float32)), np.float64)


def restated(per_class_real, per_class_syn, embed) -> float:
    """The loss as the paper writes it, class by class, image by image, in float64."""
    total = 0.0
    for real, syn in zip(per_class_real, per_class_syn, strict=True):
        mean_real = sum(embed(x[None])[0] for x in real) / len(real)
        mean_syn = sum(embed(x[None])[0] for x in syn) / len(syn)
        total += np.sum((mean_real - mean_syn) ** 2)
    return total


def test_loss_is_the_squared_distance_of_mean_embeddings(plain, weights, features):
    for seed in (0, 5):
        key = jax.random.key(seed)
        value, _ = plain(key, REAL, SYN)
        params = weights(key)
        expected = restated(
            (REAL.astype(np.float64) / 255 - MEAN) / STD, (SYN - MEAN) / STD, lambda x, p=params: features(p, x)
        )
        assert value == pytest.approx(expected, rel=1e-4)


def test_loss_with_dsa_augments_real_and_syn_of_a_class_alike(augmented, weights, features):
    operate = jax.jit(lambda key, x: dsa(key, x, ACTIVE, siamese=True))
    for seed in range(4):
        key = jax.random.key(seed)
        keys = jax.random.split(jax.random.split(key)[1], CLASSES)
        real = [operate(k, jnp.asarray((x / np.float32(255) - MEAN) / STD)) for k, x in zip(keys, REAL, strict=True)]
        syn = [operate(k, jnp.asarray((x - MEAN) / STD)) for k, x in zip(keys, SYN, strict=True)]
        params = weights(key)
        expected = restated(np.asarray(real), np.asarray(syn), lambda x, p=params: features(p, x))
        value, _ = augmented(key, REAL, SYN)
        assert value == pytest.approx(expected, rel=1e-4)


def test_class_chunk_changes_neither_value_nor_gradient(augmented):
    # 2 does not divide 3 classes: the padding must not count.
    chunked = jitted(ACTIVE, class_chunk=2)
    for seed in range(2):
        value, grad = augmented(jax.random.key(seed), REAL, SYN)
        again, regrad = chunked(jax.random.key(seed), REAL, SYN)
        assert again == pytest.approx(float(value), rel=1e-5)
        np.testing.assert_allclose(regrad, grad, rtol=0, atol=1e-5 * np.abs(grad).max())
