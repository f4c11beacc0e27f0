"""Several processes, on one host or many, that take the outer steps of one run together, as JAX has it.

All run the same program. Process 0 alone has the run directory: what is no outer step (fit, experts, tests, export) it
does for all, and the others wait for it in `gather`. A process that ends says why in the place of what it would say
there, and all end with it. One that cannot say so any more is missed by JAX, which aborts the others.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from train import stopping
from train.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, ConfigError, UserError, explain
from train.rundir import differences

# Of a process that ended without the others, or they without it.
EXIT_LOST = 3
# Seconds without a sign of life after which a process counts as dead, in which all must have come at the start, and in
# which those that are alive come to hear of an error. Else they wait for each other as long as it takes.
HEARTBEAT, START, FAREWELL, EVER = 30, 300, 60, 30 * 24 * 3600
VARIABLES = {"coordinator": "JAX_COORDINATOR_ADDRESS", "processes": "JAX_NUM_PROCESSES", "process": "JAX_PROCESS_ID"}
STOPPED, DONE = "stopped", "done"

# Barriers have a name each.
_meetings = itertools.count()
# Waits in the place of the main thread, which signals have to reach.
_waiter = ThreadPoolExecutor(1)
_on_abort: Any = None


class _Ended(Exception):
    """Another process ended; why is STOPPED, DONE or an error in words."""


def gather(value: Any = None) -> list[Any]:
    """Waits until all processes have come here, and returns what each of them says, a JSON-able value."""
    if jax.process_count() == 1:
        return [value]
    return _raise_if_ended(_exchange({"value": value}))


def stop_requested() -> bool:
    """Tells all processes whether one of them was asked to end."""
    return any(gather(stopping.requested()))


def share(tree: Any) -> Any:
    """Returns the arrays of process 0 in every process, bit by bit; the others give arrays of the same shapes."""
    if jax.process_count() == 1:
        return tree
    gather()
    held = jax.tree.map(np.asarray, tree)
    # As bytes, since the arrays of the others are added to these: -0.0 + 0.0 is 0.0.
    sent = jax.tree.map(lambda x: np.ascontiguousarray(x).reshape(-1).view(np.uint8), held)
    got = multihost_utils.broadcast_one_to_all(sent)
    return jax.tree.map(lambda x, like: np.asarray(x).view(like.dtype).reshape(like.shape), got, held)


def agree(settings: Mapping[str, Any]) -> None:
    """Makes sure that all processes have the same settings, or raises UserError in all of them."""
    first, *others = gather(settings)
    for index, other in enumerate(others, 1):
        if found := differences(first, other):
            there = "; ".join("{} is {} in process 0 and {} there".format(key, *both) for key, both in found.items())
            raise UserError(f"process {index} of {len(others) + 1} was started otherwise: {there}; start all alike")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a run in several processes to a command line."""
    group = parser.add_argument_group("several processes (start the same command in each)")
    group.add_argument(
        "--distributed", action="store_true", help="Slurm, Open MPI or Kubernetes say what the others are, or:"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0 (or JAX_COORDINATOR_ADDRESS)")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are (or JAX_NUM_PROCESSES)")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0 (or JAX_PROCESS_ID)")
    # Converted and checked like a flag.
    parser.set_defaults(**{name: os.environ.get(variable) or None for name, variable in VARIABLES.items()})


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[None]:
    """Joins the other processes of a run, if there are any, and leaves them at the end, or ends with them.

    Raises:
        UserError: The flags are incomplete or out of range, or another process ended with an error.
        Stopped: Another process was asked to end.
    """
    settings = _settings(args)
    if settings is None:
        yield
        return
    _initialize(settings)
    this = f"process {jax.process_index()} of {jax.process_count()}"
    again = "start the same command in all processes again, and the run goes on from its last checkpoint"
    _say_on_abort(f"error: {this} lost another one, which died or cannot be reached; {again}", EXIT_LOST)
    try:
        yield
        _raise_if_ended(_exchange({"end": DONE}), but=DONE)
    except _Ended as end:
        if str(end) == STOPPED:
            raise stopping.Stopped from None
        if str(end) != DONE:
            raise UserError(str(end)) from None
    except KeyboardInterrupt:
        # The main thread may have left a barrier where the others wait.
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)
    except BaseException as error:
        why = (explain(error) or f"error: {error!r}").removeprefix("error: ").splitlines()[0]
        try:
            if isinstance(error, jax.errors.JaxRuntimeError):
                raise
            _exchange({"end": STOPPED if isinstance(error, stopping.Stopped) else f"{this}: {why}"}, FAREWELL)
        except Exception:
            print(f"error: {this} ended, or lost the others ({why}); {again}", file=sys.stderr, flush=True)
            os._exit(EXIT_LOST)
        raise


