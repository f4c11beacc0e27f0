import doctest
import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import scenes

from gsdd_jax import Gaussians, render
from gsdd_jax.gaussians import MAX_PIXELS, to_pixels
from kernels import DEFAULT_CUTOFF, splat

LEAVES = ("mean", "cholesky", "color", "opacity")
# Share of the larger of 1 and the oracle's largest value.
VALUE_TOLERANCE = 1e-5
# Share of the largest entry of the same leaf in the same image: entries of one leaf have one unit, and an entry that is
# small by cancellation over the pixels cannot be known better than its terms.
GRADIENT_TOLERANCE = 1e-4
# float64 against float64 of another formula; needles lose three digits.
FLOAT64_TOLERANCE = 1e-11

SETTINGS = ("size", "supersample", "cutoff")

# Compiled as one, which is faster than the same operations one by one.
draw = jax.jit(render, static_argnames=SETTINGS)


def weights(g, size=None, seed=0) -> np.ndarray:
    n, c = g.mean.shape[0], g.color.shape[-1]
    return np.random.default_rng(seed).normal(size=(n, *(size or g.size), c)).astype(np.float32)


def draw_in_the_precision_of_the_leaves(g, size=None, **settings):
    height, width = size or g.size
    return splat(*to_pixels(g, size), height=height, width=width, **settings)


@functools.partial(jax.jit, static_argnames=(*SETTINGS, "draw"))
def value_and_gradient(g, v, *, size=None, supersample=2, cutoff=DEFAULT_CUTOFF, draw=render):
    images, vjp = jax.vjp(lambda g: draw(g, size, supersample=supersample, cutoff=cutoff), g)
    return images, vjp(v)[0]


def assert_matches_oracle(
    g, settings, value_tolerance=VALUE_TOLERANCE, gradient_tolerance=GRADIENT_TOLERANCE, both=value_and_gradient
):
    v = weights(g, settings.get("size")).astype(g.mean.dtype)
    images, gradient = jax.tree.map(np.asarray, both(g, v, **settings))
    expected = oracle.render(g, v=v, **settings)
    scale = max(1.0, np.abs(expected.images).max())
    # Pixels without a sample at the edge of the cutoff have no slack; those with one may miss that sample, or have it.
    assert np.all(np.abs(images - expected.images) <= value_tolerance * scale + expected.images_slack)
    for leaf in LEAVES:
        found, wanted, slack = getattr(gradient, leaf), expected.gradient[leaf], expected.gradient_slack[leaf]
        per_image = (len(wanted), -1)
        scale = np.abs(wanted.reshape(per_image)).max(1)
        assert np.all(scale > 0), f"{leaf}: the gradient is zero, so this scene tests nothing"
        error = np.maximum(np.abs(found - wanted) - slack, 0).reshape(per_image).max(1)
        assert np.all(error <= gradient_tolerance * scale), f"{leaf}: off by {np.max(error / scale):.1e}"


def perturbed(g, leaf, position, value) -> Gaussians:
    changed = getattr(g, leaf).at[position].set(value)
    return Gaussians(*(changed if name == leaf else getattr(g, name) for name in LEAVES), size=g.size)


