import json

import jax
import numpy as np
import pytest
from command_line import ROOT

from gsdd_jax import nets, whiten
from gsdd_jax.augment import DsaSpec
from gsdd_jax.training import EvalSpec
from gsdd_jax.uses import learning, search
from gsdd_jax.uses.summary import Learner
from train import search as command


def test_grid_holds_every_choice_once():
    grid = search.GridSpec(depth=(1, 2), width=(4,), norm=("instance", "none"), activation=("relu",), pooling=("max",))
    found = grid.networks()
    assert [(net.depth, net.norm) for net in found] == [(1, "instance"), (1, "none"), (2, "instance"), (2, "none")]
    assert all((net.width, net.activation, net.pooling) == (4, "relu", "max") for net in found)
    few = search.GridSpec(most=7).networks()
    assert len(few) == len(set(few)) == 7 and set(few) < set(search.GridSpec().networks())


def test_agreement_of_rankings_by_hand():
    truth = [0.9, 0.8, 0.7, 0.2, 0.1]
    # Ranks from the best: 2, 1, 3, 5, 4; their differences 1, 1, 0, 1, 1, so 1 - 6 * 4 / (5 * 24).
    found = search.agreement([0.5, 0.6, 0.4, 0.1, 0.2], truth, top=3)
    assert found.spearman == pytest.approx(0.8)
    # Of the best three 2, 1, 3: 1 - 6 * 2 / (3 * 8).
    assert found.top == pytest.approx(0.5)
    assert found.found == pytest.approx(0.8)
    tied = search.agreement([0.5, 0.5, 0.5, 0.1, 0.2], truth, top=3)
    assert np.isnan(tied.top) and tied.found == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: search.agreement([1.0] * 4, [1.0] * 5, 3), r"proxy: expected \[5\] accuracies, found \[4\]"),
        (lambda: search.agreement([1.0] * 4, [1.0] * 4, 5), "top: expected 3 to 4, .* found 5"),
        (
            lambda: search.GridSpec(depth=(1,), norm=("none",), activation=("relu",), pooling=("max",)).networks(),
            "grid: expected three architectures or more to rank, found 2",
        ),
    ],
)
def test_what_cannot_be_ranked_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_training_tells_a_network_that_can_from_one_that_was_not_trained():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(2), 16)
    # Bright and dark images.
    images = (rng.uniform(0, 0.3, (32, 4, 4, 1)) + 0.6 * labels[:, None, None, None]).astype(np.float32)
    learner = Learner(
        network=nets.NetSpec(depth=1, width=4, norm="none"),
        training=EvalSpec(steps=40, batch=16, lr=0.05),
        augment=DsaSpec(strategy="none"),
        whitening=whiten.meanstd_of((0.5,), (0.25,)),
    )
    pool = learning.pool(images, labels)
    trained, early = (
        search.train(
            jax.random.key(0),
            learner.network,
            pool,
            images,
            labels,
            learner=learner,
            steps=steps,
            clock=iter([3.0, 5.5]).__next__,
        )
        for steps in (40, 0)
    )
    assert trained.accuracy == 1.0 and early.accuracy < 1.0
    assert trained.seconds == 2.5


def test_command_ranks_by_every_proxy_and_continues(tmp_path, monkeypatch):
    call = ["--config", str(ROOT / "configs" / "search_digits.yaml"), "--smoke", "--out", str(tmp_path / "run")]
    assert command.main(call) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    titles = [command.ALL, command.AGAIN, command.EARLY, "random real images", "Gaussians"]
    assert [row["title"] for row in result["rows"]] == titles
    assert all(len(row["accuracies"]) == 4 for row in result["rows"])
    assert [row["bytes"] is None or row["bytes"] <= 4000 for row in result["rows"]] == [True] * 5
    assert result["rows"][0]["found"] == result["rows"][0]["best"]
    monkeypatch.setattr(search, "train", None)  # nothing is trained again
    assert command.main(call) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["rows"] == result["rows"]
