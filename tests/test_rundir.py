"""Run directories: refusal of another config, identical metrics after a kill, atomic files, one writer."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from train import rundir
from train.errors import UserError
from train.rundir import RunDir, compare, read_config, read_environment, read_history, read_metrics

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "name": "dïgits",
    "seed": 0,
    "data": {"size": (8, 8), "path": Path("data/x")},
    "distill": {"iterations": 100, "lr": 1e-5, "momentum": None, "augment": True, "extra": {}},
}


def _with(**changes):
    return CONFIG | {"distill": CONFIG["distill"] | changes}


def test_former_names_of_settings_are_no_other_config(tmp_path):
    before = {"ipc": 1.0, "codec": {"gpc": 3}, "evaluate": {"optimiser": "sgd"}}
    now = {"ipc": 1.0, "codec": {"images_per_class": 3}, "evaluate": {"optimizer": "sgd"}}
    with RunDir(tmp_path) as run:
        run.configure(before)
        assert run.configure(now) is True
        with pytest.raises(UserError, match="codec.images_per_class is 3 there and 4 now"):
            run.configure(now | {"codec": {"images_per_class": 4}})


def test_config_survives_yaml_for_awkward_values(tmp_path):
    config = {"a": float("inf"), "b": float("nan"), "c": "1e-5", "d": "null", "e": [], "f": np.float32(0.1), "g": 1e22}
    config |= {"name": "dïgits", "size": (8, 8), "path": Path("data/x"), "empty": {}}
    with RunDir(tmp_path / "deep" / "run") as run:
        assert run.configure(config) is False
    with RunDir(tmp_path / "deep" / "run") as run:
        assert run.configure(config) is True
        assert read_config(run.path).items() >= {"name": "dïgits", "size": [8, 8], "path": "data/x", "g": 1e22}.items()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 2e-5}, r"distill.lr is 1e-05 there and 2e-05 now\. Put the old values back"),
        ({"momentum": 0.9, "lr": 1}, "distill.lr is 1e-05 there and 1 now; distill.momentum is null there and 0.9 now"),
        ({"new": "x"}, 'distill.new is not set there and "x" now'),
        ({"augment": 1}, "distill.augment is true there and 1 now"),
        ({"extra": {"k": 2}}, "distill.extra.k is not set there and 2 now"),
        ({"iterations": 200, "lr": 3}, r"\(free to change: distill.iterations\)"),
    ],
)
def test_another_config_is_refused_with_both_values(tmp_path, changes, words):
    with RunDir(tmp_path) as run:
        run.configure(CONFIG)
        before = run.config_path.read_bytes()
        with pytest.raises(UserError, match=words) as caught:
            run.configure(_with(**changes), may_change={"distill.iterations"})
        assert run.config_path.read_bytes() == before
    assert "iterations is" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fields_that_may_change_are_stored_anew(tmp_path):
    with RunDir(tmp_path) as run:
        run.configure(CONFIG)
        assert run.configure(_with(iterations=200), may_change=("distill.iterations",)) is True
        assert read_config(tmp_path)["distill"]["iterations"] == 200
        assert run.configure(_with(iterations=7, lr=5, augment=False), may_change=["distill"]) is True
        with pytest.raises(UserError, match="distill.iterations is 7 there and 8 now"):
            run.configure(_with(iterations=8, lr=5, augment=False), may_change=["distill.iter", "dist"])


def test_a_setting_that_came_later_may_have_its_default_and_nothing_else(tmp_path):
    with RunDir(tmp_path) as run:
        run.configure(CONFIG)
        new = CONFIG | {"mmd": {"weight": 0.0, "kind": "joint"}}
        with pytest.raises(UserError, match="mmd.kind is not set there and .*joint"):
            run.configure(new, defaults={"mmd": {"weight": 0.0}})
        with pytest.raises(UserError, match="mmd.weight is not set there and 0.0 now"):
            run.configure(new, defaults={"mmd": {"weight": 1.0, "kind": "joint"}})
        assert run.configure(new, defaults={"mmd": {"weight": 0.0, "kind": "joint"}}) is True
        # From here on the setting is known.
        with pytest.raises(UserError, match="mmd.weight is 0.0 there and 2.0 now"):
            run.configure(
                CONFIG | {"mmd": {"weight": 2.0, "kind": "joint"}}, defaults={"mmd": {"weight": 2.0, "kind": "joint"}}
            )


def test_what_an_older_version_left_open_is_filled_in_and_nothing_else(tmp_path):
    def config(loop, sha):
        return {"loop": loop, "data": {"path": "x"} | ({} if sha is None else {"sha256": sha})}

    with RunDir(tmp_path) as run:
        run.configure(config(0, None))
        asked, defaults = config(0, ""), {"data": {"sha256": ""}}
        with pytest.raises(UserError, match="loop is 0 there and 5 now"):
            run.configure(config(5, "abc"), asked=config(5, ""), defaults=defaults)
        assert run.configure(config(10, "abc"), asked=asked, defaults=defaults) is True
        assert read_config(tmp_path) == config(10, "abc")
        # From here on it is known.
        with pytest.raises(UserError, match='data.sha256 is "abc" there and "def" now'):
            run.configure(config(10, "def"), asked=asked, defaults=defaults)
        assert run.configure(config(10, "abc"), asked=asked, defaults=defaults) is True


def test_extension_is_recorded_with_the_settings_in_one_file(tmp_path):
    rules = {"extendable": ["distill.iter*"], "may_change": ["name"]}
    more = _with(iterations=200)
    with RunDir(tmp_path) as run:
        run.configure(CONFIG)
        with pytest.raises(UserError, match="iterations is 100 there and 200 now.*; add --extend to go on with"):
            run.configure(more, **rules)
        with pytest.raises(UserError, match=r"lr is 1e-05 there and 2 now\..*; --extend takes distill.iter\*"):
            run.configure(_with(iterations=200, lr=2), extension={}, **rules)
        assert read_history(tmp_path) == []
        changes = compare(tmp_path, more, extend=True, **rules)
        assert changes == {"distill.iterations": (100, 200)}
        run.configure(more, extension={"changes": changes, "from": 7}, **rules)
        run.configure(more | {"name": "b"}, **rules)
        run.configure(_with(iterations=300) | {"name": "b"}, extension={"from": 8}, **rules)
    first, second = read_history(tmp_path)
    assert (first["from"], first["changes"]) == (7, {"distill.iterations": [100, 200]})
    assert second["from"] == 8 and second["time"] >= first["time"]
    assert "commit" in first and read_config(tmp_path)["distill"]["iterations"] == 300


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


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", "line 1"), ("", "it holds no mapping"), ("a: \x00", "not allowed")]
)
def test_damaged_config_is_named(tmp_path, text, words):
    (tmp_path / "config.yaml").write_text(text)
    expected = rf"config.yaml is damaged \(.*{words}.*\): restore it or choose another"
    with RunDir(tmp_path) as run, pytest.raises(UserError, match=expected):
        run.configure(CONFIG)


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
