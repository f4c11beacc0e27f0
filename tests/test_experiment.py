import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from gsdd_jax import data
from gsdd_jax.codecs import PixelSpec
from gsdd_jax.fitting import FitSpec
from train import config as configs
from train import distill, evaluation, results, stages, tune
from train import experiment as experiments
from train.errors import ConfigError, UserError
from train.progress import Progress
from train.rundir import RunDir

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "digits.yaml"


def digits(*overrides: str) -> configs.RunConfig:
    return configs.load(CONFIG, overrides, smoke=True)


def test_keys_of_purposes_and_indices_differ():
    seen = {
        tuple(np.asarray(jax.random.key_data(jax.random.fold_in(experiments.key_of(seed, purpose), index))).tolist())
        for seed in (0, 1)
        for purpose in experiments.PURPOSES
        for index in (0, 1)
    }
    assert len(seen) == 2 * len(experiments.PURPOSES) * 2


@pytest.mark.parametrize("to", ["solid", "random"])
def test_noise_starts_refuse_a_start_that_looks_at_images(to):
    with pytest.raises(ConfigError, match=f"codec.start: fit.to={to} starts from noise; expected uniform, found"):
        experiments.prepare(digits(f"fit.to={to}"))


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
    made = experiments.prepare(experiments.known_data(config, whole), tune.hold_out(whole))
    assert made.config.data.sha256 == whole.fingerprint() != made.dataset.fingerprint()
    # So that whoever reads the data of the run gets them.
    assert data.load(made.config.data).fingerprint() == whole.fingerprint()


def test_pixels_start_from_real_images():
    config = dataclasses.replace(digits(), codec=PixelSpec(), fit=FitSpec(to="random"))
    with pytest.raises(ConfigError, match="fit.to: the pixel codec starts from real images"):
        experiments.prepare(config)


def test_solid_warm_up_ends_near_the_mean_color_and_random_is_not_fitted(tmp_path):
    quiet = Progress(quiet=True)
    drawn = {}
    for to, steps in (("solid", 60), ("random", 60)):
        experiment = experiments.prepare(digits(f"fit.to={to}", "codec.start=uniform", f"fit.steps={steps}"))
        targets = experiments.fitting.solid_targets(experiment.dataset.train_images, experiment.codec.num_images)
        with RunDir(tmp_path / to) as run:
            params = stages.fit_stage(experiment, experiment.codec, targets, run=run, progress=quiet, arm="main")
        drawn[to] = np.abs(np.asarray(experiment.codec.decode(params)) - np.asarray(targets)).mean()
    assert drawn["solid"] < 0.3 * drawn["random"]


def test_arms_leave_out_what_makes_no_sense():
    assert "random_real" not in experiments.arms(dataclasses.replace(digits(), ipc=0.5))
    assert experiments.arms(dataclasses.replace(digits(), codec=PixelSpec()))[0] == "distilled"
    assert "fit_only" not in experiments.arms(dataclasses.replace(digits(), codec=PixelSpec()))


def test_pixel_baseline_that_does_not_fit_names_the_way_out():
    with pytest.raises(ConfigError, match=r"baselines.pixel_codec: .*raise ipc .* or set baselines.pixel=false"):
        experiments.prepare(digits("ipc=0.5", "codec.images_per_class=1", "baselines.pixel_codec={name: pixel}"))


def test_table_says_not_run_instead_of_zero():
    entry = {"mean": 0.5, "std": 0.01, "n": 2, "steps": 500, "images_per_class": 3, "bytes_per_class": 252}
    result = {
        "codec": "gaussian",
        "dataset": "digits",
        "bytes_per_class": 256,
        "paper_ipc": 1,
        "objective": "distribution",
        "device": "cpu",
        "accuracy": entry,
        "pixel": None,
    }
    text = results.table(result)
    assert "| **gaussian, distilled** | 3 | 252 | 50.0 ± 1.0 | 2 | 500 |" in text
    assert "| pixels, distilled | | | not run | | |" in text


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


def test_one_class_is_refused_with_its_name():
    with pytest.raises(ConfigError, match="data: toy has one class, 'a'; expected at least 2"):
        experiments.prepare(digits(), toy(1))


@pytest.mark.parametrize("subtask", [0, 1])
def test_subtask_of_one_class_is_refused_at_the_start_of_any(subtask):
    with pytest.raises(ConfigError, match="subtasks: expected at most 1 for the 3 classes .*subtask 0 .* class, 'a'"):
        experiments.prepare(digits("subtasks=2", f"subtask={subtask}"), toy(3))
