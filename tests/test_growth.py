import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from gsdd_jax import Gaussians, codecs, fitting, growth, starts
from gsdd_jax.codecs import Gaussian3DSpec, GaussianSpec, PackedGaussian3DSpec, PackedGaussianSpec
from gsdd_jax.spacetime import Gaussians3D, render_video

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


VIDEO = (5, 6, 7)


def moving(t, y, x, s, duration, v_y, v_x) -> np.ndarray:
    """Returns a Gaussian of the frame and pixel (t, y, x), which moves by (v_y, v_x) pixels per frame."""
    frame, row, column = np.mgrid[tuple(slice(side) for side in VIDEO)]
    away = frame - t
    square = (row - y - v_y * away) ** 2 + (column - x - v_x * away) ** 2
    return np.exp(-square / (2 * s**2) - away**2 / (2 * duration**2))


def moving_pursuit(video: np.ndarray, points: int) -> Iterator[np.ndarray]:
    """Yields what each leaves; its place is that of the best that stands still, and it the best that passes there."""
    scales = np.maximum(np.array([0.2, 0.4, 0.8]) * (np.prod(VIDEO) / points) ** (1 / 3) / np.pi**0.5, 0.5)
    durations = np.maximum(VIDEO[0] * np.array([1 / 16, 1 / 5, 1 / 2]), 0.5)
    speeds = (-1, -0.5, 0, 0.5, 1)
    still = [(*at, s, duration, 0, 0) for at in np.ndindex(VIDEO) for s in np.unique(scales) for duration in durations]
    left = video.astype(np.float64)

    def gain(settings) -> float:
        atom = moving(*settings)
        return (np.einsum("tyx,tyxc->c", atom, left) ** 2).sum() / (atom**2).sum()

    for _ in range(points):
        t, y, x, *_ = max(still, key=gain)
        passing = [
            (t, y, x, s, d, a * s, b * s) for s in np.unique(scales) for d in durations for a in speeds for b in speeds
        ]
        atom = moving(*max(passing, key=gain))
        left = left - atom[..., None] * np.einsum("tyx,tyxc->c", atom, left) / (atom**2).sum()
        yield left


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


def test_what_pursuit_takes_from_a_video_is_what_is_drawn():
    video = np.random.default_rng(5).normal(0, 0.1, (*VIDEO, 2))
    video += moving(2, 2.3, 3.6, 1.1, 1.7, 0.3, -0.9)[..., None] * [0.9, 0.4]
    g = jax.jit(starts.by_pursuit, static_argnums=2)(jax.random.key(0), jnp.asarray(video[None], jnp.float32), 4)
    assert g.size == VIDEO and (g.opacity == 1).all()
    assert (jnp.abs(g.cholesky[0, :, 3:5]).sum(-1) > 0.1).any(), "nothing moves"
    # Sampled at the centers of pixels, as the reference is.
    draw = jax.jit(lambda g, first: render_video(dataclasses.replace(g, opacity=first), supersample=1, cutoff=0.0)[0])
    for count, left in enumerate(moving_pursuit(video, 4), start=1):
        drawn = draw(g, (jnp.arange(4) < count)[None].astype(jnp.float32))
        np.testing.assert_allclose(video - drawn, left, rtol=0, atol=1e-4)


def test_two_gaussians_that_move_are_found():
    lower = jnp.array([[[1.1, 0, 1.1, 3, -0.4, 2.5], [0.8, 0, 0.8, -2, 1.2, 1.5]]])
    mean = jnp.array([[[-0.1, -0.4, 0.1], [0.2, 0.5, -0.3]]])
    color = jnp.array([[[0.8, 0.2], [0.3, 0.7]]])
    video = render_video(
        Gaussians3D(mean, lower - jnp.array([0.5, 0, 0.5, 0, 0, 0.5]), color, jnp.ones((1, 2)), size=(6, 12, 14))
    )
    spec = Gaussian3DSpec(images_per_class=1, num_points=2, dtype="float32")
    codec = codecs.make(spec, image_shape=(6, 12, 14, 2), num_classes=1)
    state = fitting.init_fit(jax.random.key(0), video, codec=codec, steps=200)
    state, psnr = jax.jit(lambda s: fitting.fit_steps(s, video, codec=codec, steps=200, count=200))(state)
    assert psnr > 45


@pytest.mark.parametrize("spec", [Gaussian3DSpec, PackedGaussian3DSpec])
def test_a_fit_of_videos_adds_gaussians_as_one_of_images_does(spec):
    videos, steps = jnp.asarray(np.random.default_rng(1).uniform(0, 1, (2, *VIDEO, 1)), jnp.float32), 48
    codec = codecs.make(
        spec(images_per_class=2, num_points=6, start="growth"),
        image_shape=(*VIDEO, 1),
        num_classes=1,
        bytes_per_class=10_000,
    )
    begin = fitting.init_fit(jax.random.key(0), videos, codec=codec, steps=steps)
    # One more every fourth step.
    state, _ = jax.jit(lambda s: fitting.fit_steps(s, videos, codec=codec, steps=steps, count=8))(begin)
    np.testing.assert_array_equal(state.params.mean[:, 2:], begin.params.mean[:, 2:])
    assert (state.params.mean[:, :2] != begin.params.mean[:, :2]).any((1, 2)).all()
    decode = jax.jit(codec.draft.decode)
    drawn = [decode(begin.params, jnp.float32(step / steps)) for step in range(2, 24, 4)]
    assert (np.diff([float(jnp.mean((each - videos) ** 2)) for each in drawn]) < 0).all()
