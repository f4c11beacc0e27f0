"""Many runs by one command: ``python -m train.launch --config FILE [KEY=V1,V2 ...]``, here or on Slurm.

All subtasks of a federated distillation, several seeds, a sweep over settings, and any product of these::

    python -m train.launch --config configs/digits.yaml subtasks=5
    python -m train.launch --config configs/digits.yaml seed=0,1,2 codec.lr=0.003,0.01
    python -m train.launch --config configs/digits.yaml seed=0,1,2 --on slurm --slurm partition=gpu time=240

Each run is a ``train.distill`` in a directory of its own under ``--out``. submitit starts it, and again where it stands
after a failure, up to ``--retries`` times. Subtasks are merged when all are there. On this machine the runs at a time
share out its cores, or take a GPU each. Ctrl-C stops all; the same command goes on, and takes up again jobs of Slurm
that still run. At the end stands a table: means over the seeds of a setting, on the test images, so that
it is no way to choose settings; for that see `train.tune`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from rich.console import Console
from rich.live import Live
from rich.table import Table

from gsdd_jax import files
from train import config as configs
from train import testset
from train.errors import ConfigError, UserError, exit_cleanly
from train.rundir import environment, read_metrics, write_json

JOBS, LOGS, RESULTS = "jobs.json", "launch", "launch.json"
# Ends a run whatever is tried again: bad input.
_USER_ERROR = 2
# Minutes; submitit ends a local job after two by default, and runs take as long as they take.
_NO_LIMIT = 60 * 24 * 365
_POLL_SECONDS = 2.0
# That runs have for saving.
_SAVE_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Work:
    """What a job does: a command of ``train``, on some cores of its machine; () = all of them."""

    command: tuple[str, ...]
    cores: tuple[int, ...] = ()

    def __call__(self) -> int:
        """Runs the command and returns its exit code."""
        # submitit ignores it, until a run that saves first takes it over.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.cores:
            # Before JAX starts its threads.
            os.sched_setaffinity(0, self.cores)
        from train import distill, merge

        module, *arguments = self.command
        # What a run records, and says to go on by: the command that this stands for.
        sys.orig_argv = [sys.executable, "-m", f"train.{module}", *arguments]
        try:
            return {"distill": distill, "merge": merge}[module].main(arguments)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 1

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Lets Slurm queue the job again where its time is over: a run goes on by the same command."""
        return submitit.helpers.DelayedSubmission(self)


