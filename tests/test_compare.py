"""`benchmarks.compare`, `benchmarks.packed_later` and the tables made from them, on toys."""

import dataclasses
import json
from pathlib import Path
from typing import get_args, get_type_hints

import jax.numpy as jnp
import numpy as np
import pytest
from command_line import refused
from test_codecs import ONLY_VIDEOS

from benchmarks import compare, tables
from gsdd_jax import codecs
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
    monkeypatch.setattr(compare, "BUDGETS", {"float32": 200})
    fit(out, "--only", "downscale", "frequency")
    found = json.loads(out.read_text())
    names = [(row["codec"], row["precision"]) for row in found["results"]]
    assert names == [("frequency", "float32"), ("downscale", "float32")]
    assert (found["settings"], found["n"]) == ({"data": "toy", "size": [8, 8, 3], "short": 1}, 2)
    for row in found["results"]:
        check_fit_row(row, budget=200)
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
    assert made == [("downscale", "float32")] and again[:-1] == found["results"][:-1]
    assert settled(again[-1]) == settled(last)
    assert [run["psnr"] for run in again[-1]["runs"]] == [run["psnr"] for run in last["runs"]]


def test_another_start_makes_other_rows_of_those_that_have_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "BUDGETS", {"float32": 200})
    out = tmp_path / "fit.json"
    fit(out, "--only", "memory")
    fit(out, "--only", "memory", "--start", "xavier")
    svd, xavier = json.loads(out.read_text())["results"]
    assert (svd.get("start"), svd["spec"]["start"]) == (None, "svd")
    assert xavier["start"] == xavier["spec"]["start"] == "xavier"
    assert xavier["runs"][0]["psnr"]["0"] < svd["runs"][0]["psnr"]["0"]
    unchanged(lambda: fit(out, "--only", "memory", "--start", "xavier"), out)
    capsys.readouterr()
    message = refused(capsys, ends(fit, out, "--only", "downscale", "--start", "xavier"))
    assert "--start: found 'xavier', expected one beside the codec's own (downscale: none)" in message


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
        (["fit", "--images", "many"], "argument --images: expected an integer >= 1, found 'many'"),
        # Pixels are what is fitted.
        (["fit", "--only", "pixel"], "argument --only: invalid choice: 'pixel' (choose from 'downscale', "),
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
    assert made["bfloat16"] == set(codecs.SPECS) - {"pixel", "palette", *ONLY_VIDEOS} == made["float32"] | CODED


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


def test_accuracies_cover_every_codec_in_every_precision():
    specs = {name: get_type_hints(spec).get("dtype") for name, spec in codecs.SPECS.items() if name not in ONLY_VIDEOS}
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
    # Each row takes a run for each rate and one more. The search has its own test.
    monkeypatch.delitem(compare.ACCURACY, "downscale, float32")
    monkeypatch.delitem(compare.ACCURACY, "downscale, bfloat16")
    monkeypatch.setattr(compare, "RATES", (1.0,))
    monkeypatch.setattr(compare, "WIDER", ())
    accuracy(toy, tmp_path, monkeypatch, "evaluate.seeds=2")
    found = json.loads(out.read_text())
    assert found["settings"] == {"config": str(toy), "overrides": ["evaluate.seeds=2"]}
    assert [row["name"] for row in found["results"]] == ["downscale, uint8"]
    for row in found["results"]:
        result = row["result"]
        ((overrides, loss),) = row["rates"]
        assert overrides == row["chosen"] == ["codec.lr=0.01"] and np.isfinite(loss) and result["name"] == row["name"]
        assert 0 < result["accuracy"]["bytes_per_class"] <= result["bytes_per_class"] == 256
        assert result["accuracy"]["n"] == 2 and result["protocol"]["evaluate"]["seeds"] == 2
        assert all(result[name] is None for name in ("pixel", "full_data", "random_real", "fit_only"))
    images = [row["result"]["accuracy"]["images_per_class"] for row in found["results"]]
    assert images == [16]

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
    assert shown.count("\n| downscale, ") == 1
    # Rows of different data do not stand in one table.
    other = json.loads(json.dumps(found["results"][0]))
    other["result"]["data_sha256"] = "1"
    record = {"results": [found["results"][0], other]}
    (tmp_path / "compare" / "accuracy_cifar10.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="runs of one table differ in data, budget or number of networks"):
        tables._compare_accuracy("accuracy_cifar10")
    assert "distill.nonsense: unknown key" in refused(
        capsys, ends(accuracy, toy, tmp_path / "new", monkeypatch, "distill.nonsense=1")
    )


# Rounding later


@pytest.mark.parametrize(
    ("optimum", "factors"),
    [(1.0, [0.3, 1.0, 3.0]), (100.0, [0.3, 1.0, 3.0, 10.0, 30.0, 100.0]), (0.01, [0.3, 1.0, 3.0, 0.1, 0.03])],
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
