"""train.evaluate across networks and resolutions, and DD-Ranking: protocol, table, files of results, refusals."""

import dataclasses
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import ends, refused

from gsdd_jax import codecs, data, ddranking, synset
from gsdd_jax import evaluation as library
from gsdd_jax.evaluation import EvalSpec
from train import evaluate

CONFIG = """
name: tiny
ipc: 1
data: {source: digits, per_class: 12, test_limit: 40}
network: {depth: 1, width: 8}
augment: {strategy: crop}
codec: {name: pixel}
distill: {iterations: 0}
evaluate: {steps: 3, batch: 16, lr: 0.1, seeds: 2, weight_decay: 0.25}
baselines: {full_data_steps: 7, full_data_seeds: 1}
"""
DIGITS = data.load(data.DataSpec(per_class=12, test_limit=40))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory as train.evaluate reads it: config and exported set, the first image of every class."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    first = [int(np.flatnonzero(DIGITS.train_labels == label)[0]) for label in range(10)]
    images = jnp.asarray(DIGITS.train_images[first], jnp.float32) / 255
    codec = codecs.make(codecs.PixelSpec(), image_shape=(8, 8, 1), num_classes=10, bytes_per_class=256)
    exported = synset.SynSet(codec, codec.init(jax.random.key(0), images), 256, DIGITS.class_names)
    (path / synset.EXPORT).mkdir(parents=True)
    exported.save(path / synset.EXPORT)
    (path / "config.yaml").write_text(CONFIG)
    return path


def start(run, *arguments) -> int:
    return ends(evaluate, "--run", run, "--quiet", *arguments)


@pytest.fixture
def mock(monkeypatch):
    """Replaces training: calls are recorded, accuracies are those of `mock.answers` in turn, or 0.5."""
    mock = types.SimpleNamespace(calls=[], answers=[])

    def fake(keys, images, labels, test_images, test_labels, **settings):
        mock.calls.append(
            types.SimpleNamespace(keys=keys, images=images, labels=labels, test_images=test_images, **settings)
        )
        answer = mock.answers.pop(0) if mock.answers else 0.5
        if isinstance(answer, BaseException):
            raise answer
        hits = np.zeros((len(keys), 10), np.int32)
        return library.Tested(np.full(len(keys), answer, np.float32), hits)

    monkeypatch.setattr(library, "evaluate_networks", fake)
    return mock


# Across networks


def test_table_and_average_of_several_networks_leave_out_the_maker(run, mock, tmp_path, capsys):
    mock.answers, out = [0.25, 0.75, 0.5, 0.5, 1.0, 1.0], tmp_path / "cross.json"
    assert start(run, "--resolution", "32", "--networks", "vgg11", "vit", "convnet", "--out", out) == 0
    text, written = capsys.readouterr().out, json.loads(out.read_text())
    assert "networks trained and tested at 32x32 px, recipe config" in text
    assert "\nEvery network: sgd, schedule step, batches of 16, DSA crop, no CutMix.\n" in text
    assert "| vgg11 | 50.0 ± 35.4 | 2 | 0.1 | 3 |" in text and "| vit | 50.0 ± 0.0 |" in text
    assert "| convnet (made the set) | 100.0 " in text
    assert "| average of those that did not make the set | 50.0 |" in text
    assert list(written["networks"]) == ["vgg11", "vit", "convnet"]
    for entry in written["networks"].values():
        assert {"mean", "std"} <= entry.keys() and (entry["n"], entry["seeds"]) == (2, [0, 1])
    assert written["cross_architecture"] == {"mean": 0.5, "networks": ["vgg11", "vit"]}
    assert written["accuracy"]["mean"] == 1 and "environment" in written
    assert {"recipe", "set_sha256", "data_sha256"} <= written["settings"].keys()


def test_recipes_set_the_training_of_each_network_and_overrides_apply_on_top(run, mock):
    def specs(*arguments) -> list[EvalSpec]:
        mock.calls.clear()
        assert start(run, "--networks", "alexnet", "convnet", *arguments) == 0
        return [mock.calls[0].spec, mock.calls[-1].spec]

    own = EvalSpec(steps=3, batch=16, lr=0.1, seeds=2, weight_decay=0.25)
    assert specs() == [own] * 2
    adam = dataclasses.replace(own, optimizer="adam", schedule="cosine", lr=1e-3, steps=9, seeds=3)
    assert specs("--recipe", "gsdd", "evaluate.steps=9") == [adam, dataclasses.replace(adam, lr=1e-2)]
    glad = EvalSpec(lr=0.5, schedule="warmup_cosine", ema=0.995, seeds=1)
    assert specs("evaluate.lr=0.5", "--recipe", "glad", "evaluate.seeds=1") == [glad] * 2
    assert specs("--recipe", "glad", "evaluate={steps: 4}") == [EvalSpec(steps=4)] * 2


