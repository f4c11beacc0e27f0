"""Differential privacy: the noise, the means, and that a set is made of nothing else."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from gsdd_jax import codecs, whiten
from gsdd_jax.augment import DsaSpec
from gsdd_jax.match import DistributionSpec
from gsdd_jax.match.distribution import statistics
from gsdd_jax.nets import NetSpec, build
from gsdd_jax.training import EvalSpec
from gsdd_jax.uses import federated, private
from gsdd_jax.uses.summary import Learner, SummarySpec, summarize

SHAPE, CLASSES = (8, 8, 1), ("a", "b")
LEARNER = Learner(
    network=NetSpec(depth=1, width=4),
    training=EvalSpec(steps=6, batch=8),
    augment=DsaSpec(strategy="none"),
    whitening=whiten.meanstd_of((0.5,), (0.25,)),
)
NETWORK = build(LEARNER.network, SHAPE, len(CLASSES))
GAUSSIANS = codecs.SPECS["gaussian"](num_points=3, images_per_class=2, start="uniform")
SPEC = SummarySpec(title="private ones", codec=GAUSSIANS, steps=3, fit_steps=0, epsilon=2.0, private_networks=2)


def data(seed: int) -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(seed).integers(0, 256, (7, *SHAPE), np.uint8), np.array([0, 1, 1, 0, 1, 1, 1])


@pytest.mark.parametrize(("epsilon", "queries"), [(0.5, 1), (2.0, 20), (8.0, 3)])
def test_noise_is_just_enough_by_the_closed_form_of_the_gaussian_mechanism(epsilon, queries):
    """Balle & Wang 2018, theorem 8; as many queries are one of a sensitivity larger by the root of their number."""

    def delta(sigma: float) -> float:
        mu = math.sqrt(queries) / sigma
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)

    found = private.noise_multiplier(epsilon, 1e-5, queries)
    assert delta(found) <= 1e-5 < delta(0.99 * found)


@pytest.mark.parametrize("numbers", [(0.0, 1e-5, 1), (1.0, 1.0, 1), (1.0, 1e-5, 0)])
def test_what_is_no_promise_is_refused(numbers):
    with pytest.raises(ValueError, match="^epsilon, delta, queries: expected more than 0"):
        private.noise_multiplier(*numbers)


def means(multiplier: float) -> private.NoisyMeans:
    images, labels = data(0)
    return private.noisy_means(
        jax.random.key(0),
        images,
        labels,
        num_classes=2,
        network=NETWORK,
        whitening=LEARNER.whitening,
        count=3,
        multiplier=multiplier,
        rng=np.random.default_rng(0),
    )


def test_means_are_those_of_features_of_length_one_and_noise_is_of_one_image():
    images, labels = data(0)
    exact, noisy = means(0.0), means(50.0)
    init = [NETWORK.init(jax.random.fold_in(jax.random.key(0), i)) for i in range(3)]
    for params, found in zip(init, exact.means, strict=True):
        seen = LEARNER.whitening(jnp.asarray(images, jnp.float32) / 255)
        features = np.asarray(NETWORK.outputs(params, seen)[1], np.float64).reshape(7, -1)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        expected = [features[labels == label].mean(0) for label in range(2)]
        np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(noisy.weights, exact.weights)
    # 192 values, so that their spread is known to a twentieth; two images in the one class and five in the other.
    for label, size in enumerate((2, 5)):
        assert np.std((noisy.means - exact.means)[:, label]) == pytest.approx(50 / size, rel=0.25)
    # One image more changes each mean's sum by a vector of length 1 at most.
    assert (np.linalg.norm(exact.means, axis=-1) <= 1 + 1e-6).all()


def test_features_are_matched_at_length_one():
    rows = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for spec, expected in (
        (private.OBJECTIVE, unit),
        (DistributionSpec(normalize=True, variance=1), np.concatenate([unit, unit**2], 1)),
        (DistributionSpec(), rows),
    ):
        np.testing.assert_allclose(statistics(spec, jax.random.key(0), jnp.asarray(rows)), expected, rtol=1e-6)


def test_epsilon_is_spent_once():
    fields = {name: getattr(SPEC, name) for name in ("title", "codec", "steps", "fit_steps", "epsilon")}
    assert federated.SetSpec(**fields).epsilon == 2
    with pytest.raises(ValueError, match="^epsilon: private ones is sent in 2 rounds; expected rounds 1"):
        federated.SetSpec(**fields, rounds=2)


def made(seed: int) -> np.ndarray:
    part = summarize(jax.random.key(5), *data(seed), spec=SPEC, class_names=CLASSES, budget=20000, learner=LEARNER)
    return np.asarray(part.images())


def test_set_is_made_of_the_means_and_of_nothing_else(monkeypatch):
    """Other images change it through them alone."""
    assert np.abs(made(0) - made(1)).max() > 1e-3
    given = means(0.0)
    monkeypatch.setattr(private, "noisy_means", lambda *_, **__: given)
    np.testing.assert_array_equal(made(0), made(1))


def test_noise_does_not_follow_from_the_seed():
    assert np.abs(made(0) - made(0)).max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"codec": None}, "private ones needs a codec and steps >= 1"),
        ({"steps": 0}, "private ones needs a codec and steps >= 1"),
        ({"fit_steps": 3}, "expected fit_steps 0 and codec.start of .*uniform.*, found 3 and uniform"),
        ({"codec": codecs.SPECS["gaussian"](num_points=3)}, "found 0 and growth"),
        ({"codec": codecs.SPECS["palette"]()}, "codec.start of another codec, found 0 and none"),
    ],
)
def test_what_looks_at_images_beside_the_means_is_refused(settings, says):
    fields = {name: getattr(SPEC, name) for name in ("title", "codec", "steps", "fit_steps", "epsilon")}
    with pytest.raises(ValueError, match=f"^epsilon: .*{says}"):
        SummarySpec(**fields | settings)
