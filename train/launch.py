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
from collections.abc import Iterator, Mapping, Sequence
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
    """A run, and how far it is.

    Attributes:
        settings: What tells it from the others, as overrides; those of a merge are the settings of its subtasks.
        path: Run directory.
        command: As in `Work`.
        after: The runs that it needs.
        state: waiting, running, finished or failed.
        note: What is to be seen of it.
        failures: How often its job ended without a result.
        job: The job, while there is one.
        slot: The place among the runs at a time that it has.
    """

    settings: tuple[str, ...]
    path: Path
    command: tuple[str, ...]
    after: tuple[Run, ...] = ()
    state: str = "waiting"
    note: str = ""
    failures: int = 0
    job: Any = None
    slot: int = -1

    @property
    def done(self) -> bool:
        """Whether its result is there."""
        return (self.path / "result.json").exists()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, 1 if a run failed."""
    parser = argparse.ArgumentParser(prog="python -m train.launch", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", required=True, metavar="FILE", help="experiment, such as configs/digits.yaml")
    parser.add_argument("--on", choices=("local", "slurm"), default="local", help="where (default: local)")
    parser.add_argument(
        "--parallel",
        type=int,
        default=0,
        metavar="N",
        help="runs at a time; default: one per GPU or core, on Slurm all",
    )
    parser.add_argument(
        "--retries", type=int, default=2, metavar="N", help="starts of a run after failures (default: 2)"
    )
    parser.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="for sbatch by way of submitit, such as partition=gpu time=60",
    )
    parser.add_argument("--out", metavar="DIR", help="default: runs/NAME")
    parser.add_argument("--smoke", action="store_true", help="shrink the runs by the config's smoke block")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, start nothing")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors too")
    parser.add_argument("overrides", nargs="*", metavar="KEY=V1,V2", help="such as seed=0,1,2")
    args = parser.parse_intermixed_args(argv)
    with exit_cleanly(debug=args.debug):
        if args.parallel < 0 or args.retries < 0:
            raise UserError(f"--parallel, --retries: expected 0 or more, found {args.parallel} and {args.retries}")
        name, runs = plan(args.config, args.overrides, out=args.out and Path(args.out), smoke=args.smoke)
        if args.dry_run:
            print("\n".join(f"python -m train.{shlex.join(run.command)}" for run in runs))
            return 0
        out = Path(args.out) if args.out else Path("runs") / name
        with _launcher(out, args) as launcher:
            launcher.watch(runs)
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
    flags = ("--smoke",) if smoke else ()
    runs: list[Run] = []
    name = ""
    for varied in itertools.product(*(one for one in choices if len(one) > 1)):
        spec: configs.RunConfig = configs.load(config, [*fixed, *varied], smoke=smoke)
        name = name or spec.name
        whole = (out or Path("runs") / name) / ",".join(varied).replace("/", "_")
        # A subtask that was asked for by its number is a run like any other.
        alone = spec.subtasks == 1 or any(text.startswith("subtask=") for text in (*fixed, *varied))
        parts = []
        for subtask in () if alone else range(spec.subtasks):
            parts.append(_distill(config, fixed, (*varied, f"subtask={subtask}"), whole / f"subtask{subtask}", flags))
        if parts:
            merged, paths = whole / "merged", [str(part.path) for part in parts]
            runs += [*parts, Run(varied, merged, ("merge", *paths, "--out", str(merged), "--quiet"), tuple(parts))]
        else:
            runs.append(_distill(config, fixed, varied, whole, flags))
    if len(runs) == 1:
        raise ConfigError(
            "KEY=V1,V2: expected a setting with several values, such as seed=0,1,2, or subtasks=K; found one run, "
            "which python -m train.distill starts"
        )
    return name, runs


def _distill(config: str, fixed: Sequence[str], own: tuple[str, ...], path: Path, flags: tuple[str, ...]) -> Run:
    return Run(own, path, ("distill", "--config", config, *flags, "--out", str(path), "--quiet", *fixed, *own))


@contextlib.contextmanager
def _launcher(out: Path, args: argparse.Namespace) -> Iterator[Launcher]:
    folder = out / LOGS
    folder.mkdir(parents=True, exist_ok=True)
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*"))) if args.on == "local" else 0
    cores = sorted(os.sched_getaffinity(0)) if args.on == "local" and hasattr(os, "sched_getaffinity") else []
    slots = args.parallel or gpus or len(cores) or sys.maxsize
    try:
        if args.on == "slurm":
            executor: Any = submitit.SlurmExecutor(folder=folder.resolve())
            executor.update_parameters(job_name="gsdd", **dict(map(_parameter, args.slurm)))
        else:
            executor = submitit.LocalExecutor(folder=folder.resolve())
            executor.update_parameters(timeout_min=_NO_LIMIT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--on {args.on}: {error}") from error
    launcher = Launcher(executor, folder / JOBS, slots=slots, cores=cores, gpus=gpus, retries=args.retries)
    try:
        yield launcher
    except BaseException:
        launcher.cancel()
        raise


def _parameter(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--slurm: expected KEY=VALUE such as partition=gpu, found {text!r}")
    return key, int(value) if value.isdecimal() else value


class Launcher:
    """Starts runs as jobs, some at a time, and watches them until none is left."""

    def __init__(
        self, executor: submitit.Executor, jobs: Path, *, slots: int, cores: Sequence[int], gpus: int, retries: int
    ):
        """Reads which jobs an interrupted launch has left.

        Args:
            executor: Of submitit.
            jobs: File of their numbers, and of the commands of finished runs, by run directory.
            slots: Runs at a time.
            cores: Of this machine, to be shared out; none where a scheduler does.
            gpus: Of this machine, likewise.
            retries: How often a run is started again.
        """
        self._executor, self._file, self._slots, self._retries = executor, jobs, slots, retries
        self._cores, self._gpus, self._local = cores, gpus, isinstance(executor, submitit.LocalExecutor)
        self._jobs: dict[str, Any] = {}
        # Of the launch before: numbers of jobs, and the commands of finished runs.
        self._known: dict[str, str] = {}
        self._finished: dict[str, list[str]] = {}
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            before = json.loads(jobs.read_text())
            self._known, self._finished = before["jobs"], before["finished"]

    def watch(self, runs: Sequence[Run]) -> None:
        """Starts and watches runs until each is finished or has failed."""
        console = Console(stderr=True, highlight=False)
        # Fewer runs than cores have more than one each.
        self._slots = min(self._slots, sum(not run.after for run in runs))
        for run in runs:
            self._take_up(run)
        shown: dict[str, str] = {}
        with Live(console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as live:
            while any(run.state in ("waiting", "running") for run in runs):
                for run in runs:
                    self._advance(run, runs)
                if live is not None:
                    live.update(_progress(runs), refresh=True)
                for run in runs if live is None else ():
                    if shown.get(key := str(run.path)) != run.state:
                        shown[key] = run.state
                        console.print(f"{run.state:<9} {key}  {run.note}", markup=False, soft_wrap=True)
                if any(run.state in ("waiting", "running") for run in runs):
                    time.sleep(_POLL_SECONDS)

    def cancel(self) -> None:
        """Stops all jobs that this launcher started or took up; here they save first, as on any SIGTERM."""
        jobs = list(self._jobs.values())
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

    def _take_up(self, run: Run) -> None:
        """Finds the job of Slurm that an interrupted launch has left; local ones end with it."""
        number = self._known.get(str(run.path))
        if number is None:
            return
        job = self._executor.job_class(folder=self._executor.folder, job_id=number)
        if job.state in ("RUNNING", "PENDING", "REQUEUED"):
            run.job, run.state = job, "running"
            self._jobs[str(run.path)] = job

    def _write(self) -> None:
        jobs = {path: job.job_id for path, job in self._jobs.items()}
        write_json(self._file, {"jobs": jobs, "finished": self._finished})

    def _advance(self, run: Run, runs: Sequence[Run]) -> None:
        if run.state == "waiting":
            left = [part for part in run.after if part.state != "finished"]
            if lost := [part for part in left if part.state == "failed"]:
                run.state, run.note = "failed", f"needs {lost[0].path}"
            if left:
                return
            # Another command has to be compared with what is there, which train.distill does.
            if run.done and self._finished.get(str(run.path)) == list(run.command):
                run.state, run.note = "finished", _found(run)
            else:
                self._start(run, runs)
        elif run.state == "running":
            if run.job.done():
                self._end(run)
            else:
                run.note = _step(run)

    def _start(self, run: Run, runs: Sequence[Run]) -> None:
        taken = {other.slot for other in runs if other.state == "running"}
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
        self._jobs[str(run.path)] = run.job
        self._write()

    def _end(self, run: Run) -> None:
        del self._jobs[str(run.path)]
        # Where a job was killed there is no result, and submitit would wait for it.
        code = run.job.result() if run.job.paths.result_pickle.exists() else None
        if code == 0 and run.done:
            run.state, run.note = "finished", _found(run)
            self._finished[str(run.path)] = list(run.command)
        else:
            run.failures += 1
            # submitit writes there too.
            said = [
                line for line in (run.job.stderr() or "").splitlines() if line.strip() and "submitit" not in line[:20]
            ]
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


def _found(run: Run) -> str:
    return f"{testset.percent(_result(run)['accuracy'])} %"


def _result(run: Run) -> dict[str, Any]:
    return json.loads((run.path / "result.json").read_text(encoding="utf-8"))


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
        entries = [_result(run)["accuracy"] for run in group if run.state == "finished"]
        means = [entry["mean"] for entry in entries]
        row: dict[str, Any] = {"settings": settings, "runs": [str(run.path) for run in group], "accuracies": means}
        if means:
            spread = statistics.stdev(means) if len(means) > 1 else entries[0]["std"]
            count = len(means) if len(means) > 1 else entries[0]["n"]
            row |= {"mean": statistics.fmean(means), "std": spread, "n": count, "networks": entries[0]["n"]}
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
