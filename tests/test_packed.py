"""What is special to packed Gaussians; test_codecs.py and test_synset.py hold them to the common contract."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import gsdd_jax
from gsdd_jax import SynSet, codecs, fitting, packed_codes, rans, storage
from gsdd_jax.codecs import PackedGaussian3DSpec, PackedGaussianSpec, packed
from gsdd_jax.codecs.packed import PackedGaussians
from gsdd_jax.gaussians import Gaussians, to_pixels
from gsdd_jax.spacetime import Gaussians3D, to_frames

SIZE, CLASSES, BUDGET = (6, 8), 2, 2000


def make(spec, **changes) -> codecs.Codec:
    settings = {"image_shape": (*SIZE, 3), "num_classes": CLASSES, "bytes_per_class": BUDGET} | changes
    return codecs.make(spec, **settings)


def random_gaussians(n=4, m=5, c=3, seed=0) -> Gaussians:
    rng = np.random.default_rng(seed)
    return Gaussians(
        jnp.asarray(rng.uniform(-0.99, 0.99, (n, m, 2)), jnp.float32),
        jnp.asarray(rng.uniform(-2, 2, (n, m, 3)), jnp.float32),
        jnp.asarray(rng.uniform(-0.5, 1, (n, m, c)), jnp.float32),
        jnp.asarray(rng.uniform(0.5, 1.5, (n, m)), jnp.float32),
        size=SIZE,
    )


def random_params(spec, **settings) -> PackedGaussians:
    """Masters off their grids, some beyond the ends, and ranges that are no bfloat16 numbers."""
    params = packed.from_gaussians(random_gaussians(**settings), spec)
    return dataclasses.replace(params, low=0.873 * params.low, step=0.871 * params.step)


def bits(x) -> bytes:
    return np.asarray(x).tobytes()


def tree_bits(tree) -> list[bytes]:
    return [bits(leaf) for leaf in jax.tree.leaves(tree)]


def bfloat16(x) -> np.ndarray:
    return np.asarray(x).astype(jnp.bfloat16).astype(np.float64)


# The quantizer

on_grid = jax.jit(storage.on_grid, static_argnums=3)


def grid_arguments(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2, 3, (4, 7, 3)).astype(np.float32)
    return x, np.float32([-1.0, -0.5, 0.25]), np.float32([0.0625, 0.109375, 0.25])


@pytest.mark.parametrize("width", [2, 11])
def test_grid_values_are_the_nearest_in_float64(width):
    x, low, step = grid_arguments()
    grid = low.astype(np.float64)[:, None] + np.arange(2**width) * step.astype(np.float64)[:, None]
    nearest = np.abs(x.astype(np.float64)[..., None] - grid).argmin(-1)
    np.testing.assert_array_equal(storage.grid_codes(x, low, step, width), nearest)
    expected = np.take_along_axis(np.broadcast_to(grid, (*x.shape, 2**width)), nearest[..., None], -1)[..., 0]
    np.testing.assert_array_equal(on_grid(x, low, step, width), expected.astype(np.float32))


@pytest.mark.parametrize("width", [8, 16])
def test_grid_values_are_exact_to_one_rounding_and_find_their_codes_again(width):
    rng = np.random.default_rng(1)
    low = bfloat16(np.float32(rng.uniform(-20, 20, 50))).astype(np.float32)
    finest = packed.FINEST_STEP * np.maximum(1, np.abs(low))
    # From the finest grid that the codec allows to a coarse one.
    step = np.float32(bfloat16(finest * np.float32(2.0 ** rng.uniform(0, 14, 50))))
    step[:5] = finest[:5]
    codes = np.concatenate([[0, 1, 2**width - 1], rng.integers(0, 2**width, 200)]).astype(np.float32)[:, None]
    exact = (low.astype(np.float64) + codes.astype(np.float64) * step).astype(np.float32)
    np.testing.assert_array_equal(on_grid(exact, low, step, width), exact)
    np.testing.assert_array_equal(storage.grid_codes(exact, low, step, width), np.broadcast_to(codes, exact.shape))


def test_gradient_is_straight_through_inside_and_lsq_at_the_ends():
    width = 4
    x, low, step = grid_arguments()
    v = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
    _, pull = jax.vjp(lambda *a: storage.on_grid(*a, width), x, low, step)
    v_x, v_low, v_step = jax.jit(pull)(v)
    # Esser et al. 2020, Eq. 3, with the offset as in LSQ+ and ends half a step further out.
    place, top = (x.astype(np.float64) - low) / step, 15
    below, above = place < -0.5, place > top + 0.5
    inside = ~below & ~above
    assert below.any() and above.any() and inside.any()
    d_step = np.where(below, 0, np.where(above, top, np.round(place) - place))
    scale = 1 / math.sqrt(x.size / 3 * top)
    np.testing.assert_array_equal(v_x, np.where(inside, v, 0))
    np.testing.assert_allclose(v_low, scale * (v * ~inside).sum((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(v_step, scale * (v * d_step).sum((0, 1)), rtol=1e-4)


@pytest.mark.parametrize("hostile", [np.inf, -3e38])
def test_values_beyond_all_bounds_take_the_end_of_the_grid(hostile):
    low, step = np.float32([-1.0]), np.float32([0.125])
    end = -1 + 0.125 * 15 if hostile > 0 else -1
    assert on_grid(jnp.full((1, 1), hostile), low, step, 4) == end


# The Gaussians that are drawn


@pytest.mark.parametrize(("order", "widths"), [("sorted", (8, 6, 6)), ("kept", (5, 2, 16))])
def test_decode_draws_the_values_on_the_grids(order, widths):
    names = ("bits_mean", "bits_cholesky", "bits_color")
    spec = PackedGaussianSpec(
        images_per_class=2, num_points=5, order=order, cutoff=0.0, **dict(zip(names, widths, strict=True))
    )
    codec, params = make(spec), random_params(spec)
    low, step = bfloat16(params.low), bfloat16(params.step)
    # The centers of 2^b equal cells of [-1, 1].
    cell = 2.0 ** (1 - widths[0])
    mean = (np.floor(np.asarray(params.mean, np.float64) / cell) + 0.5) * cell

    def nearest(x, low, step, width):
        return low + np.clip(np.round((np.asarray(x, np.float64) - low) / step), 0, 2**width - 1) * step

    cholesky = nearest(params.cholesky, low[:3], step[:3], widths[1])
    color = nearest(params.color, low[3:], step[3:], widths[2])
    drawn = codec.gaussians(params)
    assert (np.asarray(drawn.opacity) == 1).all()
    for i in range(4):
        rank = np.lexsort([mean[i, :, 0], mean[i, :, 1]]) if order == "sorted" else np.arange(5)
        np.testing.assert_array_equal(drawn.mean[i], mean[i, rank])
        np.testing.assert_allclose(drawn.cholesky[i], cholesky[i, rank], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(drawn.color[i], color[i, rank], rtol=1e-6, atol=1e-6)
    reference = Gaussians(mean, cholesky, color, np.ones((4, 5)), size=SIZE)
    np.testing.assert_allclose(codec.decode(params), oracle.render(reference).images, rtol=0, atol=1e-5)


def test_fit_begins_unrounded_and_the_grids_follow_until_the_switch():
    spec = PackedGaussianSpec(images_per_class=2, num_points=5, draft=0.4, cutoff=0.0)
    codec, params = make(spec), random_params(spec)
    draw, project = codec.draft.decode, codec.draft.project
    before, after = jnp.float32(0.39), jnp.float32(0.4)
    unrounded = Gaussians(params.mean, params.cholesky, params.color, np.ones((4, 5)), size=SIZE)
    np.testing.assert_allclose(draw(params, before), oracle.render(unrounded).images, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(draw(params, after), codec.decode(params))
    assert np.abs(draw(params, before) - codec.decode(params)).max() > 1e-3
    assert tree_bits(project(params, after)) == tree_bits(codec.project(params))
    assert bits(project(params, after).step) == bits(params.step) != bits(project(params, before).step)
    # All but the outermost 0.3 % of the numbers, here none of 20, lie within half a step of the grid.
    followed = project(params, before)
    low, step = np.asarray(followed.low)[:3], np.asarray(followed.step)[:3]
    place = (np.asarray(followed.cholesky).reshape(-1, 3) - low) / step
    assert place.min() > -0.5 and place.max() < 2**spec.bits_cholesky - 0.5
    # The grids have no say in what is drawn, and get no gradient.
    slope = jax.jit(jax.grad(lambda p: jnp.sum(draw(p, before) ** 2)))(params)
    assert (slope.step == 0).all() and (slope.low == 0).all() and np.abs(slope.cholesky).min() > 0


def test_what_is_trained_is_what_the_file_shows_bit_by_bit(tmp_path):
    spec = PackedGaussianSpec(images_per_class=2, num_points=7)
    codec = make(spec)
    images = jnp.asarray(np.random.default_rng(3).uniform(0, 1, (4, *SIZE, 3)), jnp.float32)
    state = jax.jit(lambda x: fitting.init_fit(jax.random.key(0), x, codec=codec, steps=30))(images)
    started = state.params
    state, _ = jax.jit(lambda s, x: fitting.fit_steps(s, x, codec=codec, steps=30, count=30))(state, images)
    params = state.params
    assert (params.step != started.step).all()
    # The training step draws inside a larger program.
    trained = jax.jit(jax.value_and_grad(lambda p: (jnp.sum(codec.decode(p) ** 2), codec.decode(p)), has_aux=True))
    written = SynSet(codec, params, BUDGET, ("a", "b"))
    written.save(tmp_path)
    read = gsdd_jax.load(tmp_path)
    assert bits(trained(params)[0][1]) == bits(trained(read.params)[0][1])
    assert bits(written.images()) == bits(read.images())
    assert bits(written.images((9, 11))) == bits(read.images((9, 11)))
    for draw in (codec.gaussians, jax.jit(codec.gaussians)):
        assert tree_bits(draw(params)) == tree_bits(draw(read.params)) == tree_bits(codec.gaussians(params))


def test_images_of_a_sorted_set_do_not_depend_on_the_order_of_the_masters():
    spec = PackedGaussianSpec(images_per_class=2, num_points=40)
    codec, params = make(spec, bytes_per_class=10**6), random_params(spec, m=40)
    rank = np.random.default_rng(4).permutation(40)
    leaves = ("mean", "cholesky", "color")
    mixed = dataclasses.replace(params, **{name: getattr(params, name)[:, rank] for name in leaves})
    decode = jax.jit(codec.decode)
    assert bits(decode(params)) == bits(decode(mixed))
    assert tree_bits(codec.quantize(params)) == tree_bits(codec.quantize(mixed))
    # The gradients go back to the masters that they belong to.
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(codec.decode(p) ** 2)))
    grads, grads_mixed = gradient(params), gradient(mixed)
    for name in leaves:
        np.testing.assert_allclose(getattr(grads, name)[:, rank], getattr(grads_mixed, name), rtol=1e-4, atol=1e-5)


def test_gradient_passes_straight_through_to_the_masters():
    spec = PackedGaussianSpec(images_per_class=2, num_points=5, cutoff=0.0)
    codec = make(spec)
    params = packed.from_gaussians(random_gaussians(), spec)
    weights = np.random.default_rng(5).normal(size=(4, *SIZE, 3))
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.asarray(weights, jnp.float32) * codec.decode(p))))(params)
    expected = oracle.render(codec.gaussians(params), v=weights).gradient
    for i in range(4):
        x, y = (np.floor((np.asarray(params.mean)[i, :, j] + 1) * 128) for j in (0, 1))
        rank = np.lexsort([x, y])
        for name in ("mean", "cholesky", "color"):
            want = expected[name][i]
            np.testing.assert_allclose(getattr(grads, name)[i, rank], want, atol=2e-4 * np.abs(want).max(), rtol=0)


def test_projection_fits_fitted_ranges_to_the_masters_and_leaves_learned_ones():
    spec = PackedGaussianSpec(images_per_class=2, num_points=5)
    params = packed.from_gaussians(random_gaussians(), spec)
    moved = dataclasses.replace(params, color=2 * params.color, cholesky=0.5 * params.cholesky)
    learned = make(spec).project(moved)
    assert tree_bits((learned.low, learned.step)) == tree_bits((params.low, params.step))
    fitted = make(dataclasses.replace(spec, ranges="fitted")).project(moved)
    assert (fitted.step[3:] > params.step[3:]).all() and (fitted.step[:2] < params.step[:2]).all()


def test_folding_and_canonical_signs_keep_the_image():
    g = random_gaussians()
    assert ((np.asarray(g.cholesky)[..., [0, 2]] + 0.5) < 0).any()
    params = packed.from_gaussians(g, PackedGaussianSpec(images_per_class=2, num_points=5))
    assert ((np.asarray(params.cholesky)[..., [0, 2]] + 0.5) >= 0).all()
    plain = Gaussians(params.mean, params.cholesky, params.color, jnp.ones((4, 5)), size=SIZE)
    for before, after in zip(to_pixels(g), to_pixels(plain), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_canonical_signs_are_a_projection_that_keeps_the_bits_of_what_is_canonical():
    raw = jnp.asarray(np.random.default_rng(7).uniform(-3, 3, (50, 3)), jnp.float32)
    once = packed.canonical(raw)
    assert bits(packed.canonical(once)) == bits(once)
    kept = (np.asarray(raw)[:, [0, 2]] >= -0.5).all(1)
    assert kept.any() and bits(np.asarray(raw)[kept]) == bits(np.asarray(once)[kept])
    lower = np.asarray(raw, np.float64) + [0.5, 0, 0.5]
    found = np.asarray(once, np.float64) + [0.5, 0, 0.5]

    def covariance(x):
        return np.stack([x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2 + x[:, 2] ** 2], axis=-1)

    np.testing.assert_allclose(covariance(found), covariance(lower), rtol=1e-5, atol=1e-5)


def test_canonical_signs_in_space_and_time_keep_the_video():
    rng = np.random.default_rng(8)
    mean, raw = rng.uniform(-0.9, 0.9, (2, 5, 3)), rng.uniform(-2, 2, (2, 5, 6))
    leaves = [jnp.asarray(x, jnp.float32) for x in (mean, raw, rng.uniform(-0.5, 1, (2, 5, 3)), np.ones((2, 5)))]
    g = Gaussians3D(*leaves, size=(4, *SIZE))
    signed = packed.canonical(g.cholesky)
    assert (np.asarray(raw)[..., [0, 2, 5]] < -0.5).any((0, 1)).all()
    assert (np.asarray(signed)[..., [0, 2, 5]] >= -0.5).all()
    assert bits(packed.canonical(signed)) == bits(signed)
    for before, after in zip(to_frames(g), to_frames(dataclasses.replace(g, cholesky=signed)), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


def test_projection_clips_positions_and_makes_signs_canonical():
    spec = PackedGaussianSpec(images_per_class=2, num_points=5)
    params = random_params(spec)
    far = dataclasses.replace(params, mean=3 * params.mean, cholesky=params.cholesky - 2)
    projected = make(spec).project(far)
    assert np.abs(projected.mean).max() == np.float32(1 - 1e-3)
    assert bits(projected.cholesky) == bits(packed.canonical(far.cholesky))
    assert tree_bits((projected.color, projected.low, projected.step)) == tree_bits((far.color, far.low, far.step))


def test_ranges_learn_at_their_own_rate_and_steps_at_that_over_their_number():
    spec = PackedGaussianSpec(
        images_per_class=2, num_points=5, lr=0.01, lr_cholesky=2.0, lr_color=0.5, lr_ranges=0.1, bits_color=4
    )
    params = random_params(spec)
    gradients = jax.tree.map(jnp.ones_like, params)
    transformation = make(spec).optimizer()
    # Adam's first step on a gradient of one is its rate.
    updates, _ = transformation.update(gradients, transformation.init(params), params)
    for name, rate in {"mean": 0.01, "cholesky": 0.02, "color": 0.005}.items():
        np.testing.assert_allclose(getattr(updates, name), -rate, rtol=1e-5)
    np.testing.assert_allclose(updates.low, -np.array([0.002] * 3 + [0.0005] * 3), rtol=1e-5)
    np.testing.assert_allclose(updates.step, -np.array([0.002 / 63] * 3 + [0.0005 / 15] * 3), rtol=1e-5)
    for still in ({"ranges": "fitted"}, {"lr_ranges": 0.0}):
        transformation = make(dataclasses.replace(spec, **still)).optimizer()
        updates, _ = transformation.update(gradients, transformation.init(params), params)
        assert not np.asarray(updates.low).any() and not np.asarray(updates.step).any()


# Hostile sets


def test_nan_masters_spoil_their_image_alone_and_get_code_zero():
    spec = PackedGaussianSpec(images_per_class=2, num_points=5, ranges="fitted")
    codec, params = make(spec), random_params(spec)
    for name in ("mean", "cholesky", "color"):
        leaf = getattr(params, name)
        bad = codec.project(dataclasses.replace(params, **{name: leaf.at[1, 2, 0].set(jnp.nan)}))
        assert np.isfinite(bad.low).all() and np.isfinite(bad.step).all()
        finite = np.isfinite(codec.decode(bad)).all((1, 2, 3))
        assert finite.tolist() == [True, False, True, True]
        assert (np.asarray(codec.quantize(bad)[name][1]) == 0).any()
        codec.pack(codec.quantize(bad))


@pytest.mark.parametrize(("value", "width"), [(0.0, 2), (1000.1, 16)])
def test_range_of_zero_width_draws_the_one_value(value, width):
    spec = PackedGaussianSpec(images_per_class=2, num_points=5, bits_cholesky=width, bits_color=width)
    params = random_params(spec)
    flat = packed.fit_ranges(dataclasses.replace(params, color=jnp.full_like(params.color, value)), spec)
    codec = make(spec)
    drawn = codec.gaussians(flat).color
    assert np.abs(drawn - value).max() <= abs(value) * 2.0**-6 / (2**width - 1) + packed.FINEST_STEP * max(
        1, abs(value)
    )
    loaded = codec.dequantize(codec.quantize(flat))
    assert bits(codec.gaussians(loaded).color) == bits(drawn)


@pytest.mark.parametrize("step", [0.0, -1.0])
def test_step_that_vanishes_or_turns_negative_is_the_finest(step):
    spec = PackedGaussianSpec(images_per_class=2, num_points=5)
    codec, params = make(spec), random_params(spec)
    bad = dataclasses.replace(params, step=jnp.full_like(params.step, step), low=jnp.full_like(params.low, -4.0))
    stored = codec.quantize(bad)
    np.testing.assert_array_equal(np.asarray(stored["step"], np.float32), 4 * packed.FINEST_STEP)
    assert bits(codec.decode(codec.dequantize(stored))) == bits(codec.decode(bad))
    grads = jax.jit(jax.grad(lambda p: sum(jnp.sum(x) for x in jax.tree.leaves(codec.gaussians(p)))))(bad)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_equal_positions_come_back_with_their_own_shapes_and_colors():
    spec = PackedGaussianSpec(images_per_class=2, num_points=5)
    codec, params = make(spec), random_params(spec)
    crowded = dataclasses.replace(params, mean=jnp.full_like(params.mean, 0.9995).at[:, 3].set(-0.9995))
    stored = codec.quantize(crowded)
    back = codec.unpack(codec.pack(stored))
    assert all(bits(back[name]) == bits(stored[name]) for name in stored)
    assert bits(codec.decode(codec.dequantize(stored))) == bits(codec.decode(crowded))
    last = np.asarray(stored["color"])[:, -1]
    np.testing.assert_array_equal(last, np.asarray(packed.codes(crowded, codec.spec)["color"])[:, 4])


# Bytes


def test_payload_is_the_codes_in_binary_one_kind_after_the_other():
    spec = PackedGaussianSpec(images_per_class=2, num_points=3, bits_mean=5, bits_cholesky=3, bits_color=7)
    codec = make(spec)
    stored = jax.device_get(codec.quantize(random_params(spec, m=3)))
    width = math.ceil(math.log2(math.comb(2**10 + 2, 3)))
    sets = [sorted(32 * y + x for x, y in image) for image in stored["mean"].tolist()]
    text = "".join(f"{sum(math.comb(k + i, i + 1) for i, k in enumerate(keys)):0{width}b}" for keys in sets)
    text += "".join(f"{code:03b}" for code in stored["cholesky"].ravel().tolist())
    text += "".join(f"{code:07b}" for code in stored["color"].ravel().tolist())
    text += "0" * (-len(text) % 8)
    written = codec.pack(stored)
    assert list(written) == ["codes", "low", "step"]
    assert written["codes"].tobytes() == int(text, 2).to_bytes(len(text) // 8, "big")
    kept = make(dataclasses.replace(spec, order="kept"))
    mean = "".join(f"{code:05b}" for code in stored["mean"].ravel().tolist())
    first = int(mean[:8], 2)
    assert kept.pack(stored)["codes"][0] == first


def test_payload_of_videos_sorts_by_frame_row_and_column():
    spec = PackedGaussian3DSpec(images_per_class=2, num_points=3, bits_mean=3, bits_cholesky=4, bits_color=5)
    codec = make(spec, image_shape=(4, *SIZE, 1))
    rng = np.random.default_rng(9)
    leaves = rng.uniform(-1, 1, (4, 3, 3)), rng.uniform(-1, 2, (4, 3, 6)), rng.uniform(0, 1, (4, 3, 1)), np.ones((4, 3))
    g = Gaussians3D(*(jnp.asarray(x, jnp.float32) for x in leaves), size=(4, *SIZE))
    params = packed.from_gaussians(g, spec)
    stored = jax.device_get(codec.quantize(params))
    # The cells of [-1, 1], whatever the order.
    cells = np.floor((np.clip(leaves[0], -0.999, 0.999) + 1) * 4).astype(int)
    keys = [sorted(64 * t + 8 * y + x for x, y, t in video) for video in cells.tolist()]
    assert [[64 * t + 8 * y + x for x, y, t in video] for video in stored["mean"].tolist()] == keys
    width = math.ceil(math.log2(math.comb(2**9 + 2, 3)))
    text = "".join(f"{sum(math.comb(k + i, i + 1) for i, k in enumerate(row)):0{width}b}" for row in keys)
    text += "".join(f"{code:04b}" for code in stored["cholesky"].ravel().tolist())
    text += "".join(f"{code:05b}" for code in stored["color"].ravel().tolist())
    text += "0" * (-len(text) % 8)
    written = codec.pack(stored)
    assert written["codes"].tobytes() == int(text, 2).to_bytes(len(text) // 8, "big")
    assert written["low"].shape == written["step"].shape == (7,)


@pytest.mark.parametrize(("order", "gpc", "channels"), [("sorted", 7, 3), ("kept", 20, 1)])
def test_open_number_of_points_fills_the_budget(order, gpc, channels):
    spec = PackedGaussianSpec(images_per_class=gpc, order=order)
    codec = make(spec, image_shape=(*SIZE, channels))
    m, available = codec.spec.num_points, CLASSES * BUDGET

    def size(m):
        position = math.ceil(math.log2(math.comb(2**16 + m - 1, m))) if order == "sorted" else 16 * m
        return math.ceil(CLASSES * gpc * (position + m * 6 * (3 + channels)) / 8) + 4 * (3 + channels)

    assert codec.nbytes(None) == size(m) <= available < size(m + 1)


def test_bits_after_the_last_code_are_refused():
    codec = make(PackedGaussianSpec(images_per_class=2, num_points=3, bits_cholesky=5))
    written = codec.pack(codec.quantize(random_params(codec.spec, m=3)))
    written["codes"][-1] |= 1
    with pytest.raises(ValueError, match="codes: the 4 bits after the last code must be 0"):
        codec.unpack(written)


def test_color_differences_have_bits_of_their_own_and_come_back_as_colors():
    np.testing.assert_array_equal(packed.to_ycocg(jnp.array([1.0, 0.5, 0.25])), [0.5625, 0.75, -0.125])
    colors = np.random.default_rng(0).integers(-64, 64, (9, 3)) / np.float32(16)
    np.testing.assert_array_equal(packed.from_ycocg(packed.to_ycocg(colors)), colors)
    spec = PackedGaussianSpec(images_per_class=2, num_points=5, bits_chroma=3)
    plain = dataclasses.replace(spec, bits_chroma=0)
    assert packed_codes.image_bits(spec, 3, 2) == packed_codes.image_bits(plain, 3, 2) - 5 * 2 * 3
    # Codes cover what they have bits for, and no more.
    found = np.asarray(packed.codes(random_params(spec), spec)["color"])
    assert found[..., 0].max() > 7 and found[..., 1:].max() == 7
    with pytest.raises(ValueError, match="codec.bits_chroma: expected 0 for images of 1 channels, found 3"):
        make(spec, image_shape=(*SIZE, 1))


# Entropy-coded sets


def coded(bits_gaussian, *, n=40, m=25, **settings):
    """Returns a codec and its parameters, whose shapes and colors are spread as those of images are: few are large."""
    spec = PackedGaussianSpec(images_per_class=n // CLASSES, num_points=m, bits_gaussian=bits_gaussian, **settings)
    codec, rng = make(spec, bytes_per_class=None), np.random.default_rng(7)
    luma = rng.laplace(0.3, 0.2, (n, m, 1))
    g = Gaussians(
        jnp.asarray(rng.uniform(-0.99, 0.99, (n, m, 2)), jnp.float32),
        jnp.asarray(rng.exponential(1.0, (n, m, 3)), jnp.float32),
        jnp.asarray(luma + rng.normal(0, 0.03, (n, m, 3)), jnp.float32),
        jnp.ones((n, m)),
        size=SIZE,
    )
    return codec, codec.project(packed.from_gaussians(g, spec))


def written_bits(codec, params) -> float:
    """Returns the bits of a Gaussian, without the zeros that fill up the file."""
    return 8 * len(codec.pack(codec.quantize(params))["codes"].tobytes().rstrip(b"\0")) / params.mean[..., 0].size


@pytest.mark.parametrize("settings", [{}, {"bits_chroma": 6, "order": "kept"}, {"bits_mean": 5}])
def test_entropy_coded_sets_fill_the_bits_that_they_may_have(settings):
    for bits_gaussian in (36, 48.5):
        codec, params = coded(bits_gaussian, **settings)
        assert codec.nbytes(params) == math.ceil(1000 * bits_gaussian / 8) + 4 * 6
        assert 0.96 * bits_gaussian < written_bits(codec, params) <= bits_gaussian + 8 / 1000
    # From too fine or coarse, in few steps.
    for factor in (0.3, 30.0):
        low = params.low + 512 * (1 - factor) * params.step
        off = dataclasses.replace(params, step=factor * params.step, low=low)
        if factor < 1:
            with pytest.raises(ValueError, match="codec.bits_gaussian: 48.5 bits per Gaussian leave 6063 bytes"):
                codec.pack(codec.quantize(off))
        for _ in range(4):
            off = codec.project(off)
        assert 0.96 * bits_gaussian < written_bits(codec, off) <= bits_gaussian + 8 / 1000


def test_a_bit_more_of_each_number_is_half_the_step_and_colors_share_theirs():
    # Finer codes have longer tables, which take a sixth of what is added.
    coarse, fine = (np.asarray(coded(bits)[1].step) for bits in (40, 46))
    np.testing.assert_allclose(np.log2(coarse / fine), 1, atol=0.2)
    assert coarse[3] == coarse[4] == coarse[5]
    # In proportion: two bits more of a color are a quarter of the step, beside shapes.
    shift = np.log2(coded(40, bits_color=8)[1].step / coarse)
    np.testing.assert_allclose(shift[:3] - shift[3:], 2, atol=0.05)


def test_entropy_coded_files_are_positions_and_then_numbers_channel_by_channel():
    codec, params = coded(44)
    stored = jax.device_get(codec.quantize(params))
    data = codec.pack(stored)["codes"].tobytes()
    width = math.ceil(math.log2(math.comb(2**16 + 24, 25)))
    shapes = [stored["cholesky"][..., i].ravel().astype(int) for i in range(3)]
    red, green, blue = (stored["color"][..., i].ravel().astype(int) for i in range(3))
    found = rans.decode(data[math.ceil(40 * width / 8) :], [1000] * 6)
    for values, expected in zip(found, [*shapes, red, green - red, blue - green], strict=True):
        np.testing.assert_array_equal(values, expected)


def test_too_few_bits_and_numbers_beyond_the_codes_are_refused():
    with pytest.raises(
        ValueError, match=r"codec.bits_gaussian: expected 0 or at least 19 for 40 images of 25 Gaussians"
    ):
        coded(15)
    codec, params = coded(44)
    stored = jax.device_get(codec.quantize(params))
    stored["color"] = stored["color"].astype(np.int32) - stored["color"].min() - 1
    with pytest.raises(ValueError, match="codes: entropy-coded numbers must lie in 0 to 1023"):
        codec.unpack(codec.pack(stored))
