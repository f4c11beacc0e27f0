"""Runs in several processes, as real processes that talk over the loopback device; also killed and told to stop."""

import argparse
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import ROOT, assert_same, findings, start
from safetensors.numpy import load_file

from train import hosts
from train.checkpoint import Checkpoints
from train.errors import EXIT_USER_ERROR, ConfigError
from train.rundir import is_wall_clock, read_metrics

# As small as it goes: a line for every iteration, a checkpoint for every second one. In float32, for bfloat16 rounds
# the last bits of parameters to other images.
TOY = """
name: toy
ipc: 1
data: {source: digits, per_class: 8, test_limit: 50}
network: {depth: 1, width: 4}
augment: {strategy: crop}
codec: {name: gaussian, images_per_class: 2, num_points: 4, lr: 0.01, dtype: float32}
fit: {steps: 2}
objective: {name: distribution, batch_real: 4, class_chunk: 10}
distill: {iterations: 8, log_every: 1, checkpoint_every: 2, devices: 0}
evaluate: {steps: 4, batch: 8, lr: 0.1, seeds: 1}
baselines: {pixel: false, full_data: false, random_real: false, fit_only: false}
"""
AGAIN = "start the same command in all processes again"
SECONDS = 400

# The command line, but the leader waits after the line of an iteration until a condition holds.
WAITING = """
import sys, time
from pathlib import Path
from train import distill, stopping
from train.rundir import RunDir
append = RunDir.append
def waiting(self, phase, step, **values):
    append(self, phase, step, **values)
    while (phase, step) == ("main-distill", {step}) and not ({condition}):
        time.sleep(0.02)
RunDir.append = waiting
sys.exit(distill.main())
"""