def test_oracle_equals_the_definition_written_as_loops():
    g = scenes.random(n=1, m=2, size=(3, 4), channels=2)
    height, width, s = 2, 3, 2
    mean, raw, color, opacity = (np.asarray(x[0], np.float64) for x in (g.mean, g.cholesky, g.color, g.opacity))
    expected = np.zeros((height, width, 2))
    for row in range(height):
        for column in range(width):
            for sample in range(s * s):
                point = np.array([column + (sample % s + 0.5) / s, row + (sample // s + 0.5) / s])
                for k in range(2):
                    center = 0.5 * np.array([width, height]) * (mean[k] + 1)
                    lower = np.array([[raw[k, 0] + 0.5, 0], [raw[k, 1], raw[k, 2] + 0.5]])
                    lower = lower * np.array([[width / 4], [height / 3]])
                    covariance = lower @ lower.T + np.diag([1 / 12, 1 / 12])
                    q = (point - center) @ np.linalg.inv(covariance) @ (point - center)
                    expected[row, column] += opacity[k] * math.exp(-q / 2) * color[k] / s**2
    found = oracle.render(g, (height, width), supersample=s).images[0]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_oracle_gradient_equals_real_finite_differences():
    g = scenes.random(n=1, m=2, size=(6, 5), channels=2)
    v = weights(g)
    gradient = oracle.render(g, v=v).gradient
    leaves = {leaf: np.asarray(getattr(g, leaf), np.float64) for leaf in LEAVES}

    class Moved:
        size = g.size

    def loss(leaf, index, step):
        moved = Moved()
        for name, value in leaves.items():
            value = value.copy()
            if name == leaf:
                value[index] += step
            setattr(moved, name, value)
        return np.sum(oracle.render(moved).images * v)

    for leaf in LEAVES:
        for index in np.ndindex(leaves[leaf].shape):
            slope = (loss(leaf, index, 1e-5) - loss(leaf, index, -1e-5)) / 2e-5
            assert slope == pytest.approx(gradient[leaf][index], rel=1e-6, abs=1e-7)


@pytest.fixture(scope="module")
def for_users(default_code):
    """Values and gradients in the code that users get."""
    return jax.jit(value_and_gradient.__wrapped__, static_argnames=SETTINGS, compiler_options=default_code)


@pytest.mark.parametrize("name", scenes.HOSTILE)
def test_hostile_scenes_match_the_oracle(name, for_users):
    assert_matches_oracle(scenes.HOSTILE[name](), {"cutoff": DEFAULT_CUTOFF}, both=for_users)


@pytest.mark.parametrize("name", scenes.shaped())
def test_other_shapes_sizes_and_supersampling_match_the_oracle(name):
    g, settings = scenes.shaped()[name]
    assert_matches_oracle(g, {"cutoff": DEFAULT_CUTOFF} | settings)


def test_float64_matches_the_oracle_to_its_precision():
    # At this precision a wrong formula cannot hide behind rounding, not even in the needles.
    both = functools.partial(value_and_gradient, draw=draw_in_the_precision_of_the_leaves)
    with jax.enable_x64(True):
        for build in scenes.HOSTILE.values():
            g = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), build())
            settings = {"cutoff": 0.0, "supersample": 3}
            assert_matches_oracle(g, settings, FLOAT64_TOLERANCE, FLOAT64_TOLERANCE, both)


def test_images_are_float32_whatever_the_leaves_are():
    single = scenes.random(n=1, m=2, size=(5, 4))
    double, half = (jax.tree.map(lambda x, to=to: np.asarray(x).astype(to), single) for to in ("f8", jnp.bfloat16))
    with jax.enable_x64(True):
        assert jax.eval_shape(render, double).dtype == jax.eval_shape(render, half).dtype == jnp.float32
        assert jax.eval_shape(jax.grad(lambda g: jnp.sum(render(g))), double).mean.dtype == jnp.float64


def test_exactly_the_contributions_below_the_cutoff_are_dropped():
    cutoff = 0.3
    # One white Gaussian and one sample per pixel: a pixel is the contribution.
    g = scenes.gaussians([[[0.1, -0.2]]], scenes.ellipses([[2.0]], 0.5, 0.4), [[[1.0]]], [[1.0]], (40, 33))
    cut = np.asarray(draw(g, supersample=1, cutoff=cutoff))
    whole = oracle.render(g, supersample=1).images
    clear = np.abs(whole / cutoff - 1) > oracle.AMBIGUOUS
    assert np.array_equal((cut > 0)[clear], (whole >= cutoff)[clear])
    assert np.any((whole < cutoff) & (whole > 0)) and np.all(cut[cut > 0] >= cutoff)
    np.testing.assert_allclose(cut[clear & (whole >= cutoff)], whole[clear & (whole >= cutoff)], atol=VALUE_TOLERANCE)


@pytest.mark.parametrize("leaf", LEAVES)
def test_nan_fills_its_own_image_and_no_other(leaf):
    g = scenes.random()
    v = weights(g)
    clean_images, clean = value_and_gradient(g, v)
    position = (1, 2) if leaf == "opacity" else (1, 2, 0)
    images, gradient = value_and_gradient(perturbed(g, leaf, position, jnp.nan), v)
    assert np.all(np.isnan(images[1]))
    assert np.array_equal(images[0], clean_images[0])
    for name in LEAVES:
        assert np.all(np.isnan(getattr(gradient, name)[1])), name
        assert np.array_equal(getattr(gradient, name)[0], getattr(clean, name)[0]), name


@pytest.mark.parametrize("cutoff", [0.0, DEFAULT_CUTOFF])
@pytest.mark.parametrize("leaf", ["mean", "cholesky"])
def test_huge_and_tiny_geometry_gives_finite_values_and_gradients(leaf, cutoff):
    g = scenes.random()
    v = weights(g)
    sizes = (1e20, 1e30, 3e38, np.inf, 1e7, 1e-20, 1e-30, 1e-42, 0.0)
    for size in sizes:
        for value in (size, -size):
            # Every entry alone, then all at once.
            moved = np.array(getattr(g, leaf))
            last = moved.shape[-1]
            for j in range(last):
                moved[0, j, j] = value
            moved[1, :3] = value
            bad = Gaussians(*(jnp.asarray(moved) if name == leaf else getattr(g, name) for name in LEAVES), size=g.size)
            images, gradient = value_and_gradient(bad, v, cutoff=cutoff)
            assert np.all(np.isfinite(images)), value
            for name in LEAVES:
                assert np.all(np.isfinite(getattr(gradient, name))), (name, value)


@pytest.mark.parametrize("weight", [1e20, -1e30])
def test_huge_weights_give_finite_values_and_gradients(weight):
    g = perturbed(scenes.random(), "color", (0, 3), weight)
    images, gradient = value_and_gradient(g, weights(g), cutoff=DEFAULT_CUTOFF)
    assert np.all(np.isfinite(images))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))


