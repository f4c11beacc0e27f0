"""Evaluation against NumPy restatements: optimizer, schedule, stream of batches, accuracy; and its contract."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsdd_jax.augment import DsaSpec, cutmix
from gsdd_jax.evaluation import (
    EvalSpec,
    accuracy,
    choose_lr,
    evaluate_networks,
    lr_factor,
    stream_batch,
    stream_start,
    summarize,
    train_network,
)
from gsdd_jax.nets import NetSpec, Network, build
from gsdd_jax.recipes import recipe_for

NO_DSA = DsaSpec(strategy="none")
CONVNET = build(NetSpec(depth=1, width=4, norm="none"), (4, 4, 3), 3)


def linear_apply(params, images):
    features = images.reshape(images.shape[0], -1)
    return features @ params["w"] + params["b"], features


LINEAR = Network(lambda key: {"w": 0.1 * jax.random.normal(key, (12, 3)), "b": jnp.zeros(3)}, linear_apply, 39)


def toy(n, seed=0, size=4):
    """Images of three classes, told apart by their color channel; uint8."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n).astype(np.int32)
    images = rng.integers(0, 120, (n, size, size, 3))
    images[np.arange(n), :, :, labels] += 100
    return images.astype(np.uint8), labels


def softmax_gradients(params, x, y):
    """Gradients of the mean cross entropy of a linear classifier to probabilities, float64."""
    logits = x @ params["w"] + params["b"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p = p / p.sum(1, keepdims=True) - y
    return {"w": x.T @ p / len(y), "b": p.mean(0)}


def in_numpy(params, key, images, labels, spec):
    """Trains LINEAR in float64; batches, CutMix and the factors on the rate are the library's, tested elsewhere."""
    n = len(images)
    batch, steps = min(spec.batch, n), spec.num_steps(n)
    _, key_stream, key_augment = jax.random.split(key, 3)

    @jax.jit
    def stream():
        def cut(order, t):
            return stream_batch(key_stream, order, t, batch=batch)

        return jax.lax.scan(cut, stream_start(key_stream, n), jnp.arange(steps))[1]

    batches = np.asarray(stream())
    factors = np.asarray(
        jax.jit(lambda: lr_factor(jnp.arange(steps), spec.schedule, steps=steps, warmup_steps=spec.warmup_steps))()
    )
    state = {name: [np.zeros_like(value), np.zeros_like(value), 0] for name, value in params.items()}
    average, epochs = None, 0
    for t in range(steps):
        x, y = np.float32(images[batches[t]] / 255), np.eye(3, dtype=np.float32)[labels[batches[t]]]
        if spec.cutmix:
            x, y = map(np.asarray, cutmix(jax.random.fold_in(key_augment, steps + t), x, y, spec.cutmix))
        grads = softmax_gradients(params, x.reshape(batch, -1), y)
        rate = spec.lr * float(factors[t])
        for name, (first, second, count) in state.items():
            g = grads[name] + spec.weight_decay * params[name]
            if spec.schedule == "step" and t == (steps + 1) // 2:
                first, second, count = 0 * first, 0 * second, 0
            if spec.optimizer == "sgd":
                first = spec.momentum * first + g
                direction = first
            else:
                first, second, count = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2, count + 1
                direction = first / (1 - 0.9**count) / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
            params = params | {name: params[name] - rate * direction}
            state[name] = [first, second, count]
        if (t + 1) * batch // n > epochs or t == steps - 1:
            decay = min(1 - 1 / (1 + epochs), spec.ema)
            average = {k: decay * average[k] + (1 - decay) * v for k, v in params.items()} if epochs else params
            epochs += 1
    return average if spec.ema else params


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam", "schedule": "step"},
        {"optimizer": "sgd", "schedule": "warmup_cosine", "ema": 0.995},
        {"optimizer": "sgd", "schedule": "step", "ema": 0.5},
        {"optimizer": "sgd", "schedule": "multistep", "cutmix": 0.7, "warmup_steps": 2},
        {"optimizer": "adam", "schedule": "cosine", "ema": 0.4, "batch": 99},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_training_equals_the_loop_written_in_numpy(settings):
    # Epochs end within batches: 8 steps of 4 images are five epochs of 6, and a part of a sixth.
    images, labels = toy(6, size=2)
    spec = EvalSpec(**{"steps": 8, "batch": 4, "lr": 0.05, "weight_decay": 0.02, **settings})
    key = jax.random.key(3)
    start = LINEAR.init(jax.random.split(key, 3)[0])
    start = {name: np.asarray(value, np.float64) for name, value in start.items()}
    expected = in_numpy(start, key, images, labels, spec)
    trained = train_network(key, images, labels, network=LINEAR, augment=NO_DSA, spec=spec)
    for name in expected:
        assert np.abs(expected[name] - start[name]).max() > 0.02
        np.testing.assert_allclose(trained[name], expected[name], atol=5e-6)


def test_average_begins_with_the_weights_after_the_first_epoch_not_with_the_initial_ones():
    # One weight that only weight decay moves: with rates 0.5 and 0.25 from 8 to 4 and to 3.
    network = Network(lambda key: {"w": jnp.float32(8)}, lambda p, x: (jnp.zeros((x.shape[0], 3)) * p["w"], x), 1)
    spec = EvalSpec(steps=2, lr=0.5, momentum=0.0, weight_decay=1.0, schedule="cosine", ema=0.9)
    trained = train_network(jax.random.key(0), *toy(5, size=2), network=network, spec=spec, augment=NO_DSA)
    np.testing.assert_allclose(trained["w"], 3.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "warmup", "steps", "expected"),
    [
        ("step", 0, 5, [1, 1, 1, 0.1, 0.1]),
        ("step", 3, 8, [1 / 3, 2 / 3, 1, 1, 0.1, 0.1, 0.1, 0.1]),
        ("constant", 2, 3, [0.5, 1, 1]),
        ("multistep", 0, 6, [1, 1, 1, 1, 0.2, 0.04]),
        ("cosine", 2, 6, [0.5, 1, 1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
    ],
)
def test_learning_rate_follows_hand_values(schedule, warmup, steps, expected):
    factors = lr_factor(jnp.arange(steps), schedule, steps=steps, warmup_steps=warmup)
    np.testing.assert_allclose(factors, expected, atol=1e-6)


def test_glad_schedule_rises_to_half_time_and_follows_a_cosine_down():
    # What PyTorch's LinearLR, then CosineAnnealingLR give over GLaD's 1000 epochs.
    schedule = "warmup_cosine"
    expected = {0: 1e-7, 250: 0.5, 499: 0.998, 500: 1, 501: 1, 750: 0.50314, 900: 0.0973, 999: 3.948e-5}
    factors = lr_factor(jnp.array(list(expected)), schedule, steps=1000)
    np.testing.assert_allclose(factors, list(expected.values()), rtol=1e-3)
    for steps, few in ((1, [1e-7]), (4, [1e-7, 0.5, 1, 1])):
        np.testing.assert_allclose(lr_factor(jnp.arange(steps), schedule, steps=steps), few, atol=1e-6)
    with pytest.raises(ValueError, match="evaluate.warmup_steps: 5, must be 0 with schedule warmup_cosine"):
        EvalSpec(schedule=schedule, warmup_steps=5)


RUN = EvalSpec(epochs=7, steps=70, batch=5, lr=0.3, momentum=0.1, weight_decay=0.2, warmup_steps=4, seeds=9, parallel=3)


@pytest.mark.parametrize(
    ("network", "gsdd", "glad"),
    [
        ("convnet", 1e-2, 1e-3),
        ("alexnet", 1e-3, 1e-3),
        ("vgg11", 1e-2, 1e-4),
        ("resnet18", 1e-2, 1e-3),
        ("vit", 5e-5, 1e-3),
    ],
)
def test_recipes_are_those_of_their_sources_and_leave_the_rest_to_the_run(network, gsdd, glad):
    assert recipe_for("config", network, RUN) is RUN
    expected = dataclasses.replace(RUN, optimizer="adam", lr=gsdd, schedule="cosine", warmup_steps=0, seeds=3)
    assert recipe_for("gsdd", network, RUN) == expected
    expected = EvalSpec(batch=256, lr=glad, schedule="warmup_cosine", ema=0.995, parallel=3)
    assert recipe_for("glad", network, RUN) == expected
    expected = EvalSpec(epochs=1500, batch=64, schedule="multistep", cutmix=0.5, seeds=9, parallel=3)
    assert recipe_for("dance", network, RUN) == expected
    assert expected.num_steps(64) == 1500 and (expected.momentum, expected.weight_decay) == (0.9, 5e-4)
    assert EvalSpec(epochs=3, batch=4).num_steps(10) == 8  # ceil(30 / 4)
    assert EvalSpec(epochs=3, batch=4, steps=7).num_steps(10) == 7


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (7, 7), (5, 1)])
def test_stream_covers_every_image_once_per_epoch(n, batch):
    key = jax.random.key(n)
    steps = 4 * n

    def step(order, t):
        return stream_batch(key, order, t, batch=batch)

    _, batches = jax.jit(lambda: jax.lax.scan(step, stream_start(key, n), jnp.arange(steps)))()
    epochs = np.asarray(batches).reshape(-1, n)
    assert batches.shape == (steps, batch) and batches.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.broadcast_to(np.arange(n), epochs.shape))
    assert len(np.unique(epochs, axis=0)) > len(epochs) / 2


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def evaluate(*given, **settings):
    return evaluate_networks(*given, **settings).accuracies


