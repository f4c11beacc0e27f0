"""The kernel distance, against a float64 loop over pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsdd_jax.match.mmd import mmd, mmd_loss

pytestmark = pytest.mark.usefixtures("lazy_compiler")

jitted = jax.jit(mmd)


def kernel(a, b) -> float:
    distance = float(((a - b) ** 2).sum())
    return sum(np.exp(-distance / (2 * width**2)) for width in (1, 2, 4, 8, 16))


def loop(x, y) -> float:
    """Unbiased MMD^2, pair by pair."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    a, b = len(x), len(y)
    total = sum(kernel(x[i], x[j]) for i in range(a) for j in range(a) if i != j) / (a * (a - 1))
    total += sum(kernel(y[i], y[j]) for i in range(b) for j in range(b) if i != j) / (b * (b - 1))
    return total - 2 * sum(kernel(p, q) for p in x for q in y) / (a * b)


def sets(seed=0, a=4, b=6, f=5, *, apart=0.5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(a, f)).astype(np.float32), rng.normal(apart, 1.5, (b, f)).astype(np.float32)


def test_value_is_that_of_the_loop_over_pairs_with_sets_of_different_sizes():
    x, y = sets()
    assert abs(loop(x, y)) > 0.01
    np.testing.assert_allclose(jitted(x, y), loop(x, y), atol=2e-6)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 10.0])
def test_value_keeps_its_digits_at_each_scale_and_far_from_the_origin(spread):
    x, y = (spread * x + np.float32(30) for x in sets(1))
    # Features of 30 are known to 2e-6 themselves; squares of 30 would be to 1e-4.
    np.testing.assert_allclose(jitted(x, y), loop(x, y), atol=1e-5)


def test_two_samples_on_each_side_have_the_value_of_the_formula():
    x, y = np.array([[0.0], [1.0]]), np.array([[2.0], [2.0]])

    def k(distance):
        return sum(np.exp(-(distance**2) / (2 * s**2)) for s in (1, 2, 4, 8, 16))

    expected = k(1) + k(0) - 2 * (2 * k(2) + 2 * k(1)) / 4
    np.testing.assert_allclose(mmd(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)), expected, atol=1e-6)


def test_gradient_is_the_slope_of_the_loop_in_every_number():
    x, y = sets(2, 3, 4, 3)
    found = jax.jit(jax.grad(mmd, argnums=(0, 1)))(x, y)
    step = 1e-5
    for place, grad in enumerate(found):
        expected = np.zeros(grad.shape)
        for index in np.ndindex(grad.shape):
            ends = []
            for sign in (1, -1):
                pair = [np.asarray(v, np.float64).copy() for v in (x, y)]
                pair[place][index] += sign * step
                ends.append(loop(*pair))
            expected[index] = (ends[0] - ends[1]) / (2 * step)
        assert np.abs(expected).max() > 0.01
        np.testing.assert_allclose(grad, expected, atol=2e-6)


def test_gradient_is_finite_where_samples_coincide():
    x = jnp.ones((3, 4))
    value, grads = jax.value_and_grad(mmd, argnums=(0, 1))(x, x)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    assert all((np.asarray(grad) == 0).all() for grad in grads)


def test_equal_distributions_are_at_zero_in_expectation_and_others_are_not():
    rng = np.random.default_rng(3)
    many = jax.jit(jax.vmap(mmd))
    x, y = rng.normal(size=(2, 4000, 5, 2)).astype(np.float32)
    same = np.asarray(many(x, y), np.float64)
    error = same.std() / np.sqrt(len(same))
    assert abs(same.mean()) < 4 * error < 0.02
    assert (same < 0).any(), "an estimate that is never negative is biased"
    assert np.mean(many(x, y + 1)) > 20 * error


def test_loss_is_the_sum_over_classes():
    rng = np.random.default_rng(4)
    real, syn = rng.normal(size=(3, 4, 5)).astype(np.float32), rng.normal(1, 1, (3, 2, 5)).astype(np.float32)
    expected = sum(loop(x, y) for x, y in zip(real, syn, strict=True))
    np.testing.assert_allclose(jax.jit(mmd_loss)(real, syn), expected, atol=5e-6)


@pytest.mark.parametrize(("a", "b"), [(1, 3), (3, 1), (0, 2)])
def test_fewer_than_two_samples_are_refused(a, b):
    with pytest.raises(ValueError, match=f"at least 2 samples on each side, found {a} and {b}"):
        mmd(jnp.zeros((a, 3)), jnp.zeros((b, 3)))
    with pytest.raises(ValueError, match=f"at least 2 samples on each side, found {a} and {b}"):
        mmd_loss(jnp.zeros((2, a, 3)), jnp.zeros((2, b, 3)))


def test_shapes_that_do_not_belong_together_are_refused():
    pairs = [((3, 4), (3, 5)), ((3,), (3,)), ((2, 3, 4), (2, 3, 4))]
    for one, other in pairs:
        with pytest.raises(ValueError, match=r"mmd: expected two arrays \[samples, features\]"):
            mmd(jnp.zeros(one), jnp.zeros(other))
    for one, other in [((2, 3, 4), (3, 3, 4)), ((3, 4), (3, 4)), ((2, 3, 4), (2, 3, 5))]:
        with pytest.raises(ValueError, match=r"mmd: expected two arrays \[classes, samples, features\]"):
            mmd_loss(jnp.zeros(one), jnp.zeros(other))
