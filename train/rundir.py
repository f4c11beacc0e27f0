"""A run directory: everything one experiment writes, laid out so that a killed run can be continued.

    config.yaml        the resolved config, and a history where it was extended; another config is refused
    environment.json   versions, device, commit and command: one entry per start
    metrics.jsonl      one JSON object per line, each with "phase" and "step"
    checkpoints/       written by `train.checkpoint`
    .lock              held while a process writes here, whose name is in .owner

This file knows paths and bytes, not what a run computes. Every file except metrics.jsonl is replaced atomically, and
metrics.jsonl can be cut back to a checkpointed step, so that an interrupted and continued run leaves the same lines as
an uninterrupted one (but for wall-clock fields, see `is_wall_clock`).
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock
import jax
import pydantic_core

from gsdd_jax import files, synset
from train import yaml12
from train.errors import UserError

# What a run directory adds to its config: how the run was extended. No setting.
HISTORY = "history"

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "triton", "jax-triton")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunDir(contextlib.AbstractContextManager["RunDir"]):
    """Creates or re-opens a run directory and locks it against other processes.

    Raises:
        UserError: Another process writes there, or the directory holds part of a run but no config.yaml.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.config_path, self.metrics_path = self.path / "config.yaml", self.path / "metrics.jsonl"
        # Where `train.checkpoint.Checkpoints` of this run live.
        self.checkpoints_path = self.path / "checkpoints"
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._acquire()
        try:
            files.remove_leftovers([self.path, self.checkpoints_path, *(self.path / synset.EXPORT).glob("**")])
            orphans = [p.name for p in (self.metrics_path, self.checkpoints_path) if p.exists()]
            if orphans and not self.config_path.exists():
                raise UserError(
                    f"{self.path} holds {' and '.join(orphans)} but no config.yaml, so it cannot be continued: "
                    "delete it or choose another run directory"
                )
            _drop_half_line(self.metrics_path)
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        """Closes the run directory."""
        self.close()

    def close(self) -> None:
        """Releases the lock. A killed process releases it too."""
        self._lock.release()

    def configure(self, config: Mapping[str, Any], *, extension: Mapping[str, Any] | None = None) -> bool:
        """Stores the resolved config, a nested mapping of values that `plain` takes.

        The history gets an entry where the run is extended: what `extension` says, when, and by which commit.

        Returns:
            True if the directory already held a run.
        """
        continued, history = self.config_path.exists(), read_history(self.path)
        if extension:
            now = environment()
            history.append({"time": now["started"], "commit": now["commit"], **plain(extension)})
        # Settings and history in one step.
        text = yaml12.dump(plain(config) | ({HISTORY: history} if history else {})).encode()
        if not continued or text != self.config_path.read_bytes():
            files.write_bytes(self.config_path, text)
        return continued

    def record_environment(self) -> dict[str, Any]:
        """Appends what this process runs on to environment.json, one entry per start, and returns it."""
        entry = environment()
        write_json(self.path / "environment.json", [*read_environment(self.path), entry])
        return entry

    def append(self, phase: str, step: int, **values: Any) -> None:
        """Appends one line to metrics.jsonl; it survives the death of the process from here on.

        The values are what `plain` takes; NaN and infinities are written as strings.
        """
        line = _json({"phase": phase, "step": int(step), **values})
        try:
            with open(self.metrics_path, "ab") as file:
                file.write(line)
        except OSError as error:
            raise files.named(error, self.metrics_path) from error

    def truncate(self, phase: str, step: int) -> None:
        """Drops the metrics of a phase after a checkpointed step, from which it goes on; -1 drops all of them."""
        if not self.metrics_path.exists():
            return
        lines = self.metrics_path.read_bytes().splitlines(keepends=True)
        entries = _parse(lines, self.metrics_path)
        kept = [ln for ln, e in zip(lines, entries, strict=True) if e.get("phase") != phase or e.get("step", 0) <= step]
        if len(kept) != len(lines):
            files.write_bytes(self.metrics_path, b"".join(kept))

    def _acquire(self) -> filelock.BaseFileLock:
        # Not in the lock itself, which Windows lets nobody else read.
        owner, lock = self.path / ".owner", filelock.FileLock(self.path / ".lock", timeout=0, thread_local=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            found = owner.read_text(encoding="utf-8", errors="replace").strip() if owner.exists() else ""
            raise UserError(
                f"{self.path} is being written by {found or 'another process'}: "
                "wait until it ends, stop it, or choose another run directory"
            ) from None
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        return lock


def is_wall_clock(key: str) -> bool:
    """Tells whether a metric is a time or a speed, which no two runs share: "seconds", "*_seconds", "*_per_second"."""
    return key == "seconds" or key.endswith(("_seconds", "_per_second"))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Compares nested configs of plain values: dotted keys with another value, to both values in words."""
    # As text, in which NaN equals NaN, and true is not 1.
    a, b = ({k: json.dumps(v, ensure_ascii=False) for k, v in flatten(one).items()} for one in (before, now))
    both = {k: (a.get(k, "not set"), b.get(k, "not set")) for k in dict.fromkeys([*a, *b])}
    return {k: (there, here) for k, (there, here) in both.items() if there != here}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of a nested config by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def read_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads how the run in `path` was extended, from config.yaml; [] if it was not, or there is no such file.

    An entry says at which steps of each phase which settings changed from what to what, when, and the commit.
    """
    file = Path(path) / "config.yaml"
    config = yaml12.parse(file.read_text(encoding="utf-8"), source=str(file)) if file.exists() else None
    return list(config.get(HISTORY, [])) if isinstance(config, dict) else []


def read_steps(path: str | os.PathLike[str]) -> dict[str, int]:
    """Returns the newest step on disk of every phase of the run in `path` that has a checkpoint."""
    found = {}
    for phase in sorted((Path(path) / "checkpoints").glob("*")):
        steps = [int(step.name) for step in phase.glob("*") if step.name.isdecimal()]
        if steps:
            found[phase.name] = max(steps)
    return found


def read_command(path: str | os.PathLike[str]) -> str | None:
    """Returns the command that goes on with the run in `path`, that of its last start, if it is known."""
    commands = [start.get("command", "") for start in reversed(read_environment(path))]
    return next((command for command in commands if "train.distill" in command), None)


def read_environment(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads environment.json of the run directory `path`, one entry per start; [] if it is absent."""
    file = Path(path) / "environment.json"
    if not file.exists():
        return []
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(file, error, "delete it and run the same command again") from error
    return list(entries) if isinstance(entries, list) else [entries]


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads metrics.jsonl of the run directory `path`, also while a run writes it; [] if it is absent.

    A last line without its end is left out. Non-finite numbers come back as floats.
    """
    file = Path(path) / "metrics.jsonl"
    if not file.exists():
        return []
    lines = [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return _parse(lines, file)


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Replaces a file atomically with `value` as indented JSON; NaN and infinities are written as strings."""
    return files.write_bytes(path, _json(value, indent=2))


def environment() -> dict[str, Any]:
    """Describes what this process runs on: versions, device, cores, commit of this code, command, start time (UTC)."""
    device = jax.devices()[0]
    known, dirty = commit()
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "versions": versions(),
        "platform": device.platform,
        "device": _device_name(device),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpu_count": os.cpu_count(),
        "system": platform.platform(),
        "commit": known,
        "dirty": dirty,
    }


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and of the packages that decide numbers; None for what is not installed."""
    found = {name: [one.version for one in importlib.metadata.distributions(name=name)] for name in _PACKAGES}
    return {"python": platform.python_version(), **{name: next(iter(one), None) for name, one in found.items()}}


def _device_name(device: jax.Device) -> str:
    """Names the device; JAX calls every CPU "cpu", so there its model and the number of cores stand in."""
    if device.platform != "cpu":
        return device.device_kind
    known = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: *(.+)", known.read_text() if known.exists() else "", re.MULTILINE)
    return f"{model[1] if model else platform.processor() or 'CPU'}, {os.cpu_count()} cores"


def plain(value: Any) -> Any:
    """Converts to dicts with string keys, lists, str, int, float, bool and None, which YAML and JSON both hold."""
    return pydantic_core.to_jsonable_python(value, fallback=_of_array)


def _json(value: Any, indent: int | None = None) -> bytes:
    # JSON has no token for non-finite floats.
    return pydantic_core.to_json(value, indent=indent, fallback=_of_array, inf_nan_mode="strings") + b"\n"


def _of_array(value: Any) -> Any:
    return value.tolist()


def _parse(lines: list[bytes], path: Path) -> list[dict[str, Any]]:
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("not an object")
        except ValueError as error:
            remedy = "delete that line and run the same command again"
            raise _damaged(f"{path}, line {number},", error, remedy) from error
        entries.append({k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in entry.items()})
    return entries


def _drop_half_line(path: Path) -> None:
    """Cuts what follows the last line end: a process was killed, or the disk filled, in the middle of a line."""
    if path.is_file():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


def _damaged(what: Path | str, why: Exception | str, remedy: str) -> UserError:
    return UserError(f"{what} is damaged ({' '.join(str(why).split())}): {remedy}")


def commit() -> tuple[str | None, bool | None]:
    """The commit of this code and whether tracked files differ from it; (None, None) where git does not track it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        # An installed copy may lie inside an unrelated repository (a virtual environment in a checkout).
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None
