import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from gsdd_jax import Gaussians, codecs, fitting, growth, starts
from gsdd_jax.codecs import GaussianSpec, PackedGaussianSpec

SIZE = (7, 9)


def pictures(n: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(4).uniform(0, 1, (n, *SIZE, 3)).cumsum(2) / 5, jnp.float32)


def matching_pursuit(image: np.ndarray, count: int, points: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns row, column and scale, and color, of each atom, and what is left; every product anew, in float64."""
    h, w, _ = image.shape
    y, x = np.mgrid[:h, :w]
    scales = np.maximum(np.array([0.2, 0.4, 0.8, 1.6, 3.2]) * np.sqrt(h * w / np.pi / points), 0.5)
    atoms = {
        (i, j, s): np.exp(-((y - i) ** 2 + (x - j) ** 2) / (2 * s**2))
        for i in range(h)
        for j in range(w)
        for s in scales
    }
    left, places, colors = image.astype(np.float64), [], []
    for _ in range(count):
        gains = {k: ((atom[..., None] * left).sum((0, 1)) ** 2).sum() / (atom**2).sum() for k, atom in atoms.items()}
        places.append(max(gains, key=gains.__getitem__))
        atom = atoms[places[-1]]
        colors.append((atom[..., None] * left).sum((0, 1)) / (atom**2).sum())
        left = left - atom[..., None] * colors[-1]
    return np.array(places), np.array(colors), left


def test_start_is_matching_pursuit():
    images = pictures()
    g = jax.jit(starts.by_pursuit, static_argnums=2)(jax.random.key(0), images, 6)
    for image, mean, cholesky, color in zip(images, g.mean, g.cholesky, g.color, strict=True):
        places, colors, left = matching_pursuit(np.asarray(image), 6)
        # Rows, columns and standard deviations of what is drawn, the prefilter included.
        np.testing.assert_allclose((mean[:, 1] + 1) / 2 * SIZE[0] - 0.5, places[:, 0], rtol=0, atol=1e-4)
        np.testing.assert_allclose((mean[:, 0] + 1) / 2 * SIZE[1] - 0.5, places[:, 1], rtol=0, atol=1e-4)
        for spread in (cholesky[:, 0], cholesky[:, 2]):
            np.testing.assert_allclose(np.sqrt((spread + 0.5) ** 2 + 1 / 12), places[:, 2], rtol=1e-5)
        np.testing.assert_allclose(color, colors, rtol=0, atol=1e-4)
        drawn = oracle.render(
            Gaussians(mean[None], cholesky[None], color[None], np.ones((1, 6)), size=SIZE), supersample=1
        )
        np.testing.assert_allclose(image - drawn.images[0], left, rtol=0, atol=2e-3)
    assert (g.opacity == 1).all()


def test_only_what_is_asked_for_is_placed_and_it_goes_on():
    images = pictures()
    whole = starts.by_pursuit(jax.random.key(0), images, 6)
    marked = jax.tree.map(lambda leaf: jnp.full_like(leaf, 7), whole)
    half = growth.pursue(marked, images, 0, 3)
    assert (half.mean[:, 3:] == 7).all() and (half.color[:, 3:] == 7).all()
    np.testing.assert_array_equal(half.mean[:, :3], whole.mean[:, :3])
    left = jnp.stack([matching_pursuit(np.asarray(image), 6)[2] for image in images])
    assert float(jnp.sum(left**2)) < 0.2 * float(jnp.sum(images**2))
    doubled = growth.pursue(marked, images, 0, 3, encode=lambda color: 2 * color)
    np.testing.assert_array_equal(doubled.color[:, :3], 2 * half.color[:, :3])


def test_number_of_gaussians_over_a_fit_by_hand():
    found = [int(growth.number(jnp.float32(done), 48)) for done in (0, 0.02, 0.021, 0.25, 0.479, 0.48, 0.5, 1)]
    assert found == [2, 2, 4, 26, 46, 48, 48, 48]
    assert [int(growth.number(jnp.float32(done), 5)) for done in (0, 0.1, 0.2, 0.49)] == [1, 2, 3, 5]
    assert int(growth.number(jnp.float32(0), 5, 0.0)) == 5
    # Never more than there are, whatever 22 / 24 is rounded to.
    assert [int(growth.number(jnp.float32(lot / 48), 22)) for lot in range(25)][-3:] == [22, 22, 22]


@pytest.mark.parametrize(
    "spec",
    [
        GaussianSpec(images_per_class=2, num_points=6, dtype="float32"),
        PackedGaussianSpec(images_per_class=2, num_points=6, bits_chroma=6),
    ],
    ids=["gaussian", "packed"],
)
def test_a_fit_draws_few_at_first_and_adds_others_where_the_error_is_then(spec):
    images, steps = pictures(), 48
    codec = codecs.make(spec, image_shape=(*SIZE, 3), num_classes=1, bytes_per_class=10_000)
    advance = jax.jit(lambda s, x, n: fitting.fit_steps(s, x, codec=codec, steps=steps, count=n))
    begin = fitting.init_fit(jax.random.key(0), images, codec=codec, steps=steps)
    # One more Gaussian every fourth step: the first two are drawn by now, and the others as they began.
    state, _ = advance(begin, images, 8)
    np.testing.assert_array_equal(state.params.mean[:, 2:], begin.params.mean[:, 2:])
    assert (state.params.mean[:, :2] != begin.params.mean[:, :2]).all()
    before, now, after = (jnp.float32(step / steps) for step in (7, 8, 9))
    grow = jax.jit(codec.draft.grow)
    grown = grow(state.params, images, now, before)
    assert jax.tree.all(jax.tree.map(np.array_equal, grow(grown, images, after, now), grown))
    left = np.asarray(images - codec.draft.decode(state.params, before))
    for i in range(2):
        places, colors, _ = matching_pursuit(left[i], 1, points=6)
        row, column = (grown.mean[i, 2, ::-1] + 1) / 2 * np.array(SIZE) - 0.5
        np.testing.assert_allclose([row, column], places[0, :2], rtol=0, atol=1e-4)
        drawn = codec.draft.decode(grown, now)[i] - codec.draft.decode(state.params, before)[i]
        at = tuple(int(x) for x in places[0, :2])
        # The atom is 1 at its center; what is drawn is its mean over samples of the pixel.
        np.testing.assert_allclose(drawn[at], colors[0], rtol=0.15, atol=1e-3)
    np.testing.assert_array_equal(grown.mean[:, 3:], begin.params.mean[:, 3:])
    # All are drawn, and rounded, from half of the steps on.
    half = codec.draft.decode(begin.params, jnp.float32(0.5))
    np.testing.assert_array_equal(half, codec.decode(begin.params))
