import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsdd_jax import codecs, data, fitting
from gsdd_jax.codecs import GaussianSpec, PixelSpec

STEPS, POINTS = 40, 12


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load(data.DataSpec(per_class=5, test_limit=10))


@pytest.fixture(scope="module")
def targets(digits) -> jax.Array:
    chosen = fitting.select_images(jax.random.key(0), digits.train_labels, 1, how="first", num_classes=10)
    return jnp.asarray(digits.train_images[chosen[:4]], jnp.float32) / 255


@pytest.fixture(scope="module")
def codec() -> codecs.Codec:
    spec = GaussianSpec(images_per_class=2, num_points=POINTS)
    return codecs.make(spec, image_shape=(8, 8, 1), num_classes=2, bytes_per_class=2 * POINTS * 7 * 2)


@pytest.fixture(scope="module")
def start(codec, targets) -> fitting.FitState:
    return jax.jit(lambda x: fitting.init_fit(jax.random.key(1), x, codec=codec, steps=STEPS))(targets)


@pytest.fixture(scope="module")
def advance(codec):
    """``(state, targets, count) -> (state, psnr)``, compiled once."""
    return jax.jit(lambda state, x, count: fitting.fit_steps(state, x, codec=codec, steps=STEPS, count=count))


@pytest.fixture(scope="module")
def fitted(advance, start, targets) -> fitting.FitState:
    return advance(start, targets, STEPS)[0]


def errors(codec, params, targets) -> np.ndarray:
    return np.mean((np.asarray(jax.jit(codec.decode)(params)) - np.asarray(targets)) ** 2, axis=(1, 2, 3))


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_fit_of_digits_reaches_a_floor(codec, fitted, targets):
    # Measured: 24.5, 30.1, 23.9 and 24.0 dB (CPU).
    psnr = np.asarray(fitting.psnr(jax.jit(codec.decode)(fitted.params), targets))
    assert psnr.mean() > 24.5 and psnr.min() > 22
    assert np.abs(fitted.params.mean).max() <= np.float32(1 - 1e-3)


def test_images_are_fitted_as_if_each_were_alone(codec, advance, start, fitted, targets):
    for i in (0, 3):
        # The other places hold something else altogether.
        others = jnp.roll(targets, 1, axis=0).at[i].set(targets[i])
        params = jax.tree.map(lambda x, i=i: jnp.roll(x, 2, axis=0).at[i].set(x[i]), start.params)
        state = start._replace(params=params)
        alone, _ = advance(state, others, STEPS)
        for a, b in zip(jax.tree.leaves(alone.params), jax.tree.leaves(fitted.params), strict=True):
            np.testing.assert_allclose(a[i], b[i], rtol=0, atol=1e-5)
        assert np.abs(alone.params.color[1] - fitted.params.color[1]).max() > 0.01


def test_fit_in_parts_equals_fit_in_one_go_bit_for_bit(advance, start, fitted, targets):
    state = start
    for count in (15, 1, STEPS - 16):
        state, _ = advance(state, targets, count)
        # As through a checkpoint: only arrays survive.
        state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state)
    assert bits(state) == bits(fitted)
    assert state.step == STEPS
    assert advance._cache_size() == 1


def test_reported_psnr_is_that_before_the_last_step(codec, advance, start, fitted, targets):
    state, _ = advance(start, targets, STEPS - 1)
    _, reported = advance(state, targets, 1)
    expected = np.mean(-10 * np.log10(errors(codec, state.params, targets)))
    assert reported == pytest.approx(expected, abs=1e-3)
    _, reported = advance(start, targets, STEPS)
    assert reported == pytest.approx(expected, abs=1e-3)


def test_pixels_fit_in_no_steps(digits):
    codec = codecs.make(PixelSpec(), image_shape=(8, 8, 1), num_classes=2, bytes_per_class=256)
    targets = jnp.asarray(digits.train_images[:2], jnp.float32) / 255
    state = fitting.init_fit(jax.random.key(0), targets, codec=codec, steps=3)
    state, psnr = jax.jit(lambda s: fitting.fit_steps(s, targets, codec=codec, steps=3, count=3))(state)
    np.testing.assert_array_equal(state.params["images"], targets)
    assert psnr == pytest.approx(120)


