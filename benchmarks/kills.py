"""Kills real runs at random moments and compares what they end with: ``python -m benchmarks.kills [--kills 30]``.

For each objective a small job on the digits (fit, experts, distillation of two arms, export, evaluation) is run to its
end once, undisturbed. Then it is run again and killed by SIGKILL at a moment drawn uniformly from its whole life, up to
``--in-a-row`` times before it may end. The same command goes on each time; parameters, metrics, checkpoints, export,
accuracies, tables and pictures must have the bits of the undisturbed run. The log says what each kill interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from train.checkpoint import Checkpoints
from train.errors import exit_cleanly
from train.rundir import is_wall_clock, read_metrics

SEED = 0
# Several checkpoints in every stage, of which the newest two stay.
CONFIG = """
name: kills
ipc: 1
data: {source: digits, per_class: 8, test_limit: 50}
network: {depth: 1, width: 4}
augment: {strategy: crop}
codec: {name: gaussian, images_per_class: 2, num_points: 5, lr: 0.01}
fit: {steps: 20}
experts: {count: 3, batch: 16, lr: 0.1}
distill: {iterations: 30, log_every: 2, checkpoint_every: 4}
evaluate: {steps: 40, batch: 8, lr: 0.1, seeds: 4}
baselines: {full_data: true, random_real: true, pixel: true}
"""
OBJECTIVES = {
    "distribution": "{name: distribution, batch_real: 6}",
    "gradient": "{name: gradient, batch_real: 6, outer_loop: 2, inner_loop: 1}",
    "trajectory": "{name: trajectory, syn_steps: 2, batch_syn: 10, expert_epochs: 1, max_start_epoch: 2, lr_lr: 0.001}",
}


def findings(run: Path) -> dict[str, Any]:
    """Everything a run found out, in a form that can be compared.

    Left out are times, the command, and the commit, which may change while runs are compared.
    """

    def untimed(value: Any) -> Any:
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
    checkpoints = {phase.name: Checkpoints(phase).latest() for phase in sorted((run / "checkpoints").iterdir())}
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


def interrupted(run: Path) -> str:
    """Says what a run was about when it died, by what it left."""
    if not (run / "config.yaml").exists():
        return "start"
    if (run / "result.json").exists():
        return "end"
    half = [p.name for p in run.rglob("*") if p.suffix == ".tmp" or "orbax-checkpoint-tmp" in p.name]
    lines = read_metrics(run)
    last = f"after {lines[-1]['phase']} {lines[-1]['step']}" if lines else "before the first line of metrics"
    evaluated = json.loads((run / "evaluation.json").read_text()) if (run / "evaluation.json").exists() else {}
    if evaluated:
        arm = list(evaluated)[-1]
        last = f"evaluation of {arm}, {len(evaluated[arm]['accuracies'])} networks done"
    elif (run / "export").exists():
        last += ", exported"
    return last + (f", {half[0]} half written" if half else "")


class Job:
    """A config, and how it is run in a process of its own."""

    def __init__(self, folder: Path, objective: str):
        self.config, self.folder = folder / f"{objective}.yaml", folder / objective
        self.config.write_text(f"{CONFIG}objective: {OBJECTIVES[objective]}\n")
        # Every start compiles the same programs; without a cache most kills would hit the compiler.
        self.environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }

    def start(self, out: Path) -> subprocess.Popen[bytes]:
        """Starts the job."""
        command = [sys.executable, "-m", "train.distill", "--config", str(self.config), "--out", str(out), "--quiet"]
        return subprocess.Popen(
            command, cwd=record.ROOT, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def finish(self, out: Path) -> float:
        """Runs the job to its end; returns the seconds.

        Raises:
            RuntimeError: It failed.
        """
        began = time.perf_counter()
        process = self.start(out)
        _, errors = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"{out.name}: exit code {process.returncode}: {errors.decode()[-2000:]}")
        return time.perf_counter() - began


def torture(job: Job, kills: int, in_a_row: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Kills a job so often, and returns a row for every run: what was hit, and whether its bits are those it should."""
    whole = job.folder / "whole"
    job.finish(job.folder / "compiling")
    life = job.finish(whole)
    expected = findings(whole)
    rows: list[dict[str, Any]] = []
    done = 0
    while done < kills:
        out = job.folder / f"run{len(rows)}"
        hits = []
        while len(hits) < in_a_row and done < kills:
            moment = float(rng.uniform(0, life))
            process = job.start(out)
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                done += 1
                hits.append({"after_seconds": moment, "hit": interrupted(out)})
                continue
            process.communicate()
            break
        job.finish(out)
        found = findings(out)
        different = [key for key in expected if found[key] != expected[key]]
        rows.append({"kills": hits, "different": different})
        for hit in hits:
            print(f"{job.folder.name}: {hit['hit']}", file=sys.stderr, flush=True)
        print(f"{job.folder.name}: {', '.join(different) or 'same bits'}", file=sys.stderr, flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, 1 if any bit differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="over all objectives (default: 30)")
    parser.add_argument("--in-a-row", type=int, default=3, help="of one run, at most (default: 3)")
    parser.add_argument("--only", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), metavar="OBJECTIVE")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "kills.json", metavar="FILE")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for index, objective in enumerate(args.only):
            share = args.kills // len(args.only) + (index < args.kills % len(args.only))
            results[objective] = torture(Job(Path(folder), objective), share, args.in_a_row, rng)
    record.write(args.out, results, seed=args.seed, n=args.kills, in_a_row=args.in_a_row)
    runs = [run for rows in results.values() for run in rows]
    spoilt = sum(bool(run["different"]) for run in runs)
    print(f"{sum(len(run['kills']) for run in runs)} kills in {len(runs)} runs; {spoilt} runs ended in other bits")
    return int(spoilt > 0)


if __name__ == "__main__":
    sys.exit(exit_cleanly()(main)())
