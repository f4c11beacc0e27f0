"""Runs of the command line inside the test process, and what they leave."""

from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from benchmarks.kills import findings
from train import distill

__all__ = ["ROOT", "assert_same", "ends", "findings", "image_folder", "refused", "start"]

ROOT = Path(__file__).resolve().parent.parent


def ends(command: ModuleType, *arguments) -> int:
    """Runs a command line in this process and returns its exit code."""
    try:
        return command.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def start(config: Path, out: Path | None, *arguments: str) -> int:
    """Runs `train.distill` in this process and returns its exit code."""
    return ends(distill, "--config", config, "--quiet", *([] if out is None else ["--out", out]), *arguments)


def refused(capsys, code: int) -> str:
    """Checks that a command ended with one line of error, and returns that line."""
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


def image_folder(folder: Path, classes: str) -> Path:
    """Writes four noisy images of 8x8 pixels in each split of each class: read faster than scikit-learn's digits."""
    rng = np.random.default_rng(0)
    for path in (folder / s / name / f"{i}.png" for s in ("train", "test") for name in classes for i in range(4)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return folder


def assert_same(found: dict, expected: dict) -> None:
    for key in expected:
        assert found[key] == expected[key], key
