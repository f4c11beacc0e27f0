"""Federated learning: splits, messages, what is refused, averages, and rounds."""

import dataclasses
import json
import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import ROOT, ends
from flax import linen

import gsdd_jax as gsdd
from gsdd_jax import SynSet, codecs, data, whiten
from gsdd_jax.augment import DsaSpec
from gsdd_jax.nets import NetSpec
from gsdd_jax.training import EvalSpec
from gsdd_jax.uses import archive, federated
from gsdd_jax.uses.federated import AverageSpec, Federation, SetSpec
from gsdd_jax.uses.summary import Learner
from train import federated as command

CLASSES = ("3", "1", "4")
PIXELS = SetSpec(title="pixels", codec=gsdd.Pixels(dtype="uint8", images_per_class=1))


def learner(network) -> Learner:
    return Learner(
        network=network,
        training=EvalSpec(steps=2, batch=4, lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant"),
        augment=DsaSpec(strategy="none"),
        whitening=whiten.Identity(),
    )


SMALL = learner(NetSpec(depth=1, width=4))


def federation(spec, *learners, budget: int = 3000) -> Federation:
    return Federation(spec, learners or (SMALL,), CLASSES, (8, 8, 1), budget)


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load(data.DataSpec(classes=CLASSES, per_class=9, test_limit=30))


def test_dirichlet_split_deals_every_image_once_in_the_shares_that_were_drawn():
    labels = np.array([0, 1, 2] * 40 + [2] * 30)
    parts = federated.dirichlet_split(5, labels, 4, 0.5)
    assert np.sort(np.concatenate(parts)).tolist() == list(range(150))
    rng = np.random.default_rng(5)
    for label, total in enumerate((40, 40, 70)):
        rng.permutation(total)  # the deck
        # Drawn as normalized gamma variables, dealt up to the rounded-down cumulative share.
        gamma = rng.dirichlet([0.5] * 4)
        ends = [0, *(int(gamma[: i + 1].sum() * total) for i in range(3)), total]
        counts = [int((labels[part] == label).sum()) for part in parts]
        assert counts == np.diff(ends).tolist()


def test_small_alpha_leaves_clients_few_classes_and_a_large_one_all():
    labels = np.repeat(np.arange(10), 100)

    def mean_classes(alpha):
        return np.mean(
            [
                len(np.unique(labels[own]))
                for seed in range(5)
                for own in federated.dirichlet_split(seed, labels, 10, alpha)
            ]
        )

    assert mean_classes(0.1) < 5 < 9.9 < mean_classes(100)
    with pytest.raises(ValueError, match="clients and alpha: expected at least 1 and more than 0, found 0 and 1"):
        federated.dirichlet_split(0, labels, 0, 1)


class Linear(linen.Module):
    """Logits without a bias, from zeros."""

    @linen.compact
    def __call__(self, images):
        return linen.Dense(3, use_bias=False, kernel_init=linen.initializers.zeros)(images.reshape(len(images), -1))


def test_average_of_two_linear_models_by_hand(tmp_path, digits):
    agreed = federation(AverageSpec(title="average", rounds=1, epochs=1), learner(Linear()))
    images = np.stack([np.full((8, 8, 1), 255, np.uint8), np.zeros((8, 8, 1), np.uint8)])
    files = {client: tmp_path / str(client) for client in range(2)}
    start = np.zeros(64 * 3, np.float32)
    # A client of four white images of class 0, and one of twelve of class 2.
    for client, (count, label) in enumerate(((4, 0), (12, 2))):
        agreed.send(jax.random.key(client), client, files[client], images[[0] * count], np.full(count, label), start)
    served = agreed.serve(jax.random.key_data(jax.random.key(0)), files, {0: 4, 1: 12}, start, images, np.array([0, 2]))

    def descended(label, steps):
        rows = np.zeros((64, 3))
        for _ in range(steps):
            logits = rows.sum(0)
            share = np.exp(logits - logits.max())
            rows -= 0.1 * (share / share.sum() - np.eye(3)[label])
        return rows

    expected = (4 * descended(0, 1) + 12 * descended(2, 3)) / 16
    np.testing.assert_allclose(served.weights.reshape(64, 3), expected, rtol=1e-5, atol=1e-6)
    # White is of class 2, black has equal logits: of class 0.
    assert served.accuracies == (0.0,) and served.refused == {}


def test_client_sends_the_classes_that_it_has_and_its_bytes_are_those_on_disk(tmp_path, digits):
    agreed = federation(PIXELS)
    own = np.flatnonzero(digits.train_labels == 2)
    agreed.send(jax.random.key(0), 0, tmp_path / "one", digits.train_images[own], digits.train_labels[own], np.zeros(1))
    assert (tmp_path / "one").stat().st_size <= 3000
    images, labels = agreed.read(tmp_path / "one")
    assert images.shape == (1, 8, 8, 1) and labels.tolist() == [2]
    nearest = np.abs(digits.train_images[own] / 255 - images).max((1, 2, 3)).min()
    assert nearest <= 0.5 / 85 + 1e-6
    with pytest.raises(ValueError, match="client 7: expected at least one image of its own, found none"):
        agreed.send(jax.random.key(0), 7, tmp_path / "none", digits.train_images[:0], np.zeros(0, int), np.zeros(1))
    with pytest.raises(ValueError, match="budget: 1050 bytes for 1 classes, .* too few for pixels"):
        federation(PIXELS, budget=1050).send(
            jax.random.key(0), 0, tmp_path / "one", digits.train_images[own], digits.train_labels[own], np.zeros(1)
        )


def made(shape=(8, 8, 1), names=("3", "4"), spec=PIXELS.codec, value=0.5) -> SynSet:
    codec = codecs.make(spec, image_shape=shape, num_classes=len(names))
    params = codec.init(jax.random.key(0), jnp.full((codec.num_images, *shape), value))
    return SynSet(codec, params, 1 << 20, names)


def hostile(path, kind: str) -> None:
    """Writes what a client should not send."""
    if kind == "nothing":
        return
    floats = gsdd.Pixels(images_per_class=1)
    sent = {
        "classes": made(names=("3", "cat")),
        "shape": made(shape=(16, 16, 1)),
        "codec": made(spec=floats),
        "large": made(names=CLASSES, shape=(32, 32, 1)),
    }.get(kind, made())
    archive.append(path, sent)
    if kind == "twice":
        archive.append(path, sent)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    if kind == "text":
        path.write_text("no message")
    if kind == "outside":
        with zipfile.ZipFile(path, "a") as file:
            file.writestr("../../outside", "x")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("nothing", "^no message$"),
        ("cut", "damaged file"),
        ("text", "damaged file"),
        ("outside", "found ../../outside"),
        ("twice", "expected one part"),
        ("classes", "class_names: expected those of 3, 1, 4; found 'cat'"),
        ("shape", r"expected one part, .*\(8, 8, 1\)\); found \[\('pixel', \(16, 16, 1\)\)\]"),
        ("large", "expected at most 3000 bytes, found"),
    ],
)
def test_hostile_message_is_refused_with_its_reason_and_the_round_goes_on(tmp_path, kind, says):
    agreed, files = federation(PIXELS), {4: tmp_path / "good", 9: tmp_path / "bad"}
    archive.append(files[4], made())
    hostile(files[9], kind)
    good, why = agreed.receive(files)
    assert list(good) == [4] and list(why) == [9]
    with pytest.raises(ValueError, match="round: expected a message of at least one client, found none: client 9: "):
        agreed.receive({9: files[9]})
    assert re.search(says, why[9])
    assert kind == "nothing" or str(files[9]) in why[9]


