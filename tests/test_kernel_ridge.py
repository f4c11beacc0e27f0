import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from objectives import data_of

from gsdd_jax import codecs, distillation, match, whiten
from gsdd_jax.match import Batch, KernelRidgeSpec, Synthetic
from gsdd_jax.match.kernel_ridge import ridge_predictions
from gsdd_jax.nets import NetSpec, build

CLASSES, SHAPE, GPC, KEY = 3, (8, 8, 1), 2, jax.random.key(3)
# Without a norm, behind which a bias has no gradient but its rounding, of which Adam takes the sign.
NETWORK = build(NetSpec(depth=1, width=4, norm="none"), SHAPE, CLASSES)
NORMAL = whiten.MeanStd(jnp.full(1, 0.3), jnp.full(1, 0.4))
RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (12, *SHAPE), np.uint8), np.arange(12) % CLASSES
CODEC = codecs.make(
    codecs.PixelSpec(images_per_class=GPC, optimizer="adam", lr=0.01),
    image_shape=SHAPE,
    num_classes=CLASSES,
    bytes_per_class=512,
)


def oracle(features, labels, others, regularization):
    """The dual form in float64, whatever the shapes."""
    features, labels, others = (np.asarray(x, np.float64) for x in (features, labels, others))
    kernel = features @ features.T
    r = regularization * np.trace(kernel) / len(kernel)
    return others @ features.T @ np.linalg.solve(kernel + r * np.eye(len(kernel)), labels)


@pytest.mark.parametrize(("n", "f"), [(5, 20), (20, 5)])
def test_predictions_are_those_of_ridge_regression_whichever_system_is_smaller(n, f):
    features, labels, others = RNG.normal(size=(n, f)), RNG.normal(size=(n, 3)), RNG.normal(size=(2, 4, f))
    # What all features have in common is most of them, as behind a ReLU.
    features, others = features + 3, others + 3
    for regularization in (1e-6, 0.5):
        found = ridge_predictions(*(jnp.float32(x) for x in (features, labels, others)), regularization=regularization)
        assert found.shape == (2, 4, 3)
        np.testing.assert_allclose(found, oracle(features, labels, others, regularization), rtol=0, atol=2e-3)


def objective(**settings):
    return match.make(KernelRidgeSpec(**{"batch_real": 4} | settings), codec=CODEC, network=NETWORK)


def start(made):
    images = np.random.default_rng(1).uniform(size=(CODEC.num_images, *SHAPE))
    return distillation.init_state(made, CODEC.init(KEY, jnp.asarray(images, jnp.float32)))


@functools.partial(jax.jit, static_argnums=0)
def loss(made, learned, carry, params, batch):
    return made.loss(KEY, learned, carry, Synthetic(CODEC, params), batch)


def test_the_loss_is_that_of_the_predictions_and_the_network_takes_a_step_of_its_own():
    made = objective(flip=True, learn_labels=True, label_margin=0.5, regularization=1e-3, pool=1)
    state, k = start(made), CLASSES
    labels = np.random.default_rng(2).dirichlet(np.ones(k), k * GPC)
    weights = NETWORK.init(jax.random.key(1))
    # A network that was trained before, or else it would be drawn anew.
    moments = state.carry.moments._replace(count=jnp.ones(1, jnp.int32))
    carry = state.carry._replace(params=jax.tree.map(lambda x: x[None], weights), moments=moments)
    batch = Batch(NORMAL, {"real": jnp.asarray(IMAGES.reshape(k, 4, *SHAPE))})
    value, metrics, pool = loss(made, {"labels": jnp.float32(labels)}, carry, state.params, batch)

    @jax.jit
    def outputs(weights, images):
        return NETWORK.apply(weights, NORMAL(images))

    syn = jnp.asarray(state.params["images"]).reshape(-1, *SHAPE)
    targets, wanted = ((p - 1 / k) / np.sqrt(k / 10) for p in (labels, np.eye(k).repeat(4, 0)))
    found = oracle(
        np.concatenate([outputs(weights, x)[1] for x in (syn, syn[:, :, ::-1])]),
        np.concatenate([targets, targets]),
        outputs(weights, IMAGES.astype(np.float32) / 255)[1],
        1e-3,
    )
    top = np.sort(targets, 1)
    margin = -np.minimum(top[:, -1] - top[:, -2], 1 / k).mean()
    np.testing.assert_allclose(value, 0.5 * ((found - wanted) ** 2).sum(1).mean() + 0.5 * margin, rtol=1e-4)
    np.testing.assert_allclose(metrics["regression_accuracy"], np.mean(found.argmax(1) == np.arange(k).repeat(4)))

    adam = optax.adam(made.spec.net_lr)
    moments = optax.ScaleByAdamState(jnp.int32(1), *(jax.tree.map(jnp.zeros_like, weights) for _ in range(2)))
    slope = jax.jit(jax.grad(lambda w: 0.5 * jnp.sum((outputs(w, syn)[0] - targets) ** 2) / len(syn)))(weights)
    updates, _ = adam.update(slope, (moments, optax.EmptyState()))
    trained = optax.apply_updates(weights, updates)
    for one, other in zip(jax.tree.leaves(pool.params), jax.tree.leaves(trained), strict=True):
        np.testing.assert_allclose(one[0], other, rtol=0, atol=1e-6)


def test_networks_are_of_several_ages_and_drawn_anew_in_turn_while_labels_stay_probabilities():
    made = objective(pool=3, net_updates=3, learn_labels=True, label_lr=0.1)
    data, step = data_of(made, IMAGES, LABELS, NORMAL), jax.jit(distillation.make_step(made))
    states = [start(made)]
    assert states[0].carry.age.tolist() == [0, 1, 2] and states[0].carry.moments.count.tolist() == [0, 0, 0]
    for _ in range(8):
        states.append(step(states[-1], data, KEY)[0])
    ended = 0
    for before, after in zip(states, states[1:], strict=False):
        kernels = [np.asarray(state.carry.params["conv0"]["kernel"]) for state in (before, after)]
        (which,) = np.flatnonzero((kernels[0] != kernels[1]).any((1, 2, 3, 4)))
        ages, counts = ([np.asarray(x) for x in (s.carry.age, s.carry.moments.count)] for s in (before, after))
        ended += int(after.carry.age[which] == 0)
        expected = np.asarray(before.carry.age).copy()
        expected[which] = (expected[which] + 1) % 3
        np.testing.assert_array_equal(after.carry.age, expected)
        # A life that ends leaves nothing behind, so that the next begins with a draw; others go on by a small step.
        count = before.carry.moments.count[which]
        assert after.carry.moments.count[which] == (0 if after.carry.age[which] == 0 else count + 1)
        assert (np.abs(kernels[1] - kernels[0])[which].max() > 0.01) == (count == 0)
    assert ended >= 2
    labels = np.asarray(states[-1].learned["labels"])
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-5)
    assert labels.min() >= 0 and np.all(np.abs(labels - np.eye(CLASSES).repeat(GPC, 0)).max(1) > 1e-3)
