"""The command lines as a user meets them: results, accidents, and bad input."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from command_line import assert_same, ends, findings, refused, start
from PIL import Image

import gsdd_jax
from gsdd_jax import codecs, data, distillation, files, synset, whiten
from train import config as configs
from train import evaluate, evaluation, export, report
from train.checkpoint import Checkpoints
from train.rundir import RunDir, read_metrics

ROOT = Path(__file__).resolve().parent.parent

# Every stage and every baseline but the full data, as small as it goes; two checkpoints in each stage.
TOY = """
name: toy
ipc: 1
data: {source: digits, per_class: 8, test_limit: 50}
network: {depth: 1, width: 4}
augment: {strategy: crop}
codec: {name: gaussian, images_per_class: 2, num_points: 5, lr: 0.01}
fit: {steps: 6}
objective: {name: distribution, batch_real: 4, class_chunk: 10}
distill: {iterations: 6, log_every: 1, checkpoint_every: 2}
evaluate: {steps: 8, batch: 8, lr: 0.1, seeds: 2}
baselines: {full_data: false}
smoke: {fit: {steps: 2}}
"""


# The demo, as a real command


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """``(run directory, finished process, seconds)`` of the smoke run of the demo."""
    out = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "train.distill", "--config", "configs/digits.yaml", "--smoke", "--out", str(out)]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    return out, done, time.perf_counter() - began


def test_demo_succeeds_and_prints_its_table(demo):
    out, done, _ = demo
    assert done.returncode == 0, done.stderr
    assert (out / "table.md").read_text() in done.stdout
    assert f"{out / 'report.html'}" in done.stdout
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


def test_demo_result_holds_everything_needed_to_cite_it(demo):
    result = json.loads((demo[0] / "result.json").read_text())
    config = configs.load(ROOT / "configs" / "digits.yaml", smoke=True)
    assert (result["codec"], result["objective"], result["dataset"]) == ("gaussian", "distribution", "digits")
    assert (result["paper_ipc"], result["gpc"]) == (config.ipc, config.codec.images_per_class)
    assert result["bytes_per_class"] == config.ipc * 8 * 8 * 4
    assert result["num_points"] == result["bytes_per_class"] // (config.codec.images_per_class * 7 * 2)
    for name in ("accuracy", "fit_only", "pixel", "random_real", "random_jpeg", "full_data"):
        row = result[name]
        assert row["n"] == len(row["seeds"]) == len(row["accuracies"]) >= 2, name
        assert row["mean"] == pytest.approx(np.mean(row["accuracies"])), name
        assert row["std"] == pytest.approx(np.std(row["accuracies"], ddof=1)), name
        assert min(row["accuracies"]) >= 0 and max(row["accuracies"]) <= 1, name
    assert result["seconds"] > 0 and result["device"]
    assert {"python", "jax", "numpy", "flax", "optax"} <= result["versions"].keys()
    assert result["versions"]["jax"] == jax.__version__
    assert "commit" in result
    assert result["command"].endswith(f"-m train.distill --config configs/digits.yaml --smoke --out {demo[0]}")


def test_demo_export_loads_and_weighs_what_was_counted(demo):
    result = json.loads((demo[0] / "result.json").read_text())
    loaded = gsdd_jax.load(demo[0])
    classes, gpc = result["num_classes"], result["gpc"]
    assert loaded.nbytes == classes * gpc * result["num_points"] * 7 * 2
    assert loaded.nbytes <= classes * result["bytes_per_class"]
    budget = result["budget"]
    assert budget["bytes written per class"] == loaded.nbytes / classes
    file = demo[0] / "export" / "synset.safetensors"
    assert file.stat().st_size == budget["exported file (bytes)"]
    assert file.stat().st_size - budget["exported file, header (bytes)"] == loaded.nbytes
    images = np.asarray(loaded.images())
    assert images.shape == (classes * gpc, 8, 8, 1) and np.isfinite(images).all()
    assert loaded.labels.tolist() == [label for label in range(classes) for _ in range(gpc)]
    assert loaded.class_names == tuple(str(digit) for digit in range(10))
    assert np.asarray(loaded.images((32, 24))).shape == (classes * gpc, 32, 24, 1)
    assert {"dataset", "objective", "whiten", "channel_mean", "channel_std", "versions"} <= loaded.meta.keys()


KEPT = ("metrics.jsonl", "evaluation.json", "config.yaml", "table.md")


def test_run_again_computes_nothing_and_its_metrics_are_complete_and_finite(toy, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(whiten, "fit")
    again = Path(shutil.copytree(whole, tmp_path / "again"))
    assert start(toy, again) == 0
    assert (again / "table.md").read_text() in capsys.readouterr().out
    assert picked(again, *KEPT) == picked(whole, *KEPT)
    assert_same(findings(again), findings(whole))
    lines = read_metrics(whole)
    steps = {phase: [e["step"] for e in lines if e["phase"] == phase] for phase in {e["phase"] for e in lines}}
    assert steps.keys() == {"main-fit", "main-distill", "pixel-distill"} and steps["main-fit"][-1] == 6
    assert steps["main-distill"] == steps["pixel-distill"] == [1, 2, 3, 4, 5, 6]
    for entry in lines:
        assert all(np.isfinite(value) for key, value in entry.items() if key != "phase"), entry
        assert not entry["phase"].endswith("distill") or {"loss", "regularizer", "grad_norm"} <= entry.keys()


# Accidents


class Killed(BaseException):
    """The process ends here."""


def at(target, name, condition, action, monkeypatch):
    """Calls ``action`` before the first call of ``target.name`` whose arguments meet the condition."""
    real = getattr(target, name)

    def wrapper(*args, **kwargs):
        if condition(*args, **kwargs):
            action()
        return real(*args, **kwargs)

    monkeypatch.setattr(target, name, wrapper)


def die():
    raise Killed


def line(phase: str, step: int):
    """Meets the writing of one line of metrics."""
    return lambda run, at_phase, at_step, **values: (at_phase, at_step) == (phase, step)


def checkpoint(phase: str, step: int):
    """Meets the moment before a checkpoint is written, when the one before is on disk."""
    return lambda held, at_step, *_: (held.path.name, at_step) == (phase, step)


def second_network_of(arm: str):
    """Meets the moment when the first network of an arm has been tested and not yet been written down."""

    def condition(path, known):
        return path.name == "evaluation.json" and len(known.get(arm, {"accuracies": {}})["accuracies"]) == 1

    return condition


def flip_bits(folder: Path) -> None:
    """Damages the arrays of a checkpoint, but no file's size; some of their bytes are in no use, so many of them."""
    for file in (folder / "tree").rglob("d/*"):
        content = bytearray(file.read_bytes())
        for place in range(16, len(content), 64):
            content[place] ^= 0x10
        file.write_bytes(bytes(content))


