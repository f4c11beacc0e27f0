"""Many runs by one command, through real local processes; Slurm by what is handed to it."""

import json
import os
import signal
import time
from pathlib import Path
from threading import Thread

import pytest
from command_line import image_folder

import gsdd_jax
from train import config as configs
from train import launch
from train.errors import ConfigError

TOY = """
name: toy
ipc: 1
data: {source: folder, path: PATH}
network: {depth: 1, width: 4}
augment: {strategy: crop}
codec: {name: pixel, lr: 0.01}
objective: {name: distribution, batch_real: 4, class_chunk: 2}
distill: {iterations: 4, log_every: 1, checkpoint_every: 2}
evaluate: {steps: 2, batch: 8, lr: 0.1, seeds: 2}
baselines: {full_data: false, pixel: false, random_real: false, fit_only: false}
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = image_folder(tmp_path_factory.mktemp("toy"), "abcd")
    (folder / "toy.yaml").write_text(TOY.replace("PATH", str(folder)))
    return folder / "toy.yaml"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("codec.lr=0.003,1e-2", ["codec.lr=0.003", "codec.lr=0.01"]),
        ("labels.kind=hard,soft", ["labels.kind=hard", "labels.kind=soft"]),
        ("augment.strategy='crop,flip'", ["augment.strategy='crop,flip'"]),
        ("baselines.compressed=[webp, jpeg]", ["baselines.compressed=[webp, jpeg]"]),
        ("labels={kind: soft, top_k: 3}", ["labels={kind: soft, top_k: 3}"]),
        ("seed", ["seed"]),
    ],
)
def test_values_are_separated_by_commas_outside_of_lists(override, expected):
    assert configs.choices(override) == expected


def test_plan_is_the_product_of_values_and_subtasks_with_a_merge_of_each(toy):
    _, runs = launch.plan(toy, ["subtasks=2", "seed=0,1", "codec.lr=0.1"], out=Path("x"))
    paths = [f"x/seed={seed}/{part}" for seed in (0, 1) for part in ("subtask0", "subtask1", "merged")]
    assert [str(run.path) for run in runs] == paths
    assert [len(run.after) for run in runs] == [0, 0, 2] * 2
    assert runs[4].command[-4:] == ("subtasks=2", "codec.lr=0.1", "seed=1", "subtask=1")
    assert [str(run.path) for run in launch.plan(toy, ["seed=3,4"])[1]] == ["runs/toy/seed=3", "runs/toy/seed=4"]


def test_nothing_to_launch_and_bad_settings_are_refused_before_anything_starts(toy):
    with pytest.raises(ConfigError, match="expected a setting with several values, such as seed=0,1,2"):
        launch.plan(toy, ["subtasks=2", "subtask=1"])
    with pytest.raises(ConfigError, match="codec.lr: expected a number > 0, found -1"):
        launch.plan(toy, ["codec.lr=0.1,-1"])


def test_killed_subtask_is_started_again_and_all_are_merged(toy, tmp_path, capsys):
    out = tmp_path / "out"

    def kill() -> None:
        # The job's own process, once it has something to go on from.
        while not list(out.glob("subtask0/checkpoints/main-distill/2")):
            time.sleep(0.05)
        number = json.loads((out / "launch" / "jobs.json").read_text())["jobs"][str(out / "subtask0")]
        children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)

    killer = Thread(target=kill)
    killer.start()
    arguments = ["--config", str(toy), "--out", str(out), "subtasks=2"]
    assert launch.main(arguments) == 0
    killer.join()
    assert len(list((out / "launch").glob("*_log.out"))) == 4  # two subtasks, one of them twice, and the merge
    assert gsdd_jax.load(out / "merged").class_names == tuple("abcd")
    row = json.loads((out / "launch.json").read_text())["rows"][0]
    found = json.loads((out / "merged" / "result.json").read_text())["accuracy"]
    assert row["mean"] == found["mean"] and row["n"] == found["n"] == 2
    environment = json.loads((out / "subtask0" / "environment.json").read_text())
    assert len(environment) == 2 and "-m train.distill --config" in environment[0]["command"]
    # Again: nothing is left to do.
    capsys.readouterr()
    assert launch.main(arguments) == 0
    assert "running" not in capsys.readouterr().err and len(list((out / "launch").glob("*_log.out"))) == 4
    # What is there is of other settings: refused, once, and the merge does not begin.
    assert launch.main([*arguments, "distill.iterations=3"]) == 1
    err = capsys.readouterr().err
    assert err.count("distill.iterations is 4 there and 3 now") >= 2 and f"needs {out / 'subtask'}" in err
    assert len(list((out / "launch").glob("*_log.out"))) == 6


def test_slurm_is_given_what_was_asked_for(toy, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "bin"
    folder.mkdir()
    # Jobs that end at once, without a result.
    for name, text in (("srun", ""), ("sbatch", "echo Submitted batch job 7"), ("scancel", ""), ("sacct", "")):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    (folder / "sacct").write_text("#!/bin/sh\necho 'JobID|State|NodeList'\necho '7|FAILED|'\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    out = tmp_path / "out"
    arguments = ["--config", str(toy), "--out", str(out), "seed=0,1", "--on", "slurm", "--retries", "0"]
    assert launch.main([*arguments, "--slurm", "partition=gpu", "time=240", "gpus_per_node=1"]) == 1
    script = (out / "launch" / "7_submission.sh").read_text()
    for line in ("--partition=gpu", "--time=240", "--gpus-per-node=1", "--job-name=gsdd"):
        assert f"#SBATCH {line}\n" in script
    assert "submitit.core._submit" in script
    with pytest.raises(SystemExit, match="2"):
        launch.main([*arguments, "--slurm", "gpu"])
    assert "--slurm: expected KEY=VALUE such as partition=gpu, found 'gpu'" in capsys.readouterr().err
    (folder / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: cpu' >&2\nexit 1\n")
    with pytest.raises(SystemExit, match="2"):
        launch.main([*arguments, "--slurm", "partition=cpu"])
    assert "error: --slurm: sbatch: error: invalid partition specified: cpu" in capsys.readouterr().err
