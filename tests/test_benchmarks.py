"""The benchmarks measure what they say, and refuse what they cannot: at sizes that take seconds on a CPU."""

import importlib.util
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import correctness, figure5, gpu, offline, plots, siren, table16, tables, timing
from benchmarks.peers import __main__ as peers
from train import rundir

ROOT = Path(__file__).resolve().parent.parent
REFUSAL = "needs a CUDA device; JAX runs on cpu; --smoke runs everything at tiny sizes on the XLA path\n"


def numbers(tree) -> list[float]:
    """Returns every number of a JSON document; non-finite ones were written as strings and are put back."""
    if isinstance(tree, dict):
        return [x for value in tree.values() for x in numbers(value)]
    if isinstance(tree, list):
        return [x for value in tree for x in numbers(value)]
    if tree in ("NaN", "Infinity", "-Infinity"):
        return [math.nan]
    return [tree] if isinstance(tree, int | float) else []


# SIREN


def test_siren_has_the_floats_of_the_paper_and_starts_within_its_bounds():
    assert figure5.WIDTHS == {283: 10, 963: 20, 2043: 30, 3523: 40}
    assert [siren.floats(width) for width in figure5.WIDTHS.values()] == list(figure5.WIDTHS)
    params = jax.device_get(siren.init(jax.random.key(2), 50, 20))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 50 * 963
    for layer, bound in zip(params, [0.5, *3 * [math.sqrt(6 / 20) / 40]], strict=True):
        for leaf in layer:
            assert 0.95 * bound < np.abs(leaf).max() <= bound


def test_siren_draws_what_a_loop_over_images_and_pixels_draws():
    n, size = 2, 5
    params = jax.device_get(siren.init(jax.random.key(1), n, 4))
    expected = np.zeros((n, size, size, 3))
    for i in range(n):
        for y in range(size):
            for x in range(size):
                h = np.array([y, x]) * 2 / (size - 1) - 1
                for place, layer in enumerate(params):
                    h = h @ np.float64(layer.weight[i]) + np.float64(layer.bias[i])
                    if place < 3:
                        h = np.sin((30 if place == 0 else 40) * h)
                expected[i, y, x] = h
    assert expected.std() > 0.01
    # The phases reach hundreds, of which float32 knows 1e-5.
    np.testing.assert_allclose(jax.jit(siren.decode, static_argnums=1)(params, size), expected, atol=1e-4)


# Timing


def test_measuring_traces_once_and_reports_time_and_memory():
    timed = timing.Timed(lambda x: 2 * x, jnp.ones(1000)).compile()
    found = timed.measure(seconds=0.01, repeats=4)
    assert timed.traces == 1
    assert 0 < found["min_ms"] <= found["median_ms"] < 1e3 and 1 <= found["repeats"] <= 4
    assert found["memory"]["argument"] >= 4000 and found["memory"]["total"] >= 8000
    np.testing.assert_array_equal(timed(), 2.0)


# Figure 5


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> Path:
    """The folder of all stages of the command for a GPU at tiny sizes, through XLA where there is none."""
    folder = tmp_path_factory.mktemp("results") / "h200"
    for name in gpu.SECONDS:
        assert gpu.run_stage(name, gpu.Setup(smoke=True), 600, folder) == 0
    return folder


def test_figure5_records_time_and_memory_of_every_series(dry_run):
    found = json.loads((dry_run / "figure5.json").read_text())["results"]
    assert [row["series"] for row in found["rows"]] == figure5.curves()
    for row in found["rows"]:
        for direction in figure5.DIRECTIONS:
            assert {"median_ms", "min_ms", "calls", "compile_seconds", "memory"} <= row[direction].keys()
            assert row[direction]["memory"]["total"] > 0
    assert found["speedups"][0]["forward+backward"] > 0 and found["skipped"] == []


