"""The studies of a run ask what they say; on the released digits, at sizes that take seconds."""

import dataclasses
import json

import jax
import numpy as np
import oracle
import pytest

from benchmarks import study
from gsdd_jax import Gaussians

SMALL = [
    "evaluate.steps=2",
    "evaluate.seeds=2",
    "network.depth=1",
    "network.width=2",
    "data.sha256=''",
    "data.per_class=4",
]


@pytest.fixture
def subject(monkeypatch) -> study.Subject:
    monkeypatch.setattr(study, "GRID", 3)
    monkeypatch.setattr(study, "NETWORKS", 1)
    run = study.record.ROOT / "sets" / "digits"
    config = study.configs.load(run / "config.yaml", SMALL)
    return study.Subject("digits", study.experiments.prepare(config), study.gsdd_jax.load(run / "export"))


def test_pruning_leaves_the_strongest_weakest_or_any_gaussians_of_each_image(subject, monkeypatch):
    seen = []
    monkeypatch.setattr(study, "KEPT", (0.5,))
    monkeypatch.setattr(
        study.Subject, "accuracy", lambda self, images: seen.append(np.asarray(images)) or {"mean": 0.0}
    )
    rows = list(study.prune(subject))
    assert [(row["order"], row["kept"]) for row in rows] == [("none", 1.0), *((x, 0.5) for x in study.ORDERS)]
    g = jax.device_get(subject.synset.codec.gaussians(subject.synset.params))
    l11, l21, l22 = np.moveaxis(np.float64(g.cholesky) + [0.5, 0, 0.5], -1, 0)
    areas = np.sqrt((l11**2 + 1 / 12) * (l21**2 + l22**2 + 1 / 12) - (l11 * l21) ** 2)
    strength = areas * np.abs(g.color * g.opacity[..., None]).max(-1)
    for images, order in zip(seen[1:3], (np.argsort(-strength, 1), np.argsort(strength, 1)), strict=True):
        kept = order[:, :3]
        left = Gaussians(
            *(np.take_along_axis(x, kept.reshape(30, 3, *[1] * (x.ndim - 2)), 1) for x in _leaves(g)), g.size
        )
        np.testing.assert_allclose(images, oracle.render(left).images, rtol=0, atol=5e-3)
    assert not np.allclose(seen[3], seen[1]) and not np.allclose(seen[3], seen[2])


def _leaves(g: Gaussians) -> tuple[np.ndarray, ...]:
    return tuple(np.float32(getattr(g, name)) for name in ("mean", "cholesky", "color", "opacity"))


def test_both_landscapes_have_the_loss_of_the_same_images_in_their_middle(subject):
    gaussian, pixel = study.landscape(subject)
    assert (gaussian["codec"], pixel["codec"]) == ("gaussian", "pixel")
    planes = [np.array(row["loss"]) for row in (gaussian, pixel)]
    assert planes[0][1, 1] == pytest.approx(planes[1][1, 1], rel=1e-4)
    bends = [np.abs(plane[0] - 2 * plane[1] + plane[2]).mean() for plane in (planes[0], planes[0].T)]
    assert gaussian["roughness"] == pytest.approx(np.mean(bends) / (planes[0].max() - planes[0].min()), rel=1e-6)


def test_images_are_sorted_by_the_networks_that_are_wrong_about_them(subject, monkeypatch):
    monkeypatch.setattr(study, "JUDGES", 4)
    hits = iter([[1, 1, 0, 0], [1, 0, 1, 0]] + 4 * [[1, 1, 0, 0]])
    monkeypatch.setattr(study.Subject, "train", lambda self, images, index: None)
    monkeypatch.setattr(study.training, "train_network", lambda *_, **__: None)
    monkeypatch.setattr(study.Subject, "right", lambda self, params: np.array(next(hits), bool))
    four = subject.experiment.dataset._replace(test_labels=np.zeros(4, np.int32))
    rows = list(study.difficulty(subject._replace(experiment=dataclasses.replace(subject.experiment, dataset=four))))
    assert [(row["most_wrong"], row["test_images"], row["mean"]) for row in rows] == [(0.0, 2, 0.75), (1.0, 2, 0.25)]


def test_command_writes_numbers_and_a_picture(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "STEPS", (1, 2))
    study.main(["convergence", "--run", "sets/digits", "--out", str(tmp_path / "found.json"), *SMALL])
    record = json.loads((tmp_path / "found.json").read_text())
    assert [row["steps"] for row in record["results"]["digits"]] == [1, 2] and record["n"] == 2
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    assert 0 <= record["results"]["digits"][0]["mean"] <= 1
