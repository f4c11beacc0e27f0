"""Trajectory matching and its experts on the command line."""

import json
import re
from pathlib import Path

import pytest
from command_line import ends, refused, start

import gsdd_jax
from train import experts
from train.rundir import read_metrics

ROOT = Path(__file__).resolve().parent.parent
# Two checkpoints, a window of two starting epochs.
TOY = """
name: toy
ipc: 1
whiten: zca
data: {source: digits, per_class: 8, test_limit: 50}
network: {depth: 1, width: 4}
augment: {strategy: crop}
codec: {name: gaussian, images_per_class: 2, num_points: 5, lr: 0.01}
fit: {steps: 2}
experts: {count: 2, batch: 16, lr: 0.1}
objective: {name: trajectory, syn_steps: 2, batch_syn: 10, expert_epochs: 1, max_start_epoch: 2, lr_lr: 0.001}
distill: {iterations: 6, log_every: 1, checkpoint_every: 2}
evaluate: {steps: 4, batch: 8, lr: 0.1, lr_from: syn_lr, seeds: 2}
baselines: {full_data: false, random_real: false, pixel: false}
smoke: {fit: {steps: 1}}
"""
# Steps are those of the toy run, whose executables serve again.
SHORT = ["baselines.fit_only=false", "evaluate.seeds=1"]


def train_experts(config: Path, *arguments: str) -> int:
    return ends(experts, "--config", config, "--quiet", *arguments)


def test_run_trains_its_experts_and_learns_the_step_size(whole):
    manifest = json.loads((whole / "experts" / "manifest.json").read_text())
    # Starts at epochs 0 and 1, one epoch each: nothing past epoch 2 can be used.
    assert manifest["epochs"] == 2 and sum(len(chunk["crc32"]) for chunk in manifest["chunks"]) == 2
    logged = [entry for entry in read_metrics(whole) if entry["phase"] == "main-distill"]
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4, 5, 6]
    assert all(entry["bad_step"] == -1 and entry["syn_lr"] >= 1e-3 for entry in logged)
    assert gsdd_jax.load(whole).meta["syn_lr"] == logged[-1]["syn_lr"] != 0.01
    result = json.loads((whole / "result.json").read_text())
    assert result["objective"] == "trajectory" and result["accuracy"]["n"] == 2
    # Its networks are trained at that step size, others as configured.
    assert (result["accuracy"]["lr"], result["fit_only"]["lr"]) == (logged[-1]["syn_lr"], 0.1)


def test_experts_trained_beforehand_serve_several_runs(toy, whole, tmp_path, capsys):
    folder = tmp_path / "experts"
    assert train_experts(toy, "--out", str(folder)) == 0
    assert f"{folder}: 2 experts, 2 epochs" in capsys.readouterr().out
    chunks = sorted(path.name for path in folder.glob("*.npy"))
    assert [(folder / name).read_bytes() for name in chunks] == [
        (whole / "experts" / name).read_bytes() for name in chunks
    ]
    shared = [f"experts.path={folder}", "experts.train=false", *SHORT]
    assert start(toy, tmp_path / "run", *shared) == 0
    assert not (tmp_path / "run" / "experts").exists()
    exports = [run / "export" / "synset.safetensors" for run in (tmp_path / "run", whole)]
    assert exports[0].read_bytes() == exports[1].read_bytes()


def test_half_written_experts_are_counted_and_completed(toy, whole, tmp_path, capsys):
    folder = tmp_path / "experts"
    assert train_experts(toy, "--out", str(folder), "experts.count=1") == 0
    settings = [f"experts.path={folder}", *SHORT]
    text = refused(capsys, start(toy, tmp_path / "run", "experts.train=false", *settings))
    assert f"{folder}: half written: 1 of 2 experts are finished" in text
    assert start(toy, tmp_path / "run", *settings) == 0
    assert (folder / "experts-00001.npy").read_bytes() == (whole / "experts" / "experts-00001.npy").read_bytes()


