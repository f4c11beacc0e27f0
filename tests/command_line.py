"""Runs of the command line inside the test process, and what they leave."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from train import distill
from train.checkpoint import Checkpoints
from train.rundir import is_wall_clock, read_metrics

ROOT = Path(__file__).resolve().parent.parent


def start(config: Path, out: Path | None, *arguments: str) -> int:
    """Runs the command line in this process and returns its exit code."""
    where = [] if out is None else ["--out", str(out)]
    try:
        return distill.main(["--config", str(config), "--quiet", *where, *arguments])
    except SystemExit as end:
        return end.code


def refused(capsys, code: int) -> str:
    """Checks that a command ended with one line of error, and returns that line."""
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


def findings(run: Path) -> dict:
    """Everything a run found out, in a form that can be compared.

    Left out are times, the command, and the commit, which may change while the tests run.
    """

    def untimed(value):
        if isinstance(value, dict):
            left_out = ("command", "commit", "commits", "dirty")
            return {k: untimed(v) for k, v in value.items() if not is_wall_clock(k) and k not in left_out}
        return value

    export = {
        "arrays": (run / "export" / "synset.safetensors").read_bytes(),
        "manifest": untimed(json.loads((run / "export" / "manifest.json").read_text())),
        "files": sorted(path.name for path in (run / "export").iterdir()),
    }
    metrics = [untimed(entry) for entry in read_metrics(run)]
    checkpoints = {}
    for phase in sorted((run / "checkpoints").iterdir()):
        with Checkpoints(phase) as held:
            checkpoints[phase.name] = held.latest()
    return {
        "export": export,
        "metrics": {phase: [m for m in metrics if m["phase"] == phase] for phase in checkpoints},
        "lines": len(metrics),
        "checkpoints": checkpoints,
        "config": (run / "config.yaml").read_bytes(),
        "evaluation": untimed(json.loads((run / "evaluation.json").read_text())),
        "result": untimed(json.loads((run / "result.json").read_text())),
        "table": (run / "table.md").read_bytes(),
        "pictures": {path.name: path.read_bytes() for path in run.glob("*.png")},
    }


def assert_same(found: dict, expected: dict) -> None:
    for key in expected:
        assert found[key] == expected[key], key


def kill_while_distilling(config: Path, out: Path, step: int, settings: dict) -> None:
    """Runs the command line in a process that SIGKILL ends right after the line of metrics of a step."""
    program = f"""
import os, signal
from train import distill
from train.rundir import RunDir
append = RunDir.append
def wrapper(self, phase, step, **values):
    append(self, phase, step, **values)
    if (phase, step) == ("main-distill", {step}):
        os.kill(os.getpid(), signal.SIGKILL)
RunDir.append = wrapper
distill.main(["--config", {str(config)!r}, "--quiet", "--out", {str(out)!r}])
"""
    environment = {name.upper(): str(value) for name, value in settings.items()}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read_metrics(out)[-1]["step"] == step
