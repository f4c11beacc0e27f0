"""Pictures and the report: exact pixels and ellipses, a self-contained page, and no number invented or lost."""

import base64
import html
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from train import pictures, report
from train.rundir import RunDir

MAGENTA = (255, 0, 255, 255)
VOID = {"meta", "link", "img", "br", "hr", "input"}


def _open(data):
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGBA"))


def _tiles(data, k, n, size):
    """Cuts a grid without note into its tiles [k, n, size, size, 4], counted from the right and the top."""
    picture, gap = _open(data), 3 * pictures.DENSITY
    assert picture.shape[0] == k * (size + gap) - gap
    left = picture.shape[1] - (n * (size + gap) - gap)
    rows = [
        [picture[y : y + size, x : x + size] for x in range(left, picture.shape[1], size + gap)]
        for y in range(0, picture.shape[0], size + gap)
    ]
    return np.array(rows), picture[:, :left]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grid_magnifies_every_image_in_its_place(channels):
    images = np.random.default_rng(0).uniform(size=(2, 3, 4, 4, channels)).astype(np.float32)
    tiles, labels = _tiles(pictures.grid(images, ["a", "b"], scale=5), 2, 3, 20)
    expected = np.rint(images.astype(np.float64) * 255)
    expected = expected.repeat(3, -1) if channels == 1 else expected
    assert (tiles[:, :, 2::5, 2::5, : expected.shape[-1]] == expected).all()
    assert (tiles.reshape(2, 3, 4, 5, 4, 5, 4) == tiles[:, :, ::5, ::5].reshape(2, 3, 4, 1, 4, 1, 4)).all()
    if channels != 4:
        assert (tiles[..., 3] == 255).all()
    for half in np.split(labels[:-1], [20], axis=0):
        assert half[..., 3].any()  # each row has its name


def test_grid_clips_and_marks_nan():
    images = np.array([-1.0, 2.0, np.nan, np.inf, -np.inf, 0.5], np.float32).reshape(1, 1, 1, 6, 1)
    picture = _open(pictures.grid(images, ["a"], scale=2))[0, -12::2]
    gray = [(v, v, v, 255) for v in (0, 255, 255, 0, 128)]
    assert [tuple(p) for p in picture.tolist()] == [gray[0], gray[1], MAGENTA, gray[2], gray[3], gray[4]]


def test_grid_shows_the_first_and_says_how_many_there_are():
    images = np.linspace(0, 1, 25 * 30).reshape(25, 30, 1, 1, 1) * np.ones((1, 1, 8, 8, 3))
    picture = _open(pictures.grid(images, [f"class {i}" for i in range(25)]))
    stride = 128 + 3 * pictures.DENSITY
    centers = picture[64 : 20 * stride : stride, -64 - 11 * stride :: stride, 0]
    assert (centers == np.rint(images[:20, :12, 0, 0, 0] * 255)).all()
    assert picture[20 * stride :, :, 3].any()  # the note
    assert pictures._note(25, 30, 20, 12) == "Shown: the first 12 of 30 images per class, the first 20 of 25 classes"
    assert pictures._note(20, 12, 20, 12) == ""


@pytest.mark.parametrize(
    ("size", "scale"), [((8, 8), 16), ((28, 28), 5), ((32, 32), 4), ((128, 128), 1), ((300, 300), 1)]
)
def test_default_scale_brings_images_to_a_like_size(size, scale):
    assert pictures._scale(size, None) == scale


def test_long_and_multiline_names_are_shortened():
    images = np.zeros((1, 1, 8, 8, 1))
    wide = _open(pictures.grid(images, ["x" * 500 + "\n" + "y" * 500])).shape
    assert wide[1] < 128 + 160 * pictures.DENSITY + 40
    assert wide[0] == 128


@pytest.mark.parametrize(
    ("images", "names", "words"),
    [
        (np.zeros((2, 3, 4, 4)), ["a", "b"], r"images has shape \(2, 3, 4, 4\): expected"),
        (np.zeros((2, 3, 4, 4, 2)), ["a", "b"], "c of 1, 3 or 4"),
        (np.zeros((2, 0, 4, 4, 1)), ["a", "b"], "none empty"),
        (np.zeros((2, 3, 4, 4, 1)), ["a"], "class_names has 1 names for 2 classes"),
    ],
)
def test_grid_refuses_other_shapes(images, names, words):
    with pytest.raises(ValueError, match=words):
        pictures.grid(images, names)


def test_scale_below_one_is_refused():
    with pytest.raises(ValueError, match="scale is 0"):
        pictures.grid(np.zeros((1, 1, 2, 2, 1)), ["a"], scale=0)


