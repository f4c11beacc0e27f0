"""What is special to packed Gaussians; test_codecs.py and test_synset.py hold them to the common contract."""

import dataclasses
import hashlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from safetensors.flax import load_file, save_file

import gsdd_jax
from benchmarks import packed_psnr
from gsdd_jax import SynSet, codecs, fitting, packing, storage
from gsdd_jax.codecs import PackedGaussianSpec, packed
from gsdd_jax.codecs.packed import PackedGaussians
from gsdd_jax.gaussians import Gaussians, to_pixels

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


def grid_arguments(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2, 3, (4, 7, 3)).astype(np.float32)
    return x, np.float32([-1.0, -0.5, 0.25]), np.float32([0.0625, 0.109375, 0.25])


@pytest.mark.parametrize("width", [2, 6, 11])
def test_grid_values_are_the_nearest_in_float64(width):
    x, low, step = grid_arguments()
    grid = low.astype(np.float64)[:, None] + np.arange(2**width) * step.astype(np.float64)[:, None]
    nearest = np.abs(x.astype(np.float64)[..., None] - grid).argmin(-1)
    np.testing.assert_array_equal(storage.grid_codes(x, low, step, width), nearest)
    expected = np.take_along_axis(np.broadcast_to(grid, (*x.shape, 2**width)), nearest[..., None], -1)[..., 0]
    for function in (storage.on_grid, jax.jit(storage.on_grid, static_argnums=3)):
        np.testing.assert_array_equal(function(x, low, step, width), expected.astype(np.float32))


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
    for function in (storage.on_grid, jax.jit(storage.on_grid, static_argnums=3)):
        np.testing.assert_array_equal(function(exact, low, step, width), exact)
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


def test_gradient_of_clipped_values_is_that_of_the_end_they_sit_at():
    # All beyond the upper end low + top * step, or below low: finite differences of the function itself.
    low, step, width = np.float32([0.5]), np.float32([0.25]), 3
    for x, d_low, d_step in ((np.float32([[9.0]]), 1, 7), (np.float32([[-9.0]]), 1, 0)):

        def value(low, step, x=x):
            return storage.on_grid(x, low, step, width).sum()

        found = jax.grad(value, argnums=(0, 1))(low, step)
        scale = 1 / math.sqrt(7)
        np.testing.assert_allclose(np.ravel(found), [scale * d_low, scale * d_step], rtol=1e-6)
        assert value(low + 0.125, step) - value(low, step) == 0.125 * d_low
        assert value(low, step + 0.125) - value(low, step) == 0.125 * d_step


@pytest.mark.parametrize("hostile", [np.inf, -np.inf, 3e38, -3e38])
def test_values_beyond_all_bounds_take_the_end_of_the_grid(hostile):
    low, step = np.float32([-1.0]), np.float32([0.125])
    end = -1 + 0.125 * 15 if hostile > 0 else -1
    assert storage.on_grid(jnp.full((1, 1), hostile), low, step, 4) == end


# The Gaussians that are drawn


@pytest.mark.parametrize(("order", "widths"), [("sorted", (8, 6, 6)), ("kept", (5, 2, 16)), ("sorted", (16, 16, 2))])
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


@pytest.mark.parametrize(("ranges", "order"), [("learned", "sorted"), ("fitted", "kept")])
def test_what_is_trained_is_what_the_file_shows_bit_by_bit(ranges, order, tmp_path):
    spec = PackedGaussianSpec(images_per_class=2, num_points=7, order=order, ranges=ranges)
    codec = make(spec)
    images = jnp.asarray(np.random.default_rng(3).uniform(0, 1, (4, *SIZE, 3)), jnp.float32)
    state = jax.jit(lambda x: fitting.init_fit(jax.random.key(0), x, codec=codec, steps=30))(images)
    started = state.params
    state, _ = jax.jit(lambda s, x: fitting.fit_steps(s, x, codec=codec, steps=30, count=30))(state, images)
    params = state.params
    if ranges == "learned":
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
    assert bits(codec.decode(params)) == bits(codec.decode(read.params))
    # And once more through the file.
    read.save(tmp_path / "again")
    assert tree_bits(gsdd_jax.load(tmp_path / "again").params) == tree_bits(read.params)
    assert (tmp_path / "again" / "synset.safetensors").read_bytes() == (tmp_path / "synset.safetensors").read_bytes()


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


