"""The configs that are shipped, on the command line: each loads, fits its data and its budget, and runs."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import start

from gsdd_jax import codecs, data, labels, storage
from train import audit, experiment, federated, replay, search
from train import config as configs
from train.rundir import read_metrics

ROOT = Path(__file__).resolve().parent.parent
# By the first word of their names: what they are read as; all others are runs.
USES = {
    "audit": audit.AuditConfig,
    "federated": federated.FederatedConfig,
    "replay": replay.ReplayConfig,
    "search": search.SearchConfig,
}
EVERY = sorted((ROOT / "configs").glob("*.yaml"))
CONFIGS = [path for path in EVERY if path.stem.split("_")[0] not in USES]


@pytest.fixture(autouse=True)
def once(monkeypatch):
    """Reads data once."""
    monkeypatch.setattr(data, "load", loaded)


loaded = functools.cache(data.load)


@functools.cache
def smoke_of(path):
    return configs.load(path, smoke=True)


each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@each_config
def test_config_loads_and_its_smoke_run_is_small(path):
    full, smoke = configs.load(path), smoke_of(path)
    assert full.name == path.stem
    # What a smoke run shows must be the experiment of this name.
    for config in (full, smoke):
        assert (config.name, config.seed, config.ipc) == (path.stem, full.seed, full.ipc)
        # The digits stand in for what each user has to prepare, so that the smoke run works everywhere.
        assert config.data.source in (full.data.source, "digits", "moving_digits", "solid_digits")
        assert (config.codec.name, config.objective.name) == (full.codec.name, full.objective.name)
    assert 1 <= smoke.distill.iterations <= 20 and smoke.distill.iterations <= full.distill.iterations
    assert smoke.distill.checkpoint_every <= smoke.distill.iterations
    assert smoke.fit.steps <= 100
    if smoke.objective.name == "trajectory":
        assert smoke.objective.syn_steps <= 4 and smoke.experts.count * smoke.objective.last_epoch <= 4
    else:
        assert smoke.objective.batch_real <= 16
    assert 1 <= smoke.evaluate.steps * smoke.evaluate.seeds <= 200
    assert not smoke.baselines.full_data or (smoke.baselines.full_data_steps or smoke.evaluate.steps) <= 100


@pytest.mark.parametrize("path", [path for path in EVERY if path not in CONFIGS], ids=lambda path: path.stem)
def test_config_of_a_use_loads_and_its_smoke_run_is_small(path):
    full, smoke = (configs.load(path, smoke=small, cls=USES[path.stem.split("_")[0]]) for small in (False, True))
    assert full.name == smoke.name == path.stem and len(full.seeds) >= 3
    assert len(smoke.seeds) == 1 and smoke.training.steps <= 10


def with_its_data(config, request):
    """Points a config to its data where they are, or skips."""
    if "digits" in config.data.source:
        return config
    if config.data.source == "tfds":
        pytest.importorskip("tensorflow_datasets")
    if not config.data.path:
        pytest.skip(f"needs a prepared copy of {config.data.name}")
    folder = Path(config.data.path)
    if not folder.exists():
        folder = request.getfixturevalue("data_root") / config.data.path.removeprefix("../shared/data/")
    if not folder.exists():
        pytest.skip(f"no data at {folder}")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(folder)))


@each_config
def test_config_fits_its_data_and_uses_its_budget(path, request):
    prepared = experiment.prepare(with_its_data(smoke_of(path), request))
    full, shape = configs.load(path), prepared.dataset.image_shape
    if full.data.resolution:
        shape = (*shape[:-3], full.data.resolution, full.data.resolution, shape[-1])
    available = storage.budget_bytes(full.ipc, shape)
    classes = prepared.dataset.num_classes
    if full.subtasks > 1 and full.data.source != "digits":
        # The digits stand in for more classes than they have.
        classes = {"imagenet2012": 1000, "": 200}[full.data.name] // full.subtasks
    codec = codecs.make(
        full.codec,
        image_shape=shape,
        num_classes=classes,
        bytes_per_class=available,
        label_bytes=labels.nbytes(full.labels, 1, classes),
    )
    images = jax.ShapeDtypeStruct((codec.num_images, *shape), np.float32)
    spent = codec.nbytes(jax.eval_shape(codec.init, jax.random.key(0), images))
    spent += labels.nbytes(full.labels, codec.num_images, classes)
    # D3's own account holds labels of all classes, ours of those of the subtask.
    least = 0.8 if path.stem.startswith("d3_imagenet64") else 0.9
    assert least * available * classes < spent <= available * classes


def needs_no_data(path):
    """Tells whether the digits stand in for the data of a config, which takes a few seconds."""
    return "digits" in smoke_of(path).data.source != configs.load(path).data.source


def parts(config):
    return {config.objective.name, config.codec.name, config.evaluate.protocol}


def smoke_runs():
    """One config for each part that no other shows: an objective, a codec, or a protocol of evaluation."""
    # The demo is started in test_cli.py.
    shown, runs = parts(smoke_of(ROOT / "configs" / "digits.yaml")), []
    quick = [path for path in CONFIGS if needs_no_data(path)]
    while not parts(smoke_of(best := max(quick, key=lambda path: len(parts(smoke_of(path)) - shown)))) <= shown:
        runs.append(best)
        shown |= parts(smoke_of(best))
    return [pytest.param(path, id=path.stem, marks=[] if path in runs else [pytest.mark.slow]) for path in CONFIGS]


def test_demo_and_quick_runs_show_every_part_of_the_configs():
    runs = [ROOT / "configs" / "digits.yaml", *(run.values[0] for run in smoke_runs() if not run.marks)]
    shown = [parts(smoke_of(path)) for path in runs]
    assert set().union(*shown) == set().union(*(parts(smoke_of(path)) for path in CONFIGS))


@pytest.mark.parametrize("path", smoke_runs())
def test_smoke_run_of_every_config_succeeds(path, request, tmp_path):
    config = with_its_data(smoke_of(path), request)
    where = [f"data.path={config.data.path}"] if config.data.path else []
    if not request.node.get_closest_marker("slow"):
        # Those of the demo, which runs in test_cli.py.
        where += [f"baselines.{name}=false" for name in ("fit_only", "pixel", "random_real", "full_data")]
    assert start(path, tmp_path / "run", "--smoke", *where) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["accuracy"]["n"] >= 2
    logged = [entry for entry in read_metrics(tmp_path / "run") if entry["phase"] == "main-distill"]
    assert logged and all(np.isfinite(entry["mmd"]) for entry in logged if config.mmd.weight)