def test_run_survives_accident_upon_accident_and_ends_in_the_same_bits(toy, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"

    def killed(target, name, condition):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            at(target, name, condition, die, patch)
            start(toy, out)
        capsys.readouterr()

    def held(phase):
        return sorted(int(path.name) for path in (out / "checkpoints" / phase).iterdir() if path.name.isdigit())

    # Killed in the fit, between checkpoints, before a line of metrics was written.
    killed(RunDir, "append", line("main-fit", 4))
    assert held("main-fit") == [2]

    # No room for a checkpoint: the limit of the file size stands in for the disk.
    with monkeypatch.context() as patch:
        at(Checkpoints, "save", checkpoint("main-fit", 6), lambda: limit_files(patch, 1000), patch)
        message = refused(capsys, start(toy, out))
    assert "error: disk full" in message and "main-fit/.6" in message and "File too large" in message
    assert held("main-fit") == [2, 4]

    # Killed in the distillation, after a line of metrics that its checkpoint does not cover.
    killed(Checkpoints, "save", checkpoint("main-distill", 4))
    assert held("main-distill") == [2] and not (out / "export").exists()
    assert read_metrics(out)[-1]["step"] == 4

    # The loss turns into NaN.
    real = distillation.make_step

    def poisoned(*args, **settings):
        step = real(*args, **settings)

        def wrapper(state, data, key):
            after, metrics = step(state, data, key)
            bad = jax.numpy.where(state.step == 4, jax.numpy.nan, 1.0)
            return jax.tree.map(lambda x: x * bad if x.dtype == "float32" else x, after), {
                name: value * bad for name, value in metrics.items()
            }

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "make_step", poisoned)
        message = refused(capsys, start(toy, out))
    assert re.search("main-distill: .*loss.* not finite by iteration 5; the state of step 4 is kept in", message)
    assert "try a smaller learning rate (codec.lr, now 0.01), with --extend codec.lr=... in this run" in message
    assert held("main-distill") == [2, 4] and not (out / "export").exists()
    assert all(np.isfinite(entry.get("loss", 0)) for entry in read_metrics(out))

    # Bits of the newest checkpoint flip: the older one takes its place.
    damaged = out / "checkpoints" / "main-distill" / "4"
    flip_bits(damaged)

    # No room for the exported set.
    with monkeypatch.context() as patch:
        at(files, "write_bytes", lambda path, _: path.parent.name == "export", lambda: fill_disk(patch), patch)
        assert start(toy, out) == 2
    named, way, message = capsys.readouterr().err.splitlines()
    assert named.startswith(f"warning: {damaged} is damaged (") and named.endswith("was removed")
    assert way == "warning: going on from step 2"
    assert "error: disk full" in message and "free some space and run the same command again" in message
    assert held("main-distill") == [4, 6]

    # Killed in the pixel baseline.
    killed(RunDir, "append", line("pixel-distill", 3))

    # No room for the result of a network.
    with monkeypatch.context() as patch:
        at(evaluation, "write_json", second_network_of("fit_only"), lambda: fill_disk(patch), patch)
        message = refused(capsys, start(toy, out))
    assert f"error: disk full while writing {out / 'evaluation.json'}: nothing saved so far is lost" in message
    assert list(json.loads((out / "evaluation.json").read_text())) == ["distilled"]

    # Killed between two networks, and at last while the report is written.
    killed(evaluation, "write_json", second_network_of("random_real"))
    assert "random_real" not in json.loads((out / "evaluation.json").read_text())
    killed(report, "write", lambda *_: True)
    assert start(toy, out) == 0
    assert_same(findings(out), findings(whole))


