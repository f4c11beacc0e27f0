import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsdd_jax import codecs, data, match, whiten
from gsdd_jax.augment import DsaSpec, dsa
from gsdd_jax.match.trajectory import (
    MIN_SYN_LR,
    TrajectorySpec,
    flattener,
    student_batches,
    trajectory_loss,
)
from gsdd_jax.nets import NetSpec, build

SHAPE, CLASSES, N = (8, 8, 1), 10, 10
NETWORK = build(NetSpec(depth=1, width=4), SHAPE, CLASSES)
P = NETWORK.num_params
# An operation whose draw always does something; each more takes a second to compile.
AUGMENT = DsaSpec(strategy="color")
SPEC = TrajectorySpec(syn_steps=2, batch_syn=4)
MEAN, STD = jnp.full(1, 0.3), jnp.full(1, 0.4)
KEY = jax.random.key(3)
NORMAL = whiten.MeanStd(MEAN, STD)


@pytest.fixture(scope="module")
def digits():
    dataset = data.load(data.DataSpec(source="digits", per_class=1))
    return jnp.asarray(dataset.train_images, jnp.float32) / 255, jnp.asarray(dataset.train_labels)


@pytest.fixture(scope="module")
def weights():
    """Three starts and targets, `[3, p]` each, a small step apart as those of an expert are."""
    initial = jax.jit(lambda key: flattener(NETWORK)[0](NETWORK.init(key)))
    start = jnp.stack([initial(jax.random.key(seed)) for seed in range(3)])
    return start, start + 0.02 * jax.random.normal(jax.random.key(9), start.shape)


def objective(spec=SPEC, augment=AUGMENT, loss=trajectory_loss, whitening=NORMAL):
    """`(key, syn, labels, syn_lr, start, target) -> (loss, metrics), (slope in syn, slope in syn_lr)`, jitted."""
    bound = partial(loss, network=NETWORK, augment=augment, whitening=whitening, spec=spec)
    return jax.jit(jax.value_and_grad(bound, argnums=(1, 3), has_aux=True))


@pytest.fixture(scope="module")
def two_steps():
    return objective()


@pytest.fixture(scope="module")
def one_step():
    return objective(TrajectorySpec(syn_steps=1), DsaSpec(strategy="none"))


def unrolled(key, syn, labels, syn_lr, start, target, *, network, augment, whitening, spec):
    """The loss of one segment as the paper writes it: a Python loop, nothing recomputed, no flat weights."""
    unflatten = flattener(network)[1]
    key_batches, key_augment = jax.random.split(key)
    batches = student_batches(key_batches, len(syn), spec=spec)
    first, params = unflatten(start), unflatten(start)
    for t in range(spec.syn_steps):
        chosen = jnp.arange(len(syn)) if batches is None else batches[t]
        x = dsa(jax.random.fold_in(key_augment, t), whitening(syn[chosen]), augment)

        def cross_entropy(params, x=x, chosen=chosen):
            logits, _ = network.apply(params, x)
            picked = jnp.take_along_axis(logits, labels[chosen][:, None], 1)[:, 0]
            return jnp.mean(jnp.log(jnp.sum(jnp.exp(logits), 1)) - picked)

        grads = jax.grad(cross_entropy)(params)
        params = jax.tree.map(lambda p, g: p - syn_lr * g, params, grads)
    moved = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, unflatten(target))
    apart = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), first, unflatten(target))
    return sum(jax.tree.leaves(moved)) / sum(jax.tree.leaves(apart)), {}


def doubled(*arrays):
    return [jnp.asarray(np.asarray(a, np.float64)) for a in arrays]


def test_gradient_is_that_of_float64_finite_differences_and_of_the_unrolled_student(digits, weights):
    with jax.enable_x64(True):
        syn, start, target = doubled(digits[0], weights[0][0], weights[1][0])
        whitening = whiten.MeanStd(*doubled(MEAN, STD))
        # One executable for the slopes and all the values.
        both, plain = (objective(loss=loss, whitening=whitening) for loss in (trajectory_loss, unrolled))

        def value(syn, lr):
            return float(both(KEY, syn, digits[1], lr, start, target)[0][0])

        lr = jnp.float64(0.05)
        (loss, _), (slope, slope_lr) = both(KEY, syn, digits[1], lr, start, target)
        assert loss.dtype == jnp.float64
        along = slope / jnp.linalg.norm(slope)
        anywhere = jnp.asarray(np.random.default_rng(0).normal(size=syn.shape))
        h = 1e-6
        for direction in (along, anywhere):
            measured = (value(syn + h * direction, lr) - value(syn - h * direction, lr)) / (2 * h)
            assert measured != 0
            assert float(jnp.sum(slope * direction)) == pytest.approx(measured, rel=1e-5)
        measured = (value(syn, lr + h) - value(syn, lr - h)) / (2 * h)
        assert float(slope_lr) == pytest.approx(measured, rel=1e-6)
        (expected, _), (expected_slope, expected_lr) = plain(KEY, syn, digits[1], lr, start, target)
        assert float(loss) == pytest.approx(float(expected), rel=1e-9)
        assert float(slope_lr) == pytest.approx(float(expected_lr), rel=1e-9)
        np.testing.assert_allclose(slope, expected_slope, rtol=0, atol=1e-9 * np.abs(expected_slope).max())


