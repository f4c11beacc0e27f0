"""Run directories: refusal of another config, identical metrics after a kill, atomic files, one writer."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from train import rundir, yaml12
from train.errors import UserError
from train.rundir import RunDir, read_environment, read_history, read_metrics

ROOT = Path(__file__).resolve().parent.parent


def test_config_survives_yaml_for_awkward_values(tmp_path):
    config = {"a": float("inf"), "b": float("nan"), "c": "1e-5", "d": "null", "e": [], "f": np.float32(0.1), "g": 1e22}
    config |= {"name": "dïgits", "size": (8, 8), "path": Path("data/x"), "empty": {}}
    with RunDir(tmp_path / "deep" / "run") as run:
        assert run.configure(config) is False
    with RunDir(tmp_path / "deep" / "run") as run:
        assert run.configure(config) is True
        found = yaml12.parse(run.config_path.read_text(), source="")
        assert found.items() >= {"name": "dïgits", "size": [8, 8], "path": "data/x", "g": 1e22}.items()
        assert math.isnan(found["b"]) and found["e"] == [] and found["empty"] == {}


def test_extension_is_recorded_with_the_settings_in_one_file(tmp_path):
    with RunDir(tmp_path) as run:
        run.configure({"lr": 1})
        assert read_history(tmp_path) == []
        run.configure({"lr": 2}, extension={"changes": {"lr": (1, 2)}, "from": 7})
        run.configure({"lr": 2, "name": "b"})
        run.configure({"lr": 3, "name": "b"}, extension={"from": 8})
        assert "lr: 3" in run.config_path.read_text()
    first, second = read_history(tmp_path)
    assert (first["from"], first["changes"], second["from"]) == (7, {"lr": [1, 2]}, 8)
    assert "commit" in first and second["time"] >= first["time"]


def test_uninterrupted_and_resumed_metrics_are_the_same_bytes(tmp_path):
    def log(run, steps):
        for step in steps:
            run.append("distill", step, loss=1 / step, nested={"psnr": [np.float32(20.5), jnp.float32(step)]})

    with RunDir(tmp_path / "whole") as run:
        run.append("fit", 50, loss=0.5)
        log(run, range(1, 11))
    with RunDir(tmp_path / "killed") as run:
        run.configure({})
        run.append("fit", 50, loss=0.5)
        log(run, range(1, 8))
    path = tmp_path / "killed" / "metrics.jsonl"
    whole_line = path.read_bytes()
    path.write_bytes(whole_line + b'{"phase": "distill", "st')
    assert len(read_metrics(path.parent)) == 8
    with RunDir(tmp_path / "killed") as run:
        assert path.read_bytes() == whole_line
        run.truncate("distill", 4)
        log(run, range(5, 11))
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_truncate_touches_only_its_phase(tmp_path):
    with RunDir(tmp_path) as run:
        run.truncate("fit", 3)
        for step in (1, 2):
            run.append("fit", step)
            run.append("distill", step)
        run.truncate("distill", -1)
        run.append("distill", 9)
        assert [(e["phase"], e["step"]) for e in read_metrics(tmp_path)] == [("fit", 1), ("fit", 2), ("distill", 9)]


def test_a_killed_writer_leaves_whole_lines_and_a_free_lock(tmp_path):
    child = textwrap.dedent("""
        import sys
        from train.rundir import RunDir
        run = RunDir(sys.argv[1])
        run.configure({"seed": 1})
        print("ready", flush=True)
        for step in range(10**9):
            run.append("distill", step, loss=0.1, text="x" * 3000)
    """)
    command = [sys.executable, "-c", child, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        while not (tmp_path / "metrics.jsonl").exists():
            pass
        with pytest.raises(UserError, match=f"is being written by process {process.pid} on "):
            RunDir(tmp_path)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    with RunDir(tmp_path) as run:
        steps = [e["step"] for e in read_metrics(tmp_path)]
        assert steps == list(range(len(steps)))
        run.append("distill", 0)
    assert len(read_metrics(tmp_path)) == len(steps) + 1


def test_non_finite_metrics_are_strict_json_and_come_back(tmp_path):
    with RunDir(tmp_path) as run:
        run.append("distill", 1, loss=float("nan"), up=np.float32(np.inf), down=[-np.inf])
    line = run.metrics_path.read_text()
    json.loads(line, parse_constant=lambda token: pytest.fail(f"{token} is no JSON"))
    (entry,) = read_metrics(tmp_path)
    assert np.isnan(entry["loss"])
    assert entry["up"] == np.inf
    assert entry["down"] == ["-Infinity"]


def test_damaged_middle_line_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1\n")
    (tmp_path / "metrics.jsonl").write_text('{"phase": "a", "step": 1}\n{oops\n{"phase": "a", "step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2, is damaged \(.*\): delete that line"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match="line 1, is damaged .not an object"):
        RunDir(tmp_path).truncate("a", 0)


def test_damaged_environment_is_named(tmp_path):
    (tmp_path / "environment.json").write_text("{")
    with pytest.raises(UserError, match="environment.json is damaged .*delete it"):
        read_environment(tmp_path)


def test_metrics_without_config_are_not_taken_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    for _ in range(2):  # the lock must be free again after a refusal
        with pytest.raises(UserError, match="holds metrics.jsonl but no config.yaml"):
            RunDir(tmp_path)


def test_environment_is_appended_at_each_start(tmp_path):
    with RunDir(tmp_path) as run:
        run.record_environment()
        run.record_environment()
    first, second = read_environment(tmp_path)
    assert second["started"] >= first["started"]
    assert set(first["versions"]) >= {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "triton"}
    assert first["versions"]["numpy"] == np.__version__
    assert first["platform"] == "cpu"
    assert first["cpu_count"] == os.cpu_count()
    assert first["started"].endswith("+00:00")
    assert first["command"].startswith("python ")


def test_commit_is_that_of_the_code_not_of_the_working_directory(tmp_path, monkeypatch):
    def git(*arguments):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *settings, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    for name in [n for n in os.environ if n.startswith("GIT_")]:
        monkeypatch.delenv(name)
    source = tmp_path / "rundir.py"
    source.write_text("a = 1\n")
    git("init", "-q")
    monkeypatch.setattr(rundir, "__file__", str(source))
    assert rundir.environment()["commit"] is None  # inside a repository, but not of it
    git("add", "rundir.py")
    git("commit", "-qm", "x")
    found = rundir.environment()
    assert (found["commit"], found["dirty"]) == (git("rev-parse", "HEAD"), False)
    source.write_text("a = 2\n")
    assert rundir.environment()["dirty"] is True


def test_leftover_temporary_files_are_removed(tmp_path):
    (tmp_path / "export" / "part0").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".main-fit.123.tmp").mkdir(parents=True)
    for path in (".result.json.123.tmp", "export/part0/.manifest.json.123.tmp", "checkpoints/.main-fit.123.tmp/5"):
        (tmp_path / path).write_text("half")
    (tmp_path / "config.yaml").write_text("a: 1")
    RunDir(tmp_path).close()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, the device that is always full")
def test_full_disk_while_logging_names_the_file(tmp_path):
    with RunDir(tmp_path) as run:
        run.metrics_path.symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left on device") as caught:
            run.append("distill", 1, loss=0.5)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(run.metrics_path)