def limit_files(patch, size: int) -> None:
    """Limits the size of files until the patch is undone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    # Undone in reverse order; deleting an item is a step of undoing that can run code.
    patch.setitem(_OnUndo(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))), "limit", None)


class _OnUndo(dict):
    def __init__(self, action):
        super().__init__()
        self.action = action

    def __delitem__(self, key):
        super().__delitem__(key)
        self.action()


def fill_disk(patch) -> None:
    """Makes the next flush to disk fail."""

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, "fsync", full)


# Going on otherwise


def picked(run: Path, *names: str) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in names}


def test_extension_goes_on_from_where_it_was_and_survives_a_kill(toy, whole, tmp_path, monkeypatch, capsys):
    more = ["--extend", "distill.iterations=8", "codec.lr=0.003"]
    out, again = (Path(shutil.copytree(whole, tmp_path / name)) for name in ("run", "again"))
    before = picked(whole, "result.json", "metrics.jsonl")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at(Checkpoints, "save", checkpoint("main-distill", 8), die, patch)
        start(toy, out, *more)
    # The old result is there, and does not stand for the new run.
    assert not (out / "result.json").exists() and (out / "result-6.json").read_bytes() == before["result.json"]
    assert export.main(["--run", str(out), "--to", "npz", "--out", str(tmp_path / "npz")]) == 0
    assert capsys.readouterr().err == f"notice: {out} is being extended: its set may still be the one of before\n"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at(report, "write", lambda *_: True, die, patch)
        start(toy, out, *more)
    assert start(toy, out, *more) == 0 and start(toy, again, *more) == 0
    held, expected = (findings(run) for run in (out, again))
    for one in (held, expected):
        del one["config"], one["result"]["history"][0]["time"]
    assert_same(held, expected)
    assert (out / "metrics.jsonl").read_bytes().startswith(before["metrics.jsonl"].partition(b'{"phase": "pixel')[0])

    old, new = (json.loads((run / "result.json").read_text()) for run in (whole, out))
    (entry,) = new["history"]
    assert entry["changes"] == {"codec.lr": [0.01, 0.003], "distill.iterations": [6, 8]}
    assert entry["from"] == {"main-distill": 6, "main-fit": 6, "pixel-distill": 6}
    assert "Extended, from iteration 6 on: codec.lr 0.003 (before: 0.01)" in (out / "table.md").read_text()
    assert new["random_real"]["accuracies"] == old["random_real"]["accuracies"]
    tested = json.loads((out / "evaluation.json").read_text())
    assert (tested["distilled"]["iteration"], tested["pixel"]["iteration"]) == (8, 8)
    assert not np.array_equal(gsdd_jax.load(out).images(), gsdd_jax.load(whole).images())

    # The same command computes nothing more, the one of before is refused.
    held = contents(out)
    assert start(toy, out, *more) == 0 and start(toy, out, *more[1:]) == 0
    assert contents(out) == held
    assert "distill.iterations is 8 there and 6 now" in refused(capsys, start(toy, out))
    # A run from its own config is no extended one.
    assert configs.load(out / "config.yaml").distill.iterations == 8


# Nothing beside the distilled set.
ALONE = ("baselines={fit_only: false, pixel: false, full_data: false, random_real: false}", "evaluate.seeds=1")


def test_checkpoint_is_a_set_that_another_run_starts_from(toy, whole, tmp_path, monkeypatch, capsys):
    out, made, short = tmp_path / "run", tmp_path / "set", tmp_path / "short"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at(RunDir, "append", line("main-distill", 5), die, patch)
        start(toy, out, *ALONE)
    text = refused(capsys, ends(evaluate, "--run", str(out)))
    assert "the run is not finished, so that there is no set (checkpointed: main-distill 4, main-fit 6)" in text
    assert (
        "; go on with: the command that started it; or" in text
        and f"train.export --checkpoint --to set --run {out}" in text
    )
    assert refused(capsys, ends(export, "--run", str(out), "--to", "npz", "--out", str(made))) == text
    assert export.main(["--run", str(out), "--checkpoint", "--to", "set", "--out", str(made)]) == 0
    assert not (out / "export").exists()

    # As a run that ends there.
    assert start(toy, short, "distill.iterations=4", *ALONE) == 0
    arrays = (made / "synset.safetensors").read_bytes()
    assert arrays == (short / "export" / "synset.safetensors").read_bytes()
    found = gsdd_jax.load(made)
    assert (found.meta["phase"], found.meta["step"]) == ("main-distill", 4)
    assert found.meta.keys() - gsdd_jax.load(short).meta.keys() == {"phase", "step"}

    # With masters, from which another run starts in place of the rounded parameters.
    begun, kept = tmp_path / "begun", tmp_path / "kept"
    assert export.main(["--run", str(out), "--masters", "--to", "orbax", "--out", str(kept)]) == 0
    settings = ["distill.iterations=0", "codec.lr=0.5", *ALONE]
    assert start(toy, begun, f"fit.initial_set={kept}", *settings) == 0
    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(kept / "state")
        of_begun, of_short = (
            reader.restore(run / "checkpoints" / phase / "tree")
            for run, phase in ((begun, "main-fit/0"), (short, "main-distill/4"))
        )
    assert state["step"] == 4 and set(state["params"]) == {"mean", "cholesky", "color", "opacity"}
    for name, master in state["params"].items():
        assert (master != getattr(found.params, name)).any()
        for other in (of_begun, of_short):
            np.testing.assert_array_equal(other[f"params.{name}"], master)
    assert (begun / "export" / "synset.safetensors").read_bytes() == arrays
    moved = Path(shutil.move(made, tmp_path / "moved"))
    assert start(toy, begun, f"fit.initial_set={moved}", *settings) == 0
    assert configs.load(begun / "config.yaml").fit.initial_sha256 == synset.fingerprint([found])
    text = refused(capsys, start(toy, begun, f"fit.initial_set={whole}", *settings))
    assert "fit.initial_sha256 is " in text


@pytest.fixture(scope="module")
def digits_on_disk(toy, tmp_path_factory) -> Path:
    """The data of the toy as a folder of images."""
    root, held = tmp_path_factory.mktemp("folder") / "digits", data.load(configs.load(toy).data)
    for split, images, labels in (("train", *held[1:3]), ("test", *held[3:5])):
        order = np.argsort(labels, kind="stable")
        for name in held.class_names:
            (root / split / name).mkdir(parents=True)
        for i in order:
            Image.fromarray(images[i, ..., 0]).save(root / split / str(labels[i]) / f"{i:04}.png")
    return root


def test_data_are_known_by_their_content_wherever_they_are(toy, digits_on_disk, tmp_path, capsys):
    root, out = tmp_path / "here", tmp_path / "run"
    shutil.copytree(digits_on_disk, root)
    assert start(toy, out, f"data={{source: folder, path: {root}}}", *ALONE) == 0
    found, result = configs.load(out / "config.yaml").data.sha256, (out / "result.json").read_bytes()

    # Mounted elsewhere.
    there = Path(shutil.move(root, tmp_path / "there"))
    elsewhere = [f"data={{source: folder, path: {there}}}", *ALONE]
    assert start(toy, out, *elsewhere) == 0 and (out / "result.json").read_bytes() == result
    assert configs.load(out / "config.yaml").data.path == str(there)

    # A config of before has no hash; its result has one.
    text = (out / "config.yaml").read_text()
    older = text.replace(f"  sha256: {found}\n", "").replace("    images_per_class: 1\n", "    images_per_class: 0\n")
    assert older.count("\n") == text.count("\n") - 1 and "    images_per_class: 0" in older
    (out / "config.yaml").write_text(older)

    (there / "train" / "3").rename(tmp_path / "3")
    (there / "train" / "5").rename(there / "train" / "3")
    (tmp_path / "3").rename(there / "train" / "5")
    changed = data.load(data.DataSpec(source="folder", path=str(there))).fingerprint()
    for known in (older, text):
        (out / "config.yaml").write_text(known)
        before = contents(out)
        for extra in ([], ["--dry-run"], ["--extend", "distill.iterations=9"]):
            line = refused(capsys, start(toy, out, *elsewhere, *extra))
            assert f"than the run in {out} was made from: SHA-256 {changed[:12]}..., expected {found[:12]}" in line
        assert contents(out) == before
    line = refused(capsys, ends(evaluate, "--run", str(out), "--quiet"))
    assert f"SHA-256 {changed[:12]}..., expected {found[:12]}..." in line and "data.sha256=''" in line
    assert evaluate.main(["--run", str(out), "--quiet", "data.sha256=''"]) == 0


def test_sigterm_saves_ends_with_0_and_is_continued_to_the_same_bits(toy, whole, tmp_path, monkeypatch, capsys):
    out, append, evaluate = tmp_path / "run", RunDir.append, evaluation.evaluation.evaluate_networks
    for phase, step in (("main-fit", 2), ("main-distill", 3)):

        def interrupted(self, now, count, phase=phase, step=step, **values):
            append(self, now, count, **values)
            if (now, count) == (phase, step):
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(RunDir, "append", interrupted)
            assert start(toy, out) == 0
        assert "stopped by SIGTERM, everything is saved; the same command goes on: python " in capsys.readouterr().out
        assert read_metrics(out)[-1]["step"] == step and not (out / "result.json").exists()
        assert Checkpoints(out / "checkpoints" / phase).latest() == step

    def between(*args, **settings):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **settings)

    # Of two networks, the first is kept.
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.evaluation, "evaluate_networks", between)
        assert start(toy, out) == 0
    assert len(json.loads((out / "evaluation.json").read_text())["distilled"]["accuracies"]) == 1
    assert start(toy, out) == 0
    assert_same(findings(out), findings(whole))


def test_a_second_sigterm_ends_at_once():
    program = """