def test_networks_are_trained_side_by_side_with_the_keys_of_their_seeds(run, mock):
    assert start(run, "evaluate.seeds=5") == 0
    single = [jax.random.key_data(call.keys).tolist()[0] for call in mock.calls]
    assert len(single) == 5
    mock.calls.clear()
    assert start(run, "--first-seed", "1", "evaluate.seeds=4", "evaluate.parallel=3") == 0
    assert [len(call.keys) for call in mock.calls] == [3, 1]
    assert np.concatenate([jax.random.key_data(call.keys) for call in mock.calls]).tolist() == single[1:]


# Across resolutions


def test_resolution_renders_the_set_and_reads_the_data_at_that_size(run, mock, tmp_path):
    out = tmp_path / "large.json"
    assert start(run, "--resolution", "16", "network.depth=4", "--out", out) == 0
    call = mock.calls[0]
    assert call.images.shape == (10, 16, 16, 1) and call.test_images.shape == (40, 16, 16, 1)
    larger = data.load(data.DataSpec(per_class=12, test_limit=40, resolution=16))
    np.testing.assert_array_equal(call.test_images, larger.test_images)
    assert {"conv0", "conv1", "conv2", "conv3"} <= set(jax.eval_shape(call.network.init, jax.random.key(0)))
    written = json.loads(out.read_text())
    assert (written["native_size"], written["settings"]["size"]) == ([8, 8], [16, 16])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--networks", "lenet"],
            "--networks: unknown network 'lenet'; allowed: convnet, convnet3d, alexnet, vgg11, resnet18, v",
        ),
        (["--networks", "evaluate.seeds=1"], "--networks: expected one or more of convnet, convnet3d, alexnet"),
        (["--resolution", "-1"], "--resolution: expected an integer of at least 0, found -1"),
        (["--networks", "vit", "--ddranking"], "--networks: --ddranking is computed for the run's own network"),
        (["--out", "/absent/place/x.json"], "--out: no such directory: /absent/place"),
        (["--networks", "alexnet", "vgg11"], "network.name: vgg11 does not fit 8x8 px images"),
        (["--resolution", "16", "network.depth=5"], "network.depth: 5 blocks halve 16x16 px images below one pixel"),
        (["--recipe", "glad", "evaluate.warmup_steps=5"], "evaluate.warmup_steps: 5, must be 0 with schedule"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line_before_any_data_are_read(run, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(data, "load", lambda spec: pytest.fail("read data"))
    assert message in refused(capsys, start(run, *arguments))


# The file of results


def test_finished_networks_survive_a_crash_and_are_not_trained_again(run, mock, tmp_path, capsys):
    out = tmp_path / "cross.json"
    command = ["--resolution", "32", "--out", out, "--networks", "alexnet", "vgg11", "resnet18"]
    mock.answers = [0.25, 0.25, KeyboardInterrupt()]
    assert start(run, *command) == 130
    assert list(json.loads(out.read_text())["networks"]) == ["alexnet"]
    mock.answers, count = [0.5, 0.5, MemoryError()], len(mock.calls)
    with pytest.raises(MemoryError):
        start(run, *command)
    assert len(mock.calls) - count == 3
    assert list(json.loads(out.read_text())["networks"]) == ["alexnet", "vgg11"]
    mock.answers, count = [0.75, 0.75], len(mock.calls)
    assert start(run, *command) == 0
    assert len(mock.calls) - count == 2
    written = json.loads(out.read_text())
    assert {name: entry["mean"] for name, entry in written["networks"].items()} == {
        "alexnet": 0.25, "vgg11": 0.5, "resnet18": 0.75,
    }  # fmt: skip
    assert written["cross_architecture"]["mean"] == 0.5
    # More networks go into the same file, and `parallel` changes no number.
    assert start(run, *command, "vit", "evaluate.parallel=2") == 0
    assert list(json.loads(out.read_text())["networks"]) == ["alexnet", "vgg11", "resnet18", "vit"]


def test_file_of_other_settings_set_or_size_is_refused_and_kept(run, mock, tmp_path, capsys):
    out = tmp_path / "own.json"
    assert start(run, "--out", out) == 0
    before, count = out.read_bytes(), len(mock.calls)
    capsys.readouterr()
    message = refused(capsys, start(run, "--out", out, "evaluate.steps=4", "augment.strategy=none"))
    assert f"{out} holds results with other settings: evaluate.steps is 3 there and 4 now; " in message
    assert 'augment.strategy is "crop" there and "none" now; choose another file or delete it' in message
    message = refused(capsys, start(run, "--out", out, "--resolution", "16"))
    assert "size is [8, 8] there and [16, 16] now; " in message and "data_sha256 is " in message
    assert out.read_bytes() == before and len(mock.calls) == count
    for text in ("{half", "[1]", "{}"):
        out.write_text(text)
        assert f"{out} is damaged, or of another version" in refused(capsys, start(run, "--out", out))


def test_diverged_networks_are_reported_and_the_others_are_tested(run, mock, tmp_path, capsys):
    out = tmp_path / "cross.json"
    mock.answers = [0.5, math.nan, 0.75, 0.75]
    code = start(run, "--resolution", "32", "--networks", "vgg11", "vit", "--out", out)
    captured = capsys.readouterr()
    assert code == 2 and "| vgg11 | diverged | 2 |" in captured.out and "| vit | 75.0" in captured.out
    line = "error: test vgg11: network 1 diverged at a learning rate of 0.1; lower evaluate.lr or choose another "
    assert captured.err == line + "--recipe\n"
    written = json.loads(out.read_text())
    assert list(written["networks"]) == ["vit"] and written["cross_architecture"] is None
    assert start(run, "--resolution", "32", "--networks", "vgg11", "vit", "--out", out) == 0
    assert "| vgg11 | 50.0 ± 0.0 | 2 |" in capsys.readouterr().out


# DD-Ranking


def test_ranking_of_digits_gives_scores_from_its_own_accuracies(run, mock, tmp_path, capsys):
    out, mock.answers = tmp_path / "ranking.json", [0.9, 0.7, *[0.1] * 5, 0.4, 0.6, *[0.1] * 5, 0.3]
    assert start(run, "--ddranking", "evaluate.seeds=1", "--out", out) == 0
    written, text = json.loads(out.read_text()), capsys.readouterr().out
    arms = written["ddranking"]
    mean = {name: entry["mean"] for name, entry in arms.items()}
    assert list(mean.values()) == pytest.approx([0.9, 0.7, 0.4, 0.6, 0.3])
    assert {name: (entry["images"], entry["steps"]) for name, entry in arms.items()} == {
        "full_data": (120, 7), "distilled": (10, 3), "random_real": (10, 3),
        "distilled_plain": (10, 3), "random_real_plain": (10, 3),
    }  # fmt: skip
    assert written["scores"]["lrs"] == ddranking.label_robust_score(
        full=mean["full_data"], syn_hard=mean["distilled"], syn=mean["distilled"], random=mean["random_real"]
    )
    assert written["scores"]["ars"] == ddranking.augmentation_robust_score(
        syn=mean["distilled"],
        random=mean["random_real"],
        syn_plain=mean["distilled_plain"],
        random_plain=mean["random_real_plain"],
    )
    assert f"LRS {100 * written['scores']['lrs']:.1f} %, ARS {100 * written['scores']['ars']:.1f} %" in text
    # Nothing is left to do.
    assert start(run, "--ddranking", "evaluate.seeds=1", "--out", out, "evaluate.parallel=7") == 0
    assert capsys.readouterr().out == text


def test_ranking_chooses_the_rate_of_random_images_on_held_out_training_images(run, mock):
    # Of five rates the third does best with augmentation, the last one without.
    mock.answers = [0.9] + [0.5] * 2 + [0.1, 0.2, 0.8, 0.3, 0.4] + [0.6] * 2 + [0.5] * 2 + [0.1] * 4 + [0.2] + [0.6] * 2
    assert start(run, "--ddranking", "evaluate.cutmix=0.5") == 0
    assert [call.spec.cutmix for call in mock.calls] == [0.5] * 10 + [0.0] * 9
    assert [call.augment.strategy for call in mock.calls] == ["crop"] * 10 + ["none"] * 9
    assert [(call.spec.steps, call.lr) for call in mock.calls[3:8] if (call.lr)] == [
        (3, lr) for lr in (1e-3, 5e-3, 1e-2, 5e-2, 1e-1)
    ]  # fmt: skip
    assert [call.spec.lr for call in (*mock.calls[:3], *mock.calls[8:12], *mock.calls[17:])] == (
        [0.1] * 3 + [0.01] * 2 + [0.1] * 2 + [0.1] * 2
    )
    tests = {np.asarray(image).tobytes() for image in DIGITS.test_images}
    held_out = {np.asarray(image).tobytes() for call in mock.calls[3:8] for image in call.test_images}
    trained = {np.asarray(image).tobytes() for call in mock.calls[3:10] for image in call.images}
    assert len(held_out) == 10 and not held_out & tests and not held_out & trained
    train = {np.asarray(image).tobytes() for image in DIGITS.train_images}
    assert held_out | trained <= train
    # Random images are drawn anew for every network, one of each class.
    assert not np.array_equal(mock.calls[8].images, mock.calls[9].images)
    assert all(call.labels.tolist() == list(range(10)) for call in mock.calls[8:10])


def test_ranking_without_room_for_random_images_or_with_a_diverging_arm_is_one_line(run, mock, capsys):
    assert "ipc: --ddranking compares with random images, at least 1 per class; found 0.5" in refused(
        capsys, start(run, "--ddranking", "ipc=0.5")
    )
    assert "has 11 training images, ipc needs 12" in refused(capsys, start(run, "--ddranking", "ipc=12"))
    mock.answers = [math.nan]
    assert "test full_data: network 0 diverged at a learning rate of 0.1; lower" in refused(
        capsys, start(run, "--ddranking")
    )
