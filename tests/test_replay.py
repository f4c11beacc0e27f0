"""Continual learning: parts in a file, the stream, its measures, and what is refused."""

import dataclasses
import io
import json
import os
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import ROOT, ends, refused
from PIL import Image

import gsdd_jax as gsdd
from gsdd_jax import compressed, data, exchange, whiten
from gsdd_jax.augment import DsaSpec
from gsdd_jax.nets import NetSpec
from gsdd_jax.nets import build as build_network
from gsdd_jax.training import EvalSpec
from gsdd_jax.uses import archive, learning, replay
from gsdd_jax.uses.summary import Learner, SummarySpec, herded, summarize
from train import replay as command

LEARNER = Learner(
    network=NetSpec(depth=1, width=4),
    training=EvalSpec(steps=6, batch=8, schedule="constant"),
    augment=DsaSpec(strategy="none"),
    whitening=whiten.meanstd_of((0.5,), (0.25,)),
)
PIXELS = SummarySpec(title="pixels", codec=gsdd.Pixels(dtype="uint8", images_per_class=2))
RAW = SummarySpec(title="raw", format="raw")


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load(data.DataSpec(classes=("3", "1", "4", "8"), per_class=8, test_limit=40))


def real(images: np.ndarray, counts: tuple[int, ...], format: str = "webp") -> archive.RealImages:
    shared, files = zip(*(archive.encoded(image, format, 80) for image in images), strict=True)
    return archive.RealImages(
        format=format,
        image_shape=images.shape[1:],
        class_names=tuple(f"class {i}" for i in range(len(counts))),
        counts=counts,
        shared=np.frombuffer(*set(shared), np.uint8),
        sizes=np.array([len(file) for file in files], np.uint16),
        data=np.frombuffer(b"".join(files), np.uint8),
    )


def photos(n: int = 3) -> np.ndarray:
    ramp = np.linspace(0, 255, 12 * 16 * 3).reshape(12, 16, 3)
    return np.stack([np.roll(ramp, 4 * i, 1) for i in range(n)]).astype(np.uint8)


@pytest.mark.parametrize("format", ["webp", "avif"])
def test_real_images_come_back_as_pillow_reads_the_whole_file(tmp_path, format):
    images = photos()
    archive.append(tmp_path / "file", real(images, (2, 0, 1), format))
    archive.append(tmp_path / "file", real(images, (1, 1, 1), "raw"))
    lossy, raw = archive.read(tmp_path / "file")
    for image, read in zip(images, lossy.images(), strict=True):
        whole = io.BytesIO()
        Image.fromarray(image).save(whole, format, quality=80, **compressed.OPTIONS[format])
        np.testing.assert_array_equal(read, np.asarray(Image.open(whole).convert("RGB")))
    np.testing.assert_array_equal(raw.images(), images)
    labels = archive.labeled(raw, ["class 2", "class 0", "class 1"])[1]
    assert lossy.labels.tolist() == [0, 0, 2] and labels.tolist() == [1, 2, 0]


def test_set_in_an_archive_is_the_set_that_others_unpack(tmp_path, digits):
    made = gsdd.fit(
        jax.random.key(0),
        digits.train_images,
        digits.train_labels,
        codec=PIXELS.codec,
        progress=False,
        class_names=digits.class_names,
    )
    size = archive.append(tmp_path / "file", made)
    assert size == os.path.getsize(tmp_path / "file")
    zipfile.ZipFile(tmp_path / "file").extractall(tmp_path / "folder")
    for read in (archive.read(tmp_path / "file")[0], gsdd.load(tmp_path / "folder" / "0")):
        np.testing.assert_array_equal(read.images(), made.images())
    again = archive.append(tmp_path / "other", made)
    assert again == size and (tmp_path / "other").read_bytes() == (tmp_path / "file").read_bytes()


def test_summary_fills_its_budget_with_whole_images_and_never_more(tmp_path, digits):
    inputs = digits.train_images, digits.train_labels
    for spec in (
        RAW,
        SummarySpec(title="webp"),
        SummarySpec(title="avif", format="avif"),
        SummarySpec(title="pixels", codec=gsdd.Pixels(dtype="uint8")),
    ):
        part = summarize(
            jax.random.key(0), *inputs, spec=spec, class_names=digits.class_names, budget=1900, learner=LEARNER
        )
        assert 0.7 * 1900 < archive.append(tmp_path / spec.title, part) <= 1900
    # 1,900 bytes less names are 21 of 64 bytes, class by class in turn.
    assert archive.read(tmp_path / "raw")[0].counts == (6, 5, 5, 5)
    for spec, budget in ((RAW, 700), (PIXELS, 1300)):
        with pytest.raises(ValueError, match=f"^budget: {budget} bytes .* too few for {spec.title}"):
            summarize(
                jax.random.key(0), *inputs, spec=spec, class_names=digits.class_names, budget=budget, learner=LEARNER
            )