import os, signal, time
from train.stopping import on_sigterm, requested
with on_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)
    assert requested()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=50)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stderr.count(b"SIGTERM") == 1


def test_images_drawn_on_the_host_resume_to_the_same_bits(toy, tmp_path, monkeypatch):
    # Steps and sizes are those of the toy run, whose executables serve again.
    settings = ["distill.data=host", *ALONE]
    assert start(toy, tmp_path / "whole", *settings) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at(RunDir, "append", line("main-distill", 4), die, patch)
        start(toy, tmp_path / "cut", *settings)
    assert start(toy, tmp_path / "cut", *settings) == 0
    assert_same(findings(tmp_path / "cut"), findings(tmp_path / "whole"))


# Looking before leaping


def test_dry_run_prints_budget_and_shapes_and_writes_nothing(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(whiten, "fit")
    assert start(toy, None, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "ipc 1 = 256 bytes per class" in text
    assert "2 images of 5 Gaussians: 70 floats, 140 bytes" in text
    for leaf in (
        "mean         [20, 5, 2]",
        "cholesky     [20, 5, 3]",
        "color        [20, 5, 1]",
        "opacity      [20, 5]",
    ):
        assert leaf in text
    assert "written: 1400 bytes, 140 per class" in text
    assert "MiB temporary" in text and "2 networks of 8 steps" in text
    assert list(tmp_path.iterdir()) == []


# Bad input: one line, exit code 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "absent.yaml"], "error: absent.yaml: no such file or directory"),
        (["codec.image_per_class=3"], "codec.image_per_class: unknown key; did you mean images_per_class"),
        (["codec.name=wavelet"], f"codec.name: expected one of {', '.join(codecs.SPECS)}, found"),
        (["codec.num_points=10"], "codec.num_points: 2800 bytes for num_points=10, images_per_class=2, the budget"),
        (["ipc=0.5", "codec.num_points=0"], "baselines.pixel_codec: 2560 bytes for images_per_class=1, the budget"),
        (["ipc=0.5", "codec.num_points=1"], "raise ipc (found 0.5) or set baselines.pixel=false"),
        (["codec={name: pixel, ipc: 9}", "ipc=9"], "class '0' has 8 training images, codec.images_per_class needs 9"),
        (["network.depth=4"], "network.depth: 4 blocks halve 8x8 px images below one pixel"),
        (["data={source: folder, path: /absent/place}"], "/absent/place"),
        (["--out", "TOY"], "error: TOY: file exists"),
        (["--extend", "distill.iterations=9"], "error: --extend: HERE/run holds no run"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_setting_is_one_line_that_names_it(toy, tmp_path, capsys, arguments, message):
    given = [one.replace("HERE", str(tmp_path)).replace("TOY", str(toy)) for one in arguments]
    text = refused(capsys, start(toy, tmp_path / "run", *given))
    assert message.replace("HERE", str(tmp_path)).replace("TOY", str(toy)) in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--extend", "distill.iterations=5"], "distill.iterations: expected at least the 6 that main-distill has"),
        (["--extend", "codec.lr=0.5"], "has done all 6 in RUN, so that another codec.lr changes nothing; expected"),
        (["--extend", "distill.iterations=8", "seed=1"], "seed is 0 there and 1 now"),
        (["--extend", "distill.iterations=8", "fit.steps=9"], "--extend takes distill.iterations, distill.schedule, "),
        (
            ["--extend", "baselines.pixel_codec.lr=1", "distill.iterations=8", "baselines.pixel_iterations=6"],
            "pixel-distill has",
        ),
        (["--dry-run", "--extend", "distill.iterations=5"], "distill.iterations: expected at least the 6"),
        (["seed=1", "codec.lr=0.5"], "RUN holds a run with another config: "),
        (["seed=1", "codec.lr=0.5"], "codec.lr is 0.01 there and 0.5 now"),
    ],
)
def test_another_config_and_an_extension_that_makes_no_sense_are_refused(toy, whole, capsys, arguments, message):
    before = contents(whole)
    assert message.replace("RUN", str(whole)) in refused(capsys, start(toy, whole, *arguments))
    assert contents(whole) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["codec.images_per_class=1"], "RUN has another codec.images_per_class than this run: 2, expected 1"),
        (["codec={name: pixel}"], "RUN has another codec.name than this run: gaussian, expected pixel"),
        (["data.resolution=16"], "fit.initial_set: RUN has another image_shape than this run: (8, 8, 1), expected (16"),
        (["subtasks=2"], "fit.initial_set: RUN has another class_names than this run"),
        (["fit.initial_set=/absent/set"], "/absent/set: no distilled set here"),
        (["fit.initial_set=''", "fit.initial_sha256=abc"], "fit.initial_set: expected the folder of the set"),
    ],
)
def test_initial_set_that_does_not_fit_is_one_line(toy, whole, tmp_path, capsys, settings, message):
    text = refused(capsys, start(toy, tmp_path / "run", "--dry-run", f"fit.initial_set={whole}", *settings))
    assert message.replace("RUN", str(whole)) in text


