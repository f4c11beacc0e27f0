"""The formulas of docs/scale.md against numbers worked out by hand, and the launch files against the command line."""

import json
import re
import signal
import subprocess
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from benchmarks import record, scale
from train import distill, hosts

ROOT = Path(__file__).resolve().parent.parent
SBATCH = ROOT / "docs" / "launch" / "slurm.sbatch"
KUBERNETES = ROOT / "docs" / "launch" / "kubernetes.yaml"
# 3 classes of 4 x 4 px, 2 images of 5 Gaussians each; feature maps of 4 x 4 and 2 x 2 with 7 channels.
SMALL = scale.Size(classes=3, pixels=4, depth=2, width=7, held=9, real=6, gpc=2, points=5, class_chunk=1)


@pytest.fixture(scope="module")
def flags() -> set[str]:
    with redirect_stdout(StringIO()) as text, pytest.raises(SystemExit):
        distill.main(["--help"])
    return set(re.findall(r"--[a-z-]+", text.getvalue()))


def given(script: str) -> set[str]:
    """Returns the flags that a script gives to train.distill."""
    (command,) = re.findall(r"python -m train\.distill (.*)", script)
    return set(re.findall(r"--[a-z-]+", command))


def kubernetes() -> tuple[dict, dict, dict]:
    """Returns the service, the job, and its container."""
    service, job = YAML(typ="safe", pure=True).load_all(KUBERNETES.read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return service, job, container


def test_bytes_of_parameters_state_and_sum_are_those_counted_by_hand():
    parameters = 3 * 2 * 5 * 9
    assert SMALL.parameters == parameters
    assert scale.state_bytes(SMALL) == 12 * parameters
    assert scale.summed_bytes(SMALL, "distribution") == 4 * parameters + 8
    assert scale.summed_bytes(SMALL, "trajectory") == 4 * parameters + 20


def test_collectives_are_counted_from_their_results_once_each():
    program = """
  %all-reduce.9 = (f32[40,10,2]{2,1,0}, f32[], /*index=2*/s32[3]{0}) all-reduce(%a, %b, %c), channel_id=1
  %get-tuple-element.5 = f32[40,10,2]{2,1,0} get-tuple-element(%all-reduce.9), index=0
  ROOT %all-gather.1 = f32[8]{0} all-gather(%d), dimensions={0}
"""
    assert scale.collective_bytes(program) == {"all-reduce": 4 * (800 + 1 + 3), "all-gather": 32}


def test_network_flops_are_those_of_its_convolutions():
    # So many pixels and channels that a CPU takes a convolution of half of the products, which is not to count.
    size = scale.Size(classes=2, pixels=64, depth=1, width=32, held=1, real=1, gpc=1, points=1)
    found = scale.network_flops(size)
    # Pixels of the border have fewer neighbors.
    neighbors = (3 * 64 - 2) ** 2
    convolution = 2 * neighbors * 3 * 32
    assert convolution < found["forward"] < 1.5 * convolution
    assert 1.8 * convolution < found["gradient"] < 4 * convolution


def test_plan_of_the_committed_results_is_what_the_code_calculates():
    results = json.loads((record.RESULTS / "scale.json").read_text())["results"]
    flops = {int(pixels): found for pixels, found in results["flops"].items()}
    assert scale.plan(flops, results["memory"]["constants"]) == results["plan"]


def test_committed_steps_agree_with_one_device_and_with_the_formulas():
    results = json.loads((record.RESULTS / "scale.json").read_text())["results"]
    assert {(row["objective"], row["devices"]) for row in results["steps"]} == {
        (name, devices) for name in scale.SCALARS for devices in scale.DEVICES
    }
    for row in results["steps"]:
        # Float32, sums in another order.
        assert row["gradient_difference"] < 1e-4 and row["metrics_difference"] < 1e-4
        assert row["collectives"] == ({"all-reduce": row["summed_formula"]} if row["devices"] > 1 else {})
        # Counters, key and normalization are not in the formula.
        assert 0 <= row["arguments"] - row["arguments_formula"] < 100


def test_launch_files_give_flags_that_the_command_has(flags):
    _, _, container = kubernetes()
    assert given(SBATCH.read_text()) == {"--distributed", "--config", "--out", "--quiet"}
    for script in (SBATCH.read_text(), *container["args"]):
        assert given(script) <= flags
        assert "distill.devices=0" in script


@pytest.mark.parametrize("script", [SBATCH.read_text(), *kubernetes()[2]["args"]], ids=["slurm", "kubernetes"])
def test_launch_scripts_are_valid_shell(script):
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_kubernetes_job_gives_every_process_its_number_and_the_address_of_process_0():
    service, job, container = kubernetes()
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(variables[hosts.VARIABLES["processes"]])
    name, service_name = job["metadata"]["name"], service["metadata"]["name"]
    host, _, port = variables[hosts.VARIABLES["coordinator"]].partition(":")
    assert host == f"{name}-0.{service_name}" and pod["subdomain"] == service_name
    assert int(port) in [entry["containerPort"] for entry in container["ports"]]
    assert service["spec"]["clusterIP"] == "None" and list(service["spec"]["selector"].values()) == [name]
    assert f'export {hosts.VARIABLES["process"]}="$JOB_COMPLETION_INDEX"' in container["args"][0]
    assert (ROOT / variables["CONFIG"]).exists()


def in_pod(folder: Path, index: int, stand_in: str) -> subprocess.Popen:
    """Starts the script of a pod with a shell function in the place of python."""
    (script,) = kubernetes()[2]["args"]
    environment = {"OUT": str(folder), "CONFIG": "x", "JOB_COMPLETION_INDEX": str(index), "PATH": "/usr/bin:/bin"}
    return subprocess.Popen(["bash", "-c", f"python() {{ {stand_in}; }}\n{script}"], env=environment)


@pytest.mark.parametrize(
    ("stand_in", "index", "wanted"),
    [("exit 0", 1, 75), ("exit 3", 0, 3), ('touch "$OUT/result.json"', 0, 0)],
)
def test_pod_fails_unless_process_0_wrote_its_result(tmp_path, stand_in, index, wanted):
    assert in_pod(tmp_path, index, stand_in).wait(timeout=30) == wanted


def test_pod_passes_sigterm_on_waits_for_the_run_to_save_and_fails(tmp_path):
    saving = 'trap "sleep 0.5; touch $OUT/saved; exit 0" TERM; touch "$OUT/started"; while :; do sleep 0.05; done'
    pod = in_pod(tmp_path, 0, saving)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(timeout=30) == 75
    assert (tmp_path / "saved").exists()
