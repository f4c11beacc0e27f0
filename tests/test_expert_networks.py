"""Distribution matching under trained networks, against NumPy in float64."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from gsdd_jax import expert_networks, pixels, whiten
from gsdd_jax.augment import DsaSpec, dsa
from gsdd_jax.match import DistributionSpec, ExpertNetwork, ExpertNetworks, Source, distribution_loss
from gsdd_jax.match.distribution import draw_key
from gsdd_jax.match.trajectory import flattener
from gsdd_jax.nets import NetSpec, build

CLASSES, SHAPE, KEY = 3, (8, 8, 1), jax.random.key(3)
NETWORK = build(NetSpec(depth=1, width=3), SHAPE, CLASSES)
APPLY = jax.jit(NETWORK.apply)
NONE, ACTIVE = DsaSpec(strategy="none"), DsaSpec(strategy="color_crop_rotate")
NORMAL = whiten.MeanStd(np.full(1, 0.4, np.float32), np.full(1, 0.3, np.float32))
RNG = np.random.default_rng(0)
ROWS = RNG.normal(0, 0.3, (2, 5, NETWORK.num_params)).astype(np.float32)
# Unequal classes; the first is longer than a batch of the test below.
LABELS = np.array([0, 1, 2, 0, 1, 0, 0, 2, 0, 0, 1, 2])
IMAGES = RNG.integers(0, 256, (len(LABELS), *SHAPE), np.uint8)
SYN = RNG.uniform(size=(CLASSES, 2, *SHAPE)).astype(np.float32)


def outputs(weights, images):
    """Logits and flat features in float64, of images in [0,1] or of bytes."""
    found = APPLY(flattener(NETWORK)[1](weights), NORMAL(pixels.as_float(jnp.asarray(images))))
    return [np.asarray(x, np.float64).reshape(len(images), -1) for x in found]


def loss(spec, real, expert, augment=NONE):
    real, expert = jax.tree.map(jnp.asarray, (real, expert))
    settings = {"network": NETWORK, "augment": augment, "whitening": NORMAL, "class_chunk": 2}
    return jax.jit(lambda syn: distribution_loss(KEY, real, syn, spec=spec, expert=expert, **settings))(SYN)


@pytest.fixture
def networks(tmp_path):
    """Those of two experts of four epochs."""
    experts = types.SimpleNamespace(path=tmp_path, count=2, row=lambda expert, epoch: ROWS[expert, epoch])

    def make(augment=NONE, **settings):
        spec = DistributionSpec(**{"networks": "experts", "expert_epochs": 4} | settings)
        source = Source(IMAGES, LABELS, CLASSES, NORMAL)
        return expert_networks.Networks(experts, ExpertNetworks(spec, NETWORK, augment), source, seed=7)

    return make


@pytest.mark.parametrize(
    "settings",
    [
        {"later_epochs": 1, "cross_entropy": 0.7},
        {"cross_entropy": 0.7, "variance": 2.0},
        {"distance": "characteristic", "frequencies": 5},
    ],
    ids=str,
)
def test_the_loss_is_that_of_the_formulas(settings):
    spec = DistributionSpec(networks="experts", **settings)
    real = np.stack([IMAGES[label == LABELS][:3] for label in range(CLASSES)])
    expert = ExpertNetwork(ROWS[0, 1], ROWS[1, 2] if spec.later_epochs else None, np.int32(0), None)
    expected = 0.0
    for label in range(CLASSES):
        (_, phi_real), (logits, phi_syn) = outputs(ROWS[0, 1], real[label]), outputs(ROWS[0, 1], SYN[label])
        if spec.distance == "mean":
            expected += np.sum((phi_real.mean(0) - phi_syn.mean(0)) ** 2)
            expected += spec.variance * np.sum((phi_real.var(0) - phi_syn.var(0)) ** 2)
        else:
            key = jax.random.fold_in(jax.random.split(KEY)[1], 1)
            t = np.asarray(jax.random.normal(key, (phi_real.shape[1], 5)), np.float64)
            phases = [
                np.exp(1j * (phi / np.linalg.norm(phi, axis=1, keepdims=True)) @ t) for phi in (phi_real, phi_syn)
            ]
            a, b = (x.mean(0) for x in phases)
            # As NCFM writes it.
            amplitude, phase = (abs(a) - abs(b)) ** 2, 2 * (abs(a) * abs(b) - (a * b.conj()).real)
            expected += 300 * np.mean(np.sqrt(amplitude / 2 + phase / 2))
        if spec.later_epochs:
            logits = outputs(ROWS[1, 2], SYN[label])[0]
        log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        expected -= spec.cross_entropy * log_probabilities[:, label].mean()
    assert_allclose(loss(spec, real, expert), expected, rtol=1e-5)


def test_statistics_are_those_of_all_images_and_are_computed_once(networks, monkeypatch):
    monkeypatch.setattr(expert_networks, "_BATCH", 4)
    drawn = networks(ACTIVE, draws=3)
    step = next(i for i in range(99) if drawn.choice(i).draw == 2)
    found = drawn.batch(step)
    choice = drawn.choice(step)
    assert (found.weights == ROWS[choice.expert, choice.epoch]).all() and found.draw == 2
    for label, key in enumerate(jax.random.split(draw_key(2), CLASSES)):
        seen = dsa(key, NORMAL(pixels.as_float(IMAGES[label == LABELS])), ACTIVE, siamese=True)
        features = APPLY(flattener(NETWORK)[1](found.weights), seen)[1].reshape(len(seen), -1)
        assert_allclose(found.statistics[label], np.asarray(features, np.float64).mean(0), rtol=1e-4, atol=1e-6)
    # A batch of the same augmentation whose mean is that of the class: the same loss.
    spec = DistributionSpec(networks="experts", draws=3)
    doubled = np.stack([np.resize(IMAGES[label == LABELS], (18, *SHAPE)) for label in range(CLASSES)])
    assert_allclose(loss(spec, None, found, ACTIVE), loss(spec, doubled, found, ACTIVE), rtol=1e-4)

    (file,) = (path for path in drawn._experts.path.rglob("*.npz"))
    kept = file.read_bytes()
    file.write_bytes(kept[:-40] + bytes(40))
    assert networks(ACTIVE, draws=3).batch(step).statistics.tobytes() == found.statistics.tobytes()
    assert file.read_bytes()[-40:] == kept[-40:]
    monkeypatch.delattr(expert_networks, "_sum")
    assert networks(ACTIVE, draws=3).batch(step).statistics.tobytes() == found.statistics.tobytes()
    with pytest.raises(NameError, match="_sum"):
        networks(NONE, draws=3).batch(step)


def test_what_is_drawn_is_within_its_bounds_and_all_of_it(networks):
    drawn = networks(draws=2, later_epochs=2)
    choices = [drawn.choice(i) for i in range(400)]
    assert {(c.expert, c.epoch, c.draw) for c in choices} == {
        (e, t, d) for e in range(2) for t in range(5) for d in range(2)
    }
    assert {(c.epoch, c.later) for c in choices} == {(t, s) for t in range(5) for s in range(t, min(t + 2, 4) + 1)}
    assert choices == [networks(draws=2, later_epochs=2).choice(i) for i in range(400)]
    mixed = networks(networks="interpolated")
    assert_allclose(mixed.weights(1, 3), 0.25 * ROWS[1, 0] + 0.75 * ROWS[1, 4], rtol=1e-5, atol=1e-7)


def test_shapes_are_those_of_what_is_drawn(networks):
    for settings in ({"draws": 1, "later_epochs": 1, "variance": 1.0}, {}):
        drawn = networks(**settings)
        expected = jax.tree.map(lambda x: (x.shape, x.dtype), drawn.batch(0))
        found = drawn._need.shape(drawn._source, NETWORK.num_params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == expected


@pytest.mark.parametrize("key", ["cross_entropy", "later_epochs", "draws"])
def test_random_networks_have_no_later_epochs_nor_kept_statistics(key):
    with pytest.raises(ValueError, match=f"objective.{key}: expected 0 with networks=random, found 2"):
        DistributionSpec(**{key: 2})
    assert dataclasses.replace(DistributionSpec(), networks="experts", **{key: 2})
