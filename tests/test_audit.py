import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import ROOT
from PIL import Image

from gsdd_jax import nets, whiten
from gsdd_jax.augment import DsaSpec
from gsdd_jax.training import EvalSpec
from gsdd_jax.uses import audit
from gsdd_jax.uses.summary import Learner
from train import audit as command


def test_members_are_half_of_every_class_in_each_set():
    labels = np.array([0] * 6 + [1] * 5 + [2] * 2)
    members = audit.halves(3, labels, 8)
    for label, half in ((0, 3), (1, 2), (2, 1)):
        assert (members[:, labels == label].sum(1) == half).all()
    assert len(np.unique(members, axis=0)) > 4
    np.testing.assert_array_equal(members, audit.halves(3, labels, 8))


@pytest.mark.parametrize(
    ("labels", "shadows", "message"),
    [([0, 0, 1, 1], 3, "shadows: expected a number >= 4, found 3"), ([0, 0, 1], 4, "class 1 has one image")],
)
def test_what_cannot_be_audited_is_refused(labels, shadows, message):
    with pytest.raises(ValueError, match=message):
        audit.halves(0, np.array(labels), shadows)


def test_confidence_is_the_log_odds_of_the_right_class():
    logits = np.array([[2.0, -1.0, 0.5], [0.0, 30.0, 1.0]])
    labels = np.array([2, 1])
    p = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[np.arange(2), labels]
    found = audit.confidence(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(found[0], np.log(p[0] / (1 - p[0])), rtol=1e-5)
    # 1 - p has no digits left in float32.
    np.testing.assert_allclose(found[1], 30 - np.log(1 + math.e), rtol=1e-6)


def test_likelihood_ratio_leaves_the_set_under_attack_out():
    statistics = np.array([[9.0, 1.0], [2.0, 0.0], [4.0, 7.0], [5.0, 1.0], [8.0, 4.0]])
    members = np.array([[1, 0], [1, 0], [1, 1], [0, 1], [0, 0]], bool)
    # Of sets 1 to 4. As members: 2 and 4, mean 3; 7 and 1, mean 4; squares 1 + 1 + 9 + 9, over 2 degrees of freedom.
    inside = np.array([3.0, 4.0]), 20 / 2 * (1 + 1 / 2)
    # As none: 5 and 8, mean 6.5; 0 and 4, mean 2; squares 2 * 2.25 + 2 * 4.
    outside = np.array([6.5, 2.0]), 12.5 / 2 * (1 + 1 / 2)
    density = [-((statistics[0] - mean) ** 2 / variance + np.log(variance)) / 2 for mean, variance in (inside, outside)]
    np.testing.assert_allclose(audit.likelihood_ratio(statistics, members)[0], density[0] - density[1])


def test_attack_finds_what_there_is_to_find_and_no_more():
    labels, shift = np.repeat(np.arange(10), 300), 1.0
    members = audit.halves(0, labels, 32)
    noise = np.random.default_rng(99).normal(size=members.shape)  # another stream than that of the halves
    blind = audit.attack(audit.likelihood_ratio(noise, members), members)
    assert blind.auc == pytest.approx(0.5, abs=0.005)
    assert blind.tpr == pytest.approx(audit.RATES, rel=0.25)
    # Two Gaussians a standard deviation apart: with their means known, the best test's area is Phi(1 / sqrt 2), its
    # power Phi(1 - z); estimates from 15 or 16 values each are worth less.
    seeing = audit.attack(audit.likelihood_ratio(noise + shift * members, members), members)
    assert seeing.auc == pytest.approx(0.7602, abs=0.02)
    assert seeing.tpr == pytest.approx((0.0183, 0.0923), rel=0.45)


def test_scores_that_are_unknown_do_not_count():
    found = audit.attack(np.array([3.0, np.nan, 1.0, 2.0]), np.array([True, False, False, True]))
    assert found == (1.0, (1.0, 1.0))


def learner(seeds: int) -> Learner:
    return Learner(
        network=nets.NetSpec(depth=1, width=2),
        training=EvalSpec(steps=3, batch=4, seeds=seeds),
        augment=DsaSpec(strategy="none"),
        whitening=whiten.meanstd_of((0.5,), (0.25,)),
    )


def test_a_set_of_the_members_themselves_is_found_out():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (24, 4, 4, 1), np.uint8), np.repeat(np.arange(3), 8)
    done = []
    found = audit.audit(
        1,
        images,
        labels,
        lambda key, images, labels: (images, labels),
        learner=learner(seeds=2),
        shadows=4,
        on_set=done.append,
    )
    assert found.sets == (1.0, (1.0, 1.0)) and done == [1, 2, 3, 4]
    assert 0 <= found.networks.auc <= 1 and len(found.accuracy) == 4
    own = audit.halves(1, labels, 4)[0]
    np.testing.assert_array_equal(found.images, images[own])
    np.testing.assert_array_equal(found.neighbors.member, np.flatnonzero(own))
    assert (found.neighbors.member_distance == 0).all()
    # By hand, for the first image.
    others = [i for i in np.flatnonzero(~own) if labels[i] == labels[own][0]]
    away = [np.sqrt(((images[own][0] / 255 - images[i] / 255) ** 2).sum()) for i in others]
    assert found.neighbors.unused[0] == others[int(np.argmin(away))]
    assert found.neighbors.unused_distance[0] == pytest.approx(min(away), rel=1e-6)


def test_audit_repeats_to_the_bit():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (12, 4, 4, 1), np.uint8), np.repeat(np.arange(2), 6)

    def run():
        return audit.audit(
            0,
            images,
            labels,
            lambda key, images, labels: (jax.random.uniform(key, (4, 4, 4, 1)), jnp.array([0, 0, 1, 1])),
            learner=learner(seeds=1),
            shadows=4,
        )

    first, second = run(), run()
    assert first.networks == second.networks and first.sets == second.sets and first.accuracy == second.accuracy


def test_command_attacks_every_kind_of_set_and_continues(tmp_path, monkeypatch):
    call = ["--config", str(ROOT / "configs" / "audit_digits.yaml"), "--smoke", "--out", str(tmp_path / "run")]
    assert command.main(call) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [row["set"] for row in result["rows"]] == ["all members", "random real images", "Gaussians"]
    assert [0 < row["bytes"] <= 4000 for row in result["rows"]] == [False, True, True]
    assert result["rows"][0]["sets"]["auc"] == 1.0
    # Three rows of eight pixels and a margin, twice as large.
    with Image.open(tmp_path / "run" / "2-0.png") as picture:
        assert picture.size[1] == 54
    (tmp_path / "run" / "result.json").unlink()
    monkeypatch.setattr(audit, "audit", None)  # nothing is attacked again
    assert command.main(call) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["rows"] == result["rows"]
