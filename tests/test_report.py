"""Pictures and the report: exact pixels and ellipses, a self-contained page, and no number invented or lost."""

import base64
import hashlib
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train import pictures, report
from train.rundir import RunDir

ROOT = Path(__file__).resolve().parent.parent
MAGENTA = (255, 0, 255, 255)
VOID = {"meta", "link", "img", "br", "hr", "input"}


def _open(data):
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGBA"))


def _grid(images, names):
    """Draws images [k, per class, h, w, c]."""
    return pictures.grid(
        images.reshape(-1, *images.shape[2:]), np.repeat(np.arange(len(names)), images.shape[1]), names
    )


def _tiles(data, k, n, height, width):
    """Cuts a grid without note into its tiles [k, n, height, width, 4], counted from the right and the top."""
    picture, gap = _open(data), 3 * pictures.DENSITY
    assert picture.shape[0] == k * (height + gap) - gap
    left = picture.shape[1] - (n * (width + gap) - gap)
    rows = [
        [picture[y : y + height, x : x + width] for x in range(left, picture.shape[1], width + gap)]
        for y in range(0, picture.shape[0], height + gap)
    ]
    return np.array(rows), picture[:, :left]


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_magnifies_every_image_in_its_place(channels):
    images = np.random.default_rng(0).uniform(size=(2, 3, 4, 8, channels)).astype(np.float32)
    tiles, labels = _tiles(_grid(images, ["a", "b"]), 2, 3, 64, 128)
    expected = np.rint(images.astype(np.float64) * 255)
    expected = expected.repeat(3, -1) if channels == 1 else expected
    assert (tiles[:, :, 8::16, 8::16, : expected.shape[-1]] == expected).all()
    assert (tiles.reshape(2, 3, 4, 16, 8, 16, 4) == tiles[:, :, ::16, ::16].reshape(2, 3, 4, 1, 8, 1, 4)).all()
    assert (tiles[..., 3] == 255).all()
    for half in np.split(labels[:-1], [64], axis=0):
        assert half[..., 3].any()  # each row has its name


def test_grid_clips_and_marks_nan():
    images = np.array([-1.0, 2.0, np.nan, np.inf, -np.inf, 0.5], np.float32).reshape(1, 1, 1, 6, 1)
    picture = _open(_grid(images, ["a"]))[0, -126::21]
    gray = [(v, v, v, 255) for v in (0, 255, 255, 0, 128)]
    assert [tuple(p) for p in picture.tolist()] == [gray[0], gray[1], MAGENTA, gray[2], gray[3], gray[4]]


def test_grid_shows_the_first_and_says_how_many_there_are():
    images = np.linspace(0, 1, 25 * 30).reshape(25, 30, 1, 1, 1) * np.ones((1, 1, 8, 8, 3))
    picture = _open(_grid(images, [f"class {i}" for i in range(25)]))
    stride = 128 + 3 * pictures.DENSITY
    centers = picture[64 : 20 * stride : stride, -64 - 11 * stride :: stride, 0]
    assert (centers == np.rint(images[:20, :12, 0, 0, 0] * 255)).all()
    assert picture[20 * stride :, :, 3].any()  # the note
    # Long names and those of several lines are cut.
    wide = _open(_grid(np.zeros((1, 1, 8, 8, 1)), ["x" * 500 + "\n" + "y" * 500])).shape
    assert wide[1] < 128 + 200 * pictures.DENSITY and wide[0] == 128


def _ellipses(mean, cholesky, color, opacity, size):
    """The picture of one image: Gaussians [m, ...], magnified to 128 pixels."""
    arrays, scale = [np.asarray(a)[None] for a in (mean, cholesky, color, opacity)], 128 // max(size)
    data = pictures.ellipse_grid(arrays, np.zeros(1, int), ["a"], size)
    return _tiles(data, 1, 1, size[0] * scale, size[1] * scale)[0][0, 0]


def test_ellipse_covers_the_one_sigma_set_of_its_gaussian():
    h, w, scale = 24, 32, 4
    mean, factor = np.array([0.25, -0.4]), np.array([[7.0, 0.0], [2.5, 4.0]])
    cholesky = np.array([[factor[0, 0], factor[1, 0], factor[1, 1]]])
    picture = _ellipses(mean[None], cholesky, np.ones((1, 3)), np.ones(1), (h, w))
    rows, columns = np.mgrid[: h * scale, : w * scale]
    position = (np.stack([columns, rows], -1) + 0.5) / scale  # (x, y) in native pixels
    offset = position - np.array([0.5 * w * (mean[0] + 1), 0.5 * h * (mean[1] + 1)])
    q = np.einsum("...i,ij,...j", offset, np.linalg.inv(factor @ factor.T), offset)
    assert (picture[q < 0.8] == 255).all()
    assert (picture[q > 1.3] == (0, 0, 0, 255)).all()
    assert 0.1 < (q < 1).mean() < 0.2


