"""Gaussians in space and time against the 3D formula, written out in float64."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scenes

from gsdd_jax import render, spacetime
from gsdd_jax.spacetime import Gaussians3D, render_video, to_frames
from kernels import splat

LEAVES = ("mean", "cholesky", "color", "opacity")
SIZE = (4, 7, 9)  # frames, height, width
STEP = 1e-20

draw = jax.jit(render_video, static_argnames=("size", "supersample", "cutoff"))


def build(mean, lower, color, opacity, size=SIZE) -> Gaussians3D:
    """Builds Gaussians from entries of L itself."""
    raw = np.asarray(lower) - np.array([0.5, 0, 0.5, 0, 0, 0.5])
    return Gaussians3D(*(jnp.asarray(x, jnp.float32) for x in (mean, raw, color, opacity)), size=size)


def random(n=2, m=4, size=SIZE, channels=3, seed=0) -> Gaussians3D:
    rng = np.random.default_rng(seed)
    return build(
        rng.uniform(-1, 1, (n, m, 3)),
        rng.uniform(-1, 1, (n, m, 6)) * [3, 2, 3, 2, 2, 2],
        rng.uniform(-0.5, 1, (n, m, channels)),
        rng.uniform(0.5, 1.5, (n, m)),
        size,
    )


def needles() -> Gaussians3D:
    """Thin in space, long in time and fast, and the other way round."""
    lower = [[5, 5, 0.1, 6, -5, 8], [0.05, 0, 0.02, 4, 3, 1], [6, 0.2, 4, 0.1, 0, 0.05], [0, 0, 0, 8, 8, 0]]
    return build(
        [[[0.1, -0.2, 0.3], [0.4, 0.1, -0.3], [-0.3, 0.4, 0.1], [0.0, 0.1, -0.2]]],
        [lower],
        [[[1.0, -0.5], [0.7, 0.3], [0.2, 0.9], [0.5, 0.5]]],
        [[1.0, 0.8, -0.5, 0.7]],
    )


def expected(g, size=None, supersample=2, v=None):
    """Returns videos and the gradient of ``sum(v * videos)``: exp(-d^T C^-1 d / 2) with C of (x, y, t), at samples.

    C has the box filters of a pixel and a frame on its diagonal. Derivatives have an imaginary step, see oracle.py.
    """
    frames, height, width = size or g.size
    grow = np.array([width, height, frames])
    s = supersample
    axes = [np.arange(frames) + 0.5, *((np.arange(length * s) + 0.5) / s for length in (height, width))]
    points = np.stack(np.meshgrid(*axes, indexing="ij")[::-1], axis=-1)

    def weight(mean, raw):
        l11, l21, l22, u_x, u_y, l_t = raw + np.array([0.5, 0, 0.5, 0, 0, 0.5])
        # Rows x, y, t; columns as in the order t, x, y.
        lower = np.array([[u_x, l11, 0], [u_y, l21, l22], [l_t, 0, 0]])
        lower = lower * (grow / np.array(g.size)[[2, 1, 0]])[:, None]
        inverse = np.linalg.inv(lower @ lower.T + np.eye(3) / 12)
        offset = points - grow * (mean + 1) / 2
        samples = np.exp(-np.einsum("...i,ij,...j->...", offset, inverse, offset) / 2)
        return samples.reshape(frames, height, s, width, s).mean((2, 4))

    mean, raw, color, opacity = (np.asarray(getattr(g, name), np.float64) for name in LEAVES)
    videos = np.zeros((len(mean), frames, height, width, color.shape[-1]))
    gradient = {name: np.zeros(getattr(g, name).shape) for name in LEAVES}
    v = np.ones(videos.shape) if v is None else np.asarray(v, np.float64)
    for i, k in np.ndindex(mean.shape[:2]):
        drawn = weight(mean[i, k], raw[i, k])
        videos[i] += opacity[i, k] * drawn[..., None] * color[i, k]
        per_color = np.einsum("thw,thwc->c", drawn, v[i])
        gradient["color"][i, k], gradient["opacity"][i, k] = per_color * opacity[i, k], per_color @ color[i, k]
        v_weight = opacity[i, k] * v[i] @ color[i, k]
        for name, count in (("mean", 3), ("cholesky", 6)):
            for j in range(count):
                own = {"mean": mean[i, k].astype(complex), "cholesky": raw[i, k].astype(complex)}
                own[name][j] += 1j * STEP
                gradient[name][i, k, j] = np.sum(v_weight * weight(own["mean"], own["cholesky"]).imag / STEP)
    return videos, gradient


def assert_as_expected(g, tolerance, gradient_tolerance, draw, **settings):
    frames, height, width = settings.get("size") or g.size
    v = np.random.default_rng(0).normal(size=(len(g.mean), frames, height, width, g.color.shape[-1]))
    found, pull = jax.vjp(functools.partial(draw, cutoff=0.0, **settings), g)
    (slope,) = pull(jnp.asarray(v, found.dtype))
    videos, gradient = expected(g, v=v, **settings)
    np.testing.assert_allclose(found, videos, rtol=0, atol=tolerance * max(1, np.abs(videos).max()))
    for name in LEAVES:
        scale = np.abs(gradient[name]).max()
        assert scale > 1e-3, name
        np.testing.assert_allclose(
            getattr(slope, name), gradient[name], rtol=0, atol=gradient_tolerance * scale, err_msg=name
        )


@pytest.mark.parametrize(
    ("scene", "settings"),
    [
        (random, {}),
        (needles, {}),
        (functools.partial(random, seed=1), {"size": (7, 5, 12), "supersample": 3}),
        (functools.partial(random, seed=2, n=1, channels=1), {"size": (1, 14, 3), "supersample": 1}),
    ],
)
def test_videos_and_gradients_are_those_of_the_3d_formula(scene, settings):
    assert_as_expected(scene(), 1e-5, 1e-4, draw, **settings)


def test_float64_has_the_formula_to_its_precision():
    @functools.partial(jax.jit, static_argnames=("size", "supersample", "cutoff"))
    def in_float64(g, size=None, **settings):
        frames, height, width = size or g.size
        images = splat(*to_frames(g, size), height=height, width=width, **settings)
        return images.reshape(-1, frames, *images.shape[1:])

    with jax.enable_x64(True):
        for scene in (random(), needles()):
            g = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), scene)
            assert_as_expected(g, 1e-11, 1e-11, in_float64, size=(6, 9, 8))


@pytest.mark.parametrize("size", [(5, 24, 37), (3, 40, 11)])
def test_what_neither_moves_nor_fades_is_the_image_of_2d_gaussians_in_every_frame_bit_by_bit(size):
    flat = scenes.HOSTILE["negative_lower"]()
    still = np.zeros((*flat.mean.shape[:2], 1), np.float32)
    g = Gaussians3D(
        jnp.concatenate([flat.mean, still + 0.3], -1),
        jnp.concatenate([flat.cholesky, still, still, still + 1e7], -1),
        flat.color,
        flat.opacity,
        size=(4, *flat.size),
    )
    # Operation by operation: within a larger program XLA rounds even the 2D conics otherwise.
    found, image = np.asarray(render_video(g, size)), np.asarray(render(flat, size[1:]))
    assert found.shape == (2, *size, 3)
    assert all(found[:, frame].tobytes() == image.tobytes() for frame in range(size[0]))


def test_a_gaussian_moves_along_its_line_and_fades():
    # One frame and one pixel per unit: velocity u / l_t = (2, -1) pixels per frame, but for the box of a frame.
    g = build([[[0.0, 0.0, 0.0]]], [[[1.0, 0, 1.0, 200.0, -100.0, 100.0]]], [[[1.0]]], [[1.0]], (5, 31, 33))
    centers = to_frames(g).centers[:, 0]
    np.testing.assert_allclose(centers, [[16.5 + 2 * d, 15.5 - d] for d in range(-2, 3)], rtol=1e-4)
    short = build([[[0.0, 0.0, 0.2]]], [[[1.0, 0, 1.0, 0, 0, 0.5]]], [[[1.0]]], [[1.0]], (5, 31, 33))
    np.testing.assert_allclose(
        to_frames(short).colors[:, 0, 0], np.exp(-0.5 * (np.arange(5) - 2.5) ** 2 / (0.25 + 1 / 12)), rtol=1e-5
    )


@pytest.mark.parametrize(("leaf", "last"), [("mean", 2), ("cholesky", 0), ("cholesky", 3), ("cholesky", 5)])
def test_nan_stays_within_its_video(leaf, last):
    g = random()
    broken = {name: getattr(g, name) for name in LEAVES}
    broken[leaf] = broken[leaf].at[1, 2, last].set(jnp.nan)
    both = jax.jit(jax.value_and_grad(lambda g: (jnp.sum(jnp.square(v := render_video(g))), v), has_aux=True))
    (_, clean), clean_slope = both(g)
    (_, found), slope = both(Gaussians3D(**broken, size=g.size))
    assert np.isnan(found[1]).all() and np.array_equal(found[0], clean[0])
    for name in LEAVES:
        assert np.array_equal(getattr(slope, name)[0], getattr(clean_slope, name)[0]), name


@pytest.mark.parametrize("leaf", ["mean", "cholesky"])
def test_huge_and_tiny_geometry_gives_finite_values_and_gradients(leaf):
    g = random()
    both = jax.jit(jax.value_and_grad(lambda g: (jnp.sum(v := render_video(g)), v), has_aux=True))
    for value in (1e7, 1e20, 3e38, np.inf, 1e-20, 1e-42, 0.0):
        for signed in (value, -value):
            moved = np.array(getattr(g, leaf))
            for j in range(moved.shape[-1]):
                moved[0, j % 4, j] = signed
            moved[1, :2] = signed
            leaves = {name: getattr(g, name) for name in LEAVES} | {leaf: jnp.asarray(moved)}
            (_, found), slope = both(Gaussians3D(**leaves, size=g.size))
            assert np.isfinite(found).all(), signed
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope)), signed


def test_what_is_wrong_is_named():
    g = random(n=1)
    leaves = {name: getattr(g, name) for name in LEAVES}
    with pytest.raises(ValueError, match=r"^cholesky: expected shape \[1, 4, 6\] for .*, found \[1, 4, 3\]"):
        render_video(Gaussians3D(**leaves | {"cholesky": g.cholesky[..., :3]}, size=SIZE))
    with pytest.raises(ValueError, match=r"^size: expected \(frames, height, width\), three integers >= 1; found \(8"):
        render_video(g, (8, 8))
    with pytest.raises(ValueError, match=r"^size of the Gaussians: expected \(frames, height, width\)"):
        render_video(Gaussians3D(**leaves, size=(4, 0, 9)))


def test_selection_takes_whole_videos_and_examples_run():
    g = random(n=3)[np.array([2, 0])]
    assert g.size == SIZE and bytes(np.asarray(g.mean)) == bytes(np.asarray(random(n=3).mean)[[2, 0]])
    result = doctest.testmod(spacetime)
    assert result.attempted > 0 and result.failed == 0
