"""Runs in several processes, as real processes that talk over the loopback device; also killed and told to stop."""

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import ROOT, assert_same, findings, image_folder, start
from safetensors.numpy import load_file

from train import hosts, stopping
from train.checkpoint import Checkpoints
from train.errors import ConfigError, UserError
from train.rundir import RunDir, is_wall_clock, read_metrics

# As small as it goes: a line for every iteration, and a checkpoint where the run is stopped, tested or done.
TOY = """
name: toy
ipc: 1
data: {source: folder, path: PATH}
network: {depth: 1, width: 4}
augment: {strategy: none}
codec: {name: pixel, lr: 0.1, dtype: float32}
objective: {name: distribution, batch_real: 4}
distill: {iterations: 8, log_every: 1, checkpoint_every: 100, devices: 0}
evaluate: {protocol: paper, test_every: 6, steps: 2, batch: 8, lr: 0.1, seeds: 1}
baselines: {pixel: false, full_data: false, random_real: false, fit_only: false}
"""
AGAIN = "start the same command in all processes again"
SECONDS = 600

# The command line, but process 0 waits after the line of an iteration until a file is there.
WAITING = """
import sys, time
from pathlib import Path
from train import distill
from train.rundir import RunDir
append = RunDir.append
def waiting(self, phase, step, **values):
    append(self, phase, step, **values)
    while (phase, step) == ("main-distill", {step}) and not Path({go!r}).exists():
        time.sleep(0.02)
RunDir.append = waiting
sys.exit(distill.main())
"""
# What processes say to each other: one is asked to end, then process 0 is killed.
TALK = """
import argparse, os, signal
import jax, numpy as np
from train import hosts, stopping
parser = argparse.ArgumentParser()
hosts.add_arguments(parser)
with stopping.on_sigterm(), hosts.joined(parser.parse_args()):
    index = jax.process_index()
    assert hosts.gather({"index": index}) == [{"index": 0}, {"index": 1}]
    bits = np.uint32([0x80000000, 0x7FC00001, 1]).view(np.float32)
    shared = hosts.share({"a": bits if index == 0 else np.zeros_like(bits), "b": np.int32(index)})
    assert shared["a"].tobytes() == bits.tobytes() and shared["b"] == 0
    assert not hosts.stop_requested()
    if index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    assert hosts.stop_requested()
    if index == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    hosts.gather()
"""


