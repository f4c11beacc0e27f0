import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from gsdd_jax.codecs import PixelSpec
from gsdd_jax.fit import FitSpec
from train import config as configs
from train import evaluation, results, stages
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
    with pytest.raises(ConfigError, match=f"codec.start: fit.to={to} starts from noise; expected uniform or xavier"):
        experiments.prepare(digits(f"fit.to={to}"))


def test_pixels_start_from_real_images():
    config = dataclasses.replace(digits(), codec=PixelSpec(), fit=FitSpec(to="random"))
    with pytest.raises(ConfigError, match="fit.to: the pixel codec starts from real images"):
        experiments.prepare(config)


def test_solid_warm_up_ends_near_the_mean_colour_and_random_is_not_fitted(tmp_path):
    quiet = Progress(quiet=True)
    drawn = {}
    for to, steps in (("solid", 60), ("random", 60)):
        experiment = experiments.prepare(digits(f"fit.to={to}", "codec.start=uniform", f"fit.steps={steps}"))
        targets = experiments.fit.solid_targets(experiment.dataset.train_images, experiment.codec.num_images)
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
        experiments.prepare(digits("ipc=0.5", "codec.gpc=1"))


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
