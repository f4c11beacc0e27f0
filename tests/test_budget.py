"""`train.budget`: which settings fit, which are kept, and what it writes."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import ends, refused

from gsdd_jax import codecs, data, fitting
from train import budget, distill, stages, tune
from train import config as configs
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


def start(toy: Path, *arguments) -> int:
    return ends(budget, "--config", toy, "--quiet", *arguments)


@pytest.fixture(scope="module")
def found(toy, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "budget"
    assert start(toy, "--bits", "bf16", "8+6+6", "--points", 6, "--keep", 1, "--out", out) == 0
    return out


def test_every_point_takes_as_many_images_as_fit_and_one_more_does_not(toy):
    config, dataset = configs.load(toy), data.load(configs.load(toy).data)
    for one in budget.candidates(config, dataset, ("bf16", "8+6+6", "4+4+4"), (3, 6, 11)):

        def make(gpc, one=one):
            spec = one.codec.__class__(**{**vars(one.codec), "images_per_class": gpc})
            return codecs.make(spec, image_shape=(8, 8, 1), num_classes=10, bytes_per_class=256)

        assert make(one.codec.images_per_class).spec.num_points == one.codec.num_points
        if one.codec.images_per_class < 20:
            with pytest.raises(ValueError, match="codec."):
                make(one.codec.images_per_class + 1)


def test_held_out_images_are_training_images_that_nothing_else_sees():
    whole = data.load(data.DataSpec(per_class=20, test_limit=50))
    part = tune.hold_out(whole)
    assert np.bincount(part.train_labels).tolist() == [18] * 10 and np.bincount(part.test_labels).tolist() == [2] * 10
    both = np.concatenate([part.train_images, part.test_images])
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in whole.train_images)


def test_search_keeps_the_best_fit_and_proposes_it(found, toy):
    result = json.loads((found / "frontier.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["bf16x6", "8+6+6x6"]
    best = max(result["rows"], key=lambda row: row["accuracy"]["mean"])
    assert [row["name"] for row in result["rows"] if "distilled" in row] == [best["name"]]
    assert result["proposal"][1:] == best["overrides"] and result["held_out"] == 20
    assert all(row["bytes_per_class"] <= 256 for row in result["rows"])
    # The proposal is a setting of the command line.
    config = configs.load(toy, result["proposal"])
    assert (config.codec.images_per_class, config.codec.num_points) == (best["images_per_class"], best["points"])
    # Nor does it lose what the config had set.
    assert config.codec.lr == configs.load(toy).codec.lr == 0.01 and config.ipc == 1


def test_table_and_plot_are_written(found):
    text = (found / "frontier.md").read_text()
    assert text.count("\n| bf16 ") == 1 and text.count("\n| 8+6+6 ") == 1
    assert "20 held-out training images" in text
    assert (found / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_search_that_is_done_is_only_read(found, toy, capsys):
    before = {path: path.stat().st_mtime_ns for path in found.rglob("result.json")}
    assert start(toy, "--bits", "bf16", "8+6+6", "--points", 6, "--keep", 1, "--out", found) == 0
    assert {path: path.stat().st_mtime_ns for path in found.rglob("result.json")} == before
    assert "proposal: ipc=1.0 codec={name: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "8+6"], "--bits: expected bf16 or three numbers from 2 to 16 such as 8+6+6, found '8+6'"),
        (["--bits", "8+6+17"], "--bits: expected bf16 or three numbers"),
        (["--points", "0"], "--points: expected numbers of at least 1, found 0"),
        (["--keep", "-1"], "--keep: expected 0 or more, found -1"),
        (["bytes_per_class=ten"], "bytes_per_class: expected a whole number of at least 1, found 'ten'"),
        (
            ["bytes_per_class=5", "--points", "40"],
            "bytes_per_class: no combination of --bits and --points fits; codec.",
        ),
        (["codec={name: pixel}"], "codec.name: a budget is searched for Gaussians, found 'pixel'"),
    ],
)
def test_bad_request_is_one_line(toy, tmp_path, capsys, arguments, message):
    assert message in refused(capsys, start(toy, "--out", tmp_path / "out", *arguments))
    assert not (tmp_path / "out").exists()


def test_tune_compares_on_held_out_images_and_shares_the_fit(found, toy, tmp_path, capsys):
    out = tmp_path / "tune"
    # The sizes are those that the search settled on, whose executables serve again.
    sizes = json.loads((found / "frontier.json").read_text())["proposal"]
    assert tuned(toy, out, "distill.iterations=1,2", "evaluate.seeds=1", *sizes) == 0
    result = json.loads((out / "tune.json").read_text())
    assert [row["overrides"] for row in result["rows"]] == [["distill.iterations=1"], ["distill.iterations=2"]]
    assert result["held_out"] == 20
    best = max(result["rows"], key=lambda row: row["accuracy"]["mean"])
    assert result["best"] == best["overrides"] and f"best: {best['overrides'][0]}" in capsys.readouterr().out
    # One was fitted, the other took the fit over and went on from it in a way of its own.
    fits = [
        [entry["phase"] for entry in map(json.loads, (out / name / "metrics.jsonl").read_text().splitlines())]
        for name in ("distill.iterations=1", "distill.iterations=2")
    ]
    assert fits[0].count("main-fit") == 2 and fits[1].count("main-fit") == 0
    assert result["rows"][0]["psnr"] == result["rows"][1]["psnr"]
    sets = [(out / name / "export" / "synset.safetensors") for name in ("distill.iterations=1", "distill.iterations=2")]
    assert sets[0].read_bytes() != sets[1].read_bytes()


def test_a_fit_is_taken_over_by_what_makes_the_same_fit_and_by_nothing_else(toy, tmp_path):
    dataset = tune.hold_out(data.load(configs.load(toy).data))
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
        targets, codec = distill._targets(experiment), experiment.codec
        with RunDir(tmp_path / str(i)) as run:
            quiet = Progress(quiet=True)
            params = stages.fit_stage(experiment, codec, targets, run=run, progress=quiet, arm="main", fitted=runs)
            steps.append(len(read_metrics(run.path)))
        psnr.append(float(fitting.psnr(distill.as_stored(codec, params), targets).mean()))
        runs.append(run.path)
    assert [count > 0 for count in steps] == [True, False, *[True] * 5], psnr
    assert psnr[1] == psnr[0] and len(set(psnr)) == len(changes) - 1, psnr


def tuned(toy: Path, out: Path, vary: str, *arguments) -> int:
    return ends(tune, "--config", toy, "--vary", vary, "--out", out, "--quiet", *arguments)


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
        ("subtask=0,1", "--vary: expected settings other than those of data and subtasks"),
    ],
)
def test_tune_refuses_what_cannot_be_varied(toy, tmp_path, capsys, vary, message):
    assert message in refused(capsys, tuned(toy, tmp_path / "x", vary, "subtasks=2"))
