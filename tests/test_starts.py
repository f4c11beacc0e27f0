import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from gsdd_jax import Gaussians, render, starts
from gsdd_jax.spacetime import Gaussians3D, render_video
from kernels import DEFAULT_CUTOFF

NAMES = sorted(starts.START)


def natural(n=4, size=(24, 20), channels=3, seed=0) -> jax.Array:
    """Images with smooth shading, a dark rectangle and a bright disc, somewhat like photographs of objects."""
    rng = np.random.default_rng(seed)
    height, width = size
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    images = np.empty((n, height, width, channels))
    for image in images:
        image[:] = 0.5 + 0.3 * np.sin(rng.uniform(1, 4) * x + rng.uniform(1, 4) * y + rng.uniform(0, 6))[..., None]
        left, top = rng.uniform(0.1, 0.5, 2)
        image[(x > left) & (x < left + 0.3) & (y > top) & (y < top + 0.4)] = rng.uniform(0, 0.3, channels)
        center_x, center_y = rng.uniform(0.3, 0.8, 2)
        image[(x - center_x) ** 2 + (y - center_y) ** 2 < 0.03] = rng.uniform(0.7, 1, channels)
    return jnp.asarray(images, jnp.float32)


@functools.partial(jax.jit, static_argnames=("name", "num_points"))
def start(key, images, *, name, num_points):
    return starts.START[name](key, images, num_points)


def psnr(g: Gaussians, images: jax.Array) -> float:
    return float(-10 * jnp.log10(jnp.mean((jax.jit(render)(g) - images) ** 2)))


def assert_sound(g, n, m, size, channels):
    assert (g.size, g.mean.shape, g.cholesky.shape) == (size, (n, m, 2), (n, m, 3))
    assert (g.color.shape, g.opacity.shape) == ((n, m, channels), (n, m))
    for leaf in jax.tree.leaves(g):
        assert leaf.dtype == jnp.float32 and np.all(np.isfinite(leaf))
    assert np.all(np.abs(g.mean) <= 1)


@pytest.mark.parametrize("name", NAMES)
def test_each_start_is_sound_and_determined_by_its_key(name):
    images = natural()
    first, second, other = (start(jax.random.key(k), images, name=name, num_points=9) for k in (0, 0, 1))
    assert_sound(first, 4, 9, (24, 20), 3)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    assert np.array_equal(first.mean, other.mean) == (name == "growth")
    assert len({np.asarray(image).tobytes() for image in first.mean}) == 4, "images share their random numbers"


