from pathlib import Path

import numpy as np
import pytest

from gsdd_jax import data
from gsdd_jax.codecs import PixelSpec
from train import config as configs
from train import distill, evaluation, stages
from train import experiment as experiments
from train.errors import ConfigError, UserError
from train.progress import Progress
from train.rundir import RunDir

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "digits.yaml"


def digits(*overrides: str) -> configs.RunConfig:
    return configs.load(CONFIG, overrides, smoke=True)


def test_config_holds_what_follows_from_data_and_budget():
    loops = ["objective={name: gradient, inner_loop: 3}", "ipc=10", "codec.num_points=0"]
    made = experiments.prepare(digits(*loops))
    assert (made.config.objective.outer_loop, made.config.objective.inner_loop) == (10, 3)
    assert (made.asked.objective.outer_loop, made.asked.codec.num_points) == (0, 0)
    assert made.config.codec.num_points == made.codec.spec.num_points > 0
    # 2,560 bytes hold 319 digits of 8 bytes beside a palette; no class has so many.
    smallest = int(np.bincount(made.dataset.train_labels).min())
    chosen = made.config.baselines.pixel_codec.images_per_class, experiments.random_codec(made).images_per_class
    assert chosen == (smallest, smallest)
    pixels = experiments.prepare(digits(*loops, "baselines.pixel_codec={}"))
    assert pixels.config.baselines.pixel_codec == PixelSpec(images_per_class=10)
    assert made.config.data.sha256 == made.dataset.fingerprint()
    assert (made.config.data.resolution, made.config.data.channels) == (8, 1)
    # What a run stores leads to itself.
    assert experiments.prepare(made.config).config == made.config


def test_data_of_another_content_are_refused_with_both_hashes():
    found = data.load(digits().data).fingerprint()
    assert data.load(digits(f"data.sha256={found}").data).fingerprint() == found
    message = f"data: other images.* than data.sha256 names: SHA-256 {found[:12]}..., expected {'0' * 12}..."
    with pytest.raises(ValueError, match=message):
        experiments.prepare(digits(f"data.sha256='{'0' * 64}'"))
    with pytest.raises(ValueError, match=f"{found}..., expected {found[:12]}{'0' * 52}..."):
        experiments.prepare(digits(f"data.sha256='{found[:12]}{'0' * 52}'"))
    with pytest.raises(ConfigError, match="data.sha256: expected 64 hexadecimal digits or nothing, found 'abc'"):
        digits("data.sha256=abc")


def test_run_on_held_out_images_names_the_data_that_they_are_of():
    config = digits()
    whole = data.load(config.data)
    made = experiments.prepare(experiments.known_data(config, whole), experiments.hold_out(whole))
    assert made.config.data.sha256 == whole.fingerprint() != made.dataset.fingerprint()
    # So that whoever reads the data of the run gets them.
    assert data.load(made.config.data).fingerprint() == whole.fingerprint()


def test_solid_warm_up_ends_near_the_mean_color_and_random_is_not_fitted(tmp_path):
    quiet = Progress(quiet=True)
    drawn = {}
    for to, steps in (("solid", 40), ("random", 40)):
        experiment = experiments.prepare(digits(f"fit.to={to}", "codec.start=uniform", f"fit.steps={steps}"))
        targets = experiments.fitting.solid_targets(experiment.dataset.train_images, experiment.codec.num_images)
        with RunDir(tmp_path / to) as run:
            params = stages.fit_stage(experiment, targets, run=run, progress=quiet)
        drawn[to] = np.abs(np.asarray(experiment.codec.decode(params)) - np.asarray(targets)).mean()
    assert drawn["solid"] < 0.3 * drawn["random"]


def test_damaged_evaluation_is_named_with_the_way_out(tmp_path):
    experiment = experiments.prepare(digits())
    with RunDir(tmp_path / "run") as run:
        (run.path / "evaluation.json").write_text("{half")
        with pytest.raises(UserError, match=r"evaluation.json is damaged .*: delete it and run the same command again"):
            evaluation.evaluate_stage(experiment, "random_real", None, run=run, progress=Progress(quiet=True))


def toy(classes: int, blue: int = 7) -> data.Dataset:
    """Images of 8x8 whose last channel is constant."""
    images = np.random.default_rng(0).integers(0, 256, (6 * classes, 8, 8, 3), dtype=np.uint8)
    images[..., 2] = blue
    names = tuple("abcdefghij"[:classes])
    return data.Dataset(
        "toy", images, np.arange(len(images)) % classes, images, np.arange(len(images)) % classes, names
    )


@pytest.mark.parametrize("kind", ["none", "zca", "meanstd"])
def test_constant_channel_leaves_normalization_constants_that_divide(kind):
    experiment = experiments.prepare(
        digits(f"whiten={kind}", "baselines.pixel=false", "evaluate.overlap=allow"), toy(2)
    )
    meta = distill._meta(experiment, {"versions": {}, "commit": ""})
    images = experiment.dataset.train_images[..., :2] / 255
    np.testing.assert_allclose(meta["channel_std"], [*images.std((0, 1, 2)), 1], rtol=1e-5)
    np.testing.assert_allclose(meta["channel_mean"], [*images.mean((0, 1, 2)), 7 / 255], rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "classes", "message"),
    [
        (["fit.to=solid"], 0, "codec.start: fit.to=solid starts from noise; expected uniform, found"),
        (["codec={name: pixel}", "fit.to=random"], 0, "fit.to: the pixel codec starts from real images"),
        (
            ["ipc=0.5", "codec.images_per_class=1", "baselines.pixel_codec={name: pixel}"],
            0,
            r"baselines.pixel_codec: .*raise ipc .* or set baselines.pixel=false",
        ),
        ([], 1, "data: toy has one class, 'a'; expected at least 2"),
        (["subtasks=2", "subtask=0"], 3, "subtasks: expected at most 1 for the 3 classes .*subtask 0 .* class, 'a'"),
        (["subtasks=2", "subtask=1"], 3, "subtasks: expected at most 1 for the 3 classes .*subtask 0 .* class, 'a'"),
    ],
)
def test_settings_that_fit_no_data_and_no_budget_are_refused(overrides, classes, message):
    with pytest.raises(ConfigError, match=message):
        experiments.prepare(digits(*overrides), *([toy(classes)] if classes else []))
