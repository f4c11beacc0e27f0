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


NORMAL = whiten.MeanStd(MEAN, STD)


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


@pytest.mark.parametrize("seed", range(6))
def test_loss_is_zero_where_syn_equals_real(augmented, seed):
    value, grad = augmented(jax.random.key(seed), REAL, REAL.astype(np.float32) / 255)
    typical, _ = augmented(jax.random.key(seed), REAL, SYN[:, [0, 1, 2, 3, 0, 1, 2]])
    assert 0 <= value < 1e-9 * typical
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("seed", range(6))
def test_one_draw_of_dsa_serves_batches_of_different_size(augmented, seed):
    # Each real image once, twice as syn: equal means if and only if both batches were augmented alike.
    twice = np.concatenate([REAL[:, :2], REAL[:, :2]], axis=1).astype(np.float32) / 255
    real = REAL[:, :2][:, [0, 1, 0, 1, 0, 1, 0]]  # the same shape as elsewhere, unequal counts
    balanced, _ = augmented(jax.random.key(seed), np.repeat(REAL[:, :1], 7, axis=1), np.repeat(twice[:, :1], 4, axis=1))
    typical, _ = augmented(jax.random.key(seed), real, SYN)
    assert 0 <= balanced < 1e-9 * typical


def test_classes_draw_their_augmentations_apart(augmented, plain):
    real, syn = np.repeat(REAL[:1], CLASSES, axis=0), np.repeat(SYN[:1], CLASSES, axis=0)
    differ = 0
    for seed in range(4):
        _, grad = augmented(jax.random.key(seed), real, syn)
        differ += not np.allclose(grad[0], grad[1], rtol=1e-3, atol=0)
    assert differ >= 3
    # Without augmentation equal classes are equal.
    _, grad = plain(jax.random.key(0), real, syn)
    np.testing.assert_allclose(grad[0], grad[1], rtol=1e-5, atol=1e-7)


def test_each_key_draws_another_network(plain):
    values = {float(plain(jax.random.key(seed), REAL, SYN)[0]) for seed in range(4)}
    assert len(values) == 4
    assert float(plain(jax.random.key(0), REAL, SYN)[0]) in values


@pytest.mark.parametrize("seed", range(3))
def test_gradient_agrees_with_finite_differences(augmented, seed):
    key = jax.random.key(seed)
    _, grad = augmented(key, REAL, SYN)
    grad = np.asarray(grad, np.float64)
    assert np.abs(grad).max() > 0
    rng = np.random.default_rng(seed)
    random = rng.normal(size=SYN.shape)
    for direction in (grad, grad + random * np.linalg.norm(grad) / np.linalg.norm(random)):
        direction = direction / np.linalg.norm(direction)
        h = 3e-3
        above, below = (augmented(key, REAL, np.float32(SYN + s * h * direction))[0] for s in (1, -1))
        slope = (float(above) - float(below)) / (2 * h)
        # float32 losses of about 10 leave 1e-3 of slopes of about 1; ReLU kinks the rest.
        assert slope == pytest.approx(np.sum(grad * direction), rel=0.02)


def test_gradient_reaches_every_syn_image(plain):
    _, grad = plain(jax.random.key(0), REAL, SYN)
    assert np.isfinite(grad).all()
    assert (np.abs(grad).max((2, 3, 4)) > 0).all()


def test_class_chunk_changes_neither_value_nor_gradient(augmented):
    # 2 does not divide 3 classes: the padding must not count.
    chunked = jitted(ACTIVE, class_chunk=2)
    for seed in range(2):
        value, grad = augmented(jax.random.key(seed), REAL, SYN)
        again, regrad = chunked(jax.random.key(seed), REAL, SYN)
        assert again == pytest.approx(float(value), rel=1e-5)
        np.testing.assert_allclose(regrad, grad, rtol=0, atol=1e-5 * np.abs(grad).max())


def test_chunk_of_more_classes_than_there_are_takes_them_all(plain):
    value, grad = plain(jax.random.key(0), REAL, SYN)
    again, regrad = jitted(class_chunk=50)(jax.random.key(0), REAL, SYN)
    assert again == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_allclose(regrad, grad, rtol=0, atol=1e-5 * np.abs(grad).max())


def test_real_images_get_no_gradient():
    def loss(real, syn):
        return distribution_loss(
            jax.random.key(0),
            real,
            syn,
            network=NETWORK,
            augment=NONE,
            whitening=NORMAL,
            class_chunk=2,
        )

    grad_real, grad_syn = jax.jit(jax.grad(loss, argnums=(0, 1)))(REAL.astype(np.float32), SYN)
    assert np.asarray(grad_syn).any() and not np.asarray(grad_real).any()


def test_vmap_over_keys_equals_a_loop(plain):
    keys = jax.random.split(jax.random.key(9), 2)
    inside, grad_inside = jax.jit(jax.vmap(plain, in_axes=(0, None, None)))(keys, REAL, SYN)

    def total(syn):
        return jax.vmap(lambda key: plain(key, REAL, syn)[0])(keys).sum()

    outside, grad_outside = jax.jit(jax.value_and_grad(total))(jnp.asarray(SYN))
    values, grads = zip(*(plain(key, REAL, SYN) for key in keys), strict=True)
    np.testing.assert_allclose(inside, values, rtol=1e-5)
    np.testing.assert_allclose(outside, sum(values), rtol=1e-5)
    scale = np.abs(grads).max()
    np.testing.assert_allclose(grad_inside, grads, rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(grad_outside, sum(grads), rtol=0, atol=1e-5 * scale)
