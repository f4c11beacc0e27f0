import dataclasses
import fcntl
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsdd_jax import data
from gsdd_jax.augment import DsaSpec, cutmix, dsa
from gsdd_jax.experts import (
    MANIFEST,
    Experts,
    ExpertSpec,
    Origin,
    Segments,
    expert_keys,
    train_epoch,
    train_experts,
)
from gsdd_jax.match.trajectory import TrajectorySpec, flattener
from gsdd_jax.nets import NetSpec, Network

OBJECTIVE = TrajectorySpec(syn_steps=2, max_start_epoch=3, expert_epochs=2)
EPOCHS = 4
SPEC = ExpertSpec(count=5, batch=16, lr=0.05, group=2)
AUGMENT = DsaSpec(strategy="color")
NONE = DsaSpec(strategy="none")
FULL = {"epochs": EPOCHS, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "cosine", "cutmix": 0.5}

SHIFTED = jax.tree_util.Partial(lambda shift, x: x - shift, jnp.float32(0.5))


@pytest.fixture(scope="module")
def digits():
    return data.load(data.DataSpec(source="digits", per_class=4))


@pytest.fixture(scope="module")
def origin(digits):
    return Origin(
        network=NetSpec(depth=1, width=4),
        image_shape=digits.image_shape,
        num_classes=10,
        dataset=digits.fingerprint(),
        whiten="none",
        augment=AUGMENT,
    )