def test_networks_that_diverge_end_the_run_and_the_set_is_kept(toy, tmp_path, capsys):
    run = tmp_path / "run"
    text = refused(capsys, start(toy, run, "evaluate.lr=1e30"))
    assert "test distilled: network 0 diverged at a learning rate of 1e+30; what was distilled is kept" in text
    assert gsdd_jax.load(run).images().shape == (20, 8, 8, 1)
    with pytest.raises(SystemExit):
        evaluate.main(["--run", str(run), "--quiet"])
    assert evaluate.main(["--run", str(run), "--quiet", "evaluate.lr=0.1"]) == 0


# Evaluation of an exported set


def contents(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def test_evaluation_repeats_the_accuracies_of_the_run(whole, tmp_path, capsys):
    before = contents(whole)
    assert evaluate.main(["--run", str(whole), "--quiet", "--out", str(tmp_path / "again.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "again.json").read_text())
    own = json.loads((whole / "result.json").read_text())["accuracy"]
    assert printed == written["accuracy"]
    assert {key: printed[key] for key in printed} == {key: own[key] for key in printed}
    assert written["bytes_per_class"] == 140 and written["images"] == 20 and written["settings"]["size"] == [8, 8]
    assert contents(whole) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "RUN", "data.resolution=16"], "the set renders to [8, 8, 1], test images are [16, 16, 1]"),
        (["--run", "RUN", "evaluate.sedes=3"], "evaluate.sedes: unknown key; did you mean seeds"),
        (["--run", "HERE"], "HERE: no distilled set here"),
        (["--run", "HERE/set"], "HERE/set holds an exported set but no config.yaml"),
    ],
)
def test_evaluation_that_cannot_be_is_one_line(whole, tmp_path, capsys, arguments, message):
    shutil.copytree(whole / "export", tmp_path / "set" / "export")
    given = [one.replace("RUN", str(whole)).replace("HERE", str(tmp_path)) for one in arguments]
    assert message.replace("HERE", str(tmp_path)) in refused(capsys, ends(evaluate, "--quiet", *given))