def test_infinitely_wide_is_constant_and_infinitely_far_is_absent():
    wide = scenes.gaussians([[[0.3, 0.0]]], [[[1e30, 0.0, -1e30]]], [[[0.5, 2.0]]], [[-3.0]], (9, 13))
    np.testing.assert_allclose(draw(wide), np.broadcast_to([-1.5, -6.0], (1, 9, 13, 2)), rtol=1e-6)
    for far in ((1e30, 0.0), (0.0, -np.inf)):
        g = scenes.gaussians([[far]], [[[2.0, 0.0, 2.0]]], [[[1.0, 1.0]]], [[1.0]], (9, 13))
        assert not np.any(draw(g))
    assert MAX_PIXELS >= 1e4


def test_second_call_and_equal_settings_do_not_trace_again():
    traces = []

    @jax.jit
    def drawn(g):
        traces.append(None)
        return render(g, (8, 9), cutoff=0.01)

    for seed in range(2):
        drawn(scenes.random(n=2, m=5, size=(6, 7), seed=seed))
    assert len(traces) == 1


def test_getitem_selects_images():
    g = jax.tree.map(np.asarray, scenes.random(n=3, m=4))
    assert (g.num_images, g.num_points) == (3, 4)
    part = g[np.array([2, 0])]
    assert (part.num_images, part.num_points, part.size) == (2, 4, g.size)
    for name in LEAVES:
        np.testing.assert_array_equal(getattr(part, name), getattr(g, name)[[2, 0]])


@pytest.mark.parametrize(
    ("leaf", "shape", "message"),
    [
        ("mean", (2, 5, 3), r"mean: expected shape \[2, 5, 2\] for \[n, m\] = \[2, 5\], found \[2, 5, 3\]"),
        ("mean", (5, 2), r"mean: expected shape .*found \[5, 2\]"),
        ("color", (2, 4, 3), r"color: expected shape \[2, 5, 3\].*found \[2, 4, 3\]"),
        ("opacity", (2, 5, 1), r"opacity: expected shape \[2, 5\].*found \[2, 5, 1\]"),
    ],
)
def test_a_leaf_of_the_wrong_shape_is_named(leaf, shape, message):
    g = scenes.random(n=2, m=5)
    leaves = {name: getattr(g, name) for name in LEAVES} | {leaf: jnp.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        render(Gaussians(**leaves, size=g.size))


@pytest.mark.parametrize("size", [(np.int64(8), np.int32(6)), np.array([8, 6]), [8, 6]])
def test_a_size_may_be_of_any_kind_of_integer(size):
    assert jax.eval_shape(lambda g: render(g, size), scenes.random(n=1, m=2)).shape == (1, 8, 6, 3)


@pytest.mark.parametrize("size", [(8,), (8, 0), (8, 9.0), (True, 8)])
def test_a_bad_size_is_named(size):
    g = scenes.random(n=1, m=2)
    with pytest.raises(ValueError, match=r"^size: expected \(height, width\), two integers >= 1; found \("):
        render(g, size)
    native = Gaussians(g.mean, g.cholesky, g.color, g.opacity, size=size)
    with pytest.raises(ValueError, match=r"size of the Gaussians: expected \(height, width\), two integers >= 1"):
        render(native)


# `gsdd_jax.render` the function hides the module of the same name.
@pytest.mark.parametrize("module", ["gsdd_jax.render", "gsdd_jax.synset"])
def test_examples_of_the_docstrings_run(module):
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0 and result.failed == 0