def test_ellipse_covers_the_one_sigma_set_of_its_gaussian():
    h, w, scale = 24, 32, 6
    mean, factor = np.array([0.25, -0.4]), np.array([[7.0, 0.0], [2.5, 4.0]])
    cholesky = np.array([[factor[0, 0], factor[1, 0], factor[1, 1]]])
    data = pictures.ellipses(mean[None], cholesky, np.ones((1, 3)), np.ones(1), size=(h, w), scale=scale)
    picture = _open(data)
    assert picture.shape == (h * scale, w * scale, 4)
    rows, columns = np.mgrid[: h * scale, : w * scale]
    position = (np.stack([columns, rows], -1) + 0.5) / scale  # (x, y) in native pixels
    offset = position - np.array([0.5 * w * (mean[0] + 1), 0.5 * h * (mean[1] + 1)])
    q = np.einsum("...i,ij,...j", offset, np.linalg.inv(factor @ factor.T), offset)
    assert (picture[q < 0.85] == 255).all()
    assert (picture[q > 1.2] == (0, 0, 0, 255)).all()
    assert 0.1 < (q < 1).mean() < 0.2


def test_small_ellipses_lie_over_big_ones_whatever_their_order():
    cholesky = np.array([[2.0, 0, 2.0], [8.0, 0, 8.0]])
    color = np.array([[1.0, 0, 0], [0, 0, 1.0]])
    for order in ([0, 1], [1, 0]):
        data = pictures.ellipses(np.zeros((2, 2)), cholesky[order], color[order], np.ones(2), size=(20, 20), scale=4)
        picture = _open(data)
        assert picture[40, 40].tolist() == [255, 0, 0, 255]
        assert picture[40, 60].tolist() == [0, 0, 255, 255]


def test_weak_colors_are_lifted_and_keep_their_hue():
    color = np.array([[2.0, 1.0, 0.0], [0.08, 0.0, 0.04]])
    mean = np.array([[-0.5, 0.0], [0.5, 0.0]])
    data = pictures.ellipses(mean, np.full((2, 3), [3.0, 0, 3.0]), color, np.ones(2), size=(20, 20), scale=4)
    picture = _open(data).astype(int)
    assert np.abs(picture[40, 20] - [255, 128, 0, 255]).max() <= 1
    assert np.abs(picture[40, 60] - [51, 0, 25, 255]).max() <= 1  # the root of 0.04, times (1, 0, 0.5)


def test_negative_gaussians_are_dashed_outlines():
    arguments = {"size": (20, 20), "scale": 6}
    shape = np.zeros((1, 2)), np.array([[6.0, 0, 6.0]]), np.full((1, 1), 0.7)
    filled = _open(pictures.ellipses(*shape, np.array([1.0]), **arguments))
    outline = _open(pictures.ellipses(*shape, np.array([-1.0]), **arguments))
    assert filled[60, 60].tolist() == [255, 255, 255, 255]
    assert outline[60, 60].tolist() == [0, 0, 0, 255]
    angle = np.linspace(0, 2 * np.pi, 2000)
    on_line = (
        outline[np.round(60 + 36 * np.sin(angle)).astype(int), np.round(60 + 36 * np.cos(angle)).astype(int), 0] > 90
    )
    assert 0.3 < on_line.mean() < 0.9
    assert np.abs(np.diff(on_line.astype(int))).sum() > 20


def test_ellipse_grid_has_the_layout_of_grid_and_does_not_leak_between_tiles():
    k, n, m = 2, 3, 4
    rng = np.random.default_rng(1)
    mean = rng.uniform(-1, 1, (k, n, m, 2))
    cholesky = np.tile([4.0, 1.0, 3.0], (k, n, m, 1))
    color, opacity = rng.uniform(size=(k, n, m, 3)), rng.uniform(0.2, 1, (k, n, m))
    names = ["first", "second"]
    data = pictures.ellipse_grid(mean, cholesky, color, opacity, names, size=(16, 16))
    grid = pictures.grid(np.zeros((k, n, 16, 16, 3)), names)
    assert _open(data).shape == _open(grid).shape
    tiles, _ = _tiles(data, k, n, 128)
    for i in range(k):
        for j in range(n):
            alone = _open(pictures.ellipses(mean[i, j], cholesky[i, j], color[i, j], opacity[i, j], size=(16, 16)))
            # Agg rounds positions to 1/256 pixel, relative to another origin.
            assert np.abs(tiles[i, j].astype(int) - alone).max() <= 16
            assert (np.abs(tiles[i, j].astype(int) - alone) > 2).mean() < 0.01


