"""Runs of the command line inside the test process, and what they leave."""

import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.kills import findings
from train import distill
from train.rundir import read_metrics

__all__ = ["ROOT", "assert_same", "findings", "kill_while_distilling", "refused", "start"]

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


def assert_same(found: dict, expected: dict) -> None:
    for key in expected:
        assert found[key] == expected[key], key


def kill_while_distilling(config: Path, out: Path, step: int) -> None:
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
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read_metrics(out)[-1]["step"] == step