def test_plot_draws_a_panel_for_each_quantity_and_sweep(dry_run, tmp_path, monkeypatch):
    monkeypatch.setattr(figure5, "PIXELS", 8)
    figure, out = dry_run / "figure5.json", tmp_path / "figure5.png"
    assert plots.main([str(figure), "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.format == "PNG" and min(picture.size) > 500
    drawn = plots.draw(*plots.read([figure, figure]))
    assert len(drawn.axes) == 6
    rows, _ = plots.read([figure])
    assert sum(len(line.get_xdata()) for line in drawn.axes[2].lines) == len(rows)


# Table 16


def encoded() -> offline.Encoded:
    files = []
    for i in range(3):
        buffer = io.BytesIO()
        Image.fromarray(table16.synthetic(3, 16)[i]).save(buffer, "PNG" if i else "JPEG")
        files.append(buffer.getvalue())
    return offline.Encoded(files, np.array([4, 0, 4]))


def test_packed_images_come_back_as_they_were(tmp_path):
    images = encoded()
    offline.pack(images, tmp_path / "new" / "images.npz")
    found = gpu.Setup(smoke=False, data=tmp_path / "new").images("images")
    assert found.files == images.files and found.fingerprint() == images.fingerprint()
    np.testing.assert_array_equal(found.labels, images.labels)
    np.testing.assert_array_equal(found.decode()[1:], table16.synthetic(3, 16)[1:])


def test_images_of_each_class_are_the_first_by_name_whatever_their_order(data_root):
    path = data_root / "imagenette128" / "1.0.0"
    if not path.is_dir():
        pytest.skip(f"no data at {path}")
    pytest.importorskip("tensorflow_datasets", reason="needs the extra data")
    two, three = offline.read(path, "validation", 2), offline.read(path, "validation", 3)
    np.testing.assert_array_equal(two.labels, np.repeat(np.arange(10), 2))
    assert [file for i, file in enumerate(three.files) if i % 3 < 2] == two.files
    assert two.decode().shape == (20, 128, 128, 3)
    with pytest.raises(ValueError, match=r"--data: class 0 has \d+ images in validation, 100000 are needed"):
        offline.read(path, "validation", 100000)


def test_table16_fits_in_one_loop_and_reports_time_memory_and_psnr(dry_run):
    (row,) = json.loads((dry_run / "table16.json").read_text())["results"]["rows"]
    assert (row["points"], row["images"], row["steps"], row["start"]) == (4, 2, 3, "clusters")
    assert len(row["seconds"]) == 2 and row["repeats_bit_equal"] is True and 0 < row["psnr"] < 40
    assert row["memory"]["total"] > 0 and row["start_seconds"] > 0 and row["compile_seconds"] > 0


# The command for a GPU


def test_without_a_gpu_the_command_says_so_in_one_line_and_needs_no_optional_package():
    script = (
        "import sys\n"
        "optional = 'sklearn', 'triton', 'tensorflow_datasets', 'array_record', 'matplotlib'\n"
        "sys.modules.update(dict.fromkeys(optional))\n"
        "from benchmarks import gpu\nfrom jax._src import xla_bridge\n"
        # All of the device's memory is left to the processes of the stages.
        "assert gpu.main(['--data', 'absent']) == 2 and not xla_bridge.backends_are_initialized()\n"
        "sys.exit(gpu.main(['--stage', 'correctness']))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (2, "") and done.stderr.endswith(f"makes it\n{REFUSAL}")


def test_missing_kernels_images_and_commits_are_named_before_any_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpu.main(["--smoke", "--stage", "tune", "--out", str(tmp_path)]) == 2
    assert "needs jax-triton, without which XLA would be timed" in capsys.readouterr().err
    assert gpu.main(["--out", str(tmp_path), "--data", str(tmp_path)]) == 2
    assert "--data: no such file: " in (found := capsys.readouterr().err) and "imagenette128-train.npz; python" in found
    for file in offline.packed(tmp_path):
        file.touch()
    monkeypatch.setattr(rundir, "commit", lambda: (None, None))
    assert gpu.main(["--out", str(tmp_path), "--data", str(tmp_path)]) == 2
    assert "--commit: git cannot tell the commit of this code; name it" in capsys.readouterr().err


def test_every_stage_ends_with_numbers_that_are_finite_and_make_the_tables(dry_run, monkeypatch):
    for name in gpu.SECONDS:
        found = json.loads((dry_run / f"{name}.json").read_text())
        assert np.isfinite(numbers(found)).all() and found["settings"]["complete"] is True
        assert {"commit", "dirty", "command", "device"} <= found.keys() and found["seed"] == gpu.SEED
        assert found["versions"].keys() >= {"jax", "jaxlib", "triton", "jax-triton", "numpy"}
        assert found["settings"]["stand_in"] is (jax.default_backend() != "gpu")
    rows = json.loads((dry_run / "distill.json").read_text())["results"]["rows"]
    assert [row["iterations"] for row in rows] == [0, 2] and rows[0]["seconds"] < rows[1]["seconds"]
    assert all(0 <= row["accuracy"]["mean"] <= 1 for row in rows)
    monkeypatch.setattr(tables, "RESULTS", dry_run.parent)
    monkeypatch.setitem(tables.TABLES, "h200", tables._gpu)
    text = tables.render("<!-- table: h200 -->\n<!-- end -->")
    assert "3 of 3 scenes" in text and "\n| 4 | 0." in text and "\n| 2, 6, 16 | " in text
    assert "\n| 283 | 32 | 8 | " in text and "\n| 2 | " in text


def test_a_stage_that_breaks_or_hangs_takes_no_other_along_and_the_last_are_left_out(tmp_path, monkeypatch, capfd):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho $4 >> ran\n[ $4 != tune ] || exec sleep 60\n[ $4 != correctness ]\n")
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(gpu, "SECONDS", dict.fromkeys(gpu.SECONDS, 0.1) | {"distill": 1000})
    monkeypatch.setattr(gpu, "GRACE", 1)
    assert gpu.run_all(gpu.Setup(smoke=True), 10, tmp_path, None) == 1
    assert (tmp_path / "ran").read_text().split() == ["correctness", "table16", "tune", "figure5"]
    said = capfd.readouterr()
    assert "FAILED tune: killed after 1 s" in said.err and "distill and what follows: left out" in said.out


def test_a_stage_is_done_once_its_file_is_complete_and_of_this_code(tmp_path, monkeypatch, capsys):
    def broken(setup, deadline, save):
        save({"rows": [1]})
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(rundir, "commit", lambda: (None, None))
    monkeypatch.setattr(gpu, "STAGES", {"tune": broken, "figure5": lambda *args: ({"rows": [2]}, ["too slow"])})
    one, two = tmp_path / "tune.json", tmp_path / "figure5.json"
    for file in (one, two):
        assert gpu.done(file, True, "0123abc") is None
        assert gpu.run_stage(file.stem, gpu.Setup(smoke=True), 1, tmp_path, "0123abc") == 1
    found = json.loads(one.read_text())
    assert found["results"] == {"rows": [1]} and "RuntimeError: no such kernel" in found["settings"]["failures"][0]
    assert "FAILED tune" in capsys.readouterr().err and gpu.done(one, True, "0123abc") is None
    assert gpu.done(two, True, "0123abc") == ["too slow"]
    assert gpu.done(two, True, "0123abd") is None and gpu.done(two, False, "0123abc") is None


def test_the_check_of_values_tells_a_wrong_gradient_from_rounding():
    one = correctness.cases(smoke=True)[0]
    expected = correctness.reference(one)
    single = [np.float32(x) for x in expected.float32]
    assert all(
        0 < row["beyond_slack"] <= row["tolerance"] for row in correctness.errors(one, single, expected).values()
    )
    for i, name in enumerate(correctness.TOLERANCES):
        off = [x.copy() for x in single]
        off[i].flat[3] += 3 * correctness.TOLERANCES[name] * max(1, np.abs(single[i]).max())
        wrong = [
            key for key, row in correctness.errors(one, off, expected).items() if row["beyond_slack"] > row["tolerance"]
        ]
        assert wrong == [name]


def test_a_wrong_a_broken_and_an_unchecked_case_all_count_as_failures(monkeypatch):
    operands = tuple(np.ones((1, 1, last), np.float32) for last in (2, 3, 3))
    one = correctness.Case("only", operands, height=2, width=2)
    zeros = [np.zeros(x.shape) for x in (one.cotangent(), *operands)]
    monkeypatch.setattr(correctness, "cases", lambda smoke: [one])
    monkeypatch.setattr(correctness, "reference", lambda one: correctness.Reference(zeros, zeros, zeros))
    for check in ("poison", "repeatability"):
        monkeypatch.setattr(correctness, check, lambda *args, **settings: {"fine": True})

    def run(function, seconds=60.0):
        monkeypatch.setattr(correctness, "operator", lambda *settings: function)
        return correctness.run(timing.Deadline(seconds), backend="xla", smoke=True)[1]

    def broken(*args):
        raise RuntimeError("no such kernel")

    assert run(lambda *args: [np.float32(x) for x in zeros]) == []
    assert len(run(lambda *args: [np.float32(x + np.nan) for x in zeros])) == 1
    assert run(broken) == ["only: RuntimeError: no such kernel"]
    assert run(broken, seconds=0) == ["only: not checked, out of time"]


def test_every_tuning_of_the_sweep_is_one_that_the_kernels_know():
    pytest.importorskip("triton")
    from kernels import _splat_triton
    from kernels.spec import SplatSpec

    spec = SplatSpec(height=128, width=128, supersample=2, cutoff=1e-4)
    for fields in (*gpu.FORWARD_TUNINGS, *gpu.BACKWARD_TUNINGS):
        tuning = _splat_triton.TUNING._replace(**fields)
        assert _splat_triton.forward_launch(spec, 1000, 170, 3, tuning).grid >= 1000
        assert _splat_triton.backward_launches(spec, 1000, 170, 3, (jnp.float32,) * 3, tuning)


@pytest.mark.gpu
def test_all_phases_run_and_pass_on_a_gpu(tmp_path):
    assert gpu.main(["--smoke", "--out", str(tmp_path)]) == 0
    for name in gpu.PHASES:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["settings"]["stand_in"] is False and found["settings"]["complete"] is True


# Peers


def test_our_side_runs_where_pytorch_is_missing(tmp_path, capsys):
    out = tmp_path / "peers.json"
    options = ["--smoke", "--only", "forward", "--cores", "1", "--rounds", "2", "--torch-python", "false"]
    peers.main([*options, "--out", str(out)])
    assert "--torch-python: false has no PyTorch: ours runs alone" in capsys.readouterr().out
    (row,) = json.loads(out.read_text())["results"]["rows"]
    found = row["competitors"]["ours"]
    assert (row["task"], row["cores"], row["rounds"]) == ("forward", 1, 2) and "ratio" not in row
    assert 0 < found["min_ms"] <= found["quartiles_ms"][0] <= found["median_ms"] <= found["quartiles_ms"][1] < 1e3
    assert found["account"]["total"] > 32 * 32 * 32 * 3 * 4


def test_what_both_sides_share_imports_no_framework():
    asked = "import sys, benchmarks.peers.worker; print({'jax', 'gsdd_jax', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    source = (ROOT / "benchmarks" / "peers" / "torch_side.py").read_text()
    assert not re.search(r"^\s*(import|from) (jax|gsdd_jax|train|kernels)\b", source, re.M)
