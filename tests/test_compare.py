"""`benchmarks.compare`, `benchmarks.packed_later` and the tables made from them, on toys."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import refused

from benchmarks import compare, packed_later, tables
from gsdd_jax import codecs, render
from gsdd_jax.codecs import FactorSpec, PackedGaussianSpec
from gsdd_jax.gaussians import Gaussians
from train import config as configs

ROOT = Path(__file__).resolve().parent.parent
IMAGES = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (12, 8, 8, 3)), jnp.float32)
# Codecs that store integer codes and nothing else.
CODED = {"packed_gaussian", "packed_frequency"}
# What differs between two runs of one row.
CIRCUMSTANCES = ("started", "command", "load", "seconds", "start_seconds", "tried", "runs", "result")

TOY = """
name: toy
ipc: 1
data: {source: digits, per_class: 18, test_limit: 50}
network: {depth: 1, width: 4}
augment: {strategy: crop}
codec: {name: packed_gaussian, gpc: 2, num_points: 6, bits_mean: 5, bits_cholesky: 3, bits_color: 3, lr: 0.01}
fit: {steps: 2}
objective: {name: distribution, batch_real: 4, class_chunk: 10}
distill: {iterations: 3, log_every: 1, checkpoint_every: 2}
evaluate: {steps: 4, batch: 8, lr: 0.1, seeds: 2}
"""


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path_factory):
    """The constants of the comparison at sizes of a test."""
    monkeypatch.chdir(ROOT)
    for name, value in {
        "sample": lambda path, count: (IMAGES[:count], "toy"),
        "REPORTED": (1, 2),
        "SHORT": 1,
        "FACTORS": (1.0, 3.0),
        "SEEDS": 2,
        "SIZES": [],
        "RATES": (0.3, 3.0),
        "WIDER": (0.1, 10.0),
        "SHORT_ITERATIONS": 2,
    }.items():
        monkeypatch.setattr(compare, name, value)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "toy.yaml"
    path.write_text(TOY)
    return path


def unchanged(function, *paths: Path) -> None:
    """Calls a function, and checks that it writes none of these files."""
    before = [path.stat().st_mtime_ns for path in paths]
    function()
    assert [path.stat().st_mtime_ns for path in paths] == before


def drop_last_row(path: Path) -> dict:
    """Removes a row from a record, and returns it."""
    found = json.loads(path.read_text())
    last = found["results"].pop()
    path.write_text(json.dumps(found))
    return last


def settled(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in CIRCUMSTANCES}


def ends(function, *arguments) -> int:
    """Calls a function that exits, and returns the code."""
    with pytest.raises(SystemExit) as end:
        function(*arguments)
    return end.value.code


# Fits


def fit(out: Path, *arguments, images: int = 4) -> None:
    compare.main(["fit", "--images", str(images), "--out", str(out), *arguments])


def psnr(images, expected) -> float:
    return float(np.mean(-10 * np.log10(np.mean((np.asarray(expected) - images) ** 2, axis=(1, 2, 3)))))


def cells(images, factor) -> np.ndarray:
    """Nearest-neighbor images of the means of blocks: as near as a constant per block comes."""
    n, h, w, c = images.shape
    means = np.asarray(images, np.float64).reshape(n, h // factor, factor, w // factor, factor, c).mean((2, 4))
    return means.repeat(factor, 1).repeat(factor, 2)


def check_fit_row(row: dict, *, budget: int) -> None:
    """Checks a row of three seeds or fewer against its budget and its own choices."""
    assert 0 < row["bytes_per_image"] <= budget == row["budget"], row["codec"]
    assert len(row["runs"]) == compare.SEEDS
    best = max(row["tried"], key=lambda one: one["psnr"])
    assert (row["spec"], row["factor"]) == (best["spec"], best["factor"])
    for run in row["runs"]:
        # As many reports as there are steps, or the start alone where no step can better it.
        assert list(run["psnr"]) in (["0"], ["0", "1", "2"])
        assert np.isfinite(list(run["psnr"].values())).all()
        assert ("seconds" in run) == (len(run["psnr"]) > 1)


def test_fits_are_written_with_their_budgets_and_are_not_made_again(tmp_path, monkeypatch):
    out = tmp_path / "new" / "fit.json"
    budgets = {"float32": 200, "bfloat16": 100}
    monkeypatch.setattr(compare, "BUDGETS", budgets)
    fit(out, "--only", "downscale", "frequency")
    found = json.loads(out.read_text())
    names = [(row["codec"], row["precision"]) for row in found["results"]]
    assert names == [(codec, dtype) for dtype in budgets for codec in ("frequency", "downscale")]
    assert (found["settings"], found["n"]) == ({"data": "toy", "size": [8, 8, 3], "short": 1}, 2)
    for row in found["results"]:
        check_fit_row(row, budget=budgets[row["precision"]])
        assert {"commit", "device", "versions"} <= row.keys() and row["images"] == 4
    one = found["results"][1]
    # One canvas holds four images, at 192 bytes each; a canvas for each image does not fit.
    assert (one["spec"]["factor"], one["bytes_per_image"]) == (2, 192)
    # It starts at the cells of least error, enlarged bilinearly: about as near as the means of blocks.
    assert one["runs"][0]["psnr"]["0"] > psnr(cells(IMAGES[:4], 2), IMAGES[:4]) - 0.5
    # So many floats, and what the places of the class cost beside them.
    k = found["results"][0]["spec"]["coefficients"]
    assert 4 * 3 * k <= 200 < 4 * 3 * (k + 1) + 64

    def refuse(*arguments):
        raise AssertionError("a row that is there was made again")

    with monkeypatch.context() as patch:
        patch.setattr(compare, "fit_row", refuse)
        unchanged(lambda: fit(out, "--only", "downscale", "frequency"), out)
    last = drop_last_row(out)
    made = []
    real = compare.fit_row
    monkeypatch.setattr(compare, "fit_row", lambda *arguments: made.append(arguments[:2]) or real(*arguments))
    fit(out, "--only", "downscale", "frequency")
    again = json.loads(out.read_text())["results"]
    assert made == [("downscale", "bfloat16")] and again[:-1] == found["results"][:-1]
    assert settled(again[-1]) == settled(last)
    assert [run["psnr"] for run in again[-1]["runs"]] == [run["psnr"] for run in last["runs"]]


def test_a_codec_that_does_not_fit_is_a_row_that_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "BUDGETS", {"float32": 24})
    fit(tmp_path / "fit.json", "--only", "neural_field")
    (row,) = json.loads((tmp_path / "fit.json").read_text())["results"]
    assert row["refused"].startswith("codec.") and "runs" not in row


def test_another_start_makes_other_rows_of_those_that_have_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "BUDGETS", {"float32": 200})
    out = tmp_path / "fit.json"
    fit(out, "--only", "memory", "downscale")
    fit(out, "--only", "memory", "--start", "xavier")
    rows = json.loads(out.read_text())["results"]
    assert [(row["codec"], row.get("start")) for row in rows[:2]] == [("downscale", None), ("memory", None)]
    assert (rows[2]["start"], rows[2]["spec"]["start"], rows[1]["spec"]["start"]) == ("xavier", "xavier", "svd")
    assert rows[2]["runs"][0]["psnr"]["0"] < rows[1]["runs"][0]["psnr"]["0"]
    unchanged(lambda: fit(out, "--only", "memory", "--start", "xavier"), out)
    capsys.readouterr()
    message = refused(capsys, ends(fit, out, "--only", "downscale", "--start", "xavier"))
    assert "--start: found 'xavier', expected one beside the codec's own (downscale: none)" in message
    message = refused(capsys, ends(fit, out, "--only", "memory", "--start", "svd"))
    assert "(memory: xavier)" in message
    message = refused(capsys, ends(fit, out, "--start", "somewhere"))
    assert "--start: found 'somewhere', expected" in message and "gaussian: gradient, uniform; " in message


def test_rows_of_other_settings_and_other_files_are_refused(tmp_path, monkeypatch, capsys):
    out = tmp_path / "fit.json"
    out.write_text(json.dumps({"settings": {"data": "other", "size": [8, 8, 3], "short": 1}, "results": []}))
    message = refused(capsys, ends(fit, out, "--only", "frequency"))
    assert "holds rows of {'data': 'other'" in message and "expected {'data': 'toy'" in message
    for text in ("{half", "[]", '{"results": []}'):
        out.write_text(text)
        assert "holds no rows of benchmarks.compare" in refused(capsys, ends(fit, out, "--only", "frequency"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--images", "0"], "argument --images: expected an integer >= 1, found '0'"),
        (["fit", "--images", "many"], "argument --images: expected an integer >= 1, found 'many'"),
        # Pixels are what is fitted.
        (["fit", "--only", "pixel"], "argument --only: invalid choice: 'pixel' (choose from 'downscale', "),
        (["accuracy", "--only", "wavelet"], "argument --only: invalid choice: 'wavelet' (choose from 'downscale', "),
        ([], "the following arguments are required: fit|accuracy"),
    ],
)
def test_bad_arguments_are_named_with_what_is_allowed(arguments, message, capsys):
    assert ends(compare.main, arguments) == 2
    assert message.replace("'", "") in capsys.readouterr().err.replace("'", "")


def open_field(way: compare.Way) -> str | None:
    """Returns the setting that a way leaves open."""
    one, two = (dataclasses.asdict(way.spec(number)) for number in (1, 2))
    return next((name for name in one if one[name] != two[name]), None)


def test_every_number_left_open_is_the_largest_that_fits():
    made = {"float32": set(), "bfloat16": set()}
    for dtype, names in made.items():

        def make(spec, budget=12 * compare.BUDGETS[dtype]):
            return codecs.make(spec, image_shape=(8, 8, 3), num_classes=1, bytes_per_class=budget)

        for way in compare.ways(dtype, 12, 8):
            codec, refusal = compare.filled(way, make)
            if codec is None:
                assert refusal.startswith("codec."), way
                continue
            names.add(way.codec)
            assert codec.name == way.codec and codec.num_images == 12
            field = open_field(way)
            number = getattr(codec.spec, field) if field else 1
            assert 1 <= number <= way.most
            if number < way.most:
                with pytest.raises(ValueError, match="codec."):
                    make(way.spec(number + 1))
    assert made["bfloat16"] == set(codecs.SPECS) - {"pixel", "palette"} == made["float32"] | CODED


def test_half_the_bytes_may_be_spent_on_canvases_of_bytes():
    for dtype, expected in (("float32", {"float32"}), ("bfloat16", {"bfloat16", "uint8"})):
        found = [way.spec(1) for way in compare.ways(dtype, 8, 8) if way.codec == "downscale"]
        assert {(spec.factor, spec.dtype) for spec in found} == {(f, one) for f in (1, 2) for one in expected}


@pytest.mark.slow
def test_every_codec_is_fitted_at_the_budgets_of_the_paper(tmp_path):
    out = tmp_path / "fit.json"
    fit(out, images=12)
    rows = json.loads(out.read_text())["results"]
    for dtype, budget in (("float32", 3852), ("bfloat16", 1926)):
        own = [row for row in rows if row["precision"] == dtype]
        assert {row["codec"] for row in own} == set(codecs.SPECS) - (
            CODED | {"pixel"} if dtype == "float32" else {"pixel"}
        )
        for row in own:
            check_fit_row(row, budget=budget)
    unchanged(lambda: fit(out, images=12), out)


# Accuracies


@pytest.mark.parametrize("name", compare.ACCURACY)
def test_codecs_of_the_accuracies_fit_the_budget_of_cifar10_in_the_precision_that_they_say(name):
    config = configs.load(compare.CONFIG, [f"codec={compare.ACCURACY[name]}"])
    codec = codecs.make(config.codec, image_shape=(32, 32, 3), num_classes=10, bytes_per_class=12_288)
    # The layout counts what is written, whatever the parameters are.
    written = sum(int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in codec.layout().values())
    assert 0.5 * 122_880 < written <= 122_880
    kind, *precision = name.split(", ")[:2]
    assert (codec.name, [codec.spec.dtype] if precision else []) == (kind, precision)
    # The comparison reads so many images per class.
    assert codec.images_per_class <= 1000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_other_number_of_hallucinators_makes_more_images(dtype):
    counts = {}
    for styles in range(1, 12):
        spec = FactorSpec(hallucinators=styles, base_channels=1, dtype=dtype)
        with contextlib.suppress(ValueError):
            made = codecs.make(spec, image_shape=(32, 32, 3), num_classes=10, bytes_per_class=12_288)
            counts[styles] = made.images_per_class
    chosen = configs.load(compare.CONFIG, [f"codec={compare.ACCURACY[f'factor, {dtype}']}"]).codec
    assert counts[chosen.hallucinators] == max(counts.values())


def test_accuracies_cover_every_codec_in_every_precision():
    specs = {name: get_type_hints(spec).get("dtype") for name, spec in codecs.SPECS.items()}
    every = {f"{name}, {dtype}" for name, dtypes in specs.items() for dtype in get_args(dtypes)}
    assert set(compare.ACCURACY) == every | CODED | {"palette", "memory, bfloat16, 32 bases"}
    assert {"pixel, uint8", "downscale, uint8", "gaussian, bfloat16"} <= every


def accuracy(toy: Path, folder: Path, monkeypatch, *overrides: str) -> None:
    monkeypatch.setattr(compare, "CONFIG", str(toy))
    arguments = ["--only", "downscale", "--runs", str(folder / "runs"), "--out", str(folder / "accuracy.json")]
    # The settings go first: --only takes all that follows it.
    compare.main(["accuracy", *overrides, *arguments])


def test_accuracies_are_written_resumed_and_shown(toy, tmp_path, monkeypatch, capsys):
    out = tmp_path / "accuracy.json"
    # Each row takes a run for each rate and one more, and two rows are as good as three. The search has its own test.
    monkeypatch.delitem(compare.ACCURACY, "downscale, bfloat16")
    monkeypatch.setattr(compare, "RATES", (1.0,))
    monkeypatch.setattr(compare, "WIDER", ())
    accuracy(toy, tmp_path, monkeypatch, "evaluate.seeds=2")
    found = json.loads(out.read_text())
    assert found["settings"] == {"config": str(toy), "overrides": ["evaluate.seeds=2"]}
    assert [row["name"] for row in found["results"]] == ["downscale, float32", "downscale, uint8"]
    for row in found["results"]:
        result = row["result"]
        ((overrides, loss),) = row["rates"]
        assert overrides == row["chosen"] == ["codec.lr=0.01"] and np.isfinite(loss) and result["name"] == row["name"]
        assert 0 < result["accuracy"]["bytes_per_class"] <= result["bytes_per_class"] == 256
        assert result["accuracy"]["n"] == 2 and result["protocol"]["evaluate"]["seeds"] == 2
        assert all(result[name] is None for name in ("pixel", "full_data", "random_real", "fit_only"))
    images = [row["result"]["accuracy"]["images_per_class"] for row in found["results"]]
    assert images == [4, 16]

    unchanged(lambda: accuracy(toy, tmp_path, monkeypatch, "evaluate.seeds=2"), out, *tmp_path.rglob("result.json"))
    last = drop_last_row(out)
    # From its run directories: nothing is computed anew.
    unchanged(lambda: accuracy(toy, tmp_path, monkeypatch, "evaluate.seeds=2"), *tmp_path.rglob("result.json"))
    again = json.loads(out.read_text())["results"]
    assert again[:-1] == found["results"][:-1]
    assert settled(again[-1]) == settled(last) and again[-1]["result"] == last["result"]

    capsys.readouterr()
    message = refused(capsys, ends(accuracy, toy, tmp_path, monkeypatch, "evaluate.seeds=3"))
    assert "'overrides': ['evaluate.seeds=2']}, expected" in message and "; name another file" in message

    # What was measured is what the table shows.
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "accuracy_cifar10.json").write_text(out.read_text())
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    shown = tables._compare_accuracy("accuracy_cifar10")
    assert "digits, 256 bytes per class, distribution matching, test accuracy in % of 2 networks" in shown
    assert shown.count("\n| downscale, ") == 2


def test_a_setting_that_there_is_not_is_one_line(toy, tmp_path, monkeypatch, capsys):
    assert "distill.nonsense: unknown key" in refused(
        capsys, ends(accuracy, toy, tmp_path, monkeypatch, "distill.nonsense=1")
    )


# The table


def row_of(name: str, codec: str, mean: float, **changes) -> dict:
    accuracy = {"mean": mean, "std": 0.01, "n": 3, "images_per_class": 12, "bytes_per_class": 12_000}
    protocol = {"evaluate": {"seeds": 3}, "network": {"depth": 3}, "augment": "crop", "whiten": "meanstd", "seed": 0}
    result = {
        "codec": codec,
        "dataset": "toys",
        "objective": "distribution",
        "bytes_per_class": 12_288,
        "accuracy": accuracy,
        "fit_psnr": 21.26,
        "protocol": protocol,
        "data_sha256": "0",
    }
    row = {"name": name, "chosen": ["codec.lr=0.03"], "command": "python -m benchmarks.compare accuracy"}
    return row | {"commit": "0123456789abc", "result": result | changes}


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Writes rows where the table looks for them."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "compare").mkdir()

    def write(rows):
        (tmp_path / "compare" / "accuracy_cifar10.json").write_text(json.dumps({"results": rows}))

    return write


def test_table_of_accuracies_goes_from_worst_to_best_with_published_numbers_beside_their_precision(recorded):
    rows = [
        row_of("gaussian, bfloat16", "gaussian", 0.515),
        row_of("gaussian, float32", "gaussian", 0.45),
        row_of("pixel, float32", "pixel", 0.3, fit_psnr=None),
        row_of("packed_gaussian", "packed_gaussian", 0.52),
    ]
    recorded(rows)
    lines = tables._compare_accuracy("accuracy_cifar10").splitlines()
    assert lines[-1] == "`python -m benchmarks.compare accuracy`; commit 012345678."
    assert lines[4:-2] == [
        "| pixel, float32 | 12 | 12,000 |  | lr=0.03 | 30.0 ± 1.0 | 46.3 ± 0.8 |",
        "| gaussian, float32 | 12 | 12,000 | 21.3 | lr=0.03 | 45.0 ± 1.0 |  |",
        "| gaussian, bfloat16 | 12 | 12,000 | 21.3 | lr=0.03 | 51.5 ± 1.0 | 67.6 ± 0.4 |",
        "| packed_gaussian | 12 | 12,000 | 21.3 | lr=0.03 | 52.0 ± 1.0 |  |",
    ]


def test_rows_of_different_data_do_not_stand_in_one_table(recorded):
    recorded([row_of("pixel, float32", "pixel", 0.3), row_of("memory, float32", "memory", 0.3, data_sha256="1")])
    with pytest.raises(ValueError, match="runs of one table differ in data, budget or number of networks"):
        tables._compare_accuracy("accuracy_cifar10")


def fit_row_of(codec: str, precision: str, psnr: float, **changes) -> dict:
    runs = [{"start_seconds": 0.5, "seconds": 9.0, "temporary_bytes": 3 << 20} for _ in range(2)]
    for run, value in zip(runs, (psnr - 0.5, psnr + 0.5), strict=True):
        run["psnr"] = {"0": 10.0, "100": 20.0, "300": value - 1, "1000": value}
    row = {"codec": codec, "precision": precision, "images": 20, "bytes_per_image": 3852.0, "runs": runs}
    return row | {"command": "python -m benchmarks.compare fit", "commit": "0123456789abc"} | changes


def test_table_of_fits_goes_from_best_to_worst_within_a_precision(recorded, tmp_path):
    start_only = [{"psnr": {"0": 21.0}, "start_seconds": 0.25}] * 2
    rows = [
        fit_row_of("gaussian", "bfloat16", 25.0),
        fit_row_of("sparse_epitome", "float32", 19.0),
        fit_row_of("sparse_epitome", "float32", 17.0, images=200, start="uniform"),
        fit_row_of("frequency", "float32", 0.0, runs=start_only),
        fit_row_of("packed_gaussian", "bfloat16", 27.0),
        fit_row_of("downscale", "bfloat16", 14.0, spec={"dtype": "uint8"}),
        {
            "codec": "factor",
            "precision": "float32",
            "images": 20,
            "refused": "codec.bases",
            "command": "x",
            "commit": "1",
        },
        fit_row_of("gaussian", "float32", 24.0),
    ]
    record = {"n": 2, "settings": {"data": "toys", "size": [128, 128, 3]}, "results": rows}
    (tmp_path / "compare" / "fit_toys.json").write_text(json.dumps(record))
    lines = tables._compare_fit("fit_toys").splitlines()
    assert lines[0].startswith("Mean PSNR in dB of 20 training images of toys (128x128x3) as stored")
    same = "3,852 | 10.00 | 20.00"
    assert lines[4:-2] == [
        f"| gaussian | float32 | {same} | 23.00 ± 0.71 | 24.00 ± 0.71 | 9.5 | 3 | 23.22; 150; 24.5 |",
        "| frequency | float32 | 3,852 | 21.00 |  |  |  | 0.2 |  | 15.69; 280; 15.5 |",
        f"| sparse_epitome | float32 | {same} | 18.00 ± 0.71 | 19.00 ± 0.71 | 9.5 | 3 | 17.77; 299; 69.4 |",
        f"| sparse_epitome, 200 images, uniform start | float32 | {same} | 16.00 ± 0.71 | 17.00 ± 0.71 | 9.5 | 3 |  |",
        "| factor | float32 | does not fit | | | | | | | |",
        f"| packed_gaussian | codes | {same} | 26.00 ± 0.71 | 27.00 ± 0.71 | 9.5 | 3 |  |",
        f"| gaussian | bfloat16 | {same} | 24.00 ± 0.71 | 25.00 ± 0.71 | 9.5 | 3 |  |",
        f"| downscale | uint8 | {same} | 13.00 ± 0.71 | 14.00 ± 0.71 | 9.5 | 3 |  |",
    ]


# Rounding later


def test_unrounded_codec_draws_its_masters_and_moves_its_grids():
    spec = PackedGaussianSpec(
        images_per_class=2, num_points=6, bits_mean=4, bits_cholesky=3, bits_color=3, ranges="fitted"
    )
    codec = codecs.make(spec, image_shape=(8, 8, 3), num_classes=2, bytes_per_class=1000)
    later = packed_later.unrounded(codec)
    params = jax.jit(codec.init)(jax.random.key(0), IMAGES[:4])
    params = dataclasses.replace(params, color=1.5 * params.color + 0.03)
    plain = Gaussians(params.mean, params.cholesky, params.color, jnp.ones(params.mean.shape[:2]), size=(8, 8))
    drawn = np.asarray(jax.jit(later.decode)(params))
    np.testing.assert_allclose(drawn, render(plain, cutoff=spec.cutoff), atol=2e-6)
    assert np.abs(drawn - np.asarray(jax.jit(codec.decode)(params))).max() > 0.01
    index = np.array([3, 1])
    np.testing.assert_allclose(jax.jit(later.decode)(params, index, key=jax.random.key(1)), drawn[index], atol=1e-6)
    # Ranges follow the colors that have changed, in the same way as with rounding.
    ours, theirs = jax.jit(later.project)(params), jax.jit(codec.project)(params)
    assert (np.asarray(ours.step)[3:] > 1.1 * np.asarray(params.step)[3:]).all()
    np.testing.assert_allclose(ours.step, theirs.step, rtol=1e-6)


def later(toy: Path, folder: Path, *overrides: str) -> None:
    where = ["--runs", str(folder / "runs"), "--out", str(folder / "later.json")]
    packed_later.main(["--config", str(toy), *where, *overrides])


@pytest.mark.slow
def test_both_ways_to_round_are_tested_from_one_fit_and_taken_up_again(toy, tmp_path, capsys):
    later(toy, tmp_path)
    found = json.loads((tmp_path / "later.json").read_text())
    rows, settings = found["results"], found["settings"]
    assert {name: list(kinds) for name, kinds in rows.items()} == {
        "every step": ["rounded"],
        "at the end": ["rounded", "as trained"],
    }
    for kinds in rows.values():
        for row in kinds.values():
            assert row["n"] == found["n"] == 2 and row["images"] == 20
    # A tenth of the ten training images of each class.
    assert (settings["iterations"], settings["held_out"], settings["config"]) == (3, 10, str(toy))
    losses = [
        [json.loads(line)["loss"] for line in path.read_text().splitlines() if '"main-distill"' in line]
        for path in (tmp_path / "runs" / name / "metrics.jsonl" for name in ("every_step", "at_the_end"))
    ]
    assert [len(one) for one in losses] == [3, 3] and losses[0] != losses[1]

    kept = [*(tmp_path / "runs").rglob("evaluation.json"), *(tmp_path / "runs").rglob("metrics.jsonl")]
    assert len(kept) >= 4
    unchanged(lambda: later(toy, tmp_path), *kept)
    assert json.loads((tmp_path / "later.json").read_text())["results"] == rows

    capsys.readouterr()
    assert "holds a run with another config: codec.lr is 0.01 there and 0.02 now" in refused(
        capsys, ends(later, toy, tmp_path, "codec.lr=0.02")
    )


def test_rounding_later_needs_a_packed_codec(toy, tmp_path, capsys):
    message = refused(capsys, ends(later, toy, tmp_path, "codec={name: gaussian, images_per_class: 1, num_points: 5}"))
    assert message == "error: codec.name: expected packed_gaussian, found 'gaussian'\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("optimum", "factors"),
    [
        (1.0, [0.3, 1.0, 3.0]),
        (10.0, [0.3, 1.0, 3.0, 10.0, 30.0]),
        (100.0, [0.3, 1.0, 3.0, 10.0, 30.0, 100.0]),
        (0.01, [0.3, 1.0, 3.0, 0.1, 0.03]),
    ],
)
def test_rates_are_tried_further_out_while_the_best_is_at_an_end(optimum, factors, toy, tmp_path, monkeypatch):
    def search(tried, dataset, *, out, progress):
        # The rate of 100 times the codec's own diverges.
        rates = [config.codec.lr / base.codec.lr for _, config in tried]
        return {"rows": [{"loss": None if rate > 50 else abs(np.log(rate / optimum))} for rate in rates]}

    monkeypatch.setattr(compare, "CONFIG", str(toy))
    monkeypatch.setattr(compare, "RATES", (0.3, 1.0, 3.0))
    monkeypatch.setattr(compare, "WIDER", (0.03, 0.1, 10.0, 30.0, 100.0))
    monkeypatch.setattr(compare.tune, "search", search)
    base = configs.load(str(toy))
    tried, rows = compare.tuned(base, [], None, tmp_path)
    assert [overrides for (overrides,) in tried] == [f"codec.lr={0.01 * factor:.6g}" for factor in factors]
    assert len(rows) == len(tried)
