"""`evaluate.protocol=paper`: tests while distilling, and the set that was best on the test set."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import assert_same, findings, start

from train import evaluate, evaluation, results
from train.checkpoint import Checkpoints
from train.rundir import read_metrics

TOY = """
name: toy
ipc: 1
data: {source: digits, per_class: 8, test_limit: 50}
network: {depth: 1, width: 4}
augment: {strategy: crop}
codec: {name: gaussian, images_per_class: 2, num_points: 5, lr: 0.05}
fit: {steps: 2}
objective: {name: distribution, batch_real: 4, class_chunk: 10}
distill: {iterations: 5, log_every: 3, checkpoint_every: 4}
evaluate: {protocol: paper, test_every: 2, steps: 8, batch: 8, lr: 0.1, seeds: 2}
baselines: {full_data: false, random_real: false}
"""


@pytest.mark.parametrize("arm", ["distilled", "pixel"])
def test_row_is_the_best_of_the_tests_and_says_how_many_there_were(whole, arm):
    tests = json.loads((whole / "evaluation.json").read_text())
    steps = (2, 4, 5)
    assert {name for name in tests if name.startswith(arm)} == {f"{arm} after {step}" for step in steps}
    accuracies = {step: list(tests[f"{arm} after {step}"]["accuracies"].values()) for step in steps}
    best = max(steps, key=lambda step: np.mean(accuracies[step]))
    row = json.loads((whole / "result.json").read_text())["accuracy" if arm == "distilled" else arm]
    assert (row["iteration"], row["tests"], row["n"]) == (best, 3, 2)
    assert row["mean"] == pytest.approx(np.mean(accuracies[best])) and row["accuracies"] == accuracies[best]


def test_every_test_has_networks_of_its_own(whole):
    tests = json.loads((whole / "evaluation.json").read_text())
    seeds = [seed for name, entry in tests.items() if name.startswith("distilled") for seed in entry["accuracies"]]
    assert len(seeds) == len(set(seeds)) == 6


def test_what_is_exported_is_the_set_of_the_best_test(whole, tmp_path):
    row = json.loads((whole / "result.json").read_text())["accuracy"]
    assert Checkpoints(whole / "checkpoints" / "distilled-best").latest() == row["iteration"]
    out = tmp_path / "again.json"
    seed = str(row["seeds"][0])
    assert evaluate.main(["--run", str(whole), "--quiet", "--first-seed", seed, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["accuracy"]["accuracies"] == pytest.approx(row["accuracies"], abs=1e-6)


def test_protocol_is_named_in_table_and_result(whole):
    table = (whole / "table.md").read_text()
    assert "Protocol `paper`: distilled rows are the best of 3 tests on the test set" in table
    assert "the distilled rows are the best of 3 tests on the test set" in (whole / "report.html").read_text()
    protocol = json.loads((whole / "result.json").read_text())["protocol"]
    assert protocol["evaluate"]["protocol"] == "paper" and protocol["networks"] == results.NETWORKS["paper"]
    assert "best on the test set" in protocol["networks"]


def test_extended_run_keeps_its_tests_and_the_best_of_all(toy, whole, tmp_path):
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    assert start(toy, out, "--extend", "distill.iterations=7") == 0
    tests, old = (json.loads((run / "evaluation.json").read_text()) for run in (out, whole))
    assert {name: tests[name] for name in old} == old
    steps = (2, 4, 5, 6, 7)
    assert {name for name in tests if name.startswith("distilled")} == {f"distilled after {step}" for step in steps}
    means = {step: np.mean(list(tests[f"distilled after {step}"]["accuracies"].values())) for step in steps}
    row = json.loads((out / "result.json").read_text())["accuracy"]
    assert (row["iteration"], row["tests"]) == (max(steps, key=means.get), 5)


class KilledError(Exception):
    """Stands for SIGKILL."""


def test_run_killed_in_its_tests_ends_in_the_same_bits(toy, whole, tmp_path, monkeypatch):
    write, save, written = evaluation.write_json, Checkpoints.save, []

    def half_tested(path, value):
        write(path, value)
        written.append(path)
        # The first of the two networks of the second test.
        if len(written) == 3:
            raise KilledError

    def tested(self, step, *rest, kept=False):
        if self.path.name != "distilled-best":
            return save(self, step, *rest)
        if kept:
            save(self, step, *rest)
        raise KilledError

    # Killed with a test that nothing was kept of, with one that was kept, and within a test.
    for target, name, kill in (
        (Checkpoints, "save", tested),
        (Checkpoints, "save", functools.partialmethod(tested, kept=True)),
        (evaluation, "write_json", half_tested),
    ):
        with monkeypatch.context() as patch, pytest.raises(KilledError):
            patch.setattr(target, name, kill)
            start(toy, tmp_path / "run")
    assert start(toy, tmp_path / "run") == 0
    assert_same(findings(tmp_path / "run"), findings(whole))


def test_tests_do_not_change_what_is_distilled(toy, whole, tmp_path):
    settings = ["evaluate.protocol=trusted", "evaluate.steps=1", "baselines.pixel=false", "baselines.fit_only=false"]
    assert start(toy, tmp_path / "run", *settings) == 0
    row = json.loads((tmp_path / "run" / "result.json").read_text())["accuracy"]
    assert "tests" not in row and "Protocol" not in (tmp_path / "run" / "table.md").read_text()

    def losses(run):
        return {m["step"]: m["loss"] for m in read_metrics(run) if m["phase"] == "main-distill"}

    tested, untested = losses(whole), losses(tmp_path / "run")
    assert set(tested) == {2, 3, 4, 5} and set(untested) == {3, 5}
    assert {step: tested[step] for step in untested} == untested
