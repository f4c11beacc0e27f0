"""Several processes, on one host or many, that take the outer steps of one run together.

Process 0 leads: it alone reads and writes the run directory, fits, tests and exports, as a run in one process does. The
others follow: they hold their share of the data, wait for what the leader announces, and take each outer step with it.
What is announced goes through the key-value store of `jax.distributed`, which the leader's process serves; arrays go
through collectives.

JAX aborts a process when another one has died or did not come, in a way that Python cannot catch. So each process of a
run in several is the child of one that only waits, and says in one line what happened and what to do. Before they start
their children, these call the roll.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from train import stopping
from train.errors import EXIT_USER_ERROR, ConfigError, UserError, explain
from train.rundir import differences

# Ends a process without the farewell to the others that JAX would wait for.
EXIT_LOST = 3
# Seconds without a sign of life after which a process counts as dead.
HEARTBEAT = 30
# Seconds in which process 0 must answer the others, and in which all must have come to it.
REACH, GATHER = 60, 300
# Seconds between two looks at what other processes want, and the longest wait for a message before the next try.
POLL = 1.0
# Seconds in which all processes come to where they need each other: one may be compiling or reading data.
PATIENCE = 3600
# Set in the child; holds the descriptor through which the parent speaks to it.
CHILD = "GSDD_CHILD_PIPE"
TERMINATE = b"t"
VARIABLES = {"coordinator": "JAX_COORDINATOR_ADDRESS", "processes": "JAX_NUM_PROCESSES", "process": "JAX_PROCESS_ID"}


class Crew:
    """The processes of a run, seen by one of them; a single one leads nobody."""

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count
        self._announced = self._barriers = 0
        self.ended = False

    @property
    def leader(self) -> bool:
        """Whether this process does all but the steps."""
        return self.index == 0

    def announce(self, kind: str, **values: Any) -> None:
        """Announces something to all followers; does nothing in a single process."""
        if self.count > 1:
            _store().key_value_set(f"gsdd/announced/{self._announced}", json.dumps({"kind": kind, **values}))
            self._announced += 1

    def receive(self) -> dict[str, Any]:
        """Waits for what the leader announces next, for as long as it takes."""
        while True:
            if stopping.requested():
                _report("stop", self.index, "")
            try:
                text = _store().blocking_key_value_get(f"gsdd/announced/{self._announced}", int(POLL * 1000))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                continue
            self._announced += 1
            return json.loads(text)

    def barrier(self) -> None:
        """Waits until all processes have come here; collectives of some backends wait for seconds only."""
        if self.count > 1:
            self._barriers += 1
            _store().wait_at_barrier(f"gsdd/barrier/{self._barriers}", PATIENCE * 1000)

    def share(self, tree: Any) -> Any:
        """Returns the leader's arrays in every process, bit by bit; the others give arrays of the same shapes."""
        if self.count == 1:
            return tree
        held = jax.tree.map(np.asarray, tree)
        self.barrier()
        # As bytes, since the arrays of the others are added to these: -0.0 + 0.0 is 0.0.
        sent = jax.tree.map(lambda x: np.ascontiguousarray(x).reshape(-1).view(np.uint8), held)
        got = multihost_utils.broadcast_one_to_all(sent, is_source=self.leader)
        return jax.tree.map(lambda x, like: np.asarray(x).view(like.dtype).reshape(like.shape), got, held)

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Makes sure that all processes have the same settings; to be called by all.

        Raises:
            UserError: In a follower: its own differ from those of the leader.
        """
        if self.count == 1:
            return
        if self.leader:
            self.announce("settings", settings=settings)
            return
        differing = differences(self.receive()["settings"], json.loads(json.dumps(settings)))
        if differing:
            there = "; ".join("{} is {} in process 0 and {} here".format(key, *both) for key, both in differing.items())
            raise UserError(f"process {self.index} of {self.count} was started otherwise: {there}; start all alike")

    def end(self, error: str | None) -> None:
        """Lets the followers go: all is done, or the leader ends with an error or by SIGTERM."""
        if not self.ended:
            self.ended = True
            self.announce("end", error=error)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a run in several processes to a command line."""
    group = parser.add_argument_group("several processes (start the same command in each)")
    group.add_argument(
        "--distributed", action="store_true", help="Slurm, Open MPI or Kubernetes say what the others are, or:"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0 (or JAX_COORDINATOR_ADDRESS)")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are (or JAX_NUM_PROCESSES)")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0 (or JAX_PROCESS_ID)")


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[Crew]:
    """Joins the other processes of a run, if there are any, and leaves them at the end.

    Args:
        args: Parsed flags of `add_arguments`.

    Raises:
        ConfigError: The flags are incomplete or out of range, process 0 cannot be reached, or others did not come.
        SystemExit: In the process that only waits: with the code of the one that works.
    """
    settings = _settings(args)
    if settings is None:
        yield Crew()
        return
    if os.name != "posix":
        raise ConfigError("--processes: runs in several processes need Linux; start it without, in one")
    if CHILD not in os.environ:
        if settings:
            _call_the_roll(**settings)
        raise SystemExit(_wait_for_child())
    _listen_to_parent(int(os.environ[CHILD]))
    try:
        jax.distributed.initialize(**settings, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of this run did not find each other: {' '.join(str(error).split())}") from error
    crew = Crew(jax.process_index(), jax.process_count())
    if crew.leader:
        threading.Thread(target=_watch, daemon=True).start()
    try:
        yield crew
        if crew.leader:
            crew.end(None)
    except jax.errors.JaxRuntimeError as error:
        # Also a defect of the program, perhaps; its traceback would be the only sign of that.
        print(f"process {crew.index} of {crew.count}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        os._exit(EXIT_LOST)
    except BaseException as error:
        if crew.leader:
            crew.end("" if isinstance(error, (SystemExit, stopping.Stopped)) else explain(error) or repr(error))
        elif not isinstance(error, (SystemExit, stopping.Stopped)):
            message = (explain(error) or f"error: {error!r}").removeprefix("error: ")
            print(f"error: {message}", file=sys.stderr, flush=True)
            _report("failed", crew.index, message)
            os._exit(EXIT_USER_ERROR)
        raise


def _settings(args: argparse.Namespace) -> dict[str, Any] | None:
    """Returns what `jax.distributed.initialize` is to be told; None for a single process."""
    given = {name: getattr(args, name) for name in VARIABLES}
    for name, variable in VARIABLES.items():
        text = os.environ.get(variable)
        if given[name] is None and text:
            given[name] = text if name == "coordinator" else _number(variable, text)
    known = [name for name, value in given.items() if value is not None]
    if not known:
        # Found out by JAX.
        return {} if args.distributed else None
    if len(known) < len(given):
        absent = ", ".join(f"--{name}" for name in given if name not in known)
        raise ConfigError(f"--{known[0]}: expected all of --coordinator, --processes and --process; {absent} missing")
    coordinator, count, index = given.values()
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"--coordinator: expected HOST:PORT with a port from 1 to 65535, found {coordinator!r}")
    if count < 1 or not 0 <= index < count:
        raise ConfigError(f"--process: expected 0 to --processes - 1, found {index} of {count}")
    if count == 1:
        return None
    return {"coordinator_address": coordinator, "num_processes": count, "process_id": index}


def _number(variable: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{variable}: expected a number, found {text!r}")
    return int(text)


def _call_the_roll(coordinator_address: str, num_processes: int, process_id: int) -> None:
    """Waits until all processes are there, at the port where JAX will then listen.

    Raises:
        ConfigError: They do not find each other, or two of them do not fit together.
        Stopped: This process was asked to end.
    """
    host, _, port = coordinator_address.rpartition(":")
    if process_id:
        error = _answer_the_roll((host.strip("[]"), int(port)), num_processes, process_id)
    else:
        try:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            server = socket.create_server(("", int(port)), family=family, dualstack_ipv6=both)
        except OSError as busy:
            raise ConfigError(f"--coordinator: cannot listen at {coordinator_address}: {busy.strerror}") from busy
        with server:
            error = _hear_the_roll(server, num_processes)
    if error:
        raise ConfigError(error)


def _hear_the_roll(server: socket.socket, count: int) -> str:
    """Returns what is wrong, or nothing once all are there, and tells the others the same."""
    server.settimeout(POLL)
    deadline, error, there = time.monotonic() + GATHER, "", dict[int, socket.socket]()
    with contextlib.ExitStack() as open_sockets:
        while len(there) < count - 1 and not error:
            stopping.raise_if_requested()
            if time.monotonic() > deadline:
                absent = ", ".join(str(i) for i in range(1, count) if i not in there)
                error = f"--processes: of {count}, process {absent} did not come within {GATHER} s; start all of them"
            with contextlib.suppress(OSError, ValueError):
                other = open_sockets.enter_context(server.accept()[0])
                other.settimeout(POLL)
                index, of = json.loads(other.recv(1024))
                if of != count:
                    error = f"--processes: found {of} in process {index} and {count} in process 0; start all alike"
                elif index in there:
                    error = f"--process: {index} was given to two processes; each needs its own, from 0 to {count - 1}"
                there[index] = other
        for other in there.values():
            with contextlib.suppress(OSError):
                other.sendall(json.dumps(error).encode())
                # The first to close a connection keeps its port busy.
                other.recv(1)
    return error


def _answer_the_roll(address: tuple[str, int], count: int, index: int) -> str:
    """Returns what process 0 says is wrong, or nothing once all are there."""
    deadline = time.monotonic() + REACH
    while True:
        stopping.raise_if_requested()
        try:
            with socket.create_connection(address, timeout=POLL) as leader:
                leader.sendall(json.dumps([index, count]).encode())
                leader.settimeout(GATHER + REACH)
                return json.loads(leader.recv(1024))
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                where, why = ":".join(map(str, address)), getattr(error, "strerror", None) or error
                raise ConfigError(
                    f"--coordinator: process 0 does not answer at {where} within {REACH} s ({why}); "
                    "start it too, and name the machine where it runs"
                ) from error
        time.sleep(POLL / 2)


def _store() -> Any:
    """Returns the key-value store of the processes, of which JAX has no public handle."""
    return distributed.global_state.client


def _report(what: str, index: int, text: str) -> None:
    """Tells the leader something of a follower; the first one to say it counts."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _store().key_value_set(f"gsdd/{what}", json.dumps([index, text]))


def _watch() -> None:
    """Looks for what followers report, in the leader: one was asked to end, or cannot go on."""
    while True:
        time.sleep(POLL)
        for what in ("stop", "failed"):
            try:
                index, text = json.loads(_store().key_value_try_get(f"gsdd/{what}"))
            except jax.errors.JaxRuntimeError:
                continue
            if what == "failed":
                # What is computed is checkpointed, or was not yet.
                print(f"error: process {index}: {text}", file=sys.stderr, flush=True)
                os._exit(EXIT_USER_ERROR)
            stopping.request()


def _listen_to_parent(descriptor: int) -> None:
    """Passes on what the waiting process is told, and ends with it."""

    def listen() -> None:
        while os.read(descriptor, 1) == TERMINATE:
            stopping.request()
        os._exit(EXIT_LOST)

    threading.Thread(target=listen, daemon=True).start()


def _wait_for_child() -> int:
    """Starts this command again as a child, passes SIGTERM on, and says how it ended if it could not say so itself."""
    read_end, write_end = os.pipe()
    environment = os.environ | {CHILD: str(read_end)}
    # PYTHONPATH does not hold what `python -m` puts in front of it.
    child = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environment, pass_fds=[read_end])
    os.close(read_end)
    asked = False

    def handler(*_: object) -> None:
        nonlocal asked
        if asked:
            child.kill()
        asked = True
        # The child may have had the signal too, as schedulers send it; told so, it does not count it twice.
        with contextlib.suppress(BrokenPipeError):
            os.write(write_end, TERMINATE)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        # Sent to both.
        code = child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if asked and code == -signal.SIGKILL:
        return stopping.EXIT_AT_ONCE
    if code < 0 or code == EXIT_LOST:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else "lost the others"
        print(
            f"error: this process of the run {how}: another one died or could not be reached, or it was killed itself; "
            "start the same command in all processes again, and the run goes on from its last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        return EXIT_LOST
    return code