class Processes:
    """The processes of one run."""

    def __init__(self, folder: Path, commands: Sequence[Sequence[str]]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self._folder = folder
        folder.mkdir(parents=True)
        self.started = []
        for index, command in enumerate(commands):
            where = ["--coordinator", address, "--processes", str(len(commands)), "--process", str(index)]
            with open(folder / f"{index}.out", "wb") as out, open(folder / f"{index}.err", "wb") as err:
                process = subprocess.Popen([*command, *where], cwd=ROOT, stdout=out, stderr=err)
            self.started.append(process)

    def output(self, index: int) -> str:
        return (self._folder / f"{index}.out").read_text()

    def errors(self, index: int) -> str:
        return (self._folder / f"{index}.err").read_text()

    def worker(self, index: int) -> int:
        """The process that works for one that only waits: its only child."""
        (found,) = [pid for pid, parent in parents() if parent == self.started[index].pid]
        return found

    def wait_for_line(self, out: Path, step: int) -> None:
        deadline = time.monotonic() + SECONDS
        while not any((m["phase"], m["step"]) == ("main-distill", step) for m in read_metrics(out)):
            assert all(process.poll() is None for process in self.started), self.everything()
            assert time.monotonic() < deadline, self.everything()
            time.sleep(0.02)

    def codes(self) -> list[int]:
        deadline = time.monotonic() + SECONDS
        try:
            return [process.wait(max(deadline - time.monotonic(), 0)) for process in self.started]
        except subprocess.TimeoutExpired:
            pytest.fail(self.everything())

    def everything(self) -> str:
        indices = range(len(self.started))
        return "\n".join(
            f"process {i}: {p.poll()}\n{self.errors(i)}" for i, p in zip(indices, self.started, strict=True)
        )

    def end(self) -> None:
        """Whatever became of a test, nothing of it runs on: a worker ends with the process that waits for it."""
        for process in self.started:
            process.kill()
            process.wait()


def parents() -> Iterator[tuple[int, int]]:
    """Every process of the machine and its parent."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        # Some end meanwhile. A name may hold spaces and brackets.
        with contextlib.suppress(OSError):
            yield int(path.parent.name), int(path.read_text().rpartition(")")[2].split()[1])


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "toy.yaml"
    path.write_text(TOY)
    return path


@pytest.fixture(scope="module")
def launch(toy, tmp_path_factory):
    """Starts one command in several processes: ``launch(out, count, [program], [settings of each])``."""
    if jax.default_backend() != "cpu":
        pytest.skip("several processes cannot share a GPU")
    with contextlib.ExitStack() as running:

        def started(out: Path, count: int = 2, program: str | None = None, settings=None) -> Processes:
            what = ["-m", "train.distill"] if program is None else ["-c", program]
            command = [sys.executable, *what, "--config", str(toy), "--quiet", "--out", str(out)]
            commands = [[*command, *(settings[i] if settings else [])] for i in range(count)]
            processes = Processes(tmp_path_factory.mktemp("said") / "of", commands)
            running.callback(processes.end)
            return processes

        yield started


@pytest.fixture(scope="module")
def alone(toy, tmp_path_factory) -> Path:
    """The run in a single process; read only."""
    out = tmp_path_factory.mktemp("alone") / "run"
    with contextlib.chdir(ROOT):
        assert start(toy, out) == 0
    return out


@pytest.fixture(scope="module")
def stopped(launch, tmp_path_factory) -> tuple[Path, Processes, list[int], list[dict]]:
    """A run in two processes of which the follower had SIGTERM during iteration 4."""
    out = tmp_path_factory.mktemp("two") / "run"
    processes = launch(out, program=WAITING.format(step=3, condition="stopping.requested()"))
    processes.wait_for_line(out, 3)
    processes.started[1].terminate()
    codes = processes.codes()
    with Checkpoints(out / "checkpoints" / "main-distill") as held:
        return out, processes, codes, [*read_metrics(out), {"checkpoint": held.latest()}]


@pytest.fixture(scope="module")
def killed(stopped, launch, tmp_path_factory) -> tuple[Path, Processes, list[int]]:
    """The same run continued, until the follower's worker was killed; iteration 5 is not checkpointed."""
    out = stopped[0]
    dead = tmp_path_factory.mktemp("dead") / "follower"
    processes = launch(out, program=WAITING.format(step=5, condition=f"Path({str(dead)!r}).exists()"))
    processes.wait_for_line(out, 5)
    os.kill(processes.worker(1), signal.SIGKILL)
    processes.started[1].wait(SECONDS)
    dead.touch()
    return out, processes, processes.codes()


@pytest.fixture(scope="module")
def finished(killed, launch) -> tuple[Path, Processes, list[int]]:
    """The same run continued to its end."""
    processes = launch(killed[0])
    return killed[0], processes, processes.codes()


def test_sigterm_to_a_follower_saves_everything_and_ends_all_with_0(stopped):
    _, processes, codes, found = stopped
    assert codes == [0, 0], processes.everything()
    assert found[-2]["step"] == 3 and found[-1] == {"checkpoint": 3}
    for index in range(2):
        assert "stopped by SIGTERM, everything is saved; the same command goes on: python" in processes.output(index)


def test_all_processes_say_in_one_line_that_one_was_killed_and_what_to_do(killed):
    _, processes, codes = killed
    assert codes == [hosts.EXIT_LOST, hosts.EXIT_LOST], processes.everything()
    assert "was ended by SIGKILL" in processes.errors(1) and "lost the others" in processes.errors(0)
    for index in range(2):
        assert processes.errors(index).count(AGAIN) == 1 and "Traceback" not in processes.errors(index)


def test_the_same_commands_go_on_to_the_end(finished):
    out, processes, codes = finished
    assert codes == [0, 0], processes.everything()
    assert (out / "table.md").read_text() in processes.output(0)
    # The leader alone speaks, but for JAX's communication.
    assert all(line.startswith("[Gloo]") for line in processes.output(1).splitlines())
    assert [m["step"] for m in read_metrics(out) if m["phase"] == "main-distill"] == list(range(1, 9))


def distance(found, expected) -> float:
    found, expected = np.float64(found), np.float64(expected)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_a_run_of_two_processes_is_the_run_of_one_up_to_rounding(finished, alone):
    lines, expected = ([m for m in read_metrics(out) if "distill" in m["phase"]] for out in (finished[0], alone))
    assert len(lines) == len(expected) == 8
    names = [name for name in expected[0] if name != "phase" and not is_wall_clock(name)]
    for name in names:
        assert distance([m[name] for m in lines], [m[name] for m in expected]) <= 1e-6, name
    ours, theirs = (load_file(out / "export" / "synset.safetensors") for out in (finished[0], alone))
    assert ours.keys() == theirs.keys()
    assert {name: d for name in theirs if not (d := distance(ours[name], theirs[name])) <= 1e-6} == {}


@pytest.mark.slow
def test_a_run_that_was_stopped_and_killed_has_the_bits_of_an_undisturbed_one(finished, launch, tmp_path):
    processes = launch(tmp_path / "run")
    assert processes.codes() == [0, 0], processes.everything()
    assert_same(findings(finished[0]), findings(tmp_path / "run"))


@pytest.mark.slow
def test_three_followers_outlive_a_killed_leader_and_the_run_goes_on_to_the_same_bits(launch, tmp_path):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "run"
    settings = [["distill.iterations=60"]] * 4
    processes = launch(undisturbed, 4, settings=settings)
    assert processes.codes() == [0] * 4, processes.everything()
    processes = launch(out, 4, settings=settings)
    processes.wait_for_line(out, 10)
    os.kill(processes.worker(0), signal.SIGKILL)
    assert processes.codes() == [hosts.EXIT_LOST] * 4, processes.everything()
    assert all(processes.errors(index).count(AGAIN) == 1 for index in range(4)), processes.everything()
    processes = launch(out, 4, settings=settings)
    assert processes.codes() == [0] * 4, processes.everything()
    assert_same(findings(out), findings(undisturbed))


def test_processes_started_with_different_settings_end_and_name_the_setting(launch, tmp_path):
    processes = launch(tmp_path / "run", settings=[[], ["seed=1"]])
    assert processes.codes() == [EXIT_USER_ERROR] * 2, processes.everything()
    for index in range(2):
        assert re.search("seed is 0 in process 0 and 1 here", processes.errors(index)), processes.everything()
        assert "Traceback" not in processes.errors(index)


# Parts that need one process

TOLD = {"coordinator_address": "node:1234", "num_processes": 3, "process_id": 2}
FLAGS = ["--coordinator", "node:1234", "--processes", "3", "--process", "2"]


@pytest.fixture
def parse(monkeypatch):
    """Parses flags where no variable says anything."""
    for variable in hosts.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    parser = argparse.ArgumentParser()
    hosts.add_arguments(parser)
    return parser.parse_args


@pytest.fixture
def flags(parse):
    """What flags say of the processes."""
    return lambda *flags: hosts._settings(parse(flags))


@pytest.mark.parametrize(
    ("index", "expected"), [(0, [("gsdd/announced/0", '{"kind": "end", "error": null}')]), (2, [])]
)
def test_the_leader_alone_tells_the_others_that_a_run_is_over(parse, monkeypatch, index, expected):
    said: list[tuple[str, str]] = []
    store = types.SimpleNamespace(key_value_set=lambda key, value: said.append((key, value)))
    replaced = {"_store": lambda: store, "_listen_to_parent": lambda descriptor: None, "_watch": lambda: None}
    for name, replacement in replaced.items():
        monkeypatch.setattr(hosts, name, replacement)
    monkeypatch.setenv(hosts.CHILD, "0")
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: None)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with hosts.joined(parse(FLAGS)) as crew:
        assert crew.leader == (index == 0)
    assert said == expected