def test_gradient_without_checkpoint_is_the_same(two_steps, digits, weights):
    held = objective(dataclasses.replace(SPEC, checkpoint=False))
    arguments = (KEY, *digits, jnp.float32(0.05), weights[0][0], weights[1][0])
    (loss, _), (slope, slope_lr) = two_steps(*arguments)
    (expected, _), (expected_slope, expected_lr) = held(*arguments)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert slope_lr == pytest.approx(float(expected_lr), rel=1e-5)
    np.testing.assert_allclose(slope, expected_slope, atol=1e-6 * np.abs(expected_slope).max())


def test_segments_are_the_mean_of_single_ones(two_steps, digits, weights):
    lr = jnp.float32(0.05)
    (loss, metrics), slopes = two_steps(KEY, *digits, lr, *weights)
    singles = [two_steps(KEY, *digits, lr, start, target) for start, target in zip(*weights, strict=True)]
    values = [float(value) for (value, _), _ in singles]
    assert np.ptp(values) > 1e-3  # or the mean would prove nothing
    assert loss == pytest.approx(np.mean(values), rel=1e-5)
    last = np.mean([float(m["student_loss"]) for (_, m), _ in singles])
    assert metrics["student_loss"] == pytest.approx(last, rel=1e-5)
    for place in range(2):
        expected = np.mean([np.asarray(single[1][place]) for single in singles], axis=0)
        np.testing.assert_allclose(slopes[place], expected, atol=1e-5 * np.abs(expected).max())


def peak(spec):
    arguments = (KEY, np.zeros((N, *SHAPE), np.float32), np.zeros(N, np.int32), np.float32(0.01))
    step = objective(spec, DsaSpec(strategy="none"))
    flat = np.zeros((2, P), np.float32)
    return step.lower(*arguments, *flat).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_by_the_flat_weights_of_each_step_and_no_more():
    few, many = (peak(dataclasses.replace(SPEC, syn_steps=steps)) for steps in (4, 16))
    per_step, flat = (many - few) / 12, 4 * P
    # Beside the weights: the batch's indices, the step's loss, and the rounding of buffers to 64 bytes.
    assert flat <= per_step <= flat + 4 * SPEC.batch_syn + 128


def test_only_images_of_some_batch_have_a_gradient(two_steps, digits, weights):
    _, (slope, _) = two_steps(KEY, *digits, jnp.float32(0.05), weights[0][0], weights[1][0])
    seen = np.unique(student_batches(jax.random.split(KEY)[0], N, spec=SPEC))
    assert len(seen) == 8  # of 10
    np.testing.assert_array_equal(np.flatnonzero(np.abs(slope).max((1, 2, 3)) > 0), seen)


@pytest.mark.parametrize(("start", "rate", "first"), [(0, 0.05, -1), (np.nan, 0.05, 0), (0, 1e38, 1)])
def test_first_step_that_is_not_finite_is_reported(two_steps, digits, weights, start, rate, first):
    (_, metrics), _ = two_steps(KEY, *digits, jnp.float32(rate), weights[0][0] + start, weights[1][0])
    assert metrics["bad_step"].dtype == jnp.int32 and metrics["bad_step"] == first


def test_weights_that_only_the_last_step_spoils_are_reported_as_step_t(one_step, digits, weights):
    (_, metrics), _ = one_step(KEY, *digits, jnp.float32(np.inf), weights[0][0], weights[1][0])
    assert metrics["bad_step"] == 1 and np.isfinite(metrics["student_loss"])


def test_batches_are_whole_parts_of_permutations():
    spec = TrajectorySpec(syn_steps=7, batch_syn=4)
    batches = np.asarray(student_batches(KEY, 11, spec=spec))
    assert batches.shape == (7, 4) and batches.dtype == np.int32
    assert batches.min() >= 0 and batches.max() < 11
    for epoch in range(3):  # two batches of four fit into eleven images
        assert len(np.unique(batches[2 * epoch : 2 * epoch + 2])) == batches[2 * epoch : 2 * epoch + 2].size
    assert not np.array_equal(batches[:2], batches[2:4])