def train(path, digits, origin, spec=SPEC, objective=OBJECTIVE, **settings) -> Experts:
    return train_experts(
        path, digits.train_images, digits.train_labels, origin=origin, spec=spec, objective=objective, **settings
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits, origin) -> Path:
    """Five experts; never written to."""
    path = tmp_path_factory.mktemp("experts")
    train(path, digits, origin)
    return path


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """The same five, to be damaged."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def opened(folder, origin) -> Experts:
    return Experts.open(folder, origin=origin, spec=SPEC, objective=OBJECTIVE)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def linear(pixels: int, classes: int) -> Network:
    """Softmax regression, whose training NumPy can follow."""

    def apply(params, images):
        flat = images.reshape(len(images), -1)
        return flat @ params["kernel"] + params["bias"], flat

    def init(key):
        return {"bias": jnp.zeros(classes), "kernel": 0.1 * jax.random.normal(key, (pixels, classes))}

    return Network(init, apply, pixels * classes + classes)


RECIPE = {"momentum": 0.8, "weight_decay": 0.1, "epochs": 2}


@pytest.mark.parametrize(
    ("n", "settings", "factors"),
    [
        (10, {"batch": 4}, [1] * 6),
        (10, {"batch": 5, "schedule": "multistep", **RECIPE}, [1, 1, 1, 0.2]),
        (3, {"batch": 8, "schedule": "cosine", **RECIPE}, [1, 0.5]),
    ],
)
def test_epochs_are_sgd_over_permutations_with_a_short_last_batch(n, settings, factors):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (n, 2, 3, 1), np.uint8)
    labels = random.integers(0, 4, n).astype(np.int32)
    network = linear(6, 4)
    flatten, unflatten = flattener(network)
    theta = flatten(network.init(jax.random.key(1)))
    key, lr, spec = jax.random.key(2), 0.3, ExpertSpec(**settings)
    state = spec.optimizer().init(theta)

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), unflatten(theta))
    velocity = {"kernel": 0.0, "bias": 0.0}
    rates = iter(lr * np.array(factors))
    for epoch in range(2):
        order = np.asarray(jax.random.permutation(jax.random.split(jax.random.fold_in(key, epoch))[0], n))
        losses = []
        for first in range(0, n, spec.batch):
            chosen = order[first : first + spec.batch]
            x = (images[chosen] / 255 - 0.5).reshape(len(chosen), -1)
            logits = x @ params["kernel"] + params["bias"]
            soft = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            losses += list(-np.log(soft[np.arange(len(chosen)), labels[chosen]]))
            error = (soft - np.eye(4)[labels[chosen]]) / len(chosen)
            rate = next(rates)
            for name, gradient in (("kernel", x.T @ error), ("bias", error.sum(0))):
                velocity[name] = spec.momentum * velocity[name] + gradient + spec.weight_decay * params[name]
                params[name] = params[name] - rate * velocity[name]
        theta, state, loss = train_epoch(
            theta,
            state,
            key,
            epoch,
            jnp.asarray(images),
            jnp.asarray(labels),
            lr,
            network=network,
            augment=NONE,
            spec=spec,
            whitening=SHIFTED,
        )
        np.testing.assert_allclose(theta, flatten(params), rtol=1e-5, atol=1e-6)
        assert loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert next(rates, None) is None


def test_epoch_augments_and_mixes_each_batch_with_keys_of_its_own():
    images = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (4, 4, 4, 1)), jnp.float32)
    seen = []
    network = linear(16, 2)

    def apply(params, x):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x, ordered=True)
        return network.apply(params, x)

    key = jax.random.key(5)
    theta = flattener(network)[0](network.init(key))
    spying = Network(network.init, apply, network.num_params)
    labels = jnp.array([0, 1, 1, 0])
    spec = ExpertSpec(batch=2, cutmix=1.0)
    state = spec.optimizer().init(theta)
    train_epoch(theta, state, key, 0, images, labels, 0.1, network=spying, augment=AUGMENT, spec=spec)
    jax.effects_barrier()
    key_order, key_augment = jax.random.split(jax.random.fold_in(key, 0))
    order = jax.random.permutation(key_order, 4)
    assert len(seen) >= 2
    for t in range(2):
        expected = dsa(jax.random.fold_in(key_augment, t), images[order[2 * t : 2 * t + 2]], AUGMENT)
        mixed, _ = cutmix(jax.random.fold_in(key_augment, 2 + t), expected, jnp.zeros((2, 2)), 1.0)
        assert any(np.allclose(x, mixed, atol=1e-6) for x in seen)


def test_rows_are_the_initialization_and_the_weights_after_each_epoch(opened, digits, origin):
    network = origin.build()
    key_init, key_train = expert_keys(SPEC.seed, range(3, 4))
    theta = jax.jit(lambda key: flattener(network)[0](network.init(key)))(key_init[0])
    np.testing.assert_array_equal(opened.row(3, 0), theta)
    step = jax.jit(
        lambda theta, epoch: train_epoch(
            theta,
            SPEC.optimizer().init(theta),  # without momentum nothing is carried over
            key_train[0],
            epoch,
            jnp.asarray(digits.train_images),
            jnp.asarray(digits.train_labels),
            SPEC.lr,
            network=network,
            augment=AUGMENT,
            spec=SPEC,
        )[0]
    )
    for epoch in range(EPOCHS):
        theta = step(theta, epoch)
        np.testing.assert_allclose(opened.row(3, epoch + 1), theta, atol=1e-6)
    assert np.abs(theta - opened.row(3, 0)).max() > 0.01


def test_method_and_group_change_an_expert_by_rounding_only(tmp_path, opened, digits, origin):
    spec = dataclasses.replace(SPEC, method="vmap", group=5)
    other = train(tmp_path, digits, origin, spec)
    for expert in (0, 3, 4):
        np.testing.assert_array_equal(other.row(expert, 0), opened.row(expert, 0))
        np.testing.assert_allclose(other.row(expert, EPOCHS), opened.row(expert, EPOCHS), atol=1e-5)


def test_training_killed_at_an_epoch_continues_to_the_same_bits(tmp_path, digits, origin):
    class KilledError(Exception):
        pass

    trained, stop = [], (range(2, 3), 1)

    def kill(group, epoch, losses):
        if (group, epoch) == stop:
            raise KilledError

    spec = dataclasses.replace(SPEC, count=3, **FULL)
    folder, killed = tmp_path / "whole", tmp_path / "killed"
    train(folder, digits, origin, spec)
    with pytest.raises(KilledError):
        train(killed, digits, origin, spec, on_epoch=kill)
    assert contents(killed) != contents(folder)
    train(killed, digits, origin, spec, on_epoch=lambda group, *_: trained.append(group))
    assert contents(killed) == contents(folder)
    assert trained[0] == stop[0]  # what was finished is not trained again


def test_finished_experts_are_left_alone_and_more_can_be_added(copy, digits, origin):
    before = contents(copy)
    calls = []
    train(copy, digits, origin, on_epoch=lambda *call: calls.append(call))
    assert contents(copy) == before and not calls
    more = train(copy, digits, origin, dataclasses.replace(SPEC, count=6))
    assert more.count == 6 and np.isfinite(more.row(5, EPOCHS)).all()
    assert all(contents(copy)[name] == before[name] for name in before if name != MANIFEST)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": NetSpec(depth=2, width=4)}, r"network.depth: expected 2, found 1 \(and \d more\)"),
        ({"dataset": "abc"}, r"dataset: expected 'abc', found '[0-9a-f]{64}'; name another folder"),
        ({"augment": NONE}, r"augment.strategy: expected 'none', found 'color'"),
        ({"lr": 0.01}, r"experts.lr: expected 0.01, found 0.05"),
        ({"schedule": "cosine", "epochs": 4}, r"experts.epochs: expected 4, found 0 \(and 1 more\)"),
    ],
)
def test_experts_of_another_origin_or_training_are_refused_in_one_line(folder, digits, origin, change, message):
    fields = {field.name for field in dataclasses.fields(ExpertSpec)}
    spec = dataclasses.replace(SPEC, **{k: v for k, v in change.items() if k in fields})
    other = dataclasses.replace(origin, **{k: v for k, v in change.items() if k not in fields})
    for use in (
        lambda: Experts.open(folder, origin=other, spec=spec, objective=OBJECTIVE),
        lambda: train(folder, digits, other, spec),
    ):
        with pytest.raises(ValueError, match=f"these experts do not belong to this run: {message}") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_folders_from_before_a_setting_hold_experts_of_its_default(copy, digits, origin):
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["origin"]["experts"] = {name: manifest["origin"]["experts"][name] for name in ("batch", "lr", "seed")}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    before = contents(copy)
    train(copy, digits, origin)
    assert contents(copy) == before
    with pytest.raises(ValueError, match=r"experts.cutmix: expected 0.5, found 0.0; name another"):
        train(copy, digits, origin, dataclasses.replace(SPEC, cutmix=0.5))


def test_number_of_epochs_may_be_that_of_the_experts_and_must_be_where_the_rate_falls(tmp_path, digits, origin):
    spec = dataclasses.replace(SPEC, count=1, epochs=EPOCHS + 1)
    assert train(tmp_path, digits, origin, spec).epochs == EPOCHS + 1
    with pytest.raises(ValueError, match="max_start_epoch may be up to 2, or train others"):
        train(tmp_path / "few", digits, origin, dataclasses.replace(spec, epochs=2 + 1))
    with pytest.raises(ValueError, match="experts.epochs: 0, must be at least 1 with schedule cosine"):
        ExpertSpec(schedule="cosine")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"max_start_epoch": 4},
            "max_start_epoch 4 with expert_epochs 2 reaches epoch 5, but these experts end at epoch 4; "
            "objective.max_start_epoch may be up to 3, or train others in another folder",
        ),
        ({"expert_epochs": 5}, "reaches epoch 7, but these experts end at epoch 4; no window fits"),
    ],
)
def test_a_window_past_the_last_epoch_is_refused(folder, digits, origin, opened, fields, message):
    longer = dataclasses.replace(OBJECTIVE, **fields)
    for use in (
        lambda: Experts.open(folder, origin=origin, spec=SPEC, objective=longer),
        lambda: train(folder, digits, origin, objective=longer),
        lambda: Segments(opened, longer, seed=0),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def truncate(copy):
    file = copy / "experts-00002.npy"
    file.write_bytes(file.read_bytes()[:-4])


def garble(copy):
    (copy / "experts-00002.npy").write_bytes(b"not an array")


def edit(**changes):
    def change(copy):
        manifest = json.loads((copy / MANIFEST).read_text())
        (copy / MANIFEST).write_text(json.dumps(manifest | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda copy: (copy / MANIFEST).unlink(), FileNotFoundError, r"no experts here \(expected manifest.json\)"),
        (lambda copy: (copy / "experts-00002.npy").unlink(), FileNotFoundError, "experts-00002.npy: missing, although"),
        (truncate, ValueError, r"experts-00002.npy: damaged: expected float32 \[2, 5, \d+\] in (\d+) bytes"),
        (garble, ValueError, "experts-00002.npy: damaged header"),
        (lambda copy: (copy / MANIFEST).write_text("{"), ValueError, "manifest.json: damaged manifest"),
        (edit(epochs=5), ValueError, "damaged manifest .*checksums are missing"),
        (edit(format="gsdd_jax experts 9"), ValueError, "format: expected 'gsdd_jax experts 1', found .* 9'"),
    ],
)
def test_damaged_folders_are_refused(copy, origin, damage, error, message):
    damage(copy)
    with pytest.raises(error, match=message):
        Experts.open(copy, origin=origin, spec=SPEC, objective=OBJECTIVE)


def test_a_flipped_bit_is_found_when_its_row_is_read(copy, origin):
    file = copy / "experts-00002.npy"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    experts = Experts.open(copy, origin=origin, spec=SPEC, objective=OBJECTIVE)
    assert experts.row(3, EPOCHS - 1).shape == (experts.num_params,)
    with pytest.raises(ValueError, match="experts-00002.npy: damaged: the checksum of expert 3, epoch 4"):
        experts.row(3, EPOCHS)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda opened: opened.row(5, 0), IndexError, "expert: 5, must be 0 to 4"),
        (lambda opened: opened.row(0, -1), IndexError, "epoch"),
        (lambda opened: Segments(opened, OBJECTIVE, seed=-1), ValueError, r"seed must be in 0 to 2\*\*64 - 1, found"),
        (lambda opened: Segments(opened, OBJECTIVE, seed=0).choice(-1), ValueError, "iteration must be at least 0"),
    ],
)
def test_what_is_out_of_range_is_refused(opened, call, error, message):
    with pytest.raises(error, match=message):
        call(opened)


def test_two_processes_cannot_train_into_one_folder(copy, digits, origin):
    with (copy / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process trains experts there"):
            train(copy, digits, origin)


def test_an_expert_that_diverges_is_named(tmp_path, digits, origin):
    with pytest.raises(ValueError, match="expert 0: weights not finite after epoch 1; lower the experts' lr"):
        train(tmp_path, digits, origin, dataclasses.replace(SPEC, lr=1e38))


def test_segments_are_rows_of_experts_within_the_window(opened):
    spec = dataclasses.replace(OBJECTIVE, segments=3, min_start_epoch=1)
    segments = Segments(opened, spec, seed=4)
    starts, targets = segments.batch(7).swapaxes(0, 1)
    assert starts.shape == targets.shape == (3, opened.num_params) and starts.dtype == np.float32
    for place, (expert, start) in enumerate(segments.choice(7)):
        np.testing.assert_array_equal(starts[place], opened.row(expert, start))
        np.testing.assert_array_equal(targets[place], opened.row(expert, start + 2))
    drawn = {choice for i in range(200) for choice in segments.choice(i)}
    assert drawn == {(expert, start) for expert in range(5) for start in (1, 2)}


def test_segments_follow_a_growing_window(opened):
    spec = dataclasses.replace(OBJECTIVE, first_max_start_epoch=1, expansion_iterations=100)
    segments = Segments(opened, spec, seed=0)
    seen = [
        {start for i in iterations for _, start in segments.choice(i)} for iterations in (range(50), range(99, 150))
    ]
    assert seen == [{0}, {0, 1, 2}]


def test_an_expert_that_stands_still_is_refused(tmp_path, digits, origin):
    still = dataclasses.replace(SPEC, count=1, lr=1e-30)
    experts = train(tmp_path, digits, origin, still)
    with pytest.raises(ValueError, match="expert 0 did not move from epoch"):
        Segments(experts, OBJECTIVE, seed=0).batch(0)
