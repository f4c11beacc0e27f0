import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gsdd_jax import codecs, storage
from train import results

# GSDD, appendix: (edge in pixels, ipc, Gaussian images per class, Gaussians per image).
PAPER_ROWS = [
    (32, 1, 30, 22),
    (32, 50, 250, 136),
    (128, 1, 64, 170),
    (256, 1, 120, 364),
]


def float32_of(bits) -> np.ndarray:
    return np.asarray(bits, np.uint32).view(np.float32)


def all_kinds_of_floats() -> np.ndarray:
    """Every bfloat16 followed by nothing, by the tie, by its neighbors, by random tails; no subnormals, no NaN."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    tails = [
        0,
        0x7FFF,
        0x8000,
        0x8001,
        0xFFFF,
        np.random.default_rng(0).integers(0, 1 << 16, high.size, dtype=np.uint32),
    ]
    x = float32_of(np.concatenate([high + tail for tail in tails]).astype(np.uint32))
    return x[~np.isnan(x) & ((np.abs(x) >= np.finfo(np.float32).tiny) | (x == 0))]


def test_as_bfloat16_equals_the_cast_bit_for_bit():
    x = all_kinds_of_floats()
    with np.errstate(over="ignore"):
        expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    found = np.asarray(jax.jit(storage.as_bfloat16)(x))
    assert found.dtype == np.float32
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))
    # The largest floats round up to infinity, and infinities stay.
    assert np.isinf(found).sum() > np.isinf(x).sum() > 0


def test_as_bfloat16_keeps_nan():
    nan = float32_of([0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF])
    assert np.all(np.isnan(storage.as_bfloat16(nan)))


def test_what_the_forward_pass_sees_is_what_is_stored():
    tree = {"a": jnp.asarray(np.random.default_rng(2).normal(size=(50, 3)), jnp.float32)}
    for dtype, size in storage.PIXEL_ITEMSIZE.items():
        stored = storage.cast(tree, dtype)
        assert stored["a"].dtype == jnp.dtype(dtype)
        seen = jax.jit(storage.quantize, static_argnames="dtype")(tree["a"], dtype=dtype)
        assert np.array_equal(storage.widen(stored)["a"], seen)
        if dtype != "uint8":
            assert np.array_equal(np.asarray(stored["a"], np.float32), seen)
        assert storage.nbytes(stored) == 150 * size


def around_the_grid_of_bytes() -> np.ndarray:
    """Values on the grid, halfway between them and next to that, beyond its ends and in between."""
    grid, half = np.arange(256) / 85 - 1, (np.arange(255) + 0.5) / 85 - 1
    x = np.concatenate([grid, half, np.random.default_rng(4).uniform(-1.5, 2.5, 10_000)]).astype(np.float32)
    return np.concatenate([x, np.nextafter(x, np.float32(9)), np.nextafter(x, np.float32(-9))])


def test_values_of_bytes_are_multiples_of_an_85th_from_minus_one_to_two():
    values = np.asarray(storage.widen(np.arange(256, dtype=np.uint8)))
    assert values.dtype == np.float32
    exact = np.arange(256) / 85 - 1
    assert np.all(np.abs(values - exact) <= np.spacing(np.abs(exact).astype(np.float32)))
    assert values[[0, 85, 170, 255]].tolist() == [-1, 0, 1, 2]
    # What is loaded is what it was rounded to.
    assert np.array_equal(storage.cast(values, "uint8"), np.arange(256))
    assert np.array_equal(storage.as_uint8(values), values)


def test_bytes_are_the_nearest_of_the_grid_and_clipped_at_its_ends():
    x = around_the_grid_of_bytes()
    codes = np.asarray(storage.cast(x, "uint8")).astype(np.int64)
    place = 85 * (x.astype(np.float64) + 1)
    # Two operations of float32, of numbers up to 255, may be off by 2^-24 of them each.
    assert np.abs(codes - place.clip(0, 255)).max() <= 0.5 + 2 * 255 * 2**-24
    assert codes.min() == 0 and codes.max() == 255
    assert np.all(codes[x <= -1] == 0) and np.all(codes[x >= 2] == 255)
    ends = np.array([-np.inf, np.finfo(np.float32).min, np.inf, np.finfo(np.float32).max, np.nan], np.float32)
    assert storage.cast(ends, "uint8").tolist() == [0, 0, 255, 255, 0]
    assert np.array_equal(storage.as_uint8(ends), [-1, -1, 2, 2, np.nan], equal_nan=True)


def test_ties_of_bytes_go_to_even_codes():
    # The three ties that are numbers of float32: 42.5, 127.5 and 212.5 steps from the lower end.
    ties = np.array([-0.5, 0.5, 1.5], np.float32)
    assert storage.cast(ties, "uint8").tolist() == [42, 128, 212]
    assert storage.cast(ties + np.float32(1e-6), "uint8").tolist() == [43, 128, 213]
    assert storage.cast(ties - np.float32(1e-6), "uint8").tolist() == [42, 127, 212]


def test_bytes_are_the_same_bits_compiled_and_not(default_code):
    x = around_the_grid_of_bytes()
    alone, compiled = storage.as_uint8(jnp.asarray(x)), jax.jit(storage.as_uint8, compiler_options=default_code)(x)
    assert np.array_equal(alone, compiled) and np.array_equal(alone, storage.widen(storage.cast(x, "uint8")))


def test_gradient_of_bytes_is_that_of_clipping_half_a_step_beyond_the_ends():
    half = 0.5 / 85
    x = np.array([-2, -1 - 1.01 * half, -1 - 0.99 * half, -1, -0.3, 0.5, 1.2, 2, 2 + 0.99 * half, 2 + 1.01 * half, 9])
    inside = np.array([0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0])
    x, v = x.astype(np.float32), np.arange(1, 12, dtype=np.float32)
    assert np.array_equal(jax.jit(jax.grad(lambda x: jnp.sum(storage.as_uint8(x) * v)))(x), inside * v)
    # The slope of a loss is taken at the rounded value, and has a slope itself.
    slope = jax.jit(jax.grad(lambda x: jnp.sum(storage.quantize(x, "uint8") ** 2)))
    assert np.array_equal(slope(x), inside * 2 * np.asarray(storage.as_uint8(x)))
    assert np.array_equal(jax.jit(jax.grad(lambda x: jnp.sum(slope(x))))(x), 2 * inside)


def test_the_gradient_passes_straight_through():
    x = jnp.asarray(np.random.default_rng(3).normal(size=7), jnp.float32)
    v = jnp.arange(7.0)
    assert np.array_equal(jax.jit(jax.grad(lambda x: jnp.sum(storage.as_bfloat16(x) * v)))(x), v)
    # The slope of a loss is taken at the rounded value.
    slope = jax.jit(jax.grad(lambda x: jnp.sum(storage.quantize(x, "bfloat16") ** 2)))(x)
    assert np.array_equal(slope, 2 * storage.as_bfloat16(x)) and not np.array_equal(slope, 2 * x)


@pytest.mark.parametrize(("edge", "ipc", "gpc", "points"), PAPER_ROWS)
def test_num_points_match_the_tables_of_the_paper(edge, ipc, gpc, points):
    bytes_per_class = storage.budget_bytes(ipc, (edge, edge, 3))
    assert bytes_per_class == ipc * edge * edge * 3 * 4
    spec = codecs.GaussianSpec(images_per_class=gpc)
    made = codecs.make(spec, image_shape=(edge, edge, 3), num_classes=10, bytes_per_class=bytes_per_class)
    assert made.spec.num_points == points == 3 * edge**2 * ipc * 2 // (gpc * 9)
    # One more Gaussian per image would not fit.
    assert gpc * points * 9 * 2 <= bytes_per_class < gpc * (points + 1) * 9 * 2


def test_budget_table_counts_ours_and_the_papers_way():
    spec = codecs.GaussianSpec(images_per_class=30, num_points=20)
    assert results.budget_rows(1, codecs.make(spec, image_shape=(32, 32, 3), num_classes=10), 108_000) == {
        "pixels, float32": "1 images: 3072 floats, 12288 bytes",
        "30 Gaussian images, float32 (the rivals' count)": "30 images of 11 Gaussians: 2970 floats, 11880 bytes",
        "30 Gaussian images, bfloat16 (the paper's count)": "30 images of 22 Gaussians: 5940 floats, 11880 bytes",
        "this run: 30 images of gaussian, bfloat16": "30 images of 20 Gaussians: 5400 floats, 10800 bytes",
    }
    packed = codecs.PackedGaussianSpec(images_per_class=86, num_points=22)
    rows = results.budget_rows(1, codecs.make(packed, image_shape=(32, 32, 3), num_classes=10), 122_690)
    own = rows["this run: 86 images of packed_gaussian, codes of 8, 6 and 6 bits"]
    assert own == f"86 images of 22 Gaussians: {86 * 22 * 8} floats, 12269 bytes"


def test_nbytes_counts_every_array_of_a_tree_as_written():
    tree = {"a": np.zeros((3, 5), np.uint8), "b": [jnp.zeros(7, jnp.bfloat16), np.zeros((2, 0), np.float32)]}
    assert storage.nbytes(tree) == 15 + 14