def test_small_ellipses_lie_over_big_ones_whatever_their_order():
    cholesky = np.array([[2.0, 0, 2.0], [8.0, 0, 8.0]])
    color = np.array([[1.0, 0, 0], [0, 0, 1.0]])
    for order in ([0, 1], [1, 0]):
        picture = _ellipses(np.zeros((2, 2)), cholesky[order], color[order], np.ones(2), (32, 32))
        assert picture[64, 64].tolist() == [255, 0, 0, 255]
        assert picture[64, 84].tolist() == [0, 0, 255, 255]


def test_weak_colors_are_lifted_and_keep_their_hue():
    color = np.array([[2.0, 1.0, 0.0], [0.08, 0.0, 0.04]])
    mean = np.array([[-0.5, 0.0], [0.5, 0.0]])
    picture = _ellipses(mean, np.full((2, 3), [3.0, 0, 3.0]), color, np.ones(2), (32, 32)).astype(int)
    assert np.abs(picture[64, 32] - [255, 128, 0, 255]).max() <= 1
    assert np.abs(picture[64, 96] - [51, 0, 25, 255]).max() <= 1  # the root of 0.04, times (1, 0, 0.5)


def test_negative_gaussians_are_dashed_outlines():
    shape = np.zeros((1, 2)), np.array([[9.0, 0, 9.0]]), np.full((1, 1), 0.7)
    filled, outline = (_ellipses(*shape, np.array([sign]), (32, 32)) for sign in (1.0, -1.0))
    assert filled[64, 64].tolist() == [255, 255, 255, 255]
    assert outline[64, 64].tolist() == [0, 0, 0, 255]
    angle = np.linspace(0, 2 * np.pi, 2000)
    on_line = outline[(64 + 36 * np.sin(angle)).astype(int), (64 + 36 * np.cos(angle)).astype(int), 0] > 90
    assert 0.3 < on_line.mean() < 0.9
    assert np.abs(np.diff(on_line.astype(int))).sum() > 20


def test_ellipse_grid_has_the_layout_of_grid_and_does_not_leak_between_tiles():
    k, n, m = 2, 3, 4
    rng = np.random.default_rng(1)
    mean = rng.uniform(-1, 1, (k, n, m, 2))
    cholesky = np.tile([4.0, 1.0, 3.0], (k, n, m, 1))
    color, opacity = rng.uniform(size=(k, n, m, 3)), rng.uniform(0.2, 1, (k, n, m))
    names = ["first", "second"]
    gaussians = [array.reshape(k * n, *array.shape[2:]) for array in (mean, cholesky, color, opacity)]
    data = pictures.ellipse_grid(gaussians, np.repeat(range(k), n), names, (16, 16))
    assert _open(data).shape == _open(_grid(np.zeros((k, n, 16, 16, 3)), names)).shape
    tiles, _ = _tiles(data, k, n, 128, 128)
    for at in np.ndindex(k, n):
        alone = _ellipses(mean[at], cholesky[at], color[at], opacity[at], (16, 16))
        # Agg rounds positions to 1/256 pixel, relative to another origin.
        assert np.abs(tiles[at].astype(int) - alone).max() <= 16
        assert (np.abs(tiles[at].astype(int) - alone) > 2).mean() < 0.01


@pytest.mark.parametrize("broken", range(4))
def test_non_finite_gaussians_get_a_magenta_frame_and_the_others_stay(broken):
    arrays = [np.zeros((2, 2)), np.full((2, 3), [4.0, 0, 4.0]), np.ones((2, 3)), np.ones(2)]
    arrays[broken][0] = np.nan
    picture = _ellipses(*arrays, (32, 32))
    assert picture[64, 64].tolist() == [255, 255, 255, 255]
    assert (picture == MAGENTA).all(-1).sum() > 400