@pytest.mark.parametrize(
    ("images", "points"),
    [
        pytest.param(jnp.zeros((1, 6, 5, 1)), 1, id="black_and_one_point"),
        pytest.param(natural(2, (3, 2)), 8, id="fewer_pixels_than_points"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_odd_images_have_sound_starts(name, images, points):
    n, height, width, channels = images.shape
    assert_sound(start(jax.random.key(0), images, name=name, num_points=points), n, points, (height, width), channels)


def test_clusters_start_much_closer_to_the_image_than_noise():
    images = natural()
    quality = {name: psnr(start(jax.random.key(0), images, name=name, num_points=9), images) for name in NAMES}
    assert quality["clusters"] > 16
    assert quality["clusters"] > quality["uniform"] + 8
    assert quality["gradient"] > quality["uniform"]


def test_clusters_of_a_solid_image_draw_it():
    images = jnp.full((1, 16, 16, 3), 0.25)
    g = start(jax.random.key(0), images, name="clusters", num_points=6)
    # Seen: 26 dB.
    assert psnr(g, images) > 22


def test_uniform_follows_the_authors():
    g = start(jax.random.key(0), natural(8), name="uniform", num_points=400)
    for leaf, low, high in ((g.mean, -1, 1), (g.cholesky, 0, 1), (g.color, 0, 1)):
        assert low <= np.min(leaf) < low + 0.02 and high - 0.02 < np.max(leaf) <= high
        assert np.mean(leaf) == pytest.approx((low + high) / 2, abs=0.02)
    assert np.all(np.asarray(g.opacity) == 1)


def test_edge_start_lies_on_pixels_with_half_their_color_and_prefers_edges():
    height, width, points = 20, 30, 60
    image = jnp.zeros((1, height, width, 2)).at[:, :, 15:].set(jnp.array([1.0, 0.5]))
    g = start(jax.random.key(0), image, name="gradient", num_points=points)
    column = (np.asarray(g.mean[0, :, 0]) + 1) / 2 * width - 0.5
    row = (np.asarray(g.mean[0, :, 1]) + 1) / 2 * height - 0.5
    np.testing.assert_allclose(column, np.round(column), atol=1e-4)
    np.testing.assert_allclose(row, np.round(row), atol=1e-4)
    place = np.stack([np.round(row), np.round(column)], axis=-1).astype(int)
    assert len(np.unique(place, axis=0)) == points, "the same pixel twice"
    np.testing.assert_allclose(g.color[0], 0.5 * np.asarray(image)[0, place[:, 0], place[:, 1]])
    # One column of 30 holds all the gradient: half of the draws go there while its pixels last, not 1/30 of them.
    assert np.sum(place[:, 1] == 14) >= 15
    assert np.sum(place[:, 1] != 14) >= 15


def bars(frames=6, size=12, speed=1) -> np.ndarray:
    """A black video in which a white bar, three columns wide, moves to the right."""
    video = np.zeros((1, frames, size, size, 1), np.float32)
    for t in range(frames):
        video[0, t, :, speed * t : speed * t + 3] = 1
    return video


def test_the_only_cluster_of_a_video_has_the_covariance_of_its_grid():
    g = start(jax.random.key(0), np.full((2, 4, 6, 10, 3), 0.5, np.float32), name="clusters", num_points=1)
    assert (g.size, g.color.shape, g.opacity.shape) == ((4, 6, 10), (2, 1, 3), (2, 1))
    np.testing.assert_allclose(g.mean, np.zeros((2, 1, 3)), atol=1e-6)
    l11, l22, l_t = (starts.CLUSTER_SPREAD * np.std(np.arange(side)) for side in (10, 6, 4))
    expected = np.array([l11 - 0.5, 0, l22 - 0.5, 0, 0, l_t - 0.5])
    np.testing.assert_allclose(g.cholesky, np.broadcast_to(expected, (2, 1, 6)), atol=1e-5)


def test_growth_of_a_video_moves_with_what_moves_and_black_ones_stay_black():
    video = bars()
    g = start(jax.random.key(1), video, name="growth", num_points=8)
    assert (g.size, g.mean.shape, g.cholesky.shape) == ((6, 12, 12), (1, 8, 3), (1, 8, 6))
    drawn = np.asarray(jax.jit(render_video)(g))
    assert np.mean((drawn - video) ** 2) < 0.3 * np.mean(video**2)
    u_x, u_y, l_t = np.asarray(g.cholesky[0, np.argmax(g.color[0, :, 0])])[3:] + [0, 0, 0.5]
    assert u_x / l_t > 0.2
    black = start(jax.random.key(1), np.zeros_like(video), name="growth", num_points=8)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(black)) and not black.color.any()


def test_clusters_of_a_video_move_with_what_moves_and_draw_it():
    video = bars()
    g = start(jax.random.key(1), video, name="clusters", num_points=8)
    drawn = np.asarray(jax.jit(render_video)(g))
    uniform = np.asarray(jax.jit(render_video)(start(jax.random.key(1), video, name="uniform", num_points=8)))
    assert np.mean((drawn - video) ** 2) < 0.15 * np.mean((uniform - video) ** 2)
    # The brightest goes right with the bar, by a column per frame, and neither up nor down.
    u_x, u_y, l_t = np.asarray(g.cholesky[0, np.argmax(g.color[0, :, 0])])[3:] + [0, 0, 0.5]
    assert u_x / l_t == pytest.approx(1, abs=0.3) and abs(u_y / l_t) < 0.3


def test_least_squares_colors_of_a_video_solve_the_ridge_regression():
    video = bars(3, 7)[0]
    g = start(jax.random.key(3), video[None], name="uniform", num_points=4)
    found = jax.jit(starts.least_squares_colors)(g.mean[0], g.cholesky[0], video)
    each = Gaussians3D(g.mean, g.cholesky, jnp.eye(4)[None], jnp.ones((1, 4)), size=(3, 7, 7))
    design = np.asarray(render_video(each)[0], np.float64).reshape(-1, 4)
    gram = design.T @ design
    expected = np.linalg.solve(gram + 1e-3 * np.trace(gram) / 4 * np.eye(4), design.T @ video.reshape(-1, 1))
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_least_squares_colors_solve_the_ridge_regression():
    image = natural(1, (14, 11))[0]
    g = start(jax.random.key(3), image[None], name="gradient", num_points=8)
    found = jax.jit(starts.least_squares_colors)(g.mean[0], g.cholesky[0], image)
    # Column k of the design matrix is Gaussian k alone, drawn in float64.
    each = Gaussians(g.mean, g.cholesky, np.eye(8)[None], np.ones((1, 8)), size=(14, 11))
    design = oracle.render(each, cutoff=DEFAULT_CUTOFF).images[0].reshape(-1, 8)
    gram = design.T @ design
    ridge = 1e-3 * np.trace(gram) / 8
    target = np.asarray(image, np.float64).reshape(-1, 3)
    expected = np.linalg.solve(gram + ridge * np.eye(8), design.T @ target)
    # The condition number is at most 8 / 1e-3, times the rounding of float32.
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