@pytest.mark.parametrize("value", [np.nan, -1e6])
def test_numbers_that_no_image_has_are_refused(tmp_path, value):
    spec = SetSpec(title="floats", codec=gsdd.Pixels(images_per_class=1))
    archive.append(tmp_path / "file", made(spec=spec.codec, value=value))
    with pytest.raises(ValueError, match=f"^{tmp_path}/file: images: expected numbers around 0 to 1"):
        federation(spec).read(tmp_path / "file")
    weights = np.zeros(8, np.float32)
    weights[3] = np.nan
    archive.write_weights(tmp_path / "weights", weights)
    with pytest.raises(ValueError, match="weights: expected finite numbers"):
        archive.read_weights(tmp_path / "weights", 8)
    with pytest.raises(ValueError, match=r"weights: expected float32\[7\], found float32\[8\]"):
        archive.read_weights(tmp_path / "weights", 7)


def test_neighbors_lie_in_the_ball_and_are_the_same_again():
    center = np.arange(50, dtype=np.float32)
    around = federated.Neighbors(center, 2.0, 7)
    rows = np.stack([around.row(i, 0) for i in range(200)])
    away = np.linalg.norm(rows - center, axis=1)
    # Uniform distances: mean 1, and near both ends.
    assert away.max() <= 2.0001 and away.min() < 0.1 < 1.9 < away.max() and 0.85 < away.mean() < 1.15
    np.testing.assert_array_equal(rows[3], federated.Neighbors(center, 2.0, 7).row(3, 0))


def test_rounds_around_the_servers_network_move_it_and_the_pixels(tmp_path, digits):
    spec = dataclasses.replace(PIXELS, steps=2, rounds=2, batch_real=4, radius=1.0)
    split = federated.dirichlet_split(0, digits.train_labels, 2, 1.0)
    first, second = federated.rounds(jax.random.key(0), federation(spec, budget=6000), digits, split, tmp_path)
    assert np.abs(second.served.weights - first.served.weights).max() > 0
    kept = archive.read_weights(tmp_path / "round1" / "server", len(first.served.weights))
    np.testing.assert_array_equal(kept, first.served.weights)
    assert second.up == max((tmp_path / "round1" / f"client{i}").stat().st_size for i in range(2)) <= 3000
    assert second.down == (tmp_path / "round1" / "server").stat().st_size
    # Two steps on batches of 4 per class, and thrice one image of each.
    classes = [len(np.unique(digits.train_labels[own])) for own in split]
    assert second.passes == np.mean([2 * (4 * k + 3 * k) for k in classes])


def test_round_without_any_message_says_so_of_every_client(tmp_path, digits):
    split = federated.dirichlet_split(0, digits.train_labels, 2, 1.0)
    lost = federated.rounds(jax.random.key(0), federation(PIXELS), digits, split, tmp_path, missing=[0, 1])
    with pytest.raises(ValueError, match="found none: client 0: no message; client 1: no message"):
        next(lost)


def test_command_goes_on_without_the_missing_and_the_damaged_and_names_them(tmp_path, capsys):
    config, out = ROOT / "configs" / "federated_digits.yaml", tmp_path / "out"
    smaller = "networks=[{depth: 1, width: 4}, {depth: 1, width: 4, norm: none}]"
    sets = "sets=[{title: real ones, format: raw}]"
    assert ends(command, "--config", config, "--smoke", "--out", out, "averages=[]", sets, smaller) == 0
    shown = capsys.readouterr().err
    assert "client 1: no message" in shown and f"client 2: {out}/0.5-0-0/round0/client2: damaged file" in shown
    (row,) = json.loads((out / "result.json").read_text())["rows"]
    # Two architectures learned from the same files.
    assert len(row["accuracies"][0]) == 2 and row["down"] == 0 < row["up"] <= 4000
    assert "| 0.5 | real ones | 1 |" in (out / "table.md").read_text()