def test_herding_takes_the_row_that_brings_the_mean_nearest_each_time():
    rows = np.random.default_rng(0).normal(size=(7, 3))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    chosen: list[int] = []
    for _ in range(7):
        left = [i for i in range(7) if i not in chosen]
        chosen.append(min(left, key=lambda i: np.linalg.norm(unit.mean(0) - unit[[*chosen, i]].mean(0))))
    assert list(herded(rows)) == chosen


def test_training_continues_from_weights_and_never_sees_what_fills_up(digits):
    network = build_network(LEARNER.network, digits.image_shape, digits.num_classes)
    shared = dict(network=network, spec=LEARNER.training, augment=LEARNER.augment, whitening=LEARNER.whitening)
    params = network.init(jax.random.key(0))
    one = learning.pool(digits.train_images[:5] / np.float32(255), digits.train_labels[:5])
    poisoned = one._replace(images=jnp.where(jnp.arange(8)[:, None, None, None] < 5, one.images, jnp.nan))
    after = learning.train(jax.random.key(1), params, (one,), **shared)
    leaves = jax.tree.leaves(learning.train(jax.random.key(1), params, (poisoned,), **shared))
    for found, expected, before in zip(leaves, jax.tree.leaves(after), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert np.abs(np.asarray(found) - np.asarray(before)).max() > 0
    nothing = learning.train(jax.random.key(1), params, (one,), steps=0, **shared)
    jax.tree.map(np.testing.assert_array_equal, nothing, params)


def test_predictions_are_among_the_classes_that_were_seen(digits):
    network = build_network(LEARNER.network, digits.image_shape, digits.num_classes)
    params = network.init(jax.random.key(3))
    logits = np.asarray(
        network.apply(params, LEARNER.whitening(jnp.asarray(digits.test_images / 255.0, jnp.float32)))[0]
    )
    for seen in ([0, 1, 2, 3], [1, 3]):
        found = learning.predictions(
            params, digits.test_images, np.array(seen), network=network, whitening=LEARNER.whitening
        )
        assert found.tolist() == [seen[row[seen].argmax()] for row in logits]


def test_forgetting_and_average_of_a_hand_computed_matrix():
    nan = np.nan
    matrix = np.array([[0.9, nan, nan], [0.5, 0.8, nan], [0.6, 0.3, 1.0]])
    np.testing.assert_allclose(replay.average(matrix), [0.9, 0.65, 1.9 / 3])
    # Task 0 fell from 0.9 to 0.6, task 1 from 0.8 to 0.3.
    assert replay.forgetting(matrix) == pytest.approx((0.3 + 0.5) / 2)
    assert replay.forgetting(matrix[:1]) == 0


def test_order_is_that_of_the_field_and_tasks_divide_it():
    np.random.seed(3)
    expected = np.random.permutation(10)
    assert replay.class_order(3, 10).tolist() == expected.tolist()
    assert replay.split([3, 1, 0, 2], 2) == [(3, 1), (0, 2)]
    with pytest.raises(ValueError, match="tasks: expected a divisor of 10, the number of classes; found 4"):
        replay.split(expected, 4)
    with pytest.raises(ValueError, match="expected every class once, found class 1 again"):
        replay.split([0, 1, 1, 2], 2)


def run(digits, path, **start):
    tasks = replay.split([2, 0, 3, 1], 2)
    return replay.stream(jax.random.key(0), digits, tasks, path, spec=RAW, budget=2060, learner=LEARNER, **start)


def test_stream_that_was_killed_goes_on_to_the_same_bits_and_keeps_its_budget(tmp_path, digits):
    first, last = run(digits, tmp_path / "whole")
    assert first.sizes[0] < last.sizes[1] == os.path.getsize(tmp_path / "whole") <= 2060
    assert [part.class_names for part in archive.read(tmp_path / "whole")] == [("4", "3"), ("8", "1")]
    assert np.isnan(last.fresh).tolist() == [[False, True], [False, False]]
    begun = next(run(digits, tmp_path / "killed"))
    # Killed after the memory has grown and before the networks have learned from it.
    archive.append(tmp_path / "killed", archive.read(tmp_path / "whole")[1])
    (resumed,) = run(digits, tmp_path / "killed", start=begun)
    jax.tree.map(np.testing.assert_array_equal, resumed, last)
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    with pytest.raises(ValueError, match="expected 0 tasks, after which the stream goes on; found 2"):
        next(run(digits, tmp_path / "killed"))


def test_class_that_comes_again_is_refused_and_the_memory_stays(tmp_path, digits):
    archive.append(tmp_path / "memory", dataclasses.replace(real(photos(), (1, 2)), class_names=("1", "2")))
    before = (tmp_path / "memory").read_bytes()
    with pytest.raises(ValueError, match="class '1' is in the memory already, since task 0; each class comes once"):
        replay.remember(
            jax.random.key(0),
            tmp_path / "memory",
            digits.train_images[:4],
            np.zeros(4, int),
            class_names=["1"],
            spec=RAW,
            share=4000,
            learner=LEARNER,
        )
    assert (tmp_path / "memory").read_bytes() == before


def damaged(tmp_path, kind: str):
    """Writes a memory and damages it."""
    path = tmp_path / "memory"
    archive.append(path, real(photos(), (2, 1), "avif" if kind in ("sides", "boxes") else "webp"))
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as whole:
        header, arrays = (whole.read(f"0/{name}") for name in archive.REAL_FILES)
    if kind == "short":
        path.write_bytes(raw[: len(raw) // 2])
    elif kind == "bits":
        at = raw.index(arrays) + len(arrays) - 1
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 255]) + raw[at + 1 :])
    else:
        document = json.loads(header)
        document |= {
            "counts": {"counts": [2, 5]},
            "names": {"class_names": ["a"]},
            "key": {"run": "rm"},
            "empty": {"counts": [0, 0]},
            "wide": {"image_shape": [1 << 13, 1 << 13, 3]},
            "sides": {"image_shape": [13, 16, 3]},
            "huge": {"image_shape": [1 << 12, 1 << 12, 3], "format": "raw"},
        }.get(kind, {})
        files = {"0/images.json": json.dumps(document).encode(), "0/images.safetensors": arrays}
        files |= {"../evil": b""} if kind == "path" else {}
        if name := {"frame": "data", "boxes": "shared"}.get(kind):
            held = exchange.read(arrays).values({}, "")
            files["0/images.safetensors"] = exchange.serialize(held | {name: held[name] ^ 85})
        if kind == "inflated":
            files["0/images.safetensors"] = bytes(2 << 20)
        if kind == "bomb":
            files["0/images.json"] = b"[" * (4 << 20)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as whole:
            for name, content in files.items():
                whole.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("short", "damaged file"),
        ("bits", "damaged file .*CRC"),
        ("counts", r"part 0, sizes: expected uint16\[7\], found uint16\[3\]"),
        ("names", "part 0, counts: expected one per class, 1; found 2"),
        ("key", "part 0, run: unknown key"),
        ("empty", r"part 0, counts: expected 1 to 466033 images of \[12, 16, 3\], found 0"),
        ("wide", r"part 0, counts: expected 1 to 1 images of \[8192, 8192, 3\], found 3"),
        ("inflated", "part 0, images.safetensors: expected at most 1048576 bytes, found 2097152"),
        ("huge", r"part 0, data: expected uint8\[150994944\]"),
        ("path", "found ../evil without or beside them"),
        ("frame", "part 0, image 0: damaged"),
        ("boxes", "part 0, image 0: damaged"),
        ("sides", "part 0, image 0: expected 13 x 16 pixels, found 12 x 16"),
        ("bomb", "part 0, images.json: expected at most 1048576 bytes, found 4194304"),
    ],
)
def test_damaged_file_is_refused_by_name(tmp_path, kind, says):
    path = damaged(tmp_path, kind)
    with pytest.raises(ValueError, match=f"^{path}: .*{says}"):
        archive.read(path, most_bytes=1 << 20)


MEMORIES = "memories=[{title: real ones, format: raw}]"


def test_command_writes_table_and_plot_and_keeps_what_is_finished(tmp_path, capsys):
    config, out = ROOT / "configs" / "replay_digits.yaml", tmp_path / "out"
    arguments = ("--config", config, "--smoke", "--out", out, "tasks=2", "data.classes=['1','2','3','4']", MEMORIES)
    assert ends(command, *arguments) == 0
    result = json.loads((out / "result.json").read_text())
    assert [row["memory"] for row in result["rows"]] == ["real ones"]
    for row, path in zip(result["rows"], sorted(out.glob("*.zip")), strict=True):
        assert row["sizes"][-1] == path.stat().st_size <= 8000
    assert "| real ones |" in (out / "table.md").read_text() and (out / "plot.png").read_bytes()[1:4] == b"PNG"
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("8000*")}
    capsys.readouterr()
    assert ends(command, *arguments, "--quiet") == 0
    shown = capsys.readouterr()
    assert shown.out == (out / "table.md").read_text() and shown.err == ""
    assert before == {path.name: path.stat().st_mtime_ns for path in out.glob("8000*")}
    code = ends(command, *arguments, "training.steps=5")
    assert "holds an experiment with other settings" in refused(capsys, code)
