"""Test images that are training images, classes without any, and classes of uneven size: refused, or said."""

import json

import numpy as np
import pytest
from command_line import ROOT, refused, start
from PIL import Image

from gsdd_jax import data
from gsdd_jax.data.overlap import found_in
from train import config as configs
from train import evaluation, report, results, testset
from train import experiment as experiments
from train.errors import ConfigError
from train.progress import Progress
from train.rundir import RunDir

DIGITS = data.load(data.DataSpec(per_class=8, test_limit=20))
SPEC = configs.EvaluateConfig()


def with_training_images(count: int) -> data.Dataset:
    """Digits, of whose 20 test images the last ones are training images."""
    test, labels = DIGITS.test_images.copy(), DIGITS.test_labels.copy()
    test[20 - count :], labels[20 - count :] = DIGITS.train_images[:count], DIGITS.train_labels[:count]
    return DIGITS._replace(test_images=test, test_labels=labels)


def test_images_are_found_by_all_their_pixels():
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 2, 3), np.uint8)
    others = np.concatenate([images[4:], images[:1, :, ::-1], images[1:2]])
    assert found_in(images, others).tolist() == [False, True, False, False, True, True]
    changed = images.copy()
    changed[:, 2, 1, 2] ^= 1
    assert not found_in(changed, images).any() and found_in(images[:0], others).shape == (0,)


def test_half_of_the_test_images_from_training_is_refused_and_fewer_are_counted():
    for count in (0, 9):
        assert testset.check(SPEC, with_training_images(count))["test_images_also_in_training"] == count
    with pytest.raises(ConfigError, match=r"^data.test_split: 10 of the 20 test images of digits are training images"):
        testset.check(SPEC, with_training_images(10))
    allowed = configs.EvaluateConfig(overlap="allow")
    assert testset.check(allowed, with_training_images(20))["test_images_also_in_training"] == 20


ROW = {"mean": 0.9, "std": 0.0, "n": 1, "steps": 5, "images_per_class": 1, "bytes_per_class": 256, "balanced": 0.5}
RESULT = {
    "name": "toy", "codec": "pixel", "dataset": "toy", "bytes_per_class": 256, "paper_ipc": 1, "objective": "gradient",
    "device": "cpu", "accuracy": ROW, "class_names": ["cat", "<b>", "emu"], "test_images_per_class": [9, 0, 1],
    "test_images_also_in_training": 1,
}  # fmt: skip


def test_table_and_report_say_it_and_average_over_uneven_classes(tmp_path):
    text = results.table(RESULT)
    assert "| steps each | mean over classes, % |\n|---|---:|---:|---:|---:|---:|---:|" in text
    assert "| **pixel, distilled** | 1 | 256 | 90.0 | 1 | 5 | 50.0 |" in text
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {8}
    assert text.endswith(
        "|\n\n1 of the 10 test images are training images, pixel for pixel.\n"
        "\nNo test images of <b>: accuracies are of the other classes.\n"
    )
    page = report.write(tmp_path, RESULT, {}).read_text()
    assert "mean over classes 50.0 %" in page and "No test images of &lt;b&gt;: accuracies" in page
    assert "1 of the 10 test images are training images" in page
    # Even classes, and results of before, have the table that they had.
    before = {key: value for key, value in RESULT.items() if not key.startswith(("test_", "class_"))}
    for other in (before, RESULT | {"test_images_per_class": [5, 4, 5], "test_images_also_in_training": 0}):
        text = results.table(other)
        assert "over classes" not in text and "test images" not in text
        assert "over classes" not in report.write(tmp_path, other, {}).read_text()


def test_networks_tested_before_classes_were_counted_keep_their_row(tmp_path):
    config = configs.load(ROOT / "configs" / "digits.yaml", ["evaluate.seeds=2"], smoke=True)
    experiment = experiments.prepare(config, DIGITS)
    entry = {"accuracies": {"0": 0.25, "1": 0.75}, "seconds": 1.0, "images": 10}
    quiet = {"progress": Progress(quiet=True)}
    with RunDir(tmp_path / "run") as run:
        for hits, found in (({}, None), ({"0": [1] * 10}, None), ({"0": [1] * 10, "1": [0] * 5 + [2] * 5}, 0.5)):
            (run.path / "evaluation.json").write_text(json.dumps({"distilled": entry | {"hits": hits}}))
            row = evaluation.evaluate_stage(experiment, "distilled", None, run=run, **quiet)
            assert row["mean"] == 0.5 and row.get("balanced") == found
    # Two test images of each class.
    assert row["per_class"] == [0.25] * 5 + [0.75] * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of four images; in test/, the first of each is a training image."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for split in ("train", "test"):
            (root / split / name).mkdir(parents=True)
        for i, pixels in enumerate(rng.integers(0, 256, (7, 8, 8, 3), np.uint8)):
            for split, there in (("train", i < 4), ("test", i == 0 or i >= 4)):
                if there:
                    Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def test_the_training_split_as_test_split_is_one_line_before_anything_is_computed(folder, tmp_path, capsys):
    config, out = ROOT / "configs" / "digits.yaml", tmp_path / "run"
    of_folder = [
        "data={source: folder, path: " + str(folder) + "}",
        "baselines.pixel=false",
        "codec.images_per_class=1",
    ]
    for more in (["--dry-run"], []):
        line = refused(capsys, start(config, out, "--smoke", *more, *of_folder, "data.test_split=train"))
        assert "data.test_split: 8 of the 8 test images" in line and "evaluate.overlap=allow" in line
        assert not out.exists()
    experiment = experiments.prepare(configs.load(config, of_folder, smoke=True))
    assert experiment.test_set["test_images_also_in_training"] == 2
