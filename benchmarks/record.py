"""How every benchmark stores its numbers: with all that is needed to judge them and to get them again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from train import rundir

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SETS = ROOT / "sets"


def environment() -> dict[str, Any]:
    """Describes the command, the code and the machine of this process.

    Returns:
        What a run records (versions, device, commit, dirty, command, start), and ``load``, the runnable processes of
        the last minute: timings taken at a load above the number of cores are noisy.
    """
    return rundir.environment() | {"load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None}


def write(
    path: str | os.PathLike[str],
    results: Any,
    *,
    seed: int | list[int],
    n: int,
    commit: str | None = None,
    **settings: Any,
) -> Path:
    """Writes one JSON file with ``results`` and their circumstances, and creates its folder.

    Args:
        path: The file.
        results: What was measured; JSON types only.
        seed: The seed or seeds of everything random.
        n: Repeats or images behind each number.
        commit: Of the code, where git cannot tell, as in a copy without history.
        settings: The constants of the benchmark.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = environment()
    record["commit"] = record["commit"] or commit
    record |= {"seed": seed, "n": n, "settings": settings, "results": results}
    return rundir.write_json(path, record)