@pytest.mark.parametrize("broken", ["mean", "cholesky", "color", "opacity"])
def test_non_finite_gaussians_get_a_magenta_frame_and_the_others_stay(broken):
    arrays = {
        "mean": np.zeros((2, 2)),
        "cholesky": np.full((2, 3), [4.0, 0, 4.0]),
        "color": np.ones((2, 3)),
        "opacity": np.ones(2),
    }
    arrays[broken][0] = np.nan
    picture = _open(pictures.ellipses(**arrays, size=(20, 20), scale=6))
    assert picture[60, 60].tolist() == [255, 255, 255, 255]
    assert (picture == MAGENTA).all(-1).sum() > 400


def test_extreme_ellipses_draw_something():
    cholesky = np.array([[1e30, 1e30, 1e30], [0.0, 0.0, 0.0], [-3.0, 0.5, 3.0]])
    picture = _open(pictures.ellipses(np.full((3, 2), 1e20), cholesky, np.ones((3, 1)), np.ones(3), size=(8, 8)))
    assert picture.shape == (128, 128, 4)
    empty = pictures.ellipses(np.zeros((0, 2)), np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), size=(8, 8))
    assert (_open(empty) == (0, 0, 0, 255)).all()


def test_ellipse_grid_refuses_other_shapes():
    good = [np.zeros((2, 3, 4, 2)), np.zeros((2, 3, 4, 3)), np.zeros((2, 3, 4, 3)), np.zeros((2, 3, 4))]
    for index, bad in enumerate([(2, 3, 4, 3), (2, 3, 4, 2), (2, 3, 4, 2), (2, 3, 5)]):
        arrays = list(good)
        arrays[index] = np.zeros(bad)
        with pytest.raises(ValueError, match=r"expected \[k, per_class, m, 2\]"):
            pictures.ellipse_grid(*arrays, ["a", "b"], size=(8, 8))


def test_curves_are_deterministic_and_survive_gaps():
    rng = np.random.default_rng(0)
    y = np.exp(rng.normal(size=5000))
    y[[0, 10, 4999]] = np.nan, np.inf, -1.0
    series = {
        "noisy <&>": (np.arange(5000), y),
        "short": ([1, 2], [0.1, 0.2]),
        "one": ([3], [1.0]),
        "none": ([1], [np.nan]),
    }
    for log in (False, True):
        first = pictures.curves(series, xlabel="step", ylabel="loss", log=log)
        assert first == pictures.curves(series, xlabel="step", ylabel="loss", log=log)
        assert b"<svg" in first[:1000]
    assert _open(pictures.curves(series, xlabel="step", ylabel="loss", kind="png"))[..., 3].any()


def test_thinning_keeps_the_spikes():
    y = np.zeros(50_000)
    y[31_234] = 9.0
    y[:100] = np.nan
    x, kept = pictures._thinned(np.arange(50_000), y)
    assert len(x) <= 1000
    assert kept[x == 31_234] == [9.0]


def test_running_mean_is_the_mean_of_its_window():
    y = np.random.default_rng(0).uniform(1, 2, 100)
    y[40] = np.nan
    mean = pictures._running_mean(y, 5, log=False)
    assert np.isnan(mean[40])
    for i in (0, 1, 20, 39, 41, 99):
        np.testing.assert_allclose(mean[i], np.nanmean(y[max(0, i - 2) : i + 3]), rtol=1e-12)
    geometric = pictures._running_mean(y, 5, log=True)
    np.testing.assert_allclose(geometric[20], y[18:23].prod() ** 0.2, rtol=1e-12)


def test_curves_refuse_bad_input():
    with pytest.raises(ValueError, match="series 'a' has 2 x and 1 y"):
        pictures.curves({"a": ([1, 2], [1])}, xlabel="", ylabel="")
    with pytest.raises(ValueError, match="kind is 'pdf'"):
        pictures.curves({}, xlabel="", ylabel="", kind="pdf")


