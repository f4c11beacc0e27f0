import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gsdd_jax import codecs, data, distillation, match, whiten
from gsdd_jax.augment import DsaSpec, dsa
from gsdd_jax.batches import Data, hold
from gsdd_jax.codecs import PixelSpec
from gsdd_jax.match import GradientSpec, gradient_loss
from gsdd_jax.match.gradient import layerwise_distance, train_between
from gsdd_jax.nets import NetSpec, build

CLASSES, SHAPE, GPC = 3, (8, 8, 1), 2
NETWORK = build(NetSpec(depth=1, width=4), SHAPE, CLASSES)
init = jax.jit(NETWORK.init)
AUGMENT, NO_AUGMENT = DsaSpec(strategy="crop"), DsaSpec(strategy="none")
KEY = jax.random.key(3)
NORMAL = whiten.MeanStd(jnp.full(1, 0.3), jnp.full(1, 0.4))


def batches(seed=0, real=4, syn=GPC):
    rng = np.random.default_rng(seed)
    real = jnp.asarray(rng.integers(0, 256, (CLASSES, real, *SHAPE)), jnp.uint8)
    return real, jnp.asarray(rng.uniform(0, 1, (CLASSES, syn, *SHAPE)), jnp.float32)


# Compiled as one, here and below, which is faster than the same operations one by one.
@functools.partial(jax.jit, static_argnames="class_chunk")
def loss(syn, real, params, *, class_chunk=2):
    return gradient_loss(
        KEY,
        real,
        syn,
        params=params,
        network=NETWORK,
        augment=AUGMENT,
        whitening=NORMAL,
        class_chunk=class_chunk,
    )


slope_of_loss = jax.jit(jax.value_and_grad(loss), static_argnames="class_chunk")


def cross_entropy(params, images, labels):
    logits, _ = NETWORK.apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


slope_of_cross_entropy = jax.jit(jax.grad(cross_entropy))


def distance(real, syn):
    """The definition, in float64: one term for each output of each kernel."""
    total = 0.0
    for layer in real:
        if "kernel" in real[layer]:  # no other array of these networks has two axes
            a, b = (np.asarray(g[layer]["kernel"], np.float64) for g in (real, syn))
            for unit in range(a.shape[-1]):
                u, v = a[..., unit].ravel(), b[..., unit].ravel()
                total += 1 - u @ v / (np.linalg.norm(u) * np.linalg.norm(v) + 1e-6)
    return total


def test_distance_counts_one_cosine_per_output_unit_of_every_layer_whatever_its_name():
    rng = np.random.default_rng(0)
    # By names of others, in a list, and as a plain array; what has one axis does not count.
    for name, weights in (("kernel", (3, 3, 2, 5)), ("w", (4, 5)), ("embedding", (2, 3, 5)), ("position", (2, 5))):
        layer = {name: rng.normal(size=weights), "bias": rng.normal(size=5)}
        real = {"a": layer, "scale": rng.normal(size=4)}
        opposite = jax.tree.map(lambda x: -x, real)
        other_rest = {"a": layer | {"bias": -layer["bias"]}, "scale": -real["scale"]}
        assert abs(float(layerwise_distance(real, jax.tree.map(lambda x: 7 * x, real)))) < 1e-5
        np.testing.assert_allclose(layerwise_distance(real, opposite), 2 * 5, rtol=1e-6)
        assert abs(float(layerwise_distance(real, other_rest))) < 1e-5
        np.testing.assert_allclose(layerwise_distance([layer[name]], [-layer[name]]), 2 * 5, rtol=1e-6)
        np.testing.assert_allclose(layerwise_distance(layer[name], -layer[name]), 2 * 5, rtol=1e-6)
    right = {"w": np.array([[1.0, 0.0], [0.0, 2.0]])}
    np.testing.assert_allclose(layerwise_distance(right, {"w": np.array([[0.0, 3.0], [1.0, 3.0]])}), 2 - 0.5**0.5)


def test_nothing_to_match_is_an_error_at_trace_time():
    with pytest.raises(ValueError, match=r"weights of two or more axes.* found shapes \[\[3\], \[\]\]"):
        jax.eval_shape(layerwise_distance, *[{"a": jnp.ones(3), "b": jnp.ones(())}] * 2)


def test_distance_has_a_finite_derivative_where_a_gradient_vanishes():
    real, zero = {"kernel": jnp.ones((3, 2))}, {"kernel": jnp.zeros((3, 2)).at[0, 1].set(1.0)}
    slope = jax.grad(lambda syn: layerwise_distance(real, syn))(zero)["kernel"]
    assert np.all(np.isfinite(slope)) and np.any(slope[:, 1] != 0)


def test_loss_is_the_sum_of_the_distances_of_the_classes_gradients():
    real, syn = batches()
    params = init(jax.random.key(1))
    augmented = jax.jit(lambda key, images: dsa(key, NORMAL(images), AUGMENT, siamese=True))
    expected = 0.0
    for label, key in enumerate(jax.random.split(KEY, CLASSES)):
        gradients = []
        for images in (real[label].astype(jnp.float32) / 255, syn[label]):
            gradients.append(slope_of_cross_entropy(params, augmented(key, images), jnp.full(len(images), label)))
        expected += distance(*gradients)
    assert expected > 1
    np.testing.assert_allclose(slope_of_loss(syn, real, params)[0], expected, rtol=1e-4)