OWN, ABSENT = "experts.path=RUN/experts", "experts.path=/absent/experts"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([OWN, "objective.max_start_epoch=3"], "max_start_epoch 3 with expert_epochs 1 reaches epoch 3, but these "),
        ([OWN, "network.width=8"], "RUN/experts: "),
        ([OWN, "network.width=8"], "network.width: expected 8, found 4"),
        ([OWN, "data.per_class=7"], "dataset: expected "),
        ([OWN, "experts.lr=0.2"], "experts.lr: expected 0.2, found 0.1"),
        ([ABSENT, "experts.train=false"], "/absent/experts: no experts here"),
        ([ABSENT, "experts.train=false"], "train.experts with the same config and settings and --out /absent/experts"),
        (["mmd.weight=-1"], "mmd.weight: expected a number >= 0, found -1"),
        (["mmd.weight=1", "codec.images_per_class=1"], "mmd.weight: the term needs 2 synthetic images per class, the"),
        (["mmd.weight=1", "baselines.pixel=true"], "baselines.pixel_codec: mmd.weight: the term needs 2 synthetic "),
        (
            ["objective={name: distribution}", "mmd={weight: 1, features: expert}"],
            "mmd.features: experts are trained for objective.name=trajectory; expected random with distribution",
        ),
    ],
)
def test_experts_and_terms_that_do_not_fit_are_refused(toy, whole, tmp_path, capsys, settings, message):
    given = [one.replace("RUN", str(whole)) for one in settings]
    assert message.replace("RUN", str(whole)) in refused(capsys, start(toy, tmp_path / "run", *given))
    # Said before anything is computed.
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_damaged_expert_stops_the_run_and_is_named(toy, whole, tmp_path, capsys):
    folder = tmp_path / "experts"
    folder.mkdir()
    for path in (whole / "experts").glob("[!.]*"):
        (folder / path.name).write_bytes(path.read_bytes())
    for file in folder.glob("*.npy"):
        data = bytearray(file.read_bytes())
        for row in range(3):
            data[-1 - row * (len(data) - 128) // 3] ^= 1
        file.write_bytes(data)
    text = refused(capsys, start(toy, tmp_path / "run", f"experts.path={folder}"))
    assert "damaged: the checksum of expert " in text


def test_student_that_diverges_stops_the_run_with_iteration_step_and_remedy(toy, whole, tmp_path, capsys):
    settings = [f"experts.path={whole / 'experts'}", "objective.syn_lr=1e30", *SHORT]
    text = refused(capsys, start(toy, tmp_path / "run", *settings))
    assert re.search("main-distill: .* not finite by iteration 1; nothing was checkpointed yet", text)
    assert "try a smaller learning rate (codec.lr, now " in text and "or objective.lr_lr) with --extend in this" in text
    assert "a smaller objective.syn_lr" in text and re.search("not finite from its step [12] on", text)


def test_dry_run_of_trajectory_matching_trains_nothing(toy, tmp_path, capsys):
    assert start(toy, None, "--dry-run", f"experts.path={tmp_path / 'experts'}", "experts.count=100") == 0
    # 4 * 1 * 3 * 3 + 4 weights of the convolution, 2 * 4 of the norm, 4 * 16 * 10 + 10 of the head; initialization too.
    size = 100 * 3 * (40 + 8 + 650) * 4 / 2**20
    assert f"experts: 100 networks, 2 epochs each, {size:.0f} MiB on disk" in capsys.readouterr().out
    assert not (tmp_path / "experts").exists()


def test_experts_for_another_objective_are_refused(toy, tmp_path, capsys):
    config = tmp_path / "distribution.yaml"
    lines = [line for line in TOY.splitlines() if not line.startswith("objective:")]
    config.write_text("\n".join(lines))
    text = refused(capsys, train_experts(config))
    assert "objective.name: expected trajectory, or distribution with objective.networks=experts" in text