def _settings(args: argparse.Namespace) -> dict[str, Any] | None:
    """Returns what `jax.distributed.initialize` is to be told; None for a single process."""
    absent = [f"--{name}" for name in VARIABLES if getattr(args, name) is None]
    if len(absent) == len(VARIABLES):
        # Found out by JAX.
        return {} if args.distributed else None
    if absent:
        raise ConfigError(
            f"several processes need --coordinator, --processes and --process; {', '.join(absent)} absent"
        )
    host, _, port = args.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"--coordinator: expected HOST:PORT with a port from 1 to 65535, found {args.coordinator!r}")
    if not 0 <= args.process < args.processes:
        raise ConfigError(f"--process: expected 0 to --processes - 1, found {args.process} of {args.processes}")
    if args.processes == 1:
        return None
    return {"coordinator_address": args.coordinator, "num_processes": args.processes, "process_id": args.process}


def _initialize(settings: dict[str, Any]) -> None:
    if settings.get("process_id") == 0:
        address = settings["coordinator_address"]
        try:
            # JAX would end in a segmentation fault.
            socket.create_server(("", int(address.rpartition(":")[2]))).close()
        except OSError as busy:
            raise ConfigError(f"--coordinator: cannot listen at {address}: {busy.strerror}") from busy
    _say_on_abort(
        f"error: --coordinator: {settings.get('num_processes', 'the')} processes did not find each other at "
        f"{settings.get('coordinator_address', 'an address that JAX found')} within {START} s; start the same command "
        "in each, with the address of process 0 and a number of its own",
        EXIT_USER_ERROR,
    )
    # It takes SIGTERM away from Python.
    jax.config.update("jax_enable_preemption_service", False)
    settings |= {"initialization_timeout": START, "heartbeat_timeout_seconds": HEARTBEAT}
    start = functools.partial(jax.distributed.initialize, **settings, shutdown_timeout_seconds=FAREWELL)
    try:
        _waiter.submit(start).result()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of this run did not find each other: {' '.join(str(error).split())}") from error


def _exchange(message: dict[str, Any], seconds: int = EVER) -> list[dict[str, Any]]:
    """Returns the messages of all processes, in their order."""
    text, name, everyone = json.dumps(message).encode(), f"gsdd/{next(_meetings)}", set(range(jax.process_count()))
    # Collectives of some backends wait for seconds only.
    _waiter.submit(multihost.sync_global_processes, name, timeout=seconds, processes=everyone).result()
    longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    # Of few sizes, for each is compiled.
    padded = text.ljust(-(-longest // 4096) * 4096)
    rows = multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))
    return [json.loads(row.tobytes()) for row in rows]


def _raise_if_ended(said: list[dict[str, Any]], but: str | None = None) -> list[Any]:
    for message in said:
        if (end := message.get("end", but)) != but:
            raise _Ended(end)
    return [message.get("value") for message in said]


def _say_on_abort(line: str, code: int) -> None:
    """Lets this process end with a line and an exit code where JAX aborts it, which no exception comes from."""
    global _on_abort

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def end(_: int) -> None:
        os.write(2, f"{line}\n".encode())
        os._exit(code)

    ctypes.pythonapi.PyOS_setsig.restype = ctypes.c_void_p
    ctypes.pythonapi.PyOS_setsig(int(signal.SIGABRT), end)
    # In the place of the one before, which nothing calls any more.
    _on_abort = end
