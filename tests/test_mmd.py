"""The kernel distance, against a float64 loop over pairs, and the term that it adds to an objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsdd_jax import codecs, distillation, match, whiten
from gsdd_jax.augment import DsaSpec
from gsdd_jax.batches import Data
from gsdd_jax.codecs import LatentSpec, PixelSpec
from gsdd_jax.match import DistributionSpec, GradientSpec, MmdSpec, TrajectorySpec
from gsdd_jax.match.mmd import feature_mmd, mmd, mmd_loss, samples_of
from gsdd_jax.match.trajectory import flattener
from gsdd_jax.nets import NetSpec, build

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


@pytest.mark.parametrize("spread", [1e-3, 1.0, 10.0])
def test_value_is_that_of_the_loop_over_pairs_at_each_scale_and_far_from_the_origin(spread):
    x, y = (spread * x + np.float32(30) for x in sets(1))
    # Features of 30 are known to 2e-6 themselves; squares of 30 would be to 1e-4.
    np.testing.assert_allclose(jitted(x, y), loop(x, y), atol=1e-5)


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
    value, grads = jax.jit(jax.value_and_grad(mmd, argnums=(0, 1)))(x, x)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    assert all((np.asarray(grad) == 0).all() for grad in grads)


@pytest.mark.parametrize(
    ("function", "real", "syn", "message"),
    [
        (mmd, (1, 3), (3, 3), "at least 2 samples on each side, found 1 and 3"),
        (mmd_loss, (2, 3, 3), (2, 1, 3), "at least 2 samples on each side, found 3 and 1"),
        (mmd, (3, 4), (3, 5), r"mmd: expected two arrays \[samples, features\]"),
        (mmd_loss, (2, 3, 4), (3, 3, 4), r"mmd: expected two arrays \[classes, samples, features\]"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(function, real, syn, message):
    with pytest.raises(ValueError, match=message):
        function(jnp.zeros(real), jnp.zeros(syn))


CLASSES, PER_CLASS, SHAPE = 2, 3, (8, 8, 1)
NETWORK = build(NetSpec(depth=1, width=4), SHAPE, CLASSES)
WEIGHTS = flattener(NETWORK)[0](NETWORK.init(jax.random.key(5)))
# Draws always the same, so that the terms of a step can be told.
FIXED = NETWORK._replace(init=lambda key: flattener(NETWORK)[1](WEIGHTS))
LR = 0.5
RNG = np.random.default_rng(0)
REAL = RNG.integers(0, 256, (CLASSES, 4, *SHAPE), dtype=np.uint8)


WHITENED = whiten.MeanStd(jnp.full(1, 0.5), jnp.full(1, 0.5))


def features(images) -> np.ndarray:
    """Of the network with WEIGHTS, flattened."""
    x = (jnp.asarray(images, jnp.float32) - 0.5) * 2
    return np.asarray(NETWORK.apply(flattener(NETWORK)[1](WEIGHTS), x)[1]).reshape(len(images), -1)


def of_features(real, syn) -> float:
    """Sum over classes of the loop over pairs of features, float64."""
    return sum(loop(features(a / np.float32(255)), features(b)) for a, b in zip(real, syn, strict=True))


@jax.jit
def distance(syn):
    unflatten = flattener(NETWORK)[1]
    return feature_mmd(jnp.asarray(REAL), syn, unflatten(WEIGHTS), network=NETWORK, whitening=WHITENED)


def test_the_distance_of_images_is_the_loop_over_pairs_of_their_features_summed_over_classes():
    syn = RNG.uniform(size=(CLASSES, PER_CLASS, *SHAPE)).astype(np.float32)
    expected = of_features(REAL, syn)
    assert abs(expected) > 0.01
    np.testing.assert_allclose(distance(syn), expected, atol=2e-5)


OBJECTIVES = {
    "distribution": DistributionSpec(batch_real=4),
    "gradient": GradientSpec(batch_real=4, outer_loop=1, inner_loop=1),
    "trajectory": TrajectorySpec(syn_steps=1, expert_epochs=1, max_start_epoch=1),
}


def pixels():
    spec = PixelSpec(images_per_class=PER_CLASS, optimizer="sgd", lr=LR)
    return codecs.make(spec, image_shape=SHAPE, num_classes=CLASSES, bytes_per_class=PER_CLASS * 256)


def objective_of(codec, spec, mmd, network=FIXED):
    return match.make(spec, codec=codec, network=network, augment=DsaSpec(strategy="none"), mmd=mmd)


def given(objective):
    """Fixed images, and a fixed segment of an expert."""
    known = {
        "real": jnp.asarray(REAL), "mmd_real": jnp.asarray(REAL),
        "segments": jnp.stack([WEIGHTS, WEIGHTS + 0.01])[None],
    }  # fmt: skip
    return Data(WHITENED, None, {name: known[name] for name in objective.needs})


def step_of(codec, objective, spec, *, schedule=None):
    """Takes one outer step from fixed images; returns the states around it and the metrics."""
    objective = objective_of(codec, objective, spec)
    step = distillation.make_step(objective, schedule=schedule)
    images = jnp.asarray(np.random.default_rng(1).uniform(size=(codec.num_images, *SHAPE)), jnp.float32)
    state = distillation.init_state(objective, codec.init(jax.random.key(0), images))
    after, metrics = jax.jit(step)(state, given(objective), jax.random.key(3))
    return state, after, metrics


def leaf(params) -> np.ndarray:
    return np.asarray(jax.tree.leaves(params)[0], np.float64)


@pytest.mark.parametrize("name", ["gradient", "trajectory"])
def test_a_joint_step_adds_the_weighted_gradient_of_the_term_to_that_of_any_objective(name):
    codec = pixels()
    start, plain, _ = step_of(codec, OBJECTIVES[name], None)
    _, both, metrics = step_of(codec, OBJECTIVES[name], MmdSpec(weight=7.0, samples=4))
    images = codec.decode(start.params).reshape(CLASSES, PER_CLASS, *SHAPE)
    np.testing.assert_allclose(metrics["mmd"], of_features(REAL, images), atol=2e-5)
    extra = -LR * 7 * np.asarray(jax.jit(jax.grad(distance))(images)).reshape(leaf(both.params).shape)
    assert np.abs(extra).max() > 1e-3
    np.testing.assert_allclose(leaf(both.params) - leaf(plain.params), extra, atol=1e-5 * np.abs(extra).max() + 1e-6)
    assert int(both.step) == int(plain.step) == 1


def test_a_separate_step_follows_that_of_the_objective_with_the_same_optimizer_and_schedule():
    codec, factor = pixels(), 0.25
    objective, schedule = OBJECTIVES["distribution"], lambda taken: factor / (1 + taken)
    start, plain, _ = step_of(codec, objective, None, schedule=schedule)
    _, both, metrics = step_of(codec, objective, MmdSpec(weight=7.0, samples=4, steps="separate"), schedule=schedule)
    middle = codec.decode(plain.params).reshape(CLASSES, PER_CLASS, *SHAPE)
    grad = 7 * np.asarray(jax.jit(jax.grad(distance))(middle)).reshape(leaf(both.params).shape)
    # Momentum 0.5: half of the first update comes once more.
    expected = leaf(plain.params) + 0.5 * (leaf(plain.params) - leaf(start.params)) - factor * LR * grad
    np.testing.assert_allclose(leaf(both.params), expected, atol=2e-6)
    np.testing.assert_allclose(metrics["mmd"], of_features(REAL, middle), atol=2e-5)
    assert int(both.step) == 1


def test_weight_zero_is_the_program_without():
    codec, programs = pixels(), []
    for spec in (None, MmdSpec(weight=0.0)):
        objective = objective_of(codec, OBJECTIVES["distribution"], spec)
        state = distillation.init_state(objective, codec.init(None, jnp.zeros((codec.num_images, *SHAPE))))
        step = jax.jit(distillation.make_step(objective))
        programs.append(step.lower(state, given(objective), jax.random.key(3)).as_text())
    assert programs[0] == programs[1]


def test_without_given_weights_the_network_is_another_in_each_step():
    codec, objective, spec = pixels(), OBJECTIVES["distribution"], MmdSpec(weight=1.0, samples=4)
    objective = objective_of(codec, objective, spec, NETWORK)
    step = jax.jit(distillation.make_step(objective))
    images = jnp.asarray(RNG.uniform(size=(codec.num_images, *SHAPE)), jnp.float32)
    state = distillation.init_state(objective, codec.init(None, images))
    data = given(objective)._replace(drawn={"real": jnp.asarray(REAL), "mmd_real": jnp.asarray(REAL)})
    values = [float(step(state._replace(step=jnp.int32(i)), data, jax.random.key(3))[1]["mmd"]) for i in range(3)]
    assert len(set(values)) == 3


def latents(**changes):
    spec = LatentSpec(decoder="small", width=8, latent_dim=4, images_per_class=2, **changes)
    return codecs.make(spec, image_shape=SHAPE, num_classes=CLASSES, bytes_per_class=100_000)


def test_each_latent_is_drawn_as_often_as_makes_up_the_samples_and_images_without_noise_once():
    spec = MmdSpec(weight=1.0, samples=7)
    assert samples_of(latents(), spec) == (3, 2)
    assert samples_of(latents(sample=False), spec) == (1, 2)
    assert samples_of(latents(), MmdSpec(samples=2)) == (1, 2)
    assert samples_of(pixels(), MmdSpec(samples=2)) == (1, 2)
    one = PixelSpec(images_per_class=1)
    with pytest.raises(ValueError, match="mmd.weight: the term needs 2 synthetic images per class, the pixel codec"):
        samples_of(codecs.make(one, image_shape=SHAPE, num_classes=2, bytes_per_class=256), spec)


def test_the_term_trains_log_variances_by_samples_that_differ():
    codec = latents(optimizer="adam", lr=0.1)
    state, after, metrics = step_of(codec, OBJECTIVES["trajectory"], MmdSpec(weight=1.0, samples=7, steps="separate"))
    assert np.isfinite(metrics["mmd"])
    for name in ("mean", "log_variance"):
        assert np.abs(after.params[name] - state.params[name]).max() > 0.01, name