def test_chunks_of_classes_change_nothing():
    real, syn = batches()
    params = init(jax.random.key(1))
    wanted = slope_of_loss(syn, real, params)
    found = slope_of_loss(syn, real, params, class_chunk=1)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], wanted[1], rtol=0, atol=2e-5 * np.abs(wanted[1]).max())


@functools.partial(jax.jit, static_argnames="spec")
def train(params, images, labels, spec):
    settings = {"network": NETWORK, "augment": NO_AUGMENT, "whitening": NORMAL}
    return train_between(KEY, params, images, labels, spec=spec, **settings)


def test_a_full_batch_epoch_is_one_step_of_gradient_descent():
    rng = np.random.default_rng(2)
    images, labels = jnp.asarray(rng.uniform(size=(6, *SHAPE)), jnp.float32), jnp.arange(6) % CLASSES
    params = init(jax.random.key(4))
    for batch in (6, 256):
        spec = GradientSpec(inner_loop=2, net_lr=0.1, net_batch=batch)
        found = train(params, images, labels, spec)
        wanted = params
        for _ in range(2):
            slope = slope_of_cross_entropy(wanted, NORMAL(images), labels)
            wanted = jax.tree.map(lambda p, g: p - 0.1 * g, wanted, slope)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_an_epoch_visits_every_image_in_batches_of_one_size():
    # With one image of another class, the bias of that class moves up only in the batches that hold it.
    images, labels = jnp.zeros((5, *SHAPE)), jnp.arange(5) % CLASSES
    params = init(jax.random.key(4))
    moved = train(params, images, labels, GradientSpec(inner_loop=1, net_lr=1e-3, net_batch=2))
    shift = np.asarray(moved["linear"]["bias"] - params["linear"]["bias"]) / 1e-3
    # Three steps of two images, each image once and one of them twice: sums of (one hot - softmax) / 2.
    weights = jax.nn.softmax(NETWORK.apply(params, NORMAL(images[:1]))[0])[0]
    counts = (shift + 3 * weights) * 2
    np.testing.assert_allclose(counts.sum(), 6, atol=1e-2)
    assert np.all(np.abs(counts - np.round(counts)) < 2e-2)
    assert np.all(np.round(counts) - np.bincount(labels) >= 0)


def test_loops_follow_the_budget_unless_they_are_given():
    assert [(s.outer_loop, s.inner_loop) for s in map(GradientSpec().for_ipc, (0.5, 1, 2, 10, 11, 50, 100))] == [
        (1, 1), (1, 1), (1, 1), (10, 50), (10, 50), (50, 10), (50, 10),
    ]  # fmt: skip
    given = GradientSpec(outer_loop=3).for_ipc(10)
    assert (given.outer_loop, given.inner_loop) == (3, 50)


@pytest.fixture(scope="module")
def setting():
    full = data.load(data.DataSpec(per_class=20, test_limit=10))
    keep = full.train_labels < CLASSES
    images, labels = full.train_images[keep], full.train_labels[keep]
    on_device = Data(NORMAL, hold(images, labels, CLASSES), {})
    codec = codecs.make(
        PixelSpec(images_per_class=GPC),
        image_shape=SHAPE,
        num_classes=CLASSES,
        bytes_per_class=GPC * 4 * int(np.prod(SHAPE)),
    )
    chosen = np.concatenate([np.flatnonzero(labels == label)[:GPC] for label in range(CLASSES)])
    params = codec.init(KEY, jnp.asarray(images[chosen], jnp.float32) / 255)
    return codec, params, on_device


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_network_lives_for_its_iterations_and_learns_in_between(setting):
    codec, params, on_device = setting
    spec = GradientSpec(batch_real=4, outer_loop=3, inner_loop=2, net_lr=0.1)
    objective = match.make(spec, codec=codec, network=NETWORK, augment=AUGMENT)
    step, states = jax.jit(distillation.make_step(objective)), [distillation.init_state(objective, params)]
    for _ in range(4):
        states.append(step(states[-1], on_device, KEY)[0])
    states = states[1:]

    @jax.jit
    def fit(state):
        images = NORMAL(codec.decode(state.params))
        return cross_entropy(state.carry.params, images, jnp.repeat(jnp.arange(CLASSES), GPC))

    losses = [float(fit(state)) for state in states]
    # Trained after the first and second iteration; the third leaves it as it was; then another is born.
    assert losses[1] < losses[0] and abs(losses[2] - losses[1]) < 0.05
    assert bits(states[1].carry.params) == bits(states[2].carry.params)
    assert bits(states[2].carry.params) != bits(states[3].carry.params)
    assert losses[3] > losses[2]
    # One iteration carries none.
    single = dataclasses.replace(spec, outer_loop=1, inner_loop=1)
    assert match.make(single, codec=codec, network=NETWORK, augment=AUGMENT).init()[1] == ()


def test_loops_must_be_filled_in(setting):
    with pytest.raises(ValueError, match=r"objective: outer_loop and inner_loop are 0; GradientSpec.for_ipc"):
        match.make(GradientSpec(outer_loop=2), codec=setting[0], network=NETWORK)