@dataclasses.dataclass
class Run:
    """A run, and how far it is; a merge comes after the runs that it needs."""

    # What tells it from the others, as overrides; those of a merge are the settings of its subtasks.
    settings: tuple[str, ...]
    path: Path
    # As in `Work`.
    command: tuple[str, ...]
    after: tuple[Run, ...] = ()
    # waiting, running, finished or failed.
    state: str = "waiting"
    note: str = ""
    failures: int = 0
    job: Any = None
    # Its place among the runs at a time.
    slot: int = -1

    @property
    def done(self) -> bool:
        """Whether its result is there."""
        return (self.path / "result.json").exists()

    @property
    def open(self) -> bool:
        """Whether something is left to do."""
        return self.state in ("waiting", "running")

    def accuracy(self) -> dict[str, Any]:
        """Reads its accuracy."""
        return json.loads((self.path / "result.json").read_text(encoding="utf-8"))["accuracy"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, 1 if a run failed."""
    parser = configs.parser("launch", __doc__, out="runs/NAME")
    parser.add_argument("--on", choices=("local", "slurm"), default="local", help="where (default: local)")
    at_a_time = "runs at a time; default: one per GPU or core, on Slurm all"
    parser.add_argument("--parallel", type=int, default=0, metavar="N", help=at_a_time)
    parser.add_argument("--retries", type=int, default=2, metavar="N", help="starts after failures (default: 2)")
    example = "for sbatch by way of submitit, such as partition=gpu time=60"
    parser.add_argument("--slurm", nargs="+", default=[], metavar="KEY=VALUE", help=example)
    parser.add_argument("--dry-run", action="store_true", help="print the commands, start nothing")
    args = parser.parse_intermixed_args(argv)
    with exit_cleanly(debug=args.debug):
        if args.parallel < 0 or args.retries < 0:
            raise UserError(f"--parallel, --retries: expected 0 or more, found {args.parallel} and {args.retries}")
        name, runs = plan(args.config, args.overrides, out=args.out and Path(args.out), smoke=args.smoke)
        if args.dry_run:
            print("\n".join(f"python -m train.{shlex.join(run.command)}" for run in runs))
            return 0
        out = Path(args.out) if args.out else Path("runs") / name
        launcher = Launcher(runs, out / LOGS, args)
        try:
            launcher.watch()
        except BaseException:
            launcher.cancel()
            raise
        rows = summary(runs)
        write_json(out / RESULTS, {"name": name, "rows": rows, "environment": environment()})
        files.write_bytes(out / "launch.md", table(rows).encode())
        print(table(rows))
        failed = [run for run in runs if run.state == "failed"]
        for run in failed:
            print(f"failed: {run.path}: {run.note}", file=sys.stderr)
    return 1 if failed else 0


def plan(
    config: str, overrides: Sequence[str], *, out: Path | None = None, smoke: bool = False
) -> tuple[str, list[Run]]:
    """Returns the name of the experiment, and all runs that a command asks for; the config of each is checked.

    Raises:
        ConfigError: A config that cannot be run, or settings that leave nothing to launch.
    """
    choices = [configs.choices(text) for text in overrides]
    fixed = [one[0] for one in choices if len(one) == 1]
    runs: list[Run] = []
    name = ""

    def add(own: tuple[str, ...], path: Path) -> Run:
        flags = (*(["--smoke"] if smoke else []), "--out", str(path), "--quiet")
        runs.append(Run(own, path, ("distill", "--config", config, *flags, *fixed, *own)))
        return runs[-1]

    for varied in itertools.product(*(one for one in choices if len(one) > 1)):
        spec: configs.RunConfig = configs.load(config, [*fixed, *varied], smoke=smoke)
        name = name or spec.name
        whole = (out or Path("runs") / name) / ",".join(varied).replace("/", "_")
        # A subtask that was asked for by its number is a run like any other.
        if spec.subtasks == 1 or any(text.startswith("subtask=") for text in (*fixed, *varied)):
            add(varied, whole)
            continue
        parts = [add((*varied, f"subtask={i}"), whole / f"subtask{i}") for i in range(spec.subtasks)]
        merged, paths = whole / "merged", [str(part.path) for part in parts]
        runs.append(Run(varied, merged, ("merge", *paths, "--out", str(merged), "--quiet"), tuple(parts)))
    if len(runs) == 1:
        raise ConfigError(
            "KEY=V1,V2: expected a setting with several values, such as seed=0,1,2, or subtasks=K; found one run, "
            "which python -m train.distill starts"
        )
    return name, runs


def _parameter(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--slurm: expected KEY=VALUE such as partition=gpu, found {text!r}")
    return key, int(value) if value.isdecimal() else value


class Launcher:
    """Starts runs as jobs, some at a time, and watches them until none is left."""

    def __init__(self, runs: Sequence[Run], folder: Path, args: argparse.Namespace):
        """Takes up, from the folder of logs, the jobs of Slurm that an interrupted launch has left."""
        folder.mkdir(parents=True, exist_ok=True)
        self._runs, self._file, self._retries, self._local = runs, folder / JOBS, args.retries, args.on == "local"
        self._console = Console(stderr=True, highlight=False, quiet=args.quiet)
        # Shared out; a scheduler does it elsewhere.
        self._gpus = len(list(Path("/dev").glob("nvidia[0-9]*"))) if self._local else 0
        self._cores = sorted(os.sched_getaffinity(0)) if self._local and hasattr(os, "sched_getaffinity") else []
        slots = args.parallel or self._gpus or len(self._cores) or sys.maxsize
        # Fewer runs than cores have more than one each.
        self._slots = min(slots, sum(not run.after for run in runs))
        try:
            if self._local:
                self._executor: Any = submitit.LocalExecutor(folder=folder.resolve())
                self._executor.update_parameters(timeout_min=_NO_LIMIT)
            else:
                self._executor = submitit.SlurmExecutor(folder=folder.resolve())
                self._executor.update_parameters(job_name="gsdd", **dict(map(_parameter, args.slurm)))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"--on {args.on}: {error}") from error
        # The commands of finished runs, by run directory.
        self._finished: dict[str, list[str]] = {}
        known: dict[str, str] = {}
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            before = json.loads(self._file.read_text())
            known, self._finished = before["jobs"], before["finished"]
        for run in runs:
            if (number := known.get(str(run.path))) is not None:
                job = self._executor.job_class(folder=self._executor.folder, job_id=number)
                # Local ones ended with that launch.
                if job.state in ("RUNNING", "PENDING", "REQUEUED"):
                    run.job, run.state = job, "running"

    def watch(self) -> None:
        """Starts and watches runs until each is finished or has failed."""
        console, shown = self._console, dict[str, str]()
        with Live(console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as live:
            while any(run.open for run in self._runs):
                for run in self._runs:
                    self._advance(run)
                if live is not None:
                    live.update(_progress(self._runs), refresh=True)
                for run in self._runs if live is None else ():
                    if shown.get(key := str(run.path)) != run.state:
                        shown[key] = run.state
                        console.print(f"{run.state:<9} {key}  {run.note}", markup=False, soft_wrap=True)
                if any(run.open for run in self._runs):
                    time.sleep(_POLL_SECONDS)

    def cancel(self) -> None:
        """Stops all jobs that this launcher started or took up; here they save first, as on any SIGTERM."""
        jobs = [run.job for run in self._runs if run.state == "running"]
        if not self._local:
            for job in jobs:
                job.cancel(check=False)
            return
        # The second one does not wait for anything.
        for _ in range(2):
            for job in jobs:
                if not job.done():
                    os.kill(int(job.job_id), signal.SIGTERM)
            until = time.monotonic() + _SAVE_SECONDS
            while not all(job.done() for job in jobs) and time.monotonic() < until:
                time.sleep(0.1)

    def _write(self) -> None:
        jobs = {str(run.path): run.job.job_id for run in self._runs if run.state == "running"}
        write_json(self._file, {"jobs": jobs, "finished": self._finished})

    def _advance(self, run: Run) -> None:
        if run.state == "waiting":
            left = [part for part in run.after if part.state != "finished"]
            if lost := [part for part in left if part.state == "failed"]:
                run.state, run.note = "failed", f"needs {lost[0].path}"
            if left:
                return
            # Another command has to be compared with what is there, which train.distill does.
            if run.done and self._finished.get(str(run.path)) == list(run.command):
                run.state, run.note = "finished", f"{testset.percent(run.accuracy())} %"
            else:
                self._start(run)
        elif run.state == "running":
            if run.job.done():
                self._end(run)
            else:
                run.note = _step(run)

    def _start(self, run: Run) -> None:
        taken = {other.slot for other in self._runs if other.state == "running"}
        slot = next((slot for slot in range(self._slots) if slot not in taken), None)
        if slot is None:
            return
        share = tuple(self._cores[slot % len(self._cores) :: self._slots]) if self._cores else ()
        if self._gpus:
            # submitit hides the GPUs that a local job does not ask for.
            self._executor.update_parameters(gpus_per_node=1, visible_gpus=[slot % self._gpus])
        # Ctrl-C reaches all processes of a terminal: it is for this one to end the others.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            run.job = self._executor.submit(Work(run.command, share))
        except submitit.core.utils.FailedJobError as error:
            raise UserError(f"--slurm: {error}") from error
        finally:
            signal.signal(signal.SIGINT, before)
        run.state, run.slot, run.note = "running", slot, ""
        self._write()

    def _end(self, run: Run) -> None:
        # Where a job was killed there is no result, and submitit would wait for it.
        code = run.job.result() if run.job.paths.result_pickle.exists() else None
        if code == 0 and run.done:
            run.state, run.note = "finished", f"{testset.percent(run.accuracy())} %"
            self._finished[str(run.path)] = list(run.command)
        else:
            run.failures += 1
            # submitit writes there too.
            lines = (run.job.stderr() or "").splitlines()
            said = [line for line in lines if line.strip() and "submitit" not in line[:20]]
            run.note = said[-1] if said else f"ended without a word, {run.job.paths.stderr}"
            run.state = "failed" if code == _USER_ERROR or run.failures > self._retries else "waiting"
        self._write()


def _step(run: Run) -> str:
    """Says where a run is, by its newest line of metrics."""
    with contextlib.suppress(UserError, OSError):
        if entries := read_metrics(run.path):
            last = entries[-1]
            value = next((f", {key} {last[key]:.4g}" for key in ("psnr", "loss") if key in last), "")
            return f"{last['phase']} {last['step']}{value}"
    return ""


def _progress(runs: Sequence[Run]) -> Table:
    shown = Table("run", "state", "", box=None)
    for run in runs:
        again = f" (started {run.failures + 1} times)" if run.failures else ""
        shown.add_row(str(run.path), run.state + again, run.note)
    return shown


def summary(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns a row for each setting: its seeds' accuracies, their mean and their spread.

    The spread is that between distillations, or of one distillation that between its test networks.
    """
    needed = {id(part) for run in runs for part in run.after}
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        if id(run) not in needed:
            groups.setdefault(tuple(text for text in run.settings if not text.startswith("seed=")), []).append(run)
    rows = []
    for settings, group in groups.items():
        entries = [run.accuracy() for run in group if run.state == "finished"]
        means = [entry["mean"] for entry in entries]
        row: dict[str, Any] = {"settings": settings, "runs": [str(run.path) for run in group], "accuracies": means}
        if means:
            several = {"std": statistics.stdev(means), "n": len(means)} if len(means) > 1 else {}
            row |= {"std": entries[0]["std"], "n": entries[0]["n"]} | several
            row |= {"mean": statistics.fmean(means), "networks": entries[0]["n"]}
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Writes the rows of `summary` as a Markdown table."""
    lines = ["| settings | distillations | networks each | test accuracy, % |", "|---|---:|---:|---:|"]
    for row in rows:
        found = testset.percent(row) if "mean" in row else "failed"
        lines.append(
            f"| `{' '.join(row['settings']) or 'as configured'}` | {len(row['accuracies'])} of {len(row['runs'])} | "
            f"{row.get('networks', '')} | {found} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
