"""This library against PyTorch on one and two cores of a CPU, with the same networks, images and steps.

    python -m benchmarks.peers [--torch-python PYTHON] [--only TASK ...] [--rounds N] [--smoke] [--out FILE]

Forward pass, training step, distribution matching of pixels with DSA and a fresh network in each step, and the step of
trajectory matching through an unrolled student. Ours are the functions that the command lines call; PyTorch's are
written here as its users write them, with maps contiguous and with channels last, of which the better counts. Before
anything is timed, both do everything from the same weights and must agree.

Each competitor is a process of its own. All of a row hold their data and programs at the same time and take turns, on
the same cores, so that whatever else the machine does hits all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.peers import worker
from benchmarks.peers.worker import TASKS, Case
from train.errors import UserError, exit_cleanly

OURS = "ours"
CORES, WIDTHS, ROUNDS = (1, 2), (64, 128), 5
# Calls of a turn together take about so long, at least one; and a row ends early, but not before so many rounds.
TURN_SECONDS, MOST_CALLS, ROW_SECONDS, FEWEST_ROUNDS = 1.0, 10, 30.0, 3
# A variant of PyTorch whose first call takes longer than a turn, and so much longer than another's, is called no more.
HOPELESS = 1.5
# Of norms. Both sides are float32, and where a ReLU's argument is near zero they may take different sides of it: 0.003
# was seen, of the student's gradient at width 4. A wrong computation is off by a tenth and more.
TOLERANCE = 1e-2
SMALL: dict[str, Any] = {
    "batch": 32, "train_steps": 2, "held": 8, "real": 8, "syn": 3, "student": 2, "student_steps": 2
}  # fmt: skip


class Competitor:
    """A worker in its process."""

    def __init__(self, python: str, case: Case):
        """Starts it; it answers when it is asked."""
        self.case = case
        with _pinned(case.cores):
            self._process = subprocess.Popen(
                _command(python, case), cwd=record.ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )

    def seconds(self, calls: int) -> list[float]:
        """Returns the seconds per step of so many calls; the first time it also builds and compiles."""
        assert self._process.stdin
        self._process.stdin.write(f"{calls}\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> dict[str, Any]:
        """Ends the process; returns what it says of itself."""
        assert self._process.stdin
        self._process.stdin.close()
        found = self._answer()
        self._process.wait()
        return found

    def kill(self) -> None:
        """Ends the process whatever it is at."""
        self._process.kill()
        with self._process:  # which closes its pipes and waits
            pass

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.case}: the process ended with {self._process.wait()}")
        return json.loads(line)


def _command(python: str, case: Case, *more: str) -> list[str]:
    side = "torch_side" if case.variant else "jax_side"
    return [python, "-m", f"benchmarks.peers.{side}", json.dumps(case), *more]


@contextlib.contextmanager
def _pinned(cores: int) -> Iterator[None]:
    """Lets what is started within run on the first cores only: XLA makes as many threads as it may use."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def agreement(pythons: dict[str, str], width: int) -> dict[str, Any]:
    """Lets all do the same; returns the relative difference of each variant of PyTorch from ours, by result.

    Raises:
        AssertionError: A difference beyond `TOLERANCE`.
    """
    found: dict[str, Any] = {}
    case = Case(TASKS[0], width, len(os.sched_getaffinity(0)), augment=False, **SMALL)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "ours.npz")
        for name, python in pythons.items():
            one = case if name == OURS else case._replace(variant=name)
            run = subprocess.run(_command(python, one, file), cwd=record.ROOT, text=True, stdout=subprocess.PIPE)
            run.check_returncode()
            if name != OURS:
                found[name] = json.loads(run.stdout)
    wrong = [
        f"{what} of {name}: {off}" for name, row in found.items() for what, off in row.items() if not off < TOLERANCE
    ]
    if wrong:
        raise AssertionError(f"width {width}: not the same computation, off by {', '.join(wrong)}")
    return found


