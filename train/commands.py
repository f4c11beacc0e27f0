"""The console command: ``gsdd distill --config digits`` is ``python -m train.distill --config digits``.

A command is a module of `train`, and the only one of them that is imported for it.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAME = "gsdd"
COMMANDS = (
    *("distill", "evaluate", "export", "merge", "tune", "launch", "experts", "gallery"),
    *("replay", "federated", "search", "audit", "import_gsdd"),
)


def parser(command: str, doc: str | None, **more: Any) -> argparse.ArgumentParser:
    """Returns the command line of a module, named as it was called and described by the head of its docstring."""
    called = f"{NAME} {command}" if Path(sys.argv[0]).name == NAME else f"python -m train.{command}"
    made = argparse.ArgumentParser(prog=called, description=_head(doc or ""), **more)
    made.add_argument("--debug", action="store_true", help="show tracebacks of user errors too")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the console command; returns the exit code."""
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print(f"usage: {NAME} COMMAND ...\n\nDataset distillation with sparse 2-D Gaussians.\n")
        for name in COMMANDS:
            with Path(__file__).with_name(f"{name}.py").open(encoding="utf-8") as file:
                print(f"  {name:<{width}}  {_head(file.readline()[3:])}")
        print(f"\n{NAME} COMMAND --help says more; {NAME} COMMAND ... is python -m train.COMMAND ...")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        print(f"error: {NAME}: expected one of {', '.join(COMMANDS)}; found {command!r}{meant}", file=sys.stderr)
        return 2
    # What a run records, and says to go on by.
    sys.orig_argv = [sys.executable, "-m", f"train.{command}", *arguments]
    return importlib.import_module(f"train.{command}").main(arguments)


def _head(doc: str) -> str:
    return f"{doc.partition(': ``')[0]}."