def test_extreme_ellipses_draw_something():
    cholesky = np.array([[1e30, 1e30, 1e30], [0.0, 0.0, 0.0], [-3.0, 0.5, 3.0]])
    assert _ellipses(np.full((3, 2), 1e20), cholesky, np.ones((3, 1)), np.ones(3), (8, 8)).shape == (128, 128, 4)
    empty = _ellipses(np.zeros((0, 2)), np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), (8, 8))
    assert (empty == (0, 0, 0, 255)).all()


def test_curves_are_deterministic_and_survive_gaps(monkeypatch):
    y = np.exp(np.random.default_rng(0).normal(size=5001))
    y[[0, 10, 4999]] = np.nan, np.inf, -1.0
    y[2000:2100] = np.nan
    for x, values in ((range(5001), y), ([1, 2], [0.1, 0.2]), ([3], [1.0]), ([1], [np.nan])):
        for log in (False, True):
            first = pictures.curve(x, values, log=log)
            assert first == pictures.curve(x, values, log=log)
            assert b"<svg" in first[:1000]


def test_long_curves_are_means_in_a_band_that_keeps_the_spikes(monkeypatch):
    drawn = {}
    for name in ("plot", "fill_between"):
        monkeypatch.setattr(f"matplotlib.axes.Axes.{name}", lambda self, *a, name=name, **k: drawn.update({name: a}))
    y = np.random.default_rng(0).uniform(1, 2, 50_000)
    y[31_234], y[700] = 9.0, np.nan
    pictures.curve(range(50_000), y)
    rows = y.reshape(100, 500)
    assert list(drawn["plot"][0]) == list(range(0, 50_000, 500))
    np.testing.assert_allclose(drawn["plot"][1], np.nanmean(rows, 1), rtol=1e-12)
    for band, expected in zip(drawn["fill_between"][1:], (np.nanmin(rows, 1), np.nanmax(rows, 1)), strict=True):
        np.testing.assert_array_equal(band, expected)