class _Page(HTMLParser):
    """Collects text and attributes, and fails on tags that are not balanced."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.urls, self.tags, self.text = [], [], [], ""
        self.cells = []
        self.feed(text)
        self.close()
        assert self.stack == []

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
        if self.stack and self.stack[-1] != "style":
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
    "num_points": 7,
    "accuracy": _accuracy(0.7134, 0.0061),
    "random_real": _accuracy(0.5521, 0.0214) | {"bytes_per_class": 256, "images_per_class": 4},
    "fit_only": None,
    "pixel": _accuracy(0.6666, 0.0, n=1),
    "full_data": _accuracy(0.971, 0.002, n=3),
    "seconds": 412.3,
    "device": "cpu",
    "versions": {"jax": "0.10.2", "triton": None},
    "commit": "0123abcd",
    "protocol": {"name": "final epoch", "epochs": 300, "lr": 0.01},
    "budget": {"bytes_total": 122880, "floats": {"per_image": 63}},
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


def _pictures():
    images = np.random.default_rng(0).uniform(size=(2, 3, 8, 8, 3))
    return {"images": pictures.grid(images, ["<i>", "b"]), "extra <u>": pictures.grid(images, ["a", "b"])}


def test_report_is_well_formed_self_contained_and_complete(run):
    path = report.write(run.path, RESULT, _pictures())
    assert path == run.path / "report.html"
    source = path.read_text(encoding="utf-8")
    page = _Page(source)
    assert "script" not in page.tags
    assert page.urls
    assert all(url.startswith("data:") for url in page.urls)
    assert not re.search(r"https?:|url\(|@import|//[a-z]", re.sub(r"data:[^\"]*", "", source))
    assert "default-src 'none'" in html.unescape(source)
    for text in (
        RESULT["name"],
        "extra <u>".capitalize(),
        "</pre><script>alert(1)</script>",
        "iterations: 1234",
        "0123abcd",
        "0.10.2",
        "not installed",
        "122,880",
        "6 min 52 s",
        "Loss, fit (log scale)",
        "PSNR, fit",
        "Loss, distill",
        "final epoch",
    ):
        assert text in page.text, text
    assert "Seconds" not in page.text
    assert page.tags.count("img") == 2 + 3


def test_results_table_holds_the_numbers_and_never_invents_one(run):
    page = _Page(report.write(run.path, RESULT, {}).read_text(encoding="utf-8"))
    cells = [cell.replace("\N{NO-BREAK SPACE}", " ") for cell in page.cells]
    rows = [cells[i : i + 6] for i in range(6, 36, 6)]
    assert [row[0].split("  ")[0][:3] for row in rows] == ["GSD", "Fit", "Pix", "Ran", "Ful"]
    assert [row[1:] for row in rows] == [
        ["71.3 ± 0.6 %", "", "5", "12,288", "6"],
        ["not run", "", "–", "12,288", "6"],
        ["66.7 %", "", "1", "–", "1"],
        ["55.2 ± 2.1 %", "", "5", "256", "4"],
        ["97.1 ± 0.2 %", "", "3", "–", "all"],
    ]


def test_summary_is_one_sentence_with_its_rivals():
    assert report.summary(RESULT).replace("\N{NO-BREAK SPACE}", " ") == (
        "10 classes × 6 Gaussian images in 12,288 bytes per class: 71.3 ± 0.6 % (5 networks), "
        "against 55.2 ± 2.1 % for random real images and 97.1 ± 0.2 % for the full data."
    )
    bare = {"name": "x", "codec": "pixel", "gpc": 1, "accuracy": None}
    assert report.summary(bare) == "1 pixel image per class: accuracy not measured."


def test_report_of_a_bare_directory_says_not_run(tmp_path):
    page = _Page(
        report.write(tmp_path, {"name": "x", "accuracy": {"mean": float("nan")}}, {}).read_text(encoding="utf-8")
    )
    assert page.text.count("not run") == 5
    assert "0.0" not in page.text
    assert "img" not in page.tags


def test_paper_protocol_is_labeled(tmp_path):
    result = RESULT | {"protocol": {"name": "paper"}}
    assert "best of repeated tests" in report.write(tmp_path, result, {}).read_text(encoding="utf-8")
    assert "best of repeated tests" not in report.write(tmp_path, RESULT, {}).read_text(encoding="utf-8")


def test_command_and_curves_can_be_given(run):
    svg = pictures.curves({"a": ([1, 2], [1, 2])}, xlabel="x", ylabel="y")
    path = report.write(run.path, RESULT, {}, curves={"My <curve>": svg}, command="python -m x 'a b' && y")
    source = path.read_text(encoding="utf-8")
    page = _Page(source)
    assert "python -m x 'a b' && y" in page.text
    assert "My <curve>" in page.text
    (url,) = [u for u in page.urls if u.startswith("data:image")]
    assert base64.b64decode(url.split(",", 1)[1]) == svg


def test_pictures_are_shown_at_the_density_they_were_drawn_at(run):
    data = _pictures()["images"]
    source = report.write(run.path, RESULT, {"images": data}).read_text(encoding="utf-8")
    assert f'style="width:{_open(data).shape[1] // pictures.DENSITY}px"' in source


def test_bad_result_and_picture_are_refused(tmp_path):
    with pytest.raises(ValueError, match="result has no name"):
        report.write(tmp_path, {}, {})
    with pytest.raises(ValueError, match="neither PNG nor SVG"):
        report.write(tmp_path, RESULT, {"images": b"GIF89a"})
    assert list(tmp_path.iterdir()) == []