def test_flags_name_the_processes(flags):
    assert flags(*FLAGS) == TOLD


def test_variables_stand_in_for_flags_which_come_first(flags, monkeypatch):
    for variable, value in zip(hosts.VARIABLES.values(), ("node:1234", "3", "0"), strict=True):
        monkeypatch.setenv(variable, value)
    assert flags() == TOLD | {"process_id": 0}
    assert flags("--process", "2") == TOLD


def test_without_flags_a_run_has_one_process_and_a_cluster_is_asked_on_demand(flags):
    assert flags() is None
    assert flags("--distributed") == {}


def test_one_process_of_one_is_a_run_in_a_single_process(flags):
    assert flags("--coordinator", "node:1234", "--processes", "1", "--process", "0") is None


def without(*names: str) -> list[str]:
    return [x for pair in zip(FLAGS[::2], FLAGS[1::2], strict=True) if pair[0] not in names for x in pair]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (without("--process"), "--coordinator: expected all of .*; --process missing"),
        (without("--coordinator", "--processes"), "--process: expected all of .*; --coordinator, --processes missing"),
        ([*FLAGS, "--coordinator", "node"], "--coordinator: expected HOST:PORT .*, found 'node'"),
        ([*FLAGS, "--coordinator", "node:x"], "--coordinator: expected HOST:PORT with a port .*, found 'node:x'"),
        ([*FLAGS, "--coordinator", "node:70000"], "with a port from 1 to 65535, found 'node:70000'"),
        ([*FLAGS, "--coordinator", ":1234"], "--coordinator: expected HOST:PORT .*, found ':1234'"),
        ([*FLAGS, "--process", "3"], "--process: expected 0 to --processes - 1, found 3 of 3"),
        ([*FLAGS, "--process", "-1"], "--process: expected 0 to --processes - 1, found -1 of 3"),
        ([*FLAGS, "--processes", "0"], "--process: expected 0 to --processes - 1, found 2 of 0"),
    ],
)
def test_bad_flags_are_named(flags, given, message):
    with pytest.raises(ConfigError, match=message):
        flags(*given)