class _Page(HTMLParser):
    """Collects text and attributes, and fails on tags that are not balanced."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.stack, self.urls, self.tags, self.text, self.script = [], [], [], "", ""
        self.cells = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.stack == []
        self.cells = [" ".join(cell.split()) for cell in self.cells]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.urls += [value for name, value in attrs if name in ("src", "href", "action", "poster", "srcset", "data")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.stack.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "script":
            self.script += data
        elif self.stack and self.stack[-1] != "style":
            self.text += data
            if any(tag in ("td", "th") for tag in self.stack):
                self.cells[-1] += data


def _accuracy(mean, std, n=5):
    return {"mean": mean, "std": std, "n": n, "seeds": list(range(n))}


RESULT = {
    "name": "digits <b>&\"'",
    "codec": "gaussian",
    "objective": "distribution",
    "dataset": "digits",
    "num_classes": 10,
    "bytes_per_class": 12288,
    "paper_ipc": 1,
    "gpc": 6,
    "accuracy": _accuracy(0.7134, 0.0061) | {"bytes_per_class": 12200, "images_per_class": 6},
    "random_real": _accuracy(0.5521, 0.0214) | {"bytes_per_class": 256, "images_per_class": 4, "training_flops": 2e11},
    "fit_only": None,
    "pixel": _accuracy(0.6666, 0.0, n=1),
    "full_data": _accuracy(0.971, 0.002, n=3),
    "seconds": 412.3,
    "device": "cpu",
    "versions": {"jax": "0.10.2", "triton": None},
    "commit": "0123abcd",
    "protocol": {"name": "final epoch", "epochs": 300, "lr": 0.01},
    "budget": {"exported file (bytes)": 122880, "pixels, float32": "1 images"},
}


@pytest.fixture
def run(tmp_path):
    with RunDir(tmp_path / "run") as run:
        run.configure({"name": "x", "path": "</pre><script>alert(1)</script>", "distill": {"iterations": 1234}})
        run.record_environment()
        for step in range(0, 100, 10):
            run.append("fit", step, loss=1.0 / (step + 1), psnr=20.0 + step, seconds=0.1, note="text")
            run.append("distill", step, loss=float("nan") if step == 50 else 2.0)
        yield run


def test_report_is_well_formed_self_contained_and_complete(run):
    images = np.random.default_rng(0).uniform(size=(2, 3, 8, 8, 3))
    data = _grid(images, ["<i>", "b"])
    path = report.write(run.path, RESULT, {"images": data, "real": data, "extra <u>": data})
    assert path == run.path / "report.html"
    page = _Page(path)
    assert len(page.urls) == 1 + 3 + 3 and page.tags.count("img") == 3 + 3
    assert all(url.startswith("data:") for url in page.urls)
    assert not re.search(r"https?:|url\(|@import|//[a-z]", re.sub(r"data:[^\"]*", "", page.source))
    # One script, the only one that the page itself allows.
    assert page.tags.count("script") == 1
    allowed = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    assert policy in html.unescape(page.source)
    for text in (
        RESULT["name"],
        "extra <u>".capitalize(),
        "</pre><script>alert(1)</script>",
        "iterations: 1234",
        "0123abcd",
        "0.10.2",
        "exported file (bytes): 122,880\npixels, float32: 1 images",
        "digits · distribution · cpu · 0:06:52",
        "fit: loss (log scale)",
        "fit: psnr",
        "distill: loss",
        "final epoch",
    ):
        assert text in page.text, text
    assert "fit: seconds" not in page.text and "Load the set" not in page.text
    # As wide as it was drawn to be shown.
    assert f'style="width:{_open(data).shape[1] // pictures.DENSITY}px"' in page.source


def test_results_table_holds_the_numbers_and_never_invents_one(run):
    page = _Page(report.write(run.path, RESULT, {}))
    assert [page.cells[i : i + 5] for i in range(5, 25, 5)] == [
        ["gaussian, distilled", "71.3 ± 0.6 %", "5", "12,200", "6"],
        ["pixels, distilled", "66.7 %", "1", "–", "–"],
        ["random real images", "55.2 ± 2.1 %", "50.2 TFLOP", "256", "4"],
        ["whole training set", "97.1 ± 0.2 %", "3", "–", "–"],
    ]
    assert "Not run: gaussian, fitted only." in page.text
    assert "script" not in page.tags and "input" not in page.tags


def test_classes_have_a_table_of_the_arms_that_know_them(tmp_path):
    result = {
        "name": "x",
        "class_names": ["<cat>", "dog"],
        "test_images_per_class": [1200, 0],
        "accuracy": _accuracy(0.5, 0.1) | {"per_class": [0.5, None]},
        "pixel": _accuracy(0.4, 0.1),
        "full_data": _accuracy(0.9, 0.1) | {"per_class": [0.912, None]},
    }
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "manifest.json").touch()
    page = _Page(report.write(tmp_path, result, {}))
    at = page.cells.index("Class") + 4
    assert page.cells[at : at + 8] == ["<cat>", "50.0 %", "91.2 %", "1,200", "dog", "–", "–", "0"]
    assert f"synset = gsdd.load({str(tmp_path)!r})\nimages, labels = synset.images(), synset.labels" in page.text


def test_summary_is_one_sentence_with_its_rivals():
    assert report.summary(RESULT).replace("\N{NO-BREAK SPACE}", " ") == (
        "10 classes × 6 Gaussian images in 12,288 bytes per class: 71.3 ± 0.6 % (5 networks), "
        "against 55.2 ± 2.1 % for random real images and 97.1 ± 0.2 % for the full data."
    )


def test_report_of_a_bare_directory_says_not_run(tmp_path):
    page = _Page(report.write(tmp_path, {"name": "x", "accuracy": {"mean": float("nan")}}, {}))
    assert "pixels, distilled, random real images, whole training set." in page.text and "not tested" in page.text
    assert "0.0" not in page.text and "None" not in page.text and "img" not in page.tags


@pytest.mark.parametrize(
    "name", ["sets/digits", "benchmarks/results/digits_federated", "benchmarks/results/cifar10_d3_soft"]
)
def test_committed_results_render_with_their_numbers(name, tmp_path):
    result = json.loads((ROOT / name / "result.json").read_text())
    text = _Page(report.write(tmp_path, result, {})).text.replace("\N{NO-BREAK SPACE}", " ")
    for key in ("accuracy", "fit_only", "pixel", "random_real", "full_data"):
        entry = result[key]
        assert entry is None or f"{100 * entry['mean']:.1f}" in text, key
    assert result["commit"] in text and f"{result['accuracy']['bytes_per_class']:,}" in text and "None" not in text


def test_paper_protocol_is_labeled(tmp_path):
    for protocol in ({"name": "paper"}, {"evaluate": {"protocol": "paper"}}):
        page = _Page(report.write(tmp_path, RESULT | {"protocol": protocol}, {}))
        assert "Protocol paper: the distilled rows are the best of repeated tests on the test set" in page.text
    assert "best of repeated tests" not in _Page(report.write(tmp_path, RESULT, {})).text