def test_fitted_ranges_are_quantiles_widened_by_no_more_than_the_rounding_needs():
    for width in (6, 16):
        spec = PackedGaussianSpec(images_per_class=2, num_points=5, bits_cholesky=width, bits_color=width)
        params = packed.from_gaussians(random_gaussians(), spec)
        masters = np.concatenate([params.cholesky, params.color], axis=-1).reshape(-1, 6).astype(np.float64)
        low, step = np.asarray(params.low, np.float64), np.asarray(params.step, np.float64)
        assert (low == bfloat16(low)).all() and (step == bfloat16(step)).all()
        high = low + (2**width - 1) * step
        first, last = np.quantile(masters, [0.003, 0.997], axis=0)
        assert (low <= first + 1e-6).all() and (high >= last - 1e-6).all()
        assert (high - low <= 1.04 * (last - first)).all()


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


def test_set_without_a_finite_number_has_a_range():
    spec = PackedGaussianSpec(images_per_class=2, num_points=5)
    params = random_params(spec)
    bad = packed.fit_ranges(jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params), spec)
    assert np.isfinite(bad.low).all() and np.isfinite(bad.step).all()


@pytest.mark.parametrize("value", [0.0, 0.3, -17.7, 1000.1])
@pytest.mark.parametrize("width", [2, 6, 16])
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


@pytest.mark.parametrize("step", [0.0, -1.0, 1e-30])
def test_step_that_vanishes_or_turns_negative_is_the_finest(step):
    spec = PackedGaussianSpec(images_per_class=2, num_points=5)
    codec, params = make(spec), random_params(spec)
    bad = dataclasses.replace(params, step=jnp.full_like(params.step, step), low=jnp.full_like(params.low, -4.0))
    stored = codec.quantize(bad)
    np.testing.assert_array_equal(np.asarray(stored["step"], np.float32), 4 * packed.FINEST_STEP)
    assert bits(codec.decode(codec.dequantize(stored))) == bits(codec.decode(bad))
    grads = jax.jit(jax.grad(lambda p: sum(jnp.sum(x) for x in jax.tree.leaves(codec.gaussians(p)))))(bad)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("order", ["sorted", "kept"])
def test_equal_positions_come_back_with_their_own_shapes_and_colors(order):
    spec = PackedGaussianSpec(images_per_class=2, num_points=5, order=order)
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