def test_psnr_by_hand():
    targets = np.zeros((3, 2, 2, 1), np.float32)
    images = targets.copy()
    images[0] = 0.1  # mse 0.01
    images[1, 0, 0] = 2  # mse 1: nothing is clamped
    np.testing.assert_allclose(fitting.psnr(images, targets), [20, 0, 120], rtol=1e-5, atol=1e-5)


def test_solid_targets_are_copies_of_the_mean_color():
    images = np.random.default_rng(0).integers(0, 256, (50, 4, 5, 3), np.uint8)
    solid = np.asarray(fitting.solid_targets(images, 7))
    assert solid.shape == (7, 4, 5, 3) and solid.dtype == np.float32
    np.testing.assert_allclose(
        solid, np.broadcast_to(images.astype(np.float64).mean((0, 1, 2)) / 255, solid.shape), rtol=1e-6
    )


# Choice of the images

LABELS = np.array([2, 0, 1, 1, 0, 2, 0, 1, 0, 2, 2, 1, 0], np.int32)


def blobs() -> np.ndarray:
    """Two clusters of features in every class: images of even rank near (0, 0), of odd rank near (9, 9)."""
    rank = np.array([np.sum(LABELS[:i] == LABELS[i]) for i in range(len(LABELS))])
    return np.random.default_rng(1).normal(0, 0.1, (len(LABELS), 2)) + 9 * (rank % 2)[:, None]


def select(how, per_class=2, seed=0, **options) -> np.ndarray:
    options = {"features": blobs()} | options if how == "kmeans" else options
    return fitting.select_images(jax.random.key(seed), LABELS, per_class, how=how, num_classes=3, **options)


@pytest.mark.parametrize(("how", "per_class"), [("random", 4), ("first", 1), ("kmeans", 2)])
def test_selection_is_class_major_distinct_and_repeatable(how, per_class):
    chosen = select(how, per_class)
    assert chosen.shape == (3 * per_class,)
    np.testing.assert_array_equal(LABELS[chosen], np.repeat([0, 1, 2], per_class))
    assert len(set(chosen.tolist())) == len(chosen)
    np.testing.assert_array_equal(chosen, select(how, per_class))


def test_first_takes_the_first_of_each_class():
    assert select("first").tolist() == [1, 4, 2, 3, 0, 5]


def test_random_depends_on_the_key_and_reaches_every_image():
    draws = [select("random", seed=seed) for seed in range(30)]
    assert len({tuple(draw.tolist()) for draw in draws}) > 10
    assert set(np.concatenate(draws).tolist()) == set(range(len(LABELS)))


def test_kmeans_takes_one_image_of_every_cluster():
    chosen, features = select("kmeans"), blobs()
    sides = features[chosen].mean(1).reshape(3, 2) > 4.5
    assert (sides.sum(1) == 1).all()
    # The image nearest to the mean of its cluster.
    for label, pair in enumerate(chosen.reshape(3, 2)):
        own = np.flatnonzero(label == LABELS)
        for index in pair:
            cluster = own[(features[own].mean(1) > 4.5) == (features[index].mean() > 4.5)]
            distance = np.linalg.norm(features[cluster] - features[cluster].mean(0), axis=1)
            assert distance[cluster == index] <= distance.min() + 1e-9


@pytest.mark.parametrize(
    ("how", "options", "message"),
    [
        ("first", {"per_class": 5}, "per_class: 5 images per class are to be fitted, class 1 has 4 training ones"),
        ("kmeans", {"features": None}, "fit.select: kmeans needs features, found none"),
        ("best", {}, "fit.select: expected one of random, first, kmeans; found 'best'"),
    ],
)
def test_selection_that_cannot_be_made_is_refused(how, options, message):
    with pytest.raises(ValueError, match=message):
        select(how, **options)