class Processes:
    """The processes of one run."""

    def __init__(self, folder: Path, count: int, command: Sequence[str]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self._folder, self.started = folder, []
        for index in range(count):
            where = ["--coordinator", address, "--processes", str(count), "--process", str(index)]
            with open(folder / f"{index}.out", "wb") as out, open(folder / f"{index}.err", "wb") as err:
                process = subprocess.Popen([sys.executable, *command, *where], cwd=ROOT, stdout=out, stderr=err)
            self.started.append(process)

    def output(self, index: int) -> str:
        return (self._folder / f"{index}.out").read_text()

    def errors(self, index: int) -> str:
        return (self._folder / f"{index}.err").read_text()

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
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
        return "\n".join(f"process {i}: {p.poll()}\n{self.errors(i)}" for i, p in enumerate(self.started))

    def end(self) -> None:
        """Whatever became of a test, nothing of it runs on."""
        for process in self.started:
            process.kill()
            process.wait()


def steps(out: Path) -> list[int]:
    return [m["step"] for m in read_metrics(out) if m["phase"] == "main-distill"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = image_folder(tmp_path_factory.mktemp("toy"), "abc")
    (folder / "toy.yaml").write_text(TOY.replace("PATH", str(folder)))
    return folder / "toy.yaml"


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Starts one command in several processes."""
    if jax.default_backend() != "cpu":
        pytest.skip("several processes cannot share a GPU")
    with contextlib.ExitStack() as running:

        def started(count: int, *command: str) -> Processes:
            processes = Processes(tmp_path_factory.mktemp("said"), count, command)
            running.callback(processes.end)
            return processes

        yield started


@pytest.fixture(scope="module")
def begun(toy, tmp_path_factory) -> Path:
    """A run that a single process was told to stop in iteration 2."""
    out = tmp_path_factory.mktemp("several") / "run"
    append = RunDir.append

    def stopping_at_2(self, phase, step, **values):
        append(self, phase, step, **values)
        if (phase, step) == ("main-distill", 2):
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDir, "append", stopping_at_2)
        assert start(toy, out) == 0
    assert steps(out) == [1, 2]
    return out


def agree(found, expected) -> bool:
    found, expected = np.float64(found), np.float64(expected)
    return bool(np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected))


def test_two_processes_go_on_with_the_run_of_one_which_stays_the_same_up_to_rounding(begun, whole, launch, toy):
    out = begun
    processes = launch(2, "-m", "train.distill", "--config", str(toy), "--quiet", "--out", str(out))
    assert processes.codes() == [0, 0], processes.everything()
    assert (out / "table.md").read_text() in processes.output(0)
    # Process 0 alone speaks, but for JAX's communication.
    assert all(line.startswith("[Gloo]") for line in processes.output(1).splitlines())
    lines, expected = ([m for m in read_metrics(path) if "distill" in m["phase"]] for path in (out, whole))
    assert [m["step"] for m in lines] == list(range(1, 9))
    names = [name for name in expected[0] if name != "phase" and not is_wall_clock(name)]
    assert [name for name in names if not agree([m[name] for m in lines], [m[name] for m in expected])] == []
    ours, theirs = (load_file(path / "export" / "synset.safetensors") for path in (out, whole))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not agree(ours[name], theirs[name])] == []


def test_all_hear_what_one_says_and_shares_and_that_one_is_to_end_and_the_death_of_process_0_is_one_line(launch):
    processes = launch(2, "-c", TALK)
    assert processes.codes() == [-signal.SIGKILL, hosts.EXIT_LOST], processes.everything()
    assert processes.errors(1).count(AGAIN) == 1 and "Traceback" not in processes.errors(1)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_at_the_next_step_with_a_checkpoint(launch, toy, tmp_path):
    out, go = tmp_path / "run", tmp_path / "go"
    program = WAITING.format(step=4, go=str(go))
    processes = launch(2, "-c", program, "--config", str(toy), "--quiet", "--out", str(out))
    processes.wait_until(lambda: out.exists() and 4 in steps(out))
    processes.started[1].terminate()
    processes.wait_until(lambda: "SIGTERM: saving" in processes.errors(1))
    go.touch()
    assert processes.codes() == [0, 0], processes.everything()
    # The process may have been on its way to the others, or there already.
    assert steps(out) in ([1, 2, 3, 4], [1, 2, 3, 4, 5])
    assert Checkpoints(out / "checkpoints" / "main-distill").latest() == steps(out)[-1]
    for index in range(2):
        assert "stopped by SIGTERM, everything is saved; the same command goes on: python" in processes.output(index)


@pytest.mark.slow
def test_four_processes_of_which_one_is_killed_end_within_a_minute_and_three_go_on(launch, toy, tmp_path):
    out = tmp_path / "run"
    command = ["-m", "train.distill", "--config", str(toy), "--quiet", "--out", str(out), "distill.iterations=200"]
    command += ["distill.checkpoint_every=10", "evaluate.test_every=200"]
    processes = launch(4, *command)
    processes.wait_until(lambda: out.exists() and len(steps(out)) > 20)
    processes.started[2].kill()
    began = time.monotonic()
    assert processes.codes() == [hosts.EXIT_LOST] * 2 + [-signal.SIGKILL, hosts.EXIT_LOST], processes.everything()
    assert time.monotonic() - began < 2 * hosts.HEARTBEAT
    assert all(processes.errors(index).count(AGAIN) == 1 for index in (0, 1, 3)), processes.everything()
    processes = launch(3, *command)
    assert processes.codes() == [0] * 3, processes.everything()
    assert steps(out) == list(range(1, 201))


@pytest.mark.slow
def test_processes_share_out_segments_of_the_experts_that_process_0_trained(launch, toy, tmp_path):
    settings = ["objective={name: trajectory, syn_steps: 2, segments: 2, max_start_epoch: 1, expert_epochs: 1}"]
    settings += ["experts.count=2", "distill.iterations=2", "evaluate.protocol=trusted"]
    command = ["-m", "train.distill", "--config", str(toy), "--quiet", "--out", str(tmp_path / "run"), *settings]
    processes = launch(2, *command)
    assert processes.codes() == [0, 0], processes.everything()
    assert steps(tmp_path / "run") == [1, 2]


@pytest.mark.slow
def test_two_processes_give_the_same_bits_twice(launch, toy, tmp_path):
    for name in "ab":
        processes = launch(2, "-m", "train.distill", "--config", str(toy), "--quiet", "--out", str(tmp_path / name))
        assert processes.codes() == [0, 0], processes.everything()
    assert_same(findings(tmp_path / "a"), findings(tmp_path / "b"))


# Parts that need one process

TOLD = {"coordinator_address": "node:1234", "num_processes": 3, "process_id": 2}
FLAGS = ["--coordinator", "node:1234", "--processes", "3", "--process", "2"]


@pytest.fixture
def told(monkeypatch):
    """What flags and variables say of the processes."""
    for variable in hosts.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)

    def settings(*flags: str, **variables: str):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        parser = argparse.ArgumentParser()
        hosts.add_arguments(parser)
        return hosts._settings(parser.parse_args(flags))

    return settings


def test_flags_or_variables_name_the_processes_and_a_cluster_is_asked_on_demand(told):
    assert told() is None
    assert told("--distributed") == {}
    assert told(*FLAGS) == TOLD
    assert told(*FLAGS, "--processes", "1", "--process", "0") is None
    named = {"JAX_COORDINATOR_ADDRESS": "node:1234", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "0"}
    assert told(**named) == TOLD | {"process_id": 0}
    assert told("--process", "2", **named) == TOLD


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (FLAGS[:4], "need --coordinator, --processes and --process; --process absent"),
        (FLAGS[4:], "need .*; --coordinator, --processes absent"),
        ([*FLAGS, "--coordinator", "node"], "--coordinator: expected HOST:PORT .*, found 'node'"),
        ([*FLAGS, "--coordinator", "node:70000"], "with a port from 1 to 65535, found 'node:70000'"),
        ([*FLAGS, "--coordinator", ":1234"], "--coordinator: expected HOST:PORT .*, found ':1234'"),
        ([*FLAGS, "--process", "3"], "--process: expected 0 to --processes - 1, found 3 of 3"),
        ([*FLAGS, "--processes", "0"], "--process: expected 0 to --processes - 1, found 2 of 0"),
    ],
)
def test_bad_flags_are_named(told, given, message):
    with pytest.raises(ConfigError, match=message):
        told(*given)


def test_a_port_that_another_program_has_is_named():
    with socket.create_server(("", 0)) as taken, pytest.raises(ConfigError, match="--coordinator: cannot listen at"):
        hosts._initialize(TOLD | {"process_id": 0, "coordinator_address": f"localhost:{taken.getsockname()[1]}"})


def test_processes_started_with_different_settings_name_them(monkeypatch):
    monkeypatch.setattr(hosts, "gather", lambda settings: [settings, settings, {"seed": 1, "name": "x"}])
    with pytest.raises(UserError, match="process 2 of 3 was started otherwise: seed is 0 in process 0 and 1 there;"):
        hosts.agree({"seed": 0, "name": "x"})


def joined_while_others_say(monkeypatch, others: list[dict], body) -> tuple[list, bool]:
    """What this process says, with stand-ins for the others, and whether it came to the end."""
    said, args = [], argparse.Namespace(coordinator="node:1", processes=2, process=0)

    def exchange(message, seconds=0):
        said.append(message)
        return [message, others.pop(0)]

    for name, stand_in in {"_initialize": lambda settings: None, "_exchange": exchange}.items():
        monkeypatch.setattr(hosts, name, stand_in)
    monkeypatch.setattr(hosts, "_say_on_abort", lambda line, code: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    came = False
    try:
        with hosts.joined(args):
            body()
            came = True
    finally:
        others.append(said)
    return said, came


def test_all_end_with_a_process_that_ends(monkeypatch):
    def fail():
        raise UserError("the disk is gone")

    done, stop, error = {"end": hosts.DONE}, {"end": hosts.STOPPED}, {"end": "process 1 of 2: no data"}
    assert joined_while_others_say(monkeypatch, [{"value": 3}, done], lambda: hosts.gather(1)) == (
        [{"value": 1}, done],
        True,
    )
    # Process 0 found the run finished.
    assert joined_while_others_say(monkeypatch, [done], hosts.gather) == ([{"value": None}], False)
    for others, body, raised in (
        ([stop], hosts.stop_requested, stopping.Stopped),
        ([error], hosts.gather, "process 1 of 2: no data"),
        # Waiting at the end for process 0.
        ([stop], lambda: None, stopping.Stopped),
        ([{"value": 3}], fail, "the disk is gone"),
    ):
        with pytest.raises(UserError if isinstance(raised, str) else raised) as caught:
            joined_while_others_say(monkeypatch, others, body)
        assert not isinstance(raised, str) or str(caught.value) == raised
    assert others == [[{"end": "process 0 of 2: the disk is gone"}]]