def test_52_bits_hold_2_8_times_the_images_of_bfloat16():
    # CIFAR-10 at 12,288 bytes per class: 16 + 18 + 18 bits, less the order, which is worth 16 - 283/22 bits.
    settings = {"image_shape": (32, 32, 3), "num_classes": 10, "bytes_per_class": 12288}
    for widths, order, bits_per_image in (((8, 6), "kept", 22 * 52), ((8, 6), "sorted", 283 + 22 * 36)):
        spec = PackedGaussianSpec(
            images_per_class=1, num_points=22, bits_mean=widths[0], bits_cholesky=widths[1], order=order
        )
        most = (8 * (122880 - 24)) // bits_per_image // 10
        codec = codecs.make(dataclasses.replace(spec, images_per_class=most), **settings)
        size = -(-10 * most * bits_per_image // 8) + 24
        assert codec.nbytes(None) == storage.nbytes(codec.layout()) == size <= 122880
        with pytest.raises(ValueError, match="codec.num_points"):
            codecs.make(dataclasses.replace(spec, images_per_class=most + 1), **settings)
    assert most == 91 and codecs.make(PackedGaussianSpec(images_per_class=85), **settings).spec.num_points == 23


@pytest.mark.parametrize("order", ["sorted", "kept"])
@pytest.mark.parametrize(("gpc", "channels"), [(1, 3), (7, 3), (20, 1)])
def test_open_number_of_points_fills_the_budget(order, gpc, channels):
    spec = PackedGaussianSpec(images_per_class=gpc, order=order)
    codec = make(spec, image_shape=(*SIZE, channels))
    m, available = codec.spec.num_points, CLASSES * BUDGET

    def size(m):
        position = math.ceil(math.log2(math.comb(2**16 + m - 1, m))) if order == "sorted" else 16 * m
        return math.ceil(CLASSES * gpc * (position + m * 6 * (3 + channels)) / 8) + 4 * (3 + channels)

    assert codec.nbytes(None) == size(m) <= available < size(m + 1)


def test_one_gaussian_per_image_survives_the_file(tmp_path):
    spec = PackedGaussianSpec(images_per_class=1, num_points=1, bits_mean=2, bits_cholesky=2, bits_color=2)
    codec = make(spec)
    made = SynSet(codec, random_params(spec, n=2, m=1), BUDGET, ("a", "b"))
    sizes = made.save(tmp_path)
    # 4 + 6 + 6 bits for each of two images, and the grids.
    assert sizes["payload"] == 2 * 16 // 8 + 24
    assert bits(gsdd_jax.load(tmp_path).images()) == bits(made.images())


@pytest.fixture
def folder(tmp_path):
    spec = PackedGaussianSpec(images_per_class=2, num_points=3, bits_cholesky=5)
    SynSet(make(spec), random_params(spec, m=3), BUDGET, ("a", "b")).save(tmp_path)
    return tmp_path


def rewrite(folder, arrays):
    """Replaces the arrays of a set and the sum that its manifest has of their file."""
    save_file(arrays, folder / "synset.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"] = hashlib.sha256((folder / "synset.safetensors").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_bytes_that_are_no_set_name_the_file(folder):
    file = folder / "synset.safetensors"
    arrays = load_file(file)
    codes = np.asarray(arrays["codes"])
    assert packing.multiset_bits(3, 2**16) == 46
    high = codes.copy()
    high[:6] = 255
    rewrite(folder, arrays | {"codes": jnp.asarray(high)})
    with pytest.raises(ValueError, match=f"{file}: no set of 3 of 65536 codes has the number 0x3fffffffffff"):
        gsdd_jax.load(folder)
    odd = codes.copy()
    odd[-1] |= 1
    rewrite(folder, arrays | {"codes": jnp.asarray(odd)})
    with pytest.raises(ValueError, match=f"{file}: codes: the 4 bits after the last code must be 0"):
        gsdd_jax.load(folder)


def test_arrays_of_another_layout_are_named(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["codec"]["bits_color"] = 7
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"codes: expected uint8\[77\], found uint8\[73\]"):
        gsdd_jax.load(folder)


def test_manifest_of_a_packed_set_holds_no_arrays(folder):
    assert (folder / "manifest.json").stat().st_size < 1500


def test_benchmark_counts_the_bits_of_a_gaussian_in_every_coding():
    assert packed_psnr.entropy(np.repeat(np.arange(8), 5)) == 3
    assert packed_psnr.entropy(np.array([0, 0, 0, 1])) == pytest.approx(2 - 0.75 * math.log2(3))
    assert packed_psnr.entropy(np.zeros(9, np.int64)) == 0
    spec = PackedGaussianSpec(images_per_class=2, num_points=5, bits_mean=7, bits_color=5)
    codec, params = make(spec), random_params(spec)
    found = packed_psnr.bits_per_gaussian(codec, params)
    assert found["kept"] == 14 + 18 + 15
    assert found["written"] == 8 * math.ceil(4 * (packing.multiset_bits(5, 2**14) + 5 * 33) / 8) / 20
    assert packing.multiset_bits(5, 2**14) / 5 < found["entropy"] < found["written"]