LINEAR_4 = Network(lambda key: {"w": 0.1 * jax.random.normal(key, (48, 3)), "b": jnp.zeros(3)}, linear_apply, 147)


def test_training_is_a_function_of_its_key_and_augmentation():
    images, labels = toy(20)
    settings = {"network": LINEAR_4, "spec": EvalSpec(steps=6, batch=8, lr=0.1)}
    first, second, other, plain = (
        leaves(train_network(jax.random.key(seed), images, labels, augment=augment, **settings))
        for seed, augment in ((0, DsaSpec()), (0, DsaSpec()), (1, DsaSpec()), (0, NO_DSA))
    )
    for a, b, c, d in zip(first, second, other, plain, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(a - c).max() > 1e-3 and np.abs(a - d).max() > 1e-4


def test_whitening_of_batches_equals_whitened_images():
    images, labels = toy(20)
    whitening = {"mean": jnp.float32(0.4), "std": jnp.array([0.2, 0.5, 0.3])}

    def transform(params, x):
        return (x - params["mean"]) / params["std"]

    settings = {"network": LINEAR_4, "spec": EvalSpec(steps=5, batch=8, lr=0.1), "augment": DsaSpec(strategy="crop")}
    whitened = transform(whitening, images / np.float32(255))
    inside = {"whitening": jax.tree_util.Partial(transform, whitening)}
    a = train_network(jax.random.key(0), images, labels, **settings, **inside)
    b = train_network(jax.random.key(0), whitened, labels, **settings)
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    scores = accuracy(a, images, labels, network=LINEAR_4, **inside), accuracy(a, whitened, labels, network=LINEAR_4)
    assert scores[0] == scores[1] > 0.4


def test_accuracy_counts_every_image_once_for_any_batch():
    images, labels = toy(23, size=2)
    params = jax.jit(LINEAR.init)(jax.random.key(1))
    logits = images.reshape(23, -1) / 255 @ np.asarray(params["w"], np.float64)
    expected = np.mean(logits.argmax(1) == labels)
    assert 0 < expected < 1
    for batch in (1, 10, 500):
        result = accuracy(params, images, labels, network=LINEAR, batch=batch)
        assert result.dtype == jnp.float32 and result.shape == ()
        np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_test_images_are_counted_class_by_class():
    images, labels = toy(23, size=2)
    keys = jax.random.split(jax.random.key(1), 3)
    for parallel in (1, 3):
        spec = EvalSpec(steps=1, batch=4, parallel=parallel)
        given = (keys, images[:9], labels[:9], images, labels)
        settings = {"network": LINEAR, "spec": spec, "augment": NO_DSA, "lr": 0.0}
        found = evaluate_networks(*given, **settings)
        for key, hits in zip(keys, np.asarray(found.hits), strict=True):
            params = train_network(key, images[:9], labels[:9], **settings)
            right = labels[(images.reshape(23, -1) / 255 @ np.asarray(params["w"], np.float64)).argmax(1) == labels]
            assert hits.tolist() == np.bincount(right, minlength=3).tolist()
        # The share of all images.
        assert found.accuracies.tolist() == (np.asarray(found.hits).sum(1).astype(np.float32) / np.float32(23)).tolist()


def test_evaluate_and_choose_lr_compile_once_for_all_networks_calls_and_rates():
    traces = []

    def transform(params, x):
        traces.append(x.shape)
        return x - params

    def settings(by, **changes):
        shift = jax.tree_util.Partial(transform, jnp.float32(by))
        spec = dataclasses.replace(EvalSpec(steps=3, batch=8), **changes)
        return {"network": LINEAR_4, "augment": NO_DSA, "whitening": shift, "spec": spec}

    data = (*toy(20), *toy(30, seed=1))
    keys = jax.random.split(jax.random.key(0), 3)
    evaluate(keys, *data, **settings(0.5))
    count = len(traces)
    assert count >= 2  # training and testing
    evaluate(keys[:2], *(x.copy() for x in data), **settings(0.1))
    evaluate(keys, *data, **settings(0, lr=0.7, seeds=2))
    choose_lr(keys[0], *data, [0.1, 0.2, 0.3], **settings(0))
    assert len(traces) == count
    evaluate(keys, *data, **settings(0, steps=4))
    assert len(traces) > count


def test_evaluate_gives_the_same_results_one_by_one_and_in_parallel():
    images, labels = toy(30)
    data = (images, labels, *toy(200, seed=1))
    keys = jax.random.split(jax.random.key(2), 4)
    settings = {"network": LINEAR_4, "spec": EvalSpec(steps=8, batch=8, lr=0.1), "augment": DsaSpec(strategy="flip")}
    single = np.asarray(evaluate(keys, *data, **settings))
    # Three and then one.
    spec = dataclasses.replace(settings["spec"], parallel=3)
    grouped = np.asarray(evaluate(keys, *data, **settings | {"spec": spec}))
    assert len(set(single.tolist())) > 1
    np.testing.assert_allclose(single, grouped, atol=0.011)  # rounding may turn two of 200 images
    trained = train_network(keys[1], images, labels, **settings)
    assert accuracy(trained, *data[2:], network=LINEAR_4) == single[1]


def test_choose_lr_picks_the_rate_that_does_best_on_the_held_out_images():
    images, labels = toy(60)
    lr, table = choose_lr(
        jax.random.key(0),
        images,
        labels,
        *toy(100, seed=1),
        [1e-6, 0.1, 1e4],
        networks=2,
        network=LINEAR_4,
        spec=EvalSpec(steps=60, batch=32),
        augment=NO_DSA,
    )
    assert lr == 0.1 and set(table) == {1e-6, 0.1, 1e4} and all(isinstance(value, float) for value in table.values())
    assert table[0.1] > 0.9 > max(table[1e-6], table[1e4])


def test_diverged_networks_have_no_accuracy_and_their_rate_is_not_chosen():
    images, labels = toy(20)
    data = (images, labels, *toy(10, seed=1))
    keys = jax.random.split(jax.random.key(0), 2)
    settings = {"network": LINEAR_4, "spec": EvalSpec(steps=4, batch=8), "augment": NO_DSA}
    assert np.isnan(evaluate(keys, *data, **settings, lr=1e30)).all()
    lr, table = choose_lr(keys[0], *data, [1e30, 0.01], **settings)
    assert lr == 0.01 and np.isnan(table[1e30]) and np.isfinite(table[0.01])
    with pytest.raises(ValueError, match=r"lrs: \[1e\+30\], networks diverge with each of them; lower rates"):
        choose_lr(keys[0], *data, [1e30], **settings)
    result = summarize([0.5, float("nan"), 0.25], [0, 1, 2])
    assert np.isnan([result["mean"], result["std"]]).all() and result["n"] == 3


def test_summary_is_plain_and_uses_the_sample_deviation():
    result = summarize(jnp.array([0.5, 0.75, 1.0]), [3, 4, 5])
    assert result == {"mean": 0.75, "std": 0.25, "n": 3, "seeds": [3, 4, 5]}
    assert type(result["mean"]) is type(result["std"]) is float
    assert summarize([0.5], [7]) == {"mean": 0.5, "std": 0.0, "n": 1, "seeds": [7]}


IMAGES, LABELS = toy(4)
KEYS = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
GIVEN = {"network": CONVNET, "spec": EvalSpec(), "augment": NO_DSA}


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[0], LABELS, r"images: found uint8 of shape \[4, 4, 3\]; expected \[n, h, w, c\]"),
        (IMAGES[:0], LABELS[:0], r"images: found uint8 of shape \[0, 4, 4, 3\]; expected .*none of them 0"),
        (IMAGES.astype(np.int32), LABELS, "images: found int32 of shape .*uint8 .* or floating point"),
        (IMAGES, LABELS[:3], r"labels: shape \(3,\), must be \(4,\), one per image"),
        (IMAGES, LABELS.astype(np.float32), "labels: float32, must be integers"),
    ],
)
def test_data_that_do_not_fit_are_refused(images, labels, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        train_network(KEYS, images, labels, **GIVEN)
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        accuracy({}, images, labels, network=CONVNET)
    with pytest.raises((ValueError, TypeError), match=f"^test_{message}"):
        evaluate(KEYS, IMAGES, LABELS, images, labels, **GIVEN)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data: evaluate(jax.random.key(0), *data, **GIVEN), r"keys: shape \(\), must be \[s\]"),
        (lambda data: accuracy({}, *data[:2], network=CONVNET, batch=0), "batch: 0, must be at least 1"),
        (lambda data: choose_lr(KEYS, *data, [0.1, -1], **GIVEN), r"lrs: \[0.1, -1\], must be one or more positive"),
        (lambda data: choose_lr(KEYS, *data, [0.1], networks=0, **GIVEN), "networks: 0, must be at least 1"),
        (lambda data: summarize([0.1, 0.2], [1]), "accuracies: 2 of them, must be at least 1 and one per seed"),
        (lambda data: recipe_for("mtt", "vit", RUN), "recipe: 'mtt', must be one of config, gsdd, glad, dance"),
        (lambda data: recipe_for("glad", "lenet", RUN), "network: 'lenet', recipe glad is for one of convnet, alexnet"),
    ],
)
def test_settings_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call((IMAGES, LABELS, IMAGES, LABELS))
