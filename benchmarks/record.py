"""How every benchmark stores its numbers: with all that is needed to judge them and to get them again."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax")


def environment() -> dict[str, Any]:
    """Describes the command, the code and the machine of this process.

    Returns:
        ``command``; ``commit``, None outside a repository and ``-dirty`` with uncommitted changes; ``versions``;
        ``device``; ``load``, the processes that ran in the last minute: above the number of cores, timings are noisy.
    """
    device = jax.devices()[0]
    program = sys.modules["__main__"].__spec__
    start = ["python", "-m", program.name] if program else ["python", *sys.argv[:1]]
    return {
        "command": " ".join([*start, *sys.argv[1:]]),
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
        "device": {
            "platform": device.platform,
            "kind": _processor() if device.platform == "cpu" else device.device_kind,
            "count": jax.device_count(),
            "cores": os.cpu_count(),
        },
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def write(path: str | os.PathLike[str], results: Any, *, seed: int | list[int], n: int, **settings: Any) -> Path:
    """Writes one JSON file with ``results`` and their circumstances, and creates its folder.

    Args:
        path: The file.
        results: What was measured; JSON types only.
        seed: The seed or seeds of everything random.
        n: Repeats behind each number.
        settings: The constants of the benchmark.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = environment() | {"seed": seed, "n": n, "settings": settings, "results": results}
    path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _commit() -> str | None:
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