def measure(case: Case, pythons: dict[str, str], rounds: int) -> dict[str, Any]:
    """Times one row: a task at a width on so many cores."""
    with contextlib.ExitStack() as stack:
        running: dict[str, Competitor] = {}
        for name, python in pythons.items():
            running[name] = Competitor(python, case if name == OURS else case._replace(variant=name))
            stack.callback(running[name].kill)
        first = {name: one.seconds(1)[0] for name, one in running.items()}
        about: dict[str, dict[str, Any]] = {}
        for name in [name for name in running if name != OURS]:
            least = min(first[other] for other in first if other != OURS)
            if first[name] > HOPELESS * least and case.steps * first[name] > TURN_SECONDS:
                about[name] = {"first_ms": 1e3 * first[name], **running.pop(name).end()}
        calls = int(np.clip(TURN_SECONDS / (case.steps * first[OURS]), 1, MOST_CALLS))
        times: dict[str, list[float]] = {name: [] for name in running}
        began, done = time.monotonic(), 0
        while done < rounds and (done < FEWEST_ROUNDS or time.monotonic() - began < ROW_SECONDS):
            for name, one in running.items():
                times[name] += one.seconds(calls)
            done += 1
        for name, one in running.items():
            low, middle, high = np.quantile(times[name], [0.25, 0.5, 0.75])
            about[name] = {
                "median_ms": 1e3 * middle,
                "quartiles_ms": [1e3 * low, 1e3 * high],
                "min_ms": 1e3 * min(times[name]),
                **one.end(),
            }
    row = {"task": case.task, "width": case.width, "cores": case.cores, "rounds": done, "calls": calls}
    peers = [name for name in times if name != OURS]
    if peers:
        best = min(peers, key=lambda name: about[name]["median_ms"])
        row |= {"best": best, "ratio": about[best]["median_ms"] / about[OURS]["median_ms"]}
    return row | {"competitors": about}


def _shown(row: dict[str, Any]) -> str:
    parts = [
        f"{name} {one.get('median_ms', one.get('first_ms')):.1f} ms, {one['peak_bytes'] / 2**20:.0f} MiB"
        for name, one in row["competitors"].items()
    ]
    ratio = f"; ratio {row['ratio']:.2f}" if "ratio" in row else ""
    return f"{row['task']}, width {row['width']}, cores {row['cores']}: {'; '.join(parts)}{ratio}"


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark and writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch-python", default=sys.executable, metavar="PYTHON", help="interpreter that has PyTorch")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS), metavar="N")
    parser.add_argument("--cores", nargs="+", type=int, default=list(CORES), metavar="N")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; ours alone where PyTorch is missing")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "peers.json", metavar="FILE")
    args = parser.parse_args(argv)
    there = len(os.sched_getaffinity(0))
    if not 1 <= min(args.cores) <= max(args.cores) <= there:
        raise UserError(f"--cores: expected 1 to {there}, as many as this process may use; found {args.cores}")
    for option, least in (("--rounds", args.rounds), ("--widths", min(args.widths))):
        if least < 1:
            raise UserError(f"{option}: expected at least 1, found {least}")
    if not shutil.which(args.torch_python):
        raise UserError(f"--torch-python: expected an interpreter, found no command {args.torch_python!r}")
    pythons = {OURS: sys.executable}
    tried = subprocess.run([args.torch_python, "-c", "import torch"], stderr=subprocess.DEVNULL, check=False)
    if not tried.returncode:
        pythons |= dict.fromkeys(("contiguous", "channels last"), args.torch_python)
    elif args.smoke:
        print(f"--torch-python: {args.torch_python} has no PyTorch: ours runs alone", flush=True)
    else:
        raise UserError(
            f"--torch-python: {args.torch_python} has no PyTorch; install the extra 'peers', or name an interpreter "
            "that has it"
        )
    widths, sizes = ([8], SMALL) if args.smoke else (args.widths, {})
    load = os.getloadavg()[0]
    agreed = {str(width): agreement(pythons, width) for width in widths} if len(pythons) > 1 else {}
    settings = Case(task="", width=0, cores=0, **sizes)._asdict()
    settings = {name: settings[name] for name in settings if name not in ("task", "width", "cores", "variant")}
    results: dict[str, Any] = {"load_before": load, "agreement": agreed, "rows": []}
    for cores, task, width in itertools.product(args.cores, args.only, widths):
        results["rows"].append(measure(Case(task, width, cores, **sizes), pythons, args.rounds))
        print(_shown(results["rows"][-1]), flush=True)
        # After each row: the whole takes half an hour.
        record.write(args.out, results, seed=worker.SEED, n=args.rounds, **settings)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    exit_cleanly()(main)()
