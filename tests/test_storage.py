import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gsdd_jax import storage

# GSDD, appendix: (edge in pixels, ipc, Gaussian images per class, Gaussians per image).
PAPER_ROWS = [
    (32, 1, 30, 22),
    (32, 10, 160, 42),
    (32, 50, 250, 136),
    (32, 10, 80, 85),
    (32, 50, 400, 85),
    (128, 1, 64, 170),
    (128, 10, 640, 170),
    (128, 1, 200, 54),
    (256, 1, 120, 364),
]


def float32_of(bits) -> np.ndarray:
    return np.asarray(bits, np.uint32).view(np.float32)


def all_kinds_of_floats() -> np.ndarray:
    """Every bfloat16 followed by nothing, by the tie, by its neighbours, by random tails; no subnormals, no NaN."""
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


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_as_bfloat16_equals_the_cast_bit_for_bit(wrap):
    x = all_kinds_of_floats()
    with np.errstate(over="ignore"):
        expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    found = np.asarray(wrap(storage.as_bfloat16)(x))
    assert found.dtype == np.float32
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))
    # The largest floats round up to infinity, and infinities stay.
    assert np.isinf(found).sum() > np.isinf(x).sum() > 0


def test_as_bfloat16_keeps_nan():
    nan = float32_of([0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF])
    assert np.all(np.isnan(storage.as_bfloat16(nan)))


def test_as_bfloat16_of_subnormals_is_the_cast_or_zero():
    # Processors may flush subnormals; nothing in between may come out.
    x = float32_of(np.random.default_rng(1).integers(1, 1 << 23, 4096, dtype=np.uint32))
    found = np.asarray(storage.as_bfloat16(x))
    expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.all((found == expected) | (found == 0))


def test_what_the_forward_pass_sees_is_what_is_stored():
    tree = {"a": jnp.asarray(np.random.default_rng(2).normal(size=(50, 3)), jnp.float32)}
    for dtype in storage.ITEMSIZE:
        stored = storage.cast(tree, dtype)
        assert stored["a"].dtype == jnp.dtype(dtype)
        seen = jax.jit(storage.quantise, static_argnames="dtype")(tree["a"], dtype=dtype)
        assert np.array_equal(np.asarray(stored["a"], np.float32), seen)
        assert storage.nbytes(stored) == 150 * storage.ITEMSIZE[dtype]


def test_the_gradient_passes_straight_through():
    x = jnp.asarray(np.random.default_rng(3).normal(size=7), jnp.float32)
    v = jnp.arange(7.0)
    assert np.array_equal(jax.jit(jax.grad(lambda x: jnp.sum(storage.as_bfloat16(x) * v)))(x), v)
    # The slope of a loss is taken at the rounded value.
    slope = jax.grad(lambda x: jnp.sum(storage.quantise(x, "bfloat16") ** 2))(x)
    assert np.array_equal(slope, 2 * storage.as_bfloat16(x)) and not np.array_equal(slope, 2 * x)
    assert np.array_equal(jax.jvp(storage.as_bfloat16, (x,), (v,))[1], v)


@pytest.mark.parametrize(("edge", "ipc", "gpc", "points"), PAPER_ROWS)
def test_num_points_match_the_tables_of_the_paper(edge, ipc, gpc, points):
    bytes_per_class = storage.budget_bytes(ipc, (edge, edge, 3))
    assert bytes_per_class == ipc * edge * edge * 3 * 4
    assert storage.largest_num_points(bytes_per_class, gpc, 3) == points == 3 * edge**2 * ipc * 2 // (gpc * 9)
    # One more Gaussian per image would not fit.
    assert gpc * points * 9 * 2 <= bytes_per_class < gpc * (points + 1) * 9 * 2


def test_float32_halves_the_points_and_one_channel_has_fewer_numbers():
    assert storage.gaussian_numbers(3) == 9 and storage.gaussian_numbers(1) == 7
    assert storage.largest_num_points(12288, 30, 3, "float32") == 11
    assert storage.largest_num_points(storage.budget_bytes(1, (8, 8, 1)), 4, 1) == 256 // (4 * 7 * 2)


def test_an_impossible_budget_says_what_would_fit():
    message = r"codec.gpc: 8 images do not fit 128 bytes .* one bfloat16 Gaussian each \(18 bytes\); .*at most 7"
    with pytest.raises(ValueError, match=message):
        storage.largest_num_points(128, 8, 3)
    assert storage.largest_num_points(128, 7, 3) == 1


def test_budget_table_counts_ours_and_the_papers_way():
    table = storage.budget_table(1, (32, 32, 3), 30, 20, "bfloat16")
    assert {row.bytes_available for row in table} == {12288}
    pixels, float32, bfloat16, run = table
    assert pixels[1:5] == (1, 0, 3072, 12288)
    assert float32[1:5] == (30, 11, 2970, 11880)
    assert bfloat16[1:5] == (30, 22, 5940, 11880)
    assert run[1:5] == (30, 20, 5400, 10800)
    assert "the paper's count" in bfloat16.what and "the rivals' count" in float32.what and "this run" in run.what


def test_budget_table_leaves_out_what_does_not_fit():
    # 256 bytes: ten Gaussians of 18 bytes fit ten images, in float32 none does.
    table = storage.budget_table(1, (8, 8, 1), 10, 1, "bfloat16")
    assert [row.points_per_image for row in table] == [0, 1, 1]


def test_nbytes_counts_every_array_of_a_tree_as_written():
    tree = {"a": np.zeros((3, 5), np.uint8), "b": [jnp.zeros(7, jnp.bfloat16), np.zeros((2, 0), np.float32)]}
    assert storage.nbytes(tree) == 15 + 14