@pytest.mark.parametrize("batch_syn", [0, 10, 12])
def test_every_step_sees_all_images_where_a_batch_could_hold_them(batch_syn):
    assert student_batches(KEY, 10, spec=TrajectorySpec(batch_syn=batch_syn)) is None


def test_flattener_inverts_and_has_the_order_of_ravel(weights):
    flatten, unflatten = flattener(NETWORK)
    params = NETWORK.init(jax.random.key(0))
    assert flatten(params).shape == (P,)
    assert jax.tree.structure(unflatten(weights[0][0])) == jax.tree.structure(params)
    np.testing.assert_array_equal(flatten(unflatten(weights[0][0])), weights[0][0])


def test_syn_lr_follows_sgd_with_momentum_and_keeps_above_its_floor():
    codec = codecs.make(codecs.PixelSpec(), image_shape=(8, 8, 1), num_classes=10, bytes_per_class=256)
    objective = match.make(TrajectorySpec(lr_lr=0.1), codec=codec, network=NETWORK)
    optimizer, (learned, carry) = objective.optimizer(), objective.init()
    assert learned["syn_lr"] == np.float32(0.01) and carry == ()
    state = optimizer.init(learned)

    def moved(learned, slope, state):
        update, state = optimizer.update({"syn_lr": jnp.float32(slope)}, state)
        return objective.project({"syn_lr": learned["syn_lr"] + update["syn_lr"]}), update["syn_lr"], state

    learned, _, state = moved(learned, -2.0, state)
    assert learned["syn_lr"] == pytest.approx(0.21)
    learned, update, state = moved(learned, 5.0, state)  # velocity 5 - 0.5 * 2
    assert update == pytest.approx(-0.4)
    assert learned["syn_lr"] == np.float32(MIN_SYN_LR) == np.float32(1e-3)
    assert np.isnan(moved(learned, np.nan, state)[0]["syn_lr"])


def test_fixed_window_and_last_epoch():
    spec = TrajectorySpec(min_start_epoch=4, max_start_epoch=30, expert_epochs=2)
    assert [spec.start_window(i) for i in (0, 10**6)] == [(4, 30)] * 2
    # Starts are 4, ..., 29; the last match ends at 31.
    assert spec.last_epoch == 31


def test_growing_window_is_that_of_datm():
    # DATM, CIFAR-10 at 10 images per class: T-, T, T+ = 0, 10, 20 over 1,000 iterations.
    spec = TrajectorySpec(max_start_epoch=20, first_max_start_epoch=10, expansion_iterations=1000)
    upper = {0: 10, 99: 10, 100: 11, 500: 15, 999: 19, 1000: 20, 5000: 20}
    assert {i: spec.start_window(i)[1] for i in upper} == upper
    assert spec.start_window(0)[0] == 0 and spec.last_epoch == 21


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_start_epoch": 30}, r"objective.min_start_epoch must be below max_start_epoch \(30\), found 30"),
        ({"first_max_start_epoch": 5}, r"must both be set for a growing window, or both 0, found 5 and 0"),
        (
            {"first_max_start_epoch": 3, "expansion_iterations": 9, "min_start_epoch": 3},
            r"objective.first_max_start_epoch must be above min_start_epoch \(3\) .* found 3",
        ),
    ],
)
def test_windows_without_epochs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TrajectorySpec(**fields)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"syn": np.zeros((10, 8, 8))}, ValueError, r"syn: shape \(10, 8, 8\), must be \[n, h, w, c\]"),
        ({"labels": np.zeros(9, np.int32)}, ValueError, r"labels: shape \(9,\), must be \(10,\), one per image"),
        ({"labels": np.zeros(10)}, TypeError, r"labels: float64, must be integers"),
        ({"start": np.zeros(P - 1)}, ValueError, rf"start: shape \({P - 1},\), must be \[{P}\] or \[segments, {P}\]"),
        ({"target": np.zeros((2, P))}, ValueError, rf"target: shape \(2, {P}\), must be that of start, \({P},\)"),
    ],
)
def test_input_that_does_not_fit_is_refused(change, error, message):
    arguments = {
        "syn": np.zeros((N, *SHAPE), np.float32),
        "labels": np.zeros(N, np.int32),
        "start": np.zeros(P),
        "target": np.zeros(P),
    } | change
    with pytest.raises(error, match=message):
        trajectory_loss(
            KEY,
            arguments["syn"],
            arguments["labels"],
            0.01,
            arguments["start"],
            arguments["target"],
            network=NETWORK,
            augment=AUGMENT,
            whitening=NORMAL,
            spec=SPEC,
        )