@pytest.mark.parametrize("value", ["two", "-1", "1.5"])
def test_a_variable_that_is_no_number_is_named(flags, monkeypatch, value):
    monkeypatch.setenv("JAX_NUM_PROCESSES", value)
    with pytest.raises(ConfigError, match=f"JAX_NUM_PROCESSES: expected a number, found '{value}'"):
        flags("--coordinator", "node:1234", "--process", "0")


def test_several_processes_are_refused_where_signals_and_pipes_are_others(parse, monkeypatch):
    args = parse(FLAGS)
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(ConfigError, match="--processes: runs in several processes need Linux"), hosts.joined(args):
        pytest.fail("joined")


@pytest.fixture
def call(monkeypatch):
    """Calls the roll of processes ``(index, count)`` that have little time; gives what each of them ends with."""
    for name, seconds in {"REACH": 0.5, "GATHER": 0.5, "POLL": 0.1}.items():
        monkeypatch.setattr(hosts, name, seconds)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def one(index: int, count: int) -> str:
        try:
            return hosts._call_the_roll(address, count, index) or ""
        except ConfigError as error:
            return str(error).replace(address, "HOST:PORT")

    def together(*processes: tuple[int, int]) -> list[str]:
        with futures.ThreadPoolExecutor(len(processes)) as threads:
            return list(threads.map(one, *zip(*processes, strict=True)))

    return together


def test_processes_that_are_all_there_go_on(call):
    assert call((2, 3), (0, 3), (1, 3)) == ["", "", ""]


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        ([(0, 4), (2, 4)], "--processes: of 4, process 1, 3 did not come within 0.5 s"),
        ([(0, 4), (2, 4), (2, 4)], "--process: 2 was given to two processes; each needs its own, from 0 to 3"),
        ([(0, 3), (1, 2)], "--processes: found 2 in process 1 and 3 in process 0"),
        ([(1, 2)], "--coordinator: process 0 does not answer at HOST:PORT within 0.5 s (Connection refused); start it"),
    ],
)
def test_all_processes_say_what_keeps_them_apart(call, processes, message):
    said = call(*processes)
    # One of two with the same number may be told nothing by process 0, which has left.
    assert said[0].startswith(message) and all(text.startswith((message, "--coordinator")) for text in said)


def test_a_coordinator_without_an_address_is_named(monkeypatch):
    monkeypatch.setattr(hosts, "REACH", 0)
    with pytest.raises(ConfigError, match="process 0 does not answer at no.such.host.invalid:1234 within 0 s"):
        hosts._call_the_roll("no.such.host.invalid:1234", 2, 1)


def test_a_port_that_another_program_has_is_named(monkeypatch):
    with socket.create_server(("", 0)) as taken, pytest.raises(ConfigError, match="--coordinator: cannot listen at"):
        hosts._call_the_roll(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0)
