"""`train.tune`: what is compared, what is kept, and which fits are shared."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import ends, refused

from gsdd_jax import data, fitting
from train import config as configs
from train import distill, stages, tune
from train import experiment as experiments
from train.errors import DivergedError
from train.progress import Progress
from train.rundir import RunDir, read_metrics

TOY = """
name: toy
ipc: 1
data: {source: digits, per_class: 20, test_limit: 50}
network: {depth: 1, width: 4}
augment: {strategy: crop}
codec: {name: packed_gaussian, images_per_class: 2, lr: 0.01}
fit: {steps: 2}
objective: {name: distribution, batch_real: 4, class_chunk: 10}
distill: {iterations: 2, log_every: 1, checkpoint_every: 2}
evaluate: {steps: 8, batch: 8, lr: 0.1, seeds: 2}
smoke: {fit: {steps: 1}}
"""


def test_held_out_images_are_training_images_that_nothing_else_sees():
    whole = data.load(data.DataSpec(per_class=20, test_limit=50))
    part = experiments.hold_out(whole)
    assert np.bincount(part.train_labels).tolist() == [18] * 10 and np.bincount(part.test_labels).tolist() == [2] * 10
    both = np.concatenate([part.train_images, part.test_images])
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in whole.train_images)


def tuned(toy: Path, out: Path, vary: str, *arguments) -> int:
    return ends(tune, "--config", toy, "--vary", vary, "--out", out, "--quiet", *arguments)


def test_best_fits_are_distilled_and_what_is_done_is_only_read(toy, tmp_path, capsys):
    # Of one size, so that executables serve again.
    arguments = ["fit.steps=1,3", "--keep", 1, "evaluate.seeds=1"]
    assert tuned(toy, tmp_path, *arguments) == 0
    text, result = (tmp_path / "tune.md").read_text(), json.loads((tmp_path / "tune.json").read_text())
    assert result["held_out"] == 20
    best = max(result["rows"], key=lambda row: row["fit_only"]["mean"])
    assert [row for row in result["rows"] if row["accuracy"]] == [best] and result["best"] == best["overrides"]
    assert best["loss"] is not None and text.count("\n| `fit.steps=") == 2 and "PSNR, dB" in text
    # Each was fitted once.
    assert [e["phase"] for e in read_metrics(tmp_path / best["overrides"][0])].count("main-fit") == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(before) == 3 and tuned(toy, tmp_path, *arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert f"best: {best['overrides'][0]}" in capsys.readouterr().out


def test_a_fit_is_taken_over_by_what_makes_the_same_fit_and_by_nothing_else(toy, tmp_path):
    dataset = experiments.hold_out(data.load(configs.load(toy).data))
    kmeans = "fit.select=kmeans"
    # The rate and the iterations leave the fit alone; the rest decides images, start, number of images or steps.
    changes = [
        (), ("codec.lr=0.5", "distill.iterations=7"), (kmeans,), (kmeans, "whiten=zca"), ("seed=1",), ("fit.steps=3",),
        ("labels.kind=soft", "labels.dtype=uint8"),
    ]  # fmt: skip
    runs, psnr, steps = [], [], []
    for i, one in enumerate(changes):
        few = ["codec={name: downscale}", "ipc=2", "baselines.pixel=false"]
        experiment = experiments.prepare(configs.load(toy, [*few, *one]), dataset)
        codec = experiment.codec
        targets = experiments.real_images(experiment, codec, purpose="select", how=experiment.config.fit.select)
        with RunDir(tmp_path / str(i)) as run:
            quiet = Progress(quiet=True)
            params = stages.fit_stage(experiment, targets, run=run, progress=quiet, fitted=runs)
            steps.append(len(read_metrics(run.path)))
        psnr.append(float(fitting.psnr(distill.as_stored(codec, params), targets).mean()))
        runs.append(run.path)
    assert [count > 0 for count in steps] == [True, False, *[True] * 5], psnr
    assert psnr[1] == psnr[0] and len(set(psnr)) == len(changes) - 1, psnr


def test_tune_goes_on_after_a_rate_that_diverges(toy, tmp_path, capsys, monkeypatch):
    def run(experiment, path, progress, fitted=()):
        if experiment.config.codec.lr >= 0.1:
            raise DivergedError("loss not finite in iteration 3")
        path.mkdir(parents=True)
        return {"accuracy": {"mean": 0.5, "n": 1, "images_per_class": 2}, "fit_psnr": None, "seconds": 1.0}

    monkeypatch.setattr(tune.distill, "run", run)
    assert tuned(toy, tmp_path / "none", "codec.lr=0.1,1") == 2
    assert "every combination diverged, the first by this: loss not finite" in capsys.readouterr().err
    assert tuned(toy, tmp_path / "one", "codec.lr=0.001,0.1") == 0
    result = json.loads((tmp_path / "one" / "tune.json").read_text())
    assert result["best"] == ["codec.lr=0.001"]
    assert result["rows"][1]["accuracy"] is None and "iteration 3" in result["rows"][1]["diverged"]
    assert "| `codec.lr=0.1` | | | diverged |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("codec.lr", "override 'codec.lr': expected section.key=value"),
        ("data.per_class=10,20", "--vary: expected settings other than those of data"),
        ("codec.lr=0.1,1 --keep -1", "--keep: expected 0 or more, found -1"),
        ("subtask=0,1", "--vary: expected settings other than those of data and subtasks"),
    ],
)
def test_tune_refuses_what_cannot_be_varied(toy, tmp_path, capsys, vary, message):
    assert message in refused(capsys, tuned(toy, tmp_path / "x", *vary.split(), "subtasks=2"))
